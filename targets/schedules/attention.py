"""Causal attention of a prompt, written as loops: the masked half is never computed."""

import math
from typing import Any

from tvm.script import tirx as T


def causal_attention(tokens: int, heads: int, kv_heads: int, width: int, value_width: int) -> Any:
    """Softmax(q k^T / sqrt(width)) v with row s attending to rows 0..s.

    q (1, tokens, heads, width), k (1, tokens, kv_heads, width), v (1, tokens, kv_heads, value_width)
    -> (1, tokens, heads, value_width), float32. Rows and heads run in parallel.
    """
    S, H, K, D, V = tokens, heads, kv_heads, width, value_width
    group = H // K
    scale = 1.0 / math.sqrt(D)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q: T.Buffer((1, S, H, D), "float32"),
        k: T.Buffer((1, S, K, D), "float32"),
        v: T.Buffer((1, S, K, V), "float32"),
        out: T.Buffer((1, S, H, V), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "edgewise.scheduled": True, "op_pattern": 8})
        for row in T.parallel(S * H):
            p = T.alloc_buffer((S,), "float32", scope="local")
            acc = T.alloc_buffer((V,), "float32", scope="local")
            most = T.alloc_buffer((1,), "float32", scope="local")
            total = T.alloc_buffer((1,), "float32", scope="local")
            dot = T.alloc_buffer((1,), "float32", scope="local")
            most[0] = T.float32(-3.0e38)
            for t in range(row // H + 1):
                dot[0] = T.float32(0)
                for j in range(D):
                    dot[0] = dot[0] + q[0, row // H, row % H, j] * k[0, t, row % H // group, j]
                p[t] = dot[0] * T.float32(scale)
                most[0] = T.max(most[0], p[t])
            total[0] = T.float32(0)
            for t in range(row // H + 1):
                p[t] = T.exp(p[t] - most[0])
                total[0] = total[0] + p[t]
            for j in range(V):
                acc[j] = T.float32(0)
            for t in range(row // H + 1):
                for j in range(V):
                    acc[j] = acc[j] + p[t] * v[0, t, row % H // group, j]
            for j in range(V):
                out[0, row // H, row % H, j] = acc[j] / total[0]

    return kernel
