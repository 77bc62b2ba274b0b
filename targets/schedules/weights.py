"""`WeightSpec`: a weight matrix as kernels see it, whatever its bits, and single elements of it as expressions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from targets.layout import K_GROUP, WORD_VALUES, Layout, Word, packed_shape

_WORDS: dict[int, Word] = {8: "bytes", 4: "nibbles"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """The matrix (rows, columns) of a product out[rows] = sum over columns, packed in tiles of rows.

    Attributes:
        rows: outputs.
        columns: inputs.
        tile: rows that lie side by side.
        bits: 32 or 16 for floats, 8 or 4 for integers with scales.
        groups: scales a row has; 0 for floats.
        halves: whether the processor converts vectors of half-precision floats.
        first_tile, all_tiles: where its tiles lie among those of the array that it is stored in with others; 0: alone.
    """

    rows: int
    columns: int
    tile: int
    bits: int = 32
    groups: int = 0
    halves: bool = True
    first_tile: int = 0
    all_tiles: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of rows, the last one padded."""
        return -(-self.rows // self.tile)

    @property
    def integer(self) -> bool:
        """Whether values are integers with scales."""
        return self.bits < 16

    @property
    def scale_dtype(self) -> str:
        """NumPy's name of the type of the scales: those of whole rows are few, so they need not be small."""
        return "float32" if self.bits == 8 else "float16"

    def layouts(self, views: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> tuple[Layout, ...]:
        """How the values lie in memory, then the scales if there are any."""
        if not self.integer:
            return (Layout(views=views, tile=self.tile, dtype="float32" if self.bits == 32 else "float16"),)
        return (
            Layout(views=views, tile=self.tile, word=_WORDS[self.bits], dtype="int32"),
            Layout(tile=self.tile, dtype=self.scale_dtype),
        )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the arrays in those layouts, with what is stored beside it."""
        rows = self.all_tiles * self.tile or self.rows
        if not self.integer:
            return (packed_shape(rows, self.columns, self.tile),)
        words = -(-self.columns // K_GROUP) * K_GROUP // WORD_VALUES[_WORDS[self.bits]]
        return packed_shape(rows, words, self.tile), packed_shape(rows, self.groups, self.tile)

    def element(self, arrays: tuple[te.Tensor, ...]) -> Callable[[Any, Any, Any], Any]:
        """The weight as float32, by tile of rows, column and row in the tile."""
        values, *scales = arrays
        first = self.first_tile
        if self.bits == 32:
            return lambda tile, k, lane: values[tile + first, k, lane]
        if self.bits == 16:
            return lambda tile, k, lane: self._float(values[tile + first, k, lane])

        per_word = WORD_VALUES[_WORDS[self.bits]]

        def integer(tile: Any, k: Any, lane: Any) -> Any:
            word = values[tile + first, tirx.indexdiv(k, per_word), lane]
            # A shift by an index would make 64-bit arithmetic of it; once loops over k are unrolled one choice is left.
            position = tirx.indexmod(k, per_word)
            value = _shifted(word, self.bits, per_word - 1)
            for j in range(per_word - 1):
                value = tirx.Select(position == j, _shifted(word, self.bits, j), value)
            group = tirx.indexdiv(k, K_GROUP) if self.groups > 1 else 0
            scale = scales[0][tile + first, group, lane]
            return tirx.Cast("float32", value) * (scale if self.scale_dtype == "float32" else self._float(scale))

        return integer

    def _float(self, half: Any) -> Any:
        """A finite half-precision float as float32."""
        if self.halves:
            return tirx.Cast("float32", half)
        # Its exponent and fraction moved to where a float32 has them, then the difference of the exponents' biases, 112.
        bits = tirx.Cast("int32", tirx.reinterpret("uint16", half))
        magnitude = tirx.reinterpret("float32", (bits & 0x7FFF) << 13) * tirx.const(2.0**112, "float32")
        return tirx.Select(bits >= 0x8000, -magnitude, magnitude)


def _shifted(word: Any, bits: int, j: int) -> Any:
    """Value j of a word, as `Layout.word` says."""
    if bits == 8:
        return (word << tirx.const(24 - 8 * j, "int32")) >> tirx.const(24, "int32")
    return ((word >> tirx.const(8 * (j % 4) + 4 * (j // 4), "int32")) & tirx.const(15, "int32")) - tirx.const(8, "int32")


def packed_product(weight: WeightSpec, x: te.Tensor, *arrays: te.Tensor) -> te.Tensor:
    """out[..., n] = sum_k x[..., k] w[n, k], x of shape (..., columns).

    The product runs over whole tiles, and a copy drops the padding: inside a tile nothing is ever guarded. Weights in
    fewer than 32 bits that several rows of x use are made float32 once, in a block "unpacked".
    """
    element = weight.element(arrays)
    rows = 1
    for size in x.shape[:-1]:
        rows *= int(size)
    if weight.bits < 32 and rows > 1:
        shape = (weight.tiles, weight.columns, weight.tile)
        unpacked = te.compute(shape, lambda tile, k, lane: element(tile, k, lane), name="unpacked")
        element = lambda tile, k, lane: unpacked[tile, k, lane]  # noqa: E731
    k = te.reduce_axis((0, weight.columns), name="k")
    padded = te.compute(
        (*x.shape[:-1], weight.tiles * weight.tile),
        lambda *i: te.sum(x[(*i[:-1], k)] * element(tirx.indexdiv(i[-1], weight.tile), k, tirx.indexmod(i[-1], weight.tile)), axis=k),
        name="packed_product",
    )
    return padded if weight.tiles * weight.tile == weight.rows else cropped(padded, weight.rows)


def cropped(padded: te.Tensor, rows: int) -> te.Tensor:
    """The first `rows` of the last axis: whole tiles without their padding."""
    return te.compute((*padded.shape[:-1], rows), lambda *i: padded(*i), name="cropped")


def packed_gather(weight: WeightSpec, indices: te.Tensor, *arrays: te.Tensor) -> te.Tensor:
    """out[..., :] = w[indices[...], :], each index below `rows`."""
    element, lead = weight.element(arrays), len(indices.shape)

    def value(*i: Any) -> Any:
        row = indices[i[:lead]]
        return element(tirx.indexdiv(row, weight.tile), i[lead], tirx.indexmod(row, weight.tile))

    return te.compute((*indices.shape, weight.columns), value, name="gather")
