"""`LocalTarget`: this machine through TVM, in two child processes: one compiles, one measures.

The measuring child holds nothing but TVM's runtime, since another library's threads would spin and slow it.
"""

import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.cpu import Cpu
from targets.job import MANIFEST, PRODUCT_SIZE, READ_VALUES, Job
from targets.measurement import Measurement, Timing
from targets.program import Program, Sample
from targets.spec import DeviceSpec
from targets.target import TargetError
from targets.worker import Worker, WorkerError

COMPILE_TIMEOUT_S = 600.0
_DETECT_TIMEOUT_S = 180.0
_PROBE_FORMAT = 1
"""Counts up when the probe's kernels or the way they are timed change."""


class LocalTarget:
    """This machine's processor.

    Args:
        spec: the device file; zeros and blanks are detected and measured at the first use.
        cache_dir: where compiled kernels and the best rates seen are kept; None: a folder that goes away.
    """

    def __init__(self, spec: DeviceSpec, cache_dir: Path | None = None) -> None:
        self._declared = spec
        self._temporary = tempfile.TemporaryDirectory(prefix="edgewise-") if cache_dir is None else None
        self._cache = Path(self._temporary.name) if self._temporary else cache_dir
        assert self._cache is not None
        self._cache.mkdir(parents=True, exist_ok=True)
        self._spec: DeviceSpec | None = None
        cores = spec.cores or len(os.sched_getaffinity(0))
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._compiler = Worker(quiet)
        # TVM imports PyTorch wherever it is installed, and its threads with it.
        self._runner = Worker({**quiet, "TVM_NUM_THREADS": str(cores), "TVM_USE_RUNTIME_LIB": "1"}, without=("torch",))
        self._cores = cores
        self._reference_best_s = 0.0

    @property
    def spec(self) -> DeviceSpec:
        """The device with everything detected and its ceilings measured."""
        if self._spec is None:
            self._spec = self._complete()
        return self._spec

    @property
    def cpu(self) -> Cpu:
        """What the schedules need to know."""
        return _cpu(self.spec)

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Compiles in the compile worker.

        Raises:
            TargetError: if the compiler fails, crashes or takes too long.
        """
        return Path(
            self._ask(
                self._compiler,
                "compiling",
                COMPILE_TIMEOUT_S,
                "targets.tvm_compile:compile_program",
                program,
                self._llvm(self.spec),
                self.cpu,
                self._cache,
                out_dir,
            )
        )

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Checks, then times, in the measuring worker.

        Raises:
            TargetError: if an output differs, the program crashes or time is up.
        """
        spec = self.spec
        best_s = self._reference_best_s or 2.0 * PRODUCT_SIZE**3 / spec.flops_per_s
        with tempfile.TemporaryDirectory(prefix="sample-", dir=artifact.parent) as folder:
            path = Path(folder) / "sample.safetensors"
            sample.write(path)
            job = Job(
                artifact=str(artifact),
                sample=str(path),
                probe=str(self._probe(spec)),
                reference=(PRODUCT_SIZE, self.cpu.tile_columns),
                reference_best_s=best_s,
                steps=sample.steps,
                timed=sample.timed,
                tolerance=sample.tolerance,
                timing=timing,
            )
            record = self._ask(self._runner, "measuring", timing.timeout_s, "targets.tvm_run:run_job", job)
        self._reference_best_s = min(best_s, *record["reference_s"])
        manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        return Measurement(
            device=spec.name,
            times_s={name: tuple(times) for name, times in record["times_s"].items()},
            reference_s=tuple(record["reference_s"]),
            reference_best_s=best_s,
            measured_peak_bytes=record["measured_peak_bytes"],
            workspace_bytes=manifest["workspace_bytes"],
            packed_bytes=record["packed_bytes"],
            errors=record["errors"],
            attempts=record["attempts"],
        )

    def close(self) -> None:
        """Ends both workers."""
        self._compiler.close()
        self._runner.close()
        if self._temporary:
            self._temporary.cleanup()

    # --- finding out about the machine ------------------------------------------------------

    def _complete(self) -> DeviceSpec:
        # Asked anew in every session: a cache folder may have come from another machine.
        detected = self._ask(self._compiler, "detecting the processor", _DETECT_TIMEOUT_S, "targets.tvm_probe:detect")
        declared = self._declared
        spec = dataclasses.replace(
            declared,
            triple=declared.triple or detected["triple"],
            cpu=declared.cpu or detected["cpu"],
            vector_bytes=declared.vector_bytes or detected["vector_bytes"],
            cores=self._cores,
            memory_bytes=declared.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
        if spec.flops_per_s and spec.read_bytes_per_s:
            return spec
        best = self._best(spec, self._ceilings(spec))
        return dataclasses.replace(
            spec,
            flops_per_s=spec.flops_per_s or best["flops_per_s"],
            read_bytes_per_s=spec.read_bytes_per_s or best["read_bytes_per_s"],
        )

    def _best(self, spec: DeviceSpec, seen: Mapping[str, float]) -> dict[str, float]:
        """The best rates of this processor in any session, kept in the cache: one taken while busy is no ceiling."""
        path = self._file("ceilings", spec, "json")
        try:
            kept = {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            kept = {}
        best = {name: max(value, kept.get(name, 0.0)) for name, value in seen.items()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(best, file)
        Path(file.name).replace(path)
        return best

    def _file(self, what: str, spec: DeviceSpec, suffix: str) -> Path:
        """A file of the cache that holds for this processor, compiler and way of measuring."""
        assert self._cache is not None
        version = importlib.metadata.version("apache-tvm")
        return self._cache / f"{what}-{_PROBE_FORMAT}-tvm{version}-{spec.cpu}-{spec.cores}x{spec.vector_bytes}.{suffix}"

    def _ceilings(self, spec: DeviceSpec) -> dict[str, float]:
        cpu = _cpu(spec)
        result: dict[str, float] = self._ask(
            self._runner, "measuring the ceilings", _DETECT_TIMEOUT_S, "targets.tvm_run:ceilings",
            str(self._probe(spec)), PRODUCT_SIZE, cpu.tile_columns, READ_VALUES, 2 * cpu.cores, 4 * cpu.lanes,
        )  # fmt: skip
        return result

    def _probe(self, spec: DeviceSpec) -> Path:
        path = self._file("probe", spec, "so")
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                made = self._ask(
                    self._compiler,
                    "compiling the probe",
                    _DETECT_TIMEOUT_S,
                    "targets.tvm_probe:compile_probe",
                    self._llvm(spec),
                    _cpu(spec),
                    Path(folder) / "probe.so",
                )
                Path(made).replace(path)
        return path

    @staticmethod
    def _llvm(spec: DeviceSpec) -> dict[str, Any]:
        # fast-math lets LLVM vectorise reductions; what it changes is within the tolerance of the check.
        target: dict[str, Any] = {"kind": "llvm", "mtriple": spec.triple, "mcpu": spec.cpu, "num-cores": spec.cores, "fast-math": True}
        return target | ({"mattr": list(spec.features)} if spec.features else {})

    @staticmethod
    def _ask(worker: Worker, what: str, timeout_s: float, function: str, *args: Any) -> Any:
        try:
            return worker.call(function, *args, timeout_s=timeout_s)
        except WorkerError as error:
            raise TargetError(f"{what} failed: {error}") from None


def _cpu(spec: DeviceSpec) -> Cpu:
    wide = spec.vector_bytes >= 64
    arm = (spec.triple or "").startswith(("aarch64", "arm64"))
    return Cpu(vector_bytes=spec.vector_bytes, registers=32 if wide or arm else 16, cores=spec.cores)
