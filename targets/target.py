"""`Target`: the two things a device must do, and the table of those we have.

`compile` is host-bound and cached; `measure` owns the device, so only one runs at a time.
"""

from pathlib import Path
from typing import Protocol

from targets.measurement import Measurement, Timing
from targets.program import Program, Sample
from targets.spec import DeviceSpec, InvalidDevice, device_names, load_spec

__all__ = ["Target", "TargetError", "device_names", "load_target"]


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
    """The target of that name, ready to use; `cache_dir` keeps what is compiled and detected.

    Raises:
        InvalidDevice: if there is no such target.
    """
    spec = load_spec(name)
    if spec.kind == "null":
        from targets.null import NullTarget

        return NullTarget(spec)
    if spec.kind == "local":
        from targets.local import LocalTarget

        return LocalTarget(spec, cache_dir)
    raise InvalidDevice(f"target {name!r}: kind={spec.kind!r} is not one of local, null; correct its file")
