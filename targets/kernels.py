"""Compiled kernels kept on disk by content, so that a kernel seen before is only linked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from targets.compile_cache import KERNEL, CompileCache
from targets.tvm_device_code import device_code

_DEVICE = ".gpu"


class KernelCache:
    """Object files of kernels for one target. A kernel is known by its structure; names do not count.

    A kernel for a GPU is an object file that starts it, and beside it the code that the GPU runs.

    Args:
        files: where they are kept; of this target and version of the compiler.
        target: the TVM target, as its dict form.
    """

    def __init__(self, files: CompileCache, target: Mapping[str, Any]) -> None:
        self._files, self._target = files, tvm.target.Target(dict(target))
        self._has_device = self._target.kind.name != "llvm"

    @staticmethod
    def symbol(kernel: Any) -> str:
        """The name under which a kernel is linked: equal for kernels of equal structure."""
        return f"kernel_{tvm_ffi.structural_hash(kernel) & (2**64 - 1):016x}"

    def find(self, symbol: str) -> Path | None:
        """The compiled kernel of that symbol, if all of it is there."""
        found = self._files.find(symbol + KERNEL)
        return None if self._has_device and self._files.find(symbol + _DEVICE) is None else found

    def device_code(self, symbol: str) -> bytes | None:
        """What the GPU runs of that kernel, see `device_code`; None if it is not there."""
        path = self._files.find(symbol + _DEVICE)
        return None if path is None else path.read_bytes()

    def object_file(self, kernel: Any) -> Path:
        """The compiled kernel, compiled now if it is not there."""
        symbol = self.symbol(kernel)
        return self.find(symbol) or self._compile(kernel, symbol)

    def _compile(self, kernel: Any, symbol: str) -> Path:
        # Argument checks are half of a small kernel's code; what calls these kernels was checked when it was linked.
        with self._target, tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
            module = tvm.tirx.build(tvm.IRModule({symbol: kernel.with_attr("global_symbol", symbol)}), target=self._target)
            code = device_code(module) if self._has_device else b""
        if code:
            self._files.add(symbol + _DEVICE, lambda path: _write(path, code))
        return self._files.add(symbol + KERNEL, lambda path: module.write_to_file(str(path), "o"))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
