"""Short training: the score is right, repeatable, comparable across vocabularies, and failures are outcomes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nas import passages as passages_module
from nas.corpus import Corpus, load_corpus
from nas.errors import UserError
from nas.tokenizer import Tokenizer, train_tokenizer
from nas.training import Budget, ProxyScore, ShortTraining, bits_per_byte, evaluate, train
from nas.training_step import EMBEDDING_RATE, MATRIX_RATE, cooldown_steps, has_diverged, parameter_groups, schedule, trapezoid
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = Budget(train_bytes=24_000, passage_bytes=512)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    whole = load_corpus()
    return Corpus(
        name="slice",
        licence=whole.licence,
        train=tuple(d[:9000] for d in whole.train[:16]),
        validation=tuple(d[: 700 + 150 * i] for i, d in enumerate(whole.validation[:5])),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, folder: Path) -> Tokenizer:
    return train_tokenizer(corpus, 400, folder / "400.json")


def config(tokenizer: Tokenizer, **values: object) -> SLMConfig:
    return SLMConfig.from_dict(
        {"vocab_size": tokenizer.vocab_size, "d_model": 32, "num_layers": 2, "num_heads": 2, "context": 256, **values}
    )


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tokenizer: Tokenizer) -> tuple[SLM, ProxyScore]:
    return train(config(tokenizer), corpus, tokenizer, BUDGET, seed=3, device="cpu")


# --- the score --------------------------------------------------------------------------------


def test_model_that_knows_nothing_scores_the_size_of_its_vocabulary(corpus: Corpus, tokenizer: Tokenizer) -> None:
    per_byte = sum(map(len, tokenizer.encode_batch(corpus.validation))) / corpus.validation_bytes
    model = SLM(config(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    uniform, _ = evaluate(model, tokenizer, corpus.validation, 64)
    assert uniform == pytest.approx(math.log2(tokenizer.vocab_size) * per_byte, rel=1e-6)
    untrained, stderr = evaluate(model.initialise(0), tokenizer, corpus.validation, 64)
    assert untrained == pytest.approx(uniform, rel=0.03)
    assert stderr is not None
    assert 0 < stderr < 0.1 * untrained


@pytest.mark.parametrize("window", [1, 7, 64, 100, 10_000])
def test_every_token_is_scored_once_with_a_quarter_of_a_window_before_it(
    corpus: Corpus, tokenizer: Tokenizer, trained: tuple[SLM, ProxyScore], window: int
) -> None:
    model, _ = trained
    documents = (*corpus.validation, "x", "Fellow-Citizens: é")
    if window < 64:  # a model call for each of so many windows
        documents = documents[-3:]
    bits, sizes = [], []
    size = min(window, 256)
    context = min(size - 1, round(size / 4))
    for document in documents:
        ids = tokenizer.encode(document)
        total, first = 0.0, 0
        while first < len(ids):
            begin = max(0, first - context)
            piece = torch.tensor([tokenizer.end_of_text, *ids[begin : begin + size]])
            with torch.no_grad():
                logits = model(piece[None, :-1])[0, first - begin :]
            total += F.cross_entropy(logits, piece[1 + first - begin :], reduction="sum").item()
            first = begin + size
        bits.append(total / math.log(2))
        sizes.append(len(document.encode()))
    got, _ = evaluate(model, tokenizer, documents, window)
    assert got == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)


def test_scoring_leaves_the_mode_of_the_model(corpus: Corpus, tokenizer: Tokenizer) -> None:
    model = SLM(config(tokenizer)).initialise(0)
    for mode in (True, False):
        evaluate(model.train(mode), tokenizer, ["a text"], 8)
        assert model.training is mode


def test_standard_error_is_that_of_a_ratio() -> None:
    bits, sizes = np.array([200.0, 330.0, 90.0]), np.array([100.0, 150.0, 50.0])
    ratio, stderr = bits_per_byte(bits, sizes)
    # By hand: R = 620/300; residuals -20/3, 20, -40/3; sum of squares 622.22; sqrt(3/2 * 622.22) / 300.
    assert ratio == pytest.approx(620 / 300)
    assert stderr == pytest.approx(math.sqrt(1.5 * (400 / 9 + 400 + 1600 / 9)) / 300)
    assert bits_per_byte(bits[:1], sizes[:1]) == (2.0, None)
    assert bits_per_byte(sizes * 2, sizes)[1] == 0.0


def test_standard_error_predicts_the_spread_of_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    ratios: list[float] = []
    errors: list[float] = []
    for _ in range(2000):
        sizes = generator.uniform(5e3, 3e4, 30)
        ratio, stderr = bits_per_byte(sizes * (2.2 + 0.2 * generator.standard_normal(30)), sizes)
        assert stderr is not None
        ratios.append(ratio)
        errors.append(stderr)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.08)


def test_nothing_to_score_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^there is no text to score"):
        evaluate(SLM(config(tokenizer)), tokenizer, ["", ""], 8)


# --- training ---------------------------------------------------------------------------------


def test_training_learns_and_says_what_it_did(corpus: Corpus, tokenizer: Tokenizer, trained: tuple[SLM, ProxyScore]) -> None:
    model, score = trained
    untrained, _ = evaluate(SLM(config(tokenizer)).initialise(3), tokenizer, corpus.validation, score.window_tokens)
    assert score.val_bpb is not None
    assert score.val_bpb < 0.85 * untrained
    assert not score.diverged
    assert score.first_train_bpb is not None
    assert score.final_train_bpb is not None
    assert score.first_train_bpb == pytest.approx(untrained, rel=0.15)
    assert score.final_train_bpb == pytest.approx(score.val_bpb, rel=0.15)
    assert BUDGET.train_bytes <= score.train_bytes < BUDGET.train_bytes + 2 * 512
    assert score.steps == pytest.approx(24_000 / 512, rel=0.05)
    assert (score.device, score.threads, score.seed) == ("cpu", 1, 3)
    assert score.train_s > 0
    assert score.eval_s > 0
    assert not model.training
    again, stderr = evaluate(model, tokenizer, corpus.validation, score.window_tokens)
    assert (again, stderr) == (score.val_bpb, score.val_bpb_stderr)


def test_same_seed_gives_the_same_bits(corpus: Corpus, tokenizer: Tokenizer, trained: tuple[SLM, ProxyScore]) -> None:
    passages_module._TOKENISED.clear()
    torch.manual_seed(99)
    model, score = train(config(tokenizer), corpus, tokenizer, BUDGET, seed=3, device="cpu")
    assert score.val_bpb == trained[1].val_bpb
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained[0].parameters(), strict=True))
    _, other = train(config(tokenizer), corpus, tokenizer, BUDGET, seed=4, device="cpu")
    assert other.val_bpb != score.val_bpb


def test_two_threads_repeat_themselves_and_are_set_back(corpus: Corpus, tokenizer: Tokenizer) -> None:
    # Very little text: two threads on a busy core wait for each other.
    short = Corpus(name="short", licence="", train=corpus.train, validation=(corpus.validation[0][:200], corpus.validation[1][:200]))
    budget = Budget(train_bytes=600, passage_bytes=256)
    candidate = config(tokenizer, num_layers=1)
    scores = [train(candidate, short, tokenizer, budget, seed=0, device="cpu", threads=2)[1] for _ in range(2)]
    assert scores[0].val_bpb == scores[1].val_bpb
    assert scores[0].threads == 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_divergence_is_an_outcome(corpus: Corpus, tokenizer: Tokenizer, rate: float) -> None:
    budget = Budget(train_bytes=24_000, passage_bytes=512, learning_rate=rate)
    _, score = train(config(tokenizer), corpus, tokenizer, budget, seed=0, device="cpu")
    assert score.diverged
    assert score.val_bpb is None
    assert score.val_bpb_stderr is None
    assert score.steps < 47
    assert ProxyScore.from_dict(json.loads(json.dumps(score.to_dict(), allow_nan=False))) == score


def test_score_survives_json(trained: tuple[SLM, ProxyScore]) -> None:
    score = trained[1]
    assert ProxyScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    with pytest.raises(TypeError, match="surprise"):
        ProxyScore.from_dict({**score.to_dict(), "surprise": 1})


def test_progress_rises_to_one(corpus: Corpus, tokenizer: Tokenizer) -> None:
    shares: list[float] = []
    budget = Budget(train_bytes=4000, passage_bytes=512)
    _, score = train(config(tokenizer), corpus, tokenizer, budget, seed=0, device="cpu", progress=shares.append)
    assert len(shares) == score.steps
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_interrupt_passes_through(corpus: Corpus, tokenizer: Tokenizer) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tokenizer), corpus, tokenizer, BUDGET, seed=0, device="cpu", progress=stop, threads=2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "values",
    [
        {"context": 16, "positions": "learned"},
        {"attention": "mla", "kv_rank": 8, "q_rank": 8, "tie_embeddings": False},
        {"norm": "layernorm", "ffn": "standard", "activation": "gelu", "qkv_bias": True, "block": "parallel", "series_activation": 2},
        {
            "num_layers": 4,
            "sharing": "cycle",
            "num_unique_layers": 2,
            "augmented_shortcuts": 1,
            "series_activation": 2,
            "series_mode": "channel",
        },
    ],
)
def test_other_architectures_learn(corpus: Corpus, tokenizer: Tokenizer, values: dict[str, object]) -> None:
    candidate = config(tokenizer, **values)
    model, score = train(candidate, corpus, tokenizer, Budget(train_bytes=6000, passage_bytes=512), seed=0, device="cpu")
    groups = parameter_groups(model, 1e-3)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert all(p.ndim >= 2 and p is not model.embed.tokens.weight for p in decayed)
    assert len(decayed) >= 6
    assert score.val_bpb is not None
    assert score.first_train_bpb is not None
    assert score.val_bpb < 0.9 * score.first_train_bpb
    assert score.window_tokens <= candidate.context


def test_matrix_rate_falls_with_size_and_others_stay(tokenizer: Tokenizer) -> None:
    rates = []
    for width, layers in ((64, 4), (128, 4), (256, 4), (128, 1), (128, 16)):
        embeddings, matrices, vectors = parameter_groups(SLM(config(tokenizer, d_model=width, num_layers=layers), device="meta"), 1e-3)
        rates.append(matrices["lr"])
        assert embeddings["lr"] == vectors["lr"] == pytest.approx(1e-3 * EMBEDDING_RATE / MATRIX_RATE)
    assert rates == pytest.approx([2e-3, 1e-3, 5e-4, 2e-3, 5e-4])


def test_schedule_warms_up_and_ends_near_zero() -> None:
    for steps in (1, 2, 3, 20, 200):
        shares = [schedule(i, steps) for i in range(steps)]
        assert all(0 < s <= 1 for s in shares)
        assert max(shares) == 1.0
    assert shares[0] == pytest.approx(0.1)
    assert shares[-1] == pytest.approx(1 / 190)
    assert shares[:10] == sorted(shares[:10])
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_trapezoid_is_the_same_for_every_length_up_to_where_it_falls() -> None:
    for steps in (1, 2, 10, 64, 1000):
        shares = [trapezoid(i, steps, 1024) for i in range(steps)]
        turn = steps - cooldown_steps(steps)
        assert shares[:turn] == [trapezoid(i, 10_000, 1024) for i in range(turn)]
        assert all(0 < s <= 1 for s in shares)
        assert shares[turn:] == sorted(shares[turn:], reverse=True) or steps < 30
    assert shares[7] == shares[699] == 1.0
    assert shares[3] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(1 / 301)


# --- rungs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def climbed(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> list[ProxyScore]:
    training = ShortTraining(config(tokenizer), corpus, tokenizer, BUDGET, 3, device="cpu")
    scores = [training.to(6_000)[1]]
    training.save(folder / "trunk.safetensors")
    return [*scores, training.to(24_000)[1]]


def timeless(score: ProxyScore) -> dict[str, object]:
    return {name: value for name, value in score.to_dict().items() if not name.endswith("_s")}


def test_a_rung_scores_what_training_to_it_alone_does(climbed: list[ProxyScore], trained: tuple[SLM, ProxyScore]) -> None:
    assert timeless(climbed[1]) == timeless(trained[1])
    assert climbed[0].val_bpb is not None
    assert climbed[1].val_bpb is not None
    assert climbed[0].val_bpb > climbed[1].val_bpb
    assert 6_000 <= climbed[0].train_bytes < 7_000


def test_a_killed_training_goes_on_to_the_same_bits(corpus: Corpus, tokenizer: Tokenizer, folder: Path, climbed: list[ProxyScore]) -> None:
    training = ShortTraining(config(tokenizer), corpus, tokenizer, BUDGET, 3, device="cpu")
    assert training.resume(folder / "trunk.safetensors")
    first_step = training.to(24_000, lambda share: None)
    assert timeless(first_step[1]) == timeless(climbed[1])


@pytest.mark.parametrize("what", ["seed", "architecture", "damaged", "missing", "rate"])
def test_a_trunk_of_another_training_is_not_taken_up(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, climbed: list[ProxyScore], what: str, tmp_path: Path
) -> None:
    path = folder / "trunk.safetensors"
    if what == "damaged":
        path = tmp_path / "half.safetensors"
        path.write_bytes((folder / "trunk.safetensors").read_bytes()[:-100])
    elif what == "missing":
        path = tmp_path / "none.safetensors"
    values = {"num_layers": 1} if what == "architecture" else {}
    budget = Budget(train_bytes=1, passage_bytes=512, learning_rate=1e-3) if what == "rate" else BUDGET
    training = ShortTraining(config(tokenizer, **values), corpus, tokenizer, budget, 4 if what == "seed" else 3, device="cpu")
    assert not training.resume(path)
    assert not training._losses
    fresh = SLM(training.trunk.config).initialise(4 if what == "seed" else 3)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), training.trunk.parameters(), strict=True))


def test_what_cannot_be_trained_is_refused(corpus: Corpus, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"^vocab_size=300 is below the 400 ids of the tokenizer; give the model 400, or train a smaller tokenizer$"
    ):
        train(config(tokenizer, vocab_size=300), corpus, tokenizer, BUDGET, seed=0)
    with pytest.raises(UserError, match=r"^train_bytes=0 is below 1; give a positive integer$"):
        Budget(train_bytes=0)
    with pytest.raises(UserError, match=r"^passage_bytes=0 is below 1"):
        Budget(train_bytes=1, passage_bytes=0)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"^learning_rate={rate} is not a positive number; give one above 0, or leave it out$"):
            Budget(train_bytes=1, learning_rate=rate)


def test_every_vocabulary_takes_as_many_steps(corpus: Corpus, folder: Path) -> None:
    scores = []
    for size in (257, 1024):
        other = train_tokenizer(corpus, size, folder / f"{size}.json")
        scores.append(train(config(other), corpus, other, Budget(train_bytes=4000, passage_bytes=512), seed=5, device="cpu")[1])
    assert scores[0].steps == scores[1].steps
    assert scores[0].train_bytes == scores[1].train_bytes
    assert scores[0].train_tokens > 1.5 * scores[1].train_tokens


def test_one_hard_window_is_no_divergence() -> None:
    assert not has_diverged([6.0] * 20 + [14.0])
    assert has_diverged([6.0] * 20 + [14.0] * 8)
    assert has_diverged([6.0, math.nan])
    assert has_diverged([6.0, math.inf])
    assert has_diverged([math.nan])
    assert not has_diverged([6.0])
