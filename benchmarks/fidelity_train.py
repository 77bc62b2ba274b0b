"""The trainings of the fidelity study: architectures that span a space, each scored at several budgets. Read by fidelity.py.

    python benchmarks/fidelity_train.py --out build/fidelity --corpus sotu --worker 0/2

One file per training (OUT/CORPUS/VARIANT/NNN-SEED.json), written whole; what is there is not done again, so that a study can be
ended at any moment and gone on with, by several processes at once (--worker K/N). Seconds are those of the process (CPU time of
one thread), as the machine may have other work; while something of ours is measured, training rests.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas import scoring, training_step
from nas.corpus import Corpus, load_corpus
from nas.evaluation import write_whole
from nas.passages import PASSAGE_BYTES
from nas.tokenizer import train_tokenizer
from nas.training import Budget, ShortTraining, evaluate
from search_spaces.config import SLMConfig
from search_spaces.counting import count, prefill_flops
from search_spaces.space import Space, load_space
from search_spaces.twin import body_params, twin
from search_spaces.workload import assumed_bytes_per_token
from targets.quiet import working

KB = 1024
BANDS = (150_000, 300_000, 550_000, 900_000, 1_400_000)
"""Parameters in the middle of each band of +-10 %."""
PER_BAND = 8
RUNGS = (64 * KB, 256 * KB, 1024 * KB, 4096 * KB)
SAMPLE_SEED = 7
MOST_FLOPS_PER_BYTE = 2_200_000
"""Of training. Two fifths of random draws of tiny cost more (wide, deep, shared, small vocabularies): with them the study would take
twice as long."""
VARIANTS = ("protocol", "one-rate", "width-only", "twin")
"""Ours; the same rate for every size; a rate that falls with the width and not with the depth; a twin whose body is a quarter."""
TWIN_SHARE = 4
ABLATED_BYTES = 256 * KB
"""At this rung it is also scored without context, and without the decay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of the sample.

    Attributes:
        number: its place in the sample.
        params_drawn: as the space names them.
        config: with the vocabulary that was asked for.
    """

    number: int
    params_drawn: dict[str, Any]
    config: SLMConfig


def sample(space: Space) -> list[Architecture]:
    """The space's starts, then `PER_BAND` random draws in each band of sizes, so that every band is filled evenly from the first on."""
    rng = random.Random(SAMPLE_SEED)
    starts = [dict(start) for i in range(len(space.starts)) if (start := space.start(i)) is not None]
    bands: list[list[dict[str, Any]]] = [[] for _ in BANDS]
    seen = set()
    while any(len(band) < PER_BAND for band in bands):
        drawn = space.draw(rng)
        config = space.config(drawn)
        size = count(config).params
        if training_flops_per_byte(config) > MOST_FLOPS_PER_BYTE:
            continue
        for band, middle in zip(bands, BANDS, strict=True):
            if 0.9 * middle <= size <= 1.1 * middle and len(band) < PER_BAND and config.key not in seen:
                band.append(drawn)
                seen.add(config.key)
    rows = [band[i] for i in range(PER_BAND) for band in bands]
    return [Architecture(number=i, params_drawn=p, config=space.config(p)) for i, p in enumerate([*rows, *starts])]


def training_flops_per_byte(config: SLMConfig) -> float:
    """FLOPs to train on a byte of text: three times those of a forward pass over a passage."""
    tokens = round(PASSAGE_BYTES / assumed_bytes_per_token(config.vocab_size))
    return 3 * prefill_flops(config, tokens, every_logit=True) / PASSAGE_BYTES


def facts(architecture: Architecture, config: SLMConfig) -> dict[str, Any]:
    """What is known without training: the baselines."""
    counts = count(config)
    return {
        "number": architecture.number,
        "params_drawn": dict(architecture.params_drawn),
        "config": config.to_dict(),
        "params": counts.params,
        "non_embedding_params": body_params(config),
        "flops_per_token": counts.flops_per_token,
        "training_flops_per_byte": training_flops_per_byte(config),
    }


