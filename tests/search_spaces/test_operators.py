"""The operators against PyTorch's own attention over the whole sequence, and how an exported program shows them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from search_spaces.operators import cached_attention, latent_attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "width", "value_width"), [(1, 4, 4, 8, 8), (2, 6, 2, 5, 7), (3, 4, 1, 6, 3)])
def test_cached_attention_is_the_last_row_of_full_attention(
    rows: int, batch: int, heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    q = normal(batch, 1, heads, width)
    k, v = normal(batch, rows + 1, kv_heads, width, seed=1), normal(batch, rows + 1, kv_heads, value_width, seed=2)
    got = torch.ops.edgewise.cached_attention(q, k[:, :rows], v[:, :rows], k[:, rows:], v[:, rows:], 0.3)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert got.shape == (batch, 1, heads, value_width)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_latent_attention_is_attention_whose_keys_are_latents_beside_rotary_keys(rows: int) -> None:
    batch, heads, rank, rotary = 2, 5, 7, 4
    q, q_rope = normal(batch, heads, rank), normal(batch, heads, rotary, seed=1)
    c, k_rope = normal(batch, rows + 1, rank, seed=2), normal(batch, rows + 1, rotary, seed=3)
    got = torch.ops.edgewise.latent_attention(q, q_rope, c[:, :rows], k_rope[:, :rows], c[:, rows:], k_rope[:, rows:], 0.3)
    queries, keys = torch.cat((q, q_rope), -1)[:, :, None], torch.cat((c, k_rope), -1)[:, None]
    expected = F.scaled_dot_product_attention(queries, keys.expand(-1, heads, -1, -1), c[:, None].expand(-1, heads, -1, -1), scale=0.3)
    torch.testing.assert_close(got, expected[:, :, 0], atol=1e-12, rtol=0)


class Both(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, row: Tensor, latents: Tensor, ropes: Tensor) -> Tensor:
        plain = torch.ops.edgewise.cached_attention(q, k, v, row, row, 1 / math.sqrt(8))
        absorbed = torch.ops.edgewise.latent_attention(q[:, 0], q[:, 0], latents, ropes, latents[:, :1], ropes[:, :1], 0.5)
        return plain[:, 0] + absorbed


def exported() -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    args = (normal(1, 1, 2, 8), normal(1, 6, 2, 8), normal(1, 6, 2, 8), normal(1, 1, 2, 8), normal(1, 6, 8), normal(1, 6, 8))
    rows = {1: Dim("C", min=2, max=1000)}
    return export(Both(), args, dynamic_shapes=(None, rows, rows, None, rows, rows), strict=False), args


def targets(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_an_exported_program_keeps_each_call_as_one_node() -> None:
    names = targets(exported()[0])
    assert [name for name in names if name.startswith("edgewise.")] == [
        "edgewise.cached_attention.default",
        "edgewise.latent_attention.default",
    ]
    assert not any("softmax" in name or "matmul" in name for name in names)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch warns about its own internals
def test_decomposed_it_is_made_of_pytorchs_operators_and_gives_the_same_for_any_number_of_rows() -> None:
    program, args = exported()
    plain = program.run_decompositions()
    assert all(name.startswith(("aten.", "<built-in", "sym_size")) for name in targets(plain))
    torch.testing.assert_close(plain.module()(*args), Both()(*args), atol=1e-12, rtol=0)
    q, k, v, row, latents, ropes = args
    longer = (q, torch.cat((k, v), 1), torch.cat((v, k), 1), row, torch.cat((latents, ropes), 1), torch.cat((ropes, latents), 1))
    torch.testing.assert_close(plain.module()(*longer), Both()(*longer), atol=1e-12, rtol=0)


def test_gradients_flow_through_both() -> None:
    q, k, v, row = (normal(1, n, 2, 4, seed=n).requires_grad_() for n in (1, 5, 5, 1))
    assert torch.autograd.gradcheck(lambda *a: torch.ops.edgewise.cached_attention(*a, row, row, 0.5), (q, k, v))
    c, r = normal(1, 5, 4).requires_grad_(), normal(1, 5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, r: torch.ops.edgewise.latent_attention(q[:, 0], q[:, 0, :, :3], c[:, :4], r[:, :4], c[:, 4:], r[:, 4:], 0.5), (c, r)
    )


def test_the_functions_are_what_the_operators_run() -> None:
    args = (normal(1, 1, 2, 8), normal(1, 6, 2, 8), normal(1, 6, 2, 8), normal(1, 1, 2, 8), normal(1, 1, 2, 8), 0.3)
    assert torch.equal(cached_attention(*args), torch.ops.edgewise.cached_attention(*args))
    latents = (normal(1, 2, 8), normal(1, 2, 4), normal(1, 6, 8), normal(1, 6, 4), normal(1, 1, 8), normal(1, 1, 4), 0.3)
    assert torch.equal(latent_attention(*latents), torch.ops.edgewise.latent_attention(*latents))
