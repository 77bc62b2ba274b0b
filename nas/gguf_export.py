"""A model as one GGUF file, which llama.cpp and everything built on it runs.

GGUF names an architecture, and llama.cpp's code for that name is the model; so a config is written only if it is,
value for value, one of those below. Weights leave with the values that were scored: int4 is Q4_0, and int8 with one scale a
channel is a special case of Q8_0, which has one for 32 inputs (in float16: the scales are rounded to it).
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nas.errors import UserError
from search_spaces.config import SLMConfig
from targets.files import whole

if TYPE_CHECKING:
    from torch import Tensor

    from nas.export import Chosen
    from nas.tokenizer import Tokenizer
    from search_spaces.precision import Precision

GGUF = "model.gguf"
"""The file in the folder of an export."""

_BLOCK = 32
"""Inputs of a channel that share a scale in Q8_0 and Q4_0."""
_FILE_TYPES = {"fp32": ("F32", 0), "fp16": ("F16", 1), "int8": ("Q8_0", 7), "int4": ("Q4_0", 2)}
"""Precision -> GGML's type of a matrix, and the number that GGUF gives to a file of mostly that type."""
_BLOCK_BYTES = {"int8": 2 + _BLOCK, "int4": 2 + _BLOCK // 2}
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
"""GGUF's kinds of tokens."""

_DECODER = {"block": "sequential", "series_activation": 1, "augmented_shortcuts": 0, "head_bias": False, "norm_weight": True}
_LLAMA = _DECODER | {
    "attention": ("mha", "gqa", "mqa"), "positions": "rotary", "norm": "rmsnorm", "ffn": "gated", "activation": "silu",
    "qkv_bias": False, "attention_bias": False, "ffn_bias": False, "qk_norm": False, "embedding_scale": 1.0,
}  # fmt: skip
_GPT2 = _DECODER | {
    "attention": ("mha",), "positions": "learned", "position_offset": 0, "norm": "layernorm", "norm_bias": True, "ffn": "standard",
    "activation": "gelu_tanh", "qkv_bias": True, "attention_bias": True, "ffn_bias": True, "qk_norm": False, "embedding_scale": 1.0,
}  # fmt: skip
_RULES: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"qkv_bias": True},
    "qwen3": _LLAMA | {"qk_norm": True},
    "gemma": _LLAMA | {"activation": "gelu_tanh", "embedding_scale": "sqrt(d_model)", "tie_embeddings": True},
    "gpt2": _GPT2,
}
"""What llama.cpp's code for an architecture computes, field by field; a tuple lists all that it takes."""

_NAMES = {
    "attention.norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.out": "attn_output", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "ffn.norm": "ffn_norm", "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
}  # fmt: skip


def gguf_architecture(config: SLMConfig) -> str:
    """llama.cpp's name for an architecture: llama, qwen2, qwen3, gemma or gpt2.

    Raises:
        UserError: if llama.cpp has no code for it; the message has the first field that is in the way.
    """
    differing = {name: [field for field in rules if not _fits(config, field, rules[field])] for name, rules in _RULES.items()}
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        field = differing[nearest][0]
        _refuse(config, field, f"llama.cpp's {nearest!r}, the nearest architecture, needs {_wanted(_RULES[nearest][field])}")
    for field in ("num_heads", "num_kv_heads", "ffn_dim"):
        if isinstance(getattr(config, field), tuple):
            _refuse(config, field, f"llama.cpp's {nearest!r} needs one value for all layers")
    if config.positions == "rotary" and config.rotary_dim != config.head_dim:
        _refuse(config, "rotary_dim", f"llama.cpp's {nearest!r} rotates whole heads, head_dim={config.head_dim}")
    if nearest == "gpt2" and config.head_dim * config.layer(0).num_heads != config.d_model:  # type: ignore[operator]
        _refuse(config, "head_dim", f"llama.cpp's 'gpt2' needs d_model / num_heads, {config.d_model / config.layer(0).num_heads:g}")
    return nearest


def write_gguf_folder(chosen: "Chosen", folder: Path) -> None:
    """model.gguf in the trial's precision, and a model card.

    Raises:
        UserError: as `write_gguf`.
    """
    from nas.evaluation import write_whole
    from nas.export import CARD, model_card

    config, precision = chosen.config, chosen.evaluation.weights
    write_gguf(folder / GGUF, config, dict(chosen.model.named_parameters()), chosen.tokenizer, precision)
    form = f"`{GGUF}` is of llama.cpp's architecture `{gguf_architecture(config)}`, with matrices in {_FILE_TYPES[precision][0]}."
    loading = f'```\nllama-cli -m {GGUF} -no-cnv -p "My fellow citizens"\n```'
    write_whole(folder / CARD, model_card(chosen.run, chosen.evaluation, chosen.tokenizer.vocab_size, form=form, loading=loading))


