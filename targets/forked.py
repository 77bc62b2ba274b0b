"""Work done beside this process by copies of it: a fork begins at once, with everything imported and nothing to send."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from targets.quiet import resting, working, yield_to_measuring
from targets.worker import end_with_parent

MOST_PROCESSES = 8
"""More would not be faster by much, and each holds memory of its own."""
_NUMBER_BYTES = 2
_Item = TypeVar("_Item")


def in_parallel(work: Callable[[_Item], object], items: Sequence[_Item]) -> None:
    """Calls `work` on every item, as many at once as there are processors, and returns when all are done.

    What `work` returns is lost, as is an error of a copy, or its end: `work` leaves its results on disk, and what is not
    there afterwards the caller makes itself, to have them or the error.

    This process takes items, too; an error raised here is raised once the copies have ended. Between two items all of them
    let measurements go first. Without Linux, or beside other threads, whose locks a copy would inherit locked for ever, all
    items are done here, one after the other.
    """
    # Neighbours are far from each other in the list, so that what is done at once has little in common.
    half = -(-len(items) // 2)
    order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair if i < len(items)]
    reader, writer = os.pipe()  # holds the numbers of items that nobody has taken
    os.write(writer, b"".join(number.to_bytes(_NUMBER_BYTES, "little") for number in order))
    os.close(writer)

    def take() -> None:
        while number := os.read(reader, _NUMBER_BYTES):
            yield_to_measuring()
            work(items[int.from_bytes(number, "little")])

    copies: list[int] = []
    try:
        with contextlib.suppress(OSError):  # no room for another process: fewer do
            for _ in range(_processes(len(items)) - 1):
                copies.append(_copy(take))
        take()
    finally:
        while os.read(reader, 1 << 16):  # after an error here, nobody begins another item
            pass
        os.close(reader)
        for pid in copies:
            _wait(pid)


def _processes(items: int) -> int:
    if sys.platform != "linux" or len(list(Path("/proc/self/task").iterdir())) > 1:
        return 1
    return max(1, min(items, len(os.sched_getaffinity(0)), MOST_PROCESSES))


def _copy(take: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        end_with_parent()
        with working():
            take()
        status = 0
    finally:
        os._exit(status)  # nothing of the original's, such as its temporary folders, ends with a copy


def _wait(pid: int) -> None:
    """Waits for a copy to end; not at work meanwhile, since someone may want to measure, whom the copy is waiting for."""
    with resting():
        os.waitpid(pid, 0)
