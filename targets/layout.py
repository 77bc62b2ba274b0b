"""`Layout`: how a weight lies in a device's memory, as data: made ahead of time, applied with NumPy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Word = Literal["", "bytes", "nibbles"]
"""How small integers along k share a 32-bit word: not at all, four signed bytes, or eight nibbles holding value + 8."""
WORD_VALUES = {"": 1, "bytes": 4, "nibbles": 8}
K_GROUP = 32
"""Integer weights are padded along k to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Views applied in order, then packing into column tiles.

    Attributes:
        views: ("reshape", shape) and ("transpose", axes) steps.
        tile: 0 to leave it so, else a matrix (N, K) becomes (ceil(N / tile), K, tile), padded with zeros: the
            `tile` outputs that a vector register row computes together lie side by side for each k.
        word: integers that share a word; K then counts words. Value j of a word of bytes is its byte j; values 0 to 3
            of a word of nibbles are the low halves of its bytes, 4 to 7 the high halves, as a byte dot product takes them.
        dtype: NumPy's name of what is stored.
    """

    views: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tile: int = 0
    word: Word = ""
    dtype: str = "float32"

    def apply(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight in this layout, contiguous."""
        for kind, argument in self.views:
            weight = weight.reshape(argument) if kind == "reshape" else weight.transpose(argument)
        if self.tile:
            if self.word:
                weight = self._words(weight)
            rows, columns = weight.shape
            shape = packed_shape(rows, columns, self.tile)
            if rows % self.tile:
                weight = np.concatenate((weight, np.zeros((shape[0] * self.tile - rows, columns), weight.dtype)))
            weight = weight.reshape(shape[0], self.tile, columns).transpose(0, 2, 1)
        return np.ascontiguousarray(weight)

    def _words(self, weight: NDArray[Any]) -> NDArray[Any]:
        """(N, K) of int8 -> (N, words) of int32."""
        padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % K_GROUP)))
        if self.word == "nibbles":
            halves = (padded + np.int8(8)).view(np.uint8).reshape(len(padded), -1, 2, 4)
            padded = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))
        return np.ascontiguousarray(padded).reshape(len(weight), -1).view("<i4")

    def to_json(self) -> list[Any]:
        """Plain values for a manifest."""
        return [[[kind, list(argument)] for kind, argument in self.views], self.tile, self.word, self.dtype]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Layout":
        """The inverse of `to_json`."""
        views, tile, word, dtype = values
        return cls(views=tuple((kind, tuple(argument)) for kind, argument in views), tile=tile, word=word, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array that a device holds: weights by name, each in the layout, joined along the first axis.

    Weights that multiply the same input are joined, so that a kernel may take them as one.
    """

    names: tuple[str, ...]
    layout: Layout = Layout()

    def apply(self, read: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
        """The array, from a function that gives a weight by name."""
        parts = [self.layout.apply(read(name)) for name in self.names]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def renamed(self, names: Mapping[str, str]) -> "StoredArray":
        """The same of the weights that these names stand for."""
        return StoredArray(names=tuple(names[name] for name in self.names), layout=self.layout)

    def to_json(self) -> list[Any]:
        """Plain values for a manifest."""
        return [list(self.names), self.layout.to_json()]

    @classmethod
    def from_json(cls, values: list[Any]) -> "StoredArray":
        """The inverse of `to_json`."""
        names, layout = values
        return cls(names=tuple(names), layout=Layout.from_json(layout))


def packed_shape(rows: int, columns: int, tile: int) -> tuple[int, int, int]:
    """Shape of a packed (rows, columns) weight."""
    return -(-rows // tile), columns, tile
