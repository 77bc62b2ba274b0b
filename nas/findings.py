"""What a run shows, in plain sentences computed from its evaluations, with the counts to judge them by.

Every sentence states something that holds for the numbers it was made from. Where it could be chance
or noise, it says how much of either.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nas.describe import attention_words, format_bpb, format_count, format_rate, format_s, significant, trial_facts
from nas.evaluation import WEIGHTS, Evaluation, Speed, State
from nas.front import choose, front_of, on_each
from search_spaces.precision import PRECISIONS
from targets.measurement import NOISY_IQR, SLOW, interquartile_range

_ENOUGH = 8
"""Candidates below which no statement about all of them is made."""


def findings(evaluations: Sequence[Evaluation], speed: Speed = "decode", devices: Sequence[str] = ()) -> list[str]:
    """Sentences about these evaluations, most useful first; at least one, whatever they are.

    Of a run over several `devices`, named in the order of its manifest, they say which model wins where.
    """
    sentences = [_counts(evaluations)]
    candidates = distinct([e for e in evaluations if e.is_ranked(speed)])
    front = front_of(candidates, speed)
    if not front:
        sentences.append("There is no front: no trial has both bits per byte and a time.")
        return sentences
    if len(devices) > 1:
        return sentences + _over_devices(candidates, speed, devices)
    sentences += _leaders(front, speed)
    sentences += _trade(front, speed)
    sentences += _rounding(candidates)
    sentences += _surplus(front, candidates)
    sentences += _by_size(front, candidates, speed)
    sentences += _by_estimate(candidates, speed)
    sentences += _noise(front, candidates)
    sentences += _noisy_times(candidates)
    return sentences


def distinct(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations without those that repeat an earlier one of them, in order."""
    trials = {e.trial for e in evaluations}
    return [e for e in evaluations if e.duplicate_of is None or e.duplicate_of not in trials or e.duplicate_of >= e.trial]


