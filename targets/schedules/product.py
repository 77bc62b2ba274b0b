"""Matrix products: packed weights (`packed_product`) and activations by activations (`product`)."""

from typing import Any

from targets.cpu import Cpu
from targets.schedules.blocks import block_handles, inline_all, int_or_none, output_block
from targets.schedules.prefetch import mark, mark_ahead

_FEW_TILES = 16
"""Column tiles a core has, from which on a last uneven one costs little."""
PARALLEL_FLOPS = 1 << 17
"""Products below this many operations run on one thread: waking the others costs more."""
PREFETCH_BYTES = 1 << 20
"""Weights of float32 below this stay in the caches from one use to the next, and fetching them ahead is no gain."""


def schedule_packed_product(sch: Any, cpu: Cpu) -> None:
    """Register tiles of `tile_rows` x `tile_columns` over a packed weight, the epilogue taken along.

    Weight tiles are the outer, parallel loop, so each is fetched from memory once; rows come inside.
    A last, smaller row tile is split off by loop partitioning instead of being guarded in the inner loop.
    """
    product = sch.get_sblock("packed_product")
    unpacked = next((block for block in block_handles(sch) if sch.get(block).name_hint == "unpacked"), None)
    out = _epilogue(sch, product, keep=() if unpacked is None else (unpacked,))
    *lead, n = sch.get_loops(out)
    m = lead[0] if len(lead) == 1 else sch.fuse(*lead)
    rows, columns = int_or_none(sch.get(m).extent), int_or_none(sch.get(n).extent)
    assert rows is not None and columns is not None, "packed products have static shapes"
    depth = int_or_none(sch.get(sch.get_loops(product)[-1]).extent)
    assert depth is not None
    tuning, tiles = cpu.tuning, -(-columns // cpu.tile_columns)
    tile_rows = min(rows, tuning.tile_rows)
    # All of a word's values, so that which one is meant is known where it is taken out.
    in_words = any(str(region.source.dtype) == "int32" for region in sch.get(product).reads)
    at_once = _row_tiles(tiles, cpu, cpu.registers // (4 if in_words else 2)) if rows == 1 else 1
    m_outer, m_inner = sch.split(m, [None, tile_rows])
    n_outer, n_inner = sch.split(n, [None, cpu.tile_columns * at_once])
    sch.reorder(n_outer, m_outer, m_inner, n_inner)
    sch.compute_at(product, m_outer, preserve_unit_loops=True)
    if unpacked is not None:
        _schedule_unpacked(sch, unpacked, n_outer, cpu)
    *_, row, column, k = sch.get_loops(product)
    unroll = 8 if in_words else tuning.row_unroll if rows == 1 else tuning.unroll
    k_outer, k_inner = sch.split(k, [None, next(u for u in (unroll, 4, 2, 1) if depth % u == 0)])
    vector, lane = sch.split(column, [None, cpu.lanes])
    sch.reorder(k_outer, k_inner, row, vector, lane)
    sch.vectorize(lane)
    for loop in (vector, row, k_inner):
        sch.unroll(loop)
    if columns % cpu.tile_columns == 0:
        out_vector, out_lane = sch.split(n_inner, [None, cpu.lanes])
        sch.vectorize(out_lane)
        sch.unroll(out_vector)
    if rows % tile_rows:
        sch.annotate(m_outer, "pragma_loop_partition_hint", 1)
    is_large = unpacked is None and not in_words and 4 * columns * depth >= PREFETCH_BYTES
    if rows <= tile_rows and is_large and tuning.row_ahead_bytes:
        mark_ahead(sch, k_outer, max(1, tuning.row_ahead_bytes // (4 * cpu.tile_columns)))
    if 2 * rows * columns * depth >= PARALLEL_FLOPS:
        # Few tiles that do not share out evenly: rows are shared, too.
        uneven = tiles % cpu.cores and tiles < _FEW_TILES * cpu.cores
        shares_rows = uneven and unpacked is None and rows % tile_rows == 0
        if rows > tile_rows and is_large and not shares_rows:
            mark(sch, n_outer, m_outer, k_outer)
        sch.parallel(sch.fuse(n_outer, m_outer) if shares_rows else n_outer)
    init = sch.decompose_reduction(product, k_outer)
    *_, init_row, init_vector, init_lane = sch.get_loops(init)
    sch.vectorize(init_lane)
    sch.unroll(init_vector)
    sch.unroll(init_row)


def _row_tiles(tiles: int, cpu: Cpu, accumulators: int) -> int:
    """Tiles that a single row takes at once: as tuned, or another number with which cores have equal shares and registers suffice."""
    if cpu.tuning.row_tiles == 1:
        return 1
    for at_once in (cpu.tuning.row_tiles, 4, 3, 2):
        chunks, fits = tiles // at_once, at_once * cpu.tuning.tile_vectors <= accumulators
        if fits and tiles % at_once == 0 and (chunks % cpu.cores == 0 or chunks >= _FEW_TILES * cpu.cores):
            return at_once
    return 1


def _schedule_unpacked(sch: Any, unpacked: Any, tile: Any, cpu: Cpu) -> None:
    """A tile of the weight made float32 beside the rows that use it, a group of k at a time, so that scales stay in registers."""
    sch.compute_at(unpacked, tile, preserve_unit_loops=True)
    sch.set_scope(unpacked, 0, "local")
    *_, k, lane = sch.get_loops(unpacked)
    vector, lane = sch.split(lane, [None, cpu.lanes])
    depth = int_or_none(sch.get(k).extent)
    assert depth is not None
    k_outer, k_inner = sch.split(k, [None, next(u for u in (8, 4, 2, 1) if depth % u == 0)])
    sch.reorder(k_outer, k_inner, vector, lane)
    for loop in (vector, k_inner):
        sch.unroll(loop)
    sch.vectorize(lane)


def schedule_product(sch: Any, cpu: Cpu) -> None:
    """A batched product whose second operand is read in place, through whatever view it is.

    Some vectors of a row of outputs are kept in registers while k runs outside; rows of all batches run in parallel.
    """
    product = sch.get_sblock("product")
    depth = int_or_none(sch.get(sch.get_loops(product)[-1]).extent)
    out = _epilogue(sch, product)
    *lead, n = sch.get_loops(out)
    row = sch.fuse(*lead)
    rows, columns = int_or_none(sch.get(row).extent), int_or_none(sch.get(n).extent)
    assert rows is not None and columns is not None and depth is not None, "products have static shapes"
    width = next((v * cpu.lanes for v in (8, 4, 2, 1) if columns % (v * cpu.lanes) == 0), columns)
    n_outer, n_inner = sch.split(n, [None, width])
    sch.compute_at(product, n_outer, preserve_unit_loops=True)
    *_, column, k = sch.get_loops(product)
    sch.reorder(k, column)
    vectorised = width % cpu.lanes == 0
    if vectorised:
        vector, lane = sch.split(column, [None, cpu.lanes])
        sch.vectorize(lane)
        sch.unroll(vector)
        sch.vectorize(sch.split(n_inner, [None, cpu.lanes])[1])
    if 2 * rows * columns * depth >= PARALLEL_FLOPS:
        sch.parallel(sch.fuse(row, n_outer))
    init = sch.decompose_reduction(product, k)
    if vectorised:
        *_, vector, lane = sch.get_loops(init)
        sch.vectorize(lane)
        sch.unroll(vector)


def _epilogue(sch: Any, product: Any, keep: tuple[Any, ...] = ()) -> Any:
    """Inlines everything after the product into one output block; gives the product a local result."""
    out = output_block(sch)
    if sch.get(out).same_as(sch.get(product)):
        sch.cache_write(product, 0, "local")
        return output_block(sch)
    inline_all(sch, keep=(product, out, *keep))
    sch.set_scope(product, 0, "local")
    return out
