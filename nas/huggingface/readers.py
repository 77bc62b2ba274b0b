"""A reader for each family: what its config.json says, as fields of `SLMConfig`, after transformers 5.23's code.

Constants that our model lacks are folded into weights that it has (`Scales`), so that parameters stay what they are:
a factor on attention scores is one on the queries, a factor on a residual branch one on its last projection, a
factor on logits one on the last norm.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.huggingface.fields import Fields
from nas.huggingface.imported import Scales
from search_spaces.config import MOST, attention_kind
from search_spaces.layerwise import multipliers, round_to_multiple


@dataclass(frozen=True, slots=True)
class Read:
    """What a reader finds: fields of `SLMConfig`, and what else there is to know."""

    values: Mapping[str, Any]
    exact_tokens: int
    scales: Scales = field(default_factory=Scales)


_MLA_EPS = 1e-6
"""Of the norms of MLA's latents in transformers, whatever the config says."""


# --- learned positions ------------------------------------------------------------------------


def _gpt2(f: Fields) -> Read:
    width, layers, heads = f.integer("n_embd"), f.integer("n_layer"), f.integer("n_head")
    context = f.integer("n_positions")
    # Attention scores are scaled by 1 / sqrt(d) unless told otherwise, and by 1 / (i + 1) if told so.
    unscaled = 1.0 if f.flag("scale_attn_weights") else math.sqrt(f.head_dim(heads, width, free=False))
    by_layer = f.flag("scale_attn_by_inverse_layer_idx")
    queries = tuple(unscaled / (i + 1 if by_layer else 1) for i in range(layers))
    values = _learned(f, width, layers, heads, context, "activation_function") | {
        "ffn_dim": f.integer_or("n_inner", 4 * width),
        "norm_eps": f.number("layer_norm_epsilon"),
    }
    return Read(values, context, Scales(queries=queries if unscaled != 1.0 or by_layer else ()))


def _opt(f: Fields) -> Read:
    width, layers, heads = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    context = f.integer("max_position_embeddings")
    f.need("do_layer_norm_before", True, "norms after attention and FFN are not built")
    f.need("_remove_final_layer_norm", False, "a model without a last norm is not built")
    if f.integer_or("word_embed_proj_dim", width) != width:
        f.refuse("word_embed_proj_dim", f"embeddings of another width than hidden_size={width} are not built")
    biased, affine = f.flag("enable_bias"), f.flag("layer_norm_elementwise_affine")
    values = _learned(f, width, layers, heads, context, "activation_function") | {
        "position_offset": 2,
        "ffn_dim": f.integer("ffn_dim"),
        "norm_eps": 1e-5,
        "norm_weight": affine,
        "norm_bias": affine,
        "qkv_bias": biased,
        "attention_bias": biased,
        "ffn_bias": biased,
    }
    return Read(values, context)


def _gpt_neo(f: Fields) -> Read:
    width, layers, heads = f.integer("hidden_size"), f.integer("num_layers"), f.integer("num_heads")
    context = f.integer("max_position_embeddings")
    kinds = _gpt_neo_layers(f, layers)
    exact = f.window(context, "window_size") if "local" in kinds else context
    f.get("window_size")
    values = _learned(f, width, layers, heads, context, "activation_function") | {
        "ffn_dim": f.integer_or("intermediate_size", 4 * width),
        "norm_eps": f.number("layer_norm_epsilon"),
        "qkv_bias": False,
    }
    # Its scores are not scaled at all.
    return Read(values, exact, Scales(queries=(math.sqrt(f.head_dim(heads, width, free=False)),) * layers))


def _gpt_neo_layers(f: Fields, layers: int) -> list[str]:
    """Whether each layer's attention is "global" or "local"."""
    try:
        kinds = [str(kind) for names, times in f.get("attention_types") for _ in range(min(times, layers + 1)) for kind in names]
    except (TypeError, ValueError):
        f.refuse("attention_types", "it is not a list of [kinds, how many times]")
    if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
        f.refuse("attention_types", f"it does not give 'global' or 'local' for each of num_layers={layers}")
    if f.get("attention_layers") not in (None, kinds):
        f.refuse("attention_layers", "it contradicts attention_types")
    return kinds


