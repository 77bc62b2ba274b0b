"""Precisions of the matrices that a device holds, and their bytes; no torch. `search_spaces.quantisation` does the rounding."""

from collections.abc import Mapping
from typing import Literal

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
GROUP = 32
"""Inputs of a channel that share a scale in int4."""

MEANINGS: Mapping[Precision, str] = {
    "fp32": "32-bit floats, as trained",
    "fp16": "16-bit floats",
    "int8": "bytes with a scale for each output channel",
    "int4": "half bytes with a scale for every 32 inputs",
}
"""Each precision in words for people."""


def matrix_bytes(rows: int, columns: int, precision: Precision) -> int:
    """Bytes of a matrix (rows, columns), scales included: float32 ones by row in int8, float16 ones by row and group in int4."""
    if precision == "int8":
        return rows * (columns + 4)
    if precision == "int4":
        return -(-rows * columns // 2) + 2 * rows * -(-columns // GROUP)
    return rows * columns * (2 if precision == "fp16" else 4)
