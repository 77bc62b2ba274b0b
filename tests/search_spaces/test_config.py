import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from strategies import configs, random_config

from search_spaces.config import InvalidConfig, SLMConfig, attention_kind, shared_index


def make(**changes) -> SLMConfig:
    return SLMConfig(**{"vocab_size": 100, "d_model": 48, "num_layers": 4, "num_heads": 4} | changes)


# --- round trips --------------------------------------------------------------------------------


@given(configs())
@settings(max_examples=150, deadline=None)
def test_a_config_survives_dict_and_text(config):
    again = SLMConfig.from_dict(config.to_dict())
    assert again == config
    assert (again.key, hash(again)) == (config.key, hash(config))
    read = SLMConfig.from_dict(json.loads(config.to_json()))
    assert read == config
    assert read.to_json() == config.to_json()


@given(configs())
@settings(max_examples=60, deadline=None)
def test_checking_a_config_again_changes_nothing(config):
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert {f.name: getattr(SLMConfig(**values), f.name) for f in dataclasses.fields(config)} == values


def test_load_reads_a_file_or_its_folder(tmp_path):
    config = make(ffn_dim=[64, 64, 96, 128])
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    assert SLMConfig.load(tmp_path) == SLMConfig.load(tmp_path / "config.json") == config


def test_key_is_the_same_in_another_process():
    config = random_config(random.Random(3))
    code = "import sys; from search_spaces.config import SLMConfig; import json; print(SLMConfig.from_dict(json.load(sys.stdin)).key)"
    found = subprocess.run([sys.executable, "-c", code], input=config.to_json(), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == config.key


def test_keys_differ_when_any_field_does():
    changed = [
        make(),
        make(vocab_size=101),
        make(context=64),
        make(rope_theta=5e4),
        make(norm_eps=1e-6),
        make(activation="relu"),
        make(qk_norm=True),
    ]
    assert len({c.key for c in changed}) == len(changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds list, not a JSON object"),
        ("{", "is not JSON"),
        ('{"d_model": 8, "num_layers": 1}', "vocab_size is missing"),
        ('{"vocab_size": 10, "d_model": 8, "num_layers": 1, "num_head": 2}', "'num_head' is not a field .*did you mean 'num_heads'"),
        ('{"vocab_size": 10, "d_model": 8, "num_layers": 1, "model_type": "llama"}', "config of another format, with model_type='llama'"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfig, match=message):
        SLMConfig.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidConfig, match=r"nowhere\.json cannot be read"):
        SLMConfig.load(tmp_path / "nowhere.json")


# --- canonical forms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"num_heads": [4, 4, 4, 4], "head_dim": 12}, {"num_heads": 4}),
        ({"ffn_dim": (64, 64, 64, 64)}, {"ffn_dim": 64}),
        ({"num_kv_heads": 4}, {}),
        ({"attention": "mqa", "num_kv_heads": 1}, {"attention": "mqa"}),
        ({"head_dim": 12}, {}),
        ({"rotary_dim": 12}, {}),
        ({"v_head_dim": 12}, {}),
        ({"ffn": "standard", "ffn_dim": 192}, {"ffn": "standard"}),
        ({"ffn": "gated", "ffn_dim": 128}, {}),
        ({"norm": "layernorm", "norm_bias": True}, {"norm": "layernorm"}),
        ({"norm_bias": False}, {}),
        ({"norm": "layernorm", "norm_weight": False, "norm_bias": False}, {"norm": "layernorm", "norm_weight": False}),
        ({"positions": "learned", "rotary_dim": 0, "rope_theta": 5e5}, {"positions": "learned"}),
        ({"series_mode": "channel"}, {}),
        ({"shortcut_reduction": 4}, {}),
        ({"num_unique_layers": 4, "shared_parts": "ffn"}, {}),
        ({"embedding_scale": 1, "rope_theta": 10000}, {}),
        ({"attention": "mla", "kv_rank": 8, "v_head_dim": 12, "rotary_dim": 6}, {"attention": "mla", "kv_rank": 8}),
    ],
)
def test_one_model_has_one_form(one, other):
    assert make(**one) == make(**other)
    assert make(**one).key == make(**other).key


def test_defaults_that_follow_the_shape():
    assert make(d_model=64).ffn_dim == 176  # 8/3 of 64 is 170.7
    assert make(d_model=768, num_heads=12).ffn_dim == 2048
    assert make(ffn="standard").ffn_dim == 192
    assert make(attention="mqa").num_kv_heads == 1
    assert make(head_dim=7, rotary_dim=4).head_dim == 7


def test_a_small_width_needs_no_shortcut_reduction():
    assert make(d_model=16).d_model == 16


