"""`targets check`: each step tells the truth, what is missing comes with its remedy, and what is doubtful is a warning."""

import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas import check
from nas.check import CheckStep, ceilings, check_device
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Sample
from targets.spec import DeviceSpec, load_spec
from targets.target import TargetError

BOARD = DeviceSpec(name="board", kind="rpc", host="127.0.0.1", triple="aarch64-linux-gnu", cpu="cortex-a76", cores=4, vector_bytes=16)


def found(spec: DeviceSpec, cache: Path, repeats: int = 9) -> dict[str, CheckStep]:
    steps = list(check_device(spec, cache, repeats))
    assert all("\n" not in step.detail for step in steps)
    assert all(step.status != "failed" for step in steps[:-1]), "nothing follows a failure"
    return {step.name: step for step in steps}


class Scripted(NullTarget):
    """A device that takes the times it is told to."""

    times_s: tuple[float, ...] = (1e-3,) * 9
    slowdown = 1.0
    failure = ""

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        if self.failure and timing.repeats > 1:
            raise TargetError(self.failure)
        measurement = super().measure(artifact, sample, timing)
        times = {"prefill": (2e-3,) * len(self.times_s), "decode": self.times_s}
        return dataclasses.replace(measurement, times_s=times, reference_s=(self.slowdown,), reference_best_s=1.0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    class Mine(Scripted):
        pass

    monkeypatch.setattr(check, "make_target", lambda spec, cache: Mine(load_spec("null")))
    return Mine


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that listens, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


# --- a device that works ------------------------------------------------------------------------


def test_this_machine_passes_and_says_what_it_can_do(local_target: LocalTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "make_target", lambda spec, cache: local_target)
    monkeypatch.setattr(local_target, "close", lambda: None)
    steps = found(load_spec("local"), tmp_path, repeats=3)
    assert list(steps) == ["tools", "probe", "roofline", "numerics", "spread", "drift", "clock"]
    assert 0 < steps["numerics"].values["largest_error"] < 1e-4
    assert steps["spread"].values["decode_s"] > 0
    assert ceilings(steps) == {"read_bytes_per_s": 1e10, "flops_per_s": 1e11}
    assert steps["roofline"].detail == "reads 10 GB/s, multiplies matrices at 100 GFLOP/s"


def test_ceilings_are_measured_anew_whatever_the_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[DeviceSpec] = []

    def make(spec: DeviceSpec, cache: Path) -> Any:
        asked.append(spec)
        raise TargetError("enough")

    monkeypatch.setattr(check, "make_target", make)
    steps = found(DeviceSpec(name="b", kind="local", flops_per_s=5.0, read_bytes_per_s=7.0, cores=2), tmp_path)
    assert steps["starts"].detail == "enough"
    assert asked == [DeviceSpec(name="b", kind="local", cores=2)]


def test_steady_times_are_all_right(scripted: type[Scripted], tmp_path: Path) -> None:
    steps = found(load_spec("null"), tmp_path)
    assert {step.status for step in steps.values()} == {"ok"}
    assert steps["spread"].detail == "prefill 2 ms, decode 1 ms; the middle half of 9 times spreads 0.0% of the median (prefill)"


# --- times that are doubtful ----------------------------------------------------------------------


def test_a_wide_spread_is_a_warning(scripted: type[Scripted], tmp_path: Path) -> None:
    scripted.times_s = (1e-3, 2e-3, 3e-3) * 3
    steps = found(load_spec("null"), tmp_path)
    assert steps["spread"].status == "warning"
    assert steps["spread"].values["spread"] == pytest.approx(1.0)
    assert "spreads 100.0% of the median (decode), more than 10%: close what else runs there" in steps["spread"].detail
    assert steps["drift"].status == "ok"


@pytest.mark.parametrize(("last", "change", "advice"), [(1.2e-3, "+20.0%", "it gets hot"), (0.8e-3, "-20.0%", "it was slow at first")])
def test_times_that_drift_are_a_warning(last: float, change: str, advice: str, scripted: type[Scripted], tmp_path: Path) -> None:
    scripted.times_s = (1e-3,) * 6 + (last,) * 3
    step = found(load_spec("null"), tmp_path)["drift"]
    assert step.status == "warning"
    assert step.detail.startswith(f"{change} from the first third of the times to the last (decode); {advice}")


def test_a_slow_clock_is_a_warning(scripted: type[Scripted], tmp_path: Path) -> None:
    scripted.slowdown = 1.5
    step = found(load_spec("null"), tmp_path)["clock"]
    assert (step.status, step.values["slowdown"]) == ("warning", 1.5)
    assert "takes 1.50 times its best, more than 1.25: see its frequency governor" in step.detail


def test_a_failure_ends_the_check(scripted: type[Scripted], tmp_path: Path) -> None:
    scripted.failure = "measuring failed: the board caught fire"
    steps = found(load_spec("null"), tmp_path)
    assert list(steps)[-1] == "spread"
    assert steps["spread"].detail == "measuring failed: the board caught fire"


def test_another_version_of_tvm_is_told_with_the_remedy(scripted: type[Scripted], tmp_path: Path) -> None:
    scripted.failure = "measuring failed: Client protocol version mismatch with the server"
    detail = found(load_spec("null"), tmp_path)["spread"].detail
    assert detail.startswith("the device has another version of TVM (measuring failed: Client")
    assert "run `pip install apache-tvm==0.27" in detail


# --- what is missing ------------------------------------------------------------------------------


def test_a_missing_linker_is_told_with_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)
    spec = dataclasses.replace(BOARD, linker="ndk")
    steps = found(spec, tmp_path)
    assert list(steps) == ["tools"]
    assert steps["tools"].detail.startswith('linker="ndk" is for Android')


