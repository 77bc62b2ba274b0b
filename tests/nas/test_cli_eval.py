"""`edgewise eval`: the model as it is deployed, on the user's files, in a table, in JSON, or refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from search_helpers import run_search, settings, write_speeches

from nas.cli import main
from nas.corpus import load_corpus
from nas.evaluation import Evaluation
from nas.export import export_trial
from nas.likelihood import wilson_interval
from nas.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    {"good": "The people of the United States", "bad": "of States The United people the", "group": "[red]order"},
    {"good": "We have the right.", "bad": "We has the right.", "group": "agreement"},
    {"good": "They are here.", "bad": "They is here.", "group": "agreement"},
]
CHOICE = {"context": "The Government of the United", "choices": ["States", "xqzj", "of"], "answer": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose weights were rounded, the text it was scored on, and tasks."""
    folder = tmp_path_factory.mktemp("eval")
    corpus = load_corpus(str(write_speeches(folder / "speeches.jsonl")))
    run_search(folder / "small", corpus, trials=3, given=settings(weights=("int4",)))
    (folder / "held-out.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in corpus.validation))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "choice.jsonl").write_text(json.dumps(CHOICE) + "\n")
    return folder


@pytest.fixture
def chosen(place: Path) -> Evaluation:
    front = json.loads((place / "small" / "front.json").read_text())
    found = Run(place / "small", json.loads((place / "small" / "manifest.json").read_text())).load(front["chosen"])
    assert found is not None
    return found


def answered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert isinstance(values, dict)
    return values


def test_a_run_scores_as_it_was_scored(place: Path, chosen: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    """The default choice in its own precision gives the bits per byte that its record has; in float32, those of before."""
    assert chosen.score is not None
    values = answered(capsys, place / "small", place / "held-out.jsonl")
    assert (values["model"], values["trial"], values["weights"]) == ("small", chosen.trial, "int4")
    assert values["window"] == chosen.score["window_tokens"]
    (file,) = values["files"]
    assert (file["kind"], file["loss_unit"], file["file"]) == ("text", "bits/byte", str(place / "held-out.jsonl"))
    assert (file["loss"], file["loss_stderr"]) == pytest.approx((chosen.val_bpb, chosen.val_bpb_stderr), rel=1e-5)
    float32 = answered(capsys, place / "small", place / "held-out.jsonl", "--trial", str(chosen.trial), "--weights", "fp32")
    assert float32["files"][0]["loss"] == pytest.approx(chosen.score["val_bpb_fp32"], rel=1e-5)
    assert abs(float32["files"][0]["loss"] - file["loss"]) > 1e-4


def test_an_export_scores_as_the_run_it_is_from(
    place: Path, chosen: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(place / "small", json.loads((place / "small" / "manifest.json").read_text()))
    folder = export_trial(run, chosen.trial, tmp_path / "model")
    files = [place / "pairs.jsonl", place / "choice.jsonl", place / "held-out.jsonl"]
    of_run = answered(capsys, place / "small", *files)
    exported = answered(capsys, folder, *files, "--weights", "int4")
    assert exported["files"] == of_run["files"]
    assert (exported["model"], exported["trial"], exported["window"]) == ("model", None, of_run["window"])
    assert answered(capsys, folder, *files)["weights"] == "fp32"


def test_what_is_shown(place: Path, chosen: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(place / name) for name in ("pairs.jsonl", "choice.jsonl", "held-out.jsonl")]
    assert main(["eval", str(place / "small"), *files]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith(f"small, trial {chosen.trial}: ")
    assert lines[0].endswith(", int4 weights")
    assert lines[1].split() == ["file", "kind", "n", "accuracy", "95", "%", "per", "byte", "95", "%", "chance", "loss", "perplexity"]
    begins = [line.split("  ")[0] or line.split()[0] for line in lines[2:]]
    assert begins == ["pairs", "[red]order", "agreement", "choice", "held-out"]
    values = answered(capsys, place / "small", *files)["files"]
    share = values[0]["accuracy"]
    low, high = wilson_interval(share, 3)
    assert f"{100 * share:.1f} %  {100 * low:.1f}–{100 * high:.1f}" in lines[2]
    assert "50.0 %" in lines[2]
    assert "33.3 %" in lines[5]
    assert values[2]["accuracy"] is None
    assert f"{values[2]['loss']:.3f} ± {values[2]['loss_stderr']:.3f}" in lines[6]
    assert {label: group["n"] for label, group in values[0]["groups"].items()} == {"[red]order": 1, "agreement": 2}


def test_limit_items_and_window(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = answered(capsys, place / "small", place / "pairs.jsonl", "--limit", "2", "--items")
    (file,) = values["files"]
    assert file["n"] == len(file["items"]) == 2
    for row, found in zip(PAIRS, file["items"], strict=False):
        assert (found["options"], found["group"]) == ([row["good"], row["bad"]], row["group"])
        assert found["right"] == (found["log_likelihoods"][0] > found["log_likelihoods"][1])
    assert main(["eval", str(place / "small"), str(place / "pairs.jsonl"), "--window", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["files"][0]["shortened"] == 3
    assert err == "pairs: 3 of 3 items are longer than 4 tokens; their beginnings were cut\n"


def test_what_cannot_be_scored_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pairs = str(place / "small"), str(place / "pairs.jsonl")
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"good": "a", "bad": "b", "note": 1}) + "\n")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "edgewise", "vocab_size": 320, "d_model": 16, "num_layers": 1, "num_heads": 2}))
    for arguments, message in [
        ([run], "Missing argument 'FILE...'; see `edgewise eval --help`"),
        ([run, str(tmp_path / "no.jsonl")], "no.jsonl' does not exist; give a .jsonl file of tasks"),
        ([run, str(tmp_path / "wrong.jsonl")], "wrong.jsonl:1 has the unknown field"),
        ([str(tmp_path / "none"), pairs], "none' does not exist"),
        ([str(tmp_path), pairs], "has no trained weights; give a run, or a folder from `edgewise export`"),
        (["smollm-135m", pairs], "'smollm-135m' has no trained weights"),
        ([str(tmp_path), pairs, "--trial", "1"], "--trial 1 is of a run and"),
        ([run, pairs, "--trial", "99"], "trial 99 is not in run"),
        ([run, pairs, "--window", "9999"], "--window 9999 is more than the 1024 tokens that small can see at once"),
        ([run, pairs, "--limit", "0"], "0 is not in the range x>=1"),
        ([run, pairs, "--items"], "--items is a part of the JSON; give --json as well"),
    ]:
        assert main(["eval", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err


def test_help_answers_at_once_and_teaches() -> None:
    code = "import sys; from nas.cli import main; main(['eval', '--help']); print(sorted({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "edgewise eval runs/tiny-local notes.txt" in done.stdout
