import pytest

from search_spaces.config import InvalidConfig
from search_spaces.layerwise import layerwise_scaling, round_to_multiple

# Figures of the published OpenELM config files.
FFN_270M = (768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120)
KV_1_1B = (4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8)


def test_openelm_270m_sizes():
    sizes = layerwise_scaling(d_model=1280, num_layers=16, head_dim=64)
    assert sizes.num_heads == (12,) * 5 + (16,) * 7 + (20,) * 4
    assert sizes.num_kv_heads == (3,) * 5 + (4,) * 7 + (5,) * 4
    assert sizes.ffn_dim == FFN_270M


def test_openelm_1_1b_heads():
    sizes = layerwise_scaling(d_model=2048, num_layers=28, head_dim=64)
    assert sizes.num_kv_heads == KV_1_1B
    assert sizes.num_heads == tuple(4 * k for k in KV_1_1B)
    assert (sizes.ffn_dim[0], sizes.ffn_dim[1], sizes.ffn_dim[13], sizes.ffn_dim[27]) == (1024, 1280, 4608, 8192)


@pytest.mark.parametrize(
    ("value", "multiple", "rounded"),
    [(1024, 256, 1024), (1100, 256, 1024), (13, 8, 16), (100, 256, 256), (600, 256, 768), (300, 256, 512), (1, 8, 8)],
)
def test_rounding_is_to_the_nearest_but_at_most_a_tenth_down(value, multiple, rounded):
    assert round_to_multiple(value, multiple) == rounded


def test_one_layer_takes_the_minimum():
    one = layerwise_scaling(d_model=1280, num_layers=1, head_dim=64)
    assert (one.num_heads, one.num_kv_heads, one.ffn_dim) == ((12,), (3,), (768,))
    assert layerwise_scaling(d_model=1280, num_layers=1, head_dim=64, beta=(4.0, 0.5)) == one


def test_multi_head_and_shrinking_multipliers():
    sizes = layerwise_scaling(d_model=256, num_layers=3, head_dim=32, alpha=(1.0, 0.5), beta=(4.0, 2.0), kv_group=1, ffn_multiple=32)
    assert sizes.num_heads == sizes.num_kv_heads == (8, 6, 4)
    assert sizes.ffn_dim == (1024, 768, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 is below 1"),
        ({"kv_group": 0}, "kv_group=0 is below 1"),
        ({"alpha": (0.0, 1.0)}, r"alpha=\(0.0, 1.0\) has a multiplier that is not a positive number"),
        ({"beta": (0.5, float("inf"))}, "beta="),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(InvalidConfig, match=message):
        layerwise_scaling(**{"d_model": 128, "num_layers": 4, "head_dim": 16} | change)
