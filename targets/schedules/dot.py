"""One row by a weight of small integers, with a processor's byte dot products.

The row is rounded to 24 bits with a scale per 32 values, x = scale (65536 a + 256 b + c) with signed bytes a, b, c. Products
are exact in integers, so the result is as near as a float32 one (2e-7 seen), while a weight costs three instructions for
64 values instead of a conversion and a multiplication for 16. Rounding the row to 8 bits, as is common, would be cheaper
still where memory is not the limit, but what runs on the device would then not be what was scored.
"""

from typing import Any

from tvm.script import tirx as T

from targets.cpu import Cpu
from targets.layout import K_GROUP, WORD_VALUES
from targets.schedules.blocks import inline_all, output_block
from targets.schedules.weights import WeightSpec

PARALLEL_BYTES = 1 << 16
"""Weights below this are read by one thread, in about the time that it takes to wake another (2 us, two cores at 14 GB/s each)."""
_LANES = {"vnni": (4, 8, 16), "sdot": (4,)}
"""Words in a vector of each kind of instruction."""
_PARTS = 3
"""Bytes of a rounded value, the lowest first."""
_LARGEST = 127 * 65536
"""The largest rounded value; its high byte is at most 127."""
_VALUES = 3
"""The weight's place among what the block reads."""
_INTS = K_GROUP // 4
"""Words of four bytes in a group of the row."""


def can_dot(weight: WeightSpec, cpu: Cpu, shape: tuple[int, ...]) -> bool:
    """Whether the product of x of that shape with the weight is made of byte dot products."""
    return weight.integer and cpu.lanes in _LANES.get(cpu.dot, ()) and len(shape) == 3 and shape[:2] == (1, 1)


def dot_product(weight: WeightSpec, cpu: Cpu) -> Any:
    """The kernel: x (1, 1, columns), values, scales -> (1, 1, tiles * tile), float32."""
    K, tile, L, bits = weight.columns, weight.tile, cpu.lanes, weight.bits
    tiles, vectors, groups = weight.tiles, weight.tile // cpu.lanes, -(-weight.columns // K_GROUP)
    values_shape, scales_shape = weight.shapes
    words = values_shape[1] // groups
    halves = WORD_VALUES["nibbles"] // 4 if bits == 4 else 1
    # What is added to a weight so that the instruction can take it: VNNI wants unsigned weights.
    offset = 8 if bits == 4 else 128 if cpu.dot == "vnni" else 0
    floats, scale_dtype = f"float32x{L}", weight.scale_dtype

    def value(x: Any, k: Any) -> Any:
        return x[0, 0, k] if K % K_GROUP == 0 else T.if_then_else(k < K, x[0, 0, T.min(k, K - 1)], T.float32(0))

    def dot(total: Any, word: Any, half: Any, row: Any) -> Any:
        if bits == 4:
            word = T.shift_right(word, T.broadcast(4 * half, L)) & T.broadcast(T.int32(0x0F0F0F0F), L)
        elif offset:
            word = word ^ T.broadcast(T.int32(-0x7F7F7F80), L)  # every byte from signed to unsigned
        return _byte_dot(cpu, total, word, T.broadcast(row, L))

    def joined(sums: Any, at: Any) -> Any:
        low = T.Cast(floats, sums[1, at] * T.broadcast(T.int32(256), L) + sums[0, at])
        return low + T.Cast(floats, sums[2, at]) * T.broadcast(T.float32(65536), L)

    def group_scale(scales: Any, o: Any, g: Any, at: Any, step: Any) -> Any:
        return T.broadcast(step, L) if bits == 8 else T.Cast(floats, scales[o, g, at]) * T.broadcast(step, L)

    def row_scale(scales: Any, o: Any, at: Any) -> Any:
        return scales[o, 0, at] if bits == 8 else T.broadcast(T.float32(1), L)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x: T.Buffer(_shape(1, 1, K), "float32"),
        values: T.Buffer(_shape(*values_shape), "int32"),
        scales: T.Buffer(_shape(*scales_shape), scale_dtype),
        out: T.Buffer(_shape(1, 1, tiles * tile), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 4})
        row = T.sblock_alloc_buffer((_PARTS, groups * _INTS), "int32")
        step = T.sblock_alloc_buffer((groups,), "float32")
        start = T.sblock_alloc_buffer((_PARTS, groups), "int32")
        with T.sblock("rounded"):
            T.reads(x[0, 0, 0:K])
            T.writes(row[0:_PARTS, 0 : groups * _INTS], step[0:groups], start[0:_PARTS, 0:groups])
            for g in range(groups):
                most = T.alloc_buffer((1,), "float32", scope="local")
                rest = T.alloc_buffer((K_GROUP,), "int32", scope="local")
                byte = T.alloc_buffer((K_GROUP,), "int32", scope="local")
                total = T.alloc_buffer((1,), "int32", scope="local")
                most[0] = T.float32(1e-30)
                for i in range(K_GROUP):
                    most[0] = T.max(most[0], T.abs(value(x, g * K_GROUP + i)))
                step[g] = most[0] * T.float32(1 / _LARGEST)
                for i in range(K_GROUP):
                    rest[i] = T.Cast("int32", T.round(value(x, g * K_GROUP + i) * (T.float32(_LARGEST) / most[0])))
                for p in T.unroll(_PARTS):
                    total[0] = 0
                    for i in range(K_GROUP):
                        byte[i] = ((rest[i] + 128) & 255) - 128
                        rest[i] = (rest[i] - byte[i]) >> 8
                        total[0] = total[0] + byte[i]
                    start[p, g] = total[0] * T.int32(-offset)
                    for j in range(_INTS):
                        row[p, g * _INTS + j] = (
                            (byte[4 * j] & 255) | ((byte[4 * j + 1] & 255) << 8) | ((byte[4 * j + 2] & 255) << 16) | (byte[4 * j + 3] << 24)
                        )
        for o in range(tiles):
            with T.sblock("dot_product"):
                vo = T.axis.spatial(tiles, o)
                T.reads(
                    row[0:_PARTS, 0 : groups * _INTS],
                    step[0:groups],
                    start[0:_PARTS, 0:groups],
                    values[vo, 0 : values_shape[1], 0:tile],
                    scales[vo, 0 : scales_shape[1], 0:tile],
                )
                T.writes(out[0, 0, vo * tile : vo * tile + tile])
                result = T.alloc_buffer((tile,), "float32", scope="local")
                sums = T.alloc_buffer((_PARTS, tile), "int32", scope="local")
                for v in T.unroll(vectors):
                    result[T.ramp(v * L, 1, L)] = T.broadcast(T.float32(0), L)
                for g in range(groups):
                    for p in T.unroll(_PARTS):
                        for v in T.unroll(vectors):
                            sums[p, T.ramp(v * L, 1, L)] = T.broadcast(start[p, g], L)
                    for w in T.unroll(words):
                        for half in T.unroll(halves):
                            for v in T.unroll(vectors):
                                for p in T.unroll(_PARTS):
                                    sums[p, T.ramp(v * L, 1, L)] = dot(
                                        sums[p, T.ramp(v * L, 1, L)],
                                        values[vo, g * words + w, T.ramp(v * L, 1, L)],
                                        half,
                                        row[p, g * _INTS + w * halves + half],
                                    )
                    for v in T.unroll(vectors):
                        result[T.ramp(v * L, 1, L)] = result[T.ramp(v * L, 1, L)] + joined(sums, T.ramp(v * L, 1, L)) * group_scale(
                            scales, vo, g, T.ramp(v * L, 1, L), step[g]
                        )
                for v in T.unroll(vectors):
                    out[0, 0, T.ramp(vo * tile + v * L, 1, L)] = result[T.ramp(v * L, 1, L)] * row_scale(scales, vo, T.ramp(v * L, 1, L))

    return kernel


