"""A target that runs programs with ONNX Runtime on this machine's processor: a runtime other than TVM, in one file.

Each stage of a program becomes an ONNX graph, once for all programs (`export_stages`); a function is a chain of sessions, one
for each call of a stage, with that call's weights. Two child processes do the work, so that a crash or a hang costs one
trial: one exports, the other measures and holds no PyTorch, whose threads would spin beside ONNX Runtime's.

What is timed is a whole call of a function: all its sessions, and the Python between them (some ten microseconds each).
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.arrays import ArrayFile
from targets.compile_cache import CompileCache, sources
from targets.measurement import NOISY_IQR, SLOW, Measurement, Timing, interquartile_range
from targets.memory import held_bytes
from targets.program import ROWS, Function, Program, Sample, Stage, Step
from targets.quiet import measuring, resting, wait_for_turn, working, yield_to_measuring
from targets.spec import DeviceSpec, InvalidDevice
from targets.target import TargetError
from targets.worker import Worker, WorkerError

OPTIMIZATIONS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC", "off": "ORT_DISABLE_ALL"}
"""Values of the device file's option `optimization`: how much ONNX Runtime rewrites graphs when it loads them."""
REFERENCE_SIZE = 384
"""Rows, columns and depth of the product that is timed beside every measurement."""
_ROW_SIZE = 4096
"""Depth and columns of the product of one row that says how fast weights are read: 64 MiB of them."""
_COMPILE_TIMEOUT_S, _CEILINGS_TIMEOUT_S = 600.0, 120.0
_FEWEST_REPEATS = 5
_REFERENCE = "_reference"
_MANIFEST = "manifest.json"
_ME = "edgewise_onnxruntime"


class OnnxRuntimeTarget:
    """This machine through ONNX Runtime.

    Args:
        spec: the device file. `cores`, `memory_bytes` and the ceilings are found out where it leaves them out; the option
            `optimization` is one of `OPTIMIZATIONS`.
        cache_dir: where exported stages are kept; None: a folder that goes away.

    Raises:
        InvalidDevice: if the device file asks for what this target does not know.
    """

    def __init__(self, spec: DeviceSpec, cache_dir: Path | None = None) -> None:
        for key in spec.options:
            if key != "optimization":
                raise InvalidDevice(f"target {spec.name!r}: options.{key} is not known; the only option is optimization")
        self._optimization = spec.options.get("optimization", "all")
        if self._optimization not in OPTIMIZATIONS:
            known = ", ".join(OPTIMIZATIONS)
            raise InvalidDevice(f"target {spec.name!r}: options.optimization={self._optimization!r} is not one of {known}; choose one")
        self._declared, self._spec = spec, None  # type: tuple[DeviceSpec, DeviceSpec | None]
        self._temporary = tempfile.TemporaryDirectory(prefix="edgewise-") if cache_dir is None else None
        self._cache = cache_dir or Path(self._temporary.name)  # type: ignore[union-attr]  # one of them is there
        self._exporter = Worker({"OMP_NUM_THREADS": "1"})
        self._exporting = threading.Lock()
        self._runner = Worker({"OPENBLAS_NUM_THREADS": "1"}, without=("torch",), affinity=spec.affinity)
        self._reference_best_s = 0.0

    @property
    def spec(self) -> DeviceSpec:
        """The device with its cores, its memory and its ceilings, which are found out at the first use."""
        if self._spec is None:
            spec = dataclasses.replace(
                self._declared,
                cores=self._declared.cores or len(self._declared.affinity or os.sched_getaffinity(0)),
                memory_bytes=self._declared.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            )
            if not (spec.flops_per_s and spec.read_bytes_per_s):
                with measuring():
                    found = self._ask(self._runner, "measuring the ceilings", _CEILINGS_TIMEOUT_S, "ceilings", spec.cores)
                spec = dataclasses.replace(
                    spec,
                    flops_per_s=spec.flops_per_s or found["flops_per_s"],
                    read_bytes_per_s=spec.read_bytes_per_s or found["read_bytes_per_s"],
                )
            self._spec = spec
        return self._spec

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Exports the program's stages; may be called from another thread than the rest.

        Raises:
            TargetError: if a stage cannot be exported.
        """
        with self._exporting:
            wait_for_turn()
            with resting():  # the worker is at work instead
                return Path(self._ask(self._exporter, "exporting", _COMPILE_TIMEOUT_S, "export_stages", program, self._cache, out_dir))

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Compares every output of the sample's steps, then times.

        Raises:
            TargetError: if an output differs, the process dies, or time is up.
        """
        spec = self.spec
        best_s = self._reference_best_s or 2.0 * REFERENCE_SIZE**3 / spec.flops_per_s
        with tempfile.TemporaryDirectory(prefix="sample-", dir=artifact.parent) as folder:
            path = Path(folder) / "sample.safetensors"
            with working():
                sample.write(path)
            job = Job(
                artifact=artifact, sample=path, steps=sample.steps, timed=sample.timed, tolerance=sample.tolerance, timing=timing,
                reference_best_s=best_s, threads=spec.cores, optimization=self._optimization,
            )  # fmt: skip
            with measuring() as quiet:
                time.sleep(spec.cooldown_s)
                record = self._ask(self._runner, "measuring", spec.timeout_s or timing.timeout_s, "run_job", job)
        self._reference_best_s = min(best_s, *record["reference_s"])
        return Measurement(device=spec.name, reference_best_s=best_s, quiet=quiet, **record)

    def close(self) -> None:
        """Ends both processes, also in the middle of an export that another thread waits for."""
        self._exporter.kill()
        with self._exporting:
            self._exporter.close()
        self._runner.close()
        if self._temporary:
            self._temporary.cleanup()

    def _ask(self, worker: Worker, what: str, timeout_s: float, function: str, *args: Any) -> Any:
        try:
            return worker.call(f"{_ME}:{function}", *args, timeout_s=timeout_s)
        except WorkerError as error:
            raise TargetError(f"{what} failed: {error}") from None


