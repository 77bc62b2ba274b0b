"""Stages that no model here has: what the importer joins and packs is right for them, too."""

import numpy as np
import pytest
import torch
import tvm
from kernel_helpers import llvm_target
from torch import Tensor, nn
from torch.export import export
from tvm import relax

from targets.cpu import Cpu
from targets.program import Stage
from targets.tvm_compile import lower_stage

CPU = Cpu(vector_bytes=32, registers=16, cores=2)


class _Reused(nn.Module):
    """Weights that multiply more than one input, alone and beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({name: nn.Linear(24, 40, bias=name == "b") for name in "abc"})

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.part.values()
        return a(x) + b(x), a(y) * c(y)


class _Joined(nn.Module):
    """Three weights of one input, none of them whole tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"a": nn.Linear(24, 40), "b": nn.Linear(24, 7, bias=False), "c": nn.Linear(24, 33)})

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = self.part.values()
        return a(x), b(x), torch.relu(c(x)) + y


class _Wrapper(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.stage(x, y)
        return outputs


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("stage", [_Reused, _Joined])
def test_weights_that_share_an_input_are_joined_only_where_that_is_right(stage: type[nn.Module], rows: int) -> None:
    torch.manual_seed(0)
    module = _Wrapper(stage()).eval()
    inputs = torch.randn(1, rows, 24), torch.randn(1, rows, 33 if stage is _Joined else 24)
    lowered = lower_stage(Stage(key="stage", export=lambda: export(module, inputs, strict=False)), CPU)
    names = [weight.names for weight in lowered.weights]
    assert (("part.a.weight", "part.b.weight", "part.c.weight") in names) == (stage is _Joined)
    target = llvm_target()
    with target:
        machine = relax.VirtualMachine(tvm.compile(lowered.module, target), tvm.cpu())
    state = module.stage.state_dict()
    arrays = [*(x.numpy() for x in inputs), *(weight.apply(lambda name: state[name].numpy()) for weight in lowered.weights)]
    found = machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cpu()) for array in arrays))
    with torch.no_grad():
        expected = module(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-5)
