"""How much a score changes from one training to the next: a few models of a run, trained again with other seeds.

After the trials, the default choice and the front's far end are trained `repeats` times more, each with another seed and else as
they were. What those scores differ by is the noise of one training, taken as the same for every model of the run. It is not
the error over held-out documents: that is of the text which is scored, and common to all candidates.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation, Speed
from nas.front import choose, front_of

if TYPE_CHECKING:
    from nas.run import Run
    from nas.settings import Bench, View

DEFAULT_REPEATS = 2
"""Trainings more of each model that is repeated."""

FEWEST_TRAINED = 8
"""Trained candidates below which nothing is repeated unless it is asked for: the repeats would cost as much as the search."""

_Z = 2.0
"""Standard errors of a difference within which two models are not told apart."""

_LEVEL = 0.95
"""Of the interval of the standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What one training differs by from another of the same model.

    Attributes:
        sigma: standard deviation of the loss between seeds, pooled over the models that were repeated.
        low, high: 95 % interval of `sigma`: of few trainings it is wide.
        trainings: that it is computed from, the trials' own among them.
        trials: the models.
        diverged: repeats that came to no score and so are not among them.
    """

    sigma: float
    low: float
    high: float
    trainings: int
    trials: tuple[int, ...]
    diverged: int = 0

    @property
    def least_difference(self) -> float:
        """The difference of two losses below which their order may be noise: two standard errors of it, 2 sqrt(2) sigma."""
        return _Z * math.sqrt(2) * self.sigma

    def pairs_within(self, front: Sequence[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
        """The neighbours in loss among models with a score whose order may be noise, the better one of each first."""
        scored = [(e.loss, e.trial, e) for e in front if e.loss is not None]
        ordered = sorted(scored, key=lambda row: row[:2])
        return [(a, b) for (x, _, a), (y, _, b) in itertools.pairwise(ordered) if y - x < self.least_difference]

    def unresolved(self, front: Sequence[Evaluation]) -> frozenset[int]:
        """The trials that are in such a pair."""
        return frozenset(e.trial for pair in self.pairs_within(front) for e in pair)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "sigma": self.sigma,
            "sigma_interval": [self.low, self.high],
            "least_difference": self.least_difference,
            "trainings": self.trainings,
            "trials": list(self.trials),
            "diverged": self.diverged,
        }


def pooled(losses: Mapping[int, Sequence[float]], diverged: int = 0) -> Noise | None:
    """The noise of several trainings of each of some models, by trial; None if no model has two.

    sigma^2 = sum over models and trainings of (loss - mean of its model)^2 / (trainings - models), the pooled variance. Its
    interval is that of a normal variance: nu sigma^2 / chi^2_nu at 97.5 % and 2.5 %, with nu the same denominator.
    """
    from scipy.special import gammaincinv

    several = {trial: list(values) for trial, values in losses.items() if len(values) > 1}
    trainings = sum(map(len, several.values()))
    free = trainings - len(several)
    if free < 1:
        return None
    means = {trial: math.fsum(values) / len(values) for trial, values in several.items()}
    squares = math.fsum((x - means[trial]) ** 2 for trial, values in several.items() for x in values)
    least, most = (2 * float(gammaincinv(free / 2, (1 + side * _LEVEL) / 2)) for side in (-1, 1))
    return Noise(
        sigma=math.sqrt(squares / free),
        low=math.sqrt(squares / most),
        high=math.sqrt(squares / least),
        trainings=trainings,
        trials=tuple(sorted(several)),
        diverged=diverged,
    )


def noise_of(run: "Run", evaluations: Sequence[Evaluation]) -> Noise | None:
    """The noise of a run, from all repeats in its folder that are of these trials; None if there are none.

    Raises:
        InvalidRun: if a repeat's record is damaged.
    """
    trials = {e.trial: e for e in evaluations if e.state == "complete"}
    repeats = [r for r in map(Evaluation.load, run.repeat_paths()) if r.trial in trials and _is_of(r, trials[r.trial])]
    losses = {r.trial: [loss] for r in repeats if (loss := trials[r.trial].loss) is not None}
    for repeat in repeats:
        if repeat.loss is not None and repeat.trial in losses:
            losses[repeat.trial].append(repeat.loss)
    return pooled(losses, diverged=sum(r.loss is None for r in repeats))


def make_repeats(bench: "Bench", repeats: int | None) -> None:
    """Trains again what `to_repeat` names; each result is on disk before the next training begins, and none is done twice.

    Args:
        bench: of the search whose trials are over.
        repeats: of each model; None: `DEFAULT_REPEATS`, or none in a run of fewer than `FEWEST_TRAINED` trained candidates.

    Raises:
        UserError: if `repeats` is below 0.
    """
    done = [e for e in bench.run.evaluations() if e.state != "running"]
    for evaluation in to_repeat(done, bench.settings.speed, repeats):
        for seed in _seeds(bench, evaluation, repeats):
            _repeat(bench, evaluation.evolve(stage_s={}), seed)


def check_repeats(repeats: int | None) -> None:
    """Refuses a number of repeats that cannot be.

    Raises:
        UserError: if it is below 0.
    """
    if repeats is not None and repeats < 0:
        raise UserError(f"repeats={repeats} is below 0; give 0 for none, or how often to train again")


def to_repeat(evaluations: Sequence[Evaluation], speed: Speed, repeats: int | None) -> list[Evaluation]:
    """The models that are trained again: the default choice, and the end of the front that is further from it in size.

    Raises:
        UserError: if `repeats` is below 0.
    """
    check_repeats(repeats)
    trained = [e for e in evaluations if e.is_ranked(speed) and e.duplicate_of is None]
    front = front_of(evaluations, speed)
    chosen = choose(front, speed)
    if chosen is None or repeats == 0 or (repeats is None and len(trained) < FEWEST_TRAINED):
        return []
    size = chosen.params or 1
    other = max((front[0], front[-1]), key=lambda e: abs(math.log((e.params or size) / size)))
    return [chosen] if other.trial == chosen.trial else [chosen, other]


def set_damaged_repeats_aside(run: "Run", view: "View") -> None:
    """Moves records of repeats that cannot be read out of the way; they are made again."""
    for path in run.repeat_paths():
        try:
            Evaluation.load(path)
        except InvalidRun as error:
            view.note(f"{error}; kept as {run.set_aside(path).name}, and that training is done again")


def _seeds(bench: "Bench", evaluation: Evaluation, repeats: int | None) -> Iterator[int]:
    """The seeds that the trial is still to be trained with: those after the run's."""
    for count in range(1, 1 + (DEFAULT_REPEATS if repeats is None else repeats)):
        seed = (bench.settings.seed + count) % 2**32
        path = bench.run.repeat_path(evaluation.trial, seed)
        if not (path.exists() and _is_of(Evaluation.load(path), evaluation)):
            yield seed


