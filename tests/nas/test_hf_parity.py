"""Our model against transformers', both ways, on random architectures of every family: logits and 64 greedy tokens."""

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import FAMILIES, VOCAB, random_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_helpers import write_speeches

from nas.corpus import load_corpus
from nas.huggingface.export import native_form, write_model
from nas.models import model_at
from nas.tokenizer import Tokenizer, train_tokenizer
from search_spaces.counting import params
from search_spaces.model import SLM

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an extra")

PROMPT, GENERATED = 12, 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, bytes]:
    """A tokenizer of ours with its file; its ids are more than the random models have, which no one asks for."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "tokenizer.json"
    return train_tokenizer(load_corpus(str(write_speeches(folder / "speeches.jsonl"))), 257, path), path.read_bytes()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def random_model(family: str, rng: random.Random) -> Any:
    """A model of transformers with weights that give every token another logit."""
    torch.manual_seed(rng.randrange(2**31))
    config = transformers.AutoConfig.for_model(family, **random_values(family, rng))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim > 1 else 0.3, 0.25)
    return model


@torch.inference_mode()
def assert_same(theirs: Any, ours: SLM, rng: random.Random) -> None:
    """Logits of a prompt within 1e-4 of the largest, and the same 64 greedy tokens after it."""
    prompt = torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    expected, got = theirs(prompt).logits, ours(prompt)
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    theirs.generation_config.eos_token_id = None
    tokens = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GENERATED, pad_token_id=0)
    assert tokens[0, PROMPT:].tolist() == greedy(ours, prompt)


def greedy(ours: SLM, prompt: torch.Tensor) -> list[int]:
    """What our model says, with its own cache."""
    logits, caches = ours.prefill(prompt)
    found = []
    for _ in range(GENERATED):
        found.append(int(logits[0, -1].argmax()))
        logits, rows = ours.decode(torch.tensor([found[-1:]]), caches)
        caches = [tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)) for old, new in zip(caches, rows, strict=True)]
    return found


def both_ways(family: str, rng: random.Random, folder: Path, tokenizer: tuple[Tokenizer, bytes]) -> None:
    theirs = random_model(family, rng)
    (folder / "theirs").mkdir()
    theirs.save_pretrained(folder / "theirs")
    named = model_at(folder / "theirs")
    assert params(named.config) == sum(p.numel() for p in theirs.parameters())
    loaded = named.load()
    assert loaded is not None
    ours, none = loaded
    assert none is None
    assert_same(theirs, ours, rng)

    # Perhaps as another family: one that is this architecture too, or the one without a window.
    native = native_form(named.config)
    assert native is not None
    (folder / "ours").mkdir()
    write_model(ours, *tokenizer, {}, folder / "ours")
    again, problems = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(problems.values())
    assert sum(p.numel() for p in again.parameters()) == params(named.config)
    assert again.config.model_type == native[0].family == json.loads((folder / "ours" / "config.json").read_text())["model_type"]
    assert_same(again.eval(), ours, rng)


FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=30)


@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(rng=st.randoms(use_true_random=False))
def test_a_random_model_comes_in_and_goes_out_with_the_same_logits_and_tokens(
    family: str, rng: random.Random, tokenizer: tuple[Tokenizer, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        both_ways(family, rng, Path(folder), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@MANY
@given(rng=st.randoms(use_true_random=False))
def test_many_random_models_come_in_and_go_out(family: str, rng: random.Random, tokenizer: tuple[Tokenizer, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        both_ways(family, rng, Path(folder), tokenizer)
