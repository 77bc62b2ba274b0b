"""The search loop on the null target, with real training on little text."""

import dataclasses
import errno
import json
import math
import random
import signal
import sqlite3
import threading
import weakref
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from search_helpers import SPACE_FILE, Listener, contents, repeated_steps, run_search, settings, write_speeches

from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation
from nas.export import export_trial, load_exported
from nas.front import front_of
from nas.proposals import SAMPLERS, UNTRAINED_BPB, VIOLATION, make_sampler, open_study, propose, tell
from nas.run import Run
from nas.search import _ASKED_TO_END, IDLE_TRIALS, ended_by_signals
from nas.settings import Settings
from nas.training import Budget
from search_spaces.space import Space, load_space
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Program, Sample
from targets.spec import load_spec
from targets.target import TargetError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> dict[str, bytes]:
    """The files of six trials done in one go."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run_search(path, corpus)
    return contents(path)


# --- the same again ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    run_search(tmp_path / "run", corpus)
    again = contents(tmp_path / "run")
    assert again == uninterrupted
    assert sum(name.startswith("trials/") for name in again) == 6
    assert sum(name.startswith("weights/") for name in again) >= 1


def test_another_seed_gives_other_candidates(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    run_search(tmp_path / "run", corpus, trials=3, given=settings(seed=7))
    assert contents(tmp_path / "run")["trials/00000.json"] != uninterrupted["trials/00000.json"]


def test_a_run_grows_as_if_it_had_been_longer_at_once(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    run_search(tmp_path / "run", corpus, trials=2)
    view = Listener()
    run, outcome = run_search(tmp_path / "run", corpus, trials=6, view=view)
    assert view.earlier == [0, 1]
    assert view.finished_trials == [2, 3, 4, 5]
    assert contents(run.path) == uninterrupted
    assert len(outcome.evaluations) == 6


def test_fewer_trials_than_there_are_loses_nothing(tmp_path: Path, corpus: Corpus) -> None:
    run_search(tmp_path / "run", corpus, trials=4)
    before = contents(tmp_path / "run")
    _, outcome = run_search(tmp_path / "run", corpus, trials=2)
    assert contents(tmp_path / "run") == before
    assert len(outcome.evaluations) == 4


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_ended_at_any_stage_it_goes_on_to_the_same_end(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    sessions = 0
    stopped_at: set[str] = set()
    rng = random.Random(1)
    while True:
        sessions += 1
        seen: list[tuple[int, str]] = []

        def end(trial: int, stage: str, seen: list[tuple[int, str]] = seen, most: int = rng.randint(1, 3)) -> None:
            # One to three stages a session, so that over the sessions it stops at every kind of boundary.
            if (trial, stage) not in seen:
                seen.append((trial, stage))
            if len(seen) > most and stage != "report":
                stopped_at.add(stage)
                raise Killed

        try:
            run, _ = run_search(tmp_path / "run", corpus, view=Listener(end))
            break
        except Killed:
            assert sessions < 60
    assert stopped_at == {"count", "tokenizer", "compile", "measure", "train"}
    assert contents(run.path) == uninterrupted
    assert repeated_steps(run) == []


def test_a_training_whose_record_was_not_written_is_found_in_its_weights(
    tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]
) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=1)
    done = run.load(0)
    assert done is not None
    assert run.weights_path(0).exists()
    done.evolve(state="running", score=None, val_bpb=None, val_bpb_stderr=None).save(run.trial_path(0))

    def no_training(trial: int, stage: str) -> None:
        assert (trial, stage) != (0, "train")

    run_search(tmp_path / "run", corpus, view=Listener(no_training))
    assert contents(run.path) == uninterrupted


def test_weights_of_another_model_are_not_taken_for_a_score(tmp_path: Path, corpus: Corpus) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=3)
    kept = next(n for n in range(3) if run.weights_path(n).exists())
    other = next(n for n in range(3) if n != kept)
    before = run.load(other)
    assert before is not None
    run.weights_path(other).write_bytes(run.weights_path(kept).read_bytes())
    before.evolve(state="running", score=None, val_bpb=None, val_bpb_stderr=None).save(run.trial_path(other))
    run_search(tmp_path / "run", corpus, trials=3)
    assert run.load(other) == before


def test_ctrl_c_leaves_a_front_and_a_report_and_the_rest_for_later(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    def interrupt(trial: int, stage: str) -> None:
        if (trial, stage) == (3, "train"):
            raise KeyboardInterrupt

    run, outcome = run_search(tmp_path / "run", corpus, view=Listener(interrupt))
    assert outcome.interrupted
    assert [e.trial for e in outcome.evaluations] == [0, 1, 2]
    assert outcome.front
    assert outcome.chosen is not None
    assert [m["trial"] for m in json.loads(run.front_path.read_text())["front"]] == [e.trial for e in outcome.front]
    assert run.report_path.stat().st_size > 1000
    _, outcome = run_search(tmp_path / "run", corpus)
    assert not outcome.interrupted
    assert contents(run.path) == uninterrupted


# --- compiling beside training ----------------------------------------------------------------


class Gated:
    """A null target that goes on compiling until it is let, or closed."""

    def __init__(self) -> None:
        self._inner = NullTarget(load_spec("null"))
        self.let, self._closed = threading.Event(), threading.Event()

    @property
    def spec(self) -> Any:
        return self._inner.spec

    def compile(self, program: Program, out_dir: Path) -> Path:
        (out_dir / "half").mkdir(parents=True)
        assert self.let.wait(30)
        if self._closed.is_set():
            raise TargetError("closed")
        return self._inner.compile(program, out_dir)

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        return self._inner.measure(artifact, sample, timing)

    def close(self) -> None:
        self._closed.set()
        self.let.set()


def steps(run: Run, trial: int, event: str) -> list[str]:
    return [entry["step"] for entry in run.log_entries() if entry["trial"] == trial and entry["event"] == event]


def test_a_model_is_trained_while_its_program_is_compiled(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    target = Gated()

    def let(trial: int, stage: str) -> None:
        if (trial, stage) == (0, "train"):  # compiled any earlier, the search would still wait for it
            target.let.set()

    run, _ = run_search(tmp_path / "run", corpus, target=target, view=Listener(let))
    assert contents(run.path) == uninterrupted
    assert steps(run, 0, "start") == ["count", "tokenizer", "compile", "train", "measure"]
    assert steps(run, 0, "done") == ["count", "tokenizer", "train", "compile", "measure"]


@pytest.mark.parametrize("limit", ["max_latency_s", "max_memory_bytes"])
def test_with_a_limit_that_measuring_shows_nothing_is_trained_before(tmp_path: Path, corpus: Corpus, limit: str) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=1, given=settings(**{limit: 10**9}))
    assert steps(run, 0, "done") == ["count", "tokenizer", "compile", "measure", "train"]


def test_the_order_changes_no_result(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    """Also those of a trial that was measured first and is trained in another session."""
    run, _ = run_search(tmp_path / "run", corpus, given=settings(max_latency_s=10.0))
    assert contents(run.path).items() - uninterrupted.items() == set()
    done = run.load(5)
    assert done is not None
    done.evolve(state="running", score=None, val_bpb=None, val_bpb_stderr=None).save(run.trial_path(5))
    run.weights_path(5).unlink(missing_ok=True)
    run, _ = run_search(tmp_path / "run", corpus, given=settings(max_latency_s=10.0))
    assert run.load(5) == done


def test_seconds_of_all_steps_add_up_to_what_passed_and_the_overlap_is_named(tmp_path: Path, corpus: Corpus) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=1)
    compiled = next(entry for entry in run.log_entries() if entry["step"] == "compile" and entry["event"] == "done")
    assert 0 <= compiled["seconds"] < run.stage_seconds()[0]["train"]
    assert compiled["overlapped_seconds"] > 0
    times = [datetime.fromisoformat(entry["time"]) for entry in run.log_entries()]
    assert sum(run.stage_seconds()[0].values()) <= (times[-1] - times[0]).total_seconds() + 0.01


def test_ctrl_c_while_a_program_is_compiled_leaves_nothing_behind_once_the_target_is_closed(
    tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]
) -> None:
    target = Gated()

    def interrupt(trial: int, stage: str) -> None:
        if stage == "train":
            raise KeyboardInterrupt

    run, outcome = run_search(tmp_path / "run", corpus, target=target, view=Listener(interrupt))
    assert outcome.interrupted
    target.close()
    # The next session's first compile waits until the thread is free, so the folder is gone by then.
    run_search(tmp_path / "run", corpus)
    assert not (run.path / "artifacts").exists()
    assert contents(run.path) == uninterrupted


# --- the end ----------------------------------------------------------------------------------


def test_time_alone_ends_a_search(tmp_path: Path, corpus: Corpus) -> None:
    _, outcome = run_search(tmp_path / "run", corpus, trials=None, timeout_s=0.8)
    assert len(outcome.evaluations) >= 1
    assert not outcome.interrupted


def test_with_time_alone_a_space_that_is_used_up_ends_the_search(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"] |= {
        "vocab_size": 300,
        "d_model": 16,
        "num_layers": [1, 2],
        "attention": "mha",
        "ffn": "gated",
        "activation": "relu",
    }
    values["parameters"].pop("kv_group", None)
    values["parameters"].pop("standard_ffn_ratio", None)
    space = Space.from_dict(values)
    run, outcome = run_search(tmp_path / "run", corpus, trials=None, timeout_s=120.0, space=space)
    assert IDLE_TRIALS <= len(outcome.evaluations) <= IDLE_TRIALS + 20
    assert sum(e.duplicate_of is None for e in outcome.evaluations) == 2
    assert Counter(entry["step"] for entry in run.log_entries() if entry["event"] == "start")["train"] == 2


@pytest.mark.parametrize(("given", "message"), [({"trials": 0}, "trials=0"), ({"timeout_s": 0.0}, "timeout=0.0")])
def test_no_trials_and_no_time_are_refused(tmp_path: Path, corpus: Corpus, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_search(tmp_path / "run", corpus, **given)


# --- what is not done -------------------------------------------------------------------------


def test_duplicates_cost_nothing_and_copy_the_first(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"] |= {"vocab_size": 300, "num_layers": 1, "activation": "relu"}
    run, outcome = run_search(tmp_path / "run", corpus, trials=24, space=Space.from_dict(values))
    copies = [e for e in outcome.evaluations if e.duplicate_of is not None]
    assert copies
    steps = {(entry["trial"], entry["step"]) for entry in run.log_entries()}
    for copy in copies:
        original = outcome.evaluations[copy.duplicate_of or 0]
        assert original.duplicate_of is None
        assert (
            copy.evolve(trial=original.trial, duplicate_of=None, params_drawn=original.params_drawn, stage_s=original.stage_s) == original
        )
        assert not steps & {(copy.trial, step) for step in ("tokenizer", "compile", "measure", "train")}
    keys = [e.config.key for e in outcome.evaluations if e.duplicate_of is None and e.config is not None]
    assert len(keys) == len(set(keys))
    assert all(e.duplicate_of is None for e in outcome.front)


def test_limits_by_counting_cost_nothing_at_all(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=5, given=settings(max_params=1000))
    assert {e.state for e in outcome.evaluations} == {"infeasible"}
    assert all("--max-params" in (e.reason or "") for e in outcome.evaluations)
    assert outcome.front == ()
    assert outcome.chosen is None
    assert not (run.path / "tokenizers").exists()
    assert {entry["step"] for entry in run.log_entries()} == {"count"}
    assert json.loads(run.front_path.read_text())["front"] == []
    assert run.report_path.exists()


def test_a_vocabulary_that_turns_out_smaller_than_asked_for_is_not_held_to_the_asked_size(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"]["vocab_size"] = 60_000
    space = Space.from_dict(values)
    _, free = run_search(tmp_path / "free", corpus, trials=1, space=space)
    most = free.evaluations[0].params
    assert most is not None
    _, outcome = run_search(tmp_path / "exact", corpus, trials=1, space=space, given=settings(max_params=most))
    assert outcome.evaluations[0].state == "complete"
    run, outcome = run_search(tmp_path / "below", corpus, trials=1, space=space, given=settings(max_params=most - 1))
    assert outcome.evaluations[0].state == "infeasible"
    assert {entry["step"] for entry in run.log_entries()} == {"count", "tokenizer"}


def test_memory_that_the_weights_alone_exceed_is_ruled_out_by_counting(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=3, given=settings(max_memory_bytes=10_000))
    assert all("--max-memory" in (e.reason or "") for e in outcome.evaluations)
    assert {entry["step"] for entry in run.log_entries()} == {"count"}


def test_every_point_on_the_front_keeps_the_limits_and_what_breaks_one_is_not_trained(
    tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]
) -> None:
    free = [Evaluation.from_dict(json.loads(v)) for k, v in uninterrupted.items() if k.startswith("trials/")]
    latencies = sorted(e.decode_s_per_token or 0.0 for e in free)
    peaks = sorted(e.peak_bytes or 0 for e in free)
    limit_s, limit_bytes, limit_params = latencies[-2], peaks[-2], sorted(e.params or 0 for e in free)[-2]
    given = settings(max_latency_s=limit_s, max_memory_bytes=limit_bytes, max_params=limit_params)
    run, outcome = run_search(tmp_path / "run", corpus, trials=12, given=given)
    assert outcome.front
    for e in outcome.front:
        assert e.decode_s_per_token is not None
        assert e.decode_s_per_token <= limit_s
        assert e.peak_bytes is not None
        assert e.peak_bytes <= limit_bytes
        assert e.params is not None
        assert e.params <= limit_params
    broken = [e for e in outcome.evaluations if e.state == "infeasible"]
    assert any(e.measurement is not None for e in broken)
    assert all(e.score is None and e.reason for e in broken)
    trained = {entry["trial"] for entry in run.log_entries() if entry["step"] == "train"}
    assert not trained & {e.trial for e in broken}


def test_a_request_beyond_the_context_is_infeasible_not_compiled(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"]["context"] = 128
    run, outcome = run_search(tmp_path / "run", corpus, trials=2, space=Space.from_dict(values))
    assert {e.state for e in outcome.evaluations} == {"infeasible"}
    assert all("the context holds 128" in (e.reason or "") for e in outcome.evaluations)
    assert "compile" not in {entry["step"] for entry in run.log_entries()}


def test_the_range_of_a_space_is_a_limit(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["params"] = [15_000, 30_000]
    _, outcome = run_search(tmp_path / "run", corpus, trials=8, space=Space.from_dict(values))
    assert {e.state for e in outcome.evaluations} == {"complete", "infeasible"}
    for e in outcome.evaluations:
        assert (e.state == "complete") == (15_000 <= (e.params or 0) <= 30_000)


# --- what goes wrong --------------------------------------------------------------------------


class Fragile:
    """A target on which some models fail, at compiling or at measuring."""

    def __init__(self, error: Exception, at: str) -> None:
        self._inner = NullTarget(load_spec("null"))
        self._error, self._at, self.calls = error, at, 0

    @property
    def spec(self) -> Any:
        return self._inner.spec

    def compile(self, program: Program, out_dir: Path) -> Path:
        self.calls += 1
        artifact = self._inner.compile(program, out_dir)
        if self._at == "compile" and self.calls == 2:
            raise self._error
        return artifact

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        if self._at == "measure" and self.calls == 2:
            raise self._error
        return self._inner.measure(artifact, sample, timing)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("at", ["compile", "measure"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TargetError("decode differs in layer 2"), "decode differs in layer 2"),
        (KeyError("x"), "KeyError: 'x'"),
        (ConnectionResetError("lost the device"), "ConnectionResetError: lost the device"),
    ],
    ids=["target", "bug", "connection"],
)
def test_a_failure_costs_one_trial(tmp_path: Path, corpus: Corpus, at: str, error: Exception, reason: str) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=3, target=Fragile(error, at))
    states = [e.state for e in outcome.evaluations]
    assert states == ["complete", "failed", "complete"]
    assert outcome.evaluations[1].reason == reason
    assert outcome.evaluations[1].score is not None  # trained meanwhile
    assert outcome.evaluations[1].measurement is None
    assert not run.weights_path(1).exists()
    assert not (run.path / "artifacts").exists()


def test_a_failure_before_training_spares_it(tmp_path: Path, corpus: Corpus) -> None:
    given = settings(max_latency_s=10.0)
    run, outcome = run_search(tmp_path / "run", corpus, trials=3, target=Fragile(TargetError("no"), "compile"), given=given)
    assert [e.state for e in outcome.evaluations] == ["complete", "failed", "complete"]
    assert outcome.evaluations[1].score is None
    assert (1, "train") not in {(entry["trial"], entry["step"]) for entry in run.log_entries()}


def test_a_full_disk_is_not_a_failed_trial(tmp_path: Path, corpus: Corpus) -> None:
    target = Fragile(OSError(28, "No space left on device"), "measure")
    with pytest.raises(OSError, match="No space left"):
        run_search(tmp_path / "run", corpus, trials=3, target=target)
    _, outcome = run_search(tmp_path / "run", corpus, trials=3)
    assert [e.state for e in outcome.evaluations] == ["complete"] * 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reckless(Settings):
    """Settings with a learning rate that no model survives."""

    def budget(self) -> Budget:
        return Budget(train_bytes=self.budget_bytes, learning_rate=1e6)


def test_divergence_is_an_outcome(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, given=Reckless(budget_bytes=20_000))
    (only,) = outcome.evaluations
    assert only.state == "diverged"
    assert only.val_bpb is None
    assert only.reason
    assert only.request_s is not None
    assert outcome.front == ()
    assert not run.weights_path(0).exists()


def test_only_the_front_keeps_its_weights(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=8)
    kept = sorted(int(p.stem) for p in (run.path / "weights").glob("*.safetensors"))
    assert kept == sorted(e.trial for e in outcome.front)
    assert len(kept) < 8


# --- repairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["", "{", '{"trial": 9}', "[1]", '{"trial": 1, "oops": 2}'])
def test_a_damaged_record_is_set_aside_and_done_again(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes], damage: str) -> None:
    run, _ = run_search(tmp_path / "run", corpus)
    run.trial_path(1).write_text(damage)
    view = Listener()
    run_search(tmp_path / "run", corpus, view=view)
    aside = run.path / "trials" / "00001.json.damaged"
    assert aside.read_text() == damage
    assert len(view.notes) == 1
    assert "trial 1 is done again" in view.notes[0]
    assert view.finished_trials == [1]
    aside.unlink()
    assert contents(run.path) == uninterrupted


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_a_lost_study_is_made_again_from_the_records(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes], damage: str) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=4)
    study = run.path / "study.db"
    if damage == "missing":
        study.unlink()
    else:
        study.write_bytes(b"not a database at all" * 1000)
    view = Listener()
    run_search(tmp_path / "run", corpus, view=view)
    assert view.finished_trials == [4, 5]
    assert len(view.notes) == (damage == "garbage")
    assert contents(run.path) == uninterrupted


def test_a_damaged_tokenizer_is_trained_again(tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes]) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=3)
    for path in (run.path / "tokenizers").glob("*.json"):
        path.write_text("{")
    run_search(tmp_path / "run", corpus)
    assert contents(run.path) == uninterrupted


@pytest.mark.parametrize("damage", ["missing", "cut", "stranger"])
def test_lost_weights_and_tokenizers_of_the_front_are_made_anew(
    tmp_path: Path, corpus: Corpus, uninterrupted: dict[str, bytes], damage: str
) -> None:
    run, outcome = run_search(tmp_path / "run", corpus)
    path = run.weights_path(outcome.front[0].trial)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
        for tokenizer in (run.path / "tokenizers").iterdir():
            tokenizer.unlink()
    else:
        path.write_bytes(whole[:-10] if damage == "cut" else run.weights_path(outcome.front[-1].trial).read_bytes())
    with pytest.raises(InvalidRun, match=r"run the same search command again, it makes it anew"):
        export_trial(run, outcome.front[0].trial, tmp_path / "model")
    view = Listener()
    run_search(tmp_path / "run", corpus, view=view)
    assert len(view.notes) == 1
    assert "is trained again" in view.notes[0]
    aside = path.with_name(path.name + ".damaged")
    assert aside.exists() == (damage != "missing")
    aside.unlink(missing_ok=True)
    assert contents(run.path) == uninterrupted
    load_exported(export_trial(run, outcome.front[0].trial, tmp_path / "model"))


def test_settings_are_kept_without_a_password() -> None:
    assert settings(storage="postgresql://me:pw@host/db").to_dict()["storage"] == "postgresql://me:***@host/db"


def test_other_versions_are_noted(tmp_path: Path, corpus: Corpus) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=1)
    versions = {**run.manifest["versions"], "optuna": "0.1"}
    (run.path / "manifest.json").write_text(json.dumps({**run.manifest, "versions": versions}))
    view = Listener()
    run_search(tmp_path / "run", corpus, trials=1, view=view)
    assert len(view.notes) == 1
    assert "optuna 0.1, now" in view.notes[0]


@pytest.mark.parametrize("text", ["database or disk is full", "disk I/O error"])
def test_no_room_for_the_study_is_not_the_urls_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def full(url: str, name: str, devices: int) -> Any:
        raise RuntimeError("storage") from sqlite3.OperationalError(text)

    monkeypatch.setattr("nas.proposals._load", full)
    with pytest.raises(OSError, match="No space left on device") as caught, open_study(None, tmp_path, "toy"):
        pass
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(InvalidRun, match=r"me:\*\*\*@host.* cannot be opened"), open_study("postgresql://me:pw@host/db", tmp_path, "toy"):
        pass


# --- samplers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "random"])
def test_a_search_runs_with_other_samplers_and_resumes_exactly(tmp_path: Path, corpus: Corpus, sampler: str) -> None:
    given = settings(sampler=sampler, budget_bytes=2000)
    run_search(tmp_path / "a", corpus, trials=4, given=given)
    for trials in (2, 4):
        run_search(tmp_path / "b", corpus, trials=trials, given=given)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_unknown_sampler_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="sampler 'tp' is not known; choose one of tpe, nsga2, nsga3, gp, random"):
        make_sampler("tp", 0)


def _toy(trial: int, params: dict[str, Any]) -> Evaluation:
    """A finished trial whose figures follow from its parameters: wider is better and slower."""
    wide, deep = params["d_model"], params["num_layers"]
    return Evaluation(
        trial=trial, state="complete", params_drawn=params, val_bpb=4 - math.log(wide * deep) / 3, request_s=1e-3 * wide * deep, stage_s={}
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_proposal_follows_from_seed_number_and_the_trials_before(tmp_path: Path, sampler: str) -> None:
    space = load_space(SPACE_FILE)
    first: list[dict[str, Any]] = []
    count = 36 if sampler != "gp" else 13
    with open_study(None, tmp_path, "toy") as (study, _):
        for number in range(count):
            proposal = propose(study, space, sampler, 3, number)
            first.append(dict(proposal.params))
            tell(study, proposal, _toy(number, first[-1]), -1.0, "request")
    # In another session, with all the later trials there, each is proposed again.
    with open_study(None, tmp_path, "toy") as (study, note):
        assert note is None
        assert len(study.get_trials()) == count
        for number in (0, 5, 11, count - 1):
            assert propose(study, space, sampler, 3, number).params == first[number]
    assert len({json.dumps(p, sort_keys=True) for p in first}) > count // 3


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp"])
def test_samplers_learn_from_what_is_infeasible(tmp_path: Path, sampler: str) -> None:
    space = load_space(SPACE_FILE)
    count = {"tpe": 40, "nsga2": 64, "gp": 18}[sampler]
    wide = []
    with open_study(None, tmp_path, "toy") as (study, _):
        for number in range(count):
            proposal = propose(study, space, sampler, 0, number)
            params = dict(proposal.params)
            wide.append(params["d_model"] == 32)
            told = _toy(number, params)
            if wide[-1]:
                told = told.evolve(state="infeasible", val_bpb=None, request_s=None, reason="too wide")
            tell(study, proposal, told, 0.5 if wide[-1] else -0.5, "request")
    half = count // 2
    assert sum(wide[half:]) / len(wide[half:]) < 0.3
    assert 0.2 < sum(wide[:8]) / 8 < 0.9


def test_untrained_candidates_are_told_as_violations_with_stand_ins(tmp_path: Path) -> None:
    space = load_space(SPACE_FILE)
    with open_study(None, tmp_path, "toy") as (study, _):
        for number, known in enumerate(({"request_s": 0.25}, {"estimate": {"request_s": 0.5}}, {})):
            proposal = propose(study, space, "tpe", 0, number)
            told = Evaluation(trial=number, state="failed", reason="broke", params_drawn=proposal.params, **known)  # type: ignore[arg-type]
            tell(study, proposal, told, 1.0, "request")
        trials = study.get_trials()
        assert [t.values for t in trials] == [[UNTRAINED_BPB, 0.25], [UNTRAINED_BPB, 0.5], [UNTRAINED_BPB, 0.5]]
        assert all(t.constraints == {VIOLATION: 1.0} and t.user_attrs["state"] == "failed" for t in trials)
        assert study.best_trials == []


def test_the_study_agrees_with_the_records(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=6, given=settings(max_params=26_000))
    with open_study(None, run.path, f"edgewise-{run.manifest['id']}") as (study, _):
        trials = study.get_trials()
        best = {t.number for t in study.best_trials}
    assert [t.user_attrs["state"] for t in trials] == [e.state for e in outcome.evaluations]
    assert all(t.state.is_finished() for t in trials)
    for told, e in zip(trials, outcome.evaluations, strict=True):
        assert told.params == e.params_drawn
        assert (told.constraints[VIOLATION] <= 0) == (e.state == "complete")
        if e.state == "complete":
            assert told.values == list(e.objectives("request"))
    assert {e.trial for e in front_of(outcome.evaluations, "request")} <= best


def test_an_interrupt_that_python_ignores_ends_the_search_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """A signal may come in the callback of a weak reference, where an exception is reported and goes on no further."""
    before = signal.getsignal(signal.SIGINT)

    class Dropped:
        pass

    with ended_by_signals():
        dropped = Dropped()
        reference = weakref.ref(dropped, lambda _: signal.raise_signal(signal.SIGINT))
        del dropped
        assert reference() is None
        assert _ASKED_TO_END.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err == ""
