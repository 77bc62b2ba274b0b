"""Which operator a kernel call belongs to, on functions made by hand: what the kernels are called must not matter."""

from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform

from targets.layout import Layout, StoredArray
from targets.program import Call, Function
from targets.tvm_operators import OTHER, call_operators, weight_uses

VECTOR = relax.TensorType((4,), "float32")
MATRIX = relax.TensorType((4, 4), "float32")
HALF = relax.TensorType((4, 4), "float16")


class Line:
    """A function of `x` and a tuple of weights, whose kernels are named 0, 1, 2 … in the order they are called."""

    def __init__(self, *weights: Any) -> None:
        self.x = relax.Var("x", VECTOR)
        self.pack = relax.Var("weights", relax.TupleType(list(weights)))
        self.builder = relax.BlockBuilder()
        self.calls = 0

    def planned(self, body: Any) -> Any:
        """The function as the compiler leaves it: results last, in tensors that are allocated and reused."""
        with self.builder.function("f", [self.x, self.pack]):
            with self.builder.dataflow():
                result = self.builder.emit_output(relax.Tuple(body(self)))
            self.builder.emit_func_output(result)
        lowering = [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
        ]
        return tvm.transform.Sequential(lowering)(self.builder.finalize())["f"]

    def weight(self, place: int) -> Any:
        return self.builder.emit(relax.TupleGetItem(self.pack, place))

    def call(self, *arguments: Any, results: int = 1) -> Any:
        out = self.builder.emit(relax.call_dps_packed(str(self.calls), relax.Tuple(list(arguments)), [VECTOR] * results))
        self.calls += 1
        return out if results == 1 else [self.builder.emit(relax.TupleGetItem(out, i)) for i in range(results)]

    def view(self, value: Any) -> Any:
        return self.builder.emit(relax.op.reshape(value, (2, 2)))


def operators(line: Line, uses: dict[int, list[str]], body: Any) -> list[str]:
    found = call_operators(line.planned(body), uses)
    assert [symbol for symbol, _ in found] == [str(i) for i in range(len(found))]
    return [operator for _, operator in found]


def test_a_call_belongs_to_what_its_result_is_read_by_if_it_reads_no_weight() -> None:
    def body(line: Line) -> list[Any]:
        q = line.call(line.x, line.weight(0))
        turned = line.call(line.view(q))
        scores = line.call(turned, line.x)
        out = line.call(line.call(scores), line.weight(0))
        hidden = line.call(out, line.weight(1))
        return [line.call(line.call(hidden), line.weight(1))]

    assert operators(Line(MATRIX, MATRIX), {0: ["a"], 1: ["b"]}, body) == ["a", "a", "a", "a", "a", "b", "b", "b"]


def test_the_nearest_reader_decides() -> None:
    def body(line: Line) -> list[Any]:
        shared = line.call(line.x)
        first = line.call(shared, line.weight(1))
        return [line.call(shared, first, line.weight(0))]

    assert operators(Line(MATRIX, MATRIX), {0: ["far"], 1: ["near"]}, body) == ["near", "near", "far"]


def test_what_only_the_caller_reads_belongs_to_what_it_came_from() -> None:
    def body(line: Line) -> list[Any]:
        early = line.call(line.x, line.weight(0))
        late = line.call(early, line.weight(1))
        return [line.call(early, late), line.call(line.x)]

    assert operators(Line(MATRIX, MATRIX), {0: ["early"], 1: ["late"]}, body) == ["early", "late", "late", OTHER]


def test_of_several_weights_the_one_of_most_bytes_decides() -> None:
    def body(line: Line) -> list[Any]:
        return [line.call(line.x, line.weight(0), line.weight(1), line.weight(2))]

    assert operators(Line(VECTOR, MATRIX, HALF), {0: ["norm"], 1: ["ffn"], 2: ["half"]}, body) == ["ffn"]


def test_a_call_may_give_several_results() -> None:
    def body(line: Line) -> list[Any]:
        left, right = line.call(line.x, results=2)
        return [line.call(left), line.call(right, line.weight(0))]

    # The second result is what the weight's call reads; the first goes to a call that only the caller reads from.
    assert operators(Line(MATRIX), {0: ["a"]}, body) == ["a", "a", "a"]


def test_memory_that_is_used_again_does_not_join_calls() -> None:
    def body(line: Line) -> list[Any]:
        value = line.call(line.x, line.weight(0))
        for _ in range(4):
            value = line.call(value, line.weight(1))
        return [line.call(value, line.weight(0))]

    line = Line(MATRIX, MATRIX)
    assert operators(line, {0: ["ends"], 1: ["middle"]}, body) == ["ends", *["middle"] * 4, "ends"]


def test_one_table_serves_two_operators_by_turns() -> None:
    def body(line: Line) -> list[Any]:
        x = line.call(line.x, line.weight(0))
        return [line.call(line.call(x, line.weight(1)), line.weight(0))]

    assert operators(Line(MATRIX, MATRIX), {0: ["embedding", "head"], 1: ["ffn"]}, body) == ["embedding", "ffn", "head"]


def test_uses_come_in_the_order_of_the_calls_and_apart_by_layout() -> None:
    plain, packed = Layout(), Layout(tile=16)
    calls = (
        Call(stage="first", inputs=("x",), weights={"table": "shared"}, outputs=("y",), operators={"table": "embedding"}),
        Call(stage="second", inputs=("y",), weights={"w": "shared", "b": "bias"}, outputs=("z",), operators={"w": "head"}),
    )
    function = Function(name="f", inputs={}, calls=calls, outputs=("z",))

    def stored(name: str, layout: Layout = plain) -> StoredArray:
        return StoredArray(names=(name,), layout=layout)

    weights = [stored("shared"), stored("shared", packed), stored("bias")]
    same = {"first": [stored("table")], "second": [stored("w"), stored("b")]}
    assert weight_uses(function, same, weights) == {0: ["embedding", "head"], 2: [OTHER]}
    apart = {"first": [stored("table")], "second": [stored("w", packed), stored("b")]}
    assert weight_uses(function, apart, weights) == {0: ["embedding"], 1: ["head"], 2: [OTHER]}
