"""`CompiledStage`: a stage as a list of kernel calls, in plain values: what is kept of it, so that it is compiled once.

A compiled stage is a straight line: each step calls one kernel, known by its symbol, or looks at a value in another
shape. That is all a program is linked from; neither PyTorch nor a schedule is needed for one that was seen before.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from targets.layout import StoredArray

_VIEW = ""
"""The symbol of a step that calls nothing."""
_ARITHMETIC = ("Add", "Sub", "Mul", "FloorDiv", "FloorMod", "Max", "Min")
"""How sizes may be made of the one that varies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForm:
    """Shape and dtype of a value.

    Attributes:
        shape: a number, or for a size that varies the expression that gives it: "size", or (operator, left, right).
        dtype: NumPy's name.
    """

    shape: tuple[Any, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStep:
    """One kernel call, or a view of a value when the symbol is empty.

    Attributes:
        arguments: the number of a value, or ("size", expression), or ("constant", shape, dtype, base64).
        results: what the kernel writes; each becomes the next value.
    """

    symbol: str
    arguments: tuple[Any, ...]
    results: tuple[TensorForm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStage:
    """Values are numbered: the inputs, the weights, then every step's results.

    Attributes:
        weights: each weight argument, by the stage's own names.
        outputs: numbers of the values that the stage gives.
    """

    inputs: tuple[TensorForm, ...]
    weights: tuple[StoredArray, ...]
    weight_forms: tuple[TensorForm, ...]
    steps: tuple[KernelStep, ...]
    outputs: tuple[int, ...]

    @property
    def symbols(self) -> list[str]:
        """The kernels it calls, each once."""
        return list(dict.fromkeys(step.symbol for step in self.steps if step.symbol != _VIEW))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "inputs": [[form.shape, form.dtype] for form in self.inputs],
            "weights": [weight.to_json() for weight in self.weights],
            "weight_forms": [[form.shape, form.dtype] for form in self.weight_forms],
            "steps": [[s.symbol, s.arguments, [[form.shape, form.dtype] for form in s.results]] for s in self.steps],
            "outputs": self.outputs,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CompiledStage":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if these are not the values of a stage.
        """
        return cls(
            inputs=_forms(values["inputs"]),
            weights=tuple(StoredArray.from_json(weight) for weight in values["weights"]),
            weight_forms=_forms(values["weight_forms"]),
            steps=tuple(
                KernelStep(symbol=symbol, arguments=_tuples(arguments), results=_forms(results))
                for symbol, arguments, results in values["steps"]
            ),
            outputs=tuple(values["outputs"]),
        )


def _forms(values: Sequence[Any]) -> tuple[TensorForm, ...]:
    return tuple(TensorForm(shape=_tuples(shape), dtype=dtype) for shape, dtype in values)


def _tuples(values: Sequence[Any]) -> tuple[Any, ...]:
    """JSON has no tuples; what was one, at any depth, is one again."""
    return tuple(_tuples(value) if isinstance(value, list | tuple) else value for value in values)


# --- from Relax ---------------------------------------------------------------------------------


def stage_steps(function: Any, symbols: Mapping[Any, str], weights: tuple[StoredArray, ...]) -> CompiledStage:
    """A lowered Relax function as a compiled stage.

    Args:
        function: takes inputs, then weights; calls kernels by `call_tir` and returns a tuple.
        symbols: the symbol of each kernel, by its global variable.
    """
    return _Reader(symbols).read(function, weights)


class _Reader:
    """Numbers values as they come."""

    def __init__(self, symbols: Mapping[Any, str]) -> None:
        self._symbols = symbols
        self._numbers: dict[Any, tuple[int, ...]] = {}
        """A variable -> the values it stands for; several for a tuple."""
        self._count = 0

    def read(self, function: Any, weights: tuple[StoredArray, ...]) -> CompiledStage:
        for param in function.params:
            self._numbers[param] = self._new(1)
        steps = []
        for block in function.body.blocks:
            for binding in block.bindings:
                step = self._bind(binding.var, binding.value)
                if step is not None:
                    steps.append(step)
        forms = [_form(param.ty) for param in function.params]
        inputs = len(forms) - len(weights)
        return CompiledStage(
            inputs=tuple(forms[:inputs]),
            weights=weights,
            weight_forms=tuple(forms[inputs:]),
            steps=tuple(steps),
            outputs=self._values(function.body.body),
        )

    def _new(self, count: int) -> tuple[int, ...]:
        first, self._count = self._count, self._count + count
        return tuple(range(first, self._count))

    def _values(self, expr: Any) -> tuple[int, ...]:
        if isinstance(expr, relax.Tuple):
            return tuple(number for field in expr.fields for number in self._values(field))
        if isinstance(expr, relax.TupleGetItem):
            return (self._values(expr.tuple_value)[expr.index],)
        return self._numbers[expr]

    def _bind(self, var: Any, value: Any) -> KernelStep | None:
        """The step of a binding; None for one that only gives values another name."""
        if not isinstance(value, relax.Call):
            self._numbers[var] = self._values(value)
            return None
        assert isinstance(value.op, tvm.ir.Op), f"{value.op} is no kernel call"
        if value.op.name == "relax.call_tir":
            results = tuple(_form(ty) for ty in _fields(value.ty_args[0]))
            arguments = tuple(self._argument(argument) for argument in value.args[1].fields)
            step = KernelStep(symbol=self._symbols[value.args[0]], arguments=arguments, results=results)
        else:
            assert value.op.name == "relax.reshape", f"{value.op.name} was not lowered to a kernel"
            step = KernelStep(symbol=_VIEW, arguments=self._values(value.args[0]), results=(_form(var.ty),))
        self._numbers[var] = self._new(len(step.results))
        return step

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, tvm.ir.GenericConst):
            array = argument.value.numpy()
            return ("constant", tuple(array.shape), str(array.dtype), base64.b64encode(array.tobytes()).decode("ascii"))
        if argument in self._numbers:
            (number,) = self._numbers[argument]
            return number
        return ("size", _size(argument))


def _fields(ty: Any) -> list[Any]:
    return list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]


def _form(ty: Any) -> TensorForm:
    return TensorForm(shape=tuple(_size(size) for size in ty.shape), dtype=str(ty.dtype))


def _size(expr: Any) -> Any:
    if isinstance(expr, int | tirx.IntImm):
        return int(expr)
    if isinstance(expr, tirx.Var):
        return "size"  # a program has one size that varies
    kind = type(expr).__name__
    assert kind in _ARITHMETIC, f"a size is made by {kind}: {expr}"
    return (kind, _size(expr.a), _size(expr.b))


# --- to Relax -----------------------------------------------------------------------------------


def emit_stage(builder: Any, stage: CompiledStage, arguments: Sequence[Any], varying: Any) -> list[Any]:
    """Emits a stage's steps on the given inputs and weights; returns its outputs.

    Args:
        varying: the program's varying size, None if it has none.
    """
    values = list(arguments)
    for step in stage.steps:
        types = [tensor_type(form, varying) for form in step.results]
        if step.symbol == _VIEW:
            values.append(builder.emit(relax.op.reshape(values[step.arguments[0]], types[0].shape)))
            continue
        operands = relax.Tuple([_operand(argument, values, varying) for argument in step.arguments])
        result = builder.emit(relax.call_dps_packed(step.symbol, operands, types))
        values += [result] if len(types) == 1 else [builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]
    return [values[number] for number in stage.outputs]


def tensor_type(form: TensorForm, varying: Any) -> Any:
    """The Relax type of a value."""
    return relax.TensorType([_expression(size, varying) for size in form.shape], form.dtype)


def _operand(argument: Any, values: Sequence[Any], varying: Any) -> Any:
    if isinstance(argument, int):
        return values[argument]
    if argument[0] == "size":
        return _expression(argument[1], varying)
    _, shape, dtype, data = argument
    return relax.const(np.frombuffer(base64.b64decode(data), dtype).reshape(shape), dtype)  # else int64 becomes int32


def _expression(size: Any, varying: Any) -> Any:
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        return varying
    kind, left, right = size
    assert kind in _ARITHMETIC
    return getattr(tirx, kind)(
        *(tirx.const(e, "int64") if isinstance(e, int) else e for e in (_expression(s, varying) for s in (left, right)))
    )
