"""How a bundle's runner chooses tokens, and how tokens become text as they come."""

import numpy as np
import pytest
import tokenizers
from bundle_helpers import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nas.bundle_runner import BundleError, Sampling, TextStream, _harmless, byte_alphabet

LOGITS = np.random.default_rng(0).standard_normal(50).astype(np.float32) * 3


def draws(sampling: Sampling, count: int = 400, logits: np.ndarray = LOGITS) -> list[int]:
    choose = sampling.chooser()
    return [choose(logits) for _ in range(count)]


# --- choosing -------------------------------------------------------------------------------------


def test_without_a_choice_the_likeliest_is_taken() -> None:
    assert set(draws(Sampling(), 5)) == {int(LOGITS.argmax())}
    assert Sampling().chooser()(np.array([1.0, 3.0, 3.0])) == 1


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.floats(0.01, 10), st.integers(0, 5))
def test_top_k_of_one_and_a_tiny_top_p_are_greedy(values: list[float], temperature: float, seed: int) -> None:
    logits = np.array(values, np.float32)
    for sampling in (Sampling(temperature=temperature, top_k=1, seed=seed), Sampling(temperature=temperature, top_p=1e-9, seed=seed)):
        assert sampling.chooser()(logits) == int(logits.argmax())


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    assert draws(Sampling(temperature=1.0, seed=4)) == draws(Sampling(temperature=1.0, seed=4))
    assert draws(Sampling(temperature=1.0, seed=4)) != draws(Sampling(temperature=1.0, seed=5))
    assert draws(Sampling(temperature=1.0)) != draws(Sampling(temperature=1.0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(draws(Sampling(temperature=temperature, seed=1), 20_000, logits), minlength=4) / 20_000
    assert abs(found - expected).max() < 0.015


def test_top_k_draws_from_the_k_likeliest() -> None:
    likeliest = set(np.argsort(-LOGITS)[:4].tolist())
    assert set(draws(Sampling(temperature=5.0, top_k=4, seed=0))) == likeliest
    assert len(set(draws(Sampling(temperature=5.0, top_k=500, seed=0), 3000))) == 50


def test_top_p_draws_from_the_fewest_that_make_it_up() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    for top_p, kept in ((0.39, {1}), (0.5, {1, 3}), (0.69, {1, 3}), (0.85, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draws(Sampling(temperature=1.0, top_p=top_p, seed=0), 300, logits)) == kept


def test_impossible_logits_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert set(draws(Sampling(temperature=3.0, seed=0), 200, logits)) == {1, 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan is not 0 or more"),
        ({"temperature": float("inf")}, "temperature=inf is not 0 or more"),
        ({"top_k": -1}, "top-k=-1 is not 0 or more"),
        ({"top_p": 0.0}, "top-p=0.0 is not above 0 and at most 1"),
        ({"top_p": 1.5}, "top-p=1.5 is not above 0 and at most 1"),
        ({"seed": -1}, "seed=-1 is not 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


# --- text -----------------------------------------------------------------------------------------


def _tokenizer() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<|endoftext|>"], show_progress=False
    )
    inner.train_from_iterator([TEXT * 9], trainer)
    return inner


TOKENIZER = _tokenizer()


def test_the_alphabet_is_that_of_byte_level_bpe() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_streamed_text_is_the_text_and_no_piece_cuts_a_character(text: str) -> None:
    stream = TextStream(TOKENIZER.id_to_token)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text, add_special_tokens=False).ids]
    assert stream.end() == ""
    assert "".join(pieces) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_stream_as_they_decode_at_once(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER.id_to_token)
    streamed = "".join([*(stream.add(token) for token in ids), stream.end()])
    assert streamed == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_character_comes_when_it_is_complete_and_half_of_one_at_the_end_is_marked() -> None:
    back = {byte: character for character, byte in byte_alphabet().items()}
    pieces = [back[byte] for byte in "a🌾".encode()]
    stream = TextStream(lambda token: pieces[token])
    assert [stream.add(token) for token in range(5)] == ["a", "", "", "", "🌾"]
    assert stream.add(1) == ""
    assert stream.end() == "�"


def test_a_terminal_is_not_commanded() -> None:
    assert _harmless("a\x1b[2J\x9b1m\r\tb\n’豊") == "a�[2J�1m�\tb\n’豊"
