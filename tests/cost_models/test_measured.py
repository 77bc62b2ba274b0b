"""A request's figures from raw times, and the sample that a program is checked with."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import random_config

from cost_models.measured import DECODE_STEPS, latency, make_sample, randomise
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import kv_bytes_per_token
from search_spaces.model import SLM
from search_spaces.workload import RequestTokens, Workload
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Sample
from targets.spec import load_spec

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=64)
TOKENS = RequestTokens(prompt=9, generated=12)


def measurement(prefill: tuple[float, ...], decode: tuple[float, ...], **changes: Any) -> Measurement:
    values = {"workspace_bytes": {"prefill": 700, "decode": 900}, "packed_bytes": 10_000, "errors": {}} | changes
    return Measurement(device="d", times_s={"prefill": prefill, "decode": decode}, **values)


def written(sample: Sample, folder: Path) -> dict[str, torch.Tensor]:
    sample.write(folder / "sample.safetensors")
    return load_file(folder / "sample.safetensors")


# --- latency ----------------------------------------------------------------------------------


def test_a_request_is_its_prefill_and_every_generated_token() -> None:
    workload = Workload(prompt_bytes=100, generate_bytes=60)
    found = latency(measurement((0.5, 0.3, 9.0), (0.02, 0.01, 0.03, 0.02, 0.02)), CONFIG, TOKENS, workload)
    assert found.prefill_s == 0.5
    assert found.decode_s_per_token == 0.02
    assert found.request_s == pytest.approx(0.5 + 12 * 0.02)
    assert found.bytes_per_s == pytest.approx(60 / (12 * 0.02))
    # K and V of 2 layers, 4 heads of 8: 128 values of 4 bytes for each of 21 tokens.
    assert found.peak_bytes == 10_000 + 21 * 2 * 2 * 4 * 8 * 4 + 900


@given(
    prefill=st.lists(st.floats(1e-6, 10), min_size=1, max_size=9).map(tuple),
    decode=st.lists(st.floats(1e-6, 1), min_size=1, max_size=9).map(tuple),
    generated=st.integers(1, 500),
)
def test_a_request_takes_at_least_its_parts_and_speed_is_bytes_over_decoding(
    prefill: tuple[float, ...], decode: tuple[float, ...], generated: int
) -> None:
    workload = Workload()
    found = latency(measurement(prefill, decode), CONFIG, RequestTokens(prompt=3, generated=generated), workload)
    assert found.request_s >= max(found.prefill_s, generated * found.decode_s_per_token)
    assert found.bytes_per_s * (found.request_s - found.prefill_s) == pytest.approx(workload.generate_bytes, rel=1e-3)


def test_a_vocabulary_that_needs_fewer_tokens_is_faster_in_bytes_at_the_same_time_a_token() -> None:
    workload, m = Workload(), measurement((0.1,), (0.01,))
    few, many = (latency(m, CONFIG, workload.tokens(b), workload) for b in (4.0, 2.0))
    assert few.bytes_per_s == pytest.approx(2 * many.bytes_per_s)


def test_a_latency_is_plain_json_with_the_raw_record_inside() -> None:
    m = measurement((0.5,), (0.02, 0.03))
    found = json.loads(json.dumps(latency(m, CONFIG, TOKENS, Workload()).to_dict()))
    assert list(found) == ["prefill_s", "decode_s_per_token", "request_s", "bytes_per_s", "peak_bytes", "measurement"]
    assert Measurement.from_dict(found["measurement"]) == m


# --- the sample -------------------------------------------------------------------------------


def test_the_script_is_one_prefill_and_eight_decode_steps() -> None:
    sample = make_sample(CONFIG, TOKENS, 0)
    assert [step.function for step in sample.steps] == ["prefill"] + ["decode"] * 8
    assert DECODE_STEPS == 8
    assert sample.tolerance == 1e-4
    assert {name: rows for name, (_, rows) in sample.timed.items()} == {"prefill": 0, "decode": 9 + 12 // 2}


@pytest.mark.parametrize("generated", [1, 3, 8, 9])
def test_the_script_never_outgrows_the_request(generated: int) -> None:
    """The program keeps state for the request's tokens alone, and the model may have no position beyond them."""
    config = dataclasses.replace(CONFIG, context=5 + generated)
    sample = make_sample(config, RequestTokens(prompt=5, generated=generated), 0)
    assert len(sample.steps) == 1 + min(8, generated)


