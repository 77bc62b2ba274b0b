"""Tensors that stay: each in its own place, whole, and begun where kernels want them."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from targets import machine
from targets.machine import Memory


@settings(max_examples=30)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=20), dtype=st.sampled_from(["float32", "int8"])
)
def test_tensors_of_one_block_do_not_touch_each_other(shapes: list[tuple[int, int]], dtype: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_BLOCK_BYTES", 2000)  # several blocks, and tensors larger than one
        memory = Memory(tvm.cpu())
        tensors = [memory.filled(shape, dtype, lambda array, i=i: array.fill(i)) for i, shape in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        found = tensor.numpy()
        assert (found.shape, found.dtype) == (shape, dtype)
        assert (found == i).all()


def test_every_tensor_begins_a_cache_line_and_blocks_are_shared() -> None:
    memory = Memory(tvm.cpu())
    addresses = [np.from_dlpack(memory.empty((3,), "float32")).ctypes.data for _ in range(4)]
    assert [address % 64 for address in addresses] == [0] * 4
    assert np.diff(addresses).tolist() == [64] * 3


def test_tensors_stay_when_their_maker_is_gone() -> None:
    tensor = Memory(tvm.cpu()).filled((1000,), "float32", lambda array: array.fill(3))
    np.empty(1 << 20).fill(1)
    assert (tensor.numpy() == 3).all()
