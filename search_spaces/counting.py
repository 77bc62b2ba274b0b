"""Exact parameters, FLOPs and bytes of an `SLMConfig`, in closed form and without building the model.

What is counted, and what is not:

- **Parameters** are unique elements: a tied head and shared layers count once.
- **FLOPs** are those of matrix products, 2 m n k for (m, k) times (k, n); norms, activations, rotary, softmax and
  the products with the one new row of a decode step are elementwise and not counted. Causal attention is counted
  over the full square, S x S scores for S tokens, as PyTorch's `FlopCounterMode` counts it; a kernel that skips
  the masked half does (S + 1) / (2 S) of that. Every *effective* layer computes, whether or not it owns its weights.
- **Bytes of weights** are those of a precision: matrices of linear layers and the token table in as many bits, with their
  scales, the rest in float32. The cache and activations are float32 always.
- **Bytes read** are those one pass must fetch if nothing stays cached between layers: a shared layer's weights are
  read each time that it runs, gathered tables only in the rows used, cached keys and values once.

Symbols: D model width, H query heads, K key/value heads, d head width, v value head width, R rotary dims,
L latent rank, Q query rank, F inner FFN width, V vocabulary, S tokens, C cached rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from search_spaces.config import InvalidConfig, LayerShape, SLMConfig
from search_spaces.precision import Precision, matrix_bytes

Matrix = tuple[int, int]
"""Rows (outputs) and columns (inputs) of a matrix that a precision applies to."""

_FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one architecture costs, by component; totals are derived.

    `flops_by_component` and `bytes_read_by_component` are of decoding one token against `context` cached rows.
    """

    context: int
    """Cached rows C that the decode figures are for."""
    precision: Precision
    """Of the matrices."""
    params_by_component: Mapping[str, int]
    flops_by_component: Mapping[str, int]
    bytes_read_by_component: Mapping[str, int]
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    """The cache at the config's whole context."""
    workspace_bytes: int
    peak_bytes: int
    """Weights, the whole cache and the workspace of decoding: see `peak_bytes`."""

    @property
    def params(self) -> int:
        """Unique parameters."""
        return sum(self.params_by_component.values())

    @property
    def flops_per_token(self) -> int:
        """FLOPs of decoding one token."""
        return sum(self.flops_by_component.values())

    @property
    def bytes_read_per_token(self) -> int:
        """Bytes read to decode one token."""
        return sum(self.bytes_read_by_component.values())


def count(config: SLMConfig, context: int | None = None, precision: Precision = "fp32") -> Counts:
    """Everything countable about a config.

    Args:
        config: the architecture.
        context: cached rows of the decode step; None: config.context - 1, the most there can be.
        precision: of the matrices.

    Raises:
        InvalidConfig: if `context` is more than the model can attend over.
    """
    rows = config.context - 1 if context is None else context
    return Counts(
        context=rows,
        precision=precision,
        params_by_component=params_by_component(config),
        flops_by_component=decode_flops_by_component(config, rows),
        bytes_read_by_component=bytes_read_by_component(config, context=rows, precision=precision),
        weight_bytes=weight_bytes(config, precision),
        kv_bytes_per_token=kv_bytes_per_token(config),
        kv_bytes=kv_bytes(config, config.context),
        workspace_bytes=workspace_bytes(config, context=config.context - 1),
        peak_bytes=peak_bytes(config, precision=precision),
    )


# --- parameters -----------------------------------------------------------------------------


def params_by_component(config: SLMConfig) -> dict[str, int]:
    """Unique parameters by component, zeros left out.

    embedding: V D; positions: (context + offset) D if learned; attention, ffn: projections and their biases;
    norm: every norm's weights (blocks, final, QK, latents); activation: the series' scales and shifts;
    shortcuts: 2 T (D // r) D an attention part; head: V D if untied, and its bias.
    """
    c, D, V = config, config.d_model, config.vocab_size
    attentions, ffns = _unique(config)
    found = {
        "embedding": V * D,
        "positions": (c.context + c.position_offset) * D if c.positions == "learned" else 0,
        "attention": sum(_attention_params(c, s) for s in attentions),
        "ffn": sum(_ffn_params(c, s) for s in ffns),
        "norm": sum(_attention_norm_params(c) for _ in attentions) + sum(_ffn_norm_params(c) for _ in ffns) + _norm_params(c),
        "activation": sum(_series_params(c, s) for s in ffns),
        "shortcuts": len(attentions) * _shortcut_params(c),
        "head": (0 if c.tie_embeddings else V * D) + (V if c.head_bias else 0),
    }
    return {name: n for name, n in found.items() if n}


def params(config: SLMConfig) -> int:
    """Unique parameters of the whole model."""
    return sum(params_by_component(config).values())


