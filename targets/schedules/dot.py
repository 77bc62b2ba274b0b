"""One row by a weight of small integers, with a processor's byte dot products.

The row is rounded to 24 bits with a scale per 32 values, x = scale (65536 a + 256 b + c) with signed bytes a, b, c. Products
are exact in integers, so the result is as near as a float32 one (2e-7 seen), while a weight costs three instructions for
64 values instead of a conversion and a multiplication for 16. Rounding the row to 8 bits, as is common, would be cheaper
still where memory is not the limit, but what runs on the device would then not be what was scored.

x86 processors without instructions for four byte products have those for two. The sum of two products of a byte by half a byte
is below 4096 in size, so the eight such sums of a group fit into 16 bits, and are widened once. Of bytes by bytes they do not: int8
is multiplied in 16 bits, x = scale (65536 a + b) with 16 bits for b, in place of three bytes.
"""

from typing import Any

from tvm.script import tirx as T

from targets.cpu import Cpu
from targets.layout import K_GROUP, WORD_VALUES
from targets.schedules.blocks import inline_all, output_block
from targets.schedules.weights import WeightSpec

PARALLEL_BYTES = 1 << 16
"""Weights below this are read by one thread, in about the time that it takes to wake another (2 us, two cores at 14 GB/s each)."""
_LANES = {"vnni": (4, 8, 16), "madd": (4, 8, 16), "sdot": (4,)}
"""Words in a vector of each kind of instruction."""
_LARGEST = 127 * 65536
"""The largest rounded value; its high byte is at most 127."""
_VALUES = 3
"""The weight's place among what the block reads."""


def can_dot(weight: WeightSpec, cpu: Cpu, shape: tuple[int, ...]) -> bool:
    """Whether the product of x of that shape with the weight is made of byte dot products."""
    return weight.integer and cpu.lanes in _LANES.get(cpu.dot, ()) and len(shape) == 3 and shape[:2] == (1, 1)


