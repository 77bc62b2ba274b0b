"""Two small kernels that say what a processor can do at most: a matrix product and a streaming read.

Compiled with the same schedules as everything else, so a ceiling is one that our kernels can reach.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, te

from targets.cpu import Cpu
from targets.job import PRODUCT_SIZE, READ_VALUES
from targets.link import link_shared
from targets.schedules.product import schedule_packed_product


def detect() -> dict[str, Any]:
    """What LLVM says of this machine's processor: `triple`, `cpu`, `vector_bytes`."""
    ask = tvm.get_global_func
    triple = str(ask("target.llvm_get_system_triple")())
    cpu = str(ask("target.llvm_get_system_cpu")())
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu})
    with target:
        features = {name for name in ("avx512f", "avx2", "avx", "sse2", "neon", "sve") if ask("target.llvm_cpu_has_feature")(name, target)}
        bits = int(ask("target.llvm_get_vector_width")(target))
    return {"triple": triple, "cpu": cpu, "vector_bytes": 64 if "avx512f" in features else bits // 8}


def compile_probe(llvm: Mapping[str, Any], cpu: Cpu, path: Path) -> Path:
    """Compiles both kernels into a shared library at `path`."""
    n, tile = PRODUCT_SIZE, cpu.tile_columns
    x = te.placeholder((1, n, n), name="x")
    packed = te.placeholder((-(-n // tile), n, tile), name="packed")
    k = te.reduce_axis((0, n), name="k")
    product = te.compute((1, n, n), lambda b, i, j: te.sum(x[b, i, k] * packed[j // tile, k, j % tile], axis=k), name="packed_product")
    sch = s_tir.Schedule(te.create_prim_func([x, packed, product]))
    schedule_packed_product(sch, cpu)
    module = tvm.IRModule(
        {
            "product": sch.mod["main"].with_attr("global_symbol", "product"),
            "read": _read(cpu).with_attr("global_symbol", "read"),
        }
    )
    link_shared(tvm.compile(module, tvm.target.Target(dict(llvm))), path)
    return path


def _read(cpu: Cpu) -> Any:
    """Sums every lane of a large array, each thread its part; four vectors at once hide the latency of an addition."""
    parts, width = 2 * cpu.cores, 4 * cpu.lanes
    steps = READ_VALUES // (parts * width)
    data = te.placeholder((parts, steps, width), name="data")
    s = te.reduce_axis((0, steps), name="s")
    total = te.compute((parts, width), lambda p, j: te.sum(data[p, s, j], axis=s), name="total")
    sch = s_tir.Schedule(te.create_prim_func([data, total]))
    block = sch.get_sblock("total")
    local = sch.cache_write(block, 0, "local")
    part, _ = sch.get_loops(local)
    sch.compute_at(block, part, preserve_unit_loops=True)
    *_, lane, step = sch.get_loops(block)
    vector, lane = sch.split(lane, [4, None])
    sch.reorder(step, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    sch.parallel(part)
    init = sch.decompose_reduction(block, step)
    sch.vectorize(sch.get_loops(init)[-1])
    return sch.mod["main"]
