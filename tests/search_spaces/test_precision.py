"""What a precision costs in bytes is what its tensors hold."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import quantisation
from search_spaces.precision import MEANINGS, PRECISIONS, Precision, matrix_bytes


@given(rows=st.integers(1, 9), columns=st.integers(1, 100))
@pytest.mark.parametrize("name", PRECISIONS[1:])
def test_bytes_of_a_matrix_are_those_of_its_values_and_scales(name: Precision, rows: int, columns: int) -> None:
    values, scales = quantisation.quantise(torch.ones(rows, columns), name)
    held = -(-values.numel() // 2) if name == "int4" else values.nbytes
    assert matrix_bytes(rows, columns, name) == held + (0 if scales is None else scales.nbytes)


def test_bytes_by_hand() -> None:
    # 3 rows of 40: two groups a row.
    assert [matrix_bytes(3, 40, name) for name in PRECISIONS] == [480, 240, 120 + 3 * 4, 60 + 3 * 2 * 2]
    assert matrix_bytes(1, 3, "int4") == 2 + 2


def test_each_has_a_meaning() -> None:
    assert tuple(MEANINGS) == PRECISIONS


def test_naming_a_precision_needs_no_torch() -> None:
    code = "import sys; import search_spaces.precision; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
