"""A compiled stage run on an emulated processor, by a small C program that stands where TVM's runtime would.

The stage's kernels and `harness.c` become one static executable; arrays go in and out through a file that it maps.
"""

import base64
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.compiled_stage import CompiledStage, TensorForm
from targets.cpu import Cpu
from targets.link import link_command

ALIGNMENT = 64
_TENSOR, _NUMBER = 7, 1  # kinds of argument in TVM's FFI
_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A processor: as LLVM, as the schedules and as QEMU know it.

    Attributes:
        llvm: the TVM target, as its dict form.
        emulator: name of QEMU's program.
        model: QEMU's name of the processor, with its options.
    """

    llvm: Mapping[str, Any]
    cpu: Cpu
    emulator: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Executable:
    """A static executable of the harness and kernels, which it knows by their place in `symbols`."""

    machine: Machine
    path: Path
    symbols: tuple[str, ...]


def link(machine: Machine, kernels: Mapping[str, Path], path: Path) -> Executable:
    """The harness and the object files of kernels, by symbol, as an executable at `path`."""
    source = Path(__file__).with_name("harness.c")
    table = "".join(f"K({symbol})" for symbol in kernels)
    # Nothing but the kernels is linked, so one that calls a mathematical library cannot be.
    flags = ["-O1", "-static", "-ffreestanding", "-fno-builtin", "-nostdlib", f"-DKERNELS={table}"]
    command = [*link_command(machine.llvm["mtriple"]), *flags, "-o", str(path), str(source), *map(str, kernels.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"linking failed:\n{done.stderr}"
    return Executable(machine=machine, path=path, symbols=tuple(kernels))


def run_stage(
    program: Executable, stage: CompiledStage, arrays: Sequence[NDArray[Any]], emulators: Path, size: int, log: Path
) -> list[NDArray[Any]]:
    """The stage's outputs.

    Args:
        program: holds all the stage's kernels.
        arrays: the stage's inputs, then its weights in their layouts.
        emulators: the folder of QEMU's programs.
        size: the value of the size that varies.
        log: where QEMU writes which instructions ran; `executed` reads it.
    """
    tape = _Tape(size)
    for array in arrays:
        tape.add(array)
    for step in stage.steps:
        arguments = [tape.argument(argument) for argument in step.arguments]
        if not step.symbol:
            (form,), (source,) = step.results, step.arguments
            tape.view(source, form)
            continue
        tape.calls.append((program.symbols.index(step.symbol), arguments + [(_TENSOR, tape.new(form)) for form in step.results]))
    file = program.path.with_suffix(".tape")
    offsets = tape.write(file)
    machine = program.machine
    command = [str(emulators / machine.emulator), "-cpu", machine.model, "-D", str(log), "-d", "in_asm,exec,nochain", str(program.path)]
    with file.open("r+b") as standard_input:
        done = subprocess.run(command, stdin=standard_input, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{machine.emulator} ended with {done.returncode}: {done.stderr}"
    content = file.read_bytes()
    outputs = [tape.values[number] for number in stage.outputs]
    return [np.frombuffer(content, v.dtype, v.size, offsets[v.home]).reshape(v.shape) for v in outputs]


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor: `home` is the number of the array whose bytes it is."""

    home: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class _Tape:
    """What `harness.c` reads: tensors and calls. Values a stage numbers keep their numbers; constants come behind them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[_Value] = []
        self.constants: list[_Value] = []
        self.arrays: list[NDArray[Any]] = []
        self.calls: list[tuple[int, list[tuple[int, Any]]]] = []

    def add(self, array: NDArray[Any]) -> int:
        self.values.append(self._home(array))
        return len(self.values) - 1

    def new(self, form: TensorForm) -> int:
        """A value that is still to be computed: not a number, so that what stays unwritten shows."""
        shape, dtype = self._shape(form), np.dtype(form.dtype)
        return self.add(np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).min, dtype))

    def view(self, source: int, form: TensorForm) -> None:
        self.values.append(_Value(self.values[source].home, self._shape(form), np.dtype(form.dtype)))

    def argument(self, argument: Any) -> tuple[int, Any]:
        if isinstance(argument, int):
            return _TENSOR, argument
        if argument[0] == "size":
            return _NUMBER, self._evaluate(argument[1])
        _, shape, dtype, data = argument
        self.constants.append(self._home(np.frombuffer(base64.b64decode(data), dtype).reshape(shape)))
        return _TENSOR, -len(self.constants)

    def write(self, path: Path) -> list[int]:
        """Writes the file; returns where in it each array lies."""
        tensors = [*self.values, *self.constants]
        words = 2 + sum(3 + len(t.shape) for t in tensors) + 1 + sum(2 + 2 * len(arguments) for _, arguments in self.calls)
        offsets, end = [], 8 * words
        for array in self.arrays:
            offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
            end = offsets[-1] + array.nbytes
        head = [end, len(tensors)]
        for t in tensors:
            head += [_CODES[t.dtype.kind] | 8 * t.dtype.itemsize << 8, offsets[t.home], len(t.shape), *t.shape]
        head.append(len(self.calls))
        for kernel, arguments in self.calls:
            head += [kernel, len(arguments)]
            for kind, value in arguments:
                head += [kind, len(self.values) - 1 - value if kind == _TENSOR and value < 0 else value]
        assert len(head) == words
        with path.open("wb") as file:
            file.write(np.array(head, "<i8").tobytes())
            for offset, array in zip(offsets, self.arrays, strict=True):
                file.seek(offset)
                file.write(array.tobytes())
            file.truncate(end)
        return offsets

    def _home(self, array: NDArray[Any]) -> _Value:
        self.arrays.append(np.ascontiguousarray(array))
        return _Value(len(self.arrays) - 1, array.shape, array.dtype)

    def _shape(self, form: TensorForm) -> tuple[int, ...]:
        return tuple(self._evaluate(size) for size in form.shape)

    def _evaluate(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        if isinstance(size, str):
            return self.size
        kind, left, right = size[0], *(self._evaluate(part) for part in size[1:])
        operators = {"Add": int.__add__, "Sub": int.__sub__, "Mul": int.__mul__, "FloorDiv": int.__floordiv__, "FloorMod": int.__mod__}
        return {**operators, "Max": max, "Min": min}[kind](left, right)
