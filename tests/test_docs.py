"""Every command that the README and the pages show is run, in the order shown, and every TOML they show is loaded."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a user who has nothing yet."""
    own = {"EDGEWISE_CACHE": str(folder / "cache"), "EDGEWISE_CONFIG": str(folder / "config")}
    return {**os.environ, "PYTHONPATH": str(ROOT), **own}


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "console")], ids=lambda p: p.stem)
def test_commands_shown_work(page: Path, tmp_path: Path) -> None:
    commands = [line[2:] for block in fenced(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands
    environment = surroundings(tmp_path)
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "edgewise", command
        done = subprocess.run(
            [sys.executable, "-m", "nas", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_python_shown_for_an_export_works(tmp_path: Path) -> None:
    (code,) = fenced(ROOT / "docs" / "export.md", "python")
    commands = [line[2:] for line in "".join(fenced(ROOT / "docs" / "export.md", "console")).splitlines() if "measure" not in line]
    environment = surroundings(tmp_path)
    for command in commands:
        subprocess.run([sys.executable, "-m", "nas", *shlex.split(command)[1:]], cwd=tmp_path, env=environment, check=True)
    script = code + "assert logits.shape[-1] == tokenizer.vocab_size\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


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
