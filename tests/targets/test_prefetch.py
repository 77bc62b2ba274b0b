"""Hints for the next tile of a weight: each of its lines is asked for once, and the product stays what it was."""

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


def scheduled(function: Any) -> str:
    return str(schedule_module(tvm.IRModule({"f": function}), CPU)["f"].script())


# Row tiles that ask for several lines a step, for one, and only the first of which ask; a last tile of fewer rows.
@pytest.mark.parametrize("rows", [16, 17, 32, 64, 100, 256])
def test_products_with_hints_are_those_without(rows: int) -> None:
    function = packed_kernel(rows, 128, 192, CPU, "f")
    assert "llvm.prefetch" in scheduled(function)
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((1, rows, 192), dtype=np.float32)
    packed = generator.standard_normal(packed_shape(128, 192, CPU.tile_columns), dtype=np.float32)
    got = call(build({"f": function}, CPU), "f", x, packed, out=(1, rows, 128))
    expected = x.astype(np.float64) @ packed.astype(np.float64).transpose(1, 0, 2).reshape(192, 128)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 2e-6


@pytest.mark.parametrize(("rows", "n", "k"), [(8, 128, 192), (1, 128, 192), (16, 96, 64)])
def test_there_are_none_where_all_rows_are_one_tile_or_rows_are_shared_among_cores(rows: int, n: int, k: int) -> None:
    assert "llvm.prefetch" not in scheduled(packed_kernel(rows, n, k, CPU, "f"))


def test_small_weights_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFETCH_BYTES", 4 * 128 * 192 + 1)
    assert "llvm.prefetch" not in scheduled(packed_kernel(16, 128, 192, CPU, "f"))


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
