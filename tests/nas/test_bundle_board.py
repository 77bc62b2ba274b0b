"""A bundle for another processor: compiled here, checked and run on an emulated aarch64 board, sent there and lying there."""

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_helpers import make_chosen

from nas.bundle_runner import read_manifest
from nas.cli import main
from nas.cli_show import cache_dir
from nas.tvm_bundle import write_bundle
from scripts.emulated_board import PLATFORMS, board, command, environment
from scripts.emulator import Unavailable, emulators
from targets.spec import DeviceSpec

pytestmark = pytest.mark.slow

DEVICE = """
name = "board"
kind = "rpc"
host = "127.0.0.1"
port = {port}
triple = "aarch64-linux-gnu"
cpu = "cortex-a76"
cores = 1
vector_bytes = 16
dot = "sdot"
memory_bytes = 1000000000
flops_per_s = 1e9
read_bytes_per_s = 1e9
"""


@pytest.fixture(scope="module")
def parts() -> tuple[Path, Path]:
    """The board's system, and the emulator."""
    try:
        return board(cache_dir()), emulators(cache_dir()) / "qemu-aarch64"
    except Unavailable as reason:
        pytest.skip(f"no emulated board: {reason}")


@pytest.fixture
def device(parts: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """The file of a board that serves."""
    root, qemu = parts
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    path, log = tmp_path / "board.toml", tmp_path / "board.log"
    path.write_text(DEVICE.format(port=port))
    with log.open("wb") as out:
        child = subprocess.Popen(command(root, qemu, port), env=environment(root), stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while b"bind to" not in log.read_bytes():
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield path
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def with_tokenizers(root: Path, folder: Path) -> dict[str, str]:
    """The board's environment with the third package that a bundle needs."""
    from importlib.metadata import version

    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms, f"tokenizers=={version('tokenizers')}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--dest", str(folder), *wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tokenizers for the board: {done.stderr[-300:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return environment(root) | {"PYTHONPATH": f"{root / 'site'}:{folder / 'site'}"}


def test_a_bundle_for_the_board_generates_there_what_pytorch_does(
    parts: tuple[Path, Path], device: Path, local_spec: DeviceSpec, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = make_chosen(tmp_path, local_spec, "int8", target=str(device), context=40)
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(chosen, folder)  # the device's numbers are compared with PyTorch's
    assert read_manifest(folder)["target"]["machine"] == "aarch64"
    assert "asimddp" in read_manifest(folder)["target"]["flags"]
    capfd.readouterr()
    options = ["My fellow", "--tokens", "16", "--temperature", "0.7", "--seed", "1"]
    assert main(["generate", str(folder), *options, "--target", str(device)]) == 0
    sent = capfd.readouterr().out
    assert len(sent) > 8
    assert main(["generate", str(folder), *options]) == 2
    assert "this bundle was compiled for aarch64, and this machine is" in capfd.readouterr().err
    root, qemu = parts
    lying_there = [str(qemu), "-cpu", "max", "-L", str(root), str(sorted((root / "usr/bin").glob("python3.*"))[-1]), "-W", "ignore"]
    done = subprocess.run(
        [*lying_there, str(folder / "run.py"), *options], env=with_tokenizers(root, tmp_path / "wheels"), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == sent
