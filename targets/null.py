"""`NullTarget`: runs the whole program flow without hardware, compiler or arithmetic.

Times follow from the bytes of weights and state a function reads and the operations its shapes imply,
at the rates of the device file: deterministic, monotonic in the work, and not a claim about any machine.
"""

import json
import math
from pathlib import Path

from targets.measurement import Measurement, Timing
from targets.program import Function, Program, Sample, TensorSpec
from targets.spec import DeviceSpec


class NullTarget:
    """A device that computes nothing and takes a counted time."""

    def __init__(self, spec: DeviceSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> DeviceSpec:
        """The device file's values, as they are."""
        return self._spec

    def compile(self, program: Program, out_dir: Path) -> Path:
        """Writes down what the program's functions read; exports nothing."""
        artifact = out_dir / "null.json"
        out_dir.mkdir(parents=True, exist_ok=True)
        counted = {name: self._count(program, function) for name, function in program.functions.items()}
        artifact.write_text(json.dumps({"functions": counted, "weight_bytes": program.weight_bytes}), encoding="utf-8")
        return artifact

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        """The counted time of each function, `timing.repeats` times over; nothing is run, so errors are zero."""
        counted = json.loads(artifact.read_text(encoding="utf-8"))
        times = {}
        for name, (_, rows) in sample.timed.items():
            work = counted["functions"][name]
            read_bytes = work["weight_bytes"] + rows * work["state_row_bytes"]
            operations = 2 * work["rows"] * work["weight_values"]
            seconds = 1e-6 + max(read_bytes / self._spec.read_bytes_per_s, operations / self._spec.flops_per_s)
            times[name] = (seconds,) * timing.repeats
        return Measurement(
            device=self._spec.name,
            times_s=times,
            reference_s=(1e-3,) * timing.repeats,
            measured_peak_bytes=None,
            workspace_bytes={name: work["workspace_bytes"] for name, work in counted["functions"].items()},
            packed_bytes=counted["weight_bytes"],
            errors={step.function: 0.0 for step in sample.steps},
        )

    def close(self) -> None:
        """Nothing is kept alive."""

    @staticmethod
    def _count(program: Program, function: Function) -> dict[str, int]:
        rows = _values(next(iter(function.inputs.values())))
        weights = [program.weights[name] for call in function.calls for name in call.weights.values()]
        state_rows = [_values(spec) * 4 for name, spec in program.state.items() if name in function.inputs]
        return {
            "rows": rows,
            "weight_bytes": sum(weight.nbytes for weight in weights),
            "weight_values": sum(map(_values, weights)),
            "state_row_bytes": sum(state_rows),
            "workspace_bytes": rows * 4096,
        }


def _values(spec: TensorSpec) -> int:
    """Elements of a tensor, in one row if the number of rows varies."""
    return math.prod(d for d in spec.shape if isinstance(d, int))
