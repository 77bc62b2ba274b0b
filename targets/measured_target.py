"""`MeasuredTarget`: what every device that TVM compiles for has in common: compiling, tuning, ceilings, measurements."""

import dataclasses
import json
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.cpu import Cpu, Tuning
from targets.files import whole
from targets.gpu import PROBE_PARTS, PROBE_SIZE, PROBE_WIDTH
from targets.host_compiler import HostCompiler
from targets.job import MANIFEST, PRODUCT_SIZE, READ_SHAPE, READ_VALUES, Job
from targets.layout import packed_shape
from targets.measurement import Measurement, Timing
from targets.program import Program, Sample
from targets.quiet import resting, working
from targets.spec import DeviceSpec
from targets.toolchain import processor, toolchain

_FIRST_LOOK_TIMEOUT_S = 180.0


class MeasuredTarget(ABC):
    """A target whose programs are compiled here by TVM. Where they are run is what those below it say.

    Args:
        compiler: compiles for it, and keeps what is found out.
    """

    def __init__(self, compiler: HostCompiler) -> None:
        self._compiler = compiler
        self._spec: DeviceSpec | None = None
        self._cpu: Cpu | None = None
        self._finding_out = threading.Lock()
        self._lock = threading.Lock()
        self._reference_best_s = 0.0

    @abstractmethod
    def _known(self) -> DeviceSpec:
        """The device with everything known that is not tried or measured; asked once, at the first use."""

    @abstractmethod
    def _run(self, what: str, timeout_s: float, function: str, *args: Any) -> tuple[Any, bool | None]:
        """Calls a function of `tvm_run` or `tvm_tune` where the device is reached.

        Returns:
            What the function gives after its session, and whether all other work of ours on this machine had stopped meanwhile.

        Raises:
            TargetError: if it fails; the message begins with `what`.
        """

    @property
    def spec(self) -> DeviceSpec:
        """The device with everything known, its small choices tried and its ceilings measured."""
        with resting(), self._finding_out:
            if self._spec is None:
                self._spec, self._cpu = self._find_out(self._known())
            return self._spec

    @property
    def cpu(self) -> Cpu:
        """What the schedules need to know."""
        assert self.spec, "found out at the first use"
        assert self._cpu is not None
        return self._cpu

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Compiles for the device, in the compile worker; may be called from another thread than the rest.

        Raises:
            TargetError: if the compiler fails, crashes, takes too long, or the target is closed meanwhile.
        """
        return self._compiler.compile(program, toolchain(self.spec, self.cpu), out_dir)

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Checks, then times.

        Raises:
            TargetError: if an output differs, the program crashes, time is up, or the device is not to be had.
        """
        spec, cpu = self.spec, self.cpu
        reference = _reference(spec, cpu)
        best_s = self._reference_best_s or 2.0 * reference[0] ** 3 / spec.flops_per_s
        with tempfile.TemporaryDirectory(prefix="sample-", dir=artifact.parent) as folder:
            path = Path(folder) / "sample.safetensors"
            with working():
                sample.write(path)
            job = Job(
                artifact=str(artifact),
                sample=str(path),
                probe=str(self._compiler.probe(spec, toolchain(spec, cpu))),
                reference=reference,
                reference_best_s=best_s,
                steps=sample.steps,
                timed=sample.timed,
                tolerance=sample.tolerance,
                timing=timing,
            )
            record, quiet = self._run("measuring", spec.timeout_s or timing.timeout_s, "targets.tvm_run:run_job", job)
        with self._lock:
            self._reference_best_s = min(self._reference_best_s or best_s, *record["reference_s"])
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

    def _find_out(self, spec: DeviceSpec) -> tuple[DeviceSpec, Cpu]:
        """The device with its ceilings, and its processor with the choices that are fastest there.

        Args:
            spec: with everything else known.

        Raises:
            TargetError: if something cannot be compiled for it or run on it.
        """
        cpu = processor(spec)
        if spec.backend == "llvm":
            cpu = dataclasses.replace(cpu, tuned=self._tuning(spec, cpu))
        self._compiler.probe(spec, toolchain(spec, cpu))  # now, so that no measurement waits for a compile to end
        if spec.flops_per_s and spec.read_bytes_per_s:
            return spec, cpu
        best = self._best(spec, self._ceilings(spec, cpu))
        flops_per_s = spec.flops_per_s or best["flops_per_s"]
        return dataclasses.replace(spec, flops_per_s=flops_per_s, read_bytes_per_s=spec.read_bytes_per_s or best["read_bytes_per_s"]), cpu

    def _tuning(self, spec: DeviceSpec, cpu: Cpu) -> Tuning:
        """The small choices that were fastest there, tried at the first use of a device and kept in the cache."""
        tools = toolchain(spec, cpu)
        path = self._compiler.record("tuning", spec, tools)
        try:
            kept = Tuning(**json.loads(path.read_text(encoding="utf-8")))
            if kept in [row for tuning in cpu.variants() for row in cpu.row_variants(tuning)]:
                return kept
        except (OSError, ValueError, TypeError):
            pass
        with tempfile.TemporaryDirectory(dir=self._compiler.cache) as folder:
            library = self._compiler.variants(tools, Path(folder))
            tuning: Tuning
            tuning, _ = self._run("tuning", _FIRST_LOOK_TIMEOUT_S, "targets.tvm_tune:best_tuning", str(library), cpu)
        _write_json(path, dataclasses.asdict(tuning))
        return tuning

    def _ceilings(self, spec: DeviceSpec, cpu: Cpu) -> dict[str, float]:
        probe = str(self._compiler.probe(spec, toolchain(spec, cpu)))
        kind = "cpu" if spec.backend == "llvm" else spec.backend
        found: dict[str, float]
        found, _ = self._run(
            "measuring the ceilings", _FIRST_LOOK_TIMEOUT_S, "targets.tvm_run:ceilings",
            probe, kind, *_reference(spec, cpu), _reading(spec, cpu),
        )  # fmt: skip
        return found

    def _best(self, spec: DeviceSpec, seen: Mapping[str, float]) -> dict[str, float]:
        """The best rates of this device in any session, kept in the cache: one taken while busy is no ceiling."""
        path = self._compiler.record("ceilings", spec, toolchain(spec))
        try:
            kept = {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            kept = {}
        best = {name: max(value, kept.get(name, 0.0)) for name, value in seen.items()}
        _write_json(path, best)
        return best


def _reference(spec: DeviceSpec, cpu: Cpu) -> tuple[int, int]:
    """Size and tile of the product that a device is rated by, and that is timed beside every program."""
    return (PRODUCT_SIZE, cpu.tile_columns) if spec.backend == "llvm" else (PROBE_SIZE, 1)


def _reading(spec: DeviceSpec, cpu: Cpu) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the probe's kernel that reads memory takes, the result's last."""
    if spec.backend == "llvm":
        rows, depth, columns = READ_SHAPE
        return (1, rows, depth), packed_shape(columns, depth, cpu.tile_columns), (1, rows, columns)
    return (PROBE_PARTS, READ_VALUES // (PROBE_PARTS * PROBE_WIDTH), PROBE_WIDTH), (PROBE_PARTS, PROBE_WIDTH)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path, durable=False) as part:
        part.write_text(json.dumps(values), encoding="utf-8")
