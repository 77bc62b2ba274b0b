"""The design parameters a search space chooses from: the table of them, what each may be, and how TOML says it.

`PARAMETERS` is the table; a new design choice is a line in it. A space has one axis for each: `Choices` or a `Range`,
which `read_axes` makes from a TOML table, refusing with `InvalidSpace` what is malformed or contradicts itself.
This module imports neither torch nor Optuna.
"""

import difflib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

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
)

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Value = bool | int | float | str
"""What a parameter can be: a JSON scalar, so that Optuna can store it."""


class InvalidSpace(ValueError):
    """A search space that cannot be loaded or contradicts itself; the message is one line."""


# --- the table ---------------------------------------------------------------------------------


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

BY_NAME: Mapping[str, Parameter] = {p.name: p for p in PARAMETERS}
"""The same, by name."""

_UNUSED: Mapping[str, Value] = {"kv_group": 2, "mla_kv_ratio": 0.5, "unique_fraction": 1.0}


# --- what a parameter may be in one space ------------------------------------------------------


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

    @property
    def plain(self) -> Value:
        """The value to take where nothing says otherwise: the first written."""
        return self.values[0]

    def holds(self, value: object) -> bool:
        """Whether a trial may have this value."""
        return value in self.values

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

    @property
    def plain(self) -> Value:
        """The value to take where nothing says otherwise: the lowest."""
        return self.low

    def holds(self, value: object) -> bool:
        """Whether a trial may have this value."""
        if isinstance(value, bool) or not isinstance(value, int if self._is_int else int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1)
        return self.size is None or self.log or abs(steps - round(steps)) < 1e-6

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


# --- from a TOML table to axes -----------------------------------------------------------------


def read_axes(where: str, table: Mapping[str, object]) -> tuple[Axis, ...]:
    """One axis for each of `PARAMETERS`, in that order, from the table of a TOML file.

    Args:
        where: what the errors start with, as in "space 'mine'".
        table: parameter to one value, a list of choices or a range; those left out keep their default.

    Raises:
        InvalidSpace: on unknown keys or words, empty choices, low above high, wrong types and contradictions.
    """
    refuse_unknown(where, table, BY_NAME)
    axes: dict[str, Axis] = {}
    for p in PARAMETERS:
        if p.name in table:
            axes[p.name] = _axis(where, p, table[p.name])
            continue
        default = p.default if p.default is not None else _UNUSED.get(p.name)
        require(default is not None, f"{where}: {p.name} is missing ({p.meaning}); give a value, a list or a range")
        assert default is not None
        axes[p.name] = Choices(name=p.name, values=(default,))
    _check_together(where, axes, table)
    return tuple(axes.values())


def _axis(where: str, p: Parameter, entry: object) -> Axis:
    """The axis that a TOML value describes: a list, a table of low and high, or one value."""
    if isinstance(entry, Mapping):
        return _range(where, p, entry)
    given = entry if isinstance(entry, list) else [entry]
    require(len(given) > 0, f"{where}: {p.name}=[] has no choices; list one or more")
    values = tuple(_value(where, p, v) for v in given)
    for i, value in enumerate(values):
        require(value not in values[:i], f"{where}: {p.name} lists {value_text(value)} twice; list it once")
    return Choices(name=p.name, values=values)


