"""A search as it is watched: a live view on a terminal, one parseable line per finished trial anywhere else."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nas.across import CHOSEN, DOUBTFUL, ON_FRONT, across, time_words
from nas.describe import (
    describe_config,
    describe_trial,
    format_bytes,
    format_count,
    format_loss,
    format_ms,
    format_rate,
    format_s,
    is_text,
    objective_words,
    significant,
    twin_words,
)
from nas.doubts import is_doubtful, is_noisy, is_slow
from nas.evaluation import Evaluation, Speed, loss_in
from nas.front import choose, front_of, on_each
from nas.noise import Noise
from search_spaces.counting import params

_ROWS = 10
"""Models of the front shown while a search runs: the view has to fit on the screen to be redrawn in place."""

_NARROW = 110
"""Columns below which the table leaves some out, so that the architecture stays readable."""

_LINE_FIELDS = (
    *(
        "trial",
        "state",
        "weights",
        "params",
        "bytes_per_token",
        "peak_bytes",
        "prefill_s",
        "decode_s_per_token",
        "request_s",
        "bytes_per_s",
    ),
    *("val_bpb", "val_bpb_stderr", "duplicate_of", "reason"),
)
_DEVICE_FIELDS = ("peak_bytes", "prefill_s", "decode_s_per_token", "request_s", "bytes_per_s")


def parseable_line(evaluation: Evaluation) -> str:
    """One trial as `name=value` words in a fixed order; what is not known is left out.

    Numbers are written in full precision; text that holds anything but word characters is a JSON string. In a search over
    several devices, times and memory without a device's name are those of the first, the others are named as in
    `pi5.request_s=0.12`.
    """
    words = []
    for name in _LINE_FIELDS:
        value = getattr(evaluation, name)
        if value is None or (name == "weights" and not evaluation.names_weights):
            continue
        plain = not isinstance(value, str) or value.replace("_", "a").isalnum()
        words.append(f"{name}={value if plain else json.dumps(value)}")
    for device, there in evaluation.others.items():
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", device)
        words += [f"{name}.{field}={value}" for field in _DEVICE_FIELDS if (value := getattr(there, field)) is not None]
    words += [f"{name}={value}" for name, value in _score_facts(evaluation).items() if value is not None]
    words += [f"{word}=true" for word, holds in (("noisy", is_noisy), ("slow", is_slow)) if holds(evaluation.measurement)]
    return " ".join(words)


def _score_facts(evaluation: Evaluation) -> dict[str, Any]:
    """What a line says of a score that is not, or not only, bits per byte of the model itself at the whole budget."""
    facts: dict[str, Any] = {}
    if evaluation.task is not None:
        facts |= {"loss": evaluation.loss, "loss_stderr": evaluation.loss_stderr, "task_accuracy": evaluation.task.get("accuracy")}
    if (rung := evaluation.last_rung) is not None:
        facts |= {"stopped_at_bytes": rung.get("train_bytes"), "loss_there": loss_in(rung)}
    if evaluation.twin is not None:
        facts["twin_params"] = params(evaluation.twin)
    return facts


def front_table(
    evaluations: Sequence[Evaluation],
    speed: Speed = "decode",
    *,
    most: int | None = None,
    width: int | None = None,
    references: Mapping[str, Evaluation] | None = None,
    noise: Noise | None = None,
) -> Table:
    """The front as a rich table, fastest first, the default choice marked with ★, times that were noisy or slow with ~.

    Args:
        evaluations: any trials of one device; only complete ones can be on the front.
        speed: the time traded against bits per byte.
        most: no more rows than this, the ends and the default choice among them, one line each; a caption says how many
            are left out.
        width: columns of the terminal, if known; below `_NARROW` request time and memory are left out.
        references: models measured beside, by name, to list below.
        noise: what one training differs by from another: a column more, with ≈ at models that it leaves in no sure order.

    The precision of weights is a column only where people are told (`Evaluation.names_weights`).
    """
    front = front_of(evaluations, speed)
    best = choose(front, speed)
    shown = _spread(front, best, most)
    beside = references or {}
    names = ["trial", "", _loss_name(front), "± seed", "ms/token", "request", "chars/s", "params", "weights", "peak", "score of"]
    rows = [_cells(e, str(e.trial), "★" if e is best else "", _seed_cell(e, front, noise)) for e in shown]
    rows += [_cells(e, name, "ref") for name, e in beside.items()]
    left_out = {"request", "peak"} if width is not None and width < _NARROW else set()
    left_out |= set() if any(e.names_weights for e in (*front, *beside.values())) else {"weights"}
    left_out |= _silent(front, noise)
    keep = [i for i, name in enumerate(names) if name not in left_out]
    names, rows = [names[i] for i in keep], [[*(row[i] for i in keep), row[-1]] for row in rows]
    table = _table(names, rows, {i for i, e in enumerate(shown) if e is best}, most is not None)
    notes = [f"{len(front) - len(shown)} more on the front"] if len(shown) < len(front) else []
    if any(is_doubtful(e) for e in (*shown, *beside.values())):
        notes.append("~ times spread widely, or the device ran slow")
    notes += _noise_notes(front, noise)
    table.caption = _caption(notes if front else ["no model on the front yet"], beside)
    return table


def joint_table(
    evaluations: Sequence[Evaluation],
    speed: Speed,
    devices: Sequence[str],
    *,
    most: int | None = None,
    references: Mapping[str, Evaluation] | None = None,
    noise: Noise | None = None,
) -> Table:
    """The joint front of a search over several devices as a rich table: every model's time on each, and where it wins.

    Args:
        evaluations: any trials of the run.
        speed: the time traded against bits per byte.
        devices: names, in the order of the run's manifest.
        most: as for `front_table`.
        references: models measured beside, by name, to list below.
        noise: as for `front_table`.
    """
    found, beside = across(evaluations, speed, devices), references or {}
    shown = _spread(found.front, found.chosen, most)
    names = ["trial", "", _loss_name(found.front), "± seed", *devices, "params", "score of"]
    rows = []
    for e in shown:
        seed = _seed_cell(e, found.front, noise)
        rows.append([str(e.trial), "★" if e is found.chosen else "", *_joint_cells(e, seed, found.times[e.trial])])
    for name, e in beside.items():
        rows.append([name, "ref", *_joint_cells(e, "", [time_words(there[0], speed) for there in on_each([e], devices).values()])])
    keep = [i for i, name in enumerate(names) if name not in _silent(found.front, noise)]
    names, rows = [names[i] for i in keep], [[*(row[i] for i in keep), row[-1]] for row in rows]
    table = _table(names, rows, {i for i, e in enumerate(shown) if e is found.chosen}, most is not None)
    notes = [f"{len(found.front) - len(shown)} more on the joint front"] if len(shown) < len(found.front) else []
    notes.append(f"{found.unit} on each device; {CHOSEN} default choice there, {ON_FRONT} on its front")
    if any(DOUBTFUL in cell for row in found.times.values() for cell in row):
        notes.append("~ times spread widely, or the device ran slow")
    notes += _noise_notes(found.front, noise)
    table.caption = _caption(notes if found.front else ["no model on the front yet"], beside)
    return table


def _joint_cells(e: Evaluation, seed: str, times: Sequence[str]) -> list[str]:
    return [format_loss(e), seed, *times, format_count(e.params), twin_words(e), describe_trial(e)]


def _loss_name(evaluations: Sequence[Evaluation]) -> str:
    """The head of the column of what was minimised."""
    return "bits/byte" if all(e.task is None for e in evaluations) else objective_words(evaluations)


def _seed_cell(e: Evaluation, front: Sequence[Evaluation], noise: Noise | None) -> str:
    return "" if noise is None else significant(noise.sigma, 2) + (" ≈" if e.trial in noise.unresolved(front) else "")


def _silent(front: Sequence[Evaluation], noise: Noise | None) -> set[str]:
    """Columns that would say nothing."""
    return ({"± seed"} if noise is None else set()) | (set() if any(e.twin is not None for e in front) else {"score of"})


def _noise_notes(front: Sequence[Evaluation], noise: Noise | None) -> list[str]:
    if noise is None:
        return []
    over, least = "documents" if is_text(front) else "tasks", significant(noise.least_difference, 2)
    notes = [f"± seed: standard deviation between seeds, from {noise.trainings} trainings; the ± before it is over {over}"]
    if noise.unresolved(front):
        notes.append(f"≈ closer than {least} to a neighbour: other seeds may turn their order round")
    return notes


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], bold: set[int], one_line: bool) -> Table:
    """A table whose last cell of each row is an architecture."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", caption_justify="left")
    for i, name in enumerate(names):
        # Figures keep their width; rich would otherwise cut them before the long words of the last column.
        width = max(len(name), *(len(row[i]) for row in rows), 1)
        table.add_column(Text(name), justify="right", no_wrap=True, min_width=width)
    table.add_column("architecture")
    for i, row in enumerate(rows):
        # `Text`, not `str`: a string would be read as markup.
        # One that may not wrap is so on the text: a column that may not would take the room of the figures.
        words = Text(row[-1], no_wrap=True, overflow="ellipsis") if one_line else Text(row[-1])
        table.add_row(*(Text(cell) for cell in row[:-1]), words, style="bold" if i in bold else None)
    return table


