"""What the two worker processes are asked to do: plain data that both sides can import without TVM."""

from dataclasses import dataclass

from targets.cpu import Tuning
from targets.measurement import Timing
from targets.program import Step

MANIFEST = "manifest.json"
"""The file of a compiled program that names the others."""
PRODUCT_SIZE = 384
"""Rows, columns and depth of the probe's product: large enough for full speed, small enough to stay in a cache."""
READ_VALUES = 64 << 20
"""float32 values that the probe reads once: 256 MiB, so that no cache holds a part worth mentioning."""
VARIANT_SHAPE = (120, 512, 512)
"""Rows, depth and columns of the product that tunings are tried on; 120 rows are whole tiles of every height tried."""
READ_SHAPE = (1, 1024, READ_VALUES // 1024)
"""The same of a single row, whose weight is read from memory; the ceiling for reading is taken on it, too."""


def variant_name(tuning: Tuning) -> str:
    """Name of the kernel that tries a register tile."""
    return f"product_{tuning.tile_vectors}x{tuning.tile_rows}_{tuning.unroll}"


def row_variant_name(tuning: Tuning) -> str:
    """Name of the kernel that tries a way to take a single row."""
    return f"row_{tuning.tile_vectors}_{tuning.row_tiles}_{tuning.row_unroll}_{tuning.row_ahead_bytes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run: where the program and its arrays lie, what to check, what to time.

    Attributes:
        artifact, sample, probe: paths of the compiled program, the arrays and the probe library.
        reference: size and tile of the probe's product, timed beside the program.
        reference_best_s: the best time of that product seen on this device.
    """

    artifact: str
    sample: str
    probe: str
    reference: tuple[int, int]
    reference_best_s: float
    steps: tuple[Step, ...]
    timed: dict[str, tuple[dict[str, str], int]]
    tolerance: float
    timing: Timing