def kendall_tau(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings, -1..1, with ties; None if one of them is all ties or there are under two.

    (concordant - discordant) / sqrt((n0 - n1) (n0 - n2)), with n0 all pairs, n1 and n2 those tied in x and in y
    (Kendall 1945).
    """
    balance = untied_x = untied_y = 0
    for (x0, y0), (x1, y1) in itertools.combinations(zip(xs, ys, strict=True), 2):
        dx, dy = (x0 > x1) - (x0 < x1), (y0 > y1) - (y0 < y1)
        balance += dx * dy
        untied_x += dx != 0
        untied_y += dy != 0
    return balance / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None


def chance_of_at_least(hits: int, draws: int, marked: int, total: int) -> float:
    """The probability that `draws` of `total` things, `marked` of them marked, hold `hits` marked ones or more.

    The upper tail of the hypergeometric distribution (Fisher's exact test, one-sided).
    """
    ways = sum(
        math.comb(marked, k) * math.comb(total - marked, draws - k)
        for k in range(hits, min(draws, marked) + 1)
        if draws - k <= total - marked
    )
    return ways / math.comb(total, draws)


def is_noisy(measurement: Mapping[str, Any] | None) -> bool:
    """Whether a raw measuring record holds times that spread too wide, by the rule of `targets.measurement`.

    The record's `times_s` has a list of repeated times for each function; one that spreads is enough.
    """
    times_s = (measurement or {}).get("times_s")
    if not isinstance(times_s, Mapping):
        return False
    return any(interquartile_range(tuple(times)) > NOISY_IQR * statistics.median(times) for times in times_s.values() if times)


def is_slow(measurement: Mapping[str, Any] | None) -> bool:
    """Whether a raw measuring record was taken while the device ran slower than it can, by the rule of `targets.measurement`."""
    record = measurement or {}
    times_s, best_s = record.get("reference_s") or (), float(record.get("reference_best_s") or 0)
    return bool(times_s and best_s) and statistics.median(times_s) > SLOW * best_s


def is_doubtful(evaluation: Evaluation) -> bool:
    """Whether the trial's times are noisy, or were taken while the device ran slow or other work would not stop."""
    record = evaluation.measurement
    return is_noisy(record) or is_slow(record) or (record or {}).get("quiet") is False


# --- several devices ----------------------------------------------------------------------


def _over_devices(candidates: Sequence[Evaluation], speed: Speed, devices: Sequence[str]) -> list[str]:
    seen = on_each(candidates, devices)
    fronts = {device: front_of(there, speed) for device, there in seen.items()}
    sentences = [*_winners(fronts, speed), *_like_orders(seen, speed), *_rounding(candidates)]
    for device, there in seen.items():
        own = [*_leaders(fronts[device], speed), *_trade(fronts[device], speed)]
        own += [*_by_size(fronts[device], there, speed), *_by_estimate(there, speed), *_noise(fronts[device], there), *_noisy_times(there)]
        sentences += [f"On {device}: {sentence}" for sentence in own]
    return list(dict.fromkeys(sentences))


def _winners(fronts: Mapping[str, Sequence[Evaluation]], speed: Speed) -> list[str]:
    """Which model is the default choice where, and which are on which front."""
    chosen = {device: best.trial for device, front in fronts.items() if (best := choose(front, speed)) is not None}
    if len(set(chosen.values())) == 1:
        sentences = [f"Trial {next(iter(chosen.values()))} is the default choice on every device."]
    else:
        sentences = [f"The default choice is {_listed([f'trial {trial} on {device}' for device, trial in chosen.items()])}."]
    on = {device: {e.trial for e in front} for device, front in fronts.items()}
    everywhere, anywhere = set.intersection(*on.values()), set.union(*on.values())
    if everywhere == anywhere:
        return [*sentences, f"The front has the same {_plural(len(anywhere), 'model')} on every device."]
    alone = {device: sorted(trials.difference(*(t for d, t in on.items() if d != device))) for device, trials in on.items()}
    parts = [f"{_trials(trials)} only on {device}" for device, trials in alone.items() if trials]
    where = f", {_listed(parts)}" if parts else ""
    return [
        *sentences,
        f"Of {_plural(len(anywhere), 'model')} on some front, {len(everywhere)} {_be(len(everywhere))} on every one{where}.",
    ]


def _like_orders(seen: Mapping[str, Sequence[Evaluation]], speed: Speed) -> list[str]:
    """How far one device's times tell another's order."""
    sentences = []
    for (one, first), (other, second) in itertools.combinations(seen.items(), 2):
        tau = kendall_tau([e.objectives(speed)[1] for e in first], [e.objectives(speed)[1] for e in second])
        if len(first) >= _ENOUGH and tau is not None:
            sentences.append(f"The times on {one} and {other} order {len(first)} candidates with Kendall tau {_signed(tau)} (1: alike).")
    return sentences


def _trials(trials: Sequence[int]) -> str:
    return f"{'trial' if len(trials) == 1 else 'trials'} {_listed([str(trial) for trial in trials])}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- the sentences ------------------------------------------------------------------------


def _counts(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "No trial has been made yet."
    states = Counter(e.state for e in evaluations)
    words: dict[State, str] = {
        "infeasible": "broke a limit",
        "failed": "failed",
        "diverged": "diverged in training",
        "running": "not finished",
    }
    others = [f"{states[s]} {text}" for s, text in words.items() if states[s]]
    repeats = sum(e.duplicate_of is not None for e in evaluations)
    if repeats:
        several = " in the same precision" if any(WEIGHTS in e.params_drawn for e in evaluations) else ""
        others.append(f"{repeats} repeated an earlier architecture{several} and took its results")
    return f"{states['complete']} of {_plural(len(evaluations), 'trial')} completed{'; ' if others else ''}{', '.join(others)}."


def _leaders(front: Sequence[Evaluation], speed: Speed) -> list[str]:
    """Who leads within which time, for the default choice and for the attention kinds along the front."""
    chosen = choose(front, speed)
    assert chosen is not None
    at = front.index(chosen)
    name = attention_words(chosen.config) if chosen.config else "a model"
    size = f" of {format_count(chosen.params)} parameters" if chosen.params is not None else ""
    size += f" in {chosen.weights}" if chosen.names_weights else ""
    figures = f"{format_bpb(chosen.val_bpb)} at {_pace(chosen, speed)}"
    if len(front) == 1:
        return [f"Trial {chosen.trial}, {name}{size}, is both the fastest and the most accurate measured here ({figures})."]
    if at + 1 < len(front):
        start = f"{_limit(chosen, front[at + 1], speed)}, trial {chosen.trial} has the best bits per byte measured here"
    else:
        start = f"Trial {chosen.trial} has the best bits per byte measured here, at any speed"
    sentences = [f"{start}: {name}{size} ({figures})."]
    return sentences + _stretches(front, speed)


def _stretches(front: Sequence[Evaluation], speed: Speed) -> list[str]:
    kinds = [attention_words(e.config) if e.config else "unknown" for e in front]
    groups = [(kind, [e for _, e in members]) for kind, members in itertools.groupby(zip(kinds, front, strict=True), key=lambda p: p[0])]
    if "unknown" in kinds or len(groups) > 4:
        return []
    if len(groups) == 1:
        return [f"All {len(front)} models on the front have the same attention: {kinds[0]}."]
    parts = []
    for kind, members in groups:
        fast, slow = _rate(members[0], speed), _rate(members[-1], speed)
        parts.append(f"{kind} ({fast})" if len(members) == 1 else f"{kind} ({len(members)} models, {fast} to {slow})")
    unit = "characters a second" if speed == "decode" else f"time for a {_task(speed)}"
    return [f"From fast to accurate, in {unit}, the front is held by {', then '.join(parts)}."]


def _trade(front: Sequence[Evaluation], speed: Speed) -> list[str]:
    if len(front) < 2:
        return []
    (slow_bpb, slow_s), (fast_bpb, fast_s) = front[-1].objectives(speed), front[0].objectives(speed)
    saved = (1 - slow_bpb / fast_bpb) * 100
    return [
        f"End to end, the front trades {significant(saved, 2)} % fewer bits per byte for {significant(slow_s / fast_s)} times the time."
    ]


def _rounding(candidates: Sequence[Evaluation]) -> list[str]:
    """What each precision cost in bits per byte, against the float32 weights of the same training."""
    sentences = []
    for precision in PRECISIONS:
        before = [(e, (e.score or {}).get("val_bpb_fp32")) for e in candidates if e.weights == precision]
        lost = [e.val_bpb - bpb for e, bpb in before if e.val_bpb is not None and isinstance(bpb, int | float)]
        if not lost:
            continue
        middle, low, high = (_change(f(lost)) for f in (statistics.median, min, max))
        spread = f" in the median of {len(lost)} candidates, {low} to {high}" if len(lost) > 1 else " in the one candidate that has them"
        sentences.append(f"Rounding trained weights to {precision} changed bits per byte by {middle}{spread}.")
    return sentences


def _surplus(front: Sequence[Evaluation], candidates: Sequence[Evaluation]) -> list[str]:
    """The choice most over-represented on the front, and how likely that is if the front were drawn by lot."""
    chosen = [trial_facts(e) for e in front if e.config]
    everyone = [trial_facts(e) for e in candidates if e.config]
    if len(chosen) != len(front) or len(front) < 3 or len(everyone) < _ENOUGH or len(everyone) <= len(chosen):
        return []
    rows = []
    for fact in everyone[0]:
        among, on = Counter(f[fact] for f in everyone), Counter(f[fact] for f in chosen)
        if len(among) < 2:
            continue
        for value, hits in on.items():
            rows.append((chance_of_at_least(hits, len(chosen), among[value], len(everyone)), fact, value, hits, among[value]))
    if not rows:
        return []
    chance, fact, value, hits, marked = min(rows, key=lambda r: (r[0], r[1], str(r[2])))
    # Bonferroni: the smallest of m probabilities is expected to be small, so it is weighed by m.
    verdict = "more than chance explains" if chance * len(rows) < 0.05 else "which chance alone could give"
    return [
        f"The choice most over-represented on the front is {fact} = {value}: {hits} of {len(chosen)} there, "
        f"{marked} of {len(everyone)} among all candidates (by lot as many or more with probability {significant(chance, 2)}, "
        f"the smallest of {_plural(len(rows), 'comparison')}: {verdict})."
    ]


def _by_estimate(candidates: Sequence[Evaluation], speed: Speed) -> list[str]:
    """How well the cost model orders what was measured, beside its simplest baseline."""
    rows = [(e.seconds(speed), e.estimated_seconds(speed), e.estimated_seconds(speed, baseline=True)) for e in candidates]
    known = [(m, p, b) for m, p, b in rows if m is not None and p is not None and b is not None]
    if len(known) < _ENOUGH:
        return []
    measured, predicted, baseline = zip(*known, strict=True)
    model, simplest = kendall_tau(predicted, measured), kendall_tau(baseline, measured)
    if model is None or simplest is None:
        return []
    return [
        f"The roofline estimate orders the {len(known)} measured times with Kendall tau {_signed(model)}, its baseline, the bytes of "
        f"parameters and cache alone, with {_signed(simplest)}; neither decides anything here."
    ]


def _by_size(front: Sequence[Evaluation], candidates: Sequence[Evaluation], speed: Speed) -> list[str]:
    """How the number of parameters alone would have ranked, and what it would have picked."""
    sized = [e for e in candidates if e.params is not None]
    if len(sized) < _ENOUGH:
        return []
    sizes = [float(e.params or 0) for e in sized]
    points = [e.objectives(speed) for e in sized]
    bpb, seconds = kendall_tau(sizes, [p[0] for p in points]), kendall_tau(sizes, [p[1] for p in points])
    sentences = []
    if bpb is not None and seconds is not None:
        sentences.append(
            f"Parameter count alone ranks these {len(sized)} candidates with Kendall tau {_signed(-bpb)} against accuracy and "
            f"{_signed(seconds)} against time (1: larger is always better, or slower; 0: no relation)."
        )
    chosen = choose(front, speed)
    assert chosen is not None
    best_bpb, budget = chosen.objectives(speed)
    largest = max((e for e in sized if e.objectives(speed)[1] <= budget), key=lambda e: (e.params or 0, -e.trial), default=None)
    if largest is not None:
        loss = largest.objectives(speed)[0] - best_bpb
        where = f"the largest candidate as fast as trial {chosen.trial} ({_pace(chosen, speed)})"
        sentences.append(
            f"Taking {where} picks that same model."
            if largest.trial == chosen.trial
            else f"Taking {where} would pick trial {largest.trial} and lose {significant(loss, 2)} bits per byte."
        )
    return sentences


def _noise(front: Sequence[Evaluation], candidates: Sequence[Evaluation]) -> list[str]:
    """How much of the order is within the error of measurement of bits per byte."""
    known = [e for e in candidates if e.val_bpb_stderr is not None]
    if len(candidates) < 2:
        return []
    if len(known) < len(candidates):
        return [
            f"{len(candidates) - len(known)} of {_plural(len(candidates), 'candidate')} have no standard error; their order may be noise."
        ]
    pairs = list(itertools.pairwise(front))
    sentences = []
    if pairs:
        one, two = (sum(_within(a, b, k) for a, b in pairs) for k in (1, 2))
        which = "the two models" if len(pairs) == 1 else f"the {len(pairs)} pairs of neighbours"
        sentences.append(
            f"Of {which} on the front, {two} {_be(two)} closer in bits per byte than two standard errors of the difference, "
            f"{one} closer than one: that part of the order may be noise."
            if two and len(pairs) > 1
            else "The two models on the front are closer in bits per byte than two standard errors of the difference, and so may be equal."
            if two
            else f"In {which} on the front, bits per byte differ by two standard errors or more."
        )
    best, others = front[-1], len(candidates) - 1
    close = sum(_within(best, e, 2) for e in candidates if e.trial != best.trial)
    of = f"{close} of the {others} other candidates {_be(close)}"
    if others == 1:
        of = f"The only other candidate is{'' if close else ' not'}"
    sentences.append(f"{of} within two standard errors of the best bits per byte ({format_bpb(best.val_bpb, best.val_bpb_stderr)}).")
    return sentences


def _noisy_times(candidates: Sequence[Evaluation]) -> list[str]:
    measured = [e for e in candidates if e.measurement is not None]
    noisy = sum(is_doubtful(e) for e in measured)
    if not measured:
        return ["No time here was measured on a device."]
    if not noisy:
        return []
    taken = f"{noisy} of {_plural(len(measured), 'measurement')} {_be(noisy)} noisy, or taken while the device ran slow"
    return [f"{taken}; close other programs and measure those again."]


# --- words --------------------------------------------------------------------------------


def _within(a: Evaluation, b: Evaluation, errors: int) -> bool:
    """Whether the bits per byte differ by less than so many standard errors, taken as independent: sqrt(sa^2 + sb^2)."""
    assert a.val_bpb is not None
    assert b.val_bpb is not None
    return abs(a.val_bpb - b.val_bpb) < errors * math.hypot(a.val_bpb_stderr or 0.0, b.val_bpb_stderr or 0.0)


def _task(speed: Speed) -> str:
    return "request" if speed == "request" else "prompt"


def _rate(evaluation: Evaluation, speed: Speed) -> str:
    seconds = evaluation.objectives(speed)[1]
    return format_rate(1 / seconds) if speed == "decode" else format_s(seconds)


def _pace(evaluation: Evaluation, speed: Speed) -> str:
    if speed == "decode":
        return f"{_rate(evaluation, speed)} characters a second, {format_s(evaluation.decode_s_per_token)} a token"
    return f"{_rate(evaluation, speed)} a {_task(speed)}"


def _limit(chosen: Evaluation, slower: Evaluation, speed: Speed) -> str:
    """The start of a sentence about all times that `chosen` keeps and `slower` does not, in figures that still say so."""
    seconds, too_many = chosen.objectives(speed)[1], slower.objectives(speed)[1]
    if speed == "decode":
        rate = _outward(1 / too_many, up=True)
        return f"Above {format_rate(rate, 4)} characters a second" if rate < 1 / seconds else f"Faster than trial {slower.trial}"
    limit = _outward(too_many * 1e3, up=False)
    return f"Below {significant(limit, 4)} ms a {_task(speed)}" if limit > seconds * 1e3 else f"Faster than trial {slower.trial}"


def _outward(value: float, *, up: bool) -> float:
    """The value at four significant digits, rounded up or down."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return (math.ceil(value / step - 1e-9) if up else math.floor(value / step + 1e-9)) * step


def _change(bpb: float) -> str:
    """A difference of bits per byte, to two digits."""
    return ("−" if bpb < 0 else "+") + significant(abs(bpb), 2)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
