"""Where a measured model's time goes: each operator's seconds beside the work that the architecture says it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search_spaces.config import SLMConfig
from search_spaces.counting import bytes_read_by_component, decode_flops_by_component, prefill_flops_by_component
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets.measurement import Measurement

COMPONENTS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "attention_projections", "attention_scores", "kv_cache", "shortcuts"),
    "ffn": ("ffn", "activation"),
    "norm": ("norm",),
    "head": ("head",),
    "embedding": ("embedding", "positions"),
}
"""The components of `search_spaces.counting` that each operator is made of, parameters, FLOPs and bytes alike."""


def weight_operator(stage: Literal["embed", "block", "head"], name: str) -> str:
    """The operator that a stage's weight belongs to, by the weight's own name in that stage.

    Every norm is one, those of heads and latents included; augmented shortcuts run beside attention and count with it.
    """
    first, *rest = name.split(".")
    if any(part == "norm" or part.endswith("_norm") for part in (first, *rest)):
        return "norm"
    if stage != "block":
        return "embedding" if stage == "embed" else "head"
    return "attention" if first == "attention" else "ffn"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProfile:
    """One operator in one call of a function.

    Attributes:
        operator: its name.
        time_s: seconds in its kernels.
        share: of the whole call.
        flops: of its products; 0 where all it does is elementwise.
        read_bytes: weights and cached rows that it must read, each once; activations are not among them.
    """

    operator: str
    time_s: float
    share: float
    flops: int
    read_bytes: int

    @property
    def flops_per_s(self) -> float | None:
        """Achieved rate; None where nothing is counted or no time was seen."""
        return self.flops / self.time_s if self.flops and self.time_s else None

    @property
    def read_bytes_per_s(self) -> float | None:
        """Achieved rate; None where nothing is counted or no time was seen."""
        return self.read_bytes / self.time_s if self.read_bytes and self.time_s else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, rates included."""
        return asdict(self) | {"flops_per_s": self.flops_per_s, "read_bytes_per_s": self.read_bytes_per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One function's time, taken apart.

    Attributes:
        wall_s: median seconds of a call, as it was timed without looking inside.
        operators: most time first.
        between_s: what is left of the call: dispatch, allocation, waking threads; 0 if the kernels took longer than
            the call, which only noise can do.
    """

    wall_s: float
    operators: tuple[OperatorProfile, ...]
    between_s: float

    @property
    def between_share(self) -> float:
        """Of the whole call, between kernels."""
        return self.between_s / _whole_s(self.wall_s, sum(o.time_s for o in self.operators))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, rates and shares included."""
        operators = [operator.to_dict() for operator in self.operators]
        return {"wall_s": self.wall_s, "between_s": self.between_s, "between_share": self.between_share, "operators": operators}


def profiles(measurement: Measurement, config: SLMConfig, tokens: RequestTokens, precision: Precision = "fp32") -> dict[str, Profile]:
    """The profiles of `prefill` and `decode`; empty if the device took none.

    Of causal attention the half that is needed is counted, so that its rate compares with the device's.

    Args:
        config: what was measured.
        tokens: the request that it was measured with.
        precision: of its matrices then.
    """
    if measurement.profile is None:
        return {}
    flops = {
        "prefill": prefill_flops_by_component(config, tokens.prompt, masked=False),
        "decode": decode_flops_by_component(config, tokens.mid_context),
    }
    read_bytes = {
        "prefill": bytes_read_by_component(config, tokens=tokens.prompt, precision=precision),
        "decode": bytes_read_by_component(config, context=tokens.mid_context, precision=precision),
    }
    return {
        phase: _profile(measurement.median_s(phase), times_s, by_operator(flops[phase]), by_operator(read_bytes[phase]))
        for phase, times_s in measurement.profile.items()
    }


def by_operator(components: Mapping[str, int]) -> dict[str, int]:
    """Counts by component -> by operator; operators without any are left out.

    Raises:
        KeyError: on a component that belongs to no operator.
    """
    owner = {component: operator for operator, parts in COMPONENTS.items() for component in parts}
    sums: dict[str, int] = {}
    for component, count in components.items():
        sums[owner[component]] = sums.get(owner[component], 0) + count
    return sums


def _profile(wall_s: float, times_s: Mapping[str, float], flops: Mapping[str, int], read_bytes: Mapping[str, int]) -> Profile:
    kernels_s = sum(times_s.values())
    whole_s = _whole_s(wall_s, kernels_s)
    operators = [
        OperatorProfile(operator=name, time_s=time_s, share=time_s / whole_s, flops=flops.get(name, 0), read_bytes=read_bytes.get(name, 0))
        for name, time_s in sorted(times_s.items(), key=lambda item: -item[1])
    ]
    return Profile(wall_s=wall_s, operators=tuple(operators), between_s=whole_s - kernels_s)


def _whole_s(wall_s: float, kernels_s: float) -> float:
    """What shares are of: the call, or its kernels where noise made them take longer."""
    return max(wall_s, kernels_s)