# --- exporting: in a process that has PyTorch ---------------------------------------------------


def export_stages(program: Program, cache_dir: Path, out_dir: Path) -> Path:
    """Writes down which ONNX graph each call of the program runs; graphs that were exported before are taken as they are."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")}
    cache = CompileCache(cache_dir, {"runtime": "onnxruntime", **versions})
    out_dir.mkdir(parents=True, exist_ok=True)
    with working():
        for key, stage in program.stages.items():
            yield_to_measuring()
            shutil.copyfile(_exported(stage, cache), out_dir / f"{key}.onnx")  # without weights, so they are small
    manifest = {
        "functions": {name: _described(function, program) for name, function in program.functions.items()},
        "state": {name: list(spec.shape) for name, spec in program.state.items()},
        "rows": program.bounds["C"],
    }
    (out_dir / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return out_dir


def _described(function: Function, program: Program) -> dict[str, Any]:
    calls = [{"stage": c.stage, "inputs": c.inputs, "weights": c.weights, "outputs": c.outputs} for c in function.calls]
    state = [name for name in function.inputs if name in program.state]
    return {"calls": calls, "state": state, "outputs": function.outputs, "last": function.last}


def _exported(stage: Stage, cache: CompileCache) -> Path:
    """The stage's ONNX file. The source code that defines a stage is part of its name, since it is part of what it is."""
    name = f"{stage.key}-{sources(stage.export.__module__)[:16]}.onnx"
    return cache.find(name) or cache.add(name, lambda path: _export(stage, path))


def _export(stage: Stage, path: Path) -> None:
    import onnx
    import torch

    # What is kept as one operator for TVM is taken apart into operators that ONNX has.
    exported = stage.export().run_decompositions()
    # Unoptimised, or weights that are none yet would be folded into constants; ONNX Runtime optimises when it has them.
    program = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    model = program.model_proto
    for tensor in model.graph.initializer:
        if tensor.name.startswith("stage."):  # a weight, which comes with the sample
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="sample")
    path.write_bytes(model.SerializeToString())


# --- measuring: in a process that has ONNX Runtime and NumPy --------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the measuring process is asked to do."""

    artifact: Path
    sample: Path
    steps: tuple[Step, ...]
    timed: dict[str, tuple[dict[str, str], int]]
    tolerance: float
    timing: Timing
    reference_best_s: float
    threads: int
    optimization: str


class CheckFailed(Exception):
    """An output that differs from the expected one."""