def test_missing_packages_are_told_with_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None if name == "tornado" else name)
    steps = found(BOARD, tmp_path)
    assert steps["tools"].detail == "tornado not installed; run `pip install 'edgewise[rpc]'`"


@pytest.fixture
def with_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_RPC_PACKAGES", ())


def test_a_server_that_does_not_listen_is_told_with_how_to_start_it(tmp_path: Path, with_packages: None, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    steps = found(dataclasses.replace(BOARD, port=port), tmp_path)
    assert list(steps) == ["tools", "reachable"]
    assert steps["reachable"].detail == (
        f"nothing listens at 127.0.0.1:{port} (Connection refused); start the server on the device with "
        f"`TVM_USE_RUNTIME_LIB=1 python -m tvm.exec.rpc_server --host 127.0.0.1 --port {port} --port-end {port + 1}`, or its SSH tunnel"
    )


def test_a_tracker_that_is_not_there_or_has_no_device_is_told(tmp_path: Path, with_packages: None, listener: socket.socket) -> None:
    spec = dataclasses.replace(BOARD, kind="tracker", key="pi5", port=listener.getsockname()[1])
    serve = threading.Thread(target=empty_tracker, args=(listener,))
    serve.start()
    steps = found(spec, tmp_path)
    serve.join(timeout=10)
    assert steps["reachable"].detail.startswith(
        f"the tracker at 127.0.0.1:{spec.port} has no server with key 'pi5'; start one on the device"
    )
    listener.close()
    detail = found(spec, tmp_path)["reachable"].detail
    assert "no tracker answers at" in detail
    assert f"start one with `python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {spec.port}`" in detail


def empty_tracker(listener: socket.socket) -> None:
    """Answers one question as a tracker that nothing has registered with."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(connection.recv(4))
        size = int.from_bytes(connection.recv(4), "little")
        connection.recv(size)
        answer = b'[0, {"queue_info": {}, "server_info": []}]'
        connection.sendall(len(answer).to_bytes(4, "little") + answer)


def test_a_row_without_an_address_says_what_to_add(tmp_path: Path, with_packages: None) -> None:
    steps = found(load_spec("pi5"), tmp_path)
    assert steps["starts"].status == "failed"
    assert "say where yours is: `edgewise targets add NAME --like pi5 --host HOST`" in steps["starts"].detail
