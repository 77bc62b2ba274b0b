"""Architectures and quantities in the words people read; the only place where milliseconds and megabytes exist."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from search_spaces.config import PerLayer, SLMConfig
from search_spaces.counting import params

if TYPE_CHECKING:
    from nas.evaluation import Evaluation

_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU-tanh", "silu": "SiLU"}
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_SHARING = {"sequence": "in sequence", "cycle": "cycled", "cycle_rev": "cycled and reversed"}


def describe_trial(evaluation: "Evaluation") -> str:
    """A trial's model in one line: `describe_config`, and the precision of its weights where people are told; "–" without a config."""
    if evaluation.config is None:
        return "–"
    return describe_config(evaluation.config) + (f", {evaluation.weights} weights" if evaluation.names_weights else "")


def describe_config(config: SLMConfig) -> str:
    """A model in one line, such as "6 layers × 128, GQA 4/2 heads × 32, gated SiLU ×2.7, RMSNorm, vocab 2048, tied"."""
    words = [f"{config.num_layers} {'layer' if config.num_layers == 1 else 'layers'} × {config.d_model}"]
    if config.sharing != "none":
        parts = "" if config.shared_parts == "both" else f" {config.shared_parts}"
        words.append(f"{config.num_unique_layers} unique{parts} {_SHARING[config.sharing]}")
    words.append(_attention(config))
    if config.positions == "learned":
        words.append("learned positions")
    elif config.attention != "mla" and config.rotary_dim != config.head_dim:
        assert config.rotary_dim is not None
        assert config.head_dim is not None
        words.append(f"rotary {config.rotary_dim / config.head_dim:.0%}".replace("%", " %"))
    words.append(f"{config.ffn} {_ACTIVATIONS[config.activation]} ×{_ratio(config.ffn_dim, config.d_model)}")
    words.append(_NORMS[config.norm])
    if config.qk_norm:
        words.append("QK-norm")
    if config.block != "sequential":
        words.append("parallel blocks" if config.block == "parallel" else "parallel blocks with one norm")
    if config.series_activation > 1:
        words.append(f"{config.series_activation}-term {config.series_mode} series")
    if config.augmented_shortcuts:
        words.append(f"{config.augmented_shortcuts} augmented {'shortcut' if config.augmented_shortcuts == 1 else 'shortcuts'}")
    words.append(f"vocab {config.vocab_size}")
    words.append("tied" if config.tie_embeddings else "untied")
    return ", ".join([*words, *_less_usual(config).values()])


def _less_usual(config: SLMConfig) -> dict[str, str]:
    """Words for what mostly is as it is by default, where it is not, by the name of the fact."""
    c = config
    plain = SLMConfig(vocab_size=c.vocab_size, d_model=c.d_model, num_layers=c.num_layers, num_heads=1)
    biased = " and ".join(part for part, has in _biases(c).items() if has)
    found = {
        "biases": f"bias on {biased}" if biased else "",
        "norm weight": "" if c.norm_weight else "norms without weights",
        "norm bias": "norms without bias" if c.norm == "layernorm" and c.norm_weight and not c.norm_bias else "",
        "norm epsilon": f"epsilon {c.norm_eps:g}" if c.norm_eps != plain.norm_eps else "",
        "embedding scale": f"embeddings × {_embedding_scale(c)}" if c.embedding_scale != plain.embedding_scale else "",
        "context": f"context {c.context}" if c.context != plain.context else "",
        "rotary base": f"rotary base {c.rope_theta:g}" if c.rope_theta != plain.rope_theta else "",
        "value width": f"values of {c.v_head_dim}" if c.v_head_dim not in (None, c.head_dim) else "",
        "position offset": f"positions from {c.position_offset}" if c.position_offset else "",
        "shortcut reduction": f"shortcuts reduced by {c.shortcut_reduction}" if c.shortcut_reduction != plain.shortcut_reduction else "",
    }
    return {name: words for name, words in found.items() if words}


def attention_words(config: SLMConfig) -> str:
    """The attention kind in words that can begin a sentence, such as "GQA with 2 key/value heads"."""
    if config.attention == "mla":
        return f"MLA with a latent of {config.kv_rank}"
    if config.attention == "mqa":
        return "MQA"
    heads = _range(config.num_kv_heads)
    which = "key/value " if config.attention == "gqa" else ""
    return f"{config.attention.upper()} with {heads} {which}{'head' if heads == '1' else 'heads'}"


