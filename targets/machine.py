"""`Machine`: a compiled program with its weights and its growing state.

Needs TVM's runtime and NumPy, and nothing of ours: a model that leaves takes the text of this file along. TVM is not
imported before a machine is made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 64 << 20
_LINE_BYTES = 64
"""What TVM's kernels take tensors to begin at."""


class Memory:
    """Tensors on a device that stay.

    On this machine's processor they lie one behind the other in large blocks: NumPy asks Linux for large pages there (of 2 MiB in place of
    4 KiB), which small tensors by themselves never get. Reading weights from memory with one vector at a time went from 14 to 17 GB/s
    a core so, on an Intel server. What a block has left over is never touched, and so takes no memory.

    Args:
        device: of this process, or of an RPC session.
    """

    def __init__(self, device: Any) -> None:
        import tvm

        self.device = device
        self._is_here = device == tvm.cpu()
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor that holds anything."""
        import tvm

        return tvm.runtime.from_dlpack(self._place(shape, dtype)) if self._is_here else tvm.runtime.empty(tuple(shape), dtype, self.device)

    def filled(self, shape: Sequence[int], dtype: str, fill: Callable[[NDArray[Any]], Any]) -> Any:
        """A tensor that `fill` writes: into its own memory, with no copy beside it, on this machine's processor."""
        import tvm

        array = self._place(shape, dtype) if self._is_here else np.empty(tuple(shape), dtype)
        fill(array)
        return tvm.runtime.from_dlpack(array) if self._is_here else tvm.runtime.tensor(array, self.device)

    def _place(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        """The next part of a block, or of a new one."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes > self._block.nbytes:
            block = np.empty(max(nbytes, _BLOCK_BYTES) + _LINE_BYTES, np.uint8)
            self._block = block[-block.ctypes.data % _LINE_BYTES :]
        place, self._block = self._block[:nbytes], self._block[nbytes + -nbytes % _LINE_BYTES :]
        return place.view(dtype).reshape(tuple(shape))


class Machine:
    """A loaded program on a device.

    State lives in one buffer per name, of the program's largest size; a call sees the rows so far as a view, and new
    rows are copied behind them, so nothing moves the cache. It starts as zeros: a decode timed further along than any
    call went must not read whatever lay in memory.

    Args:
        library: the loaded library.
        manifest: what compiling wrote of the program: its `functions`, `state` and most `rows`.
        device: where it runs: of this process, or of an RPC session.

    Attributes:
        memory: where its weights are to be made.
    """

    def __init__(self, library: Any, manifest: Mapping[str, Any], device: Any) -> None:
        from tvm.runtime.vm import VirtualMachine  # not `relax`: the process may hold TVM's small runtime library alone

        self.device = device
        self.memory = Memory(device)
        self.vm = VirtualMachine(library, device)
        self.rows = 0
        self._functions: Mapping[str, Any] = manifest["functions"]
        rows = manifest["rows"]
        self._state = {
            name: self.memory.filled([rows if isinstance(size, str) else size for size in shape], dtype, lambda array: array.fill(0))
            for name, (shape, dtype) in manifest["state"].items()
        }
        self._weights: Any = None

    def hold(self, weights: Iterable[Any]) -> None:
        """Takes the program's weights, tensors on the device, in the order of its manifest."""
        import tvm_ffi

        # Converted once: a list would be converted anew in every call.
        self._weights = tvm_ffi.convert(list(weights))

    def call(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Runs a function on inputs and state, appends the rows it returns that count, and gives its outputs."""
        spec = self._functions[function]
        if not spec["state"]:
            self.rows = 0  # it does not see what was before: what it returns begins anew
        result = self.run(function, self.arguments(function, inputs, self.rows))
        outputs = dict(zip(spec["outputs"], result, strict=True))
        new = 0
        for name, state in spec["rows"].items():
            new = int(inputs[spec["last"]][0]) + 1 if spec["last"] else outputs[name].shape[1]
            _rows(self._state[state], self.rows, new).copyfrom(_rows(outputs[name], 0, new))
        self.rows += new
        return outputs

    def run(self, function: str, arguments: Sequence[Any]) -> Sequence[Any]:
        """Runs a function on its arguments and gives what it returns; a device that is elsewhere is called otherwise."""
        result: Sequence[Any] = self.vm[function](*arguments)
        return result

    def arguments(self, function: str, inputs: Mapping[str, NDArray[Any]], rows: int) -> list[Any]:
        """The arguments of a call that sees `rows` rows of state."""
        import tvm

        spec = self._functions[function]
        values = [tvm.runtime.tensor(np.ascontiguousarray(inputs[name]), self.device) for name in spec["inputs"]]
        return [*values, *(_rows(self._state[name], 0, rows) for name in spec["state"]), self._weights]


def _rows(buffer: Any, first: int, count: int) -> Any:
    """Rows of a float32 tensor (1, rows, …), in place."""
    shape = list(buffer.shape)
    width = int(np.prod(shape[2:])) * 4
    return buffer._create_view([1, count, *shape[2:]], "float32", relative_byte_offset=first * width)
