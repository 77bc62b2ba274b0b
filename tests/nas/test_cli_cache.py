"""`edgewise cache`: what was compiled is counted and removed, in plain words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nas.cli import main
from targets.compile_cache import CompileCache

ROOT = Path(__file__).parents[2]
ABOUT = {
    "tvm": "0.27.0",
    "target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "num-cores": 4, "mattr": ["+neon"]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    for about, kernels in ((ABOUT, 3), ({}, 1)):
        cache = CompileCache(folder, about)
        for n in range(kernels):
            cache.add(f"{n}.o", lambda path: path.write_bytes(b"x" * 1000) and None)
        cache.add("stage.json", lambda path: path.write_text("{}" * 100) and None)


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["cache", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_info_says_where_how_much_and_for_which_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    lines = said(capsys, "info").splitlines()
    assert lines == [
        f"{folder}: 2 stages and 4 kernels, 4.40 kB; at most about 1.07 GB are kept for each target",
        "  aarch64-linux-gnu cortex-a76 +neon, cores: 4 (TVM 0.27.0): 1 stage and 3 kernels, 3.20 kB",
        "  unknown target: 1 stage and 1 kernel, 1.20 kB",
    ]


def test_info_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said(capsys, "info", "--json"))["targets"] == []
    fill(folder)
    found = json.loads(said(capsys, "info", "--json"))
    assert found["folder"] == str(folder)
    assert found["targets"][0] == {**ABOUT, "stages": 1, "kernels": 3, "bytes": 3200}


def test_clear_removes_what_was_compiled_and_says_how_much(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    (folder / "ceilings.json").write_text("{}")
    assert said(capsys, "clear") == f"{folder}: removed 2 stages and 4 kernels, 4.40 kB\n"
    assert said(capsys, "info") == f"{folder}: nothing is compiled yet\n"
    assert said(capsys, "clear") == f"{folder}: nothing was compiled, nothing to remove\n"
    assert (folder / "ceilings.json").exists()


def test_text_of_datasets_is_shown_and_removed_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = folder / "text" / "stories-0123456789abcdef.parquet"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x" * 2000)
    assert said(capsys, "info").splitlines() == [f"{folder}: nothing is compiled yet", f"{kept.parent}: the text of 1 dataset, 2.00 kB"]
    assert json.loads(said(capsys, "info", "--json"))["texts"] == [{"file": str(kept), "bytes": 2000}]
    said(capsys, "clear")
    assert kept.exists()
    assert said(capsys, "clear", "--text").splitlines()[1:] == [f"{kept.parent}: removed the text of 1 dataset, 2.00 kB"]
    assert not kept.exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "clear"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: Permission denied ({folder}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["info", "clear"])
def test_nothing_heavy_is_imported(command: str) -> None:
    heavy = ("torch", "tvm", "optuna", "plotly", "numpy", "rich")
    run = f"import sys; from nas.cli import main; status = main(['cache', {command!r}])"
    tell = f"print(status, sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{run}; {tell}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"


@pytest.mark.parametrize("command", ["cache", "cache info", "cache clear"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: edgewise {command}")
