"""A trained model as a folder that transformers loads: as one of its families, or with a modelling file of its own."""

import importlib.resources
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.evaluation import write_whole
from nas.huggingface.families import FAMILIES, read_family
from nas.huggingface.imported import Imported
from search_spaces.config import ARCHITECTURE, MODEL_TYPE, Activation, InvalidConfig, SLMConfig

if TYPE_CHECKING:
    from torch import Tensor

    from nas.export import Chosen
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

_CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM", "phi3": "Phi3ForCausalLM", "olmo": "OlmoForCausalLM", "stablelm": "StableLmForCausalLM",
    "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "gpt_neo": "GPTNeoForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
    "phi": "PhiForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM", "minicpm3": "MiniCPM3ForCausalLM",
}  # fmt: skip
"""The families that a model leaves as, the most widely known first, and transformers' class of each."""
NATIVE: tuple[str, ...] = tuple(_CLASSES)

TOKENIZATION = "tokenization_edgewise.py"
_OWN_TOKENIZERS = ("qwen2",)
"""Families whose own tokenizer transformers 5 takes, whatever class a folder names, unless that is one with a file."""

_SOURCES = {
    "edgewise_config.py": ("search_spaces", "config.py"),
    "edgewise_operators.py": ("search_spaces", "operators.py"),
    "edgewise_model.py": ("search_spaces", "model.py"),
    "configuration_edgewise.py": ("nas.huggingface", "configuration_edgewise.py"),
    "modeling_edgewise.py": ("nas.huggingface", "modeling_edgewise.py"),
    TOKENIZATION: ("nas.huggingface", TOKENIZATION),
}
"""The files of the other form, and of tokenizers that need one: our own, side by side."""
_IMPORTS = {
    "from search_spaces.config import": "from .edgewise_config import",
    "from search_spaces.operators import": "from .edgewise_operators import",
    "from search_spaces.model import": "from .edgewise_model import",
    "from nas.huggingface.configuration_edgewise import": "from .configuration_edgewise import",
}
_AUTO_MAP = {
    "AutoConfig": "configuration_edgewise.EdgewiseConfig",
    "AutoModelForCausalLM": "modeling_edgewise.EdgewiseForCausalLM",
}


def native_form(config: SLMConfig) -> tuple[Imported, dict[str, Any]] | None:
    """The family of transformers that an architecture is, and its config.json there; None if it is of none.

    What a family's config would say is read back as any config.json is: the architecture is of that family if what
    comes out is the one that went in.
    """
    if config.sharing != "none":
        return None  # weights written apart are other parameters
    for family in NATIVE:
        values = {"model_type": family, "architectures": [_CLASSES[family]], **_WRITERS[family](config)}
        if family == "deepseek_v2" and ((config.head_dim or 0) % 2 or config.kv_rank % 2):
            continue  # transformers views the rotary dimensions behind them as complex numbers, which must lie on even places
        try:
            imported = read_family(values)
        except InvalidConfig:
            continue
        if imported.config == config and imported.exact_tokens == config.context and not imported.notes:
            return imported, values
    return None


def write_folder(chosen: "Chosen", folder: Path) -> None:
    """config.json, model.safetensors, the tokenizer's files and a model card, in the form that `native_form` finds.

    The weights leave in float32, as trained; the card says in which precision they were measured and scored.
    """
    from nas.export import CARD, model_card

    form, loading = write_model(chosen.model, chosen.tokenizer, chosen.tokenizer_path.read_bytes(), chosen.facts, folder)
    card = model_card(chosen.run, chosen.evaluation, chosen.tokenizer.vocab_size, form=form, loading=loading)
    write_whole(folder / CARD, card)


def write_model(model: "SLM", tokenizer: "Tokenizer", tokenizer_json: bytes, facts: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """The files of a model but for its card.

    Args:
        model: on the CPU; of one on the meta device, which has no weights yet, everything else is written.
        tokenizer, tokenizer_json: of the model, and its file.
        facts: JSON values for the header of the weights.
        folder: where to; there already.

    Returns:
        For the card: a sentence on the form the model is in, and how to load it, as Markdown.
    """
    from nas.export import CONFIG, LOADING, TOKENIZER, WEIGHTS
    from nas.huggingface.weights import laid_out

    native, end = native_form(model.config), tokenizer.end_of_text
    has_weights = not any(p.is_meta for p in model.parameters())
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    if native is not None:
        imported, values = native
        tensors = dict(laid_out(model, imported)) if has_weights else {}
        form = f"It is of the family `{imported.family}` of transformers, which loads it without other code."
    else:
        values = {"model_type": MODEL_TYPE, "architectures": ["EdgewiseForCausalLM"], "auto_map": _AUTO_MAP}
        values |= {ARCHITECTURE: model.config.to_dict()}
        tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()} if has_weights else {}
        form = "It is of no family of transformers: the Python files in this folder are the model, and trust_remote_code runs them."
    write_whole(folder / CONFIG, json.dumps({**values, "dtype": "float32", **ids}, indent=1) + "\n")
    if has_weights:
        # What tokenizer.json has no room for goes into the weights' header.
        header = {"config": model.config.key, **facts, "tokenizer": tokenizer.meta}
        write_whole(folder / WEIGHTS, _safetensors(tensors, header))
    write_whole(folder / TOKENIZER, tokenizer_json)
    named = native is not None and native[0].family in _OWN_TOKENIZERS
    write_whole(folder / "tokenizer_config.json", json.dumps(_tokenizer_config(model.config, tokenizer, named), indent=1) + "\n")
    write_whole(folder / "generation_config.json", json.dumps(ids, indent=1) + "\n")
    for name, text in source_files().items():
        if named if name == TOKENIZATION else native is None:
            write_whole(folder / name, text)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier export
    loading = f"```python\n{_NATIVE_LOADING if native is not None else _OWN_LOADING}```\n\nOr in edgewise:\n\n```python\n{LOADING}```"
    return form, loading


