"""`DeviceSpec`: what a device is, as data: one TOML file in `targets/devices/`."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

Backend = Literal["llvm", "cuda", "opencl"]
State = Literal["run", "cross-compiled", "described"]
Linker = Literal["auto", "zig", "gcc", "ndk", "none"]
Dot = Literal["", "vnni", "sdot"]


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
        dot: byte dot products it has: "vnni" (x86), "sdot" (ARM) or "" for none; None: detected.
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
        for key in ("cores", "vector_bytes", "memory_bytes", "port"):
            value = values.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidDevice(f"{source}: {key}={value!r} is not a whole number of 0 or more; correct it")
        for key in ("read_bytes_per_s", "flops_per_s", "cooldown_s", "timeout_s"):
            value = values.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InvalidDevice(f"{source}: {key}={value!r} is not a number of 0 or more; correct it")
        for key in ("name", "kind", "description", "triple", "cpu", "arch", "host", "key"):
            if values.get(key) is not None and not isinstance(values[key], str):
                raise InvalidDevice(f"{source}: {key}={values[key]!r} is not a text; correct it")
        for key, known_values in (("state", get_args(State)), ("backend", get_args(Backend)), ("linker", get_args(Linker))):
            if values.get(key, known_values[0]) not in known_values:
                raise InvalidDevice(f"{source}: {key}={values[key]!r} is not one of {', '.join(known_values)}; choose one")
        if values.get("dot") not in (None, "", "vnni", "sdot"):
            raise InvalidDevice(f"{source}: dot={values['dot']!r} is not one of vnni, sdot or empty; correct it or leave it out")
        features = values.get("features", ())
        if not isinstance(features, list | tuple) or not all(isinstance(feature, str) for feature in features):
            raise InvalidDevice(f"{source}: features={features!r} is not a list of texts; correct it")
        affinity = values.get("affinity", ())
        whole = isinstance(affinity, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in affinity)
        if not whole:
            raise InvalidDevice(f"{source}: affinity={affinity!r} is not a list of processor numbers; correct it")
        if not isinstance(values.get("options", {}), Mapping):
            raise InvalidDevice(f"{source}: options={values['options']!r} is not a table; correct it")
        return cls(**{**values, "features": tuple(features), "affinity": tuple(affinity)})


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
