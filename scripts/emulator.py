"""Fetches QEMU's user-mode emulators, so that programs for other processors run on this Linux machine.

Run from the project's folder as `python -m scripts.emulator`. Prints the folder that holds `qemu-aarch64`, `qemu-arm`
and `qemu-riscv64`. What is installed is used; else Debian's or Ubuntu's package is downloaded and unpacked into
Edgewise's cache, without root and without installing anything. Where neither can be had, one line on stderr says
why, and the exit status is 1.
"""

import argparse
import fcntl
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nas.cli_show import cache_dir

ARCHITECTURES = ("aarch64", "arm", "riscv64")
PACKAGES = ("qemu-user-static", "qemu-user")
"""Statically linked emulators are in the first up to Debian 12, in the second from Debian 13 on."""
LEAST_VERSION = (7, 0)
"""The first release with version 1.0 of RISC-V's vector instructions."""
DOWNLOAD_TIMEOUT_S = 300


class Unavailable(Exception):
    """There is no emulator here; the message is one line that says why."""


def emulators(cache: Path) -> Path:
    """The folder with one executable `qemu-ARCHITECTURE` for each of `ARCHITECTURES`; the second call takes milliseconds.

    Raises:
        Unavailable: if they are not installed and cannot be downloaded.
    """
    folder = cache / "emulators"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together wait for one download
        if not all((folder / f"qemu-{architecture}").exists() for architecture in ARCHITECTURES):
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                for path in _installed(Path(temporary)) or _downloaded(Path(temporary)):
                    path.replace(folder / path.name)
    return folder


def _installed(folder: Path) -> list[Path]:
    """Links in `folder` to the emulators on PATH; none unless all are there and new enough."""
    links = []
    for architecture in ARCHITECTURES:
        path = shutil.which(f"qemu-{architecture}-static") or shutil.which(f"qemu-{architecture}")
        if path is None or _version(Path(path)) < LEAST_VERSION:
            return []
        links.append(folder / f"qemu-{architecture}")
        links[-1].symlink_to(path)
    return links


def _downloaded(folder: Path) -> list[Path]:
    """The emulators out of the distribution's package, unpacked into `folder`."""
    wanted = {f"./usr/bin/qemu-{a}{suffix}": folder / f"qemu-{a}" for a in ARCHITECTURES for suffix in ("", "-static")}
    for package in PACKAGES:
        content = folder / "content.tar"
        with content.open("wb") as file:
            done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(download(package, folder))], stdout=file, check=False)
        if done.returncode:
            raise Unavailable(f"dpkg-deb could not unpack {package}: exit status {done.returncode}; is there room in {folder.parent}?")
        paths = []
        with tarfile.open(content) as archive:
            for member in archive:
                if member.isfile() and member.name in wanted:
                    paths.append(wanted[member.name])
                    with archive.extractfile(member) as source, paths[-1].open("wb") as target:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, target)
                    paths[-1].chmod(0o755)
        if len(paths) == len(ARCHITECTURES):
            if (version := min(_version(path) for path in paths)) < LEAST_VERSION:
                offered, least = (".".join(map(str, v)) for v in (version, LEAST_VERSION))
                raise Unavailable(f"apt offers QEMU {offered}, and RISC-V's vectors need {least} or later; install that yourself")
            return paths
    raise Unavailable(f"apt's packages {' and '.join(PACKAGES)} do not hold emulators for {', '.join(ARCHITECTURES)}")


def download(package: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """Downloads a Debian package into `folder` without root; returns the .deb file.

    Package lists that are missing (as in a container image) are fetched into `folder`, not into the system.

    Args:
        options: further options of apt-get, such as ("-o", "APT::Architecture=arm64").

    Raises:
        Unavailable: without apt-get and dpkg-deb, without a network, or if there is no such package.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise Unavailable(f"{tool} is not installed, so QEMU cannot be downloaded; install qemu-user (7.0 or later) yourself")
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    private = [*options, "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}", "-o", "APT::Sandbox::User="]
    problems: list[str] = []
    for attempt in (["download", package, *options], ["update", *private], ["download", package, *private]):
        try:
            done = subprocess.run(
                ["apt-get", "-q", *attempt], cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"downloading {package} with apt-get took more than {DOWNLOAD_TIMEOUT_S} s; is there a network?") from None
        if found := sorted(folder.glob(f"{package}_*.deb")):
            return found[0]
        problems += [line[3:] for line in done.stderr.splitlines() if line.startswith(("E: ", "W: Failed"))]
    # That a list could not be fetched says more than that the package is not in it.
    reason = next((line for line in problems if "Failed" in line), problems[0] if problems else "it gives no reason")
    raise Unavailable(f"apt-get could not download {package}: {reason}")


def _version(path: Path) -> tuple[int, ...]:
    text = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.emulator", description="Fetches QEMU's user-mode emulators.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="where they are kept (default: Edgewise's cache)")
    try:
        print(emulators(parser.parse_args().cache))
    except Unavailable as reason:
        print(f"no emulator: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
