"""The text of short training: all of it, once each time through, the same for every tokenizer, no document cut inside a word."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.corpus import Corpus, load_corpus
from nas.passages import TokenisedCorpus, cut_at_words, tokenised
from nas.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    whole = load_corpus()
    short = tuple(d[:60] for d in whole.train[20:40])
    return Corpus(name="slice", licence="", train=(*(d[:9000] for d in whole.train[:6]), *short), validation=("x", "y"))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(corpus, 400, tmp_path_factory.mktemp("tokenizers") / "400.json")


@given(st.text(min_size=1), st.integers(1, 50))
def test_pieces_are_the_text(text: str, size: int) -> None:
    pieces = cut_at_words(text, size)
    assert "".join(pieces) == text
    assert all(pieces)


def test_pieces_begin_with_the_space_before_a_word_and_are_of_equal_size(corpus: Corpus) -> None:
    pieces = cut_at_words(corpus.train[0], 1024)
    assert len(pieces) == round(len(corpus.train[0].encode()) / 1024)
    assert all(piece[0].isspace() and not piece[:-1].isspace() for piece in pieces[1:])
    assert max(len(p.encode()) for p in pieces) - min(len(p.encode()) for p in pieces) < 60


def test_every_tokenizer_reads_the_same_text(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    read = []
    for other in (tokenizer, train_tokenizer(corpus, 257, tmp_path / "257.json")):
        text = TokenisedCorpus(corpus, other)
        order = text.order(30_000, seed=5)
        rows = [row.tolist() for row in text.ids(order)]
        assert all(row[0] == other.end_of_text for row in rows)
        read.append([other.decode([i for i in row if i != other.end_of_text]) for row in rows])
    assert read[0] == read[1]
    assert 30_000 <= sum(len(r.encode()) for r in read[0]) < 32_000


def test_short_documents_share_a_passage_and_keep_their_ends(corpus: Corpus, tokenizer: Tokenizer) -> None:
    text = TokenisedCorpus(corpus, tokenizer)
    rows = text.ids(range(len(text.sizes)))
    shared = [row for row in rows if (row == tokenizer.end_of_text).sum() > 2]
    assert shared
    assert sum(int((row == tokenizer.end_of_text).sum()) - 1 for row in shared) == 20
    assert all(row[-1] == tokenizer.end_of_text for row in shared)
    # A long document's parts begin with an end of text, and only the last has one after it.
    assert sum(int(row[-1] == tokenizer.end_of_text) for row in rows) == len(shared) + 6


def test_a_larger_budget_reads_on_and_all_is_read_before_any_is_read_again(corpus: Corpus, tokenizer: Tokenizer) -> None:
    text = TokenisedCorpus(corpus, tokenizer)
    orders = [text.order(n, seed=1) for n in (1, 10_000, corpus.train_bytes, 2 * corpus.train_bytes + 1)]
    for order in orders:
        assert order == orders[-1][: len(order)]
    count = len(text.sizes)
    assert sorted(orders[2]) == sorted(orders[3][count : 2 * count]) == list(range(count))
    assert orders[3][:count] != orders[3][count : 2 * count]
    assert text.order(10_000, seed=2) != orders[1]
    assert sum(text.sizes) == corpus.train_bytes


def test_text_is_tokenised_once_and_only_as_much_as_is_read(corpus: Corpus, tokenizer: Tokenizer) -> None:
    text = tokenised(corpus, tokenizer)
    first = text.ids(text.order(5_000, seed=0))
    known = dict(text._ids)
    assert 1 <= len(known) <= 6
    assert all(a is b for a, b in zip(first, text.ids(text.order(5_000, seed=0)), strict=True))
    assert tokenised(corpus, tokenizer) is text
    assert tokenised(corpus, tokenizer, 512) is not text
    assert text.validation() is text.validation()
