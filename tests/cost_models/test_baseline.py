"""The simplest predictor, by hand, and what it ranks by."""

import dataclasses
import random

import pytest
from strategies import random_config

from cost_models.baseline import BytesBaseline
from search_spaces.config import SLMConfig
from search_spaces.counting import kv_bytes, params
from search_spaces.workload import RequestTokens
from targets.spec import load_spec

SPEC = dataclasses.replace(load_spec("null"), read_bytes_per_s=1e9, flops_per_s=1e12)
CONFIG = SLMConfig(vocab_size=10, d_model=8, num_layers=1, num_heads=2, ffn="standard", ffn_dim=16, activation="relu", context=16)
TOKENS = RequestTokens(prompt=6, generated=4)


def test_a_request_by_hand() -> None:
    found = BytesBaseline().estimate(CONFIG, TOKENS, SPEC)
    parameters = 256 + 256 + 24 + 80  # attention, FFN, norms, tied embedding
    decode_s = (4 * parameters + 8 * 16 * 4) / 1e9  # 8 cached rows of 16 values
    assert found.prefill_s == pytest.approx(2 * parameters * 6 / 1e12)
    assert found.decode_s_per_token == pytest.approx(decode_s)
    assert found.request_s == pytest.approx(found.prefill_s + 4 * decode_s)
    assert found.model == "bytes"
    # In int8 all but the norms are a byte, and each of 4 x 8 + 16 + 8 + 10 rows has a scale.
    fewer = BytesBaseline().estimate(CONFIG, TOKENS, SPEC, "int8")
    assert fewer.prefill_s == found.prefill_s
    assert fewer.decode_s_per_token == pytest.approx((256 + 256 + 80 + 4 * (24 + 66) + 8 * 16 * 4) / 1e9)


def test_prefill_ranks_by_parameters_and_decode_by_bytes() -> None:
    candidates = [random_config(random.Random(seed)) for seed in range(30)]
    found = {c: BytesBaseline().estimate(c, TOKENS, SPEC) for c in candidates}
    assert sorted(candidates, key=lambda c: found[c].prefill_s) == sorted(candidates, key=params)

    def read_bytes(config: SLMConfig) -> int:
        return 4 * params(config) + kv_bytes(config, TOKENS.mid_context)

    assert sorted(candidates, key=lambda c: found[c].decode_s_per_token) == sorted(candidates, key=read_bytes)


def test_sharing_weights_makes_the_baseline_faster() -> None:
    """It counts unique parameters; that every layer still computes is beyond it."""
    deep = dataclasses.replace(CONFIG, num_layers=4)
    shared = dataclasses.replace(deep, sharing="cycle", num_unique_layers=1)
    assert BytesBaseline().estimate(shared, TOKENS, SPEC).prefill_s < BytesBaseline().estimate(deep, TOKENS, SPEC).prefill_s


@pytest.mark.parametrize("missing", ["flops_per_s", "read_bytes_per_s"])
def test_a_device_without_ceilings_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match="target 'null' has no measured ceilings"):
        BytesBaseline().estimate(CONFIG, TOKENS, dataclasses.replace(SPEC, **{missing: 0.0}))
