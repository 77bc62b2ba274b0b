"""Kernels on their own: what they compute against NumPy and PyTorch, and what instructions they become."""

import platform
import re
from typing import Any

import numpy as np
import pytest
import torch
from kernel_helpers import build, call, prim_func
from numpy.typing import NDArray
from tvm import te, topi

from targets.cpu import Cpu
from targets.layout import Layout, packed_shape
from targets.schedules import legalize
from targets.schedules.attention import causal_attention
from targets.tvm_import import _packed_product, _product
from targets.tvm_probe import detect

CPUS = [
    Cpu(vector_bytes=16, registers=16, cores=1),
    Cpu(vector_bytes=16, registers=32, cores=4),
    Cpu(vector_bytes=32, registers=16, cores=2),
    Cpu(vector_bytes=64, registers=32, cores=2),
]
ROWS = (1, 2, 7, 8, 9, 127)
# Outputs below, at, just above and far above every tile width; depths that do and do not split by 4 and by 2.
SHAPES = ((1, 1), (5, 3), (32, 64), (33, 7), (100, 65), (129, 18))


def cpu_id(cpu: Cpu) -> str:
    return f"{8 * cpu.vector_bytes}bit-{cpu.registers}registers"


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def packed_kernel(rows: int, n: int, k: int, cpu: Cpu, name: str, lead: tuple[int, ...] = (1,)) -> Any:
    x = te.placeholder((*lead, rows, k), name="x")
    packed = te.placeholder(packed_shape(n, k, cpu.tile_columns), name="packed")
    return prim_func([x, packed, _packed_product(x, packed, n)], name)


# --- packed products ------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", CPUS, ids=cpu_id)
@pytest.mark.parametrize("rows", ROWS)
def test_packed_product_is_numpys_for_every_shape(cpu: Cpu, rows: int) -> None:
    library = build({f"f{n}x{k}": packed_kernel(rows, n, k, cpu, f"f{n}x{k}") for n, k in SHAPES}, cpu)
    for n, k in SHAPES:
        x, weight = random(1, rows, k, seed=1), random(n, k, seed=2)
        got = call(library, f"f{n}x{k}", x, Layout(tile=cpu.tile_columns).apply(weight), out=(1, rows, n))
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
        assert relative_error(got, expected) < 2e-6, (rows, n, k)


@pytest.mark.parametrize("n", [64, 70])
def test_packed_product_takes_its_epilogue_along(n: int) -> None:
    """A bias, an activation and a residual after the product are computed in the same kernel."""
    cpu, rows, k = CPUS[-1], 9, 40
    x = te.placeholder((1, rows, k), name="x")
    packed = te.placeholder(packed_shape(n, k, cpu.tile_columns), name="packed")
    bias, residual = te.placeholder((n,), name="bias"), te.placeholder((1, rows, n), name="residual")
    out = topi.add(topi.nn.relu(topi.add(_packed_product(x, packed, n), bias)), residual)
    library = build({"f": prim_func([x, packed, bias, residual, out], "f")}, cpu)
    xs, weight, b, r = random(1, rows, k), random(n, k, seed=1), random(n, seed=2), random(1, rows, n, seed=3)
    got = call(library, "f", xs, Layout(tile=cpu.tile_columns).apply(weight), b, r, out=(1, rows, n))
    assert relative_error(got, np.maximum(xs @ weight.T + b, 0) + r) < 2e-6


def test_packed_product_is_made_of_full_width_fused_multiply_adds() -> None:
    """The inner loop of a large product must not fall back to scalars or half registers."""
    vector_bytes = detect()["vector_bytes"]
    machine = platform.machine()
    patterns = {
        ("x86_64", 64): r"vfmadd\w+ps\s.*%zmm",
        ("x86_64", 32): r"vfmadd\w+ps\s.*%ymm",
        ("aarch64", 16): r"fmla\s+v\d+\.4s",
    }
    if (machine, vector_bytes) not in patterns:
        pytest.skip(f"no multiply-add instruction is known here for {machine} with {vector_bytes}-byte vectors")
    cpu = Cpu(vector_bytes=vector_bytes, registers=16 if vector_bytes == 32 else 32, cores=2)
    library = build({"f": packed_kernel(64, 256, 256, cpu, "f")}, cpu)
    assembly = library.mod.inspect_source("asm")
    full = re.findall(patterns[machine, vector_bytes], assembly)
    every = re.findall(r"(?:vfmadd\w+s[sd]|vfmadd\w+p[sd]|fmla|fmadd)\s", assembly)
    # A register tile of r rows and v vectors, k unrolled by 4, is 4 r v of them.
    tile_vectors = cpu.tile_columns // cpu.lanes
    assert len(full) >= 4 * cpu.tile_rows * tile_vectors
    assert len(full) >= 0.9 * len(every)


@pytest.mark.parametrize("cpu", CPUS, ids=cpu_id)
def test_a_register_tile_fits_the_registers(cpu: Cpu) -> None:
    vectors = cpu.tile_columns // cpu.lanes
    assert cpu.tile_columns % cpu.lanes == 0
    assert 1 <= cpu.tile_rows <= 8
    assert cpu.tile_rows * vectors + vectors + 1 <= cpu.registers


# --- products of activations -----------------------------------------------------------------