def dot_product(weight: WeightSpec, cpu: Cpu) -> Any:
    """The kernel: x (1, 1, columns), values, scales -> (1, 1, tiles * tile), float32."""
    K, tile, L, bits = weight.columns, weight.tile, cpu.lanes, weight.bits
    in_pairs = cpu.dot == "madd"
    part_bits = 16 if in_pairs and bits == 8 else 8
    parts = 2 if part_bits == 16 else 3  # of a rounded value, the lowest first
    ints = K_GROUP * part_bits // 32  # words of a part of a group of the row
    short = in_pairs and bits == 4
    sum_lanes, sum_dtype = (2 * L, "int16") if short else (L, "int32")
    tiles, vectors, groups = weight.tiles, weight.tile // cpu.lanes, -(-weight.columns // K_GROUP)
    values_shape, scales_shape = weight.shapes
    words = values_shape[1] // groups
    halves = WORD_VALUES["nibbles"] // 4 if bits == 4 else 1
    # What is added to a weight so that the instruction can take it: VNNI wants unsigned weights.
    offset = 8 if bits == 4 else 128 if cpu.dot == "vnni" else 0
    floats, scale_dtype = f"float32x{L}", weight.scale_dtype

    def value(x: Any, k: Any) -> Any:
        return x[0, 0, k] if K % K_GROUP == 0 else T.if_then_else(k < K, x[0, 0, T.min(k, K - 1)], T.float32(0))

    def dot(total: Any, word: Any, half: Any, row: Any, p: Any, at: Any) -> Any:
        if bits == 4:
            word = T.shift_right(word, T.broadcast(4 * half, L)) & T.broadcast(T.int32(0x0F0F0F0F), L)
        elif in_pairs:
            return _short_dot(L, total, word, T.broadcast(row[p, 2 * at], L), T.broadcast(row[p, 2 * at + 1], L))
        elif offset:
            word = word ^ T.broadcast(T.int32(-0x7F7F7F80), L)  # every byte from signed to unsigned
        return (_pair_dot if in_pairs else _byte_dot)(cpu, total, word, T.broadcast(row[p, at], L))

    def summed(sums: Any, v: Any, p: Any, start: Any) -> Any:
        """The sums of a part of a group, whose offset is only now added where it would not fit before."""
        found = sums[p, T.ramp(v * sum_lanes, 1, sum_lanes)]
        return _add_pairs(L, found, T.broadcast(T.int32(0x00010001), L)) + T.broadcast(start, L) if short else found

    def joined(sums: Any, v: Any, start: Any, g: Any) -> Any:
        *low, high = [summed(sums, v, p, start[p, g]) for p in range(parts)]
        lowest = low[0] if len(low) == 1 else low[1] * T.broadcast(T.int32(256), L) + low[0]
        return T.Cast(floats, lowest) + T.Cast(floats, high) * T.broadcast(T.float32(65536), L)

    def begun(start: Any) -> Any:
        return T.broadcast(T.int16(0), sum_lanes) if short else T.broadcast(start, L)

    def word(part: Any, j: Any) -> Any:
        """Word j of a part of a group, as the weights' words meet it: four bytes, or of four values two, the even or the odd ones."""
        if part_bits == 8:
            return (part[4 * j] & 255) | ((part[4 * j + 1] & 255) << 8) | ((part[4 * j + 2] & 255) << 16) | (part[4 * j + 3] << 24)
        first = j // 2 * 4 + j % 2
        return (part[first] & 65535) | (part[first + 2] << 16)

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
        row = T.sblock_alloc_buffer((parts, groups * ints), "int32")
        step = T.sblock_alloc_buffer((groups,), "float32")
        start = T.sblock_alloc_buffer((parts, groups), "int32")
        with T.sblock("rounded"):
            T.reads(x[0, 0, 0:K])
            T.writes(row[0:parts, 0 : groups * ints], step[0:groups], start[0:parts, 0:groups])
            for g in range(groups):
                most = T.alloc_buffer((1,), "float32", scope="local")
                rest = T.alloc_buffer((K_GROUP,), "int32", scope="local")
                part = T.alloc_buffer((K_GROUP,), "int32", scope="local")
                total = T.alloc_buffer((1,), "int32", scope="local")
                most[0] = T.float32(1e-30)
                for i in range(K_GROUP):
                    most[0] = T.max(most[0], T.abs(value(x, g * K_GROUP + i)))
                step[g] = most[0] * T.float32(1 / _LARGEST)
                for i in range(K_GROUP):
                    rest[i] = T.Cast("int32", T.nearbyint(value(x, g * K_GROUP + i) * (T.float32(_LARGEST) / most[0])))
                for p in T.unroll(parts):
                    total[0] = 0
                    for i in range(K_GROUP):
                        part[i] = ((rest[i] + T.int32(1 << (part_bits - 1))) & T.int32((1 << part_bits) - 1)) - T.int32(
                            1 << (part_bits - 1)
                        )
                        rest[i] = (rest[i] - part[i]) >> part_bits
                        total[0] = total[0] + part[i]
                    start[p, g] = total[0] * T.int32(-offset)
                    for j in range(ints):
                        row[p, g * ints + j] = word(part, j)
        for o in range(tiles):
            with T.sblock("dot_product"):
                vo = T.axis.spatial(tiles, o)
                T.reads(
                    row[0:parts, 0 : groups * ints],
                    step[0:groups],
                    start[0:parts, 0:groups],
                    values[vo, 0 : values_shape[1], 0:tile],
                    scales[vo, 0 : scales_shape[1], 0:tile],
                )
                T.writes(out[0, 0, vo * tile : vo * tile + tile])
                result = T.alloc_buffer((tile,), "float32", scope="local")
                sums = T.alloc_buffer((parts, vectors * sum_lanes), sum_dtype, scope="local")
                for v in T.unroll(vectors):
                    result[T.ramp(v * L, 1, L)] = T.broadcast(T.float32(0), L)
                for g in range(groups):
                    for p in T.unroll(parts):
                        for v in T.unroll(vectors):
                            sums[p, T.ramp(v * sum_lanes, 1, sum_lanes)] = begun(start[p, g])
                    for w in T.unroll(words):
                        for half in T.unroll(halves):
                            for v in T.unroll(vectors):
                                for p in T.unroll(parts):
                                    sums[p, T.ramp(v * sum_lanes, 1, sum_lanes)] = dot(
                                        sums[p, T.ramp(v * sum_lanes, 1, sum_lanes)],
                                        values[vo, g * words + w, T.ramp(v * L, 1, L)],
                                        half,
                                        row,
                                        p,
                                        (g * words + w) * halves + half,
                                    )
                    for v in T.unroll(vectors):
                        result[T.ramp(v * L, 1, L)] = result[T.ramp(v * L, 1, L)] + joined(sums, v, start, g) * group_scale(
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


_BYTE_PAIRS = {4: "llvm.x86.ssse3.pmadd.ub.sw.128", 8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
_SHORT_PAIRS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _pair_dot(cpu: Cpu, total: Any, weights: Any, row: Any) -> Any:
    """total + the sum of two byte products, in each 16-bit lane: weights unsigned, row signed."""
    L = cpu.lanes
    weights, row = T.reinterpret(f"int8x{4 * L}", weights), T.reinterpret(f"int8x{4 * L}", row)
    return total + T.call_llvm_pure_intrin(f"int16x{2 * L}", _BYTE_PAIRS[L], weights, row)


def _short_dot(L: int, total: Any, word: Any, even: Any, odd: Any) -> Any:
    """total + the sum of four products of signed bytes of a word by 16-bit values, in each 32-bit lane."""
    shorts, eight = T.reinterpret(f"int16x{2 * L}", word), T.broadcast(T.int16(8), 2 * L)
    total = total + _add_pairs(L, T.shift_right(T.shift_left(shorts, eight), eight), even)
    return total + _add_pairs(L, T.shift_right(shorts, eight), odd)


def _add_pairs(L: int, weights: Any, row: Any) -> Any:
    """The sum of two products of signed 16-bit values, in each 32-bit lane."""
    weights, row = T.reinterpret(f"int16x{2 * L}", weights), T.reinterpret(f"int16x{2 * L}", row)
    return T.call_llvm_pure_intrin(f"int32x{L}", _SHORT_PAIRS[L], weights, row)
