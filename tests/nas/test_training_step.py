"""One step of training: portions and parts change nothing but the rounding, and precision is of products alone."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nas import training_step
from nas.training_kernels import IGNORED
from nas.training_step import Learner, peak_rates, schedule
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**values: object) -> SLMConfig:
    return SLMConfig.from_dict({"vocab_size": 61, "d_model": 16, "num_layers": 2, "num_heads": 2, "context": 32, **values})


def batch(rows: int, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].clone()


def after(portions: list[tuple[torch.Tensor, torch.Tensor]], steps: int = 3, **values: object) -> tuple[list[torch.Tensor], list[float]]:
    learner = Learner(SLM(config(**values)).initialise(0), 1e-3)
    losses = [learner.step(portions, 1.0).item() for _ in range(steps)]
    return [p.detach() for p in learner.model.parameters()], losses


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 1, 2, 8], list(range(9))])
def test_portions_are_as_one_batch(cuts: list[int]) -> None:
    inputs, targets = batch(8)
    targets[2, 5:] = IGNORED  # portions with unlike numbers of targets count by them
    targets[7, 1:] = IGNORED
    whole, losses = after([(inputs, targets)])
    parts, losses_of_parts = after([(inputs[a:b], targets[a:b]) for a, b in itertools.pairwise(cuts)])
    assert losses_of_parts == pytest.approx(losses, rel=1e-6)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    # A step on half of them is another one.
    other, _ = after([(inputs[:4], targets[:4])])
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=2e-6) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("values", [{}, {"tie_embeddings": False, "head_bias": True, "norm": "layernorm"}])
@pytest.mark.parametrize("tokens", [1, 7, 95, 96])
def test_logits_made_in_parts_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch, values: dict[str, object], tokens: int) -> None:
    inputs, targets = batch(8)
    targets[1, 3] = IGNORED
    model = SLM(config(**values)).initialise(1)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()  # type: ignore[no-untyped-call]
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(training_step, "_HEAD_TOKENS", tokens)
    learner = Learner(model, 1e-3)
    losses = learner._add_gradients(inputs, targets, (targets != IGNORED).sum())
    assert len(losses) == math.ceil(96 / tokens)
    assert torch.stack(losses).sum().item() == pytest.approx(loss.item(), rel=1e-6)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(wanted) == len(list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bf16_is_close_and_keeps_weights_in_float32() -> None:
    portions = [batch(8)]
    exact = Learner(SLM(config()).initialise(0), 1e-3)
    rough = Learner(SLM(config()).initialise(0), 1e-3, arithmetic="bf16")
    a, b = ([learner.step(portions, 1.0).item() for _ in range(5)] for learner in (exact, rough))
    assert a != b
    assert b == pytest.approx(a, rel=5e-3)
    assert b[-1] < b[0]
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}


def test_both_decays_rise_alike_and_end_near_zero() -> None:
    straight, cosine = ([schedule(i, 200, decay) for i in range(200)] for decay in ("linear", "cosine"))  # type: ignore[arg-type]
    assert straight[:10] == cosine[:10]
    assert max(cosine) == 1.0
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    # Half a cosine after the rise: (1 + cos(pi x)) / 2 with x the share of the fall that is done.
    assert cosine[105] == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)
    assert cosine[58] == pytest.approx((1 + math.cos(math.pi * 48 / 190)) / 2)
    assert 0 < cosine[-1] < straight[-1] < 0.01


def test_rates_by_size() -> None:
    assert peak_rates(config(d_model=128, num_layers=4), 1e-3) == pytest.approx((1e-3, 1e-3 * 1.5e-2 / 8e-4))
    assert peak_rates(config(d_model=512, num_layers=16), 1e-3)[0] == pytest.approx(1e-3 / 8)


def test_clipping_bounds_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def noted(parameters: list[torch.Tensor], most: float) -> torch.Tensor:
        before = real(parameters, most)
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    model = SLM(config(embedding_scale=50.0)).initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(40)  # far off: large gradients
    Learner(model, 1e-3).step([batch(4)], 1.0)
    assert norms == pytest.approx([1.0], rel=1e-4)
