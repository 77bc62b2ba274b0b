"""`LocalTarget`: this machine through TVM, in two child processes: one compiles, one measures.

The measuring child holds nothing but TVM's runtime, since another library's threads would spin and slow it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.compile_cache import sources
from targets.cpu import Cpu, Tuning
from targets.files import whole
from targets.job import MANIFEST, PRODUCT_SIZE, READ_VALUES, Job
from targets.measurement import Measurement, Timing
from targets.program import Program, Sample
from targets.quiet import measuring, resting, wait_for_turn, working
from targets.spec import DeviceSpec
from targets.target import TargetError
from targets.toolchain import processor, toolchain
from targets.worker import Worker, WorkerError

COMPILE_TIMEOUT_S = 600.0
_DETECT_TIMEOUT_S = 180.0


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
        self._cpu: Cpu | None = None
        cores = spec.cores or len(os.sched_getaffinity(0))
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._compiler = Worker(quiet)
        self._compiling = threading.Lock()
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
        assert self.spec, "detected at the first use"
        assert self._cpu is not None
        return self._cpu

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Compiles in the compile worker; may be called from another thread than the rest.

        Raises:
            TargetError: if the compiler fails, crashes, takes too long, or the target is closed meanwhile.
        """
        arguments = (program, toolchain(self.spec, self.cpu), self._cache, out_dir)
        with self._compiling:
            return Path(self._compile("compiling", COMPILE_TIMEOUT_S, "targets.tvm_compile:compile_program", *arguments))

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Checks, then times, in the measuring worker.

        Raises:
            TargetError: if an output differs, the program crashes or time is up.
        """
        spec = self.spec
        best_s = self._reference_best_s or 2.0 * PRODUCT_SIZE**3 / spec.flops_per_s
        with tempfile.TemporaryDirectory(prefix="sample-", dir=artifact.parent) as folder:
            path = Path(folder) / "sample.safetensors"
            with working():
                sample.write(path)
            job = Job(
                artifact=str(artifact),
                sample=str(path),
                probe=str(self._probe(spec, self.cpu)),
                reference=(PRODUCT_SIZE, self.cpu.tile_columns),
                reference_best_s=best_s,
                steps=sample.steps,
                timed=sample.timed,
                tolerance=sample.tolerance,
                timing=timing,
            )
            with measuring() as quiet:
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
            quiet=quiet,
            profile=record["profile"],
        )

    def close(self) -> None:
        """Ends both workers, also in the middle of a compile that another thread waits for."""
        self._compiler.kill()
        with self._compiling:  # until that thread has let go of the worker
            self._compiler.close()
        self._runner.close()
        if self._temporary:
            self._temporary.cleanup()

    # --- finding out about the machine ------------------------------------------------------

    def _complete(self) -> DeviceSpec:
        # Asked anew in every session: a cache folder may have come from another machine.
        detected = self._compile("detecting the processor", _DETECT_TIMEOUT_S, "targets.tvm_probe:detect")
        declared = self._declared
        spec = dataclasses.replace(
            declared,
            triple=declared.triple or detected["triple"],
            cpu=declared.cpu or detected["cpu"],
            vector_bytes=declared.vector_bytes or detected["vector_bytes"],
            dot=detected["dot"] if declared.dot is None else declared.dot,
            cores=self._cores,
            memory_bytes=declared.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
        untuned = processor(spec)
        self._cpu = dataclasses.replace(untuned, tuned=self._tuning(spec, untuned))
        if spec.flops_per_s and spec.read_bytes_per_s:
            return spec
        best = self._best(spec, self._ceilings(spec, self._cpu))
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
        _write_json(path, best)
        return best

    def _tuning(self, spec: DeviceSpec, cpu: Cpu) -> Tuning:
        """The small choices that were fastest here, tried at the first use of a processor and kept in the cache."""
        path = self._file("tuning", spec, "json")
        try:
            kept = Tuning(**json.loads(path.read_text(encoding="utf-8")))
            if kept in [row for tuning in cpu.variants() for row in cpu.row_variants(tuning)]:
                return kept
        except (OSError, ValueError, TypeError):
            pass
        assert self._cache is not None
        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            library = Path(folder) / "variants.so"
            self._compile("compiling variants", _DETECT_TIMEOUT_S, "targets.tvm_probe:compile_variants", toolchain(spec, cpu), library)
            with measuring():
                tuning: Tuning = self._ask(self._runner, "tuning", _DETECT_TIMEOUT_S, "targets.tvm_tune:best_tuning", str(library), cpu)
        _write_json(path, dataclasses.asdict(tuning))
        return tuning

    def _file(self, what: str, spec: DeviceSpec, suffix: str, cpu: Cpu | None = None) -> Path:
        """A file of the cache that holds for this processor, compiler and way of measuring."""
        assert self._cache is not None
        version = importlib.metadata.version("apache-tvm")
        depends = json.dumps([repr(toolchain(spec, cpu)), sources(__name__)])
        digest = hashlib.sha256(depends.encode()).hexdigest()[:12]
        return self._cache / f"{what}-tvm{version}-{spec.cpu}-{spec.cores}x{spec.vector_bytes}-{digest}.{suffix}"

    def _ceilings(self, spec: DeviceSpec, cpu: Cpu) -> dict[str, float]:
        probe = str(self._probe(spec, cpu))
        with measuring():
            result: dict[str, float] = self._ask(
                self._runner, "measuring the ceilings", _DETECT_TIMEOUT_S, "targets.tvm_run:ceilings",
                probe, PRODUCT_SIZE, cpu.tile_columns, READ_VALUES, 2 * cpu.cores, 4 * cpu.lanes,
            )  # fmt: skip
        return result

    def _probe(self, spec: DeviceSpec, cpu: Cpu) -> Path:
        path = self._file("probe", spec, "so", cpu)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                made = self._compile(
                    "compiling the probe",
                    _DETECT_TIMEOUT_S,
                    "targets.tvm_probe:compile_probe",
                    toolchain(spec, cpu),
                    Path(folder) / "probe.so",
                )
                Path(made).replace(path)
        return path

    def _compile(self, what: str, timeout_s: float, function: str, *args: Any) -> Any:
        """Has the compile worker do something, as work that no measurement of this machine runs beside."""
        wait_for_turn()
        with resting():
            return self._ask(self._compiler, what, timeout_s, "targets.quiet:at_work", function, *args)

    @staticmethod
    def _ask(worker: Worker, what: str, timeout_s: float, function: str, *args: Any) -> Any:
        try:
            return worker.call(function, *args, timeout_s=timeout_s)
        except WorkerError as error:
            raise TargetError(f"{what} failed: {error}") from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path, durable=False) as part:
        part.write_text(json.dumps(values), encoding="utf-8")
