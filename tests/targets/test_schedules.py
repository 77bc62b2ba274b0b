"""Kernels on their own: what they compute against NumPy and PyTorch, and what instructions they become."""

import dataclasses
import platform
import re
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from kernel_helpers import build, call, packed_kernel, prim_func
from numpy.typing import NDArray
from tvm import te, topi

from search_spaces.precision import Precision
from search_spaces.quantisation import bits, dequantise, quantise
from targets.cpu import Cpu, Dot, Tuning
from targets.layout import Layout, packed_shape
from targets.schedules import legalize
from targets.schedules.dot import PARALLEL_BYTES, can_dot, dot_product
from targets.schedules.rules import schedule_module
from targets.schedules.weights import WeightSpec, packed_gather, packed_product
from targets.tvm_import import _product
from targets.tvm_probe import detect

CPUS = [
    Cpu(vector_bytes=16, registers=16, cores=1),
    Cpu(vector_bytes=16, registers=32, cores=4),
    Cpu(vector_bytes=32, registers=16, cores=2),
    Cpu(vector_bytes=64, registers=32, cores=2),
]
ROWS = (1, 2, 7, 8, 9, 127)


def cpu_id(cpu: Cpu) -> str:
    return f"{8 * cpu.vector_bytes}bit-{cpu.registers}registers"


PRODUCTS = [
    pytest.param(cpu, rows, marks=() if (c + r) % 2 else pytest.mark.slow, id=f"{cpu_id(cpu)}-{rows}")
    for c, cpu in enumerate(CPUS)
    for r, rows in enumerate(ROWS)
]
"""Every processor with half of the numbers of rows, and every number of rows on half of the processors; the others are slow."""
# Outputs below, at, just above and far above every tile width; depths that do and do not split by 4 and by 2.
SHAPES = ((1, 1), (5, 3), (32, 64), (33, 7), (100, 65), (129, 18))


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- packed products ------------------------------------------------------------------------


@pytest.mark.parametrize(("cpu", "rows"), PRODUCTS)
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
    weight = WeightSpec(rows=n, columns=k, tile=cpu.tile_columns)
    out = topi.add(topi.nn.relu(topi.add(packed_product(weight, x, packed), bias)), residual)
    library = build({"f": prim_func([x, packed, bias, residual, out], "f")}, cpu)
    xs, matrix, b, r = random(1, rows, k), random(n, k, seed=1), random(n, seed=2), random(1, rows, n, seed=3)
    got = call(library, "f", xs, Layout(tile=cpu.tile_columns).apply(matrix), b, r, out=(1, rows, n))
    assert relative_error(got, np.maximum(xs @ matrix.T + b, 0) + r) < 2e-6


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
def test_every_tuning_that_may_be_tried_fits_the_registers(cpu: Cpu) -> None:
    assert cpu.default_tuning in cpu.variants()
    for tuning in cpu.variants():
        assert tuning.tile_rows * tuning.tile_vectors + tuning.tile_vectors + 1 <= cpu.registers
        assert tuning in cpu.row_variants(tuning)


@pytest.mark.parametrize("tuning", CPUS[-1].variants()[::3] + CPUS[-1].row_variants(CPUS[-1].default_tuning)[1:], ids=str)
def test_every_tuning_gives_numpys_product(tuning: Tuning) -> None:
    cpu = dataclasses.replace(CPUS[-1], tuned=tuning)
    library = build({f"f{rows}x{n}": packed_kernel(rows, n, 24, cpu, f"f{rows}x{n}") for rows in (1, 13) for n in (100, 256)}, cpu)
    for rows in (1, 13):
        for n in (100, 256):
            x, weight = random(1, rows, 24, seed=1), random(n, 24, seed=2)
            got = call(library, f"f{rows}x{n}", x, Layout(tile=cpu.tile_columns).apply(weight), out=(1, rows, n))
            assert relative_error(got, x.astype(np.float64) @ weight.T.astype(np.float64)) < 2e-6


@pytest.mark.parametrize("cpu", CPUS, ids=cpu_id)
def test_a_register_tile_fits_the_registers(cpu: Cpu) -> None:
    vectors = cpu.tile_columns // cpu.lanes
    assert cpu.tile_columns % cpu.lanes == 0
    assert 1 <= cpu.tile_rows <= 8
    assert cpu.tile_rows * vectors + vectors + 1 <= cpu.registers


# --- weights in fewer bits ----------------------------------------------------------------------


