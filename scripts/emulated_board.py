"""An aarch64 board without hardware: TVM's RPC server on an emulated processor, on this Linux machine.

Run from the project's folder as `python -m scripts.emulated_board`, or with `--tracker 127.0.0.1:9190 --key board`. The board
has a Python of Debian or Ubuntu for arm64 and the aarch64 wheels of the versions of TVM and NumPy that are installed here,
unpacked into Edgewise's cache without root and without installing anything; QEMU runs them. Only TVM's runtime is there, as
on a real board. It listens on the loopback address alone, and begins anew when a program has crashed it. Right for
testing that a remote target works; its times mean nothing. Where it cannot be had, one line on stderr says why, and
the exit status is 1.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from nas.cli_show import cache_dir
from scripts.emulator import DOWNLOAD_TIMEOUT_S, Unavailable, emulators
from targets.worker import end_with_parent

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "zlib1g")
"""What is asked of apt; it adds what they need."""
WHEELS = ("apache-tvm", "apache-tvm-ffi", "numpy", "ml-dtypes", "typing-extensions", "psutil", "cloudpickle", "tornado")
PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_24_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
HOST = "127.0.0.1"
_LEFT_OUT = re.compile(r"tvm/lib/libtvm_(compiler|runtime_cuda)")
"""Parts of TVM that a device does not need."""
_SERVER = """
import sys
from tvm.rpc.server import PopenRPCServerState
port, key, tracker = int(sys.argv[1]), sys.argv[2], (sys.argv[3], int(sys.argv[4])) if sys.argv[3:] else None
PopenRPCServerState("127.0.0.1", port, port + 1, key=key, tracker_addr=tracker, custom_addr="127.0.0.1").thread.join()
"""
_RESTART_S = 1.0


def board(cache: Path) -> Path:
    """The folder of the board's system; made at the first call, in a minute, most of it downloads of 120 MB.

    Raises:
        Unavailable: if its parts cannot be downloaded.
    """
    boards = cache / "boards"
    boards.mkdir(parents=True, exist_ok=True)
    root = boards / f"aarch64-{hashlib.sha256(' '.join(map(_pinned, WHEELS)).encode()).hexdigest()[:12]}"
    with (boards / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together wait for one download
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=boards) as temporary:
                made = Path(temporary) / "root"
                _unpack_system(Path(temporary), made)
                _unpack_wheels(Path(temporary), made)
                made.rename(root)
    return root


def command(root: Path, qemu: Path, port: int, key: str = "", tracker: tuple[str, int] | None = None) -> list[str]:
    """The command that serves; its environment is `environment(root)`."""
    where = [] if tracker is None else [tracker[0], str(tracker[1])]
    return [str(qemu), "-cpu", "max", "-L", str(root), str(_python(root)), "-W", "ignore", "-c", _SERVER, str(port), key, *where]


def environment(root: Path) -> dict[str, str]:
    """Variables for the board's programs: they see nothing of this machine's Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TVM_", "LD_"))}
    return kept | {"PYTHONPATH": str(root / "site"), "TVM_USE_RUNTIME_LIB": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def serve(root: Path, qemu: Path, port: int, key: str, tracker: tuple[str, int] | None) -> None:
    """Serves until interrupted. A program that crashes ends the server, which is then started again."""
    while True:
        child = subprocess.Popen(
            command(root, qemu, port, key, tracker), env=environment(root), start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # sessions, too
                os.killpg(child.pid, signal.SIGKILL)
        print(f"the server ended with status {child.returncode}; starting it again", file=sys.stderr, flush=True)
        time.sleep(_RESTART_S)


def _pinned(name: str) -> str:
    """What pip is asked for: the version that is installed here, if one is."""
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def _python(root: Path) -> Path:
    found = sorted(path for path in (root / "usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name))
    if not found:
        raise Unavailable("apt's package python3-minimal for arm64 holds no /usr/bin/python3.N")
    return found[-1]


def _unpack_system(folder: Path, root: Path) -> None:
    """Python for arm64 and all it needs, as the distribution of this machine has it."""
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise Unavailable(f"{tool} is not installed, so a system for arm64 cannot be downloaded")
    state, archives = folder / "state", folder / "cache" / "archives"
    for needed in (state / "lists" / "partial", archives / "partial"):
        needed.mkdir(parents=True)
    (state / "status").touch()  # nothing is installed there
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": folder / "cache",
    }
    private = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _download("apt's lists for arm64", ["apt-get", "-q", *private, "update"])
    _download("Python for arm64", ["apt-get", "-q", "-y", *private, "--download-only", "install", *PACKAGES])
    for package in sorted(archives.glob("*.deb")):
        done = subprocess.run(["dpkg-deb", "-x", str(package), str(root)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"dpkg-deb could not unpack {package.name}: {_last(done.stderr)}")


def _unpack_wheels(folder: Path, root: Path) -> None:
    """TVM's runtime and what its server imports."""
    version = _python(root).name.removeprefix("python")
    wheels = folder / "wheels"
    _download(
        "aarch64 wheels",
        [
            sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--dest", str(wheels), "--no-deps",
            "--only-binary=:all:", "--implementation", "cp", "--python-version", version,
            *(part for platform in PLATFORMS for part in ("--platform", platform)), *map(_pinned, WHEELS),
        ],
    )  # fmt: skip
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "site", [name for name in archive.namelist() if not _LEFT_OUT.match(name)])


def _download(what: str, arguments: list[str]) -> None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"downloading {what} took more than {DOWNLOAD_TIMEOUT_S} s; is there a network?") from None
    if done.returncode:
        raise Unavailable(f"{what} could not be downloaded: {_last(done.stderr)}")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problems = [line for line in lines if line.startswith(("E: ", "ERROR: "))]
    return (problems or lines or ["it gives no reason"])[-1]


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.emulated_board", description="Serves as an aarch64 board on an emulator.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="where the board is kept (default: Edgewise's cache)")
    parser.add_argument("--port", type=int, default=9090, help="where it listens, on the loopback address (default: 9090)")
    parser.add_argument("--tracker", metavar="HOST:PORT", help="the tracker to register with")
    parser.add_argument("--key", default="", help="the key to register or serve with")
    parser.add_argument("--make", action="store_true", help="only make the board, and print its folder")
    given = parser.parse_args()
    tracker = None
    if given.tracker is not None:
        host, _, port = given.tracker.rpartition(":")
        if not host or not port.isdigit():
            parser.error(f"--tracker {given.tracker!r} is not HOST:PORT")
        tracker = (host, int(port))
    try:
        root, qemu = board(given.cache), emulators(given.cache) / "qemu-aarch64"
    except Unavailable as reason:
        print(f"no emulated board: {reason}", file=sys.stderr)
        return 1
    if given.make:
        print(root)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        serve(root, qemu, given.port, given.key, tracker)
    return 0


if __name__ == "__main__":
    sys.exit(main())
