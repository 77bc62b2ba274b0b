"""How the compiled model compares with the runtimes people would pick, on the same weights, threads and machine.

    python benchmarks/engine.py [--quick] [--config NAME] [--peer NAME] [--phase PHASE] [--length N] [--threads N]

Every side runs in processes of its own, the rounds are interleaved, and each side's logits are compared with PyTorch's before
it is timed. Peers are stopped (SIGSTOP) but for the one that is timed; our own workers are not stopped while a peer is timed, but
sleep, waiting for their next question. Searches of this user on this machine rest meanwhile, whoever is timed. A cell is the median
over rounds of the ratio best peer / ours (above 1: ours is faster) with its smallest and largest value. Results gather in a file, so
that a long comparison can be taken in parts; a cell timed again on the same device replaces the old one. Weights, inputs and exports
are kept, too, in folders named by what they were made from.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cells import CONFIGS, DECODE_CONTEXTS, PRECISIONS, PREFILL_TOKENS, Cell, PeerJob
from engine_inputs import SEED, inputs_folder, inputs_path, weights_path, write_inputs
from engine_peers import PEERS
from engine_report import Row, geometric_means, markdown, read_rows, tables, write_rows
from peer_process import PeerError, PeerProcess

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.precision import Precision
from targets.local import LocalTarget
from targets.measurement import Timing
from targets.program import Sample
from targets.quiet import measuring
from targets.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
QUANTISED = "llama.cpp"
"""The peer of every precision but fp32, which is compared with all the others."""
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.1, "int4": 0.1}
"""Largest error of a peer's logits relative to the largest of PyTorch's on the same rounded weights (llama.cpp rounds activations)."""
_LOAD_TIMEOUT_S, _TIME_TIMEOUT_S = 1800.0, 600.0

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A cell's compiled program, and a sample that times this cell's function alone."""

    target: LocalTarget
    artifact: Path
    sample: Sample

    def median_s(self, phase: str, timing: Timing) -> float:
        """Checks, then times, as a search does."""
        return self.target.measure(self.artifact, self.sample, timing).median_s(phase)


class Peers:
    """The chosen peers' processes, one for each thread count, started when first asked for."""

    def __init__(self, python: Path, names: tuple[str, ...], work: Path) -> None:
        self._python, self._names, self._work = python, names, work
        self._running: dict[tuple[str, int], PeerProcess] = {}
        self._missing: dict[str, str] = {}

    def load(self, cell: Cell) -> tuple[dict[str, PeerProcess], dict[str, str]]:
        """The peers that run this cell's model rightly, and why the others do not."""
        loaded, left_out = {}, {}
        for peer in self._names:
            if (peer == QUANTISED) != (cell.precision != "fp32"):
                continue
            try:
                loaded[peer] = self._load(peer, cell)
            except PeerError as error:
                left_out[peer] = str(error)
                console.print(f"{cell}: {peer} is left out: {error}", style="yellow", markup=False)
        return loaded, left_out

    def _load(self, peer: str, cell: Cell) -> PeerProcess:
        if peer in self._missing:
            raise PeerError(self._missing[peer])
        folder = inputs_folder(self._work, cell.config)
        job = PeerJob(
            cell=cell,
            config=CONFIGS[cell.config].to_dict(),
            weights=str(weights_path(folder)),
            inputs=str(inputs_path(folder, cell)),
            folder=str(folder),
        )
        process = self._running.get((peer, cell.threads))
        try:
            if process is None:
                process = self._running[peer, cell.threads] = PeerProcess(self._python, peer, cell.threads)
            error = process.ask("load", dataclasses.asdict(job), _LOAD_TIMEOUT_S)
        except PeerError as reason:
            self.drop(peer, cell.threads)
            if "ModuleNotFoundError" in str(reason) or "does not start" in str(reason):
                self._missing[peer] = f"{reason}; run `make bench`, or give --peers-python"
                raise PeerError(self._missing[peer]) from None
            raise
        if not error <= TOLERANCE[cell.precision]:
            raise PeerError(f"its logits differ from PyTorch's by {error:.2g} of the largest (limit {TOLERANCE[cell.precision]:g})")
        return process

    def drop(self, peer: str, threads: int) -> None:
        """Ends a process; it is started again when next asked for."""
        process = self._running.pop((peer, threads), None)
        if process is not None:
            process.close()

    def close(self) -> None:
        """Ends every process."""
        for peer, threads in list(self._running):
            self.drop(peer, threads)


def load_ours(cell: Cell, target: LocalTarget, folder: Path) -> Ours:
    """Compiles a cell's program and writes its sample once, however many rounds read it."""
    config, request = CONFIGS[cell.config], cell.request
    precision: Precision = cell.precision  # type: ignore[assignment]
    artifact = target.compile(build_program(config, request, precision), folder / "artifact")
    sample, path = make_sample(config, request, SEED, precision=precision), folder / "sample.safetensors"
    sample.write(path)
    timed = {str(cell.phase): sample.timed[cell.phase]}
    return Ours(target=target, artifact=artifact, sample=dataclasses.replace(sample, timed=timed, write=lambda to: os.link(path, to)))


def load_cell(
    cell: Cell, target: LocalTarget, peers: Peers, work: Path, folder: Path
) -> tuple[Ours, dict[str, PeerProcess], dict[str, str]]:
    """Everything of a cell up to the timing."""
    write_inputs(cell, inputs_folder(work, cell.config))
    return load_ours(cell, target, folder), *peers.load(cell)


