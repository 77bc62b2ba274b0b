"""`Worker`: functions called in a child process, with a time limit, so that a crash or hang costs one call.

The child stays alive between calls (importing a compiler takes seconds) and is replaced after a failure.
Messages are pickles on private pipes between a process and its own child; nothing foreign is ever unpickled.
"""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

_LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1  # prctl(2)


class WorkerError(RuntimeError):
    """A call that raised, crashed the child or ran out of time; the message is one line that says which.

    Attributes:
        raised: the name of the exception's type, if the call raised one; else "", and the child is gone.
    """

    def __init__(self, message: str, raised: str = "") -> None:
        super().__init__(message)
        self.raised = raised


class Worker:
    """A child process that calls functions one after the other.

    Args:
        environment: variables set in the child, above the parent's own.
        without: modules that the child must not load; importing one fails there as if it were not installed.
        affinity: the processors it may use, by number; empty: those that this process may use.
    """

    def __init__(self, environment: Mapping[str, str], without: tuple[str, ...] = (), affinity: tuple[int, ...] = ()) -> None:
        self._affinity = affinity
        self._environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._without = without
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def call(self, function: str, *args: Any, timeout_s: float) -> Any:
        """Calls a function, given as "module:name" so that the caller need not import its module.

        Raises:
            WorkerError: if it raises, the child dies, or `timeout_s` passes; the child is then replaced.
        """
        child = self._start()
        assert child.stdin is not None and child.stdout is not None
        deadline = time.monotonic() + timeout_s
        payload = pickle.dumps((function, args))
        try:
            child.stdin.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)
            child.stdin.flush()
            size = int.from_bytes(self._read(child, _LENGTH_BYTES, deadline), "little")
            ok, value = pickle.loads(self._read(child, size, deadline))
        except TimeoutError:
            self.close()
            raise WorkerError(f"no answer within {timeout_s:.0f} s; the process was ended") from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            reason = _exit_reason(child.returncode, self._tail())
            self.close()
            raise WorkerError(reason) from None
        except BaseException:  # Ctrl-C in the middle of a message leaves the pipe unusable
            self.close()
            raise
        if not ok:
            raised, message = value
            raise WorkerError(message, raised)
        return value

    def kill(self) -> None:
        """Ends the child, also while another thread waits for its answer, whose call then fails; `close` clears up after it."""
        _kill(self._child)

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        child, self._child = self._child, None
        log, self._log = self._log, None
        if log is not None:
            log.close()
        if child is None:
            return
        _kill(child)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a full pipe to a dead child
                    pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
            # -P: nothing that lies in the folder a user happens to be in is imported.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", "targets.worker", ",".join(map(str, self._affinity)), *self._without],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=self._environment, start_new_session=True,
            )  # fmt: skip
        return self._child

    @staticmethod
    def _read(child: "subprocess.Popen[bytes]", size: int, deadline: float) -> bytes:
        assert child.stdout is not None
        descriptor, data = child.stdout.fileno(), bytearray()
        while len(data) < size:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(descriptor, min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def _tail(self) -> str:
        assert self._log is not None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _kill(child: "subprocess.Popen[bytes] | None") -> None:
    if child is not None and child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _exit_reason(code: int | None, last_line: str) -> str:
    if code is None:
        return "the process closed its pipe and did not end"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"the process {how}" + (f": {last_line[:300]}" if last_line else "")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _serve() -> None:
    """The child's loop: read a call, answer (True, result) or (False, reason)."""
    import importlib

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    requests = sys.stdin.buffer
    while header := requests.read(_LENGTH_BYTES):
        name, args = pickle.loads(requests.read(int.from_bytes(header, "little")))
        module, _, function = name.partition(":")
        try:
            reply = (True, getattr(importlib.import_module(module), function)(*args))
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = (False, (type(error).__name__, _one_line(error)))
        payload = pickle.dumps(reply)
        replies.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)
        replies.flush()


def end_with_parent() -> None:
    """Asks Linux to end this process when its parent dies, even if it hangs: a compiler must not outlive a killed search."""
    import ctypes

    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # other systems: the closed pipe ends it, unless it hangs
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    end_with_parent()
    if sys.argv[1]:
        os.sched_setaffinity(0, [int(number) for number in sys.argv[1].split(",")])
    sys.modules.update(dict.fromkeys(sys.argv[2:]))  # type: ignore[arg-type]  # None is how Python marks a module as not there
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _serve()
