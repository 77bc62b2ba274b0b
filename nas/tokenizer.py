"""Byte-level BPE of a chosen vocabulary size, trained on the corpus and kept in a file.

The file is a plain `tokenizer.json` that Hugging Face `tokenizers` loads. What that format has no room
for (how many bytes a token stands for, which corpus made it) is in NAME.meta.json beside it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A DataLoader or child process forked after tokenising would otherwise print a warning and switch threads off itself.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import write_whole

END_OF_TEXT = "<|endoftext|>"
"""The special token between documents, and before the first token of each."""
MIN_VOCAB_SIZE = 257
"""256 bytes and the end of text."""
MAX_TRAINING_BYTES = 8 * 1024 * 1024
"""Merges learned from more text differ too little to be worth the wait."""

REMEDY = "run the same search command again, it makes it anew"
"""What helps when a run's tokenizer or a front trial's weights are lost."""

_FORMAT = 1
_COUNTED_BYTES = 256 * 1024
"""Text that the bytes per token of a published tokenizer are counted on."""

Tokens = npt.NDArray[np.integer[Any]]
"""Ids, one dimension."""


class Tokenizer:
    """A byte-level BPE: any text to ids and exactly back.

    `vocab_size` is the real number of ids, end of text included; it can be below what was asked for when
    the corpus has too few repeats. `bytes_per_token` was measured on the training text. One that came with a published
    model may be of another kind, and `end_of_text` is then the token that its documents begin with.
    """

    def __init__(self, inner: tokenizers.Tokenizer, meta: Mapping[str, Any], sha256: str) -> None:
        # Without this a document that spells out <|endoftext|> would end in the middle.
        inner.encode_special_tokens = True
        self._inner = inner
        self.sha256 = sha256
        self.meta = dict(meta)
        self.vocab_size: int = meta.get("vocab_size") or inner.get_vocab_size()
        self.bytes_per_token = float(meta["bytes_per_token"])
        self.corpus_sha256 = str(meta["corpus_sha256"])
        self.requested_vocab_size = int(meta["requested_vocab_size"])
        end = meta.get("end_of_text", inner.token_to_id(END_OF_TEXT))
        if end is None:
            raise ValueError(f"no {END_OF_TEXT} token")
        self.end_of_text: int = end

    @classmethod
    def from_file(cls, path: str | Path, meta: Mapping[str, Any] | None = None, remedy: str = REMEDY) -> "Tokenizer":
        """Reads what `train_tokenizer` wrote.

        Args:
            path: the tokenizer.json.
            meta: what its .meta.json says, if that is kept elsewhere.
            remedy: what an error says to do.

        Raises:
            InvalidRun: if the file or its .meta.json is missing, damaged, or belongs to another.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if meta is None:
                meta = json.loads(_meta_path(path).read_text(encoding="utf-8"))
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            if meta["format"] != _FORMAT or meta["sha256"] != sha256:
                raise ValueError("it is not the file that was written")
            return cls(tokenizers.Tokenizer.from_str(text), meta, sha256)
        except OSError as error:
            raise InvalidRun(f"tokenizer {str(error.filename)!r} cannot be read ({error.strerror}); {remedy}") from error
        except Exception as error:  # `tokenizers` raises bare Exception on a malformed file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidRun(f"tokenizer {str(path)!r} is damaged ({reason}); {remedy}") from error

    def text_of(self, token: int) -> str:
        """The name of a token, as tokenizer.json has it."""
        name = self._inner.id_to_token(token)
        assert name is not None, f"there is no token {token}"
        return name

    @classmethod
    def published(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of a folder with a published model, from its tokenizer.json; nothing in the folder is run.

        Bytes per token are those of State of the Union text. The token that documents begin with is the one that
        tokenizer_config.json, generation_config.json or config.json has for the beginning, else for the end.

        Raises:
            InvalidRun: if a file is missing or damaged, or none names such a token.
        """
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            inner = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise InvalidRun(f"tokenizer {str(path)!r} cannot be read ({error.strerror}); take the folder again from its source") from error
        except Exception as error:  # `tokenizers` raises bare Exception on a malformed file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidRun(f"tokenizer {str(path)!r} is damaged ({reason}); take the folder again from its source") from error
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        end = _first_token(folder, inner)
        if end is None:
            raise InvalidRun(f"{str(folder)!r} names no bos or eos token; add a tokenizer_config.json that does")
        # Special tokens beyond the model's own are not made from text.
        plain = [i for i, token in inner.get_added_tokens_decoder().items() if not token.special]
        ids = max([*inner.get_vocab(with_added_tokens=False).values(), *plain, end]) + 1
        sample = list(_sample(load_corpus().train, _COUNTED_BYTES))
        tokens = sum(len(e.ids) for e in inner.encode_batch(sample, add_special_tokens=False))
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        meta = {
            "format": _FORMAT,
            "sha256": sha256,
            "corpus_sha256": "",
            "requested_vocab_size": ids,
            "vocab_size": ids,
            "bytes_per_token": sum(len(t.encode()) for t in sample) / max(1, tokens),
            "end_of_text": end,
        }
        return cls(inner, meta, sha256)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no end of text is added."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 (half a character) become U+FFFD."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """The text of a tokenizer.json that Hugging Face `tokenizers` loads."""
        text: str = self._inner.to_str(pretty=False)
        return text


def train_tokenizer(corpus: Corpus, vocab_size: int, path: str | Path) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids for this corpus, read from `path` if it is already there.

    Only training text is used, at most 8 MB of it, and the result is the same every time. A file made
    for another corpus or size, or a damaged one, is replaced.

    Raises:
        UserError: if `vocab_size` is below 257.
    """
    path = Path(path)
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE}, the 256 bytes and the end of text; choose {MIN_VOCAB_SIZE} or more"
        )
    try:
        cached = Tokenizer.from_file(path)
    except InvalidRun:
        pass
    else:
        if (cached.corpus_sha256, cached.requested_vocab_size) == (corpus.sha256, vocab_size):
            return cached

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    # Sorted, as the alphabet comes in an order that changes from process to process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    sample = list(_sample(corpus.train, MAX_TRAINING_BYTES))
    inner.train_from_iterator(sample, trainer)
    inner.encode_special_tokens = True
    tokens = sum(len(e.ids) for e in inner.encode_batch(sample, add_special_tokens=False))

    text = inner.to_str(pretty=False)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    meta = {
        "format": _FORMAT,
        "sha256": sha256,
        "corpus_sha256": corpus.sha256,
        "requested_vocab_size": vocab_size,
        "vocab_size": inner.get_vocab_size(),
        "bytes_per_token": sum(len(t.encode()) for t in sample) / tokens,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    # Last, as its hash of the first vouches for both.
    write_whole(_meta_path(path), json.dumps(meta, indent=1) + "\n")
    return Tokenizer(inner, meta, sha256)


def _sample(documents: Sequence[str], most_bytes: int) -> Iterator[str]:
    """Documents spread evenly over the corpus, up to `most_bytes` of UTF-8."""
    sizes = [len(d.encode()) for d in documents]
    step = max(1.0, sum(sizes) / most_bytes)
    position = taken = 0.0
    # Walks the corpus by bytes: a document is in when the share taken so far lags behind 1/step.
    for document, size in zip(documents, sizes, strict=True):
        position += size
        if taken + size <= position / step + 1e-6 or taken == 0:
            taken += size
            # A first document longer than the whole sample is cut.
            yield document if size <= most_bytes else document.encode()[:most_bytes].decode(errors="ignore")


def _first_token(folder: Path, inner: tokenizers.Tokenizer) -> int | None:
    """The id of the token before a document's first one."""
    files = []
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        files.append(values if isinstance(values, dict) else {})
    for kind in ("bos", "eos"):
        for values in files:
            text, number = values.get(f"{kind}_token"), values.get(f"{kind}_token_id")
            text = text.get("content") if isinstance(text, dict) else text
            number = number[0] if isinstance(number, list) and number else number
            found = inner.token_to_id(text) if isinstance(text, str) else number
            if isinstance(found, int) and inner.id_to_token(found) is not None:
                return found
    return None


def _meta_path(path: Path) -> Path:
    return path.with_suffix(".meta.json")
