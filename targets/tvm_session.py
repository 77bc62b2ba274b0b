"""`Session`: where a program's arrays live and how its functions are called: in this process, or on another machine.

Everything that measures (`tvm_run.py`, `tvm_tune.py`) is written for a session and does not know which it has.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tvm

from targets.machine import Machine

Timer = Callable[[int], float]
"""Mean seconds of a call, from the number of calls to time, one after the other."""


class Session(Protocol):
    """What measuring needs of a device."""

    is_here: bool
    """Whether programs run in this process, so that its memory and its clock are theirs."""

    def device(self, kind: str) -> Any:
        """The device of that kind ("cpu", "cuda", "opencl") that arrays are put on."""
        ...

    def load(self, library: Path) -> Any:
        """A library as a loaded module."""
        ...

    def machine(self, library: Any, manifest: Mapping[str, Any], device: Any) -> Machine:
        """A loaded program."""
        ...

    def time_kernel(self, module: Any, name: str, arrays: Sequence[Any], device: Any) -> Timer:
        """Times a kernel of a library."""
        ...

    def time_function(self, machine: Machine, function: str, arguments: Sequence[Any]) -> Timer:
        """Times a function of a program."""
        ...

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Around what the host does for a program: packing, comparing."""
        ...


class LocalSession:
    """This process."""

    is_here = True

    def device(self, kind: str) -> Any:
        """See `Session`."""
        return tvm.device(kind, 0)

    def load(self, library: Path) -> Any:
        """See `Session`."""
        return tvm.runtime.load_module(str(library))

    def machine(self, library: Any, manifest: Mapping[str, Any], device: Any) -> Machine:
        """See `Session`."""
        return Machine(library, manifest, device)

    def time_kernel(self, module: Any, name: str, arrays: Sequence[Any], device: Any) -> Timer:
        """See `Session`."""
        return _clock(module[name], arrays, device)

    def time_function(self, machine: Machine, function: str, arguments: Sequence[Any]) -> Timer:
        """See `Session`."""
        return _clock(machine.vm[function], arguments, machine.device)

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: who measures here has the machine alone already."""
        return contextlib.nullcontext()


def _clock(run: Any, arguments: Sequence[Any], device: Any) -> Timer:
    waits = device != tvm.cpu()  # a GPU is still at it when a call returns

    def timer(number: int) -> float:
        if waits:
            device.sync()
        begin = time.perf_counter()
        for _ in range(number):
            run(*arguments)
        if waits:
            device.sync()
        return (time.perf_counter() - begin) / number

    return timer


def here(function: str, *args: Any) -> Any:
    """Calls a function, given as "module:name", with a session of this process and the arguments."""
    return resolve(function)(LocalSession(), *args)


def resolve(function: str) -> Callable[..., Any]:
    """The function that "module:name" means."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
