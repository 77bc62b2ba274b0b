"""Whether a measured time can be trusted: how far one config's median moves, and whether two passes rank configs alike.

    python benchmarks/timing.py [--minutes 60] [--repeats 10] [--configs 20]

First one config is measured `--repeats` times over `--minutes`, while a search of its own compiles, measures and trains
in another process on this machine. Then `--configs` random ones of a space are measured in two passes, the second in another
order, with nothing of ours running beside. Prints two tables, then JSON. 0 repeats or configs leave a part out.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cost_models.measured import Latency, latency, make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.space import Space, load_space
from search_spaces.workload import RequestTokens, Workload, assumed_bytes_per_token
from targets.measurement import Timing
from targets.target import Target, TargetError, load_target

TIMES = ("prefill_s", "decode_s_per_token", "request_s")
MOST_MOVE, LEAST_TAU = 0.05, 0.97
"""What must hold: the medians of one config within 5 %, and Kendall's tau between two passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A config that is compiled and can be measured again and again."""

    config: SLMConfig
    tokens: RequestTokens
    artifact: Path

    def measure(self, target: Target) -> Latency:
        """As a trial of a search is measured."""
        measurement = target.measure(self.artifact, make_sample(self.config, self.tokens, 0), Timing())
        return latency(measurement, self.config, self.tokens, Workload())


def compiled(target: Target, config: SLMConfig, folder: Path) -> Candidate:
    """Compiles the program of the default request; bytes per token are assumed, as no tokenizer is trained."""
    tokens = Workload().tokens(assumed_bytes_per_token(config.vocab_size))
    return Candidate(config=config, tokens=tokens, artifact=target.compile(build_program(config, tokens), folder))


