"""Published models by name, each with its exact parameter count.

A reference is here only if `SLMConfig` is the whole of its architecture, up to how weights are stored (Gemma keeps
norm weights less one). Left out for that reason: OPT-350M (post-norm, projected embeddings), Gemma-2 (four norms,
soft caps, windows), GPT-Neo (windows, unscaled scores), MiniCPM (scaled residuals and logits), StableLM. The
config.json of most of these can be read all the same, with weights that are folded (`nas.huggingface`). Numbers are
of the published config files; counts are of unique elements, tied weights once.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.layerwise import layerwise_scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A published model: its config, what is known of its size, and where that is from."""

    name: str
    config: SLMConfig
    params: int | None
    """The exact published count; None where it is unpublished."""
    source: str
    notes: str = ""


@dataclass(frozen=True, slots=True)
class _Row:
    """A reference as data: a config is made, and checked, only when it is asked for."""

    values: Mapping[str, Any]
    params: int | None
    source: str
    notes: str = ""


def reference_names() -> tuple[str, ...]:
    """Every reference, by family and size."""
    return tuple(_TABLE)


def reference(name: str) -> SLMConfig:
    """The config of a published model, by its lower-case name.

    Raises:
        InvalidConfig: if there is no such reference; the message has the nearest names.
    """
    return reference_model(name).config


def reference_model(name: str) -> Reference:
    """A published model with its exact count, source and notes.

    Raises:
        InvalidConfig: if there is no such reference; the message has the nearest names.
    """
    row = _TABLE.get(name.lower())
    if row is None:
        close = difflib.get_close_matches(name.lower(), _TABLE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose one of {', '.join(_TABLE)}"
        raise InvalidConfig(f"{name!r} is not a reference model; {hint}")
    return Reference(name=name.lower(), config=SLMConfig(**row.values), params=row.params, source=row.source, notes=row.notes)


# --- families ---------------------------------------------------------------------------------

_BIASES = {"qkv_bias": True, "attention_bias": True, "ffn_bias": True}
_GPT = {**_BIASES, "positions": "learned", "ffn": "standard", "norm": "layernorm", "norm_eps": 1e-5}
_GPT2 = {**_GPT, "vocab_size": 50257}
_NEOX = {**_BIASES, "ffn": "standard", "activation": "gelu", "norm": "layernorm", "norm_eps": 1e-5, "block": "parallel", "context": 2048}
_NEOX = {**_NEOX, "tie_embeddings": False}
_LLAMA = {"ffn": "gated", "activation": "silu", "norm": "rmsnorm"}
_SMOLLM = {**_LLAMA, "vocab_size": 49152, "context": 2048, "norm_eps": 1e-5}
_SMOLLM2 = {**_SMOLLM, "context": 8192, "rope_theta": 1e5}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "context": 32768,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qkv_bias": True,
    "attention": "gqa",
    "num_kv_heads": 2,
}
_MOBILELLM = {**_LLAMA, "vocab_size": 32000, "context": 2048, "norm_eps": 1e-5, "d_model": 576}
_MOBILELLM = {**_MOBILELLM, "attention": "gqa", "num_heads": 9, "num_kv_heads": 3, "ffn_dim": 1536}


def _openelm(d_model: int, num_layers: int, head_dim: int) -> dict[str, Any]:
    sizes = layerwise_scaling(d_model=d_model, num_layers=num_layers, head_dim=head_dim)
    return {
        **_LLAMA,
        "vocab_size": 32000,
        "context": 2048,
        "norm_eps": 1e-6,
        "d_model": d_model,
        "num_layers": num_layers,
        "attention": "gqa",
        "head_dim": head_dim,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "ffn_dim": sizes.ffn_dim,
        "qk_norm": True,
    }


_TRANSFORMERS = "published config; counted in transformers 5.23 on the meta device"
_CORENET = "apple/corenet general_gpt.py, arXiv 2404.14619; the published OpenELM total"
_MOBILELLM_SOURCE = "facebookresearch/MobileLLM configs/125M, arXiv 2402.14905; counted in transformers 5.23 on the meta device"
_QWEN2_NOTE = "Context as stated for the model (32,768); the base checkpoint's file allows 131,072 positions."
_CEREBRAS_NOTE = "Activation as in the published file (gelu, exact)."
_OPENELM_NOTE = "Rotary tables are built for 4,096 positions; 2,048 is the trained context. Stored as fused QKV and fused gate and up."

