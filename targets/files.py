"""Files that appear whole: written beside their place, then renamed into it."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a path to write to, in the same folder; what lies there takes the name `path` in one step, or goes on an error.

    Args:
        durable: flush it to the disk first, so that a machine that loses power keeps the old file or the new one.
    """
    # Not `tempfile`: its files are private to the user, this one should have the mode of any other new file.
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        if durable:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
