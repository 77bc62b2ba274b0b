"""Compiled kernels kept on disk by content, so that a kernel seen before is only linked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from targets.compile_cache import KERNEL, CompileCache


class KernelCache:
    """Object files of kernels for one target. A kernel is known by its structure; names do not count.

    Args:
        files: where they are kept; of this target and version of the compiler.
        llvm: the TVM target, as its dict form.
    """

    def __init__(self, files: CompileCache, llvm: Mapping[str, Any]) -> None:
        self._files, self._target = files, tvm.target.Target(dict(llvm))

    @staticmethod
    def symbol(kernel: Any) -> str:
        """The name under which a kernel is linked: equal for kernels of equal structure."""
        return f"kernel_{tvm_ffi.structural_hash(kernel) & (2**64 - 1):016x}"

    def find(self, symbol: str) -> Path | None:
        """The compiled kernel of that symbol, if there is one."""
        return self._files.find(symbol + KERNEL)

    def object_file(self, kernel: Any) -> Path:
        """The compiled kernel, compiled now if it is not there."""
        symbol = self.symbol(kernel)
        return self.find(symbol) or self._files.add(symbol + KERNEL, lambda path: self._compile(kernel, symbol, path))

    def _compile(self, kernel: Any, symbol: str, path: Path) -> None:
        # Argument checks are half of a small kernel's code; what calls these kernels was checked when it was linked.
        with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
            module = tvm.tirx.build(tvm.IRModule({symbol: kernel.with_attr("global_symbol", symbol)}), target=self._target)
        module.write_to_file(str(path), "o")
