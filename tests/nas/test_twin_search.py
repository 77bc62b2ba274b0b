"""Searches whose models are scored by twins: what is measured is the model, what is trained the twin, and never one for the other."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from search_helpers import contents, repeated_steps, run_search, settings, write_speeches

from nas.cli import main
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun
from nas.export import FORMATS, choose_trial, export_trial, load_exported
from nas.models import model_at
from nas.run import Run
from nas.search import Outcome
from nas.tokenizer import Tokenizer
from search_spaces.counting import params, weight_bytes
from search_spaces.space import Space, load_space
from search_spaces.twin import trained_config

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = Space.from_dict(
    {
        "name": "pocket",
        "params": [20_000, 2_000_000],
        "twin": {"params": [2_000, 20_000]},
        "parameters": {
            "vocab_size": [300, 330],
            "d_model": {"low": 48, "high": 96, "step": 16},
            "num_layers": {"low": 3, "high": 6},
            "head_dim": 8,
            "attention": ["mha", "mqa"],
            "ffn_ratio": 2.0,
        },
    }
)


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")


@pytest.fixture(scope="module")
def corpus(speeches: Path) -> Corpus:
    return load_corpus(str(speeches))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> tuple[Run, Outcome]:
    return run_search(tmp_path_factory.mktemp("runs") / "pocket", corpus, trials=3, space=SPACE)


def test_the_model_is_measured_and_its_twin_is_trained(searched: tuple[Run, Outcome]) -> None:
    run, outcome = searched
    assert [e.state for e in outcome.evaluations] == ["complete"] * 3
    for evaluation in outcome.evaluations:
        config, twin, score = evaluation.config, evaluation.twin, evaluation.score
        assert config is not None and twin is not None and score is not None
        assert twin == trained_config(SPACE, config) != config
        assert (evaluation.params, score["twin_params"]) == (params(config), params(twin))
        assert evaluation.weight_bytes == weight_bytes(config)
        assert evaluation.measurement is not None and evaluation.measurement["packed_bytes"] > 4 * params(twin)
    for evaluation in outcome.front:
        kept = load_file(run.weights_path(evaluation.trial))
        assert sum(tensor.numel() for tensor in kept.values()) == (evaluation.score or {})["twin_params"]


def test_lost_weights_of_a_twin_are_made_again(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=2, space=SPACE)
    before = contents(run.path)
    run.weights_path(outcome.front[0].trial).unlink()
    run_search(tmp_path / "run", corpus, trials=2, space=SPACE)
    assert contents(run.path) == before


def test_another_precision_of_a_model_takes_the_weights_of_its_twin(tmp_path: Path, corpus: Corpus) -> None:
    one = {"vocab_size": 300, "d_model": 64, "num_layers": 3, "attention": "mha"}
    space = Space.from_dict({**SPACE.to_dict(), "parameters": {**SPACE.to_dict()["parameters"], **one}})
    run, outcome = run_search(tmp_path / "run", corpus, trials=4, space=space, given=settings(weights=("fp32", "int8")))
    found = {e.weights: e for e in outcome.evaluations if e.duplicate_of is None}
    plain, rounded = found["fp32"], found["int8"]
    assert plain.twin == rounded.twin and plain.twin is not None
    assert rounded.score is not None and rounded.score["twin_params"] == params(plain.twin)
    assert rounded.score["val_bpb_fp32"] == plain.val_bpb != rounded.val_bpb
    assert not repeated_steps(run)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.untrained])
def test_weights_of_a_twin_never_leave_as_the_models(searched: tuple[Run, Outcome], tmp_path: Path, name: str) -> None:
    run, outcome = searched
    trial = outcome.front[0].trial
    wanted = rf"trial {trial} was scored by a twin of .* parameters, so it has no weights of its own; export it with --format recipe"
    with pytest.raises(InvalidRun, match=wanted):
        export_trial(run, trial, tmp_path / "model", name)
    with pytest.raises(InvalidRun, match=wanted):
        choose_trial(run, trial)
    assert not (tmp_path / "model").exists()


def test_a_recipe_has_the_whole_model_without_weights_and_is_trained(
    searched: tuple[Run, Outcome], speeches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, outcome = searched
    chosen = outcome.front[0]
    assert chosen.config is not None
    folder = export_trial(run, chosen.trial, tmp_path / "model", "recipe")
    assert not (folder / "model.safetensors").exists()
    assert model_at(folder).config == chosen.config
    assert Tokenizer.published(folder).vocab_size == chosen.config.vocab_size
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "It has no weights yet." in card
    assert "validation bits per byte of the smaller model" in card
    assert "## Loading" not in card and "--init" not in card
    export_trial(run, chosen.trial, folder, "recipe")  # over itself
    with pytest.raises(InvalidRun, match=r"lacks model\.safetensors"):
        load_exported(folder)
    train = ["train", str(folder), "--corpus", str(speeches), "--tokens", "600", "--batch-tokens", "300", "--device", "cpu"]
    assert main([*train, "--out", str(tmp_path / "trained")]) == 0
    model, tokenizer = load_exported(tmp_path / "trained")
    assert (model.config, tokenizer.vocab_size) == (chosen.config, chosen.config.vocab_size)
    assert main([*train, "--out", str(tmp_path / "other"), "--init", str(run.weights_path(chosen.trial))]) == 2
    assert "was scored by a twin of" in capsys.readouterr().err


def test_phones_are_searched_here(corpus: Corpus, tmp_path: Path) -> None:
    """Hundreds of millions of parameters, in a second: with a small vocabulary, as most of a twin is its table."""
    values = load_space("phone").to_dict()
    space = Space.from_dict({**values, "params": [50_000_000, 600_000_000], "parameters": {**values["parameters"], "vocab_size": 300}})
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, space=space)
    assert [e.state for e in outcome.evaluations] == ["complete"]
    for evaluation in outcome.evaluations:
        assert evaluation.twin is not None and evaluation.params is not None
        assert evaluation.params > 50e6 > 12 * params(evaluation.twin)
    (first, *_) = json.loads(run.front_path.read_text())["front"]
    assert first["twin"]["params"] == (outcome.front[0].score or {})["twin_params"]


def test_spaces_show_says_how_twins_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spaces", "show", "phone"]) == 0
    shown = capsys.readouterr().out
    assert "[twin]\nparams = [400000, 2400000]" in shown
    assert "# Models are scored by twins, whose bodies have 400 k for 100 M to 2.40 M for 600 M parameters:" in shown
    assert main(["spaces", "show", "tiny"]) == 0
    assert "twin" not in capsys.readouterr().out
    assert main(["spaces", "show", "phone", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["twin"] == {"params": [400_000, 2_400_000]}
