"""Attention of one new token over a contiguous cache: plain heads (`cached_attention`) and latents (`latent_attention`).

The cache is read once, front to back, in parts that run in parallel and are merged at the end (Dao et al., "Flash-Decoding",
2023). A part takes a chunk of rows at a time: scores of a few rows at once in vectors along their width, their softmax, then
the weighted rows of values. Heads of a group take turns on rows that are in the first-level cache by then. The next rows are
asked for ahead of time, spread over the arithmetic: a processor follows one stream from memory, not a head's pieces of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from targets.cpu import Cpu
from targets.schedules.vectors import (
    LOG2_E,
    LOWEST,
    add,
    begin_kernel,
    common_lanes,
    exp2,
    load,
    local,
    prefetch,
    reduced,
    splat,
    store,
    sums,
)

CHUNK = 64
"""Rows whose scores are held at once."""
STRIP = 8
"""Rows of values that are added between two times of asking for later rows."""
PART_FLOPS = 1 << 15
"""Parts of less work than this do not pay for waking a thread."""


def cached_attention(heads: int, kv_heads: int, width: int, value_width: int, scale: float, cpu: Cpu) -> Any:
    """softmax(scale q [k; k_new]^T) [v; v_new] for one token and C cached rows, C known at run time (0 is allowed).

    q (1, 1, heads, width), k (1, C, kv_heads, width), v (1, C, kv_heads, value_width), k_new (1, 1, kv_heads, width),
    v_new (1, 1, kv_heads, value_width) -> (1, 1, heads, value_width), float32.
    """
    H, K, D, V = heads, kv_heads, width, value_width
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        C = tirx.Var("C", "int64")
        q, k, v, k_new, v_new, out = begin_kernel(
            "cached_attention", q=(1, 1, H, D), k=(1, C, K, D), v=(1, C, K, V), k_new=(1, 1, K, D), v_new=(1, 1, K, V), out=(1, 1, H, V)
        )
        keys = (_Rows(cache=k, new=k_new, width=D, queries=q),)
        _attention(_Plan(heads=H, kv_heads=K, scale=scale, cpu=cpu, keys=keys, values=_Rows(cache=v, new=v_new, width=V), rows=C), out)
    return builder.get()


def latent_attention(heads: int, rank: int, rotary: int, scale: float, cpu: Cpu) -> Any:
    """softmax(scale (q [c; c_new]^T + q_rope [k_rope; k_rope_new]^T)) [c; c_new]: MLA over cached latents c.

    q (1, heads, rank), q_rope (1, heads, rotary), latent (1, C, rank), k_rope (1, C, rotary), latent_new (1, 1, rank),
    k_rope_new (1, 1, rotary) -> (1, heads, rank), float32.
    """
    H, L, R = heads, rank, rotary
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        C = tirx.Var("C", "int64")
        q, q_rope, latent, k_rope, latent_new, k_rope_new, out = begin_kernel(
            "latent_attention",
            q=(1, H, L),
            q_rope=(1, H, R),
            latent=(1, C, L),
            k_rope=(1, C, R),
            latent_new=(1, 1, L),
            k_rope_new=(1, 1, R),
            out=(1, H, L),
        )
        latents = _Rows(cache=latent, new=latent_new, width=L, queries=q)
        keys = (latents, _Rows(cache=k_rope, new=k_rope_new, width=R, queries=q_rope))
        _attention(_Plan(heads=H, kv_heads=1, scale=scale, cpu=cpu, keys=keys, values=latents, rows=C), out)
    return builder.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A cached array, its new row, how wide a head's row is, and the queries that meet it if it holds keys."""

    cache: Any
    new: Any
    width: int
    queries: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the kernel reads and its sizes."""

    heads: int
    kv_heads: int
    scale: float
    cpu: Cpu
    keys: Sequence[_Rows]
    values: _Rows
    rows: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        return self.cpu.lanes

    @property
    def row_block(self) -> int:
        """Rows whose scores are in registers at once: a whole vector of them, and enough to hide an addition's latency."""
        return max(self.lanes, 8)

    @property
    def value_lanes(self) -> int:
        return common_lanes(self.values.width, self.lanes)

    @property
    def value_vectors(self) -> int:
        return self.values.width // self.value_lanes

    @property
    def head_block(self) -> int:
        """Heads whose outputs are in registers at once."""
        return next(heads for heads in range(min(self.group, 8), 0, -1) if self.group % heads == 0)

    @property
    def vector_block(self) -> int:
        """Vectors of a head's output that are in registers at once."""
        most = max(1, min(24, self.cpu.registers * 3 // 4) // self.head_block)
        return next(vectors for vectors in range(min(self.value_vectors, most), 0, -1) if self.value_vectors % vectors == 0)

    def slot(self, head: Any, row: Any) -> Any:
        """Where a head's score of a chunk's row is kept; a block that was moved back begins before the chunk."""
        return head * (self.row_block + CHUNK) + self.row_block + row

    @property
    def fewest_rows(self) -> int:
        """Rows that are worth a part of their own."""
        per_row = 2 * self.heads * (sum(keys.width for keys in self.keys) + self.values.width)
        return -(-PART_FLOPS // per_row)

    @property
    def values_are_keys(self) -> bool:
        return self.values is self.keys[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What parts leave for each other: per part and head the largest score, lanes of the sum, and the output so far."""

    most: Any
    total: Any
    outputs: Any


def _attention(plan: _Plan, out: Any) -> None:
    most_parts = plan.cpu.cores
    size = most_parts * plan.heads
    parts = _Parts(
        most=T.alloc_buffer((size,), "float32", layout=None),
        total=T.alloc_buffer((size * plan.lanes,), "float32", layout=None),
        outputs=T.alloc_buffer((size * plan.values.width,), "float32", layout=None),
    )
    length, count = plan.rows, 1
    if most_parts > 1:
        length = T.Bind(T.max((plan.rows + (most_parts - 1)) // most_parts, plan.fewest_rows))
        count = T.Bind(T.max((plan.rows + length - 1) // length, 1))
    with (T.parallel if most_parts > 1 else T.serial)(count) as part:
        powers = local(plan.group * (plan.row_block + CHUNK))
        registers = max(plan.row_block * plan.lanes, plan.head_block * plan.vector_block * plan.value_lanes)
        accumulators = local(registers)
        begin = T.Bind(part * length)
        end = T.Bind(T.min(plan.rows, begin + length))
        _begin(plan, parts, part, accumulators)
        with T.serial((T.max(end - begin, 0) + (CHUNK - 1)) // CHUNK) as chunk, T.serial(plan.kv_heads) as kv_head:
            row = T.Bind(begin + chunk * CHUNK)
            rows = T.Bind(T.min(CHUNK, end - row))
            head = T.Bind(part * plan.heads + kv_head * plan.group)
            _scores(plan, kv_head, row, rows, powers, accumulators)
            _softmax(plan, parts, head, rows, powers, accumulators)
            _outputs(plan, parts, head, kv_head, row, rows, powers, accumulators)
    with T.serial(plan.heads) as head:
        _merge(plan, parts, head, count, most_parts, out)


def _begin(plan: _Plan, parts: _Parts, part: Any, accumulators: Any) -> None:
    """The first part starts from the new row, the others from nothing."""
    with T.serial(plan.heads) as head:
        kv_head = T.Bind(head // plan.group)
        score = _score(plan, [keys.new for keys in plan.keys], head, kv_head, accumulators)
        at, own = T.Bind(part * plan.heads + head), part == 0
        one = T.Bind(T.Select(own, T.float32(1), T.float32(0)))
        store(parts.most, at, T.Select(own, score, T.float32(LOWEST)), 1)
        store(parts.total, at * plan.lanes, splat(0.0, plan.lanes), plan.lanes)
        store(parts.total, at * plan.lanes, one, 1)
        W, width = plan.value_lanes, plan.values.width
        with T.serial(plan.value_vectors) as x:
            store(parts.outputs, at * width + x * W, load(plan.values.new, kv_head * width + x * W, W) * splat(one, W), W)


def _score(plan: _Plan, arrays: Sequence[Any], head: Any, row: Any, accumulators: Any) -> Any:
    """The score of one row of keys, whose parts are rows `row` of the arrays; scaled for powers of two."""
    score = T.float32(0)
    for keys, array in zip(plan.keys, arrays, strict=True):
        W = common_lanes(keys.width, plan.lanes)
        store(accumulators, 0, splat(0.0, W), W)
        with T.serial(keys.width // W) as j:
            add(accumulators, 0, load(keys.queries, head * keys.width + j * W, W) * load(array, row * keys.width + j * W, W), W)
        score = T.Bind(score + reduced(T.Bind(load(accumulators, 0, W)), W, lambda a, b: a + b))
    return score * T.float32(plan.scale * LOG2_E)


def _scores(plan: _Plan, kv_head: Any, row: Any, rows: Any, powers: Any, accumulators: Any) -> None:
    """Scores of `rows` rows for each head of the group."""
    R = plan.row_block
    with T.If(plan.rows >= R):
        with T.Then(), T.serial((rows + (R - 1)) // R) as block:
            # The last block of all is moved back to end with the cache: it computes some scores again instead of reading past it.
            first = T.Bind(T.min(row + block * R, plan.rows - R))
            with T.serial(plan.group) as g:
                _prefetch_values(plan, kv_head, first, g)
                _block_scores(plan, kv_head, first, first - row, g, powers, accumulators)
        with T.Else(), T.serial(rows) as r, T.serial(plan.group) as g:
            where = T.Bind((row + r) * plan.kv_heads + kv_head)
            score = _score(plan, [keys.cache for keys in plan.keys], kv_head * plan.group + g, where, accumulators)
            store(powers, plan.slot(g, r), score, 1)


def _prefetch_values(plan: _Plan, kv_head: Any, first: Any, g: Any) -> None:
    """Asks for the block's rows of values; the heads of a group share them among themselves.

    Where the values are keys, and at hand, it is the same rows of the next chunk.
    """
    array, ahead = plan.values, CHUNK if plan.values_are_keys else 0
    each = -(-plan.row_block // plan.group)
    for r in range(each):
        row = _row(plan, first + ahead + T.min(g * each + r, plan.row_block - 1), kv_head)
        prefetch(array.cache, row * array.width, array.width)


def _block_scores(plan: _Plan, kv_head: Any, first: Any, slot: Any, g: Any, powers: Any, accumulators: Any) -> None:
    """Scores of a block of rows from `first` on, into the slots from `slot` on, a vector of rows at a time."""
    R = plan.row_block
    for keys in plan.keys:
        W, width = common_lanes(keys.width, plan.lanes), keys.width
        query = T.Bind((kv_head * plan.group + g) * width)
        key = T.Bind((first * plan.kv_heads + kv_head) * width)
        with T.unroll(R) as r:
            store(accumulators, r * W, splat(0.0, W), W)
        with T.serial(width // W) as j, T.unroll(R) as r:
            at = key + r * (plan.kv_heads * width) + j * W
            add(accumulators, r * W, load(keys.queries, query + j * W, W) * load(keys.cache, at, W), W)
        for vector in range(0, R, W):
            to = plan.slot(g, slot + vector)
            score = sums([T.Bind(load(accumulators, (vector + r) * W, W)) for r in range(W)])
            score = score if keys is plan.keys[0] else load(powers, to, W) + score
            store(powers, to, score * splat(plan.scale * LOG2_E, W) if keys is plan.keys[-1] else score, W)


def _row(plan: _Plan, row: Any, kv_head: Any) -> Any:
    """Where a row of a head begins, in rows; past the end of the cache its last row."""
    return T.min(row, plan.rows - 1) * plan.kv_heads + kv_head


def _softmax(plan: _Plan, parts: _Parts, head: Any, rows: Any, powers: Any, accumulators: Any) -> None:
    """Scores -> exponentials under each head's largest score so far; sums and outputs so far shrink with it."""
    W, V = plan.lanes, plan.value_lanes
    vectors = T.Bind((rows + (W - 1)) // W)
    with T.serial(plan.group) as g:
        at, mine = T.Bind(head + g), T.Bind(plan.slot(g, 0))
        with T.serial(vectors * W - rows) as i:
            store(powers, mine + rows + i, T.float32(LOWEST), 1)
        store(accumulators, 0, splat(parts.most[at], W), W)
        with T.serial(vectors) as t:
            store(accumulators, 0, T.max(load(accumulators, 0, W), load(powers, mine + t * W, W)), W)
        most = reduced(T.Bind(load(accumulators, 0, W)), W, T.max)
        shrink = exp2(parts.most[at] - most, 1)
        store(parts.most, at, most, 1)
        store(accumulators, 0, load(parts.total, at * W, W) * splat(shrink, W), W)
        with T.serial(vectors) as t:
            power = exp2(load(powers, mine + t * W, W) - splat(most, W), W)
            add(accumulators, 0, power, W)
            store(powers, mine + t * W, power, W)
        store(parts.total, at * W, load(accumulators, 0, W), W)
        with T.serial(plan.value_vectors) as x:
            output = at * plan.values.width + x * V
            store(parts.outputs, output, load(parts.outputs, output, V) * splat(shrink, V), V)


def _outputs(plan: _Plan, parts: _Parts, head: Any, kv_head: Any, row: Any, rows: Any, powers: Any, accumulators: Any) -> None:
    """Adds weighted rows of values, a strip of rows at a time; before each, as many rows of the next chunk's keys are asked for."""
    W, G, N, width = plan.value_lanes, plan.head_block, plan.vector_block, plan.values.width
    keys = plan.keys[0]
    with T.serial((rows + (STRIP - 1)) // STRIP) as strip:
        first = T.Bind(strip * STRIP)
        # Not inside the loop below: a prefetch counts as a write, and the accumulators would go back to memory at each.
        if not plan.values_are_keys:
            with T.serial(STRIP) as t:
                prefetch(keys.cache, _row(plan, row + first + t + CHUNK, kv_head) * keys.width, keys.width)
        with T.serial(plan.group // G) as heads, T.serial(plan.value_vectors // N) as column:
            output = T.Bind((head + heads * G) * width + column * (N * W))
            with T.unroll(G) as g, T.unroll(N) as x:
                store(accumulators, (g * N + x) * W, load(parts.outputs, output + g * width + x * W, W), W)
            with T.serial(T.min(STRIP, rows - first)) as t:
                source = T.Bind(((row + first + t) * plan.kv_heads + kv_head) * width + column * (N * W))
                with T.unroll(G) as g, T.unroll(N) as x:
                    power = splat(powers[plan.slot(heads * G + g, first + t)], W)
                    add(accumulators, (g * N + x) * W, power * load(plan.values.cache, source + x * W, W), W)
            with T.unroll(G) as g, T.unroll(N) as x:
                store(parts.outputs, output + g * width + x * W, load(accumulators, (g * N + x) * W, W), W)


def _merge(plan: _Plan, parts: _Parts, head: Any, count: Any, most_parts: int, out: Any) -> None:
    """One head's parts, brought under their largest score, added up and divided by the sum of all exponentials."""
    W, V, width = plan.lanes, plan.value_lanes, plan.values.width
    accumulator, weights = local(W), local(most_parts)
    store(accumulator, 0, parts.most[head], 1)
    with T.serial(count) as part:
        store(accumulator, 0, T.max(accumulator[0], parts.most[part * plan.heads + head]), 1)
    most = T.Bind(accumulator[0])
    store(accumulator, 0, splat(0.0, W), W)
    with T.serial(count) as part:
        at = T.Bind(part * plan.heads + head)
        store(weights, part, exp2(parts.most[at] - most, 1), 1)
        add(accumulator, 0, load(parts.total, at * W, W) * splat(weights[part], W), W)
    inverse = T.Bind(T.float32(1) / reduced(T.Bind(load(accumulator, 0, W)), W, lambda a, b: a + b))
    with T.serial(plan.value_vectors) as x:
        store(out, head * width + x * V, splat(0.0, V), V)
    with T.serial(count) as part:
        share = T.Bind(weights[part] * inverse)
        with T.serial(plan.value_vectors) as x:
            output = load(parts.outputs, (part * plan.heads + head) * width + x * V, V)
            add(out, head * width + x * V, output * splat(share, V), V)
