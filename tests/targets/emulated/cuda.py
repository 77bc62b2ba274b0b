"""CUDA kernels of a compiled program run on this machine's processor: the very source that is compiled for a GPU.

The library that calls them is the one that a GPU's owner loads; only where it looks for its kernels it finds these:
in this process (`emulated`), or through TVM's CUDA runtime, under which there is no driver but ours (`install_driver`).
"""

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi

_HERE = Path(__file__).parent
_LOADER = "ffi.Module.load_from_bytes.cuda"
_BEGIN = b"#ifdef __CUDACC_RTC__"
_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernel:
    """A kernel: its source, and the launch sizes that its caller gives after the arguments, if that is known."""

    source: str
    launch: tuple[str, ...] = ()

    @property
    def declaration(self) -> re.Match[str]:
        """Where its name and its parameters are."""
        (found,) = re.finditer(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) {', self.source)
        return found

    @property
    def name(self) -> str:
        """Its name."""
        return self.declaration[1]

    @property
    def parameters(self) -> list[str]:
        """C types of its arguments."""
        return [text.rpartition(" ")[0].replace("__restrict__", "").strip() for text in self.declaration[2].split(",")]

    @property
    def body(self) -> str:
        """What its threads do."""
        return self.source[self.declaration.end() :]

    @property
    def waits(self) -> bool:
        """Whether its threads wait for each other."""
        return "__syncthreads()" in self.body or "_sync(" in self.body


def device_kernel(code: bytes) -> DeviceKernel:
    """A kernel from `targets.tvm_device_code`: kind, and bytes that are a format, one function (name, types, launch sizes) and source."""
    kind, rest = _take(code)
    assert kind == b"cuda"
    data, _ = _take(rest)
    form, rest = _take(data)
    assert form == b"cuda" and _count(rest) == 1
    _, rest = _take(_take(rest[8:])[1])
    rest = rest[8 + 4 * _count(rest) :]
    count, rest, launch = _count(rest), rest[8:], []
    for _ in range(count):
        tag, rest = _take(rest)
        launch.append(tag.decode())
    return DeviceKernel(launch=tuple(launch), source=data[data.index(_BEGIN) :].decode())


def _count(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


def _take(data: bytes) -> tuple[bytes, bytes]:
    return data[8 : 8 + _count(data)], data[8 + _count(data) :]


def compile_kernels(kernels: Sequence[DeviceKernel], folder: Path) -> Path:
    """The kernels as a library of TVM's for this processor, in `folder`."""
    for header in ("cuda.h", "cuda_fp16.h"):
        (folder / header).write_text("", encoding="utf-8")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    text = ['#include "cuda_on_cpu.h"']
    for kernel in kernels:
        text += [f"namespace in_{kernel.name} {{", kernel.source, _entry(kernel), "}"]
    source.write_text("\n".join(text), encoding="utf-8")
    compiler = [path] if (path := shutil.which("g++") or shutil.which("clang++")) else [sys.executable, "-m", "ziglang", "c++"]
    flags = ["-std=c++17", "-O1", "-w", "-fno-exceptions", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command = [*compiler, *flags, f"-I{_HERE}", f"-I{folder}", "-o", str(library), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return library


def _entry(kernel: DeviceKernel) -> str:
    """What a driver calls, with launch sizes and the addresses of arguments; and what TVM calls, with arguments, then launch sizes."""
    types = kernel.parameters
    addressed = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(types))
    addresses = ", ".join(f"(void*)&args[{i}].pointer" for i in range(len(types)))
    sizes = {tag: f"(unsigned)args[{len(types) + i}].number" for i, tag in enumerate(kernel.launch)}
    grid, block = (", ".join(sizes.get(axis, "1") for axis in axes) for axes in (_AXES[:3], _AXES[3:]))
    return f"""
extern "C" int emulated_{kernel.name}(Dimensions grid, Dimensions block, void **arguments) {{
  return launch(grid, block, {str(kernel.waits).lower()}, [=] {{ {kernel.name}({addressed}); }});
}}
extern "C" int __tvm_ffi_{kernel.name}(void *, const Packed *args, int32_t, Packed *result) {{
  void *arguments[] = {{{addresses}}};
  memset(result, 0, sizeof *result);
  return emulated_{kernel.name}({{{grid}}}, {{{block}}}, arguments);
}}"""


@contextmanager
def emulated(library: Path) -> Iterator[None]:
    """While it lasts, a library that holds CUDA kernels finds them in `library`."""
    module = tvm.runtime.load_module(str(library))
    real = tvm_ffi.get_global_func(_LOADER, allow_missing=True)
    tvm_ffi.register_global_func(_LOADER, lambda code: module, override=True)
    try:
        yield
    finally:
        if real is None:
            tvm_ffi.registry.remove_global_func(_LOADER)
        else:
            tvm_ffi.register_global_func(_LOADER, real, override=True)


# --- a driver ---------------------------------------------------------------------------------

_COMPILER = """#!/bin/sh
# Stands for nvcc: keeps the source, and gives what looks like code.
for argument; do
  case "$argument" in *.cu) cp "$argument" "$EDGEWISE_EMULATED_SOURCES/$(md5sum < "$argument" | cut -c -32).cu" ;; esac
  [ "$previous" = -o ] && printf '\\177ELF' > "$argument"
  previous=$argument
done
"""


def install_driver(folder: Path) -> dict[str, str]:
    """A CUDA driver, runtime and compiler in `folder`; returns the environment in which TVM takes them for real.

    Kernels' sources gather in `folder / "sources"` as programs are compiled; `compile_sources` makes what they then run.
    """
    for name in ("bin", "lib", "sources"):
        (folder / name).mkdir()
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: *; };", encoding="ascii")
    for library, flags in (("libcuda.so.1", []), ("libcudart.so.13", [f"-Wl,--version-script={versions}"])):
        command = ["cc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", *flags]
        subprocess.run([*command, "-o", str(folder / "lib" / library), str(_HERE / "cuda_driver.c"), "-ldl"], check=True)
    compiler = folder / "bin" / "nvcc"
    compiler.write_text(_COMPILER, encoding="ascii")
    compiler.chmod(0o755)
    return {
        "PATH": f"{compiler.parent}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "EDGEWISE_EMULATED_SOURCES": str(folder / "sources"),
        "EDGEWISE_EMULATED_KERNELS": str(folder / "kernels.so"),
    }


def compile_sources(folder: Path) -> None:
    """Makes the kernels that were compiled for the driver in `folder` runnable. Those of the probe are left: they run for minutes."""
    texts = [path.read_text(encoding="utf-8") for path in (folder / "sources").iterdir()]
    kernels = [DeviceKernel(source=text[text.index(_BEGIN.decode()) :]) for text in texts if text.count("__global__") == 2]
    compile_kernels(kernels, folder)
