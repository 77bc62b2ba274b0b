"""`Layout`: how a weight lies in a device's memory, as data: made ahead of time, applied with NumPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Views applied in order, then packing into column tiles.

    Attributes:
        views: ("reshape", shape) and ("transpose", axes) steps.
        tile: 0 to leave it so, else a matrix (N, K) becomes (ceil(N / tile), K, tile), padded with zeros: the
            `tile` outputs that a vector register row computes together lie side by side for each k.
        dtype: NumPy's name.
    """

    views: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tile: int = 0
    dtype: str = "float32"

    def apply(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight in this layout, contiguous."""
        for kind, argument in self.views:
            weight = weight.reshape(argument) if kind == "reshape" else weight.transpose(argument)
        if self.tile:
            rows, columns = weight.shape
            shape = packed_shape(rows, columns, self.tile)
            if rows % self.tile:
                weight = np.concatenate((weight, np.zeros((shape[0] * self.tile - rows, columns), weight.dtype)))
            weight = weight.reshape(shape[0], self.tile, columns).transpose(0, 2, 1)
        return np.ascontiguousarray(weight)

    def to_json(self) -> list[Any]:
        """Plain values for a manifest."""
        return [[[kind, list(argument)] for kind, argument in self.views], self.tile, self.dtype]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Layout":
        """The inverse of `to_json`."""
        views, tile, dtype = values
        return cls(views=tuple((kind, tuple(argument)) for kind, argument in views), tile=tile, dtype=dtype)


def packed_shape(rows: int, columns: int, tile: int) -> tuple[int, int, int]:
    """Shape of a packed (rows, columns) weight."""
    return -(-rows // tile), columns, tile
