"""The roofline, by hand and as a bound."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, random_config

from cost_models.measured import make_sample
from cost_models.program import build_program
from cost_models.roofline import Roofline
from search_spaces.config import SLMConfig
from search_spaces.precision import PRECISIONS
from search_spaces.workload import RequestTokens
from targets.measurement import Timing
from targets.null import NullTarget
from targets.spec import load_spec

SPEC = dataclasses.replace(load_spec("null"), read_bytes_per_s=1e9, flops_per_s=1e12)
CONFIG = SLMConfig(vocab_size=10, d_model=8, num_layers=1, num_heads=2, ffn="standard", ffn_dim=16, activation="relu", context=16)
TOKENS = RequestTokens(prompt=6, generated=4)
# Elements of CONFIG: attention 4 x 8 x 8 = 256, FFN 2 x 8 x 16 = 256, three norms of 8 = 24, head 10 x 8 = 80.
READ_ALWAYS = 256 + 256 + 24 + 80


def test_a_memory_bound_request_by_hand() -> None:
    found = Roofline().estimate(CONFIG, TOKENS, SPEC)
    # One token: its embedding row (8) and rotary row (4); 6 + 4 / 2 = 8 cached rows of K and V, 8 values each.
    decode_s = 4 * (READ_ALWAYS + 8 + 4 + 8 * 16) / 1e9
    prefill_s = 4 * (READ_ALWAYS + 6 * (8 + 4)) / 1e9
    assert found.decode_s_per_token == pytest.approx(decode_s)
    assert found.prefill_s == pytest.approx(prefill_s)
    assert found.request_s == pytest.approx(prefill_s + 4 * decode_s)
    assert found.model == "roofline"


def test_fewer_bits_are_read_faster_by_hand() -> None:
    found = Roofline().estimate(CONFIG, TOKENS, SPEC, "int8")
    # A byte a value and a scale of 4 for each of the rows: attention 4 x 8, FFN 16 + 8, head 10, the one row of the embedding.
    matrices = 256 + 256 + 80 + 8 + 4 * (32 + 24 + 10 + 1)
    assert found.decode_s_per_token == pytest.approx((matrices + 4 * (24 + 4 + 8 * 16)) / 1e9)


def test_a_compute_bound_request_by_hand() -> None:
    slow = dataclasses.replace(SPEC, flops_per_s=1e6, read_bytes_per_s=1e15)
    found = Roofline().estimate(CONFIG, TOKENS, slow)
    # Scores and their sum over values: 2 heads x 2 x (4 + 4) operations for each pair of rows; the head is for one row.
    decode = 2 * (256 + 256 + 80) + 8 * 2 * 2 * 8
    prefill = 2 * 6 * (256 + 256) + 6 * 6 * 2 * 2 * 8 + 2 * 80
    assert found.decode_s_per_token == pytest.approx(decode / 1e6)
    assert found.prefill_s == pytest.approx(prefill / 1e6)


@given(config=configs(), factor=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_a_machine_twice_as_good_takes_half_the_time(config: SLMConfig, factor: float) -> None:
    better = dataclasses.replace(SPEC, read_bytes_per_s=SPEC.read_bytes_per_s * factor, flops_per_s=SPEC.flops_per_s * factor)
    here, there = (Roofline().estimate(config, TOKENS, spec) for spec in (SPEC, better))
    assert there.request_s == pytest.approx(here.request_s / factor)


@given(config=configs(), bandwidth=st.floats(1e6, 1e12), rate=st.floats(1e6, 1e14))
@settings(max_examples=40, deadline=None)
def test_neither_ceiling_is_undercut(config: SLMConfig, bandwidth: float, rate: float) -> None:
    both = dataclasses.replace(SPEC, read_bytes_per_s=bandwidth, flops_per_s=rate)
    found = Roofline().estimate(config, TOKENS, both)
    for endless in ({"read_bytes_per_s": 1e30}, {"flops_per_s": 1e30}):
        alone = Roofline().estimate(config, TOKENS, dataclasses.replace(both, **endless))
        assert alone.decode_s_per_token <= found.decode_s_per_token
        assert alone.prefill_s <= found.prefill_s


def test_a_longer_prompt_never_costs_less() -> None:
    found = [Roofline().estimate(CONFIG, RequestTokens(prompt=p, generated=2), SPEC) for p in range(1, 14)]
    for shorter, longer in itertools.pairwise(found):
        assert longer.prefill_s > shorter.prefill_s
        assert longer.decode_s_per_token > shorter.decode_s_per_token


def test_the_null_target_is_never_faster_than_its_own_roofline_in_decode(tmp_path: Path) -> None:
    """The null target reads every weight of a call and the same cache, at the same rates."""
    target = NullTarget(load_spec("null"))
    for seed in range(32):
        config, precision = random_config(random.Random(seed)), PRECISIONS[seed % 4]
        artifact = target.compile(build_program(config, TOKENS, precision), tmp_path / str(seed))
        measured = target.measure(artifact, make_sample(config, TOKENS, 0, precision=precision), Timing()).median_s("decode")
        assert Roofline().estimate(config, TOKENS, target.spec, precision).decode_s_per_token <= measured, seed


@pytest.mark.parametrize("missing", ["flops_per_s", "read_bytes_per_s"])
def test_a_device_without_ceilings_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match="target 'null' has no measured ceilings"):
        Roofline().estimate(CONFIG, TOKENS, dataclasses.replace(SPEC, **{missing: 0.0}))
