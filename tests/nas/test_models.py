"""Models by name and by path: what each means, and weights in every form that is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from search_helpers import write_speeches

from cost_models.measured import randomise
from nas.cli import cli
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun
from nas.huggingface.families import read_family
from nas.huggingface.tensors import entries
from nas.huggingface.weights import laid_out
from nas.models import named_model
from nas.tokenizer import train_tokenizer
from nas.training import evaluate
from search_spaces.config import InvalidConfig
from search_spaces.model import SLM
from search_spaces.references import reference

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """A folder as of a published Llama, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "tiny-llama"
    tokenizer = train_tokenizer(corpus, 290, folder / "tokenizer.json")
    (folder / "tokenizer.meta.json").unlink()
    write(folder, LLAMA)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    assert tokenizer.vocab_size <= 300
    return folder


def write(folder: Path, values: dict[str, Any]) -> SLM:
    """config.json and model.safetensors of a random model of that family."""
    folder.mkdir(exist_ok=True)
    imported = read_family(values)
    model = randomise(SLM(imported.config), 0).eval()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(dict(laid_out(model, imported)), folder / "model.safetensors")
    return model


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "tiny-llama"))


def test_a_name_is_a_reference_and_a_path_a_file() -> None:
    named = named_model("smollm-135m")
    assert (named.config, named.folder, named.exact_tokens) == (reference("smollm-135m"), None, 2048)
    assert named.load() is None
    with pytest.raises(InvalidConfig, match="'no/such' does not exist"):
        named_model("no/such")
    with pytest.raises(InvalidConfig, match="did you mean 'smollm-135m'"):
        named_model("smollm-135")


def test_a_folder_of_hugging_face_has_its_name_its_weights_and_its_tokenizer(published: Path, corpus: Corpus) -> None:
    named = named_model(str(published))
    assert (named.name, named.config.attention, named.folder, named.notes) == ("tiny-llama", "gqa", published, ())
    assert named_model(str(published / "config.json")).name == "tiny-llama"
    assert named_model(str(published / "config.json")).load() is None
    loaded = named.load()
    assert loaded is not None
    model, tokenizer = loaded
    assert tokenizer is not None
    assert not model.training
    assert (tokenizer.end_of_text, tokenizer.decode(tokenizer.encode("Größe 大小 🙂"))) == (0, "Größe 大小 🙂")
    assert 1 < tokenizer.bytes_per_token < 5
    bpb, _ = evaluate(model, tokenizer, corpus.validation, 64)
    assert 2 < bpb < 20


def test_weights_in_shards_are_the_same(folder: Path) -> None:
    expected = named_model(str(folder)).load()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-{i}-of-2.safetensors": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    got = named_model(str(folder)).load()
    assert got is not None and expected is not None
    for (name, a), b in zip(got[0].named_parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(a, b), name
    for bad in ("../elsewhere.safetensors", "/etc/passwd", "", 3, None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, bad)}))
        with pytest.raises(InvalidRun, match="cannot be read") as error:
            named_model(str(folder)).load()
        assert "\n" not in str(error.value)


def test_half_precision_bare_names_and_masks_of_older_files_are_read(folder: Path) -> None:
    values = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = write(folder, values)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t.bfloat16() for name, t in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors, folder / "model.safetensors")
    loaded = named_model(str(folder)).load()
    assert loaded is not None
    for (name, a), b in zip(loaded[0].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float()), name
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(InvalidRun, match=r"'lm_head\.weight' is not the embedding, and tie_word_embeddings is true"):
        named_model(str(folder)).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"stranger": torch.zeros(1)}, "has the tensor 'stranger'"),
        (lambda t: {k: v for k, v in t.items() if "q_proj" not in k}, r"lacks the tensor 'model\.layers\.0\.self_attn\.q_proj"),
        (lambda t: t | {"model.norm.weight": torch.zeros(3)}, r"'model\.norm\.weight' has shape \[3\], not \[32\]"),
        (lambda t: t | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "in a quantised form"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(folder: Path, change: Any, message: str) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(InvalidRun, match=message) as error:
        named_model(str(folder)).load()
    assert "\n" not in str(error.value)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidRun, match="is a pickle, which can run anything"):
        named_model(str(folder))


