"""The one decoder, in PyTorch: trained, exported to devices and shipped from this definition.

A model is a list of stages: embed, block 0 … block L-1, head. Each has two phases: `prefill` runs S
tokens from an empty cache, `decode` runs one token against a cache of C rows and returns only the
new rows. Training is `forward`, which is prefill without the cache.

Shape suffixes: B batch, S tokens of a sequence, C cached rows, D model width, H query heads,
K key/value heads, G = H/K query heads per key/value head, d head width, v value head width,
R rotary dims, L latent rank, F inner FFN width, V vocabulary, n series terms.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.config import LayerShape, SLMConfig
from search_spaces.operators import OPERATORS

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (S, R/2); of width 0 when positions are learned."""
Cache = tuple[Tensor, ...]
"""Rows of one effective layer: (k_BCKd, v_BCKd), or for MLA (latent_BCL, k_rope_BCR)."""


def attend(q_BHSd: Tensor, k_BKSd: Tensor, v_BKSv: Tensor) -> Tensor:
    """Causal attention, (B, H, S, v)."""
    return F.scaled_dot_product_attention(q_BHSd, k_BKSd, v_BKSv, is_causal=True, enable_gqa=q_BHSd.shape[1] != k_BKSd.shape[1])


def rope_table(config: SLMConfig) -> Tensor:
    """cos and sin of every position side by side, (context, R), in float32 from float64 angles.

    angle(p, j) = p * theta^(-2j/R) (Su et al., arXiv 2104.09864).
    """
    half = (config.rotary_dim or 0) // 2
    exponents = np.arange(half) * (2.0 / max(1, 2 * half))
    angles_Sj = np.outer(np.arange(config.context), config.rope_theta**-exponents)
    # NumPy, since PyTorch's own range loads its compiler, a second, where there is nothing to fill ("meta").
    return torch.tensor(np.concatenate((np.cos(angles_Sj), np.sin(angles_Sj)), axis=1, dtype=np.float32, casting="same_kind"))


def rotate(x_BSHd: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of the first R dims of each head, halves paired (j with j + R/2)."""
    cos_Sj, sin_Sj = rope
    half = cos_Sj.shape[-1]
    cos, sin = cos_Sj[None, :, None, :], sin_Sj[None, :, None, :]
    a, b = x_BSHd[..., :half], x_BSHd[..., half : 2 * half]
    turned = (a * cos - b * sin, b * cos + a * sin)
    if 2 * half == x_BSHd.shape[-1]:
        return torch.cat(turned, dim=-1)
    return torch.cat((*turned, x_BSHd[..., 2 * half :]), dim=-1)


class Kernels(NamedTuple):
    """What prefill computes with: this, or what gives the same values but for rounding (`nas.training_kernels`)."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
    rotate: Callable[[Tensor, Rope], Tensor] = rotate


PLAIN = Kernels()


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, config: SLMConfig, width: int) -> None:
        super().__init__()
        self.kind, self.eps, self.shape = config.norm, config.norm_eps, (width,)
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm with a learned weight over each head (QK-norm)."""

    def __init__(self, config: SLMConfig, width: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSHd: Tensor) -> Tensor:
        return F.rms_norm(x_BSHd, self.weight.shape, self.weight, self.eps)


def activation(config: SLMConfig, x: Tensor) -> Tensor:
    """The plain activation: relu, gelu (erf), gelu_tanh or silu."""
    if config.activation == "relu":
        return F.relu(x)
    if config.activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


class Activation(nn.Module):
    """act(x), or the series sum_{i<n} act(a_i x + b_i) with learned a, b (PanGu-pi, arXiv 2312.17276).

    a and b are scalars per term, or one per term and channel, as `series_mode` says.
    """

    def __init__(self, config: SLMConfig, width: int) -> None:
        super().__init__()
        self.config, self.terms = config, config.series_activation
        if self.terms > 1:
            channels = width if config.series_mode == "channel" else 1
            self.scale = nn.Parameter(torch.empty(self.terms, channels))
            self.shift = nn.Parameter(torch.empty(self.terms, channels))

    def forward(self, x_BSF: Tensor) -> Tensor:
        if self.terms == 1:
            return activation(self.config, x_BSF)
        total = activation(self.config, x_BSF * self.scale[0] + self.shift[0])
        for i in range(1, self.terms):
            total = total + activation(self.config, x_BSF * self.scale[i] + self.shift[i])
        return total


class FFN(nn.Module):
    """Standard act(x Wu) Wd, or gated (act(x Wg) * (x Wu)) Wd; a series activation sits on the gate branch."""

    def __init__(self, config: SLMConfig, shape: LayerShape) -> None:
        super().__init__()
        width, inner, bias = config.d_model, shape.ffn_dim, config.ffn_bias
        self.norm = Norm(config, width) if config.block != "parallel_shared_norm" else None
        self.gate = nn.Linear(width, inner, bias=bias) if config.ffn == "gated" else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = Activation(config, inner)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """FFN of an already normalised input."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BSD)))
        return self.down(self.activation(self.gate(x_BSD)) * self.up(x_BSD))


