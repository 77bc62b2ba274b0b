"""Layer-wise scaling: heads and FFN widths that grow with depth (OpenELM, arXiv 2404.14619)."""

import math
from dataclasses import dataclass

from search_spaces.config import InvalidConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerwiseSizes:
    """Sizes of each layer, first to last, as `SLMConfig` takes them."""

    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_dim: tuple[int, ...]


def layerwise_scaling(
    *,
    d_model: int,
    num_layers: int,
    head_dim: int,
    alpha: tuple[float, float] = (0.5, 1.0),
    beta: tuple[float, float] = (0.5, 4.0),
    kv_group: int = 4,
    ffn_multiple: int = 256,
) -> LayerwiseSizes:
    """Heads and FFN widths from multipliers that go linearly from the first layer to the last.

    alpha_i = round(alpha_0 + (alpha_1 - alpha_0) i / (L - 1), 2), beta_i likewise; a layer's query width is
    alpha_i D rounded to a multiple of head_dim * kv_group, its FFN width beta_i D rounded to one of ffn_multiple.
    The rounding, to the nearest but never more than a tenth down, is that of the published models (Apple's corenet,
    `general_gpt.py` and `math_utils.py`). A single layer takes the smaller multiplier, where i / (L - 1) is undefined.

    Args:
        d_model: model width D.
        num_layers: layers L.
        head_dim: width of a head.
        alpha: multipliers of the query width at the first and the last layer.
        beta: multipliers of the FFN width at the first and the last layer.
        kv_group: query heads that share one key/value head; 1: multi-head attention.
        ffn_multiple: what FFN widths are multiples of.

    Raises:
        InvalidConfig: if a size is below 1 or a multiplier is not a positive number.
    """
    sizes = {"d_model": d_model, "num_layers": num_layers, "head_dim": head_dim, "kv_group": kv_group, "ffn_multiple": ffn_multiple}
    for name, size in sizes.items():
        if size < 1:
            raise InvalidConfig(f"{name}={size} is below 1; give a positive integer for layer-wise scaling")
    for name, ends in (("alpha", alpha), ("beta", beta)):
        if not all(math.isfinite(end) and end > 0 for end in ends):
            raise InvalidConfig(f"{name}={ends} has a multiplier that is not a positive number; give two above 0")
    heads = tuple(round_to_multiple(d_model * a, head_dim * kv_group) // head_dim for a in multipliers(alpha, num_layers))
    return LayerwiseSizes(
        num_heads=heads,
        num_kv_heads=tuple(h // kv_group for h in heads),
        ffn_dim=tuple(round_to_multiple(d_model * b, ffn_multiple) for b in multipliers(beta, num_layers)),
    )


def round_to_multiple(value: float, multiple: int) -> int:
    """The multiple nearest to `value`, at least one of them, and the next one up if that is below 0.9 of `value`."""
    nearest = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return nearest + multiple if nearest < 0.9 * value else nearest


def multipliers(ends: tuple[float, float], num_layers: int) -> list[float]:
    """One multiplier a layer, in equal steps from the first end to the last, rounded to two decimals."""
    if num_layers == 1:
        return [round(min(ends) * 100) / 100]
    first, last = ends
    step = (last - first) / (num_layers - 1)
    # The published code spaces and rounds with numpy: the last point is exact, and two decimals are those of 100 x.
    points = [first + step * i for i in range(num_layers - 1)] + [last]
    return [round(point * 100) / 100 for point in points]
