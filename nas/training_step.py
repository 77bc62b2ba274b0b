"""One step of training: the search's short training and `edgewise train` change weights in this way and no other.

A step has portions (microbatches), whose gradients are summed, so that a batch may be larger than what fits in memory.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.training_kernels import IGNORED, head_gradients, keep_memory, training_kernels
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

# Chosen on State of the Union text by bits per byte of one seed (two seeds of the final choice: 2.134 and 2.135).
# Width 128, 4 layers, vocabulary 1,024 unless said. Steps of 8, 4, 2 KB with rates 3e-3 and 1e-2: 2.60, 2.38, 2.24
# at 256 KB; lower rates 2.27 with 2 KB, 2.18 with 1 KB. At 512 KB 2.025 with 1 KB, 2.008 with 512 bytes: steps
# of 1 KB keep a whole window. Second beta 0.99 for 0.95: 2.120 for 2.142 with 512-byte steps.
# Matrix rate x 0.5, 1, 2 at 256 KB: 2.478, 2.464, 2.485 at width 64; 1.994, 1.996, 2.043 at width 192.
# The same at 7e-4 and 1e-3: 2.135, 2.135 with 4 layers; with 8, at 5e-4, 7e-4 and 1e-3: 2.148, 2.148, 2.159;
# with 2, at 1e-3, 1.4e-3 and 2e-3: 2.134, 2.136, 2.139.
# Embedding rate 5e-3, 1e-2, 2e-2 with a vocabulary of 4,096: 1.976, 1.970, 1.949;
# 1e-2 and 1.5e-2 with 1,024: 2.137, 2.135, and 1e-2 and 2e-2 at 512 KB: 2.025, 2.030. 1.5e-2 is between them.
# Whole documents in place of 8 KB excerpts: 2.198 for 2.137.
MATRIX_RATE = 8e-4
EMBEDDING_RATE = 1.5e-2
REFERENCE_WIDTH = 128
REFERENCE_DEPTH = 4
WARMUP_SHARE = 0.05
WARMUP_BYTES = 8 * 1024
COOLDOWN_SHARE = 0.3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)
EPSILON = 1e-10
MOST_GRADIENT_NORM = 1.0

DIVERGED_ABOVE = 1.5
"""A loss (mean of 8 steps) of this many times the first one counts as diverged."""

Decay = Literal["linear", "cosine"]
"""How the rate falls after its rise: straight, or along half a cosine; to (nearly) zero at the last step either way."""

Arithmetic = Literal["fp32", "bf16"]
"""What products are computed in; weights, their moments and the loss are float32 always."""

DECAYS: tuple[Decay, ...] = get_args(Decay)
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)

_HEAD_TOKENS = 1024
"""Tokens that logits are made of at once. Of 2,048 tokens, width 384, two cores: 255 to 270 ms instead of 296 with a
vocabulary of 8,192, 1,143 instead of 1,209 with 32,768; with 128 tokens 328 and 1,445, as every part adds to the whole gradient."""

Portion = tuple[Tensor, Tensor]
"""Inputs and targets, each (B, S)."""


class Learner:
    """A model, its optimiser and what a step does with them.

    Attributes:
        model: whose weights `step` changes; on any device.
        optimiser: AdamW, in groups by `parameter_groups`.

    Args:
        model: in the state to go on from.
        rate: peak rate of weight matrices at a width of 128 and 4 layers.
        other_rate: peak rate of embeddings and vectors; None: see `peak_rates`.
        arithmetic: what products are computed in.
        compiled: whether torch.compile makes the step's code; the first step then takes minutes.
    """

    def __init__(
        self, model: SLM, rate: float, *, other_rate: float | None = None, arithmetic: Arithmetic = "fp32", compiled: bool = False
    ) -> None:
        self.model = model
        self.optimiser = torch.optim.AdamW(parameter_groups(model, rate, other_rate), betas=BETAS, eps=EPSILON, fused=True)
        self._peaks = [group["lr"] for group in self.optimiser.param_groups]
        self._parameters = list(model.parameters())
        self._arithmetic = arithmetic
        on_cpu = self._parameters[0].device.type == "cpu"
        if on_cpu:
            keep_memory()
        self._written_out = on_cpu and arithmetic == "fp32" and not compiled
        body = partial(model.body, kernels=training_kernels()) if self._written_out else model.body
        self._body = torch.compile(body) if compiled else body
        self._loss = torch.compile(self._loss_of) if compiled else self._loss_of

    def step(self, portions: Sequence[Portion], share: float) -> Tensor:
        """Changes the weights once; as one batch of all portions would, but for rounding.

        Args:
            portions: at least one; positions whose target is `IGNORED` count for nothing.
            share: of the peak rates.

        Returns:
            The mean loss before the change, nats a token; a scalar on the model's device.
        """
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        # Not read here: that would make a GPU wait.
        count = torch.stack([(targets_BS != IGNORED).sum() for _, targets_BS in portions]).sum()
        losses = [loss for inputs_BS, targets_BS in portions for loss in self._add_gradients(inputs_BS, targets_BS, count)]
        nn.utils.clip_grad_norm_(self._parameters, MOST_GRADIENT_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _add_gradients(self, inputs_BS: Tensor, targets_BS: Tensor, count: Tensor) -> list[Tensor]:
        """Backward through one portion; its share of the mean loss, in parts."""
        if self._written_out:
            return self._add_written_out(inputs_BS, targets_BS, count)
        with self._autocast():
            x_BSD = self._body(inputs_BS)
        if targets_BS.numel() <= _HEAD_TOKENS:
            with self._autocast():
                loss = self._loss(x_BSD, targets_BS, count)
            loss.backward()  # type: ignore[no-untyped-call]
            return [loss.detach()]
        x_1ND = x_BSD.flatten(0, 1)[None]
        gradients, losses = [], []
        targets_1N = targets_BS.flatten()[None]
        for part_1nD, targets_1n in zip(torch.split(x_1ND, _HEAD_TOKENS, 1), torch.split(targets_1N, _HEAD_TOKENS, 1), strict=True):
            # Backward through the head at once, so that the logits of one part only are ever held.
            leaf_1nD = part_1nD.detach().requires_grad_()
            with self._autocast():
                loss = self._loss(leaf_1nD, targets_1n, count)
            loss.backward()  # type: ignore[no-untyped-call]
            assert leaf_1nD.grad is not None
            gradients.append(leaf_1nD.grad)
            losses.append(loss.detach())
        x_1ND.backward(torch.cat(gradients, dim=1))  # type: ignore[no-untyped-call]
        return losses

    def _add_written_out(self, inputs_BS: Tensor, targets_BS: Tensor, count: Tensor) -> list[Tensor]:
        """The same by `nas.training_kernels`."""
        head = self.model.head
        h_ND = head.norm(self._body(inputs_BS)).flatten(0, 1)
        parts = zip(torch.split(h_ND.detach(), _HEAD_TOKENS), torch.split(targets_BS.flatten(), _HEAD_TOKENS), strict=True)
        found = [head_gradients(head, h_nD, targets_n, count) for h_nD, targets_n in parts]
        h_ND.backward(torch.cat([gradient_nD for _, gradient_nD in found]) if len(found) > 1 else found[0][1])
        return [loss for loss, _ in found]

    def _loss_of(self, x_BSD: Tensor, targets_BS: Tensor, count: Tensor) -> Tensor:
        logits_BSV = self.model.head(x_BSD)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum") / count

    def _autocast(self) -> AbstractContextManager[object]:
        if self._arithmetic == "fp32":
            return nullcontext()
        return torch.autocast(self._parameters[0].device.type, dtype=torch.bfloat16)


def schedule(step: int, steps: int, decay: Decay = "linear") -> float:
    """Share of the peak rate at a step: up over the first 5 %, then down to (nearly) zero at the last."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    left = min(1.0, (steps - step) / max(1, steps - warmup))
    return min(1.0, (step + 1) / warmup, left if decay == "linear" else math.sin(left * math.pi / 2) ** 2)


