"""What decides how a trial ends: the limits that it must keep on every device of a search, and its results."""

from collections.abc import Sequence
from dataclasses import dataclass

from nas.describe import format_bytes, format_count, format_ms
from nas.evaluation import Evaluation, Speed, loss_in
from nas.rungs import MARGIN, RungPoint, verdict
from nas.settings import Bench
from search_spaces.counting import kv_bytes
from search_spaces.workload import assumed_bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """A limit of a candidate whose value is known.

    Attributes:
        what: the option or the thing that sets it, and in a search over several devices the device.
        value, most: the candidate's, and the largest allowed.
        broken: what to say where it is broken, in one line.
    """

    what: str
    value: float
    most: float
    broken: str


def violation(bench: Bench, evaluation: Evaluation) -> float:
    """By which share the candidate breaks the worst of its limits; at most 0 if it keeps them all, -1 if there are none.

    The violation of value v against a most of m is v/m - 1. Failed and diverged candidates, and requests beyond
    the context, have 1.
    """
    worst = max((limit.value / limit.most - 1 for limit in _limits(bench, evaluation)), default=-1.0)
    if evaluation.state in ("complete", "stopped"):
        return min(worst, 0.0)
    return worst if worst > 0 else 1.0


def broken(bench: Bench, evaluation: Evaluation, least: Evaluation | None = None) -> str | None:
    """The limit that is broken (by `least` too, if that is given), in one line, or None."""
    by_least = None if least is None else {limit.what for limit in _limits(bench, least) if limit.value > limit.most}
    for limit in _limits(bench, evaluation):
        if limit.value > limit.most and (by_least is None or limit.what in by_least):
            return limit.broken
    return None


def settled(bench: Bench, evaluation: Evaluation) -> Evaluation:
    """The record with the state that its results decide, whichever came first; running while one that is needed lacks."""
    if not evaluation.is_measured:
        return evaluation
    reason = broken(bench, evaluation)
    if reason is not None:
        return evaluation.evolve(state="infeasible", reason=reason)
    if evaluation.score is None or not evaluation.is_trained:
        return evaluation
    if evaluation.score["diverged"]:
        return evaluation.evolve(state="diverged", reason="the training loss exploded or was not a number")
    if evaluation.val_bpb is None or evaluation.loss is None:
        return evaluation.evolve(state="failed", reason=f"with {evaluation.weights} weights its score is not a number")
    return evaluation.evolve(state="complete", reason=None)


def stopped_if_behind(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> Evaluation:
    """The record of a measured trial, with the state "stopped" if it is not worth training beyond the rung it has come to.

    Args:
        bench: what it is tried with.
        evaluation: scored at one rung or several, not at the top.
        before: every trial before it, finished.
    """
    rungs, speed = bench.settings.all_rungs(), bench.settings.speed
    candidate = _rung_point(evaluation, speed, rungs)
    others = [_rung_point(e, speed, rungs) for e in before if e.state in ("complete", "stopped") and e.duplicate_of is None]
    if candidate is None:
        return evaluation
    found = verdict(candidate, [other for other in others if other is not None], rungs)
    if not found.stop:
        return evaluation
    there = candidate.scores[-1]
    reason = (
        f"at {format_bytes(rungs[len(candidate.scores) - 1])} of text it scored {there:.3f}, which foretells {found.predicted:.3f} ± "
        f"{found.stderr:.3f}; trial {found.behind}, at least as fast, has {found.best:.3f}, and a gain below {MARGIN:.0%} does not count"
    )
    assert found.predicted is not None
    assert found.best is not None
    # No better than what it is stopped for: a sampler would take it for a point of the front.
    foretold = {"loss": max(found.predicted, found.best), "stderr": found.stderr, "behind": found.behind}
    return evaluation.evolve(state="stopped", reason=reason, score={**(evaluation.score or {}), "foretold": foretold})


def _rung_point(evaluation: Evaluation, speed: Speed, rungs: Sequence[int]) -> RungPoint | None:
    """Its times and scores; None if it was not measured. A model taken over from another precision was not scored on the way."""
    seconds = [evaluation.on(device).seconds(speed) for device in (None, *evaluation.others)]
    known = tuple(value for value in seconds if value is not None)
    scores: list[float | None] = [loss_in(rung) for rung in evaluation.rungs]
    if evaluation.is_trained:
        scores = [*scores, *[None] * (len(rungs) - 1 - len(scores)), evaluation.loss]
    return RungPoint(trial=evaluation.trial, seconds=known, scores=tuple(scores)) if len(known) == len(seconds) else None


def _limits(bench: Bench, evaluation: Evaluation) -> list[_Limit]:
    """Every limit whose value is known."""
    found = _of_size(bench, evaluation.params)
    for device, target in bench.devices():
        seen, spec, limits = evaluation.on(device), target.spec, bench.settings.limits
        where = f" on {spec.name!r}" if len(bench.targets) > 1 else ""
        needed = _memory_bytes(bench, seen)
        for what, most in ((f"--max-memory{where}", limits.max_memory_bytes), (f"the memory of {spec.name!r}", spec.memory_bytes)):
            if needed is not None and most:
                text = f"{format_bytes(needed)} of memory is above {what}, {format_bytes(most)}"
                found.append(_Limit(what=what, value=needed, most=most, broken=text))
        if (token_s := seen.decode_s_per_token) is not None and (most_s := limits.max_latency_s) is not None:
            text = f"{format_ms(token_s)} ms a token{where} is above --max-latency {format_ms(most_s)} ms"
            found.append(_Limit(what=f"--max-latency{where}", value=token_s, most=most_s, broken=text))
    return found


def _of_size(bench: Bench, params: int | None) -> list[_Limit]:
    if not params:
        return []
    found = []
    least, most = bench.space.params_range or (None, None)
    for what, limit in (("--max-params", bench.settings.limits.max_params), (f"the largest size in space {bench.space.name!r}", most)):
        if limit is not None:
            text = f"{format_count(params)} parameters is above {what}, {format_count(limit)}"
            found.append(_Limit(what=what, value=params, most=limit, broken=text))
    if least is not None:
        what = f"the smallest size in space {bench.space.name!r}"
        text = f"{format_count(params)} parameters is below {what}, {format_count(least)}"
        # "At least" turned into "at most": how far below is how far 1/params is above 1/least.
        found.append(_Limit(what=what, value=1 / params, most=1 / least, broken=text))
    return found


def _memory_bytes(bench: Bench, seen: Evaluation) -> int | None:
    """The peak once the device has counted it; before that what is sure: weights and the cache of the request.

    The workspace depends on how a target computes, so an estimate of it rules no candidate out.
    """
    config = seen.config
    if seen.measurement is not None or config is None or seen.weight_bytes is None:
        return seen.peak_bytes
    bytes_per_token = seen.bytes_per_token or assumed_bytes_per_token(config.vocab_size)
    total = min(bench.settings.workload.tokens(bytes_per_token).total, config.context)
    return seen.weight_bytes + kv_bytes(config, total)
