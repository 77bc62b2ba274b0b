"""Hints for the next tile of a weight: each of its lines is asked for once, and the product stays what it was."""

import re
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import build, call, prim_func
from tvm import te

from targets.cpu import Cpu, Tuning
from targets.schedules import product
from targets.schedules.prefetch import shares
from targets.schedules.rules import schedule_module
from targets.schedules.weights import WeightSpec, packed_product

CPU = Cpu(vector_bytes=64, registers=32, cores=2, tuned=Tuning(tile_vectors=2, tile_rows=8))


@pytest.fixture(autouse=True)
def every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFETCH_BYTES", 0)


def kernel(rows: int, n: int, k: int, first_tile: int = 0, all_tiles: int = 0) -> tuple[Any, WeightSpec]:
    weight = WeightSpec(rows=n, columns=k, tile=CPU.tile_columns, first_tile=first_tile, all_tiles=all_tiles)
    x = te.placeholder((1, rows, k), name="x")
    packed = te.placeholder(weight.shapes[0], name="packed")
    return prim_func([x, packed, packed_product(weight, x, packed)], "f"), weight


def scheduled(function: Any) -> str:
    return str(schedule_module(tvm.IRModule({"f": function}), CPU)["f"].script())


# Row tiles that ask for several lines a step, for one, and only the first of which ask; a last tile of fewer rows.
@pytest.mark.parametrize("rows", [16, 17, 32, 64, 100, 256])
def test_products_with_hints_are_those_without(rows: int) -> None:
    function, weight = kernel(rows, 128, 192)
    assert "llvm.prefetch" in scheduled(function)
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((1, rows, 192), dtype=np.float32)
    packed = generator.standard_normal(weight.shapes[0], dtype=np.float32)
    got = call(build({"f": function}, CPU), "f", x, packed, out=(1, rows, 128))
    expected = x.astype(np.float64) @ packed.astype(np.float64).transpose(1, 0, 2).reshape(192, 128)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 2e-6


@pytest.mark.parametrize(("rows", "n", "k"), [(8, 128, 192), (1, 128, 192), (16, 96, 64)])
def test_there_are_none_where_all_rows_are_one_tile_or_rows_are_shared_among_cores(rows: int, n: int, k: int) -> None:
    assert "llvm.prefetch" not in scheduled(kernel(rows, n, k)[0])


def test_small_weights_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFETCH_BYTES", 4 * 128 * 192 + 1)
    assert "llvm.prefetch" not in scheduled(kernel(16, 128, 192)[0])


def test_a_weight_among_others_is_asked_for_where_it_lies() -> None:
    text = scheduled(kernel(16, 128, 192, first_tile=5, all_tiles=20)[0])
    (tile,) = set(re.findall(r"address_of\(packed\[(.*?), \(", text))
    assert re.fullmatch(r"T\.min\(\w+ \+ 1, 3\) \+ 5", tile)


@given(lines=st.integers(1, 5000), rows=st.integers(2, 64), steps=st.integers(1, 500))
def test_every_line_is_asked_for_once_and_by_the_fewest_row_tiles(lines: int, rows: int, steps: int) -> None:
    each, needed = shares(lines, rows, steps)
    asked = [(row * steps + step) * each + i for row in range(min(needed, rows)) for step in range(steps) for i in range(each)]
    assert asked == list(range(len(asked)))
    assert len(asked) - steps * each < lines <= len(asked)
