"""What a search minimises: bits per byte of the held-out documents, or the loss on a user's file."""

import json
from pathlib import Path
from typing import Any

import pytest
from search_helpers import Listener, run_search, settings, write_speeches

from nas.accuracy import UNTRAINED_BPB, load_accuracy
from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, InvalidTasks
from nas.evaluation import Evaluation
from nas.likelihood import score_tasks
from nas.proposals import open_study
from nas.run import FORMAT, resume_or_create
from nas.tokenizer import train_tokenizer
from nas.weights import load_weights

PAIRS = [{"good": "the people of the country", "bad": "people the of country the"}, {"good": "to the Congress", "bad": "the to Congress"}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


def write_pairs(path: Path, pairs: list[dict[str, str]] = PAIRS) -> str:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return str(path)


def test_bpb_is_no_file_and_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    assert load_accuracy("bpb") is None
    first, copy = (load_accuracy(write_pairs(tmp_path / name)) for name in ("pairs.jsonl", "copy.jsonl"))
    assert first is not None
    assert copy is not None
    assert (first.name, copy.name, first.untrained_loss) == ("pairs.jsonl", "copy.jsonl", 1.0)
    assert first.to_dict() == {"path": str(tmp_path / "pairs.jsonl"), "sha256": copy.tasks.sha256, "kind": "pairs"}
    (tmp_path / "notes.txt").write_text("Some notes.", encoding="utf-8")
    notes = load_accuracy(str(tmp_path / "notes.txt"))
    assert notes is not None
    assert (notes.tasks.kind, notes.untrained_loss) == ("text", UNTRAINED_BPB)
    with pytest.raises(InvalidTasks, match="does not exist"):
        load_accuracy(str(tmp_path / "nothing.jsonl"))


def test_what_to_know_of_a_text_is_said(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*corpus.train[:2], *["word " * 30_000] * 2)))
    notes = load_accuracy(str(path))
    assert notes is not None
    size = sum(len(document.encode()) for document in notes.tasks.documents)
    assert notes.doubts(corpus) == [
        f"2 documents of --accuracy {path} are trained on, too; give it as --held-out as well",
        f"every model is scored on all {size:,} bytes of {path}; 262,144 are mostly enough, and faster",
    ]
    pairs = load_accuracy(write_pairs(tmp_path / "pairs.jsonl"))
    assert pairs is not None
    assert pairs.doubts(corpus) == []


def manifest(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "format": FORMAT,
        "seed": 0,
        "target": "null",
        "corpus": {},
        "space": {},
        "device": {"name": "null"},
        "id": "a",
    }
    return values | {"created": "", "versions": {}, "settings": {"sampler": "tpe", **changes}}


def test_a_run_goes_on_with_the_same_file_under_any_path_and_with_no_other(tmp_path: Path) -> None:
    one, same, other = ({"path": p, "sha256": s * 64, "kind": "pairs"} for p, s in (("a.jsonl", "a"), ("b.jsonl", "a"), ("a.jsonl", "c")))
    resume_or_create(tmp_path / "file", manifest(accuracy=one))
    resume_or_create(tmp_path / "file", manifest(accuracy=same))
    with pytest.raises(
        InvalidRun, match=r"made with --accuracy a\.jsonl \(pairs, sha256 aaaaaaaaaaaa\), not a\.jsonl \(pairs, sha256 cccccccc"
    ):
        resume_or_create(tmp_path / "file", manifest(accuracy=other))
    resume_or_create(tmp_path / "before", manifest())  # from before there was a choice
    resume_or_create(tmp_path / "before", manifest(accuracy="bpb"))
    with pytest.raises(InvalidRun, match=r"made with --accuracy bpb, not a\.jsonl \(pairs"):
        resume_or_create(tmp_path / "before", manifest(accuracy=one))


def test_a_search_minimises_the_loss_on_a_file_and_keeps_bits_per_byte(tmp_path: Path, corpus: Corpus) -> None:
    accuracy = load_accuracy(write_pairs(tmp_path / "pairs.jsonl"))
    assert accuracy is not None
    given = settings(budget_bytes=2000, weights=("int8",), accuracy=accuracy, max_params=26_000)
    run, outcome = run_search(tmp_path / "run", corpus, trials=4, given=given)
    assert run.manifest["settings"]["accuracy"] == accuracy.to_dict()
    done = [e for e in outcome.evaluations if e.state == "complete"]
    assert 1 < len(done) < 4
    for e in done:
        assert e.score is not None
        assert e.task is not None
        assert e.val_bpb == e.score["val_bpb"] != e.loss == e.task["loss"] == e.objectives("request")[0]
        assert (e.task["name"], e.task["kind"], e.task["n"], e.task["sha256"]) == ("pairs.jsonl", "pairs", 2, accuracy.tasks.sha256)
    best = outcome.front[-1]
    assert best.loss == min(e.loss for e in done if e.loss is not None)

    # The float32 weights are kept; the score is that of the rounded ones.
    assert best.config is not None
    assert best.score is not None
    model = load_weights(run.weights_path(best.trial), best.config)
    vocab = next(
        int(p.stem) for p in (run.path / "tokenizers").glob("*.json") if p.stem.isdigit() and int(p.stem) >= best.config.vocab_size
    )
    tokenizer = train_tokenizer(corpus, vocab, run.tokenizer_path(vocab))
    window = best.score["window_tokens"]
    assert score_tasks(model, tokenizer, accuracy.tasks, window).loss != best.loss
    from search_spaces.quantisation import round_weights

    round_weights(model, "int8")
    assert score_tasks(model, tokenizer, accuracy.tasks, window).loss == best.loss

    front = json.loads(run.front_path.read_text())
    assert front["objective"] == "loss on pairs.jsonl"
    assert [m["loss"] for m in front["front"]] == [e.loss for e in outcome.front]
    assert [m["task_accuracy"] for m in front["front"]] == [(e.task or {})["accuracy"] for e in outcome.front]
    assert "loss on pairs.jsonl" in run.report_path.read_text()
    with open_study(None, run.path, f"edgewise-{run.manifest['id']}") as (study, _):
        told = study.get_trials()
    for t, e in zip(told, outcome.evaluations, strict=True):
        assert t.values[0] == e.loss if e.state == "complete" else t.values[0] >= 1.0
        assert t.values[0] < UNTRAINED_BPB
    again = Listener()
    run_search(tmp_path / "run", corpus, trials=4, given=given, view=again)
    assert again.finished_trials == []
    with pytest.raises(InvalidRun, match="--accuracy"):
        run_search(tmp_path / "run", corpus, trials=4, given=settings(budget_bytes=2000, weights=("int8",), max_params=26_000))


def test_a_loss_that_is_not_known_is_no_objective() -> None:
    task = {"name": "pairs.jsonl", "kind": "pairs", "loss": None, "loss_stderr": None, "accuracy": 0.5}
    evaluation = Evaluation(trial=0, state="complete", val_bpb=2.0, request_s=1.0, score={"val_bpb": 2.0, "task": task})
    assert not evaluation.is_ranked("request")
    with pytest.raises(ValueError, match="has no score"):
        evaluation.objectives("request")
