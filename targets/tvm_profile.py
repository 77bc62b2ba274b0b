"""Where the time of a call goes: seconds in the kernels of each operator, by a clock read between the VM's instructions.

Runs in the measuring worker, on a program that has been timed. The clock is a few lines of C, compiled into the probe: read
from Python it would take longer than a small kernel, and the reading would be counted as the kernel's.
"""

import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from targets.link import link_command

_CLOCK = r"""
#include <stdint.h>
#include <time.h>

/* TVM's packed values (TVMFFIAny in tvm/ffi/c_api.h) as far as whole numbers go: kind 1. */
typedef struct { int32_t kind; uint32_t padding; int64_t value; } Packed;

static int64_t *times_ns, room, used;

static int give(Packed *result, int64_t value) {
  result->kind = 1;
  result->padding = 0;
  result->value = value;
  return 0;
}

/* Called before and after every instruction: notes the time and asks for nothing (0). */
int __tvm_ffi_edgewise_tick(void *self, const Packed *args, int32_t count, Packed *result) {
  if (used < room) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    times_ns[used] = now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
  }
  ++used;
  return give(result, 0);
}

/* (address, count): where the next times go, and how many fit; gives how many were noted since it was last asked. */
int __tvm_ffi_edgewise_record(void *self, const Packed *args, int32_t count, Packed *result) {
  int64_t noted = used;
  times_ns = (int64_t *)(intptr_t)args[0].value;
  room = args[1].value;
  used = 0;
  return give(result, noted);
}
"""

_SKIP = 1
"""What an instrument answers to have an instruction left out (VMInstrumentReturnKind in TVM's vm.h)."""
_MOST_RUNS = 30


def compile_clock(folder: Path) -> Path:
    """Compiles the clock for this machine into an object file in `folder`, to be linked into the probe.

    Raises:
        RuntimeError: if there is no C compiler, or it fails.
    """
    source, made = folder / "clock.c", folder / "clock.o"
    source.write_text(_CLOCK, encoding="utf-8")
    done = subprocess.run(
        [*link_command(), "-O2", "-fPIC", "-c", str(source), "-o", str(made)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"compiling the profiler's clock failed: {' '.join(done.stderr.split())[-300:] or done.returncode}")
    return made


def take_profile(
    machine: Any,
    calls: Mapping[str, tuple[str, Sequence[Any]]],
    operators: Mapping[str, Sequence[Sequence[str]]],
    probe: Path,
    budget_s: float,
) -> dict[str, dict[str, float]]:
    """Seconds that one run of each function spends in the kernels of each operator.

    Of every kernel call the median over the runs is taken; an operator's seconds are the sum over its calls. What the VM does
    between them, a clock's two readings included, is nobody's. The machine's instrument stays set: time before, not after.

    Args:
        calls: a function and its arguments, by name.
        operators: (symbol, operator) of the kernel calls of each function, in the order they run (`tvm_operators`).
        probe: the library that holds the clock.
        budget_s: seconds to run for, shared evenly; every function runs at least once.
    """
    clock = tvm.runtime.load_module(str(probe))
    found = {}
    for name, (function, arguments) in calls.items():
        is_kernel = _kernel_instructions(machine, function, arguments, operators[function])
        machine.set_instrument(clock["edgewise_tick"])
        times_ns = _times_ns(machine[function], arguments, clock["edgewise_record"], len(is_kernel), budget_s / len(calls))
        found[name] = _by_operator(times_ns[:, is_kernel], operators[function])
    return found


def _kernel_instructions(machine: Any, function: str, arguments: Sequence[Any], operators: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """For each instruction of a run whether it is a kernel call; the kernels are left out of this run."""
    symbols = {symbol for symbol, _ in operators}
    names: list[str] = []

    def note(_: Any, name: str, is_before: bool, *__: Any) -> int:
        if is_before:
            names.append(name)
        return _SKIP if name in symbols else 0

    machine.set_instrument(note)
    machine[function](*arguments)
    expected = [symbol for symbol, _ in operators]
    assert [name for name in names if name in symbols] == expected, f"{function} does not run the kernels that its manifest lists"
    return np.array([name in symbols for name in names])


def _times_ns(run: Any, arguments: Sequence[Any], record: Any, instructions: int, budget_s: float) -> NDArray[np.int64]:
    """Nanoseconds of each instruction (columns) in each run (rows).

    The first run finds the caches as another function left them: it counts only if there is no time for a second.
    """
    noted = np.ones(2 * instructions, np.int64)
    rows: list[NDArray[np.int64]] = []
    until = time.perf_counter() + budget_s
    while not rows or (len(rows) <= _MOST_RUNS and time.perf_counter() < until):
        record(noted.ctypes.data, len(noted))
        run(*arguments)
        readings = record(0, 0)
        assert readings == len(noted), f"{readings / 2} instructions ran, not {instructions}"
        rows.append(noted[1::2] - noted[::2])
    return np.stack(rows[1:] or rows)


def _by_operator(times_ns: NDArray[np.int64], operators: Sequence[Sequence[str]]) -> dict[str, float]:
    """Sums the medians of each column (one a kernel call) by operator, in seconds."""
    totals: dict[str, float] = defaultdict(float)
    for (_, operator), median_ns in zip(operators, np.median(times_ns, axis=0), strict=True):
        totals[operator] += 1e-9 * float(median_ns)
    return dict(totals)
