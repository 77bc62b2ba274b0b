"""`Roofline`: the least time the device's measured ceilings allow (Williams, Waterman & Patterson 2009)."""

from dataclasses import dataclass

from cost_models.estimate import Estimate
from search_spaces.config import SLMConfig
from search_spaces.counting import bytes_read_by_component, decode_flops, prefill_flops
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets.spec import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """time = max(FLOPs / arithmetic rate, bytes read / read bandwidth), per phase.

    A lower bound as far as the ceilings are true: what a kernel needs beyond them, it never undercuts. The arithmetic rate is
    that of float32 products, which integer ones of int8 and int4 weights may exceed.
    """

    name: str = "roofline"

    def estimate(self, config: SLMConfig, tokens: RequestTokens, spec: DeviceSpec, precision: Precision = "fp32") -> Estimate:
        """The bound for a request.

        Raises:
            ValueError: if the device has no ceilings yet.
        """
        if not (spec.flops_per_s and spec.read_bytes_per_s):
            raise ValueError(f"target {spec.name!r} has no measured ceilings; measure on it once")

        def bound(flops: int, read_bytes: int) -> float:
            return max(flops / spec.flops_per_s, read_bytes / spec.read_bytes_per_s)

        prefill_s = bound(
            prefill_flops(config, tokens.prompt),
            sum(bytes_read_by_component(config, tokens=tokens.prompt, precision=precision).values()),
        )
        decode_s = bound(
            decode_flops(config, tokens.mid_context),
            sum(bytes_read_by_component(config, context=tokens.mid_context, precision=precision).values()),
        )
        return Estimate(
            model=self.name, prefill_s=prefill_s, decode_s_per_token=decode_s, request_s=prefill_s + tokens.generated * decode_s
        )
