import random

import optuna
import pytest

from nas.evaluation import Evaluation
from nas.importance import FEWEST_TRIALS, importances


def run(count: int, seed: int = 0) -> list[Evaluation]:
    """Trials whose bits per byte depend on `kind` and whose time depends on `width`; `idle` decides nothing."""
    rng = random.Random(seed)
    evaluations = []
    for i in range(count):
        drawn = {"kind": rng.choice(["a", "b", "c"]), "width": rng.randint(16, 256), "idle": rng.choice([True, False]), "fixed": 1}
        bpb = 2.0 + {"a": 0.0, "b": 0.5, "c": 1.0}[str(drawn["kind"])] + rng.uniform(0, 0.2)
        evaluations.append(Evaluation(trial=i, state="complete", params_drawn=drawn, val_bpb=bpb, request_s=float(drawn["width"])))
    return evaluations


def test_each_objective_finds_what_decides_it() -> None:
    found = importances(run(60), "request")
    assert found is not None
    bpb, seconds = found
    assert (next(iter(bpb)), next(iter(seconds))) == ("kind", "width")
    assert bpb["kind"] > 2 * bpb["idle"]
    assert "fixed" not in bpb
    for shares in found:
        assert sum(shares.values()) == pytest.approx(1.0)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_deciding_choice_is_found_among_few_trials(seed: int) -> None:
    found = importances(run(40, seed), "request")
    assert found is not None
    assert (next(iter(found[0])), next(iter(found[1]))) == ("kind", "width")


def test_too_few_trials() -> None:
    assert importances(run(FEWEST_TRIALS - 1), "request") is None
    assert importances(run(FEWEST_TRIALS), "request") is not None
    repeats = [e.evolve(duplicate_of=0) if e.trial else e for e in run(20)]
    assert importances(repeats, "request") is None
    assert importances(run(20), "decode") is None


def test_nothing_varies() -> None:
    assert importances([e.evolve(params_drawn={"kind": "a"}) for e in run(20)], "request") is None


def test_distributions_of_the_study_are_used_where_they_hold() -> None:
    evaluations = run(40)
    study = optuna.create_study(directions=["minimize", "minimize"])
    trial = study.ask()
    trial.suggest_categorical("kind", ["a", "b", "c"])
    trial.suggest_int("width", 1, 512)
    trial.suggest_categorical("idle", ["yes", "no"])
    lent, own = importances(evaluations, "request", study), importances(evaluations, "request")
    assert lent is not None
    assert own is not None
    assert lent[1]["width"] != own[1]["width"]
    assert next(iter(lent[0])) == "kind"


def test_optuna_stays_as_loud_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    level = optuna.logging.get_verbosity()
    importances(run(10), "request")
    assert optuna.logging.get_verbosity() == level
    assert capsys.readouterr().err == ""
