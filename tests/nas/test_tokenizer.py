"""Byte-level BPE: exact round trips, real sizes, caching, and files that others can load."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.tokenizer import END_OF_TEXT, Tokenizer, _sample, train_tokenizer


def slice_of_speeches(documents: int, characters: int) -> Corpus:
    whole = load_corpus()
    return Corpus(
        name="slice", licence=whole.licence, train=tuple(d[:characters] for d in whole.train[:documents]), validation=whole.validation[:2]
    )


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return slice_of_speeches(20, 5000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "512.json"
    train_tokenizer(corpus, 512, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@example(text="")
@example(text=" leading and trailing  \n\t\r\n ")
@example(text="\x00\x01\x7f\u0080\u2028\ufeff\U0010ffff")
@example(text="cafe\u0301 caf\u00e9 \u1e9b\u0323 \ufb01 \u00bd")
@example(text=f"spelled {END_OF_TEXT} out")
@example(text="👩‍👩‍👧‍👦 العربية 中文 ไทย")
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_text for i in ids)
    assert len(ids) <= len(text.encode())


def test_every_byte_is_one_token(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.encode(chr(i))[0] for i in range(128)]
    assert len(set(tokens)) == 128
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_batch_is_each_text(tokenizer: Tokenizer, corpus: Corpus) -> None:
    texts = [d[:300] for d in corpus.train[:5]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_size_and_bytes_per_token_are_measured(tokenizer: Tokenizer, corpus: Corpus) -> None:
    tokens = sum(map(len, tokenizer.encode_batch(corpus.train)))
    assert tokenizer.vocab_size == 512
    assert tokenizer.bytes_per_token == corpus.train_bytes / tokens
    assert 1.8 < tokenizer.bytes_per_token < 2.6


def test_size_that_the_corpus_cannot_fill_is_read_back(tmp_path: Path) -> None:
    tiny = Corpus(name="tiny", licence="", train=("abcabcabc abc",), validation=("x", "y"))
    tokenizer = train_tokenizer(tiny, 4096, tmp_path / "t.json")
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.requested_vocab_size == 4096


def test_smallest_vocabulary_is_the_bytes(tmp_path: Path, corpus: Corpus) -> None:
    tokenizer = train_tokenizer(corpus, 257, tmp_path / "t.json")
    assert (tokenizer.vocab_size, tokenizer.bytes_per_token) == (257, 1.0)
    with pytest.raises(UserError, match=r"^vocab_size=256 is below 257, the 256 bytes and the end of text; choose 257 or more$"):
        train_tokenizer(corpus, 256, tmp_path / "u.json")


def test_held_out_text_is_not_learned_from(tmp_path: Path, corpus: Corpus) -> None:
    other = Corpus(name="other", licence="", train=corpus.train, validation=("zqx " * 5000, "zqx zqx"))
    assert train_tokenizer(other, 512, tmp_path / "t.json").sha256 == train_tokenizer(corpus, 512, tmp_path / "u.json").sha256


def test_cached_file_is_used_for_the_same_corpus_and_size_only(tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "deep" / "t.json"
    first = train_tokenizer(corpus, 300, path)
    stamp = path.stat().st_mtime_ns
    assert train_tokenizer(corpus, 300, path).sha256 == first.sha256
    assert path.stat().st_mtime_ns == stamp
    assert train_tokenizer(corpus, 310, path).vocab_size == 310
    other = slice_of_speeches(4, 3000)
    assert train_tokenizer(other, 310, path).corpus_sha256 == other.sha256
    assert {p.name for p in path.parent.iterdir()} == {"t.json", "t.meta.json"}


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "meta", "no meta", "keyless meta"])
def test_damaged_file_is_refused_and_trained_again(tmp_path: Path, corpus: Corpus, damage: str) -> None:
    path = tmp_path / "t.json"
    meta = tmp_path / "t.meta.json"
    whole = train_tokenizer(corpus, 300, path)
    if damage == "cut":
        path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    elif damage == "empty":
        path.write_text("")
    elif damage == "other":
        path.write_text(whole.to_json().replace("true", "false", 1), encoding="utf-8")
    elif damage == "meta":
        meta.write_text("{")
    elif damage == "keyless meta":
        meta.write_text("{}")
    else:
        meta.unlink()
    with pytest.raises(InvalidRun, match=r"t(\.meta)?\.json' (is damaged|cannot be read) ") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)
    assert train_tokenizer(corpus, 300, path).sha256 == whole.sha256
    assert Tokenizer.from_file(path).sha256 == whole.sha256


def test_file_loads_in_plain_tokenizers(path: Path, tokenizer: Tokenizer) -> None:
    plain = tokenizers.Tokenizer.from_file(str(path))
    text = "Fellow-Citizens of the Senate, 1863."
    assert plain.encode(text).ids == tokenizer.encode(text)
    assert plain.encode(END_OF_TEXT).ids == [tokenizer.end_of_text]
    assert json.loads(tokenizer.to_json())["model"]["type"] == "BPE"
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab_size() == 512


def test_another_process_trains_the_same_tokenizer(tmp_path: Path) -> None:
    code = (
        "import sys; from nas.corpus import Corpus; from nas.tokenizer import train_tokenizer as t;"
        "c = Corpus(name='c', licence='', train=tuple('ab cab bca acb '[i:] * 20 for i in range(9)), validation=('x', 'y'));"
        "print(t(c, 290, sys.argv[1]).sha256)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path / f"{i}.json")], capture_output=True, text=True, check=True).stdout
        for i in range(2)
    ]
    assert runs[0] == runs[1] != ""


def test_sample_is_spread_over_the_corpus_and_bounded() -> None:
    documents = [f"{i:03d}" + "x" * 97 for i in range(500)]
    taken = [int(d[:3]) for d in _sample(documents, 10_000)]
    assert len(taken) in range(98, 101)
    assert min(taken) < 10
    assert max(taken) > 490
    assert max(b - a for a, b in pairwise(taken)) <= 10
    assert list(_sample(documents, 10**9)) == documents
    assert [len(d) for d in _sample(["é" * 500], 101)] == [50]
