"""The null target: the whole flow without hardware, compiler or arithmetic, and the same every time."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Call, Function, Program, Sample, Stage, Step, TensorSpec
from targets.spec import load_spec

SPEC = dataclasses.replace(load_spec("null"), read_bytes_per_s=1e9, flops_per_s=1e10)


def never(*_: Any) -> NoReturn:
    raise AssertionError("the null target must neither export nor write anything")


def program(width: int = 64, layers: int = 2, prompt: int = 5, dtype: str = "float32") -> Program:
    """A stack of square layers with one row of state each; nothing says what it computes."""
    weights = {f"w{i}": TensorSpec(shape=(width, width), dtype=dtype) for i in range(layers)}
    state = {f"s{i}": TensorSpec(shape=(1, "C", width)) for i in range(layers)}
    calls = tuple(Call(stage="layer", inputs=("x",), weights={"w": name}, outputs=("x",)) for name in weights)
    functions = {
        name: Function(name=name, inputs={"x": TensorSpec(shape=(1, rows))} | (state if rows == 1 else {}), calls=calls, outputs=("x",))
        for name, rows in (("prefill", prompt), ("decode", 1))
    }
    return Program(functions=functions, stages={"layer": Stage(key="layer", export=never)}, weights=weights, state=state, bounds={"C": 99})


def sample(rows: int = 10) -> Sample:
    steps = (Step(function="prefill", inputs={}, expected={}), Step(function="decode", inputs={}, expected={}))
    return Sample(write=never, steps=steps, timed={"prefill": ({}, 0), "decode": ({}, rows)})


def measure(folder: Path, rows: int = 10, timing: Timing = Timing(repeats=3), **sizes: Any) -> Measurement:  # noqa: B008
    target = NullTarget(SPEC)
    return target.measure(target.compile(program(**sizes), folder), sample(rows), timing)


def test_times_follow_from_counted_bytes_and_operations(tmp_path: Path) -> None:
    m = measure(tmp_path)
    weight_bytes = 2 * 64 * 64 * 4
    state_bytes = 10 * 2 * 64 * 4
    assert m.times_s["decode"] == pytest.approx((1e-6 + (weight_bytes + state_bytes) / 1e9,) * 3)
    # Five rows through 8192 weights are 81,920 operations: 8.2 us at 10 GFLOP/s, less than the 33 us of reading.
    assert m.times_s["prefill"] == pytest.approx((1e-6 + weight_bytes / 1e9,) * 3)
    assert m.packed_bytes == weight_bytes
    assert m.errors == {"prefill": 0.0, "decode": 0.0}
    assert m.measured_peak_bytes is None
    assert m.device == "null"


def test_a_long_prefill_takes_the_time_of_its_operations(tmp_path: Path) -> None:
    m = measure(tmp_path, prompt=100)
    assert m.median_s("prefill") == pytest.approx(1e-6 + 2 * 100 * 2 * 64 * 64 / 1e10)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("int8", 8), ("int4", 4)])
def test_smaller_values_are_read_faster_and_computed_no_faster(tmp_path: Path, dtype: str, bits: int) -> None:
    full, fewer = (measure(tmp_path / name, rows=0, prompt=100, dtype=name) for name in ("float32", dtype))
    assert fewer.packed_bytes == full.packed_bytes * bits // 32
    assert fewer.median_s("decode") - 1e-6 == pytest.approx((full.median_s("decode") - 1e-6) * bits / 32)
    assert fewer.median_s("prefill") == full.median_s("prefill")


def test_the_same_program_takes_the_same_time_and_is_never_noisy(tmp_path: Path) -> None:
    first, second = measure(tmp_path / "a"), measure(tmp_path / "b")
    assert first == second
    assert first.noisy == ()
    assert (tmp_path / "a" / "null.json").read_bytes() == (tmp_path / "b" / "null.json").read_bytes()


@pytest.mark.parametrize(("size", "more"), [("width", 65), ("layers", 3)])
def test_more_work_takes_longer(tmp_path: Path, size: str, more: int) -> None:
    small, large = measure(tmp_path / "a"), measure(tmp_path / "b", **{size: more})
    for function in ("prefill", "decode"):
        assert large.median_s(function) > small.median_s(function)


def test_more_cached_rows_take_longer_in_decode_alone(tmp_path: Path) -> None:
    few, many = measure(tmp_path / "a", rows=10), measure(tmp_path / "b", rows=11)
    assert many.median_s("decode") > few.median_s("decode")
    assert many.median_s("prefill") == few.median_s("prefill")


def test_weights_used_twice_are_stored_once_and_read_twice(tmp_path: Path) -> None:
    once = program(layers=1)
    calls = once.functions["decode"].calls * 2
    twice = dataclasses.replace(once, functions={"decode": dataclasses.replace(once.functions["decode"], calls=calls)})
    target = NullTarget(SPEC)
    only_decode = dataclasses.replace(sample(0), timed={"decode": ({}, 0)})
    times = [target.measure(target.compile(p, tmp_path / str(i)), only_decode, Timing()) for i, p in enumerate((once, twice))]
    assert times[0].packed_bytes == times[1].packed_bytes == 64 * 64 * 4
    assert times[1].median_s("decode") - 1e-6 == pytest.approx(2 * (times[0].median_s("decode") - 1e-6))


def test_the_null_target_loads_neither_torch_nor_tvm() -> None:
    code = "import sys; from targets.target import load_target; load_target('null'); print({'torch', 'tvm', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()"
