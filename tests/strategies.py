"""Small random architectures that between them use every choice a config has."""

import random
from typing import Any

from hypothesis import strategies as st

from search_spaces.config import SLMConfig, shared_index


def configs() -> st.SearchStrategy[SLMConfig]:
    """Valid configs of 1 to 5 layers and widths of 16 to 64, for hypothesis."""
    return st.randoms(use_true_random=False).map(random_config)


def random_config(rng: random.Random, max_layers: int = 5) -> SLMConfig:
    """A valid config, small enough to run in milliseconds; the same for the same generator state."""
    num_layers, d_model = rng.randint(1, max_layers), rng.randint(16, 64)
    norm = rng.choice(["layernorm", "rmsnorm"])
    sharing = _sharing(rng, num_layers)
    values: dict[str, Any] = {
        "vocab_size": rng.randint(50, 300),
        "d_model": d_model,
        "num_layers": num_layers,
        "context": rng.randint(24, 48),
        "qkv_bias": rng.random() < 0.4,
        "attention_bias": rng.random() < 0.4,
        "ffn": rng.choice(["gated", "standard"]),
        "activation": rng.choice(["relu", "gelu", "gelu_tanh", "silu"]),
        "ffn_bias": rng.random() < 0.4,
        "norm": norm,
        "norm_bias": rng.choice([None, True, False]) if norm == "layernorm" else None,
        "norm_eps": rng.choice([1e-6, 1e-5]),
        "block": rng.choice(["sequential", "parallel", "parallel_shared_norm"]),
        "tie_embeddings": rng.random() < 0.5,
        "head_bias": rng.random() < 0.3,
        "embedding_scale": rng.choice([1.0, d_model**0.5, 0.5]),
        "series_activation": rng.choice([1, 1, 2, 3]),
        "series_mode": rng.choice(["scalar", "channel"]),
        "augmented_shortcuts": rng.choice([0, 0, 1, 2]),
        "shortcut_reduction": rng.choice([1, 3, 8]),
        **sharing,
        **_attention(rng, num_layers, sharing),
        "ffn_dim": rng.choice([None, _per_layer(rng, num_layers, sharing, "ffn", lambda: rng.randint(5, 40))]),
    }
    if norm == "layernorm" and not values["norm_bias"] and rng.random() < 0.4:
        values |= {"norm_weight": False, "norm_bias": None}
    return SLMConfig(**values)


def _sharing(rng: random.Random, num_layers: int) -> dict[str, Any]:
    sharing = rng.choice(["none", "sequence", "cycle", "cycle_rev"])
    fits = {
        "none": [],
        # A sequence of ceil(N / M) repeats must reach the last unique layer.
        "sequence": [m for m in range(1, num_layers) if shared_index(num_layers - 1, num_layers, m, "sequence") == m - 1],
        "cycle": list(range(1, num_layers)),
        "cycle_rev": list(range(1, num_layers // 2 + 1)) if num_layers > 1 else [],
    }[sharing]
    if not fits:
        return {}
    return {"sharing": sharing, "num_unique_layers": rng.choice(fits), "shared_parts": rng.choice(["both", "attention", "ffn"])}


def _per_layer(rng: random.Random, num_layers: int, sharing: dict[str, Any], part: str, draw: Any) -> Any:
    """One size for all layers, or one for each of the unique parts they use."""
    if rng.random() < 0.5:
        return draw()
    shared = sharing and sharing["shared_parts"] in ("both", part)
    indices = [shared_index(i, num_layers, sharing["num_unique_layers"], sharing["sharing"]) if shared else i for i in range(num_layers)]
    sizes = [draw() for _ in range(num_layers)]
    return [sizes[i] for i in indices]


def _attention(rng: random.Random, num_layers: int, sharing: dict[str, Any]) -> dict[str, Any]:
    kind = rng.choice(["mha", "gqa", "mqa", "mla"])
    head_dim = rng.randint(2, 17)
    values: dict[str, Any] = {"attention": kind, "head_dim": head_dim}
    if kind == "gqa":
        # Layers differ in their key/value heads, or in how many queries share each; never all of them trivial.
        kv_heads = _per_layer(rng, num_layers, sharing, "attention", lambda: rng.randint(2, 3))
        group = rng.randint(2, 3)
        heads = [k * group for k in kv_heads] if isinstance(kv_heads, list) else kv_heads * group
        values |= {"num_heads": heads, "num_kv_heads": kv_heads}
    else:
        values["num_heads"] = _per_layer(rng, num_layers, sharing, "attention", lambda: rng.randint(2, 4))
    if kind == "mla":
        return values | {
            "q_rank": rng.choice([0, rng.randint(3, 12)]),
            "kv_rank": rng.randint(3, 12),
            "v_head_dim": rng.choice([None, rng.randint(3, 9)]),
            "rotary_dim": rng.choice([None, 2, 4, 6]),
            "rope_theta": rng.choice([1e4, 1e5]),
        }
    values["qk_norm"] = rng.random() < 0.4
    if rng.random() < 0.3:
        return values | {"positions": "learned", "position_offset": rng.randint(0, 2)}
    return values | {"rotary_dim": 2 * rng.randint(1, head_dim // 2), "rope_theta": rng.choice([1e4, 1e5])}
