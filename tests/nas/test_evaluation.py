import json
import math
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import InvalidRun
from nas.evaluation import Evaluation, loss_in, write_whole
from search_spaces.config import SLMConfig

CONFIG = SLMConfig(vocab_size=300, d_model=24, num_layers=2, attention="gqa", num_heads=(4, 2), num_kv_heads=(2, 1), head_dim=6)
FULL = Evaluation(
    trial=3,
    state="complete",
    params_drawn={"width": 24, "kind": "gqa", "ratio": 2.5, "tie": True},
    config=CONFIG,
    weights="int8",
    bytes_per_token=2.5,
    params=1234,
    flops_per_token=5678,
    weight_bytes=4936,
    kv_bytes_per_token=96,
    peak_bytes=10_000,
    estimate={"decode_s": 1e-4},
    measurement={"decode": {"times_s": [1e-4, 1.1e-4]}},
    prefill_s=0.004,
    decode_s_per_token=1e-3,
    request_s=0.2,
    bytes_per_s=2500.0,
    score={"val_bpb": 2.5, "diverged": False},
    val_bpb=2.5,
    val_bpb_stderr=0.01,
    stage_s={"count": 0.01, "train": 3.5},
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_file_gives_back_the_same_record(tmp_path: Path) -> None:
    for evaluation in (FULL, Evaluation(trial=0), Evaluation(trial=1, state="failed", reason="línea ☃", duplicate_of=0)):
        path = tmp_path / "trials" / f"{evaluation.trial:05d}.json"
        evaluation.save(path)
        assert Evaluation.load(path) == evaluation
    assert FULL.config == Evaluation.load(tmp_path / "trials" / "00003.json").config


@given(record=st.dictionaries(st.text(), json_values, max_size=4), bpb=st.floats(), reason=st.none() | st.text())
def test_any_record_survives_json(record: dict[str, object], bpb: float, reason: str | None) -> None:
    evaluation = Evaluation(trial=0, measurement=record, score=record, params_drawn=record, val_bpb=bpb, reason=reason)
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == evaluation


def test_numbers_that_are_not_finite_are_kept_as_none() -> None:
    evaluation = Evaluation(trial=0, val_bpb=math.nan, request_s=math.inf, score={"losses": [1.0, math.nan], "n": -math.inf})
    assert (evaluation.val_bpb, evaluation.request_s) == (None, None)
    assert evaluation.score == {"losses": [1.0, None], "n": None}


def test_what_the_caller_changes_later_does_not_reach_the_record() -> None:
    record = {"times_s": [1.0]}
    evaluation = Evaluation(trial=0, measurement=record)
    record["times_s"].append(2.0)
    assert evaluation.measurement == {"times_s": [1.0]}
    evaluation.to_dict()["measurement"]["times_s"].append(3.0)
    assert evaluation.measurement == {"times_s": [1.0]}


def test_evolve_returns_a_new_record() -> None:
    later = FULL.evolve(state="diverged", reason="loss is not finite")
    assert (FULL.state, later.state, later.params) == ("complete", "diverged", 1234)
    with pytest.raises(TypeError):
        FULL.evolve(colour="red")
    with pytest.raises(AttributeError):
        FULL.state = "failed"  # type: ignore[misc]


def test_objectives_by_speed() -> None:
    assert FULL.objectives("decode") == (2.5, pytest.approx(1e-3 / 2.5))
    assert FULL.objectives("prefill") == (2.5, 0.004)
    assert FULL.objectives("request") == (2.5, 0.2)


def test_decode_compares_vocabularies_per_byte_of_text() -> None:
    slower_token = FULL.evolve(decode_s_per_token=1.5e-3, bytes_per_token=5.0)
    assert slower_token.objectives("decode")[1] < FULL.objectives("decode")[1]


@pytest.mark.parametrize(
    "changes", [{"val_bpb": None}, {"decode_s_per_token": None}, {"bytes_per_token": None}, {"decode_s_per_token": 0.0}]
)
def test_objectives_need_both_figures(changes: dict[str, object]) -> None:
    evaluation = FULL.evolve(**changes)
    assert not evaluation.is_ranked("decode")
    with pytest.raises(ValueError, match=r"trial 3 .* has no (score|decode time);"):
        evaluation.objectives("decode")


def test_only_complete_trials_are_ranked() -> None:
    assert FULL.is_ranked("decode")
    assert not FULL.evolve(state="running").is_ranked("decode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": "done"}, "state='done' is not one of running"),
        ({"trial": "3"}, "trial='3' is not an integer"),
        ({"params": 1.5}, "params=1.5 is not an integer"),
        ({"params": True}, "params=True is not an integer"),
        ({"val_bpb": "2.5"}, "val_bpb='2.5' is not a number"),
        ({"reason": 3}, "reason=3 is not text"),
        ({"score": [1]}, "score=.* is not a mapping"),
        ({"score": None, "params_drawn": None}, "params_drawn=None is not a mapping"),
        ({"stage_s": {"train": "long"}}, "stage_s\\['train'\\]='long' is not a number of seconds"),
        ({"config": {"d_model": 8}}, "config does not describe a model: vocab_size is missing"),
        ({"config": 8}, "config=8 is not a JSON object"),
        ({"speedup": 2}, "'speedup' is not a field"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "00003.json"
    path.write_text(json.dumps({**FULL.to_dict(), **changes}))
    with pytest.raises(InvalidRun, match=message) as caught:
        Evaluation.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"{}", FULL.to_dict().__repr__().encode()])
