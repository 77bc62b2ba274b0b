"""`Cpu`: what the schedules need to know of a processor, and nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor as the schedules see it.

    Attributes:
        vector_bytes: width of a SIMD register.
        registers: how many of them there are.
        cores: threads that run at once.
    """

    vector_bytes: int
    registers: int
    cores: int

    @property
    def lanes(self) -> int:
        """float32 values in a SIMD register."""
        return max(1, self.vector_bytes // 4)

    @property
    def tile_columns(self) -> int:
        """Columns of a packed weight that lie side by side: enough vectors to hide the latency of a row of them."""
        return self.lanes * (2 if self.lanes >= 8 else 4)

    @property
    def tile_rows(self) -> int:
        """Rows of a register tile: at most 8, and accumulators leave room for a row of weights and a broadcast."""
        vectors = self.tile_columns // self.lanes
        return max(1, min(8, (self.registers - vectors - 1) // vectors))
