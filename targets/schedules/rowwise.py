"""Everything that is not a product: elementwise kernels, norms, softmax, sums."""

from typing import Any

from targets.cpu import Cpu
from targets.schedules.blocks import block_handles, int_or_none, is_reduction, output_block

PARALLEL_ELEMENTS = 1 << 14
"""Kernels with fewer output elements run on one thread."""


def schedule_rowwise(sch: Any, cpu: Cpu) -> None:
    """Computes a row at a time: what feeds the output is inlined or computed beside it, rows run in parallel."""
    _inline_single_uses(sch)
    out = output_block(sch)
    others = [block for block in block_handles(sch) if not sch.get(block).same_as(sch.get(out))]
    loops = sch.get_loops(out)
    spatial = [loop for loop, iter_var in zip(loops, sch.get(out).iter_vars, strict=True) if int(iter_var.iter_type) == 0]
    extents = [int_or_none(sch.get(loop).extent) for loop in spatial]
    if len(spatial) < 2:
        return
    if not others and not is_reduction(sch, out):
        _elementwise(sch, loops, extents, cpu)
        return
    row = sch.fuse(*spatial[:-1]) if len(spatial) > 2 else spatial[0]
    for block in reversed(others):
        sch.compute_at(block, row)
    elements = _size(extents)
    if elements is not None and elements >= PARALLEL_ELEMENTS:
        sch.parallel(row)


def _elementwise(sch: Any, loops: list[Any], extents: list[int | None], cpu: Cpu) -> None:
    *outer, inner = loops
    row = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    elements, width = _size(extents), extents[-1]
    if elements is None or elements >= PARALLEL_ELEMENTS:
        if elements is not None:
            sch.parallel(row)
        return
    if width is not None and width % cpu.lanes == 0:
        _, lane = sch.split(inner, [None, cpu.lanes])
        sch.vectorize(lane)


def _size(extents: list[int | None]) -> int | None:
    total = 1
    for extent in extents:
        if extent is None:
            return None
        total *= extent
    return total


def _inline_single_uses(sch: Any) -> None:
    """Inlines elementwise blocks that one other block reads; several readers would repeat the work."""
    changed = True
    while changed:
        changed = False
        out = sch.get(output_block(sch))
        for block in block_handles(sch):
            if sch.get(block).same_as(out) or is_reduction(sch, block):
                continue
            if len(sch.get_consumers(block)) == 1:
                sch.compute_inline(block)
                changed = True
                break
