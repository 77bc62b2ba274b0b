"""llama.cpp through its C interface: a model file, a cache that is wound back, and nothing of Python's in between."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Llama:
    """A GGUF file on the CPU with a cache of `rows` rows: float16 as llama.cpp has it by itself, or exact in float32."""

    def __init__(self, path: Path, rows: int, threads: int, exact: bool = False) -> None:
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = rows, rows, min(512, rows)
        if exact:
            context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
            context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.n_threads = context.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def rewind(self, rows: int) -> None:
        """Forgets all cached rows from `rows` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, rows, -1)

    def feed(self, ids: Sequence[int]) -> None:
        """Runs ids behind the cached rows, and caches theirs; returns when the last one's logits are there."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits(self._context)  # waits

    def logits(self) -> NDArray[np.float32]:
        """Of the last id fed, (V,)."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), shape=(self._size,)).copy()

    def tokenise(self, text: str) -> list[int]:
        """The ids of a text, with nothing put before it."""
        data, room = text.encode(), len(text.encode()) + 8
        out = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), out, room, False, False)
        return list(out[:count])

    def close(self) -> None:
        """Frees the model and its cache."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