def _learned(f: Fields, width: int, layers: int, heads: int, context: int, activation: str) -> dict[str, Any]:
    f.head_dim(heads, width, free=False)
    return {
        "vocab_size": f.integer("vocab_size"), "d_model": width, "num_layers": layers, "num_heads": heads, "context": context,
        "positions": "learned", "norm": "layernorm", "ffn": "standard", "activation": f.activation(activation),
        "qkv_bias": True, "attention_bias": True, "ffn_bias": True, "tie_embeddings": f.flag("tie_word_embeddings"),
    }  # fmt: skip


# --- rotary positions, LayerNorm --------------------------------------------------------------


def _gpt_neox(f: Fields) -> Read:
    values = _rotary(f, partial="rotary_pct", theta="rotary_emb_base", free=False, grouped=False)
    return Read(
        values
        | _layer_norm(f)
        | {
            "ffn": "standard",
            "ffn_bias": True,
            "qkv_bias": f.flag("attention_bias"),
            "attention_bias": f.flag("attention_bias"),
            "block": "parallel" if f.flag("use_parallel_residual") else "sequential",
        },
        values["context"],
    )


def _phi(f: Fields) -> Read:
    f.need("qk_layernorm", False, "a LayerNorm of queries and keys is not built")
    values = _rotary(f, partial="partial_rotary_factor")
    biases = {"qkv_bias": True, "attention_bias": True, "ffn_bias": True, "head_bias": True}
    return Read(values | _layer_norm(f) | {"ffn": "standard", "block": "parallel_shared_norm", **biases}, values["context"])


def _stablelm(f: Fields) -> Read:
    f.need("qk_layernorm", False, "a LayerNorm for each head of queries and keys is not built")
    values = _rotary(f, partial="partial_rotary_factor", free=False)
    block = "parallel_shared_norm" if f.flag("use_parallel_residual") else "sequential"
    return Read(values | _layer_norm(f) | {"qkv_bias": f.flag("use_qkv_bias"), "block": block}, values["context"])


def _olmo(f: Fields) -> Read:
    f.need("clip_qkv", None, "clipped queries, keys and values are not built")
    values = _rotary(f)
    return Read(values | _attention_biases(f) | {"norm": "layernorm", "norm_weight": False, "norm_eps": 1e-5}, values["context"])


def _layer_norm(f: Fields) -> dict[str, Any]:
    return {"norm": "layernorm", "norm_eps": f.number("layer_norm_eps")}


# --- rotary positions, RMSNorm ----------------------------------------------------------------


def _llama(f: Fields) -> Read:
    values = _rotary(f) | _rms_norm(f) | _attention_biases(f) | {"ffn_bias": f.flag("mlp_bias")}
    _whole_heads(f)
    return Read(values, values["context"])


def _mistral(f: Fields) -> Read:
    values = _rotary(f) | _rms_norm(f)
    return Read(values, f.window(values["context"]))


def _phi3(f: Fields) -> Read:
    values = _rotary(f, partial="partial_rotary_factor") | _rms_norm(f)
    f.get("original_max_position_embeddings")  # of scaled rotary positions only
    return Read(values, f.window(values["context"]))


def _qwen2(f: Fields) -> Read:
    values = _rotary(f) | _rms_norm(f) | {"qkv_bias": True}
    return Read(values, _qwen_window(f, values))


def _qwen3(f: Fields) -> Read:
    values = _rotary(f) | _rms_norm(f) | _attention_biases(f) | {"qk_norm": True}
    return Read(values, _qwen_window(f, values))


