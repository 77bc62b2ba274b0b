"""`Cpu`: what the schedules need to know of a processor, and nothing else."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Dot = Literal["", "vnni", "madd", "sdot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Small choices of the product kernels that only trying tells; found once per device and kept.

    Attributes:
        tile_vectors: SIMD registers across a tile of packed columns.
        tile_rows: rows of a register tile, where a product has many.
        unroll: steps of k written out, there.
        row_tiles: tiles that the product of a single row takes at once: as many streams from memory.
        row_unroll: steps of k written out, there.
        row_ahead_bytes: how far ahead in each stream a large weight is asked for, there; 0: not at all.
    """

    tile_vectors: int
    tile_rows: int
    unroll: int = 4
    row_tiles: int = 2
    row_unroll: int = 4
    row_ahead_bytes: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor as the schedules see it.

    Attributes:
        vector_bytes: width of a SIMD register.
        registers: how many of them there are.
        cores: threads that run at once.
        dot: byte dot products it has: of four, "vnni" (x86, unsigned by signed) or "sdot" (ARM, signed by signed), of two,
            "madd" (x86, unsigned by signed), or none.
        halves: whether it converts vectors of half-precision floats.
        tuned: choices found by trying; None: `default_tuning`.
    """

    vector_bytes: int
    registers: int
    cores: int
    dot: Dot = ""
    halves: bool = True
    tuned: Tuning | None = None

    @property
    def lanes(self) -> int:
        """float32 values in a SIMD register."""
        return max(1, self.vector_bytes // 4)

    @property
    def default_tuning(self) -> Tuning:
        """Enough vectors to hide the latency of a row of them; at most 8 rows."""
        vectors = 2 if self.lanes >= 8 else 4
        return Tuning(tile_vectors=vectors, tile_rows=max(1, min(8, self.most_rows(vectors))))

    def most_rows(self, vectors: int) -> int:
        """Rows of a register tile whose accumulators leave room for a row of weights and a broadcast."""
        return (self.registers - vectors - 1) // vectors

    @property
    def tuning(self) -> Tuning:
        """The choices in force."""
        return self.tuned or self.default_tuning

    @property
    def tile_columns(self) -> int:
        """Columns of a packed weight that lie side by side."""
        return self.lanes * self.tuning.tile_vectors

    @property
    def tile_rows(self) -> int:
        """Rows of a register tile."""
        return self.tuning.tile_rows

    def variants(self) -> tuple[Tuning, ...]:
        """Register tiles worth trying here: the default, and those whose accumulators fit and fill a quarter of the registers."""
        tried = [
            Tuning(tile_vectors=vectors, tile_rows=rows, unroll=unroll)
            for vectors in (1, 2, 4)
            for rows, unroll in ((4, 4), (6, 4), (8, 4), (8, 8), (12, 4))
            if rows <= self.most_rows(vectors) and rows * vectors >= self.registers // 4
        ]
        return tuple(dict.fromkeys([self.default_tuning, *tried]))

    def row_variants(self, tuning: Tuning) -> tuple[Tuning, ...]:
        """Ways worth trying to take a single row, for the tile width of a tuning."""
        choices = ((2, 4, 1024), (3, 4, 1024), (4, 4, 1024), (1, 4, 0), (1, 8, 0), (2, 4, 0), (4, 4, 0))
        return tuple(dataclasses.replace(tuning, row_tiles=t, row_unroll=unroll, row_ahead_bytes=ahead) for t, unroll, ahead in choices)
