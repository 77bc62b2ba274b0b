"""The search: ask for a candidate, try it, tell what came of it; until enough are done or time is up.

Several may be under way at once (`Settings.ahead`), so that other machines have something to measure while this one trains.

A trial's number runs from 0. Its record in the folder is what counts: a trial with a finished record is only told to
the study if that does not know it yet, any other is (or goes on being) tried. New, resumed and repaired runs are
all this one loop.
"""

import contextlib
import dataclasses
import json
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_models.estimate import CostModel
from nas.accuracy import UNTRAINED_BPB
from nas.candidates import Candidate
from nas.corpus import Corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation, Speed, write_whole
from nas.front import choose, front_json, front_of, on_fronts, speed_of
from nas.limits import violation
from nas.measuring import servers
from nas.noise import check_repeats, make_repeats, noise_of, set_damaged_repeats_aside
from nas.run import FORMAT, Run, changed_versions, utc_now, versions
from nas.settings import Bench, Settings, View
from nas.trained import forget_training, restore
from search_spaces.space import Space
from targets.quiet import working, yield_to_measuring
from targets.spec import DeviceSpec
from targets.target import Target

if TYPE_CHECKING:
    import optuna

    from nas.models import NamedModel
    from nas.proposals import Proposal

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


def new_manifest(
    *, space: Space, corpus: Corpus, corpus_source: str | None, specs: Sequence[DeviceSpec], settings: Settings
) -> dict[str, Any]:
    """What a run is, as `manifest.json` keeps it.

    Raises:
        UserError: if two devices have the same name, or there are none.
    """
    names = [spec.name for spec in specs]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None or not names:
        raise UserError(f"target {twice!r} is there twice; name each device once, and give device files names of their own")
    return {
        "format": FORMAT,
        "id": secrets.token_hex(6),
        "created": utc_now(),
        "seed": settings.seed,
        "target": names[0],
        "settings": settings.to_dict(),
        "versions": versions(),
        "device": specs[0].to_dict(),
        "targets": [spec.to_dict() for spec in specs],
        "corpus": {
            "name": corpus.name,
            "source": corpus_source,
            "licence": corpus.licence,
            "held_out": corpus.held_out,
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
    targets: Sequence[Target],
    corpus: Corpus,
    settings: Settings,
    cost_model: CostModel,
    view: View,
    trials: int | None = None,
    timeout_s: float | None = None,
    repeats: int | None = None,
    references: "Sequence[NamedModel]" = (),
) -> Outcome:
    """Searches in a run folder, going on from where it stands.

    `trials` counts every trial of the run that is over, in any state, those of earlier sessions too. `timeout_s` counts
    this session; the trial under way when it passes is finished (of several the first; the next session takes up the others).
    With neither, `DEFAULT_TRIALS`. Every trial is measured on all `targets`, in the order of the run's manifest; so are the
    `references`, once in a run. At the end, after the time too, models of the front are trained again (`nas.noise.make_repeats`,
    which says what `repeats` is).
    A keyboard interrupt ends the search as the end of time does, except that the trial under way stops where it is and
    is taken up again by the next session.

    Raises:
        InvalidRun: if another process has the run, or its storage cannot be opened.
        UserError: if a number of trials or seconds is not above 0, one of repeats below 0, or two references are called alike.
        OSError: if the folder cannot be written any more; what is in it stays.
    """
    from nas.proposals import make_sampler, open_study
    from nas.reference_models import file_names, measure_references

    if trials is not None and trials < 1:
        raise UserError(f"trials={trials} is below 1; give a positive number")
    if timeout_s is not None and not timeout_s > 0:
        raise UserError(f"timeout={timeout_s} is not above 0; give a positive number of seconds")
    check_repeats(repeats)
    make_sampler(settings.sampler, 0)
    file_names(references)
    bench = Bench(
        run=run,
        space=space,
        targets=tuple(targets),
        servers=tuple(map(servers, targets)),
        corpus=corpus,
        settings=settings,
        cost_model=cost_model,
        view=view,
    )
    assert [target.spec.name for target in targets] == run.devices
    most = DEFAULT_TRIALS if trials is None and timeout_s is None else trials
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    _ASKED_TO_END.clear()
    with run.locked(), working():
        changed = changed_versions(run)
        if changed is not None:
            view.note(changed)
        _set_damaged_aside(run, view)
        set_damaged_repeats_aside(run, view)
        with open_study(settings.storage, run.path, f"edgewise-{run.manifest['id']}", len(targets)) as (study, repaired):
            if repaired is not None:
                view.note(repaired)
            view.start(most, timeout_s, [e for e in run.evaluations() if e.state != "running"])
            try:
                measure_references(bench, references)
                _loop(bench, study, most, deadline)
                _restore_front(bench)
                make_repeats(bench, repeats)
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
    """The ask/tell loop: `settings.ahead` trials are under way at once, and finished in order."""
    done: list[Evaluation] = []
    under_way: deque[Candidate | Evaluation] = deque()
    idle, reported = 0, time.monotonic()
    finished_late = 1  # trials that are finished though the time is up: one, as it was under way

    def may_begin(number: int) -> bool:
        return (most is None or number < most) and not _is_past(deadline) and (most is not None or idle < IDLE_TRIALS)

    try:
        while True:
            if _ASKED_TO_END.is_set():
                raise KeyboardInterrupt
            while len(under_way) < bench.settings.ahead:
                begun = _begun(bench, study, done, under_way, may_begin)
                if begun is None:
                    break
                under_way.append(begun)
            while _is_past(deadline) and len(under_way) > finished_late and isinstance(last := under_way[-1], Candidate):
                under_way.pop()
                last.stop()  # the next session takes it up
            if not under_way:
                return
            first = under_way[0]
            evaluation = first.finish(done) if isinstance(first, Candidate) else first
            _tell(bench, study, first, evaluation)
            done.append(evaluation)
            under_way.popleft()
            idle = idle + 1 if evaluation.measurement is None or evaluation.duplicate_of is not None else 0
            if isinstance(first, Candidate):
                finished_late = 0 if _is_past(deadline) else 1
                _keep_front(bench.run, done, bench.settings.speed)
                bench.view.finished(evaluation)
                if time.monotonic() - reported > REPORT_EVERY_S:
                    rewrite_report(bench.run)
                    reported = time.monotonic()
                yield_to_measuring()
    finally:
        for left in under_way:
            if isinstance(left, Candidate):
                left.stop()


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _begun(
    bench: Bench,
    study: "optuna.Study",
    done: Sequence[Evaluation],
    under_way: Sequence[Candidate | Evaluation],
    may_begin: Callable[[int], bool],
) -> Candidate | Evaluation | None:
    """The next trial: its record if that is finished already, else begun; None if it may not begin."""
    number = len(done) + len(under_way)
    evaluation = bench.run.load(number)
    if evaluation is not None and evaluation.state != "running":
        forget_training(bench.run, number)  # if the session before was killed just then
        return evaluation
    if not may_begin(number):
        return None
    candidate = Candidate(bench, _proposal(bench, study, number))
    candidate.begin(done, [e if isinstance(e, Evaluation) else e.evaluation for e in under_way])
    return candidate


def _proposal(bench: Bench, study: "optuna.Study", number: int) -> "Proposal":
    from nas.proposals import propose

    settings = bench.settings
    return propose(study, bench.space, settings.sampler, settings.seed, number, settings.weights, settings.ahead)


def _tell(bench: Bench, study: "optuna.Study", first: Candidate | Evaluation, evaluation: Evaluation) -> None:
    """Tells the study of a finished trial, unless it knows."""
    from nas.proposals import tell

    if evaluation.trial < len(study.get_trials(deepcopy=False)):
        return
    if isinstance(first, Candidate):
        proposal = first.proposal
    else:
        # Another version of Optuna may propose otherwise than the one that made the record.
        proposal = dataclasses.replace(_proposal(bench, study, evaluation.trial), params=evaluation.params_drawn)
    accuracy = bench.settings.accuracy
    untrained_loss = UNTRAINED_BPB if accuracy is None else accuracy.untrained_loss
    tell(study, proposal, evaluation, violation(bench, evaluation), bench.settings.speed, untrained_loss)


def _finish(bench: Bench, interrupted: bool) -> Outcome:
    run, speed = bench.run, bench.settings.speed
    done = tuple(e for e in run.evaluations() if e.state != "running")
    _keep_front(run, done, speed)
    bench.view.stage(len(done), "report")
    rewrite_report(run)
    front = front_of(done, speed)
    return Outcome(evaluations=done, front=tuple(front), chosen=choose(front, speed), interrupted=interrupted)


def rewrite_report(run: Run) -> None:
    """Writes a run's report again from what its folder holds.

    Raises:
        InvalidRun: if a trial's record is damaged.
    """
    from nas.report import Reference, starts_among, write_report

    evaluations = run.evaluations()
    references = starts_among(evaluations, Space.from_dict(run.manifest["space"]))
    references += [Reference(name=name, evaluation=e) for name, e in run.references().items()]
    noise = noise_of(run, evaluations)
    write_report(run.name, evaluations, run.manifest, run.report_path, references, speed=speed_of(run), noise=noise)


# --- the front on disk ------------------------------------------------------------------------


def _keep_front(run: Run, done: Sequence[Evaluation], speed: Speed) -> None:
    """Writes front.json whole, and deletes the weights of finished trials off every front: what is beaten once stays beaten."""
    write_whole(run.front_path, json.dumps(front_json(done, speed, run.devices, run.references(), noise_of(run, done)), indent=1) + "\n")
    kept = {e.trial for e in on_fronts(run, done, speed)}
    for evaluation in done:
        if evaluation.trial not in kept:
            run.weights_path(evaluation.trial).unlink(missing_ok=True)


# --- repairs ----------------------------------------------------------------------------------


def _restore_front(bench: Bench) -> None:
    """Makes what the front's exports need anew, if it is lost: at the end, as only then the front is sure."""
    done = [e for e in bench.run.evaluations() if e.state != "running"]
    for evaluation in on_fronts(bench.run, done, bench.settings.speed):
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