def _qwen_window(f: Fields, values: Mapping[str, Any]) -> int:
    """Layers from `max_window_layers` on look back over a window, unless `layer_types` says which do."""
    windowed, first, kinds = f.flag("use_sliding_window"), f.get("max_window_layers"), f.get("layer_types")
    f.get("sliding_window")
    layers = values["num_layers"]
    if kinds is None:
        kinds = ["sliding_attention" if windowed and i >= f.number("max_window_layers") else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
        f.refuse("layer_types", f"it does not give 'full_attention' or 'sliding_attention' for each of {layers} layers")
    if "sliding_attention" not in kinds:
        return int(values["context"])
    if not windowed:
        f.refuse("layer_types", f"it has windows and use_sliding_window={windowed!r}, max_window_layers={first!r} says there are none")
    return f.window(values["context"])


def _gemma(f: Fields) -> Read:
    if f.get("hidden_activation") not in (None, "gelu_pytorch_tanh"):
        f.refuse("hidden_activation", "transformers takes hidden_act instead")
    values = _rotary(f) | _rms_norm(f) | _attention_biases(f)
    if f.get("hidden_act") == "gelu":  # so in the first files; the weights were trained with the other, and are read with it
        values["activation"] = "gelu_tanh"
    return Read(values | {"embedding_scale": math.sqrt(values["d_model"])}, values["context"], Scales(norm_shift=1.0))


def _minicpm(f: Fields) -> Read:
    values = _rotary(f, free=False) | _rms_norm(f) | _attention_biases(f)
    return Read(*_scaled(f, values))


def _scaled(f: Fields, values: dict[str, Any], **scales: Any) -> tuple[dict[str, Any], int, Scales]:
    """MiniCPM's factors: on embeddings, on what each layer adds, and on what the head reads."""
    width, layers = values["d_model"], values["num_layers"]
    depth = math.sqrt(layers) if f.get("scale_depth") is None else f.number("scale_depth")
    base = width if f.get("dim_model_base") is None else f.number("dim_model_base")
    for name in ("scale_depth", "dim_model_base", "scale_emb"):
        if f.get(name) is not None and f.number(name) <= 0:
            f.refuse(name, "it is not above 0")
    found = Scales(residual=depth / math.sqrt(layers), final=base / width, **scales)
    return values | {"embedding_scale": f.number("scale_emb")}, values["context"], found


def _rotary(f: Fields, *, partial: str | None = None, theta: str = "rope_theta", free: bool = True, grouped: bool = True) -> dict[str, Any]:
    """What decoders with rotary positions have in common; a gated FFN without biases unless overwritten."""
    width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer_or("num_key_value_heads", heads) if grouped else heads
    head_dim = f.head_dim(heads, width, free=free)
    dims, base = f.rope(head_dim, partial=partial, theta=theta)
    return {
        "vocab_size": f.integer("vocab_size"), "d_model": width, "num_layers": f.integer("num_hidden_layers"),
        "context": f.integer("max_position_embeddings"), "attention": attention_kind(heads, kv_heads), "num_heads": heads,
        "num_kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": dims, "rope_theta": base,
        "ffn": "gated", "ffn_dim": f.integer("intermediate_size"), "activation": f.activation("hidden_act"),
        "tie_embeddings": f.flag("tie_word_embeddings"),
    }  # fmt: skip


def _rms_norm(f: Fields) -> dict[str, Any]:
    return {"norm": "rmsnorm", "norm_eps": f.number("rms_norm_eps")}


def _attention_biases(f: Fields) -> dict[str, Any]:
    return {"qkv_bias": f.flag("attention_bias"), "attention_bias": f.flag("attention_bias")}


def _whole_heads(f: Fields) -> None:
    """What some config classes of transformers ask for, whatever the width of heads."""
    width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if width % heads:
        f.refuse("num_attention_heads", f"transformers' {f.family!r} needs a divisor of hidden_size={width}")


# --- latent attention -------------------------------------------------------------------------


def _latent(f: Fields) -> dict[str, Any]:
    """MLA (DeepSeek-V2, arXiv 2405.04434) with RMSNorm and a gated FFN."""
    _whole_heads(f)
    width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if f.integer_or("num_key_value_heads", heads) != heads:
        f.refuse("num_key_value_heads", f"latent attention has as many as num_attention_heads={heads}")
    rotary = f.integer("qk_rope_head_dim")
    dims, base = f.rope(rotary)
    q_rank, biased = f.get("q_lora_rank"), f.flag("attention_bias")
    if q_rank is None and biased:
        f.refuse("attention_bias", "with q_lora_rank=None it is on the latent and not on the queries, and ours is on both or neither")
    f.get("head_dim")  # transformers overwrites both
    f.get("qk_head_dim")
    return _rms_norm(f) | {
        "vocab_size": f.integer("vocab_size"), "d_model": width, "num_layers": f.integer("num_hidden_layers"),
        "context": f.integer("max_position_embeddings"), "attention": "mla", "num_heads": heads,
        "head_dim": f.integer("qk_nope_head_dim"), "v_head_dim": f.integer_or("v_head_dim", width // heads),
        "q_rank": 0 if q_rank is None else f.integer("q_lora_rank"), "kv_rank": f.integer("kv_lora_rank"),
        "rotary_dim": dims, "rope_theta": base, "qkv_bias": biased, "attention_bias": biased, "ffn": "gated",
        "ffn_dim": f.integer("intermediate_size"), "ffn_bias": f.flag("mlp_bias"), "activation": f.activation("hidden_act"),
        "tie_embeddings": f.flag("tie_word_embeddings"),
    }  # fmt: skip


def _latent_scale(values: Mapping[str, Any]) -> float:
    eps = float(values["norm_eps"])
    return math.sqrt(eps / _MLA_EPS) if eps > 0 else 1.0


def _minicpm3(f: Fields) -> Read:
    values = _latent(f)
    return Read(*_scaled(f, values, latents=_latent_scale(values)))


_EXPERTS = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_layer_freq", "n_group", "topk_group",
    "topk_method", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "aux_loss_alpha", "seq_aux", "ep_size",
    "first_k_dense_replace",
)  # fmt: skip


def _deepseek_v2(f: Fields) -> Read:
    values = _latent(f)
    for name in _EXPERTS:
        f.get(name)
    dense = f.get("first_k_dense_replace")
    if f.get("n_routed_experts") and not (isinstance(dense, int) and dense >= values["num_layers"]):
        f.refuse("n_routed_experts", f"experts are not built, and first_k_dense_replace={dense!r} leaves layers that have them")
    return Read(values, values["context"], Scales(latents=_latent_scale(values), neighbours=True))


# --- layer-wise scaling -----------------------------------------------------------------------


def _openelm(f: Fields) -> Read:
    """OpenELM (arXiv 2404.14619): sizes follow from multipliers; lists of heads in the file are what they come to."""
    f.need("normalization_layer_name", "rms_norm", "norms of OpenELM are RMSNorm")
    width, layers, head_dim = f.integer("model_dim"), f.integer("num_transformer_layers"), f.integer("head_dim")
    groups = f.integer_or("num_gqa_groups", 1)
    multiple = head_dim * f.integer_or("num_gqa_groups", 2)
    heads = [round_to_multiple(width * m, multiple) // head_dim for m in _spread(f, "qkv_multipliers", layers)]
    kv_heads = [n // groups for n in heads]
    for name, found in (("num_query_heads", heads), ("num_kv_heads", kv_heads)):
        if f.get(name) not in (None, found):
            f.refuse(name, f"qkv_multipliers come to {found}")
    dims, base = f.rope(head_dim, theta="rope_freq_constant")
    f.get("rope_max_length")  # how long a table its code prepares
    context = f.integer("max_context_length")
    values = {
        "vocab_size": f.integer("vocab_size"), "d_model": width, "num_layers": layers, "context": context,
        "attention": attention_kind(tuple(heads), tuple(kv_heads)), "num_heads": tuple(heads), "num_kv_heads": tuple(kv_heads),
        "head_dim": head_dim, "rotary_dim": dims, "rope_theta": base, "qk_norm": f.flag("normalize_qk_projections"),
        "ffn": "gated" if f.flag("ffn_with_glu") else "standard", "activation": f.activation("activation_fn_name"),
        "ffn_dim": tuple(round_to_multiple(m * width, f.integer("ffn_dim_divisor")) for m in _spread(f, "ffn_multipliers", layers)),
        "norm": "rmsnorm", "norm_eps": 1e-6, "tie_embeddings": f.flag("share_input_output_layers"),
    }  # fmt: skip
    return Read(values, context)


def _spread(f: Fields, name: str, layers: int) -> list[float]:
    """One multiplier a layer: the same for all, each given, or in equal steps between two."""
    value = f.get(name)
    points = [f.finite(name, v) for v in (value if isinstance(value, list) else [value])]
    if not isinstance(value, list):
        points *= layers
    elif len(points) == 2:
        points = multipliers((points[0], points[1] if layers > 1 else points[0]), layers)
    if len(points) != layers or not 0 < min(points) <= max(points) <= MOST:
        f.refuse(name, f"it is not a positive number, two of them, or one for each of {layers} layers")
    return points


READERS: Mapping[str, Callable[[Fields], Read]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "phi3": _phi3,
    "gemma": _gemma,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "stablelm": _stablelm,
    "olmo": _olmo,
    "openelm": _openelm,
    "minicpm": _minicpm,
    "minicpm3": _minicpm3,
    "deepseek_v2": _deepseek_v2,
}
"""The reader of each model_type."""
