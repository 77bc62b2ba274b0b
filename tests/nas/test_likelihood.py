"""Likelihoods: against a plain loop over transformers' logits, and by hand where the rules decide."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import write_speeches

from cost_models.measured import randomise
from nas.corpus import load_corpus
from nas.errors import InvalidTasks
from nas.huggingface.export import write_model
from nas.likelihood import ItemScore, binomial_stderr, score_items, score_tasks, wilson_interval
from nas.scoring import Row, log_likelihoods
from nas.tasks import Item, TaskSet
from nas.tokenizer import Tokenizer, train_tokenizer
from nas.training import evaluate
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 64
LLAMA = SLMConfig(vocab_size=400, d_model=32, num_layers=2, num_heads=2, context=CONTEXT)
OWN = SLMConfig(vocab_size=400, d_model=32, num_layers=2, num_heads=2, context=CONTEXT, series_activation=2)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return load_corpus().validation[0].split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, bytes]:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "tokenizer.json"
    return train_tokenizer(load_corpus(str(write_speeches(folder / "speeches.jsonl"))), 400, path), path.read_bytes()


def sharp(config: SLMConfig) -> SLM:
    """A random model that is far from indifferent: log-likelihoods that differ by tens of nats."""
    model = randomise(SLM(config), 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def model() -> SLM:
    return sharp(LLAMA)


def tasks_of(words: Sequence[str]) -> dict[str, TaskSet]:
    """Items of every kind, the right answers where the seed put them, on real words with marks that are not ASCII."""
    random = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        at = int(random.integers(len(words) - most))
        return " ".join(words[at : at + int(random.integers(least, most + 1))])

    pairs = [Item(context="", options=(text(4, 9) + ".", text(4, 9) + "é"), group="ab"[i % 2]) for i in range(12)]
    cloze = [Item(context=text(0, 12), options=(text(1, 2),)) for _ in range(12)]
    choice = [
        Item(context=text(2, 12), options=tuple(f"{text(1, 5)} {j} 大" for j in range(4)), answer=int(random.integers(4)))
        for _ in range(12)
    ]
    return {
        "pairs": TaskSet(name="p", kind="pairs", items=tuple(pairs)),
        "cloze": TaskSet(name="c", kind="cloze", items=tuple(cloze)),
        "choice": TaskSet(name="m", kind="choice", items=tuple(choice)),
    }


# --- against transformers ---------------------------------------------------------------------


@pytest.fixture
def _modules(tmp_path: Path) -> Iterator[None]:
    """transformers copies the Python files of a model into a folder of its own: one that goes with the test."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        # What another test loaded lies in that test's folder, and its package would be asked for this one's files.
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]


def plainly(theirs: Any, ids: list[int], bos: int, scored: int) -> tuple[float, bool]:
    """The log-likelihood of the last `scored` ids after all others, one row at a time, and whether they are the likeliest."""
    with torch.inference_mode():
        logits = theirs(torch.tensor([[bos, *ids]])).logits[0].double()
    total, greedy = 0.0, True
    for place in range(len(ids) - scored, len(ids)):
        total += float(torch.log_softmax(logits[place], dim=0)[ids[place]])
        greedy &= int(logits[place].argmax()) == ids[place]
    return total, greedy


