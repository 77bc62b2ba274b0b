"""`Space`: a search space written as data, read from TOML, and asked of an Optuna trial.

A space is static: `suggest` asks for the same parameters, with the same distributions, in the same order,
whatever the answers. Optuna's samplers model such spaces; they fall back to random where parameters come and go.
So a choice that only matters sometimes is asked always, and a combination that cannot be built is repaired by
the rules in `REPAIRS`. No `InvalidConfig` ever comes out of a space that loads.

```toml
name = "mine"
about = "One line for people."
params = [100_000, 2_500_000]              # optional: parameters a candidate may have
starts = [{d_model = 64}, {d_model = 256}] # optional: what to try first; what it leaves out is the first choice, or low

[twin]                                     # optional: models are scored by twins, see `search_spaces.twin`
params = [20_000, 500_000]                 # their bodies', for a full model's body of the least and the most of `params`

[parameters]
vocab_size = [1024, 4096]                  # a list: one of these
d_model = {low = 64, high = 256, step = 32}
num_layers = {low = 2, high = 8}           # or {low, high, log = true}
head_dim = 32                              # one value: fixed, never asked
```

`search_spaces.parameters` has the table of what can be chosen; parameters left out keep its default. This module imports
neither torch nor Optuna.
"""

import hashlib
import json
import math
import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from search_spaces.config import SharedParts, Sharing, SLMConfig, attention_kind, shared_index
from search_spaces.layerwise import LayerwiseSizes, layerwise_scaling
from search_spaces.parameters import BY_NAME, Axis, Choices, Value, hint, listed, read_axes, refuse_unknown, require, value_text
from search_spaces.parameters import InvalidSpace as InvalidSpace  # what `load_space` raises; importable from here too

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

REPAIRS = (
    "heads: attention_width * d_model / head_dim, rounded as OpenELM does, at least 1; ratios count to two decimals",
    "gqa: an even number of heads; kv_group is lowered to the largest divisor below the heads; 2 heads have none, and are mha",
    "mqa: one key/value head; mha and mla: as many as query heads",
    "mla: positions are rotary, qk_norm is off, rotary dims are extra ones: rotary_fraction * head_dim / 2; ranks are multiples of 8",
    "rotary dims: rotary_fraction * head_dim, rounded to an even number, at least 2; none with learned positions",
    "ffn_dim: the ratio of the chosen ffn kind * d_model, rounded to a multiple of ffn_multiple",
    "layerwise: a span multiplies attention_width (alpha) or the ffn ratio (beta), first to last layer (unique layers where shared)",
    "layerwise: with a single layer, or a single unique one, a span counts as its mean",
    "sharing: unique_fraction * num_layers unique layers, at least 1; all layers unique means no sharing",
    "sharing: a cycle_rev has at most half the layers unique (of one layer: no sharing); a sequence only as many as it uses",
    "norm_bias is off with rmsnorm; shortcut_reduction is at most d_model",
)
"""How a combination that cannot be built becomes one that can, in words for `edgewise spaces show`."""


