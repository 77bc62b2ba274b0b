"""A config on a target, measured: what a request costs there, after the compiled program equalled PyTorch."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.program import build_program, state_name
from search_spaces.config import SLMConfig
from search_spaces.counting import kv_bytes_per_token
from search_spaces.stages import cache_names
from search_spaces.workload import RequestTokens, Workload
from targets.arrays import write_arrays
from targets.measurement import Measurement, Timing
from targets.program import ROWS, Sample, Step
from targets.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.model import SLM
    from search_spaces.precision import Precision

DECODE_STEPS = 8
"""How many decode steps are compared with PyTorch before anything is timed; fewer if the request generates fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """A request as measured.

    Attributes:
        prefill_s: seconds to read the prompt and give the first logits.
        decode_s_per_token: seconds per generated token at the mean context of the request.
        request_s: prefill plus every generated token.
        bytes_per_s: bytes of generated text per second of decoding.
        peak_bytes: counted: packed weights, the cache of the whole request, and the larger workspace.
        measurement: the raw record.
    """

    prefill_s: float
    decode_s_per_token: float
    request_s: float
    bytes_per_s: float
    peak_bytes: int
    measurement: Measurement

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the raw record under `measurement`."""
        names = ("prefill_s", "decode_s_per_token", "request_s", "bytes_per_s", "peak_bytes")
        return {name: getattr(self, name) for name in names} | {"measurement": self.measurement.to_dict()}


def latency(measurement: Measurement, config: SLMConfig, tokens: RequestTokens, workload: Workload) -> Latency:
    """Derives a request's figures from the raw times of `prefill` and `decode`."""
    prefill_s, decode_s = measurement.median_s("prefill"), measurement.median_s("decode")
    decoding_s = tokens.generated * decode_s
    return Latency(
        prefill_s=prefill_s,
        decode_s_per_token=decode_s,
        request_s=prefill_s + decoding_s,
        bytes_per_s=workload.generate_bytes / decoding_s,
        peak_bytes=measurement.packed_bytes + kv_bytes_per_token(config) * tokens.total + max(measurement.workspace_bytes.values()),
        measurement=measurement,
    )


def measure_request(
    target: Target,
    config: SLMConfig,
    tokens: RequestTokens,
    workload: Workload,
    *,
    seed: int,
    model: "SLM | None",
    precision: "Precision",
    timing: Timing,
) -> Latency:
    """Compiles a model for a request, checks it and times it; nothing of it is kept.

    Args:
        seed, model, precision: as for `make_sample`.

    Raises:
        TargetError: if it cannot be compiled or measured, or differs from PyTorch.
    """
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        artifact = target.compile(build_program(config, tokens, precision), Path(folder))
        measurement = target.measure(artifact, make_sample(config, tokens, seed, model, precision), timing)
    return latency(measurement, config, tokens, workload)


def make_sample(config: SLMConfig, tokens: RequestTokens, seed: int, model: "SLM | None" = None, precision: "Precision" = "fp32") -> Sample:
    """A scripted prefill and up to `DECODE_STEPS` decode steps with PyTorch's results, and what to time.

    Nothing is computed until a target that computes calls `Sample.write`.

    Args:
        config: the architecture.
        tokens: the request the program was built for.
        seed: of the weights (when `model` is None) and of the tokens.
        model: trained or otherwise given weights, float32 on the CPU.
        precision: of the matrices; PyTorch's results are those of the rounded weights.
    """
    caches = [(i, cache) for i in range(config.num_layers) for cache in cache_names(config)]
    rows = [state_name(i, cache) + ROWS for i, cache in caches]

    def step(n: int) -> Step:
        function = "prefill" if n == 0 else "decode"
        return Step(
            function=function,
            inputs={"tokens": f"step{n}.tokens", "positions": f"step{n}.positions"},
            expected={name: f"step{n}.{name}" for name in ("logits", *rows)},
        )

    steps = _decode_steps(tokens)
    last = {"tokens": f"step{steps}.tokens", "positions": "timed.positions"}
    return Sample(
        write=lambda path: _write(config, tokens, seed, model, precision, path),
        steps=tuple(step(n) for n in range(steps + 1)),
        timed={"prefill": (step(0).inputs, 0), "decode": (last, tokens.mid_context)},
    )


def _decode_steps(tokens: RequestTokens) -> int:
    """Decode steps that fit the program's state, which holds the request and no more."""
    return min(DECODE_STEPS, tokens.generated)


def _write(config: SLMConfig, tokens: RequestTokens, seed: int, model: "SLM | None", precision: "Precision", path: Path) -> None:
    import copy

    from search_spaces.model import SLM

    if model is None:
        model = randomise(SLM(config), seed)
    elif precision != "fp32":
        model = copy.deepcopy(model)  # its weights are rounded in place
    write_sample(path, model, precision, lambda rounded: _steps(config, tokens, seed, rounded))


def write_sample(path: Path, model: "SLM", precision: "Precision", steps: "Callable[[SLM], Iterator[tuple[str, Tensor]]]") -> None:
    """Writes a sample's arrays one at a time: large models are held once, and nothing beside them.

    Args:
        model: its weights are written as a device stores them, then rounded in place.
        steps: gives the further arrays by name, from the rounded model.
    """
    import torch

    from search_spaces.quantisation import round_weights, stored_tensors

    def arrays() -> "Iterator[tuple[str, Tensor]]":
        for name, tensor, _ in stored_tensors(model, precision):
            yield name, tensor
        round_weights(model, precision)
        yield from steps(model)

    with torch.inference_mode():
        write_arrays(path, ((name, value.detach().numpy()) for name, value in arrays()))


def _steps(config: SLMConfig, tokens: RequestTokens, seed: int, model: "SLM") -> "Iterator[tuple[str, Tensor]]":
    """The inputs of the scripted run, and what PyTorch gives."""
    import torch

    yield "timed.positions", torch.tensor([tokens.mid_context])
    steps = _decode_steps(tokens)
    ids_S = torch.randint(config.vocab_size, (tokens.prompt + steps,), generator=torch.Generator().manual_seed(seed))
    logits, caches = model.prefill(ids_S[None, : tokens.prompt])
    new = caches
    for n in range(steps + 1):
        first, count = (0, tokens.prompt) if n == 0 else (tokens.prompt + n - 1, 1)
        ids = ids_S[None, first : first + count]
        if n > 0:
            logits, new = model.decode(ids, caches)
            caches = [tuple(torch.cat(pair, dim=1) for pair in zip(*layer, strict=True)) for layer in zip(caches, new, strict=True)]
        yield f"step{n}.tokens", ids
        yield f"step{n}.positions", torch.arange(first, first + count)
        yield f"step{n}.logits", logits
        for i, layer_rows in enumerate(new):
            for cache, value in zip(cache_names(config), layer_rows, strict=True):
                yield f"step{n}.{state_name(i, cache)}{ROWS}", value


def randomise(model: "SLM", seed: int) -> "SLM":
    """Weights for a check: as a training starts, with every vector (norms, biases, series) moved off its default.

    A bias of zero or a scale of one would hide a wrong one.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    model.initialise(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.endswith((".scale", ".shift")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
