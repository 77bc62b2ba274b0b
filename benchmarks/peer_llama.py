"""llama.cpp on our own GGUF file: its default cache and attention, weights quantised as ours are."""

from pathlib import Path

import numpy as np
from cells import PeerJob
from llama import Llama
from made_from import maker
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from nas.gguf_export import write_gguf
from search_spaces.config import SLMConfig

_WRITER = maker(("gguf", "numpy", "torch"), ("nas/gguf_export.py",))
"""What makes the GGUF files, beside what the folder of a config is named by."""


class LlamaSession:
    """A prefill from an empty cache, or one token behind a prefix that stays."""

    def __init__(self, llama: Llama, prefix: list[int], ids: list[int]) -> None:
        self._llama, self._kept, self._ids = llama, len(prefix), ids
        if prefix:
            llama.feed(prefix)

    def run(self) -> None:
        """Winds the cache back, then feeds the tokens."""
        self._llama.rewind(self._kept)
        self._llama.feed(self._ids)

    def logits(self) -> NDArray[np.float32]:
        """Of the last token."""
        return self._llama.logits()

    def close(self) -> None:
        """Frees what Python does not."""
        self._llama.close()


def load(job: PeerJob) -> LlamaSession:
    """Writes the GGUF file once, then opens it."""
    config = SLMConfig.from_dict(job.config)
    path = Path(job.folder) / f"gguf-{_WRITER}" / f"{job.cell.precision}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_gguf(path, config, load_file(job.weights), None, job.cell.precision)  # type: ignore[arg-type]
    with safe_open(job.inputs, framework="numpy") as file:
        ids = file.get_tensor("tokens").ravel().tolist()
        prefix = file.get_tensor("prefix").ravel().tolist() if job.cell.phase == "decode" else []
    return LlamaSession(Llama(path, len(prefix) + len(ids), job.cell.threads), prefix, ids)
