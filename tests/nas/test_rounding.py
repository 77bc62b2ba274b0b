"""The precision of the weights in a search: what is deployed is what is scored."""

import copy
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from search_helpers import SPACE_FILE, Listener, contents, repeated_steps, run_search, settings, write_speeches

import nas.trained
import nas.training
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.proposals import open_study, propose
from nas.rounding import float_score, rounded_score
from nas.tokenizer import Tokenizer
from nas.training import evaluate
from nas.weights import load_weights
from search_spaces.counting import weight_bytes
from search_spaces.precision import PRECISIONS, Precision
from search_spaces.quantisation import round_weights
from search_spaces.space import Space, load_space
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Sample
from targets.spec import load_spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


def one_model() -> Space:
    """A space of a single architecture: all that a search can choose is the precision."""
    values = load_space(SPACE_FILE).to_dict()
    plain = {"vocab_size": 300, "d_model": 32, "num_layers": 1, "attention": "mha", "ffn": "gated", "activation": "silu"}
    return Space.from_dict({**values, "parameters": values["parameters"] | plain})


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_candidate_is_measured_and_scored_in_the_precision_asked_for(tmp_path: Path, corpus: Corpus, precision: Precision) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, given=settings(weights=(precision,)))
    (only,) = outcome.evaluations
    _, floats = run_search(tmp_path / "floats", corpus, trials=1)
    full = floats.evaluations[0]
    assert only.config is not None
    assert only.score is not None
    assert (only.state, only.weights, only.params_drawn) == ("complete", precision, full.params_drawn)
    assert (only.score["val_bpb_fp32"], only.score["val_bpb_stderr_fp32"]) == (full.val_bpb, full.val_bpb_stderr)
    trained = load_weights(run.weights_path(0), only.config)
    tokenizer = Tokenizer.from_file(run.tokenizer_path(only.config.vocab_size))
    assert evaluate(trained, tokenizer, corpus.validation, only.score["window_tokens"])[0] == full.val_bpb
    round_weights(trained, precision)
    assert evaluate(trained, tokenizer, corpus.validation, only.score["window_tokens"]) == (only.val_bpb, only.val_bpb_stderr)
    assert only.val_bpb != full.val_bpb
    # Bytes of the precision everywhere: counted, measured, estimated.
    saved = weight_bytes(only.config) - weight_bytes(only.config, precision)
    assert only.weight_bytes == weight_bytes(only.config, precision)
    assert full.peak_bytes is not None
    assert only.peak_bytes == full.peak_bytes - saved
    assert only.measurement is not None
    assert only.measurement["packed_bytes"] == only.weight_bytes
    for baseline in (False, True):
        fewer, all_bits = (e.estimated_seconds("decode", baseline=baseline) for e in (only, full))
        assert fewer is not None
        assert all_bits is not None
        assert fewer < all_bits


class Reader(NullTarget):
    """A null target that reads what the check against PyTorch is made with."""

    names: frozenset[str] = frozenset()

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        path = artifact.with_name("sample")
        sample.write(path)
        with safe_open(path, framework="np") as file:
            self.names = frozenset(file.keys())
        return super().measure(artifact, sample, timing)


def test_the_program_is_checked_on_the_weights_in_their_precision(tmp_path: Path, corpus: Corpus) -> None:
    target = Reader(load_spec("null"))
    run_search(tmp_path / "run", corpus, trials=1, target=target, given=settings(weights=("int8",)))
    assert {"embed.tokens.weight_values", "embed.tokens.weight_scales"} <= target.names
    assert "embed.tokens.weight" not in target.names


