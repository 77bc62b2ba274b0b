"""A config and request lengths -> the distinct stages a device compiles, and how they chain.

A stage stands for every layer of the same structure: block i of a config is block 0 of a one-layer config
that keeps only what the block's structure depends on, so equal blocks of different candidates share a key.

Shape suffixes as in `model.py`; every stage runs with batch 1.
"""

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from search_spaces.config import SLMConfig
from search_spaces.model import SLM, Block, Embed, Head
from search_spaces.precision import Precision
from search_spaces.quantisation import QuantisedStage, quantised_names, quantised_tensors

Phase = Literal["prefill", "padded", "decode"]
"""`padded` is a prefill whose last rows may be padding. Attention is causal, so no row sees what follows it, and only the
head differs: it is told which row is the last."""
Kind = Literal["embed", "block", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """A distinct stage: what to export, and under which identity.

    Attributes:
        kind: embed, block or head.
        phase: prefill (`tokens` rows, no cache), decode (one row against a cache of any length), or for a head padded.
        config: a one-layer config holding what the stage depends on; the rest at fixed values.
        tokens: rows of a prefill; 1 for decode.
        precision: of the matrices.
    """

    kind: Kind
    phase: Phase
    config: SLMConfig
    tokens: int
    precision: Precision = "fp32"

    @property
    def key(self) -> str:
        """Content identity, equal in every process for equal stages."""
        text = json.dumps([self.kind, self.phase, self.tokens, self.precision, self.config.to_dict()], sort_keys=True)
        return f"{self.kind}_{self.phase}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def export(self) -> ExportedProgram:
        """The stage as a standard exported program; weights are uninitialised."""
        return _export(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """One place in the model where a stage runs.

    Attributes:
        spec: the stage.
        layer: the effective layer for a block, else None.
        weights: the stage's own parameter and buffer names -> names in `SLM`.
    """

    spec: StageSpec
    layer: int | None
    weights: dict[str, str]


def cache_names(config: SLMConfig) -> tuple[str, str]:
    """Names of the two tensors one layer caches."""
    return ("latent", "k_rope") if config.attention == "mla" else ("k", "v")


def cache_row_shapes(config: SLMConfig, layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of one cached row (one token) of each of the two tensors."""
    assert config.head_dim is not None and config.rotary_dim is not None
    if config.attention == "mla":
        return (config.kv_rank,), (config.rotary_dim,)
    row = (config.layer(layer).num_kv_heads, config.head_dim)
    return row, row


def stage_uses(config: SLMConfig, phase: Phase, tokens: int, precision: Precision = "fp32") -> Iterator[StageUse]:
    """The stages of one phase in the order they run.

    Args:
        tokens: rows of a prefill, padding included; ignored (1) for decode.
        precision: of the matrices.
    """
    tokens = 1 if phase == "decode" else tokens
    spec = functools.partial(StageSpec, phase="prefill" if phase == "padded" else phase, tokens=tokens, precision=precision)
    embed_config, head_config = _embed_config(config), _head_config(config)
    with torch.device("meta"):
        embed, head = Embed(embed_config), Head(head_config, None)
    tied = "embed.tokens.weight" if config.tie_embeddings else "head.weight"
    weights = _tensors(embed, precision, lambda name: f"embed.{name}")
    yield StageUse(spec=spec(kind="embed", config=embed_config), layer=None, weights=weights)
    blocks: dict[SLMConfig, nn.Module] = {}
    for i, shape in enumerate(config.layers()):
        block_config = _block_config(config, i)
        if block_config not in blocks:
            blocks[block_config] = SLM(block_config, device="meta").block(0)
        index = {"attention": shape.attention_index, "ffn": shape.ffn_index}

        def in_model(name: str, index: dict[str, int] = index) -> str:
            part, _, rest = name.partition(".")
            return f"{part}s.{index[part]}.{rest}"

        yield StageUse(spec=spec(kind="block", config=block_config), layer=i, weights=_tensors(blocks[block_config], precision, in_model))
    weights = _tensors(head, precision, lambda name: tied if name == "weight" else f"head.{name}")
    yield StageUse(spec=spec(kind="head", phase=phase, config=head_config), layer=None, weights=weights)


def _tensors(module: nn.Module, precision: Precision, in_model: Callable[[str], str]) -> dict[str, str]:
    """The names of a stage's tensors, each with its name in the model."""
    quantised = set() if precision == "fp32" else set(quantised_names(module))
    names: dict[str, str] = {}
    for name in _tensor_names(module):
        if name in quantised:
            names |= zip(quantised_tensors(name, precision), quantised_tensors(in_model(name), precision), strict=True)
        else:
            names[name] = in_model(name)
    return names


def _tensor_names(module: nn.Module) -> list[str]:
    return [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]


def _block_config(config: SLMConfig, layer: int) -> SLMConfig:
    shape = config.layer(layer)
    kind = config.attention
    if kind in ("mha", "gqa", "mqa"):
        kind = "mha" if shape.num_heads == shape.num_kv_heads else "mqa" if shape.num_kv_heads == 1 else "gqa"
    return dataclasses.replace(
        config,
        attention=kind, num_layers=1, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, ffn_dim=shape.ffn_dim,
        vocab_size=2, context=1, rope_theta=10000.0, position_offset=0, tie_embeddings=True, head_bias=False, embedding_scale=1.0,
        sharing="none", shared_parts="both", num_unique_layers=None,
    )  # fmt: skip


def _plain(config: SLMConfig) -> dict[str, object]:
    """What embed and head have in common: a width and nothing of the blocks."""
    return {
        "d_model": config.d_model,
        "num_layers": 1,
        "num_heads": 1,
        "ffn": "standard",
        "ffn_dim": 1,
        "positions": "learned",
        "context": 1,
    }


def _embed_config(config: SLMConfig) -> SLMConfig:
    values = _plain(config) | {"context": config.context, "positions": config.positions, "position_offset": config.position_offset}
    if config.positions == "rotary":
        values |= {"head_dim": config.rotary_dim, "rotary_dim": config.rotary_dim, "rope_theta": config.rope_theta}
    return SLMConfig(vocab_size=config.vocab_size, embedding_scale=config.embedding_scale, **values)  # type: ignore[arg-type]


def _head_config(config: SLMConfig) -> SLMConfig:
    values = _plain(config) | {
        "norm": config.norm,
        "norm_eps": config.norm_eps,
        "norm_weight": config.norm_weight,
        "norm_bias": config.norm_bias,
        "head_bias": config.head_bias,
    }
    return SLMConfig(vocab_size=config.vocab_size, **values)  # type: ignore[arg-type]


class _EmbedStage(nn.Module):
    """tokens_1S, positions_S -> x_1SD [, cos_SR, sin_SR]."""

    def __init__(self, embed: Embed, rotary: bool) -> None:
        super().__init__()
        self.stage, self.rotary = embed, rotary
        # A device gets the table as a weight; left non-persistent it would be baked into the program.
        embed.register_buffer("rope", embed.rope, persistent=True)

    def forward(self, tokens_1S: Tensor, positions_S: Tensor) -> tuple[Tensor, ...]:
        x, cos, sin = self.stage(tokens_1S, positions_S)
        return (x, cos, sin) if self.rotary else (x,)


class _BlockStage(nn.Module):
    """x_1SD [, cos_SR, sin_SR] [, cache...] -> x_1SD, new rows."""

    def __init__(self, block: Block, rotary: bool, phase: Phase) -> None:
        super().__init__()
        self.stage, self.rotary, self.phase = block, rotary, phase

    def forward(self, x_1SD: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        cut = 2 if self.rotary else 0
        rope = (rest[0], rest[1]) if self.rotary else (x_1SD, x_1SD)  # unused without rotary
        if self.phase == "prefill":
            y, rows = self.stage.prefill(x_1SD, rope)
        else:
            y, rows = self.stage.decode(x_1SD, rope, rest[cut:])
        return (y, *rows)


class _HeadStage(nn.Module):
    """x_1SD -> logits_11V of the last row only."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.stage = head

    def forward(self, x_1SD: Tensor) -> tuple[Tensor]:
        return (self.stage(x_1SD[:, -1:]),)


class _PaddedHeadStage(nn.Module):
    """x_1SD, last_1 -> logits_11V of the row `last_1` only."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.stage = head

    def forward(self, x_1SD: Tensor, last_1: Tensor) -> tuple[Tensor]:
        return (self.stage(x_1SD.view(x_1SD.shape[1:])[last_1][None]),)


def _export(spec: StageSpec) -> ExportedProgram:
    config, S = spec.config, spec.tokens
    rotary = config.positions == "rotary"
    args: tuple[Tensor, ...]
    dynamic: tuple[object, ...]
    if spec.kind == "embed":
        module: nn.Module = _EmbedStage(Embed(config), rotary)
        args = (torch.zeros(1, S, dtype=torch.int64), torch.arange(S))
        dynamic = (None, None)
    elif spec.kind == "head":
        padded = spec.phase == "padded"
        module = (_PaddedHeadStage if padded else _HeadStage)(Head(config, None))
        args = (torch.zeros(1, S, config.d_model), *([torch.zeros(1, dtype=torch.int64)] if padded else []))
        dynamic = (None,) * len(args)
    else:
        module = _BlockStage(SLM(config).block(0), rotary, spec.phase)
        half = (config.rotary_dim or 0) // 2
        # Every input is a tensor of its own: export takes the same tensor given twice for one input.
        inputs = [torch.zeros(1, S, config.d_model), *(torch.zeros(S, half) for _ in range(2 if rotary else 0))]
        caches = []
        if spec.phase == "decode":
            caches = [torch.zeros(1, 37, *row) for row in cache_row_shapes(config, 0)]
        args = (*inputs, *caches)
        rows = Dim("C", min=2, max=1 << 20)
        # A *args forward takes its dynamic shapes as one nested tuple after the named argument.
        rest = (*(None for _ in inputs[1:]), *({1: rows} for _ in caches))
        dynamic = (None, rest) if rest else (None,)
    if spec.precision != "fp32":
        module = QuantisedStage(module, spec.precision)
        dynamic = ((dynamic[0], *dynamic[1]),) if isinstance(dynamic[-1], tuple) else (dynamic,)  # its inputs are all in *args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns about its own internals here
        return export(module.eval(), args, dynamic_shapes=dynamic, strict=False)
