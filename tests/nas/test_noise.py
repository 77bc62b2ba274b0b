"""The noise of a training: how it is computed, what is trained again, and that a killed run goes on."""

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from search_helpers import Listener, contents, run_search, settings, write_speeches

from nas.accuracy import load_accuracy
from nas.corpus import Corpus, load_corpus
from nas.errors import UserError
from nas.evaluation import Evaluation
from nas.noise import FEWEST_TRAINED, Noise, noise_of, pooled, to_repeat
from nas.run import open_run


def trial(number: int, loss: float, seconds: float, **changes: object) -> Evaluation:
    return Evaluation(trial=number, state="complete", val_bpb=loss, request_s=seconds, params=1000 * (number + 1)).evolve(**changes)


def noise(sigma: float) -> Noise:
    return Noise(sigma=sigma, low=sigma / 2, high=3 * sigma, trainings=6, trials=(0, 2))


# --- the figure -------------------------------------------------------------------------------


@examples(deadline=None)  # SciPy is imported by the first
@given(st.dictionaries(st.integers(0, 9), st.lists(st.floats(0, 9), min_size=1, max_size=5), max_size=4))
def test_it_is_the_pooled_standard_deviation_within_models(losses: dict[int, list[float]]) -> None:
    found = pooled(losses)
    several = {number: values for number, values in losses.items() if len(values) > 1}
    if not several:
        assert found is None
        return
    assert found is not None
    free = sum(len(values) - 1 for values in several.values())
    variance = sum(statistics.variance(values) * (len(values) - 1) for values in several.values()) / free
    assert found.sigma == pytest.approx(math.sqrt(variance), abs=1e-7)
    assert found.low <= found.sigma <= found.high
    assert (found.trainings, found.trials) == (sum(map(len, several.values())), tuple(sorted(several)))
    assert pooled(dict(reversed(losses.items()))) == found


def test_its_interval_is_that_of_a_normal_variance() -> None:
    # Tables of chi-squared with 4 degrees of freedom: 0.4844 and 11.1433 at 2.5 and 97.5 %.
    found = pooled({1: [1.0, 2.0, 3.0], 2: [5.0, 5.0, 5.0]})
    assert found is not None
    assert found.sigma == pytest.approx(math.sqrt(2 / 4))
    assert found.low == pytest.approx(math.sqrt(2 / 11.1433), rel=1e-4)
    assert found.high == pytest.approx(math.sqrt(2 / 0.4844), rel=1e-4)


def test_neighbours_in_loss_closer_than_two_errors_of_a_difference_are_unresolved() -> None:
    front = [trial(0, 3.0, 1.0), trial(1, 2.5, 2.0), trial(2, 2.45, 3.0), trial(3, 2.0, 4.0)]
    least = noise(0.02).least_difference
    assert least == pytest.approx(2 * math.sqrt(2) * 0.02)
    assert noise(0.02).unresolved(front) == {1, 2}
    assert [(a.trial, b.trial) for a, b in noise(0.02).pairs_within(front)] == [(2, 1)]
    assert noise(0.017).unresolved(front) == set()
    assert noise(1.0).unresolved(front[::-1]) == {0, 1, 2, 3}
    assert noise(1.0).unresolved(front[:1]) == set()


# --- what is trained again --------------------------------------------------------------------


