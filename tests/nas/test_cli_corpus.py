"""The options of text, as a search and a training take them."""

import json
from pathlib import Path

import pytest
from search_helpers import SPACE_FILE, write_speeches

from nas.cli import main
from nas.corpus import load_corpus


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two texts, to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    speeches = write_speeches(tmp_path / "speeches.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "apart.jsonl").write_text("".join(speeches[:2]), encoding="utf-8")
    return tmp_path


def test_a_search_is_scored_on_the_held_out_text_it_was_begun_with(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", "--space", str(SPACE_FILE), "--target", "null", "--corpus", "speeches.jsonl", "--budget", "3kB", "--trials", "1"]
    command += ["--run", "run"]
    assert main([*command, "--held-out", "apart.jsonl"]) == 0
    err = capsys.readouterr().err
    assert "documents of speeches.jsonl are held out in apart.jsonl too, and are not trained on" in err
    corpus = load_corpus("speeches.jsonl", held_out="apart.jsonl")
    assert len(corpus.validation) == 2
    kept = json.loads((place / "run" / "manifest.json").read_text())["corpus"]
    assert (kept["sha256"], kept["held_out_bytes"]) == (corpus.sha256, corpus.validation_bytes)
    assert main(command) == 2
    assert "was made with --corpus" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["search", "--target", "null"], ["train", "smollm-135m", "--tokens", "1000", "--out", "out"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "speeches.jsonl", "--held-out", "nowhere"], "'nowhere' does not exist"),
        (["--corpus", "speeches.jsonl", "--corpus-bytes", "1MB"], "'speeches.jsonl' is read whole, --corpus-bytes is of a dataset"),
        (["--corpus", "hf:org/name:train[:10%]"], "asks for a part of a split"),
    ],
)
def test_text_that_there_is_not_is_refused_before_anything_is_made(
    place: Path, capsys: pytest.CaptureFixture[str], command: list[str], options: list[str], message: str
) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == before
