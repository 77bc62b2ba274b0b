"""The run job: load a compiled program, check it against expected outputs, then time it.

Runs in a process that holds nothing but TVM's runtime and NumPy: another library's threads would spin and
halve what is measured.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm.runtime.vm import VirtualMachine  # not `relax`: the child may hold TVM's small runtime library alone

from targets.arrays import ArrayFile
from targets.job import MANIFEST, Job
from targets.layout import StoredArray, packed_shape
from targets.measurement import NOISY_IQR, SLOW, Timing, interquartile_range
from targets.memory import held_bytes
from targets.program import ROWS, Step
from targets.tvm_profile import take_profile

_FEWEST_REPEATS = 5
_REFERENCE = "_reference"


class CheckFailed(Exception):
    """A compiled output that differs from the expected one; the message says which and by how much."""


class Runner:
    """A loaded program with its weights and its growing state.

    State lives in one buffer per name, of the program's largest size; a call sees the rows so far as a view,
    and new rows are copied behind them, so nothing moves the cache. It starts as zeros: a decode timed further
    along than the check went must not read whatever lay in memory.
    """

    def __init__(self, artifact: Path, arrays: ArrayFile) -> None:
        self.manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        self.device = tvm.cpu()
        self.machine = VirtualMachine(tvm.runtime.load_module(str(artifact / self.manifest["library"])), self.device)
        self.packed_bytes = 0
        # Converted once: a list would be converted anew in every call.
        self.weights = tvm_ffi.convert([self._packed(StoredArray.from_json(weight), arrays) for weight in self.manifest["weights"]])
        rows = self.manifest["rows"]
        self.state = {
            name: tvm.runtime.tensor(np.zeros([rows if isinstance(size, str) else size for size in shape], dtype), self.device)
            for name, (shape, dtype) in self.manifest["state"].items()
        }
        self.rows = 0

    def _packed(self, weight: StoredArray, arrays: ArrayFile) -> Any:
        """A weight as the program takes it; nothing else of it is left when this returns."""
        array = weight.apply(arrays.read)
        self.packed_bytes += array.nbytes
        return tvm.runtime.tensor(array, self.device)

    def call(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Runs a function on inputs and state, appends the rows it returns, and gives its outputs."""
        spec = self.manifest["functions"][function]
        result = self.machine[function](*self.arguments(function, inputs, self.rows))
        outputs = dict(zip(spec["outputs"], result, strict=True))
        new = 0
        for name, value in outputs.items():
            if name.endswith(ROWS):
                new = value.shape[1]
                self._view(name.removesuffix(ROWS), self.rows, new).copyfrom(value)
        self.rows += new
        return outputs

    def arguments(self, function: str, inputs: Mapping[str, NDArray[Any]], rows: int) -> list[Any]:
        """The arguments of a call that sees `rows` rows of state."""
        spec = self.manifest["functions"][function]
        values = [tvm.runtime.tensor(np.ascontiguousarray(inputs[name]), self.device) for name in spec["inputs"]]
        return [*values, *(self._view(name, 0, rows) for name in spec["state"]), self.weights]

    def _view(self, name: str, first: int, count: int) -> Any:
        buffer = self.state[name]
        shape = list(buffer.shape)
        width = int(np.prod(shape[2:])) * 4
        return buffer._create_view([1, count, *shape[2:]], "float32", relative_byte_offset=first * width)


def run_job(job: Job) -> dict[str, Any]:
    """Checks and times a compiled program.

    Returns:
        `times_s`, `reference_s`, `measured_peak_bytes`, `packed_bytes`, `errors`, `attempts` and `profile` of a
            `Measurement`.

    Raises:
        CheckFailed: if an output differs from the expected one.
    """
    before = held_bytes()
    arrays = ArrayFile(Path(job.sample))
    runner = Runner(Path(job.artifact), arrays)
    errors = _check(runner, arrays, job.steps, job.tolerance)
    calls = {
        name: (name, runner.arguments(name, {key: arrays.read(array) for key, array in inputs.items()}, rows))
        for name, (inputs, rows) in job.timed.items()
    }
    for function, arguments in calls.values():
        runner.machine[function](*arguments)
    after = held_bytes()
    reference = Probe(Path(job.probe)).product(*job.reference)
    began = time.perf_counter()
    times, reference_s, attempts = _time(runner.machine, calls, reference, job)
    budget_s = job.timing.profile_share * (time.perf_counter() - began)
    try:
        profile = take_profile(runner.machine, calls, runner.manifest["operators"], Path(job.probe), budget_s)
    except (AssertionError, RuntimeError):  # the times stand without it
        profile = None
    return {
        "times_s": times,
        "reference_s": reference_s,
        "measured_peak_bytes": None if before is None or after is None else max(0, after - before),
        "packed_bytes": runner.packed_bytes,
        "errors": errors,
        "attempts": attempts,
        "profile": profile,
    }