def _caption(notes: Sequence[str], references: Mapping[str, Evaluation]) -> Text | None:
    lines = [*notes, *(f"{name}: {e.reason}" for name, e in references.items() if e.reason)]
    if references:
        lines.append("ref: a reference, measured beside and never on the front")
    return Text("\n".join(lines)) if lines else None


def _cells(e: Evaluation, name: str, sign: str, seed: str = "") -> list[str]:
    mark = "~" if is_doubtful(e) else ""
    return [
        *(name, sign),
        *(format_loss(e), seed, format_ms(e.decode_s_per_token) + mark, format_s(e.request_s) + mark),
        *(format_rate(1 / e.s_per_byte if e.s_per_byte else None), format_count(e.params), e.weights, format_bytes(e.peak_bytes)),
        twin_words(e),
        describe_config(e.config) if e.config is not None else "–",
    ]


def _spread(front: Sequence[Evaluation], best: Evaluation | None, most: int | None) -> list[Evaluation]:
    """At most so many of the front, evenly spread: the best one always, then both ends."""
    if most is None or len(front) <= most:
        return list(front)
    steps = max(1, most - 1)
    places = {round(i * (len(front) - 1) / steps) for i in range(most)}
    if best is not None and (at := front.index(best)) not in places:
        inner = places - {0, len(front) - 1} or places
        places.remove(min(inner, key=lambda p: abs(p - at)))
        places.add(at)
    return [front[i] for i in sorted(places)]


