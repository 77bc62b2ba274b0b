"""Which instructions an emulated program executed: multiply-adds in full vectors, and all others, for each kernel.

QEMU's log has every piece of straight-line machine code, with its bytes, and a line for each time that one was executed.
So what is counted is what ran: a loop counts as much as it is hot. Instructions are told by their encodings, since
what a disassembler knows differs from one release to the next.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SYMBOL = re.compile(r"IN: ?(\S*)")
_CODE = re.compile(r"0x([0-9a-f]+):\s+([0-9a-f]{4,8})\s")
_EXECUTION = re.compile(r"Trace \d+: 0x[0-9a-f]+ \[[0-9a-f]+/([0-9a-f]+)/")


@dataclass(slots=True)
class Executed:
    """What one kernel executed.

    Attributes:
        full: multiply-adds by instructions that fill a vector register, in lanes of 32 bits.
        other: multiply-adds of floats by scalar instructions and shorter vectors.
        stores: vector registers written to memory.
        instructions: all of them.
    """

    full: int = 0
    other: int = 0
    stores: int = 0
    instructions: int = 0

    @property
    def share(self) -> float:
        """Share of the multiply-adds that were in full vectors."""
        return self.full / max(1, self.full + self.other)


@dataclass(slots=True)
class _Vectors:
    """How many values of how many bits a vector instruction works on; RISC-V's programs set it as they go."""

    length: float = 4
    bits: int = 32

    @property
    def lanes(self) -> int:
        """Length in lanes of 32 bits."""
        return int(self.length * self.bits / 32)


Decoder = Callable[[int, _Vectors, Executed], None]


def executed(log: Path, architecture: str) -> dict[str, Executed]:
    """Counts of each kernel, by symbol, from a log that `run_stage` had QEMU write."""
    decode, vectors, counts = _DECODERS[architecture], _Vectors(), dict[str, Executed]()
    pieces: dict[int, tuple[str, list[int]]] = {}
    symbol, words, kernel = "", list[int](), Executed()
    with log.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if found := _CODE.match(line):
                if not words:
                    pieces[int(found[1], 16)] = (symbol, words)
                words.append(int(found[2], 16))
            elif found := _SYMBOL.match(line):
                symbol, words = found[1], []
            elif found := _EXECUTION.match(line):
                symbol_, piece = pieces[int(found[1], 16)]
                # Between kernels the harness runs; what a kernel calls counts as its own.
                if symbol_.startswith("__tvm_ffi_kernel"):
                    kernel = counts.setdefault(symbol_.removeprefix("__tvm_ffi_"), Executed())
                elif symbol_ == "_start":
                    kernel = Executed()
                kernel.instructions += len(piece)
                for word in piece:
                    decode(word, vectors, kernel)
    return counts


def _aarch64(word: int, vectors: _Vectors, counts: Executed) -> None:
    """Encodings from the Arm Architecture Reference Manual, "Advanced SIMD" and "Floating-point data-processing"."""
    if word >> 24 == 0x1F:  # FMADD and its kin, scalar
        counts.other += 1
    elif any(word & mask == value for mask, value in _AARCH64_VECTORS):
        if word >> 30 & 1:
            counts.full += 4
        else:
            counts.other += 2
    elif word & 0xFE400000 == 0xAC000000:  # STP of two
        counts.stores += 2
    elif word & 0xFFC00000 == 0x3D800000 or word & 0xFFC00000 == 0x3C800000:  # STR
        counts.stores += 1


_AARCH64_VECTORS = (
    (0xBF20FC00, 0x0E20CC00),  # FMLA, FMLS
    (0xBF80B400, 0x0F801000),  # the same, by an element
    (0x9FE0FC00, 0x0E809400),  # SDOT, UDOT
    (0x9FC0F400, 0x0F80E000),  # the same, by an element
)


def _riscv64(word: int, vectors: _Vectors, counts: Executed) -> None:
    """Encodings from the RISC-V instruction set manual, chapters "F" and "V"; registers of 128 bits."""
    opcode, kind = word & 0x7F, word >> 12 & 7
    if word & 3 != 3:
        return  # a compressed instruction: none of these
    if opcode in (0x43, 0x47, 0x4B, 0x4F):  # FMADD.S and its kin
        counts.other += 1
    elif opcode == 0x57 and kind == 7:
        _set_vectors(word, vectors)
    elif opcode == 0x57 and kind in (1, 5) and (0x28 <= word >> 26 <= 0x2F or word >> 26 >= 0x3C):  # VFMACC and its kin
        if vectors.lanes >= 4:
            counts.full += vectors.lanes
        else:
            counts.other += max(1, vectors.lanes)
    elif opcode == 0x27 and kind in (0, 5, 6, 7):  # VSE
        counts.stores += 1


def _set_vectors(word: int, vectors: _Vectors) -> None:
    """VSETIVLI and VSETVLI. A length in a register counts as the longest: only the end of a loop is shorter."""
    if word >> 25 == 0x40:
        return  # VSETVL, which restores what was
    kind = word >> 20
    multiplier = 2.0 ** ((kind & 7) - 8 * (kind >> 2 & 1))
    bits = 8 << (kind >> 3 & 7)
    longest, immediate = 128 / bits * multiplier, word >> 30 == 3
    length = min(longest, word >> 15 & 31) if immediate else longest
    if immediate or word >> 7 & 0x1F or word >> 15 & 0x1F:
        vectors.length = length
    vectors.bits = bits


_DECODERS: dict[str, Decoder] = {"aarch64": _aarch64, "riscv64": _riscv64}
