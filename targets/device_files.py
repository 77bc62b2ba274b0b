"""The user's device files: written, changed and removed. `targets/spec.py` reads them."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.files import whole
from targets.spec import DeviceSpec, InvalidDevice, device_origins, load_spec, own_devices, own_file

_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)


def to_toml(spec: DeviceSpec) -> str:
    """A device file that reads as `spec`: what differs from the defaults, in the order of the fields, `options` last."""
    lines = []
    for field in dataclasses.fields(DeviceSpec):
        value = getattr(spec, field.name)
        if field.name != "options" and (field.default is dataclasses.MISSING or value != field.default):
            lines.append(f"{field.name} = {_toml(value)}")
    if spec.options:
        lines += ["", "[options]", *(f"{_toml(str(key))} = {_toml(value)}" for key, value in spec.options.items())]
    return "\n".join(lines) + "\n"


def add_device(spec: DeviceSpec, *, replace: bool = False) -> Path:
    """Writes a device file into the user's folder.

    Args:
        replace: whether a device of the user's that has this name may go.

    Returns:
        Its path.

    Raises:
        InvalidDevice: if the name is taken, or `spec` breaks a rule of device files.
    """
    origin = device_origins().get(spec.name)
    path = own_devices() / f"{spec.name}.toml"
    if origin in ("shipped", "plug-in"):
        whose = "a shipped device" if origin == "shipped" else "an installed plug-in"
        raise InvalidDevice(f"device {spec.name!r}: the name is that of {whose}; choose another, as in my-{spec.name}")
    if path.exists() and not replace:
        raise InvalidDevice(f"device {spec.name!r} is there already, in {path}; give --replace, or another name")
    text = to_toml(spec)
    try:
        values = tomllib.loads(text)
    except ValueError:
        raise InvalidDevice(
            f"device {spec.name!r}: options={dict(spec.options)!r} is not a table of texts, numbers, truth values and lists; correct it"
        ) from None
    DeviceSpec.from_dict(values, f"device {spec.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, text)
    return path


def remove_device(name: str) -> Path:
    """Removes a device of the user's.

    Returns:
        The path that was.

    Raises:
        InvalidDevice: if it is not in the user's folder.
    """
    path = own_devices() / f"{name}.toml"
    origin = device_origins().get(name)
    if origin == "own" or (origin == "shipped" and path.exists()):
        path.unlink()
        return path
    if origin is None:
        load_spec(name)  # says what is known
    whose = {"shipped": "ships with edgewise", "plug-in": "is that of an installed plug-in"}.get(origin or "", "is a file of yours")
    raise InvalidDevice(f"device {name!r} {whose}; only devices that `edgewise targets add` wrote are removed")


def set_values(target: str, changes: Mapping[str, Any]) -> Path:
    """Changes values of a device file of the user's and leaves the rest of its text, comments too, as it is.

    Returns:
        The file's path.

    Raises:
        InvalidDevice: if the device has no file of the user's, or it cannot be changed line by line.
    """
    path = own_file(target)
    if path is None:
        raise InvalidDevice(f"device {target!r} has no file of yours; `edgewise targets add NAME --like {target}` makes one")
    expected = dataclasses.replace(load_spec(target), **changes)
    text = path.read_text(encoding="utf-8")
    for key, value in changes.items():
        text = _with_value(text, key, value)
    try:
        got = DeviceSpec.from_dict({"name": path.stem, **tomllib.loads(text)}, str(path))
    except ValueError:
        got = None
    if got != expected:
        lines = ", ".join(f"{key} = {_toml(value)}" for key, value in changes.items())
        raise InvalidDevice(f"{path} cannot be changed line by line; write these into it yourself: {lines}")
    _write(path, text)
    return path


def _with_value(text: str, key: str, value: Any) -> str:
    """The text with `key = value` in its first table: where the key was, else at the end of that table."""
    first = _TABLE.search(text)
    head, rest = (text, "") if first is None else (text[: first.start()], text[first.start() :])
    line = f"{key} = {_toml(value)}"
    there = re.compile(rf"^[ \t]*{key}[ \t]*=[^#\n]*?([ \t]*(?:#.*)?)$", re.MULTILINE)
    if there.search(head):
        return there.sub(lambda match: line + match[1], head, count=1) + rest
    gap = "\n" if head and not head.endswith("\n") else ""
    if not rest:
        return f"{head}{gap}{line}\n"
    return f"{head.rstrip()}\n{line}\n\n{rest}" if head.strip() else f"{line}\n\n{rest}"


def _toml(value: Any) -> str:
    """A value in TOML, whose texts, numbers, truth values and lists of printable texts are written as JSON's are."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