def design_facts(config: SLMConfig) -> dict[str, str | int | float]:
    """What the model is, choice by choice, under names for people; one value each, per-layer sizes as their mean."""
    heads, kv = _mean(config.num_heads, config.num_layers), _mean(config.num_kv_heads, config.num_layers)
    assert config.head_dim is not None
    assert config.rotary_dim is not None
    return {
        "layers": config.num_layers,
        "width": config.d_model,
        "vocabulary": config.vocab_size,
        "attention": config.attention.upper(),
        "heads": heads,
        "kv heads": kv,
        "head width": config.head_dim,
        "FFN": config.ffn,
        "FFN ratio": round(_mean(config.ffn_dim, config.num_layers) / config.d_model, 2),
        "activation": _ACTIVATIONS[config.activation],
        "norm": _NORMS[config.norm],
        "QK-norm": "yes" if config.qk_norm else "no",
        "positions": config.positions,
        "block": config.block.replace("_", " "),
        "embeddings": "tied" if config.tie_embeddings else "untied",
        "sharing": "none" if config.sharing == "none" else f"{config.sharing.replace('_', '-')} ({config.shared_parts})",
        "series terms": config.series_activation,
        "shortcuts": config.augmented_shortcuts,
        "shortcut reduction": config.shortcut_reduction,
        "series": config.series_mode,
        "context": config.context,
        "rotary dims": config.rotary_dim,
        "rotary base": config.rope_theta,
        "position offset": config.position_offset,
        "unique layers": config.num_unique_layers or config.num_layers,
        "latent rank": config.kv_rank,
        "query rank": config.q_rank,
        "value width": config.v_head_dim or config.head_dim,
        **{f"{part} bias": "yes" if has else "no" for part, has in _biases(config).items()},
        "norm weight": "yes" if config.norm_weight else "no",
        "norm bias": "yes" if config.norm_bias else "no",
        "norm epsilon": config.norm_eps,
        "embedding scale": _embedding_scale(config),
        **_by_layer(config),
    }


def trial_facts(evaluation: "Evaluation") -> dict[str, str | int | float]:
    """`design_facts` of a trial with a config, and the precision of its weights."""
    assert evaluation.config is not None
    return {**design_facts(evaluation.config), "weights": evaluation.weights}


def _biases(config: SLMConfig) -> dict[str, bool]:
    return {"QKV": config.qkv_bias, "attention": config.attention_bias, "FFN": config.ffn_bias, "head": config.head_bias}


def _embedding_scale(config: SLMConfig) -> str:
    return "√width" if config.embedding_scale == math.sqrt(config.d_model) else f"{config.embedding_scale:g}"


def _by_layer(config: SLMConfig) -> dict[str, str]:
    """How sizes go from the first layer to the last: "same", or all of them."""
    sizes = {"heads by layer": config.num_heads, "kv heads by layer": config.num_kv_heads, "FFN by layer": config.ffn_dim}
    return {name: " ".join(map(str, size)) if isinstance(size, tuple) else "same" for name, size in sizes.items()}


def _attention(config: SLMConfig) -> str:
    heads, kv = _range(config.num_heads), _range(config.num_kv_heads)
    kind = config.attention.upper()
    if config.attention == "mla":
        query = f", queries {config.q_rank}" if config.q_rank else ""
        return f"MLA {heads} heads × {config.head_dim} on latent {config.kv_rank}+{config.rotary_dim}{query}"
    count = heads if config.attention == "mha" else f"{heads}/{kv}"
    return f"{kind} {count} {'head' if count == '1' else 'heads'} × {config.head_dim}"


def _range(value: PerLayer | None) -> str:
    assert value is not None
    return f"{min(value)}–{max(value)}" if isinstance(value, tuple) else str(value)


def _ratio(value: PerLayer | None, width: int) -> str:
    assert value is not None
    if isinstance(value, tuple):
        low, high = f"{min(value) / width:.1f}", f"{max(value) / width:.1f}"
        return low if low == high else f"{low}–{high}"
    return f"{value / width:.1f}"


def _mean(value: PerLayer | None, layers: int) -> float | int:
    assert value is not None
    if not isinstance(value, tuple):
        return value
    mean = sum(value) / layers
    return int(mean) if mean == int(mean) else round(mean, 2)


# --- what was searched by -------------------------------------------------------------------


