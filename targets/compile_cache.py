"""`CompileCache`: what was compiled for one target, on disk: files by name, safe to share, bounded in size.

Needs no compiler, so that it is counted and emptied at once.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.files import whole

MOST_BYTES = 1 << 30
"""Size of one target's folder, approximately: some fifty thousand kernels."""
PARTS = 256
"""Folders that a target's files are spread over. Each keeps its own share of the bound, so that adding a file
looks at one of them and reading one at none."""
KEPT_S = 600.0
"""A file used within this many seconds stays whatever the bound says: a program may be about to be linked from it."""
KERNEL, STAGE = ".o", ".json"
"""How names of kernels and of stages end."""
_ABANDONED_S = 3600.0
"""An unfinished file this old was left by a process that was killed."""
_FOLDER, _ABOUT = "compiled", "about.json"


class CompileCache:
    """Files of one target. Several processes may use it at once: a file appears whole, or not at all.

    Args:
        root: the cache folder of all targets.
        about: what the files depend on, in plain JSON values; another `about` is another folder.
        most_bytes: the size that is kept; see `PARTS` and `KEPT_S` for how closely.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], most_bytes: int = MOST_BYTES) -> None:
        text = json.dumps(dict(about), sort_keys=True)
        self.folder = root / _FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._text, self._part_bytes = text, most_bytes // PARTS

    def find(self, name: str) -> Path | None:
        """The file of that name, which counts as a use; None if there is none."""
        path = self._path(name)
        try:
            if path.stat().st_size == 0:  # what a machine that lost power may leave
                return None
            os.utime(path)  # the least recently used go first
        except FileNotFoundError:
            return None
        return path

    def add(self, name: str, write: Callable[[Path], None]) -> Path:
        """Keeps the file that `write` writes at the path it is given."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._describe()
        with whole(path, durable=False) as part:
            write(part)
        self._trim(path.parent)
        return path

    def _path(self, name: str) -> Path:
        return self.folder / f"{zlib.crc32(name.encode()) % PARTS:02x}" / name

    def _describe(self) -> None:
        about = self.folder / _ABOUT
        if about.exists():
            return
        with whole(about, durable=False) as part:
            part.write_text(self._text, encoding="utf-8")

    def _trim(self, part: Path) -> None:
        """Removes what was used longest ago until the part fits its share, what a killed process left half written included."""
        files = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _files(part) if not _is_being_made(path, stat))
        total = sum(size for _, size, _ in files)
        for used, size, path in files:
            if total <= self._part_bytes or used > time.time() - KEPT_S:
                return
            path.unlink(missing_ok=True)
            total -= size


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one target's folder holds.

    Attributes:
        about: what the files depend on; empty if that cannot be read.
        nbytes: size of all files.
        stages, kernels: how many there are.
    """

    folder: Path
    about: dict[str, Any]
    nbytes: int
    stages: int
    kernels: int


def usage(root: Path) -> list[Usage]:
    """What the cache below `root` holds, for each target that anything is kept of, the largest first."""
    found = []
    for folder in (root / _FOLDER).glob("*/"):
        files = [entry for part in folder.glob("*/") for entry in _files(part)]
        names = [path.name for path, _ in files if not path.name.startswith(".")]
        if files:
            found.append(
                Usage(
                    folder=folder,
                    about=_about(folder),
                    nbytes=sum(stat.st_size for _, stat in files),
                    stages=sum(name.endswith(STAGE) for name in names),
                    kernels=sum(name.endswith(KERNEL) for name in names),
                )
            )
    return sorted(found, key=lambda entry: -entry.nbytes)


def clear(root: Path) -> list[Usage]:
    """Removes everything that was compiled, and returns what that was. What was measured of a machine stays.

    Folders stay, since another process may be adding a file to one; a program that it is linking meanwhile may miss a
    file, and is then compiled again.
    """
    found = usage(root)
    for entry in found:
        for path, stat in (file for part in entry.folder.glob("*/") for file in _files(part)):
            if not _is_being_made(path, stat):
                path.unlink(missing_ok=True)
    return found


def _is_being_made(path: Path, stat: os.stat_result) -> bool:
    return path.name.startswith(".") and stat.st_mtime > time.time() - _ABANDONED_S


def _files(part: Path) -> list[tuple[Path, os.stat_result]]:
    files = []
    with contextlib.suppress(FileNotFoundError):
        for path in part.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process trims, too
                files.append((path, path.stat()))
    return files


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


@functools.cache
def sources(module: str) -> str:
    """A hash of the source of a module, or of its whole package if it is in one; asked once, as modules are loaded once."""
    package = module.partition(".")[0]
    found = sys.modules[package]
    file = getattr(found, "__file__", None)
    paths = sorted(path for folder in getattr(found, "__path__", ()) for path in Path(folder).rglob("*.py"))
    content = hashlib.sha256()
    for path in paths or ([Path(file)] if file else []):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()
