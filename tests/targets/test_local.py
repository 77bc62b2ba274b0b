"""This machine as a target: found out about once, and no failure of a program outlives its trial."""

import dataclasses
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from child_functions import Exports

import targets.local
from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.workload import RequestTokens
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.program import Program, Stage
from targets.quiet import working
from targets.spec import DeviceSpec, InvalidDevice, load_spec
from targets.target import TargetError
from targets.worker import Worker

MIB = 1 << 20
SMALL = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=32)
TOKENS = RequestTokens(prompt=6, generated=10)
LARGE = SLMConfig(
    vocab_size=4000, d_model=256, num_layers=8, attention="gqa", num_heads=8, num_kv_heads=4, ffn_dim=1024, context=128,
    tie_embeddings=False,
)  # fmt: skip
LARGE_TOKENS = RequestTokens(prompt=64, generated=32)


@pytest.fixture(scope="module")
def small(local_target: LocalTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_target.compile(build_program(SMALL, TOKENS), tmp_path_factory.mktemp("small") / "program")


@pytest.fixture(scope="module")
def large(local_target: LocalTarget, tmp_path_factory: pytest.TempPathFactory, quick: Timing) -> Measurement:
    artifact = local_target.compile(build_program(LARGE, LARGE_TOKENS), tmp_path_factory.mktemp("large") / "program")
    return local_target.measure(artifact, make_sample(LARGE, LARGE_TOKENS, 0), quick)


# --- what the machine is ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTarget]:
    """This machine with nothing declared, and a cache of its own."""
    target = LocalTarget(load_spec("local"), tmp_path_factory.mktemp("found") / "cache")
    yield target
    target.close()


@pytest.fixture(scope="module")
def found_out(finder: LocalTarget) -> tuple[DeviceSpec, Path]:
    """What was found out, and the cache it left behind."""
    return finder.spec, finder._compiler.cache


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":")[1].split())
    return set()


def test_the_processor_is_detected(found_out: tuple[DeviceSpec, Path]) -> None:
    spec, _ = found_out
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    assert spec.triple is not None
    assert spec.triple.split("-")[0] == machine
    assert spec.cpu
    assert spec.cores == len(os.sched_getaffinity(0))
    assert 1 << 28 < spec.memory_bytes < 1 << 46
    flags = cpu_flags()
    expected = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16
    assert spec.vector_bytes == expected


def test_ceilings_are_those_of_some_real_machine(found_out: tuple[DeviceSpec, Path]) -> None:
    spec, _ = found_out
    assert 1e8 < spec.flops_per_s < 1e14
    assert 1e8 < spec.read_bytes_per_s < 1e13


def test_the_best_rates_of_any_session_are_kept(found_out: tuple[DeviceSpec, Path], tmp_path: Path) -> None:
    spec, cache = found_out
    mine = Path(shutil.copytree(cache, tmp_path / "cache"))
    (kept,) = mine.glob("ceilings-*.json")
    assert json.loads(kept.read_text()) == {"flops_per_s": spec.flops_per_s, "read_bytes_per_s": spec.read_bytes_per_s}
    kept.write_text('{"flops_per_s": 123.0, "read_bytes_per_s": 1e15}')
    target = LocalTarget(load_spec("local"), mine)
    assert target.spec.flops_per_s > 1e8  # taken while the machine was busy, say: a better one replaces it
    assert target.spec.read_bytes_per_s == 1e15
    assert json.loads(kept.read_text())["flops_per_s"] == target.spec.flops_per_s
    target.close()


@pytest.mark.parametrize("damage", ["{", "[]", '{"flops_per_s": "fast"}'], ids=["cut", "list", "word"])
def test_a_damaged_record_is_made_again(damage: str, finder: LocalTarget, found_out: tuple[DeviceSpec, Path]) -> None:
    spec, cache = found_out
    (kept,) = cache.glob("ceilings-*.json")
    before, seen = kept.read_text(), {"flops_per_s": 3.0, "read_bytes_per_s": 5.0}
    try:
        kept.write_text(damage)
        assert finder._best(spec, seen) == json.loads(kept.read_text()) == seen
    finally:
        kept.write_text(before)