class Shortcuts(nn.Module):
    """Augmented shortcuts sum_t T_t(x), T_t: D -> D/r -> D with GELU between (PanGu-pi)."""

    def __init__(self, config: SLMConfig) -> None:
        super().__init__()
        inner = config.d_model // config.shortcut_reduction
        # The T bottlenecks side by side are one bottleneck T times as wide: the same sum in two products.
        self.down = nn.Linear(config.d_model, config.augmented_shortcuts * inner, bias=False)
        self.up = nn.Linear(config.augmented_shortcuts * inner, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x_BSD)))


class Attention(nn.Module):
    """MHA, GQA or MQA: key/value heads shared by groups of query heads."""

    def __init__(self, config: SLMConfig, shape: LayerShape) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.H, self.K, self.d = shape.num_heads, shape.num_kv_heads, config.head_dim
        self.rotary = config.positions == "rotary"
        width = config.d_model
        self.norm = Norm(config, width)
        self.q = nn.Linear(width, self.H * self.d, bias=config.qkv_bias)
        self.k = nn.Linear(width, self.K * self.d, bias=config.qkv_bias)
        self.v = nn.Linear(width, self.K * self.d, bias=config.qkv_bias)
        self.out = nn.Linear(self.H * self.d, width, bias=config.attention_bias)
        self.q_norm = HeadNorm(config, self.d) if config.qk_norm else None
        self.k_norm = HeadNorm(config, self.d) if config.qk_norm else None
        self.shortcuts = Shortcuts(config) if config.augmented_shortcuts else None

    def _project(self, x_BSD: Tensor, rope: Rope, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q_BSHd = self.q(x_BSD).view(B, S, self.H, self.d)
        k_BSKd = self.k(x_BSD).view(B, S, self.K, self.d)
        v_BSKd = self.v(x_BSD).view(B, S, self.K, self.d)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSKd = self.q_norm(q_BSHd), self.k_norm(k_BSKd)
        if self.rotary:
            q_BSHd, k_BSKd = kernels.rotate(q_BSHd, rope), kernels.rotate(k_BSKd, rope)
        return q_BSHd, k_BSKd, v_BSKd

    def _finish(self, o_BSM: Tensor, x_BSD: Tensor) -> Tensor:
        y_BSD = self.out(o_BSM)
        return y_BSD if self.shortcuts is None else y_BSD + self.shortcuts(x_BSD)

    def prefill(self, x_BSD: Tensor, rope: Rope, kernels: Kernels = PLAIN) -> tuple[Tensor, Cache]:
        """Causal attention among S normalised inputs; returns the output and the S rows to cache."""
        B, S, _ = x_BSD.shape
        q_BSHd, k_BSKd, v_BSKd = self._project(x_BSD, rope, kernels)
        o_BHSd = kernels.attend(q_BSHd.transpose(1, 2), k_BSKd.transpose(1, 2), v_BSKd.transpose(1, 2))
        return self._finish(o_BHSd.transpose(1, 2).reshape(B, S, self.H * self.d), x_BSD), (k_BSKd, v_BSKd)

    def decode(self, x_B1D: Tensor, rope: Rope, cache: Cache) -> tuple[Tensor, Cache]:
        """One normalised input against C cached rows."""
        k_BCKd, v_BCKd = cache
        q_B1Hd, k_B1Kd, v_B1Kd = self._project(x_B1D, rope, PLAIN)
        o_B1Hd = OPERATORS.cached_attention(q_B1Hd, k_BCKd, v_BCKd, k_B1Kd, v_B1Kd, 1 / math.sqrt(self.d))
        return self._finish(o_B1Hd.reshape(x_B1D.shape[0], 1, self.H * self.d), x_B1D), (k_B1Kd, v_B1Kd)


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, arXiv 2405.04434): keys and values from a cached latent, plus shared rotary keys.

    Prefill expands the latent; decode is absorbed, i.e. attends over the latent itself:
    score = (W_uk^T q_nope . c + q_rope . k_rope) / sqrt(d + R), o = W_uv sum(p c).
    """

    def __init__(self, config: SLMConfig, shape: LayerShape) -> None:
        super().__init__()
        assert config.head_dim is not None and config.v_head_dim is not None and config.rotary_dim is not None
        self.H, self.d, self.v, self.R = shape.num_heads, config.head_dim, config.v_head_dim, config.rotary_dim
        self.L = config.kv_rank
        width, bias = config.d_model, config.qkv_bias
        self.norm = Norm(config, width)
        self.q_down = nn.Linear(width, config.q_rank, bias=bias) if config.q_rank else None
        self.q_norm = HeadNorm(config, config.q_rank) if config.q_rank else None
        self.q = nn.Linear(config.q_rank or width, self.H * (self.d + self.R), bias=bias and not config.q_rank)
        self.kv_down = nn.Linear(width, self.L + self.R, bias=bias)
        self.kv_norm = HeadNorm(config, self.L)
        self.k_up = nn.Parameter(torch.empty(self.H, self.d, self.L))
        self.v_up = nn.Parameter(torch.empty(self.H, self.v, self.L))
        self.out = nn.Linear(self.H * self.v, width, bias=config.attention_bias)
        self.shortcuts = Shortcuts(config) if config.augmented_shortcuts else None

    def _project(self, x_BSD: Tensor, rope: Rope, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q_BSM = self.q(x_BSD) if self.q_down is None or self.q_norm is None else self.q(self.q_norm(self.q_down(x_BSD)))
        q_BSHe = q_BSM.view(B, S, self.H, self.d + self.R)
        kv_BSe = self.kv_down(x_BSD)
        c_BSL = self.kv_norm(kv_BSe[..., : self.L])
        k_rope_BSR = kernels.rotate(kv_BSe[..., self.L :].view(B, S, 1, self.R), rope).view(B, S, self.R)
        return q_BSHe[..., : self.d], kernels.rotate(q_BSHe[..., self.d :], rope), c_BSL, k_rope_BSR

    def _finish(self, o_BSM: Tensor, x_BSD: Tensor) -> Tensor:
        y_BSD = self.out(o_BSM)
        return y_BSD if self.shortcuts is None else y_BSD + self.shortcuts(x_BSD)

    def prefill(self, x_BSD: Tensor, rope: Rope, kernels: Kernels = PLAIN) -> tuple[Tensor, Cache]:
        """Causal attention among S normalised inputs; returns the output and the S rows to cache."""
        B, S, _ = x_BSD.shape
        q_BSHd, q_rope_BSHR, c_BSL, k_rope_BSR = self._project(x_BSD, rope, kernels)
        k_BSHd = F.linear(c_BSL, self.k_up.view(self.H * self.d, self.L)).view(B, S, self.H, self.d)
        v_BSHv = F.linear(c_BSL, self.v_up.view(self.H * self.v, self.L)).view(B, S, self.H, self.v)
        q_BSHe = torch.cat((q_BSHd, q_rope_BSHR), dim=-1)
        k_BSHe = torch.cat((k_BSHd, k_rope_BSR[:, :, None, :].expand(B, S, self.H, self.R)), dim=-1)
        o_BHSv = kernels.attend(q_BSHe.transpose(1, 2), k_BSHe.transpose(1, 2), v_BSHv.transpose(1, 2))
        return self._finish(o_BHSv.transpose(1, 2).reshape(B, S, self.H * self.v), x_BSD), (c_BSL, k_rope_BSR)

    def decode(self, x_B1D: Tensor, rope: Rope, cache: Cache) -> tuple[Tensor, Cache]:
        """One normalised input against C cached latents, in absorbed form."""
        c_BCL, k_rope_BCR = cache
        B = x_B1D.shape[0]
        q_B1Hd, q_rope_B1HR, c_B1L, k_rope_B1R = self._project(x_B1D, rope, PLAIN)
        q_BHL = torch.matmul(q_B1Hd.view(B, self.H, 1, self.d), self.k_up).view(B, self.H, self.L)
        q_BHR = q_rope_B1HR.view(B, self.H, self.R)
        scale = 1 / math.sqrt(self.d + self.R)
        u_BHL = OPERATORS.latent_attention(q_BHL, q_BHR, c_BCL, k_rope_BCR, c_B1L, k_rope_B1R, scale)
        o_BH1v = torch.matmul(u_BHL.view(B, self.H, 1, self.L), self.v_up.transpose(1, 2))
        return self._finish(o_BH1v.reshape(B, 1, self.H * self.v), x_B1D), (c_B1L, k_rope_B1R)


class Block(nn.Module):
    """One effective layer: an attention part and an FFN part, either of which other layers may share."""

    def __init__(self, config: SLMConfig, attention: Attention | LatentAttention, ffn: FFN) -> None:
        super().__init__()
        self.form, self.attention, self.ffn = config.block, attention, ffn

    def _join(self, x_BSD: Tensor, normed_BSD: Tensor, a_BSD: Tensor) -> Tensor:
        if self.ffn.norm is None:  # parallel_shared_norm
            return x_BSD + a_BSD + self.ffn(normed_BSD)
        if self.form == "parallel":
            return x_BSD + a_BSD + self.ffn(self.ffn.norm(x_BSD))
        x_BSD = x_BSD + a_BSD
        return x_BSD + self.ffn(self.ffn.norm(x_BSD))

    def prefill(self, x_BSD: Tensor, rope: Rope, kernels: Kernels = PLAIN) -> tuple[Tensor, Cache]:
        normed_BSD = self.attention.norm(x_BSD)
        a_BSD, rows = self.attention.prefill(normed_BSD, rope, kernels)
        return self._join(x_BSD, normed_BSD, a_BSD), rows

    def decode(self, x_B1D: Tensor, rope: Rope, cache: Cache) -> tuple[Tensor, Cache]:
        normed_B1D = self.attention.norm(x_B1D)
        a_B1D, rows = self.attention.decode(normed_B1D, rope, cache)
        return self._join(x_B1D, normed_B1D, a_B1D), rows


def _table(rows: int, width: int) -> nn.Embedding:
    """Embeddings left as they are: PyTorch's own filling loads its compiler, a second, when there is nothing to fill ("meta")."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # type: ignore[no-untyped-call]


