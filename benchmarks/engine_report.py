"""Times of all sides in a cell -> the ratio to the best peer, geometric means, tables; those of different devices never mix."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import CONFIGS, Cell
from rich.markup import escape
from rich.table import Table

from search_spaces.counting import params


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cell as timed.

    Attributes:
        cell: what was compared.
        edgewise_s: our median seconds in each round.
        peers_s: each peer's, in the same rounds.
        device: LLVM's name of the processor, and its cores.
        version: the commit of ours that was timed.
        left_out: peers that could not take part, and why.
    """

    cell: Cell
    edgewise_s: tuple[float, ...]
    peers_s: dict[str, tuple[float, ...]]
    device: str
    version: str
    left_out: dict[str, str]

    @property
    def best(self) -> str | None:
        """The peer with the smallest median; None if there was none."""
        return min(self.peers_s, key=lambda peer: statistics.median(self.peers_s[peer]), default=None)

    def ratios(self, peer: str) -> tuple[float, ...]:
        """That peer's seconds over ours, round by round: above 1 ours is faster."""
        return tuple(theirs / ours for theirs, ours in zip(self.peers_s[peer], self.edgewise_s, strict=True))

    @property
    def ratio(self) -> float | None:
        """The median ratio to the best peer."""
        return statistics.median(self.ratios(self.best)) if self.best else None

    def __str__(self) -> str:
        theirs = ", ".join(f"{peer} {_ms(times)}" for peer, times in self.peers_s.items())
        return f"{self.cell}: {_ms(self.edgewise_s)} ms; {theirs or 'no peer'}; ratio {_ratio(self)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with what is derived from them."""
        best = self.best
        derived: dict[str, Any] = {"params": params(CONFIGS[self.cell.config]), "best": best}
        if best:
            ratios = self.ratios(best)
            derived |= {"ratio": self.ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}
        return asdict(self) | derived

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """The inverse of `to_dict`."""
        return cls(
            cell=Cell(**values["cell"]),
            edgewise_s=tuple(values["edgewise_s"]),
            peers_s={peer: tuple(times) for peer, times in values["peers_s"].items()},
            device=values["device"],
            version=values["version"],
            left_out=values["left_out"],
        )


def read_rows(path: Path) -> dict[tuple[str, Cell], Row]:
    """The rows of a results file by device and cell; none if there is no file."""
    if not path.exists():
        return {}
    return {(row.device, row.cell): row for row in map(Row.from_dict, json.loads(path.read_text(encoding="utf-8")))}


def write_rows(path: Path, rows: dict[tuple[str, Cell], Row]) -> None:
    """Writes a results file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([row.to_dict() for row in rows.values()], indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def geometric_means(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], float]:
    """The geometric mean of the ratios by device, precision, phase and threads."""
    groups: dict[tuple[str, str, str, int], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault((row.device, row.cell.precision, row.cell.phase, row.cell.threads), []).append(row.ratio)
    return {key: statistics.geometric_mean(ratios) for key, ratios in sorted(groups.items(), reverse=True)}


def tables(rows: Iterable[Row]) -> list[Table]:
    """Every cell with all times, for a terminal: a table for each device, under its name."""
    by_device: dict[str, list[Row]] = {}
    for row in rows:
        by_device.setdefault(row.device, []).append(row)
    return [_table(device, of) for device, of in by_device.items()]


def _table(device: str, rows: list[Row]) -> Table:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers_s))
    names: tuple[str, ...] = ("config", "weights", "phase", "length", "threads", "ours ms", *(f"{peer} ms" for peer in peers))
    result = Table(*names, "ratio to best", title=escape(device))
    for row in rows:
        cell = row.cell
        theirs = [_ms(row.peers_s[peer]) if peer in row.peers_s else "–" for peer in peers]
        names = (cell.config, cell.precision, cell.phase, str(cell.length), str(cell.threads))
        result.add_row(*names, _ms(row.edgewise_s), *theirs, _ratio(row), style=None if (row.ratio or 1) >= 1 else "yellow")
    return result


def markdown(rows: Iterable[Row]) -> str:
    """A table for each device and precision: a line for a config and thread count, a column for a phase and length.

    Cells we lose are in bold.
    """
    rows = list(rows)
    parts = []
    for device, precision in dict.fromkeys((row.device, row.cell.precision) for row in rows):
        of = [row for row in rows if (row.device, row.cell.precision) == (device, precision)]
        columns = sorted({(row.cell.phase, row.cell.length) for row in of}, key=lambda c: (c[0] != "prefill", c[1]))
        by_line: dict[tuple[str, int], dict[tuple[str, int], Row]] = {}
        for row in of:
            by_line.setdefault((row.cell.config, row.cell.threads), {})[row.cell.phase, row.cell.length] = row
        lines = [
            "| config | threads | " + " | ".join(f"{phase} {length}" for phase, length in columns) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        for (config, threads), cells in by_line.items():
            values = (_markdown_cell(cells[column]) if column in cells else "–" for column in columns)
            lines.append(f"| {config} | {threads} | " + " | ".join(values) + " |")
        means = (f"{phase} on {count} {mean:.2f}" for (_, _, phase, count), mean in geometric_means(of).items())
        lines += ["", f"Geometric means: {', '.join(means)}."]
        versions = ", ".join(dict.fromkeys(row.version for row in of))  # more than one: parts taken at different times
        parts.append(f"**{precision} on {device}** ({versions})\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _markdown_cell(row: Row) -> str:
    if row.ratio is None or row.best is None:
        return f"{_ms(row.edgewise_s)} ms, no peer"
    ratios = row.ratios(row.best)
    ratio = f"{row.ratio:.2f}" if row.ratio >= 1 else f"**{row.ratio:.2f}**"
    return f"{ratio} ({min(ratios):.2f} to {max(ratios):.2f}) {row.best}"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.best is None:
        return "no peer"
    ratios = row.ratios(row.best)
    return f"{row.ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _ms(times_s: tuple[float, ...]) -> str:
    return f"{1e3 * statistics.median(times_s):.3g}"
