"""How much memory this process holds, from Linux's own counters."""

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")


def held_bytes() -> int | None:
    """Resident memory that is the process's own (no file pages), once what it freed is given back; None where unknown.

    TVM's runtime keeps the workspace it has allocated, so after a call this holds the call's peak, while a
    high-water mark would also hold everything that loading and comparing needed for a moment.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library than glibc
        return None
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
