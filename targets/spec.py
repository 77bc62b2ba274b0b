"""`DeviceSpec`: what a device is, as data: one TOML file in `targets/devices/`."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

Kind = Literal["null", "local"]


class InvalidDevice(ValueError):
    """An unknown or malformed device; the message says which field, its value, the rule and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device: how to reach it, what it is, and what it can do at most.

    Attributes:
        name: how users call it.
        kind: how it is reached: "local" (this machine, through TVM) or "null" (no hardware, no compiler).
        description: one line for people.
        triple, cpu, features: LLVM's names for the processor; None: detected.
        cores: hardware threads to use; 0: detected.
        vector_bytes: width of a SIMD register; 0: detected.
        dot: byte dot products it has: "vnni" (x86), "sdot" (ARM) or "" for none; None: detected.
        memory_bytes: memory a model may use; 0: detected.
        read_bytes_per_s, flops_per_s: measured ceilings (streaming reads, fp32 matrix product); 0: not measured yet.
    """

    name: str
    kind: Kind
    description: str = ""
    triple: str | None = None
    cpu: str | None = None
    features: tuple[str, ...] = ()
    cores: int = 0
    vector_bytes: int = 0
    dot: Literal["", "vnni", "sdot"] | None = None
    memory_bytes: int = 0
    read_bytes_per_s: float = 0.0
    flops_per_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "DeviceSpec":
        """A spec from plain values; `source` names them in errors.

        Raises:
            InvalidDevice: on an unknown key, a missing one or a value of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidDevice(f"{source}: {key!r} is not a field of a device; the fields are {', '.join(known)}")
        for key in ("name", "kind"):
            if key not in values:
                raise InvalidDevice(f"{source}: {key} is missing; a device needs it")
        if values["kind"] not in ("null", "local"):
            raise InvalidDevice(f"{source}: kind={values['kind']!r} is not one of local, null; choose one")
        for key in ("cores", "vector_bytes", "memory_bytes"):
            value = values.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidDevice(f"{source}: {key}={value!r} is not a whole number of 0 or more; correct it")
        for key in ("read_bytes_per_s", "flops_per_s"):
            value = values.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InvalidDevice(f"{source}: {key}={value!r} is not a number of 0 or more; correct it")
        for key in ("name", "description", "triple", "cpu"):
            if values.get(key) is not None and not isinstance(values[key], str):
                raise InvalidDevice(f"{source}: {key}={values[key]!r} is not a text; correct it")
        if values.get("dot") not in (None, "", "vnni", "sdot"):
            raise InvalidDevice(f"{source}: dot={values['dot']!r} is not one of vnni, sdot or empty; correct it or leave it out")
        features = values.get("features", ())
        if not isinstance(features, list | tuple) or not all(isinstance(feature, str) for feature in features):
            raise InvalidDevice(f"{source}: features={features!r} is not a list of texts; correct it")
        return cls(**{**values, "features": tuple(features)})


def device_names() -> tuple[str, ...]:
    """Names of the shipped devices."""
    return tuple(sorted(p.name.removesuffix(".toml") for p in _devices().iterdir() if p.name.endswith(".toml")))


def load_spec(name: str) -> DeviceSpec:
    """The device of that name.

    Raises:
        InvalidDevice: if there is none, or its file is malformed.
    """
    if name not in device_names():
        raise InvalidDevice(f"target {name!r} is not known; choose one of {', '.join(device_names())}")
    path = _devices() / f"{name}.toml"
    return DeviceSpec.from_dict(tomllib.loads(path.read_text(encoding="utf-8")), str(path.name))


def _devices() -> Any:
    return resources.files("targets") / "devices"
