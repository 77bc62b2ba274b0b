"""The parts of a step with gradients written down are those of PyTorch, but for rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas import training_kernels
from nas.training_kernels import IGNORED, Rotation, causal_attention, head_gradients
from nas.training_step import Learner
from search_spaces.config import SLMConfig
from search_spaces.model import SLM, Head, attend, rotate

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(B: int, H: int, K: int, S: int, d: int, v: int) -> list[Tensor]:
    """As the model has them: heads between tokens and their width."""
    generator = torch.Generator().manual_seed(S)
    shapes = [(B, S, H, d), (B, S, K, d), (B, S, K, v)]
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


# One row, one part, the sizes around where there is a second and a third part, several windows, groups, MLA's narrower values.
@pytest.mark.parametrize(
    ("B", "H", "K", "S", "d", "v"),
    [(1, 2, 2, 1, 4, 4), (1, 2, 2, 96, 4, 4), (2, 3, 3, 143, 5, 5), (1, 2, 2, 145, 4, 4), (2, 4, 2, 240, 8, 8), (2, 2, 1, 250, 6, 3)],
)
def test_attention_and_its_gradients(B: int, H: int, K: int, S: int, d: int, v: int) -> None:
    given = inputs(B, H, K, S, d, v)
    ours, theirs = causal_attention(*given), attend(*given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((o * weights).sum(), given) for o in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(causal_attention(*given), ours)


def test_large_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(1, 2, 2, 20, 4, 4)
    assert "CausalAttention" in type(causal_attention(*given).grad_fn).__name__
    monkeypatch.setattr(training_kernels, "_MOST_SCORES", 2 * 20 * 20 - 1)
    assert "CausalAttention" not in type(causal_attention(*given).grad_fn).__name__


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_a_large_batch_without_gradients_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    given = inputs(5, 4, 2, 20, 6, 3)
    monkeypatch.setattr(training_kernels, "_MOST_SCORES", rows * 4 * 20 * 20)
    with torch.inference_mode():
        torch.testing.assert_close(causal_attention(*given), attend(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [8, 10])  # the second with two dims that are not turned
def test_rotation_is_the_same_to_the_bit_forth_and_back(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(9, 4, generator=generator)
    rotation = Rotation()
    for S, H in ((5, 2), (9, 2), (7, 2), (7, 1)):  # its tables grow, are cut, and are of another number of heads
        rope = angles[:S].cos(), angles[:S].sin()
        given, weights = torch.randn(2, 2, S, H, width, generator=generator)
        given.requires_grad_()
        ours, theirs = rotation(given, rope), rotate(given, rope)
        assert torch.equal(ours, theirs)
        found, wanted = (torch.autograd.grad((o * weights).sum(), given)[0] for o in (ours, theirs))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_head_gradients_are_added_to_what_is_there(bias: bool) -> None:
    config = SLMConfig.from_dict({"vocab_size": 50, "d_model": 8, "num_layers": 1, "num_heads": 1, "context": 16, "head_bias": bias})
    torch.manual_seed(0)
    head = Head(config, None)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    h_nD = torch.randn(12, 8, requires_grad=True)
    targets = torch.randint(0, 50, (12,))
    targets[3] = targets[11] = IGNORED
    count = torch.tensor(7)  # not that of these targets: they may be a portion of more
    loss = F.cross_entropy(F.linear(h_nD, head.weight, head.bias), targets, ignore_index=IGNORED, reduction="sum") / count
    variables = [h_nD, head.weight, *([] if head.bias is None else [head.bias])]
    wanted = torch.autograd.grad(loss, variables)
    for times in (1, 2):
        found, gradient_nD = head_gradients(head, h_nD, targets, count)
        assert found.item() == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradient_nD, wanted[0], rtol=1e-5, atol=1e-7)
        for variable, gradient in zip(variables[1:], wanted[1:], strict=True):
            torch.testing.assert_close(variable.grad, times * gradient, rtol=1e-5, atol=1e-7)


def test_a_target_that_is_nearly_impossible_has_a_finite_loss_and_its_whole_gradient() -> None:
    head = Head(SLMConfig.from_dict({"vocab_size": 4, "d_model": 4, "num_layers": 1, "num_heads": 1, "context": 8}), None)
    with torch.no_grad():
        head.weight.copy_(200 * torch.eye(4))
    loss, gradient_nD = head_gradients(head, torch.eye(4)[:1], torch.tensor([1]), torch.tensor(1))
    assert loss.item() == pytest.approx(87.3, abs=0.1)
    torch.testing.assert_close(gradient_nD, torch.tensor([[200.0, -200.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    "values",
    [
        {"attention": "mla", "kv_rank": 8, "tie_embeddings": False},
        {"attention": "mqa", "num_kv_heads": 1, "block": "parallel", "qk_norm": True},
        {"positions": "learned", "norm": "layernorm", "head_bias": True, "embedding_scale": 4.0},
    ],
)
def test_a_step_is_that_of_pytorchs_own_parts(values: dict[str, object]) -> None:
    config = SLMConfig.from_dict({"vocab_size": 61, "d_model": 16, "num_layers": 2, "num_heads": 2, "context": 128, **values})
    ids = torch.randint(0, 61, (2, 121), generator=torch.Generator().manual_seed(0))
    ours = SLM(config).initialise(0)
    theirs = copy.deepcopy(ours)
    loss = F.cross_entropy(theirs(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    learner = Learner(ours, 1e-3)
    found = learner._add_gradients(ids[:, :-1], ids[:, 1:], torch.tensor(240))
    assert [value.item() for value in found] == pytest.approx([loss.item()], rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_steps_are_the_same_to_the_bit() -> None:
    config = SLMConfig.from_dict({"vocab_size": 61, "d_model": 16, "num_layers": 2, "num_heads": 4, "context": 256})
    ids = torch.randint(0, 61, (1, 251), generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):
        learner = Learner(SLM(config).initialise(0), 1e-3)
        losses = [learner.step([(ids[:, :-1], ids[:, 1:])], 1.0).item() for _ in range(3)]
        runs.append((losses, [p.detach() for p in learner.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
