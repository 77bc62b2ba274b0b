"""Training a candidate, or its twin, and scoring it, once for all devices; the weights are kept with their score.

In a space with twins (`search_spaces.twin`) what is trained, scored and kept is the twin: its score has the twin's config, as
`twin`, and its parameters, as `twin_params`, and its weights are those of no candidate.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from nas.describe import describe_config, format_count
from nas.errors import InvalidRun
from nas.evaluation import Evaluation
from nas.front import on_fronts
from nas.limits import settled
from nas.run import Run
from nas.settings import Bench
from nas.trial import Trial, first_line
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.twin import trained_config

if TYPE_CHECKING:
    from nas.tokenizer import Tokenizer
    from nas.training import ShortTraining
    from search_spaces.model import SLM

ONE_THREAD_BELOW = 3_000_000
"""Models with fewer parameters train on one thread: their products are too small for a second to help (13 % more tokens a
second on an idle machine of two cores, many times fewer when another program wants one), and the score is then the same
to the bit whatever the number of cores."""


class Training:
    """A trial's training, from rung to rung. What it comes to is on disk, as are its score's own weights, before its record says so.

    Args:
        trial: counted, with its tokenizer made.
        before: every trial before it, finished, of which one may have trained the same model for another precision.
    """

    def __init__(self, trial: Trial, before: Sequence[Evaluation]) -> None:
        self._trial, self._before = trial, before
        self._config = trained_config(trial.bench.space, trial.config)
        self._short: ShortTraining | None = None

    @functools.cached_property
    def _tokenizer(self) -> "Tokenizer":
        return self._trial.bench.tokenizer(self._trial.evaluation.params_drawn)

    def go_on(self) -> None:
        """Trains to the rung after the last one in the record, and scores there; to the top at once, where that is taken over.

        Where it stands is kept at a rung below the top; the float32 weights are kept with their score at the top.
        """
        trial, rungs = self._trial, self._trial.bench.settings.all_rungs()
        # A run killed between the weights and the record finds the score in the weights' header.
        score = _kept_score(trial.bench, trial.evaluation)
        if score is not None:
            _save_score(trial, score)
            trial.log("train", "done", recovered=True)
            return
        at = len(trial.evaluation.rungs)
        taken_over = _equal_on_a_front(trial.bench, trial.evaluation, self._before) if at == 0 else []
        try:
            if taken_over or at == len(rungs) - 1:
                self.to_top(taken_over)
            else:
                self._to_rung(rungs[at])
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = f"training ran out of memory: {first_line(error)}"
            trial.save(lambda e: e.evolve(state="failed", reason=reason))

    def to_top(self, like: Sequence[Evaluation] = ()) -> None:
        """Trains to the top, or takes the weights of one of these trials of the same model; scores, and keeps the weights.

        The rungs that are in the record stay in it.
        """
        trial, bench = self._trial, self._trial.bench
        with self._step(bench.settings.budget_bytes) as facts:
            model, score = _weights_of(bench, like, self._config) or self._trained(bench.settings.budget_bytes, facts)
            if not score["diverged"]:
                score = self._rounded(model, score)
            score = {**score, **self._twin(), **({"rungs": rungs} if (rungs := trial.evaluation.rungs) else {})}
            if not score["diverged"]:
                _save_weights(trial, model, score)
            _save_score(trial, score)

    def _to_rung(self, train_bytes: int) -> None:
        trial = self._trial
        with self._step(train_bytes) as facts:
            model, score = self._trained(train_bytes, facts)
            if score["diverged"]:
                _save_score(trial, {**score, **self._twin(), "rungs": trial.evaluation.rungs})
                return
            score = self._rounded(model, score)
            assert self._short is not None
            path = trial.bench.run.training_path(trial.number)
            self._short.save(path)
            trial.save(lambda e: e.evolve(score={**self._twin(), "rungs": [*e.rungs, score]}))

    def _step(self, train_bytes: int) -> AbstractContextManager[dict[str, Any]]:
        return self._trial.step("train", f"{format_count(params(self._config))} parameters", train_bytes=train_bytes)

    def _trained(self, train_bytes: int, facts: dict[str, Any]) -> "tuple[SLM, dict[str, Any]]":
        """Trains on so much text, from where the training stands; puts its speed among the facts for the log."""
        from nas.training import ShortTraining
        from nas.utilisation import pace_of

        trial, bench, config = self._trial, self._trial.bench, self._config
        threads = 1 if params(config) < ONE_THREAD_BELOW else None
        if self._short is None:
            asked = (config, bench.corpus, self._tokenizer, bench.settings.budget(), bench.settings.seed)
            self._short = ShortTraining(*asked, threads=threads)
            if trial.evaluation.rungs:  # what else lies there is of a record that was lost, and may be further
                self._short.resume(bench.run.training_path(trial.number))
        words, budget, tokenizer = describe_config(config), bench.settings.budget(), self._tokenizer
        tokens = budget.passage_bytes / tokenizer.bytes_per_token
        pace = pace_of(config, budget.window_tokens(config, tokenizer), tokens, self._short.trunk, threads)

        def tell(share: float) -> None:
            pace.stepped()
            bench.view.stage(trial.number, "train", f"{pace.words()}  {words}", share)

        model, score = self._short.to(train_bytes, tell)
        facts |= pace.facts()
        return model, score.to_record()

    def _rounded(self, model: "SLM", score: dict[str, Any]) -> dict[str, Any]:
        """The score in the trial's precision, and on the file that the search goes by."""
        from nas.rounding import rounded_score

        bench = self._trial.bench
        return rounded_score(model, self._trial.weights, self._tokenizer, bench.corpus, score, bench.settings.accuracy)

    def _twin(self) -> dict[str, Any]:
        config = self._config
        return {} if config == self._trial.config else {"twin": config.to_dict(), "twin_params": params(config)}


