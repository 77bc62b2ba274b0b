"""What the sampler proposes for a trial, and what it is told afterwards.

The proposal of trial k is a pure function of the seed, k and the finished trials up to k - ahead, where `ahead` trials are
under way at once: the sampler is made anew, seeded from (seed, k), and asked in a study in memory that holds just those
trials, whatever else is finished by then. The study in storage holds finished
trials only, each added whole. So a killed search proposes again exactly what it was working on, and a study that is
lost can be made again from the folder's evaluations.
"""

import errno
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState, create_trial

from nas.accuracy import UNTRAINED_BPB
from nas.errors import InvalidRun, UserError
from nas.evaluation import WEIGHTS, Evaluation, Speed
from nas.run import without_password
from search_spaces.precision import Precision
from search_spaces.space import SearchSpace

SAMPLERS = ("tpe", "nsga2", "nsga3", "gp", "random")
"""Samplers by the name `--sampler` takes."""

POPULATION = 16
"""Trials a generation of the genetic samplers: searches here have tens of trials, not the thousands that 50 suits."""

VIOLATION = "violation"
"""The one constraint told: at most 0 if the candidate keeps every limit, else by which share it breaks the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The parameters of a trial, as Optuna keeps them."""

    trial: int
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    system_attrs: Mapping[str, Any]


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A fresh sampler.

    Raises:
        UserError: if there is none of that name.
    """
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        with warnings.catch_warnings():
            # It has kept its interface since Optuna 3.2; nobody who names it needs to hear that it may change.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise UserError(f"sampler {name!r} is not known; choose one of {', '.join(SAMPLERS)}")


def propose(
    study: optuna.Study,
    space: SearchSpace,
    sampler: str,
    seed: int,
    trial: int,
    weights: Sequence[Precision] = ("fp32",),
    ahead: int = 1,
) -> Proposal:
    """What the sampler proposes for a trial, given the study's trials up to `trial - ahead`; changes nothing.

    The first trials are the space's starts, if it has any. Of several precisions of `weights` the sampler chooses one, as
    the parameter `WEIGHTS` after those of the space; starts have the first.
    """
    state = np.random.SeedSequence([seed, trial]).generate_state(1)
    memory = optuna.create_study(directions=study.directions, sampler=make_sampler(sampler, int(state[0])))
    memory.add_trials(study.get_trials(deepcopy=False)[: max(0, trial - ahead + 1)])
    start = space.start(trial)
    if start is not None:
        memory.enqueue_trial({**start, WEIGHTS: weights[0]} if len(weights) > 1 else dict(start))
    asked = memory.ask()
    space.suggest(asked)
    if len(weights) > 1:
        asked.suggest_categorical(WEIGHTS, list(weights))
    drawn = memory.get_trials(deepcopy=False)[-1]
    # A sampler's notes for parallel workers are of no use once the trial is over; a generation's number is.
    attrs = {k: v for k, v in drawn.system_attrs.items() if "relative_params" not in k and k != "fixed_params"}
    return Proposal(trial=trial, params=drawn.params, distributions=drawn.distributions, system_attrs=attrs)


def tell(
    study: optuna.Study, proposal: Proposal, evaluation: Evaluation, violation: float, speed: Speed, untrained_loss: float = UNTRAINED_BPB
) -> None:
    """Adds a finished trial to the study, in one write.

    Of a stopped candidate the loss is told that was foretold for it. One that has no objectives is told as complete with its
    constraint violated (that is how Optuna's samplers learn from it) and stand-ins for values: the loss of a model that knows
    nothing (the worst told so far if that is worse), and on each device the measured time, else the estimated one, else the
    longest told so far. The user attribute `state` says what really came of it.
    """
    told = study.get_trials(deepcopy=False)
    assert len(told) == evaluation.trial, "trials are told in order"
    loss = evaluation.loss if evaluation.loss is not None else evaluation.foretold_loss
    if loss is None:
        loss = max([untrained_loss, *(t.values[0] for t in told)])
    # What ends before it is estimated knows nothing of the further devices.
    seen = [evaluation.on(None), *map(evaluation.on, evaluation.others)]
    seen += [Evaluation(trial=evaluation.trial)] * (len(study.directions) - 1 - len(seen))
    values = [loss]
    for place, there in enumerate(seen, start=1):
        seconds = there.seconds(speed) or there.estimated_seconds(speed)
        values.append(max((t.values[place] for t in told), default=1.0) if seconds is None else seconds)
    study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            values=values,
            params=dict(proposal.params),
            distributions=dict(proposal.distributions),
            system_attrs=dict(proposal.system_attrs),
            user_attrs={"state": evaluation.state, **({"reason": evaluation.reason[:1000]} if evaluation.reason else {})},
            constraints={VIOLATION: violation},
        )
    )


@contextmanager
def open_study(storage: str | None, run_path: Path, name: str, devices: int = 1) -> Iterator[tuple[optuna.Study, str | None]]:
    """The run's study, made if there is none; closed at the end.

    Args:
        storage: an Optuna storage URL; None: study.db in the run folder. Should that file be damaged, it is
            set aside and begun anew (the evaluations in the folder are told to it again).
        run_path: the run folder.
        name: the study's name in the storage.
        devices: how many the search is for: the objectives are the loss and the time on each.

    Yields:
        The study, and a sentence about a damaged file, if there was one.

    Raises:
        InvalidRun: if the storage cannot be opened.
        OSError: if there is no room for study.db.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = run_path / "study.db"
    note = None
    try:
        opened = _load(storage or _sqlite_url(path), name, devices)
    except Exception as error:
        if storage is None and _disk_full(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        if storage is not None or not _is_damaged(path):
            raise _cannot_open(storage or str(path), error) from error
        aside = path.with_name("study.db.damaged")
        path.replace(aside)
        note = f"{path} was damaged and is now {aside.name}; the study is made again from trials/"
        opened = _load(_sqlite_url(path), name, devices)
    inner, study = opened
    try:
        yield study, note
    finally:
        if isinstance(inner, optuna.storages.RDBStorage):
            inner.remove_session()
            inner.engine.dispose()


def _load(url: str, name: str, devices: int) -> tuple[optuna.storages.BaseStorage, optuna.Study]:
    with _quiet_alembic():
        inner: optuna.storages.BaseStorage
        if url.startswith(("redis", "journal")):
            raise InvalidRun(
                f"storage {without_password(url)!r} is not a database URL; give one such as sqlite:///study.db or postgresql://…"
            )
        inner = optuna.storages.RDBStorage(url)
        study = optuna.create_study(storage=inner, study_name=name, directions=["minimize"] * (1 + devices), load_if_exists=True)
        study.get_trials(deepcopy=False)
    return inner, study


@contextmanager
def _quiet_alembic() -> Iterator[None]:
    logger = logging.getLogger("alembic")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sqlite_url(path: Path) -> str:
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path.resolve())).render_as_string(hide_password=False)


def _is_damaged(path: Path) -> bool:
    """Whether a file is there and SQLite itself finds it no sound database."""
    import sqlite3

    if not path.is_file():
        return False
    connection = None
    try:
        connection = sqlite3.connect(path)
        return bool(connection.execute("PRAGMA quick_check").fetchone() != ("ok",))
    except sqlite3.OperationalError:
        return False  # busy, unreadable, no space: not the content's fault
    except sqlite3.DatabaseError:
        return True
    finally:
        if connection is not None:
            connection.close()


def _disk_full(error: BaseException | None) -> bool:
    """Whether SQLite ran out of space, somewhere down the chain of causes; then "disk I/O error" is how it shows too."""
    while error is not None:
        if "disk is full" in str(error) or "disk I/O error" in str(error):
            return True
        error = error.__cause__
    return False


def _cannot_open(storage: str, error: Exception) -> InvalidRun:
    if isinstance(error, InvalidRun):
        return error
    reason = str(error.__cause__ or error).strip().splitlines()
    why = without_password(reason[0]) if reason else type(error).__name__
    return InvalidRun(f"storage {without_password(storage)!r} cannot be opened ({why}); check the URL")
