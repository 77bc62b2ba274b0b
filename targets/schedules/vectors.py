"""A small vocabulary for kernels written as loops over SIMD vectors of a chosen width.

A vector of one lane is a scalar, so a kernel is written once for every width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script import builder as T

LOWEST = -3.0e38
"""Stands for minus infinity where a difference of two of them must not become NaN."""
LOG2_E = math.log2(math.e)
_OPAQUE = 8  # TVM's OpPatternKind
LINE_VALUES = 16
"""float32 values that a cache line holds on most processors; where it holds more, some hints are for what is there already."""
_SECOND_LEVEL = 2  # how llvm.prefetch names it
# 2^f on [-1/2, 1/2] with the smallest relative error for p(0) = 1 (9.1e-8 before rounding; iterated weighted least squares).
_EXP2 = (1.0, 0.693146977598716, 0.2402224208463514, 0.055507337435745104, 0.009671512688146153, 0.0013264727246973848)


def vector_type(kind: str, lanes: int) -> str:
    """The type's name: "float32", "float32x16"."""
    return kind if lanes == 1 else f"{kind}x{lanes}"


def splat(value: Any, lanes: int) -> Any:
    """A value in every lane; Python numbers become float32 or int32."""
    if isinstance(value, float):
        value = T.float32(value)
    elif isinstance(value, int):
        value = T.int32(value)
    return value if lanes == 1 else T.Broadcast(value, lanes)


def load(buffer: Any, at: Any, lanes: int) -> Any:
    """`lanes` values of a flat buffer from `at` on."""
    return buffer[_index(at, lanes)]


def store(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    """Writes `lanes` values to a flat buffer from `at` on."""
    T.buffer_store(buffer, value, [_index(at, lanes)])


def add(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    """Adds to `lanes` values of a flat buffer."""
    store(buffer, at, load(buffer, at, lanes) + value, lanes)


def fill(buffer: Any, count: int, value: float, lanes: int) -> None:
    """Sets `count` vectors from the start of a flat buffer."""
    with T.serial(count) as i:
        store(buffer, i * lanes, splat(value, lanes), lanes)


def _index(at: Any, lanes: int) -> Any:
    return at if lanes == 1 else T.Ramp(at, 1, lanes)


def local(size: int, kind: str = "float32") -> Any:
    """A flat buffer of a task's own. What is only ever reached by constant indices ends up in registers."""
    return T.alloc_buffer((size,), kind, scope="local", layout=None)


def begin_kernel(name: str, **shapes: tuple[Any, ...]) -> list[Any]:
    """Names a function written as loops and gives its float32 arguments, in order, as flat buffers."""
    T.func_name(name)
    buffers = [T.arg(name, T.buffer(shape, "float32", layout=None)) for name, shape in shapes.items()]
    # Arguments never overlap, there is nothing to schedule, and nothing is to be fused into it.
    T.func_attr({"tirx.noalias": True, "edgewise.scheduled": True, "op_pattern": _OPAQUE})
    sizes = [math.prod(shape) for shape in shapes.values()]
    return [T.decl_buffer((size,), "float32", data=b.data, layout=None) for b, size in zip(buffers, sizes, strict=True)]


def common_lanes(width: int, lanes: int) -> int:
    """The widest vector, of at most `lanes`, that divides a row of `width`."""
    return math.gcd(width, lanes)


def interleaved(a: Any, b: Any, lanes: int) -> tuple[Any, Any]:
    """(a0 b0 a1 b1 ...) of the first halves, and of the second."""
    low = [lane for i in range(lanes // 2) for lane in (i, lanes + i)]
    return _shuffled([a, b], low), _shuffled([a, b], [lane + lanes // 2 for lane in low])


def _shuffled(vectors: list[Any], lanes: Sequence[int]) -> Any:
    return T.Bind(T.Shuffle(vectors, [T.int32(lane) for lane in lanes]))


def transposed(rows: Sequence[Any]) -> list[Any]:
    """As many vectors as lanes, transposed: log2(lanes) rounds that interleave the two halves of the rows."""
    half, result = len(rows) // 2, list(rows)
    for _ in range(len(rows).bit_length() - 1):
        pairs = zip(result[:half], result[half:], strict=True)
        result = [vector for a, b in pairs for vector in interleaved(a, b, 2 * half)]
    return result


def sums(vectors: Sequence[Any]) -> Any:
    """One vector whose lane i is the sum over vector i; there are as many vectors as lanes."""
    lanes, result = len(vectors), list(vectors)
    while len(result) > 1:
        half = len(result) // 2
        pairs = [interleaved(a, b, lanes) for a, b in zip(result[:half], result[half:], strict=True)]
        result = [T.Bind(low + high) for low, high in pairs]
    return result[0]


def reduced(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes combined, by halves."""
    while lanes > 1:
        lanes //= 2
        vector = T.Bind(combine(_shuffled([vector], range(lanes)), _shuffled([vector], range(lanes, 2 * lanes))))
    return vector


def exp2(x: Any, lanes: int) -> Any:
    """2^x for x <= 0; below 2^-126 it stays there. Relative error below 2e-7.

    2^x = 2^n 2^f with n the nearest integer, whose power is made by setting an exponent's bits.
    """
    x = T.Bind(T.max(x, splat(-126.0, lanes)))
    n = T.Bind(T.floor(x + splat(0.5, lanes)))
    f = T.Bind(x - n)
    power = splat(_EXP2[-1], lanes)
    for coefficient in reversed(_EXP2[:-1]):
        power = power * f + splat(coefficient, lanes)
    exponent = T.shift_left(T.Cast(vector_type("int32", lanes), n) + splat(127, lanes), splat(23, lanes))
    return T.Bind(power * T.reinterpret(vector_type("float32", lanes), exponent))


def prefetch(buffer: Any, at: Any, width: int) -> None:
    """Asks for `width` values from `at` on; see `hint`."""
    for line in range(0, width, LINE_VALUES):
        T.evaluate(hint(T.address_of(buffer[at + line])))


def hint(address: Any) -> Any:
    """A call that asks for a cache line, into the second-level cache: the first has too few places for misses under way."""
    return T.call_llvm_intrin("void", "llvm.prefetch.p0", address, T.int32(0), T.int32(_SECOND_LEVEL), T.int32(1))
