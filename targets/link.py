"""Object files -> a shared library: the system's C compiler, else the `ziglang` package."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def linker() -> list[str]:
    """The command that links on this machine.

    Raises:
        RuntimeError: if there is none, saying what to install.
    """
    for name in ("cc", "gcc", "clang", "c++", "g++"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RuntimeError("no linker is installed (cc, gcc, clang or zig); run `pip install ziglang`")


def link_shared(executable: Any, path: Path, objects: Sequence[Path] = ()) -> None:
    """Links a compiled TVM executable, and further object files, into a shared library at `path`."""
    command = linker()

    def link(output: str, objects: list[str], **_: Any) -> None:
        import subprocess

        done = subprocess.run([*command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"linking failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")

    link.output_format = "so"  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=link, addons=[str(o) for o in objects])
