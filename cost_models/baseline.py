"""`BytesBaseline`: the simplest predictor there is, one number per phase, that every cost model stands beside."""

from dataclasses import dataclass

from cost_models.estimate import Estimate
from search_spaces.config import SLMConfig
from search_spaces.counting import kv_bytes, param_bytes, params
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets.spec import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesBaseline:
    """Prefill ranks by parameters, decode by their bytes plus cached ones; seconds through the device's ceilings.

    Published comparisons find these two numbers hard to beat as a ranking (LLMForge, arXiv 2605.17653).
    """

    name: str = "bytes"

    def estimate(self, config: SLMConfig, tokens: RequestTokens, spec: DeviceSpec, precision: Precision = "fp32") -> Estimate:
        """2 FLOPs per parameter and prompt token; the bytes of parameters and cache per generated token.

        Raises:
            ValueError: if the device has no ceilings yet.
        """
        if not (spec.flops_per_s and spec.read_bytes_per_s):
            raise ValueError(f"target {spec.name!r} has no measured ceilings; measure on it once")
        count = params(config)
        prefill_s = 2 * count * tokens.prompt / spec.flops_per_s
        decode_s = (param_bytes(config, precision) + kv_bytes(config, tokens.mid_context)) / spec.read_bytes_per_s
        return Estimate(
            model=self.name, prefill_s=prefill_s, decode_s_per_token=decode_s, request_s=prefill_s + tokens.generated * decode_s
        )