def test_a_cache_from_another_machine_does_not_say_what_this_one_is(found_out: tuple[DeviceSpec, Path], tmp_path: Path) -> None:
    spec, cache = found_out
    mine = Path(shutil.copytree(cache, tmp_path / "cache"))
    for path in [path for what in ("ceilings", "probe", "tuning") for path in mine.glob(f"{what}*-tvm*")]:
        path.rename(path.with_name(path.name.replace(str(spec.cpu), "another-cpu")))
    target = LocalTarget(load_spec("local"), mine)
    assert target.spec.cpu == spec.cpu
    assert len(list(mine.glob(f"probe*{spec.cpu}*"))) == len(list(mine.glob(f"tuning*{spec.cpu}*"))) == 1
    target.close()


def test_what_the_device_file_declares_is_taken_as_it_is(found_out: tuple[DeviceSpec, Path]) -> None:
    _, cache = found_out
    declared = dataclasses.replace(load_spec("local"), cores=1, vector_bytes=16, memory_bytes=10**9, flops_per_s=5.0, read_bytes_per_s=7.0)
    target = LocalTarget(declared, cache)
    spec = target.spec
    assert (spec.cores, spec.vector_bytes, spec.memory_bytes, spec.flops_per_s, spec.read_bytes_per_s) == (1, 16, 10**9, 5.0, 7.0)
    assert target.cpu.vector_bytes == 16
    target.close()


def test_without_a_cache_folder_nothing_is_left_behind(local_spec: DeviceSpec) -> None:
    target = LocalTarget(local_spec)
    folder = target._compiler.cache
    assert target.spec.triple
    assert folder.exists()
    target.close()
    assert not folder.exists()


# --- failures -----------------------------------------------------------------------------------


