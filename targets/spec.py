"""`DeviceSpec`: what a device is, as data: one TOML file, shipped in `targets/devices/` or the user's own.

A device of a user's is a file in the folder `own_devices()`, or any TOML file whose path is given instead of a name.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from targets.plugins import plugins

Backend = Literal["llvm", "cuda", "opencl"]
State = Literal["run", "cross-compiled", "described"]
Linker = Literal["auto", "zig", "gcc", "ndk", "none"]
Dot = Literal["", "vnni", "madd", "sdot"]
Origin = Literal["shipped", "own", "plug-in"]

_NAME = re.compile(r"(?!.*\.toml$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERNS = {
    "name": (_NAME, "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit, and not a file's that ends in .toml"),
    "kind": (_NAME, "local, rpc, tracker, null or the name of a plug-in"),
    # What reaches a compiler's or linker's command line is a word that no option looks like.
    "triple": (re.compile(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+){1,3}"), "LLVM's name of a machine, as in aarch64-linux-gnu"),
    "cpu": (re.compile(r"([A-Za-z0-9][A-Za-z0-9._+-]*)?"), "LLVM's name of a processor, as in cortex-a76"),
    "arch": (re.compile(r"[A-Za-z0-9_]*"), "a GPU's architecture, as in sm_87"),
    "host": (re.compile(r"([A-Za-z0-9:][A-Za-z0-9:._%-]*)?"), "a host's name or address, as in 127.0.0.1"),
}
_FEATURE = re.compile(r"[+-][A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_PORT = 65535
_MOST_VECTOR_BYTES = 256


class InvalidDevice(ValueError):
    """An unknown or malformed device; the message says which field, its value, the rule and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device: how to reach it, what it is, and what it can do at most.

    Attributes:
        name: how users call it.
        kind: how it is reached: "local" (this machine), "rpc" (a TVM RPC server at `host` and `port`), "tracker" (any free
            one of the servers that registered as `key` with the TVM RPC tracker at `host` and `port`), "null" (no
            hardware, no compiler), or the name of a plug-in of the entry-point group `edgewise.targets`.
        description: one line for people.
        state: what has been tried: "run" (measured on such a device), "cross-compiled" (programs for it are built, and run under
            emulation at most), "described" (nothing but this file).
        backend: what computes: "llvm" (the processor), "cuda" or "opencl" (a GPU).
        triple, cpu, features: LLVM's names for the processor, that of the host for a GPU; None: detected.
        arch: the GPU's architecture as its compiler names it, as in "sm_87"; "" for a processor.
        cores: hardware threads to use; 0: detected.
        affinity: the processors to use, by number; empty: any.
        vector_bytes: width of a SIMD register; 0: detected.
        dot: byte dot products it has: "vnni" (x86 of late), "madd" (x86 with AVX2), "sdot" (ARM) or "" for none; None: detected.
        memory_bytes: memory a model may use; 0: detected.
        host, port, key: where an RPC server or tracker listens, and the key its servers registered with.
        linker: what makes shared libraries for it: "zig", "gcc" (a cross compiler), "ndk" (Android's), "none" (an archive
            of objects goes to the device, which links it), or "auto" (the first of them that is there).
        cooldown_s: rest before each measurement, for devices that get hot.
        timeout_s: most seconds of a session on the device; 0: the default of the measurement.
        read_bytes_per_s, flops_per_s: measured ceilings (streaming reads, fp32 matrix product); 0: not measured yet.
        options: what a plug-in wants to know besides; it says what is allowed.
    """

    name: str
    kind: str
    description: str = ""
    state: State = "described"
    backend: Backend = "llvm"
    triple: str | None = None
    cpu: str | None = None
    features: tuple[str, ...] = ()
    arch: str = ""
    cores: int = 0
    affinity: tuple[int, ...] = ()
    vector_bytes: int = 0
    dot: Dot | None = None
    memory_bytes: int = 0
    host: str = ""
    port: int = 0
    key: str = ""
    linker: Linker = "auto"
    cooldown_s: float = 0.0
    timeout_s: float = 0.0
    read_bytes_per_s: float = 0.0
    flops_per_s: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)} | {
            "options": dict(self.options)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "DeviceSpec":
        """A spec from plain values; `source` names them in errors.

        Raises:
            InvalidDevice: on an unknown key, a missing one, or a value of the wrong type or form.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InvalidDevice(f"{source}: {key!r} is not a field of a device{close(key, known)}; the fields are {', '.join(known)}")
        for key in ("name", "kind"):
            if key not in values:
                raise InvalidDevice(f"{source}: {key} is missing; a device needs it")
        for problem in (_wrong_number, _wrong_text, _wrong_choice, _wrong_list):
            if found := problem(values):
                key, rule = found
                raise InvalidDevice(f"{source}: {key}={values[key]!r} is not {rule}")
        lists = {key: tuple(values[key]) for key in ("features", "affinity") if key in values}
        return cls(**{**values, **lists})


