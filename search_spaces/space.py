"""`Space`: a search space written as data, read from TOML, and asked of an Optuna trial.

A space is static: `suggest` asks for the same parameters, with the same distributions, in the same order,
whatever the answers. Optuna's samplers model such spaces; they fall back to random where parameters come and go.
So a choice that only matters sometimes is asked always, and a combination that cannot be built is repaired by
the rules in `REPAIRS`. No `InvalidConfig` ever comes out of a space that loads.

```toml
name = "mine"
about = "One line for people."
params = [100_000, 2_500_000]              # optional: parameters a candidate may have

[parameters]
vocab_size = [1024, 4096]                  # a list: one of these
d_model = {low = 64, high = 256, step = 32}
num_layers = {low = 2, high = 8}           # or {low, high, log = true}
head_dim = 32                              # one value: fixed, never asked
```

Parameters left out keep the default of `PARAMETERS`. This module imports neither torch nor Optuna.
"""

import difflib
import hashlib
import json
import math
import random
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from search_spaces.config import (
    Activation,
    AttentionKind,
    BlockForm,
    FFNKind,
    NormKind,
    Positions,
    SeriesMode,
    SharedParts,
    Sharing,
    SLMConfig,
    attention_kind,
    shared_index,
)
from search_spaces.layerwise import LayerwiseSizes, layerwise_scaling

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Value = bool | int | float | str
"""What a parameter can be: a JSON scalar, so that Optuna can store it."""

REPAIRS = (
    "heads: attention_width * d_model / head_dim, rounded as OpenELM does, at least 1; ratios count to two decimals",
    "gqa: an even number of heads; kv_group is lowered to the largest divisor below the heads; 2 heads have none, and are mha",
    "mqa: one key/value head; mha and mla: as many as query heads",
    "mla: positions are rotary, qk_norm is off, rotary dims are extra ones: rotary_fraction * head_dim / 2; ranks are multiples of 8",
    "rotary dims: rotary_fraction * head_dim, rounded to an even number, at least 2; none with learned positions",
    "ffn_dim: the ratio of the chosen ffn kind * d_model, rounded to a multiple of ffn_multiple",
    "layerwise: a span multiplies attention_width (alpha) or the ffn ratio (beta), first to last layer (unique layers where shared)",
    "sharing: unique_fraction * num_layers unique layers, at least 1; all layers unique means no sharing",
    "sharing: a cycle_rev has at most half the layers unique (of one layer: no sharing); a sequence only as many as it uses",
    "norm_bias is off with rmsnorm; shortcut_reduction is at most d_model",
)
"""How a combination that cannot be built becomes one that can, in words for `edgewise spaces show`."""


class InvalidSpace(ValueError):
    """A search space that cannot be loaded or contradicts itself; the message is one line."""


class SearchSpace(Protocol):
    """What a search draws architectures from.

    An implementation must be static: the same parameters and distributions in the same order for every trial.
    """

    @property
    def name(self) -> str:
        """A short name, for reports."""

    def suggest(self, trial: "BaseTrial", *, vocab_sizes: Mapping[int, int] | None = None) -> SLMConfig:
        """An architecture from this trial's parameters; called once per trial, before anything is compiled or trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What a space may say about one design choice."""

    name: str
    kind: Literal["int", "float", "bool", "word", "span"]
    meaning: str
    default: Value | None
    """None: every space must give it, or only one in which it matters, if `needs` says so."""
    least: float = 1
    most: float = 65536
    words: tuple[str, ...] = ()
    needs: tuple[str, tuple[Value, ...] | range] | None = None
    """(other parameter, its values with which this one matters)."""


def _int(name: str, meaning: str, default: int | None, least: int = 1, most: int = 65536, needs: Any = None) -> Parameter:
    return Parameter(name=name, kind="int", meaning=meaning, default=default, least=least, most=most, needs=needs)


