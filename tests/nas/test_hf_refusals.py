"""Values in a config.json that no reader may trust: large, false or not printable ones."""

from typing import Any

import pytest

from nas.huggingface.families import read_family
from search_spaces.config import InvalidConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "gpt2", "n_layer": 10**10}, "n_layer=10000000000 cannot be represented"),
        ({"model_type": "gpt_neo", "num_layers": 10**10}, "num_layers=10000000000 cannot"),
        ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**10]]}, "attention_types="),
        ({"model_type": "openelm", "num_transformer_layers": 10**10}, "num_transformer_layers="),
        ({"model_type": "openelm", "qkv_multipliers": 1e308}, "qkv_multipliers="),
        ({"model_type": "llama", "hidden_size": 10**400}, "hidden_size=1000"),
        ({"model_type": "llama", "rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"model_type": "phi", "partial_rotary_factor": 1e308}, "partial_rotary_factor="),
        ({"model_type": "llama", "is_causal": False}, "is_causal=False cannot be represented"),
    ],
)
def test_it_is_refused_by_name_and_at_once(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_family(values)
    assert str(caught.value).startswith(said)


def test_names_from_a_file_cannot_command_a_terminal() -> None:
    (note,) = read_family({"model_type": "llama", "\x1b[31mred\n": 1}).notes
    assert "\x1b" not in note
    assert "\n" not in note
    assert "\\x1b[31mred" in note


def test_causal_attention_may_be_said() -> None:
    assert read_family({"model_type": "llama", "is_causal": True}).notes == ()
