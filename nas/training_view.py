"""A training as it is watched: a progress bar on a terminal, a line now and then anywhere else."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nas.describe import format_count
from nas.pretraining import Plan
from nas.utilisation import speed_words

_LINE_EVERY_S = 30.0
"""Seconds between two lines where there is no bar."""


class TrainingView:
    """Shows a training; a context manager.

    Args:
        console: where; standard error by default, so that results alone are on standard output.
        ceiling: FLOPs a second of the device's products, asked for when steps begin; None where it is not known.
    """

    def __init__(self, console: Console | None = None, ceiling: Callable[[], float | None] = lambda: None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._ceiling = ceiling
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._plan: Plan | None = None
        self._flops_per_token = 0.0
        self._most_flops_per_s: float | None = None
        self._first = self._done = 0
        self._began_s = self._said_s = 0.0

    def __enter__(self) -> "TrainingView":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Something to know, in a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def preparing(self, share: float) -> None:
        """The text is being tokenised."""
        self._show("tokenising", share, "")
        self._said_s = time.monotonic()

    def begin(self, plan: Plan, done: int, flops_per_token: float) -> None:
        """Steps begin, `done` of them taken earlier."""
        self._plan, self._flops_per_token = plan, flops_per_token
        self._most_flops_per_s = self._ceiling()
        self._first, self._began_s = done, time.monotonic()
        self._task = None
        went_on = f", going on after step {done:,}" if done else ""
        self.note(
            f"{format_count(plan.tokens)} tokens in {plan.steps:,} steps of {plan.batch_windows} × {plan.window}"
            f"{f' ({plan.accumulate} portions)' if plan.accumulate > 1 else ''}{went_on}"
        )

    def stepped(self, done: int, loss: float) -> None:
        """So many steps are done; `loss` in bits per byte."""
        assert self._plan is not None
        rate = (done - self._first) * self._plan.batch_tokens / max(1e-9, time.monotonic() - self._began_s)
        mfu = rate * self._flops_per_token / self._most_flops_per_s if self._most_flops_per_s else None
        facts = f"{loss:.3f} bits/byte  {speed_words(rate, mfu)}"
        self._show("training", done / self._plan.steps, facts, f"step {done:,} of {self._plan.steps:,}")

    def scoring(self) -> None:
        """The steps are done; the held-out text is scored."""
        self._show("scoring", 1.0, "")

    def _show(self, what: str, share: float, facts: str, where: str = "") -> None:
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._progress.add_task(what, total=1.0, facts=facts)
            self._progress.update(self._task, description=what, completed=share, facts=facts)
        elif facts and time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._said_s = time.monotonic()
            self.note(f"{where}: {facts}")
