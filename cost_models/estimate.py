"""`Estimate`: what a cost model says. A type of its own, so that a prediction can never pass as a measurement."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from search_spaces.config import SLMConfig
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets.spec import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A predicted request on a device, by the named model."""

    model: str
    prefill_s: float
    decode_s_per_token: float
    request_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class CostModel(Protocol):
    """Predicts a request's time from the architecture and the device, without running anything."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    def estimate(self, config: SLMConfig, tokens: RequestTokens, spec: DeviceSpec, precision: Precision = "fp32") -> Estimate:
        """The predicted times with matrices in a precision; called for every candidate, so it must cost microseconds."""
        ...
