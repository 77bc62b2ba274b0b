"""Servers that are killed, hang, refuse or come back: a measurement ends measured, or failed with a reason, and none is taken twice."""

import dataclasses
import itertools
import logging
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rpc_helpers import Process, device, free_port, reachable, server, tracker, wait_until

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.link import link_command
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.program import Sample
from targets.rpc import Patience, RpcTarget
from targets.target import TargetError
from targets.tracker import servers
from targets.worker import Worker

SMALL = SLMConfig(vocab_size=61, d_model=32, num_layers=1, num_heads=2, ffn_dim=40, context=16)
TOKENS = RequestTokens(prompt=4, generated=10)
PATIENCE = Patience(absent_s=30.0, busy_s=60.0, answer_s=2.0, pause_s=0.1)
SHORT = Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0, timeout_s=30.0)
LONG = dataclasses.replace(SHORT, repeats=10**6, budget_s=1.0)
"""Long enough to be in the middle of it when something happens."""


@pytest.fixture(scope="module")
def sample() -> Sample:
    return make_sample(SMALL, TOKENS, 0)


@pytest.fixture(scope="module")
def small(local_target: LocalTarget, kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    target = reachable(device(local_target.spec, "rpc", 1), local_target, kernel_cache, PATIENCE)
    yield target.compile(build_program(SMALL, TOKENS), tmp_path_factory.mktemp("small") / "program")
    target.close()


class Devices:
    """Targets that share a tuning, and servers that are ended after the test."""

    def __init__(self, local: LocalTarget, cache: Path, folder: Path) -> None:
        self._local, self._cache, self._folder = local, cache, folder
        self.targets: list[RpcTarget] = []
        self.processes: list[Process] = []

    def server(self, key: str = "", at: Process | None = None) -> Process:
        self.processes.append(server(self._folder, key, at, f"server{len(self.processes)}"))
        return self.processes[-1]

    def tracker(self) -> Process:
        self.processes.append(tracker(self._folder))
        self.processes[-1].wait_until_up()
        return self.processes[-1]

    def target(self, kind: str, port: int, key: str = "", timeout_s: float = 0.0, **patience: Any) -> RpcTarget:
        spec = device(self._local.spec, kind, port, key=key, timeout_s=timeout_s)
        self.targets.append(reachable(spec, self._local, self._cache, dataclasses.replace(PATIENCE, **patience)))
        return self.targets[-1]

    def close(self) -> None:
        for target in self.targets:
            target.close()
        for process in self.processes:
            process.kill()


@pytest.fixture
def devices(local_target: LocalTarget, kernel_cache: Path, tmp_path: Path, small: Path) -> Iterator[Devices]:
    made = Devices(local_target, kernel_cache, tmp_path)
    yield made
    made.close()


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the measurement of each program came to its end, by the program's folder."""
    counts: Counter[str] = Counter()
    original = Worker.call

    def call(self: Worker, function: str, *args: Any, timeout_s: float) -> Any:
        result = original(self, function, *args, timeout_s=timeout_s)
        if "targets.tvm_run:run_job" in args:
            counts[args[-1].artifact] += 1
        return result

    monkeypatch.setattr(Worker, "call", call)
    return counts


def is_complete(measured: Measurement) -> bool:
    return set(measured.times_s) == set(measured.errors) == {"prefill", "decode"}


def in_the_middle(process: Process, before: int) -> bool:
    """Whether the server has loaded the program and then the probe, which is timed beside it."""
    return process.loaded("probe") > before


# --- one device -----------------------------------------------------------------------------------------


def test_a_server_that_is_killed_in_the_middle_and_comes_back(
    devices: Devices, small: Path, sample: Sample, completed: Counter[str]
) -> None:
    process = devices.server()
    target = devices.target("rpc", process.port)
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, sample, LONG)
        wait_until(lambda: in_the_middle(process, 0))
        process.kill()
        process.start()
        assert is_complete(measuring.result(60))
    assert process.served() == 2
    assert completed == {str(small): 1}


