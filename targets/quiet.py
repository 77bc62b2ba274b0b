"""A turnstile between measuring and all other work of ours on this machine, across processes and separate searches.

Who works holds a file, the room, together with others (`working`); who measures takes it alone (`measuring`). To enter
the room one passes another file, the gate, which a measurer keeps until it is done: so workers that let go of the room
between two pieces of work (`yield_to_measuring`) cannot take it again before the measurer that waits for it. This is the
turnstile that keeps writers from starving in a readers-writers lock (Downey, The Little Book of Semaphores, 2nd ed.
2016, section 4.2.2), on files locked with flock(2): a process that ends, however it ends, holds nothing any more.

Both files lie in a folder that is the user's alone. Programs that do not ask here are not kept away: that a time was taken
while one of those ran shows in its spread and in the reference kernel beside it.
"""

import contextlib
import fcntl
import importlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_WAIT_S = 60.0
"""A measurement waits at most this long for quiet, then goes on without: longer than a training step of any model that is
worth training on such a machine."""
MOST_PAUSE_S = 900.0
"""Work waits at most this long for measurements: a measurer that was stopped, and did not end, is waited for no longer."""
_SOON_S = 0.002
"""How often a measurement that waits for work to stop looks again."""
_SELDOM_S = 0.2
"""How often those look again who wait for a measurement: seldom, since a process that wakes up may take a processor from it."""


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Work that no measurement may run beside; it begins when none is running.

    Each thread is at work for itself. Within another `working` of the same thread, or a measurement, it does nothing.
    """
    if _here() is not None:
        yield
        return
    with _arriving() as place:
        place.enter()
        yield


def yield_to_measuring() -> None:
    """Lets a measurement that waits go first, and returns once it is done; costs microseconds if there is none.

    To be called often, between two pieces of work. Outside `working` it does nothing.
    """
    place = _here()
    if place is not None and place.at_work and (not place.in_room or place.is_wanted()):
        place.leave()
        place.enter()


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """A wait in the middle of work, for another process or thread of ours: the thread is not at work meanwhile.

    Whoever is waited for may have to let a measurement go first, which in turn waits until all work has stopped.
    """
    place = _here()
    if place is None or not place.at_work:
        yield
        return
    place.leave()
    try:
        yield
    finally:
        place.enter()


@contextlib.contextmanager
def measuring(most_wait_s: float = MOST_WAIT_S) -> Iterator[bool | None]:
    """A measurement, alone among all work and measurements of this user on this machine.

    A thread that is at work, and measures in the middle of it, is not at work meanwhile.

    Yields:
        True: all other work has stopped. False: it had not after `most_wait_s`. None: not known, for there is no folder for
        lock files.
    """
    with resting(), _arriving() as place:
        yield place.take_alone(most_wait_s)


def wait_for_turn() -> None:
    """Returns once nobody measures, before a wait for another process of ours whose time limit then counts work alone."""
    with working():
        yield_to_measuring()


def at_work(function: str, *args: Any) -> Any:
    """Calls a function, given as "module:name", as work: what a worker process is asked to do."""
    module, _, name = function.partition(":")
    with working():
        return getattr(importlib.import_module(module), name)(*args)


class _Place:
    """Where one thread stands: outside the room, at work in it, or alone in it; None for a file that cannot be had."""

    def __init__(self, gate: int | None, room: int | None) -> None:
        self._gate, self._room = gate, room
        self.process = os.getpid()
        self.at_work = self.in_room = self._gave_up = False

    def is_wanted(self) -> bool:
        """Whether someone measures or waits to."""
        free = _lock(self._gate, fcntl.LOCK_SH)
        if free:
            _unlock(self._gate)
        return not free

    def enter(self) -> None:
        """Takes the room with others, after whoever measures; without it if that takes too long."""
        try:
            self._gave_up = not _lock(self._gate, fcntl.LOCK_SH, 0.0 if self._gave_up else MOST_PAUSE_S)
            self.in_room = _lock(self._room, fcntl.LOCK_SH)
        finally:
            _unlock(self._gate)
        self.at_work = True

    def take_alone(self, most_wait_s: float) -> bool | None:
        """Takes gate and room alone; see `measuring` for what it says."""
        if self._gate is None or self._room is None:
            return None
        deadline = time.monotonic() + most_wait_s
        if not _lock(self._gate, fcntl.LOCK_EX, most_wait_s):
            return False
        return _lock(self._room, fcntl.LOCK_EX, deadline - time.monotonic(), _SOON_S)

    def leave(self) -> None:
        """Lets go of everything."""
        self.at_work = self.in_room = False
        _unlock(self._room)
        _unlock(self._gate)


_LOCAL = threading.local()


def _here() -> _Place | None:
    """The calling thread's place, if it works or measures; a forked child has not inherited its parent's."""
    place: _Place | None = getattr(_LOCAL, "place", None)
    return place if place is not None and place.process == os.getpid() else None


@contextlib.contextmanager
def _arriving() -> Iterator[_Place]:
    """Makes the calling thread a place, on files it opens for itself: a lock of flock(2) belongs to an open file."""
    folder = lock_folder()
    files = [None if folder is None else _lock_file(folder / name) for name in ("gate", "room")]
    before, place = getattr(_LOCAL, "place", None), _Place(*files)
    _LOCAL.place = place
    try:
        yield place
    finally:
        place.leave()
        _LOCAL.place = before
        for descriptor in files:
            if descriptor is not None:
                os.close(descriptor)


def _lock(descriptor: int | None, how: int, within_s: float = 0.0, look_every_s: float = _SELDOM_S) -> bool:
    """Whether the lock was had in time; one on no file always is."""
    if descriptor is None:
        return True
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(look_every_s, left_s))
        else:
            return True


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


# --- the folder -------------------------------------------------------------------------------


def lock_folder() -> Path | None:
    """The folder of the lock files: in the user's runtime folder, else in that for temporary files; None if neither can be used.

    It has the mode 0700 and belongs to the user. One that another user put there, in a folder that all may write to, or a
    link, is not used: nothing is ever opened or made where somebody else decides what it is.
    """
    candidates = [Path(tempfile.gettempdir()) / f"edgewise-{os.getuid()}"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, Path(runtime) / "edgewise")
    return next((folder for folder in candidates if _is_ours(folder)), None)


def _is_ours(folder: Path) -> bool:
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077 and os.access(folder, os.W_OK)
    except OSError:
        return False


def _lock_file(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
