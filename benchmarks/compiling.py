"""What compiling a candidate costs: seconds without and with a cache, and the memory of a large model compiled and measured.

    python benchmarks/compiling.py [--part small] [--part distinct] [--part large] [--warm 5]

Every part starts with an empty cache and workers of its own, and begins once the device has been detected. A time goes from the
config to the artifact on disk. Cold: no stage or kernel has been seen. Warm: all have, by the same workers, and the artifact goes to
a new folder. Memory is the sum of the proportional set sizes (Pss) of this process and all its descendants. Prints a table with
the limits, then JSON.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.references import reference
from search_spaces.workload import Workload, assumed_bytes_per_token
from targets.measurement import Timing
from targets.target import Target, TargetError, load_target

SMALL = SLMConfig(
    vocab_size=2048, d_model=128, num_layers=4, context=512, attention="gqa", num_heads=4, num_kv_heads=2, ffn="gated", ffn_dim=352
)
"""Such as the default search proposes."""
DISTINCT = SLMConfig(
    vocab_size=8192, d_model=768, num_layers=24, context=1024, attention="gqa", head_dim=64, num_kv_heads=2, ffn="gated",
    num_heads=tuple(4 + 2 * (i // 3) for i in range(24)), ffn_dim=tuple(1024 + 64 * i for i in range(24)),
)  # fmt: skip
"""No two layers alike: every one has an FFN of its own width, and there are eight counts of heads."""
LARGE = "qwen2-0.5b"

MOST_COLD_S, MOST_WARM_S, MOST_PEAK_BYTES = 40.0, 1.5, 6_000_000_000
"""What must hold: a cold compile of `DISTINCT` on two cores, a warm one of anything, memory of `LARGE` in float32."""
_SAMPLE_S = 0.1
_TIMING = Timing(repeats=3, min_repeat_s=0.0, warmup_s=0.0, budget_s=1.0, retries=0)
"""The large model is measured for its memory: its times are of no interest here."""


@dataclass(slots=True, kw_only=True)
class Peak:
    """The most memory seen so far.

    Attributes:
        total_bytes: Pss over all processes at that moment.
        processes_bytes: of each of them, the largest first.
        at_s: when, in seconds from the first sample.
        samples: how often it was looked.
        longest_gap_s: the longest time between two looks: a peak that came and went within it may have been missed.
    """

    total_bytes: int = 0
    processes_bytes: tuple[int, ...] = ()
    at_s: float = 0.0
    samples: int = 0
    longest_gap_s: float = 0.0


def family(root: int) -> list[int]:
    """A process and its descendants, by proc(5)."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # The name before may hold blanks and brackets; after its last one come the state and the parent.
                parent = int((folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, ())
    return found


def pss_bytes(process: int) -> int:
    """Memory of a process, pages that several share divided among them (proc(5), smaps_rollup); 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


@contextlib.contextmanager
def watched() -> Iterator[Peak]:
    """Looks at the memory of this process and its descendants ten times a second while the block runs.

    Raises:
        click.ClickException: where the system does not tell.
    """
    root, peak, done, begin = os.getpid(), Peak(), threading.Event(), time.monotonic()
    if not pss_bytes(root):
        raise click.ClickException("this system has no /proc/PID/smaps_rollup, so memory cannot be summed; give --part small or distinct")

    def look() -> None:
        looked, due = begin, begin
        while True:
            now = time.monotonic()
            peak.longest_gap_s, looked = max(peak.longest_gap_s, now - looked), now
            sizes = sorted((pss_bytes(process) for process in family(root)), reverse=True)
            peak.samples += 1
            if sum(sizes) > peak.total_bytes:
                peak.total_bytes, peak.processes_bytes, peak.at_s = sum(sizes), tuple(sizes), now - begin
            due = max(due + _SAMPLE_S, time.monotonic())  # looking at gigabytes may take longer than that
            if done.wait(due - time.monotonic()):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def compile_config(target: Target, config: SLMConfig, folder: Path) -> tuple[float, Path]:
    """Seconds from the config to the artifact of the default request, and the artifact."""
    tokens = Workload().tokens(assumed_bytes_per_token(config.vocab_size))
    begin = time.perf_counter()
    artifact = target.compile(build_program(config, tokens), folder)
    return time.perf_counter() - begin, artifact


def cold_and_warm(config: SLMConfig, target: Target, folder: Path, warm: int) -> dict[str, Any]:
    """A first compile, then some that find everything in the cache."""
    times_s = [compile_config(target, config, folder / str(i))[0] for i in range(1 + warm)]
    return {"params": params(config), "layers": config.num_layers, "cold_s": times_s[0], "warm_s": times_s[1:]}


def large(target: Target, folder: Path) -> dict[str, Any]:
    """The large model, compiled and measured, and the most memory that all processes held meanwhile."""
    config = reference(LARGE)
    tokens = Workload().tokens(assumed_bytes_per_token(config.vocab_size))
    with watched() as peak:
        compile_s, artifact = compile_config(target, config, folder)
        begin = time.perf_counter()
        measurement = target.measure(artifact, make_sample(config, tokens, 0), _TIMING)
        measure_s = time.perf_counter() - begin
    return {
        "params": params(config),
        "layers": config.num_layers,
        "cold_s": compile_s,
        "measure_s": measure_s,
        "packed_bytes": measurement.packed_bytes,
        "peak": dataclasses.asdict(peak),
    }


def summary(device: str, found: dict[str, dict[str, Any]]) -> Table:
    """One row a figure, with its limit and whether it holds."""
    table = Table("what", "seen", "at most", "", title=device)

    def add(what: str, seen: str, value: float | None = None, most: float | None = None, unit: str = "s") -> None:
        broken = value is not None and most is not None and value > most
        verdict = "" if most is None else "breaks" if broken else "holds"
        table.add_row(what, seen, "" if most is None else f"{most:g} {unit}", verdict, style="yellow" if broken else None)

    for part, record in found.items():
        name = f"{part}: {record['layers']} layers, {record['params'] / 1e6:.3g} M parameters"
        add(f"{name}, cold", f"{record['cold_s']:.2f} s", record["cold_s"], MOST_COLD_S if part == "distinct" else None)
        if warm_s := record.get("warm_s"):
            seen = f"{statistics.median(warm_s):.2f} s ({min(warm_s):.2f} to {max(warm_s):.2f})"
            add(f"{name}, warm", seen, statistics.median(warm_s), MOST_WARM_S)
        if peak := record.get("peak"):
            peak_gb = peak["total_bytes"] / 1e9
            add(f"{name}, measured", f"{record['measure_s']:.2f} s")
            seen = f"{peak_gb:.2f} GB ({peak['samples']} looks, at most {peak['longest_gap_s']:.2f} s apart)"
            add(f"{name}, peak of memory", seen, peak_gb, MOST_PEAK_BYTES / 1e9, "GB")
    return table


PARTS = ("small", "distinct", "large")


@click.command()
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="Only this one; may be given again.")
@click.option("--warm", type=click.IntRange(min=0), default=5, show_default=True, help="How often a compiled config is compiled again.")
def main(parts: tuple[str, ...], warm: int) -> None:
    """Measure what compiling costs."""
    run: dict[str, Callable[[Target, Path], dict[str, Any]]] = {
        "small": lambda target, folder: cold_and_warm(SMALL, target, folder, warm),
        "distinct": lambda target, folder: cold_and_warm(DISTINCT, target, folder, warm),
        "large": large,
    }
    found: dict[str, dict[str, Any]] = {}
    spec: dict[str, Any] = {}
    for part in dict.fromkeys(parts):
        with tempfile.TemporaryDirectory(prefix="edgewise-compiling-") as folder:
            target = load_target("local", Path(folder) / "cache")
            try:
                spec = target.spec.to_dict()
                found[part] = run[part](target, Path(folder) / "out")
            except TargetError as error:
                raise click.ClickException(f"{part}: {error}") from None
            finally:
                target.close()
    Console().print(summary(f"{spec['cpu']}, {spec['cores']} cores", found))
    click.echo(json.dumps({"device": spec, **found}, indent=1))


if __name__ == "__main__":
    main()
