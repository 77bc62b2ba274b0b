"""Where each of a family's tensors goes: its name there, the parameters of `SLM` in it, and how they lie in it.

One description serves both ways: `split` takes their tensor apart into ours, `join` is its inverse.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nas.huggingface.imported import Scales
from search_spaces.config import LayerShape, SLMConfig
from search_spaces.model import SLM


@dataclass(frozen=True, slots=True)
class Layout:
    """How parameters lie in a tensor."""

    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One of their tensors.

    Attributes:
        theirs: its name in their files.
        ours: the parameters of `SLM` that it holds.
        layout: how they lie in it.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a layout may depend on."""

    config: SLMConfig
    scales: Scales
    shape: LayerShape
    layer: int


_PLAIN = Layout(lambda theirs: [theirs], lambda ours: ours[0])
_Make = Callable[[_Part], Layout]
_Modules = Mapping[tuple[str, ...], tuple[str, _Make]]
"""Modules of ours -> the module of theirs that holds them, and its layout."""


# --- layouts ----------------------------------------------------------------------------------


def _plain(_: _Part) -> Layout:
    return _PLAIN


def _scaled(by: float) -> Layout:
    return _PLAIN if by == 1.0 else Layout(lambda theirs: [theirs * by], lambda ours: ours[0] / by)


def _queries(part: _Part) -> Layout:
    return _scaled(part.scales.queries[part.layer] if part.scales.queries else 1.0)


def _residual(part: _Part) -> Layout:
    return _scaled(part.scales.residual)


def _norm(part: _Part) -> Layout:
    """Norm weights, stored less one by some."""
    by = part.scales.norm_shift
    return _PLAIN if by == 0.0 else Layout(lambda theirs: [theirs + by], lambda ours: ours[0] - by)


def _transposed(make: _Make, part: _Part) -> Layout:
    """Matrices (in, out), as GPT-2's; vectors stay."""
    inner = make(part)
    return Layout(lambda theirs: inner.split(_turned(theirs)), lambda ours: _turned(inner.join(ours)))


def _turned(x: Tensor) -> Tensor:
    return x.T if x.ndim == 2 else x


def _stacked_heads(part: _Part) -> Layout:
    """Q, K and V, one under the other; queries with their factor."""
    d = part.config.head_dim or 0
    rows = [part.shape.num_heads * d, part.shape.num_kv_heads * d, part.shape.num_kv_heads * d]
    queries = _queries(part)

    def split(theirs: Tensor) -> list[Tensor]:
        q, k, v = torch.split(theirs, rows)
        return [*queries.split(q), k, v]

    return Layout(split, lambda ours: torch.cat((queries.join(ours[:1]), *ours[1:])))


def _stacked_gate(part: _Part) -> Layout:
    """The gate, and below it the other projection."""
    return Layout(lambda theirs: list(torch.split(theirs, part.shape.ffn_dim)), lambda ours: torch.cat(tuple(ours)))


def _interleaved(part: _Part) -> Layout:
    """GPT-NeoX: for each head its rows of Q, K and V."""
    H, d = part.shape.num_heads, part.config.head_dim or 0
    return Layout(
        lambda theirs: [x.reshape(H * d, *theirs.shape[1:]) for x in theirs.reshape(H, 3, d, *theirs.shape[1:]).unbind(1)],
        lambda ours: torch.stack([x.reshape(H, d, *x.shape[1:]) for x in ours], dim=1).reshape(3 * H * d, *ours[0].shape[1:]),
    )


def _latent_queries(part: _Part) -> Layout:
    """MLA's queries: for each head the part without rotary, then the rotary one."""
    return _rotary_last(part, part.shape.num_heads, part.config.head_dim or 0)


