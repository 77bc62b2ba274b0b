"""Compiled kernels kept on disk by content, so that a kernel seen before is only linked.

A kernel's identity is its structure (names do not count), the target and the compiler's version. Files are
renamed into place when complete, so several processes may share a cache.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

MOST_BYTES = 1 << 30
"""Kernels of one target that are kept: about fifty thousand."""
_FORMAT = 2
"""Counts up when kernels are built in another way."""


class KernelCache:
    """Object files of kernels for one target, in a folder of their own.

    Args:
        folder: where kernels are kept.
        llvm: the TVM target, as its dict form.
    """

    def __init__(self, folder: Path, llvm: Mapping[str, Any]) -> None:
        identity = json.dumps([_FORMAT, tvm.__version__, dict(llvm)], sort_keys=True)
        self._folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._target = tvm.target.Target(dict(llvm))

    @staticmethod
    def symbol(kernel: Any) -> str:
        """The name under which a kernel is linked: equal for kernels of equal structure."""
        return f"kernel_{tvm_ffi.structural_hash(kernel) & (2**64 - 1):016x}"

    def object_file(self, kernel: Any) -> Path:
        """The compiled kernel, compiled now if it is not there."""
        symbol = self.symbol(kernel)
        path = self._folder / f"{symbol}.o"
        if path.exists():
            os.utime(path)  # the least recently used go first when the cache is trimmed
            return path
        # Argument checks are half of a small kernel's code; what calls these kernels was checked when it was linked.
        with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
            module = tvm.tirx.build(tvm.IRModule({symbol: kernel.with_attr("global_symbol", symbol)}), target=self._target)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            made = Path(folder) / "kernel.o"
            module.write_to_file(str(made))
            made.replace(path)
        return path

    def trim(self, most_bytes: int = MOST_BYTES) -> None:
        """Removes the kernels that were used longest ago until the others fit into `most_bytes`."""
        files = []
        for path in self._folder.glob("*.o"):
            with contextlib.suppress(FileNotFoundError):  # another process trims, too
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
