"""`edgewise train`: what it makes loads, it can begin with other weights, and says in a line what cannot be."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from search_helpers import write_speeches

from nas.cli import main
from nas.export import load_exported
from nas.pretraining import Plan
from nas.training_view import TrainingView
from nas.weights import read_facts

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {"model_type": "edgewise", "vocab_size": 320, "d_model": 16, "num_layers": 1, "num_heads": 2, "context": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a corpus, and a model trained of them."""
    folder = tmp_path_factory.mktemp("train")
    write_speeches(folder / "speeches.jsonl")
    (folder / "model.json").write_text(json.dumps(MODEL))
    assert main(command(folder, "out", "--tokens", "2000")) == 0
    return folder


def command(place: Path, out: str, *options: str, model: str = "model.json") -> list[str]:
    text = ["--corpus", str(place / "speeches.jsonl"), "--out", str(place / out), "--device", "cpu"]
    return ["train", str(place / model), *text, "--batch-tokens", "256", *options]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def test_trained_once_and_for_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_exported(place / "out")
    assert model.config.d_model == 16
    assert tokenizer.vocab_size <= 320
    before = (place / "out" / "model.safetensors").read_bytes()
    assert main(command(place, "out", "--tokens", "2000")) == 0
    out, err = capsys.readouterr()
    assert "out is trained already; to train further, give it as --init and another --out" in err
    assert "bits per byte after 2.05 k tokens" in out
    assert main(command(place, "out", "--tokens", "2000", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 8
    assert result == json.loads((place / "out" / "train.json").read_text())["result"]
    assert (place / "out" / "model.safetensors").read_bytes() == before
    assert "was begun with --tokens 2000, not 3000;" in refused(capsys, command(place, "out", "--tokens", "3000"))


def test_going_on_from_a_trained_model_keeps_its_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--bytes", "2kB", "--init", str(place / "out"), "--precision", "bf16", "--decay", "cosine", "--accumulate", "2")
    assert main(command(place, "warm", *options, model="out")) == 0
    _, tokenizer = load_exported(place / "warm")
    assert tokenizer.sha256 == load_exported(place / "out")[1].sha256
    losses = [json.loads(line)["loss"] for line in (place / "warm" / "log.jsonl").read_text().splitlines()]
    cold = [json.loads(line)["loss"] for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    assert losses[0] < cold[0]
    capsys.readouterr()


def test_what_cannot_be_is_refused_in_a_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give either --tokens or --bytes" in refused(capsys, command(place, "x"))
    assert "--device 'tpu9' is not here; give one of cpu" in refused(capsys, [*command(place, "x", "--tokens", "9"), "--device", "tpu9"])
    (place / "wide.json").write_text(json.dumps({**MODEL, "d_model": 32}))
    wide = command(place, "x", "--tokens", "9", "--init", str(place / "out"), model="wide.json")
    assert "has d_model=16 and CONFIG 32; give weights of the same model" in refused(capsys, wide)
    bare = command(place, "x", "--tokens", "9", "--init", str(place / "model.json"))
    assert "has no weights; give a folder with model.safetensors" in refused(capsys, bare)
    (place / "small.json").write_text(json.dumps({**MODEL, "vocab_size": 280}))
    small = command(place, "x", "--tokens", "9", "--tokenizer", str(place / "out" / "tokenizer.json"), model="small.json")
    assert "ids and the model vocab_size=280; give one that goes with it" in refused(capsys, small)
    run = command(place, "x", "--tokens", "9", "--init", str(place / "weights" / "00000.safetensors"))
    assert "is not a run: it has no manifest.json" in refused(capsys, run)
    named = command(place, "x", "--tokens", "9", "--tokenizer", str(place / "speeches.jsonl"))
    assert "is not named tokenizer.json" in refused(capsys, named)
    assert "--out" in refused(capsys, command(place, "model.json", "--tokens", "9"))
    assert not (place / "x").exists()


def test_it_is_evaluated_in_the_window_it_was_trained_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by whoever knows only its folder; a folder without a word of it is evaluated in its whole context."""
    assert main(command(place, "short", "--tokens", "512", "--window", "24")) == 0
    assert json.loads((place / "short" / "train.json").read_text())["result"]["window_tokens"] == 24
    evaluate = ["eval", str(place / "short"), str(place / "speeches.jsonl"), "--limit", "1", "--json"]
    capsys.readouterr()
    assert main(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 24
    path = place / "short" / "model.safetensors"
    facts = read_facts(path)
    assert facts is not None and facts.pop("window_tokens") == 24
    save_file(load_file(path), path, {"edgewise": json.dumps(facts)})
    assert main(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["window"] == MODEL["context"]


def test_a_tokenizer_file_is_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, "other", "--tokens", "256", "--tokenizer", str(place / "out" / "tokenizer.json"))) == 0
    capsys.readouterr()
    ours, theirs = load_exported(place / "other")[1], load_exported(place / "out")[1]
    assert ours.encode("My fellow citizens") == theirs.encode("My fellow citizens")
    assert ours.end_of_text == theirs.end_of_text


PLAN = Plan(steps=40, batch_windows=4, accumulate=2, window=64, epochs=1.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.training_view._LINE_EVERY_S", 0.0)
    text = io.StringIO()
    with TrainingView(Console(file=text, force_terminal=terminal, width=120), ceiling=lambda: 1e9) as view:
        view.preparing(0.5)
        view.begin(PLAN, 10, 1e6)
        view.stepped(20, 2.125)
        view.scoring()
    shown = text.getvalue()
    assert "10.2 k tokens in 40 steps of 4 × 64 (2 portions), going on after step 10" in shown
    assert "2.125 bits/byte" in shown
    assert "tokens/s" in shown
    assert "MFU" in shown
    assert ("step 20 of 40" in shown) is not terminal
    assert os.linesep in shown
