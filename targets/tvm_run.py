"""The run job: load a compiled program, check it against expected outputs, then time it, on whatever device a session reaches.

Runs in a process that holds nothing but TVM's runtime and NumPy: another library's threads would spin and
halve what is measured.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from targets.arrays import ArrayFile
from targets.job import MANIFEST, READ_VALUES, Job
from targets.layout import StoredArray, packed_shape
from targets.machine import Machine, Memory
from targets.measurement import NOISY_IQR, SLOW, Timing, interquartile_range
from targets.memory import held_bytes
from targets.program import Step
from targets.quiet import yield_to_measuring
from targets.tvm_profile import take_profile
from targets.tvm_session import Session, Timer

_FEWEST_REPEATS = 5
_PRODUCTS, _READS = 120, 30
"""How often the kernels that give the ceilings are timed."""
_CEILING_S = 2.0
"""A slow device times each of them for as long at most."""
_REFERENCE = "_reference"
Shapes = tuple[tuple[int, ...], ...]


class CheckFailed(Exception):
    """A compiled output that differs from the expected one; the message says which and by how much."""


def run_job(session: Session, job: Job) -> dict[str, Any]:
    """Checks and times a compiled program.

    Returns:
        `times_s`, `reference_s`, `measured_peak_bytes`, `packed_bytes`, `errors`, `attempts` and `profile` of a
            `Measurement`.

    Raises:
        CheckFailed: if an output differs from the expected one.
    """
    artifact = Path(job.artifact)
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    device = session.device(manifest["device"])
    on_cpu = session.is_here and device == tvm.cpu()  # elsewhere, or on a GPU, this process's memory and clock say nothing
    before = held_bytes() if on_cpu else None
    with session.at_work():
        arrays = ArrayFile(Path(job.sample))
        machine = session.machine(session.load(artifact / manifest["library"]), manifest, device)
        packed_bytes = _hold(machine, [StoredArray.from_json(weight) for weight in manifest["weights"]], arrays)
        errors = _check(machine, arrays, job.steps, job.tolerance)
        calls = {
            name: (name, machine.arguments(name, {key: arrays.read(array) for key, array in inputs.items()}, rows))
            for name, (inputs, rows) in job.timed.items()
        }
        for function, arguments in calls.values():
            machine.run(function, arguments)
    after = held_bytes() if on_cpu else None
    reference = Probe(session, Path(job.probe), device).product(*job.reference)
    began = time.perf_counter()
    timers = {name: session.time_function(machine, function, arguments) for name, (function, arguments) in calls.items()}
    times, reference_s, attempts = _time(timers, reference, job)
    budget_s = job.timing.profile_share * (time.perf_counter() - began)
    try:
        profile = take_profile(machine.vm, calls, manifest["operators"], Path(job.probe), budget_s) if on_cpu else None
    except (AssertionError, RuntimeError):  # the times stand without it
        profile = None
    return {
        "times_s": times,
        "reference_s": reference_s,
        "measured_peak_bytes": None if before is None or after is None else max(0, after - before),
        "packed_bytes": packed_bytes,
        "errors": errors,
        "attempts": attempts,
        "profile": profile,
    }


def _hold(machine: Machine, weights: list[StoredArray], arrays: ArrayFile) -> int:
    """Gives a machine its weights, packed one at a time, so that nothing else of any is left; returns their bytes."""
    packed_bytes = 0

    def packed() -> Iterator[Any]:
        nonlocal packed_bytes
        for weight in weights:
            yield_to_measuring()
            array = weight.apply(arrays.read)
            packed_bytes += array.nbytes
            yield machine.memory.filled(array.shape, array.dtype.name, partial(np.copyto, src=array))
            del array

    machine.hold(packed())
    return packed_bytes


def _check(machine: Machine, arrays: ArrayFile, steps: tuple[Step, ...], tolerance: float) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, step in enumerate(steps):
        outputs = machine.call(step.function, {key: arrays.read(array) for key, array in step.inputs.items()})
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


def _time(timers: dict[str, Timer], reference: Callable[[], float], job: Job) -> tuple[dict[str, list[float]], list[float], int]:
    """Raw seconds per call of each function and of the reference kernel, repeats interleaved.

    Interleaving spreads a disturbance over all functions instead of one. While a spread is too wide, or the
    reference says that the machine is slow, the times are taken anew; the least disturbed ones are kept.
    """
    timing = job.timing
    evaluators = {name: _evaluator(timer, timing) for name, timer in timers.items()}
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


def _evaluator(timer: Timer, timing: Timing) -> Callable[[], float]:
    """A function that gives seconds per call, over enough calls to last `min_repeat_s`; warms up first."""
    timer(1)
    once, warm_until = timer(1), time.perf_counter() + timing.warmup_s
    while time.perf_counter() < warm_until:
        once = min(once, timer(1))
    number = max(1, round(timing.min_repeat_s / max(once, 1e-9)))
    return lambda: timer(number)


class Probe:
    """The compiled probe kernels with their data (`tvm_probe.py`)."""

    def __init__(self, session: Session, library: Path, device: Any) -> None:
        self._session, self._device = session, device
        self._module = session.load(library)

    def product(self, size: int, tile: int) -> Callable[[], float]:
        """Seconds of one fixed matrix product, `size` cubed."""
        generator = np.random.default_rng(0)
        shapes = ((1, size, size), packed_shape(size, size, tile), (1, size, size))
        arrays = [tvm.runtime.tensor(generator.standard_normal(shape, dtype=np.float32), self._device) for shape in shapes]
        return self._timer("product", arrays)

    def read(self, shapes: Shapes) -> Callable[[], float]:
        """Seconds of one call of the kernel that reads memory, whose arguments have these shapes, the result's last."""
        memory = Memory(self._device)
        given = [ones(self._module, shape, memory) for shape in shapes[:-1]]
        return self._timer("read", [*given, tvm.runtime.empty(shapes[-1], "float32", self._device)])

    def _timer(self, name: str, arrays: list[Any]) -> Callable[[], float]:
        timer = self._session.time_kernel(self._module, name, arrays, self._device)

        def timed() -> float:
            timer(1)  # what ran before has had the caches
            return timer(1)

        for _ in range(3):
            timer(1)
        return timed


def ones(module: Any, shape: tuple[int, ...], memory: Memory) -> Any:
    """An array of ones, made on the device by the kernel of that name: it may be large, and the device far away."""
    array = memory.empty((int(np.prod(shape)),), "float32")
    module["ones"](array)
    return array._create_view(shape)


def ceilings(session: Session, library: str, kind: str, size: int, tile: int, reading: Shapes) -> dict[str, float]:
    """The best rates seen: `flops_per_s` of the product and `read_bytes_per_s` of the kernel that reads `READ_VALUES`.

    Args:
        library: path of the probe kernels.
        kind: of the device that they run on.
        size, tile: of the product.
        reading: shapes of what that kernel takes, the result's last.
    """
    probe = Probe(session, Path(library), session.device(kind))
    product, read = probe.product(size, tile), probe.read(reading)
    return {
        "flops_per_s": 2.0 * size**3 / _best(product, _PRODUCTS),
        "read_bytes_per_s": 4.0 * READ_VALUES / _best(read, _READS),
    }


def _best(timer: Callable[[], float], repeats: int) -> float:
    best, until = timer(), time.perf_counter() + _CEILING_S
    for _ in range(repeats - 1):
        if time.perf_counter() > until:
            break
        best = min(best, timer())
    return best
