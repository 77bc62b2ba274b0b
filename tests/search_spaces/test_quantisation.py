"""Weights in fewer bits: what the rounding may lose, and that every consumer computes with the same numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.precision import GROUP, PRECISIONS, Precision
from search_spaces.quantisation import bits, dequantise, quantise, quantised_names, round_weights, stored_tensors
from search_spaces.stages import stage_uses

FEWER: tuple[Precision, ...] = ("fp16", "int8", "int4")
CONFIG = SLMConfig(vocab_size=50, d_model=40, num_layers=2, num_heads=4, ffn_dim=72)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 9), columns=st.integers(1, 100), scale=st.sampled_from([1e-3, 0.02, 1.0, 50.0]))
@pytest.mark.parametrize("precision", FEWER)
def test_a_value_is_off_by_at_most_a_step(precision: Precision, rows: int, columns: int, scale: float) -> None:
    weight = scale * matrix(rows, columns, seed=rows * columns)
    values, scales = quantise(weight, precision)
    found = dequantise(values, scales, bits(precision))
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    if scales is None:
        step = weight.abs() * 2.0**-10 + 1e-7
    elif precision == "int8":
        step = 0.501 * scales
    else:
        # -8 … 7: the largest value of the sign opposite to the group's extreme may be cut by a whole step.
        step = (1.01 * scales.float().abs()).repeat_interleave(GROUP, dim=1)[:, :columns] + weight.abs() * 1e-3
    assert bool(((found - weight).abs() <= step).all())


@pytest.mark.parametrize("precision", FEWER)
def test_rounding_twice_is_rounding_once(precision: Precision) -> None:
    once = dequantise(*quantise(matrix(20, 70), precision), bits(precision))
    twice = dequantise(*quantise(once, precision), bits(precision))
    # The scale of the rounded weight is that of the weight but for one more rounding to float16.
    assert torch.allclose(once, twice, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_zeros_and_values_too_small_for_a_scale_become_zeros(precision: Precision) -> None:
    for weight in (torch.zeros(3, 40), torch.full((3, 40), 0.0 if precision == "int8" else 1e-12)):
        values, scales = quantise(weight, precision)
        assert scales is not None
        assert not values.any()
        assert not dequantise(values, scales, bits(precision)).any()


def test_int4_is_ggufs_q4_0() -> None:
    """The value of largest magnitude of a group of 32 becomes -8 exactly, as llama.cpp's Q4_0 has it."""
    weight = matrix(4, 64)
    values, scales = quantise(weight, "int4")
    assert scales is not None
    groups = weight.view(4, 2, 32)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    assert bool((values.view(4, 2, 32).amin(dim=2) == -8).all())
    assert torch.equal(scales, (extreme / -8).half())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_rounded_model_and_the_stored_tensors_are_the_same_weights(precision: Precision) -> None:
    model = SLM(CONFIG).initialise(0)
    stored = {name: tensor.clone() for name, tensor, _ in stored_tensors(model, precision)}
    names = list(quantised_names(model))
    assert len(names) == 1 + 2 * 7  # the tied table, and seven matrices a layer
    round_weights(model, precision)
    for name, parameter in model.named_parameters():
        if precision == "fp32" or name not in names:
            assert torch.equal(stored[name], parameter)
        else:
            found = dequantise(stored[f"{name}_values"], stored.get(f"{name}_scales"), bits(precision))
            assert torch.equal(found, parameter)


@pytest.mark.parametrize("precision", FEWER)
def test_a_stage_in_fewer_bits_gives_what_the_rounded_block_gives(precision: Precision) -> None:
    """The exported program, run by PyTorch after its own decompositions, is bit-identical to the rounded model."""
    model = SLM(CONFIG).initialise(0).eval()
    stored = {name: tensor for name, tensor, _ in stored_tensors(model, precision)}
    use = next(use for use in stage_uses(CONFIG, "prefill", 5, precision) if use.spec.kind == "block")
    program = use.spec.export()
    assert "edgewise.dequantise" in str(program.graph)
    module = program.module()
    state = {f"stage.{local}": stored[name] for local, name in use.weights.items()}
    module.load_state_dict(state, strict=False)
    assert set(state) <= set(module.state_dict())
    x, half = matrix(1, 5 * 40).view(1, 5, 40), (CONFIG.rotary_dim or 0) // 2
    rope = (matrix(5, half, seed=1), matrix(5, half, seed=2))
    round_weights(model, precision)
    with torch.no_grad():
        expected, rows = model.block(0).prefill(x, rope)
        found = module(x, *rope)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], rows[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stages_of_different_bits_are_different(precision: Precision) -> None:
    keys = {use.spec.key for use in stage_uses(CONFIG, "decode", 1, precision)}
    others = {use.spec.key for other in PRECISIONS if other != precision for use in stage_uses(CONFIG, "decode", 1, other)}
    assert not keys & others


def test_values_are_what_numpy_rounds_to() -> None:
    weight = matrix(6, 33)
    values, scales = quantise(weight, "int8")
    assert scales is not None
    np.testing.assert_array_equal(values.numpy(), np.clip(np.rint(weight.numpy() / scales.float().numpy()), -127, 127))