class Chain:
    """A program in sessions, with the state that grows from step to step."""

    def __init__(self, artifact: Path, arrays: ArrayFile, threads: int, optimization: str) -> None:
        import onnxruntime as ort

        self._value = ort.OrtValue.ortvalue_from_numpy
        self._manifest = json.loads((artifact / _MANIFEST).read_text(encoding="utf-8"))
        self._weights: dict[str, Any] = {}
        self._folder, self._arrays = artifact, arrays
        self.weight_bytes = 0
        self._functions = {
            name: [(self._session(call, threads, optimization), call) for call in function["calls"]]
            for name, function in self._manifest["functions"].items()
        }
        rows = self._manifest["rows"]
        shapes = {name: [rows if isinstance(size, str) else size for size in shape] for name, shape in self._manifest["state"].items()}
        self._state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._rows = 0
        self.workspace_bytes: dict[str, int] = {}

    def _session(self, call: Mapping[str, Any], threads: int, optimization: str) -> Any:
        options = _options(threads, optimization)
        wanted = {name: self._weight(in_program) for name, in_program in call["weights"].items()}
        options.add_external_initializers([f"stage.{name}" for name in wanted], list(wanted.values()))
        return _opened(str(self._folder / f"{call['stage']}.onnx"), options)

    def _weight(self, name: str) -> Any:
        """A weight, read once however many sessions use it."""
        if name not in self._weights:
            array = self._arrays.read(name)
            self.weight_bytes += array.nbytes
            self._weights[name] = self._value(array)
        return self._weights[name]

    def call(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a function on inputs and state, appends the rows it returns that count, and gives its outputs."""
        described = self._manifest["functions"][function]
        if not described["state"]:
            self._rows = 0
        values = self.run(function, self.arguments(function, inputs, self._rows))
        self.workspace_bytes[function] = sum(int(np.prod(value.shape())) * 4 for value in values.values())
        outputs = {name: values[name].numpy() for name in described["outputs"]}
        new = 0
        for name, array in outputs.items():
            if name.endswith(ROWS):
                new = int(inputs[described["last"]][0]) + 1 if described["last"] else array.shape[1]
                self._state[name.removesuffix(ROWS)][:, self._rows : self._rows + new] = array[:, :new]
        self._rows += new
        return outputs

    def arguments(self, function: str, inputs: Mapping[str, NDArray[Any]], rows: int) -> dict[str, Any]:
        """The values that a call starts with, which sees `rows` rows of state."""
        state = {name: self._state[name][:, :rows] for name in self._manifest["functions"][function]["state"]}
        return {name: self._value(np.ascontiguousarray(array)) for name, array in {**inputs, **state}.items()}

    def run(self, function: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """All values by name after the function's sessions have run, one after the other; none is copied on the way."""
        values = dict(values)
        for session, call in self._functions[function]:
            feeds = dict(zip(session.inputs, (values[name] for name in call["inputs"]), strict=True))
            values |= zip(call["outputs"], session.run(feeds), strict=True)
        return values


class _Opened:
    """A session that is called with values by input name; inputs that the graph does not use are not asked for."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = [spec.name for spec in session.get_inputs()]
        self._outputs = [spec.name for spec in session.get_outputs()]

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs, as ONNX Runtime holds them."""
        outputs: list[Any] = self._session.run_with_ort_values(self._outputs, feeds)
        return outputs


def _options(threads: int, optimization: str) -> Any:
    import onnxruntime as ort

    _share_threads(threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATIONS[optimization])
    return options


@functools.cache
def _share_threads(threads: int) -> None:
    """One pool for all sessions: those of a session that is done would spin beside the next one's."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)


def _opened(model: "str | bytes", options: Any) -> _Opened:
    import onnxruntime as ort

    return _Opened(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]))


def run_job(job: Job) -> dict[str, Any]:
    """Checks and times a program.

    Returns:
        Fields of a `Measurement`.

    Raises:
        CheckFailed: if an output differs from the expected one.
    """
    before = held_bytes()
    arrays = ArrayFile(job.sample)
    chain = Chain(job.artifact, arrays, job.threads, job.optimization)
    errors = _check(chain, arrays, job)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (inputs, rows) in job.timed.items():
        values = chain.arguments(name, {key: arrays.read(array) for key, array in inputs.items()}, rows)
        calls[name] = functools.partial(chain.run, name, values)
        calls[name]()
    after = held_bytes()
    calls[_REFERENCE] = _product(REFERENCE_SIZE, REFERENCE_SIZE, job.threads)
    times, attempts = _time(calls, job)
    return {
        "reference_s": tuple(times.pop(_REFERENCE)),
        "times_s": {name: tuple(found) for name, found in times.items()},
        "measured_peak_bytes": None if before is None or after is None else max(0, after - before),
        "workspace_bytes": chain.workspace_bytes,
        "packed_bytes": chain.weight_bytes,
        "errors": errors,
        "attempts": attempts,
    }


def _check(chain: Chain, arrays: ArrayFile, job: Job) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, step in enumerate(job.steps):
        outputs = chain.call(step.function, {key: arrays.read(array) for key, array in step.inputs.items()})
        for name, array in step.expected.items():
            expected = arrays.read(array)
            error = float(np.abs(outputs[name] - expected).max() / (np.abs(expected).max() or 1.0))
            if not error <= job.tolerance:
                raise CheckFailed(f"step {number} ({step.function}): output {name} differs by {error:.2g} of its largest value")
            errors[step.function] = max(errors.get(step.function, 0.0), error)
    return errors


def _time(calls: Mapping[str, Callable[[], Any]], job: Job) -> tuple[dict[str, list[float]], int]:
    """Seconds per call, repeats interleaved; taken anew while they are noisy or the machine is slow, the best attempt kept."""
    timers = {name: _timer(call, job.timing) for name, call in calls.items()}
    best: dict[str, list[float]] = {}
    attempts = 0
    while attempts <= job.timing.retries and not (best and _disturbance(best, job) <= 1):
        attempts += 1
        times: dict[str, list[float]] = {name: [] for name in timers}
        until = time.perf_counter() + job.timing.budget_s
        for repeat in range(job.timing.repeats):
            if repeat >= _FEWEST_REPEATS and time.perf_counter() > until:
                break
            for name, timer in timers.items():
                times[name].append(timer())
        if not best or _disturbance(times, job) < _disturbance(best, job):
            best = times
    return best, attempts


def _disturbance(times: Mapping[str, list[float]], job: Job) -> float:
    """At most 1 for times that are neither noisy nor slow."""
    spread = max(interquartile_range(tuple(t)) / statistics.median(t) for name, t in times.items() if name != _REFERENCE)
    return max(spread / NOISY_IQR, statistics.median(times[_REFERENCE]) / job.reference_best_s / SLOW)


def _timer(call: Callable[[], Any], timing: Timing) -> Callable[[], float]:
    """Gives seconds per call, over enough calls to last `min_repeat_s`; warms up first."""

    def elapsed(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            call()
        return time.perf_counter() - begin

    once, warm_until = elapsed(1), time.perf_counter() + timing.warmup_s
    while time.perf_counter() < warm_until:
        once = min(once, elapsed(1))
    number = max(1, round(timing.min_repeat_s / max(once, 1e-9)))
    return lambda: elapsed(number) / number


def ceilings(threads: int) -> dict[str, float]:
    """What ONNX Runtime's own products reach here: `flops_per_s` with many rows, `read_bytes_per_s` of weights with one."""
    many, one = _product(REFERENCE_SIZE, REFERENCE_SIZE, threads), _product(1, _ROW_SIZE, threads)
    return {"flops_per_s": 2.0 * REFERENCE_SIZE**3 / _best(many, 120), "read_bytes_per_s": 4.0 * _ROW_SIZE**2 / _best(one, 30)}


def _best(call: Callable[[], Any], repeats: int) -> float:
    timer = _timer(call, Timing(min_repeat_s=0.0))
    return min(timer() for _ in range(repeats))


def _product(rows: int, size: int, threads: int) -> Callable[[], Any]:
    """A product of `rows` rows with a weight of `size` squared."""
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((size, size), np.float32), "weight")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, size]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = _opened(model.SerializeToString(), _options(threads, "all"))
    feeds = {"x": ort.OrtValue.ortvalue_from_numpy(rng.standard_normal((rows, size), np.float32))}
    return lambda: session.run(feeds)
