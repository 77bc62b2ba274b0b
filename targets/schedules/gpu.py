"""How kernels are spread over a GPU's threads: rules of our own for attention of one token, else the first of TVM's dlight that fits.

Products of many rows become tiles in shared memory; those of one row, norms and the softmax become sums by the threads of a
block; everything else gives a thread an element.
"""

import math
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import dlight, pipeline

from targets.gpu import Gpu
from targets.schedules.blocks import block_handles, int_or_none
from targets.schedules.gpu_kernels import ROW_SCORES, WEIGHTED_ROWS

_RULES = (
    dlight.gpu.Matmul,
    dlight.gpu.GEMV,
    dlight.gpu.Reduction,
    dlight.gpu.GeneralReduction,
    dlight.gpu.Fallback,
)
_LANES = 32
"""Threads that read side by side: a warp of NVIDIA's."""
_SCORE_ROWS = 8
"""Cached rows that a block scores."""
_MOST_PARTS = 32
"""Parts that the sum over cached rows is made in."""


def schedule_for_gpu(module: Any, gpu: Gpu) -> Any:
    """Schedules every kernel of the module for the GPU, which is the target in force.

    Raises:
        RuntimeError: for a kernel that no rule schedules within the GPU's limits.
    """
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(var, _schedule(var.name_hint, function, gpu))
    return module


def _schedule(name: str, function: Any, gpu: Gpu) -> Any:
    target = tvm.target.Target.current(allow_none=False)
    reason = "none knows it"
    for rule in (None, *_RULES):
        # A rule may fail, or make what cannot be compiled, where a kernel is not quite what it was written for: in many ways.
        try:
            schedule = rule().apply(function, target, False) if rule else _attention(function, gpu)
            if schedule is None:
                continue
            scheduled = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
            _check(scheduled, target, gpu)
            return scheduled
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    raise RuntimeError(f"no rule schedules the kernel {name} for this GPU ({reason})")


def _check(function: Any, target: Any, gpu: Gpu) -> None:
    """Lowers the kernel: TVM raises an error for an access that is no thread's, this function for more than a block may use."""
    module = tirx.transform.BindTarget(target)(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    lower, *_ = pipeline.default_s_tir_pipeline()
    for lowered in lower(module).functions.values():
        extents: dict[str, int] = {}

        def visit(statement: Any, extents: dict[str, int] = extents) -> None:
            if statement.attr_key == "thread_extent" and statement.node.thread_tag.startswith("threadIdx"):
                extents[statement.node.thread_tag] = int(statement.value)

        tvm_ffi.structural_walk(lowered.body, (tirx.AttrStmt, visit), order="post")
        threads = math.prod(extents.values())
        if threads > gpu.threads:
            raise RuntimeError(f"{threads} threads are more than the {gpu.threads} of a block")
        for allocated in s_tir.analysis.calculate_allocated_bytes(lowered).values():
            if int(allocated.get("shared", 0)) > gpu.shared_bytes:
                raise RuntimeError(f"{int(allocated['shared'])} bytes are more than the {gpu.shared_bytes} that a block shares")


def _attention(function: Any, gpu: Gpu) -> Any | None:
    """Attention of one token; None for another kernel.

    A score is a sum by the threads that read along a cached row. A column of the weighted rows is a sum by threads that
    each take every so-manieth row, while their neighbours read the columns beside.
    """
    sch = s_tir.Schedule(function)
    block, *others = block_handles(sch)
    name = sch.get(block).name_hint
    if others or name not in (ROW_SCORES, WEIGHTED_ROWS):
        return None
    *lead, last, summed = sch.get_loops(block)
    head = sch.fuse(*lead) if len(lead) > 1 else lead[0]
    side = summed if name == ROW_SCORES else last
    width = int_or_none(sch.get(side).extent)
    assert width is not None, "only the number of cached rows varies"
    lanes = min(_LANES, 1 << (width.bit_length() - 1))
    parts = _SCORE_ROWS if name == ROW_SCORES else min(_MOST_PARTS, gpu.threads // lanes)
    outer, inner = sch.split(last, [None, parts if name == ROW_SCORES else lanes])
    steps, thread = sch.split(summed, [None, lanes if name == ROW_SCORES else parts])
    sch.reorder(head, outer, inner, steps, thread)
    x, y = (thread, inner) if name == ROW_SCORES else (inner, thread)
    for loop, axis in ((head, "blockIdx.y"), (outer, "blockIdx.x"), (y, "threadIdx.y"), (x, "threadIdx.x")):
        sch.bind(loop, axis)
    return sch
