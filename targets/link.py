"""Object files -> a shared library, for this machine or another: what links is looked for, and what is missing is said.

| linker | what it is | for |
|---|---|---|
| zig | PyPI's `ziglang`: a C compiler that knows every machine | Linux, Android, macOS |
| gcc | Debian's cross compilers, such as `aarch64-linux-gnu-gcc` | Linux |
| ndk | the clang of Android's NDK | Android |
| none | an archive of objects, which the device links with a compiler of its own | any |
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from targets.spec import Linker

_ANDROID_API = 24
"""Android 7.0, the oldest that current NDKs link for."""
_ANDROID_LIBRARIES = ("libc.so", "libm.so")


class NoLinker(RuntimeError):
    """Nothing here links for the device; the message is one line with what to install."""


def link_command(triple: str | None = None, linker: Linker = "auto") -> list[str]:
    """The command that compiles and links C.

    Args:
        triple: LLVM's name of the machine to link for, as in "aarch64-linux-gnu"; None: this one.
        linker: which one to use; "auto": the first that is installed.

    Raises:
        NoLinker: if it is not installed or does not know such machines, saying what to do.
    """
    assert linker != "none", "an archive is not linked here"
    if triple is None:
        return _native(linker)
    if linker == "gcc":
        return [_gcc(triple)]
    if linker == "ndk" or (linker == "auto" and not _has_zig() and is_android(triple)):
        return _ndk(triple)
    if _has_zig():
        return [*_zig(), "-target", zig_target(triple)]
    if linker == "auto" and (path := shutil.which(_gcc_name(triple))):
        return [path]
    raise NoLinker(f"no linker for {triple} is installed; run `pip install ziglang`")


def zig_target(triple: str) -> str:
    """Zig's name for a machine, from LLVM's: no vendor, no "v7l" after "arm", no version of the system.

    Raises:
        NoLinker: for a system that libraries are not made for.
    """
    architecture, *_, environment = triple.split("-")
    names = {"arm64": "aarch64", "amd64": "x86_64"}
    architecture = "arm" if architecture.startswith("armv") else names.get(architecture, architecture)
    if "-apple-" in triple or environment.startswith(("macos", "darwin")):
        return f"{architecture}-macos"
    if "linux" not in triple:
        raise NoLinker(f'triple={triple!r} is not of Linux, Android or macOS, which zig links for; use linker = "none"')
    return f"{architecture}-linux-{'gnu' if environment == 'linux' else environment.rstrip('0123456789')}"


def is_android(triple: str | None) -> bool:
    """Whether that machine runs Android."""
    return "-android" in (triple or "")


def link_shared(executable: Any, path: Path, objects: Sequence[Path] = (), triple: str | None = None, linker: Linker = "auto") -> Path:
    """Links a compiled TVM executable, and further object files, into a shared library.

    Args:
        executable: what `tvm.compile` gave.
        path: where the library goes; for linker "none" the archive goes there, with the suffix ".tar".
        objects: further object files.
        triple: LLVM's name of the machine that will load it; None: this one.
        linker: what links.

    Returns:
        The path written.

    Raises:
        NoLinker: if that linker is not here.
        RuntimeError: if linking fails.
    """
    addons = [str(o) for o in objects]
    if linker == "none":
        path = path.with_suffix(".tar")
        executable.export_library(str(path), addons=addons)
        return path
    command = link_command(triple, linker)

    def link(output: str, objects: list[str], **_: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _run([*command, "-shared", "-fPIC", *_foreign(triple, command, Path(folder)), "-o", output, *objects])

    link.output_format = "so"  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=link, addons=addons)
    return path


def _foreign(triple: str | None, command: Sequence[str], folder: Path) -> list[str]:
    """Options by which a library for another machine is linked without that machine's libraries at hand."""
    if triple is None:
        return []
    if zig_target(triple).endswith("-macos"):
        return ["-nostdlib", "-Wl,-undefined,dynamic_lookup"]
    if not is_android(triple):
        return ["-nostdlib"]  # the process that loads the library has a C library, whichever it is
    if "ziglang" not in command:
        return ["-lm"]  # the NDK has Android's libraries
    # Android's loader looks for a symbol in the libraries that are named, and nowhere else: empty ones lend their names.
    for name in _ANDROID_LIBRARIES:
        (folder / "empty.c").write_text("", encoding="utf-8")
        _run([*command, "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-o", str(folder / name), str(folder / "empty.c")])
    return ["-nostdlib", "-Wl,--no-as-needed", *(str(folder / name) for name in _ANDROID_LIBRARIES)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"linking failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")


def _native(linker: Linker) -> list[str]:
    """For this machine: the system's C compiler, else zig."""
    if linker == "ndk":
        raise NoLinker('linker="ndk" is for Android, and the device is this machine; leave linker out')
    names = () if linker == "zig" else ("gcc",) if linker == "gcc" else ("cc", "gcc", "clang", "c++", "g++")
    for name in names:
        if path := shutil.which(name):
            return [path]
    if linker != "gcc" and _has_zig():
        return _zig()
    raise NoLinker(f"no linker is installed ({', '.join((*names, 'zig') if linker != 'gcc' else names)}); run `pip install ziglang`")


def _has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def _zig() -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc"]


def _gcc_name(triple: str) -> str:
    architecture, _, environment = zig_target(triple).partition("-linux-")
    return f"{architecture}-linux-{environment or 'gnu'}-gcc"


def _gcc(triple: str) -> str:
    if is_android(triple) or "-linux-" not in zig_target(triple):
        raise NoLinker(f'linker="gcc" links for Linux, not for {triple}; use linker = "zig"')
    name = _gcc_name(triple)
    path = shutil.which(name)
    if path is None:
        package = name.removesuffix("-gcc").replace("_", "-")
        raise NoLinker(f'no {name} is installed; run `apt install gcc-{package}`, or use linker = "zig"')
    return path


def _ndk(triple: str) -> list[str]:
    """The clang that TVM_NDK_CC names, else that of the NDK in ANDROID_NDK_HOME."""
    if not is_android(triple):
        raise NoLinker(f'linker="ndk" is for Android, and triple={triple!r} is not; use linker = "zig"')
    if compiler := os.environ.get("TVM_NDK_CC"):
        if path := shutil.which(compiler):
            return [path]
        raise NoLinker(f"TVM_NDK_CC={compiler!r} is not a program; set it to the clang of Android's NDK")
    if home := os.environ.get("ANDROID_NDK_HOME"):
        for clang in sorted(Path(home).glob("toolchains/llvm/prebuilt/*/bin/clang")):
            return [str(clang), f"--target={zig_target(triple)}{_ANDROID_API}"]
        raise NoLinker(f"ANDROID_NDK_HOME={home!r} holds no toolchains/llvm/prebuilt/*/bin/clang; set it to the folder of Android's NDK")
    raise NoLinker('Android\'s NDK is not found; set ANDROID_NDK_HOME to its folder, or run `pip install ziglang` and use linker = "zig"')
