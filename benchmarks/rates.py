"""Whether the rules of short training suit every size: sweeps of rate, initial scale and weight decay over a space's extremes.

    python benchmarks/rates.py --out build/rates --what rate --seeds 0,1,2 --worker 0/2
    python benchmarks/rates.py --out build/rates --what rate --report

Each model trains at several multiples of what the rule gives it (`nas.training_step.peak_rates`, `SLM.initialise`), from several seeds,
whose mean counts. The optimum of a model is where a parabola in the logarithm of the multiple, through the best one and its
neighbours, is lowest, beside it the lowest and the highest that the means without one of the seeds have; the rule holds if the optima
of all models lie within a factor of 2. Prints a table and, with --json, writes the figures.
"""

import argparse
import json
import math
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch

from nas import training_step
from nas.corpus import load_corpus
from nas.evaluation import write_whole
from nas.tokenizer import train_tokenizer
from nas.training import MATRIX_RATE, Budget, train
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.model import SLM
from targets.quiet import working

KB = 1024
MULTIPLES = {"rate": (0.25, 0.5, 1.0, 2.0, 4.0), "init": (0.5, 1.0, 2.0), "decay": (0.0, 1.0, 4.0)}
_PLAIN = {"head_dim": 16, "context": 1024, "tie_embeddings": True}


