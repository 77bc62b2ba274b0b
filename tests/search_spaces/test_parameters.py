"""The parameters of a space: what TOML may say about each, what is refused in one line, and how values are drawn."""

import random
from typing import Any

import pytest

from search_spaces.config import InvalidConfig
from search_spaces.parameters import InvalidSpace, Range, read_axes

NEEDED: dict[str, Any] = {"vocab_size": 512, "d_model": 128, "num_layers": 6, "head_dim": 16}


def test_draws_stay_on_the_grid_and_reach_both_ends() -> None:
    rng = random.Random(0)
    assert {Range(name="x", low=4, high=12, step=4).draw(rng) for _ in range(200)} == {4, 8, 12}
    assert {Range(name="x", low=0.5, high=1.5, step=0.5).draw(rng) for _ in range(200)} == {0.5, 1.0, 1.5}
    assert {Range(name="x", low=1, high=4, log=True).draw(rng) for _ in range(400)} == {1, 2, 3, 4}
    assert all(0.1 <= float(Range(name="x", low=0.1, high=0.2, log=True).draw(rng)) <= 0.2 for _ in range(100))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"d_modle": 3}, "'d_modle' is not a key; did you mean 'd_model'?"),
        ({"wibble": 3}, "'wibble' is not a key; remove it, or see `edgewise spaces show tiny`"),
        ({"vocab_size": [257]}, "vocab_size=257 is not within 258 and"),
        ({"vocab_size": {"low": 512, "high": 1024}}, "vocab_size cannot be a range"),
        ({"d_model": []}, r"d_model=\[\] has no choices"),
        ({"d_model": [64, 64]}, "d_model lists 64 twice"),
        ({"d_model": "wide"}, "d_model='wide' is not an integer"),
        ({"d_model": True}, "d_model=True is not an integer"),
        ({"d_model": 64.0}, "d_model=64.0 is not an integer"),
        ({"d_model": [64, [1]]}, r"d_model=\[1\] is not an integer"),
        ({"d_model": {"low": 64, "high": 32}}, "d_model has low=64 above high=32; swap them"),
        ({"d_model": {"low": 64}}, "d_model lacks high"),
        ({"d_model": {"low": 64, "high": 96, "stp": 8}}, "'stp' is not a key; did you mean 'step'?"),
        ({"d_model": {"low": 64, "high": 100, "step": 16}}, "high=100, which is not low=64 plus a multiple of step=16; use 96"),
        ({"d_model": {"low": 64, "high": 96, "step": 0}}, "step=0; give one above 0"),
        ({"d_model": {"low": 64, "high": 96, "step": 1.5}}, "step=1.5; give an integer"),
        ({"d_model": {"low": 64, "high": 96, "step": 8, "log": True}}, "both step and log"),
        ({"d_model": {"low": 64, "high": 96, "log": 1}}, "log=1; give true or false"),
        ({"mla_q_ratio": {"low": 0.0, "high": 1.0, "log": True}}, "low=0.0 and log=true"),
        ({"ffn_ratio": float("nan")}, "ffn_ratio=nan is not within"),
        ({"ffn_ratio": {"low": 1.0, "high": float("inf")}}, "ffn_ratio=inf is not within"),
        ({"rotary_fraction": 0.0}, "rotary_fraction=0.0 is not within 0.01 and 1;"),
        ({"rotary_fraction": [0.5, 1.5]}, "rotary_fraction=1.5 is not within 0.01 and 1;"),
        ({"attention": "gpa"}, "attention='gpa' is not one of mha, gqa, mqa, mla; did you mean 'gqa'?"),
        ({"attention": [1]}, "attention=1 is not one of"),
        ({"activation": {"low": 1, "high": 2}}, "activation is not a number and cannot be a range"),
        ({"qk_norm": 1}, "qk_norm=1 is not a boolean"),
        ({"layerwise_alpha": "0.5-1.0"}, "layerwise_alpha='0.5-1.0' is not a span"),
        ({"layerwise_alpha": "0.0..1.0"}, "layerwise_alpha='0.0..1.0' is not within"),
        ({"layerwise_beta": "nan..1.0"}, "layerwise_beta='nan..1.0' is not within"),
        ({"layerwise_beta": 3}, "layerwise_beta=3 is not a span"),
        ({"sharing": ["none", "cycle"]}, "unique_fraction is missing, which sharing='sequence', 'cycle' or 'cycle_rev' needs"),
        ({"attention": ["mha", "gqa"]}, "kv_group is missing, which attention='gqa' needs"),
        ({"attention": "mla"}, "mla_kv_ratio is missing"),
        ({"kv_group": [2, 4]}, "kv_group never matters, as attention is never 'gqa'"),
        ({"unique_fraction": [0.5, 0.7]}, "unique_fraction never matters, as sharing is never"),
        ({"series_mode": ["scalar", "channel"]}, "series_mode never matters, as series_activation is never 2 or more"),
        ({"standard_ffn_ratio": [2.0, 3.0]}, "standard_ffn_ratio never matters"),
        ({"positions": "learned", "rotary_fraction": [0.5, 1.0]}, "rotary_fraction never matters"),
        ({"attention": "mla", "mla_kv_ratio": 0.5, "positions": "learned"}, "positions=learned does not go with attention='mla' only"),
        ({"attention": "mla", "mla_kv_ratio": 0.5, "qk_norm": True}, "qk_norm=true does not go with attention='mla' only"),
        ({"sharing": "cycle", "unique_fraction": 0.5, "num_layers": 1}, "num_layers=1 has nothing to share"),
        ({"sharing": "cycle", "unique_fraction": 1.0}, "unique_fraction=1.0 shares nothing"),
    ],
)
def test_refused_with_one_clear_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpace, match=message) as caught:
        read_axes("space 'mine'", {**NEEDED, **more})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("space 'mine': ")
    assert not isinstance(caught.value, InvalidConfig)
