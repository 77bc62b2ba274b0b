"""Names that change with what a file was made from, so that one made before a change is never taken for one made after it.

Both sides import this: each names the files it makes by its own packages.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_DIGITS = 12


def digest(*values: Any) -> str:
    """Twelve hexadecimal digits of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def maker(packages: tuple[str, ...], sources: tuple[str, ...]) -> str:
    """What makes a file, as twelve hexadecimal digits: the installed versions of packages and the text of source files.

    To be taken where the sources are imported: they may be edited while a long comparison runs.

    Args:
        packages: names of distributions; one that is not installed counts as such, and is an error where it is used.
        sources: paths in the repository.
    """
    texts = {path: hashlib.sha256((_ROOT / path).read_bytes()).hexdigest() for path in sources}
    return digest({package: _version(package) for package in packages}, texts)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