# --- rules: each gives the first field that breaks it, and what the value is not -----------------


def _wrong_number(values: Mapping[str, Any]) -> tuple[str, str] | None:
    for key in ("cores", "vector_bytes", "memory_bytes", "port"):
        if not _whole(values.get(key, 0)):
            return key, "a whole number of 0 or more; correct it"
    for key in ("read_bytes_per_s", "flops_per_s", "cooldown_s", "timeout_s"):
        value = values.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            return key, "a number of 0 or more; correct it"
    if values.get("port", 0) > _MOST_PORT:
        return "port", f"a port, which are 1 to {_MOST_PORT}; correct it"
    vector = values.get("vector_bytes", 0)
    if vector and (vector < 4 or vector > _MOST_VECTOR_BYTES or vector & (vector - 1)):
        return "vector_bytes", f"a power of two from 4 to {_MOST_VECTOR_BYTES}; correct it"
    return None


def _wrong_text(values: Mapping[str, Any]) -> tuple[str, str] | None:
    for key in ("name", "kind", "description", "triple", "cpu", "arch", "host", "key"):
        value = values.get(key)
        if value is None and key in ("triple", "cpu"):
            continue
        if key in values and not isinstance(value, str):
            return key, "a text; correct it"
        if isinstance(value, str) and not value.isprintable():
            return key, "a line of printable characters; correct it"
        pattern, form = _PATTERNS.get(key, (None, ""))
        if pattern is not None and isinstance(value, str) and not pattern.fullmatch(value):
            return key, f"{form}; correct it"
    return None


def _wrong_choice(values: Mapping[str, Any]) -> tuple[str, str] | None:
    for key, choices in (("state", get_args(State)), ("backend", get_args(Backend)), ("linker", get_args(Linker))):
        if key in values and values[key] not in choices:
            return key, f"one of {', '.join(choices)}; choose one"
    if values.get("dot") not in (None, *get_args(Dot)):
        return "dot", "one of vnni, madd, sdot or empty; correct it or leave it out"
    return None


def _wrong_list(values: Mapping[str, Any]) -> tuple[str, str] | None:
    features, affinity, options = values.get("features", ()), values.get("affinity", ()), values.get("options", {})
    if not isinstance(features, list | tuple) or not all(isinstance(feature, str) for feature in features):
        return "features", "a list of texts; correct it"
    if not all(_FEATURE.fullmatch(feature) for feature in features):
        return "features", 'a list of LLVM\'s names of features, each with its sign, as in ["+dotprod"]; correct it'
    if not isinstance(affinity, list | tuple) or not all(map(_whole, affinity)) or len(set(affinity)) < len(affinity):
        return "affinity", "a list of processor numbers, each once; correct it"
    if not isinstance(options, Mapping):
        return "options", "a table; correct it"
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError):
        return "options", "a table of texts, numbers, truth values and lists of them; correct it"
    return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# --- devices by name -----------------------------------------------------------------------------


