"""The search: ask for a candidate, try it, tell what came of it; until enough are done or time is up.

A trial's number runs from 0. Its record in the folder is what counts: a trial with a finished record is only told to
the study if that does not know it yet, any other is (or goes on being) tried. New, resumed and repaired runs are
all this one loop.
"""

import contextlib
import dataclasses
import itertools
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_models.estimate import CostModel
from nas.candidates import Bench, Settings, View, evaluate, restore, violation
from nas.corpus import Corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation, Speed, write_whole
from nas.front import choose, front_json, front_of, speed_of
from nas.run import FORMAT, Run, changed_versions, utc_now, versions
from search_spaces.space import Space
from targets.quiet import working, yield_to_measuring
from targets.spec import DeviceSpec
from targets.target import Target

if TYPE_CHECKING:
    import optuna

DEFAULT_TRIALS = 20
"""Trials of a search that is told neither how many nor how long."""

IDLE_TRIALS = 100
"""With a time limit alone, a search ends after this many trials in a row that cost nothing: the space is used up."""

REPORT_EVERY_S = 60.0
"""The report is written at the end, and about this often before."""

_ASKED_TO_END = threading.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a search came to.

    Attributes:
        evaluations: every finished trial, by number.
        front: those that nothing beats, fastest first.
        chosen: the one to take by default.
        interrupted: whether it was ended from the keyboard.
    """

    evaluations: tuple[Evaluation, ...]
    front: tuple[Evaluation, ...]
    chosen: Evaluation | None
    interrupted: bool


def new_manifest(*, space: Space, corpus: Corpus, corpus_source: str | None, spec: DeviceSpec, settings: Settings) -> dict[str, Any]:
    """What a run is, as `manifest.json` keeps it."""
    return {
        "format": FORMAT,
        "id": secrets.token_hex(6),
        "created": utc_now(),
        "seed": settings.seed,
        "target": spec.name,
        "settings": settings.to_dict(),
        "versions": versions(),
        "device": spec.to_dict(),
        "corpus": {
            "name": corpus.name,
            "source": corpus_source,
            "licence": corpus.licence,
            "sha256": corpus.sha256,
            "training_text_bytes": corpus.train_bytes,
            "held_out_bytes": corpus.validation_bytes,
        },
        "space": space.to_dict(),
    }


def search(
    run: Run,
    *,
    space: Space,
    target: Target,
    corpus: Corpus,
    settings: Settings,
    cost_model: CostModel,
    view: View,
    trials: int | None = None,
    timeout_s: float | None = None,
) -> Outcome:
    """Searches in a run folder, going on from where it stands.

    `trials` counts every trial of the run that is over, in any state, those of earlier sessions too. `timeout_s` counts
    this session; the trial under way when it passes is finished. With neither, `DEFAULT_TRIALS`.
    A keyboard interrupt ends the search as the end of time does, except that the trial under way stops where it is and
    is taken up again by the next session.

    Raises:
        InvalidRun: if another process has the run, or its storage cannot be opened.
        UserError: if a number of trials or seconds is not above 0.
        OSError: if the folder cannot be written any more; what is in it stays.
    """
    from nas.proposals import make_sampler, open_study

    if trials is not None and trials < 1:
        raise UserError(f"trials={trials} is below 1; give a positive number")
    if timeout_s is not None and not timeout_s > 0:
        raise UserError(f"timeout={timeout_s} is not above 0; give a positive number of seconds")
    make_sampler(settings.sampler, 0)
    bench = Bench(run=run, space=space, target=target, corpus=corpus, settings=settings, cost_model=cost_model, view=view)
    most = DEFAULT_TRIALS if trials is None and timeout_s is None else trials
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    _ASKED_TO_END.clear()
    with run.locked(), working():
        changed = changed_versions(run)
        if changed is not None:
            view.note(changed)
        _set_damaged_aside(run, view)
        with open_study(settings.storage, run.path, f"edgewise-{run.manifest['id']}") as (study, repaired):
            if repaired is not None:
                view.note(repaired)
            view.start(most, timeout_s, [e for e in run.evaluations() if e.state != "running"])
            try:
                _loop(bench, study, most, deadline)
                _restore_front(bench)
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
            return _finish(bench, interrupted)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Has Ctrl-C and `kill` interrupt what runs inside.

    An interrupt may be raised where Python only reports exceptions, as in the callback of a weak reference: it is noted,
    for the loop to end all the same, and not reported.
    """

    def end(_number: int, _frame: object) -> None:
        _ASKED_TO_END.set()
        raise KeyboardInterrupt

    def report(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            hook(ignored)

    hook, sys.unraisablehook = sys.unraisablehook, report
    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _loop(bench: Bench, study: "optuna.Study", most: int | None, deadline: float | None) -> None:
    """The ask/tell loop."""
    from nas.proposals import propose, tell

    run, settings = bench.run, bench.settings
    done: list[Evaluation] = []
    idle, reported = 0, time.monotonic()
    for number in itertools.count():
        if _ASKED_TO_END.is_set():
            raise KeyboardInterrupt
        evaluation = run.load(number)
        finished = evaluation is not None and evaluation.state != "running"
        known = number < len(study.get_trials(deepcopy=False))
        if evaluation is None or not finished or not known:
            if not finished and (
                (most is not None and number >= most)
                or (deadline is not None and time.monotonic() >= deadline)
                or (most is None and idle >= IDLE_TRIALS)
            ):
                return
            proposal = propose(study, bench.space, settings.sampler, settings.seed, number, settings.weights)
            if evaluation is None or not finished:
                evaluation = evaluate(bench, proposal, done)
            else:
                # Another version of Optuna may propose otherwise than the one that made the record.
                proposal = dataclasses.replace(proposal, params=evaluation.params_drawn)
            if not known:
                tell(study, proposal, evaluation, violation(bench, evaluation), settings.speed)
        done.append(evaluation)
        idle = idle + 1 if evaluation.measurement is None or evaluation.duplicate_of is not None else 0
        if not finished:
            front = front_of(done, settings.speed)
            _keep_weights_of(run, front, done)
            write_front(run, front, settings.speed)
            bench.view.finished(evaluation)
            if time.monotonic() - reported > REPORT_EVERY_S:
                rewrite_report(run)
                reported = time.monotonic()
            yield_to_measuring()


def _finish(bench: Bench, interrupted: bool) -> Outcome:
    run, speed = bench.run, bench.settings.speed
    done = tuple(e for e in run.evaluations() if e.state != "running")
    front = front_of(done, speed)
    _keep_weights_of(run, front, done)
    write_front(run, front, speed)
    bench.view.stage(len(done), "report")
    rewrite_report(run)
    return Outcome(evaluations=done, front=tuple(front), chosen=choose(front, speed), interrupted=interrupted)


def rewrite_report(run: Run) -> None:
    """Writes a run's report again from what its folder holds.

    Raises:
        InvalidRun: if a trial's record is damaged.
    """
    from nas.report import starts_among, write_report

    evaluations = run.evaluations()
    references = starts_among(evaluations, Space.from_dict(run.manifest["space"]))
    write_report(run.name, evaluations, run.manifest, run.report_path, references, speed=speed_of(run))


# --- the front on disk ------------------------------------------------------------------------


def write_front(run: Run, front: Sequence[Evaluation], speed: Speed) -> None:
    """Writes front.json whole."""
    write_whole(run.front_path, json.dumps(front_json(front, speed), indent=1) + "\n")


def _keep_weights_of(run: Run, front: Sequence[Evaluation], done: Sequence[Evaluation]) -> None:
    """Deletes the weights of finished trials that are off the front: what is beaten once stays beaten."""
    kept = {e.trial for e in front}
    for evaluation in done:
        if evaluation.trial not in kept:
            run.weights_path(evaluation.trial).unlink(missing_ok=True)


# --- repairs ----------------------------------------------------------------------------------


def _restore_front(bench: Bench) -> None:
    """Makes what the front's exports need anew, if it is lost: at the end, as only then the front is sure."""
    done = [e for e in bench.run.evaluations() if e.state != "running"]
    for evaluation in front_of(done, bench.settings.speed):
        restore(bench, evaluation.evolve(stage_s={}))


def _set_damaged_aside(run: Run, view: View) -> None:
    """Moves records that cannot be read out of the way; their trials are done again."""
    for path in sorted((run.path / "trials").glob("*.json")):
        if not path.stem.isdigit():
            continue
        try:
            run.load(int(path.stem))
        except InvalidRun as error:
            aside = run.set_aside(path)
            view.note(f"{error}; kept as {aside.name}, and trial {int(path.stem)} is done again")
