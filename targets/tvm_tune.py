"""Which small choices of the product kernels are fastest on a device: every variant timed in turn, several times."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from targets.cpu import Cpu, Tuning
from targets.job import READ_SHAPE, VARIANT_SHAPE, row_variant_name, variant_name
from targets.layout import packed_shape
from targets.machine import Memory
from targets.tvm_run import ones
from targets.tvm_session import Session

_ROUNDS = 12
_BUDGET_S = 3.0
"""A device that is slow, or far away, takes fewer rounds."""
_BETTER = 0.97
"""What a variant's time must be of the default's to be taken: a smaller gain is within what times vary by."""


def best_tuning(session: Session, library: str, cpu: Cpu) -> Tuning:
    """The fastest tuning of the kernels that `tvm_probe.compile_variants` made, or the default one."""
    module = session.load(Path(library))
    default = cpu.default_tuning
    tiles = {variant_name(tuning): (tuning, VARIANT_SHAPE) for tuning in cpu.variants()}
    tuning = _fastest(session, module, cpu, tiles, variant_name(default))
    rows = {row_variant_name(row): (row, READ_SHAPE) for row in cpu.row_variants(tuning)}
    return _fastest(session, module, cpu, rows, row_variant_name(tuning))


def _fastest(session: Session, module: Any, cpu: Cpu, variants: dict[str, tuple[Tuning, tuple[int, int, int]]], default: str) -> Tuning:
    device = session.device("cpu")
    memory = Memory(device)
    made: dict[tuple[int, ...], Any] = {}  # by shape: all variants may read the same ones, and results are not looked at

    def arrays(tuning: Tuning, shape: tuple[int, int, int]) -> list[Any]:
        rows, depth, columns = shape
        packed = packed_shape(columns, depth, cpu.lanes * tuning.tile_vectors)
        for size in ((1, rows, depth), packed):
            if size not in made:
                made[size] = ones(module, size, memory)
        return [made[(1, rows, depth)], made[packed], tvm.runtime.empty((1, rows, columns), "float32", device)]

    timers = {name: session.time_kernel(module, name, arrays(*variant), device) for name, variant in variants.items()}
    best: dict[str, float] = {}
    until = time.perf_counter() + _BUDGET_S
    for number in range(_ROUNDS):
        if number and time.perf_counter() > until:
            break
        for name, timer in timers.items():
            if session.is_here:
                timer(1)  # elsewhere each timing begins with an untimed call
            best[name] = min(best.get(name, np.inf), timer(1))
    fastest = min(best, key=lambda name: best[name])
    return variants[fastest if best[fastest] < _BETTER * best[default] else default][0]
