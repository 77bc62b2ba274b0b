"""Which model wins where, in a search over several devices, as rows of words: the terminal and the report show the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nas.describe import format_rate, format_s
from nas.doubts import is_doubtful
from nas.evaluation import Evaluation, Speed
from nas.front import choose, front_of, on_each

CHOSEN, ON_FRONT, DOUBTFUL = "★", "•", "~"
"""Marks behind a time: the device's default choice; on the device's front; the times spread widely, or the device ran slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """The models on the joint front, with their times on every device.

    Attributes:
        devices: by name.
        front: the joint front, fastest first.
        chosen: its default choice.
        times: for each model, by trial, its time on each device in words, with marks.
        unit: what the times are.
    """

    devices: tuple[str, ...]
    front: tuple[Evaluation, ...]
    chosen: Evaluation | None
    times: Mapping[int, tuple[str, ...]]
    unit: str


def across(evaluations: Sequence[Evaluation], speed: Speed, devices: Sequence[str]) -> Across:
    """What `Across` says, of these trials of a run over `devices`, named in the order of its manifest."""
    front = front_of(evaluations, speed)
    cells: dict[int, list[str]] = {e.trial: [] for e in front}
    for seen in on_each(evaluations, devices).values():
        there = front_of(seen, speed)
        best, on_front = choose(there, speed), {e.trial for e in there}
        for e in seen:
            if e.trial in cells:
                mark = CHOSEN if best is not None and e.trial == best.trial else ON_FRONT if e.trial in on_front else ""
                words = time_words(e, speed) + (DOUBTFUL if is_doubtful(e) else "")
                cells[e.trial].append(f"{words} {mark}".rstrip())
    return Across(
        devices=tuple(devices),
        front=tuple(front),
        chosen=choose(front, speed),
        times={trial: tuple(row) for trial, row in cells.items()},
        unit={"request": "time of a request", "prefill": "time to read the prompt", "decode": "characters a second"}[speed],
    )


def time_words(evaluation: Evaluation, speed: Speed) -> str:
    """The time that was searched by, on the first device, in words; "–" if it is not known."""
    seconds = evaluation.seconds(speed)
    return format_rate(1 / seconds if seconds else None) if speed == "decode" else format_s(seconds)
