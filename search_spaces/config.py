"""`SLMConfig`: everything about an architecture, in one frozen, validated value.

A config says what the model *is* (per-layer sizes included), never how it was found.
Two configs that describe the same model are equal: values are put in one canonical form.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

AttentionKind = Literal["mha", "gqa", "mqa", "mla"]
FFNKind = Literal["gated", "standard"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
NormKind = Literal["layernorm", "rmsnorm"]
Positions = Literal["rotary", "learned"]
BlockForm = Literal["sequential", "parallel", "parallel_shared_norm"]
Sharing = Literal["none", "sequence", "cycle", "cycle_rev"]
SharedParts = Literal["both", "attention", "ffn"]
SeriesMode = Literal["scalar", "channel"]

PerLayer = int | tuple[int, ...]
"""One value for every layer, or one per layer; canonically an int when all are equal."""

MODEL_TYPE = "edgewise"
"""The `model_type` that marks a config.json as ours."""
ARCHITECTURE = "architecture"
"""Where such a file has our fields when transformers reads it too; else they are its own fields."""


MOST_LAYERS = 10_000
MOST = 2**24
"""No size is above this: far more than any model has, and little enough to be counted in no time."""


class InvalidConfig(ValueError):
    """An architecture that cannot be built; the message says which field, its value, the rule and what to do."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidConfig(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class SLMConfig:
    """A decoder-only language model, complete and valid.

    Shapes: `d_model` is the model width D; layer i has `num_heads[i]` query heads of `head_dim`,
    `num_kv_heads[i]` key/value heads and an inner FFN width `ffn_dim[i]`.

    Raises:
        InvalidConfig: if a value or a combination is not a model that can be built.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    context: int = 1024
    """Most positions (tokens) the model can attend over."""

    attention: AttentionKind = "mha"
    num_heads: PerLayer = 4
    num_kv_heads: PerLayer | None = None
    """None: equal to `num_heads` (mha, mla) or 1 (mqa)."""
    head_dim: int | None = None
    """Width of a head; None: d_model / num_heads. For MLA the part without rotary (d_nope)."""
    v_head_dim: int | None = None
    """Width of a value head, MLA only; None: head_dim."""
    q_rank: int = 0
    """MLA query compression rank; 0: queries are projected directly."""
    kv_rank: int = 0
    """MLA key/value compression rank (the cached latent); 0 for other kinds."""
    qk_norm: bool = False
    """RMSNorm with a learned weight over each query and key head, before rotary (OpenELM, Qwen3)."""
    qkv_bias: bool = False
    attention_bias: bool = False
    """Bias on the attention output projection."""

    positions: Positions = "rotary"
    rotary_dim: int | None = None
    """Dimensions of each head that rotate, even; None: all of head_dim (MLA: head_dim / 2 extra ones)."""
    rope_theta: float = 10000.0
    position_offset: int = 0
    """Unused leading rows of a learned position table (OPT has 2)."""

    ffn: FFNKind = "gated"
    ffn_dim: PerLayer | None = None
    """Inner FFN width; None: 4 D (standard) or 8/3 D rounded up to a multiple of 8 (gated)."""
    activation: Activation = "silu"
    ffn_bias: bool = False

    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    norm_weight: bool = True
    """Learned weight of the norms of blocks and head; a LayerNorm may have none (OLMo)."""
    norm_bias: bool | None = None
    """Bias of a LayerNorm; None: as the kind has it (layernorm with a weight yes, rmsnorm never)."""

    block: BlockForm = "sequential"
    tie_embeddings: bool = True
    head_bias: bool = False
    embedding_scale: float = 1.0
    """Factor on token embeddings (Gemma: sqrt(D))."""

    sharing: Sharing = "none"
    """How effective layers map to unique ones (Takase & Kiyono, arXiv 2104.06022)."""
    shared_parts: SharedParts = "both"
    num_unique_layers: int | None = None
    """Unique layers M under sharing; None without sharing."""

    series_activation: int = 1
    """Terms n of the series-informed activation (PanGu-pi, arXiv 2312.17276); 1: the plain activation."""
    series_mode: SeriesMode = "scalar"
    """Whether the series' scales and shifts are one per term or one per term and channel (unpublished: an option)."""
    augmented_shortcuts: int = 0
    """Parallel bottleneck shortcuts T around attention (PanGu-pi); 0: none."""
    shortcut_reduction: int = 32
    """Bottleneck reduction r of the augmented shortcuts: D -> D/r -> D."""

    def __post_init__(self) -> None:
        self._check_types()
        self._canonicalise()
        self._check_attention()
        self._check_positions()
        self._check_ffn_and_norm()
        self._check_sharing()

    # --- canonical form -------------------------------------------------------------------

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            coerced = _coerce(field.name, value, _HINTS_CACHE.get(field.name) or _hint(field.name))
            self._set(field.name, coerced)
            for size in coerced if isinstance(coerced, tuple) else (coerced,):
                most = MOST_LAYERS if field.name == "num_layers" else MOST
                too_large = isinstance(size, int) and size > most
                _require(not too_large, f"{field.name}={_short(size)} is above {most:,}, the most there can be; give a smaller one")
        for name in ("vocab_size", "d_model", "num_layers", "context", "series_activation", "shortcut_reduction"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value} is below 1; give a positive integer")
        for name in ("q_rank", "kv_rank", "position_offset", "augmented_shortcuts"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value} is negative; give 0 or more")
        for name in ("rope_theta", "norm_eps", "embedding_scale"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name}={value} is not a positive number; give one above 0")

    def _canonicalise(self) -> None:
        for name in ("num_heads", "num_kv_heads", "ffn_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                _require(
                    len(value) == self.num_layers,
                    f"{name} has {len(value)} values for num_layers={self.num_layers}; give one per layer or a single one",
                )
            if value is not None:
                least = min(value) if isinstance(value, tuple) else value
                _require(least >= 1, f"{name}={value} has a value below 1; give positive integers")
                self._set(name, _collapse(value))
        if self.num_kv_heads is None:
            _require(self.attention != "gqa", "num_kv_heads is missing for attention='gqa'; give the number of key/value heads")
            self._set("num_kv_heads", 1 if self.attention == "mqa" else self.num_heads)
        if self.head_dim is None:
            _require(
                isinstance(self.num_heads, int) and self.d_model % self.num_heads == 0,
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; give head_dim",
            )
            assert isinstance(self.num_heads, int)
            self._set("head_dim", self.d_model // self.num_heads)
        if self.ffn_dim is None:
            self._set("ffn_dim", 4 * self.d_model if self.ffn == "standard" else -(-8 * self.d_model // 24) * 8)
        if self.norm_bias is None:
            self._set("norm_bias", self.norm == "layernorm" and self.norm_weight)

    # --- rules ----------------------------------------------------------------------------

    def _check_attention(self) -> None:
        assert self.head_dim is not None
        _require(self.head_dim >= 1, f"head_dim={self.head_dim} is below 1; give a positive integer")
        heads, kv_heads = self._tuple("num_heads"), self._tuple("num_kv_heads")
        for i, (h, k) in enumerate(zip(heads, kv_heads, strict=True)):
            if h % k != 0:
                divisors = ", ".join(str(n) for n in range(1, h + 1) if h % n == 0)
                raise InvalidConfig(f"num_heads={h} is not a multiple of num_kv_heads={k} (layer {i}); choose one of {divisors}")
        kind = self.attention
        if kind in ("mha", "mla"):
            _require(
                heads == kv_heads,
                f"attention={kind!r} needs num_kv_heads={self.num_kv_heads} equal to num_heads={self.num_heads}; use 'gqa'",
            )
        if kind == "mqa":
            _require(set(heads) != {1}, "attention='mqa' with num_heads=1 is 'mha'; say so")
            _require(set(kv_heads) == {1}, f"attention='mqa' needs num_kv_heads=1, not {self.num_kv_heads}; use 'gqa'")
        if kind == "gqa":
            _require(heads != kv_heads, f"attention='gqa' with num_kv_heads equal to num_heads={self.num_heads} is 'mha'; say so")
            _require(set(kv_heads) != {1}, "attention='gqa' with num_kv_heads=1 is 'mqa'; say so")
        if kind == "mla":
            _require(self.kv_rank >= 1, f"kv_rank={self.kv_rank} is not a rank; attention='mla' needs kv_rank of 1 or more")
            _require(
                self.positions == "rotary", "positions='learned' does not go with attention='mla', whose keys carry rotary; use 'rotary'"
            )
            _require(not self.qk_norm, "qk_norm=True does not go with attention='mla', which normalises its latents; set it to false")
            self._set("v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim)
            assert self.v_head_dim is not None
            _require(self.v_head_dim >= 1, f"v_head_dim={self.v_head_dim} is below 1; give a positive integer")
        else:
            for name in ("kv_rank", "q_rank"):
                _require(getattr(self, name) == 0, f"{name}={getattr(self, name)} is for attention='mla' only; leave it at 0 for {kind!r}")
            _require(
                self.v_head_dim in (None, self.head_dim),
                f"v_head_dim={self.v_head_dim} is for attention='mla' only; leave it out for {kind!r}",
            )
            self._set("v_head_dim", None)

    def _check_positions(self) -> None:
        assert self.head_dim is not None
        if self.positions == "learned":
            _require(self.rotary_dim in (None, 0), f"rotary_dim={self.rotary_dim} does not go with positions='learned'; leave it out")
            self._set("rotary_dim", 0)
            self._set("rope_theta", 10000.0)
            return
        _require(self.position_offset == 0, f"position_offset={self.position_offset} is for positions='learned' only; leave it at 0")
        if self.rotary_dim is None:
            self._set("rotary_dim", max(2, self.head_dim // 4 * 2) if self.attention == "mla" else self.head_dim)
        assert self.rotary_dim is not None
        if self.rotary_dim == 2:  # its one angle is the position itself, whatever the base
            self._set("rope_theta", 10000.0)
        most = "" if self.attention == "mla" else f" and at most head_dim={self.head_dim}"
        ok = self.rotary_dim >= 2 and self.rotary_dim % 2 == 0 and (self.attention == "mla" or self.rotary_dim <= self.head_dim)
        _require(ok, f"rotary_dim={self.rotary_dim} must be even, at least 2{most}; choose another, or positions='learned'")

    def _check_ffn_and_norm(self) -> None:
        _require(
            self.norm_weight or self.norm == "layernorm",
            "norm_weight=False does not go with norm='rmsnorm'; use 'layernorm' or set it to true",
        )
        _require(
            self.norm_weight or not self.norm_bias,
            "norm_bias=True does not go with norm_weight=False; set both to true or to false",
        )
        _require(
            not (self.norm == "rmsnorm" and self.norm_bias),
            "norm_bias=True does not go with norm='rmsnorm'; use 'layernorm' or set it to false",
        )
        if self.series_activation == 1:
            self._set("series_mode", "scalar")
        if self.augmented_shortcuts == 0:
            self._set("shortcut_reduction", 32)
        _require(
            self.augmented_shortcuts == 0 or self.shortcut_reduction <= self.d_model,
            f"shortcut_reduction={self.shortcut_reduction} exceeds d_model={self.d_model}; choose a smaller one",
        )
        _require(self.vocab_size >= 2, f"vocab_size={self.vocab_size} has nothing to predict; give 2 or more")

    def _check_sharing(self) -> None:
        if self.sharing == "none":
            _require(
                self.num_unique_layers in (None, self.num_layers),
                f"num_unique_layers={self.num_unique_layers} needs a sharing pattern; set sharing or leave it out",
            )
            self._set("num_unique_layers", None)
            self._set("shared_parts", "both")
            return
        m = self.num_unique_layers
        _require(m is not None, f"num_unique_layers is missing for sharing={self.sharing!r}; give 1 to {self.num_layers - 1}")
        assert m is not None
        _require(
            1 <= m < self.num_layers,
            f"num_unique_layers={m} is not within 1 and num_layers-1={self.num_layers - 1}; choose one that is, or sharing='none'",
        )
        if self.sharing == "cycle_rev":
            _require(
                self.num_layers >= 2 * m,
                f"num_unique_layers={m} is more than half of num_layers={self.num_layers}; sharing='cycle_rev' needs at most half",
            )
        if m == 1:  # every pattern is the same
            self._set("sharing", "sequence")
        used = 1 + shared_index(self.num_layers - 1, self.num_layers, m, self.sharing)
        _require(
            self.sharing != "sequence" or used == m,
            f"num_unique_layers={m} leaves unique layers unused in a sequence of {self.num_layers} layers; choose {used}",
        )
        for part, names in (("attention", ("num_heads", "num_kv_heads")), ("ffn", ("ffn_dim",))):
            if self.shared_parts not in ("both", part):
                continue
            for name in names:
                first: dict[int, int] = {}
                for i, value in enumerate(self._tuple(name)):
                    u = shared_index(i, self.num_layers, m, self.sharing)
                    _require(
                        first.setdefault(u, value) == value,
                        f"{name}[{i}]={value} differs from {first[u]} of the layer it shares weights with; make them equal",
                    )

    # --- views ----------------------------------------------------------------------------

    def _tuple(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.num_layers

    def layer(self, i: int) -> "LayerShape":
        """The sizes of effective layer i and which unique parts it uses."""
        m = self.num_unique_layers or self.num_layers
        shared = shared_index(i, self.num_layers, m, self.sharing)
        return LayerShape(
            num_heads=self._tuple("num_heads")[i],
            num_kv_heads=self._tuple("num_kv_heads")[i],
            ffn_dim=self._tuple("ffn_dim")[i],
            attention_index=shared if self.shared_parts in ("both", "attention") else i,
            ffn_index=shared if self.shared_parts in ("both", "ffn") else i,
        )

    def layers(self) -> "tuple[LayerShape, ...]":
        """Every effective layer, in order."""
        return tuple(self.layer(i) for i in range(self.num_layers))

    # --- files ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field; tuples become lists."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SLMConfig":
        """The inverse of `to_dict`; fields left out take their defaults.

        Raises:
            InvalidConfig: on an unknown key, a missing required field, or any rule broken.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        if values.get("model_type") == MODEL_TYPE:
            nested = values.get(ARCHITECTURE)
            # Beside a modelling file transformers reads config.json too, and writes fields of its own into it.
            values = nested if isinstance(nested, Mapping) else {k: v for k, v in values.items() if k != "model_type"}
        other = values.get("model_type")
        _require(
            other is None,
            f"this is a config of another format, with model_type={other!r}; give one that edgewise wrote (see `edgewise count --help`)",
        )
        for key in values:
            _require(key in known, f"{key!r} is not a field of an architecture config{_suggest(key, known)}")
        for name in ("vocab_size", "d_model", "num_layers"):
            _require(name in values, f"{name} is missing; an architecture config needs it")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> "SLMConfig":
        """Reads a JSON file, or `config.json` in a folder.

        Raises:
            InvalidConfig: if it is not readable JSON or breaks a rule.
        """
        return cls.from_dict(read_fields(path))

    def to_json(self) -> str:
        """Canonical text of a config.json that `load` reads."""
        return json.dumps({"model_type": MODEL_TYPE, **self.to_dict()}, indent=1) + "\n"

    @property
    def key(self) -> str:
        """A short content hash, the same for equal configs in every process."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, or of `config.json` in a folder, whatever they mean.

    Raises:
        InvalidConfig: if it is not a readable JSON object.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read ({error.strerror}); give a config.json or its folder") from error
    except ValueError as error:
        raise InvalidConfig(f"{path} is not JSON ({error}); give an architecture config") from error
    except RecursionError as error:
        raise InvalidConfig(f"{path} is nested too deeply; give an architecture config") from error
    _require(isinstance(values, dict), f"{path} holds {type(values).__name__}, not a JSON object; give an architecture config")
    return dict(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One effective layer: its sizes, and the indices of the unique attention and FFN parts it uses."""

    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    attention_index: int
    ffn_index: int


def shared_index(layer: int, num_layers: int, num_unique: int, sharing: Sharing) -> int:
    """The unique layer that effective `layer` of `num_layers` uses.

    sequence: i // ceil(N/M), cycle: i mod M, cycle_rev: as cycle, the last M layers reversed
    (Takase & Kiyono, arXiv 2104.06022).
    """
    if sharing == "none":
        return layer
    if sharing == "sequence":
        return layer // -(-num_layers // num_unique)
    if sharing == "cycle_rev" and layer >= num_layers - num_unique:
        return num_layers - 1 - layer
    return layer % num_unique


def attention_kind(num_heads: PerLayer, num_kv_heads: PerLayer) -> AttentionKind:
    """The name of plain attention with these head counts: mha, mqa or gqa."""
    if _collapse(num_heads) == _collapse(num_kv_heads):
        return "mha"
    return "mqa" if _collapse(num_kv_heads) == 1 else "gqa"


def _collapse(value: PerLayer) -> PerLayer:
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


_HINTS_CACHE: dict[str, Any] = {}


def _hint(name: str) -> Any:
    if not _HINTS_CACHE:
        _HINTS_CACHE.update(get_type_hints(SLMConfig))
    return _HINTS_CACHE[name]


def _coerce(name: str, value: object, hint: Any) -> object:
    """The value in its field's type, or InvalidConfig; JSON lists become tuples, whole ints become floats."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        _require(value in choices, f"{name}={value!r} is not one of {', '.join(map(str, choices))}; choose one")
        return value
    options = get_args(hint) or (hint,)
    if isinstance(value, list):
        value = tuple(value)
    if value is None and type(None) in options:
        return None
    if isinstance(value, bool):
        _require(bool in options, f"{name}={value} is a boolean; give {_describe(options)}")
        return value
    if isinstance(value, int) and int in options:
        return value
    if isinstance(value, int | float) and float in options:
        try:
            return float(value)
        except OverflowError as error:
            raise InvalidConfig(f"{name}={_short(value)} is too large for a number; give a smaller one") from error
    if isinstance(value, tuple) and any(get_origin(o) is tuple for o in options):
        ok = len(value) > 0 and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        _require(ok, f"{name}={list(value)} is not a list of integers; give one integer per layer")
        return value
    raise InvalidConfig(f"{name}={value!r} has the wrong type; give {_describe(options)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text)} digits)"


def _describe(options: tuple[Any, ...]) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(words.get(o, "a list of integers") for o in options)


def _suggest(key: str, known: Mapping[str, object]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; remove it, or see `edgewise count --help`"
