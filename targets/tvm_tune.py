"""Which small choices of the product kernels are fastest on a device: every variant timed in turn, several times."""

import time
from typing import Any

import numpy as np
import tvm

from targets.cpu import Cpu, Tuning
from targets.job import ROW_VARIANT_SHAPE, VARIANT_SHAPE, row_variant_name, variant_name
from targets.layout import packed_shape

_ROUNDS = 12
_BETTER = 0.97
"""What a variant's time must be of the default's to be taken: a smaller gain is within what times vary by."""


def best_tuning(library: str, cpu: Cpu) -> Tuning:
    """The fastest tuning of the kernels that `tvm_probe.compile_variants` made, or the default one."""
    module = tvm.runtime.load_module(library)
    default = cpu.default_tuning
    tiles = {variant_name(tuning): (tuning, VARIANT_SHAPE) for tuning in cpu.variants()}
    tuning = _fastest(module, cpu, tiles, variant_name(default))
    rows = {row_variant_name(row): (row, ROW_VARIANT_SHAPE) for row in cpu.row_variants(tuning)}
    return _fastest(module, cpu, rows, row_variant_name(tuning))


def _fastest(module: Any, cpu: Cpu, variants: dict[str, tuple[Tuning, tuple[int, int, int]]], default: str) -> Tuning:
    best: dict[str, float] = {}
    arrays = {name: _arrays(cpu, tuning, shape) for name, (tuning, shape) in variants.items()}
    for _ in range(_ROUNDS):
        for name in variants:
            run = module[name]
            run(*arrays[name])
            begin = time.perf_counter()
            run(*arrays[name])
            best[name] = min(best.get(name, np.inf), time.perf_counter() - begin)
    fastest = min(best, key=lambda name: best[name])
    return variants[fastest if best[fastest] < _BETTER * best[default] else default][0]


def _arrays(cpu: Cpu, tuning: Tuning, shape: tuple[int, int, int]) -> list[Any]:
    rows, depth, columns = shape
    tile = cpu.lanes * tuning.tile_vectors
    shapes = ((1, rows, depth), packed_shape(columns, depth, tile), (1, rows, columns))
    return [tvm.runtime.tensor(np.ones(size, dtype=np.float32), tvm.cpu()) for size in shapes]