def _unique(config: SLMConfig) -> tuple[list[LayerShape], list[LayerShape]]:
    """The shape of each unique attention part and of each unique FFN part."""
    shapes = config.layers()
    return list({s.attention_index: s for s in shapes}.values()), list({s.ffn_index: s for s in shapes}.values())


def _dims(config: SLMConfig) -> tuple[int, int, int]:
    """d, v, R."""
    assert config.head_dim is not None
    assert config.rotary_dim is not None
    return config.head_dim, config.v_head_dim or config.head_dim, config.rotary_dim


def _attention_matrices(c: SLMConfig, s: LayerShape) -> list[Matrix]:
    """Q, K, V and O; for MLA the queries (compressed first, with a query rank), the compression of latents, and O."""
    D, H, K = c.d_model, s.num_heads, s.num_kv_heads
    d, v, R = _dims(c)
    if c.attention != "mla":
        return [(H * d, D), (K * d, D), (K * d, D), (D, H * d)]
    queries = [(c.q_rank, D), (H * (d + R), c.q_rank)] if c.q_rank else [(H * (d + R), D)]
    return [*queries, (c.kv_rank + R, D), (D, H * v)]


def _absorbed_params(c: SLMConfig, s: LayerShape) -> int:
    """L H (d + v): what MLA expands a latent with, or absorbs."""
    d, v, _ = _dims(c)
    return c.kv_rank * s.num_heads * (d + v) if c.attention == "mla" else 0


def _attention_biases(c: SLMConfig, s: LayerShape) -> int:
    d, _, R = _dims(c)
    out = c.d_model if c.attention_bias else 0
    if not c.qkv_bias:
        return out
    if c.attention != "mla":
        return out + (s.num_heads + 2 * s.num_kv_heads) * d
    # With a query rank the bias sits on the compression, as in DeepSeek-V2 (arXiv 2405.04434), else on the projection.
    return out + (c.q_rank or s.num_heads * (d + R)) + c.kv_rank + R


def _attention_params(c: SLMConfig, s: LayerShape) -> int:
    return _elements(_attention_matrices(c, s)) + _absorbed_params(c, s) + _attention_biases(c, s)


