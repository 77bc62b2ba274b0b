"""A model on one device: compiled in the background, and measured there too if that leaves this machine in peace.

On this machine a measurement runs alone, when the trial's turn comes. Other machines measure while this one trains; each
has as many measurements at once as it had servers (`parallel`) when the search began.
"""

import functools
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.evaluation import Evaluation
from nas.settings import MOST_AHEAD
from nas.trial import Trial
from targets.quiet import resting, working
from targets.target import Target


def is_elsewhere(target: Target) -> bool:
    """Whether a target measures on another machine and leaves this one in peace: it says so with `remote = True`."""
    return getattr(target, "remote", False) is True


def servers(target: Target) -> int:
    """How many measurements the target takes at once; 1 unless it is elsewhere and says more with `parallel`."""
    return max(1, int(getattr(target, "parallel", 1))) if is_elsewhere(target) else 1


def farm_size(targets: Sequence[Target]) -> int:
    """How many trials to have under way at once, unless the user says: the servers of the largest farm among other machines."""
    return min(MOST_AHEAD, max(map(servers, targets)))


# Threads live as long as the process: on Linux a child that asks to end with its parent (PR_SET_PDEATHSIG, prctl(2)) ends
# with the thread that started it, and targets start their workers here.


@functools.cache
def _compiler() -> ThreadPoolExecutor:
    """Where programs are compiled, one after the other: they share the caches, and the processors of this machine."""
    return ThreadPoolExecutor(1, thread_name_prefix="compile")


@functools.cache
def _lane(device: str, size: int) -> ThreadPoolExecutor:
    """Where another machine's measurements are waited for."""
    return ThreadPoolExecutor(size, thread_name_prefix=f"measure-{device}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """How long something in the background took."""

    compile_s: float
    measure_s: float = 0.0


class DeviceWork:
    """What is left to do for a trial on one device; begins at once.

    The compile step's `seconds` in the log are how long the trial waited for it, and `overlapped_seconds` went by beside
    another step; so it is with a measurement on another machine. The seconds of all steps thus add up to the time that passed.

    Args:
        trial: counted, with its tokenizer made, and not measured on this device.
        place: of the device among those of the search.
    """

    def __init__(self, trial: Trial, place: int) -> None:
        self._trial = trial
        self._device, self._target = trial.bench.devices()[place]
        self._facts: dict[str, Any] = {"device": self._target.spec.name} if len(trial.bench.targets) > 1 else {}
        self._folder = trial.bench.run.artifact_path(trial.number, place)
        trial.bench.view.stage(trial.number, "compile", self._facts.get("device", ""))
        trial.log("compile", "start", **self._facts)
        self._compiling: Future[tuple[Path, float]] = _compiler().submit(self._compile)
        self._measuring: Future[_Timed] | None = None
        if is_elsewhere(self._target):
            self._measuring = _lane(self._target.spec.name, trial.bench.servers[place]).submit(self._measure_there)

    def finish(self) -> None:
        """Waits until the trial is measured; its record then has the figures.

        Raises:
            Exception: whatever the target raised.
        """
        if self._measuring is not None:
            self._wait_for_measuring(self._measuring)
            return
        artifact = self._wait_for_compiling()
        with self._trial.step("measure", self._facts.get("device", ""), **self._facts):
            self._measure(artifact)

    def stop(self) -> None:
        """Gives up what has not begun; the artifact goes as soon as nothing uses it."""
        last = self._compiling if self._measuring is None else self._measuring
        for future in (self._compiling, last):
            future.cancel()
        # After Ctrl-C both go on until the target is closed.
        last.add_done_callback(lambda _: self._compiling.add_done_callback(lambda _: _remove(self._folder)))

    # --- in the background ------------------------------------------------------------------

    def _compile(self) -> tuple[Path, float]:
        from cost_models.program import build_program

        begin = time.perf_counter()
        with working():
            program = build_program(self._trial.config, self._trial.tokens, self._trial.weights)
        return self._target.compile(program, self._folder), time.perf_counter() - begin

    def _measure_there(self) -> _Timed:
        artifact, compile_s = self._compiling.result()
        self._trial.log("measure", "start", **self._facts)
        begin = time.perf_counter()
        self._measure(artifact)
        return _Timed(compile_s=compile_s, measure_s=time.perf_counter() - begin)

    def _measure(self, artifact: Path) -> None:
        """Measures and puts the figures into the record; in the thread whose turn it is."""
        from cost_models.measured import latency, make_sample

        trial, settings = self._trial, self._trial.bench.settings
        sample = make_sample(trial.config, trial.tokens, settings.seed, precision=trial.weights)
        measurement = self._target.measure(artifact, sample, settings.timing)
        figures = latency(measurement, trial.config, trial.tokens, settings.workload).to_dict()

        def put(evaluation: Evaluation) -> Evaluation:
            return evaluation.put(self._device, **figures)

        trial.save(put)

    # --- waiting ----------------------------------------------------------------------------

    def _wait_for_compiling(self) -> Path:
        if not self._compiling.done():
            self._trial.bench.view.stage(self._trial.number, "compile", self._facts.get("device", ""))
        begin = time.perf_counter()
        with resting():
            artifact, took_s = self._compiling.result()
        self._log_done("compile", time.perf_counter() - begin, took_s)
        return artifact

    def _wait_for_measuring(self, measuring: "Future[_Timed]") -> None:
        if not measuring.done():
            self._trial.bench.view.stage(self._trial.number, "measure", f"on {self._target.spec.name}")
        begin = time.perf_counter()
        with resting():
            took = measuring.result()
        waited_s = time.perf_counter() - begin
        for_measuring_s = min(waited_s, took.measure_s)
        self._log_done("compile", waited_s - for_measuring_s, took.compile_s)
        self._log_done("measure", for_measuring_s, took.measure_s)

    def _log_done(self, step: str, waited_s: float, took_s: float) -> None:
        overlapped_s = max(0.0, took_s - waited_s)
        self._trial.log(step, "done", **self._facts, seconds=round(waited_s, 6), overlapped_seconds=round(overlapped_s, 6))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