_NATIVE_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("my-model")
tokenizer = AutoTokenizer.from_pretrained("my-model")
prompt = tokenizer(tokenizer.bos_token + "My fellow citizens", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
"""
_OWN_LOADING = _NATIVE_LOADING.replace('from_pretrained("my-model")', 'from_pretrained("my-model", trust_remote_code=True)')


def source_files() -> dict[str, str]:
    """The Python files of the form with its own modelling file: ours, with imports among themselves."""
    texts = {}
    for name, (package, source) in _SOURCES.items():
        text = importlib.resources.files(package).joinpath(source).read_text(encoding="utf-8")
        for ours, beside in _IMPORTS.items():
            text = text.replace(ours, beside)
        texts[name] = text
    return texts


def _tokenizer_config(config: SLMConfig, tokenizer: "Tokenizer", named: bool) -> dict[str, Any]:
    end = tokenizer.text_of(tokenizer.end_of_text)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": None,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": config.context,
    }  # fmt: skip
    return values | ({"auto_map": {"AutoTokenizer": [None, "tokenization_edgewise.EdgewiseTokenizer"]}} if named else {})


def _safetensors(tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> bytes:
    """A safetensors file with facts in its header, byte for byte the same each time.

    transformers 4 wants "format" there as well, and safetensors writes several facts in an order of its own.
    """
    from safetensors.torch import save

    data = save(dict(tensors))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"edgewise": json.dumps(facts, allow_nan=False), "format": "pt"}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


# --- what each family's config.json would say -------------------------------------------------


def _act(activation: Activation) -> str:
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def _rotary(c: SLMConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "intermediate_size": c.ffn_dim, "hidden_act": _act(c.activation),
        "max_position_embeddings": c.context, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _rms(c: SLMConfig) -> dict[str, Any]:
    return _rotary(c) | {"rms_norm_eps": c.norm_eps}


def _share(c: SLMConfig) -> float:
    """The share of a head that rotates; transformers multiplies and cuts off, which half a dimension more survives."""
    assert c.head_dim is not None and c.rotary_dim is not None
    exact = c.rotary_dim / c.head_dim
    return exact if int(c.head_dim * exact) == c.rotary_dim else (c.rotary_dim + 0.5) / c.head_dim


def _partial(c: SLMConfig) -> dict[str, Any]:
    return {"partial_rotary_factor": _share(c)}


def _biased(c: SLMConfig) -> dict[str, Any]:
    return {"attention_bias": c.qkv_bias}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _neox(c: SLMConfig) -> dict[str, Any]:
    parallel = {"use_parallel_residual": c.block == "parallel"}
    rotary = {"rotary_pct": _share(c), "rotary_emb_base": c.rope_theta}
    return _without(_rotary(c), "num_key_value_heads", "rope_theta") | _biased(c) | parallel | rotary | {"layer_norm_eps": c.norm_eps}


def _gpt2(c: SLMConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "n_embd": c.d_model, "n_layer": c.num_layers, "n_head": c.num_heads, "n_positions": c.context,
        "n_inner": c.ffn_dim, "activation_function": _act(c.activation), "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _gpt_neo(c: SLMConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_layers": c.num_layers, "num_heads": c.num_heads,
        "max_position_embeddings": c.context, "intermediate_size": c.ffn_dim, "activation_function": _act(c.activation),
        "layer_norm_epsilon": c.norm_eps, "attention_types": [[["global"], c.num_layers]], "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _opt(c: SLMConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.context, "ffn_dim": c.ffn_dim, "activation_function": _act(c.activation),
        "word_embed_proj_dim": c.d_model, "enable_bias": c.qkv_bias, "layer_norm_elementwise_affine": c.norm_weight,
        "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _latent(c: SLMConfig) -> dict[str, Any]:
    return _without(_rms(c), "head_dim", "num_key_value_heads") | _biased(c) | {
        "num_key_value_heads": c.num_heads, "qk_nope_head_dim": c.head_dim, "qk_rope_head_dim": c.rotary_dim, "v_head_dim": c.v_head_dim,
        "q_lora_rank": c.q_rank or None, "kv_lora_rank": c.kv_rank or None, "mlp_bias": c.ffn_bias,
    }  # fmt: skip


_WRITERS: Mapping[str, Callable[[SLMConfig], dict[str, Any]]] = {
    "llama": lambda c: _rms(c) | _biased(c) | {"mlp_bias": c.ffn_bias},
    "qwen2": _rms,
    "qwen3": lambda c: _rms(c) | _biased(c),
    "mistral": lambda c: _rms(c) | {"sliding_window": None},
    "gemma": lambda c: _rms(c) | _biased(c),
    "phi3": lambda c: _rms(c) | _partial(c),
    "olmo": lambda c: _rotary(c) | _biased(c),
    "stablelm": lambda c: (
        _rotary(c)
        | _partial(c)
        | {"layer_norm_eps": c.norm_eps, "use_qkv_bias": c.qkv_bias, "use_parallel_residual": c.block == "parallel_shared_norm"}
    ),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _neox,
    "phi": lambda c: _rotary(c) | _partial(c) | {"layer_norm_eps": c.norm_eps},
    "deepseek_v2": lambda c: _latent(c) | {"first_k_dense_replace": c.num_layers},
    "minicpm3": lambda c: (
        _latent(c) | {"scale_emb": c.embedding_scale, "scale_depth": math.sqrt(c.num_layers), "dim_model_base": c.d_model}
    ),
}
assert set(_WRITERS) == set(NATIVE) <= set(FAMILIES)
