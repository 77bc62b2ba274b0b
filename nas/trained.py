"""Training a candidate and scoring it, once for all devices; the weights are kept with their score."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.describe import describe_config, format_count
from nas.errors import InvalidRun
from nas.evaluation import Evaluation
from nas.limits import settled
from nas.settings import Bench
from nas.trial import Trial, first_line

if TYPE_CHECKING:
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

ONE_THREAD_BELOW = 3_000_000
"""Models with fewer parameters train on one thread: their products are too small for a second to help (13 % more tokens a
second on an idle machine of two cores, many times fewer when another program wants one), and the score is then the same
to the bit whatever the number of cores."""


def train(trial: Trial, before: Sequence[Evaluation]) -> None:
    """Trains and scores, unless that is done; the weights are on disk, with their score, before the record says so.

    Args:
        trial: counted, with its tokenizer made.
        before: the finished trials before it, of which one may have trained the same model for another precision.
    """
    if trial.evaluation.score is not None:
        return
    # A run killed between the weights and the record finds the score in the weights' header.
    score = _kept_score(trial.bench, trial.evaluation)
    if score is not None:
        _save_score(trial, score)
        trial.log("train", "done", recovered=True)
        return

    try:
        with trial.step("train", format_count(trial.evaluation.params) + " parameters"):
            _save_score(trial, _trained(trial, before))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = f"training ran out of memory: {first_line(error)}"
        trial.save(lambda e: e.evolve(state="failed", reason=reason))


def restore(bench: Bench, evaluation: Evaluation) -> None:
    """Makes a complete trial's tokenizer or weights anew if they are lost or damaged; a damaged weight file is set aside.

    The record has the score of the new weights if they were trained again (on the same machine, the same score).
    """
    from nas.tokenizer import train_tokenizer
    from nas.weights import load_weights

    trial = Trial(bench, evaluation)
    path = bench.run.weights_path(trial.number)
    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    tokenizer = train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab))
    if tokenizer.vocab_size != trial.config.vocab_size:
        bench.view.note(f"the tokenizer of trial {trial.number} cannot be made again: another version makes another one")
        return
    try:
        load_weights(path, trial.config)
    except InvalidRun:
        kept = f"damaged (kept as {bench.run.set_aside(path).name})" if path.exists() else "lost"
        bench.view.note(f"the weights of trial {trial.number} were {kept}; it is trained again")
    else:
        return
    with trial.step("train", "again"):
        _save_score(trial, _trained(trial, ()))
    trial.save(lambda e: settled(bench, e))


def _save_score(trial: Trial, score: Mapping[str, Any]) -> None:
    trial.save(lambda e: e.evolve(score=score, val_bpb=score["val_bpb"], val_bpb_stderr=score["val_bpb_stderr"]))


def _kept_score(bench: Bench, evaluation: Evaluation) -> Mapping[str, Any] | None:
    """The score that a trial's weights on disk were written with; None if they are not those of its model and precision."""
    from nas.weights import read_facts

    facts = read_facts(bench.run.weights_path(evaluation.trial)) or {}
    config = evaluation.config
    if config is None or facts.get("config") != config.key or facts.get("weights", "fp32") != evaluation.weights:
        return None
    score: Mapping[str, Any] | None = facts.get("score")
    return score


def _trained(trial: Trial, before: Sequence[Evaluation]) -> Mapping[str, Any]:
    """Trains in float32, or takes the weights of an equal trial `before`, and scores in the trial's precision.

    The float32 weights are kept with the score, unless they diverged.
    """
    from nas.rounding import rounded_score
    from nas.tokenizer import train_tokenizer
    from nas.weights import save_weights

    bench, evaluation = trial.bench, trial.evaluation
    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    tokenizer = train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab))
    model, score = _from_other_precision(bench, evaluation, before) or _from_scratch(trial, tokenizer)
    if score["diverged"]:
        return score
    score = rounded_score(model, evaluation.weights, tokenizer, bench.corpus, score)
    save_weights(bench.run.weights_path(evaluation.trial), model, {"score": score, "weights": evaluation.weights})
    return score


def _from_scratch(trial: Trial, tokenizer: "Tokenizer") -> "tuple[SLM, dict[str, Any]]":
    from nas import training

    bench = trial.bench
    model, score = training.train(
        trial.config,
        bench.corpus,
        tokenizer,
        bench.settings.budget(),
        bench.settings.seed,
        threads=1 if (trial.evaluation.params or 0) < ONE_THREAD_BELOW else None,
        progress=lambda fraction: bench.view.stage(trial.number, "train", describe_config(trial.config), fraction),
    )
    # Wall-clock figures would make equal runs differ: they are in the log.
    return model, {k: v for k, v in score.to_dict().items() if k not in ("train_s", "eval_s")}


def _from_other_precision(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> "tuple[SLM, dict[str, Any]] | None":
    """The float32 weights and score of an equal model that was trained for another precision, if they are still on disk.

    Training it again would come to the same weights.
    """
    from nas.rounding import float_score
    from nas.weights import load_weights

    assert evaluation.config is not None
    for other in before:
        if other.config != evaluation.config or (score := _kept_score(bench, other)) is None:
            continue
        try:
            model = load_weights(bench.run.weights_path(other.trial), evaluation.config)
        except InvalidRun:
            continue
        return model, float_score(score)
    return None


def _out_of_memory(error: BaseException) -> bool:
    if os.environ.get("EDGEWISE_DEBUG") == "1":
        return False
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
