"""Object files -> a shared library, for this machine (the system's C compiler, else `ziglang`) or another (`ziglang`)."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def linker(triple: str | None = None) -> list[str]:
    """The command that compiles and links C on this machine.

    Args:
        triple: LLVM's name of the machine to link for, as in "aarch64-linux-gnu"; None: this one.

    Raises:
        RuntimeError: if there is none, saying what to install.
    """
    if triple is not None:
        if importlib.util.find_spec("ziglang"):
            return [sys.executable, "-m", "ziglang", "cc", "-target", zig_target(triple)]
        raise RuntimeError(f"no linker for {triple} is installed; run `pip install ziglang`")
    for name in ("cc", "gcc", "clang", "c++", "g++"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RuntimeError("no linker is installed (cc, gcc, clang or zig); run `pip install ziglang`")


def zig_target(triple: str) -> str:
    """Zig's name for a Linux machine, from LLVM's: no vendor, no "v7l" after "arm"."""
    architecture, *_, environment = triple.split("-")
    names = {"arm64": "aarch64", "amd64": "x86_64"}
    architecture = "arm" if architecture.startswith("armv") else names.get(architecture, architecture)
    return f"{architecture}-linux-{environment}"


def link_shared(executable: Any, path: Path, objects: Sequence[Path] = (), triple: str | None = None) -> None:
    """Links a compiled TVM executable, and further object files, into a shared library at `path`.

    Args:
        triple: LLVM's name of the machine that will load it; None: this one.
    """
    # Another machine's C library is not at hand; the process that loads the library has one, whichever it is.
    command = [*linker(triple), *(() if triple is None else ("-nostdlib",))]

    def link(output: str, objects: list[str], **_: Any) -> None:
        import subprocess

        done = subprocess.run([*command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"linking failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")

    link.output_format = "so"  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=link, addons=[str(o) for o in objects])
