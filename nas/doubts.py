"""How far the numbers of a run can be trusted, in sentences: noise between trainings, the text scored, times that spread."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nas.describe import be, best_words, format_loss, is_text, objective_words, plural, significant, trials_words
from nas.evaluation import Evaluation
from nas.noise import Noise
from targets.measurement import NOISY_IQR, SLOW, interquartile_range


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


def between_seeds(noise: Noise | None, objective: str) -> list[str]:
    """What one training differs by from another of the same model."""
    if noise is None:
        return []
    lost = f", {noise.diverged} more diverged" if noise.diverged else ""
    return [
        f"Trained again with other seeds, a model scores otherwise: the standard deviation of {objective} between trainings is "
        f"{significant(noise.sigma, 2)} (from {noise.trainings} trainings of {trials_words(noise.trials)}{lost}; so few say only that it "
        f"is between {significant(noise.low, 2)} and {significant(noise.high, 2)}, with 95 % confidence)."
    ]


def order_within_noise(front: Sequence[Evaluation], noise: Noise | None) -> list[str]:
    """How much of the front's order another seed may turn round."""
    if noise is None or len(front) < 2:
        return []
    close, pairs = len(noise.pairs_within(front)), len(front) - 1
    least = f"{significant(noise.least_difference, 2)} (two standard errors of a difference between seeds)"
    if not close:
        return [f"Neighbours on the front differ by {least} or more: other seeds would hardly turn their order round."]
    which = "The two models on the front are" if pairs == 1 else f"Of the {pairs} pairs of neighbours on the front, {close} {be(close)}"
    return [f"{which} closer than {least}: with other seeds their order may turn round, and they are drawn hollow."]


def held_out_error(front: Sequence[Evaluation], candidates: Sequence[Evaluation]) -> list[str]:
    """How much of the order is within the error of the loss over the documents or items that it is of."""
    known = [e for e in candidates if e.loss_stderr is not None]
    if len(candidates) < 2:
        return []
    if len(known) < len(candidates):
        return [
            f"{len(candidates) - len(known)} of {plural(len(candidates), 'candidate')} have no standard error; their order may be noise."
        ]
    pairs = list(itertools.pairwise(front))
    sentences, name, over = [], objective_words(candidates), "documents" if is_text(candidates) else "tasks"
    if pairs:
        one, two = (sum(_within(a, b, k) for a, b in pairs) for k in (1, 2))
        which = "the two models" if len(pairs) == 1 else f"the {len(pairs)} pairs of neighbours"
        sentences.append(
            f"Of {which} on the front, {two} {be(two)} closer in {name} than two standard errors of the difference, "
            f"{one} closer than one: on other {over} that part of the order may be another."
            if two and len(pairs) > 1
            else f"The two models on the front are closer in {name} than two standard errors of the difference, and so may be equal."
            if two
            else f"In {which} on the front, {name} {'differ' if is_text(front) else 'differs'} by two standard errors or more."
        )
    best, others = front[-1], len(candidates) - 1
    close = sum(_within(best, e, 2) for e in candidates if e.trial != best.trial)
    of = f"{close} of the {others} other candidates {be(close)}"
    if others == 1:
        of = f"The only other candidate is{'' if close else ' not'}"
    sentences.append(f"{of} within two standard errors of the {best_words(candidates)} ({format_loss(best)}), over the {over} scored.")
    return sentences


def noisy_times(candidates: Sequence[Evaluation]) -> list[str]:
    measured = [e for e in candidates if e.measurement is not None]
    noisy = sum(is_doubtful(e) for e in measured)
    if not measured:
        return ["No time here was measured on a device."]
    if not noisy:
        return []
    taken = f"{noisy} of {plural(len(measured), 'measurement')} {be(noisy)} noisy, or taken while the device ran slow"
    return [f"{taken}; close other programs and measure those again."]


def _within(a: Evaluation, b: Evaluation, errors: int) -> bool:
    """Whether the losses differ by less than so many standard errors, taken as independent: sqrt(sa^2 + sb^2)."""
    assert a.loss is not None
    assert b.loss is not None
    return abs(a.loss - b.loss) < errors * math.hypot(a.loss_stderr or 0.0, b.loss_stderr or 0.0)
