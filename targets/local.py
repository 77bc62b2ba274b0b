"""`LocalTarget`: this machine through TVM, in two child processes: one compiles, one measures.

The measuring child holds nothing but TVM's runtime, since another library's threads would spin and slow it.
"""

import dataclasses
import os
from pathlib import Path
from time import sleep
from typing import Any

from targets.host_compiler import ONE_THREAD, HostCompiler, ask
from targets.measured_target import MeasuredTarget
from targets.quiet import measuring
from targets.spec import DeviceSpec, InvalidDevice
from targets.worker import Worker

_DETECT_TIMEOUT_S = 180.0


class LocalTarget(MeasuredTarget):
    """This machine's processor, or its GPU.

    Args:
        spec: the device file; zeros and blanks are detected and measured at the first use.
        cache_dir: where compiled kernels and the best rates seen are kept; None: a folder that goes away.

    Raises:
        InvalidDevice: if the spec names processors that this machine has not, or that this process may not use.
    """

    def __init__(self, spec: DeviceSpec, cache_dir: Path | None = None) -> None:
        usable = os.sched_getaffinity(0)
        if not usable.issuperset(spec.affinity):
            raise InvalidDevice(f"target {spec.name!r}: affinity={list(spec.affinity)} is not among {sorted(usable)}; choose from those")
        super().__init__(HostCompiler(cache_dir))
        self._declared = spec
        self._cores = spec.cores or len(spec.affinity) or len(usable)
        environment = {**ONE_THREAD, "TVM_NUM_THREADS": str(self._cores)}
        # The small library has no GPUs, and their programs are compiled as they are loaded, by what the large one registers.
        environment |= {"TVM_USE_RUNTIME_LIB": "1"} if spec.backend == "llvm" else {}
        # TVM would bind its threads to processors of its own choice.
        environment |= {"TVM_BIND_THREADS": "0"} if spec.affinity else {}
        # TVM imports PyTorch wherever it is installed, and its threads with it.
        self._runner = Worker(environment, without=("torch",), affinity=spec.affinity)

    def close(self) -> None:
        """Ends both workers, also in the middle of a compile that another thread waits for."""
        self._compiler.close()
        self._runner.close()

    def _known(self) -> DeviceSpec:
        # Asked anew in every session: a cache folder may have come from another machine.
        detected = self._compiler.call("detecting the processor", _DETECT_TIMEOUT_S, "targets.tvm_probe:detect")
        declared = self._declared
        if declared.backend != "llvm":  # asked where it is used: a process that has spoken to a GPU must not be forked
            gpu = ask(self._runner, "detecting the GPU", _DETECT_TIMEOUT_S, "targets.tvm_gpu:detect", declared.backend)
            memory_bytes = declared.memory_bytes or gpu["memory_bytes"]
            declared = dataclasses.replace(declared, arch=declared.arch or gpu["arch"], memory_bytes=memory_bytes)
        return dataclasses.replace(
            declared,
            triple=declared.triple or detected["triple"],
            cpu=declared.cpu or detected["cpu"],
            vector_bytes=declared.vector_bytes or detected["vector_bytes"],
            dot=detected["dot"] if declared.dot is None else declared.dot,
            cores=self._cores,
            memory_bytes=declared.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )

    def _run(self, what: str, timeout_s: float, function: str, *args: Any) -> tuple[Any, bool | None]:
        """Runs something in the measuring worker, alone on the machine."""
        with measuring() as quiet:
            sleep(self._declared.cooldown_s)
            return ask(self._runner, what, timeout_s, "targets.tvm_session:here", function, *args), quiet
