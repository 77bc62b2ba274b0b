"""Twins: a model too large to train here is scored by a smaller one of the same kind, shrunk by one rule.

Kinds and ratios say what an architecture is, and are kept; width, depth and heads say how large it is, and shrink. So two models
that differ in one choice have twins that differ in that choice, and the larger of two models has the larger twin. `RULES` says
how, in words. A space asks for twins with `[twin] params = [least, most]`; what is compiled, timed and counted is never a twin.

Why so:

- What counts as size is what is not a table of tokens or positions, since loss follows that and hardly the shape it comes in
  (Kaplan et al., arXiv 2001.08361, sections 3.1 and 3.2). A table is vocabulary * width: were it counted, a small twin of a model
  with a large vocabulary would be made of its table, and vocabularies would be ranked by the width that they leave.
- Depth shrinks by fewer times than width. The depth that pays for itself grows about as the logarithm of the width (Levine et al.,
  arXiv 2006.12467), so a model of a tenth of the width wants more than a tenth of the layers; and two or three layers could
  neither tell patterns of sharing apart nor a scaling from the first layer to the last.
- Learning rates follow from width and depth, and carry over from small to large (Yang et al., arXiv 2203.03466), so what a twin is
  trained at is as good for it as the full model's would be.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from search_spaces.config import LayerShape, PerLayer, Sharing, SLMConfig, attention_kind, shared_index
from search_spaces.counting import params_by_component
from search_spaces.space import Space, shared_layers

RULES = (
    "kept: vocabulary, context, every kind, bias and tie, key/value groups, the number of series terms and shortcuts",
    "one power t < 1 shrinks all that is size: width to width^t, layers to layers^t, heads to heads^t (the mean, where layers differ)",
    "t is such that the body, all parameters but token and position tables, comes to its target; layers are rounded first, then width",
    "in proportion to the width: FFN widths, MLA ranks, all heads together; in proportion to a head: its rotary dims and MLA's values",
    "layers that differ: as many, evenly from first to last; sharing keeps its pattern and, within rounding, its share of unique layers",
    "target: a power law takes the space's params onto the twin's; least: width 16, heads of 4, 2 key/value groups, what sharing needs",
)
"""How a twin is made, in words for `edgewise spaces show`."""

_TABLES = ("embedding", "positions", "head")
_WIDTH_STEP = 2
_LEAST_WIDTH, _LEAST_HEAD = 16, 4
_LEAST_GROUPS = 2
"""Of the layer that has most: with one, groups would be multi-query attention and a head would be alone."""


def trained_config(space: Space, config: SLMConfig) -> SLMConfig:
    """The model that is trained to score one of a space's models: its twin, or itself if the space has none or it is that small."""
    if space.twin_params is None:
        return config
    return twin(config, target_params(space, body_params(config)))


def target_params(space: Space, body: int) -> int:
    """Body parameters that a twin is to have, of a space with twins, for those of the full model.

    a' (body / a)^k with k = ln(b'/a') / ln(b/a), where [a, b] are the space's `params` and [a', b'] those of its twins: a straight
    line between logarithms. With k = 1, as in the shipped spaces, all twins of a space are shrunk by the same factor.
    """
    assert space.params_range is not None
    assert space.twin_params is not None
    (least, most), (twin_least, twin_most) = space.params_range, space.twin_params
    power = math.log(twin_most / twin_least) / math.log(most / least) if most > least else 1.0
    return max(1, round(twin_least * math.exp(power * math.log(body / least))))


def body_params(config: SLMConfig) -> int:
    """Unique parameters but those of token and position tables and of the head."""
    return sum(n for name, n in params_by_component(config).items() if name not in _TABLES)


