import math

import pytest

from search_spaces.config import InvalidConfig
from search_spaces.counting import params
from search_spaces.model import SLM
from search_spaces.references import reference, reference_model, reference_names

# Published counts, kept apart from the table they check.
PUBLISHED = {
    "gpt2-124m": 124439808,
    "opt-125m": 125239296,
    "cerebras-gpt-111m": 111050496,
    "cerebras-gpt-590m": 590310912,
    "pythia-160m": 162322944,
    "pythia-1b": 1011781632,
    "pythia-2.8b": 2775208960,
    "dolly-v2-3b": 2775086080,
    "phi-2": 2779683840,
    "phi-3-mini": 3821079552,
    "gemma-2b": 2506172416,
    "olmo-1b": 1_176_764_416,
    "llama-7b": 6738415616,
    "tinyllama-1.1b": 1100048384,
    "qwen2-0.5b": 494032768,
    "qwen2-1.5b": 1543714304,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-3b": 3085938688,
    "smollm-135m": 134515008,
    "smollm-360m": 361821120,
    "smollm-1.7b": 1711376384,
    "smollm2-135m": 134515008,
    "smollm2-360m": 361821120,
    "mobilellm-125m": 124635456,
    "mobilellm-ls-125m": 124635456,
    "openelm-270m": 271527168,
    "openelm-450m": 457179136,
    "openelm-1.1b": 1079891456,
    "openelm-3b": 3036647424,
    "pangu-pi-1b": None,
}


def test_every_reference_has_a_figure_to_meet():
    assert set(reference_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", reference_names())
def test_counts_equal_the_published_ones_and_the_model(name):
    found = reference_model(name)
    assert found.params == PUBLISHED[name]
    built = sum(p.numel() for p in SLM(found.config, device="meta").parameters())
    assert params(found.config) == built
    assert found.params in (None, built)
    assert found.source


def test_pangu_says_what_it_assumes():
    pangu = reference_model("pangu-pi-1b")
    assert "Unpublished" in pangu.notes
    assert params(pangu.config) == pytest.approx(1e9, rel=0.05)


def test_details_that_counts_do_not_show():
    assert reference("gpt2-124m").activation == "gelu_tanh"
    assert reference("opt-125m").position_offset == 2
    assert reference("pythia-160m").block == "parallel"
    assert reference("pythia-2.8b").rotary_dim == 20
    assert (reference("phi-2").block, reference("phi-2").rotary_dim) == ("parallel_shared_norm", 32)
    assert reference("gemma-2b").embedding_scale == math.sqrt(2048)
    assert reference("qwen2-0.5b").rope_theta == 1e6
    assert reference("smollm2-135m").rope_theta == 1e5
    assert (reference("llama-7b").norm_eps, reference("tinyllama-1.1b").norm_eps) == (1e-6, 1e-5)
    assert [s.attention_index for s in reference("mobilellm-ls-125m").layers()][:5] == [0, 0, 1, 1, 2]
    assert reference("openelm-3b").layers()[-1].num_heads == 24


def test_names_are_lower_case_and_found_in_any_case():
    assert all(name == name.lower() and " " not in name for name in reference_names())
    assert reference("GPT2-124M") == reference("gpt2-124m")


def test_an_unknown_name_gets_close_ones():
    with pytest.raises(InvalidConfig, match="'gpt2' is not a reference model; did you mean 'gpt2-124m'"):
        reference("gpt2")
    with pytest.raises(InvalidConfig, match="choose one of gpt2-124m, opt-125m"):
        reference("?")
