"""`Toolchain`: how programs are compiled and linked for a device, as plain data that the compile worker takes."""

import re
from dataclasses import dataclass
from typing import Any

from targets import gpu as gpus
from targets.cpu import Cpu
from targets.gpu import Gpu
from targets.spec import DeviceSpec, InvalidDevice, Linker


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What compiling for a device needs to know.

    Attributes:
        target: the TVM target, as its dict form; that of a GPU holds the processor's as its "host".
        cpu: what the schedules need to know of the processor.
        triple: LLVM's name of the machine to link for; None: this one.
        linker: what links.
        gpu: the GPU that computes; None: the processor does.
    """

    target: dict[str, Any]
    cpu: Cpu
    triple: str | None = None
    linker: Linker = "auto"
    gpu: Gpu | None = None

    @property
    def processor(self) -> Cpu | Gpu:
        """What computes."""
        return self.gpu or self.cpu


def toolchain(spec: DeviceSpec, cpu: Cpu | None = None) -> Toolchain:
    """The toolchain of a device whose processor is known; `cpu` has choices found by trying, if any were.

    Raises:
        InvalidDevice: for an NVIDIA GPU whose architecture is not given.
    """
    # fast-math lets LLVM vectorise reductions; what it changes is within the tolerance of the check.
    target: dict[str, Any] = {"kind": "llvm", "mtriple": spec.triple, "mcpu": spec.cpu, "num-cores": spec.cores, "fast-math": True}
    target |= {"mattr": list(spec.features)} if spec.features else {}
    if (spec.triple or "").startswith("riscv64"):
        target["mabi"] = "lp64d"
    elif (spec.triple or "").endswith("eabihf"):
        target["mfloat-abi"] = "hard"
    gpu = graphics(spec)
    return Toolchain(
        target=gpu.target(target) if gpu else target,
        cpu=cpu or processor(spec),
        triple=None if spec.kind == "local" else spec.triple,
        linker=spec.linker,
        gpu=gpu,
    )


def graphics(spec: DeviceSpec) -> Gpu | None:
    """What the schedules need to know of a device's GPU; None if its processor computes.

    Raises:
        InvalidDevice: for an NVIDIA GPU whose architecture is not given.
    """
    if spec.backend == "llvm":
        return None
    if spec.backend == "opencl":
        return gpus.opencl()
    if not re.fullmatch(r"sm_[0-9]+[a-z]?", spec.arch):
        raise InvalidDevice(f"{spec.name}: arch={spec.arch!r} is not an NVIDIA architecture, as in sm_87; correct it")
    return gpus.cuda(spec.arch)


def processor(spec: DeviceSpec) -> Cpu:
    """What the schedules need to know of a device's processor."""
    triple = spec.triple or ""
    riscv = triple.startswith("riscv")
    many = riscv or spec.vector_bytes >= 64 or triple.startswith(("aarch64", "arm64"))
    return Cpu(
        vector_bytes=spec.vector_bytes,
        registers=32 if many else 16,
        cores=spec.cores,
        dot=spec.dot or "",
        halves=not riscv or bool({"+zvfhmin", "+zfhmin"} & set(spec.features)),
    )
