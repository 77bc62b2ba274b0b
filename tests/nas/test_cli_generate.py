"""`edgewise generate`: what it hands to the runner, and that nothing but one line comes of a mistake."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nas import cli_generate
from nas.cli import main


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The runner's arguments, instead of running it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(cli_generate, "_run", lambda arguments, target=None: calls.append(arguments) or 0)
    return calls


def test_options_reach_the_runner_and_a_prompt_is_never_taken_for_one(handed: list[list[str]]) -> None:
    assert main(["generate", "b", "--", "--seed=1"]) == 0
    assert handed.pop() == ["--folder=b", "--", "--seed=1"]
    options = ["--tokens", "8", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--seed", "2", "--stats"]
    assert main(["generate", "b", "hello", *options]) == 0
    expected = ["--tokens=8", "--temperature=0.5", "--top-k=3", "--top-p=0.9", "--seed=2", "--stats"]
    assert handed.pop() == ["--folder=b", *expected, "--", "hello"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "0 is not in the range x>=1"),
        (["--temperature", "-1"], "-1.0 is not in the range"),
        (["--top-k", "-1"], "-1 is not in the range"),
        (["--top-p", "0"], "0.0 is not in the range"),
        (["--seed", "-5"], "-5 is not in the range"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], message: str, handed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "b", "hello", *options]) == 2
    assert message in capsys.readouterr().err
    assert not handed


def test_a_runner_that_is_ended_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_generate, "_run", lambda arguments, target=None: -signal.SIGILL)
    assert main(["generate", "b", "hello"]) == 1
    assert capsys.readouterr().err.strip() == (
        "error: the model's process was ended by SIGILL; if b is of another machine, export it for this one"
    )


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is no bundle: it has no manifest.json; give a folder of `edgewise export --format tvm`"),
        ("{", "manifest.json is damaged, or not the manifest of a bundle; export the model again"),
        (json.dumps({"format": 1, "sha256": "0"}), "was changed after the bundle was made (its sha256 is another); export the model again"),
    ],
)
def test_a_folder_that_is_no_bundle_is_one_line_on_stderr(manifest: str | None, message: str, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    command = [sys.executable, "-W", "error", "-m", "nas.bundle_runner", f"--folder={tmp_path}", "--", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"{message}\n")
    assert done.stderr.count("\n") == 1