def train_one(
    architecture: Architecture, space: Space, corpus: Corpus, out: Path, variant: str, seed: int, rungs: Sequence[int]
) -> dict[str, Any]:
    """Trains and scores at each rung."""
    vocab = space.requested_vocab(architecture.params_drawn)
    tokenizer = train_tokenizer(corpus, vocab, out / corpus.name / "tokenizers" / f"{vocab}.json")
    config = dataclasses.replace(architecture.config, vocab_size=tokenizer.vocab_size)
    values = {**facts(architecture, config), "bytes_per_token": tokenizer.bytes_per_token, "variant": variant, "seed": seed}
    trained = config
    if variant == "twin":
        trained = twin(config, body_params(config) // TWIN_SHARE)
        values["twin"] = trained.to_dict()
    short = ShortTraining(trained, corpus, tokenizer, Budget(train_bytes=rungs[-1]), seed, device="cpu", threads=1)
    found = []
    for rung in rungs:
        began = time.process_time()
        model, score = short.to(rung)
        row = {**score.to_dict(), "rung_bytes": rung, "cpu_s": time.process_time() - began}
        if variant == "protocol" and rung == ABLATED_BYTES:
            text, window = corpus.validation, score.window_tokens
            row["no_decay_bpb"], _ = evaluate(short.trunk, tokenizer, text, window)
            with_overlap, scoring.OVERLAP = scoring.OVERLAP, 0.0
            row["no_overlap_bpb"], _ = evaluate(model, tokenizer, text, window)
            scoring.OVERLAP = with_overlap
        del model
        found.append(row)
    return {**values, "rungs": found, "cpu_s": sum(row["cpu_s"] for row in found)}


def one_rate(config: SLMConfig, rate: float, other_rate: float) -> tuple[float, float]:
    """In place of `peak_rates`: what is right at width 128 and 4 layers for every size."""
    return rate, other_rate


def width_only(config: SLMConfig, rate: float, other_rate: float) -> tuple[float, float]:
    """In place of `peak_rates`: muP's rule for matrices, and nothing for depth."""
    return rate * training_step.REFERENCE_WIDTH / config.d_model, other_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--corpus", default="sotu", help="as edgewise search takes it")
    parser.add_argument("--variant", default="protocol", choices=VARIANTS)
    parser.add_argument("--rungs", default=",".join(str(r // KB) for r in RUNGS), help="KB of text")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--numbers", help="architectures, as in 0-9,40; all")
    parser.add_argument("--worker", default="0/1", help="K/N: every Nth training from the Kth on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    space, corpus = load_space(options.space), load_corpus(options.corpus)
    rungs = [int(r) * KB for r in options.rungs.split(",")]
    place, workers = map(int, options.worker.split("/"))
    if options.variant in ("one-rate", "width-only"):
        training_step.peak_rates = one_rate if options.variant == "one-rate" else width_only
    jobs = [(a, int(seed)) for seed in options.seeds.split(",") for a in sample(space) if wanted(a.number, options.numbers)]
    folder = options.out / corpus.name / options.variant
    for architecture, seed in jobs[place::workers]:
        path = folder / f"{architecture.number:03d}-{seed}.json"
        if path.exists():
            continue
        with working():
            values = train_one(architecture, space, corpus, options.out, options.variant, seed, rungs)
        write_whole(path, json.dumps(values, indent=1) + "\n")
        scores = " ".join(f"{row['val_bpb'] or float('nan'):.4f}" for row in values["rungs"])
        print(f"{path} params={values['params']} cpu_s={values['cpu_s']:.1f} bpb={scores}", flush=True)


def wanted(number: int, numbers: str | None) -> bool:
    """Whether a list such as 0-9,40 has the number."""
    if numbers is None:
        return True
    spans = [part.split("-") for part in numbers.split(",")]
    return any(int(span[0]) <= number <= int(span[-1]) for span in spans)


if __name__ == "__main__":
    main()
