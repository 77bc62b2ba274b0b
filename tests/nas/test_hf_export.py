"""The forms a model leaves in for transformers: which family, our own modelling file, and the tokenizer."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import FAMILIES, random_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_helpers import write_speeches
from strategies import random_config

from cost_models.measured import randomise
from nas.corpus import load_corpus
from nas.errors import InvalidRun
from nas.huggingface.export import NATIVE, native_form, source_files, write_model
from nas.huggingface.families import read_family
from nas.models import model_at
from nas.tokenizer import Tokenizer, train_tokenizer
from nas.weights import load_weights, save_weights
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.model import SLM
from search_spaces.references import reference

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an extra")

GENERATED = 64
TEXTS = (
    "My fellow citizens, we're 1,234 strong -- and it's 2026!\n\n  Two  spaces,\ttabs\r\n",
    "Größe, 大小, размер, حجم, आकार, 크기, שלום, ขนาด 🙂👍🏽‍💻 and a\u00a0hard\u200bspace",
    "".join(chr(c) for c in range(1, 0x250)),
    "e\u0301 is not é; \u202eright to left\u202c; \ufeff; \x00\x1b[31m",
    "   leading and trailing   ",
    "",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # code\n" * 3,
)
LLAMA = SLMConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, context=100)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, bytes]:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "tokenizer.json"
    return train_tokenizer(load_corpus(str(write_speeches(folder / "speeches.jsonl"))), 300, path), path.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the Python files of a model into a folder of its own: one that goes with the test."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


def written(config: SLMConfig, folder: Path, tokenizer: tuple[Tokenizer, bytes]) -> SLM:
    """A random model, and its files in a folder."""
    model = randomise(SLM(config), 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    folder.mkdir(exist_ok=True)
    write_model(model, *tokenizer, {}, folder)
    return model


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gpt2-124m", "gpt2"), ("opt-125m", "opt"), ("pythia-160m", "gpt_neox"), ("phi-2", "phi"), ("phi-3-mini", "llama"),
        ("gemma-2b", "gemma"), ("smollm-135m", "llama"), ("qwen2-0.5b", "qwen2"), ("mobilellm-ls-125m", None), ("openelm-270m", None),
        ("pangu-pi-1b", None),
    ],
)  # fmt: skip
def test_references_are_of_their_families(name: str, family: str | None) -> None:
    native = native_form(reference(name))
    assert (native and native[0].family) == family


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"activation": "relu", "ffn_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"rotary_dim": 8}, "phi3"),
        ({"d_model": 33, "num_heads": 2, "head_dim": 8, "rotary_dim": 8}, "mistral"),
        ({"norm": "layernorm", "norm_bias": None, "norm_weight": False, "norm_eps": 1e-5}, "olmo"),
        ({"norm": "layernorm", "norm_bias": None, "block": "parallel_shared_norm"}, "stablelm"),
        ({"attention": "mla", "kv_rank": 8, "rotary_dim": 4}, "deepseek_v2"),
        ({"attention": "mla", "kv_rank": 7, "rotary_dim": 4}, "minicpm3"),
        ({"embedding_scale": 2.0}, None),
        ({"block": "parallel"}, None),
        ({"ffn_dim": (40, 48)}, None),
        ({"series_activation": 2}, None),
        ({"num_layers": 4, "sharing": "cycle", "num_unique_layers": 2}, None),
    ],
)
def test_what_decides_the_family(changes: dict[str, Any], family: str | None) -> None:
    native = native_form(dataclasses.replace(LLAMA, **changes))
    assert (native and native[0].family) == family


def test_every_family_of_transformers_that_is_read_is_written() -> None:
    assert set(NATIVE) == set(FAMILIES)


@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_leaves_as_a_family_reads_back_as_itself(rng: random.Random) -> None:
    config = random_config(rng)
    native = native_form(config)
    if native is not None:
        imported, values = native
        assert read_family(json.loads(json.dumps(values))).config == config == imported.config


# --- our own form -----------------------------------------------------------------------------


def assert_generates_the_same(config: SLMConfig, tokenizer: tuple[Tokenizer, bytes], folder: Path) -> None:
    ours = written(config, folder, tokenizer)
    theirs = loaded(folder)
    assert type(theirs).__name__ == "EdgewiseForCausalLM"
    assert sum(p.numel() for p in theirs.parameters()) == params(config)
    prompt = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs.generation_config.eos_token_id = None
    asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": GENERATED, "pad_token_id": 0}
    with torch.inference_mode():
        expected, got = ours(prompt), theirs(prompt).logits
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        tokens = theirs.generate(prompt, **asked)
        ids = prompt
        for _ in range(GENERATED):
            ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(tokens, ids)
        assert torch.equal(theirs.generate(prompt, use_cache=False, **asked), ids)
        # Several tokens after a cache, as a draft that is checked is.
        first = theirs(ids[:, :20], use_cache=True)
        rest = theirs(ids[:, 20:24], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, ours(ids[:, :24])[:, 20:], rtol=1e-4, atol=1e-4)
    again = model_at(folder).load()
    assert again is not None
    with torch.inference_mode():
        assert torch.equal(again[0](prompt), expected)


def own_config(rng: random.Random) -> SLMConfig:
    """A random config that no family has."""
    while True:
        config = dataclasses.replace(random_config(rng, max_layers=2), context=100, vocab_size=300)
        if native_form(config) is None:
            return config


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_our_own_form_generates_with_and_without_a_cache(rng: random.Random, tokenizer: tuple[Tokenizer, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_generates_the_same(own_config(rng), tokenizer, Path(folder))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_many_of_our_own_form_generate(rng: random.Random, tokenizer: tuple[Tokenizer, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_generates_the_same(own_config(rng), tokenizer, Path(folder))


@pytest.fixture
def own(tmp_path: Path, tokenizer: tuple[Tokenizer, bytes]) -> Path:
    written(dataclasses.replace(LLAMA, series_activation=2), tmp_path / "own", tokenizer)
    return tmp_path / "own"


def test_what_it_cannot_do_it_says(own: Path) -> None:
    model = loaded(own)
    ids = torch.ones(2, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding on the left is not supported"):
        model(ids, attention_mask=torch.tensor([[1] * 10, [0] * 3 + [1] * 7]))
    with pytest.raises(ValueError, match="101 tokens are more than this model's context of 100"):
        model(torch.ones(1, 101, dtype=torch.int64))
    right = model(ids, attention_mask=torch.tensor([[1] * 10, [1] * 7 + [0] * 3]), use_cache=True)
    with pytest.raises(ValueError, match="rows of different lengths cannot go on together"):
        model(ids[:, :1], attention_mask=torch.tensor([[1] * 11, [1] * 7 + [0] * 3 + [1]]), past_key_values=right.past_key_values)


def test_it_trains_further_and_what_transformers_saves_is_read_back(own: Path, tmp_path: Path) -> None:
    model = loaded(own).train()
    ids = torch.arange(20)[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).detach()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    model.save_pretrained(tmp_path / "tuned")
    config = SLMConfig.load(tmp_path / "tuned")
    assert config == SLMConfig.load(own)
    tuned = load_weights(tmp_path / "tuned" / "model.safetensors", config)
    with torch.inference_mode():
        assert torch.equal(tuned(ids), loaded(tmp_path / "tuned")(ids).logits)


MADE = (
    {"series_activation": 2, "norm": "layernorm", "norm_bias": None},
    {"block": "parallel", "tie_embeddings": False, "attention_bias": True},
    {"attention": "mla", "kv_rank": 8, "rotary_dim": 4, "augmented_shortcuts": 1},
    {"num_layers": 4, "sharing": "cycle", "num_unique_layers": 2, "positions": "learned"},
)


@pytest.mark.parametrize("changes", MADE)
def test_one_made_from_a_config_begins_as_ours_do(changes: dict[str, Any], tmp_path: Path, tokenizer: tuple[Tokenizer, bytes]) -> None:
    """Every weight is filled as `SLM.initialise` does, from PyTorch's own seed."""
    config = SLMConfig(**{"vocab_size": 300, "d_model": 64, "num_layers": 2, "num_heads": 2, "context": 100, **changes})
    assert native_form(config) is None
    write_model(SLM(config).initialise(0), *tokenizer, {}, tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)

    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(theirs, trust_remote_code=True)
        assert type(model).__name__ == "EdgewiseForCausalLM"
        return {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}

    with torch.random.fork_rng():
        found, again, other = made(1), made(1), made(2)
    expected = {name: p.detach() for name, p in SLM(config).initialise(0).named_parameters()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], again[name])
        if name.rsplit(".", 1)[-1] in ("bias", "scale", "shift") or values.ndim == 1:
            assert torch.equal(found[name], values), name
        else:
            assert not torch.equal(found[name], other[name]), name
            # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2 n).
            assert float(found[name].std() / values.std()) == pytest.approx(1.0, abs=6 / values.numel() ** 0.5), name