def trapezoid(step: int, steps: int, step_bytes: int) -> float:
    """Share of the peak rate at a step of a short training: up, constant, straight down to (nearly) zero.

    It rises over the first `WARMUP_BYTES` of text and falls over the last `COOLDOWN_SHARE` of the steps (Hägele et al., arXiv
    2405.18392). Up to where it falls it does not depend on the number of steps, so that one training serves several budgets.
    """
    rise = max(1, round(WARMUP_BYTES / step_bytes))
    return min(1.0, (step + 1) / rise) * min(1.0, (steps - step) / (cooldown_steps(steps) + 1))


def cooldown_steps(steps: int) -> int:
    """The last steps of a short training, over which the rate falls."""
    return max(1, round(COOLDOWN_SHARE * steps))


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the losses of all steps so far say that training will come to nothing."""
    # A mean, as one hard window after a good start is no divergence.
    recent = losses[-8:]
    mean = sum(recent) / len(recent)
    return not math.isfinite(mean) or mean > DIVERGED_ABOVE * losses[0]


def peak_rates(config: SLMConfig, rate: float = MATRIX_RATE, other_rate: float | None = None) -> tuple[float, float]:
    """Peak rates of weight matrices, and of embeddings and vectors, by how the best of each changes with the model's size.

    Weight matrices: rate * 128/D * sqrt(4/L) with L effective layers. The update of a sum over D inputs
    grows with D under Adam (muP, Yang et al., arXiv 2203.03466, table 3); the root of the depth is
    measured (the figures are at the top of this file). Embeddings and vectors: the same for every model.
    """
    size = REFERENCE_WIDTH / config.d_model * math.sqrt(REFERENCE_DEPTH / config.num_layers)
    return rate * size, rate * EMBEDDING_RATE / MATRIX_RATE if other_rate is None else other_rate


def parameter_groups(model: SLM, rate: float, other_rate: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: embeddings, weight matrices (which alone decay), vectors; see `peak_rates`."""
    embeddings, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("embed.") or name == "head.weight":
            embeddings.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith((".scale", ".shift")):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    matrix_rate, constant_rate = peak_rates(model.config, rate, other_rate)
    groups = [
        {"params": embeddings, "lr": constant_rate, "weight_decay": 0.0},
        {"params": matrices, "lr": matrix_rate, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "lr": constant_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
