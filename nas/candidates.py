"""One trial, cheap steps first: count, tokenise, estimate, then compile and measure, and train from rung to rung.

Each step's result is on disk before the next begins, and a step whose result is there is not done again. A
candidate that breaks a limit stops at the step that showed it, one that is behind at a rung stops there. Compiling goes on in
the background, while the model trains to its first rung if measuring cannot make that needless; so does measuring on other
machines. The same model is measured on every device and trained once.

A trial begins (`Candidate.begin`) and is finished later (`Candidate.finish`), so that a search can have several under
way. They are finished in order, so what a trial comes to never depends on which measurement was ready first.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cost_models.baseline import BytesBaseline
from nas.evaluation import WEIGHTS, Evaluation
from nas.limits import broken, settled, stopped_if_behind
from nas.measuring import DeviceWork
from nas.settings import Bench
from nas.trained import Training, forget_training
from nas.trial import Trial, first_line, with_counts
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens, assumed_bytes_per_token
from targets.target import TargetError

if TYPE_CHECKING:
    from nas.proposals import Proposal


class Candidate:
    """A trial under way, from wherever its record stands.

    Args:
        bench: what to try it with.
        proposal: its parameters, unless its record has them already.
    """

    def __init__(self, bench: Bench, proposal: "Proposal") -> None:
        weights = proposal.params.get(WEIGHTS, bench.settings.weights[0])
        evaluation = bench.run.load(proposal.trial)
        self._bench = bench
        self.proposal = proposal
        self._trial = Trial(bench, evaluation or Evaluation(trial=proposal.trial, params_drawn=proposal.params, weights=weights))
        self._works: dict[int, DeviceWork] = {}

    @property
    def evaluation(self) -> Evaluation:
        """Its record so far."""
        return self._trial.evaluation

    def begin(self, before: Sequence[Evaluation], under_way: Sequence[Evaluation] = ()) -> None:
        """Counts it, and has it compiled, and measured where that disturbs nothing, in the background.

        Args:
            before: the finished trials, all of them earlier, among which an equal one may be.
            under_way: the other earlier ones: should one of them be equal, this trial waits to see what that comes to.
        """
        if self._trial.is_running and _prepare(self._trial, before, under_way):
            evaluation = self._trial.evaluation
            for place, (device, _) in enumerate(self._bench.devices()):
                if place not in self._works and evaluation.on(device).measurement is None:
                    self._works[place] = DeviceWork(self._trial, place)

    def finish(self, before: Sequence[Evaluation]) -> Evaluation:
        """Takes it to its end.

        Args:
            before: every trial before it, finished.

        Returns:
            The finished record, as it is on disk.
        """
        try:
            self.begin(before)
            # A time or a measured peak may break a limit, and then nothing needs to be trained; else it is known last.
            if _may_spare_training(self._bench):
                self._measure()
                self._settle()
            self._train(before)
            self._measure()
            self._settle()
        finally:
            self.stop()
        assert not self._trial.is_running
        forget_training(self._bench.run, self._trial.number)
        return self._trial.evaluation

    def stop(self) -> None:
        """Gives up what goes on in the background; the record stays as it is."""
        self._trial.close()
        for work in self._works.values():
            work.stop()

    def _train(self, before: Sequence[Evaluation]) -> None:
        """Trains from rung to rung, as long as it is worth it; it is measured by then, as speed decides what it is compared with."""
        training = Training(self._trial, before)
        while self._trial.is_running and not self._trial.evaluation.is_trained:
            if self._trial.evaluation.rungs:
                self._measure()
                self._settle()
                self._stop_if_behind(before)
            if self._trial.is_running:
                training.go_on()

    def _stop_if_behind(self, before: Sequence[Evaluation]) -> None:
        if self._trial.is_running:
            self._trial.save(lambda e: stopped_if_behind(self._bench, e, before))

    def _measure(self) -> None:
        """Has every device measure it, unless that is done; a failure of one is a recorded outcome, but the others are waited for.

        So the record is the same whichever device was the first to be done.
        """
        if not self._trial.is_running or self._trial.evaluation.is_measured:
            return
        reasons = []
        for place, work in sorted(self._works.items()):
            try:
                work.finish()
            except Exception as error:
                # Whatever a target or a compiler does wrong costs this trial only; a full disk is nobody's trial.
                if _is_of_this_machine(error) or (not isinstance(error, TargetError) and os.environ.get("EDGEWISE_DEBUG") == "1"):
                    raise
                kind = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
                where = f"{self._bench.targets[place].spec.name}: " if len(self._bench.targets) > 1 else ""
                reasons.append(where + kind + first_line(error))
        if reasons:
            self._trial.save(lambda e: e.evolve(state="failed", reason=reasons[0]))

    def _settle(self) -> None:
        if self._trial.is_running:
            self._trial.save(lambda e: settled(self._bench, e))


def _is_of_this_machine(error: Exception) -> bool:
    """Whether it is an error of files here, not of the way to a device."""
    return isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError)


def _may_spare_training(bench: Bench) -> bool:
    """Whether the user gave a limit that only a measured candidate is known to keep."""
    limits = bench.settings.limits
    return limits.max_latency_s is not None or limits.max_memory_bytes is not None


# --- counting -----------------------------------------------------------------------------------


def _prepare(trial: Trial, before: Sequence[Evaluation], under_way: Sequence[Evaluation]) -> bool:
    """Counts, looks for an equal trial, and only then makes or reads the tokenizer, whose real size decides.

    Returns:
        Whether it is to be measured and trained; not if that is decided, or waits for an equal trial `under_way`.
    """
    bench, evaluation = trial.bench, trial.evaluation
    if evaluation.estimate is not None:
        return True
    from nas.tokenizer import MIN_VOCAB_SIZE

    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    with trial.step("count"):
        config = bench.space.config(evaluation.params_drawn)
        tokens = bench.settings.workload.tokens(assumed_bytes_per_token(vocab))
        requested = with_counts(evaluation, config, tokens)
        # The real vocabulary may be smaller than the requested one: a limit rules out only what would break it with none
        # but the bytes. (Both, as a space's smallest size is broken from the other side.)
        least = with_counts(evaluation, dataclasses.replace(config, vocab_size=min(config.vocab_size, MIN_VOCAB_SIZE)), tokens)
        waits = _equal_to(requested, under_way) is not None
        early = None if waits else _ruled_out(bench, requested, before, least.evolve(bytes_per_token=assumed_bytes_per_token(vocab)))
        if early is not None:
            trial.save(lambda _: early)
    if waits or early is not None:
        return False

    with trial.step("tokenizer", f"vocabulary {vocab}"):
        tokenizer = bench.tokenizer(evaluation.params_drawn)
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        tokens = bench.settings.workload.tokens(tokenizer.bytes_per_token)
        counted = with_counts(evaluation, config, tokens).evolve(bytes_per_token=tokenizer.bytes_per_token)
        waits = _equal_to(counted, under_way) is not None
        decided = _ruled_out(bench, counted, before)
        if decided is None and tokens.total > config.context:
            reason = f"the request needs {tokens.total} tokens and the context holds {config.context}"
            decided = counted.evolve(state="infeasible", reason=reason)
        if not waits:
            result = decided or _estimated(bench, counted, config, tokens)
            trial.save(lambda _: result)
    return decided is None and not waits


def _ruled_out(bench: Bench, counted: Evaluation, before: Sequence[Evaluation], least: Evaluation | None = None) -> Evaluation | None:
    """The finished record, if counting alone decides: an equal trial of the same precision is copied, a broken limit is infeasible.

    With `least`, a limit must be broken by that too.
    """
    original = _equal_to(counted, before)
    if original is not None:
        return original.evolve(trial=counted.trial, params_drawn=counted.params_drawn, duplicate_of=original.trial, stage_s={})
    reason = broken(bench, counted, least)
    return None if reason is None else counted.evolve(state="infeasible", reason=reason)


def _equal_to(counted: Evaluation, others: Sequence[Evaluation]) -> Evaluation | None:
    """The first of these trials with the same model in the same precision."""
    same = (counted.config, counted.weights)
    return next((e for e in others if (e.config, e.weights) == same and e.duplicate_of is None), None)


def _estimated(bench: Bench, counted: Evaluation, config: SLMConfig, tokens: RequestTokens) -> Evaluation:
    """The record with the predicted times on every device."""
    estimated = counted
    for device, target in bench.devices():
        asked = (config, tokens, target.spec, counted.weights)
        estimate = bench.cost_model.estimate(*asked).to_dict()
        estimate["baseline"] = BytesBaseline().estimate(*asked).to_dict()
        estimated = estimated.put(device, estimate=estimate, peak_bytes=counted.peak_bytes)
    return estimated
