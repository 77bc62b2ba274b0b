"""The sample that a serving program is checked with: every padded prefill, and tokens behind it, against PyTorch."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cost_models.measured import DECODE_STEPS, write_sample
from cost_models.program import prefill_name, prefill_sizes, state_name
from search_spaces.config import SLMConfig
from search_spaces.stages import cache_names
from targets.program import ROWS, Sample, Step

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.model import SLM
    from search_spaces.precision import Precision


def serving_sample(model: "SLM", precision: "Precision" = "fp32", seed: int = 0) -> Sample:
    """For each prefill of `build_serving_program` a prompt that it pads, then decode steps; random tokens.

    Args:
        model: float32 weights on the CPU; left as they are.
        precision: of the matrices; PyTorch's results are those of the rounded weights.
        seed: of the tokens.
    """
    config = model.config
    states = [state_name(i, cache) + ROWS for i in range(config.num_layers) for cache in cache_names(config)]
    steps: list[Step] = []
    for size, real in _prompts(config):
        for n in range(_decodes(config, real) + 1):
            inputs = {name: f"{size}.{n}.{name}" for name in ("tokens", "positions", *(("last",) if n == 0 else ()))}
            expected = {name: f"{size}.{n}.{name}" for name in ("logits", *states)}
            steps.append(Step(function="decode" if n else prefill_name(size), inputs=inputs, expected=expected))
    last = steps[-1]
    own = copy.deepcopy(model) if precision != "fp32" else model  # its weights are rounded in place

    def write(path: Path) -> None:
        write_sample(path, own, precision, lambda rounded: _steps(config, seed, rounded))

    return Sample(write=write, steps=tuple(steps), timed={last.function: (last.inputs, config.context - 1)})


def _prompts(config: SLMConfig) -> Iterator[tuple[int, int]]:
    """Each prefill's rows, and how many of them are no padding: about halfway from the next smaller one's."""
    smaller = 0
    for size in prefill_sizes(config):
        yield size, max(1, min((smaller + size + 1) // 2, config.context - 1))
        smaller = size


def _decodes(config: SLMConfig, real: int) -> int:
    return min(DECODE_STEPS, config.context - real)


def _steps(config: SLMConfig, seed: int, model: "SLM") -> "Iterator[tuple[str, Tensor]]":
    """Inputs and PyTorch's results. Logits of a prompt come from the prompt alone, so that padding is shown to change nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for size, real in _prompts(config):
        decodes = _decodes(config, real)
        ids_1S = torch.randint(config.vocab_size, (1, size + decodes), generator=generator)
        padded_1S, next_1S = ids_1S[:, :size], ids_1S[:, size:]
        logits, caches = model.prefill(padded_1S[:, :real])
        _, new = model.prefill(padded_1S)
        yield f"{size}.0.last", torch.tensor([real - 1])
        for n in range(decodes + 1):
            if n:
                padded_1S = next_1S[:, n - 1 : n]
                logits, new = model.decode(padded_1S, caches)
                caches = [tuple(torch.cat(pair, dim=1) for pair in zip(*layer, strict=True)) for layer in zip(caches, new, strict=True)]
            yield f"{size}.{n}.tokens", padded_1S
            yield f"{size}.{n}.positions", torch.arange(size) if n == 0 else torch.tensor([real + n - 1])
            yield f"{size}.{n}.logits", logits
            for i, rows in enumerate(new):
                for cache, value in zip(cache_names(config), rows, strict=True):
                    yield f"{size}.{n}.{state_name(i, cache)}{ROWS}", value
