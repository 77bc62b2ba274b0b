"""Every command that the README and the pages show is run, in the order shown, and every TOML they show is loaded.

The README's are run as a new user would: each a process, with the packaged speeches whole. Those of the pages are run in this
process, with the beginnings of the speeches, which takes a fifth of the time.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nas.cli import main

ROOT = Path(__file__).resolve().parent.parent
GOES_ON = {"export": "assert logits.shape[-1] == tokenizer.vocab_size\n"}
"""Pages whose Python goes on from their commands, and what must hold after it."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder and the environment of a user who has nothing yet, here and in child processes."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("EDGEWISE_CACHE", "cache"), ("EDGEWISE_CONFIG", "config"), ("PYTHONPATH", ROOT)):
        monkeypatch.setenv(name, str(tmp_path / value))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `edgewise` that a page shows."""
    found = [shlex.split(line[2:]) for line in "".join(fenced(page, "console")).splitlines() if line.startswith("$ ")]
    assert all(program == "edgewise" for program, *_ in found), found
    return [arguments for _, *arguments in found]


@pytest.fixture
def beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged speeches, of which each is cut short."""
    import nas.corpus
    import nas.tokenizer  # takes the function by its name, and must not keep ours

    whole = nas.corpus.load_corpus

    def load_corpus(source: str | None = None, **options: Any) -> nas.corpus.Corpus:
        corpus = whole(source, **options)
        train, validation = (tuple(document[:1500] for document in split) for split in (corpus.train, corpus.validation[:8]))
        return dataclasses.replace(corpus, train=train, validation=validation)

    monkeypatch.setattr(nas.corpus, "load_corpus", load_corpus)


@pytest.mark.usefixtures("surroundings")
def test_commands_of_the_readme_work() -> None:
    shown = commands(ROOT / "README.md")
    assert shown
    for arguments in shown:
        done = subprocess.run([sys.executable, "-m", "nas", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.mark.usefixtures("surroundings", "beginnings")
@pytest.mark.parametrize("page", [p for p in PAGES[1:] if fenced(p, "console")], ids=lambda p: p.stem)
def test_commands_shown_work(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the Python that goes on from them."""
    for arguments in commands(page):
        status = main(arguments)
        shown = capsys.readouterr()
        assert status == 0, f"{arguments}\n{shown.out}\n{shown.err}"
    if page.stem in GOES_ON:
        (code,) = fenced(page, "python")
        subprocess.run([sys.executable, "-c", code + GOES_ON[page.stem]], check=True)


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "toml")], ids=lambda p: p.stem)
def test_files_shown_load(page: Path, tmp_path: Path) -> None:
    """Search spaces, and device files, which say of what kind they are."""
    from search_spaces.space import load_space
    from targets.spec import read_device

    for number, text in enumerate(fenced(page, "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        assert read_device(path).kind if "kind" in tomllib.loads(text) else load_space(path).asked


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists() or (ROOT / target).exists(), f"{page.name}: {target}"