def take_round(cell: Cell, ours: Ours, peers: dict[str, PeerProcess], timing: Timing, backwards: bool) -> dict[str, float]:
    """Median seconds of each side, ours under "": one after the other, in turning order so that a drift favours none."""
    taken = {}
    for side in sorted(("", *peers), reverse=backwards):
        if side == "":
            taken[side] = ours.median_s(cell.phase, timing)
        else:
            with measuring():
                times = sorted(peers[side].ask("time", dataclasses.asdict(timing), _TIME_TIMEOUT_S))
            taken[side] = times[len(times) // 2]
    return taken


def compare(cell: Cell, target: LocalTarget, peers: Peers, work: Path, timing: Timing, rounds: int) -> Row:
    """A cell, from compiling to the last round."""
    # A new folder for each: a library that is loaded from a path seen before is the one loaded then.
    with tempfile.TemporaryDirectory(dir=work) as folder:
        ours, processes, left_out = load_cell(cell, target, peers, work, Path(folder))
        taken = [take_round(cell, ours, processes, timing, backwards=number % 2 == 1) for number in range(rounds)]
    return Row(
        cell=cell,
        edgewise_s=tuple(times[""] for times in taken),
        peers_s={peer: tuple(times[peer] for times in taken) for peer in processes},
        device=f"{target.spec.cpu}, {len(os.sched_getaffinity(0))} cores",
        version=version(),
        left_out=left_out,
    )


def version() -> str:
    """The commit that was timed, with "-dirty" where files differed from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _names(values: tuple[str, ...]) -> click.Choice[str]:
    return click.Choice(values, case_sensitive=False)


@click.command()
@click.option("--config", "configs", type=_names(tuple(CONFIGS)), multiple=True, help="Only this one; may be given again.")
@click.option("--peer", "names", type=_names(tuple(PEERS)), multiple=True, help="Only this one; may be given again.")
@click.option("--phase", "phases", type=_names(("prefill", "decode")), multiple=True, help="Only this one.")
@click.option("--length", "lengths", type=int, multiple=True, help="Only prefills of N tokens and decodes at N cached rows.")
@click.option("--threads", type=int, multiple=True, help="Threads of either side; may be given again.  [default: 1 and all]")
@click.option("--precision", "precisions", type=_names(PRECISIONS), multiple=True, default=("fp32",), show_default=True)
@click.option("--rounds", default=5, show_default=True, help="How often all sides are timed in turn.")
@click.option("--repeats", default=5, show_default=True, help="Times taken of a side in a round, of which the median counts.")
@click.option("--quick", is_flag=True, help="The two smallest configs, one prefill and one decode, two rounds.")
@click.option("--peers-python", type=click.Path(path_type=Path), default=ROOT / "build/peers/bin/python", help="The peers' Python.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "build/bench", help="Where exports, kernels and results lie.")
@click.option("--prepare", is_flag=True, help="Export, compile and check, and time nothing: the next call finds it done.")
@click.option("--show", is_flag=True, help="Time nothing; show the results gathered so far.")
def main(
    configs: tuple[str, ...], names: tuple[str, ...], phases: tuple[str, ...], lengths: tuple[int, ...], threads: tuple[int, ...],
    precisions: tuple[str, ...], rounds: int, repeats: int, quick: bool, peers_python: Path, work: Path, prepare: bool, show: bool,
) -> None:  # fmt: skip
    """Compare compiled models with other runtimes; results are in WORK/engine.json and WORK/engine.md."""
    if quick:
        configs, lengths, rounds = configs or tuple(CONFIGS)[:2], lengths or (128,), 2
    every = tuple(
        Cell(config=config, precision=precision, threads=count, phase=phase, length=length)  # type: ignore[arg-type]
        for config in configs or CONFIGS
        for precision in precisions
        for count in threads or sorted({1, len(os.sched_getaffinity(0))})
        for phase, all_lengths in (("prefill", PREFILL_TOKENS), ("decode", DECODE_CONTEXTS))
        for length in all_lengths
        if phase in (phases or (phase,)) and length in (lengths or (length,))
    )
    timing = Timing(repeats=repeats, min_repeat_s=0.05, warmup_s=0.1, budget_s=1.0, timeout_s=_TIME_TIMEOUT_S, retries=0)
    work.mkdir(parents=True, exist_ok=True)
    rows = read_rows(work / "engine.json")
    with ExitStack() as stack:
        peers = stack.enter_context(closing(Peers(peers_python, names or tuple(PEERS), work)))
        targets: dict[int, LocalTarget] = {}
        for number, cell in enumerate(() if show else every):
            if cell.threads not in targets:
                spec = dataclasses.replace(load_spec("local"), cores=cell.threads)
                targets[cell.threads] = stack.enter_context(closing(LocalTarget(spec, work / "cache")))
            row = compare(cell, targets[cell.threads], peers, work, timing, 0 if prepare else rounds)
            if prepare:
                console.print(f"[{number + 1}/{len(every)}] {cell}: prepared", markup=False, highlight=False)
                continue
            rows[row.device, cell] = row
            write_rows(work / "engine.json", rows)
            console.print(f"[{number + 1}/{len(every)}] {row}", markup=False, highlight=False)
    for table in tables(rows.values()):
        console.print(table)
    for (device, precision, phase, count), mean in geometric_means(rows.values()).items():
        console.print(f"{device}: {precision} {phase} on {count}: {mean:.2f} times the best peer (geometric mean)", markup=False)
    (work / "engine.md").write_text(markdown(rows.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