def test_a_tokenizer_is_published_whole_or_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRun, match="names no bos or eos token"):
        named_model(str(folder)).load()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    loaded = named_model(str(folder)).load()
    assert loaded is not None and loaded[1] is not None
    assert loaded[1].end_of_text == 5
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidRun, match="is damaged"):
        named_model(str(folder)).load()
    (folder / "tokenizer.json").unlink()
    assert named_model(str(folder)).load()[1] is None  # type: ignore[index]


def test_every_parameter_of_every_family_is_in_one_tensor() -> None:
    from hf_cases import FAMILIES

    for family in (*FAMILIES, "openelm", "minicpm"):
        values: dict[str, Any] = {"model_type": family, "first_k_dense_replace": 40} if family == "deepseek_v2" else {"model_type": family}
        imported = read_family(values)
        names = [name for entry in entries(family, imported.config, imported.scales) for name in entry.ours]
        assert sorted(names) == sorted(name for name, _ in SLM(imported.config, device="meta").named_parameters()), family


def test_openelm_and_minicpm_come_back_as_they_were() -> None:
    openelm = {"model_type": "openelm", "model_dim": 64, "num_transformer_layers": 3, "head_dim": 8, "num_gqa_groups": 2}
    openelm |= {"qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 2.0], "ffn_dim_divisor": 8, "normalize_qk_projections": True}
    minicpm = {**LLAMA, "model_type": "minicpm", "scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4}
    for values in (openelm, minicpm):
        imported = read_family(values | {"vocab_size": 60})
        model = randomise(SLM(imported.config), 0)
        theirs = dict(laid_out(model, imported))
        assert sum(t.numel() for t in theirs.values()) == sum(p.numel() for p in model.parameters())
        ours = dict(model.named_parameters())
        for entry in entries(imported.family, imported.config, imported.scales):
            for name, back in zip(entry.ours, entry.layout.split(theirs[entry.theirs]), strict=True):
                torch.testing.assert_close(back, ours[name], rtol=1e-6, atol=1e-7)
    # MiniCPM's own rule, written out: what a layer adds is scaled, and so is what the head reads.
    scaled = theirs["model.layers.0.mlp.down_proj.weight"] * (1.4 / 2**0.5)
    torch.testing.assert_close(scaled, ours["ffns.0.down.weight"].detach())
    torch.testing.assert_close(theirs["model.norm.weight"] * (16 / 32), ours["head.norm.weight"].detach())


# --- the command line -------------------------------------------------------------------------


def test_count_and_measure_take_such_files(folder: Path) -> None:
    runner = CliRunner()
    for arguments in ([str(folder)], ["--reference", str(folder / "config.json")]):
        done = runner.invoke(cli, ["count", *arguments, "--json"])
        assert json.loads(done.stdout)["params"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    done = runner.invoke(cli, ["measure", str(folder), "--target", "null", "--prompt-bytes", "60", "--generate-bytes", "40", "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert not values["bytes_per_token_assumed"]
    assert values["model"] == "tiny-llama"


def test_a_request_longer_than_a_window_is_refused_by_name(folder: Path) -> None:
    values = {**LLAMA, "model_type": "mistral", "sliding_window": 20}
    (folder / "config.json").write_text(json.dumps(values))
    runner = CliRunner()
    done = runner.invoke(cli, ["measure", str(folder), "--target", "null", "--prompt-bytes", "90", "--generate-bytes", "10"])
    assert "attention of tiny-llama looks back over a window of 20" in str(done.exception)
    assert "attention over a window of 20 tokens" in done.stderr
    assert json.loads(runner.invoke(cli, ["count", str(folder), "--json"]).stdout)["context"] == 127


def test_one_model_is_asked_for() -> None:
    runner = CliRunner()
    assert "Missing argument 'MODEL'" in runner.invoke(cli, ["count"]).output
    assert "give one of them" in runner.invoke(cli, ["count", "smollm-135m", "--reference", "x"]).output
