"""Arrays in a safetensors file, written and read one at a time, so that no more than one is held beside what uses it.

The format (https://huggingface.co/docs/safetensors, "Format"): eight bytes that give the length of a JSON header, the
header, which may end in spaces, and the arrays, row by row, in little-endian order.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LENGTH_BYTES = 8
HEADER_BYTES = 1 << 22
"""Room for the header, which is written last: some thirty thousand arrays."""
_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int8": "I8"}
_NAMES = {code: name for name, code in _DTYPES.items()}


def write_arrays(path: Path, arrays: Iterable[tuple[str, NDArray[Any]]], header_bytes: int = HEADER_BYTES) -> None:
    """Writes (name, array) pairs as they come, behind a header of `header_bytes`.

    Raises:
        KeyError: for a dtype that no target knows.
    """
    header: dict[str, Any] = {}
    first = _LENGTH_BYTES + header_bytes
    with path.open("wb") as file:
        file.seek(first)
        for name, array in arrays:
            assert name not in header, f"{name} is written twice"
            begin = file.tell() - first
            file.write(np.ascontiguousarray(array).data)
            header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": array.shape, "data_offsets": [begin, file.tell() - first]}
            del array  # the next one is made with this one gone
        text = json.dumps(header).encode()
        assert len(text) <= header_bytes, "more arrays than the header has room for"
        file.seek(0)
        file.write(header_bytes.to_bytes(_LENGTH_BYTES, "little") + text.ljust(header_bytes))


class ArrayFile:
    """A safetensors file whose arrays are read when asked for. Nothing of it stays in memory, as pages of a mapped file would."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            self._header = json.loads(file.read(length))
        self._first = _LENGTH_BYTES + length

    def read(self, name: str) -> NDArray[Any]:
        """The array of that name.

        Raises:
            KeyError: if there is none.
        """
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        array = np.empty(entry["shape"], _NAMES[entry["dtype"]])
        assert array.nbytes == end - begin, f"{name} has another size than its shape"
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._first + begin)
            view = array.reshape(-1).view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self._path} ends in the middle of {name}")
                view = view[count:]
        return array
