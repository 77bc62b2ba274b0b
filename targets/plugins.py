"""Plug-ins: targets of other packages, found through the entry-point group `edgewise.targets`.

An entry point's name is the kind of device that it makes; its value is a callable that takes a `DeviceSpec` and the cache
folder and gives a `Target`. Listing them reads what packages say of themselves and imports none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

GROUP = "edgewise.targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A kind of device that an installed package makes.

    Attributes:
        kind: the entry point's name.
        value: where its callable is, as "module:name".
        package: the package and its version.
        summary: what the package says of itself, in one line.
    """

    kind: str
    value: str
    package: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """Imports the package and gives its callable.

        Raises:
            Exception: whatever the import raises.
        """
        made: Callable[..., Any] = metadata.EntryPoint(self.kind, self.value, GROUP).load()
        return made


def plugins() -> tuple[Plugin, ...]:
    """Every installed plug-in, by kind; two packages may claim the same kind."""
    found = set()
    for point in metadata.entry_points(group=GROUP):
        package = point.dist
        about = "" if package is None else f"{package.name} {package.version}"
        summary = "" if package is None else " ".join((package.metadata["Summary"] or "").split())
        found.add((point.name, point.value, about, summary))
    return tuple(Plugin(kind=kind, value=value, package=package, summary=summary) for kind, value, package, summary in sorted(found))
