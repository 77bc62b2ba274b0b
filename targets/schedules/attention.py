"""Causal attention of a prompt: tiles of query rows against tiles of keys, the masked half never computed.

A task takes as many query rows as two or four vectors have lanes; the heads of a group that share keys lie side
by side among them. Scores are held transposed (a row a key), so that the softmax of a row runs down the lanes and
neither product needs a transposed key or value:

    scores[t, r] = sum_j K[t, j] Q^T[j, r]      K read one value at a time, lanes are query rows
    o[r, c] = sum_t scores[t, r] V[t, c]        scores read one value at a time, lanes are value columns

The softmax is renormalised from tile to tile (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., 2205.14135).
"""

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from targets.cpu import Cpu
from targets.schedules.vectors import LOG2_E, LOWEST, add, begin_kernel, exp2, fill, load, local, splat, store, transposed

KEYS = 64
"""Keys of a tile: its scores stay in the first-level cache, and a row of outputs is renormalised this rarely."""


def causal_attention(tokens: int, heads: int, kv_heads: int, width: int, value_width: int, cpu: Cpu) -> Any:
    """Softmax(q k^T / sqrt(width)) v with row s attending to rows 0..s.

    q (1, tokens, heads, width), k (1, tokens, kv_heads, width), v (1, tokens, kv_heads, value_width)
    -> (1, tokens, heads, value_width), float32. Tiles of rows and key/value heads run in parallel.
    """
    S, H, K, D, V = tokens, heads, kv_heads, width, value_width
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        q, k, v, out = begin_kernel("causal_attention", q=(1, S, H, D), k=(1, S, K, D), v=(1, S, K, V), out=(1, S, H, V))
        plan = _Plan(tokens=S, heads=H, kv_heads=K, width=D, value_width=V, cpu=cpu)
        with (T.parallel if cpu.cores > 1 else T.serial)(plan.tiles * K) as task:
            _task(plan, task, q, k, v, out)
    return builder.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Sizes of the kernel; `rows` are a group's query rows, position by position, head by head."""

    tokens: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    cpu: Cpu

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    @property
    def lanes(self) -> int:
        return self.cpu.lanes

    @property
    def vectors(self) -> int:
        """Vectors across a tile of rows."""
        return min(self.cpu.default_tuning.tile_vectors, -(-self.rows // self.lanes))

    @property
    def tile(self) -> int:
        return self.vectors * self.lanes

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def key_block(self) -> int:
        """Keys whose scores are in registers at once."""
        return min(self.cpu.default_tuning.tile_rows, self.tokens)

    @property
    def row_block(self) -> int:
        """Rows whose outputs are in registers at once."""
        return next(rows for rows in range(self.cpu.default_tuning.tile_rows, 0, -1) if self.tile % rows == 0)

    @property
    def columns(self) -> int:
        """Value columns, filled up to whole vectors."""
        return -(-self.value_width // self.lanes) * self.lanes

    @property
    def column_vectors(self) -> int:
        """Vectors of value columns that are in registers at once."""
        most = self.cpu.default_tuning.tile_vectors
        return next(vectors for vectors in range(most, 0, -1) if self.columns // self.lanes % vectors == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """What a task holds: its queries and outputs, the scores of one tile of keys, and a row's running softmax."""

    queries: Any  # (width, tile), scaled
    scores: Any  # (key_block + KEYS in whole blocks, tile): the first rows take what a shifted last block computes again
    outputs: Any  # (tile, columns)
    most: Any  # largest score so far
    total: Any  # sum of exponentials so far
    shrink: Any  # by how much earlier sums and outputs shrink under a new largest score
    position: Any  # as float32
    row: Any  # in q and out
    accumulators: Any
    values: Any  # (KEYS, columns) where rows of v are not whole vectors, else None


def _task(plan: _Plan, task: Any, q: Any, k: Any, v: Any, out: Any) -> None:
    accumulators = max(plan.key_block * plan.vectors, plan.row_block * plan.column_vectors)
    tile = _Tile(
        queries=local(plan.width * plan.tile),
        scores=local((-(-KEYS // plan.key_block) + 1) * plan.key_block * plan.tile),
        outputs=local(plan.tile * plan.columns),
        most=local(plan.tile),
        total=local(plan.tile),
        shrink=local(plan.tile),
        position=local(plan.tile),
        row=local(plan.tile, "int32"),
        accumulators=local(accumulators * plan.lanes),
        values=local(KEYS * plan.columns) if plan.columns != plan.value_width else None,
    )
    head, order = T.Bind(task % plan.kv_heads), T.Bind(task // plan.kv_heads)
    # Later tiles see more keys. Long and short ones alternate, so that equal runs of tasks are equal work.
    index = T.Bind(T.Select(order % 2 == 0, plan.tiles - 1 - order // 2, order // 2))
    first_row = T.Bind(index * plan.tile)
    first = T.Bind(first_row // plan.group)
    last = T.Bind(T.min((first_row + (plan.tile - 1)) // plan.group, plan.tokens - 1))
    _begin(plan, tile, head, first_row)
    _pack_queries(plan, tile, q)
    with T.serial(last // KEYS + 1) as step:
        begin = T.Bind(step * KEYS)
        count = T.Bind(T.min(KEYS, last + 1 - begin))
        _scores(plan, tile, k, head, begin, count)
        _mask(plan, tile, first, begin, count)
        _softmax(plan, tile, count)
        if tile.values is not None:
            _pack_values(plan, tile, v, head, begin, count)
        _outputs(plan, tile, v, head, begin, count)
    _write(plan, tile, out, T.min(plan.tile, plan.rows - first_row))


def _begin(plan: _Plan, tile: _Tile, head: Any, first_row: Any) -> None:
    """Which rows these are (lanes past the last row repeat it), and empty sums."""
    with T.serial(plan.tile) as lane:
        row = T.Bind(T.min(first_row + lane, plan.rows - 1))
        store(tile.row, lane, row // plan.group * plan.heads + head * plan.group + row % plan.group, 1)
        store(tile.position, lane, T.Cast("float32", row // plan.group), 1)
        store(tile.most, lane, T.float32(LOWEST), 1)
        store(tile.total, lane, T.float32(0), 1)
    fill(tile.outputs, plan.tile * plan.columns // plan.lanes, 0.0, plan.lanes)


def _pack_queries(plan: _Plan, tile: _Tile, q: Any) -> None:
    """Q^T of the tile, scaled so that powers of two give the softmax; whole vectors are transposed in registers."""
    W, scale = plan.lanes, LOG2_E / math.sqrt(plan.width)
    whole = plan.width // W * W
    if whole:
        with T.serial(plan.vectors) as x, T.serial(whole // W) as j:
            rows = [T.Bind(load(q, tile.row[x * W + i] * plan.width + j * W, W)) for i in range(W)]
            for i, column in enumerate(transposed(rows)):
                store(tile.queries, (j * W + i) * plan.tile + x * W, column * splat(scale, W), W)
    if whole < plan.width:
        with T.serial(plan.tile) as lane, T.serial(plan.width - whole) as j:
            value = q[tile.row[lane] * plan.width + whole + j] * T.float32(scale)
            store(tile.queries, (whole + j) * plan.tile + lane, value, 1)


def _scores(plan: _Plan, tile: _Tile, k: Any, head: Any, begin: Any, count: Any) -> None:
    W, R, N = plan.lanes, plan.key_block, plan.vectors
    with T.serial((count + (R - 1)) // R) as block:
        # The last block of all is moved back to end with the keys: it computes some scores again instead of reading past them.
        key = T.Bind(T.min(begin + block * R, plan.tokens - R))
        base = T.Bind((key * plan.kv_heads + head) * plan.width)
        with T.unroll(R * N) as i:
            store(tile.accumulators, i * W, splat(0.0, W), W)
        with T.serial(plan.width) as j, T.unroll(R) as r, T.unroll(N) as x:
            value = splat(k[base + r * (plan.kv_heads * plan.width) + j], W)
            add(tile.accumulators, (r * N + x) * W, value * load(tile.queries, j * plan.tile + x * W, W), W)
        with T.unroll(R) as r, T.unroll(N) as x:
            store(tile.scores, (key - begin + R + r) * plan.tile + x * W, load(tile.accumulators, (r * N + x) * W, W), W)


def _mask(plan: _Plan, tile: _Tile, first: Any, begin: Any, count: Any) -> None:
    """Takes out the keys that come after a row; keys up to the tile's first position come after none."""
    W = plan.lanes
    seen = T.Bind(T.max(first + 1 - begin, 0))
    with T.serial(T.max(count - seen, 0)) as t, T.unroll(plan.vectors) as x:
        at = (seen + t + plan.key_block) * plan.tile + x * W
        before = splat(T.Cast("float32", begin + seen + t), W) <= load(tile.position, x * W, W)
        store(tile.scores, at, T.Select(before, load(tile.scores, at, W), splat(LOWEST, W)), W)


def _softmax(plan: _Plan, tile: _Tile, count: Any) -> None:
    """Scores -> exponentials under the largest score so far; the sums, and by how much earlier ones shrink."""
    W = plan.lanes
    with T.serial(plan.vectors) as x:
        row = x * W
        store(tile.accumulators, 0, load(tile.most, row, W), W)
        with T.serial(count) as t:
            score = load(tile.scores, (t + plan.key_block) * plan.tile + row, W)
            store(tile.accumulators, 0, T.max(load(tile.accumulators, 0, W), score), W)
        most = T.Bind(load(tile.accumulators, 0, W))
        shrink = exp2(load(tile.most, row, W) - most, W)
        store(tile.shrink, row, shrink, W)
        store(tile.most, row, most, W)
        store(tile.accumulators, 0, load(tile.total, row, W) * shrink, W)
        with T.serial(count) as t:
            at = (t + plan.key_block) * plan.tile + row
            power = exp2(load(tile.scores, at, W) - most, W)
            add(tile.accumulators, 0, power, W)
            store(tile.scores, at, power, W)
        store(tile.total, row, load(tile.accumulators, 0, W), W)


def _pack_values(plan: _Plan, tile: _Tile, v: Any, head: Any, begin: Any, count: Any) -> None:
    """Rows of v filled up with zeros to whole vectors."""
    W, whole = plan.lanes, plan.value_width // plan.lanes * plan.lanes
    with T.serial(count) as t:
        source = T.Bind(((begin + t) * plan.kv_heads + head) * plan.value_width)
        if whole:
            with T.serial(whole // W) as x:
                store(tile.values, t * plan.columns + x * W, load(v, source + x * W, W), W)
        store(tile.values, t * plan.columns + whole, splat(0.0, W), W)
        with T.serial(plan.value_width - whole) as j:
            store(tile.values, t * plan.columns + whole + j, v[source + whole + j], 1)


def _outputs(plan: _Plan, tile: _Tile, v: Any, head: Any, begin: Any, count: Any) -> None:
    W, R, N = plan.lanes, plan.row_block, plan.column_vectors
    with T.serial(plan.columns // (W * N)) as column, T.serial(plan.tile // R) as block:
        row = T.Bind(block * R)
        at = T.Bind(row * plan.columns + column * (N * W))
        with T.unroll(R) as r, T.unroll(N) as x:
            earlier = load(tile.outputs, at + r * plan.columns + x * W, W)
            store(tile.accumulators, (r * N + x) * W, earlier * splat(tile.shrink[row + r], W), W)
        with T.serial(count) as t:
            values, source = (
                (v, ((begin + t) * plan.kv_heads + head) * plan.value_width) if tile.values is None else (tile.values, t * plan.columns)
            )
            source = T.Bind(source + column * (N * W))
            with T.unroll(R) as r, T.unroll(N) as x:
                power = splat(tile.scores[(t + plan.key_block) * plan.tile + row + r], W)
                add(tile.accumulators, (r * N + x) * W, power * load(values, source + x * W, W), W)
        with T.unroll(R) as r, T.unroll(N) as x:
            store(tile.outputs, at + r * plan.columns + x * W, load(tile.accumulators, (r * N + x) * W, W), W)


def _write(plan: _Plan, tile: _Tile, out: Any, rows: Any) -> None:
    W, whole = plan.lanes, plan.value_width // plan.lanes * plan.lanes
    with T.serial(rows) as lane:
        inverse = T.Bind(T.float32(1) / tile.total[lane])
        to = T.Bind(tile.row[lane] * plan.value_width)
        if whole:
            with T.serial(whole // W) as x:
                store(out, to + x * W, load(tile.outputs, lane * plan.columns + x * W, W) * splat(inverse, W), W)
        if whole < plan.value_width:
            with T.serial(plan.value_width - whole) as j:
                store(out, to + whole + j, tile.outputs[lane * plan.columns + whole + j] * inverse, 1)
