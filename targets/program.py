"""`Program`: what a target compiles: functions made of stages, weights by name, and state that grows.

Nothing here knows what the program computes. A stage is a `torch.export.ExportedProgram` made on
demand; equal keys mean equal stages, so that one compile serves every program that uses the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ROWS = ".rows"
"""Suffix of the output whose rows are appended to the state of that name."""

Shape = tuple[int | str, ...]
"""Sizes of a tensor; a string names a size that varies between calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and dtype (NumPy's name, or "int4" for two values a byte, handed over as int8) of a tensor."""

    shape: Shape
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Size in bytes; every dimension must be a number."""
        import math

        sizes = [d for d in self.shape if isinstance(d, int)]
        assert len(sizes) == len(self.shape), f"{self.shape} has a varying size"
        bits = {"float32": 32, "float16": 16, "int64": 64, "int32": 32, "int8": 8, "int4": 4}[self.dtype]
        return -(-math.prod(sizes) * bits // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A piece of a program that is compiled once.

    Attributes:
        key: content identity, the same in every process; equal keys mean equal programs.
        export: makes the exported program; picklable, since it is called in a compile worker.
            Its parameters and buffers have the names that `Call.weights` maps, after a common "stage." prefix.
    """

    key: str
    export: "Callable[[], ExportedProgram]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One use of a stage inside a function: named values in, named weights, named values out.

    A name may be given anew by a later call; it then stands for the later value.

    Attributes:
        weights: the stage's own parameter and buffer names -> names in `Program.weights`.
        operators: the same names -> what a profile calls the part of the computation that uses them.
    """

    stage: str
    inputs: tuple[str, ...]
    weights: dict[str, str]
    outputs: tuple[str, ...]
    operators: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """An entry point: a chain of calls from `inputs` to `outputs`, all by name.

    Attributes:
        last: the input, one int64, that gives the index of the last row that counts where the rows after it are padding;
            "" where every row counts.
    """

    name: str
    inputs: dict[str, TensorSpec]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    last: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Functions over the same weights and state.

    Attributes:
        functions: entry points by name.
        stages: every stage the functions call, by key.
        weights: shape and dtype of each weight.
        state: rows kept between calls. A function that takes an input of that name reads the rows so far
            (axis 1 is the row axis); one that returns `NAME.rows` appends those rows that count after the call. A
            function that takes no state begins it anew: its rows are the first.
        bounds: the largest value of each varying size.
    """

    functions: dict[str, Function]
    stages: dict[str, Stage]
    weights: dict[str, TensorSpec]
    state: dict[str, TensorSpec]
    bounds: dict[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each once."""
        return sum(w.nbytes for w in self.weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of a scripted run: which function, its inputs, and the outputs it must give.

    State is carried by the runner: rows a step returns are appended before the next step. Arrays are
    names in the sample file.
    """

    function: str
    inputs: dict[str, str]
    expected: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Weights, inputs and expected outputs to check and time a program with.

    Attributes:
        write: writes one safetensors file at a path: weights under their program names, and every array that
            `steps` and `timed` name. Only targets that compute call it.
        steps: the scripted run whose outputs are compared.
        timed: for each function to time, its inputs (names in the file) and how many rows of state it sees.
        tolerance: largest allowed error, relative to the largest expected magnitude of each output.
    """

    write: Callable[[Path], None]
    steps: tuple[Step, ...]
    timed: dict[str, tuple[dict[str, str], int]]
    tolerance: float = 1e-4
