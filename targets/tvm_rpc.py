"""What the child process does that talks to a TVM RPC server: one session at a time, in which programs are run.

TVM's own client would retry and wait by itself; here each step fails at once and says how, so that the parent decides
(`rpc.py`). The protocol has no views with an offset between machines and no tuples as arguments, so weights are gathered
into a tuple on the device, and functions are timed there with arguments that the device keeps.
"""

import contextlib
import gc
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import rpc

from targets.machine import Machine
from targets.quiet import working
from targets.tvm_session import Timer, resolve

_SHARE_ALL = -3
"""Threads may each use all of the named processors (`kSpecifyThreadShareAllCore` in TVM's threading_backend.h)."""
_BIG = 1
"""Threads on the fastest processors (`kBig` there)."""


class Refused(Exception):
    """Nothing listens there, or it cannot be reached."""


class WrongKey(Exception):
    """The server has another key than the device's file."""


class RemoteMachine(Machine):
    """A program on another machine.

    Args:
        remote: TVM's session.
    """

    def __init__(self, remote: Any, library: Any, manifest: Mapping[str, Any], device: Any) -> None:
        super().__init__(library, manifest, device)
        self._remote = remote

    def hold(self, weights: Iterable[Any]) -> None:
        """Gathers the weights into a tuple that stays on the device.

        What the host has of an array there is a reference, which only some functions turn into an array again: TVM's table
        of parameters is one.
        """
        names: list[str] = []
        for weight in weights:
            names.append(f"weight{len(names)}")
            self._remote.get_function("vm.builtin.tensor_cache.update")(names[-1], weight, True)
        found = self._remote.get_function("vm.builtin.param_array_from_cache_by_name")
        self._weights = found(self._remote.get_function("ffi.Array")(*names))
        self._remote.get_function("vm.builtin.tensor_cache.clear")()

    def run(self, function: str, arguments: Sequence[Any]) -> Sequence[Any]:
        """Runs a function; what it returns stays on the device."""
        self.vm.set_input(function, *arguments)
        self.vm.invoke_stateful(function)
        outputs: Sequence[Any] = self.vm.get_outputs(function)
        return outputs


class RemoteSession:
    """An open session on another machine (`tvm_session.Session`)."""

    is_here = False

    def __init__(self, remote: Any) -> None:
        self._remote = remote
        self._names = itertools.count()

    def device(self, kind: str) -> Any:
        """See `Session`."""
        return self._remote.device(kind, 0)

    def load(self, library: Path) -> Any:
        """Uploads and loads a library; an archive is linked there."""
        self._remote.upload(str(library))
        return self._remote.load_module(library.name)

    def machine(self, library: Any, manifest: Mapping[str, Any], device: Any) -> Machine:
        """See `Session`."""
        return RemoteMachine(self._remote, library, manifest, device)

    def time_kernel(self, module: Any, name: str, arrays: Sequence[Any], device: Any) -> Timer:
        """See `Session`. The device's clock is read, so the network is in no time; each timing is preceded by an untimed call."""
        return lambda number: float(module.time_evaluator(name, device, number=number)(*arrays).results[0])

    def time_function(self, machine: Machine, function: str, arguments: Sequence[Any]) -> Timer:
        """See `time_kernel`."""
        alias = f"{function}.timed{next(self._names)}"
        machine.vm.save_function(function, alias, *arguments, include_return=False)
        return self.time_kernel(machine.vm.module, alias, (), machine.device)

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Work of this machine, beside which nothing that it measures itself may run."""
        return working()


_session: RemoteSession | None = None


def ready() -> str:
    """The version of TVM here; imports it, so that no later time limit counts that."""
    return str(tvm.__version__)


def connect(host: str, port: int, key: str, session_s: float, threads: int, affinity: Sequence[int]) -> None:
    """Opens a session; blocks while the server serves somebody else.

    Args:
        host, port, key: of the server.
        session_s: the server ends the session after as many seconds.
        threads: how many the device uses.
        affinity: the processors that they use, by number; empty: any.

    Raises:
        Refused: if nothing listens there.
        WrongKey: if the server has another key.
    """
    global _session
    disconnect()
    try:
        remote = rpc.connect(host, port, key, session_timeout=session_s)
    except Exception as error:
        text = " ".join(str(error).split())
        if "Connect to" in text or "resolve" in text:
            raise Refused(text) from None
        if "key" in text:
            raise WrongKey(text) from None
        raise
    configure = remote.get_function("runtime.config_threadpool")
    if affinity:
        configure(_SHARE_ALL, threads, remote.get_function("ffi.Array")(*map(str, affinity)))
    else:
        configure(_BIG, threads)
    _session = RemoteSession(remote)


def disconnect() -> None:
    """Ends the session, if one is open: TVM does so once nothing refers to it."""
    global _session
    _session = None
    gc.collect()


def on_device(function: str, *args: Any) -> Any:
    """Calls a function, given as "module:name", with the open session and the arguments."""
    assert _session is not None, "connect first"
    return resolve(function)(_session, *args)


def memory_bytes(session: RemoteSession) -> int:
    """Memory of the device, as its runtime tells it; 0 if it does not."""
    found = session.device("cpu").total_global_memory
    return 0 if found is None else int(found)


def gpu(session: RemoteSession, kind: str) -> dict[str, Any]:
    """What the device says of its GPU: `arch`, `memory_bytes` and `name`."""
    from targets.tvm_gpu import describe

    found: dict[str, Any] = describe(session.device(kind))
    return found
