"""Profiles as they are taken: a clock that costs nothing, and every kernel call under its operator."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tvm

from cost_models.measured import make_sample
from cost_models.profile import COMPONENTS
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.job import MANIFEST
from targets.link import link_command
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.tvm_profile import compile_clock

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=32)
TOKENS = RequestTokens(prompt=6, generated=10)


@pytest.fixture(scope="module")
def artifact(local_target: LocalTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_target.compile(build_program(CONFIG, TOKENS), tmp_path_factory.mktemp("profile") / "program")


@pytest.fixture(scope="module")
def measured(local_target: LocalTarget, artifact: Path, quick: Timing) -> Measurement:
    return local_target.measure(artifact, make_sample(CONFIG, TOKENS, 0), quick)


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_calls_belong_to_the_parts_of_the_model_in_order(artifact: Path, function: str) -> None:
    calls = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))["operators"][function]
    operators = [operator for _, operator in calls]
    assert {"embedding", "attention", "ffn", "head"} <= set(operators) <= set(COMPONENTS)
    assert (operators[0], operators[-1]) == ("embedding", "head")
    assert operators.index("attention") < operators.index("ffn")
    # Two layers: from one to the other the calls go back to attention once, and embedding and head are entered once.
    entered = [b for a, b in zip(["", *operators], operators, strict=False) if a != b and b != "norm"]
    within = [b for a, b in zip(["", *entered], entered, strict=False) if a != b]
    assert within == ["embedding", "attention", "ffn", "attention", "ffn", "head"]


def test_a_measurement_has_the_seconds_of_every_operator(measured: Measurement) -> None:
    assert measured.profile is not None
    assert measured.profile.keys() == measured.times_s.keys() == {"prefill", "decode"}
    for operators in measured.profile.values():
        assert {"embedding", "attention", "ffn", "head"} <= operators.keys() <= COMPONENTS.keys()
        assert all(0 < seconds < 1 for seconds in operators.values())


def test_a_profile_survives_being_written_down(measured: Measurement) -> None:
    values = json.loads(json.dumps(measured.to_dict()))
    assert Measurement.from_dict(values) == measured
    del values["profile"]
    assert Measurement.from_dict(values).profile is None


def test_a_manifest_that_does_not_fit_the_program_gives_no_profile_and_the_same_times(
    local_target: LocalTarget, artifact: Path, tmp_path: Path, quick: Timing
) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "program"))
    manifest = json.loads((other / MANIFEST).read_text(encoding="utf-8"))
    calls = manifest["operators"]["decode"]
    calls[0], calls[-1] = calls[-1], calls[0]
    (other / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    found = local_target.measure(other, make_sample(CONFIG, TOKENS, 0), quick)
    assert found.profile is None
    assert set(found.times_s) == {"prefill", "decode"}


# --- the clock ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> tvm.runtime.Module:
    folder = tmp_path_factory.mktemp("clock")
    library = folder / "clock.so"
    subprocess.run([*link_command(), "-shared", "-o", str(library), str(compile_clock(folder))], check=True)
    return tvm.runtime.load_module(str(library))


def test_the_clock_notes_the_time_of_every_call(clock: tvm.runtime.Module) -> None:
    tick, record = clock["edgewise_tick"], clock["edgewise_record"]
    times_ns = np.zeros(6, np.int64)
    record(times_ns.ctypes.data, len(times_ns))
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    answers = [tick("any", i, 1.5, None, times_ns.shape) for i in range(6)]
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert record(0, 0) == 6
    assert answers == [0] * 6  # anything else would change what the VM does
    assert before <= times_ns[0]
    assert times_ns[-1] <= after
    assert (np.diff(times_ns) >= 0).all()


def test_the_clock_keeps_to_the_room_it_has_and_counts_on(clock: tvm.runtime.Module) -> None:
    tick, record = clock["edgewise_tick"], clock["edgewise_record"]
    times_ns = np.full(4, -1, np.int64)
    record(times_ns.ctypes.data, 2)
    for _ in range(3):
        tick()
    assert record(0, 0) == 3
    assert (times_ns[:2] > 0).all()
    assert (times_ns[2:] == -1).all()
    tick()  # nobody listens: nothing is written anywhere
    assert record(0, 0) == 1


def test_a_clock_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("targets.tvm_profile._CLOCK", "int broken(")
    with pytest.raises(RuntimeError, match="compiling the profiler's clock failed: ") as caught:
        compile_clock(tmp_path)
    assert "\n" not in str(caught.value)
