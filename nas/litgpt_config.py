"""An architecture as litgpt's `Config` says it, where it can: what `litgpt pretrain` reads."""

import dataclasses
import math
from typing import Any

from search_spaces.config import InvalidConfig, SLMConfig

_SAID = {
    *("vocab_size", "d_model", "num_layers", "context", "attention", "num_heads", "num_kv_heads", "head_dim", "v_head_dim"),
    *("q_rank", "kv_rank", "qk_norm", "qkv_bias", "attention_bias", "positions", "rotary_dim", "rope_theta", "ffn", "ffn_dim"),
    *("activation", "ffn_bias", "norm", "norm_eps", "norm_bias", "block", "tie_embeddings", "head_bias", "embedding_scale"),
}
"""Fields that are put in litgpt's words below; any other one must be as it is by default."""


def litgpt_config(config: SLMConfig, name: str) -> dict[str, Any]:
    """The fields of a litgpt `Config` (0.5.13) of the same architecture, whose parameters are as many.

    Tied embeddings are not among them: there they are an option of training (`train.tie_embeddings`).

    Args:
        config: the architecture.
        name: what the model is called there; litgpt acts on some names, so words that it knows must not be in it.

    Raises:
        InvalidConfig: if litgpt has no such architecture; the message has the field that is in the way.
    """
    c = config
    _plain_fields(c)
    _need(c.positions == "rotary", c, "positions", "litgpt has rotary positions only")
    _need(c.attention != "mla", c, "attention", "its latent attention is another one")
    for field in ("num_heads", "num_kv_heads", "ffn_dim"):
        _need(not isinstance(getattr(c, field), tuple), c, field, "every layer has the same sizes there")
    _need(c.attention_bias == c.ffn_bias, c, "attention_bias", f"one field says it and ffn_bias={c.ffn_bias} there")
    _need(c.qkv_bias or not c.ffn_bias, c, "qkv_bias", "biases elsewhere bring this one along there")
    _need(c.norm == "rmsnorm" or bool(c.norm_bias), c, "norm_bias", "its LayerNorm has biases")
    _need(not c.qk_norm or c.norm == "rmsnorm", c, "qk_norm", "heads are normalised as blocks are there, and ours by RMSNorm")
    _need(c.embedding_scale in (1.0, math.sqrt(c.d_model)), c, "embedding_scale", "it is 1 or the root of the width there")
    _need(c.rope_theta == int(c.rope_theta), c, "rope_theta", "it is a whole number there")
    assert c.head_dim is not None
    assert c.rotary_dim is not None
    share = c.rotary_dim / c.head_dim
    if int(share * c.head_dim) != c.rotary_dim:  # it is multiplied out again there, and cut
        share = (c.rotary_dim + 0.5) / c.head_dim
    return {
        "name": name,
        "block_size": c.context,
        "n_layer": c.num_layers,
        "n_embd": c.d_model,
        "vocab_size": c.vocab_size,
        "padded_vocab_size": c.vocab_size,
        "norm_class_name": "RMSNorm" if c.norm == "rmsnorm" else "LayerNorm",
        "norm_eps": c.norm_eps,
        "norm_qk": c.qk_norm,
        "parallel_residual": c.block != "sequential",
        "shared_attention_norm": c.block == "parallel_shared_norm",
        "n_head": c.num_heads,
        "head_size": c.head_dim,
        "n_query_groups": c.num_kv_heads,
        "attn_bias": c.qkv_bias,
        "rope_base": int(c.rope_theta),
        "rotary_percentage": share,
        "bias": c.ffn_bias,
        "scale_embeddings": c.embedding_scale != 1.0,
        "lm_head_bias": c.head_bias,
        "intermediate_size": c.ffn_dim,
        **_ffn(c),
    }


def _ffn(c: SLMConfig) -> dict[str, Any]:
    """The kind of FFN."""
    if c.ffn == "gated" and c.activation == "silu":
        return {"mlp_class_name": "LLaMAMLP"}
    _need(
        c.activation in ("gelu", "gelu_tanh"), c, "activation", f"a {c.ffn} FFN has {'SiLU or GELU' if c.ffn == 'gated' else 'GELU'} there"
    )
    kind = "GemmaMLP" if c.ffn == "gated" else "GptNeoxMLP"
    return {"mlp_class_name": kind, "gelu_approximate": "tanh" if c.activation == "gelu_tanh" else "none"}


def _plain_fields(c: SLMConfig) -> None:
    """Refuses what is not put in litgpt's words, unless it is as it is by default."""
    for field in dataclasses.fields(SLMConfig):
        if field.name not in _SAID:
            _need(getattr(c, field.name) == field.default, c, field.name, "litgpt has no word for it")


def _need(ok: bool, c: SLMConfig, field: str, why: str) -> None:
    if not ok:
        raise InvalidConfig(f"litgpt cannot say {field}={getattr(c, field)!r}: {why}")
