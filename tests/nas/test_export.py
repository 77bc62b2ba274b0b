"""Exports: what comes out loads again and is the model that was scored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from search_helpers import SPACE_FILE, run_search, settings, write_speeches

from nas import export as export_module
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun
from nas.evaluation import Evaluation
from nas.export import LOADING, export_trial, is_export, load_exported, model_card
from nas.run import Run
from nas.search import Outcome
from nas.training import evaluate
from nas.weights import load_weights, read_facts, save_weights
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import params
from search_spaces.model import SLM
from search_spaces.space import Space, load_space


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> tuple[Run, Outcome]:
    return run_search(tmp_path_factory.mktemp("runs") / "a_b", corpus, trials=5)


@pytest.fixture
def exported(tmp_path: Path, searched: tuple[Run, Outcome]) -> Path:
    run, outcome = searched
    assert outcome.chosen is not None
    return export_trial(run, outcome.chosen.trial, tmp_path / "model")


def test_the_exported_model_is_the_one_that_was_scored(exported: Path, searched: tuple[Run, Outcome], corpus: Corpus) -> None:
    run, outcome = searched
    chosen = outcome.chosen
    assert chosen is not None
    assert chosen.config is not None
    assert chosen.score is not None
    model, tokenizer = load_exported(exported)
    assert evaluate(model, tokenizer, corpus.validation, chosen.score["window_tokens"])[0] == chosen.val_bpb
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("My fellow citizens")]])
    with torch.inference_mode():
        assert torch.equal(model(ids), load_weights(run.weights_path(chosen.trial), chosen.config)(ids))
    assert not model.training
    assert is_export(exported)
    assert not is_export(exported.parent)


def test_an_export_holds_what_others_read(exported: Path, searched: tuple[Run, Outcome]) -> None:
    import tokenizers

    _, outcome = searched
    chosen = outcome.chosen
    assert chosen is not None
    assert {p.name for p in exported.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert json.loads((exported / "config.json").read_text())["model_type"] == "edgewise"
    assert SLMConfig.load(exported) == chosen.config
    assert sum(t.numel() for t in load_file(exported / "model.safetensors").values()) == chosen.params
    assert tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json")).get_vocab_size() == chosen.config.vocab_size


def test_the_four_documented_files_are_enough(exported: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(exported / name, tmp_path / "copy" / name)
    model, tokenizer = load_exported(tmp_path / "copy")
    assert tokenizer.bytes_per_token > 1
    assert model.config.vocab_size == tokenizer.vocab_size


def test_weights_that_do_not_name_their_tokenizer_are_refused(exported: Path) -> None:
    save_file(load_file(exported / "model.safetensors"), exported / "model.safetensors")
    with pytest.raises(InvalidRun, match="does not say what tokenizer it goes with; export the model again"):
        load_exported(exported)


def test_the_three_lines_of_python_are_the_same_everywhere(exported: Path) -> None:
    block = f"```python\n{LOADING}```"
    assert block in (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert block in (exported / "README.md").read_text()
    assert LOADING in (export_module.__doc__ or "")


def test_the_card_says_what_was_measured_and_on_what_text(exported: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    card = (exported / "README.md").read_text()
    assert outcome.chosen is not None
    for fact in (
        "a\\_b",
        f"trial {outcome.chosen.trial}",
        "licence: unknown",
        run.manifest["corpus"]["sha256"],
        "Counted, not measured (target null), search begun",
        "load_exported",
    ):
        assert fact in card
    assert "On null" not in card
    device = {**run.manifest["device"], "name": "local"}
    assert "On local, search begun" in model_card(Run(run.path, {**run.manifest, "target": "local", "device": device}), outcome.chosen, 300)


def test_the_card_escapes_names_from_users(searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    corpus = run.manifest["corpus"] | {"name": "<img src=x>|[a](b)\n# head"}
    assert outcome.chosen is not None
    card = model_card(Run(run.path, {**run.manifest, "corpus": corpus}), outcome.chosen, 300)
    assert "<img" not in card.replace("\\<img", "")
    assert "\n# head" not in card


def test_tied_and_shared_weights_are_stored_once(tmp_path: Path) -> None:
    config = SLMConfig(
        vocab_size=300, d_model=16, num_layers=4, num_heads=2, sharing="cycle", num_unique_layers=2, tie_embeddings=True, context=64
    )
    model = SLM(config).initialise(0)
    path = save_weights(tmp_path / "w.safetensors", model, {"score": {"val_bpb": 2.0}})
    assert sum(t.numel() for t in load_file(path).values()) == params(config)
    assert read_facts(path) == {"config": config.key, "score": {"val_bpb": 2.0}}
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(load_weights(path, config)(ids), model(ids))


def test_exporting_again_into_the_same_folder_replaces_it(exported: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    other = next(e for e in outcome.front if e is not outcome.chosen)
    export_trial(run, other.trial, exported)
    assert SLMConfig.load(exported) == other.config
    load_exported(exported)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    assert outcome.chosen is not None
    for name, text in (("notes.txt", "dear"), ("config.json", '{"model_type": "llama"}'), ("config.json", "[]")):
        folder = tmp_path / f"{name}{len(text)}"
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(InvalidRun, match="holds other files and no exported model"):
            export_trial(run, outcome.chosen.trial, folder)
        assert [p.read_text() for p in folder.iterdir()] == [text]
    with pytest.raises(InvalidRun, match="is a file; give a folder"):
        export_trial(run, outcome.chosen.trial, folder / name)


def test_a_trial_without_weights_is_refused_with_those_that_have_them(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    on_front = ", ".join(str(e.trial) for e in outcome.front)
    off = next(e.trial for e in outcome.evaluations if e not in outcome.front)
    with pytest.raises(InvalidRun, match=f"trial {off} is not on the front of run .*; choose one of {on_front}"):
        export_trial(run, off, tmp_path / "x")
    with pytest.raises(InvalidRun, match=f"trial 99 is not in run .*; choose one of {on_front}"):
        export_trial(run, 99, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unfinished_trial_and_a_copy_of_one_on_the_front(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    chosen = outcome.chosen
    assert chosen is not None
    copied = Run(Path(shutil.copytree(run.path, tmp_path / "run")), run.manifest)
    Evaluation(trial=5, state="failed", reason="no").save(copied.trial_path(5))
    chosen.evolve(trial=6, duplicate_of=chosen.trial).save(copied.trial_path(6))
    with pytest.raises(InvalidRun, match="trial 5 is failed, so it has no trained weights"):
        export_trial(copied, 5, tmp_path / "x")
    assert SLMConfig.load(export_trial(copied, 6, tmp_path / "copy")) == chosen.config


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "there is no such file"),
        ("truncated", "cannot be read"),
        ("shape", r"has shape \[1\], not \["),
        ("lacking", "lacks the tensor"),
        ("extra", "has the tensor 'stranger'"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_in_one_line(exported: Path, damage: str, message: str) -> None:
    path = exported / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        changed = {"shape": {**tensors, name: torch.zeros(1)}, "extra": {**tensors, "stranger": torch.zeros(1)}}
        save_file(changed.get(damage) or {k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(InvalidRun, match=message) as error:
        load_exported(exported)
    assert "\n" not in str(error.value)


def test_a_config_or_tokenizer_of_another_model_is_refused(exported: Path) -> None:
    values = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**values, "vocab_size": 100}))
    with pytest.raises(InvalidRun, match="are not of the same model"):
        load_exported(exported)
    (exported / "config.json").write_text(json.dumps({**values, "d_modle": 100}))
    with pytest.raises(InvalidConfig, match=r"'d_modle' is not a field .*did you mean 'd_model'"):
        load_exported(exported)
    (exported / "config.json").write_text(json.dumps(values))
    (exported / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRun, match="is damaged"):
        load_exported(exported)


def test_a_real_vocabulary_smaller_than_asked_for_is_what_the_model_has(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"]["vocab_size"] = 60_000
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, space=Space.from_dict(values))
    (only,) = outcome.evaluations
    assert only.config is not None
    assert 300 < only.config.vocab_size < 20_000
    _, tokenizer = load_exported(export_trial(run, 0, tmp_path / "model"))
    assert tokenizer.vocab_size == only.config.vocab_size


def test_rounded_models_leave_as_trained_and_the_card_says_what_was_measured(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, given=settings(weights=("int4",)))
    (only,) = outcome.evaluations
    assert only.score is not None
    model, tokenizer = load_exported(export_trial(run, 0, tmp_path / "model"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert evaluate(model, tokenizer, corpus.validation, only.score["window_tokens"])[0] == only.score["val_bpb_fp32"] != only.val_bpb
    card = (tmp_path / "model" / "README.md").read_text()
    assert "int4 weights (half bytes with a scale for every 32 inputs), rounded from the float32 ones in this folder" in card
    assert f"| the same of the float32 weights | {only.score['val_bpb_fp32']:.3f} ±" in card
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