def forget_training(run: Run, trial: int) -> None:
    """Removes where the training of a trial stood that is over."""
    path = run.training_path(trial)
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def restore(bench: Bench, evaluation: Evaluation) -> None:
    """Makes a complete trial's tokenizer or weights anew if they are lost or damaged; a damaged weight file is set aside.

    The record has the score of the new weights if they were trained again (on the same machine, the same score).
    """
    from nas.weights import load_weights

    trial = Trial(bench, evaluation)
    path = bench.run.weights_path(trial.number)
    if bench.tokenizer(evaluation.params_drawn).vocab_size != trial.config.vocab_size:
        bench.view.note(f"the tokenizer of trial {trial.number} cannot be made again: another version makes another one")
        return
    try:
        load_weights(path, trained_config(bench.space, trial.config))
    except InvalidRun:
        kept = f"damaged (kept as {bench.run.set_aside(path).name})" if path.exists() else "lost"
        bench.view.note(f"the weights of trial {trial.number} were {kept}; it is trained again")
    else:
        return
    Training(trial, ()).to_top()
    trial.save(lambda e: settled(bench, e))


def _save_weights(trial: Trial, model: "SLM", score: Mapping[str, Any]) -> None:
    from nas.weights import save_weights

    save_weights(trial.bench.run.weights_path(trial.number), model, {"score": score, "weights": trial.weights})


def _save_score(trial: Trial, score: Mapping[str, Any]) -> None:
    trial.save(lambda e: e.evolve(score=score, val_bpb=score["val_bpb"], val_bpb_stderr=score["val_bpb_stderr"]))


def _kept_score(bench: Bench, evaluation: Evaluation) -> Mapping[str, Any] | None:
    """The score that a trial's weights on disk were written with; None if they are not those of its model and precision."""
    from nas.weights import read_facts

    facts = read_facts(bench.run.weights_path(evaluation.trial)) or {}
    config = evaluation.config
    if (
        config is None
        or facts.get("config") != trained_config(bench.space, config).key
        or facts.get("weights", "fp32") != evaluation.weights
    ):
        return None
    score: Mapping[str, Any] | None = facts.get("score")
    return score


def _equal_on_a_front(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> list[Evaluation]:
    """The trials before it that trained the same model, or twin, for another precision, and whose weights are kept.

    Training it again would come to the same weights. The records alone decide, so that a resumed run decides as the first one did.
    """
    assert evaluation.config is not None
    config = trained_config(bench.space, evaluation.config)
    equal = {e.trial for e in before if e.config is not None and trained_config(bench.space, e.config) == config}
    return [e for e in on_fronts(bench.run, before, bench.settings.speed) if e.trial in equal] if equal else []


def _weights_of(bench: Bench, like: Sequence[Evaluation], config: SLMConfig) -> "tuple[SLM, dict[str, Any]] | None":
    """The float32 weights of the first of these trials that has them on disk, and their score."""
    from nas.rounding import float_score
    from nas.weights import load_weights

    for other in like:
        if (score := _kept_score(bench, other)) is not None:
            with suppress(InvalidRun):
                model = load_weights(bench.run.weights_path(other.trial), config)
                return model, {k: v for k, v in float_score(score).items() if k not in ("rungs", "twin", "twin_params", "task")}
    return None


def _out_of_memory(error: BaseException) -> bool:
    if os.environ.get("EDGEWISE_DEBUG") == "1":
        return False
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
