"""`LocalTarget`: this machine through TVM, in two child processes: one compiles, one measures.

The measuring child holds nothing but TVM's runtime, since another library's threads would spin and slow it.
"""

import dataclasses
import os
import threading
from pathlib import Path
from time import sleep
from typing import Any

from targets.cpu import Cpu
from targets.host_compiler import ONE_THREAD, HostCompiler, ask
from targets.measurement import Measurement, Timing
from targets.measurer import Measurer
from targets.program import Program, Sample
from targets.quiet import measuring, resting
from targets.spec import DeviceSpec, InvalidDevice
from targets.toolchain import toolchain
from targets.worker import Worker

_DETECT_TIMEOUT_S = 180.0


class LocalTarget:
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
        self._declared = spec
        self._spec: DeviceSpec | None = None
        self._cpu: Cpu | None = None
        self._finding_out = threading.Lock()
        self._cores = spec.cores or len(spec.affinity) or len(usable)
        self._compiler = HostCompiler(cache_dir)
        environment = {**ONE_THREAD, "TVM_NUM_THREADS": str(self._cores)}
        # The small library has no GPUs, and their programs are compiled as they are loaded, by what the large one registers.
        environment |= {"TVM_USE_RUNTIME_LIB": "1"} if spec.backend == "llvm" else {}
        # TVM would bind its threads to processors of its own choice.
        environment |= {"TVM_BIND_THREADS": "0"} if spec.affinity else {}
        # TVM imports PyTorch wherever it is installed, and its threads with it.
        self._runner = Worker(environment, without=("torch",), affinity=spec.affinity)
        self._measurer = Measurer(self._compiler, self._run)

    @property
    def spec(self) -> DeviceSpec:
        """The device with everything detected and its ceilings measured."""
        with resting(), self._finding_out:
            if self._spec is None:
                self._spec, self._cpu = self._measurer.find_out(self._detected())
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
        return self._compiler.compile(program, toolchain(self.spec, self.cpu), out_dir)

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Checks, then times, in the measuring worker.

        Raises:
            TargetError: if an output differs, the program crashes or time is up.
        """
        return self._measurer.measure(self.spec, self.cpu, artifact, sample, timing)

    def close(self) -> None:
        """Ends both workers, also in the middle of a compile that another thread waits for."""
        self._compiler.close()
        self._runner.close()

    def _detected(self) -> DeviceSpec:
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
        """Runs something in the measuring worker, alone on the machine (`measurer.Run`)."""
        with measuring() as quiet:
            sleep(self._declared.cooldown_s)
            return ask(self._runner, what, timeout_s, "targets.tvm_session:here", function, *args), quiet
