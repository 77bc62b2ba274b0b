"""Small random models of every family of transformers that is read, and how to try them."""

import random
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
VOCAB = 67
CONTEXT = 100
"""Room for a prompt and 64 tokens."""


def random_values(family: str, rng: random.Random) -> dict[str, Any]:
    """Keyword arguments of that family's config class in transformers, a few milliseconds to run."""
    values = _CASES[family](rng) | {"vocab_size": VOCAB, "tie_word_embeddings": rng.random() < 0.5}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return values


def _sizes(rng: random.Random, **names: str) -> dict[str, Any]:
    """Width, layers, heads and inner width, under the family's names."""
    heads = rng.choice([1, 2, 4])
    found = {"width": heads * 2 * rng.randint(4, 8), "layers": rng.randint(1, 2), "heads": heads, "inner": rng.randint(9, 40)}
    return {name: found[key] for key, name in names.items()}


def _named(rng: random.Random) -> dict[str, Any]:
    sizes = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size"}
    return _sizes(rng, **sizes) | {"max_position_embeddings": CONTEXT}


def _rotary(rng: random.Random) -> dict[str, Any]:
    values = _named(rng)
    groups = [k for k in (1, 2, 4) if values["num_attention_heads"] % k == 0]
    return values | {
        "num_key_value_heads": rng.choice(groups), "hidden_act": rng.choice(ACTIVATIONS),
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e5])},
    }  # fmt: skip


def _rms(rng: random.Random) -> dict[str, Any]:
    return _rotary(rng) | {"rms_norm_eps": rng.choice([1e-6, 1e-4])}


def _partial(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    width = values["hidden_size"] // values["num_attention_heads"]
    share = 2 * rng.randint(1, width // 2) / width
    return values | {"rope_parameters": {**values["rope_parameters"], "partial_rotary_factor": share}}


def _flags(rng: random.Random, *names: str) -> dict[str, Any]:
    return {name: rng.random() < 0.5 for name in names}


def _gpt2(rng: random.Random) -> dict[str, Any]:
    values = _sizes(rng, width="n_embd", layers="n_layer", heads="n_head", inner="n_inner")
    values |= _flags(rng, "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    return values | {"n_positions": CONTEXT, "activation_function": rng.choice(ACTIVATIONS)}


def _opt(rng: random.Random) -> dict[str, Any]:
    values = _named(rng) | _flags(rng, "enable_bias", "layer_norm_elementwise_affine")
    inner = values.pop("intermediate_size")
    return values | {"ffn_dim": inner, "word_embed_proj_dim": values["hidden_size"], "activation_function": rng.choice(ACTIVATIONS)}


def _gpt_neo(rng: random.Random) -> dict[str, Any]:
    values = _sizes(rng, width="hidden_size", layers="num_layers", heads="num_heads", inner="intermediate_size")
    values |= {"max_position_embeddings": CONTEXT, "activation_function": rng.choice(ACTIVATIONS), "window_size": 90}
    return values | {"attention_types": [[[rng.choice(["global", "local"])], values["num_layers"]]]}


def _gpt_neox(rng: random.Random) -> dict[str, Any]:
    values = _partial(_rotary(rng), rng) | _flags(rng, "use_parallel_residual", "attention_bias")
    del values["num_key_value_heads"]
    return values


def _latent(rng: random.Random) -> dict[str, Any]:
    values = _rms(rng) | _flags(rng, "mlp_bias", "attention_bias")
    rank = rng.choice([None, rng.randint(4, 12)])
    return values | {
        "num_key_value_heads": values["num_attention_heads"], "q_lora_rank": rank, "kv_lora_rank": 2 * rng.randint(2, 6),
        "qk_nope_head_dim": 2 * rng.randint(2, 6), "qk_rope_head_dim": 2 * rng.randint(1, 4), "v_head_dim": rng.randint(3, 9),
        "attention_bias": values["attention_bias"] and rank is not None,
    }  # fmt: skip


def _wide_heads(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return values | {"head_dim": 2 * rng.randint(3, 9)}


_CASES = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "phi": lambda rng: _partial(_rotary(rng), rng),
    "phi3": lambda rng: _partial(_rms(rng), rng) | {"sliding_window": rng.choice([None, 90])},
    "gemma": lambda rng: _wide_heads(_rms(rng), rng) | {"hidden_act": "gelu_pytorch_tanh"} | _flags(rng, "attention_bias"),
    "llama": lambda rng: _wide_heads(_rms(rng), rng) | _flags(rng, "attention_bias", "mlp_bias"),
    "mistral": lambda rng: _wide_heads(_rms(rng), rng) | {"sliding_window": rng.choice([None, 90])},
    "qwen2": _rms,
    "qwen3": lambda rng: (
        _wide_heads(_rms(rng), rng) | _flags(rng, "attention_bias", "use_sliding_window") | {"sliding_window": 90, "max_window_layers": 1}
    ),
    "stablelm": lambda rng: _partial(_rotary(rng), rng) | _flags(rng, "use_qkv_bias", "use_parallel_residual"),
    "olmo": lambda rng: _rotary(rng) | _flags(rng, "attention_bias"),
    "minicpm3": lambda rng: _latent(rng) | {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 16},
    "deepseek_v2": lambda rng: (lambda v: v | {"first_k_dense_replace": v["num_hidden_layers"]})(_latent(rng)),
}
FAMILIES = tuple(_CASES)