@contextlib.contextmanager
def another_search(space: str, folder: Path) -> Iterator[Callable[[], int]]:
    """A search in another process, as a user would start it; begun again should it end.

    Yields:
        A function that makes sure that it runs, and says how many trials it has trained so far.
    """
    command = [sys.executable, "-m", "nas", "search", "--space", space, "--trials", "1000", "--run", str(folder / "run")]
    environment = {**os.environ, "EDGEWISE_CACHE": str(folder / "cache")}
    process: subprocess.Popen[bytes] | None = None

    def trained() -> int:
        nonlocal process
        if process is None or process.poll() is not None:
            with (folder / "output").open("ab") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        with contextlib.suppress(OSError):
            lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            return sum(entry["step"] == "train" and entry["event"] == "done" for entry in map(json.loads, lines))
        return 0

    try:
        yield trained
    finally:
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def repeated(target: Target, space: Space, repeats: int, minutes: float, folder: Path) -> dict[str, Any]:
    """One config, measured again and again while another search runs."""
    params_drawn = space.start(len(space.starts) // 2) or space.draw(random.Random(0))
    candidate = compiled(target, space.config(params_drawn), folder / "program")
    rows = []
    with another_search(space.name, folder) as trained:
        trained()
        begin = time.monotonic()
        for i in range(repeats):
            due = begin + 60 * minutes * i / max(1, repeats - 1)
            while (left := due - time.monotonic()) > 0:
                time.sleep(min(left, 5.0))
                trained()
            asked = time.monotonic()
            found = candidate.measure(target)
            rows.append(
                {
                    "at_s": asked - begin,
                    "took_s": time.monotonic() - asked,
                    **{name: getattr(found, name) for name in TIMES},
                    "slowdown": found.measurement.slowdown,
                    "attempts": found.measurement.attempts,
                    "noisy": list(found.measurement.noisy),
                    "other_trials": trained(),
                }
            )
    values = {name: [row[name] for row in rows] for name in TIMES}
    return {
        "config": candidate.config.to_dict(),
        "rows": rows,
        "largest_deviation": {name: max(abs(v / statistics.median(vs) - 1) for v in vs) for name, vs in values.items()},
        "range": {name: max(vs) / min(vs) - 1 for name, vs in values.items()},
    }


def ranked(target: Target, space: Space, configs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Random configs, measured in two passes."""
    from scipy.stats import kendalltau

    rng = random.Random(seed)
    drawn: dict[str, SLMConfig] = {}
    least, most = space.params_range or (0, sys.maxsize)
    while len(drawn) < configs:
        config = space.config(space.draw(rng))
        if least <= params(config) <= most:
            drawn.setdefault(config.key, config)
    candidates: dict[str, Candidate] = {}
    passes: list[dict[str, Latency]] = [{}, {}]
    failed: dict[str, str] = {}
    for key, config in drawn.items():
        try:
            candidates[key] = compiled(target, config, folder / key)
        except TargetError as error:
            failed[key] = str(error)
    for taken in passes:
        for key in rng.sample(sorted(candidates), len(candidates)):
            try:
                taken[key] = candidates[key].measure(target)
            except TargetError as error:
                failed[key] = str(error)
                del candidates[key]
    rows: list[dict[str, Any]] = [
        {"params": params(candidate.config), **{name: [getattr(taken[key], name) for taken in passes] for name in TIMES}}
        for key, candidate in candidates.items()
    ]
    return {
        "rows": rows,
        "failed": failed,
        "kendall_tau": {name: float(kendalltau(*zip(*(row[name] for row in rows), strict=True)).statistic) for name in TIMES},
        "median_move": {name: statistics.median(abs(b / a - 1) for a, b in (row[name] for row in rows)) for name in TIMES},
    }


def repeated_table(found: dict[str, Any]) -> Table:
    """One row a measurement, the verdict below."""
    table = Table("at min", "prefill ms", "decode ms", "request ms", "slowdown", "tries", "took s", "other trials")
    for row in found["rows"]:
        times = [f"{1e3 * row[name]:.4g}" for name in TIMES]
        rest = [f"{row['slowdown']:.2f}", str(row["attempts"]), f"{row['took_s']:.1f}", str(row["other_trials"])]
        table.add_row(f"{row['at_s'] / 60:.1f}", *times, *rest)
    table.add_row("largest move", *(f"{found['largest_deviation'][name]:.1%}" for name in TIMES))
    table.add_row("largest / least", *(f"{1 + found['range'][name]:.3f}" for name in TIMES))
    worst = max(found["largest_deviation"].values())
    table.caption = f"medians move by at most {worst:.1%} ({'holds' if worst < MOST_MOVE else 'breaks'} {MOST_MOVE:.0%})"
    return table


def ranked_table(found: dict[str, Any]) -> Table:
    """One row a config, the verdict below."""
    table = Table("parameters", "prefill ms", "decode ms", "request ms")
    for row in sorted(found["rows"], key=lambda row: float(row["request_s"][0])):
        table.add_row(f"{row['params']:,}", *(" / ".join(f"{1e3 * v:.4g}" for v in row[name]) for name in TIMES))
    table.add_row("Kendall's tau", *(f"{found['kendall_tau'][name]:.3f}" for name in TIMES))
    table.add_row("median move", *(f"{found['median_move'][name]:.1%}" for name in TIMES))
    tau = found["kendall_tau"]["request_s"]
    for key, reason in found["failed"].items():
        table.add_row("failed", key, reason)
    table.caption = f"two passes rank requests with tau {tau:.3f} ({'holds' if tau >= LEAST_TAU else 'breaks'} {LEAST_TAU})"
    return table


@click.command()
@click.option("--repeats", default=10, show_default=True, help="How often the one config is measured; 0: not at all.")
@click.option("--minutes", default=60.0, show_default=True, help="Over how long.")
@click.option("--configs", default=20, show_default=True, help="How many random configs are ranked; 0: none.")
@click.option("--space", default="tiny", show_default=True, help="The space that they are drawn from.")
@click.option("--seed", default=0, show_default=True, help="Of the random configs.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where compiled kernels are kept; left out: nowhere.")
def main(repeats: int, minutes: float, configs: int, space: str, seed: int, cache: Path | None) -> None:
    """Measure how steady measured times are."""
    loaded = load_space(space)
    console = Console()
    record: dict[str, Any] = {"space": space, "minutes": minutes, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="edgewise-timing-") as name:
        folder = Path(name)
        target = load_target("local", cache or folder / "own")
        try:
            record["device"] = target.spec.to_dict()
            if repeats:
                record["repeated"] = repeated(target, loaded, repeats, minutes, folder)
                console.print(repeated_table(record["repeated"]))
            if configs:
                record["ranked"] = ranked(target, loaded, configs, seed, folder)
                console.print(ranked_table(record["ranked"]))
        finally:
            target.close()
    click.echo(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