def test_a_server_that_hangs_in_the_middle_is_given_up_and_used_again_later(
    devices: Devices, small: Path, sample: Sample, completed: Counter[str]
) -> None:
    process = devices.server()
    target = devices.target("rpc", process.port, timeout_s=6.0)
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, sample, LONG)
        wait_until(lambda: in_the_middle(process, 0))
        stopped = process.sessions()
        process.send(signal.SIGSTOP)
        for pid in stopped:
            process.send_to(pid, signal.SIGSTOP)
        time.sleep(7.0)
        assert not measuring.done()
        process.send(signal.SIGCONT)
        assert is_complete(measuring.result(60))
    assert process.served() == 2
    assert completed == {str(small): 1}


def test_a_server_that_comes_late_is_waited_for(devices: Devices, small: Path, sample: Sample) -> None:
    process = devices.server()
    process.kill()
    target = devices.target("rpc", process.port)
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, sample, SHORT)
        time.sleep(1.0)
        assert not measuring.done()
        process.start()
        assert is_complete(measuring.result(60))


def test_a_server_that_never_comes_fails_with_what_to_do(devices: Devices, small: Path, sample: Sample) -> None:
    target = devices.target("rpc", port := free_port(), absent_s=0.5)
    with pytest.raises(TargetError) as caught:
        target.measure(small, sample, SHORT)
    assert str(caught.value) == (
        f"target 'there': nothing listens at 127.0.0.1:{port}; start the server there (docs/rpc.md), or its SSH tunnel"
    )


def test_a_server_with_another_key_is_not_waited_for(devices: Devices, small: Path, sample: Sample) -> None:
    process = devices.server(key="mine")
    target = devices.target("rpc", process.port, key="yours")
    with pytest.raises(TargetError, match="target 'there': key='yours' is not that of the server; correct its file"):
        target.measure(small, sample, SHORT)
    right = devices.target("rpc", process.port, key="mine")
    assert is_complete(right.measure(small, sample, SHORT))


def test_a_device_in_use_is_waited_for_and_that_is_said_once(
    devices: Devices, small: Path, sample: Sample, caplog: pytest.LogCaptureFixture
) -> None:
    process = devices.server()
    somebody = Worker({"TVM_USE_RUNTIME_LIB": "1"}, without=("torch",))
    process.wait_until_up()
    somebody.call("targets.tvm_rpc:connect", "127.0.0.1", process.port, "", 60.0, 1, (), timeout_s=60)
    impatient = devices.target("rpc", process.port, busy_s=1.0, say_after_s=0.2)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TargetError, match=r"gave no session in 1 s: it is in use, or has stopped serving"),
    ):
        impatient.measure(small, sample, SHORT)
    assert [record.message for record in caplog.records] == [
        f"target 'there': waiting for 127.0.0.1:{process.port}, which is in use (at most 1 s) or not there (at most 30 s)"
    ]
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(devices.target("rpc", process.port).measure, small, sample, SHORT)
        time.sleep(0.5)
        assert not measuring.done()
        somebody.close()
        assert is_complete(measuring.result(60))


def test_a_session_that_its_server_ends_fails_with_a_reason(devices: Devices, small: Path, sample: Sample) -> None:
    process = devices.server()
    target = devices.target("rpc", process.port, timeout_s=20.0, grace_s=-19.0, attempts=2)
    endless = dataclasses.replace(LONG, budget_s=1e9)
    with pytest.raises(TargetError, match="measuring failed in each of 2 sessions on target 'there', the last time: ") as caught:
        target.measure(small, sample, endless)
    assert "\n" not in str(caught.value)
    assert process.served() == 2
    assert is_complete(devices.target("rpc", process.port).measure(small, sample, SHORT))


def test_a_program_that_crashes_its_server_fails_with_a_reason(devices: Devices, small: Path, sample: Sample, tmp_path: Path) -> None:
    """TVM's server ends with the session that it lost; the next one listens nowhere, or is started again."""
    crashing = Path(shutil.copytree(small, tmp_path / "crashing"))
    (library,) = crashing.glob("program-*.so")
    (tmp_path / "crash.c").write_text("#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n")
    subprocess.run([*link_command(), "-shared", "-fPIC", "-o", str(library), str(tmp_path / "crash.c")], check=True)
    process = devices.server()
    target = devices.target("rpc", process.port, absent_s=1.0)
    with pytest.raises(TargetError, match=r"nothing listens at|measuring failed in each of 3 sessions"):
        target.measure(crashing, sample, SHORT)
    process.kill()
    process.start()
    assert is_complete(target.measure(small, sample, SHORT))


