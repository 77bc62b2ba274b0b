"""TVM's own RPC servers and trackers as processes on this machine, to be stopped, killed and started again."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.cli_show import cache_dir
from scripts.emulated_board import board
from scripts.emulator import Unavailable, emulators
from targets.local import LocalTarget
from targets.rpc import Patience, RpcTarget
from targets.spec import DeviceSpec, load_spec
from targets.toolchain import processor, toolchain
from targets.tracker import servers

SERVER = """
import sys
sys.modules["torch"] = None
from tvm.rpc.server import PopenRPCServerState
tracker = (sys.argv[3], int(sys.argv[4])) if sys.argv[3:] else None
PopenRPCServerState("127.0.0.1", int(sys.argv[1]), int(sys.argv[1]) + 1, key=sys.argv[2], tracker_addr=tracker).thread.join()
"""
TRACKER = """
import sys
sys.modules["torch"] = None
from tvm.rpc.tracker import PopenTrackerServerState
PopenTrackerServerState("127.0.0.1", int(sys.argv[1]), int(sys.argv[1]) + 1).thread.join()
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Process:
    """A server or tracker, together with the processes it starts for sessions."""

    def __init__(self, code: str, log: Path, port: int, *arguments: Any) -> None:
        self.port, self.log = port, log
        self._command = [sys.executable, "-W", "ignore", "-c", code, str(port), *map(str, arguments)]
        self._child: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def send(self, number: int) -> None:
        """Sends a signal to all of its processes."""
        assert self._child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    @staticmethod
    def send_to(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        if self._child is not None:
            self.send(signal.SIGKILL)
            self._child.wait()
            self._child = None

    def sessions(self) -> list[int]:
        """Processes of sessions that are open."""
        if self._child is None:
            return []
        children = Path(f"/proc/{self._child.pid}/task")
        with contextlib.suppress(OSError):
            return [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
        return []

    def served(self) -> int:
        """How many sessions began."""
        return self.log.read_text(errors="replace").count("start serving")

    def loaded(self, name: str) -> int:
        """How many times a library whose name begins so was loaded."""
        return sum("load_module" in line and f"/{name}" in line for line in self.log.read_text(errors="replace").splitlines())

    def wait_until_up(self) -> None:
        wait_until(lambda: "bind to" in self.log.read_text(errors="replace"))


def wait_until(condition: Any, within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@contextlib.contextmanager
def ending(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def server(folder: Path, key: str = "", tracker: Process | None = None, name: str = "server") -> Process:
    address = () if tracker is None else ("127.0.0.1", tracker.port)
    return Process(SERVER, folder / f"{name}.log", free_port(), key, *address)


def tracker(folder: Path) -> Process:
    return Process(TRACKER, folder / "tracker.log", free_port())


def device(spec: DeviceSpec, kind: str, port: int, **others: Any) -> DeviceSpec:
    """This machine's processor behind a server."""
    values = spec.to_dict() | {"name": "there", "kind": kind, "host": "127.0.0.1", "port": port, **others}
    return DeviceSpec.from_dict(values, "there")


def listens(port: int) -> bool:
    """Whether a process here waits for connections on a port; it is not told (proc(5), /proc/net/tcp: state 0A)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def reachable(spec: DeviceSpec, like: LocalTarget, cache: Path, patience: Patience) -> RpcTarget:
    """A target whose tuning is the local one's, so that it is not tried anew for each port."""
    target = RpcTarget(spec, cache, patience)
    compiler = target._compiler
    file = compiler.record("tuning", spec, toolchain(spec, processor(spec)))
    file.write_text(json.dumps(dataclasses.asdict(like.cpu.tuning)))
    return target


@contextlib.contextmanager
def board_at_a_tracker(folder: Path) -> Iterator[Process]:
    """A tracker with the emulated board, started as its users start it. Only where there is no way to have it, what needs it is skipped."""
    try:
        board(cache_dir())
        emulators(cache_dir())
    except Unavailable as reason:
        pytest.skip(f"no emulated board: {reason}")
    desk = tracker(folder)
    command = [sys.executable, "-m", "scripts.emulated_board", "--port", str(free_port()), "--key", "board"]
    command += ["--tracker", f"127.0.0.1:{desk.port}", "--cache", str(cache_dir())]
    with (folder / "board.log").open("wb") as log, ending(desk):
        desk.wait_until_up()
        serving = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=log, stderr=log)
        try:
            wait_until(lambda: servers("127.0.0.1", desk.port, "board"), within_s=120)
            yield desk
        finally:
            serving.send_signal(signal.SIGTERM)
            serving.wait(30)


def board_spec(desk: Process) -> DeviceSpec:
    """A Raspberry Pi 5 as far as programs can tell, with ceilings made up, since an emulator is slow to measure any."""
    return dataclasses.replace(
        load_spec("pi5"), name="board", kind="tracker", host="127.0.0.1", port=desk.port, key="board", cores=1, memory_bytes=1 << 30,
        flops_per_s=2.5e8, read_bytes_per_s=1e9,
    )  # fmt: skip
