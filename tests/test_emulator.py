"""The script that fetches emulators uses what is installed, and says in one line what is missing."""

import re
from pathlib import Path

import pytest

from scripts.emulator import ARCHITECTURES, emulators, main


def install(folder: Path, version: str, suffix: str = "") -> None:
    """Programs that say they are QEMU."""
    for architecture in ARCHITECTURES:
        path = folder / f"qemu-{architecture}{suffix}"
        path.write_text(f"#!/bin/sh\necho 'qemu-{architecture} version {version} (made up)'\n", encoding="ascii")
        path.chmod(0o755)


@pytest.mark.parametrize("suffix", ["", "-static"])
def test_what_is_installed_is_used(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    install(tmp_path / "bin", "8.2.1", suffix)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    folder = emulators(tmp_path / "cache")
    assert folder.is_relative_to(tmp_path / "cache")
    for architecture in ARCHITECTURES:
        assert (folder / f"qemu-{architecture}").resolve() == tmp_path / "bin" / f"qemu-{architecture}{suffix}"


def test_the_second_call_looks_at_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    install(tmp_path / "bin", "8.2.1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    emulators(tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    assert emulators(tmp_path / "cache") == tmp_path / "cache" / "emulators"


@pytest.mark.parametrize("version", ["", "6.2.0"])
def test_without_an_emulator_and_without_apt_one_line_says_so(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An emulator that is too old is none."""
    (tmp_path / "bin").mkdir()
    if version:
        install(tmp_path / "bin", version)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.argv", ["emulator", "--cache", str(tmp_path)])
    assert main() == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"no emulator: apt-get is not installed, so QEMU cannot be downloaded; install qemu-user .*\n", err)
    assert sorted(path.name for path in (tmp_path / "emulators").iterdir()) == [".lock"]


def test_what_apt_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", "echo 'W: Failed to fetch http://host/list: no route to host' >&2; exit 100"), ("dpkg-deb", "exit 1")):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.argv", ["emulator", "--cache", str(tmp_path)])
    assert main() == 1
    expected = "no emulator: apt-get could not download qemu-user-static: Failed to fetch http://host/list: no route to host\n"
    assert capfd.readouterr().err == expected
