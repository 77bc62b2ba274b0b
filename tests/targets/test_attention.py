"""Attention kernels against NumPy in float64, for processors of several kinds, and the instructions they become."""

import math
import platform
import random
import re
from typing import Any

import numpy as np
import pytest
import tvm
from kernel_helpers import build, call
from numpy.typing import NDArray

from targets.cpu import Cpu
from targets.schedules import attention, decode_attention
from targets.schedules.attention import causal_attention
from targets.schedules.decode_attention import cached_attention, latent_attention
from targets.tvm_probe import detect

SSE = Cpu(vector_bytes=16, registers=16, cores=1)
NEON = Cpu(vector_bytes=16, registers=32, cores=4)
AVX2 = Cpu(vector_bytes=32, registers=16, cores=2)
AVX512 = Cpu(vector_bytes=64, registers=32, cores=2)
CPUS = {"sse": SSE, "neon": NEON, "avx2": AVX2, "avx512": AVX512}
TOLERANCE = 2e-6
CHUNK = decode_attention.CHUNK


def cpus(slow: str) -> list[Any]:
    """Every processor; one of them is tried before a release only."""
    return [pytest.param(cpu, id=name, marks=pytest.mark.slow if name == slow else ()) for name, cpu in CPUS.items()]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def repeated(x: NDArray[np.float32], heads: int) -> NDArray[np.float64]:
    """(1, rows, kv heads, width) -> (rows, heads, width)."""
    return np.repeat(x[0].astype(np.float64), heads // x.shape[2], axis=1)


# --- prefill ----------------------------------------------------------------------------------

# tokens, heads, key/value heads, width, value width. Around a tile of rows (16 or 32), around a tile of keys, odd everything.
PREFILL = [
    (1, 1, 1, 1, 1),
    (3, 6, 2, 7, 5),
    (32, 3, 3, 16, 16),
    (attention.KEYS, 2, 2, 8, 24),
    (attention.KEYS + 1, 4, 2, 20, 33),
    (150, 3, 1, 32, 16),
]


def expected_prefill(q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float64]:
    tokens, heads, width = q.shape[1:]
    scores = np.einsum("shd,thd->hst", q[0].astype(np.float64), repeated(k, heads)) / math.sqrt(width)
    scores[..., ~np.tril(np.ones((tokens, tokens), bool))] = -np.inf
    return np.einsum("hst,thd->shd", softmax(scores), repeated(v, heads))[None]


def check_prefill(cpu: Cpu, shapes: list[tuple[int, int, int, int, int]]) -> None:
    name = "f{}_{}_{}_{}_{}".format
    library = build({name(*s): causal_attention(*s, cpu).with_attr("global_symbol", name(*s)) for s in shapes}, cpu)
    for shape in shapes:
        tokens, heads, kv_heads, width, value_width = shape
        q, k, v = (
            3 * normal(1, tokens, heads, width),
            normal(1, tokens, kv_heads, width, seed=1),
            normal(1, tokens, kv_heads, value_width, seed=2),
        )
        got = call(library, name(*shape), q, k, v, out=(1, tokens, heads, value_width))
        assert error(got, expected_prefill(q, k, v)) < TOLERANCE, shape


@pytest.mark.parametrize("cpu", cpus("avx2"))  # random shapes are tried on it below
def test_causal_attention_is_numpys(cpu: Cpu) -> None:
    check_prefill(cpu, PREFILL)


def test_causal_attention_is_numpys_for_random_shapes() -> None:
    rng = random.Random(0)
    shapes = []
    for _ in range(6):
        kv_heads = rng.randint(1, 4)
        shapes.append((rng.randint(1, 100), kv_heads * rng.randint(1, 5), kv_heads, rng.randint(1, 40), rng.randint(1, 40)))
    check_prefill(AVX2, shapes)


def test_causal_attention_survives_scores_that_would_overflow() -> None:
    library = build({"f": causal_attention(70, 1, 1, 4, 4, AVX512).with_attr("global_symbol", "f")}, AVX512)
    q = np.full((1, 70, 1, 4), 100.0, np.float32)
    v = normal(1, 70, 1, 4)
    got = call(library, "f", q, q, v, out=(1, 70, 1, 4))  # every score is 20,000, so rows are running means
    assert error(got[0, :, 0], np.cumsum(v[0, :, 0].astype(np.float64), axis=0) / np.arange(1, 71)[:, None]) < TOLERANCE
    library["f"](*(tvm.runtime.tensor(x) for x in (q, -q, v)), out := tvm.runtime.empty((1, 70, 1, 4), "float32"))
    assert error(out.numpy(), got) < TOLERANCE  # nor do scores of -20,000 vanish


def test_a_later_token_never_reaches_an_earlier_row() -> None:
    shape = (70, 4, 2, 16, 16)
    library = build({"f": causal_attention(*shape, AVX512).with_attr("global_symbol", "f")}, AVX512)
    q, k, v = normal(1, 70, 4, 16), normal(1, 70, 2, 16, seed=1), normal(1, 70, 2, 16, seed=2)
    one = call(library, "f", q, k, v, out=q.shape)
    for cut in (1, 15, 37, 64, 69):
        k[:, cut], v[:, cut] = 50.0, 1e6
        other = call(library, "f", q, k, v, out=q.shape)
        np.testing.assert_array_equal(one[:, :cut], other[:, :cut])
        assert np.abs(one[:, cut:] - other[:, cut:]).max() > 1
        one = other


# --- decode -----------------------------------------------------------------------------------

CONTEXTS = (0, 1, 2, 7, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def check_cached(library: Any, name: str, shape: tuple[int, int, int, int], contexts: tuple[int, ...], spread: float = 3.0) -> None:
    heads, kv_heads, width, value_width = shape
    for C in contexts:
        q = spread * normal(1, 1, heads, width)
        k, v = normal(1, C + 1, kv_heads, width, seed=1), normal(1, C + 1, kv_heads, value_width, seed=2)
        got = call(library, name, q, k[:, :C], v[:, :C], k[:, C:], v[:, C:], out=(1, 1, heads, value_width))
        scores = np.einsum("hd,thd->ht", q[0, 0].astype(np.float64), repeated(k, heads)) / math.sqrt(width)
        expected = np.einsum("ht,thd->hd", softmax(scores), repeated(v, heads))
        assert error(got[0, 0], expected) < TOLERANCE, (shape, C)


@pytest.mark.parametrize("cpu", cpus("sse"))
def test_cached_attention_is_numpys(cpu: Cpu) -> None:
    shapes = [(1, 1, 1, 1), (6, 2, 7, 5), (8, 8, 16, 16), (14, 2, 24, 40)]
    name = "f{}_{}_{}_{}".format
    functions = {name(*s): cached_attention(*s, 1 / math.sqrt(s[2]), cpu).with_attr("global_symbol", name(*s)) for s in shapes}
    library = build(functions, cpu)
    for shape in shapes:
        check_cached(library, name(*shape), shape, CONTEXTS)


def test_cached_attention_in_more_parts_than_rows() -> None:
    """Wide enough that every row is worth a part: with few rows some parts stay empty."""
    cpu, shape = Cpu(vector_bytes=64, registers=32, cores=7), (64, 64, 64, 64)
    library = build({"f": cached_attention(*shape, 1 / 8, cpu).with_attr("global_symbol", "f")}, cpu)
    check_cached(library, "f", shape, (0, 1, 3, 6, 7, 8, 20, 50))


def test_cached_attention_finds_one_large_score_anywhere() -> None:
    """The largest score decides alone, be it in the new row, in any part or at a chunk's edge."""
    cpu, shape, C = AVX512, (2, 1, 16, 16), 1000
    library = build({"f": cached_attention(*shape, 1.0, cpu).with_attr("global_symbol", "f")}, cpu)
    q = np.zeros((1, 1, 2, 16), np.float32)
    q[..., 0] = 40.0
    for where in (0, 15, CHUNK - 1, CHUNK, 499, 500, 501, C - 1, C):
        k, v = np.zeros((1, C + 1, 1, 16), np.float32), normal(1, C + 1, 1, 16)
        k[..., 0] = -10.0
        k[0, where, 0, 0] = 10.0
        got = call(library, "f", q, k[:, :C], v[:, :C], k[:, C:], v[:, C:], out=(1, 1, 2, 16))
        np.testing.assert_allclose(got[0, 0], np.repeat(v[0, where], 2, axis=0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("cpu", cpus("sse"))
def test_latent_attention_is_numpys(cpu: Cpu) -> None:
    shapes = [(5, 9, 4), (12, 80, 24)]
    name = "f{}_{}_{}".format
    functions = {name(*s): latent_attention(*s, 0.2, cpu).with_attr("global_symbol", name(*s)) for s in shapes}
    library = build(functions, cpu)
    for heads, rank, rotary in shapes:
        for C in CONTEXTS:
            q, q_rope = normal(1, heads, rank), normal(1, heads, rotary, seed=1)
            c, k_rope = normal(1, C + 1, rank, seed=2), normal(1, C + 1, rotary, seed=3)
            arrays = (q, q_rope, c[:, :C], k_rope[:, :C], c[:, C:], k_rope[:, C:])
            got = call(library, name(heads, rank, rotary), *arrays, out=(1, heads, rank))
            c64 = c[0].astype(np.float64)
            scores = (q[0].astype(np.float64) @ c64.T + q_rope[0].astype(np.float64) @ k_rope[0].astype(np.float64).T) * 0.2
            assert error(got[0], softmax(scores) @ c64) < TOLERANCE, (heads, rank, rotary, C)


# --- instructions -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "cached", "latent"])
def test_attention_is_made_of_full_width_fused_multiply_adds(kind: str) -> None:
    """No loop falls back to scalars or half registers, and no exponential is a call."""
    vector_bytes = detect()["vector_bytes"]
    patterns = {
        ("x86_64", 64): r"vfn?m(?:add|sub)\w+ps\s.*%zmm",
        ("x86_64", 32): r"vfn?m(?:add|sub)\w+ps\s.*%ymm",
        ("aarch64", 16): r"fml[as]\s+v\d+\.4s",
    }
    machine = platform.machine()
    if (machine, vector_bytes) not in patterns:
        pytest.skip(f"no multiply-add instruction is known here for {machine} with {vector_bytes}-byte vectors")
    cpu = Cpu(vector_bytes=vector_bytes, registers=16 if vector_bytes == 32 else 32, cores=2)
    kernel = {
        "causal": lambda: causal_attention(128, 4, 2, 64, 64, cpu),
        "cached": lambda: cached_attention(8, 2, 64, 64, 0.125, cpu),
        "latent": lambda: latent_attention(8, 128, 32, 0.1, cpu),
    }[kind]()
    assembly = build({"f": kernel.with_attr("global_symbol", "f")}, cpu).mod.inspect_source("asm")
    full = re.findall(patterns[machine, vector_bytes], assembly)
    every = re.findall(r"(?:vfn?m(?:add|sub)\w+[ps][sd]|fml[as]|fn?m(?:add|sub))\s", assembly)
    # Scalars remain where one number a head is needed: the factor by which earlier sums shrink.
    assert len(full) >= 16
    assert len(full) >= 0.6 * len(every)
    assert not re.search(r"\bexpf?\b|exp2f", assembly)