def test_configs_are_values():
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64  # type: ignore[misc]
    assert {config: 1}[make()] == 1


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "num_layers", "unique", "expected"),
    [
        ("none", 3, 3, [0, 1, 2]),
        ("sequence", 6, 3, [0, 0, 1, 1, 2, 2]),
        ("sequence", 5, 3, [0, 0, 1, 1, 2]),
        ("cycle", 6, 3, [0, 1, 2, 0, 1, 2]),
        ("cycle", 5, 2, [0, 1, 0, 1, 0]),
        ("cycle_rev", 6, 3, [0, 1, 2, 2, 1, 0]),
        ("cycle_rev", 9, 3, [0, 1, 2, 0, 1, 2, 2, 1, 0]),
        ("cycle", 4, 1, [0, 0, 0, 0]),
    ],
)
def test_sharing_patterns(sharing, num_layers, unique, expected):
    assert [shared_index(i, num_layers, unique, sharing) for i in range(num_layers)] == expected


@pytest.mark.parametrize(
    ("parts", "attention", "ffn"),
    [("both", [0, 0, 1, 1], [0, 0, 1, 1]), ("attention", [0, 0, 1, 1], [0, 1, 2, 3]), ("ffn", [0, 1, 2, 3], [0, 0, 1, 1])],
)
def test_shared_parts(parts, attention, ffn):
    layers = make(sharing="sequence", num_unique_layers=2, shared_parts=parts).layers()
    assert [s.attention_index for s in layers] == attention
    assert [s.ffn_index for s in layers] == ffn


def test_parts_that_are_not_shared_may_differ():
    config = make(sharing="sequence", num_unique_layers=2, shared_parts="attention", ffn_dim=[8, 16, 24, 32])
    assert [s.ffn_dim for s in config.layers()] == [8, 16, 24, 32]


def test_attention_kind_of_head_counts():
    assert attention_kind(8, 8) == attention_kind((4, 8), (4, 8)) == "mha"
    assert attention_kind(8, 1) == attention_kind((4, 8), (1, 1)) == "mqa"
    assert attention_kind(8, 2) == attention_kind((4, 8), (1, 2)) == "gqa"


# --- rules --------------------------------------------------------------------------------------

