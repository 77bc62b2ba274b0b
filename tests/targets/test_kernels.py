"""Kernels are compiled once for their structure, and the cache keeps to its size."""

import os
from pathlib import Path

import pytest
import tvm
from tvm import te

from targets.kernels import KernelCache

LLVM = {"kind": "llvm", "num-cores": 1}


def kernel(size: int, name: str = "x") -> tvm.tirx.PrimFunc:
    x = te.placeholder((size,), name=name)
    return te.create_prim_func([x, te.compute((size,), lambda i: x[i] + 1, name=f"{name}_plus_one")])


def test_names_do_not_count_and_structure_does() -> None:
    assert KernelCache.symbol(kernel(8)) == KernelCache.symbol(kernel(8, "other"))
    assert KernelCache.symbol(kernel(8)) != KernelCache.symbol(kernel(9))


def test_a_kernel_is_compiled_once_for_a_target(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, LLVM)
    path = cache.object_file(kernel(8))
    made = path.stat().st_ino
    assert KernelCache(tmp_path, LLVM).object_file(kernel(8, "other")) == path
    assert path.stat().st_ino == made
    assert KernelCache(tmp_path, {**LLVM, "num-cores": 2}).object_file(kernel(8)) != path


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_least_recently_used_go_first(tmp_path: Path, kept: int) -> None:
    cache = KernelCache(tmp_path, LLVM)
    paths = [cache.object_file(kernel(size)) for size in (8, 9, 10)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    cache.object_file(kernel(10))  # used again: now the youngest
    order = [paths[2], paths[0], paths[1]]
    cache.trim(sum(path.stat().st_size for path in order[:kept]))
    assert [path.exists() for path in order] == [i < kept for i in range(3)]
