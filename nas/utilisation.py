"""How much of a machine a training uses: the FLOPs that its model needs, beside what a large product reaches there (MFU)."""

import functools
import statistics
import time
from typing import Any

import torch

from nas.describe import format_rate
from nas.training import using_threads
from nas.training_step import Arithmetic
from search_spaces.config import SLMConfig
from search_spaces.counting import prefill_flops_by_component
from search_spaces.model import SLM

_STEPS = 20
"""Steps that a pace is taken over: as often is the loss of a training on a GPU read, which waits for it."""


def training_flops(config: SLMConfig, window: int) -> float:
    """FLOPs of training on a token: three times those of the forward pass, of which the backward pass is two.

    So 6 FLOPs for each weight of a product, and those of attention (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B),
    of which only the pairs that causal attention has are counted here.
    """
    return 3.0 * sum(prefill_flops_by_component(config, window, every_logit=True, masked=False).values()) / window


@functools.cache
def product_flops_per_s(device: torch.device, arithmetic: Arithmetic, threads: int) -> float:
    """FLOPs a second of a large product, the best of three after one to begin with; taken once per process, a tenth of a second.

    Args:
        device: where.
        arithmetic: of what numbers.
        threads: that torch is set to use; another number is another answer.
    """
    assert device.type != "cpu" or threads == torch.get_num_threads()
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=torch.float32 if arithmetic == "fp32" else torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def speed_words(tokens_per_s: float, mfu: float | None) -> str:
    """A training's speed for people: "12,300 tokens/s  61% MFU"."""
    return f"{format_rate(tokens_per_s)} tokens/s" + ("" if mfu is None else f"  {mfu:.0%} MFU")


def pace_of(config: SLMConfig, window: int, tokens: float, model: SLM, threads: int | None) -> "Pace":
    """The pace of a short training that begins now.

    Args:
        config: of the model.
        window: tokens that attend to each other.
        tokens: of a step, about.
        model: on the device that it is trained on.
        threads: of the CPU; None: as many as torch is set to use.
    """
    with using_threads(threads) as used:
        most = product_flops_per_s(next(model.parameters()).device, "fp32", used)
    return Pace(tokens, training_flops(config, window), most)


class Pace:
    """The speed of a training under way: of the middle one of its stretches of 20 steps, as in some it waits for a measurement.

    Args:
        tokens: of a step, about.
        flops_per_token: by `training_flops`.
        most_flops_per_s: by `product_flops_per_s`.
    """

    def __init__(self, tokens: float, flops_per_token: float, most_flops_per_s: float) -> None:
        self._tokens = tokens
        self._share_per_token = flops_per_token / most_flops_per_s
        self._steps = 0
        self._stretches_s: list[float] = []
        self._began_s = time.perf_counter()

    def stepped(self) -> None:
        """A step is done."""
        self._steps += 1
        if self._steps == _STEPS:
            now = time.perf_counter()
            self._stretches_s.append(now - self._began_s)
            self._steps, self._began_s = 0, now

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first step."""
        if self._stretches_s:
            return _STEPS * self._tokens / statistics.median(self._stretches_s)
        return self._steps * self._tokens / (time.perf_counter() - self._began_s) if self._steps else None

    def words(self) -> str:
        """For people; nothing before the first step."""
        rate = self.tokens_per_s
        return "" if rate is None else speed_words(rate, rate * self._share_per_token)

    def facts(self) -> dict[str, Any]:
        """For the log: `tokens_per_s`, and `mfu` as a share of one; nothing before the first step."""
        rate = self.tokens_per_s
        return {} if rate is None else {"tokens_per_s": round(rate, 1), "mfu": round(rate * self._share_per_token, 4)}