def test_the_default_choice_and_the_end_further_from_it_in_size_are_repeated() -> None:
    front = [trial(0, 3.0, 1.0), trial(1, 2.2, 2.0), trial(2, 2.1, 10.0), trial(3, 2.0, 100.0)]
    beaten = [trial(i, 4.0, 200.0) for i in range(4, FEWEST_TRAINED)]
    # 1 k, 2 k and 4 k: both ends are as far, and the faster one costs less.
    assert [e.trial for e in to_repeat([*front, *beaten], "request", None)] == [1, 0]
    large = [*front[:3], front[3].evolve(params=9000), *beaten]
    assert [e.trial for e in to_repeat(large, "request", None)] == [1, 3]
    assert [e.trial for e in to_repeat(front, "request", 1)] == [1, 0]
    assert to_repeat(front, "request", None) == []  # too few trials to be worth it unasked
    assert to_repeat([*front, *beaten[1:], front[0].evolve(trial=9, duplicate_of=0)], "request", None) == []
    assert to_repeat([*front, *beaten], "request", 0) == []
    assert [e.trial for e in to_repeat(front[:1], "request", 2)] == [0]
    assert to_repeat([], "request", 2) == []
    with pytest.raises(UserError, match="repeats=-1 is below 0"):
        to_repeat(front, "request", -1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "pairs.jsonl"
    texts = [
        ("the people of the country", "people the of country the"),
        ("to the Congress", "the to Congress"),
        ("of our nation", "our of nation"),
    ]
    path.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in texts), encoding="utf-8")
    return path


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_repeats_are_kept_one_by_one_and_a_killed_run_comes_to_the_same_noise(tmp_path: Path, corpus: Corpus, pairs: Path) -> None:
    """On a loss of tasks, with rounded weights: what is repeated is what was searched by."""
    given = settings(budget_bytes=2000, weights=("int8",), accuracy=load_accuracy(str(pairs)))
    whole, outcome = run_search(tmp_path / "whole", corpus, trials=2, given=given, repeats=2)
    names = [path.name for path in whole.repeat_paths()]
    repeated = to_repeat(outcome.evaluations, "request", 2)
    assert names == sorted(f"{e.trial:05d}-{seed}.json" for e in repeated for seed in (1, 2))

    found = noise_of(whole, outcome.evaluations)
    assert found is not None
    losses = {e.trial: [e.loss, *(r.loss for r in map(Evaluation.load, whole.repeat_paths()) if r.trial == e.trial)] for e in repeated}
    assert found.sigma == pytest.approx(math.sqrt(statistics.fmean(statistics.variance(map(float, v)) for v in losses.values())))  # type: ignore[arg-type]
    assert found.sigma > 0
    front = json.loads(whole.front_path.read_text())
    assert front["noise"] == found.to_dict()
    assert front["objective"] == "loss on pairs.jsonl"
    assert {model["trial"] for model in front["front"] if model["order_within_noise"]} == found.unresolved(outcome.front)
    assert "standard deviation of loss on pairs.jsonl between trainings is" in whole.report_path.read_text()
    for e in repeated:
        one = Evaluation.load(whole.repeat_path(e.trial, 1))
        assert (one.config, one.weights, one.score["seed"], one.score["task"]["n"]) == (e.config, "int8", 1, 3)  # type: ignore[index]
        assert one.val_bpb != one.score["val_bpb_fp32"]  # type: ignore[index]
        assert one.val_bpb != e.val_bpb

    seen: list[str] = []

    def end(_: int, stage: str) -> None:
        seen.append(stage)
        if stage == "repeat" and len(run.repeat_paths()) == 1:
            raise Killed

    run, _ = run_search(tmp_path / "killed", corpus, trials=2, given=given, repeats=0)
    assert json.loads(run.front_path.read_text())["noise"] is None
    with pytest.raises(Killed):
        run_search(tmp_path / "killed", corpus, trials=2, given=given, view=Listener(end), repeats=2)
    (first,) = run.repeat_paths()
    first.write_text("{")
    view = Listener()
    run_search(tmp_path / "killed", corpus, trials=2, given=given, view=view, repeats=2)
    assert "is damaged" in view.notes[0]
    first.with_name(first.name + ".damaged").unlink()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in run.repeat_paths()} == {p.name: p.read_bytes() for p in whole.repeat_paths()}
    again = [entry for entry in open_run(tmp_path / "killed").log_entries() if entry["step"] == "repeat" and entry["event"] == "done"]
    assert len(again) == len(names) + 1  # the damaged one twice


def test_repeats_of_other_models_or_without_a_score_do_not_count(tmp_path: Path) -> None:
    from nas.run import Run

    run = Run(tmp_path, {})
    for seed, changes in enumerate(
        ({"val_bpb": 2.0}, {"val_bpb": 9.0, "weights": "int4"}, {"val_bpb": None, "state": "diverged"}), start=1
    ):
        Evaluation(trial=3, state="complete").evolve(**changes).save(run.repeat_path(3, seed))
    Evaluation(trial=8, state="complete", val_bpb=5.0).save(run.repeat_path(8, 1))
    found = noise_of(run, [trial(3, 2.2, 1.0), trial(8, 1.0, 1.0, state="failed")])
    assert found is not None
    assert (found.trainings, found.trials, found.diverged) == (2, (3,), 1)
    assert found.sigma == pytest.approx(0.2 / math.sqrt(2))
    assert noise_of(Run(tmp_path / "none", {}), [trial(3, 2.2, 1.0)]) is None