def test_a_limit_of_memory_is_one_of_the_precisions_bytes(tmp_path: Path, corpus: Corpus) -> None:
    ruled_out = {}
    for precision in ("fp32", "int4"):
        given = settings(weights=(precision,), max_memory_bytes=1000)
        _, outcome = run_search(tmp_path / precision, corpus, trials=1, space=one_model(), given=given)
        (ruled_out[precision],) = outcome.evaluations
    few, many = ruled_out["int4"], ruled_out["fp32"]
    assert few.config is not None
    assert (few.state, many.state) == ("infeasible", "infeasible")
    saved = weight_bytes(few.config) - weight_bytes(few.config, "int4")
    assert few.peak_bytes is not None
    assert many.peak_bytes == few.peak_bytes + saved
    _, free = run_search(tmp_path / "free", corpus, trials=1, space=one_model(), given=settings(weights=("int4",)))
    given = settings(weights=("fp32", "int4"), max_memory_bytes=free.evaluations[0].peak_bytes)
    _, outcome = run_search(tmp_path / "both", corpus, trials=8, space=one_model(), given=given)
    assert {(e.weights, e.state) for e in outcome.evaluations} == {("fp32", "infeasible"), ("int4", "complete")}


def test_a_rounded_score_whose_record_was_not_written_is_found_in_the_weights(tmp_path: Path, corpus: Corpus) -> None:
    given = settings(weights=("int4",))
    run, _ = run_search(tmp_path / "run", corpus, trials=1, given=given)
    done = run.load(0)
    assert done is not None
    done.evolve(state="running", score=None, val_bpb=None, val_bpb_stderr=None).save(run.trial_path(0))

    def no_training(trial: int, stage: str) -> None:
        assert (trial, stage) != (0, "train")

    run_search(tmp_path / "run", corpus, trials=1, given=given, view=Listener(no_training))
    assert run.load(0) == done


def test_the_record_of_a_score_goes_there_and_back(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1)
    (only,) = outcome.evaluations
    assert only.config is not None
    assert only.score is not None
    model = load_weights(run.weights_path(0), only.config)
    before = copy.deepcopy(model.state_dict())
    tokenizer = Tokenizer.from_file(run.tokenizer_path(only.config.vocab_size))
    score = rounded_score(model, "int4", tokenizer, corpus, only.score)
    assert list(float_score(score).items()) == list(only.score.items()) == list(float_score(only.score).items())
    assert rounded_score(model, "fp32", tokenizer, corpus, only.score) == only.score
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


# --- several ----------------------------------------------------------------------------------


def test_of_several_the_sampler_chooses_and_starts_have_the_first(tmp_path: Path) -> None:
    values = load_space(SPACE_FILE).to_dict()
    space = Space.from_dict({**values, "starts": [{"d_model": 16}, {"d_model": 32}]})
    asked = [axis.name for axis in space.asked]
    with open_study(None, tmp_path, "toy") as (study, _):
        found = [propose(study, space, "random", 0, number, ("int8", "fp32", "int4")).params for number in range(30)]
        assert all(list(params) == [*asked, "weights"] for params in found)
        assert [params["weights"] for params in found[:2]] == ["int8", "int8"]
        assert {params["weights"] for params in found} == {"int8", "fp32", "int4"}
        assert "weights" not in propose(study, space, "random", 0, 2, ("int8",)).params


