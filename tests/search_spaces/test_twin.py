"""Twins: the same kinds and ratios at a size that follows from the full model's."""

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs

from search_spaces.config import PerLayer, SLMConfig
from search_spaces.counting import params
from search_spaces.parameters import InvalidSpace
from search_spaces.references import reference
from search_spaces.space import Space, load_space, space_names
from search_spaces.twin import body_params, target_params, trained_config, twin

LARGE = [name for name in space_names() if load_space(name).twin_params is not None]
KEPT = (
    "vocab_size", "context", "attention", "qk_norm", "qkv_bias", "attention_bias", "positions", "position_offset", "ffn",
    "activation", "ffn_bias", "norm", "norm_eps", "norm_weight", "norm_bias", "block", "tie_embeddings", "head_bias", "sharing",
    "shared_parts", "series_activation", "series_mode", "augmented_shortcuts",
)  # fmt: skip


def mean(value: PerLayer | None) -> float:
    assert value is not None
    return sum(value) / len(value) if isinstance(value, tuple) else value


def unique_share(config: SLMConfig) -> float:
    return (config.num_unique_layers or config.num_layers) / config.num_layers


def drawn(name: str, seed: int) -> SLMConfig:
    space = load_space(name)
    return space.config(space.draw(random.Random(seed)))


def of(name: str, **values: Any) -> SLMConfig:
    """A model of a space: the plainest, but for these parameters."""
    space = load_space(name)
    return space.config({**{axis.name: axis.plain for axis in space.asked}, **values})


