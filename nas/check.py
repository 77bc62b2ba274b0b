"""`edgewise targets check`: whether a device works, how fast it is, and how steady, one step after the other.

Each step says what it found in a line. What a device cannot work without fails, with the command that mends it; what makes
its times doubtful (a wide spread, times that grow while it gets hot, a clock below its best) is a warning.
"""

import dataclasses
import importlib.metadata
import importlib.util
import shlex
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from targets.link import NoLinker, link_command
from targets.measurement import NOISY_IQR, SLOW, Measurement, Timing
from targets.spec import DeviceSpec, InvalidDevice
from targets.target import KINDS, Target, TargetError, make_target

Status = Literal["ok", "warning", "failed"]

DRIFT = 0.05
"""A change of the times from their first third to their last that is told of."""
REPEATS = 40
"""How often the small model is timed unless the user says otherwise: a few seconds of each function."""
_CONNECT_S = 5.0
_RPC_PACKAGES = ("tornado", "psutil", "cloudpickle")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStep:
    """One thing that was looked at.

    Attributes:
        name: what it was.
        status: whether it is all right; nothing follows a step that failed.
        detail: what was found, in a line.
        values: the figures in it, in SI units.
    """

    name: str
    status: Status
    detail: str
    values: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "values": dict(self.values)}


def check_device(spec: DeviceSpec, cache_dir: Path, repeats: int = REPEATS) -> Iterator[CheckStep]:
    """Looks at a device step by step; the ceilings are measured, whatever `spec` says of them; the best of any session counts.

    Args:
        spec: of the device file.
        cache_dir: where compiled programs are kept.
        repeats: how often a small model is timed.

    Yields:
        What was found; the last step may be one that failed.
    """
    for look in (_tools, _reachable):
        step = look(spec)
        if step is not None:
            yield step
            if step.status == "failed":
                return
    # The null device cannot measure what it can do; its file says it.
    fresh = spec if spec.kind == "null" else dataclasses.replace(spec, flops_per_s=0.0, read_bytes_per_s=0.0)
    try:
        target = make_target(fresh, cache_dir)
    except (InvalidDevice, TargetError) as error:
        yield CheckStep(name="starts", status="failed", detail=str(error))
        return
    try:
        yield from _on_device(target, repeats)
    finally:
        target.close()


def ceilings(steps: Mapping[str, CheckStep]) -> dict[str, float]:
    """What the steps, by name, found that a device can do at most, by the names of a device file."""
    found = steps["roofline"].values if "roofline" in steps else {}
    return {name: float(f"{found[name]:.4g}") for name in ("read_bytes_per_s", "flops_per_s") if name in found}


# --- before anything is sent ------------------------------------------------------------------


