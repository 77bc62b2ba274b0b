"""Kernels compiled on their own for this machine, for the schedule tests."""

from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import te

from targets.cpu import Cpu
from targets.schedules.rules import schedule_module
from targets.schedules.weights import WeightSpec, packed_product
from targets.tvm_probe import detect


def llvm_target() -> Any:
    found = detect()
    return tvm.target.Target({"kind": "llvm", "mtriple": found["triple"], "mcpu": found["cpu"], "num-cores": 2, "fast-math": True})


def prim_func(tensors: list[Any], name: str) -> Any:
    return te.create_prim_func(tensors).with_attr("global_symbol", name)


def packed_kernel(rows: int, n: int, k: int, cpu: Cpu, name: str, lead: tuple[int, ...] = (1,), **stored: int) -> Any:
    """x (*lead, rows, k) by a packed weight of n rows; `stored` says where it lies among others (see `WeightSpec`)."""
    x = te.placeholder((*lead, rows, k), name="x")
    weight = WeightSpec(rows=n, columns=k, tile=cpu.tile_columns, **stored)
    packed = te.placeholder(weight.shapes[0], name="packed")
    return prim_func([x, packed, packed_product(weight, x, packed)], name)


def build(functions: dict[str, Any], cpu: Cpu) -> Any:
    """Schedules the kernels as a program's are and compiles them for this machine."""
    target = llvm_target()
    with target:
        return tvm.compile(schedule_module(tvm.IRModule(functions), cpu), target)


def call(library: Any, name: str, *arrays: NDArray[Any], out: tuple[int, ...]) -> NDArray[np.float32]:
    """Runs a kernel on NumPy arrays; the result starts as NaN, so what is not written shows."""
    device = tvm.cpu()
    result = tvm.runtime.tensor(np.full(out, np.nan, np.float32), device)
    library[name](*(tvm.runtime.tensor(np.ascontiguousarray(a), device) for a in arrays), result)
    return result.numpy()