def _float(name: str, meaning: str, default: float | None, least: float, most: float, needs: Any = None) -> Parameter:
    return Parameter(name=name, kind="float", meaning=meaning, default=default, least=least, most=most, needs=needs)


def _bool(name: str, meaning: str, default: bool, needs: Any = None) -> Parameter:
    return Parameter(name=name, kind="bool", meaning=meaning, default=default, needs=needs)


def _word(name: str, meaning: str, default: str, words: tuple[str, ...], needs: Any = None) -> Parameter:
    return Parameter(name=name, kind="word", meaning=meaning, default=default, words=words, needs=needs)


_MLA = ("attention", ("mla",))
_SHARED = ("sharing", ("sequence", "cycle", "cycle_rev"))

PARAMETERS = (
    _int("vocab_size", "tokens asked of the tokenizer; a list or one value", None, 258, 2**20),
    _int("d_model", "model width", None, 8),
    _int("num_layers", "effective layers", None, 1, 1024),
    _int("context", "most positions", 1024, 8, 2**20),
    _word("attention", "attention kind", "mha", get_args(AttentionKind)),
    _int("head_dim", "width of a head", None, 2, 1024),
    _float("attention_width", "width of all query heads / d_model", 1.0, 0.01, 8.0),
    _int("kv_group", "query heads per key/value head, gqa", None, 2, 1024, ("attention", ("gqa",))),
    _float("mla_kv_ratio", "kv_rank / d_model, mla", None, 0.01, 4.0, _MLA),
    _float("mla_q_ratio", "q_rank / d_model, mla; 0: queries are not compressed", 0.0, 0.0, 4.0, _MLA),
    _float("mla_value_ratio", "v_head_dim / head_dim, mla", 1.0, 0.01, 8.0, _MLA),
    _bool("qk_norm", "RMSNorm on query and key heads", False, ("attention", ("mha", "gqa", "mqa"))),
    _bool("qkv_bias", "bias on query, key and value projections", False),
    _bool("attention_bias", "bias on the attention output projection", False),
    _word("positions", "how positions enter", "rotary", get_args(Positions), ("attention", ("mha", "gqa", "mqa"))),
    _float("rotary_fraction", "part of a head that rotates", 1.0, 0.01, 1.0),
    _float("rope_theta", "rotary base", 10000.0, 1.0, 1e9),
    _word("ffn", "FFN kind", "gated", get_args(FFNKind)),
    _float("ffn_ratio", "inner width / d_model of a gated FFN", 2.67, 0.01, 64.0, ("ffn", ("gated",))),
    _float("standard_ffn_ratio", "inner width / d_model of a standard FFN", 4.0, 0.01, 64.0, ("ffn", ("standard",))),
    _int("ffn_multiple", "the inner FFN width is a multiple of this", 8, 1, 4096),
    _bool("ffn_bias", "biases in the FFN", False),
    _word("activation", "activation function", "silu", get_args(Activation)),
    _word("norm", "norm kind", "rmsnorm", get_args(NormKind)),
    _bool("norm_bias", "bias of a LayerNorm", True, ("norm", ("layernorm",))),
    _float("norm_eps", "epsilon of the norms", 1e-5, 1e-12, 1e-1),
    _word("block", "how attention and FFN join", "sequential", get_args(BlockForm)),
    _bool("tie_embeddings", "output head is the token embedding", True),
    _bool("head_bias", "bias on the output head", False),
    _word("embedding_scale", "factor on embeddings: 1 or sqrt(d_model)", "none", ("none", "sqrt_d")),
    Parameter(name="layerwise_alpha", kind="span", meaning="heads, first..last layer, times attention_width", default="none"),
    Parameter(name="layerwise_beta", kind="span", meaning="FFN width, first..last layer, times the ffn ratio", default="none"),
    _word("sharing", "how layers share weights", "none", get_args(Sharing)),
    _word("shared_parts", "what is shared", "both", get_args(SharedParts), _SHARED),
    _float("unique_fraction", "unique layers / num_layers, under sharing", None, 0.01, 1.0, _SHARED),
    _int("series_activation", "terms of the series activation; 1: plain", 1, 1, 64),
    _word("series_mode", "scales per term or per channel", "scalar", get_args(SeriesMode), ("series_activation", range(2, 65))),
    _int("augmented_shortcuts", "bottleneck shortcuts around attention", 0, 0, 64),
    _int("shortcut_reduction", "bottleneck reduction of the shortcuts", 32, 1, 65536, ("augmented_shortcuts", range(1, 65))),
)
"""Every design choice a space can make, in the order they are asked."""

