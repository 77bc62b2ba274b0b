"""Which design parameters decide each objective, by PED-ANOVA over a run's trials."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.evaluation import Evaluation, Speed

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

FEWEST_TRIALS = 8
"""Trials below which an importance would be noise and is not computed."""

_FEW_VALUES = 12
"""A number drawn with at most this many different values counts as a choice among them."""


_BETTER_SHARE = 0.5
"""Share of trials taken as the best. Optuna's own 0.1 leaves too few of a search's tens of trials: among 80 made-up ones,
the choice that decided everything came out first for 0 of 15 seeds at 0.1, for 14 at 0.25 and for 15 at 0.5."""


def importances(
    evaluations: Sequence[Evaluation], speed: Speed = "decode", study: "optuna.Study | None" = None
) -> tuple[dict[str, float], ...] | None:
    """Shares of importance of the drawn parameters, for each objective (bits per byte, then the time on each device).

    Those of an objective sum to 1, largest first.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255): how much a parameter's distribution among the best trials differs
    from that among all of them. The best are the better half. Repeats of an earlier trial do not count.
    `study` lends its distributions; without one, each is taken as the values seen.

    Returns:
        None if there are fewer than `FEWEST_TRIALS` trials to compare or no parameter varies.
    """
    ranked = [e for e in evaluations if e.is_ranked(speed) and e.duplicate_of is None and e.params_drawn]
    if len(ranked) < FEWEST_TRIALS:
        return None
    names = [n for n in ranked[0].params_drawn if all(n in e.params_drawn for e in ranked)]
    varied = [n for n in names if len({repr(e.params_drawn[n]) for e in ranked}) > 1]
    if not varied:
        return None
    known = {n: d for t in study.get_trials(deepcopy=False) for n, d in t.distributions.items()} if study is not None else {}
    seen = {n: _distribution([e.params_drawn[n] for e in ranked], known.get(n)) for n in varied}
    rows = [{n: e.params_drawn[n] for n in varied} for e in ranked]
    return tuple(_of(rows, seen, values) for values in zip(*(e.objectives(speed) for e in ranked), strict=True))


def _of(rows: Sequence[Mapping[str, Any]], distributions: "Mapping[str, BaseDistribution]", values: Sequence[float]) -> dict[str, float]:
    import optuna

    level = optuna.logging.get_verbosity()
    # Making a study is announced on stderr, where it would look like a new search.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for row, value in zip(rows, values, strict=True):
            study.add_trial(optuna.trial.create_trial(params=dict(row), distributions=dict(distributions), value=value))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BETTER_SHARE)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    total = sum(shares.values())
    return {n: (v / total if total > 0 else 0.0) for n, v in sorted(shares.items(), key=lambda p: (-p[1], p[0]))}


def _distribution(values: Sequence[Any], known: "BaseDistribution | None") -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if known is not None and _holds(known, values):
        return known
    distinct = list({repr(v): v for v in values}.values())
    numbers = [v for v in distinct if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(distinct) or len(distinct) <= _FEW_VALUES:
        return CategoricalDistribution(sorted(distinct, key=lambda v: (str(type(v)), v if v in numbers else 0, repr(v))))
    whole = [v for v in numbers if isinstance(v, int)]
    if len(whole) == len(numbers):
        return IntDistribution(min(whole), max(whole))
    return FloatDistribution(float(min(numbers)), float(max(numbers)))


def _holds(distribution: "BaseDistribution", values: Sequence[Any]) -> bool:
    import optuna

    try:
        for value in values:
            optuna.trial.create_trial(params={"x": value}, distributions={"x": distribution}, value=0.0)
    except (ValueError, TypeError):
        return False
    return True
