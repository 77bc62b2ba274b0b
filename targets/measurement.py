"""`Measurement`: raw times as they were taken; everything else is derived from them."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NOISY_IQR = 0.10
"""A spread (interquartile range over median) above this is flagged and measured again."""
SLOW = 1.25
"""A reference kernel this many times slower than the device's best is flagged and measured again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How to time a function: repeats of a batch of runs, warm-up before and outside the count.

    Attributes:
        repeats: how many times are taken.
        min_repeat_s: each of them covers enough runs to last this long.
        warmup_s: untimed running before the first.
        budget_s: once this long has been timed, five repeats are enough.
        timeout_s: most seconds for the whole job, checks included.
        retries: how often a noisy measurement is taken again.
        profile_share: how long to run for the profile afterwards, as a share of the seconds that the timing took.
    """

    repeats: int = 15
    min_repeat_s: float = 0.01
    warmup_s: float = 0.05
    budget_s: float = 3.0
    timeout_s: float = 300.0
    retries: int = 2
    profile_share: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured of one program on one device.

    Attributes:
        device: the device's name.
        times_s: raw seconds per call of each function, in the order taken; warm-up is not among them.
        reference_s: raw seconds of a fixed kernel timed beside, to notice a machine that slowed down.
        reference_best_s: that kernel's best time on this device, when its ceilings were measured; 0 if unknown.
        measured_peak_bytes: memory that the device held for weights, state and workspace after running every function;
            None if it cannot tell.
        workspace_bytes: counted intermediate memory of each function, beside weights and state.
        packed_bytes: counted bytes of the weights in the device's layout.
        errors: largest error of each checked function, relative to the largest expected magnitude.
        attempts: how many times the timing was taken until it was quiet.
        quiet: whether all other work of ours on the machine had stopped (`targets.quiet.measuring`); None if nobody can tell.
        profile: seconds per call of each function in the kernels of each operator, measured apart from `times_s`, which cover
            what passes between kernels, too; None if the device cannot tell.
    """

    device: str
    times_s: Mapping[str, tuple[float, ...]]
    reference_s: tuple[float, ...] = ()
    reference_best_s: float = 0.0
    measured_peak_bytes: int | None = None
    workspace_bytes: Mapping[str, int]
    packed_bytes: int
    errors: Mapping[str, float]
    attempts: int = 1
    quiet: bool | None = None
    profile: Mapping[str, Mapping[str, float]] | None = None

    def median_s(self, function: str) -> float:
        """Median seconds of a call."""
        return statistics.median(self.times_s[function])

    def iqr_s(self, function: str) -> float:
        """Interquartile range of the seconds of a call (0 for fewer than two times)."""
        return interquartile_range(self.times_s[function])

    def is_noisy(self, function: str) -> bool:
        """Whether the spread is above `NOISY_IQR` of the median."""
        return self.iqr_s(function) > NOISY_IQR * self.median_s(function)

    @property
    def slowdown(self) -> float:
        """How many times slower than its best the device ran meanwhile, by the reference kernel; 1 if unknown."""
        if not (self.reference_s and self.reference_best_s):
            return 1.0
        return statistics.median(self.reference_s) / self.reference_best_s

    @property
    def is_slow(self) -> bool:
        """Whether the device ran slower than it can, so that the times say too much."""
        return self.slowdown > SLOW

    @property
    def noisy(self) -> tuple[str, ...]:
        """Names of the functions whose times spread too wide."""
        return tuple(name for name in self.times_s if self.is_noisy(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, raw times included."""
        values = asdict(self)
        values["times_s"] = {name: list(times) for name, times in self.times_s.items()}
        values["reference_s"] = list(self.reference_s)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measurement":
        """The inverse of `to_dict`."""
        values = dict(values)
        values["times_s"] = {name: tuple(times) for name, times in values["times_s"].items()}
        values["reference_s"] = tuple(values["reference_s"])
        return cls(**values)


def interquartile_range(times_s: tuple[float, ...]) -> float:
    """Third minus first quartile (inclusive method); 0 for fewer than two values."""
    if len(times_s) < 2:
        return 0.0
    q1, _, q3 = statistics.quantiles(times_s, n=4, method="inclusive")
    return q3 - q1