class SearchSpace(Protocol):
    """What a search draws architectures from.

    An implementation must be static: the same parameters and distributions in the same order for every trial.
    """

    @property
    def name(self) -> str:
        """A short name, for reports."""

    def suggest(self, trial: "BaseTrial", *, vocab_sizes: Mapping[int, int] | None = None) -> SLMConfig:
        """An architecture from this trial's parameters; called once per trial, before anything is compiled or trained."""

    def start(self, number: int) -> Mapping[str, Any] | None:
        """Parameters that trial `number` is given instead of a proposal; None: ask the sampler."""


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
    starts: tuple[tuple[tuple[str, Value], ...], ...] = ()
    """What the first trials are given instead of a proposal, so that a front has both of its ends from the beginning."""
    twin_params: tuple[int, int] | None = None
    """Parameters of the bodies of twins, for bodies of the least and the most of `params_range`; None: models are trained themselves."""

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

    def start(self, number: int) -> dict[str, Value] | None:
        """The parameters of a start, every asked one: as written, else the first choice or the lowest; None beyond the last."""
        if number >= len(self.starts):
            return None
        given = dict(self.starts[number])
        return {axis.name: given.get(axis.name, axis.plain) for axis in self.asked}

    def requested_vocab(self, params: Mapping[str, object]) -> int:
        """The vocabulary size these parameters ask of the tokenizer (what comes out may be smaller).

        Raises:
            InvalidSpace: if the space asks for it and `params` lacks it.
        """
        return int(self._value(self.axes[0], params))

    def _value(self, axis: Axis, params: Mapping[str, Any]) -> Any:
        if axis.size == 1:
            return axis.to_plain()
        require(axis.name in params, f"space {self.name!r}: the parameters lack {axis.name}; were they made with another space?")
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
        searched = {key: plain.get(key) for key in ("params", "parameters", "starts")}
        if "twin" in plain:
            searched["twin"] = plain["twin"]
        text = json.dumps(searched, sort_keys=True)
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
        if self.starts:
            head["starts"] = [dict(start) for start in self.starts]
        if self.twin_params is not None:
            head["twin"] = {"params": list(self.twin_params)}
        return {**head, "parameters": {axis.name: axis.to_plain() for axis in self.axes}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, name: str = "unnamed") -> "Space":
        """The inverse of `to_dict`, and what a TOML file holds.

        Args:
            values: `parameters`, and optionally `name`, `about`, `params`, `starts` and `twin`.
            name: the name if `values` has none.

        Raises:
            InvalidSpace: on unknown keys or words, empty choices, low above high, wrong types and contradictions.
        """
        given_name = values.get("name", name)
        require(isinstance(given_name, str) and given_name != "", f"name={given_name!r} is not a name; give a short text")
        where = f"space {given_name!r}"
        refuse_unknown(where, values, ("name", "about", "params", "starts", "twin", "parameters"))
        about = values.get("about", "")
        require(isinstance(about, str), f"{where}: about={about!r} is not a text; give one line")
        table = values.get("parameters")
        require(isinstance(table, Mapping), f"{where}: [parameters] is missing; give at least vocab_size, d_model, num_layers and head_dim")
        assert isinstance(table, Mapping)
        axes = read_axes(where, table)
        params_range = _params_range(where, "params", values.get("params"))
        return cls(
            name=given_name,
            about=about,
            params_range=params_range,
            axes=axes,
            starts=_starts(where, values.get("starts", []), axes),
            twin_params=_twin_params(where, values.get("twin"), params_range),
        )

    def to_toml(self) -> str:
        """TOML text that `load_space` reads, each parameter with its meaning: a file to start one's own from."""
        lines = [f"name = {_toml(self.name)}", f"about = {_toml(self.about)}"]
        if self.params_range is not None:
            lines.append(f"params = {_toml(list(self.params_range))}")
        if self.starts:
            lines.append(f"starts = [{', '.join(_toml(dict(start)) for start in self.starts)}]")
        if self.twin_params is not None:
            lines += ["", "[twin]", f"params = {_toml(list(self.twin_params))}  # of the bodies of what is trained in place of a model"]
        lines += ["", "[parameters]"]
        lines += [f"{axis.name} = {_toml(axis.to_plain())}  # {BY_NAME[axis.name].meaning}" for axis in self.axes]
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
            f"space {text_name!r} is not known{hint(text_name, space_names(), f'choose {listed(space_names())}, or give a TOML file')}"
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
            values = ", ".join(value_text(v) for v in axis.values)
        else:
            kind = "range"
            note = ", log" if axis.log else f", step {value_text(axis.step)}" if axis.step else ""
            values = f"{value_text(axis.low)} to {value_text(axis.high)}{note}"
        rows.append(Row(name=axis.name, kind=kind, values=values, meaning=BY_NAME[axis.name].meaning))
    return tuple(rows)