def _elements(matrices: Iterable[Matrix]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def _norm_params(c: SLMConfig) -> int:
    return c.d_model * (c.norm_weight + bool(c.norm_bias))


def _attention_norm_params(c: SLMConfig) -> int:
    extra = c.q_rank + c.kv_rank if c.attention == "mla" else 2 * _dims(c)[0] * c.qk_norm
    return _norm_params(c) + extra


def _ffn_norm_params(c: SLMConfig) -> int:
    return 0 if c.block == "parallel_shared_norm" else _norm_params(c)


def _ffn_matrices(c: SLMConfig, s: LayerShape) -> list[Matrix]:
    D, F = c.d_model, s.ffn_dim
    return [(F, D)] * (2 if c.ffn == "gated" else 1) + [(D, F)]


def _ffn_biases(c: SLMConfig, s: LayerShape) -> int:
    return ((2 if c.ffn == "gated" else 1) * s.ffn_dim + c.d_model) * c.ffn_bias


def _ffn_params(c: SLMConfig, s: LayerShape) -> int:
    return _elements(_ffn_matrices(c, s)) + _ffn_biases(c, s)


def _series_params(c: SLMConfig, s: LayerShape) -> int:
    n = c.series_activation
    return 0 if n == 1 else 2 * n * (s.ffn_dim if c.series_mode == "channel" else 1)


def _shortcut_matrices(c: SLMConfig) -> list[Matrix]:
    """T bottlenecks D -> D // r -> D without bias, side by side (PanGu-pi, arXiv 2312.17276)."""
    inner = c.augmented_shortcuts * (c.d_model // c.shortcut_reduction)
    return [(inner, c.d_model), (c.d_model, inner)] if inner else []


def _shortcut_params(c: SLMConfig) -> int:
    return _elements(_shortcut_matrices(c))


# --- floating-point operations ----------------------------------------------------------------


def decode_flops(config: SLMConfig, context: int) -> int:
    """FLOPs of decoding one token against `context` cached rows.

    Raises:
        InvalidConfig: if `context` is not within 0 and config.context - 1.
    """
    return sum(decode_flops_by_component(config, context).values())


def prefill_flops(config: SLMConfig, tokens: int, *, every_logit: bool = False) -> int:
    """FLOPs of running `tokens` tokens from an empty cache.

    Args:
        config: the architecture.
        tokens: how many, S.
        every_logit: logits of all S positions (`SLM.forward`, training) instead of the last one (`SLM.prefill`).

    Raises:
        InvalidConfig: if `tokens` is not within 1 and config.context.
    """
    return sum(prefill_flops_by_component(config, tokens, every_logit=every_logit).values())


def decode_flops_by_component(config: SLMConfig, context: int) -> dict[str, int]:
    """FLOPs of one decode step; components as in `prefill_flops_by_component`.

    Scores and their sum over values take 2 C H (d + d) in plain attention. Absorbed MLA attends over latents:
    2 C H (2 L + R), and its up-projections act on one row only.

    Raises:
        InvalidConfig: if `context` is not within 0 and config.context - 1.
    """
    _check("context", context, 0, config.context - 1)
    return _flops(config, tokens=1, pairs=context, logits=1, absorbed=True)


def prefill_flops_by_component(config: SLMConfig, tokens: int, *, every_logit: bool = False, masked: bool = True) -> dict[str, int]:
    """FLOPs of a prefill: attention_projections, attention_scores, ffn, shortcuts (if any), head.

    Scores and their sum over values take 2 S^2 H (d + v), with d + R in place of d for MLA, which expands its latents.

    Args:
        config: the architecture.
        tokens: how many, S.
        every_logit: as in `prefill_flops`.
        masked: count the masked half of the square too; without it there are S (S + 1) / 2 pairs instead of S^2.

    Raises:
        InvalidConfig: if `tokens` is not within 1 and config.context.
    """
    _check("tokens", tokens, 1, config.context)
    pairs = tokens * tokens if masked else tokens * (tokens + 1) // 2
    return _flops(config, tokens=tokens, pairs=pairs, logits=tokens if every_logit else 1, absorbed=False)


def _flops(config: SLMConfig, *, tokens: int, pairs: int, logits: int, absorbed: bool) -> dict[str, int]:
    """`pairs` of a query and a key have a score."""
    c, D = config, config.d_model
    d, v, R = _dims(c)
    shapes = c.layers()
    into = 3 if c.ffn == "gated" else 2
    # Each weight element of a projection is one multiply-add a token, so biases apart FLOPs are 2 S times elements.
    unbiased = sum(_elements(_attention_matrices(c, s)) + _absorbed_params(c, s) for s in shapes)
    latent_width = 2 * c.kv_rank + R if absorbed else d + R + v
    width = latent_width if c.attention == "mla" else 2 * d
    found = {
        "attention_projections": 2 * tokens * unbiased,
        "attention_scores": 2 * pairs * width * sum(s.num_heads for s in shapes),
        "ffn": 2 * tokens * into * D * sum(s.ffn_dim for s in shapes),
        "shortcuts": 2 * tokens * len(shapes) * _shortcut_params(c),
        "head": 2 * logits * D * c.vocab_size,
    }
    if not c.augmented_shortcuts:
        del found["shortcuts"]
    return found


# --- bytes -------------------------------------------------------------------------------------


def param_bytes(config: SLMConfig, precision: Precision = "fp32") -> int:
    """Bytes of the unique parameters, the scales of their precision included."""
    c, D, V = config, config.d_model, config.vocab_size
    attentions, ffns = _unique(c)
    matrices = [(V, D)] if c.tie_embeddings else [(V, D), (V, D)]
    matrices += [m for s in attentions for m in (*_attention_matrices(c, s), *_shortcut_matrices(c))]
    matrices += [m for s in ffns for m in _ffn_matrices(c, s)]
    return _matrix_bytes(matrices, precision) + (params(c) - _elements(matrices)) * _FLOAT


def weight_bytes(config: SLMConfig, precision: Precision = "fp32") -> int:
    """Bytes of the constants a device holds: unique parameters and the rotary table (context x R float32 values).

    The table is not a parameter: it is computed, but it has to be stored.
    """
    return param_bytes(config, precision) + config.context * _dims(config)[2] * _FLOAT


def _matrix_bytes(matrices: Iterable[Matrix], precision: Precision) -> int:
    return sum(matrix_bytes(rows, columns, precision) for rows, columns in matrices)


def kv_values_per_token(config: SLMConfig) -> int:
    """Cached values one token adds over all effective layers: 2 K d a layer, or L + R for MLA.

    MLA: DeepSeek-V2, arXiv 2405.04434. Sharing weights shares no cache.
    """
    d, _, R = _dims(config)
    if config.attention == "mla":
        return config.num_layers * (config.kv_rank + R)
    return sum(2 * s.num_kv_heads * d for s in config.layers())


def kv_bytes_per_token(config: SLMConfig) -> int:
    """Bytes one token adds to the cache."""
    return kv_values_per_token(config) * _FLOAT


def kv_bytes(config: SLMConfig, context: int) -> int:
    """Bytes of a cache of `context` rows.

    Raises:
        InvalidConfig: if `context` is not within 0 and config.context.
    """
    _check("context", context, 0, config.context)
    return context * kv_bytes_per_token(config)


def bytes_read_by_component(config: SLMConfig, *, tokens: int = 1, context: int = 0, precision: Precision = "fp32") -> dict[str, int]:
    """Bytes one pass over `tokens` tokens reads against `context` cached rows, by component, zeros left out.

    One token is a decode step, more with no cached rows a prefill. Every effective layer reads its weights;
    embedding and position tables (rotary's too) are read by row; the head reads its whole matrix, tied or not.

    Raises:
        InvalidConfig: if tokens and cached rows together exceed config.context.
    """
    _check("tokens", tokens, 1, config.context)
    _check("context", context, 0, config.context - tokens)
    c, D = config, config.d_model
    shapes = c.layers()
    attention = sum(_absorbed_params(c, s) + _attention_biases(c, s) for s in shapes) * _FLOAT
    ffn = sum(_ffn_biases(c, s) for s in shapes) * _FLOAT
    found = {
        "embedding": matrix_bytes(tokens, D, precision),
        "positions": tokens * (D if c.positions == "learned" else _dims(c)[2]) * _FLOAT,
        "attention": attention + sum(_matrix_bytes(_attention_matrices(c, s), precision) for s in shapes),
        "ffn": ffn + sum(_matrix_bytes(_ffn_matrices(c, s), precision) for s in shapes),
        "norm": (len(shapes) * (_attention_norm_params(c) + _ffn_norm_params(c)) + _norm_params(c)) * _FLOAT,
        "activation": sum(_series_params(c, s) for s in shapes) * _FLOAT,
        "shortcuts": len(shapes) * _matrix_bytes(_shortcut_matrices(c), precision),
        "head": matrix_bytes(c.vocab_size, D, precision) + c.vocab_size * int(c.head_bias) * _FLOAT,
        "kv_cache": context * kv_bytes_per_token(c),
    }
    return {name: n for name, n in found.items() if n}


def workspace_bytes(config: SLMConfig, *, tokens: int = 1, context: int = 0) -> int:
    """Bytes of activations alive at once, estimated, for `tokens` tokens against `context` cached rows.

    2 S D (the residual stream and its normalised copy) plus the largest of, over the layers,

    - attention: queries, keys, values and output, S (2 H d + 2 K d), and scores, H (C + S);
      MLA: S (H (d + R) + L + R + H v), the scores, and S H (d + R + v) expanded or 2 H L absorbed (one token),
    - FFN: S F for each branch, and one more for a series' running sum,
    - head: V logits of one position.

    The S x S scores are never there: a prefill holds one row of scores a thread at a time (counted as H of them), a decode
    step one row a head. An estimate of a program that plans its memory well; a measurement's peak is the fact.
    """
    _check("tokens", tokens, 1, config.context)
    _check("context", context, 0, config.context - tokens)
    c, S = config, tokens
    branches = (2 if c.ffn == "gated" else 1) + (c.series_activation > 1)
    largest = max(
        max(_attention_activations(c, s, S, context) for s in c.layers()),
        max(S * branches * s.ffn_dim for s in c.layers()),
        c.vocab_size,
    )
    return (2 * S * c.d_model + largest) * _FLOAT


def _attention_activations(c: SLMConfig, s: LayerShape, S: int, C: int) -> int:
    H, K = s.num_heads, s.num_kv_heads
    d, v, R = _dims(c)
    scores = H * (C + S)
    if c.attention != "mla":
        return S * 2 * (H + K) * d + scores
    unfolded = 2 * H * c.kv_rank if S == 1 else S * H * (d + R + v)
    return S * (H * (d + R) + c.kv_rank + R + H * v) + scores + unfolded


def peak_bytes(config: SLMConfig, *, prompt_tokens: int = 1, context: int | None = None, precision: Precision = "fp32") -> int:
    """Bytes a request needs at its worst moment, estimated: weights + cache + the larger phase's workspace.

    Args:
        config: the architecture.
        prompt_tokens: tokens prefilled at once; 1: the request only decodes.
        context: rows that the cache is made for; None: config.context.
        precision: of the matrices.

    Raises:
        InvalidConfig: if the prompt is longer than the context, or the context than the model's.
    """
    rows = config.context if context is None else context
    _check("context", rows, 1, config.context)
    _check("prompt_tokens", prompt_tokens, 1, rows)
    workspace = max(workspace_bytes(config, tokens=prompt_tokens), workspace_bytes(config, context=rows - 1))
    return weight_bytes(config, precision) + kv_bytes(config, rows) + workspace


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidConfig(
            f"{name}={value} is not within {least} and {most} for this model; choose one that is, or a config with more context"
        )