def _check(runner: Runner, arrays: ArrayFile, steps: tuple[Step, ...], tolerance: float) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, step in enumerate(steps):
        outputs = runner.call(step.function, {key: arrays.read(array) for key, array in step.inputs.items()})
        for name, array in step.expected.items():
            expected, got = arrays.read(array), outputs[name].numpy()
            if got.shape != expected.shape:
                raise CheckFailed(f"step {number} ({step.function}): output {name} has shape {got.shape}, not {expected.shape}")
            error = relative_error(got, expected)
            if not error <= tolerance:
                raise CheckFailed(
                    f"step {number} ({step.function}): output {name} differs from PyTorch's"
                    f" by {error:.2g} of its largest value (limit {tolerance:.2g})"
                )
            errors[step.function] = max(errors.get(step.function, 0.0), error)
    return errors


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference over the largest expected magnitude; nan where either is not finite."""
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(got - expected).max()) / scale


def _time(
    machine: Any, calls: dict[str, tuple[str, list[Any]]], reference: Callable[[], float], job: Job
) -> tuple[dict[str, list[float]], list[float], int]:
    """Raw seconds per call of each function and of the reference kernel, repeats interleaved.

    Interleaving spreads a disturbance over all functions instead of one. While a spread is too wide, or the
    reference says that the machine is slow, the times are taken anew; the least disturbed ones are kept.
    """
    timing = job.timing
    evaluators = {name: _evaluator(machine, function, arguments, timing) for name, (function, arguments) in calls.items()}
    evaluators[_REFERENCE] = reference
    best: dict[str, list[float]] = {}
    attempts = 0
    while attempts <= timing.retries and not (best and _disturbance(best, job) <= 1):
        attempts += 1
        times = _interleaved(evaluators, timing)
        if not best or _disturbance(times, job) < _disturbance(best, job):
            best = times
    reference_s = best.pop(_REFERENCE)
    return best, reference_s, attempts


def _disturbance(times: dict[str, list[float]], job: Job) -> float:
    """At most 1 for times that are neither noisy nor slow, by the rules of `Measurement`."""
    spread = max(interquartile_range(tuple(t)) / float(np.median(t)) for name, t in times.items() if name != _REFERENCE)
    slowdown = float(np.median(times[_REFERENCE])) / job.reference_best_s if job.reference_best_s else 1.0
    return max(spread / NOISY_IQR, slowdown / SLOW)


def _interleaved(evaluators: dict[str, Callable[[], float]], timing: Timing) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in evaluators}
    until = time.perf_counter() + timing.budget_s
    for repeat in range(timing.repeats):
        if repeat >= _FEWEST_REPEATS and time.perf_counter() > until:
            break
        for name, evaluate in evaluators.items():
            times[name].append(evaluate())
    return times


def _evaluator(machine: Any, function: str, arguments: list[Any], timing: Timing) -> Callable[[], float]:
    """A function that gives seconds per call, over enough calls to last `min_repeat_s`; warms up first."""
    run = machine[function]

    def elapsed(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            run(*arguments)
        return time.perf_counter() - begin

    elapsed(1)
    once, warm_until = elapsed(1), time.perf_counter() + timing.warmup_s
    while time.perf_counter() < warm_until:
        once = min(once, elapsed(1))
    number = max(1, round(timing.min_repeat_s / max(once, 1e-9)))
    return lambda: elapsed(number) / number


class Probe:
    """The compiled probe kernels with their data (`tvm_probe.py`)."""

    def __init__(self, library: Path) -> None:
        self._module = tvm.runtime.load_module(str(library))
        self._device = tvm.cpu()

    def product(self, size: int, tile: int) -> Callable[[], float]:
        """Seconds of one fixed matrix product, `size` cubed."""
        generator = np.random.default_rng(0)
        shapes = ((1, size, size), packed_shape(size, size, tile), (1, size, size))
        arrays = [tvm.runtime.tensor(generator.standard_normal(shape, dtype=np.float32), self._device) for shape in shapes]
        return self._timer("product", arrays)

    def read(self, values: int, parts: int, width: int) -> Callable[[], float]:
        """Seconds of one pass over `values` float32."""
        steps = values // (parts * width)
        arrays = [
            tvm.runtime.tensor(np.ones((parts, steps, width), dtype=np.float32), self._device),
            tvm.runtime.empty((parts, width), "float32", self._device),
        ]
        return self._timer("read", arrays)

    def _timer(self, name: str, arrays: list[Any]) -> Callable[[], float]:
        run = self._module[name]

        def once() -> float:
            begin = time.perf_counter()
            run(*arrays)
            return time.perf_counter() - begin

        for _ in range(3):
            once()
        return once


def ceilings(library: str, size: int, tile: int, values: int, parts: int, width: int, repeats: int = 30) -> dict[str, float]:
    """The best rates seen: `flops_per_s` of the product and `read_bytes_per_s` of the streaming read."""
    probe = Probe(Path(library))
    product, read = probe.product(size, tile), probe.read(values, parts, width)
    return {
        "flops_per_s": 2.0 * size**3 / min(product() for _ in range(4 * repeats)),
        "read_bytes_per_s": 4.0 * values / min(read() for _ in range(repeats)),
    }