def sabotaged(export: Exports) -> Program:
    program = build_program(SMALL, TOKENS)
    key = next(iter(program.stages))
    return dataclasses.replace(program, stages=program.stages | {key: Stage(key=key, export=export)})


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (Exports("abort"), "compiling failed: the process was ended by SIGABRT"),
        (Exports("segfault"), "compiling failed: the process was ended by SIGSEGV"),
        (Exports("fail", "no such\noperator"), "compiling failed: ValueError: no such operator"),
    ],
    ids=["abort", "segfault", "raise"],
)
def test_a_compile_that_fails_costs_one_program(
    export: Exports, message: str, local_target: LocalTarget, tmp_path: Path, quick: Timing
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        local_target.compile(sabotaged(export), tmp_path / "bad")
    assert "\n" not in str(caught.value)
    artifact = local_target.compile(build_program(SMALL, TOKENS), tmp_path / "good")
    assert local_target.measure(artifact, make_sample(SMALL, TOKENS, 0), quick).errors["decode"] < 1e-4


def test_a_compile_that_hangs_ends_at_its_time_limit(local_target: LocalTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.host_compiler.COMPILE_TIMEOUT_S", 1.0)
    with pytest.raises(TargetError, match="compiling failed: no answer within 1 s"):
        local_target.compile(sabotaged(Exports("hang")), tmp_path / "bad")


def test_closing_ends_a_compile_that_another_thread_waits_for(local_spec: DeviceSpec, kernel_cache: Path, tmp_path: Path) -> None:
    target = LocalTarget(local_spec, kernel_cache)
    assert target.spec.cpu
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(target.compile, sabotaged(Exports("hang")), tmp_path / "bad")
        while not (tmp_path / "bad").exists():  # until the worker is at it
            assert not compiling.done()
            time.sleep(0.01)
        child = target._compiler._worker._child
        assert child is not None
        worker = child.pid
        target.close()
        with pytest.raises(TargetError, match="compiling failed: the process was ended by SIGKILL"):
            compiling.result()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_program_is_timed_only_when_other_work_has_stopped(
    local_target: LocalTarget, small: Path, quick: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while another thread works; its own work, of which measuring is a part, is let go of meanwhile."""
    at_work, times = threading.Event(), [0.0, 0.0]

    def work() -> None:
        with working():
            at_work.set()
            time.sleep(0.2)
            times[0] = time.monotonic()

    def ask(worker: Worker, *args: Any, **kwargs: Any) -> Any:
        if "targets.tvm_run:run_job" in args:
            times[1] = time.monotonic()
        return original(worker, *args, **kwargs)

    original = targets.local.ask
    monkeypatch.setattr("targets.local.ask", ask)
    other = threading.Thread(target=work)
    other.start()
    assert at_work.wait(30)
    with working():
        local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick)
    other.join()
    assert 0 < times[0] <= times[1]


def test_a_program_that_runs_too_long_is_ended_and_the_next_one_runs(local_target: LocalTarget, small: Path, quick: Timing) -> None:
    endless = Timing(repeats=10**9, min_repeat_s=0.01, budget_s=1e9, timeout_s=4.0)
    with pytest.raises(TargetError, match="measuring failed: no answer within 4 s"):
        local_target.measure(small, make_sample(SMALL, TOKENS, 0), endless)
    assert local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick).attempts == 1


def test_a_damaged_library_costs_one_program(local_target: LocalTarget, small: Path, tmp_path: Path, quick: Timing) -> None:
    broken = Path(shutil.copytree(small, tmp_path / "broken"))
    (library,) = broken.glob("program-*.so")
    library.write_bytes(library.read_bytes()[:1000])
    with pytest.raises(TargetError, match="measuring failed"):
        local_target.measure(broken, make_sample(SMALL, TOKENS, 0), quick)
    assert local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick).attempts == 1


def test_measuring_leaves_only_the_program_in_its_folder(local_target: LocalTarget, small: Path, quick: Timing) -> None:
    before = sorted(p.name for p in small.parent.rglob("*"))
    local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick)
    assert sorted(p.name for p in small.parent.rglob("*")) == before


# --- what is measured ---------------------------------------------------------------------------


def test_raw_times_are_kept_one_for_each_repeat(local_target: LocalTarget, small: Path) -> None:
    timing = Timing(repeats=7, min_repeat_s=0.0, warmup_s=0.0, retries=0)
    found = local_target.measure(small, make_sample(SMALL, TOKENS, 0), timing)
    assert set(found.times_s) == {"prefill", "decode"}
    for times in (*found.times_s.values(), found.reference_s):
        assert len(times) == 7
        assert all(0 < t < 10 for t in times)
    assert found.device == "local"
    assert found.attempts == 1
    assert found.quiet is True


def test_a_used_up_budget_still_takes_five_times(local_target: LocalTarget, small: Path) -> None:
    timing = Timing(repeats=50, min_repeat_s=0.0, warmup_s=0.0, budget_s=0.0, retries=0)
    found = local_target.measure(small, make_sample(SMALL, TOKENS, 0), timing)
    assert {len(times) for times in found.times_s.values()} == {5}


def test_a_noisy_timing_is_taken_again_at_most_as_often_as_asked(local_target: LocalTarget, small: Path) -> None:
    timing = Timing(repeats=5, min_repeat_s=0.0, warmup_s=0.0, retries=2)
    found = local_target.measure(small, make_sample(SMALL, TOKENS, 0), timing)
    assert 1 <= found.attempts <= 3
    assert found.attempts == 3 or not found.noisy


def test_packed_weights_of_a_model_are_little_larger_than_the_weights(large: Measurement) -> None:
    """Both phases use one packed copy, rows are padded to whole tiles only, and the rotary table is among them."""
    program = build_program(LARGE, LARGE_TOKENS)
    assert 9e6 < params(LARGE) < 12e6
    assert program.weight_bytes <= large.packed_bytes <= 1.02 * program.weight_bytes


def test_peak_memory_is_the_weights_and_little_more(large: Measurement) -> None:
    if large.measured_peak_bytes is None:
        pytest.skip("this system does not tell a process how much memory it holds")
    assert large.packed_bytes <= large.measured_peak_bytes < 1.2 * large.packed_bytes + 8 * MIB


def test_workspace_is_counted_for_each_function(large: Measurement) -> None:
    residual_bytes = LARGE_TOKENS.prompt * LARGE.d_model * 4
    assert set(large.workspace_bytes) == {"prefill", "decode"}
    assert residual_bytes <= large.workspace_bytes["prefill"] < 40 * residual_bytes
    assert LARGE.vocab_size * 4 <= large.workspace_bytes["decode"] < large.workspace_bytes["prefill"]


def test_tied_weights_are_kept_once(local_target: LocalTarget, small: Path, quick: Timing) -> None:
    """Rows are gathered from the same packed array that the output layer multiplies with."""
    found = local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick)
    manifest: dict[str, Any] = json.loads((small / "manifest.json").read_text())
    names = [name for joined, _ in manifest["weights"] for name in joined]
    assert len(names) == len(set(names)) == len(build_program(SMALL, TOKENS).weights)
    # Tables are padded to whole tiles, and nothing else is added.
    assert 0 <= found.packed_bytes - build_program(SMALL, TOKENS).weight_bytes < 4 * 64 * SMALL.d_model * len(names)


def test_a_tuning_is_found_once_and_kept(found_out: tuple[DeviceSpec, Path], tmp_path: Path) -> None:
    """What is kept is taken without trying again, unless it is nothing that would have been tried."""
    _, cache = found_out
    mine = Path(shutil.copytree(cache, tmp_path / "cache"))
    target = LocalTarget(load_spec("local"), mine)
    (path,) = mine.glob(f"tuning-*-{target.spec.cores}x{target.spec.vector_bytes}-*.json")
    cpu = dataclasses.replace(target.cpu, tuned=None)
    assert json.loads(path.read_text()) == dataclasses.asdict(target.cpu.tuning)
    target.close()
    other = next(row for tuning in cpu.variants() for row in cpu.row_variants(tuning) if row != target.cpu.tuning)
    path.write_text(json.dumps(dataclasses.asdict(other)))
    target = LocalTarget(load_spec("local"), mine)
    assert target.cpu.tuning == other
    target.close()
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(other, tile_rows=1000))))
    target = LocalTarget(load_spec("local"), mine)
    assert target.cpu.tuning in [row for tuning in cpu.variants() for row in cpu.row_variants(tuning)]
    target.close()


def test_the_measuring_process_holds_no_other_threads_than_tvms(local_target: LocalTarget, small: Path, quick: Timing) -> None:
    local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick)
    ask = local_target._runner.call
    assert ask("child_functions:loaded", "tvm", "torch", "optuna", "scipy", "pandas", timeout_s=30) == ["tvm"]
    assert ask("child_functions:libraries", "libtorch", "libtvm_compiler", timeout_s=30) == []
    assert ask("child_functions:environment", "TVM_NUM_THREADS", timeout_s=30) == str(local_target.spec.cores)


def test_the_measuring_process_keeps_to_the_processors_it_is_given(
    local_target: LocalTarget, kernel_cache: Path, small: Path, quick: Timing
) -> None:
    chosen = max(os.sched_getaffinity(0))
    target = LocalTarget(dataclasses.replace(local_target.spec, affinity=(chosen,)), kernel_cache)
    assert target.measure(small, make_sample(SMALL, TOKENS, 0), quick).errors["decode"] < 1e-4
    assert target._runner.call("child_functions:thread_processors", timeout_s=30) == {frozenset({chosen})}
    target.close()


def test_processors_that_are_not_there_are_refused(local_spec: DeviceSpec) -> None:
    with pytest.raises(InvalidDevice, match=r"target 'local': affinity=\[4095\] is not among \[0.*choose from those"):
        LocalTarget(dataclasses.replace(local_spec, affinity=(4095,)))


def test_a_device_rests_before_each_measurement(
    local_target: LocalTarget, small: Path, quick: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr("targets.local.sleep", rests.append)
    monkeypatch.setattr(local_target, "_declared", dataclasses.replace(local_target._declared, cooldown_s=7.0))
    local_target.measure(small, make_sample(SMALL, TOKENS, 0), quick)
    assert rests == [7.0]


def test_a_second_compile_of_the_same_program_is_the_same_program(local_target: LocalTarget, small: Path, tmp_path: Path) -> None:
    again = local_target.compile(build_program(SMALL, TOKENS), tmp_path / "again")
    assert (again / "manifest.json").read_bytes() == (small / "manifest.json").read_bytes()
