"""Which operator each kernel call of a compiled function belongs to.

A planned function is a straight line of kernel calls. What a kernel is called and how many operations it fuses is the
compiler's business, so nothing here depends on it: a call belongs to the operator of the weights it reads, as the program
names them (`Call.operators`), or else to that of the calls it feeds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax

from targets.layout import StoredArray
from targets.program import Function

OTHER = "other"
"""The operator of calls that neither read a weight with an operator nor touch such a call."""

Uses = Mapping[int, Sequence[str]]
"""By place in the tuple of weights: the operators that use it, in the order of the function's calls."""


def weight_uses(function: Function, stages: Mapping[str, Sequence[StoredArray]], weights: Sequence[StoredArray]) -> dict[int, list[str]]:
    """The operators that use each weight of a function.

    One weight may serve two: a table is gathered from by the first call of a function and multiplied by in the last.

    Args:
        stages: its weights by the stage's own names, by stage.
        weights: the tuple that the compiled function takes.
    """
    places = {weight: place for place, weight in enumerate(weights)}
    uses: dict[int, list[str]] = defaultdict(list)
    for call in function.calls:
        for weight in stages[call.stage]:
            uses[places[weight.renamed(call.weights)]].append(call.operators.get(weight.names[0], OTHER))
    return uses


def call_operators(function: Any, uses: Uses) -> list[tuple[str, str]]:
    """(symbol, operator) of each kernel call of a planned Relax function, in the order they run.

    A call that reads several weights belongs to the one of most bytes. One that reads none belongs with the nearest call
    that reads what it writes, and, if only the caller does, with the nearest one that wrote what it reads.

    Args:
        function: calls kernels by symbol, results last, in tensors allocated before; its last argument is the tuple of weights.
        uses: see `weight_uses`.
    """
    graph = _Graph(function, uses)
    found: list[str | None] = [max(read, key=lambda pair: pair[0])[1] if read else None for read in graph.weights]
    for call in reversed(range(len(found))):
        found[call] = found[call] or _first(found, sorted(graph.readers[call]))
    for call in range(len(found)):
        found[call] = found[call] or _first(found, sorted(graph.writers[call], reverse=True))
    return [(symbol, operator or OTHER) for symbol, operator in zip(graph.symbols, found, strict=True)]


def _first(found: Sequence[str | None], calls: Iterable[int]) -> str | None:
    return next((operator for call in calls if (operator := found[call]) is not None), None)


class _Graph:
    """The kernel calls of a function: which weights each reads, and which calls it reads from."""

    def __init__(self, function: Any, uses: Uses) -> None:
        self.symbols: list[str] = []
        self.weights: list[list[tuple[int, str]]] = []
        """Bytes and operator of each weight that a call reads."""
        self.readers: dict[int, set[int]] = defaultdict(set)
        self.writers: dict[int, set[int]] = defaultdict(set)
        self._pack, self._uses = function.params[-1], uses
        self._taken: dict[int, int] = defaultdict(int)
        self._weight: dict[Any, tuple[int, str]] = {}
        self._same: dict[Any, Any] = {}
        """Views and names -> the tensor they are of."""
        self._fields: dict[Any, list[Any]] = {}
        """The results of a call that has several."""
        self._writer: dict[Any, int] = {}
        self._fresh: set[Any] = set()
        for block in function.body.blocks:
            for binding in block.bindings:
                self._bind(binding.var, binding.value)

    def _bind(self, var: Any, value: Any) -> None:
        if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(self._pack):
            self._weight[var] = _bytes(var.ty), self._operator(value.index)
        elif isinstance(value, relax.Tuple):
            self._fields[var] = [self._root(field) for field in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            self._same[var] = self._fields[self._root(value.tuple_value)][value.index]
        elif isinstance(value, relax.Var):
            self._same[var] = self._root(value)
        elif isinstance(value, relax.Call) and isinstance(value.op, relax.ExternFunc):
            self._call(str(value.op.global_symbol), value.args)
        elif isinstance(value, relax.Call) and isinstance(value.op, ir.Op):
            if value.op.name in ("relax.memory.alloc_tensor", "relax.builtin.alloc_tensor"):
                self._fresh.add(var)
            elif value.args and isinstance(value.args[0], relax.Var):
                self._same[var] = self._root(value.args[0])

    def _operator(self, place: int) -> str:
        """The operator of this reading of a weight: functions read weights in the order of their calls."""
        operators, nth = self._uses[place], self._taken[place]
        self._taken[place] += 1
        return operators[min(nth, len(operators) - 1)]

    def _root(self, var: Any) -> Any:
        return self._same.get(var, var)

    def _call(self, symbol: str, args: Iterable[Any]) -> None:
        call = len(self.symbols)
        self.symbols.append(symbol)
        roots = [self._root(arg) for arg in args if isinstance(arg, relax.Var)]
        self.weights.append([self._weight[root] for root in roots if root in self._weight])
        for root in roots:
            if root in self._writer:
                self.readers[self._writer[root]].add(call)
                self.writers[call].add(self._writer[root])
        # A tensor that nothing has written yet can only be a result.
        for root in roots:
            if root in self._fresh:
                self._fresh.remove(root)
                self._writer[root] = call


def _bytes(tensor: Any) -> int:
    return math.prod(int(size) for size in tensor.shape) * np.dtype(str(tensor.dtype)).itemsize
