"""How the command line shows rows of facts, and where it keeps what is compiled."""

import os
from collections.abc import Sequence
from pathlib import Path

import click


def cache_dir() -> Path:
    """Where compiled programs and what was detected of devices are kept: $EDGEWISE_CACHE, else the user's cache."""
    given = os.environ.get("EDGEWISE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgewise"


def words(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def table(rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to line up: the first to the left, figures to the right, the last one free."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    figures = len(widths) > 2
    for row in rows:
        cells = [cell.rjust(widths[i]) if figures and i > 0 else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        click.echo("  ".join(cells).rstrip())


def say(text: str) -> None:
    """A line for people on stderr, which leaves stdout to results."""
    click.echo(text, err=True)
