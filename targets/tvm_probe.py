"""Two small kernels that say what a processor can do at most: a matrix product, and one of a single row, which reads memory.

Compiled with the same schedules as everything else, so a ceiling is one that our kernels can reach.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, te, tirx

from targets.cpu import Cpu
from targets.job import PRODUCT_SIZE, READ_SHAPE, VARIANT_SHAPE, row_variant_name, variant_name
from targets.link import link_shared
from targets.schedules.prefetch import with_prefetches
from targets.schedules.product import schedule_packed_product
from targets.schedules.weights import WeightSpec, packed_product
from targets.toolchain import Toolchain
from targets.tvm_profile import compile_clock


def detect() -> dict[str, Any]:
    """What LLVM says of this machine's processor: `triple`, `cpu`, `vector_bytes`, `dot`."""
    ask = tvm.get_global_func
    triple = str(ask("target.llvm_get_system_triple")())
    cpu = str(ask("target.llvm_get_system_cpu")())
    return {"triple": triple, "cpu": cpu, **vectors(triple, cpu)}


def vectors(triple: str, cpu: str) -> dict[str, Any]:
    """The SIMD registers and byte dot products of LLVM's processor `cpu`: `vector_bytes`, `dot`."""
    ask = tvm.get_global_func
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu})
    with target:
        known = ("avx512f", "avx512bw", "avx512vnni", "avxvnni", "avx", "avx2", "ssse3", "dotprod")
        features = {name for name in known if ask("target.llvm_cpu_has_feature")(name, target)}
        other = int(ask("target.llvm_get_vector_width")(target)) // 8
    if not triple.startswith("x86_64"):  # TVM gives 512 bits for every x86 processor
        return {"vector_bytes": other, "dot": "sdot" if "dotprod" in features else ""}
    vector_bytes, fours, twos = next(
        (width, fours, twos)
        for feature, width, fours, twos in (
            ("avx512f", 64, "avx512vnni", "avx512bw"),
            ("avx", 32, "avxvnni", "avx2"),
            ("", 16, "", "ssse3"),
        )
        if feature in {*features, ""}
    )
    return {"vector_bytes": vector_bytes, "dot": "vnni" if fours in features else "madd" if twos in features else ""}


def compile_probe(tools: Toolchain, path: Path) -> Path:
    """Compiles both kernels, `ones` and the clock that profiles are taken with, into a shared library at `path`."""
    product = _product(tools.cpu, PRODUCT_SIZE, PRODUCT_SIZE, PRODUCT_SIZE)
    kernels = {"product": product, "read": _product(tools.cpu, *READ_SHAPE), "ones": _ones()}
    with tempfile.TemporaryDirectory() as folder:
        clock = [] if tools.triple else [compile_clock(Path(folder))]  # only this machine is profiled
        return link_shared(_library(kernels, tools), path, clock, tools.triple, tools.linker)


def compile_variants(tools: Toolchain, path: Path) -> Path:
    """Compiles a product for every tuning of `cpu.variants()`, and of a single row for every one of `cpu.row_variants`.

    Kernels are named by `job.variant_name`; `ones` makes what they read.
    """
    cpu = tools.cpu
    many, single = VARIANT_SHAPE, READ_SHAPE
    kernels = {"ones": _ones()}
    for tuning in cpu.variants():
        kernels[variant_name(tuning)] = _product(dataclasses.replace(cpu, tuned=tuning), *many)
        for row_tuning in cpu.row_variants(tuning):
            name = row_variant_name(row_tuning)
            if name not in kernels:
                kernels[name] = _product(dataclasses.replace(cpu, tuned=row_tuning), *single)
    return link_shared(_library(kernels, tools), path, triple=tools.triple, linker=tools.linker)


def _product(cpu: Cpu, rows: int, depth: int, columns: int) -> Any:
    """A product as the schedules write it for `cpu`."""
    x = te.placeholder((1, rows, depth), name="x")
    weight = WeightSpec(rows=columns, columns=depth, tile=cpu.tile_columns)
    packed = te.placeholder(weight.shapes[0], name="packed")
    sch = s_tir.Schedule(te.create_prim_func([x, packed, packed_product(weight, x, packed)]))
    schedule_packed_product(sch, cpu)
    return with_prefetches(sch.mod["main"])


def _ones() -> Any:
    """Fills an array of any length: what kernels are timed on may be large, and a device far away."""
    return te.create_prim_func([te.compute((te.var("n", "int64"),), lambda _: tirx.const(1.0, "float32"), name="ones")])


def _library(kernels: Mapping[str, Any], tools: Toolchain) -> Any:
    module = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    return tvm.compile(module, tvm.target.Target(tools.target))