def quantised(n: int, k: int, precision: Precision, cpu: Cpu) -> tuple[WeightSpec, list[NDArray[Any]], NDArray[np.float32]]:
    """A weight: what it is, its packed arrays, and its values as float32."""
    values, scales = quantise(torch.from_numpy(random(n, k, seed=n + k)), precision)
    groups = 0 if scales is None else scales.shape[1]
    spec = WeightSpec(rows=n, columns=k, tile=cpu.tile_columns, bits=bits(precision), groups=groups)
    parts = [values] if scales is None else [values, scales]
    arrays = [layout.apply(part.numpy()) for layout, part in zip(spec.layouts(), parts, strict=True)]
    assert tuple(array.shape for array in arrays) == spec.shapes
    return spec, arrays, dequantise(values, scales, bits(precision)).numpy()


def placeholders(spec: WeightSpec) -> list[te.Tensor]:
    return [te.placeholder(shape, dtype=layout.dtype, name="w") for shape, layout in zip(spec.shapes, spec.layouts(), strict=True)]


@pytest.mark.parametrize("cpu", [CPUS[1], CPUS[3]], ids=cpu_id)
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_products_and_lookups_of_fewer_bits_are_those_of_the_dequantised_weight(precision: Precision, cpu: Cpu) -> None:
    functions, runs = {}, []
    for n, k in ((33, 7), (64, 64), (100, 70)):
        spec, arrays, weight = quantised(n, k, precision, cpu)
        for rows in (1, 9):
            x, packed = te.placeholder((1, rows, k), name="x"), placeholders(spec)
            name = f"f{n}x{k}x{rows}"
            functions[name] = prim_func([x, *packed, packed_product(spec, x, *packed)], name)
            xs = random(1, rows, k, seed=3)
            runs.append((name, [xs, *arrays], xs.astype(np.float64) @ weight.T.astype(np.float64)))
        ids, packed, name = te.placeholder((1, 5), dtype="int64", name="ids"), placeholders(spec), f"g{n}x{k}"
        functions[name] = prim_func([ids, *packed, packed_gather(spec, ids, *packed)], name)
        rows_taken = np.array([[0, n - 1, n // 2, 1, 0]])
        runs.append((name, [rows_taken, *arrays], weight[rows_taken].astype(np.float64)))
    library = build(functions, cpu)
    for name, arguments, expected in runs:
        assert relative_error(call(library, name, *arguments, out=expected.shape), expected) < 2e-6, name


@pytest.mark.parametrize("dot", ["vnni", "madd", "sdot"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_byte_dot_products_are_as_near_as_float_ones(precision: Precision, dot: Dot) -> None:
    """Also for rows of very different magnitudes, of zeros, and of a depth that is no whole number of groups."""
    found = detect()
    if dot not in {found["dot"], "madd" if found["dot"] == "vnni" else ""}:
        pytest.skip(f"this processor has no {dot}")
    cpu = Cpu(vector_bytes=found["vector_bytes"], registers=32, cores=2, dot=dot)
    functions, runs = {}, []
    for n, k in ((33, 7), (64, 64), (100, 70), (32, 576)):
        spec, arrays, weight = quantised(n, k, precision, cpu)
        assert can_dot(spec, cpu, (1, 1, k))
        functions[f"f{n}x{k}"] = dot_product(spec, cpu).with_attr("global_symbol", f"f{n}x{k}")
        for scale in (1.0, 1e-6, 1e6, 0.0):
            xs = scale * random(1, 1, k, seed=4) * np.exp(2 * random(1, 1, k, seed=5))
            runs.append((f"f{n}x{k}", [xs.astype(np.float32), *arrays], xs.astype(np.float64) @ weight.T.astype(np.float64), n, spec))
    library = build(functions, cpu)
    for name, arguments, expected, n, spec in runs:
        got = call(library, name, *arguments, out=(1, 1, spec.tiles * spec.tile))
        assert not got[..., n:].any()
        if expected.any():
            assert relative_error(got[..., :n], expected) < 2e-6, name
        else:
            assert not got.any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_byte_dot_products_are_shared_among_cores_by_the_bytes_of_their_weight(precision: Precision) -> None:
    cpu = Cpu(vector_bytes=64, registers=32, cores=2, dot="vnni")
    tile, columns = cpu.tile_columns, 1024
    least = -(-8 * PARALLEL_BYTES // (bits(precision) * columns * tile)) * tile
    for rows, shared in ((least, True), (least - tile, False)):
        spec, *_ = quantised(rows, columns, precision, cpu)
        module = schedule_module(tvm.IRModule({"main": dot_product(spec, cpu)}), cpu)
        assert ("T.parallel" in module["main"].script()) is shared, rows


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