def test_writing_gives_every_array_the_script_and_the_program_name(tmp_path: Path) -> None:
    for seed in range(6):
        config = random_config(random.Random(seed))
        tokens = RequestTokens(prompt=7, generated=9)
        arrays = written(sample := make_sample(config, tokens, seed), tmp_path)
        program = build_program(config, tokens)
        for name, spec in program.weights.items():
            assert tuple(arrays[name].shape) == spec.shape
        inputs = [step.inputs for step in sample.steps] + [inputs for inputs, _ in sample.timed.values()]
        assert {array for by_name in inputs for array in by_name.values()} <= set(arrays)
        for step in sample.steps:
            assert set(step.expected) == set(program.functions[step.function].outputs)
            assert all(torch.isfinite(arrays[array]).all() for array in step.expected.values())


def test_expected_outputs_are_the_models_on_its_own_tokens(tmp_path: Path) -> None:
    """Eight decode steps give the logits of one pass over the whole text."""
    arrays = written(make_sample(CONFIG, TOKENS, 5), tmp_path)
    model = SLM(CONFIG)
    model.load_state_dict({n: arrays[n] for n, _ in model.named_parameters()}, strict=False)
    ids = torch.cat([arrays[f"step{n}.tokens"] for n in range(9)], dim=1)
    with torch.inference_mode():
        logits = model(ids)
    for n in range(9):
        torch.testing.assert_close(arrays[f"step{n}.logits"][0, 0], logits[0, TOKENS.prompt - 1 + n], rtol=1e-4, atol=1e-5)
        first = 0 if n == 0 else TOKENS.prompt + n - 1
        assert arrays[f"step{n}.positions"].tolist() == list(range(first, TOKENS.prompt + n))
    assert arrays["timed.positions"].tolist() == [TOKENS.mid_context]


def test_given_weights_are_the_ones_written(tmp_path: Path) -> None:
    model = SLM(CONFIG).initialise(3)
    arrays = written(make_sample(CONFIG, TOKENS, 0, model), tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(arrays[name], parameter.detach(), rtol=0, atol=0)


def test_weights_are_written_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of all of them would double what measuring a large model needs."""
    model = SLM(CONFIG).initialise(3)
    places = {}
    monkeypatch.setattr("cost_models.measured.write_arrays", lambda _, arrays: places.update((n, a.ctypes.data) for n, a in arrays))
    make_sample(CONFIG, TOKENS, 0, model).write(tmp_path / "sample")
    for name, parameter in model.named_parameters():
        assert places[name] == parameter.data_ptr(), name


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_sample(CONFIG, TOKENS, seed).write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_randomised_weights_leave_no_vector_at_a_value_that_hides_it() -> None:
    config = dataclasses.replace(
        CONFIG, norm="layernorm", norm_bias=True, qkv_bias=True, attention_bias=True, ffn_bias=True, head_bias=True, qk_norm=True,
        series_activation=2,
    )  # fmt: skip
    model = randomise(SLM(config), 0)
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith((".scale", ".shift")):
            checked += 1
            assert len(parameter.unique()) == parameter.numel(), name
            assert not torch.isin(parameter, torch.tensor([0.0, 0.5, 1.0])).any(), name
    # Of each layer 2 norms and 2 head norms, 8 biases (norms', q, k, v, out; the FFN's 3) and 2 more, and the series; 3 of the head.
    assert checked == 2 * (2 * 2 + 2 + 3 + 1 + 3 + 2) + 3


def test_nothing_is_computed_for_a_target_that_computes_nothing(tmp_path: Path) -> None:
    target = NullTarget(load_spec("null"))
    artifact = target.compile(build_program(CONFIG, TOKENS), tmp_path)
    sample = dataclasses.replace(make_sample(CONFIG, TOKENS, 0), write=lambda path: pytest.fail("nothing should be written"))
    found = latency(target.measure(artifact, sample, Timing()), CONFIG, TOKENS, Workload())
    assert found.request_s > 0
    assert found.peak_bytes > kv_bytes_per_token(CONFIG) * TOKENS.total