def test_an_equal_model_is_trained_once_and_no_repeat_of_another_precision(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    to = nas.training.ShortTraining.to

    def counted(self: Any, train_bytes: int, progress: Any = None) -> Any:
        trained.append(train_bytes)
        return to(self, train_bytes, progress)

    monkeypatch.setattr(nas.training.ShortTraining, "to", counted)
    given = settings(weights=("int4", "fp32"))
    run, outcome = run_search(tmp_path / "run", corpus, trials=8, space=one_model(), given=given)
    assert Counter(e.weights for e in outcome.evaluations if e.duplicate_of is None) == {"int4": 1, "fp32": 1}
    assert all(e.params_drawn["weights"] == e.weights for e in outcome.evaluations)
    for copied in (e for e in outcome.evaluations if e.duplicate_of is not None):
        assert copied.weights == outcome.evaluations[copied.duplicate_of or 0].weights
    assert len(trained) == 1
    # Trained again instead, everything is the same to the byte.
    monkeypatch.setattr(nas.trained, "_weights_of", lambda *_: None)
    run_search(tmp_path / "again", corpus, trials=8, space=one_model(), given=given)
    assert len(trained) == 3
    assert contents(tmp_path / "again") == contents(run.path)


def test_weights_of_another_precision_that_are_damaged_are_not_used(tmp_path: Path, corpus: Corpus) -> None:
    given = settings(weights=("int4", "fp32"))
    run_search(tmp_path / "whole", corpus, trials=8, space=one_model(), given=given)
    path = tmp_path / "run"
    run_search(path, corpus, trials=1, space=one_model(), given=given)
    weights = path / "weights" / "00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    view = Listener()
    run_search(path, corpus, trials=8, space=one_model(), given=given, view=view)
    assert [note.split(";")[1] for note in view.notes] == [" it is trained again"]
    weights.with_name(weights.name + ".damaged").unlink()
    assert contents(path) == contents(tmp_path / "whole")


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_ended_at_any_stage_it_goes_on_to_the_same_end(tmp_path: Path, corpus: Corpus) -> None:
    given = settings(weights=("fp32", "int8", "int4"))
    whole, _ = run_search(tmp_path / "whole", corpus, trials=4, given=given)
    for stages in itertools.count(1):
        seen: list[tuple[int, str]] = []

        def end(trial: int, stage: str, seen: list[tuple[int, str]] = seen, most: int = 1 + stages % 3) -> None:
            if (trial, stage) not in seen:
                seen.append((trial, stage))
            if len(seen) > most and stage != "report":
                raise Killed

        try:
            run, outcome = run_search(tmp_path / "run", corpus, trials=4, view=Listener(end), given=given)
            break
        except Killed:
            assert stages < 60
    assert stages > 3
    assert contents(run.path) == contents(whole.path)
    assert repeated_steps(run) == []
    assert len({e.weights for e in outcome.evaluations}) > 1


def test_a_score_of_another_precision_is_not_taken_for_a_trials_own(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, given=settings(weights=("int4",)))
    (only,) = outcome.evaluations
    only.evolve(state="running", weights="int8", score=None, val_bpb=None, val_bpb_stderr=None).save(run.trial_path(0))
    _, outcome = run_search(tmp_path / "run", corpus, trials=1, given=settings(weights=("int4",)))
    assert only.score is not None
    assert outcome.evaluations[0].val_bpb not in (only.val_bpb, only.score["val_bpb_fp32"], None)


# --- settings ---------------------------------------------------------------------------------


def test_a_run_keeps_its_precisions_and_one_from_before_there_were_any_goes_on(tmp_path: Path, corpus: Corpus) -> None:
    run, _ = run_search(tmp_path / "run", corpus, trials=1)
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["settings"].pop("weights") == "fp32"
    path.write_text(json.dumps(manifest))
    run_search(tmp_path / "run", corpus, trials=1)
    with pytest.raises(InvalidRun, match=r"made with --weights fp32, not int8,int4; use the same to go on with it"):
        run_search(tmp_path / "run", corpus, given=settings(weights=("int8", "int4")))


@pytest.mark.parametrize("weights", [(), ("int5",), ("int8", "fp32", "int8")])
def test_precisions_that_cannot_be_searched_are_refused(weights: Any) -> None:
    with pytest.raises(UserError, match=f"weights={','.join(weights)} does not name each of some of {', '.join(PRECISIONS)} once"):
        settings(weights=weights)


def test_weights_that_round_to_no_number_fail_with_a_reason(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.rounding.evaluate", lambda *_: (float("nan"), float("nan")))
    _, outcome = run_search(tmp_path / "run", corpus, trials=1, given=settings(weights=("fp16",)))
    (only,) = outcome.evaluations
    assert (only.state, only.reason) == ("failed", "with fp16 weights its score is not a number")
