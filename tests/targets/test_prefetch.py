"""Hints for the next tile of a weight: each of its lines is asked for once, and the product stays what it was."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import build, call, packed_kernel

from targets.cpu import Cpu, Tuning
from targets.layout import packed_shape
from targets.schedules import product
from targets.schedules.prefetch import shares
from targets.schedules.rules import schedule_module

CPU = Cpu(vector_bytes=64, registers=32, cores=2, tuned=Tuning(tile_vectors=2, tile_rows=8))


@pytest.fixture(autouse=True)
def every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFETCH_BYTES", 0)


def scheduled(function: Any, cpu: Cpu = CPU) -> str:
    return str(schedule_module(tvm.IRModule({"f": function}), cpu)["f"].script())


def product_error(function: Any, rows: int, n: int, k: int, cpu: Cpu) -> float:
    """The largest error of a product of random numbers, compiled, relative to its largest value."""
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((1, rows, k), dtype=np.float32)
    packed = generator.standard_normal(packed_shape(n, k, cpu.tile_columns), dtype=np.float32)
    got = call(build({"f": function}, cpu), "f", x, packed, out=(1, rows, n))
    expected = x.astype(np.float64) @ packed.astype(np.float64).transpose(1, 0, 2).reshape(k, n)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# Row tiles that ask for several lines a step, for one, and only the first of which ask; a last tile of fewer rows.
@pytest.mark.parametrize("rows", [16, 17, 32, 64, 100, 256])
def test_products_with_hints_are_those_without(rows: int) -> None:
    function = packed_kernel(rows, 128, 192, CPU, "f")
    assert "llvm.prefetch" in scheduled(function)
    assert product_error(function, rows, 128, 192, CPU) < 2e-6


# One row of two and of three tiles at once, and of a number of tiles that no core shares evenly; a whole tile of rows, and a part of one.
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 128, 192), (1, 192, 64), (1, 224, 50), (8, 128, 192), (5, 96, 64)])
def test_products_of_one_tile_of_rows_are_what_they_were(rows: int, n: int, k: int) -> None:
    cpu = dataclasses.replace(CPU, tuned=Tuning(tile_vectors=2, tile_rows=8, row_ahead_bytes=512))
    assert product_error(packed_kernel(rows, n, k, cpu, "f"), rows, n, k, cpu) < 2e-6


@pytest.mark.parametrize(("rows", "at_once"), [(1, 2), (8, 1)])
def test_one_tile_of_rows_asks_once_for_each_line_that_lies_ahead(rows: int, at_once: int) -> None:
    """In a loop over steps of k: for each of its columns' lines, and so many rows of the weight further on as were tuned."""
    cpu = dataclasses.replace(CPU, tuned=Tuning(tile_vectors=2, tile_rows=8, row_ahead_bytes=512, row_tiles=2, unroll=2, row_unroll=2))
    text = scheduled(packed_kernel(rows, 128, 192, cpu, "f"), cpu)
    hints = re.findall(r"address_of\(packed\[(\w+[^,]*), \w+ \* 2((?: \+ \d+)+), (\d+)\]", text)
    ahead = 512 // (4 * cpu.tile_columns)
    assert [(sum(map(int, row.split(" + ")[1:])), int(column)) for _, row, column in hints] == [
        (ahead + k, column) for k in range(2) for _ in range(at_once) for column in range(0, cpu.tile_columns, 16)
    ]
    assert len({tile for tile, *_ in hints}) == at_once


@pytest.mark.parametrize("rows", [1, 8])
def test_a_tuning_of_no_bytes_ahead_asks_for_none(rows: int) -> None:
    cpu = dataclasses.replace(CPU, tuned=Tuning(tile_vectors=2, tile_rows=8, row_ahead_bytes=0))
    assert "llvm.prefetch" not in scheduled(packed_kernel(rows, 128, 192, cpu, "f"), cpu)


def test_there_are_none_where_rows_are_shared_among_cores() -> None:
    assert "llvm.prefetch" not in scheduled(packed_kernel(16, 96, 64, CPU, "f"))


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_small_weights_have_none(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFETCH_BYTES", 4 * 128 * 192 + 1)
    assert "llvm.prefetch" not in scheduled(packed_kernel(rows, 128, 192, CPU, "f"))


def test_a_weight_among_others_is_asked_for_where_it_lies() -> None:
    text = scheduled(packed_kernel(16, 128, 192, CPU, "f", first_tile=5, all_tiles=20))
    (tile,) = set(re.findall(r"address_of\(packed\[(.*?), \(", text))
    assert re.fullmatch(r"T\.min\(\w+ \+ 1, 3\) \+ 5", tile)


@given(lines=st.integers(1, 5000), rows=st.integers(2, 64), steps=st.integers(1, 500))
def test_every_line_is_asked_for_once_and_by_the_fewest_row_tiles(lines: int, rows: int, steps: int) -> None:
    each, needed = shares(lines, rows, steps)
    asked = [(row * steps + step) * each + i for row in range(min(needed, rows)) for step in range(steps) for i in range(each)]
    assert asked == list(range(len(asked)))
    assert len(asked) - steps * each < lines <= len(asked)
