"""Starts: what the first trials of a search are given instead of a proposal."""

from typing import Any

import optuna
import pytest

from nas.proposals import propose
from search_spaces.counting import params
from search_spaces.space import InvalidSpace, Space, load_space

PARAMETERS = {
    "vocab_size": [512, 1024],
    "d_model": {"low": 32, "high": 64, "step": 16},
    "num_layers": {"low": 1, "high": 4},
    "head_dim": 16,
}


def space(*starts: dict[str, Any]) -> Space:
    return Space.from_dict({"name": "s", "starts": list(starts), "parameters": PARAMETERS})


def test_what_a_start_leaves_out_is_the_first_choice_or_the_lowest() -> None:
    assert space({"d_model": 48}).start(0) == {"vocab_size": 512, "d_model": 48, "num_layers": 1}
    assert space({"d_model": 48}).start(1) is None
    assert space().start(0) is None


def test_starts_belong_to_what_is_searched_and_survive_files(tmp_path: Any) -> None:
    with_starts = space({"d_model": 48}, {"num_layers": 4, "vocab_size": 1024})
    assert with_starts.sha256 != space().sha256
    assert Space.from_dict(with_starts.to_dict()) == with_starts
    path = tmp_path / "s.toml"
    path.write_text(with_starts.to_toml(), encoding="utf-8")
    assert load_space(path) == with_starts


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([{"d_modle": 48}], r"starts\[0\]: d_modle is not a parameter that is asked; did you mean 'd_model'"),
        ([{"head_dim": 16}], r"starts\[0\]: head_dim is not a parameter that is asked"),
        ([{}, {"d_model": 40}], r"starts\[1\]: d_model=40 is not among the values"),
        ([{"d_model": 48.0}], r"d_model=48.0 is not among"),
        ([{"num_layers": True}], r"num_layers=True is not among"),
        ([{"vocab_size": 600}], r"vocab_size=600 is not among"),
        ("small", r"starts='small' is not a list of tables"),
    ],
)
def test_starts_that_cannot_be_are_refused(starts: Any, message: str) -> None:
    with pytest.raises(InvalidSpace, match=message) as caught:
        Space.from_dict({"name": "s", "starts": starts, "parameters": PARAMETERS})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_first_proposals_are_the_starts(sampler: str) -> None:
    searched = space({"d_model": 48}, {"d_model": 64, "num_layers": 4})
    study = optuna.create_study(directions=["minimize", "minimize"])
    first = propose(study, searched, sampler, 0, 0)
    assert dict(first.params) == searched.start(0)
    assert not any("fixed" in name for name in first.system_attrs)
    for start in (searched.start(0), searched.start(1)):
        assert start is not None
        study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0], params=start, distributions=dict(first.distributions)))
    assert set(propose(study, searched, sampler, 0, 2).params) == set(first.params)
    assert dict(propose(study, searched, sampler, 0, 1).params) == searched.start(1)


def test_the_default_space_starts_with_a_ladder_of_plain_models() -> None:
    tiny = load_space("tiny")
    configs = [tiny.config(start) for i in range(len(tiny.starts)) if (start := tiny.start(i)) is not None]
    sizes = [params(config) for config in configs]
    assert len(sizes) >= 4
    assert sizes == sorted(sizes)
    assert tiny.params_range is not None
    assert tiny.params_range[0] <= sizes[0]
    assert sizes[-1] <= tiny.params_range[1]
    assert all((c.attention, c.ffn, c.sharing, c.series_activation, c.tie_embeddings) == ("mha", "gated", "none", 1, True) for c in configs)
