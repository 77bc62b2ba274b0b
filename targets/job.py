"""What the two worker processes are asked to do: plain data that both sides can import without TVM."""

from dataclasses import dataclass

from targets.measurement import Timing
from targets.program import Step

MANIFEST, LIBRARY = "manifest.json", "program.so"
"""Files of a compiled program."""
PRODUCT_SIZE = 384
"""Rows, columns and depth of the probe's product: large enough for full speed, small enough to stay in a cache."""
READ_VALUES = 16 << 20
"""float32 values of the probe's streaming read: 64 MiB, beyond any cache that a core has to itself."""


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
