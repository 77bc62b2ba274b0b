"""Rungs: the amounts of text at which a candidate is scored, and whether it is worth training further.

A candidate stops where it is not foretold to end clearly (`MARGIN`) better than a finished trial that is at least as fast on
every device. Its score at the top is foretold from its score at the rung and from what training on changed for the trials that went
to the top. Nothing here trains or reads a file: a verdict is a function of scores and times alone, so it can be replayed
from a table.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nas.errors import UserError

SMALLEST_RUNG_BYTES = 64_000
"""No rung is below this by default: scores on less text say little."""

AUTO_SHARES = (1 / 16, 1 / 4)
"""Rungs below the top by default, as shares of it."""

CONFIDENCE = 0.25
"""Standard errors by which a candidate may turn out better than foretold. With `MARGIN` it trades training for what the front
may lose: replays of benchmarks/fidelity.py show at which price."""

MARGIN = 0.01
"""Share of a score by which a candidate should turn out better than those as fast: what is less is mostly the luck of a seed."""

SPREAD = ((1.0, 0.0), (4.0, 0.015), (16.0, 0.025))
"""How differently candidates gain from a text that is longer by a ratio, the trend with the score left out: the ratio, and a
standard deviation as a share of the score. Linear between, in the logarithm of the ratio."""

SPREAD_TRIALS = 4
"""What `SPREAD` says weighs as much as what this many trials say."""

TREND = 0.3
"""Standard deviation of how much of a difference in score at a rung is gone, or has grown, at the top; on average nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RungPoint:
    """What decides about a candidate, or of what it is compared with.

    Attributes:
        trial: its number.
        seconds: its measured time on each device.
        scores: what it scored at each rung so far, the lowest first; smaller is better. As many as there are rungs: it went to
            the top. None: it was not scored there.
    """

    trial: int
    seconds: tuple[float, ...]
    scores: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a candidate stops at the rung it has come to.

    Attributes:
        stop: whether it stops.
        predicted: its foretold score at the top; None if no trial went there from this rung.
        stderr: the standard error of that.
        behind: the trial with the best score at the top of those at least as fast; None if there is none.
        best: that score.
    """

    stop: bool
    predicted: float | None = None
    stderr: float | None = None
    behind: int | None = None
    best: float | None = None


def rungs_below(top_bytes: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """The rungs of a budget of `top_bytes`, without the top: those asked for, else `AUTO_SHARES` of it that are not too small.

    Raises:
        UserError: if those asked for are not positive, ascending and below the top.
    """
    if asked is None:
        return tuple(rung for share in AUTO_SHARES if (rung := round(share * top_bytes)) >= SMALLEST_RUNG_BYTES)
    for before, rung in zip((0, *asked), asked, strict=False):
        if rung <= before:
            raise UserError(f"rungs={','.join(map(str, asked))} do not ascend from above 0; give each once, the smallest first")
        if rung >= top_bytes:
            raise UserError(f"rung {rung} is not below the budget of {top_bytes} bytes; leave it out, or raise --budget")
    return tuple(asked)


def verdict(
    candidate: RungPoint, finished: Sequence[RungPoint], rungs: Sequence[int], *, confidence: float = CONFIDENCE, margin: float = MARGIN
) -> Verdict:
    """Whether a candidate stops at the rung of its last score.

    With x the score at the rung and y that at the top, the trials that have both are taken to follow
    y - x = m + b (x - mean x) + e. Of m nothing is known before; b is 0 with the standard deviation `TREND`; e has about
    `SPREAD`, known as if from `SPREAD_TRIALS` trials, and is estimated with the residuals (Bayesian linear regression: the
    prediction's variance is that of e times 1 + leverage). A candidate stops if predicted - confidence * stderr is not
    `margin` below the best score at the top of those at least as fast on every device; never if it is as good as that already.

    Args:
        candidate: scored at one rung or several, not at the top.
        finished: trials that are over, in any order; those that stopped below the top count for nothing.
        rungs: bytes of text at each rung, ascending, the top last.
        confidence, margin: see `CONFIDENCE` and `MARGIN`.
    """
    rung, top = len(candidate.scores) - 1, len(rungs) - 1
    assert 0 <= rung < top
    there = candidate.scores[rung]
    at_top = {p.trial: (p, p.scores[top]) for p in sorted(finished, key=lambda p: p.trial) if len(p.scores) == len(rungs)}
    known = [(score, trial) for trial, (p, score) in at_top.items() if score is not None and _as_fast(p, candidate)]
    if there is None or not known:
        return Verdict(stop=False)
    best, behind = min(known)
    pairs = [(p.scores[rung], score) for p, score in at_top.values()]
    foretold = _foretold(there, [(x, y) for x, y in pairs if x is not None and y is not None], rungs[top] / rungs[rung])
    if foretold is None:
        return Verdict(stop=False, behind=behind, best=best)
    predicted, stderr = foretold
    stop = predicted - confidence * stderr > best - margin * abs(best) and there > best
    return Verdict(stop=stop, predicted=predicted, stderr=stderr, behind=behind, best=best)


def replay(trials: Iterable[RungPoint], rungs: Sequence[int], *, confidence: float = CONFIDENCE, margin: float = MARGIN) -> list[int]:
    """To which rung (0 the lowest) each of some trials would have been trained, one after the other, had they not all gone to the top.

    Args:
        trials: with their scores at every rung, in the order in which they were tried.
        rungs, confidence, margin: as for `verdict`.
    """
    over: list[RungPoint] = []
    for trial in trials:
        ended = len(rungs) - 1
        for rung in range(ended):
            so_far = RungPoint(trial=trial.trial, seconds=trial.seconds, scores=trial.scores[: rung + 1])
            if verdict(so_far, over, rungs, confidence=confidence, margin=margin).stop:
                ended = rung
                break
        over.append(RungPoint(trial=trial.trial, seconds=trial.seconds, scores=trial.scores[: ended + 1]))
    return [len(point.scores) - 1 for point in over]


def _as_fast(point: RungPoint, candidate: RungPoint) -> bool:
    """On every device: a candidate that is faster on one of them may be on the joint front."""
    return all(a <= b for a, b in zip(point.seconds, candidate.seconds, strict=True))


def _foretold(there: float, pairs: Sequence[tuple[float, float]], ratio: float) -> tuple[float, float] | None:
    """The score at the top of a candidate that scored `there`, and its standard error; None if there is no pair to learn from."""
    if not pairs:
        return None
    n, spread = len(pairs), max(_spread(ratio) * abs(there), 1e-9)  # a loss on a file may be 0
    mean_x = math.fsum(x for x, _ in pairs) / n
    changes = [(x - mean_x, y - x) for x, y in pairs]
    mean_change = math.fsum(d for _, d in changes) / n
    # A ridge: the prior of b has the weight of (spread / TREND)^2 squared units of x. Never so steep that a better score at
    # the rung would foretell a worse one at the top.
    scale = math.fsum(x * x for x, _ in changes) + (spread / TREND) ** 2
    slope = max(-1.0, math.fsum(x * (d - mean_change) for x, d in changes) / scale)
    # In expectation a residual squared is (1 - leverage) times the variance.
    squares = math.fsum(
        (d - mean_change - slope * x) ** 2 / (1 - leverage) for x, d in changes if (leverage := 1 / n + x * x / scale) < 1 - 1e-9
    )
    counted = n if n > 1 else 0
    variance = (SPREAD_TRIALS * spread**2 + squares) / (SPREAD_TRIALS + counted)
    leverage = 1 / n + (there - mean_x) ** 2 / scale
    return there + mean_change + slope * (there - mean_x), math.sqrt(variance * (1 + leverage))


def _spread(ratio: float) -> float:
    """`SPREAD` at a ratio; beyond the largest as there."""
    for (low, a), (high, b) in itertools.pairwise(SPREAD):
        if ratio <= high:
            return a + (b - a) * math.log(max(ratio, low) / low) / math.log(high / low)
    return SPREAD[-1][1]
