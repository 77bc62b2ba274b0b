"""What is known of each family beside its reader: the defaults of its config class in transformers 5.23, and other names."""

from collections.abc import Mapping
from typing import Any

_ROTARY = {"tie_word_embeddings": False}
_LLAMA = {
    **_ROTARY, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN = {
    **_ROTARY, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
    },
    "opt": {
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "max_position_embeddings": 2048,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "num_attention_heads": 12, "activation_function": "relu",
        "enable_bias": True, "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
    },
    "gpt_neo": {
        "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
        "attention_types": [[["global", "local"], 12]], "window_size": 256, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "gpt_neox": {
        **_ROTARY, "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25, "use_parallel_residual": True, "attention_bias": True,
    },
    "phi": {
        **_ROTARY, "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "hidden_act": "gelu_new", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "qk_layernorm": False, "partial_rotary_factor": 0.5,
    },
    "phi3": {
        **_ROTARY, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
    },
    "llama": _LLAMA,
    "mistral": {
        **_ROTARY, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "stablelm": {
        **_ROTARY, "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5, "use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False,
        "partial_rotary_factor": 0.25,
    },
    "olmo": {
        **_ROTARY, "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "attention_bias": False,
    },
    "openelm": {
        "vocab_size": 32000, "max_context_length": 2048, "num_transformer_layers": 12, "model_dim": 2048, "head_dim": 128,
        "num_gqa_groups": 1, "qkv_multipliers": 1.0, "ffn_multipliers": 4.0, "ffn_with_glu": True, "ffn_dim_divisor": 256,
        "activation_fn_name": "swish", "normalization_layer_name": "rms_norm", "normalize_qk_projections": False,
        "share_input_output_layers": False, "rope_freq_constant": 10000,
    },
    "minicpm": {**_LLAMA, "tie_word_embeddings": True, "scale_emb": 1, "dim_model_base": 1, "scale_depth": 1},
    "minicpm3": {
        **_LLAMA, "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
        "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
    },
    "deepseek_v2": {
        **_LLAMA, "vocab_size": 102400, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 64, "first_k_dense_replace": 0,
    },
}  # fmt: skip
"""Of fields that are absent; those that are not here are null. OpenELM and the first MiniCPM: of their own code."""

ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "gpt_neo": {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
}
"""Other names that a family takes for a field."""

CLOSED = ("openelm", "minicpm")
"""Families whose code is not part of transformers: there, a field that is not known may mean anything."""

TELLING = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "num_experts", "num_local_experts")
"""Fields of families that are refused which say why."""
REFUSED = {
    "bloom": "positions as biases of attention (ALiBi) are not built",
    "gemma2": "four norms a block, capped scores and logits are not built",
    "gemma3": "four norms a block and rotary positions of two bases are not built",
    "gemma3_text": "four norms a block and rotary positions of two bases are not built",
    "mixtral": "experts are not built",
    "qwen2_moe": "experts are not built",
    "qwen3_moe": "experts are not built",
    "mobilellm": "its modelling code is not part of transformers; `edgewise count mobilellm-125m` has its sizes",
}
