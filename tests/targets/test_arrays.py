"""Arrays go into a safetensors file and come out of it one at a time."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from targets.arrays import ArrayFile, write_arrays

ARRAYS: dict[str, NDArray[Any]] = {
    "rows": np.arange(12, dtype=np.float32).reshape(3, 4),
    "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    "odd": np.array([-3, 2, 127], np.int8),
    "words": np.array([[1], [-2]], np.int32),
    "tokens": np.array([[1 << 40, 5]]),
    "none": np.zeros((0, 7), np.float32),
}


def test_what_is_written_is_a_safetensors_file_and_is_read_back(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", ARRAYS.items())
    theirs, ours = load_file(tmp_path / "a"), ArrayFile(tmp_path / "a")
    assert set(theirs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        for found in (theirs[name], ours.read(name)):
            np.testing.assert_array_equal(found, array, strict=True)


def test_a_file_of_the_safetensors_package_is_read(tmp_path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}, tmp_path / "a")
    np.testing.assert_array_equal(ArrayFile(tmp_path / "a").read("transposed"), ARRAYS["transposed"], strict=True)


def test_no_array_is_held_when_the_next_one_is_made(tmp_path: Path) -> None:
    before: list[weakref.ref[NDArray[Any]]] = []

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        for number in range(4):
            assert not any(reference() is not None for reference in before)
            array = np.full(10, number, np.float32)
            before.append(weakref.ref(array))
            pair = (str(number), array)
            del array
            yield pair
            del pair

    write_arrays(tmp_path / "a", arrays())
    assert ArrayFile(tmp_path / "a").read("3").tolist() == [3.0] * 10


def test_a_missing_array_and_a_file_that_ends_early_are_errors(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", [("x", np.ones(100, np.float32))])
    with pytest.raises(KeyError, match="y"):
        ArrayFile(tmp_path / "a").read("y")
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(content[:-1])
    with pytest.raises(OSError, match="ends in the middle of x"):
        ArrayFile(tmp_path / "b").read("x")


def test_a_dtype_that_no_target_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex64"):
        write_arrays(tmp_path / "a", [("x", np.ones(1, np.complex64))])
