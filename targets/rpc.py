"""`RpcTarget`: a device on another machine, or a pool of equal ones, through TVM's RPC.

Programs are compiled here, and sent to a server that holds nothing but TVM's runtime. Each measurement has a session and a
child process of its own, so several threads may measure at once where a tracker has several servers. A session that is
lost, hangs or is ended by its server costs an attempt, not the measurement: the next one goes to another server, or to the
same one once it is back. What a session has measured is never thrown away, and a wrong number is the program's failure,
which no other server would mend.

The protocol is neither authenticated nor encrypted (`docs/rpc.md`); nothing here listens.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.host_compiler import ONE_THREAD, HostCompiler
from targets.measured_target import MeasuredTarget
from targets.quiet import wait_for_turn
from targets.spec import DeviceSpec, InvalidDevice
from targets.target import TargetError
from targets.tracker import NoServer, TrackerError, request, servers
from targets.worker import Worker, WorkerError

_LOG = logging.getLogger(__name__)
_START_S = 120.0
"""Importing TVM in a child process, on a busy machine."""
_END_S = 5.0
_CHECK_FAILED = "CheckFailed"
_NEEDED = ("triple", "cpu", "vector_bytes", "cores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for devices, and how often to try.

    Attributes:
        attempts: sessions that a measurement may use up; each one lost or too long costs one.
        absent_s: most seconds for which nobody listens, no server is registered, or the one that lost a session gives no other:
            longer than a board takes to boot.
        busy_s: most seconds to wait while the device is in use.
        answer_s: most seconds that a server which the tracker says is free may take to answer.
        say_after_s: a wait this long is told of, once.
        pause_s: between two tries; it doubles each time, up to ten of them.
        grace_s: how much longer than its work may take a session may last before the server ends it.
    """

    attempts: int = 3
    absent_s: float = 180.0
    busy_s: float = 3600.0
    answer_s: float = 30.0
    say_after_s: float = 15.0
    pause_s: float = 1.0
    grace_s: float = 30.0


class RpcTarget(MeasuredTarget):
    """A device that a TVM RPC server, or a tracker with several of them, gives access to.

    Args:
        spec: the device file; `kind` is "rpc" or "tracker". Its ceilings and its memory are found out at the first use.
        cache_dir: where compiled kernels, and what was found out about the device, are kept; None: a folder that goes away.
        patience: how long to wait, and how often to try.

    Raises:
        InvalidDevice: if the spec does not say where the server is, or what the processor is.
    """

    remote = True
    """Measuring leaves this machine free for other work."""

    def __init__(self, spec: DeviceSpec, cache_dir: Path | None = None, patience: Patience | None = None) -> None:
        self._declared = _complete(spec)  # before anything is made
        super().__init__(HostCompiler(cache_dir))
        self._patience = patience or Patience()
        self._closed = threading.Event()
        self._lost = False  # whether the last session was: a server that went down with it takes connections and never serves
        self._sessions = threading.Lock()
        self._idle: list[Worker] = []
        self._used: list[Worker] = []

    @property
    def parallel(self) -> int:
        """How many programs can be measured at once: the servers that the tracker has for the key, at least 1."""
        if self._declared.kind != "tracker":
            return 1
        try:
            return max(1, servers(self._declared.host, self._declared.port, self._declared.key))
        except TrackerError:
            return 1

    def close(self) -> None:
        """Ends all sessions and the compile worker, also in the middle of what other threads wait for."""
        self._closed.set()
        with self._sessions:
            for worker in self._used:  # the thread that uses one closes it
                worker.kill()
            for worker in self._idle:
                worker.close()
            self._idle.clear()
        self._compiler.close()

    def _known(self) -> DeviceSpec:
        spec = self._declared
        if spec.backend != "llvm" and not (spec.arch and spec.memory_bytes):
            found, _ = self._run("asking for its GPU", _START_S, "targets.tvm_rpc:gpu", spec.backend)
            return _with(spec, arch=found["arch"], memory_bytes=found["memory_bytes"])
        if not spec.memory_bytes:
            found, _ = self._run("asking for its memory", _START_S, "targets.tvm_rpc:memory_bytes")
            return _with(spec, memory_bytes=found)
        return spec

    # --- sessions ---------------------------------------------------------------------------------

    def _run(self, what: str, timeout_s: float, function: str, *args: Any) -> tuple[Any, bool | None]:
        """Runs something in a session, and in another one if that is lost."""
        name, reason = self._declared.name, ""
        wait_for_turn()  # what this machine measures itself comes before the packing and comparing that it does for others
        for attempt in range(self._patience.attempts):
            if attempt:
                _LOG.info("target %r: %s failed (%s); trying again", name, what, reason)
                self._pause(attempt)
            with self._worker() as worker:
                try:
                    self._connect(worker, timeout_s + self._declared.cooldown_s)
                    self._rest(self._declared.cooldown_s)
                    result = worker.call("targets.tvm_rpc:on_device", function, *args, timeout_s=timeout_s)
                except WorkerError as error:
                    worker.close()  # and with it the session, whatever state it is in
                    if error.raised == _CHECK_FAILED:
                        raise TargetError(f"{what} failed: {error}") from None
                    reason, self._lost = str(error), True
                else:
                    with suppress(WorkerError):  # takes nothing away from what was measured
                        worker.call("targets.tvm_rpc:disconnect", timeout_s=_END_S)
                    return result, None
            self._check_open()
        raise TargetError(f"{what} failed in each of {self._patience.attempts} sessions on target {name!r}, the last time: {reason}")

    def _connect(self, worker: Worker, session_s: float) -> None:
        """Opens a session, waiting for a device that is in use or away.

        Raises:
            TargetError: if there is none in time.
            WorkerError: if a server fails in an unknown way.
        """
        spec, patience = self._declared, self._patience
        if self._lost and spec.kind == "rpc":
            patience = dataclasses.replace(patience, busy_s=min(patience.busy_s, patience.absent_s))
        here, tries = _Wait(spec, patience), 0
        with here:
            while True:
                self._check_open()
                worker.call("targets.tvm_rpc:ready", timeout_s=_START_S)
                try:
                    host, port, key = self._address(here)
                    answer_s = patience.answer_s if spec.kind == "tracker" else here.busy_left_s
                    worker.call(
                        "targets.tvm_rpc:connect", host, port, key, session_s + patience.grace_s, spec.cores, spec.affinity,
                        timeout_s=answer_s,
                    )  # fmt: skip
                    self._lost = False
                    return
                except NoServer as error:
                    self._check_open()
                    raise TargetError(f"target {spec.name!r}: {error}; see that its servers run, or wait for them") from None
                except TrackerError as error:
                    here.absent(str(error), f"start one with `python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {spec.port}`")
                except WorkerError as error:
                    if error.raised == "WrongKey":
                        raise TargetError(f"target {spec.name!r}: key={spec.key!r} is not that of the server; correct its file") from None
                    if error.raised == "Refused":
                        here.absent(f"nothing listens at {host}:{port}", "start the server there (docs/rpc.md), or its SSH tunnel")
                    elif not error.raised and "no answer" in str(error):
                        here.hung(f"{host}:{port}")
                    else:
                        raise
                tries += 1
                self._pause(tries)

    def _address(self, wait: "_Wait") -> tuple[str, int, str]:
        """Where the next session is to be had, and the key to name there.

        Raises:
            TrackerError: if the tracker has no server.
        """
        spec = self._declared
        if spec.kind != "tracker":
            return spec.host, spec.port, spec.key

        def still_wanted() -> bool:
            if not self._closed.is_set() and time.monotonic() > next_look[0]:
                next_look[0] = time.monotonic() + self._patience.absent_s / 10
                if servers(spec.host, spec.port, spec.key):
                    wait.present()
                else:
                    wait.absent(
                        f"no server with key {spec.key!r} is registered at the tracker {spec.host}:{spec.port}",
                        "start one on the device (docs/rpc.md)",
                    )
            return not self._closed.is_set()

        next_look = [0.0]
        return request(spec.host, spec.port, spec.key, wait.busy_left_s, still_wanted)

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """A child process for one session; it is kept for the next."""
        with self._sessions:
            self._check_open()
            worker = self._idle.pop() if self._idle else Worker({**ONE_THREAD, "TVM_USE_RUNTIME_LIB": "1"}, without=("torch",))
            self._used.append(worker)
        try:
            yield worker
        finally:
            with self._sessions:
                self._used.remove(worker)
                if self._closed.is_set():
                    worker.close()
                else:
                    self._idle.append(worker)

    def _pause(self, tries: int) -> None:
        self._rest(self._patience.pause_s * min(2 ** (tries - 1), 10))

    def _rest(self, seconds: float) -> None:
        self._closed.wait(seconds)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise TargetError(f"target {self._declared.name!r} was closed")


