"""Code of GPU kernels beside a library's own: taken from a compiled kernel, kept, and packed into the library that calls it.

A library of TVM's holds the modules it imports in one constant (`tvm_ffi_library_bin` in tvm/ffi/extra/module.h). Numbers
are 64-bit and little-endian, a list is its length and its values, bytes are their length and themselves:

    length of the rest; first child of each module, and the number of children; children; then each module: kind [, bytes]

where the library itself is a module of kind "_lib" that has no bytes. What a GPU's module is in bytes is its own affair.
"""

import importlib.util
import itertools
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

_BINARY = b"cubin"
"""What TVM calls the format of compiled CUDA, whatever compiled it."""
_LIBRARY, _DEVICES = b"_lib", (b"cuda", b"opencl")
_BLOB = "__tvm_ffi__library_bin"
_LINE = 256
"""Bytes that a line of C holds."""
_PLAIN = frozenset(range(32, 127)) - frozenset(b'"\\?')


def device_code(module: Any) -> bytes:
    """The code of a compiled kernel for its GPU, as `DeviceExecutable` takes it.

    CUDA is compiled for the target in force if this machine has a compiler of it (`cuda_compiler`); where TVM's CUDA runtime
    is loaded, TVM has done so already. Else, as OpenCL always is, it is compiled by the process that loads the library.
    """
    tree = _Tree.parse(tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes())
    (kind, data), *others = [entry for entry in tree.modules if entry[0] != _LIBRARY]
    assert not others, "a kernel is one module"
    if kind == b"cuda" and cuda_compiler():
        data = _compiled(data, module.imports[0].inspect_source())
    return _bytes(kind) + _bytes(data)


def cuda_compiler() -> str:
    """What TVM compiles CUDA with on this machine: "nvrtc", or "nvcc" where TVM_CUDA_COMPILE_MODE says so; "" if it is not there."""
    if os.environ.get("TVM_CUDA_COMPILE_MODE", "nvrtc").lower() == "nvcc":
        return "nvcc" if shutil.which("nvcc") else ""
    try:
        return "nvrtc" if importlib.util.find_spec("cuda.bindings.nvrtc") else ""
    except ModuleNotFoundError:
        return ""


def _compiled(data: bytes, source: str) -> bytes:
    """A CUDA module with its source compiled. Its format comes first, its code last."""
    form, rest = _take(data)
    if form == _BINARY:
        return data
    code = _bytes(source.encode())
    assert form == b"cuda" and rest.endswith(code), "a module of TVM's that is made otherwise"
    return _bytes(_BINARY) + rest.removesuffix(code) + _bytes(bytes(tvm.get_global_func("tvm_callback_cuda_compile")(source)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExecutable:
    """A compiled TVM executable or module that is exported with code for a GPU.

    Attributes:
        executable: what `tvm.compile` or `tvm.tirx.build` gave.
        codes: from `device_code`: of the module itself, or of kernels that it calls and was built without.
    """

    executable: Any
    codes: Sequence[bytes]

    def export_library(self, path: str, **options: Any) -> Any:
        """As that of the executable."""
        return self.executable.export_library(path, fpack_imports=self._pack, **options)

    def _pack(self, module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        assert not is_system_lib, "a library that is loaded by name"
        tree = _Tree.parse(tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes())
        built = [number for number, (kind, _) in enumerate(tree.modules) if kind in _DEVICES]
        for code in self.codes:
            kind, rest = _take(code)
            entry = (kind, _take(rest)[0])
            if built:
                tree.modules[built.pop()] = entry
            else:
                tree.add(*entry)
        path = Path(folder) / f"{prefix}devices.c"
        path.write_text(_source(tree.to_bytes()), encoding="ascii")
        return str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tree:
    """Modules, each with its kind and bytes, and whom each imports, by number."""

    modules: list[tuple[bytes, bytes]]
    children: list[list[int]]

    @classmethod
    def parse(cls, blob: bytes) -> "_Tree":
        first, rest = _numbers(blob[8:])
        flat, rest = _numbers(rest)
        modules = []
        for _ in first[1:]:
            kind, rest = _take(rest)
            code, rest = (b"", rest) if kind == _LIBRARY else _take(rest)
            modules.append((kind, code))
        assert not rest, "the packed modules end elsewhere than they say"
        return cls(modules=modules, children=[flat[begin:end] for begin, end in itertools.pairwise(first)])

    def add(self, kind: bytes, code: bytes) -> None:
        """The library imports one module more."""
        library = next(number for number, (name, _) in enumerate(self.modules) if name == _LIBRARY)
        self.children[library].append(len(self.modules))
        self.modules.append((kind, code))
        self.children.append([])

    def to_bytes(self) -> bytes:
        """The inverse of `parse`."""
        first = [0]
        for children in self.children:
            first.append(first[-1] + len(children))
        flat = [child for children in self.children for child in children]
        modules = b"".join(_bytes(kind) + (b"" if kind == _LIBRARY else _bytes(code)) for kind, code in self.modules)
        return _bytes(_list(first) + _list(flat) + modules)


def _numbers(data: bytes) -> tuple[list[int], bytes]:
    (count,) = struct.unpack_from("<Q", data)
    return list(struct.unpack_from(f"<{count}Q", data, 8)), data[8 + 8 * count :]


def _list(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<Q{len(numbers)}Q", len(numbers), *numbers)


def _take(data: bytes) -> tuple[bytes, bytes]:
    """The bytes that come first, and the rest."""
    (count,) = struct.unpack_from("<Q", data)
    return data[8 : 8 + count], data[8 + count :]


def _bytes(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _source(blob: bytes) -> str:
    """C that defines the constant; as C++, which some devices take it for, its name stays the same."""
    texts = [chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in range(256)]
    lines = ["".join(map(texts.__getitem__, blob[at : at + _LINE])) for at in range(0, len(blob), _LINE)]
    literal = "\n".join(f'"{line}"' for line in lines)
    return (
        f'#ifdef __cplusplus\nextern "C" {{\n#endif\nextern const char {_BLOB}[];\nconst char {_BLOB}[] =\n{literal};\n'
        "#ifdef __cplusplus\n}\n#endif\n"
    )