def objective_words(evaluations: "Iterable[Evaluation]") -> str:
    """The loss that these trials are compared by: "bits per byte", "bits per byte of notes.txt" or "loss on pairs.jsonl"."""
    task = next((e.task for e in evaluations if e.task is not None), None)
    if task is None:
        return "bits per byte"
    return f"bits per byte of {task.get('name')}" if task.get("kind") == "text" else f"loss on {task.get('name')}"


def is_text(evaluations: "Iterable[Evaluation]") -> bool:
    """Whether that loss is bits per byte of text: its words are then a plural."""
    task = next((e.task for e in evaluations if e.task is not None), None)
    return task is None or task.get("kind") == "text"


def best_words(evaluations: "Sequence[Evaluation]") -> str:
    """The least of that loss, as in "best bits per byte"."""
    return f"{'best' if is_text(evaluations) else 'smallest'} {objective_words(evaluations)}"


def format_loss(evaluation: "Evaluation") -> str:
    """The loss that a trial is compared by, with its standard error, and the accuracy on tasks: "0.612 ± 0.020 (71 %)"."""
    accuracy = (evaluation.task or {}).get("accuracy")
    share = "" if accuracy is None else f" ({100 * accuracy:.0f} %)"
    return format_bpb(evaluation.loss, evaluation.loss_stderr) + share


def twin_words(evaluation: "Evaluation") -> str:
    """Whose score it is, where that is not the model's own: "twin of 1.90 M"; else nothing."""
    twin = evaluation.twin
    return "" if twin is None else f"twin of {format_count(params(twin))}"


def stopped_words(evaluation: "Evaluation") -> str:
    """Where a trial was stopped, "stopped at 64.0 kB"; nothing for any other."""
    rung = evaluation.last_rung
    return "" if rung is None else f"stopped at {format_bytes(rung.get('train_bytes'))}"


# --- quantities ---------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent: 0.0123, 4.50, 812, 1230."""
    if value == 0:
        return "0"
    # Through the exponent form, so that a value rounded up to the next power of ten loses a decimal.
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - int(exponent))}f}"


def format_s(seconds: float | None) -> str:
    """Seconds in the unit that reads best, three digits: 12.3 µs, 4.56 ms, 1.20 s, 3.4 min; "–" for None."""
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * factor >= 0.9995 or seconds == 0:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds * 1e6)} µs"


def format_ms(seconds: float | None) -> str:
    """Seconds as a bare number of milliseconds, three digits; "–" for None."""
    return "–" if seconds is None else significant(seconds * 1e3)


def format_rate(per_s: float | None, digits: int = 3) -> str:
    """A rate to so many digits, thousands apart: 17,200 or 4.56; "–" for None."""
    if per_s is None:
        return "–"
    text = significant(per_s, digits)
    return text if "." in text else f"{int(text):,}"


def format_count(count: float | None) -> str:
    """A count with a decimal prefix, three digits: 812, 812 k, 1.26 M, 2.80 G; "–" for None."""
    return "–" if count is None else _prefixed(count).rstrip()


def format_bytes(size: float | None) -> str:
    """A size with a decimal prefix, three digits: 512 B, 5.04 MB; "–" for None."""
    if size is None:
        return "–"
    text = _prefixed(size)
    return f"{text}B" if text[-1].isalpha() else f"{text.rstrip()} B"


def format_bpb(bpb: float | None, stderr: float | None = None) -> str:
    """Bits per byte to three decimals, with its standard error if known: 2.413 ± 0.012; "–" for None."""
    if bpb is None:
        return "–"
    return f"{bpb:.3f}" if stderr is None else f"{bpb:.3f} ± {stderr:.3f}"


def _prefixed(value: float) -> str:
    if abs(value) < 999.5:
        return f"{int(value)} " if value == int(value) else f"{significant(value)} "
    for prefix, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if abs(value) < 999.5 * factor or prefix == "T":
            return f"{significant(value / factor)} {prefix}"
    raise AssertionError("the last prefix takes any value")


def printable(text: str) -> str:
    """A stranger's text on one line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text)


# --- grammar ------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """A count of things: "1 trial", "2 trials"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def be(count: int) -> str:
    """The verb for so many."""
    return "is" if count == 1 else "are"


def listed(words: Sequence[str]) -> str:
    """Words in a row: "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def trials_words(trials: Sequence[int]) -> str:
    """Trials by number: "trial 3", "trials 3 and 7"."""
    return f"{'trial' if len(trials) == 1 else 'trials'} {listed([str(trial) for trial in trials])}"