@pytest.mark.usefixtures("_modules")
@pytest.mark.parametrize(("config", "family"), [(LLAMA, "LlamaForCausalLM"), (OWN, "EdgewiseForCausalLM")])
def test_it_agrees_with_transformers(
    config: SLMConfig, family: str, tokenizer: tuple[Tokenizer, bytes], words: list[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, folder = sharp(config), tmp_path / "exported"
    folder.mkdir()
    write_model(ours, *tokenizer, {}, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == family
    bos = their_tokenizer.bos_token_id
    for kind, tasks in tasks_of(words).items():
        right, right_per_byte = 0, 0
        for item, found in zip(tasks.items, score_items(ours, tokenizer[0], tasks.items), strict=True):
            context = their_tokenizer(item.context).input_ids
            values = []
            for place, option in enumerate(item.options):
                # The delimiter begins a token of its own word here, so that encoding the two apart is the same.
                ids = context + their_tokenizer((" " if item.context else "") + option).input_ids
                value, greedy = plainly(theirs, ids, bos, len(ids) - len(context))
                assert found.log_likelihoods[place] == pytest.approx(value, abs=1e-4, rel=0)
                assert found.greedy[place] == greedy
                values.append(value)
            per_byte = [value / len(option.encode()) for value, option in zip(values, item.options, strict=True)]
            right += greedy if kind == "cloze" else int(np.argmax(values)) == item.answer
            right_per_byte += int(np.argmax(per_byte)) == item.answer
        score = score_tasks(ours, tokenizer[0], tasks)
        assert score.accuracy == right / len(tasks)
        assert score.accuracy_per_byte == (right_per_byte / len(tasks) if kind == "choice" else None)
        assert score.shortened == 0


# --- a context that does not fit, a merge across the seam -------------------------------------


def direct(model: SLM, given: list[int], ids: list[int]) -> float:
    """log p(ids | end of text, given) in one go."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*given, *ids[:-1]]]))[0].double()
    rows = torch.log_softmax(logits[len(given) - 1 :], dim=1)
    return float(rows[torch.arange(len(ids)), ids].sum())


def test_a_long_context_is_cut_from_the_left_the_same_for_all_options(
    model: SLM, tokenizer: tuple[Tokenizer, bytes], words: list[str]
) -> None:
    ours = tokenizer[0]
    item = Item(context=" ".join(words[:80]), options=("a", "a very much longer one"), answer=0)
    context, short, long = (ours.encode(t) for t in (item.context, " a", " a very much longer one"))
    assert len(context) > CONTEXT
    kept = CONTEXT - len(long)
    (found,) = score_items(model, ours, [item])
    assert found.is_shortened
    for value, ids in zip(found.log_likelihoods, (short, long), strict=True):
        assert value == pytest.approx(direct(model, [ours.end_of_text, *context[-kept:]], ids), abs=1e-4)
    # One that just fits loses nothing.
    fitting = Item(context=ours.decode(context[:kept]), options=item.options)
    if ours.encode(fitting.context) == context[:kept]:
        assert not score_items(model, ours, [fitting])[0].is_shortened


def test_what_is_longer_than_the_window_by_itself_is_scored_once_each_token(
    model: SLM, tokenizer: tuple[Tokenizer, bytes], words: list[str]
) -> None:
    ours, text = tokenizer[0], " ".join(words[:100])
    ids = ours.encode(text)
    window, overlap = 16, 4
    expected = direct(model, [ours.end_of_text], ids[:16])
    for first in range(16, len(ids), window - overlap):
        expected += direct(model, [ours.end_of_text, *ids[first - overlap : first]], ids[first : first + window - overlap])
    (found,) = score_items(model, ours, [Item(context="", options=(text,))], window)
    assert found.tokens == (len(ids),)
    assert found.is_shortened
    assert found.log_likelihoods[0] == pytest.approx(expected, abs=1e-3)


def test_a_token_that_reaches_over_the_seam_is_scored_whole(model: SLM, tokenizer: tuple[Tokenizer, bytes]) -> None:
    ours = tokenizer[0]
    # "th" and "e" are one token joined, "th" and "!" are not.
    assert len(ours.encode(" the")) == 1
    item = Item(context="We of th", options=("e", "!"), delimiter="")
    shared = ours.encode("We of the")[:-1]
    (found,) = score_items(model, ours, [item])
    assert shared == ours.encode("We of")
    for value, text in zip(found.log_likelihoods, ("We of the", "We of th!"), strict=True):
        assert value == pytest.approx(direct(model, [ours.end_of_text, *shared], ours.encode(text)[len(shared) :]), abs=1e-4)
    # White space at the end of a context belongs to the word that follows, as in training.
    spaced, plain = score_items(model, ours, [Item(context=c, options=("the", "of")) for c in ("We ", "We")])
    assert spaced.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(context=st.text(max_size=12), options=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=3, unique=True))
def test_options_rank_as_whole_texts_do(context: str, options: list[str], model: SLM, tokenizer: tuple[Tokenizer, bytes]) -> None:
    """Wherever tokens merge: what is not scored is the same for all options, so differences are those of the whole texts."""
    ours = tokenizer[0]
    item = Item(context=context, options=tuple(options))
    (found,) = score_items(model, ours, [item])
    whole = [direct(model, [ours.end_of_text], ours.encode(context + item.continuation(i))) for i in range(len(options))]
    for i in range(1, len(options)):
        assert found.log_likelihoods[i] - found.log_likelihoods[0] == pytest.approx(whole[i] - whole[0], abs=1e-3)


# --- what it comes to -------------------------------------------------------------------------


def test_text_scores_as_in_training(model: SLM, tokenizer: tuple[Tokenizer, bytes], words: list[str]) -> None:
    documents = (" ".join(words[:150]), " ".join(words[150:190]), "Größe, 大小.")
    tasks = TaskSet(name="t", kind="text", documents=documents)
    score = score_tasks(model, tokenizer[0], tasks, 24)
    bpb, stderr = evaluate(model, tokenizer[0], documents, 24)
    assert (score.loss, score.loss_stderr) == pytest.approx((bpb, stderr), rel=1e-5)
    assert score.perplexity == pytest.approx(2 ** (bpb * score.text_bytes / 192), rel=1e-3)
    assert (score.n, score.accuracy, score.chance, score.loss_unit) == (3, None, None, "bits/byte")


def item(values: Sequence[float], options: Sequence[str], answer: int = 0, *, greedy: bool = False, group: str | None = None) -> ItemScore:
    return ItemScore(
        item=Item(context="c", options=tuple(options), answer=answer, group=group),
        log_likelihoods=tuple(values),
        greedy=(greedy,) * len(options),
        tokens=(1,) * len(options),
        is_shortened=False,
    )


def test_sums_and_bytes_choose_differently_and_a_tie_is_wrong() -> None:
    short_is_likelier = item([-4.0, -5.0], ["ab", "abcdef"])
    assert short_is_likelier.is_right
    assert not short_is_likelier.is_right_per_byte
    assert not item([-4.0, -4.0], ["ab", "cd"]).is_right
    assert not item([math.nan, -4.0], ["ab", "cd"]).is_right
    # Bytes, not characters: two of three bytes each against five of one.
    assert item([-5.5, -5.0], ["大小", "abcde"]).is_right_per_byte
    assert item([math.log(3), 0.0], ["a", "b"]).share_bits == pytest.approx(-math.log2(3 / 4))
    assert item([-math.log(8)], ["a"]).bits == pytest.approx(3)


def test_a_summary_by_hand() -> None:
    from nas.likelihood import summary

    scores = [item([-1.0, -2.0], ["a", "bb"], group="x"), item([-3.0, -1.0, -2.0], ["cc", "d", "e"], group="y")]
    tasks = TaskSet(name="m", kind="choice", items=tuple(s.item for s in scores))
    whole = summary(tasks, scores)
    assert (whole.n, whole.accuracy, whole.accuracy_per_byte) == (2, 0.5, 0.0)
    assert whole.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert whole.loss == pytest.approx((1 + 3) / math.log(2) / 5)  # the space before each counts
    assert {name: group.accuracy for name, group in whole.groups.items()} == {"x": 1.0, "y": 0.0}
    values = whole.to_dict()
    assert values["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 1))
    assert values["groups"]["x"]["loss_stderr"] is None
    pairs = [item([-1.0, -2.0], ["a", "b"]), item([-4.0, -4.0], ["a", "b"])]
    score = summary(TaskSet(name="p", kind="pairs", items=tuple(s.item for s in pairs)), pairs)
    expected = [math.log2(1 + math.exp(-1)), 1.0]
    assert score.loss == pytest.approx(np.mean(expected))
    assert score.loss_stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(2))
    cloze = [item([-2.0], ["ab"], greedy=True), item([-4.0], ["a"])]
    score = summary(TaskSet(name="c", kind="cloze", items=tuple(s.item for s in cloze)), cloze)
    assert (score.accuracy, score.chance, score.accuracy_per_byte) == (0.5, None, None)
    assert score.perplexity == pytest.approx(math.exp(3))
    assert score.loss == pytest.approx(6 / math.log(2) / 5)


def test_what_is_not_finite_is_none_in_json() -> None:
    from nas.likelihood import summary

    scores = [item([math.nan], ["a"]), item([-2000.0], ["a"])]
    tasks = TaskSet(name="c", kind="cloze", items=tuple(s.item for s in scores))
    values = summary(tasks, scores).to_dict()
    assert (values["loss"], values["perplexity"], values["accuracy"]) == (None, None, 0.0)
    assert summary(tasks, [scores[1]]).to_dict()["perplexity"] is None
    assert scores[0].to_dict()["log_likelihoods"] == [None]


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0.0, 20, 0.0, 0.1611), (1 / 29, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=5e-5)


def test_one_item_has_no_error() -> None:
    assert binomial_stderr(1.0, 1) is None
    assert binomial_stderr(0.5, 101) == pytest.approx(0.05)


def test_neither_order_nor_company_changes_a_score(model: SLM, tokenizer: tuple[Tokenizer, bytes], words: list[str]) -> None:
    items = [i for tasks in tasks_of(words).values() for i in tasks.items]
    together = score_items(model, tokenizer[0], items)
    assert together == score_items(model, tokenizer[0], items)
    backwards = score_items(model, tokenizer[0], items[::-1])[::-1]
    alone = [score_items(model, tokenizer[0], [i])[0] for i in items[:3]]
    for a, b in [*zip(together, backwards, strict=True), *zip(together, alone, strict=False)]:
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)
        assert (a.greedy, a.tokens) == (b.greedy, b.tokens)


def test_the_model_is_left_as_it_was_and_progress_ends_at_one(model: SLM, tokenizer: tuple[Tokenizer, bytes]) -> None:
    told: list[float] = []
    model.train()
    try:
        rows = [Row(np.asarray(tokenizer[0].encode("My fellow citizens"))), Row(np.asarray([], dtype=np.int64))]
        nats, greedy = log_likelihoods(model, rows, CONTEXT, tokenizer[0].end_of_text, told.append)
        assert model.training
    finally:
        model.eval()
    assert told[-1] == 1.0
    assert nats[0] < 0
    assert (nats[1], bool(greedy[1])) == (0.0, True)
    with pytest.raises(InvalidTasks, match="window=1 is below 2 tokens"):
        score_items(model, tokenizer[0], [Item(context="", options=("a", "b"))], 1)
