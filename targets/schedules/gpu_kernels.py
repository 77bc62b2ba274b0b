"""What a model computes with, as tensor expressions for a GPU: products, attention, rows of a table.

Weights lie row by row, so that the threads of a warp read along one. Attention is a few plain kernels: scores, their
softmax, the weighted rows of values; a query head reads the keys and values of its group in place. How they are spread
over threads is said in `gpu.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from targets.layout import K_GROUP
from targets.schedules.weights import WeightSpec

ROW_SCORES, WEIGHTED_ROWS = "row_scores", "weighted_rows"
"""What attention of one token is known by: scores of cached rows, and their sum weighted by powers."""
_OPAQUE = 8  # OpPatternKind in TVM's op_attr_types.h
_MASKED = -3.0e38
"""The score of a key that a row does not see: its exponential is 0."""


class GpuKernels:
    """Emits them into a Relax function. Sizes are those of the arguments; C, the cached rows, may vary."""

    def product(self, builder: Any, weight: WeightSpec, x: Any, arrays: Sequence[Any]) -> Any:
        """out[..., n] = sum_k x[..., k] w[n, k]."""
        return builder.emit_te(lambda *inputs: _product(weight, *inputs), x, *arrays, primfunc_name_hint="product")

    def gather(self, builder: Any, weight: WeightSpec, rows: Any, arrays: Sequence[Any]) -> Any:
        """out[..., :] = w[rows[...], :], each row below `weight.rows`."""
        return builder.emit_te(lambda *inputs: _gather(weight, *inputs), rows, *arrays, primfunc_name_hint="gather")

    def causal_attention(self, builder: Any, q: Any, k: Any, v: Any) -> Any:
        """softmax(q k^T / sqrt(width)) v, row s attending to rows 0..s.

        q (1, S, heads, width), k (1, S, kv_heads, width), v (1, S, kv_heads, value_width) -> (1, S, heads, value_width).
        """
        raw = builder.emit_te(_scores, q, k, primfunc_name_hint="scores")
        scale = 1 / math.sqrt(int(q.ty.shape[3]))
        powers = builder.emit_te(lambda raw: _causal_softmax(raw, scale), raw, primfunc_name_hint="softmax")
        return builder.emit_te(_weighted, powers, v, primfunc_name_hint="weighted_values")

    def cached_attention(self, builder: Any, q: Any, k: Any, v: Any, k_new: Any, v_new: Any, scale: float) -> Any:
        """softmax(scale q [k; k_new]^T) [v; v_new] for one token and C cached rows, C known at run time (0 is allowed).

        q (1, 1, heads, width), k (1, C, kv_heads, width), v (1, C, kv_heads, value_width), k_new (1, 1, kv_heads, width),
        v_new (1, 1, kv_heads, value_width) -> (1, 1, heads, value_width).
        """
        raw = _emit_alone(builder, _cached_scores, q, k, k_new)
        powers = builder.emit_te(lambda raw: _scaled_softmax(raw, scale), raw, primfunc_name_hint="softmax")
        return _emit_alone(builder, _weighted_rows, powers, v, v_new)

    def latent_attention(
        self, builder: Any, q: Any, q_rope: Any, latent: Any, k_rope: Any, latent_new: Any, k_rope_new: Any, scale: float
    ) -> Any:
        """softmax(scale (q [c; c_new]^T + q_rope [k_rope; k_rope_new]^T)) [c; c_new]: MLA over cached latents c.

        q (1, heads, rank), q_rope (1, heads, rotary), latent (1, C, rank), k_rope (1, C, rotary), latent_new (1, 1, rank),
        k_rope_new (1, 1, rotary) -> (1, heads, rank).
        """
        raw = _emit_alone(builder, _latent_scores, q, q_rope, latent, k_rope, latent_new, k_rope_new)
        powers = builder.emit_te(lambda raw: _scaled_softmax(raw, scale), raw, primfunc_name_hint="softmax")
        return _emit_alone(builder, _weighted_latents, powers, latent, latent_new)


def _emit_alone(builder: Any, function: Callable[..., te.Tensor], *arguments: Any) -> Any:
    """Emits a kernel that nothing is fused with."""
    return builder.emit_te(function, *arguments, primfunc_name_hint=function.__name__.strip("_"), primfunc_attrs={"op_pattern": _OPAQUE})


# --- weights ------------------------------------------------------------------------------------


def _product(weight: WeightSpec, x: te.Tensor, *arrays: te.Tensor) -> te.Tensor:
    element = _elements(weight, arrays)
    if weight.bits < 32:
        # A block of its own: the schedules look for a product of two arrays, and take the block in.
        element = te.compute((weight.rows, weight.columns), element, name="dequantised")
    k = te.reduce_axis((0, weight.columns), name="k")
    return te.compute((*x.shape[:-1], weight.rows), lambda *i: te.sum(x[(*i[:-1], k)] * element(i[-1], k), axis=k), name="product")


def _gather(weight: WeightSpec, rows: te.Tensor, *arrays: te.Tensor) -> te.Tensor:
    element, lead = _elements(weight, arrays), len(rows.shape)
    return te.compute((*rows.shape, weight.columns), lambda *i: element(rows[i[:lead]], i[lead]), name="gather")


def _elements(weight: WeightSpec, arrays: Sequence[te.Tensor]) -> Callable[[Any, Any], Any]:
    """The weight as float32, by row and column."""
    values, *scales = arrays
    first = weight.first_tile

    def element(n: Any, k: Any) -> Any:
        row = n + first if first else n
        if weight.bits == 32:
            return values[row, k, 0]
        if weight.bits == 16:
            return tirx.Cast("float32", values[row, k, 0])
        per_word = 32 // weight.bits
        value = _shifted(values[row, tirx.indexdiv(k, per_word), 0], weight.bits, tirx.Cast("int32", tirx.indexmod(k, per_word)))
        scale = scales[0][row, tirx.indexdiv(k, K_GROUP) if weight.groups > 1 else 0, 0]
        return tirx.Cast("float32", value) * tirx.Cast("float32", scale)

    return element


def _shifted(word: Any, bits: int, j: Any) -> Any:
    """Value j of a word, as `Layout.word` says, also where TVM makes the arithmetic 64 bits wide for the sake of an index."""
    if bits == 8:
        return (((word >> (8 * j)) & 255) ^ 128) - 128
    return ((word >> (8 * (j % 4) + 4 * (j // 4))) & 15) - 8


# --- attention ----------------------------------------------------------------------------------


def _group(heads: Any, kv_heads: Any) -> Callable[[Any], Any]:
    """The key/value head that a query head reads."""
    size = int(heads) // int(kv_heads)
    return lambda head: head if size == 1 else tirx.indexdiv(head, size)


def _scores(q: te.Tensor, k: te.Tensor) -> te.Tensor:
    """q (1, S, H, d), k (1, S, K, d) -> (H, S, S)."""
    _, S, H, d = q.shape
    kv, j = _group(H, k.shape[2]), te.reduce_axis((0, d), name="j")
    return te.compute((H, S, S), lambda h, s, t: te.sum(q[0, s, h, j] * k[0, t, kv(h), j], axis=j), name="product")


def _weighted(powers: te.Tensor, v: te.Tensor) -> te.Tensor:
    """powers (H, S, S), v (1, S, K, dv) -> (1, S, H, dv)."""
    H, S, _ = powers.shape
    kv, t = _group(H, v.shape[2]), te.reduce_axis((0, S), name="t")
    return te.compute((1, S, H, v.shape[3]), lambda _, s, h, c: te.sum(powers[h, s, t] * v[0, t, kv(h), c], axis=t), name="product")


def _cached_scores(q: te.Tensor, k: te.Tensor, k_new: te.Tensor) -> te.Tensor:
    """q (1, 1, H, d), k (1, C, K, d), k_new (1, 1, K, d) -> (H, C + 1)."""
    (H, d), C = q.shape[2:], k.shape[1]
    kv, j = _group(H, k.shape[2]), te.reduce_axis((0, d), name="j")

    def key(h: Any, t: Any) -> Any:
        return tirx.if_then_else(t < C, k[0, t, kv(h), j], k_new[0, 0, kv(h), j])

    return te.compute((H, C + 1), lambda h, t: te.sum(q[0, 0, h, j] * key(h, t), axis=j), name=ROW_SCORES)


def _weighted_rows(powers: te.Tensor, v: te.Tensor, v_new: te.Tensor) -> te.Tensor:
    """powers (H, C + 1), v (1, C, K, dv), v_new (1, 1, K, dv) -> (1, 1, H, dv)."""
    H, (C, K, dv) = powers.shape[0], v.shape[1:]
    kv, t = _group(H, K), te.reduce_axis((0, C + 1), name="t")

    def value(h: Any, c: Any) -> Any:
        return tirx.if_then_else(t < C, v[0, t, kv(h), c], v_new[0, 0, kv(h), c])

    return te.compute((1, 1, H, dv), lambda _, __, h, c: te.sum(powers[h, t] * value(h, c), axis=t), name=WEIGHTED_ROWS)


def _latent_scores(
    q: te.Tensor, q_rope: te.Tensor, latent: te.Tensor, k_rope: te.Tensor, latent_new: te.Tensor, k_rope_new: te.Tensor
) -> te.Tensor:
    """q (1, H, L), q_rope (1, H, R), rows of width L and R (1, C, width), new ones (1, 1, width) -> (H, C + 1)."""
    (H, L), C = q.shape[1:], latent.shape[1]
    j = te.reduce_axis((0, L + q_rope.shape[2]), name="j")

    def term(h: Any, t: Any) -> Any:
        plain = q[0, h, j] * tirx.if_then_else(t < C, latent[0, t, j], latent_new[0, 0, j])
        rotary = q_rope[0, h, j - L] * tirx.if_then_else(t < C, k_rope[0, t, j - L], k_rope_new[0, 0, j - L])
        return tirx.if_then_else(j < L, plain, rotary)

    return te.compute((H, C + 1), lambda h, t: te.sum(term(h, t), axis=j), name=ROW_SCORES)


def _weighted_latents(powers: te.Tensor, latent: te.Tensor, latent_new: te.Tensor) -> te.Tensor:
    """powers (H, C + 1), latent (1, C, L), latent_new (1, 1, L) -> (1, H, L)."""
    H, (C, L) = powers.shape[0], latent.shape[1:]
    t = te.reduce_axis((0, C + 1), name="t")

    def value(c: Any) -> Any:
        return tirx.if_then_else(t < C, latent[0, t, c], latent_new[0, 0, c])

    return te.compute((1, H, L), lambda _, h, c: te.sum(powers[h, t] * value(c), axis=t), name=WEIGHTED_ROWS)


def _causal_softmax(raw: te.Tensor, scale: float) -> te.Tensor:
    """(H, S, S) -> the same, row s over columns 0..s."""
    return _softmax(raw.shape, lambda h, s, t: tirx.if_then_else(t <= s, raw[h, s, t] * scale, _MASKED))


def _scaled_softmax(raw: te.Tensor, scale: float) -> te.Tensor:
    """(H, n) -> the same, over its rows."""
    return _softmax(raw.shape, lambda h, t: raw[h, t] * scale)


def _softmax(shape: Sequence[Any], score: Callable[..., Any]) -> te.Tensor:
    """Over the last axis of scores that are cheap to make again."""
    *lead, n = shape
    t = te.reduce_axis((0, n), name="t")
    most = te.compute(lead, lambda *i: te.max(score(*i, t), axis=t), name="most")
    u = te.reduce_axis((0, n), name="u")
    total = te.compute(lead, lambda *i: te.sum(te.exp(score(*i, u) - most(*i)), axis=u), name="total")
    return te.compute(shape, lambda *i: te.exp(score(*i) - most(*i[:-1])) / total(*i[:-1]), name="softmax")