def _is_of(repeat: Evaluation, evaluation: Evaluation) -> bool:
    """Whether a repeat is of this trial's model, in its precision."""
    return (repeat.config, repeat.weights) == (evaluation.config, evaluation.weights)


def _repeat(bench: "Bench", evaluation: Evaluation, seed: int) -> None:
    """Trains and scores a trial's model with another seed, and keeps the result."""
    from nas.trial import Trial

    assert evaluation.score is not None
    with Trial(bench, evaluation).step("repeat", f"with seed {seed}", seed=seed):
        score = _trained_again(bench, evaluation, seed)
        Evaluation(
            trial=evaluation.trial,
            state="diverged" if score["diverged"] else "complete",
            config=evaluation.config,
            weights=evaluation.weights,
            score=score,
            val_bpb=score["val_bpb"],
            val_bpb_stderr=score["val_bpb_stderr"],
        ).save(bench.run.repeat_path(evaluation.trial, seed))


def _trained_again(bench: "Bench", evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """The score of a trial's model trained with this seed: as much text, in as many threads, scored in the same precision."""
    from nas import training
    from nas.describe import describe_trial
    from nas.rounding import rounded_score
    from search_spaces.twin import trained_config

    assert evaluation.config is not None
    assert evaluation.score is not None
    tokenizer = bench.tokenizer(evaluation.params_drawn)
    model, score = training.train(
        trained_config(bench.space, evaluation.config),
        bench.corpus,
        tokenizer,
        bench.settings.budget(),
        seed,
        threads=evaluation.score["threads"],
        progress=lambda fraction: bench.view.stage(evaluation.trial, "repeat", describe_trial(evaluation), fraction),
    )
    record = score.to_record()
    if score.diverged:
        return record
    return rounded_score(model, evaluation.weights, tokenizer, bench.corpus, record, bench.settings.accuracy)
