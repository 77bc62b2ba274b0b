"""Exports: what comes out loads again and is the model that was scored."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from search_helpers import SPACE_FILE, run_search, settings, write_speeches

from cost_models.measured import randomise
from nas import export as export_module
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation
from nas.export import FORMATS, LOADING, MARK, choose_trial, export_trial, is_export, load_exported, model_card
from nas.gguf_export import write_gguf_folder
from nas.huggingface.export import native_form, write_folder
from nas.models import model_at
from nas.run import Run
from nas.search import Outcome
from nas.training import evaluate
from nas.weights import load_weights, read_facts, save_weights
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import params
from search_spaces.model import SLM
from search_spaces.space import Space, load_space

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> tuple[Run, Outcome]:
    return run_search(tmp_path_factory.mktemp("runs") / "a_b", corpus, trials=5)


@pytest.fixture
def native(tmp_path: Path, searched: tuple[Run, Outcome]) -> Path:
    """A model that is a Llama, exported."""
    return written(tmp_path / "native", searched, SLMConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, context=64))


@pytest.fixture
def own(tmp_path: Path, searched: tuple[Run, Outcome]) -> Path:
    """A model that no family has, exported."""
    config = SLMConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, context=64, series_activation=2, augmented_shortcuts=1)
    return written(tmp_path / "own", searched, config)


def written(folder: Path, searched: tuple[Run, Outcome], config: SLMConfig) -> Path:
    """The exported folder of a random model, with the tokenizer of the search."""
    run, outcome = searched
    assert outcome.chosen is not None
    chosen = choose_trial(run, outcome.chosen.trial)
    config = dataclasses.replace(config, vocab_size=chosen.tokenizer.vocab_size)
    folder.mkdir()
    write_folder(dataclasses.replace(chosen, config=config, model=randomise(SLM(config), 0).eval()), folder)
    return folder


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
    assert {p.name for p in exported.iterdir()} >= FILES
    assert model_at(exported).config == chosen.config
    assert sum(t.numel() for t in load_file(exported / "model.safetensors").values()) == chosen.params
    assert tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json")).get_vocab_size() == chosen.config.vocab_size


def test_the_three_files_of_the_model_are_enough(exported: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(exported / name, tmp_path / "copy" / name)
    model, tokenizer = load_exported(tmp_path / "copy")
    assert tokenizer.bytes_per_token > 1
    assert model.config.vocab_size == tokenizer.vocab_size


def test_weights_that_do_not_name_their_tokenizer_are_refused(own: Path) -> None:
    save_file(load_file(own / "model.safetensors"), own / "model.safetensors")
    with pytest.raises(InvalidRun, match="does not say what tokenizer it goes with; export the model again"):
        load_exported(own)


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
        "Counted, not measured (target null). Search begun",
        "load_exported",
    ):
        assert fact in card
    assert "On null" not in card
    devices = [{**run.manifest["device"], "name": name, "kind": "local"} for name in ("local", "board")]
    several = model_card(Run(run.path, {**run.manifest, "targets": devices}), outcome.chosen, 300)
    assert "On local; On board. Search begun" in several
    assert "| decode on board | –" in several, "nothing is known of it there"


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
    assert model_at(exported).config == other.config
    load_exported(exported)
    (exported / "run.py").write_text("of a bundle")
    export_trial(run, other.trial, exported)
    assert not (exported / "run.py").exists(), "left of an export in another format"


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
    assert model_at(export_trial(copied, 6, tmp_path / "copy")).config == chosen.config


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
@pytest.mark.parametrize("form", ["native", "own"])
def test_weights_that_are_not_the_models_are_refused_in_one_line(request: Any, form: str, damage: str, message: str) -> None:
    exported = request.getfixturevalue(form)
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


def test_a_config_or_tokenizer_of_another_model_is_refused(own: Path, native: Path) -> None:
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, "architecture": {**values["architecture"], "d_modle": 100}}))
    with pytest.raises(InvalidConfig, match=r"'d_modle' is not a field .*did you mean 'd_model'"):
        load_exported(own)
    (own / "config.json").write_text(json.dumps(values))
    (own / "config.json").write_text(json.dumps({**values, "architecture": {**values["architecture"], "vocab_size": 100}}))
    with pytest.raises(InvalidRun, match="are not of the same model"):
        load_exported(own)
    (native / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRun, match="is damaged"):
        load_exported(native)


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
    assert "int4 weights (half bytes with a scale for every 32 inputs), rounded from the float32 ones that were trained" in card
    assert f"| the same of the float32 weights | {only.score['val_bpb_fp32']:.3f} ±" in card
    assert {p.name for p in (tmp_path / "model").iterdir()} >= FILES


# --- every format -----------------------------------------------------------------------------


def test_every_trial_on_the_front_leaves_in_every_format_or_the_reason_is_given(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    ids = torch.randint(60, (1, 12), generator=torch.Generator().manual_seed(0))
    for trial in (e.trial for e in outcome.front):
        with torch.inference_mode():
            expected = choose_trial(run, trial).model(ids)
        for name in FORMATS:
            folder, reason = tmp_path / f"{trial}-{name}", refusal(run, trial, name, tmp_path / f"{trial}-{name}")
            if reason is not None:
                assert re.search(r"^\S+=.* cannot leave as GGUF: |package gguf|is not a multiple of 32|target 'null'|'null' ", reason), (
                    reason
                )
                assert "\n" not in reason
            else:
                assert (folder / "README.md").read_text().rstrip().endswith(MARK)
                assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} <= set(FORMATS[name].files)
            if name == "hf":
                model, _ = load_exported(folder)
                with torch.inference_mode():
                    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def refusal(run: Run, trial: int, name: str, folder: Path) -> str | None:
    """Why a trial cannot leave in a format; None if it did."""
    try:
        export_trial(run, trial, folder, name)
    except UserError as error:
        return str(error)
    return None


def test_a_format_that_is_not_known_is_refused(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    with pytest.raises(UserError, match="--format 'onnx' is not known; choose one of hf, "):
        export_trial(run, outcome.front[0].trial, tmp_path / "x", "onnx")
    assert {"hf", "gguf"} <= set(FORMATS)
    assert not (tmp_path / "x").exists()


def test_an_export_of_a_llama_leaves_as_gguf_with_its_weights(tmp_path: Path, searched: tuple[Run, Outcome]) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF is an extra")
    run, outcome = searched
    assert outcome.chosen is not None
    chosen = choose_trial(run, outcome.chosen.trial)
    config = SLMConfig(vocab_size=chosen.tokenizer.vocab_size, d_model=32, num_layers=2, num_heads=2, context=64)
    model = randomise(SLM(config), 0).eval()
    write_gguf_folder(dataclasses.replace(chosen, config=config, model=model), tmp_path)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (tensors["blk.1.ffn_up.weight"] == model.ffns[1].up.weight.detach().numpy()).all()
    assert "architecture `llama`, with matrices in F32" in (tmp_path / "README.md").read_text()


def test_the_card_says_which_form_the_files_have(native: Path, own: Path) -> None:
    assert "of the family `llama` of transformers" in (native / "README.md").read_text()
    card = (own / "README.md").read_text()
    assert "of no family of transformers" in card
    assert 'from_pretrained("my-model", trust_remote_code=True)' in card
    assert {p.name for p in own.iterdir()} - FILES == {
        "configuration_edgewise.py", "modeling_edgewise.py", "edgewise_config.py", "edgewise_model.py", "edgewise_operators.py",
    }  # fmt: skip


def test_a_model_that_becomes_native_takes_its_python_files_away(own: Path, searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    assert outcome.chosen is not None
    chosen = choose_trial(run, outcome.chosen.trial)
    config = SLMConfig(vocab_size=chosen.tokenizer.vocab_size, d_model=32, num_layers=1, num_heads=2, context=64)
    assert native_form(config) is not None
    write_folder(dataclasses.replace(chosen, config=config, model=SLM(config).initialise(0)), own)
    assert {p.name for p in own.iterdir()} == FILES