_TABLE: dict[str, _Row] = {
    "gpt2-124m": _Row(
        {**_GPT2, "d_model": 768, "num_layers": 12, "num_heads": 12, "context": 1024, "activation": "gelu_tanh"},
        124_439_808,
        _TRANSFORMERS,
        "Stored with fused, transposed QKV.",
    ),
    "opt-125m": _Row(
        {
            **_GPT,
            "vocab_size": 50272,
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "context": 2048,
            "activation": "relu",
            "position_offset": 2,
        },
        125_239_296,
        _TRANSFORMERS,
        "The position table has two unused leading rows.",
    ),
    "cerebras-gpt-111m": _Row(
        {**_GPT2, "d_model": 768, "num_layers": 10, "num_heads": 12, "context": 2048, "activation": "gelu"},
        111_050_496,
        _TRANSFORMERS,
        _CEREBRAS_NOTE,
    ),
    "cerebras-gpt-590m": _Row(
        {**_GPT2, "d_model": 1536, "num_layers": 18, "num_heads": 12, "context": 2048, "activation": "gelu"},
        590_310_912,
        _TRANSFORMERS,
        _CEREBRAS_NOTE,
    ),
    "pythia-160m": _Row(
        {**_NEOX, "vocab_size": 50304, "d_model": 768, "num_layers": 12, "num_heads": 12, "rotary_dim": 16},
        162_322_944,
        _TRANSFORMERS,
    ),
    "pythia-1b": _Row(
        {**_NEOX, "vocab_size": 50304, "d_model": 2048, "num_layers": 16, "num_heads": 8, "rotary_dim": 64},
        1_011_781_632,
        _TRANSFORMERS,
    ),
    "pythia-2.8b": _Row(
        {**_NEOX, "vocab_size": 50304, "d_model": 2560, "num_layers": 32, "num_heads": 32, "rotary_dim": 20},
        2_775_208_960,
        _TRANSFORMERS,
    ),
    "dolly-v2-3b": _Row(
        {**_NEOX, "vocab_size": 50280, "d_model": 2560, "num_layers": 32, "num_heads": 32, "rotary_dim": 20},
        2_775_086_080,
        _TRANSFORMERS,
        "Pythia-2.8B with its embeddings cut to 50,280 rows.",
    ),
    "phi-2": _Row(
        {
            **_BIASES,
            "vocab_size": 51200,
            "d_model": 2560,
            "num_layers": 32,
            "num_heads": 32,
            "rotary_dim": 32,
            "context": 2048,
            "ffn": "standard",
            "activation": "gelu_tanh",
            "norm": "layernorm",
            "norm_eps": 1e-5,
            "block": "parallel_shared_norm",
            "tie_embeddings": False,
            "head_bias": True,
        },
        2_779_683_840,
        _TRANSFORMERS,
        "Rotary on 40 % of each head.",
    ),
    "phi-3-mini": _Row(
        {
            **_LLAMA,
            "vocab_size": 32064,
            "d_model": 3072,
            "num_layers": 32,
            "num_heads": 32,
            "ffn_dim": 8192,
            "context": 4096,
            "tie_embeddings": False,
        },
        3_821_079_552,
        _TRANSFORMERS,
        "The 4k model. Its file asks for a window of 2,047 tokens; here attention is over the whole context.",
    ),
    "gemma-2b": _Row(
        {
            "vocab_size": 256000,
            "d_model": 2048,
            "num_layers": 18,
            "attention": "mqa",
            "num_heads": 8,
            "head_dim": 256,
            "ffn_dim": 16384,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
            "context": 8192,
            "embedding_scale": math.sqrt(2048),
        },
        2_506_172_416,
        _TRANSFORMERS,
        "Checkpoints store norm weights less one: add 1 on import.",
    ),
    "olmo-1b": _Row(
        {
            **_LLAMA,
            "vocab_size": 50304,
            "d_model": 2048,
            "num_layers": 16,
            "num_heads": 16,
            "ffn_dim": 8192,
            "context": 2048,
            "norm": "layernorm",
            "norm_weight": False,
            "norm_eps": 1e-5,
        },
        1_176_764_416,
        _TRANSFORMERS,
    ),
    "llama-7b": _Row(
        {
            **_LLAMA,
            "vocab_size": 32000,
            "d_model": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "ffn_dim": 11008,
            "context": 2048,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
        },
        6_738_415_616,
        _TRANSFORMERS,
    ),
    "tinyllama-1.1b": _Row(
        {
            **_LLAMA,
            "vocab_size": 32000,
            "d_model": 2048,
            "num_layers": 22,
            "attention": "gqa",
            "num_heads": 32,
            "num_kv_heads": 4,
            "ffn_dim": 5632,
            "context": 2048,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
        },
        1_100_048_384,
        _TRANSFORMERS,
    ),
    "qwen2-0.5b": _Row(
        {**_QWEN, "d_model": 896, "num_layers": 24, "num_heads": 14, "ffn_dim": 4864}, 494_032_768, _TRANSFORMERS, _QWEN2_NOTE
    ),
    "qwen2-1.5b": _Row(
        {**_QWEN, "d_model": 1536, "num_layers": 28, "num_heads": 12, "ffn_dim": 8960}, 1_543_714_304, _TRANSFORMERS, _QWEN2_NOTE
    ),
    "qwen2.5-0.5b": _Row({**_QWEN, "d_model": 896, "num_layers": 24, "num_heads": 14, "ffn_dim": 4864}, 494_032_768, _TRANSFORMERS),
    "qwen2.5-3b": _Row({**_QWEN, "d_model": 2048, "num_layers": 36, "num_heads": 16, "ffn_dim": 11008}, 3_085_938_688, _TRANSFORMERS),
    "smollm-135m": _Row(
        {**_SMOLLM, "d_model": 576, "num_layers": 30, "attention": "gqa", "num_heads": 9, "num_kv_heads": 3, "ffn_dim": 1536},
        134_515_008,
        _TRANSFORMERS,
    ),
    "smollm-360m": _Row(
        {**_SMOLLM, "d_model": 960, "num_layers": 32, "attention": "gqa", "num_heads": 15, "num_kv_heads": 5, "ffn_dim": 2560},
        361_821_120,
        "published config; the same shapes as SmolLM2-360M, whose count this is",
    ),
    "smollm-1.7b": _Row({**_SMOLLM, "d_model": 2048, "num_layers": 24, "num_heads": 32, "ffn_dim": 8192}, 1_711_376_384, _TRANSFORMERS),
    "smollm2-135m": _Row(
        {**_SMOLLM2, "d_model": 576, "num_layers": 30, "attention": "gqa", "num_heads": 9, "num_kv_heads": 3, "ffn_dim": 1536},
        134_515_008,
        _TRANSFORMERS,
    ),
    "smollm2-360m": _Row(
        {**_SMOLLM2, "d_model": 960, "num_layers": 32, "attention": "gqa", "num_heads": 15, "num_kv_heads": 5, "ffn_dim": 2560},
        361_821_120,
        _TRANSFORMERS,
    ),
    "mobilellm-125m": _Row(
        {**_MOBILELLM, "num_layers": 30},
        124_635_456,
        _MOBILELLM_SOURCE,
        "The file says untied; training ties the head to the embedding, and so does the count.",
    ),
    "mobilellm-ls-125m": _Row(
        {**_MOBILELLM, "num_layers": 60, "sharing": "sequence", "num_unique_layers": 30},
        124_635_456,
        _MOBILELLM_SOURCE,
        "Every block runs twice in a row: 60 effective layers on 30 unique ones.",
    ),
    "openelm-270m": _Row(_openelm(1280, 16, 64), 271_527_168, _CORENET, _OPENELM_NOTE),
    "openelm-450m": _Row(_openelm(1536, 20, 64), 457_179_136, _CORENET, _OPENELM_NOTE),
    "openelm-1.1b": _Row(_openelm(2048, 28, 64), 1_079_891_456, _CORENET, _OPENELM_NOTE),
    "openelm-3b": _Row(_openelm(3072, 36, 128), 3_036_647_424, _CORENET, _OPENELM_NOTE),
    "pangu-pi-1b": _Row(
        {
            **_LLAMA,
            "vocab_size": 100883,
            "d_model": 2048,
            "num_layers": 12,
            "num_heads": 16,
            "ffn_dim": 5632,
            "context": 2048,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "series_activation": 2,
            "augmented_shortcuts": 1,
            "shortcut_reduction": 32,
        },
        None,
        "width, depth and vocabulary: YuchuanTian/RethinkTinyLM, arXiv 2402.02791; block: arXiv 2312.17276",
        "Published: width 2048, 12 layers, 100,883 tokens, n = 2, r = 32. Unpublished, and assumed here: 16 heads of 128, FFN width 5632 "
        "and an untied head (about the 1 B of its name), one shortcut a layer, scalar series on the gate branch, context 2048, eps 1e-6.",
    ),
}
