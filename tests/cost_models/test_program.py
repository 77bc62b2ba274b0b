"""A config becomes a program whose names, shapes and identities are those of the model."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import configs, random_config

from cost_models.program import ROWS, build_program, state_name
from search_spaces.config import SLMConfig
from search_spaces.counting import kv_bytes_per_token, params, weight_bytes
from search_spaces.model import SLM
from search_spaces.stages import stage_uses
from search_spaces.workload import RequestTokens
from targets.program import Program

TOKENS = RequestTokens(prompt=9, generated=10)
BASE: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "num_layers": 3, "num_heads": 4, "ffn_dim": 40, "context": 32}


def make(**changes: Any) -> SLMConfig:
    return SLMConfig(**{**BASE, **changes})


def used_weights(program: Program, function: str) -> set[str]:
    return {name for call in program.functions[function].calls for name in call.weights.values()}


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_weights_are_exactly_the_models_parameters_and_its_rotary_table(config: SLMConfig) -> None:
    program = build_program(config, TOKENS)
    expected = {name: tuple(p.shape) for name, p in SLM(config, device="meta").named_parameters()}
    if config.positions == "rotary":
        assert config.rotary_dim is not None
        expected["embed.rope"] = (config.context, config.rotary_dim)
    found = {name: spec.shape for name, spec in program.weights.items() if 0 not in spec.shape}
    assert found == expected
    for function in ("prefill", "decode"):
        assert used_weights(program, function) == set(program.weights)


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_weight_bytes_are_the_counted_ones(config: SLMConfig) -> None:
    program = build_program(config, TOKENS)
    assert program.weight_bytes == weight_bytes(config)
    tables = sum(spec.nbytes for name, spec in program.weights.items() if name == "embed.rope")
    assert (program.weight_bytes - tables) // 4 == params(config)


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_state_is_one_cache_a_layer_and_as_wide_as_counted(config: SLMConfig) -> None:
    program = build_program(config, TOKENS)
    assert program.bounds == {"C": TOKENS.total}
    assert len(program.state) == 2 * config.num_layers
    assert sum(4 * _product(spec.shape) for spec in program.state.values()) == kv_bytes_per_token(config)
    for name in ("prefill", "decode"):
        outputs = program.functions[name].outputs
        assert outputs[0] == "logits"
        assert set(outputs[1:]) == {state + ROWS for state in program.state}
    assert set(program.state) <= set(program.functions["decode"].inputs)
    assert not set(program.state) & set(program.functions["prefill"].inputs)


def _product(shape: tuple[int | str, ...]) -> int:
    total = 1
    for size in shape:
        total *= size if isinstance(size, int) else 1
    return total


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_every_value_a_call_reads_was_made_before(config: SLMConfig) -> None:
    program = build_program(config, TOKENS)
    for function in program.functions.values():
        known = set(function.inputs)
        for call in function.calls:
            assert set(call.inputs) <= known
            assert call.stage in program.stages
            known |= set(call.outputs)
        assert set(function.outputs) <= known


def test_stages_weights_have_the_shapes_of_the_models() -> None:
    """A stage is exported from a one-layer config, so its own shapes must fit the weights it is given."""
    for seed in range(12):
        config = random_config(random.Random(seed))
        shapes = {n: tuple(p.shape) for n, p in SLM(config, device="meta").named_parameters()}
        for phase in ("prefill", "decode"):
            for use in stage_uses(config, phase, TOKENS.prompt):  # type: ignore[arg-type]
                stage = SLM(use.spec.config, device="meta")
                module = {"embed": stage.embed, "block": stage.block(0), "head": stage.head}[use.spec.kind]
                for local, parameter in module.named_parameters():
                    assert tuple(parameter.shape) == shapes[use.weights[local]], (seed, use.spec.kind, local)


# --- which stages are one ---------------------------------------------------------------------


def keys(config: SLMConfig, tokens: RequestTokens = TOKENS) -> dict[str, list[str]]:
    program = build_program(config, tokens)
    return {name: [call.stage for call in f.calls] for name, f in program.functions.items()}


def test_equal_blocks_share_a_stage() -> None:
    program = build_program(make(num_layers=5), TOKENS)
    assert len(program.stages) == 6  # embed, block and head in each of two phases
    assert len(program.functions["decode"].calls) == 7


def test_blocks_of_different_sizes_are_different_stages() -> None:
    stages = keys(make(num_layers=4, ffn_dim=(40, 24, 40, 24)))["decode"]
    assert stages[1] == stages[3]
    assert stages[2] == stages[4]
    assert stages[1] != stages[2]


@pytest.mark.parametrize("sharing", ["sequence", "cycle", "cycle_rev"])
def test_a_shared_layer_has_the_weights_of_its_twin_and_a_cache_of_its_own(sharing: str) -> None:
    program = build_program(make(num_layers=4, sharing=sharing, num_unique_layers=2), TOKENS)
    blocks = program.functions["decode"].calls[1:-1]
    expected = {"sequence": (0, 0, 1, 1), "cycle": (0, 1, 0, 1), "cycle_rev": (0, 1, 1, 0)}[sharing]
    assert [int(call.weights["attention.q.weight"].split(".")[1]) for call in blocks] == list(expected)
    assert [int(call.weights["ffn.up.weight"].split(".")[1]) for call in blocks] == list(expected)
    assert len({call.inputs for call in blocks}) == 4


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"vocab_size": 99}, {"block"}),
        ({"context": 64}, {"block", "head"}),
        ({"rope_theta": 5e4}, {"block", "head"}),
        ({"num_layers": 2}, {"embed", "block", "head"}),
        ({"tie_embeddings": False}, {"embed", "block", "head"}),
        ({"head_bias": True}, {"embed", "block"}),
        ({"embedding_scale": 3.0}, {"block", "head"}),
        ({"ffn_dim": 48}, {"embed", "head"}),
        ({"activation": "relu"}, {"embed", "head"}),
        ({"qk_norm": True}, {"embed", "head"}),
        ({"block": "parallel"}, {"embed", "head"}),
        ({"attention": "gqa", "num_kv_heads": 2}, {"embed", "head"}),
        ({"series_activation": 2}, {"embed", "head"}),
        ({"augmented_shortcuts": 1, "shortcut_reduction": 4}, {"embed", "head"}),
        ({"norm": "layernorm"}, {"embed"}),
        ({"norm_eps": 1e-6}, {"embed"}),
        ({"d_model": 36}, set()),
        ({"sharing": "cycle", "num_unique_layers": 2}, {"embed", "block", "head"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_stages_key_depends_on_what_the_stage_depends_on_alone(change: dict[str, Any], same: set[str]) -> None:
    base, changed = keys(make(head_dim=8)), keys(make(**({"head_dim": 8} | change)))
    for phase in ("prefill", "decode"):
        shared = {key.split("_")[0] for key in set(base[phase]) & set(changed[phase])}
        assert shared == same


def test_decode_stages_do_not_depend_on_the_request_and_prefill_stages_only_on_the_prompt() -> None:
    base = keys(make())
    longer = keys(make(), RequestTokens(prompt=9, generated=20))
    assert longer == base
    other = keys(make(), RequestTokens(prompt=10, generated=10))
    assert other["decode"] == base["decode"]
    assert not set(other["prefill"]) & set(base["prefill"])


def test_keys_are_the_same_in_another_process() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_program as t; print(sorted(t.build_program(t.make(), t.TOKENS).stages))"
    root = Path(__file__).parents[2]
    folders = [str(root), str(root / "tests"), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(build_program(make(), TOKENS).stages))


def test_learned_positions_need_no_rotary_inputs() -> None:
    program = build_program(make(positions="learned"), TOKENS)
    assert program.functions["decode"].calls[1].inputs == ("x", "layer0.k", "layer0.v")
    rotary = build_program(make(), TOKENS)
    assert rotary.functions["decode"].calls[1].inputs == ("x", "cos", "sin", "layer0.k", "layer0.v")


def test_latent_attention_caches_latents_and_rotary_keys() -> None:
    program = build_program(make(attention="mla", kv_rank=8, rotary_dim=4), TOKENS)
    assert program.state[state_name(1, "latent")].shape == (1, "C", 8)
    assert program.state[state_name(1, "k_rope")].shape == (1, "C", 4)


def test_a_request_longer_than_the_context_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a request of 19 tokens exceeds context=18"):
        build_program(dataclasses.replace(make(), context=18), TOKENS)