class Embed(nn.Module):
    """Token (and learned position) embeddings, and the rotary table rows that every block uses."""

    rope: Tensor

    def __init__(self, config: SLMConfig) -> None:
        super().__init__()
        self.scale, self.offset = config.embedding_scale, config.position_offset
        self.tokens = _table(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = _table(config.context + config.position_offset, config.d_model) if learned else None
        self.register_buffer("rope", rope_table(config), persistent=False)

    def forward(self, tokens_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x_BSD and the rotary cos_SR, sin_SR (each (S, R/2)) of these positions."""
        x_BSD = self.tokens(tokens_BS)
        if self.scale != 1.0:
            x_BSD = x_BSD * self.scale
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_S + self.offset)
        rope_SR = self.rope[positions_S]
        half = rope_SR.shape[1] // 2
        return x_BSD, rope_SR[:, :half], rope_SR[:, half:]


class Head(nn.Module):
    """Final norm and output projection; the weight is the token embedding's when tied."""

    def __init__(self, config: SLMConfig, tied: nn.Embedding | None) -> None:
        super().__init__()
        self.norm = Norm(config, config.d_model)
        weight = torch.empty(config.vocab_size, config.d_model) if tied is None else tied.weight
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Logits of every given position, (B, S, V)."""
        return F.linear(self.norm(x_BSD), self.weight, self.bias)


class SLM(nn.Module):
    """The decoder of an `SLMConfig`; unique parts are stored once, however many layers use them.

    Args:
        config: the architecture.
        device: where to make the weights ("meta" makes none).
    """

    def __init__(self, config: SLMConfig, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.config = config
        shapes = config.layers()
        kind = LatentAttention if config.attention == "mla" else Attention
        with torch.device(device):
            self.embed = Embed(config)
            by_attention = {s.attention_index: s for s in reversed(shapes)}
            by_ffn = {s.ffn_index: s for s in reversed(shapes)}
            self.attentions = nn.ModuleList(kind(config, by_attention[i]) for i in sorted(by_attention))
            self.ffns = nn.ModuleList(FFN(config, by_ffn[i]) for i in sorted(by_ffn))
            self.head = Head(config, self.embed.tokens if config.tie_embeddings else None)
        self._layers = [(s.attention_index, s.ffn_index) for s in shapes]

    def block(self, i: int) -> Block:
        """Effective layer i, on the weights it shares."""
        a, f = self._layers[i]
        return Block(self.config, self.attentions[a], self.ffns[f])  # type: ignore[arg-type]

    def blocks(self) -> Iterator[Block]:
        """Every effective layer, in order."""
        return (self.block(i) for i in range(len(self._layers)))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of tokens (B, S), S at most `config.context`."""
        return self.head(self.body(tokens_BS))

    def body(self, tokens_BS: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        """What the head makes logits of, (B, S, D): training makes those of some tokens at a time."""
        x_BSD, cos, sin = self.embed(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        for block in self.blocks():
            x_BSD, _ = block.prefill(x_BSD, (cos, sin), kernels)
        return x_BSD

    def prefill(self, tokens_BS: Tensor) -> tuple[Tensor, list[Cache]]:
        """Logits of the last position (B, 1, V), and each effective layer's S cached rows."""
        x_BSD, cos, sin = self.embed(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        caches = []
        for block in self.blocks():
            x_BSD, rows = block.prefill(x_BSD, (cos, sin))
            caches.append(rows)
        return self.head(x_BSD[:, -1:]), caches

    def decode(self, token_B1: Tensor, caches: list[Cache]) -> tuple[Tensor, list[Cache]]:
        """Logits (B, 1, V) of one token after C cached rows, and the new row of each effective layer."""
        position_1 = torch.tensor([caches[0][0].shape[1]], device=token_B1.device)
        x_B1D, cos, sin = self.embed(token_B1, position_1)
        rows = []
        for block, cache in zip(self.blocks(), caches, strict=True):
            x_B1D, new = block.decode(x_B1D, (cos, sin), cache)
            rows.append(new)
        return self.head(x_B1D), rows

    def initialise(self, seed: int) -> "SLM":
        """Fills every weight from a seed, the same on every machine; returns self.

        Matrices are normal with std 0.04 sqrt(256 / D), at most 0.04, so that width does not change the scale of
        activations; projections back into the residual stream are divided by sqrt(2 L) (GPT-2, Radford et al. 2019).
        Norms start at one, biases at zero, and a series activation at its plain one plus terms of half the scale.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            self.fill(name, parameter, generator)
        return self

    @torch.no_grad()
    def fill(self, name: str, parameter: Tensor, generator: torch.Generator | None = None) -> None:
        """Fills one weight, whose name decides how, as `initialise` does; without a CPU generator from PyTorch's global one."""
        kind = name.rsplit(".", 1)[-1]
        if kind in ("bias", "shift"):
            parameter.zero_()
        elif kind == "scale":
            parameter.fill_(0.5)
            parameter[0] = 1.0
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            residual = name.endswith((".out.weight", "shortcuts.up.weight")) or (name.startswith("ffns.") and name.endswith(".down.weight"))
            std = min(0.04, 0.04 * math.sqrt(256 / self.config.d_model))
            scale = std / math.sqrt(2 * self.config.num_layers) if residual else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * scale)
