"""`Machine`: a compiled program with its weights and its growing state.

Needs TVM's runtime and NumPy, and nothing of ours: a model that leaves takes the text of this file along. TVM is not
imported before a machine is made.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Machine:
    """A loaded program on a device.

    State lives in one buffer per name, of the program's largest size; a call sees the rows so far as a view, and new
    rows are copied behind them, so nothing moves the cache. It starts as zeros: a decode timed further along than any
    call went must not read whatever lay in memory.

    Args:
        library: the loaded library.
        manifest: what compiling wrote of the program: its `functions`, `state` and most `rows`.
        device: where it runs: of this process, or of an RPC session.
    """

    def __init__(self, library: Any, manifest: Mapping[str, Any], device: Any) -> None:
        import tvm
        from tvm.runtime.vm import VirtualMachine  # not `relax`: the process may hold TVM's small runtime library alone

        self.device = device
        self.vm = VirtualMachine(library, device)
        self.rows = 0
        self._functions: Mapping[str, Any] = manifest["functions"]
        rows = manifest["rows"]
        self._state = {
            name: tvm.runtime.tensor(np.zeros([rows if isinstance(size, str) else size for size in shape], dtype), device)
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


def filled(shape: Sequence[int], dtype: str, device: Any, fill: Callable[[memoryview], None]) -> Any:
    """A tensor on a device whose bytes `fill` writes: into its own memory, with no copy beside it, on this machine's processor."""
    import tvm

    tensor = tvm.runtime.empty(tuple(shape), dtype, device)
    if device == tvm.cpu():
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        fill(memoryview((ctypes.c_uint8 * nbytes).from_address(tensor.data_ptr())).cast("B"))
        return tensor
    array = np.empty(tuple(shape), dtype)
    fill(array.reshape(-1).view(np.uint8).data)
    return tensor.copyfrom(array)