_BY_NAME = {p.name: p for p in PARAMETERS}
_UNUSED: Mapping[str, Value] = {"kv_group": 2, "mla_kv_ratio": 0.5, "unique_fraction": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """One of some values; a single one is a constant, which is never asked."""

    name: str
    values: tuple[Value, ...]

    @property
    def size(self) -> int:
        """How many values there are."""
        return len(self.values)

    def ask(self, trial: "BaseTrial") -> Value:
        """The trial's value."""
        if len(self.values) == 1:
            return self.values[0]
        value = trial.suggest_categorical(self.name, self.values)
        assert value is not None
        return value

    def draw(self, rng: random.Random) -> Value:
        """A value, uniformly at random."""
        return rng.choice(self.values)

    def may_be(self, wanted: Iterable[Value]) -> bool:
        """Whether some value is among `wanted`."""
        return any(v in wanted for v in self.values)

    def to_plain(self) -> Any:
        """As the TOML has it: the value, or the list of them."""
        return self.values[0] if len(self.values) == 1 else list(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; ints if both are."""

    name: str
    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @property
    def _is_int(self) -> bool:
        return isinstance(self.low, int)

    @property
    def size(self) -> int | None:
        """How many values there are; None for a continuous range."""
        step = self.step or (1 if self._is_int else None)
        return None if step is None else round((self.high - self.low) / step) + 1

    def ask(self, trial: "BaseTrial") -> Value:
        """The trial's value."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def draw(self, rng: random.Random) -> Value:
        """A value, uniformly at random (uniformly in its logarithm if `log`)."""
        if self.log:
            pad = 0.5 if self._is_int else 0.0
            drawn = math.exp(rng.uniform(math.log(self.low - pad), math.log(self.high + pad)))
            return min(max(round(drawn) if self._is_int else drawn, self.low), self.high)
        if self.size is None:
            return rng.uniform(self.low, self.high)
        return self.low + rng.randrange(self.size) * (self.step or 1)

    def may_be(self, wanted: Iterable[Value]) -> bool:
        """Whether an end of the range is among `wanted`."""
        return any(v in wanted for v in (self.low, self.high))

    def to_plain(self) -> Any:
        """As the TOML has it: a table of low, high and, where set, step or log."""
        table: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            table["step"] = self.step
        if self.log:
            table["log"] = True
        return table


Axis = Choices | Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A static search space: one axis for each of `PARAMETERS`, in that order.

    Made by `load_space` or `Space.from_dict`, which refuse what contradicts itself.
    """

    name: str
    about: str
    params_range: tuple[int, int] | None
    """Least and most parameters a candidate may have: a constraint of the search; None: any."""
    axes: tuple[Axis, ...]

    # --- asking ---------------------------------------------------------------------------

    def suggest(self, trial: "BaseTrial", *, vocab_sizes: Mapping[int, int] | None = None) -> SLMConfig:
        """The architecture of a trial; asks for each of `asked`, always, in order.

        Args:
            trial: an Optuna trial (also a FixedTrial).
            vocab_sizes: the size each requested vocabulary came out at; None: as requested.

        Raises:
            KeyError: if `vocab_sizes` lacks the requested vocabulary.
        """
        return _build({axis.name: axis.ask(trial) for axis in self.axes}, vocab_sizes)

    def config(self, params: Mapping[str, Any], *, vocab_sizes: Mapping[int, int] | None = None) -> SLMConfig:
        """The architecture that `suggest` made of `trial.params`.

        Raises:
            InvalidSpace: if a parameter is missing.
            KeyError: if `vocab_sizes` lacks the requested vocabulary.
        """
        return _build({axis.name: self._value(axis, params) for axis in self.axes}, vocab_sizes)

    def draw(self, rng: random.Random) -> dict[str, Value]:
        """Parameters at random, as `trial.params` would have them: the same for the same `rng` state."""
        return {axis.name: axis.draw(rng) for axis in self.asked}

    def requested_vocab(self, params: Mapping[str, object]) -> int:
        """The vocabulary size these parameters ask of the tokenizer (what comes out may be smaller).

        Raises:
            InvalidSpace: if the space asks for it and `params` lacks it.
        """
        return int(self._value(self.axes[0], params))

    def _value(self, axis: Axis, params: Mapping[str, Any]) -> Any:
        if axis.size == 1:
            return axis.to_plain()
        _require(axis.name in params, f"space {self.name!r}: the parameters lack {axis.name}; were they made with another space?")
        return params[axis.name]

    # --- what it is -----------------------------------------------------------------------

    @property
    def asked(self) -> tuple[Axis, ...]:
        """The axes a trial is asked for: those with more than one value."""
        return tuple(axis for axis in self.axes if axis.size != 1)

    @property
    def vocab_choices(self) -> tuple[int, ...]:
        """Every vocabulary size that can be requested, in the order written."""
        axis = self.axes[0]
        assert isinstance(axis, Choices)
        return tuple(int(v) for v in axis.values)

    @property
    def size(self) -> int | None:
        """Distinct combinations of parameters (not of architectures: repairs make some equal); None if continuous."""
        sizes = [axis.size for axis in self.axes]
        return None if None in sizes else math.prod(s for s in sizes if s is not None)

    @property
    def sha256(self) -> str:
        """A content hash of what is searched, whatever the name and the description."""
        plain = self.to_dict()
        text = json.dumps({"params": plain.get("params"), "parameters": plain["parameters"]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """The first 16 digits of `sha256`."""
        return self.sha256[:16]

    # --- files ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads; every parameter is written, so later defaults change nothing."""
        head: dict[str, Any] = {"name": self.name, "about": self.about}
        if self.params_range is not None:
            head["params"] = list(self.params_range)
        return {**head, "parameters": {axis.name: axis.to_plain() for axis in self.axes}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, name: str = "unnamed") -> "Space":
        """The inverse of `to_dict`, and what a TOML file holds.

        Args:
            values: `parameters`, and optionally `name`, `about` and `params`.
            name: the name if `values` has none.

        Raises:
            InvalidSpace: on unknown keys or words, empty choices, low above high, wrong types and contradictions.
        """
        given_name = values.get("name", name)
        _require(isinstance(given_name, str) and given_name != "", f"name={given_name!r} is not a name; give a short text")
        where = f"space {given_name!r}"
        _refuse_unknown(where, values, ("name", "about", "params", "parameters"))
        about = values.get("about", "")
        _require(isinstance(about, str), f"{where}: about={about!r} is not a text; give one line")
        table = values.get("parameters")
        _require(
            isinstance(table, Mapping), f"{where}: [parameters] is missing; give at least vocab_size, d_model, num_layers and head_dim"
        )
        assert isinstance(table, Mapping)
        _refuse_unknown(where, table, _BY_NAME)
        axes: dict[str, Axis] = {}
        for p in PARAMETERS:
            if p.name in table:
                axes[p.name] = _axis(where, p, table[p.name])
                continue
            default = p.default if p.default is not None else _UNUSED.get(p.name)
            _require(default is not None, f"{where}: {p.name} is missing ({p.meaning}); give a value, a list or a range")
            assert default is not None
            axes[p.name] = Choices(name=p.name, values=(default,))
        _check_together(where, axes, table)
        return cls(name=given_name, about=about, params_range=_params_range(where, values.get("params")), axes=tuple(axes.values()))

    def to_toml(self) -> str:
        """TOML text that `load_space` reads, each parameter with its meaning: a file to start one's own from."""
        lines = [f"name = {_toml(self.name)}", f"about = {_toml(self.about)}"]
        if self.params_range is not None:
            lines.append(f"params = {_toml(list(self.params_range))}")
        lines += ["", "[parameters]"]
        lines += [f"{axis.name} = {_toml(axis.to_plain())}  # {_BY_NAME[axis.name].meaning}" for axis in self.axes]
        return "\n".join(lines) + "\n"


def space_names() -> tuple[str, ...]:
    """The shipped spaces, smallest models first."""
    return ("tiny", "wearable", "phone", "laptop")


def load_space(name_or_path: str | Path) -> Space:
    """A shipped space by name, or one's own from a TOML file.

    Raises:
        InvalidSpace: if there is no such space, the file is not TOML, or it contradicts itself.
    """
    text_name = str(name_or_path)
    shipped = text_name in space_names()
    path = Path(__file__).parent / "spaces" / f"{text_name}.toml" if shipped else Path(name_or_path)
    if not shipped and not path.exists() and path.suffix != ".toml" and len(path.parts) == 1:
        raise InvalidSpace(
            f"space {text_name!r} is not known{_hint(text_name, space_names(), f'choose {_listed(space_names())}, or give a TOML file')}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSpace(f"{path} cannot be read ({error.strerror}); give a TOML file or one of {', '.join(space_names())}") from error
    except ValueError as error:
        raise InvalidSpace(
            f"{path} is not TOML ({str(error).splitlines()[0]}); correct it, or start from `edgewise spaces show tiny`"
        ) from error
    return Space.from_dict(values, name=path.stem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One parameter of a space, in words."""

    name: str
    kind: Literal["fixed", "choice", "range"]
    values: str
    meaning: str


def describe(space: Space) -> tuple[Row, ...]:
    """What the space says about each parameter: first those it asks for, then those it fixes."""
    rows = []
    for axis in sorted(space.axes, key=lambda axis: axis.size == 1):
        if isinstance(axis, Choices):
            kind: Literal["fixed", "choice", "range"] = "fixed" if axis.size == 1 else "choice"
            values = ", ".join(_text(v) for v in axis.values)
        else:
            kind = "range"
            note = ", log" if axis.log else f", step {_text(axis.step)}" if axis.step else ""
            values = f"{_text(axis.low)} to {_text(axis.high)}{note}"
        rows.append(Row(name=axis.name, kind=kind, values=values, meaning=_BY_NAME[axis.name].meaning))
    return tuple(rows)


# --- from parameters to an architecture -------------------------------------------------------


def _build(v: Mapping[str, Any], vocab_sizes: Mapping[int, int] | None) -> SLMConfig:
    """The architecture of one value for each of `PARAMETERS`, repaired as `REPAIRS` says."""
    width, layers, head_dim = v["d_model"], v["num_layers"], v["head_dim"]
    mla = v["attention"] == "mla"
    sharing, unique = _shared_layers(v["sharing"], layers, v["unique_fraction"])
    sizes = _layer_sizes(v, sharing, unique)
    rotary_dim = None
    if mla or v["positions"] == "rotary":
        # Half of head_dim for MLA: DeepSeek-V2 has 64 extra rotary dims beside 128 others, MiniCPM3 32 beside 64.
        rotary_dim = max(2, 2 * round(v["rotary_fraction"] * head_dim / (4 if mla else 2)))
        rotary_dim = rotary_dim if mla else min(rotary_dim, head_dim // 2 * 2)
    return SLMConfig(
        vocab_size=v["vocab_size"] if vocab_sizes is None else vocab_sizes[v["vocab_size"]],
        d_model=width,
        num_layers=layers,
        context=v["context"],
        attention="mla" if mla else attention_kind(sizes.num_heads, sizes.num_kv_heads),
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=head_dim,
        v_head_dim=max(1, round(v["mla_value_ratio"] * head_dim)) if mla else None,
        q_rank=_rank(v["mla_q_ratio"] * width) if mla and v["mla_q_ratio"] > 0 else 0,
        kv_rank=_rank(v["mla_kv_ratio"] * width) if mla else 0,
        qk_norm=v["qk_norm"] and not mla,
        qkv_bias=v["qkv_bias"],
        attention_bias=v["attention_bias"],
        positions="rotary" if mla else v["positions"],
        rotary_dim=rotary_dim,
        rope_theta=v["rope_theta"],
        ffn=v["ffn"],
        ffn_dim=sizes.ffn_dim,
        ffn_bias=v["ffn_bias"],
        activation=v["activation"],
        norm=v["norm"],
        norm_bias=v["norm_bias"] and v["norm"] == "layernorm",
        norm_eps=v["norm_eps"],
        block=v["block"],
        tie_embeddings=v["tie_embeddings"],
        head_bias=v["head_bias"],
        embedding_scale=math.sqrt(width) if v["embedding_scale"] == "sqrt_d" else 1.0,
        sharing=sharing,
        shared_parts=v["shared_parts"] if sharing != "none" else "both",
        num_unique_layers=unique if sharing != "none" else None,
        series_activation=v["series_activation"],
        series_mode=v["series_mode"],
        augmented_shortcuts=v["augmented_shortcuts"],
        shortcut_reduction=min(v["shortcut_reduction"], width),
    )


def _rank(value: float) -> int:
    return max(8, int(value + 4) // 8 * 8)


def _shared_layers(sharing: Sharing, layers: int, fraction: float) -> tuple[Sharing, int]:
    """The sharing and its unique layers, such that every unique layer is used and some layers share."""
    unique = max(1, round(fraction * layers))
    if sharing == "cycle_rev":
        unique = min(unique, layers // 2)
    elif sharing == "sequence":
        unique = 1 + shared_index(layers - 1, layers, unique, sharing)
    if sharing == "none" or not 1 <= unique < layers:
        return "none", layers
    return sharing, unique


def _layer_sizes(v: Mapping[str, Any], sharing: Sharing, unique: int) -> LayerwiseSizes:
    """Query heads, key/value heads and FFN width of each effective layer."""
    layers, width = v["num_layers"], v["attention_width"]
    ratio = v["ffn_ratio"] if v["ffn"] == "gated" else v["standard_ffn_ratio"]
    given = {"d_model": v["d_model"], "head_dim": v["head_dim"], "ffn_multiple": v["ffn_multiple"]}
    group = 1
    if v["attention"] == "gqa":
        full = layerwise_scaling(**given, num_layers=1, alpha=(width, width), kv_group=2).num_heads[0]
        # Below the heads themselves, for that would be mqa, which is asked for by its own name.
        group = max((n for n in range(1, full) if full % n == 0 and n <= v["kv_group"]), default=1)
    alpha, beta = _times(v["layerwise_alpha"], width), _times(v["layerwise_beta"], ratio)
    of_each = layerwise_scaling(**given, num_layers=layers, alpha=alpha, beta=beta, kv_group=group)
    of_unique = layerwise_scaling(**given, num_layers=unique, alpha=alpha, beta=beta, kv_group=group)

    def part_of(part: SharedParts) -> tuple[LayerwiseSizes, list[int]]:
        if sharing == "none" or v["shared_parts"] not in ("both", part):
            return of_each, list(range(layers))
        return of_unique, [shared_index(i, layers, unique, sharing) for i in range(layers)]

    (attention, a), (ffn, f) = part_of("attention"), part_of("ffn")
    return LayerwiseSizes(
        num_heads=tuple(attention.num_heads[i] for i in a),
        num_kv_heads=(1,) * layers if v["attention"] == "mqa" else tuple(attention.num_kv_heads[i] for i in a),
        ffn_dim=tuple(ffn.ffn_dim[i] for i in f),
    )


def _times(span: str, factor: float) -> tuple[float, float]:
    """The first and last multiple a span names, times a factor; "none" is 1..1."""
    first, last = (1.0, 1.0) if span == "none" else map(float, span.split(".."))
    return first * factor, last * factor


# --- from a table to axes ---------------------------------------------------------------------


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidSpace(message)


def _hint(word: object, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; {otherwise}"


def _refuse_unknown(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            all_known = list(known)
            otherwise = (
                f"remove it, or use {_listed(all_known)}" if len(all_known) < 10 else "remove it, or see `edgewise spaces show tiny`"
            )
            raise InvalidSpace(f"{where}: {key!r} is not a key{_hint(key, known, otherwise)}")


def _axis(where: str, p: Parameter, entry: object) -> Axis:
    """The axis that a TOML value describes: a list, a table of low and high, or one value."""
    if isinstance(entry, Mapping):
        return _range(where, p, entry)
    given = entry if isinstance(entry, list) else [entry]
    _require(len(given) > 0, f"{where}: {p.name}=[] has no choices; list one or more")
    values = tuple(_value(where, p, v) for v in given)
    for i, value in enumerate(values):
        _require(value not in values[:i], f"{where}: {p.name} lists {_text(value)} twice; list it once")
    return Choices(name=p.name, values=values)


def _range(where: str, p: Parameter, entry: Mapping[str, object]) -> Axis:
    name = f"{where}: {p.name}"
    _require(p.kind in ("int", "float"), f"{name} is not a number and cannot be a range; give a list of choices")
    _require(p.name != "vocab_size", f"{name} cannot be a range: each size needs its own tokenizer; give a list of choices")
    _refuse_unknown(name, entry, ("low", "high", "step", "log"))
    for key in ("low", "high"):
        _require(key in entry, f"{name} lacks {key}; give {{low = …, high = …}} or a list of choices")
    low, high = _value(where, p, entry["low"]), _value(where, p, entry["high"])
    assert not isinstance(low, str)
    assert not isinstance(high, str)
    _require(low <= high, f"{name} has low={low} above high={high}; swap them")
    log = entry.get("log", False)
    _require(isinstance(log, bool), f"{name} has log={log!r}; give true or false")
    _require(not log or low > 0, f"{name} has low={low} and log=true; a logarithm needs low above 0")
    step = entry.get("step")
    if step is not None:
        _require(not log, f"{name} has both step and log; remove one")
        ok = isinstance(step, int if p.kind == "int" else int | float) and not isinstance(step, bool)
        _require(ok, f"{name} has step={step!r}; give {'an integer' if p.kind == 'int' else 'a number'}")
        assert isinstance(step, int | float)
        _require(math.isfinite(step) and step > 0, f"{name} has step={step}; give one above 0")
        steps = (high - low) / step
        whole = math.floor(steps + 1e-9)
        # Optuna would lower `high` with a warning; a file that says what it means is better.
        _require(
            abs(steps - whole) < 1e-6,
            f"{name} has high={high}, which is not low={low} plus a multiple of step={step}; use {low + whole * step:g}",
        )
        step = float(step) if p.kind == "float" else None if step == 1 else int(step)
    if low == high:
        return Choices(name=p.name, values=(low,))
    return Range(name=p.name, low=low, high=high, step=step, log=bool(log))


def _value(where: str, p: Parameter, value: object) -> Value:
    """A value in its parameter's type and bounds."""
    name = f"{where}: {p.name}"
    if p.kind == "bool":
        _require(isinstance(value, bool), f"{name}={value!r} is not a boolean; give true or false")
        assert isinstance(value, bool)
        return value
    if p.kind == "word":
        if value not in p.words:
            raise InvalidSpace(f"{name}={value!r} is not one of {', '.join(p.words)}{_hint(value, p.words, 'choose one')}")
        return str(value)
    if p.kind == "span":
        return _span(name, p, value)
    number = int if p.kind == "int" else int | float
    ok = isinstance(value, number) and not isinstance(value, bool)
    _require(ok, f"{name}={value!r} is not {'an integer' if p.kind == 'int' else 'a number'}; give one")
    assert isinstance(value, int | float)
    _require(p.least <= value <= p.most, f"{name}={value} is not within {_text(p.least)} and {_text(p.most)}; choose one that is")
    return value if p.kind == "int" else float(value)


def _span(name: str, p: Parameter, value: object) -> str:
    try:
        first, last = (1.0, 1.0) if value == "none" else map(float, str(value).split(".."))
    except ValueError as error:
        raise InvalidSpace(f"{name}={value!r} is not a span; give 'none', or first..last as in '0.5..1.0'") from error
    _require(0.01 <= first <= 64 and 0.01 <= last <= 64, f"{name}={value!r} is not within 0.01 and 64; choose multiples that are")
    return "none" if value == "none" else f"{first}..{last}"


def _check_together(where: str, axes: Mapping[str, Axis], given: Mapping[str, object]) -> None:
    """Refuses what contradicts itself, and questions whose answers can never matter."""
    for p in PARAMETERS:
        if p.needs is None:
            continue
        other, wanted = p.needs
        matters = axes[other].may_be(wanted)
        words = _listed(wanted) if isinstance(wanted, tuple) else f"{wanted.start} or more"
        _require(
            p.name in given or not matters or p.default is not None, f"{where}: {p.name} is missing, which {other}={words} needs; give it"
        )
        _require(
            axes[p.name].size == 1 or matters, f"{where}: {p.name} never matters, as {other} is never {words}; fix it, or widen {other}"
        )
    turns = axes["positions"].may_be(("rotary",)) or axes["attention"].may_be(("mla",))
    for name in ("rotary_fraction", "rope_theta"):
        _require(
            axes[name].size == 1 or turns, f"{where}: {name} never matters, as positions is never 'rotary'; fix it, or widen positions"
        )
    if not axes["attention"].may_be(("mha", "gqa", "mqa")):
        for name, value in (("positions", "learned"), ("qk_norm", True)):
            _require(
                not axes[name].may_be((value,)),
                f"{where}: {name}={_text(value)} does not go with attention='mla' only; remove it, or widen attention",
            )
    if axes["sharing"].may_be(_SHARED[1]):
        _require(axes["num_layers"].to_plain() != 1, f"{where}: num_layers=1 has nothing to share; use sharing='none', or more layers")
        _require(axes["unique_fraction"].to_plain() != 1.0, f"{where}: unique_fraction=1.0 shares nothing; lower it, or use sharing='none'")


def _params_range(where: str, given: object) -> tuple[int, int] | None:
    if given is None:
        return None
    ok = isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    _require(ok, f"{where}: params={given!r} is not a range; give [least, most] as integers")
    assert isinstance(given, list | tuple)
    least, most = given
    _require(1 <= least <= most, f"{where}: params={[least, most]} is not least then most, both above 0; correct it")
    return least, most


def _listed(words: Iterable[object]) -> str:
    *rest, last = map(repr, words)
    return f"{', '.join(rest)} or {last}" if rest else last


def _text(value: Value) -> str:
    """A value in few characters, as TOML would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k} = {_toml(v)}' for k, v in value.items())}}}"
    return str(value).lower()