MLA = {"attention": "mla", "kv_rank": 8}
RULES = [
    ({"vocab_size": 0}, "vocab_size=0 is below 1"),
    ({"num_layers": -1}, "num_layers=-1 is below 1"),
    ({"context": 0}, "context=0 is below 1"),
    ({"series_activation": 0}, "series_activation=0 is below 1"),
    ({"kv_rank": -1}, "kv_rank=-1 is negative"),
    ({"augmented_shortcuts": -2}, "augmented_shortcuts=-2 is negative"),
    ({"rope_theta": 0.0}, "rope_theta=0.0 is not a positive number"),
    ({"norm_eps": float("nan")}, "norm_eps=nan is not a positive number"),
    ({"embedding_scale": float("inf")}, "embedding_scale=inf is not a positive number"),
    ({"d_model": "48"}, "d_model='48' has the wrong type; give an integer"),
    ({"d_model": 48.0}, "d_model=48.0 has the wrong type"),
    ({"d_model": True}, "d_model=True is a boolean; give an integer"),
    ({"qkv_bias": 1}, "qkv_bias=1 has the wrong type; give true or false"),
    ({"num_heads": [4, 4.5, 4, 4]}, "not a list of integers"),
    ({"activation": "swish"}, "activation='swish' is not one of relu, gelu, gelu_tanh, silu"),
    ({"num_heads": [4, 4, 2], "head_dim": 12}, "num_heads has 3 values for num_layers=4"),
    ({"num_heads": 0}, "num_heads=0 has a value below 1"),
    ({"ffn_dim": [8, 0, 8, 8]}, "ffn_dim=.* has a value below 1"),
    ({"attention": "gqa"}, "num_kv_heads is missing for attention='gqa'"),
    ({"num_heads": 5}, "d_model=48 is not a multiple of num_heads=5; give head_dim"),
    ({"num_heads": [2, 4, 4, 4]}, "give head_dim"),
    ({"head_dim": 0}, "head_dim=0 is below 1"),
    ({"attention": "gqa", "num_heads": 6, "num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4 .*choose one of 1, 2, 3, 6"),
    ({"num_kv_heads": 2}, "attention='mha' needs num_kv_heads=2 equal to num_heads=4; use 'gqa'"),
    ({"attention": "mqa", "num_kv_heads": 2}, "attention='mqa' needs num_kv_heads=1, not 2"),
    ({"attention": "gqa", "num_kv_heads": 4}, "equal to num_heads=4 is 'mha'"),
    ({"attention": "gqa", "num_kv_heads": 1}, "num_kv_heads=1 is 'mqa'"),
    ({"attention": "mla"}, "kv_rank=0 is not a rank"),
    (MLA | {"positions": "learned"}, "positions='learned' does not go with attention='mla'"),
    (MLA | {"qk_norm": True}, "qk_norm=True does not go with attention='mla'"),
    (MLA | {"v_head_dim": 0}, "v_head_dim=0 is below 1"),
    ({"kv_rank": 8}, "kv_rank=8 is for attention='mla' only"),
    ({"q_rank": 8}, "q_rank=8 is for attention='mla' only"),
    ({"v_head_dim": 5}, "v_head_dim=5 is for attention='mla' only"),
    ({"positions": "learned", "rotary_dim": 4}, "rotary_dim=4 does not go with positions='learned'"),
    ({"position_offset": 2}, "position_offset=2 is for positions='learned' only"),
    ({"rotary_dim": 3}, "rotary_dim=3 must be even"),
    ({"rotary_dim": 14}, "rotary_dim=14 must be even, at least 2 and at most head_dim=12"),
    ({"head_dim": 7}, "rotary_dim=7 must be even"),
    ({"norm_bias": True}, "norm_bias=True does not go with norm='rmsnorm'"),
    ({"norm_weight": False}, "norm_weight=False does not go with norm='rmsnorm'"),
    ({"norm": "layernorm", "norm_weight": False, "norm_bias": True}, "norm_bias=True does not go with norm_weight=False"),
    ({"augmented_shortcuts": 1, "shortcut_reduction": 49}, "shortcut_reduction=49 exceeds d_model=48"),
    ({"vocab_size": 1}, "vocab_size=1 has nothing to predict"),
    ({"num_unique_layers": 2}, "num_unique_layers=2 needs a sharing pattern"),
    ({"sharing": "cycle"}, "num_unique_layers is missing for sharing='cycle'"),
    ({"sharing": "cycle", "num_unique_layers": 4}, "num_unique_layers=4 is not within 1 and num_layers-1=3"),
    ({"sharing": "cycle_rev", "num_unique_layers": 3}, "num_unique_layers=3 is more than half of num_layers=4"),
    ({"sharing": "sequence", "num_unique_layers": 3}, "num_unique_layers=3 leaves unique layers unused .*choose 2"),
    ({"sharing": "cycle", "num_unique_layers": 2, "ffn_dim": [8, 16, 8, 24]}, r"ffn_dim\[3\]=24 differs from 16"),
    ({"sharing": "sequence", "num_unique_layers": 2, "head_dim": 12, "num_heads": [2, 4, 4, 4]}, r"num_heads\[1\]=4 differs from 2"),
]


@pytest.mark.parametrize(("changes", "message"), RULES, ids=[",".join(c) + f"-{i}" for i, (c, _) in enumerate(RULES)])
def test_a_broken_rule_is_one_line_that_says_what_to_do(changes, message):
    with pytest.raises(InvalidConfig, match=message) as caught:
        make(**changes)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text or "not a list" in text


# --- the random configs that other tests stand on --------------------------------------------------


def test_random_configs_span_every_choice():
    drawn = [random_config(random.Random(seed)) for seed in range(400)]
    assert len(set(drawn)) == 400
    seen = {name: {getattr(c, name) for c in drawn} for name in (f.name for f in dataclasses.fields(SLMConfig))}
    assert seen["attention"] == {"mha", "gqa", "mqa", "mla"}
    assert seen["block"] == {"sequential", "parallel", "parallel_shared_norm"}
    assert seen["activation"] == {"relu", "gelu", "gelu_tanh", "silu"}
    assert seen["series_mode"] == {"scalar", "channel"}
    assert seen["series_activation"] == {1, 2, 3}
    assert {0, 1, 2} == seen["augmented_shortcuts"]
    flags = ("qk_norm", "qkv_bias", "attention_bias", "ffn_bias", "norm_weight", "norm_bias", "tie_embeddings", "head_bias")
    assert all(seen[name] == {True, False} for name in flags)
    shared = {(c.sharing, c.shared_parts) for c in drawn if c.sharing != "none"}
    assert shared == {(s, p) for s in ("sequence", "cycle", "cycle_rev") for p in ("both", "attention", "ffn")}
    assert all(any(isinstance(v, tuple) for v in seen[name]) for name in ("num_heads", "num_kv_heads", "ffn_dim"))
    assert {(c.norm, c.norm_bias) for c in drawn} == {("layernorm", True), ("layernorm", False), ("rmsnorm", False)}
    assert {c.q_rank > 0 for c in drawn if c.attention == "mla"} == {True, False}
    assert any(c.head_dim % 2 for c in drawn)
    assert any(0 < c.rotary_dim < c.head_dim for c in drawn if c.attention != "mla")
    assert {c.position_offset for c in drawn if c.positions == "learned"} == {0, 1, 2}
    assert any(c.embedding_scale != 1.0 for c in drawn)
    assert min(c.num_layers for c in drawn) == 1
    assert max(c.num_layers for c in drawn) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": 100, "d_model": 32, "num_layers": 20000000}', "num_layers=20000000 is above 10,000, the most there can be"),
        ('{"vocab_size": 100, "d_model": 32, "num_layers": 2, "num_heads": 9000000000}', "num_heads=9000000000 is above 16,777,216"),
        ('{"vocab_size": 100, "d_model": 32, "num_layers": 2, "ffn_dim": [8, 1' + "0" * 99 + "]}", "(100 digits) is above 16,777,216"),
        ('{"vocab_size": 100, "d_model": 32, "num_layers": 2, "rope_theta": 1' + "0" * 399 + "}", "(400 digits) is too large for a number"),
        ("[" * 200_000, "is nested too deeply"),
        ('{"model_type": "llama", "hidden_size": 64}', "a config of another format, with model_type='llama'"),
    ],
)
def test_files_that_would_hang_or_are_of_others_are_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=re.escape(message)) as caught:
        SLMConfig.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
