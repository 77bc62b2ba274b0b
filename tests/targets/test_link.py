"""Linkers: the one that is asked for, the first that is there, and one line about what is missing."""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from targets import link
from targets.link import NoLinker, is_android, link_command, link_shared, zig_target
from targets.spec import Linker, load_spec
from targets.toolchain import toolchain

ELF, MACH_O = b"\x7fELF", b"\xcf\xfa\xed\xfe"
MACHINES = {"pi5": 183, "pi-32bit": 40, "riscv64-rvv": 243, "android-arm64": 183, "x86-64-avx2": 62}
"""e_machine of the ELF header (System V ABI, "ELF Header")."""


def program(target: dict[str, Any]) -> Any:
    """A kernel that calls the C library."""
    x = te.placeholder((64,), name="x")
    kernel = te.create_prim_func([x, te.compute((64,), lambda i: te.exp(x[i]), name="out")]).with_attr("global_symbol", "f")
    return tvm.compile(tvm.IRModule({"f": kernel}), tvm.target.Target(target))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing installed; returns the only folder of its PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("TVM_NDK_CC", "ANDROID_NDK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(link, "_has_zig", lambda: False)
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


# --- libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_zig_links_for_every_shipped_linux_and_android_board(name: str, tmp_path: Path) -> None:
    tools = toolchain(load_spec(name))
    made = link_shared(program(tools.target), tmp_path / "f.so", triple=tools.triple, linker="zig")
    header = made.read_bytes()[:20]
    assert header[:4] == ELF
    assert int.from_bytes(header[16:18], "little") == 3  # ET_DYN, a shared library
    assert int.from_bytes(header[18:20], "little") == MACHINES[name]


def test_a_library_for_android_names_the_libraries_it_needs(tmp_path: Path) -> None:
    """Its loader looks for `expf` in those and nowhere else."""
    tools = toolchain(load_spec("android-arm64"))
    content = link_shared(program(tools.target), tmp_path / "f.so", triple=tools.triple).read_bytes()
    assert b"expf\0" in content
    assert b"libm.so\0" in content and b"libc.so\0" in content
    assert str(tmp_path).encode() not in content


def test_zig_links_for_a_mac(tmp_path: Path) -> None:
    tools = toolchain(load_spec("apple-silicon"))
    header = link_shared(program(tools.target), tmp_path / "f.so", triple=tools.triple).read_bytes()[:16]
    assert header[:4] == MACH_O
    assert int.from_bytes(header[4:8], "little") == 0x0100000C  # CPU_TYPE_ARM64
    assert int.from_bytes(header[12:16], "little") == 6  # MH_DYLIB


def test_without_a_linker_the_device_gets_an_archive_of_objects(tmp_path: Path) -> None:
    tools = toolchain(load_spec("pi5"))
    (tmp_path / "more.o").write_bytes(b"object")
    made = link_shared(program(tools.target), tmp_path / "f.so", [tmp_path / "more.o"], tools.triple, "none")
    assert made == tmp_path / "f.tar"
    assert not (tmp_path / "f.so").exists()
    with tarfile.open(made) as archive:
        objects = {member.name: archive.extractfile(member).read() for member in archive.getmembers() if member.isfile()}  # type: ignore[union-attr]
    assert objects.pop("more.o") == b"object"
    assert any(content[:4] == ELF for content in objects.values())


# Zig first makes a C library for this machine: most of a minute, once.
@pytest.mark.parametrize("linker", ["auto", pytest.param("zig", marks=pytest.mark.slow)])
def test_what_is_linked_for_this_machine_runs(linker: Linker, tmp_path: Path) -> None:
    made = link_shared(program({"kind": "llvm"}), tmp_path / "f.so", linker=linker)
    x, y = (tvm.runtime.tensor(np.full(64, value, np.float32)) for value in (0.0, 7.0))
    tvm.runtime.load_module(str(made))["f"](x, y)
    assert (y.numpy() == 1).all()


def test_a_failed_link_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_text("no object")
    with pytest.raises(RuntimeError, match=r"^linking failed: .*") as caught:
        link_shared(program({"kind": "llvm"}), tmp_path / "f.so", [tmp_path / "broken.o"])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no cross gcc is installed: apt install gcc-aarch64-linux-gnu")
def test_a_cross_gcc_links(tmp_path: Path) -> None:
    tools = toolchain(load_spec("pi5"))
    header = link_shared(program(tools.target), tmp_path / "f.so", triple=tools.triple, linker="gcc").read_bytes()[:20]
    assert header[:4] == ELF and int.from_bytes(header[18:20], "little") == 183


# --- which one ------------------------------------------------------------------------------------


def test_auto_takes_zig_then_a_cross_gcc(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoLinker, match=r"^no linker for aarch64-linux-gnu is installed; run `pip install ziglang`$"):
        link_command("aarch64-linux-gnu")
    gcc = put(bare / "aarch64-linux-gnu-gcc")
    assert link_command("aarch64-linux-gnu") == [str(gcc)]
    monkeypatch.setattr(link, "_has_zig", lambda: True)
    assert link_command("aarch64-linux-gnu")[-4:] == ["ziglang", "cc", "-target", "aarch64-linux-gnu"]
    assert link_command("aarch64-linux-gnu", "gcc") == [str(gcc)]


@pytest.mark.parametrize(
    ("triple", "program", "package"),
    [
        ("aarch64-unknown-linux-gnu", "aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
        ("armv7l-linux-gnueabihf", "arm-linux-gnueabihf-gcc", "gcc-arm-linux-gnueabihf"),
        ("riscv64-linux-gnu", "riscv64-linux-gnu-gcc", "gcc-riscv64-linux-gnu"),
        ("x86_64-linux-gnu", "x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
    ],
)
def test_a_cross_gcc_has_debians_name(triple: str, program: str, package: str, bare: Path) -> None:
    with pytest.raises(NoLinker, match=f"^no {program} is installed; run `apt install {package}`"):
        link_command(triple, "gcc")
    path = put(bare / program)
    assert link_command(triple, "gcc") == [str(path)]


def test_the_ndk_is_found_by_either_variable(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoLinker, match="Android's NDK is not found; set ANDROID_NDK_HOME"):
        link_command("aarch64-linux-android", "ndk")
    monkeypatch.setenv("ANDROID_NDK_HOME", str(bare))
    with pytest.raises(NoLinker, match=r"ANDROID_NDK_HOME=.* holds no toolchains"):
        link_command("aarch64-linux-android")
    clang = put(bare / "toolchains/llvm/prebuilt/linux-x86_64/bin/clang")
    assert link_command("aarch64-linux-android") == [str(clang), "--target=aarch64-linux-android24"]
    own = put(bare / "my-clang")
    monkeypatch.setenv("TVM_NDK_CC", str(own))
    assert link_command("aarch64-linux-android", "ndk") == [str(own)]
    monkeypatch.setenv("TVM_NDK_CC", "nowhere")
    with pytest.raises(NoLinker, match="TVM_NDK_CC='nowhere' is not a program"):
        link_command("aarch64-linux-android", "ndk")


def test_the_ndk_links_with_its_own_libraries(bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clang that writes down what it is asked for."""
    clang = put(bare / "toolchains/llvm/prebuilt/linux-x86_64/bin/clang")
    monkeypatch.setenv("PATH", os.defpath)
    clang.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"\n')
    monkeypatch.setenv("ANDROID_NDK_HOME", str(bare))
    tools = toolchain(load_spec("android-arm64"))
    made = link_shared(program(tools.target), tmp_path / "f.so", triple=tools.triple, linker="ndk")
    assert made.read_text() == "made\n"
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:4] == ["--target=aarch64-linux-android24", "-shared", "-fPIC", "-lm"]
    assert "-nostdlib" not in asked


@pytest.mark.parametrize(
    ("triple", "linker", "message"),
    [
        ("aarch64-linux-android", "gcc", 'linker="gcc" links for Linux, not for aarch64-linux-android'),
        ("arm64-apple-macos", "gcc", 'linker="gcc" links for Linux, not for arm64-apple-macos'),
        ("aarch64-linux-gnu", "ndk", "linker=\"ndk\" is for Android, and triple='aarch64-linux-gnu' is not"),
        (None, "ndk", 'linker="ndk" is for Android, and the device is this machine'),
        (None, "auto", r"no linker is installed \(cc, gcc, clang, c\+\+, g\+\+, zig\); run `pip install ziglang`"),
        (None, "gcc", r"no linker is installed \(gcc\)"),
    ],
)
def test_a_linker_that_cannot_is_refused(triple: str | None, linker: Linker, message: str, bare: Path) -> None:
    with pytest.raises(NoLinker, match=f"^{message}") as caught:
        link_command(triple, linker)
    assert "\n" not in str(caught.value)


def test_other_systems_are_refused() -> None:
    with pytest.raises(NoLinker, match="triple='x86_64-pc-windows-msvc' is not of Linux, Android or macOS"):
        zig_target("x86_64-pc-windows-msvc")


@pytest.mark.parametrize(
    ("triple", "zig"),
    [
        ("arm64-apple-macos", "aarch64-macos"),
        ("arm64-apple-darwin23.1.0", "aarch64-macos"),
        ("x86_64-apple-macosx14.0", "x86_64-macos"),
        ("aarch64-linux-android", "aarch64-linux-android"),
        ("aarch64-none-linux-android24", "aarch64-linux-android"),
        ("x86_64-unknown-linux", "x86_64-linux-gnu"),
    ],
)
def test_macs_and_phones_have_names_in_zig(triple: str, zig: str) -> None:
    assert zig_target(triple) == zig
    assert is_android(triple) == ("android" in zig)
