"""A profile as people read it, in the terminal and in the report."""

from typing import Any

import pytest

from cost_models.profile import OperatorProfile, Profile
from nas.breakdown import COLUMNS, breakdown_rows, trial_profiles
from nas.evaluation import Evaluation
from search_spaces.config import SLMConfig
from search_spaces.workload import Workload
from targets.measurement import Measurement

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=64)
REQUEST = Workload(prompt_bytes=40, generate_bytes=20)
PROFILE = Profile(
    wall_s=2e-3,
    operators=(
        OperatorProfile(operator="ffn", time_s=1e-3, share=0.5, flops=50_000_000, read_bytes=4_000_000),
        OperatorProfile(operator="norm", time_s=5e-4, share=0.25, flops=0, read_bytes=8000),
    ),
    between_s=5e-4,
)


def measured(profile: dict[str, dict[str, float]] | None) -> dict[str, Any]:
    """A measurement's raw record."""
    times_s = {"prefill": (1e-3,), "decode": (1e-4,)}
    return Measurement(device="board", times_s=times_s, workspace_bytes={}, packed_bytes=0, errors={}, profile=profile).to_dict()


def test_rows_say_what_each_operator_takes_and_reaches() -> None:
    assert breakdown_rows(PROFILE, 100e9, 20e9) == [
        ("FFN", "1.00 ms", "50.0 %", "50.0", "4.00"),
        ("norm", "500 µs", "25.0 %", "–", "0.0160"),
        ("between kernels", "500 µs", "25.0 %", "–", "–"),
        ("whole call", "2.00 ms", "", "25.0", "2.00"),
        ("device's best", "", "", "100", "20.0"),
    ]
    assert {len(row) for row in breakdown_rows(PROFILE, 1.0, 1.0)} == {len(COLUMNS)}


def test_unknown_ceilings_are_not_called_zero() -> None:
    assert breakdown_rows(PROFILE, 0.0, 0.0)[-1] == ("device's best", "", "", "–", "–")


def test_a_trial_is_taken_apart_at_the_lengths_of_its_own_tokens() -> None:
    record = measured({"prefill": {"ffn": 4e-4}, "decode": {"ffn": 4e-5}})
    evaluation = Evaluation(trial=0, config=CONFIG, bytes_per_token=2.0, measurement=record)
    found = trial_profiles(evaluation, REQUEST)
    assert found.keys() == {"prefill", "decode"}
    assert found["prefill"].operators[0].flops == 20 * found["decode"].operators[0].flops
    fewer = trial_profiles(evaluation.evolve(weights="fp16"), REQUEST)
    assert fewer["decode"].operators[0].read_bytes == found["decode"].operators[0].read_bytes / 2


@pytest.mark.parametrize(
    "changes",
    [{"config": None}, {"bytes_per_token": None}, {"measurement": None}, {"measurement": measured(None)}],
    ids=["config", "tokens", "measurement", "profile"],
)
def test_a_trial_that_lacks_anything_has_no_profile(changes: dict[str, Any]) -> None:
    whole = Evaluation(trial=0, config=CONFIG, bytes_per_token=2.0, measurement=measured({"decode": {"ffn": 4e-5}}))
    assert trial_profiles(whole, REQUEST).keys() == {"decode"}
    assert trial_profiles(whole.evolve(**changes), REQUEST) == {}
