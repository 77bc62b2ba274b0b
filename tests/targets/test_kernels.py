"""Kernels are compiled once for their structure."""

from pathlib import Path

import tvm
from tvm import te

from targets.compile_cache import CompileCache
from targets.kernels import KernelCache

LLVM = {"kind": "llvm", "num-cores": 1}


def kernel(size: int, name: str = "x") -> tvm.tirx.PrimFunc:
    x = te.placeholder((size,), name=name)
    return te.create_prim_func([x, te.compute((size,), lambda i: x[i] + 1, name=f"{name}_plus_one")])


def kernel_cache(folder: Path) -> KernelCache:
    return KernelCache(CompileCache(folder, {"target": LLVM}), LLVM)


def test_names_do_not_count_and_structure_does() -> None:
    assert KernelCache.symbol(kernel(8)) == KernelCache.symbol(kernel(8, "other"))
    assert KernelCache.symbol(kernel(8)) != KernelCache.symbol(kernel(9))


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    symbol = KernelCache.symbol(kernel(8))
    assert kernel_cache(tmp_path).find(symbol) is None
    path = kernel_cache(tmp_path).object_file(kernel(8))
    made = path.stat().st_ino
    assert kernel_cache(tmp_path).object_file(kernel(8, "other")) == path == kernel_cache(tmp_path).find(symbol)
    assert path.stat().st_ino == made
    assert f"__tvm_ffi_{symbol}".encode() in path.read_bytes()
