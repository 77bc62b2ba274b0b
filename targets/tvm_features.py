"""Instruction sets that compiled code may use, as the machine that runs it can say whether it has them."""

from collections.abc import Mapping
from typing import Any

import tvm

_X86 = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "movbe": "movbe", "bmi": "bmi1",
    "bmi2": "bmi2", "lzcnt": "abm", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avxvnni": "avx_vnni",
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2", "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16", "avx512ifma": "avx512ifma",
}  # fmt: skip
_ARM64 = {
    "neon": "asimd", "dotprod": "asimddp", "fullfp16": "asimdhp", "lse": "atomics", "rdm": "asimdrdm", "i8mm": "i8mm", "bf16": "bf16",
    "sve": "sve", "sve2": "sve2",
}  # fmt: skip
_ARM32 = {"neon": "neon", "vfp3": "vfpv3", "vfp4": "vfpv4"}
_RISCV = {name: name for name in ("m", "a", "f", "d", "c", "v", "zvfh", "zvfhmin", "zfh", "zfhmin", "zba", "zbb", "zbs")}
"""LLVM's name of an instruction set that matters to our kernels -> its name in Linux's /proc/cpuinfo."""


def processor_flags(target: Mapping[str, Any]) -> list[str]:
    """Names, as in Linux's /proc/cpuinfo, of what code for a target may use; none for a processor that is not known here.

    Args:
        target: a TVM target as its dict form; of a GPU's, the host counts.
    """
    host = target.get("host", target)
    triple = str(host.get("mtriple", ""))
    known = {"x86_64": _X86, "aarch64": _ARM64, "arm64": _ARM64, "riscv64": _RISCV}.get(triple.partition("-")[0], {})
    known = _ARM32 if triple.startswith("armv") else known
    features = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(dict(host)))
    return [flag for feature, flag in known.items() if feature in features]
