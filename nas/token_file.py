"""A corpus as one row of token ids on disk, read through memory mapping, and the order in which training reads it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.corpus import Corpus, cut
from nas.evaluation import write_whole
from nas.tokenizer import Tokenizer, Tokens
from targets.files import whole

IDS, ABOUT = "tokens.bin", "tokens.json"

_AT_ONCE_BYTES = 2 * 1024 * 1024
"""Text that is tokenised at once: ids are Python integers for a moment, tens of bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """The training text as ids, an end of text before each document and after the last.

    Attributes:
        ids: one dimension, mapped from the file, uint16 or uint32.
        text_bytes: UTF-8 bytes of the text.
    """

    ids: Tokens = field(repr=False)
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each id that can be a target."""
        return self.text_bytes / (len(self.ids) - 1)


def token_file(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: Callable[[float], None] | None = None) -> TokenFile:
    """The file in `folder`, written unless it is there, whole and of this corpus and tokenizer.

    Args:
        folder: where `tokens.bin` and `tokens.json` are.
        corpus: whose training text.
        tokenizer: whose ids.
        progress: called with the share of the text done, 0 to 1, while it is written.
    """
    ids, about = folder / IDS, folder / ABOUT
    wanted = {"corpus": corpus.sha256, "tokenizer": tokenizer.sha256, "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"}
    known = _read(about)
    size = np.dtype(wanted["dtype"]).itemsize
    if {key: known.get(key) for key in wanted} != wanted or not ids.is_file() or ids.stat().st_size != size * known.get("tokens", -1):
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        with whole(ids) as part, part.open("xb") as file:
            tokens = 0
            for piece in _encoded(corpus, tokenizer, progress):
                file.write(np.asarray(piece, dtype=wanted["dtype"]).tobytes())
                tokens += len(piece)
        # Last, as it vouches for the other.
        write_whole(about, json.dumps({**wanted, "tokens": tokens, "text_bytes": corpus.train_bytes}, indent=1) + "\n")
    return TokenFile(ids=np.memmap(ids, dtype=wanted["dtype"], mode="r"), text_bytes=corpus.train_bytes)


def _encoded(corpus: Corpus, tokenizer: Tokenizer, progress: Callable[[float], None] | None) -> Iterator[list[int]]:
    """The row of ids, part by part."""
    end, done = [tokenizer.end_of_text], 0
    yield end
    for group in _groups(corpus):
        for (_, is_last), ids in zip(group, tokenizer.encode_batch([piece for piece, _ in group]), strict=True):
            yield ids + end if is_last else ids
        done += sum(len(piece.encode()) for piece, _ in group)
        if progress is not None:
            progress(done / corpus.train_bytes)


def _groups(corpus: Corpus) -> Iterator[list[tuple[str, bool]]]:
    """The text in pieces to be tokenised together, each with whether it ends its document."""
    group: list[tuple[str, bool]] = []
    size = 0
    for document in corpus.train:
        pieces = cut(document, _AT_ONCE_BYTES)
        for number, piece in enumerate(pieces, start=1):
            group.append((piece, number == len(pieces)))
            size += len(piece.encode())
            if size >= _AT_ONCE_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


class Windows:
    """Windows of a row of ids in the order of training: which one is the k-th depends on the seed and k alone.

    Every window is read once before any is read again, in another order. They lie side by side and hold all ids but a rest
    shorter than one; each time through begins at another place of that rest, so no text is always left out.

    Args:
        ids: one dimension, longer than a window.
        window: tokens a window.
        seed: of the order.
    """

    def __init__(self, ids: Tokens, window: int, seed: int) -> None:
        assert 1 <= window < len(ids)
        self._ids, self._window, self._seed = ids, window, seed
        self.per_epoch = (len(ids) - 1) // window
        """Windows in all the text."""
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def read(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, each (count, window), of the windows first to first + count - 1."""
        rows = [self._ids[start : start + self._window + 1] for start in map(self._start, range(first, first + count))]
        ids = np.stack(rows).astype(np.int64)
        return ids[:, :-1], ids[:, 1:]

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, 2, epoch))
            rest = len(self._ids) - 1 - self.per_epoch * self._window
            offset = int(generator.integers(0, rest + 1))
            self._starts = offset + self._window * generator.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[place])
