"""A small search to run for real: space, text, null target, and a view that listens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cost_models.roofline import Roofline
from nas.corpus import Corpus, load_corpus
from nas.evaluation import Evaluation
from nas.models import NamedModel
from nas.run import Run, resume_or_create
from nas.search import Outcome, new_manifest, search
from nas.settings import Limits, Settings
from search_spaces.space import Space, load_space
from targets.target import Target, load_target

SPACE_FILE = Path(__file__).parent / "data" / "small.toml"


def write_speeches(path: Path) -> Path:
    """About 40 KB of the packaged corpus: the beginnings of some documents, one a line of a .jsonl file."""
    documents = load_corpus().train[::9]
    path.write_text("".join(json.dumps({"text": d[:1600]}) + "\n" for d in documents), encoding="utf-8")
    return path


class Listener:
    """A view that remembers, and calls back at each stage."""

    def __init__(self, at_stage: Callable[[int, str], None] | None = None) -> None:
        self.at_stage = at_stage
        self.finished_trials: list[int] = []
        self.notes: list[str] = []
        self.earlier: list[int] = []

    def start(self, total_trials: int | None, deadline_s: float | None, earlier: Sequence[Evaluation] = ()) -> None:
        self.earlier = [e.trial for e in earlier]

    def stage(self, trial: int, stage_name: str, detail: str = "", fraction: float | None = None) -> None:
        if self.at_stage is not None:
            self.at_stage(trial, stage_name)

    def finished(self, evaluation: Evaluation) -> None:
        self.finished_trials.append(evaluation.trial)

    def note(self, text: str) -> None:
        self.notes.append(text)


def settings(**changes: Any) -> Settings:
    """Settings of a search whose trials take a fraction of a second."""
    limits = {k: changes.pop(k) for k in ("max_params", "max_memory_bytes", "max_latency_s") if k in changes}
    return Settings(**{"budget_bytes": 3000, "limits": Limits(**limits), **changes})


def run_search(
    path: Path,
    corpus: Corpus,
    *,
    trials: int | None = 6,
    timeout_s: float | None = None,
    view: Listener | None = None,
    space: Space | None = None,
    target: Target | None = None,
    targets: Sequence[Target] = (),
    given: Settings | None = None,
    references: Sequence[NamedModel] = (),
    repeats: int | None = 0,
) -> tuple[Run, Outcome]:
    """One session of a search in a run folder; on the null target, unless `target` or several `targets` are given."""
    space = space or load_space(SPACE_FILE)
    targets = targets or (target or load_target("null"),)
    given = given or settings()
    specs = [t.spec for t in targets]
    manifest = new_manifest(space=space, corpus=corpus, corpus_source="speeches.jsonl", specs=specs, settings=given)
    run = resume_or_create(path, manifest)
    outcome = search(
        run,
        space=space,
        targets=targets,
        corpus=corpus,
        settings=given,
        cost_model=Roofline(),
        view=view or Listener(),
        trials=trials,
        timeout_s=timeout_s,
        repeats=repeats,
        references=references,
    )
    return run, outcome


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a run that the seed decides, by name."""
    files = [p for part in ("trials", "weights", "tokenizers") for p in sorted((path / part).glob("*"))]
    return {str(p.relative_to(path)): p.read_bytes() for p in (*files, path / "front.json")}


def repeated_steps(run: Run) -> list[tuple[int, str]]:
    """Measurements (on a device) and trainings (to a rung) that began again although they were done."""
    done: set[tuple[int, str]] = set()
    again = []
    for entry in run.log_entries():
        key = (entry["trial"], f"{entry['step']} {entry.get('device', entry.get('train_bytes', ''))}".strip())
        if entry["step"] not in ("measure", "train"):
            continue
        if key in done:
            again.append(key)
        if entry["event"] == "done":
            done.add(key)
    return again