def same_kinds(config: SLMConfig, small: SLMConfig) -> None:
    for field in KEPT:
        assert getattr(small, field) == getattr(config, field), field
    assert small.rope_theta == config.rope_theta or small.rotary_dim == 2  # whose one angle has no base
    assert bool(small.q_rank) == bool(config.q_rank)
    assert (small.embedding_scale == math.sqrt(small.d_model)) == (config.embedding_scale == math.sqrt(config.d_model))
    groups = [{s.num_heads // s.num_kv_heads for s in c.layers()} for c in (config, small)]
    assert config.attention == "mqa" or groups[0] == groups[1]


def test_the_spaces_that_are_too_large_have_twins() -> None:
    assert LARGE == ["wearable", "phone", "laptop"]
    config = drawn("tiny", 0)
    assert trained_config(load_space("tiny"), config) is config


@pytest.mark.parametrize("name", LARGE)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_twins_of_a_space(name: str, seed: int) -> None:
    space, config = load_space(name), drawn(name, seed)
    small, target = trained_config(space, config), target_params(space, body_params(config))
    same_kinds(config, small)
    assert SLMConfig.from_dict(small.to_dict()) == small == trained_config(space, config)
    assert 0.8 < body_params(small) / target < 1.25
    assert small.d_model >= 48 and 4 <= small.num_layers <= 13

    def near(full: float, of_twin: float, within: float) -> None:
        assert abs(math.log(of_twin / full)) < within, (full, of_twin)

    # The widths are of dozens, so a step of rounding is some percent.
    near(mean(config.ffn_dim) / config.d_model, mean(small.ffn_dim) / small.d_model, 0.2)
    assert config.head_dim and small.head_dim and config.rotary_dim and small.rotary_dim
    near(mean(config.num_heads) * config.head_dim / config.d_model, mean(small.num_heads) * small.head_dim / small.d_model, 0.25)
    near(unique_share(config), unique_share(small), 0.2)
    assert abs(small.rotary_dim - small.head_dim * config.rotary_dim / config.head_dim) <= 2
    for rank in ("kv_rank", "q_rank"):
        assert abs(getattr(small, rank) - getattr(config, rank) * small.d_model / config.d_model) <= 1
    for field in ("num_heads", "ffn_dim"):  # what grows from layer to layer still does
        full, shrunk = getattr(config, field), getattr(small, field)
        if isinstance(full, tuple) and isinstance(shrunk, tuple) and list(full) == sorted(full):
            assert list(shrunk) == sorted(shrunk)


@settings(max_examples=100, deadline=None)
@given(config=configs(), divisor=st.integers(1, 10_000))
def test_any_model_has_a_valid_twin_of_the_same_kinds(config: SLMConfig, divisor: int) -> None:
    """Also one of a few hundred parameters, where nothing but the least sizes is left."""
    small = twin(config, body_params(config) // divisor)
    if divisor == 1:
        assert small is config
        return
    same_kinds(config, small)
    assert small.d_model <= config.d_model and small.num_layers <= config.num_layers
    assert body_params(small) <= body_params(config) * 1.1


@pytest.mark.parametrize("name", ["smollm-135m", "OpenELM-270M", "gpt2-124m"])
def test_published_models_have_twins(name: str) -> None:
    config = reference(name)
    small = twin(config, 1_000_000)
    same_kinds(config, small)
    assert 0.8 < body_params(small) / 1e6 < 1.25
    assert small.num_layers > config.num_layers * small.d_model / config.d_model  # depth shrinks by fewer times


@pytest.mark.parametrize("name", LARGE)
def test_larger_models_have_larger_twins(name: str) -> None:
    space, rng = load_space(name), random.Random(5)
    pairs = [(body_params(c), body_params(trained_config(space, c))) for c in (space.config(space.draw(rng)) for _ in range(60))]
    for full, small in pairs:
        for other_full, other_small in pairs:
            if full > 1.2 * other_full:
                assert small > other_small


@pytest.mark.parametrize("name", LARGE)
def test_twins_keep_the_order_of_widths_depths_and_ratios(name: str) -> None:
    space = load_space(name)

    def small(**values: Any) -> SLMConfig:
        return trained_config(space, of(name, **values))

    axes = {axis.name: axis for axis in space.axes}
    for field in ("d_model", "num_layers"):
        step: Any = axes[field]
        values = list(range(step.low, step.high + 1, step.step or 1))
        twins = [small(**{field: value}) for value in values]
        sizes = [body_params(t) for t in twins]
        # A model of one layer in forty more is larger by less than rounding the widths may take away.
        assert all(size > 0.95 * most for size, most in zip(sizes, itertools.accumulate(sizes, max), strict=True))
        assert all(b > a for a, b in zip(sizes, sizes[4:], strict=False))
        of_field = [getattr(t, field) for t in twins]
        # On average; of neighbours one may be narrower, if a layer is added.
        assert sum(b >= a for a, b in itertools.pairwise(of_field)) > 0.75 * (len(values) - 1)
        assert of_field[-1] > 1.4 * of_field[0]
    ratios = [small(ffn_ratio=ratio) for ratio in (2.0, 3.0, 4.0, 5.0)]
    assert len({(t.d_model, t.num_layers, t.head_dim) for t in ratios}) == 1  # one choice differs in the models, and in the twins
    assert [round(mean(t.ffn_dim) / t.d_model, 1) for t in ratios] == [2.0, 3.0, 4.0, 5.0]


def test_a_vocabulary_takes_no_width() -> None:
    space = load_space("phone")
    twins = [trained_config(space, of("phone", vocab_size=size)) for size in (16384, 65536)]
    assert twins[0].vocab_size == 16384 and twins[1].vocab_size == 65536
    assert (twins[0].d_model, twins[0].num_layers) == (twins[1].d_model, twins[1].num_layers)
    assert body_params(twins[0]) == body_params(twins[1]) == params(twins[0]) - 16384 * twins[0].d_model


def test_the_power_law_has_the_ends_that_a_space_names() -> None:
    space = Space.from_dict(
        {
            "params": [1_000_000, 64_000_000],
            "twin": {"params": [100_000, 800_000]},
            "parameters": {"vocab_size": 512, "d_model": 64, "num_layers": 4, "head_dim": 16},
        }
    )
    # k = ln 8 / ln 64 = 1/2: a body four times as large has a twin twice as large.
    assert [target_params(space, n) for n in (1_000_000, 4_000_000, 64_000_000)] == [100_000, 200_000, 800_000]
    assert target_params(space, 10) >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"twin": {"params": [10, 20]}}, r"\[twin\] needs the space's own params"),
        ({"twin": {}, "params": [100, 200]}, r"\[twin\] lacks params"),
        ({"twin": 3, "params": [100, 200]}, r"\[twin\] lacks params"),
        ({"twin": {"params": [10, 20], "depth": 2}, "params": [100, 200]}, "'depth' is not a key"),
        ({"twin": {"params": [20, 10]}, "params": [100, 200]}, r"\[twin\] params=\[20, 10\] is not least then most"),
        ({"twin": {"params": [100, 150]}, "params": [100, 200]}, r"\[twin\] params=\[100, 150\] are not below params=\[100, 200\]"),
        ({"twin": {"params": [50, 50]}, "params": [100, 200]}, "give models of every size the same twin"),
    ],
)
def test_refused_tables(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpace, match=message):
        Space.from_dict({"parameters": {"vocab_size": 512, "d_model": 32, "num_layers": 2, "head_dim": 16}, **values})


def test_a_space_without_twins_has_the_hash_it_had() -> None:
    """Runs that were begun before there were twins go on."""
    plain = load_space("tiny")
    values = load_space("phone").to_dict()
    phone, without = Space.from_dict(values), Space.from_dict({k: v for k, v in values.items() if k != "twin"})
    assert "twin" not in plain.to_dict()
    assert phone.sha256 != without.sha256