def test_only_weights_that_no_file_has_are_filled(own: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = torch.get_rng_state()
    whole = dict(loaded(own).named_parameters())
    assert torch.equal(torch.get_rng_state(), state), "weights were made only to be read"
    path, lost = own / "model.safetensors", "ffns.1.down.weight"
    save_file({name: p for name, p in load_file(path).items() if name != lost}, path, {"format": "pt"})
    with torch.random.fork_rng():
        parts = dict(loaded(own).named_parameters())
    expected = dict(SLM(SLMConfig.load(own)).initialise(0).named_parameters())[lost]
    assert float(parts.pop(f"model.{lost}").detach().std() / expected.detach().std()) == pytest.approx(1.0, abs=0.15)
    assert all(torch.equal(p, whole[name]) for name, p in parts.items())


def test_the_files_are_ours_with_imports_among_themselves(tmp_path: Path) -> None:
    """They need PyTorch, NumPy and transformers, and nothing of this project."""
    for name, text in source_files().items():
        assert "search_spaces" not in text, name
        assert "from nas" not in text, name
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "__init__.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(tmp_path.parent)!r}); from {tmp_path.name} import edgewise_model as m\n"
    script += "assert not [name for name in sys.modules if name.split('.')[0] in ('nas', 'search_spaces', 'targets', 'cost_models')]"
    if tmp_path.name.isidentifier():
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_weights_saved_by_us_need_no_prefix_and_mixed_ones_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_weights(tmp_path / "w.safetensors", SLM(LLAMA).initialise(0), {})
    tensors = load_file(path)
    save_file({f"model.{name}" if i else name: t for i, (name, t) in enumerate(tensors.items())}, path)
    with pytest.raises(InvalidRun, match="lacks the tensor"):
        load_weights(path, LLAMA)


# --- tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_the_tokenizer_gives_the_same_ids_and_the_text_back(family: str | None, tmp_path: Path, tokenizer: tuple[Tokenizer, bytes]) -> None:
    if family is None:
        config = dataclasses.replace(LLAMA, series_activation=2)
    else:
        config = read_family({"model_type": family, **random_values(family, random.Random(1))}).config
        assert native_form(config) is not None
    write_model(SLM(config).initialise(0), *tokenizer, {}, tmp_path)
    for trust in (False, True) if family is not None else (True,):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
        assert_same_tokens(theirs, tokenizer[0], config.context)


def assert_same_tokens(theirs: Any, ours: Tokenizer, context: int) -> None:
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.end_of_text, ours.end_of_text)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text == ours.decode(ids)
    spelled = "a document that spells <|endoftext|> out"
    assert theirs.decode(theirs(spelled).input_ids) == spelled
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == context
