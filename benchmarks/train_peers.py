"""Training loops to compare with: a plain one, in the manner of nanoGPT, and litgpt's own model and loss in its loop.

Each is given a config of ours and makes the same architecture; `step(inputs, targets)` trains on a batch and gives the loss.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.litgpt_config import litgpt_config
from search_spaces.config import SLMConfig

RATE, BETAS, WEIGHT_DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0

Step = Callable[[Tensor, Tensor], float]


class Plain(nn.Module):
    """A decoder written down plainly: one product makes queries, keys and values."""

    def __init__(self, c: SLMConfig) -> None:
        super().__init__()
        self.rotary = c.positions == "rotary"
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.places = None if self.rotary else nn.Embedding(c.context, c.d_model)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.num_layers))
        self.norm = norm(c)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        if self.rotary:
            angles = torch.outer(torch.arange(c.context), c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim))
            self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1))
            self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * c.num_layers) if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss."""
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device))
        rope = (self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]) if self.rotary else None
        for block in self.blocks:
            x = block(x, rope)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class PlainBlock(nn.Module):
    """Attention and FFN, each after a norm."""

    def __init__(self, c: SLMConfig) -> None:
        super().__init__()
        self.H, self.K, self.d = c.num_heads, c.num_kv_heads, c.head_dim
        self.norms = nn.ModuleList((norm(c), norm(c)))
        self.qkv = nn.Linear(c.d_model, (self.H + 2 * self.K) * self.d, bias=c.qkv_bias)
        self.out = nn.Linear(self.H * self.d, c.d_model, bias=c.attention_bias)
        self.gate = nn.Linear(c.d_model, c.ffn_dim, bias=c.ffn_bias) if c.ffn == "gated" else None
        self.up = nn.Linear(c.d_model, c.ffn_dim, bias=c.ffn_bias)
        self.down = nn.Linear(c.ffn_dim, c.d_model, bias=c.ffn_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """One layer."""
        B, S, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).split((self.H * self.d, self.K * self.d, self.K * self.d), dim=2)
        q, k, v = (t.view(B, S, -1, self.d).transpose(1, 2) for t in (q, k, v))
        if rope is not None:
            q, k = turned(q, *rope), turned(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.K)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, S, self.H * self.d))
        h = self.norms[1](x)
        h = F.gelu(self.up(h), approximate="tanh") if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(h)


def norm(c: SLMConfig) -> nn.Module:
    """The block's norm."""
    return nn.RMSNorm(c.d_model, eps=c.norm_eps) if c.norm == "rmsnorm" else nn.LayerNorm(c.d_model, eps=c.norm_eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def plain_loop(c: SLMConfig, device: torch.device, precision: str, compiled: bool) -> tuple[Step, int]:
    """The plain loop's step, and its parameters: weights of products decay, AdamW is the fused one."""
    model: nn.Module = Plain(c).to(device).train()
    decaying = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    count = sum(p.numel() for p in model.parameters())
    if compiled:
        model = torch.compile(model)

    def step(inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step, count


def litgpt_loop(c: SLMConfig, device: torch.device, precision: str, compiled: bool) -> tuple[Step, int]:
    """The step of litgpt's pretraining: its model, loss in chunks, optimiser and Fabric.

    It has no learned positions; such a model is given none at all, so it has a little less to do.
    """
    import lightning
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    learned = c.positions == "learned"
    rotary = SLMConfig.from_dict({**c.to_dict(), "positions": "rotary", "rotary_dim": c.head_dim}) if learned else c
    values = litgpt_config(rotary, "bench") | ({"rotary_percentage": 0.0} if learned else {})
    fabric = lightning.Fabric(devices=1, accelerator=device.type, precision="bf16-mixed" if precision == "bf16" else "32-true")
    model = GPT(Config(**values))
    model.transformer.wte.weight = model.lm_head.weight
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    count = sum(p.numel() for p in model.parameters())
    model = fabric.setup(torch.compile(model) if compiled else model)
    options = {"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": WEIGHT_DECAY, "betas": list(BETAS)}}
    optimiser = fabric.setup_optimizers(instantiate_torch_optimizer(options, model.parameters(), fused=device.type == "cuda"))

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimiser, max_norm=CLIP)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step, count
