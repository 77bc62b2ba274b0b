"""The text of a short training: passages of about 1 KB, the same ones in the same order for every candidate, whatever its vocabulary.

A training step reads one passage. So that every step reads the same bytes with every tokenizer, text is cut before it is made
tokens, at the beginnings of words; documents shorter than a passage share one. A passage begins with the end-of-text token, as
every window does that a model is scored on.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nas.corpus import Corpus
from nas.tokenizer import Tokenizer, Tokens

PASSAGE_BYTES = 1024
"""Text of a passage. Bits per byte of a step of 8, 4, 2, 1 KB: 2.60, 2.38, 2.24, 2.18 at 256 KB of State of the Union text."""

_WORD_START = re.compile(rb"(?<=\S)\s")
_FURTHEST_WORD_BYTES = 128
_KEPT = 8

Passage = tuple[str, ...]
"""One part of a document, or several short documents one after the other."""


class TokenisedCorpus:
    """A corpus in one tokenizer's ids, made as they are asked for and kept.

    Attributes:
        validation_bytes: UTF-8 bytes of each held-out document.

    Args:
        corpus: the text.
        tokenizer: of any vocabulary.
        passage_bytes: about how much text a passage has.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, passage_bytes: int = PASSAGE_BYTES) -> None:
        self._tokenizer, self._corpus = tokenizer, corpus
        self._passages, self._ends, self.sizes = _passages(corpus, passage_bytes)
        self._ids: dict[int, Tokens] = {}
        self._validation: list[Tokens] | None = None
        self.validation_bytes = [len(d.encode()) for d in corpus.validation]

    def validation(self) -> list[Tokens]:
        """Ids of each held-out document."""
        if self._validation is None:
            encoded = self._tokenizer.encode_batch(self._corpus.validation)
            self._validation = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        return self._validation

    def order(self, most_bytes: int, seed: int) -> list[int]:
        """The passages to read, by number: the fewest that have `most_bytes`.

        Every passage is read once before any is read again. The order depends on the seed and the corpus alone, and
        a smaller number of bytes reads the beginning of what a larger one does.
        """
        generator = np.random.default_rng((seed, 0))
        order: list[int] = []
        read = 0
        while read < most_bytes:
            for i in generator.permutation(len(self._passages)).tolist():
                order.append(i)
                read += self.sizes[i]
                if read >= most_bytes:
                    break
        return order

    def ids(self, numbers: Sequence[int]) -> list[Tokens]:
        """Ids of these passages: an end of text before each document of it, and after the last if that ends in the passage."""
        new = sorted(set(numbers) - self._ids.keys())
        texts = [text for i in new for text in self._passages[i]]
        encoded = iter(self._tokenizer.encode_batch(texts))
        end = self._tokenizer.end_of_text
        for i in new:
            row = [token for _ in self._passages[i] for token in (end, *next(encoded))]
            self._ids[i] = np.asarray([*row, end] if self._ends[i] else row, dtype=np.int32)
        return [self._ids[i] for i in numbers]


def cut_at_words(text: str, size_bytes: int) -> list[str]:
    """The text in pieces of nearly equal size, about `size_bytes` each, whose concatenation is the text.

    A piece begins with the white space before a word, as tokens do; where none is near, at a character.
    """
    data = text.encode()
    count = max(1, round(len(data) / size_bytes))
    cuts = [0]
    for i in range(1, count):
        at = max(cuts[-1], round(i * len(data) / count))
        found = _WORD_START.search(data, at, at + _FURTHEST_WORD_BYTES)
        if found is not None:
            at = found.start()
        while at < len(data) and data[at] & 0xC0 == 0x80:
            at += 1
        cuts.append(at)
    return [data[a:b].decode() for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True) if a < b]


@lru_cache(maxsize=4)
def _passages(corpus: Corpus, size_bytes: int) -> tuple[list[Passage], list[bool], list[int]]:
    """The passages of the training documents, whether each ends its last document, and their bytes."""
    passages: list[Passage] = []
    ends: list[bool] = []
    short: list[str] = []
    short_bytes = 0

    def add_short() -> None:
        if short:
            passages.append(tuple(short))
            ends.append(True)
            short.clear()

    for document in corpus.train:
        size = len(document.encode())
        if size < size_bytes / 2:
            if short_bytes + size > size_bytes:
                add_short()
                short_bytes = 0
            short.append(document)
            short_bytes += size
            continue
        pieces = cut_at_words(document, size_bytes)
        passages += [(piece,) for piece in pieces]
        ends += [False] * (len(pieces) - 1) + [True]
    add_short()
    return passages, ends, [sum(len(text.encode()) for text in passage) for passage in passages]


_TOKENISED: "OrderedDict[tuple[str, str, int], TokenisedCorpus]" = OrderedDict()


def tokenised(corpus: Corpus, tokenizer: Tokenizer, passage_bytes: int = PASSAGE_BYTES) -> TokenisedCorpus:
    """The corpus in this tokenizer's ids, shared by the trials of a process; the last few pairs are kept."""
    key = (corpus.sha256, tokenizer.sha256, passage_bytes)
    if key not in _TOKENISED:
        _TOKENISED[key] = TokenisedCorpus(corpus, tokenizer, passage_bytes)
        while len(_TOKENISED) > _KEPT:
            _TOKENISED.popitem(last=False)
    _TOKENISED.move_to_end(key)
    return _TOKENISED[key]