def _starts(where: str, given: object, axes: tuple[Axis, ...]) -> tuple[tuple[tuple[str, Value], ...], ...]:
    ok = isinstance(given, list | tuple) and all(isinstance(start, Mapping) for start in given)
    require(ok, f"{where}: starts={given!r} is not a list of tables; give [{{d_model = 64}}, …]")
    assert isinstance(given, list | tuple)
    asked = {axis.name: axis for axis in axes if axis.size != 1}
    starts = []
    for number, start in enumerate(given):
        for name, value in start.items():
            start_where = f"{where}: starts[{number}]"
            require(name in asked, f"{start_where}: {name} is not a parameter that is asked{hint(name, asked, 'remove it')}")
            require(asked[name].holds(value), f"{start_where}: {name}={value!r} is not among the values of {name}; choose one of them")
        starts.append(tuple((name, start[name]) for name in asked if name in start))
    return tuple(starts)


def _params_range(where: str, name: str, given: object) -> tuple[int, int] | None:
    if given is None:
        return None
    ok = isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    require(ok, f"{where}: {name}={given!r} is not a range; give [least, most] as integers")
    assert isinstance(given, list | tuple)
    least, most = given
    require(1 <= least <= most, f"{where}: {name}={[least, most]} is not least then most, both above 0; correct it")
    return least, most


def _twin_params(where: str, given: object, full: tuple[int, int] | None) -> tuple[int, int] | None:
    """The range of a [twin] table: as wide as such a table can make sense of, so that a larger model has a larger twin."""
    if given is None:
        return None
    require(isinstance(given, Mapping) and "params" in given, f"{where}: [twin] lacks params; give [least, most] of a twin's body")
    assert isinstance(given, Mapping)
    refuse_unknown(f"{where}: [twin]", given, ("params",))
    found = _params_range(where, "[twin] params", given["params"])
    require(found is not None and full is not None, f"{where}: [twin] needs the space's own params; give them as [least, most]")
    assert found is not None
    assert full is not None
    smaller = found[0] < full[0] and found[1] < full[1]
    require(smaller, f"{where}: [twin] params={list(found)} are not below params={list(full)}; lower them, or remove [twin]")
    grows = found[0] < found[1] or full[0] == full[1]
    require(grows, f"{where}: [twin] params={list(found)} give models of every size the same twin; give least below most")
    return found


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k} = {_toml(v)}' for k, v in value.items())}}}"
    return str(value).lower()


# --- from parameters to an architecture -------------------------------------------------------


def _build(v: Mapping[str, Any], vocab_sizes: Mapping[int, int] | None) -> SLMConfig:
    """The architecture of one value for each of `PARAMETERS`, repaired as `REPAIRS` says."""
    width, layers, head_dim = v["d_model"], v["num_layers"], v["head_dim"]
    mla = v["attention"] == "mla"
    sharing, unique = shared_layers(v["sharing"], layers, v["unique_fraction"])
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


def shared_layers(sharing: Sharing, layers: int, fraction: float) -> tuple[Sharing, int]:
    """The sharing and its unique layers, such that every unique layer is used and some layers share; "none" if that cannot be."""
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

    def scaled(n: int) -> LayerwiseSizes:
        alpha, beta = _times(v["layerwise_alpha"], width, n), _times(v["layerwise_beta"], ratio, n)
        return layerwise_scaling(**given, num_layers=n, alpha=alpha, beta=beta, kv_group=group)

    of_each, of_unique = scaled(layers), scaled(unique)

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


def _times(span: str, factor: float, layers: int) -> tuple[float, float]:
    """The first and last multiple a span names, times a factor; "none" is 1..1, and of a single layer both are the mean."""
    first, last = (1.0, 1.0) if span == "none" else map(float, span.split(".."))
    if layers == 1:
        first = last = (first + last) / 2
    return first * factor, last * factor
