"""What a run shows, in plain sentences computed from its evaluations, with the counts to judge them by.

Every sentence states something that holds for the numbers it was made from. Where it could be chance
or noise, it says how much of either.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from nas.describe import (
    attention_words,
    be,
    best_words,
    format_bpb,
    format_count,
    format_rate,
    format_s,
    is_text,
    listed,
    objective_words,
    plural,
    significant,
    stopped_words,
    trial_facts,
    trials_words,
)
from nas.doubts import between_seeds, held_out_error, noisy_times, order_within_noise
from nas.evaluation import WEIGHTS, Evaluation, Speed, State
from nas.front import choose, front_of, on_each
from nas.noise import Noise
from search_spaces.precision import PRECISIONS

_ENOUGH = 8
"""Candidates below which no statement about all of them is made."""


def findings(
    evaluations: Sequence[Evaluation], speed: Speed = "decode", devices: Sequence[str] = (), noise: Noise | None = None
) -> list[str]:
    """Sentences about these evaluations, most useful first; at least one, whatever they are.

    Of a run over several `devices`, named in the order of its manifest, they say which model wins where. `noise` is what
    one training differs by from another, if that is known.
    """
    sentences = [_counts(evaluations), *_twins(evaluations)]
    candidates = distinct([e for e in evaluations if e.is_ranked(speed)])
    front = front_of(candidates, speed)
    if not front:
        sentences.append("There is no front: no trial has both a score and a time.")
        return sentences
    if len(devices) > 1:
        return sentences + _over_devices(candidates, speed, devices, noise)
    sentences += _leaders(front, speed)
    sentences += _trade(front, speed)
    sentences += _rounding(candidates)
    sentences += _surplus(front, candidates)
    sentences += _by_size(front, candidates, speed)
    sentences += _by_estimate(candidates, speed)
    sentences += between_seeds(noise, objective_words(candidates)) + order_within_noise(front, noise) + held_out_error(front, candidates)
    sentences += noisy_times(candidates)
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


# --- several devices ----------------------------------------------------------------------


def _over_devices(candidates: Sequence[Evaluation], speed: Speed, devices: Sequence[str], noise: Noise | None) -> list[str]:
    seen = on_each(candidates, devices)
    fronts = {device: front_of(there, speed) for device, there in seen.items()}
    sentences = [*_winners(fronts, speed), *_like_orders(seen, speed), *_rounding(candidates)]
    sentences += between_seeds(noise, objective_words(candidates))
    for device, there in seen.items():
        own = [*_leaders(fronts[device], speed), *_trade(fronts[device], speed)]
        own += [*_by_size(fronts[device], there, speed), *_by_estimate(there, speed), *order_within_noise(fronts[device], noise)]
        own += [*held_out_error(fronts[device], there), *noisy_times(there)]
        sentences += [f"On {device}: {sentence}" for sentence in own]
    return list(dict.fromkeys(sentences))


def _winners(fronts: Mapping[str, Sequence[Evaluation]], speed: Speed) -> list[str]:
    """Which model is the default choice where, and which are on which front."""
    chosen = {device: best.trial for device, front in fronts.items() if (best := choose(front, speed)) is not None}
    if len(set(chosen.values())) == 1:
        sentences = [f"Trial {next(iter(chosen.values()))} is the default choice on every device."]
    else:
        sentences = [f"The default choice is {listed([f'trial {trial} on {device}' for device, trial in chosen.items()])}."]
    on = {device: {e.trial for e in front} for device, front in fronts.items()}
    everywhere, anywhere = set.intersection(*on.values()), set.union(*on.values())
    if everywhere == anywhere:
        return [*sentences, f"The front has the same {plural(len(anywhere), 'model')} on every device."]
    alone = {device: sorted(trials.difference(*(t for d, t in on.items() if d != device))) for device, trials in on.items()}
    parts = [f"{trials_words(trials)} only on {device}" for device, trials in alone.items() if trials]
    where = f", {listed(parts)}" if parts else ""
    return [
        *sentences,
        f"Of {plural(len(anywhere), 'model')} on some front, {len(everywhere)} {be(len(everywhere))} on every one{where}.",
    ]


def _like_orders(seen: Mapping[str, Sequence[Evaluation]], speed: Speed) -> list[str]:
    """How far one device's times tell another's order."""
    sentences = []
    for (one, first), (other, second) in itertools.combinations(seen.items(), 2):
        tau = kendall_tau([e.objectives(speed)[1] for e in first], [e.objectives(speed)[1] for e in second])
        if len(first) >= _ENOUGH and tau is not None:
            sentences.append(f"The times on {one} and {other} order {len(first)} candidates with Kendall tau {_signed(tau)} (1: alike).")
    return sentences


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
    at = Counter(f"{stopped_words(e)} of text" for e in evaluations if e.last_rung is not None)
    others = [f"{count} {'was' if count == 1 else 'were'} {where}" for where, count in at.items()]
    others += [f"{states[s]} {text}" for s, text in words.items() if states[s]]
    repeats = sum(e.duplicate_of is not None for e in evaluations)
    if repeats:
        several = " in the same precision" if any(WEIGHTS in e.params_drawn for e in evaluations) else ""
        others.append(f"{repeats} repeated an earlier architecture{several} and took its results")
    return f"{states['complete']} of {plural(len(evaluations), 'trial')} completed{'; ' if others else ''}{', '.join(others)}."


def _twins(evaluations: Sequence[Evaluation]) -> list[str]:
    """How many scores are of smaller models, trained in place of those that were measured."""
    scored = [e for e in evaluations if e.loss is not None]
    twins = sum(e.twin is not None for e in scored)
    if not twins:
        return []
    of = "Every score is" if twins == len(scored) else f"{twins} of {plural(len(scored), 'score')} {be(twins)}"
    return [f"{of} that of a twin, a smaller model of the same kind that was trained instead; times and sizes are of the model itself."]


def _leaders(front: Sequence[Evaluation], speed: Speed) -> list[str]:
    """Who leads within which time, for the default choice and for the attention kinds along the front."""
    chosen = choose(front, speed)
    assert chosen is not None
    at = front.index(chosen)
    name = attention_words(chosen.config) if chosen.config else "a model"
    size = f" of {format_count(chosen.params)} parameters" if chosen.params is not None else ""
    size += f" in {chosen.weights}" if chosen.names_weights else ""
    figures = f"{format_bpb(chosen.loss)} at {_pace(chosen, speed)}"
    best = f"the {best_words(front)} measured here"
    if len(front) == 1:
        return [f"Trial {chosen.trial}, {name}{size}, is both the fastest and the most accurate measured here ({figures})."]
    if at + 1 < len(front):
        start = f"{_limit(chosen, front[at + 1], speed)}, trial {chosen.trial} has {best}"
    else:
        start = f"Trial {chosen.trial} has {best}, at any speed"
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
    (slow_loss, slow_s), (fast_loss, fast_s) = front[-1].objectives(speed), front[0].objectives(speed)
    if fast_loss <= 0:
        return []  # tasks that the fastest model already has all right
    saved, name = (1 - slow_loss / fast_loss) * 100, objective_words(front)
    less = f"fewer {name}" if is_text(front) else f"less {name}"
    return [f"End to end, the front trades {significant(saved, 2)} % {less} for {significant(slow_s / fast_s)} times the time."]


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
        f"{marked} of {len(everyone)} among all candidates trained to the end (by lot as many or more with probability "
        f"{significant(chance, 2)}, the smallest of {plural(len(rows), 'comparison')}: {verdict})."
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
    loss, seconds = kendall_tau(sizes, [p[0] for p in points]), kendall_tau(sizes, [p[1] for p in points])
    sentences = []
    if loss is not None and seconds is not None:
        sentences.append(
            f"Parameter count alone ranks the {len(sized)} candidates trained to the end with Kendall tau {_signed(-loss)} "
            f"against accuracy and {_signed(seconds)} against time (1: larger is always better, or slower; 0: no relation)."
        )
    chosen = choose(front, speed)
    assert chosen is not None
    best_loss, budget = chosen.objectives(speed)
    largest = max((e for e in sized if e.objectives(speed)[1] <= budget), key=lambda e: (e.params or 0, -e.trial), default=None)
    if largest is not None:
        lost = largest.objectives(speed)[0] - best_loss
        unit = objective_words(front) if is_text(front) else f"of {objective_words(front)}"
        where = f"the largest candidate trained to the end and as fast as trial {chosen.trial} ({_pace(chosen, speed)})"
        sentences.append(
            f"Taking {where} picks that same model."
            if largest.trial == chosen.trial
            else f"Taking {where} would pick trial {largest.trial} and lose {significant(lost, 2)} {unit}."
        )
    return sentences


# --- words --------------------------------------------------------------------------------


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
