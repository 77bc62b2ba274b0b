"""What the fork tests run in a child process of one thread: work that says which process did it."""

import os
import threading
import time
from pathlib import Path

from targets.forked import in_parallel


def done_by(folder: Path, items: int, beside_a_thread: bool = False) -> dict[str, list[int]]:
    """The processes that did each item, by item, and this process."""

    def work(item: int) -> None:
        time.sleep(0.02)  # long enough for a copy to begin
        (folder / f"{item}-{os.getpid()}-{time.monotonic_ns()}").touch()

    over = threading.Event()
    if beside_a_thread:
        threading.Thread(target=over.wait).start()
    in_parallel(work, range(items))
    over.set()
    found: dict[str, list[int]] = {"this": [os.getpid()]}
    for path in folder.iterdir():
        item, pid, _ = path.name.split("-")
        found.setdefault(item, []).append(int(pid))
    return found


def copies_fail(folder: Path, items: int) -> dict[str, list[int]]:
    """As `done_by`, but every process other than this one ends at its first item."""
    original = os.getpid()

    def work(item: int) -> None:
        time.sleep(0.02)
        if os.getpid() != original:
            os.abort()
        (folder / str(item)).touch()

    in_parallel(work, range(items))
    return {"done": sorted(int(path.name) for path in folder.iterdir())}


def fail_here(folder: Path, items: int) -> None:
    """Raises at this process's first item; copies note how many they did."""
    original = os.getpid()

    def work(item: int) -> None:
        if os.getpid() == original:
            time.sleep(0.05)
            raise ValueError("this process failed")
        time.sleep(0.02)
        (folder / str(item)).touch()

    in_parallel(work, range(items))
