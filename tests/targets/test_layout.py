"""Packed weights: the product that the kernels compute on them is the product with the weight itself."""

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from targets.layout import K_GROUP, WORD_VALUES, Layout, Word, packed_shape

SIZES = st.integers(1, 40)
TILES = st.sampled_from([1, 2, 4, 8, 16, 32])


def some_weight(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@given(rows=SIZES, columns=SIZES, tile=TILES)
def test_a_product_over_the_packed_weight_is_the_product(rows: int, columns: int, tile: int) -> None:
    weight, x = some_weight(rows, columns), some_weight(columns)
    packed = Layout(tile=tile).apply(weight)
    out = [sum(float(x[k]) * float(packed[n // tile, k, n % tile]) for k in range(columns)) for n in range(rows)]
    np.testing.assert_allclose(out, weight.astype(np.float64) @ x, rtol=1e-5, atol=1e-5)


@given(rows=SIZES, columns=SIZES, tile=TILES)
def test_packing_keeps_every_value_and_pads_with_zeros(rows: int, columns: int, tile: int) -> None:
    weight = some_weight(rows, columns) + 10
    packed = Layout(tile=tile).apply(weight)
    assert packed.shape == packed_shape(rows, columns, tile) == (math.ceil(rows / tile), columns, tile)
    assert packed.flags.c_contiguous
    assert packed.dtype == np.float32
    assert np.count_nonzero(packed) == weight.size
    np.testing.assert_array_equal(np.sort(packed[packed != 0]), np.sort(weight.ravel()))


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), tile=st.sampled_from([1, 4, 16]), word=st.sampled_from(["bytes", "nibbles"]))
def test_small_integers_share_words_and_can_be_taken_out_again(rows: int, columns: int, tile: int, word: Word) -> None:
    least, most = (-128, 127) if word == "bytes" else (-8, 7)
    weight = np.random.default_rng(rows * columns).integers(least, most + 1, (rows, columns)).astype(np.int8)
    packed = Layout(tile=tile, word=word, dtype="int32").apply(weight)
    per_word = WORD_VALUES[word]
    assert packed.dtype == np.int32
    assert packed.shape == packed_shape(rows, -(-columns // K_GROUP) * K_GROUP // per_word, tile)
    for n in range(rows):
        for k in range(columns):
            value, j = int(packed[n // tile, k // per_word, n % tile]), k % per_word
            if word == "bytes":
                found = (value >> (8 * j)) & 255
                found -= 256 * (found > 127)
            else:
                found = ((value >> (8 * (j % 4) + 4 * (j // 4))) & 15) - 8
            assert found == weight[n, k], (n, k)


@given(a=st.integers(1, 6), b=st.integers(1, 6), c=st.integers(1, 6), tile=TILES)
def test_views_come_before_packing_in_their_order(a: int, b: int, c: int, tile: int) -> None:
    weight = some_weight(a, b, c)
    layout = Layout(views=(("transpose", (2, 0, 1)), ("reshape", (c * a, b))), tile=tile)
    np.testing.assert_array_equal(layout.apply(weight), Layout(tile=tile).apply(weight.transpose(2, 0, 1).reshape(c * a, b)))


def test_without_views_or_tile_the_weight_stays_as_it_is() -> None:
    weight = some_weight(3, 5)
    np.testing.assert_array_equal(Layout().apply(weight), weight)
    assert Layout().apply(weight.T).flags.c_contiguous


@given(
    views=st.lists(st.tuples(st.sampled_from(["reshape", "transpose"]), st.lists(st.integers(0, 9), min_size=1).map(tuple))).map(tuple),
    tile=st.integers(0, 64),
    word=st.sampled_from(["", "bytes", "nibbles"]),
    dtype=st.sampled_from(["float32", "int8"]),
)
def test_a_layout_survives_json(views: tuple[tuple[str, tuple[int, ...]], ...], tile: int, word: Word, dtype: str) -> None:
    layout = Layout(views=views, tile=tile, word=word, dtype=dtype)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
