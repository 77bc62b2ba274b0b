"""`Gpu`: what compiling and measuring need to know of a GPU, and nothing else."""

from dataclasses import dataclass
from typing import Any, Literal

GpuKind = Literal["cuda", "opencl"]

PROBE_SIZE = 2048
"""Rows, columns and depth of the product that a GPU is rated by: enough work that starting a kernel does not count."""
PROBE_PARTS, PROBE_WIDTH = 1024, 256
"""How the streaming read is shared out there: one thread a pair of part and column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as the schedules see it.

    Attributes:
        kind: how it is programmed.
        arch: its architecture as its compiler names it, as in "sm_87"; "" where the driver compiles.
        threads: most threads of a block.
        warp: threads that run in step; 1: not relied upon.
        shared_bytes: memory that a block shares.
        registers: 32-bit registers of a block; 0: not known.
    """

    kind: GpuKind
    arch: str = ""
    threads: int = 256
    warp: int = 1
    shared_bytes: int = 32 << 10
    registers: int = 0

    @property
    def halves(self) -> bool:
        """Whether it converts half-precision floats; every one that is programmed here does."""
        return True

    @property
    def tile_columns(self) -> int:
        """Rows of a weight that lie side by side: none, so that the threads of a warp read along one."""
        return 1

    def target(self, host: dict[str, Any]) -> dict[str, Any]:
        """The TVM target, as its dict form, beside that of the processor that starts the kernels."""
        target: dict[str, Any] = {
            "kind": self.kind,
            "max_threads_per_block": self.threads,
            "max_shared_memory_per_block": self.shared_bytes,
            "thread_warp_size": self.warp,
            "host": host,
        }
        if self.kind == "cuda":
            target |= {"arch": self.arch, "registers_per_block": self.registers}
        return target


def cuda(arch: str) -> Gpu:
    """An NVIDIA GPU.

    The limits hold for every architecture since sm_50 (CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"): 1024 threads and 65,536 registers a block, warps of 32 and, unless a kernel asks for more, 48 KiB shared.
    """
    return Gpu(kind="cuda", arch=arch, threads=1024, warp=32, shared_bytes=48 << 10, registers=1 << 16)


def opencl() -> Gpu:
    """Any GPU with OpenCL: no more than what phones and boards have (256 work-items a group, 32 KiB of local memory)."""
    return Gpu(kind="opencl")
