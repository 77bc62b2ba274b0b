"""Asking for a weight before it is needed.

A product of some rows reads each tile of the weight from memory while it computes its first rows, and computes the others
from what is then near. By itself, memory rests during those, and arithmetic waits during the first. Hints that fetch
one tile ahead, a little with every step, let both go on all the time.

A product of one tile of rows reads all of the weight once, and waits for memory throughout. Processors foresee such reading, but not
across the pages of memory, and not far enough ahead to keep all their places for misses busy; hints a fixed distance ahead do.
"""

import itertools
from typing import Any

import tvm
from tvm import sym, tirx
from tvm.s_tir import SBlock, SBlockRealize

from targets.schedules.vectors import LINE_VALUES, hint

_TILES, _ROWS, _DEPTH = "edgewise.tiles", "edgewise.rows", "edgewise.depth"
_AHEAD = "edgewise.ahead"


def mark(sch: Any, tiles: Any, rows: Any, depth: Any) -> None:
    """Marks the loops of a packed product for `with_prefetches`: over the weight's tiles, over tiles of rows, the outer one over k."""
    for loop, name in ((tiles, _TILES), (rows, _ROWS), (depth, _DEPTH)):
        sch.annotate(loop, name, 1)


def mark_ahead(sch: Any, depth: Any, steps: int) -> None:
    """Marks the outer loop over k of a packed product of one tile of rows, which is to ask for what lies that many steps of k ahead."""
    sch.annotate(depth, _AHEAD, steps)


def with_prefetches(function: Any) -> Any:
    """The scheduled kernel with hints in its marked loops; without marks as it is."""
    loops: dict[str, Any] = {}
    body = _visit(function.body, loops)
    return function.with_body(body) if loops else function


def _visit(stmt: Any, loops: dict[str, Any]) -> Any:
    if isinstance(stmt, SBlockRealize):
        block = stmt.block
        body = _visit(block.body, loops)
        if body.same_as(block.body):
            return stmt
        outside = (block.iter_vars, block.reads, block.writes, block.name_hint)
        block = SBlock(*outside, body, block.init, block.alloc_buffers, block.match_buffers, block.annotations)
        return SBlockRealize(stmt.iter_values, stmt.predicate, block)
    if isinstance(stmt, tirx.SeqStmt):
        parts = [_visit(part, loops) for part in stmt.seq]
        return stmt if all(a.same_as(b) for a, b in zip(parts, stmt.seq, strict=True)) else tirx.SeqStmt(parts)
    if not isinstance(stmt, tirx.For):
        return stmt
    marks = [name for name in (_TILES, _ROWS, _DEPTH, _AHEAD) if name in stmt.annotations]
    loops |= dict.fromkeys(marks, stmt)
    hints: list[Any] = _hints(stmt, loops) if _DEPTH in marks else _hints_ahead(stmt) if _AHEAD in marks else []
    body = tirx.SeqStmt([*hints, stmt.body]) if hints else _visit(stmt.body, loops)
    if body.same_as(stmt.body) and not marks:
        return stmt
    left = {name: value for name, value in stmt.annotations.items() if name not in marks}
    if _ROWS in marks:
        left["pragma_loop_partition_hint"] = 1
    return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, left)


def _hints(depth: Any, loops: dict[str, Any]) -> list[Any]:
    """What a step over k asks for: its share of the lines of the next tile, from the tile's first row tiles on."""
    weight, first = _weight(depth)
    tile, row, step = (loops[name].loop_var for name in (_TILES, _ROWS, _DEPTH))
    tiles, rows, steps = (int(loops[name].extent) for name in (_TILES, _ROWS, _DEPTH))
    _, columns, lanes = (int(size) for size in weight.ty.shape)
    each, needed = shares(columns * lanes // LINE_VALUES, rows, steps)
    at = (row * steps + step) * each
    ahead = tirx.min(tile + 1, tiles - 1) + first
    hints = [_prefetch(weight, ahead, (at + i) * LINE_VALUES, lanes) for i in range(each)]
    if needed >= rows:
        return hints
    # `likely` has the loop over row tiles split there: a branch in each step costs more than the hints gain.
    return [tirx.IfThenElse(tirx.likely(row < needed), tirx.SeqStmt(hints) if each > 1 else hints[0], None)]


def _hints_ahead(depth: Any) -> list[Any]:
    """What a step over k asks for: the lines that the step so far ahead reads, of this tile or, behind its end, of the next."""
    realize, loops = _inside(depth.body)
    weight, indices = _weight_read(realize.block)
    step, *_, vector, lane = loops
    line = LINE_VALUES * 32 // tvm.DataType(weight.ty.dtype).bits
    hints = []
    for k, v in itertools.product(range(int(step.extent)), range(int(vector.extent))):
        if v * int(lane.extent) % line == 0:
            analyzer = sym.Analyzer()
            for loop in loops:
                place = k if loop is step else v if loop is vector else 0
                analyzer.bind(loop.loop_var, tirx.const(place, loop.loop_var.ty.dtype))
            for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
                analyzer.bind(axis.var, analyzer.simplify(value))
            tile, row, column = (analyzer.simplify(index) for index in indices)
            hints.append(tirx.Evaluate(hint(weight.ptr_to([tile, row + int(depth.annotations[_AHEAD]), column]))))
    return hints


def shares(lines: int, rows: int, steps: int) -> tuple[int, int]:
    """How many lines each step of a row tile asks for, and how many of the row tiles must, for all lines to be asked for."""
    each = -(-lines // (rows * steps))
    return each, -(-lines // (steps * each))


def _prefetch(weight: Any, tile: Any, offset: Any, lanes: int) -> Any:
    return tirx.Evaluate(hint(weight.ptr_to([tile, tirx.floordiv(offset, lanes), tirx.floormod(offset, lanes)])))


def _weight(stmt: Any) -> tuple[Any, Any]:
    """The packed weight that the product inside reads, and which of its tiles is the product's first."""
    block = _inside(stmt)[0].block
    weight, (tile, *_) = _weight_read(block)
    column = _column(block)
    analyzer = sym.Analyzer()
    analyzer.bind(column, tirx.const(0, column.ty.dtype))
    return weight, analyzer.simplify(tile)


def _weight_read(block: Any) -> tuple[Any, list[Any]]:
    """The packed weight that a product's block reads, and where."""
    column = _column(block)
    region = next(region for region in block.reads if _has(region.region[0].min, column) and _has(region.region[-1].min, column))
    return region.source, [part.min for part in region.region]


def _column(block: Any) -> Any:
    return block.iter_vars[-2].var  # rows, columns, k


def _has(index: Any, var: Any) -> bool:
    return any(var.same_as(other) for other in tirx.analysis.undefined_vars(index))


def _inside(stmt: Any) -> tuple[Any, list[Any]]:
    """The first block of a statement, and the loops around it, from outside."""
    loops = []
    while not isinstance(stmt, SBlockRealize):
        if isinstance(stmt, tirx.For):
            loops.append(stmt)
        stmt = stmt.seq[0] if isinstance(stmt, tirx.SeqStmt) else stmt.body
    return stmt, loops