def test_files_that_are_no_record_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "00000.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRun, match=r"00000\.json is damaged"):
        Evaluation.load(path)


def test_a_missing_file_is_an_invalid_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidRun, match="cannot be read"):
        Evaluation.load(tmp_path / "00000.json")


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "00003.json"
    FULL.save(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidRun):
            Evaluation.load(path)


def test_values_json_cannot_hold_are_refused() -> None:
    with pytest.raises(InvalidRun, match=r"measurement\['x'\] is a set"):
        Evaluation(trial=0, measurement={"x": {1, 2}})
    with pytest.raises(InvalidRun, match="key 1"):
        Evaluation(trial=0, measurement={1: "x"})  # type: ignore[dict-item]


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    write_whole(path, "one")
    assert write_whole(path, "zwei ☃") == path
    assert path.read_text(encoding="utf-8") == "zwei ☃"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(path, "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_record_from_before_there_were_precisions_is_of_float32_weights() -> None:
    values = FULL.to_dict()
    assert values.pop("weights") == "int8"
    assert Evaluation.from_dict(values).weights == "fp32"
    with pytest.raises(InvalidRun, match="weights='int5' is not one of fp32, fp16, int8, int4; choose one"):
        Evaluation.from_dict({**values, "weights": "int5"})


def test_a_precision_is_told_where_it_is_not_float32_or_was_chosen() -> None:
    assert FULL.names_weights
    plain = FULL.evolve(weights="fp32")
    assert not plain.names_weights
    assert plain.evolve(params_drawn={"weights": "fp32"}).names_weights


def test_a_loss_is_that_on_the_file_that_was_searched_by() -> None:
    task = {"name": "pairs.jsonl", "kind": "pairs", "loss": 0.6, "loss_stderr": 0.05, "accuracy": 0.7}
    scored = FULL.evolve(score={"val_bpb": 2.5, "task": task})
    assert (FULL.loss, FULL.loss_stderr, FULL.task) == (2.5, 0.01, None)
    assert (scored.loss, scored.loss_stderr, scored.task) == (0.6, 0.05, task)
    assert scored.objectives("request") == (0.6, 0.2)
    assert scored.val_bpb == 2.5


def test_a_stopped_trial_has_a_last_rung_and_no_loss() -> None:
    rungs = [{"train_bytes": 64_000, "val_bpb": 3.1}, {"train_bytes": 256_000, "val_bpb": 2.9}]
    stopped = FULL.evolve(state="stopped", score={"rungs": rungs}, val_bpb=None, val_bpb_stderr=None)
    assert stopped.last_rung == rungs[-1]
    assert loss_in(stopped.last_rung) == 2.9
    assert (stopped.loss, stopped.is_ranked("request")) == (None, False)
    assert FULL.evolve(score={"val_bpb": 2.5, "rungs": rungs}).last_rung is None
    assert stopped.evolve(score={"rungs": "lost"}).last_rung is None


def test_the_twin_that_was_scored_is_a_config() -> None:
    assert FULL.twin is None
    assert FULL.evolve(score={"val_bpb": 2.5, "twin": CONFIG.to_dict()}).twin == CONFIG
    with pytest.raises(InvalidRun, match="twin of trial 3 does not describe a model"):
        _ = FULL.evolve(score={"val_bpb": 2.5, "twin": {"d_model": 3}}).twin
