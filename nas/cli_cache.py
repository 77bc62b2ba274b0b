"""The commands that look at what was compiled and fetched, and remove it: cache info, cache clear."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nas.cli_show import cache_dir

if TYPE_CHECKING:
    from targets.compile_cache import Usage


@click.group("cache")
def cache_group() -> None:
    """See or remove what was compiled and fetched ($EDGEWISE_CACHE, else ~/.cache/edgewise)."""


@cache_group.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def cache_info(as_json: bool) -> None:
    """Show where compiled stages and kernels are kept, how many, and their size, for each target; also datasets' text.

    \b
    Example:
      edgewise cache info
    """
    from nas.corpus_hub import kept_files
    from targets.compile_cache import MOST_BYTES, usage

    found, texts = usage(cache_dir()), kept_files(cache_dir())
    if as_json:
        entries = [{**e.about, "stages": e.stages, "kernels": e.kernels, "bytes": e.nbytes} for e in found]
        kept = [{"file": str(path), "bytes": path.stat().st_size} for path in texts]
        figures = {"folder": str(cache_dir()), "most_bytes_per_target": MOST_BYTES, "targets": entries, "texts": kept}
        click.echo(json.dumps(figures, indent=1))
        return
    from nas.describe import format_bytes

    if found:
        click.echo(f"{cache_dir()}: {_counted(found)}; at most about {format_bytes(MOST_BYTES)} are kept for each target")
    else:
        click.echo(f"{cache_dir()}: nothing is compiled yet")
    for entry in found:
        click.echo(f"  {_target(entry.about)}: {_counted([entry])}")
    if texts:
        click.echo(f"{texts[0].parent}: the text of {_texts(texts)}")


@cache_group.command("clear")
@click.option("--text", "with_text", is_flag=True, help="Also the text of datasets, without which their runs need the network again.")
def cache_clear(with_text: bool) -> None:
    """Remove everything that was compiled; it is compiled again when it is needed.

    What was measured of this machine stays, and the text of datasets without --text. A search that runs meanwhile goes on.

    \b
    Examples:
      edgewise cache clear
      edgewise cache clear --text
    """
    from nas.corpus_hub import kept_files
    from targets.compile_cache import clear

    found = clear(cache_dir())
    click.echo(f"{cache_dir()}: {f'removed {_counted(found)}' if found else 'nothing was compiled, nothing to remove'}")
    texts = kept_files(cache_dir()) if with_text else []
    if texts:
        removed = _texts(texts)
        for path in texts:
            path.unlink(missing_ok=True)
        click.echo(f"{texts[0].parent}: removed the text of {removed}")


def _texts(paths: Sequence[Path]) -> str:
    from nas.describe import format_bytes

    return f"{len(paths):,} dataset{'s' * (len(paths) != 1)}, {format_bytes(sum(path.stat().st_size for path in paths))}"


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