def own_devices() -> Path:
    """The folder of the user's device files: `devices` in $EDGEWISE_CONFIG, else in `edgewise` of the user's configuration."""
    if given := os.environ.get("EDGEWISE_CONFIG"):
        return Path(given) / "devices"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgewise" / "devices"


def device_origins() -> dict[str, Origin]:
    """Every device that has a name, sorted, and where it comes from. A shipped name stays the shipped device's."""
    found: dict[str, Origin] = {plugin.kind: "plug-in" for plugin in plugins() if _NAME.fullmatch(plugin.kind)}
    found |= dict.fromkeys(_stems(own_devices().glob("*.toml")), "own")
    found |= dict.fromkeys(_stems(_shipped().iterdir()), "shipped")
    return dict(sorted(found.items()))


def device_names() -> tuple[str, ...]:
    """Names of all devices: those shipped, the user's own, and one for each plug-in."""
    return tuple(device_origins())


def is_path(target: str) -> bool:
    """Whether a target is given as a file rather than by name."""
    return target.endswith(".toml") or "/" in target or os.sep in target


def own_file(target: str) -> Path | None:
    """The file that a device of the user's is described in; None for a shipped one or a plug-in's."""
    if is_path(target):
        return Path(target)
    return own_devices() / f"{target}.toml" if device_origins().get(target) == "own" else None


def load_spec(target: str) -> DeviceSpec:
    """The device of that name, or the one that a TOML file describes.

    Raises:
        InvalidDevice: if there is none, or its file is malformed.
    """
    if is_path(target):
        return read_device(Path(target))
    origins = device_origins()
    if target not in origins:
        names = ", ".join(origins)
        raise InvalidDevice(
            f"target {target!r} is not known{close(target, origins)}; choose one of {names}, "
            "or describe yours: `edgewise targets add --help`"
        )
    if origins[target] == "shipped":
        if (own_devices() / f"{target}.toml").exists():
            raise InvalidDevice(f"{own_devices() / target}.toml has the name of a shipped device; rename it")
        text = (_shipped() / f"{target}.toml").read_text(encoding="utf-8")
        return DeviceSpec.from_dict(tomllib.loads(text), f"{target}.toml")
    if origins[target] == "own":
        return read_device(own_devices() / f"{target}.toml")
    plugin = next(plugin for plugin in plugins() if plugin.kind == target)
    return DeviceSpec(name=target, kind=target, description=plugin.summary if plugin.summary.isprintable() else "")


def read_device(path: Path) -> DeviceSpec:
    """The device that a user's TOML file describes; its name is the file's unless it says another.

    Raises:
        InvalidDevice: if the file cannot be read, is malformed, or takes the name of a shipped device.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidDevice(f"target {str(path)!r} does not exist; give a TOML file, or a name from `edgewise targets list`") from None
    except OSError as error:
        raise InvalidDevice(f"target {str(path)!r} cannot be read ({error.strerror}); give a TOML file that can") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise InvalidDevice(f"{path}: this is not TOML ({' '.join(str(error).split())}); correct it") from None
    spec = DeviceSpec.from_dict({"name": path.stem, **values}, str(path))
    if path.parent == own_devices() and spec.name != path.stem:
        raise InvalidDevice(f"{path}: name={spec.name!r} is not that of the file; leave it out, or rename the file")
    if spec.name in _stems(_shipped().iterdir()):
        raise InvalidDevice(f"{path}: name={spec.name!r} is that of a shipped device; choose another")
    return spec


def close(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where one of the known words is close, else nothing."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _stems(paths: Iterable[Any]) -> list[str]:
    """Names of the device files among paths; a file whose name no device can have is none."""
    stems = [path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml")]
    return [stem for stem in stems if _NAME.fullmatch(stem)]


def _shipped() -> Any:
    return resources.files("targets") / "devices"
