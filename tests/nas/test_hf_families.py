"""Config files of other families: exact counts for those that are read, the field in the way for the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from nas.huggingface.defaults import CLOSED, DEFAULTS
from nas.huggingface.families import FAMILIES, read_family
from search_spaces.config import InvalidConfig
from search_spaces.counting import params
from search_spaces.references import reference

FILES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "hf_configs.json").read_text())
REFUSED = {"opt-350m": "do_layer_norm_before=False", "gemma-2-2b": r"model_type='gemma2' .*attn_logit_softcapping=50\.0"}

LLAMA = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 64, "max_position_embeddings": 64}


@pytest.mark.parametrize("name", sorted(FILES.keys() - REFUSED))
def test_counts_of_published_files_are_exact(name: str) -> None:
    imported = read_family(FILES[name]["config"])
    assert params(imported.config) == FILES[name]["params"]
    assert not [note for note in imported.notes if "not fields" in note]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_published_files_that_are_other_models_are_refused_by_field(name: str) -> None:
    with pytest.raises(InvalidConfig, match=REFUSED[name]):
        read_family(FILES[name]["config"])


# As transformers 4 wrote them, or with code of their own: other names for the same, and only what differs from a default.
OLDER: dict[str, tuple[dict[str, Any], int]] = {
    "pythia-160m": (
        {
            "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
            "use_parallel_residual": True, "torch_dtype": "float16", "architectures": ["GPTNeoXForCausalLM"],
        },
        162_322_944,
    ),
    "smollm2-135m": (
        {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "is_llama_config": True, "tie_word_embeddings": True,
        },
        134_515_008,
    ),
    "qwen2.5-0.5b": (
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768,
            "use_sliding_window": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_mrope": False,
        },
        494_032_768,
    ),
    "gpt2-124m": ({"model_type": "gpt2", "n_ctx": 1024, "activation_function": "gelu_new", "summary_type": "cls_index"}, 124_439_808),
    "phi-2": (
        {
            "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "partial_rotary_factor": 0.4, "qk_layernorm": False,
        },
        2_779_683_840,
    ),
    "openelm-270m": (
        {
            "model_type": "openelm", "vocab_size": 32000, "model_dim": 1280, "head_dim": 64, "num_transformer_layers": 16,
            "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0], "ffn_dim_divisor": 256,
            "ffn_with_glu": True, "normalize_qk_projections": True, "share_input_output_layers": True, "rope_freq_constant": 10000,
            "rope_max_length": 4096, "max_context_length": 2048, "activation_fn_name": "swish", "normalization_layer_name": "rms_norm",
            "num_query_heads": [12] * 5 + [16] * 7 + [20] * 4, "num_kv_heads": [3] * 5 + [4] * 7 + [5] * 4,
            "initializer_range": 0.02, "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
        },
        271_527_168,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OLDER))
def test_older_spellings_are_the_references_that_we_have(name: str) -> None:
    values, count = OLDER[name]
    imported = read_family(values)
    assert params(imported.config) == count
    assert imported.config == reference(name)


def test_minicpm_scales_what_it_adds_and_what_the_head_reads() -> None:
    values = {
        "model_type": "minicpm", "vocab_size": 122753, "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40,
        "num_attention_heads": 36, "num_key_value_heads": 36, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4, "rope_scaling": None,
    }  # fmt: skip
    imported = read_family(values)
    assert params(imported.config) == 2_724_880_896
    assert imported.config.embedding_scale == 12
    assert imported.scales.residual == pytest.approx(1.4 / 40**0.5)
    assert imported.scales.final == pytest.approx(256 / 2304)


@pytest.mark.parametrize(
    ("values", "exact", "context"),
    [
        ({"model_type": "mistral"}, 4096, 131072),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}, 32768, 32768),
        ({"model_type": "phi3", "sliding_window": 2047}, 2047, 4096),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 31, "sliding_window": 100}, 100, 32768),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32, "sliding_window": 100}, 32768, 32768),
        ({"model_type": "gpt_neo"}, 256, 2048),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 24]]}, 2048, 2048),
    ],
)
def test_a_window_keeps_the_context_and_says_for_how_many_tokens_we_are_exact(values: dict[str, Any], exact: int, context: int) -> None:
    imported = read_family(values)
    assert (imported.exact_tokens, imported.config.context) == (exact, context)
    assert any("window" in note for note in imported.notes) == (exact < context)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, r"rope_scaling=\{.*'llama3' are not built"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_parameters=.*'yarn' are not built"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling=.*'linear' are not built"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .*rotates whole heads"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8 .*experts"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*quantised"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' .*the activations are relu"),
        ("llama", {"num_attention_heads": 12, "head_dim": 4}, "num_attention_heads=12 .*divisor of hidden_size=32"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' is not a positive integer"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None is not a number"),
        ("llama", {"num_key_value_heads": 3}, "cannot be built: num_heads=4 is not a multiple of num_kv_heads=3"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*several kinds"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 is not a positive integer"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.*'sliding_attention' for each of 2 layers"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True .*attends to an encoder"),
        ("gpt2", {"n_embd": 30}, "4 heads do not divide the 30 dimensions"),
        ("gpt2", {"hidden_size": 64, "n_embd": 32}, "hidden_size=64 contradicts n_embd=32"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 .*another width than hidden_size=32"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types=.*each of num_layers=2"),
        ("gpt_neox", {"rotary_pct": 0.4}, "rotary_pct=0.4 comes to 3, not an even number"),
        ("gpt_neox", {"head_dim": 16}, "head_dim=16 .*32 / 4 wide"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "rope_scaling=.*'su'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True .*causal"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv=8.0 .*clipped"),
        ("deepseek_v2", {}, r"n_routed_experts=64 \(the default of 'deepseek_v2'\) .*first_k_dense_replace=0"),
        ("deepseek_v2", {"first_k_dense_replace": 2, "num_key_value_heads": 2}, "num_key_value_heads=2 .*num_attention_heads=4"),
        ("minicpm3", {"num_key_value_heads": 4, "q_lora_rank": None, "attention_bias": True}, "attention_bias=True .*q_lora_rank=None"),
        ("minicpm", {"num_experts": 8}, "num_experts=8 .*experts"),
        ("minicpm", {"mystery": 1}, "mystery=1 .*not a field of 'minicpm' that is known"),
        ("openelm", {"num_query_heads": [1, 2]}, "num_query_heads=.*qkv_multipliers come to"),
        ("openelm", {"normalization_layer_name": "layer_norm"}, "normalization_layer_name='layer_norm'"),
        ("openelm", {"qkv_multipliers": [0.5, 0.6, 0.7]}, "qkv_multipliers=.*one for each of 2 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_field_and_value(family: str, changes: dict[str, Any], message: str) -> None:
    values = {**SMALL.get(family, {**LLAMA, "model_type": family}), **changes}
    with pytest.raises(InvalidConfig, match=message) as error:
        read_family(values)
    assert "\n" not in str(error.value)


SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "openelm": {"model_type": "openelm", "model_dim": 32, "num_transformer_layers": 2, "head_dim": 8},
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bloom", "ALiBi"),
        ("gemma3", "four norms"),
        ("mixtral", "experts"),
        ("falcon", "the families that can be read are gpt2, opt"),
        (None, "model_type=None"),
        (7, "model_type=7"),
    ],
)
def test_other_families_are_refused_by_name(name: object, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        read_family({"model_type": name, "hidden_size": 8})


def test_what_transformers_ignores_is_named_in_a_note() -> None:
    imported = read_family({**LLAMA, "use_cache": True, "is_llama_config": True, "mup": 3})
    assert imported.notes == ("not fields of 'llama', and not used, as in transformers: is_llama_config, mup",)


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    checked = 0
    for family in FAMILIES:
        if family in CLOSED:  # their code is not part of transformers
            continue
        given = transformers.AutoConfig.for_model(family)
        rope = getattr(given, "rope_parameters", None) or {}
        for name, value in DEFAULTS[family].items():
            actual = rope.get("partial_rotary_factor") if name in ("rotary_pct", "partial_rotary_factor") else getattr(given, name)
            if name == "sliding_window" and family in ("qwen2", "qwen3"):
                continue  # set to null while use_sliding_window is false
            assert actual == value, (family, name)
            checked += 1
    assert checked > 100


def test_every_default_config_of_transformers_has_its_count_or_is_refused() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    import torch

    for family in ("gpt2", "opt", "qwen2", "gemma", "stablelm", "olmo", "phi"):
        given = transformers.AutoConfig.for_model(family, num_hidden_layers=1, vocab_size=99, pad_token_id=None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(given)
        assert params(read_family(json.loads(given.to_json_string(use_diff=True))).config) == sum(p.numel() for p in model.parameters())
