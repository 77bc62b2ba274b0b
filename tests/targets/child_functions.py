"""What the worker tests run in a child process: good functions, and ones that fail in every way we know."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def add(a: Any, b: Any) -> Any:
    return a + b


def pid() -> int:
    return os.getpid()


def echo(value: Any) -> Any:
    return value


def loaded(*modules: str) -> list[str]:
    """Those of the named modules that this process holds."""
    return [name for name in modules if sys.modules.get(name) is not None]


def libraries(*parts: str) -> list[str]:
    """Which of the given file name parts occur among this process's mapped files."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        text = maps.read()
    return [part for part in parts if part in text]


def environment(name: str) -> str | None:
    return os.environ.get(name)


def thread_processors() -> set[frozenset[int]]:
    """The processors that the threads of this process may use, each set once."""
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()}


def python(code: str) -> int:
    """Exit status of a fresh Python that runs the code."""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def fail(message: str) -> None:
    raise ValueError(message)


def unpicklable() -> Any:
    return lambda: None


def abort() -> None:
    print("last words", file=sys.stderr, flush=True)
    os.abort()


def segfault() -> None:
    ctypes.string_at(0)


def leave(status: int) -> None:
    os._exit(status)


def hang(seconds: float = 600.0) -> None:
    time.sleep(seconds)


def noisy(value: Any) -> Any:
    """Prints to standard output through Python and past it, as compilers do."""
    print("noise from Python", flush=True)
    os.write(1, b"noise from C\n" * 1000)
    return value


def interrupted_parent() -> None:
    """The parent's side of a Ctrl-C: its whole process group gets SIGINT, and the child must answer afterwards."""
    import signal

    from targets.worker import Worker

    signal.signal(signal.SIGINT, lambda *_: print("parent interrupted", flush=True))
    worker = Worker({})
    child = worker.call("child_functions:pid", timeout_s=30)
    os.killpg(0, signal.SIGINT)
    os.kill(child, signal.SIGINT)  # even sent to it directly
    time.sleep(0.2)
    print("same child" if worker.call("child_functions:pid", timeout_s=30) == child else "another child", flush=True)
    worker.close()


class Exports:
    """A stage's `export` that runs one of the functions here instead."""

    def __init__(self, function: str, *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self) -> Any:
        return globals()[self.function](*self.args)
