"""A peer in a process of its own, in an environment of its own, stopped whenever it is not its turn."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent


class PeerError(RuntimeError):
    """A peer that is not installed, failed or took too long; the message is one line that says which."""


class PeerProcess:
    """One runtime, asked in lines of JSON.

    Between questions the process is stopped (SIGSTOP), so that no pool of idle threads spins beside whoever is timed.

    Args:
        python: the interpreter of the peers' environment.
        peer: which runtime, a name in `engine_peers.PEERS`.
        threads: threads it may use.
    """

    def __init__(self, python: Path, peer: str, threads: int) -> None:
        self.peer = peer
        count = str(threads)
        quiet = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        try:
            self._child = subprocess.Popen(
                [str(python), "-W", "ignore", str(HERE / "engine_peers.py"), peer],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env={**os.environ, **quiet}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{python} does not start ({error.strerror})") from error

    def ask(self, question: str, argument: Any, timeout_s: float) -> Any:
        """The answer to "load" or "time".

        Raises:
            PeerError: if it raises, dies or takes too long; the process is then of no more use.
        """
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            os.killpg(self._child.pid, signal.SIGCONT)
            self._child.stdin.write(json.dumps([question, argument]).encode() + b"\n")
            self._child.stdin.flush()
            answer = json.loads(self._line(time.monotonic() + timeout_s))
            os.killpg(self._child.pid, signal.SIGSTOP)
        except (OSError, EOFError, ValueError):
            raise PeerError(f"the process ended: {self._tail()}") from None
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream is not None:
                stream.close()

    def _line(self, deadline: float) -> bytes:
        assert self._child.stdout is not None
        data = bytearray()
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerError("no answer in time")
            chunk = os.read(self._child.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def _tail(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"
