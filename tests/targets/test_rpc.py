"""A device on another machine: TVM's own server, here on the loopback address, measured like this machine."""

import dataclasses
import os
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rpc_helpers import Process, device, ending, free_port, listens, reachable, server, tracker, wait_until

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.program import Sample
from targets.rpc import Patience, RpcTarget
from targets.spec import DeviceSpec, InvalidDevice
from targets.target import Target, TargetError
from targets.tracker import TrackerError, request, servers
from targets.worker import Worker

SMALL = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=32)
TOKENS = RequestTokens(prompt=6, generated=10)
PATIENCE = Patience(absent_s=60.0, busy_s=60.0, pause_s=0.2)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = server(tmp_path_factory.mktemp("server"))
    with ending(process):
        yield process


@pytest.fixture(scope="module")
def there(serving: Process, local_target: LocalTarget, kernel_cache: Path) -> Iterator[RpcTarget]:
    """This machine's processor behind a server, found out about in full but for its ceilings."""
    target = RpcTarget(device(local_target.spec, "rpc", serving.port, memory_bytes=0), kernel_cache, PATIENCE)
    yield target
    target.close()


@pytest.fixture(scope="module")
def small(there: RpcTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return there.compile(build_program(SMALL, TOKENS), tmp_path_factory.mktemp("small") / "program")


@pytest.fixture(scope="module")
def measured(there: RpcTarget, small: Path) -> Measurement:
    timing = Timing(repeats=7, min_repeat_s=0.001, warmup_s=0.0, retries=0)
    return there.measure(small, make_sample(SMALL, TOKENS, 0), timing)


# --- what is measured ---------------------------------------------------------------------------


def test_a_program_is_checked_and_timed_there(measured: Measurement) -> None:
    assert measured.device == "there"
    assert set(measured.times_s) == set(measured.errors) == {"prefill", "decode"}
    assert all(error < 1e-4 for error in measured.errors.values())
    for times in (*measured.times_s.values(), measured.reference_s):
        assert len(times) == 7
        assert all(0 < t < 10 for t in times)


def test_what_cannot_be_told_from_afar_is_not_said(measured: Measurement) -> None:
    assert measured.measured_peak_bytes is None
    assert measured.profile is None
    assert measured.quiet is None


def test_counts_are_those_of_a_local_measurement(
    local_target: LocalTarget, serving: Process, kernel_cache: Path, quick: Timing, tmp_path: Path
) -> None:
    there = reachable(device(local_target.spec, "rpc", serving.port), local_target, kernel_cache, PATIENCE)
    made = there.compile(build_program(SMALL, TOKENS), tmp_path / "program")
    far, near = (target.measure(made, make_sample(SMALL, TOKENS, 0), quick) for target in (there, local_target))
    there.close()
    assert far.packed_bytes == near.packed_bytes
    assert far.workspace_bytes == near.workspace_bytes
    assert far.errors == near.errors


def test_the_device_tells_its_memory_and_is_tuned(there: RpcTarget) -> None:
    assert there.spec.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert there.cpu.tuned is not None
    assert there.cpu.tuned in [row for tuning in there.cpu.variants() for row in there.cpu.row_variants(tuning)]
    assert list(there._compiler.cache.glob("tuning-*.json")), "it is kept"


def test_ceilings_are_measured_there(there: RpcTarget) -> None:
    unknown = dataclasses.replace(there.spec, flops_per_s=0.0, read_bytes_per_s=0.0)
    target = RpcTarget(unknown, there._compiler.cache, PATIENCE)
    assert 1e8 < target.spec.flops_per_s < 1e14
    assert 1e8 < target.spec.read_bytes_per_s < 1e13
    assert target.spec.cores == there.spec.cores
    target.close()


def test_a_wrong_number_is_the_programs_failure_and_not_tried_again(there: RpcTarget, small: Path, serving: Process, quick: Timing) -> None:
    sample = make_sample(SMALL, TOKENS, 0)
    other = make_sample(SMALL, TOKENS, 1)
    swapped = Sample(write=other.write, steps=sample.steps, timed=sample.timed, tolerance=0.0)
    before = serving.served()
    with pytest.raises(TargetError, match=r"measuring failed: CheckFailed: step 0 \(prefill\): output .* differs from PyTorch's") as caught:
        there.measure(small, swapped, quick)
    assert "\n" not in str(caught.value)
    assert serving.served() == before + 1


def test_this_machine_is_not_kept_quiet_meanwhile(there: RpcTarget, small: Path, quick: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("measuring elsewhere takes this machine for itself")

    monkeypatch.setattr("targets.quiet._Place.take_alone", refuse)
    assert there.measure(small, make_sample(SMALL, TOKENS, 0), quick).errors


def test_the_parent_never_imports_tvm_for_it() -> None:
    code = "import sys, targets.rpc, targets.tracker, targets.measured_target; sys.exit('tvm' in sys.modules or 'torch' in sys.modules)"
    worker = Worker({})
    assert worker.call("child_functions:python", code, timeout_s=60) == 0
    worker.close()


def test_threads_keep_to_the_processors_they_are_given(serving: Process) -> None:
    """Asked of the device over RPC; seen in its session's process."""
    chosen = max(os.sched_getaffinity(0))
    wait_until(lambda: listens(serving.port))
    worker = Worker({"TVM_USE_RUNTIME_LIB": "1"}, without=("torch",))
    worker.call("targets.tvm_rpc:connect", "127.0.0.1", serving.port, "", 60.0, 2, (chosen,), timeout_s=60)
    (session,) = serving.sessions()
    bound = {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{session}/task").iterdir()}
    worker.close()
    assert frozenset({chosen}) in bound


def test_a_target_says_that_it_is_elsewhere(there: RpcTarget) -> None:
    assert there.remote
    assert there.parallel == 1
    _: Target = there


def test_closing_ends_a_measurement_that_another_thread_waits_for(
    there: RpcTarget, small: Path, serving: Process, kernel_cache: Path
) -> None:
    target = RpcTarget(there.spec, kernel_cache, PATIENCE)
    endless = Timing(repeats=10**9, min_repeat_s=0.01, budget_s=1e9)
    before = serving.loaded("program")
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(target.measure, small, make_sample(SMALL, TOKENS, 0), endless)
        wait_until(lambda: serving.loaded("program") > before)
        target.close()
        with pytest.raises(TargetError, match="target 'there' was closed"):
            measuring.result(timeout=30)
    wait_until(lambda: not serving.sessions())


# --- what a device file must say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("host", "", "target 'there': host is missing, by which kind='rpc' is reached; add it to its file"),
        ("port", 0, "target 'there': port is missing"),
        ("triple", None, "target 'there': triple is missing, and a server cannot tell it; add it to its file"),
        ("cpu", None, "target 'there': cpu is missing"),
        ("vector_bytes", 0, "target 'there': vector_bytes is missing"),
        ("cores", 0, "target 'there': cores is missing"),
    ],
)
def test_what_a_server_cannot_tell_must_be_in_the_file(field: str, value: Any, message: str) -> None:
    spec = DeviceSpec(
        name="there", kind="rpc", host="127.0.0.1", port=9090, triple="aarch64-linux-gnu", cpu="cortex-a76", cores=4, vector_bytes=16
    )
    with pytest.raises(InvalidDevice, match=message):
        RpcTarget(dataclasses.replace(spec, **{field: value}))


def test_a_tracker_needs_a_key() -> None:
    spec = DeviceSpec(
        name="farm", kind="tracker", host="127.0.0.1", port=9190, triple="aarch64-linux-gnu", cpu="cortex-a76", cores=4, vector_bytes=16
    )
    with pytest.raises(InvalidDevice, match="target 'farm': key is missing, by which kind='tracker' is reached"):
        RpcTarget(spec)


# --- the tracker's protocol ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("tracker")
    process = tracker(folder)
    process.wait_until_up()
    with ending(process):
        yield process


def test_a_tracker_tells_how_many_servers_it_has(tracking: Process, there: RpcTarget, tmp_path: Path, kernel_cache: Path) -> None:
    target = RpcTarget(dataclasses.replace(there.spec, kind="tracker", port=tracking.port, key="pair"), kernel_cache)
    assert target.parallel == 1  # none yet
    pair = [server(tmp_path, "pair", tracking, name) for name in ("one", "two")]
    with ending(*pair):
        wait_until(lambda: target.parallel == 2)
        assert servers("127.0.0.1", tracking.port, "pai") == 0
        host, port, key = request("127.0.0.1", tracking.port, "pair", 10.0, lambda: True)
        assert (host, port in [p.port for p in pair], key.startswith("pair:")) == ("127.0.0.1", True, True)
    wait_until(lambda: servers("127.0.0.1", tracking.port, "pair") == 0)
    target.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad", "no tracker answers at 127.0.0.1:[0-9]+: what listens there is something else"),
        (b"", "no tracker answers at 127.0.0.1:[0-9]+: the tracker ended the conversation"),
        (struct.pack("<ii", 0x2F271, 1 << 30), "a message of 1073741824 bytes"),
        (struct.pack("<ii", 0x2F271, 3) + b"{,}", "something else than JSON"),
        (struct.pack("<ii", 0x2F271, 3) + b"[1]", "an unknown message"),
        (struct.pack("<ii", 0x2F271, 6) + b"[1, 0]", r"no summary \(status 1\)"),
        (struct.pack("<ii", 0x2F271, 6) + b"[0, 7]", "an unknown message: '7'"),
    ],
    ids=["http", "silent", "long", "json", "short", "status", "summary"],
)
def test_what_is_not_a_tracker_is_said(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TrackerError, match=message):
            servers("127.0.0.1", listener.getsockname()[1], "key")
        thread.join()


def test_a_tracker_that_is_not_there_is_said() -> None:
    with pytest.raises(TrackerError, match=r"no tracker answers at 127.0.0.1:[0-9]+: Connection refused"):
        servers("127.0.0.1", free_port(), "key")
