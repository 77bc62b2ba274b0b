"""`Target`: the two things a device must do, and how one is made from what is known of the device.

`compile` is host-bound and cached; `measure` owns the device, so only one runs at a time.
"""

from pathlib import Path
from typing import Protocol

from targets.measurement import Measurement, Timing
from targets.plugins import plugins
from targets.program import Program, Sample
from targets.spec import DeviceSpec, InvalidDevice, load_spec

KINDS = ("local", "rpc", "tracker", "null")
"""How devices are reached that need no plug-in."""


class TargetError(RuntimeError):
    """A compile, check or measurement that failed; it costs one trial, never the run.

    The message is one line that says which step failed and why.
    """


class Target(Protocol):
    """A device that programs can be compiled for and measured on."""

    @property
    def spec(self) -> DeviceSpec:
        """What the device is, with detected values filled in and ceilings measured (asked once, then kept)."""
        ...

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Compiles a program; called on the host, before `measure`.

        Returns:
            The artifact, a folder or file below `out_dir`.

        Raises:
            TargetError: if it does not compile in time.
        """
        ...

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """Runs the sample's steps, compares every output, and only then times the functions.

        Raises:
            TargetError: if an output differs (saying where), the device fails, or time is up.
        """
        ...

    def close(self) -> None:
        """Ends whatever the target keeps alive; called once, also after errors."""
        ...


def load_target(name: str, cache_dir: Path | None = None) -> Target:
    """The target of that name, or the one that a TOML file describes; `cache_dir` keeps what is compiled and detected.

    Raises:
        InvalidDevice: if there is no such target, its file is malformed, or it does not say how the device is reached.
        TargetError: if its plug-in fails.
    """
    return make_target(load_spec(name), cache_dir)


def make_target(spec: DeviceSpec, cache_dir: Path | None = None) -> Target:
    """The target that a device is, ready to use.

    Raises:
        InvalidDevice: if the spec does not fit its kind, or nothing makes that kind.
        TargetError: if its plug-in fails.
    """
    if spec.kind not in KINDS:
        return _from_plugin(spec, cache_dir)
    if spec.options:
        raise InvalidDevice(
            f"target {spec.name!r}: options={dict(spec.options)!r} are for plug-ins, and kind={spec.kind!r}; leave them out"
        )
    if spec.kind == "null":
        from targets.null import NullTarget

        if not (spec.read_bytes_per_s and spec.flops_per_s):
            raise InvalidDevice(
                f"target {spec.name!r}: read_bytes_per_s and flops_per_s are missing; add them to its file, or begin with --like null"
            )
        return NullTarget(spec)
    if spec.kind == "local":
        from targets.local import LocalTarget

        if spec.linker == "none":
            raise InvalidDevice(f"target {spec.name!r}: linker='none' is for devices that link themselves; leave it out")
        return LocalTarget(spec, cache_dir)
    if not spec.host:
        how = "--tracker HOST:PORT --key KEY" if spec.kind == "tracker" else "--host HOST"
        raise InvalidDevice(f"target {spec.name!r} has no host; say where yours is: `edgewise targets add NAME --like {spec.name} {how}`")
    from targets.rpc import RpcTarget

    return RpcTarget(spec, cache_dir)


def _from_plugin(spec: DeviceSpec, cache_dir: Path | None) -> Target:
    """The target that an installed package makes.

    Raises:
        InvalidDevice: if no package makes that kind of device, or several do.
        TargetError: if it cannot be imported, or fails.
    """
    found = plugins()
    mine = [plugin for plugin in found if plugin.kind == spec.kind]
    if not mine:
        known = ", ".join((*KINDS, *sorted({plugin.kind for plugin in found})))
        raise InvalidDevice(
            f"target {spec.name!r}: kind={spec.kind!r} is not one of {known}; correct it, or install the package that makes such devices"
        )
    if len(mine) > 1:
        packages = " and ".join(plugin.package or plugin.value for plugin in mine)
        raise InvalidDevice(f"target {spec.name!r}: kind={spec.kind!r} is claimed by {packages}; uninstall one of them")
    try:
        target: Target = mine[0].load()(spec, cache_dir)
        return target
    except (InvalidDevice, TargetError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TargetError(f"target {spec.name!r}: the plug-in {mine[0].value} of {mine[0].package} does not start ({why})") from error