def test_what_was_measured_is_kept_when_the_session_does_not_end_well(
    devices: Devices, small: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = devices.server()
    target = devices.target("rpc", process.port)
    original = Worker.call

    def call(self: Worker, function: str, *args: Any, timeout_s: float) -> Any:
        if function == "targets.tvm_rpc:disconnect":
            process.kill()
            return original(self, "child_functions:abort", timeout_s=timeout_s)
        return original(self, function, *args, timeout_s=timeout_s)

    monkeypatch.setattr(Worker, "call", call)
    assert is_complete(target.measure(small, sample, SHORT))


# --- pools -------------------------------------------------------------------------------------------------


def test_another_server_takes_over_from_one_that_hangs(devices: Devices, small: Path, sample: Sample, completed: Counter[str]) -> None:
    """In the middle of a measurement, and before it has answered."""
    desk = devices.tracker()
    pair = [devices.server("pair", desk) for _ in range(2)]
    wait_until(lambda: servers("127.0.0.1", desk.port, "pair") == 2)
    target = devices.target("tracker", desk.port, "pair", timeout_s=5.0)
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, sample, LONG)
        wait_until(lambda: any(in_the_middle(process, 0) for process in pair))
        (hung,) = (process for process in pair if process.served())
        for pid in hung.sessions():
            hung.send_to(pid, signal.SIGSTOP)
        hung.send(signal.SIGSTOP)
        assert is_complete(measuring.result(60))
    assert is_complete(target.measure(small, sample, SHORT))
    assert completed == {str(small): 2}


def test_a_tracker_that_is_started_again_has_its_servers_back(devices: Devices, small: Path, sample: Sample) -> None:
    desk = devices.tracker()
    devices.server("one", desk)
    target = devices.target("tracker", desk.port, "one")
    assert is_complete(target.measure(small, sample, SHORT))
    desk.kill()
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, sample, SHORT)
        time.sleep(0.3)
        assert not measuring.done()
        desk.start()
        assert is_complete(measuring.result(60))


def test_without_servers_or_tracker_one_line_says_so(devices: Devices, small: Path, sample: Sample) -> None:
    desk = devices.tracker()
    target = devices.target("tracker", desk.port, "none", absent_s=0.5)
    with pytest.raises(
        TargetError, match=r"target 'there': no server with key 'none' is registered at the tracker 127\.0\.0\.1:\d+; start one"
    ):
        target.measure(small, sample, SHORT)
    desk.kill()
    with pytest.raises(TargetError, match=r"target 'there': no tracker answers at .*; start one with `python -m tvm.exec.rpc_tracker"):
        target.measure(small, sample, SHORT)


def test_two_pools_of_three_servers_with_one_flapping(
    devices: Devices, small: Path, sample: Sample, tmp_path: Path, completed: Counter[str]
) -> None:
    desk = devices.tracker()
    pools = {key: [devices.server(key, desk) for _ in range(3)] for key in ("left", "right")}
    for key in pools:
        wait_until(lambda key=key: servers("127.0.0.1", desk.port, key) == 3)
    targets = {key: devices.target("tracker", desk.port, key, timeout_s=10.0, attempts=4) for key in pools}
    assert [target.parallel for target in targets.values()] == [3, 3]
    flapping, over = pools["left"][0], threading.Event()

    def flap() -> None:
        while not over.wait(0.7):
            flapping.kill()
            flapping.start()

    programs = [Path(shutil.copytree(small, tmp_path / f"program{number}")) for number in range(16)]
    flapper = threading.Thread(target=flap)
    flapper.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            timing = dataclasses.replace(LONG, budget_s=0.3)
            jobs = {
                program: pool.submit(target.measure, program, sample, timing)
                for program, target in zip(programs, itertools.cycle(targets.values()), strict=False)
            }
            ends = {program: job.exception(120) for program, job in jobs.items()}
    finally:
        over.set()
        flapper.join()
    for program, error in ends.items():
        assert error is None or (isinstance(error, TargetError) and "\n" not in str(error))
        assert completed[str(program)] == (error is None)
    assert sum(error is None for error in ends.values()) >= 12
    assert all(sum(process.served() for process in pool) >= 6 for pool in pools.values())
