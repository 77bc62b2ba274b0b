"""The program that leaves: prefills of several lengths over the stages that a search compiles, and a sample that covers them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import configs

from cost_models.program import build_program, build_serving_program, prefill_name, prefill_sizes
from cost_models.serving import serving_sample
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.workload import RequestTokens
from targets.arrays import ArrayFile
from targets.program import ROWS

BASE: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "num_layers": 3, "num_heads": 4, "ffn_dim": 40, "context": 32}


@pytest.mark.parametrize(
    ("context", "sizes"),
    [(2, (2,)), (16, (16,)), (17, (16, 17)), (64, (16, 64)), (1000, (16, 64, 256, 1000)), (1024, (16, 64, 256, 1024))],
)
def test_sizes_are_powers_of_four_up_to_the_context(context: int, sizes: tuple[int, ...]) -> None:
    assert prefill_sizes(SLMConfig(**{**BASE, "context": context})) == sizes


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_every_size_ends_in_its_own_head_and_the_rest_is_what_a_search_compiles(config: SLMConfig) -> None:
    program = build_serving_program(config)
    assert set(program.functions) == {"decode", *(prefill_name(size) for size in prefill_sizes(config))}
    assert program.bounds == {"C": config.context}
    for size in prefill_sizes(config):
        function = program.functions[prefill_name(size)]
        assert function.last == "last"
        assert function.inputs["last"].shape == (1,)
        assert not set(function.inputs) & set(program.state)
        assert {name.removesuffix(ROWS) for name in function.outputs[1:]} == set(program.state)
        if size < config.context:
            searched = build_program(config, RequestTokens(prompt=size, generated=1))
            assert [call.stage for call in function.calls[:-1]] == [call.stage for call in searched.functions["prefill"].calls[:-1]]
            assert function.calls[-1].stage != searched.functions["prefill"].calls[-1].stage
            assert searched.functions["decode"] == program.functions["decode"]
            assert searched.weights == program.weights


def test_a_padded_head_gives_the_logits_of_the_row_it_is_told() -> None:
    config = SLMConfig(**BASE, norm="layernorm", head_bias=True)
    program = build_serving_program(config)
    stage = program.stages[program.functions["prefill_16"].calls[-1].stage].export().module()
    generator = torch.Generator().manual_seed(0)
    x_1SD = torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for last in (0, 7, 15):
            (logits,) = stage(x_1SD, torch.tensor([last]))
            assert logits.shape == (1, 1, 61)
            (alone,) = stage(x_1SD[:, last : last + 1].expand(1, 16, 32), torch.tensor([3]))
            assert torch.equal(logits, alone)


@pytest.mark.parametrize("context", [2, 16, 40])
def test_the_sample_covers_every_function_and_its_logits_are_those_of_prompts_without_padding(context: int, tmp_path: Path) -> None:
    config = SLMConfig(**{**BASE, "context": context})
    model = SLM(config).initialise(0).eval()
    sample = serving_sample(model)
    assert {step.function for step in sample.steps} == set(build_serving_program(config).functions)
    sample.write(tmp_path / "sample.safetensors")
    arrays = ArrayFile(tmp_path / "sample.safetensors")
    ids: list[int] = []
    for step in sample.steps:
        tokens, positions = arrays.read(step.inputs["tokens"])[0], arrays.read(step.inputs["positions"])
        if "last" in step.inputs:
            last = int(arrays.read(step.inputs["last"])[0])
            assert last < len(tokens) - (context > 2)
            ids = tokens[: last + 1].tolist()
            assert positions.tolist() == list(range(len(tokens)))
        else:
            assert positions.tolist() == [len(ids)]
            ids.append(int(tokens[0]))
        with torch.inference_mode():
            expected = model(torch.tensor([ids]))[0, -1].numpy()
        assert np.allclose(arrays.read(step.expected["logits"]).ravel(), expected, atol=1e-5)
        assert len(ids) <= context


def test_rounding_leaves_the_given_model_alone(tmp_path: Path) -> None:
    model = SLM(SLMConfig(**BASE)).initialise(0)
    before = model.embed.tokens.weight.clone()
    serving_sample(model, "int4").write(tmp_path / "sample.safetensors")
    assert torch.equal(before, model.embed.tokens.weight)
