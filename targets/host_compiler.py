"""`HostCompiler`: what of a target happens on this machine whatever the device is: compiling, in one worker process, cached."""

import hashlib
import importlib.metadata
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from targets.compile_cache import sources
from targets.program import Program
from targets.quiet import resting, wait_for_turn
from targets.spec import DeviceSpec
from targets.target import TargetError
from targets.toolchain import Toolchain
from targets.worker import Worker, WorkerError

COMPILE_TIMEOUT_S = 600.0
_PROBE_TIMEOUT_S = 180.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Variables that keep other libraries from starting threads in a worker process."""


class HostCompiler:
    """Compiles for one device. May be used from several threads, one of which compiles at a time.

    Args:
        cache_dir: where compiled kernels, and what is found out about a device, are kept; None: a folder that goes away.

    Attributes:
        cache: that folder.
    """

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="edgewise-") if cache_dir is None else None
        self.cache = cache_dir or Path(self._temporary.name)  # type: ignore[union-attr]  # one of them is there
        self.cache.mkdir(parents=True, exist_ok=True)
        self._worker = Worker(ONE_THREAD)
        self._busy = threading.Lock()

    def compile(self, program: Program, tools: Toolchain, out_dir: Path) -> Path:
        """Compiles a program into `out_dir`, which is returned.

        Raises:
            TargetError: if the compiler fails, crashes, takes too long, or is closed meanwhile.
        """
        return Path(self.call("compiling", COMPILE_TIMEOUT_S, "targets.tvm_compile:compile_program", program, tools, self.cache, out_dir))

    def probe(self, spec: DeviceSpec, tools: Toolchain) -> Path:
        """The library of the probe kernels, made at its first use.

        Raises:
            TargetError: if it cannot be made.
        """
        suffix = "tar" if tools.linker == "none" else "so"
        path = self._file("probe", spec, tools, (), suffix)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.cache) as folder:
                made, module = Path(folder) / f"probe.{suffix}", "tvm_gpu" if tools.gpu else "tvm_probe"
                Path(self.call("compiling the probe", _PROBE_TIMEOUT_S, f"targets.{module}:compile_probe", tools, made)).replace(path)
        return path

    def variants(self, tools: Toolchain, folder: Path) -> Path:
        """The library of the kernels that tunings are tried on, in `folder`.

        Raises:
            TargetError: if it cannot be made.
        """
        made = folder / "variants.so"
        return Path(self.call("compiling variants", _PROBE_TIMEOUT_S, "targets.tvm_probe:compile_variants", tools, made))

    def record(self, what: str, spec: DeviceSpec, tools: Toolchain) -> Path:
        """A file of the cache for what was seen of one device, which is not said of another with the same processor."""
        place: tuple[Any, ...] = () if spec.kind == "local" else (spec.name, spec.kind, spec.host, spec.port, spec.key)
        place = (*place, *spec.affinity)  # the cores of one processor may differ
        return self._file(what, spec, tools, place, "json")

    def _file(self, what: str, spec: DeviceSpec, tools: Toolchain, place: tuple[Any, ...], suffix: str) -> Path:
        """A file of the cache that holds for a processor, a compiler and this way of measuring."""
        version = importlib.metadata.version("apache-tvm")
        depends = json.dumps([repr(tools), sources(__name__), *place])
        digest = hashlib.sha256(depends.encode()).hexdigest()[:12]
        return self.cache / f"{what}-tvm{version}-{spec.cpu or 'generic'}-{spec.cores}x{spec.vector_bytes}-{digest}.{suffix}"

    def call(self, what: str, timeout_s: float, function: str, *args: Any) -> Any:
        """Has the compile worker do something, as work that no measurement of this machine runs beside.

        Raises:
            TargetError: if it fails; the message begins with `what`.
        """
        with self._busy:
            wait_for_turn()
            with resting():
                return ask(self._worker, what, timeout_s, "targets.quiet:at_work", function, *args)

    def close(self) -> None:
        """Ends the worker, also in the middle of a compile that another thread waits for."""
        self._worker.kill()
        with self._busy:  # until that thread has let go of the worker
            self._worker.close()
        if self._temporary:
            self._temporary.cleanup()


def ask(worker: Worker, what: str, timeout_s: float, function: str, *args: Any) -> Any:
    """Calls a function in a worker.

    Raises:
        TargetError: if it fails; the message begins with `what`.
    """
    try:
        return worker.call(function, *args, timeout_s=timeout_s)
    except WorkerError as error:
        raise TargetError(f"{what} failed: {error}") from None
