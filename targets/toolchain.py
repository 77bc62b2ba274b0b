"""`Toolchain`: how programs are compiled and linked for a device, as plain data that the compile worker takes."""

from dataclasses import dataclass
from typing import Any

from targets.cpu import Cpu
from targets.spec import DeviceSpec, Linker


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What compiling for a device needs to know.

    Attributes:
        target: the TVM target, as its dict form.
        cpu: what the schedules need to know of the processor.
        triple: LLVM's name of the machine to link for; None: this one.
        linker: what links.
    """

    target: dict[str, Any]
    cpu: Cpu
    triple: str | None = None
    linker: Linker = "auto"


def toolchain(spec: DeviceSpec, cpu: Cpu | None = None) -> Toolchain:
    """The toolchain of a device whose processor is known; `cpu` has choices found by trying, if any were."""
    # fast-math lets LLVM vectorise reductions; what it changes is within the tolerance of the check.
    target: dict[str, Any] = {"kind": "llvm", "mtriple": spec.triple, "mcpu": spec.cpu, "num-cores": spec.cores, "fast-math": True}
    target |= {"mattr": list(spec.features)} if spec.features else {}
    if (spec.triple or "").startswith("riscv64"):
        target["mabi"] = "lp64d"
    elif (spec.triple or "").endswith("eabihf"):
        target["mfloat-abi"] = "hard"
    return Toolchain(target=target, cpu=cpu or processor(spec), triple=None if spec.kind == "local" else spec.triple, linker=spec.linker)


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