def _range(where: str, p: Parameter, entry: Mapping[str, object]) -> Axis:
    name = f"{where}: {p.name}"
    require(p.kind in ("int", "float"), f"{name} is not a number and cannot be a range; give a list of choices")
    require(p.name != "vocab_size", f"{name} cannot be a range: each size needs its own tokenizer; give a list of choices")
    refuse_unknown(name, entry, ("low", "high", "step", "log"))
    for key in ("low", "high"):
        require(key in entry, f"{name} lacks {key}; give {{low = …, high = …}} or a list of choices")
    low, high = _value(where, p, entry["low"]), _value(where, p, entry["high"])
    assert not isinstance(low, str)
    assert not isinstance(high, str)
    require(low <= high, f"{name} has low={low} above high={high}; swap them")
    log = entry.get("log", False)
    require(isinstance(log, bool), f"{name} has log={log!r}; give true or false")
    require(not log or low > 0, f"{name} has low={low} and log=true; a logarithm needs low above 0")
    step = entry.get("step")
    if step is not None:
        require(not log, f"{name} has both step and log; remove one")
        ok = isinstance(step, int if p.kind == "int" else int | float) and not isinstance(step, bool)
        require(ok, f"{name} has step={step!r}; give {'an integer' if p.kind == 'int' else 'a number'}")
        assert isinstance(step, int | float)
        require(math.isfinite(step) and step > 0, f"{name} has step={step}; give one above 0")
        steps = (high - low) / step
        whole = math.floor(steps + 1e-9)
        # Optuna would lower `high` with a warning; a file that says what it means is better.
        require(
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
        require(isinstance(value, bool), f"{name}={value!r} is not a boolean; give true or false")
        assert isinstance(value, bool)
        return value
    if p.kind == "word":
        if value not in p.words:
            raise InvalidSpace(f"{name}={value!r} is not one of {', '.join(p.words)}{hint(value, p.words, 'choose one')}")
        return str(value)
    if p.kind == "span":
        return _span(name, p, value)
    number = int if p.kind == "int" else int | float
    ok = isinstance(value, number) and not isinstance(value, bool)
    require(ok, f"{name}={value!r} is not {'an integer' if p.kind == 'int' else 'a number'}; give one")
    assert isinstance(value, int | float)
    require(p.least <= value <= p.most, f"{name}={value} is not within {value_text(p.least)} and {value_text(p.most)}; choose one that is")
    return value if p.kind == "int" else float(value)


def _span(name: str, p: Parameter, value: object) -> str:
    try:
        first, last = (1.0, 1.0) if value == "none" else map(float, str(value).split(".."))
    except ValueError as error:
        raise InvalidSpace(f"{name}={value!r} is not a span; give 'none', or first..last as in '0.5..1.0'") from error
    require(0.01 <= first <= 64 and 0.01 <= last <= 64, f"{name}={value!r} is not within 0.01 and 64; choose multiples that are")
    return "none" if value == "none" else f"{first}..{last}"


def _check_together(where: str, axes: Mapping[str, Axis], given: Mapping[str, object]) -> None:
    """Refuses what contradicts itself, and questions whose answers can never matter."""
    for p in PARAMETERS:
        if p.needs is None:
            continue
        other, wanted = p.needs
        matters = axes[other].may_be(wanted)
        words = listed(wanted) if isinstance(wanted, tuple) else f"{wanted.start} or more"
        require(
            p.name in given or not matters or p.default is not None, f"{where}: {p.name} is missing, which {other}={words} needs; give it"
        )
        require(
            axes[p.name].size == 1 or matters, f"{where}: {p.name} never matters, as {other} is never {words}; fix it, or widen {other}"
        )
    turns = axes["positions"].may_be(("rotary",)) or axes["attention"].may_be(("mla",))
    for name in ("rotary_fraction", "rope_theta"):
        require(axes[name].size == 1 or turns, f"{where}: {name} never matters, as positions is never 'rotary'; fix it, or widen positions")
    if not axes["attention"].may_be(("mha", "gqa", "mqa")):
        for name, value in (("positions", "learned"), ("qk_norm", True)):
            require(
                not axes[name].may_be((value,)),
                f"{where}: {name}={value_text(value)} does not go with attention='mla' only; remove it, or widen attention",
            )
    if axes["sharing"].may_be(_SHARED[1]):
        require(axes["num_layers"].to_plain() != 1, f"{where}: num_layers=1 has nothing to share; use sharing='none', or more layers")
        require(axes["unique_fraction"].to_plain() != 1.0, f"{where}: unique_fraction=1.0 shares nothing; lower it, or use sharing='none'")


# --- errors in one line ------------------------------------------------------------------------


def require(ok: bool, message: str) -> None:
    """Raises InvalidSpace with the message unless `ok`."""
    if not ok:
        raise InvalidSpace(message)


def hint(word: object, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about a word: the known one it was perhaps meant to be, or what else to do."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; {otherwise}"


def refuse_unknown(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises InvalidSpace if the table has a key that is not known."""
    for key in table:
        if key not in known:
            all_known = list(known)
            otherwise = f"remove it, or use {listed(all_known)}" if len(all_known) < 10 else "remove it, or see `edgewise spaces show tiny`"
            raise InvalidSpace(f"{where}: {key!r} is not a key{hint(key, known, otherwise)}")


def listed(words: Iterable[object]) -> str:
    """Words as in "'a', 'b' or 'c'"."""
    *rest, last = map(repr, words)
    return f"{', '.join(rest)} or {last}" if rest else last


def value_text(value: Value) -> str:
    """A value in few characters, as TOML would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
