"""Whether a candidate is worth training further: alone, over whole searches made up from learning curves, and in a search."""

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import Listener, contents, run_search, write_speeches
from search_helpers import settings as search_settings

from nas.cli_types import Rungs
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation
from nas.front import hypervolume, pareto_front
from nas.limits import stopped_if_behind
from nas.proposals import VIOLATION, open_study
from nas.rungs import CONFIDENCE, MARGIN, RungPoint, Verdict, replay, rungs_below, verdict
from nas.search import Outcome
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Sample
from targets.spec import load_spec

RUNGS = (256, 1024, 4096)


def at(trial: int, seconds: float | tuple[float, ...], *scores: float | None) -> RungPoint:
    return RungPoint(trial=trial, seconds=seconds if isinstance(seconds, tuple) else (seconds,), scores=scores)


# --- where the rungs are ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "asked", "below"),
    [
        (4_096_000, None, (256_000, 1_024_000)),
        (384_000, None, (96_000,)),
        (255_000, None, ()),
        (1000, (), ()),
        (1000, (10, 999), (10, 999)),
    ],
)
def test_rungs_of_a_budget(top: int, asked: tuple[int, ...] | None, below: tuple[int, ...]) -> None:
    assert rungs_below(top, asked) == below


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((100, 100), "rungs=100,100 do not ascend"),
        ((0, 5), "do not ascend from above 0"),
        ((10, 1000), "rung 1000 is not below the budget"),
    ],
)
def test_rungs_that_do_not_ascend_to_the_budget_are_refused(asked: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rungs_below(1000, asked)


@pytest.mark.parametrize(
    ("word", "rungs"), [("auto", None), ("none", ()), ("64KB,1MiB", (64_000, 1_048_576)), ("500", (500,)), ((3, 4), (3, 4))]
)
def test_rungs_are_written_as_sizes(word: object, rungs: tuple[int, ...] | None) -> None:
    assert Rungs().convert(word, None, None) == rungs


def test_a_rung_that_is_no_size_is_refused() -> None:
    with pytest.raises(click.UsageError, match="'some' is not a size; write it as in 64MB"):
        Rungs().convert("64KB,some", None, None)


# --- one verdict ------------------------------------------------------------------------------


FINISHED = [at(0, 1.0, 2.6, 2.2, 2.0), at(1, 2.0, 2.5, 2.1, 1.9), at(2, 3.0, 2.4, 2.0, 1.8), at(3, 4.0, 2.45, 2.05, 1.85)]


def test_one_that_is_far_behind_stops_and_is_told_by_whom() -> None:
    found = verdict(at(9, 3.5, 2.8), FINISHED, RUNGS)
    assert found.stop
    assert (found.behind, found.best) == (2, 1.8)
    assert found.predicted == pytest.approx(2.2)  # all lost 0.6 from there to the top
    assert found.stderr is not None
    assert 0.02 < found.stderr < 0.2
    nearer_the_top = verdict(at(9, 3.5, 2.8, 2.4), FINISHED, RUNGS)
    assert nearer_the_top.stderr is not None
    assert nearer_the_top.stderr < found.stderr


@pytest.mark.parametrize("x", [2.42, 2.39, 2.3])
def test_one_that_may_be_the_best_at_its_speed_goes_on(x: float) -> None:
    assert not verdict(at(9, 3.5, x), FINISHED, RUNGS, confidence=1.0, margin=0.0).stop


def test_what_is_hardly_better_is_not_worth_it() -> None:
    hardly = at(9, 3.5, 2.4, 1.99)
    assert verdict(hardly, FINISHED, RUNGS, margin=0.05).stop
    assert not verdict(hardly, FINISHED, RUNGS, margin=0.0).stop


def test_the_trend_with_the_score_is_learned() -> None:
    """Where the worse catch up, one that looks bad at the rung is foretold less badly."""
    rng = random.Random(0)
    catching_up = [at(i, 1.0, 1.9 + 0.1 * i, None, 1.5 + 0.05 * i + rng.gauss(0, 0.002)) for i in range(8)]
    found = verdict(at(9, 2.0, 2.8), catching_up, RUNGS)
    assert found.predicted == pytest.approx(1.95, abs=0.05)  # 2.28 without


def test_nothing_to_compare_with_never_stops() -> None:
    slower = [at(0, 5.0, 2.0, 1.5, 1.0)]
    stopped_too = [at(0, 1.0, 1.0), at(1, 1.0, 1.0, 1.0)]
    for finished in ([], slower, stopped_too):
        assert verdict(at(9, 2.0, 9.0), finished, RUNGS) == Verdict(stop=False)
    not_scored_on_the_way = [at(0, 1.0, None, None, 1.0)]
    assert verdict(at(9, 2.0, 9.0), not_scored_on_the_way, RUNGS) == Verdict(stop=False, behind=0, best=1.0)
    assert not verdict(at(9, 2.0, None), FINISHED, RUNGS).stop


def test_over_several_devices_one_trial_must_be_as_fast_on_each() -> None:
    first, second = at(0, (1.0, 9.0), 2.0, 1.6, 1.5), at(1, (9.0, 1.0), 2.0, 1.6, 1.5)
    candidate = at(9, (5.0, 5.0), 2.9)
    assert not verdict(candidate, [first, second], RUNGS).stop  # it would be on the joint front
    assert verdict(candidate, [first, second, at(2, (5.0, 4.0), 2.0, 1.6, 1.5)], RUNGS).behind == 2


scores = st.floats(0.5, 8.0)
tops = st.tuples(st.floats(0.1, 10.0), scores, scores, scores)
over = st.lists(tops, max_size=7).map(lambda rows: [at(i, t, *s) for i, (t, *s) in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(over, scores, st.randoms(use_true_random=False))
def test_the_fastest_and_what_is_as_good_already_never_stop_and_order_changes_nothing(
    finished: list[RungPoint], score: float, rng: random.Random
) -> None:
    fastest = min((p.seconds[0] for p in finished), default=1.0) * 0.99
    best = min((p.scores[-1] or 0.0 for p in finished), default=8.0)
    assert not verdict(at(99, fastest, score), finished, RUNGS).stop
    assert not verdict(at(99, 99.0, best * 0.999), finished, RUNGS).stop
    found = verdict(at(99, 5.0, score), finished, RUNGS)
    assert verdict(at(99, 5.0, score), rng.sample(finished, len(finished)), RUNGS) == found
    if found.stop:
        assert found.predicted is not None
        assert math.isfinite(found.predicted + (found.stderr or 0.0))
        # What is worse at the rung, or slower, stops too.
        worse = verdict(at(99, 6.0, score), finished, RUNGS)
        assert worse.stop


# --- whole searches, made up ------------------------------------------------------------------


def made_up(seed: int, count: int = 40) -> list[RungPoint]:
    """Candidates of a space: slower ones are better but for a spread, and the better gain less from more text, all with noise."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        size = rng.random()
        top = 2.0 - 0.3 * size + rng.expovariate(1 / 0.08)
        rungs = [top + 0.6 + 0.35 * (top - 1.85) + rng.gauss(0, 0.02), top + 0.23 + 0.05 * (top - 1.85) + rng.gauss(0, 0.008), top]
        found.append(at(i, math.exp(2.3 * size + rng.gauss(0, 0.15)), *rungs))
    return found


def replayed(seed: int, confidence: float, margin: float) -> tuple[float, float, int]:
    """The share of the text of training everyone to the top, the share of its hypervolume, and how many of its front are lost."""
    everyone = made_up(seed)
    ended = replay(everyone, RUNGS, confidence=confidence, margin=margin)
    points = [(math.log(p.seconds[0]), p.scores[-1] or 0.0) for p in everyone]
    trained = [point for point, rung in zip(points, ended, strict=True) if rung == 2]
    # Each rung takes its text, and a quarter of each lower one was a decay that the trunk did not keep.
    text = sum((RUNGS[rung] + 0.25 * sum(RUNGS[:rung])) / RUNGS[-1] for rung in ended)
    reached = hypervolume(trained, (4.0, 2.5)) / hypervolume(points, (4.0, 2.5))
    return text / len(everyone), reached, sum(ended[i] != 2 for i in pareto_front(points))


def test_nothing_of_the_front_is_lost_in_most_searches_where_any_gain_counts() -> None:
    shares, reached, lost = zip(*(replayed(seed, confidence=1.5, margin=0.0) for seed in range(15)), strict=True)
    assert sum(n == 0 for n in lost) > 7
    assert min(reached) > 0.99
    assert sum(shares) / 15 < 0.75


def test_with_a_margin_half_of_the_training_comes_to_nearly_the_whole_hypervolume() -> None:
    """A third of these candidates are beaten by none of those before them: no rule that decides at once spares them."""
    shares, reached, _ = zip(*(replayed(seed, CONFIDENCE, MARGIN) for seed in range(15)), strict=True)
    assert sum(shares) / 15 < 0.55
    assert min(reached) > 0.985
    assert sum(reached) / 15 > 0.995


# --- in a search ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


TRIALS = 6


def with_rungs(**changes: Any) -> Any:
    return search_settings(**{"budget_bytes": 6000, "rungs": (1500, 3000), "weights": ("fp32", "int4"), **changes})


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> tuple[Path, Outcome]:
    run, outcome = run_search(tmp_path_factory.mktemp("rungs") / "run", corpus, trials=TRIALS, given=with_rungs())
    return run.path, outcome


def trained_to(run_path: Path, trial: int) -> list[int]:
    """The rungs that the log says were trained to."""
    entries = [json.loads(line) for line in (run_path / "log.jsonl").read_text().splitlines()]
    return [e["train_bytes"] for e in entries if (e["trial"], e["step"], e["event"]) == (trial, "train", "done")]


def test_what_is_behind_stops_and_its_record_says_where_and_why(searched: tuple[Path, Outcome]) -> None:
    path, outcome = searched
    stopped = [e for e in outcome.evaluations if e.state == "stopped"]
    assert stopped
    for e in stopped:
        assert (e.val_bpb, e.loss) == (None, None)
        assert [set(rung) >= {"train_bytes", "val_bpb", "val_bpb_stderr"} for rung in e.rungs] == [True] * len(e.rungs)
        assert trained_to(path, e.trial) == [1500, 3000][: len(e.rungs)]
        assert e.last_rung == e.rungs[-1]
        assert e.request_s is not None
        foretold = (e.score or {})["foretold"]
        best = outcome.evaluations[foretold["behind"]]
        assert best.state == "complete"
        assert (best.request_s or 9) <= e.request_s
        assert foretold["loss"] - CONFIDENCE * foretold["stderr"] > (1 - MARGIN) * (best.loss or 9)
        assert f"trial {best.trial}, at least as fast" in (e.reason or "")
    assert not any(e.state == "stopped" for e in outcome.front)
    complete = [e for e in outcome.evaluations if e.state == "complete" and e.rungs]
    assert complete
    assert all(trained_to(path, e.trial) == [1500, 3000, 6000] for e in complete)
    assert all([rung["val_bpb"] > (e.val_bpb or 9) for rung in e.rungs] == [True, True] for e in complete)
    assert not (path / "training").exists()
    assert {int(p.stem) for p in (path / "weights").glob("*.safetensors")} == {e.trial for e in outcome.front}


def test_the_sampler_is_told_what_was_foretold(searched: tuple[Path, Outcome]) -> None:
    path, outcome = searched
    manifest = json.loads((path / "manifest.json").read_text())
    with open_study(None, path, f"edgewise-{manifest['id']}") as (study, _):
        for told, e in zip(study.get_trials(), outcome.evaluations, strict=True):
            assert told.values == [e.foretold_loss if e.state == "stopped" else e.loss, e.request_s]
            assert told.constraints[VIOLATION] <= 0
            assert told.user_attrs["state"] == e.state


def test_a_score_is_that_of_training_to_the_top_at_once(tmp_path: Path, corpus: Corpus, searched: tuple[Path, Outcome]) -> None:
    _, without = run_search(tmp_path / "run", corpus, trials=1, given=with_rungs(rungs=()))
    (at_once,), first = without.evaluations, searched[1].evaluations[0]
    assert at_once.val_bpb == first.val_bpb
    assert at_once.score == {k: v for k, v in (first.score or {}).items() if k != "rungs"}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_ended_before_and_after_every_rung_it_goes_on_to_the_same_end(
    tmp_path: Path, corpus: Corpus, searched: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the training's file and the record, and with that file damaged."""
    done: set[tuple[int, int]] = set()
    save = Evaluation.save

    def save_and_end(self: Evaluation, path: Path) -> None:
        key = (self.trial, len(self.rungs))
        if path.parent.name == "trials" and self.rungs and key not in done:
            done.add(key)
            if sum(key) % 2:
                save(self, path)
            raise Killed
        save(self, path)

    monkeypatch.setattr(Evaluation, "save", save_and_end)
    for session in range(60):
        if session % 3 == 2:
            for path in (tmp_path / "run" / "training").glob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:-100])
        try:
            run, _ = run_search(tmp_path / "run", corpus, trials=TRIALS, given=with_rungs())
            break
        except Killed:
            continue
    assert len(done) == session > TRIALS
    assert contents(run.path) == contents(searched[0])
    assert not (run.path / "training").exists()


def test_a_training_left_of_a_finished_trial_is_removed(corpus: Corpus, searched: tuple[Path, Outcome]) -> None:
    left = searched[0] / "training" / "00001.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"left")
    run_search(searched[0], corpus, trials=TRIALS, given=with_rungs())
    assert not left.parent.exists()


def test_a_training_further_than_its_lost_record_is_not_taken_up(
    tmp_path: Path, corpus: Corpus, searched: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Evaluation.save

    def lose(self: Evaluation, path: Path) -> None:
        if len(self.rungs) == 2:
            path.write_text("{")
            raise Killed
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "save", lose)
        with pytest.raises(Killed):
            run_search(tmp_path / "run", corpus, trials=1, given=with_rungs())
    run, _ = run_search(tmp_path / "run", corpus, trials=1, given=with_rungs())
    assert run.trial_path(0).read_bytes() == contents(searched[0])["trials/00000.json"]


def test_lost_weights_are_made_anew_and_the_record_stays(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, given=with_rungs())
    before = contents(run.path)
    run.weights_path(0).unlink()
    view = Listener()
    run_search(tmp_path / "run", corpus, trials=1, given=with_rungs(), view=view)
    assert "is trained again" in view.notes[0]
    assert contents(run.path) == before
    assert len(outcome.evaluations[0].rungs) == 2


def test_other_rungs_are_another_run(corpus: Corpus, searched: tuple[Path, Outcome]) -> None:
    with pytest.raises(InvalidRun, match="was made with --rungs 1500,3000, not none"):
        run_search(searched[0], corpus, trials=TRIALS, given=with_rungs(rungs=()))


def test_one_that_breaks_a_limit_once_measured_is_not_trained_on(tmp_path: Path, corpus: Corpus) -> None:
    """A device's memory is known to be too little only when it has measured; then the first rung is done."""

    class Greedy(NullTarget):
        def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
            return dataclasses.replace(super().measure(artifact, sample, timing), packed_bytes=10**9)

    target = Greedy(dataclasses.replace(load_spec("null"), memory_bytes=10**8))
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, target=target, given=with_rungs())
    assert outcome.evaluations[0].state == "infeasible"
    assert trained_to(run.path, 0) == [1500]
    assert not (run.path / "training").exists()


def test_only_a_model_as_fast_on_every_device_stops_another(searched: tuple[Path, Outcome]) -> None:
    """The record of a stopped trial, with times on a second device where it is the fastest."""
    _, outcome = searched
    at = next(i for i, e in enumerate(outcome.evaluations) if e.state == "stopped" and e.duplicate_of is None)
    e = outcome.evaluations[at]
    record = e.evolve(state="running", reason=None, score={"rungs": e.rungs})
    bench: Any = SimpleNamespace(settings=with_rungs())
    assert stopped_if_behind(bench, record, outcome.evaluations[:at]) == e
    there = [other.put("other", request_s=1.0) for other in outcome.evaluations[:at]]
    assert stopped_if_behind(bench, record.put("other", request_s=2.0), there).state == "stopped"
    assert stopped_if_behind(bench, record.put("other", request_s=0.5), there).state == "running"