class _Wait:
    """One wait for a device: how long it may go on, and that it is told of once."""

    def __init__(self, spec: DeviceSpec, patience: Patience) -> None:
        self._spec, self._patience = spec, patience
        self._began = time.monotonic()
        self._absent_since: float | None = None
        self._timer = threading.Timer(patience.say_after_s, self._say)
        self._timer.daemon = True

    def __enter__(self) -> "_Wait":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    @property
    def busy_left_s(self) -> float:
        """Seconds that a device in use is still waited for."""
        return max(1.0, self._began + self._patience.busy_s - time.monotonic())

    def present(self) -> None:
        """The device is there."""
        self._absent_since = None

    def absent(self, problem: str, remedy: str) -> None:
        """The device is not there.

        Raises:
            TargetError: if that has been so for too long.
        """
        now = time.monotonic()
        self._absent_since = self._absent_since or now
        if now - self._absent_since >= self._patience.absent_s:
            raise TargetError(f"target {self._spec.name!r}: {problem}; {remedy}")

    def hung(self, where: str) -> None:
        """A server took the connection and then did not answer.

        Raises:
            TargetError: if the time is up.
        """
        self._absent_since = None
        if time.monotonic() - self._began >= self._patience.busy_s:
            raise TargetError(
                f"target {self._spec.name!r}: the server at {where} gave no session in {self._patience.busy_s:.0f} s: "
                "it is in use, or has stopped serving; restart it if nobody uses it"
            )

    def _say(self) -> None:
        spec, patience = self._spec, self._patience
        _LOG.warning(
            "target %r: waiting for %s:%d, which is in use (at most %.0f s) or not there (at most %.0f s)",
            spec.name, spec.host, spec.port, patience.busy_s, patience.absent_s,
        )  # fmt: skip


def _with(spec: DeviceSpec, **found: Any) -> DeviceSpec:
    """The spec with what was found out, where its file says nothing."""
    return dataclasses.replace(spec, **{name: value for name, value in found.items() if not getattr(spec, name)})


def _complete(spec: DeviceSpec) -> DeviceSpec:
    """The spec, if it says all that cannot be asked of a server.

    Raises:
        InvalidDevice: if it does not.
    """
    for name in ("host", "port", *(("key",) if spec.kind == "tracker" else ())):
        if not getattr(spec, name):
            raise InvalidDevice(f"target {spec.name!r}: {name} is missing, by which kind={spec.kind!r} is reached; add it to its file")
    for name in _NEEDED:
        if not getattr(spec, name):
            raise InvalidDevice(f"target {spec.name!r}: {name} is missing, and a server cannot tell it; add it to its file")
    return spec