def _model(d_model: int, num_layers: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    heads = d_model // 16
    ffn_dim = round(2.5 * d_model / 16) * 16
    return {
        "d_model": d_model,
        "num_layers": num_layers,
        "vocab_size": vocab_size,
        "num_heads": heads,
        "ffn_dim": ffn_dim,
        **_PLAIN,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "narrow, shallow": _model(48, 2, 1024),
    "narrow, deep": _model(48, 6, 1024),
    "wide, shallow": _model(192, 2, 1024),
    "wide, deep": _model(192, 6, 1024),
    "wide, deep, shared": _model(192, 6, 1024, sharing="cycle", num_unique_layers=2),
    "smallest vocabulary": _model(96, 4, 512),
    "largest vocabulary": _model(96, 4, 4096),
    "untied": _model(96, 4, 2048, tie_embeddings=False),
    "MLA, parallel, layernorm": _model(96, 4, 1024, attention="mla", kv_rank=24, rotary_dim=8, block="parallel", norm="layernorm"),
}


def optimum(losses: dict[float, float]) -> float:
    """The multiple where the parabola through the best one and its neighbours, in log2, is lowest; an end of the sweep as it is."""
    multiples = sorted(losses)
    best = min(range(len(multiples)), key=lambda i: losses[multiples[i]])
    if best in (0, len(multiples) - 1) or not all(math.isfinite(losses[multiples[best + i]]) for i in (-1, 1)):
        return multiples[best]
    x = [math.log2(multiples[best + i]) for i in (-1, 0, 1)]
    y = [losses[multiples[best + i]] for i in (-1, 0, 1)]
    step = x[1] - x[0]
    return float(2 ** (x[1] + 0.5 * step * (y[0] - y[2]) / (y[0] - 2 * y[1] + y[2])))


def change(what: str, multiple: float) -> None:
    """Has trainings from now on begin with matrices of another scale, or decay otherwise."""
    initialise = SLM.initialise
    if what == "decay":
        training_step.WEIGHT_DECAY *= multiple
    elif what == "init":

        def scaled(model: SLM, seed: int) -> SLM:
            initialise(model, seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim >= 2 and not name.startswith(("embed.", "head.")) and not name.endswith((".scale", ".shift")):
                        parameter *= multiple
            return model

        SLM.initialise = scaled  # type: ignore[method-assign]


def sweep(out: Path, corpus_name: str, train_bytes: int, what: str, seeds: list[int], place: int, workers: int) -> None:
    """Trains what is not there yet, each in a process of its own, as some change what all later ones would do."""
    jobs = [(name, multiple, seed) for seed in seeds for multiple in MULTIPLES[what] for name in MODELS]
    for name, multiple, seed in jobs[place::workers]:
        path = out / what / corpus_name / str(train_bytes) / f"{name.replace(' ', '-').replace(',', '')}-{multiple}-{seed}.json"
        if not path.exists():
            job = (path, out, corpus_name, train_bytes, what, name, multiple, seed)
            child = multiprocessing.get_context("spawn").Process(target=train_one, args=job)
            child.start()
            child.join()


def train_one(path: Path, out: Path, corpus_name: str, train_bytes: int, what: str, name: str, multiple: float, seed: int) -> None:
    """Trains a model at a multiple and writes its score."""
    torch.set_num_threads(1)
    corpus = load_corpus(corpus_name)
    change(what, multiple)
    values = MODELS[name]
    tokenizer = train_tokenizer(corpus, values["vocab_size"], out / "tokenizers" / corpus.name / f"{values['vocab_size']}.json")
    config = SLMConfig.from_dict({**values, "vocab_size": tokenizer.vocab_size})
    budget = Budget(train_bytes=train_bytes, learning_rate=(multiple if what == "rate" else 1.0) * MATRIX_RATE)
    with working():
        _, score = train(config, corpus, tokenizer, budget, seed=seed, device="cpu", threads=1)
    found = {"model": name, "multiple": multiple, "seed": seed, "params": params(config), "score": score.to_dict()}
    write_whole(path, json.dumps(found) + "\n")
    print(what, name, multiple, seed, score.val_bpb, flush=True)


def report(out: Path, corpus_name: str, train_bytes: int, what: str, json_path: Path | None) -> None:
    """Prints the table of what is there: means over the seeds that a model has at all of its multiples."""
    scores: dict[str, dict[int, dict[float, float]]] = {name: {} for name in MODELS}
    for path in sorted((out / what / corpus_name / str(train_bytes)).glob("*.json")):
        found = json.loads(path.read_text())
        scores[found["model"]].setdefault(found["seed"], {})[found["multiple"]] = found["score"]["val_bpb"] or math.inf
    print(
        "| model | seeds | "
        + " | ".join(f"x {m:g}" for m in MULTIPLES[what])
        + " | optimum |\n|---|---|"
        + "---|" * (len(MULTIPLES[what]) + 1)
    )
    rows, optima = {}, {}
    for name, of_seeds in scores.items():
        whole = [losses for losses in of_seeds.values() if len(losses) == len(MULTIPLES[what])]
        if not whole:
            continue
        rows[name], optima[name] = means(whole), optimum_of(whole, what)
        cells = " | ".join(f"{rows[name][m]:.4f}" for m in MULTIPLES[what])
        without = sorted(optimum_of(whole[:i] + whole[i + 1 :], what) for i in range(len(whole))) if len(whole) > 1 else []
        span = f" ({without[0]:.2f} to {without[-1]:.2f})" if without else ""
        print(f"| {name} | {len(whole)} | {cells} | x {optima[name]:.2f}{span} |")
    spread = max(optima.values()) / min(optima.values()) if optima and all(optima.values()) else math.inf
    print(f"\nlargest optimum / smallest optimum: {spread:.2f}")
    if json_path is not None:
        figures = {"what": what, "train_bytes": train_bytes, "losses": {k: {str(m): v for m, v in r.items()} for k, r in rows.items()}}
        write_whole(json_path, json.dumps({**figures, "optima": optima, "spread": spread}, indent=1) + "\n")


def means(of_seeds: list[dict[float, float]]) -> dict[float, float]:
    """By multiple, over seeds."""
    return {multiple: statistics.fmean(losses[multiple] for losses in of_seeds) for multiple in of_seeds[0]}


def optimum_of(of_seeds: list[dict[float, float]], what: str) -> float:
    """The optimum of the means; of decays, which go down to none, the best multiple itself."""
    losses = means(of_seeds)
    return min(losses, key=losses.__getitem__) if what == "decay" else optimum(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/rates"))
    parser.add_argument("--what", choices=tuple(MULTIPLES), default="rate")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--kb", type=int, default=256, help="KB of text")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--worker", default="0/1", help="K/N: every Nth training from the Kth on")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--json", type=Path, dest="json_path")
    options = parser.parse_args()
    if options.report:
        report(options.out, options.corpus, options.kb * KB, options.what, options.json_path)
        return
    place, workers = map(int, options.worker.split("/"))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    sweep(options.out, options.corpus, options.kb * KB, options.what, seeds, place, workers)


if __name__ == "__main__":
    main()