def _tools(spec: DeviceSpec) -> CheckStep | None:
    """Whether what this machine needs is installed."""
    if spec.kind == "null" or spec.kind not in KINDS:
        return None
    if spec.kind != "local":
        missing = [name for name in _RPC_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            return CheckStep(name="tools", status="failed", detail=f"{', '.join(missing)} not installed; run `pip install 'edgewise[rpc]'`")
    if spec.linker == "none":
        return CheckStep(name="tools", status="ok", detail="objects are sent as they are; the device links them")
    try:
        command = link_command(None if spec.kind == "local" else spec.triple, spec.linker)
    except NoLinker as error:
        return CheckStep(name="tools", status="failed", detail=str(error))
    return CheckStep(name="tools", status="ok", detail=f"links with {'zig' if 'ziglang' in command else command[0]}")


def _reachable(spec: DeviceSpec) -> CheckStep | None:
    """Whether something listens where the device is said to be."""
    if spec.kind not in ("rpc", "tracker") or not (spec.host and spec.port):
        return None
    where = f"{spec.host}:{spec.port}"
    if spec.kind == "tracker":
        from targets.tracker import TrackerError, servers

        try:
            count = servers(spec.host, spec.port, spec.key)
        except TrackerError as error:
            start = f"python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {spec.port}"
            return CheckStep(name="reachable", status="failed", detail=f"{error}; start one with `{start}`, or its SSH tunnel")
        if not count:
            start = f"{_server(spec)} --tracker {where} --key {shlex.quote(spec.key)} --custom-addr 127.0.0.1"
            detail = f"the tracker at {where} has no server with key {spec.key!r}; start one on the device with `{start}`"
            return CheckStep(name="reachable", status="failed", detail=detail)
        detail = f"the tracker at {where} has {count} server{'s' if count > 1 else ''} with key {spec.key!r}"
        return CheckStep(name="reachable", status="ok", detail=detail, values={"servers": count})
    try:
        socket.create_connection((spec.host, spec.port), timeout=_CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        start = f"{_server(spec)} --port {spec.port} --port-end {spec.port + 1}"
        reason = getattr(error, "strerror", None) or str(error)
        detail = f"nothing listens at {where} ({reason}); start the server on the device with `{start}`, or its SSH tunnel"
        return CheckStep(name="reachable", status="failed", detail=detail)
    return CheckStep(name="reachable", status="ok", detail=f"something listens at {where}")


def _server(spec: DeviceSpec) -> str:
    """The command that starts a server on the device, for this machine or an SSH tunnel alone."""
    small = "TVM_USE_RUNTIME_LIB=1 " if spec.backend == "llvm" else ""  # the small runtime library has no GPUs
    return f"{small}python -m tvm.exec.rpc_server --host 127.0.0.1"


# --- on the device ------------------------------------------------------------------------------


def _on_device(target: Target, repeats: int) -> Iterator[CheckStep]:
    """The steps that run something there."""
    doing = "probe"
    try:
        yield _probe(target)
        yield _roofline(target.spec)
        with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
            doing = "numerics"
            step, artifact = _numerics(target, Path(folder))
            yield step
            doing = "spread"
            step, measurement = _repeated(target, artifact, repeats)
            yield step
        yield _drift(measurement)
        yield _clock(measurement)
    except (InvalidDevice, TargetError) as error:
        yield CheckStep(name=doing, status="failed", detail=_with_remedy(str(error)))


def _with_remedy(problem: str) -> str:
    """What TVM says when the two sides are of different versions, with what to do about it."""
    if "version mismatch" not in problem and "version ==" not in problem:
        return problem
    version = importlib.metadata.version("apache-tvm")
    return f"the device has another version of TVM ({problem}); run `pip install apache-tvm=={version}` on it"


def _probe(target: Target) -> CheckStep:
    """Has everything detected and measured that the device file leaves out."""
    began = time.monotonic()
    spec = target.spec
    took_s = time.monotonic() - began
    parts = [spec.cpu or spec.triple or spec.kind, *([f"GPU {spec.arch or spec.backend}"] if spec.backend != "llvm" else [])]
    detail = f"{', '.join(parts)}, {spec.cores} core{'s' if spec.cores != 1 else ''}; answered in {took_s:.1f} s"
    return CheckStep(name="probe", status="ok", detail=detail, values={"seconds": took_s})


def _roofline(spec: DeviceSpec) -> CheckStep:
    values = {"read_bytes_per_s": spec.read_bytes_per_s, "flops_per_s": spec.flops_per_s}
    if not all(values.values()):
        return CheckStep(name="roofline", status="warning", detail="the device does not say what it can do at most; there is no estimate")
    detail = f"reads {spec.read_bytes_per_s / 1e9:.3g} GB/s, multiplies matrices at {spec.flops_per_s / 1e9:.3g} GFLOP/s"
    return CheckStep(name="roofline", status="ok", detail=detail, values=values)


def _small_model() -> tuple[Any, Any]:
    """A model of some hundred thousand weights, and a short request: seconds of work for a slow board."""
    from search_spaces.config import SLMConfig
    from search_spaces.workload import RequestTokens

    config = SLMConfig(vocab_size=512, d_model=128, num_layers=2, attention="gqa", num_heads=4, num_kv_heads=2, ffn_dim=256, context=32)
    return config, RequestTokens(prompt=16, generated=16)


def _numerics(target: Target, folder: Path) -> tuple[CheckStep, Path]:
    """Compiles a small model and compares every output with PyTorch's."""
    from cost_models.measured import make_sample
    from cost_models.program import build_program

    config, tokens = _small_model()
    began = time.monotonic()
    artifact = target.compile(build_program(config, tokens), folder)
    took_s = time.monotonic() - began
    sample = make_sample(config, tokens, 0)
    measurement = target.measure(artifact, sample, Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0, profile_share=0.0))
    error = max(measurement.errors.values())
    values = {"largest_error": error, "compile_s": took_s}
    if not error:
        return CheckStep(
            name="numerics", status="ok", detail="nothing is computed, or nothing differs from PyTorch", values=values
        ), artifact
    detail = f"within {error:.1g} of PyTorch's largest values (limit {sample.tolerance:.0e}); compiled in {took_s:.1f} s"
    return CheckStep(name="numerics", status="ok", detail=detail, values=values), artifact


def _repeated(target: Target, artifact: Path, repeats: int) -> tuple[CheckStep, Measurement]:
    """Times the small model again and again, nothing taken anew."""
    from cost_models.measured import make_sample

    config, tokens = _small_model()
    seconds = 2.0 * repeats  # a slow device takes all its repeats, too
    timing = Timing(repeats=repeats, min_repeat_s=0.05, budget_s=seconds, timeout_s=300.0 + seconds, retries=0, profile_share=0.0)
    measurement = target.measure(artifact, make_sample(config, tokens, 0), timing)
    spreads = {name: measurement.iqr_s(name) / measurement.median_s(name) for name in measurement.times_s}
    worst = max(spreads, key=lambda name: spreads[name])
    medians = ", ".join(f"{name} {1e3 * measurement.median_s(name):.3g} ms" for name in measurement.times_s)
    count = len(measurement.times_s[worst])
    detail = f"{medians}; the middle half of {count} times spreads {spreads[worst]:.1%} of the median ({worst})"
    values = {"spread": spreads[worst], **{f"{name}_s": measurement.median_s(name) for name in measurement.times_s}}
    if spreads[worst] > NOISY_IQR:
        detail += f", more than {NOISY_IQR:.0%}: close what else runs there, or pin its threads with `affinity`"
        return CheckStep(name="spread", status="warning", detail=detail, values=values), measurement
    return CheckStep(name="spread", status="ok", detail=detail, values=values), measurement


def _drift(measurement: Measurement) -> CheckStep:
    """Whether the times grew from their first third to their last, as they do on a device that gets hot."""
    changes = {name: change for name, times in measurement.times_s.items() if (change := _change(times)) is not None}
    if not changes:
        return CheckStep(name="drift", status="warning", detail="there are fewer than three times; give more --repeats")
    worst = max(changes, key=lambda name: abs(changes[name]))
    detail = f"{changes[worst]:+.1%} from the first third of the times to the last ({worst})"
    values = {"drift": changes[worst]}
    if abs(changes[worst]) <= DRIFT:
        return CheckStep(name="drift", status="ok", detail=detail, values=values)
    why = (
        "it gets hot: cool it, or give it a longer `cooldown_s`"
        if changes[worst] > 0
        else "it was slow at first: look for other work there"
    )
    return CheckStep(name="drift", status="warning", detail=f"{detail}; {why}", values=values)


def _change(times_s: tuple[float, ...]) -> float | None:
    """The median of the last third over that of the first, less 1; None for fewer than three times."""
    third = len(times_s) // 3
    return statistics.median(times_s[-third:]) / statistics.median(times_s[:third]) - 1 if third else None


def _clock(measurement: Measurement) -> CheckStep:
    """Whether a fixed kernel took as long as at the device's best."""
    slowdown = measurement.slowdown
    detail, values = f"the reference kernel takes {slowdown:.2f} times its best", {"slowdown": slowdown}
    if slowdown <= SLOW:
        return CheckStep(name="clock", status="ok", detail=detail, values=values)
    detail += f", more than {SLOW}: see its frequency governor, power supply and temperature, and what else runs there"
    return CheckStep(name="clock", status="warning", detail=detail, values=values)
