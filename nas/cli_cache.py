"""The commands that look at what was compiled, and remove it: cache info, cache clear."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nas.cli_show import cache_dir

if TYPE_CHECKING:
    from targets.compile_cache import Usage


@click.group("cache")
def cache_group() -> None:
    """See or remove what was compiled ($EDGEWISE_CACHE, else ~/.cache/edgewise)."""


@cache_group.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def cache_info(as_json: bool) -> None:
    """Show where compiled stages and kernels are kept, how many, and their size, for each target.

    \b
    Example:
      edgewise cache info
    """
    from targets.compile_cache import MOST_BYTES, usage

    found = usage(cache_dir())
    if as_json:
        entries = [{**e.about, "stages": e.stages, "kernels": e.kernels, "bytes": e.nbytes} for e in found]
        click.echo(json.dumps({"folder": str(cache_dir()), "most_bytes_per_target": MOST_BYTES, "targets": entries}, indent=1))
        return
    if not found:
        click.echo(f"{cache_dir()}: nothing is compiled yet")
        return
    from nas.describe import format_bytes

    click.echo(f"{cache_dir()}: {_counted(found)}; at most about {format_bytes(MOST_BYTES)} are kept for each target")
    for entry in found:
        click.echo(f"  {_target(entry.about)}: {_counted([entry])}")


@cache_group.command("clear")
def cache_clear() -> None:
    """Remove everything that was compiled; it is compiled again when it is needed.

    What was measured of this machine stays. A search that runs meanwhile goes on.

    \b
    Example:
      edgewise cache clear
    """
    from targets.compile_cache import clear

    found = clear(cache_dir())
    click.echo(f"{cache_dir()}: {f'removed {_counted(found)}' if found else 'nothing was compiled, nothing to remove'}")


def _counted(entries: "Sequence[Usage]") -> str:
    from nas.describe import format_bytes

    stages, kernels = sum(e.stages for e in entries), sum(e.kernels for e in entries)
    parts = [f"{n:,} {name}{'' if n == 1 else 's'}" for n, name in ((stages, "stage"), (kernels, "kernel"))]
    return f"{' and '.join(parts)}, {format_bytes(sum(e.nbytes for e in entries))}"


def _target(about: dict[str, Any]) -> str:
    target = about.get("target")
    if not isinstance(target, dict):
        return "unknown target"
    words = [str(target.get(key)) for key in ("mtriple", "mcpu") if target.get(key)]
    words += [" ".join(map(str, target.get("mattr") or []))] if target.get("mattr") else []
    cores = target.get("num-cores")
    return f"{' '.join(words) or 'any processor'}{f', cores: {cores}' if cores else ''} (TVM {about.get('tvm', 'unknown')})"