def twin(config: SLMConfig, target: int) -> SLMConfig:
    """A model of the same kinds and ratios whose body has about so many parameters, by `RULES`.

    With c L D^2 parameters in the body of L layers of width D, the power is t = 1 + ln(target / body) / ln(L D^2).

    Args:
        config: the full model.
        target: what `body_params` of the twin is to be, within rounding (a few percent, more where a least size holds); its
            tables come on top.

    Returns:
        The twin; the config itself if its body has no more than that.
    """
    L, D = config.num_layers, config.d_model
    body = body_params(config)
    if target >= body or L * D == 1:
        return config
    t = max(0.0, 1 + math.log(max(1, target) / body) / math.log(L * D**2))
    layers, sharing, unique = _depth(config, L**t)
    width = round(D**t * math.sqrt(L**t / layers) / _WIDTH_STEP) * _WIDTH_STEP
    width = max(min(D, _LEAST_WIDTH), min(D, width))
    full = config.layers()

    def shapes(shared: bool, indices: Sequence[int]) -> list[LayerShape]:
        """For each layer of the twin the full model's that it is a small copy of."""
        of_unique = list(dict(zip(indices, full, strict=True)).values())
        picked = _evenly(len(of_unique), unique if shared else layers)
        return [of_unique[picked[shared_index(i, layers, unique, sharing) if shared else i]] for i in range(layers)]

    shares = config.sharing != "none"
    attention = shapes(shares and config.shared_parts != "ffn", [s.attention_index for s in full])
    ffn = shapes(shares and config.shared_parts != "attention", [s.ffn_index for s in full])
    heads, kv_heads = _heads(config, attention, t)
    return dataclasses.replace(
        config,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        attention="mla" if config.attention == "mla" else attention_kind(heads, kv_heads),
        **_widths(config, width, heads),
        ffn_dim=tuple(max(1, round(s.ffn_dim * width / D)) for s in ffn),
        embedding_scale=math.sqrt(width) if config.embedding_scale == math.sqrt(D) else config.embedding_scale,
        sharing=sharing,
        num_unique_layers=unique if shares else None,
        shortcut_reduction=min(config.shortcut_reduction, width),
    )


def _depth(config: SLMConfig, ideal: float) -> tuple[int, Sharing, int]:
    """Layers, sharing and unique layers: the nearest depth where nothing is shared, else the best compromise with their share."""
    if config.num_unique_layers is None:
        layers = max(1, round(ideal))
        return layers, "none", layers
    share = config.num_unique_layers / config.num_layers
    least = min(2, config.num_unique_layers)  # of one unique layer all patterns are the same
    found: list[tuple[float, int, Sharing, int]] = []
    for layers in range(max(2, math.floor(ideal) - 1), min(config.num_layers, math.ceil(ideal) + 3) + 1):
        sharing, unique = shared_layers(config.sharing, layers, min(max(share, least / layers), (layers - 1) / layers))
        if sharing != "none" and unique >= least:
            off = abs(math.log(layers / ideal)) + abs(math.log(unique / layers / share))
            found.append((off, layers, sharing, unique))
    _, layers, sharing, unique = min(found)
    return layers, sharing, unique


def _evenly(have: int, want: int) -> list[int]:
    """`want` indices of `have`, from the first to the last at equal distances; the middle for one."""
    return [(have - 1) // 2] if want == 1 else [math.floor(i * (have - 1) / (want - 1) + 0.5) for i in range(want)]


def _heads(config: SLMConfig, shapes: Sequence[LayerShape], t: float) -> tuple[PerLayer, PerLayer]:
    """Query and key/value heads of each layer: groups shrink in number, not in what they hold; multi-query heads do."""
    alone = config.attention == "mqa"
    groups = [s.num_heads if alone else s.num_kv_heads for s in shapes]
    mean = sum(s.num_heads for s in config.layers()) / config.num_layers
    factor = max(mean ** (t - 1), min(_LEAST_GROUPS, max(groups)) / max(groups))
    shrunk = [max(1, round(n * factor)) for n in groups]
    if alone:
        return tuple(shrunk), 1
    return tuple(n * (s.num_heads // s.num_kv_heads) for n, s in zip(shrunk, shapes, strict=True)), tuple(shrunk)


def _widths(config: SLMConfig, width: int, heads: PerLayer) -> dict[str, Any]:
    """Widths of a head such that all heads together are as wide, in d_model, as those of the full model; MLA's ranks."""
    assert config.head_dim is not None
    assert config.rotary_dim is not None
    scale = width / config.d_model
    full = sum(s.num_heads for s in config.layers()) / config.num_layers
    mean = heads if isinstance(heads, int) else sum(heads) / len(heads)
    head = min(config.head_dim, max(_LEAST_HEAD, _even(config.head_dim * scale * full / mean)))
    part = head / config.head_dim
    rotary = min(max(2, _even(config.rotary_dim * part)), config.rotary_dim)
    if config.attention != "mla":
        rotary = min(rotary, head // 2 * 2)
    return {
        "head_dim": head,
        "rotary_dim": rotary if config.positions == "rotary" else 0,
        "v_head_dim": None if config.v_head_dim is None else max(1, round(config.v_head_dim * part)),
        "q_rank": max(1, round(config.q_rank * scale)) if config.q_rank else 0,
        "kv_rank": max(1, round(config.kv_rank * scale)) if config.kv_rank else 0,
    }


def _even(value: float) -> int:
    return 2 * round(value / 2)
