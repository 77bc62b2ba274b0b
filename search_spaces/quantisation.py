"""Weights in fewer bits, symmetric and bit-identical everywhere: what is scored in PyTorch is what a device computes with.

| precision | values | scales |
|---|---|---|
| fp32 | float32 | none |
| fp16 | float16 | none |
| int8 | int8 in -127 … 127 | float32, one per output channel |
| int4 | int8 in -8 … 7 | float16, one per group of 32 inputs of a channel |

A weight is values times scales. The int4 rule is that of GGUF's Q4_0 (the value of largest magnitude becomes -8), so that
such weights leave for llama.cpp unchanged. Matrices are quantised; norms, biases, learned positions, series terms and the
absorbed matrices of MLA stay float32, being small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from search_spaces.precision import GROUP, Precision

_LARGEST_HALF = 65504.0
VALUES, SCALES = "_values", "_scales"
"""Suffixes of the tensors that a quantised weight becomes."""

_LIBRARY = torch.library.Library("edgewise", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "dequantise(Tensor values, Tensor? scales, int bits) -> Tensor"
)


def dequantise(values: Tensor, scales: Tensor | None, bits: int) -> Tensor:
    """Float32 weights (N, K) of values (N, K) and scales (N, 1 or ceil(K / 32)), None for float16 values."""
    if scales is None:
        return values.float()
    if bits == 4:
        scales = scales.repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]
    return values.float() * scales.float()


# One node in an exported program, so that a target can keep the weight as it is; any other consumer decomposes it.
_LIBRARY.impl("dequantise", dequantise, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def bits(precision: Precision) -> int:
    """Bits of one value."""
    return {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[precision]


def quantise(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """Values and scales of a float32 matrix (N, K); rounding is to nearest, ties to even.

    Scales of int4 are rounded to float16 first and values are taken with the rounded scale, so nothing is lost between the
    two. A channel or group of zeros, or one whose scale float16 cannot hold, has scale 0.
    """
    assert precision != "fp32", "float32 weights are not quantised"
    if precision == "fp16":
        return weight.half(), None
    N, K = weight.shape
    if precision == "int8":
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return _round(weight, scales).clamp_(-127, 127).to(torch.int8), scales
    groups = -(-K // GROUP)
    padded = nn.functional.pad(weight, (0, groups * GROUP - K)).view(N, groups, GROUP)
    largest = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scales = (largest / -8).clamp_(-_LARGEST_HALF, _LARGEST_HALF).half()
    values = _round(padded, scales.float()).clamp_(-8, 7).to(torch.int8)
    return values.view(N, groups * GROUP)[:, :K].contiguous(), scales.view(N, groups)


def _round(weight: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, weight / torch.where(scales == 0, 1.0, scales)).round_()


def quantised_names(module: nn.Module) -> Iterator[str]:
    """Names of the parameters that are quantised: matrices of linear layers and the token embedding."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and name.rpartition(".")[2] == "weight" and "positions." not in name:
            yield name


def quantised_tensors(name: str, precision: Precision) -> dict[str, str]:
    """Names of the tensors that a quantised weight becomes, with their dtypes ("int4" for half bytes)."""
    values = {name + VALUES: {"fp16": "float16", "int8": "int8", "int4": "int4"}[precision]}
    if precision == "fp16":
        return values
    return values | {name + SCALES: "float32" if precision == "int8" else "float16"}


@torch.no_grad()
def stored_tensors(model: nn.Module, precision: Precision) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor a device holds for the model, one at a time: name, tensor, dtype (NumPy's name, or "int4").

    int4 values come as int8. A model on the "meta" device gives shapes alone.
    """
    quantised = set() if precision == "fp32" else set(quantised_names(model))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in quantised:
            yield name, tensor, str(tensor.dtype).removeprefix("torch.")
            continue
        for (part, dtype), value in zip(quantised_tensors(name, precision).items(), quantise(tensor, precision), strict=False):
            assert value is not None, f"{part} is not made in {precision}"
            yield part, value, dtype


@torch.no_grad()
def round_weights(model: nn.Module, precision: Precision) -> nn.Module:
    """Replaces the model's weights by what a device of that precision computes with; returns the model."""
    if precision != "fp32":
        parameters = dict(model.named_parameters())
        for name in quantised_names(model):
            parameters[name].copy_(dequantise(*quantise(parameters[name], precision), bits(precision)))
    return model


class QuantisedStage(nn.Module):
    """A stage whose matrices are values and scales, made float32 by `edgewise::dequantise` where they are used.

    Each quantised parameter NAME of `wrapper.stage` stands beside buffers NAME_values and NAME_scales of the same module.
    """

    def __init__(self, wrapper: nn.Module, precision: Precision) -> None:
        super().__init__()
        stage = wrapper.get_submodule("stage")
        self.stage, self._bits, self._names = stage, bits(precision), list(quantised_names(stage))
        self._wrapper = (wrapper,)  # in a tuple, or its tensors would be listed twice under two names
        for name in self._names:
            path, _, leaf = name.rpartition(".")
            values, scales = quantise(torch.zeros_like(stage.get_parameter(name)), precision)
            stage.get_submodule(path).register_buffer(leaf + VALUES, values)
            if scales is not None:
                stage.get_submodule(path).register_buffer(leaf + SCALES, scales)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The stage's outputs on the dequantised weights."""
        tensors = dict(self.stage.named_buffers())
        weights = {
            f"stage.{name}": torch.ops.edgewise.dequantise(tensors[name + VALUES], tensors.get(name + SCALES), self._bits)
            for name in self._names
        }
        outputs: tuple[Tensor, ...] = torch.func.functional_call(self._wrapper[0], weights, inputs)
        return outputs
