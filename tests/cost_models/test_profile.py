"""A measured time beside the work it did: nothing counted twice, nothing left out."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import configs, random_config

from cost_models.profile import COMPONENTS, Profile, by_operator, profiles, weight_operator
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import (
    bytes_read_by_component,
    decode_flops,
    params_by_component,
    prefill_flops,
    prefill_flops_by_component,
)
from search_spaces.model import SLM
from search_spaces.stages import stage_uses
from search_spaces.workload import RequestTokens
from targets.measurement import Measurement

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=32)
TOKENS = RequestTokens(prompt=6, generated=10)
SECONDS = {"embedding": 1e-6, "attention": 4e-4, "ffn": 5e-4, "norm": 2e-5, "head": 3e-5}


def measurement(wall_s: float, seconds: dict[str, float] | None = None) -> Measurement:
    times_s = {"prefill": (wall_s,) * 3, "decode": (wall_s,) * 3}
    profile = dict.fromkeys(times_s, SECONDS if seconds is None else seconds)
    return Measurement(device="board", times_s=times_s, workspace_bytes={}, packed_bytes=0, errors={}, profile=profile)


def work(profile: Profile, name: str) -> int:
    return sum(getattr(operator, name) for operator in profile.operators)


@settings(deadline=None, max_examples=40)
@given(configs())
def test_operators_together_do_what_the_whole_model_does(config: SLMConfig) -> None:
    found = profiles(measurement(1e-3), config, TOKENS)
    prompt, context = TOKENS.prompt, TOKENS.mid_context
    masked = prefill_flops_by_component(config, prompt)["attention_scores"] * (prompt - 1) / (2 * prompt)
    assert work(found["prefill"], "flops") == prefill_flops(config, prompt) - masked
    assert work(found["decode"], "flops") == decode_flops(config, context)
    assert work(found["prefill"], "read_bytes") == sum(bytes_read_by_component(config, tokens=prompt).values())
    assert work(found["decode"], "read_bytes") == sum(bytes_read_by_component(config, context=context).values())
    fewer = profiles(measurement(1e-3), config, TOKENS, "int4")
    assert work(fewer["prefill"], "read_bytes") == sum(bytes_read_by_component(config, tokens=prompt, precision="int4").values())
    assert work(fewer["decode"], "read_bytes") == sum(bytes_read_by_component(config, context=context, precision="int4").values())
    assert work(fewer["decode"], "flops") == work(found["decode"], "flops")


@settings(deadline=None, max_examples=40)
@given(configs())
def test_a_weight_belongs_to_the_operator_that_its_parameters_are_counted_with(config: SLMConfig) -> None:
    sizes = {name: parameter.numel() for name, parameter in SLM(config, device="meta").named_parameters()}
    owner: dict[str, str] = {}
    for use in stage_uses(config, "decode", 1):
        for local, name in use.weights.items():
            owner.setdefault(name, weight_operator(use.spec.kind, local))
    sums: dict[str, int] = {}
    for name, size in sizes.items():
        sums[owner[name]] = sums.get(owner[name], 0) + size
    assert sums == by_operator(params_by_component(config))


@pytest.mark.parametrize("seed", range(3))
def test_every_weight_of_a_program_has_an_operator(seed: int) -> None:
    config = random_config(random.Random(seed))
    for function in build_program(config, TOKENS).functions.values():
        assert all(call.operators.keys() == call.weights.keys() for call in function.calls)
        assert {operator for call in function.calls for operator in call.operators.values()} == set(COMPONENTS)
        assert set(function.calls[-1].operators.values()) == {"norm", "head"}  # also where the head's table is the embedding's


def test_a_component_that_nobody_owns_is_noticed() -> None:
    with pytest.raises(KeyError, match="convolution"):
        by_operator({"ffn": 1, "convolution": 2})


def test_shares_are_of_the_call_and_what_is_left_passed_between_kernels() -> None:
    found = profiles(measurement(1.25e-3), CONFIG, TOKENS)["decode"]
    assert found.wall_s == 1.25e-3
    assert found.between_s == pytest.approx(1.25e-3 - sum(SECONDS.values()))
    assert [o.operator for o in found.operators] == ["ffn", "attention", "head", "norm", "embedding"]
    assert found.operators[0].share == pytest.approx(0.4)
    assert sum(o.share for o in found.operators) + found.between_share == pytest.approx(1)


def test_kernels_that_took_longer_than_the_call_leave_nothing_between_them() -> None:
    found = profiles(measurement(5e-4), CONFIG, TOKENS)["prefill"]
    assert (found.between_s, found.between_share) == (0, 0)
    assert sum(o.share for o in found.operators) == pytest.approx(1)


def test_rates_are_work_over_time() -> None:
    found = {o.operator: o for o in profiles(measurement(1e-3), CONFIG, TOKENS)["decode"].operators}
    assert found["ffn"].flops == 2 * 2 * 3 * 32 * 40
    assert found["ffn"].flops_per_s == pytest.approx(found["ffn"].flops / 5e-4)
    assert found["head"].read_bytes_per_s == pytest.approx(4 * 61 * 32 / 3e-5)
    assert found["norm"].flops_per_s is None
    assert found["norm"].read_bytes_per_s is not None


def test_an_operator_nobody_counts_has_a_time_and_no_rate() -> None:
    (other,) = profiles(measurement(1e-3, {"other": 1e-4}), CONFIG, TOKENS)["decode"].operators
    assert (other.flops, other.read_bytes, other.flops_per_s, other.read_bytes_per_s) == (0, 0, None, None)
    assert other.share == pytest.approx(0.1)


def test_plain_values_hold_everything_shown() -> None:
    found = profiles(measurement(1e-3), CONFIG, TOKENS)["prefill"]
    values: dict[str, Any] = found.to_dict()
    assert values.keys() == {"wall_s", "between_s", "between_share", "operators"}
    names = {"operator", "time_s", "share", "flops", "read_bytes", "flops_per_s", "read_bytes_per_s"}
    assert all(operator.keys() == names for operator in values["operators"])


def test_a_device_that_took_no_profile_has_none() -> None:
    bare = Measurement(device="null", times_s={"decode": (1.0,)}, workspace_bytes={}, packed_bytes=0, errors={})
    assert profiles(bare, CONFIG, TOKENS) == {}