def schedule_dot_product(sch: Any, cpu: Cpu) -> None:
    """Tiles in parallel, each with its epilogue; the row is rounded once before."""
    product, rounded = sch.get_sblock("dot_product"), sch.get_sblock("rounded")
    out = output_block(sch)
    words, tile = (int(extent.extent) for extent in sch.get(product).reads[_VALUES].region[1:])
    tiles = int(sch.get(sch.get_loops(product)[0]).extent)
    share = sch.parallel if 4 * words * tile * tiles >= PARALLEL_BYTES else lambda loop: None
    if sch.get(out).same_as(sch.get(product)):
        share(sch.get_loops(product)[0])
        return
    inline_all(sch, keep=(product, rounded, out))
    column = sch.get_loops(out)[-1]
    aligned = int(sch.get(column).extent) % tile == 0
    outer, inner = sch.split(column, [None, tile])
    sch.compute_at(product, outer)
    sch.set_scope(product, 0, "local")
    if aligned:
        _, lane = sch.split(inner, [None, cpu.lanes])
        sch.vectorize(lane)
    share(outer)


def _shape(*sizes: int) -> tuple[Any, ...]:
    """Sizes as Relax has them; a kernel with narrower ones would not be fused with what follows."""
    return tuple(T.int64(size) for size in sizes)


def _byte_dot(cpu: Cpu, total: Any, weights: Any, row: Any) -> Any:
    """total + the sum of four byte products, in each 32-bit lane: weights as `cpu.dot` takes them, row signed."""
    L = cpu.lanes
    weights, row = T.reinterpret(f"int8x{4 * L}", weights), T.reinterpret(f"int8x{4 * L}", row)
    if cpu.dot == "vnni":
        return T.call_llvm_pure_intrin(f"int32x{L}", f"llvm.x86.avx512.vpdpbusd.{32 * L}", total, weights, row)
    return T.call_llvm_pure_intrin(f"int32x{L}", f"llvm.aarch64.neon.sdot.v{L}i32.v{4 * L}i8", total, weights, row)
