"""Measures every architecture of the fidelity study on this machine: OUT/latency.json, one after the other, whole after each.

python benchmarks/fidelity_latency.py --out build/fidelity
"""

import argparse
import dataclasses
import json
from pathlib import Path

from fidelity_train import sample

from cost_models.measured import measure_request
from nas.corpus import load_corpus
from nas.evaluation import write_whole
from nas.tokenizer import train_tokenizer
from search_spaces.space import load_space
from search_spaces.workload import Workload
from targets.measurement import Timing
from targets.target import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--corpus", default="sotu", help="whose tokenizers say how many tokens a request has")
    options = parser.parse_args()
    space, corpus, workload = load_space(options.space), load_corpus(options.corpus), Workload()
    target = load_target("local")
    path = options.out / "latency.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for architecture in sample(space):
        if str(architecture.number) in known:
            continue
        vocab = space.requested_vocab(architecture.params_drawn)
        tokenizer = train_tokenizer(corpus, vocab, options.out / corpus.name / "tokenizers" / f"{vocab}.json")
        config = dataclasses.replace(architecture.config, vocab_size=tokenizer.vocab_size)
        tokens = workload.tokens(tokenizer.bytes_per_token)
        found = measure_request(target, config, tokens, workload, seed=0, model=None, precision="fp32", timing=Timing())
        values = found.to_dict()
        values.pop("measurement")
        known[str(architecture.number)] = values
        write_whole(path, json.dumps(known, indent=1) + "\n")
        print(architecture.number, f"{1000 * found.request_s:.2f} ms a request", flush=True)


if __name__ == "__main__":
    main()