def write_gguf(
    path: Path, config: SLMConfig, tensors: "Mapping[str, Tensor]", tokenizer: "Tokenizer | None", precision: "Precision" = "fp16"
) -> Path:
    """Writes a model whole, one tensor in memory at a time.

    Args:
        path: the file, usually NAME.gguf.
        config: the architecture; layers that share weights are written apart, since llama.cpp shares none.
        tensors: each parameter, float32, under its name in `SLM`.
        tokenizer: None leaves the vocabulary out: such a file takes and gives ids only.
        precision: of every matrix, token embeddings included; norms, biases and learned positions stay float32.

    Returns:
        The path.

    Raises:
        UserError: if llama.cpp has no code for the architecture, a width does not fit the precision, or the package gguf
            is not installed.
    """
    architecture = gguf_architecture(config)
    _check_widths(config, precision)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("a GGUF file needs the package gguf, which is not installed; pip install 'edgewise[gguf]'")
    import gguf

    sources = list(_sources(config, architecture))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        try:
            for key, value in _facts(config, architecture, precision).items():
                if isinstance(value, float):
                    writer.add_float32(key, value)
                else:
                    writer.add_uint32(key, value)
            _add_tokens(writer, config, tokenizer)
            for source in sources:
                rows, columns = _shape(source, tensors)
                kind = precision if columns and source.matrix else "fp32"
                shape = (rows, columns // _BLOCK * _BLOCK_BYTES[kind]) if kind in _BLOCK_BYTES else (rows, columns) if columns else (rows,)
                dtype = np.dtype({"fp32": np.float32, "fp16": np.float16}.get(kind, np.uint8))
                writer.add_tensor_info(
                    source.name, shape, dtype, math.prod(shape) * dtype.itemsize, gguf.GGMLQuantizationType[_FILE_TYPES[kind][0]]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for source in sources:
                writer.write_tensor_data(_array(source, tensors, precision))
        finally:
            writer.close()
    return path


# --- what llama.cpp knows ---------------------------------------------------------------------


def _fits(config: SLMConfig, field: str, wanted: Any) -> bool:
    value = getattr(config, field)
    if wanted == "sqrt(d_model)":
        return math.isclose(value, math.sqrt(config.d_model), rel_tol=1e-6)
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _wanted(wanted: Any) -> str:
    return " or ".join(map(repr, wanted)) if isinstance(wanted, tuple) else str(wanted) if wanted == "sqrt(d_model)" else repr(wanted)


def _refuse(config: SLMConfig, field: str, rule: str) -> None:
    raise UserError(f"{field}={getattr(config, field)!r} cannot leave as GGUF: {rule}; use --format hf instead")


def _check_widths(config: SLMConfig, precision: str) -> None:
    if precision not in _BLOCK_BYTES:
        return
    heads = config.layer(0).num_heads
    widths = {"d_model": config.d_model, "num_heads * head_dim": heads * (config.head_dim or 0), "ffn_dim": config.layer(0).ffn_dim}
    for name, width in widths.items():
        if width % _BLOCK:
            kind = _FILE_TYPES[precision][0]
            raise UserError(f"{name}={width} is not a multiple of {_BLOCK}, the block of GGUF's {kind} ({precision}); choose fp16 or fp32")


def _facts(config: SLMConfig, architecture: str, precision: str) -> dict[str, int | float]:
    """The sizes that llama.cpp reads, under GGUF's keys; integers and floats are different types there."""
    shape = config.layer(0)
    assert config.head_dim is not None
    facts: dict[str, int | float] = {
        "context_length": config.context,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": shape.ffn_dim,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "vocab_size": config.vocab_size,
    }
    if config.norm == "rmsnorm":
        facts["attention.layer_norm_rms_epsilon"] = float(config.norm_eps)
    else:
        facts["attention.layer_norm_epsilon"] = float(config.norm_eps)
    if config.positions == "rotary":
        facts |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        facts |= {"rope.dimension_count": config.rotary_dim or 0, "rope.freq_base": float(config.rope_theta)}
    return {f"{architecture}.{key}": value for key, value in facts.items()} | {"general.file_type": _FILE_TYPES[precision][1]}


def _add_tokens(writer: Any, config: SLMConfig, tokenizer: "Tokenizer | None") -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    import json

    model = json.loads(tokenizer.to_json())["model"]
    by_id = {number: text for text, number in model["vocab"].items()}
    names = [by_id.get(i, f"<|unused{i}|>") for i in range(config.vocab_size)]
    kinds = [_CONTROL if i == tokenizer.end_of_text else _NORMAL if i in by_id else _UNUSED for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # how text is cut into words before merging
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)  # a document begins with it in training


# --- tensors ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A tensor of the file: GGUF's name, and ours, stacked if several.

    Attributes:
        matrix: whether it is stored in the precision asked for.
        heads: where rotary pairs neighbours instead of halves, the heads whose rows are reordered; else 0.
    """

    name: str
    parameters: tuple[str, ...]
    matrix: bool
    heads: int = 0


def _sources(config: SLMConfig, architecture: str) -> Iterator[_Source]:
    yield _Source(name="token_embd.weight", parameters=("embed.tokens.weight",), matrix=True)
    if config.positions == "learned":
        yield _Source(name="position_embd.weight", parameters=("embed.positions.weight",), matrix=False)
    for i, shape in enumerate(config.layers()):
        for name in _block_parameters(config):
            part, _, rest = name.partition(".")
            module, _, kind = rest.rpartition(".")
            index = shape.attention_index if part == "attention" else shape.ffn_index
            parameter = f"{part}s.{index}.{rest}"
            target = _NAMES[f"{part}.{module}"]
            if architecture == "gpt2" and module in ("q", "k", "v"):
                if module == "q":
                    stacked = tuple(f"{part}s.{index}.{m}.{kind}" for m in ("q", "k", "v"))
                    yield _Source(name=f"blk.{i}.attn_qkv.{kind}", parameters=stacked, matrix=kind == "weight")
                continue
            heads = {"q": shape.num_heads, "k": shape.num_kv_heads}.get(module, 0) if architecture == "llama" else 0
            is_matrix = kind == "weight" and not module.endswith("norm")
            yield _Source(name=f"blk.{i}.{target}.{kind}", parameters=(parameter,), matrix=is_matrix, heads=heads)
    for kind in ("weight", "bias") if config.norm_bias else ("weight",):
        yield _Source(name=f"output_norm.{kind}", parameters=(f"head.norm.{kind}",), matrix=False)
    if not config.tie_embeddings:
        yield _Source(name="output.weight", parameters=("head.weight",), matrix=True)


def _block_parameters(config: SLMConfig) -> list[str]:
    """Names of one layer's parameters, as in `search_spaces.model.Block`."""
    from search_spaces.model import SLM

    return [name for name, _ in SLM(config, device="meta").block(0).named_parameters()]


def _shape(source: _Source, tensors: "Mapping[str, Tensor]") -> tuple[int, int]:
    """Rows and columns; 0 columns for a vector."""
    shapes = [tuple(tensors[name].shape) for name in source.parameters]
    return sum(shape[0] for shape in shapes), shapes[0][1] if len(shapes[0]) == 2 else 0


def _array(source: _Source, tensors: "Mapping[str, Tensor]", precision: "Precision") -> npt.NDArray[Any]:
    """The bytes of a tensor as GGUF lays them out."""
    import torch

    tensor = torch.cat([tensors[name].detach().float().cpu() for name in source.parameters])
    if source.heads:
        tensor = _neighbours(tensor, source.heads)
    if not source.matrix or precision == "fp32":
        return tensor.contiguous().numpy()
    from search_spaces.quantisation import quantise

    values, scales = quantise(tensor.contiguous(), precision)
    if scales is None:
        return values.numpy()
    return _blocks(values.numpy(), scales.numpy(), precision)


def _neighbours(rows: "Tensor", heads: int) -> "Tensor":
    """Rows of each head reordered so that rotary pairs (2j, 2j + 1), as 'llama' does, where ours pairs (j, j + R/2)."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)


def _blocks(values: npt.NDArray[np.int8], scales: npt.NDArray[Any], precision: str) -> npt.NDArray[np.uint8]:
    """Blocks of 32 inputs: a float16 scale, then bytes (Q8_0), or half bytes with 8 added, input j beside input j + 16 (Q4_0)."""
    rows, columns = values.shape
    blocks = values.reshape(rows, columns // _BLOCK, _BLOCK)
    if precision == "int4":
        halves = (blocks + 8).astype(np.uint8)
        body = halves[..., : _BLOCK // 2] | halves[..., _BLOCK // 2 :] << 4
    else:
        body = blocks.view(np.uint8)
    head = np.ascontiguousarray(np.broadcast_to(scales.astype(np.float16), (rows, columns // _BLOCK)))[..., None].view(np.uint8)
    return np.concatenate((head, body), axis=-1).reshape(rows, -1)