class LiveView:
    """Shows a search on a terminal while it runs; elsewhere, or when quiet, prints a line per finished trial.

    Use it as a context manager. Lines go to stdout; notes go to stderr, and nowhere when quiet.

    Args:
        speed: the time the search trades against bits per byte.
        devices: those of the search, by name, in the order of its manifest; of one or none the table is that of one device.
        quiet: print lines even on a terminal, and no notes.
        console: where to draw; stdout by default. It is drawn on only if it is a terminal.
        errors: where notes go when there is no live view; stderr by default.
    """

    def __init__(
        self,
        *,
        speed: Speed = "decode",
        devices: Sequence[str] = (),
        quiet: bool = False,
        console: Console | None = None,
        errors: TextIO | None = None,
    ) -> None:
        self.speed: Speed = speed
        self.devices = tuple(devices)
        self.console = console if console is not None else Console()
        self.quiet = quiet
        self.errors = errors
        self.is_live = self.console.is_terminal and not quiet
        self._live: Live | None = None
        self._evaluations: list[Evaluation] = []
        self._earlier = 0
        self._total: int | None = None
        self._deadline_s: float | None = None
        self._began_s = time.monotonic()
        self._table: tuple[tuple[int, int, int], Table] | None = None
        self._stage: tuple[int, str, str, float | None, float] | None = None

    def __enter__(self) -> "LiveView":
        if self.is_live:
            # Text of the view is made when it is drawn, so that clocks go on while a stage is silent.
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stage = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, total_trials: int | None, deadline_s: float | None, earlier: Sequence[Evaluation] = ()) -> None:
        """The search begins.

        Args:
            total_trials: how many trials there will be in all, `earlier` included; None if only time ends it.
            deadline_s: seconds from now after which no trial is begun; None if only the number ends it.
            earlier: trials finished before, in a run that is resumed; they are not printed again.
        """
        self._total, self._deadline_s = total_trials, deadline_s
        self._evaluations = list(earlier)
        self._earlier, self._table = len(earlier), None
        self._began_s = time.monotonic()
        self._refresh()

    def stage(self, trial: int, stage_name: str, detail: str = "", fraction: float | None = None) -> None:
        """Trial `trial` is in this stage, `fraction` (0..1) of it done if known."""
        now = time.monotonic()
        began = self._stage[4] if self._stage is not None and self._stage[:2] == (trial, stage_name) else now
        self._stage = (trial, stage_name, detail, fraction, began)

    def finished(self, evaluation: Evaluation) -> None:
        """A trial has ended, in whatever state."""
        self._evaluations.append(evaluation)
        self._stage = None
        if not self.is_live:
            self._write(self.console.file, parseable_line(evaluation))
        self._refresh()

    def note(self, text: str) -> None:
        """A sentence for the person watching, kept above the live view."""
        if self.is_live:
            self.console.print(Text(text))
        elif not self.quiet:
            self._write(self.errors if self.errors is not None else sys.stderr, text)

    @staticmethod
    def _write(file: Any, line: str) -> None:
        # Past rich, which would wrap a line at 80 columns; flushed, since someone may be reading a pipe.
        file.write(line + "\n")
        file.flush()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    # --- what is drawn --------------------------------------------------------------------

    def _render(self) -> RenderableType:
        # Runs in rich's own thread: what the search may change meanwhile is read once.
        stage, evaluations = self._stage, list(self._evaluations)
        now = time.monotonic()
        parts: list[RenderableType] = [self._progress(now, evaluations)]
        if stage is not None:
            parts.append(_running(now, *stage))
        size = (len(evaluations), self.console.width, self.console.height)
        if self._table is None or self._table[0] != size:
            room = max(1, min(_ROWS, self.console.height - 7))
            if len(self.devices) > 1:
                table = joint_table(evaluations, self.speed, self.devices, most=room)
            else:
                table = front_table(evaluations, self.speed, most=room, width=self.console.width)
            self._table = (size, table)
        return Group(*parts, Text(""), self._table[1])

    def _progress(self, now: float, evaluations: Sequence[Evaluation]) -> RenderableType:
        done, elapsed = len(evaluations), now - self._began_s
        complete, stopped = (sum(e.state == state for e in evaluations) for state in ("complete", "stopped"))
        share = self._share(done, elapsed)
        left = self._left_s(done, elapsed)
        row = Table.grid(padding=(0, 2))
        words = f"{done}/{self._total} trials" if self._total is not None else f"{done} {'trial' if done == 1 else 'trials'}"
        cells: list[RenderableType] = [Text(words, style="bold")]
        if share is not None:
            cells.append(ProgressBar(total=1.0, completed=share, width=16))
        cells.append(Text(f"{complete} complete" + (f", {stopped} stopped" if stopped else "")))
        cells.append(Text(f"{_clock(elapsed)} elapsed" + ("" if left is None else f", ~{_clock(left)} left")))
        row.add_row(*cells)
        return row

    def _share(self, done: int, elapsed: float) -> float | None:
        shares = [min(1.0, done / self._total)] if self._total else []
        shares += [min(1.0, elapsed / self._deadline_s)] if self._deadline_s else []
        return max(shares, default=None)

    def _left_s(self, done: int, elapsed: float) -> float | None:
        """Seconds left by the mean pace of this session's trials, and at most until the deadline."""
        left = []
        if self._deadline_s is not None:
            left.append(max(0.0, self._deadline_s - elapsed))
        here = done - self._earlier
        if self._total is not None and here > 0:
            left.append(max(0, self._total - done) * elapsed / here)
        return min(left, default=None)


def _running(now: float, trial: int, name: str, detail: str, fraction: float | None, began: float) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [Text(f"trial {trial}"), Text(name, style="cyan")] if trial >= 0 else [Text(name, style="cyan")]
    if fraction is not None:
        share = min(1.0, max(0.0, fraction))
        cells += [ProgressBar(total=1.0, completed=share, width=24), Text(f"{share:.0%}")]
    cells += [Text(_clock(now - began)), Text(detail, style="dim", overflow="ellipsis", no_wrap=True)]
    row.add_row(*cells)
    return row


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