@pytest.mark.parametrize("cpu", CPUS[1:], ids=cpu_id)
def test_product_reads_its_second_operand_through_a_view(cpu: Cpu) -> None:
    """Scores read keys along their width, values are read along their rows: neither is copied or transposed."""
    cases = {
        "scores": ((1, 3, 4, 8), (1, 11, 3, 8), (0, 2, 3, 1)),
        "scores_odd": ((1, 2, 1, 7), (1, 5, 2, 7), (0, 2, 3, 1)),
        "values": ((1, 3, 4, 11), (1, 11, 3, 16), (0, 2, 1, 3)),
        "values_odd": ((1, 2, 3, 5), (1, 5, 2, 7), (0, 2, 1, 3)),
        "plain": ((2, 3, 6), (2, 6, 10), (0, 1, 2)),
        "broadcast": ((1, 4, 1, 6), (4, 6, 5), (0, 1, 2)),
    }
    functions = {}
    for name, (a_shape, b_shape, order) in cases.items():
        a, b = te.placeholder(a_shape, name="a"), te.placeholder(b_shape, name="b")
        functions[name] = prim_func([a, b, _product(a, b, order)], name)
    library = build(functions, cpu)
    for name, (a_shape, b_shape, order) in cases.items():
        a, b = random(*a_shape, seed=3), random(*b_shape, seed=4)
        expected = a @ b.transpose(order)
        assert relative_error(call(library, name, a, b, out=expected.shape), expected) < 2e-6, name


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "value_width"),
    [(1, 2, 2, 8, 8), (2, 4, 1, 16, 16), (9, 6, 2, 7, 7), (33, 4, 4, 12, 5), (40, 8, 2, 32, 64), (3, 1, 1, 1, 1)],
)
def test_causal_attention_is_numpys(tokens: int, heads: int, kv_heads: int, width: int, value_width: int) -> None:
    kernel = causal_attention(tokens, heads, kv_heads, width, value_width).with_attr("global_symbol", "f")
    library = build({"f": kernel}, CPUS[-1])
    q = 3 * random(1, tokens, heads, width)
    k, v = random(1, tokens, kv_heads, width, seed=1), random(1, tokens, kv_heads, value_width, seed=2)
    got = call(library, "f", q, k, v, out=(1, tokens, heads, value_width))
    kk, vv = (np.repeat(a.astype(np.float64), heads // kv_heads, axis=2) for a in (k, v))
    scores = np.einsum("bshd,bthd->bhst", q.astype(np.float64), kk) / np.sqrt(width)
    scores[..., ~np.tril(np.ones((tokens, tokens), bool))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhst,bthd->bshd", p / p.sum(-1, keepdims=True), vv)
    assert relative_error(got, expected) < 2e-6


def test_causal_attention_survives_scores_that_would_overflow() -> None:
    library = build({"f": causal_attention(4, 1, 1, 4, 4).with_attr("global_symbol", "f")}, CPUS[-1])
    q = np.full((1, 4, 1, 4), 100.0, np.float32)
    v = random(1, 4, 1, 4)
    got = call(library, "f", q, q, v, out=(1, 4, 1, 4))  # every score is 20,000, so rows are running means
    expected = np.cumsum(v[0, :, 0], axis=0) / np.arange(1, 5)[:, None]
    assert relative_error(got[0, :, 0], expected) < 2e-6


# --- activations ------------------------------------------------------------------------------


def unary(function: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    placeholder = te.placeholder(x.shape, name="x")
    library = build({"f": prim_func([placeholder, function(placeholder)], "f")}, CPUS[-1])
    return call(library, "f", x, out=x.shape)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (legalize.silu, torch.nn.functional.silu),
        (legalize.gelu, torch.nn.functional.gelu),
        (legalize.gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
    ids=["silu", "gelu", "gelu_tanh"],
)
@pytest.mark.parametrize("limit", [20.0, 2.0])
def test_activation_is_pytorchs_within_two_millionths_of_its_largest_value(ours: Any, torchs: Any, limit: float) -> None:
    x = np.linspace(-limit, limit, 1 << 14, dtype=np.float32).reshape(1, 64, 256)
    expected = torchs(torch.from_numpy(x).double()).numpy()
    assert relative_error(unary(ours, x), expected) < 2e-6


@pytest.mark.parametrize("ours", [legalize.silu, legalize.gelu, legalize.gelu_tanh], ids=["silu", "gelu", "gelu_tanh"])
def test_activation_of_a_huge_value_is_the_value_or_zero(ours: Any) -> None:
    x = np.array([[-1e4, -200.0, 0.0, 200.0, 1e4]], np.float32)
    np.testing.assert_allclose(unary(ours, x), np.maximum(x, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [3, 64, 101])
def test_softmax_is_pytorchs(width: int) -> None:
    x = np.random.default_rng(0).uniform(-20, 20, (1, 5, width)).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(x).double(), -1).numpy()
    got = unary(lambda t: topi.nn.fast_softmax(t, 2), x)
    assert relative_error(got, expected) < 2e-6
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-6)


def test_softmax_of_scores_far_apart_is_one_and_zeros() -> None:
    x = np.array([[[1000.0, 0.0, 900.0, 911.62, 911.6, 912.3, -1e5]]], np.float32)
    got = unary(lambda t: topi.nn.fast_softmax(t, 2), x)
    np.testing.assert_allclose(got, [[[1, 0, 0, 0, 0, 0, 0]]], atol=1e-7)