def _rotary_last(part: _Part, heads: int, before: int) -> Layout:
    R = part.config.rotary_dim or 0
    if not part.scales.neighbours:
        return _PLAIN

    def turned(x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        by_head = x.reshape(heads, before + R, *x.shape[1:])
        return torch.cat((by_head[:, :before], move(by_head[:, before:])), dim=1).reshape(x.shape)

    def halves(x: Tensor) -> Tensor:
        return x.reshape(heads, R // 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    def neighbours(x: Tensor) -> Tensor:
        return x.reshape(heads, 2, R // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    return Layout(lambda theirs: [turned(theirs, halves)], lambda ours: turned(ours[0], neighbours))


def _latents(part: _Part) -> Layout:
    """MLA's compression: rows of the latent, then the shared rotary key."""
    L, inner, latent = part.config.kv_rank, _rotary_last(part, 1, part.config.kv_rank), _scaled(part.scales.latents)

    def split(theirs: Tensor) -> list[Tensor]:
        (turned,) = inner.split(theirs)
        return [torch.cat((*latent.split(turned[:L]), turned[L:]))]

    return Layout(split, lambda ours: inner.join([torch.cat((latent.join([ours[0][:L]]), ours[0][L:]))]))


def _latent_scale(part: _Part) -> Layout:
    return _scaled(part.scales.latents)


def _expansion(part: _Part) -> Layout:
    """MLA's expansion (H (d + v), L): for each head what makes its keys, then what makes its values."""
    H, d, L = part.shape.num_heads, part.config.head_dim or 0, part.config.kv_rank

    def split(theirs: Tensor) -> list[Tensor]:
        by_head = theirs.reshape(H, -1, L)
        return [by_head[:, :d], by_head[:, d:]]

    return Layout(split, lambda ours: torch.cat(tuple(ours), dim=1).reshape(-1, L))


# --- names ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """A family's names.

    Attributes:
        prefix: in front of everything but the head; files of the bare decoder leave it out.
        embed, positions, norm, head: of what is there once.
        block: in front of a layer's names, with its number to fill in.
        modules: of a layer.
    """

    prefix: str = "model."
    embed: str = "embed_tokens"
    positions: str = ""
    block: str = "layers.{}."
    norm: str = "norm"
    head: str = "lm_head"
    modules: _Modules


_Q, _K, _V, _OUT = ("attention.q",), ("attention.k",), ("attention.v",), ("attention.out",)
_QKV = (*_Q, *_K, *_V)
_GATE, _UP, _DOWN = ("ffn.gate",), ("ffn.up",), ("ffn.down",)
_NORM, _FFN_NORM = ("attention.norm",), ("ffn.norm",)

_LLAMA: _Modules = {
    _NORM: ("input_layernorm", _norm),
    _Q: ("self_attn.q_proj", _queries),
    _K: ("self_attn.k_proj", _plain),
    _V: ("self_attn.v_proj", _plain),
    _OUT: ("self_attn.o_proj", _residual),
    ("attention.q_norm",): ("self_attn.q_norm", _plain),
    ("attention.k_norm",): ("self_attn.k_norm", _plain),
    _FFN_NORM: ("post_attention_layernorm", _norm),
    _GATE: ("mlp.gate_proj", _plain),
    _UP: ("mlp.up_proj", _plain),
    _DOWN: ("mlp.down_proj", _residual),
}
_LATENT: _Modules = {
    **{key: value for key, value in _LLAMA.items() if key not in (_Q, _K, _V)},
    ("attention.q_down",): ("self_attn.q_a_proj", _latent_scale),
    ("attention.q_norm",): ("self_attn.q_a_layernorm", _plain),
    ("attention.kv_down",): ("self_attn.kv_a_proj_with_mqa", _latents),
    ("attention.kv_norm",): ("self_attn.kv_a_layernorm", _plain),
    ("attention.k_up", "attention.v_up"): ("self_attn.kv_b_proj", _expansion),
}
_PHI: _Modules = {
    _NORM: ("input_layernorm", _plain),
    _Q: ("self_attn.q_proj", _plain),
    _K: ("self_attn.k_proj", _plain),
    _V: ("self_attn.v_proj", _plain),
    _OUT: ("self_attn.dense", _plain),
    _UP: ("mlp.fc1", _plain),
    _DOWN: ("mlp.fc2", _plain),
}
_PHI3: _Modules = {
    **{key: value for key, value in _LLAMA.items() if key not in (_Q, _K, _V, _GATE, _UP)},
    _QKV: ("self_attn.qkv_proj", _stacked_heads),
    (*_GATE, *_UP): ("mlp.gate_up_proj", _stacked_gate),
}
_GPT2: _Modules = {
    _NORM: ("ln_1", _plain),
    _QKV: ("attn.c_attn", partial(_transposed, _stacked_heads)),
    _OUT: ("attn.c_proj", partial(_transposed, _plain)),
    _FFN_NORM: ("ln_2", _plain),
    _UP: ("mlp.c_fc", partial(_transposed, _plain)),
    _DOWN: ("mlp.c_proj", partial(_transposed, _plain)),
}
_GPT_NEO: _Modules = {
    _NORM: ("ln_1", _plain),
    _Q: ("attn.attention.q_proj", _queries),
    _K: ("attn.attention.k_proj", _plain),
    _V: ("attn.attention.v_proj", _plain),
    _OUT: ("attn.attention.out_proj", _plain),
    _FFN_NORM: ("ln_2", _plain),
    _UP: ("mlp.c_fc", _plain),
    _DOWN: ("mlp.c_proj", _plain),
}
_OPT: _Modules = {
    _NORM: ("self_attn_layer_norm", _plain),
    _Q: ("self_attn.q_proj", _plain),
    _K: ("self_attn.k_proj", _plain),
    _V: ("self_attn.v_proj", _plain),
    _OUT: ("self_attn.out_proj", _plain),
    _FFN_NORM: ("final_layer_norm", _plain),
    _UP: ("fc1", _plain),
    _DOWN: ("fc2", _plain),
}
_NEOX: _Modules = {
    _NORM: ("input_layernorm", _plain),
    _QKV: ("attention.query_key_value", _interleaved),
    _OUT: ("attention.dense", _plain),
    _FFN_NORM: ("post_attention_layernorm", _plain),
    _UP: ("mlp.dense_h_to_4h", _plain),
    _DOWN: ("mlp.dense_4h_to_h", _plain),
}
_OPENELM: _Modules = {
    _NORM: ("attn_norm", _plain),
    _QKV: ("attn.qkv_proj", _stacked_heads),
    _OUT: ("attn.out_proj", _plain),
    ("attention.q_norm",): ("attn.q_norm", _plain),
    ("attention.k_norm",): ("attn.k_norm", _plain),
    _FFN_NORM: ("ffn_norm", _plain),
    (*_GATE, *_UP): ("ffn.proj_1", _stacked_gate),
    _UP: ("ffn.proj_1", _plain),
    _DOWN: ("ffn.proj_2", _plain),
}

_GPT = {"prefix": "transformer.", "embed": "wte", "positions": "wpe", "block": "h.{}.", "norm": "ln_f"}
_LIKE_LLAMA = _Names(modules=_LLAMA)
_LIKE_LATENT = {
    False: _Names(modules={**_LATENT, _Q: ("self_attn.q_proj", _latent_queries)}),
    True: _Names(modules={**_LATENT, _Q: ("self_attn.q_b_proj", _latent_queries)}),
}
"""By whether queries are compressed first."""
_NAMES: Mapping[str, _Names] = {
    "gpt2": _Names(**_GPT, modules=_GPT2),
    "gpt_neo": _Names(**_GPT, modules=_GPT_NEO),
    "opt": _Names(prefix="model.decoder.", positions="embed_positions", norm="final_layer_norm", modules=_OPT),
    "gpt_neox": _Names(prefix="gpt_neox.", embed="embed_in", norm="final_layer_norm", head="embed_out", modules=_NEOX),
    "phi": _Names(norm="final_layernorm", modules=_PHI),
    "phi3": _Names(modules=_PHI3),
    "openelm": _Names(prefix="transformer.", embed="token_embeddings", modules=_OPENELM),
}


def names_of(family: str, config: SLMConfig) -> _Names:
    """How a family calls the parts of a model."""
    if config.attention == "mla":
        return _LIKE_LATENT[config.q_rank > 0]
    return _NAMES.get(family, _LIKE_LLAMA)


def entries(family: str, config: SLMConfig, scales: Scales) -> Iterator[Entry]:
    """Each of a family's tensors once, in the order of the model; tied ones as the embedding.

    Args:
        family: a model_type that is read, whose architecture `config` is.
        config: the architecture, without sharing.
        scales: factors between its weights and ours.
    """
    names = names_of(family, config)
    parameters = {name for name, _ in SLM(config, device="meta").named_parameters()}
    once = _Part(config=config, scales=scales, shape=config.layer(0), layer=0)
    yield Entry(theirs=f"{names.prefix}{names.embed}.weight", ours=("embed.tokens.weight",), layout=_PLAIN)
    if config.positions == "learned":
        yield Entry(theirs=f"{names.prefix}{names.positions}.weight", ours=("embed.positions.weight",), layout=_PLAIN)
    for i, shape in enumerate(config.layers()):
        part = _Part(config=config, scales=scales, shape=shape, layer=i)
        index = {"attention": f"attentions.{i}", "ffn": f"ffns.{i}"}
        for modules, (theirs, make) in names.modules.items():
            for kind in ("weight", "bias"):
                ours = tuple(_parameter(index, module, kind) for module in modules)
                if all(name in parameters for name in ours):
                    yield Entry(theirs=f"{names.prefix}{names.block.format(i)}{theirs}.{kind}", ours=ours, layout=make(part))
                    parameters.difference_update(ours)
    for kind in ("weight", "bias"):
        if f"head.norm.{kind}" in parameters:
            layout = _final(once) if kind == "weight" else _scaled(scales.final)
            yield Entry(theirs=f"{names.prefix}{names.norm}.{kind}", ours=(f"head.norm.{kind}",), layout=layout)
        if f"head.{kind}" in parameters:
            yield Entry(theirs=f"{names.head}.{kind}", ours=(f"head.{kind}",), layout=_PLAIN)


def _parameter(index: Mapping[str, str], module: str, kind: str) -> str:
    part, _, rest = module.partition(".")
    if rest in ("k_up", "v_up"):  # parameters themselves
        return f"{index[part]}.{rest}" if kind == "weight" else ""
    return f"{index[part]}.{rest}.{kind}"


def _final(part: _Part) -> Layout:
    shift, scale = _norm(part), _scaled(part.scales.final)
    return Layout(lambda theirs: scale.split(shift.split(theirs)[0]), lambda ours: shift.join([scale.join(ours)]))
