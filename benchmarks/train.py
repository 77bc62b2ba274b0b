"""Tokens a second of our training step beside a plain loop's and litgpt's, step by step in turn on the same batches.

    python benchmarks/train.py --models gpt2-14m,llama-13m --json train.json
    python benchmarks/train.py --models search-64,search-128,search-192 --loops edgewise,plain --threads 1 --clock cpu --steps 8

Models named search-* are of the size that a search trains, on a window a step (about 1 KB of text); the others are for
`edgewise train`. Every round trains some steps with each, in an order that changes; a ratio compares two loops' times of one
round. The table has the median ratio and the range of the middle half. `--clock cpu` takes the processor's time of one thread,
for a machine on which other programs run. litgpt is left out, and said so, where it is not installed (train-peers.txt).
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_peers import Step, litgpt_loop, plain_loop

from nas.token_file import Windows
from nas.training_kernels import keep_memory
from nas.training_step import MATRIX_RATE, Learner
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

# As `edgewise train` has it, here for all: threads that spin would disturb the process whose turn it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_GPT2 = {
    **{"positions": "learned", "norm": "layernorm", "ffn": "standard", "activation": "gelu_tanh"},
    **{"qkv_bias": True, "attention_bias": True, "ffn_bias": True, "context": 1024},
}
_LLAMA = {"attention": "gqa", "context": 1024}
_SEARCH = {"attention": "mha", "context": 512}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-14m": {**_GPT2, "vocab_size": 8192, "d_model": 384, "num_layers": 6, "num_heads": 6},
    "gpt2-28m": {**_GPT2, "vocab_size": 16384, "d_model": 512, "num_layers": 6, "num_heads": 8},
    "llama-13m": {**_LLAMA, "vocab_size": 8192, "d_model": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 1024},
    "llama-30m": {**_LLAMA, "vocab_size": 24576, "d_model": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 1408},
    "search-64": {**_SEARCH, "vocab_size": 1024, "d_model": 64, "num_layers": 3, "num_heads": 4},
    "search-128": {**_SEARCH, "vocab_size": 4096, "d_model": 128, "num_layers": 4, "num_heads": 8},
    "search-gqa": {**_SEARCH, "attention": "gqa", "vocab_size": 2048, "d_model": 128, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2},
    "search-192": {**_SEARCH, "vocab_size": 4096, "d_model": 192, "num_layers": 3, "num_heads": 8},
}
BATCHES = {"search-64": (1, 430), "search-128": (1, 300), "search-gqa": (1, 350), "search-192": (1, 300)}
"""Windows a step and tokens a window, where they are not (8, 256)."""


def our_loop(config: SLMConfig, device: torch.device, precision: str, compiled: bool) -> tuple[Step, int]:
    """The step of a search and of `edgewise train`."""
    model = SLM(config).initialise(0).to(device).train()
    learner = Learner(model, MATRIX_RATE, arithmetic="bf16" if precision == "bf16" else "fp32", compiled=compiled)
    return lambda inputs, targets: learner.step([(inputs, targets)], 0.5).item(), sum(p.numel() for p in model.parameters())


LOOPS = {"edgewise": our_loop, "plain": plain_loop, "litgpt": litgpt_loop}


def work(pipe: Connection, loop: str, name: str, path: str, options: argparse.Namespace) -> None:
    """A process that trains some steps whenever it is asked: gives its parameters first, then their seconds and the last one's loss."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_memory()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    batch, window = batch_of(name, options)
    config, device = SLMConfig.from_dict(MODELS[name]), torch.device(options.device)
    try:
        step, parameters = LOOPS[loop](config, device, options.precision, options.compile)
    except ImportError as error:
        pipe.send(str(error).splitlines()[0])
        return
    windows = Windows(np.memmap(path, dtype=np.uint16, mode="r"), window, 0)
    pipe.send(parameters)
    while (number := pipe.recv()) is not None:
        begin = clock()
        for i in range(number * options.steps, (number + 1) * options.steps):
            inputs, targets = (torch.from_numpy(a).to(device) for a in windows.read(i * batch, batch))
            loss = step(inputs, targets)
        pipe.send((clock() - begin, loss))


def batch_of(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Windows a step and tokens a window."""
    batch, window = BATCHES.get(name, (8, 256))
    return options.batch or batch, options.window or window


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each round by loop, and what was compared. Each loop has a process, of which one works at a time."""
    vocab_size = MODELS[name]["vocab_size"]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.uint16).tofile(path)
        pipes, parameters, left_out = {}, {}, {}
        for loop in options.loops.split(","):
            pipes[loop], end = context.Pipe()
            context.Process(target=work, args=(end, loop, name, str(path), options), daemon=True).start()
        for loop, pipe in list(pipes.items()):
            first = pipe.recv()
            if isinstance(first, str):
                left_out[loop] = first
                del pipes[loop]
            else:
                parameters[loop] = first
        seconds: dict[str, list[float]] = {loop: [] for loop in pipes}
        for number in range(options.rounds + 2):
            for loop in sorted(pipes, key=lambda loop: (list(pipes).index(loop) + number) % len(pipes)):
                pipes[loop].send(number)
                taken_s, loss = pipes[loop].recv()
                seconds[loop].append(taken_s)
                assert math.isfinite(loss), f"{loop}: loss {loss}"
                assert number > 0 or options.steps > 1 or abs(loss - math.log(vocab_size)) < 1.0, f"{loop}: the first loss is {loss}"
        for pipe in pipes.values():
            pipe.send(None)
    timed = {loop: values[2:] for loop, values in seconds.items()}  # the first two rounds of each make ready
    return {"model": name, "parameters": parameters, "seconds": timed, "left_out": left_out}


def summary(found: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """A row for each loop: tokens a second, and how many times as fast ours is, with its quartiles."""
    ours = found["seconds"]["edgewise"]
    rows = []
    for loop, seconds in found["seconds"].items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rate = tokens / statistics.median(seconds)
        rows.append(
            {"loop": loop, "tokens_per_s": rate, "best_tokens_per_s": tokens / min(seconds), "ratio": middle, "from": low, "to": high}
        )
    return rows


def main() -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--loops", default=",".join(LOOPS), help="edgewise, and some of the others")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1, help="of a loop in a round, before the next one's turn")
    parser.add_argument("--batch", type=int, help="windows a step; 8, or 1 for a model of a search")
    parser.add_argument("--window", type=int, help="tokens a window; 256, or about 1 KB of text for a model of a search")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is compared")
    parser.add_argument(
        "--keep-memory", action="store_true", help="what `nas.training_kernels.keep_memory` does in every loop, not in ours alone"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile in every loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path, help="where to write all times")
    options = parser.parse_args()
    results = []
    for name in options.models.split(","):
        batch, window = batch_of(name, options)
        found = compare(name, options)
        found["summary"] = summary(found, batch * window * options.steps)
        results.append(found)
        print(f"\n{name}, {found['parameters']['edgewise'] / 1e6:.1f} M parameters, {batch} × {window} tokens a step")
        for row in found["summary"]:
            times = f"{row['ratio']:.3f} ({row['from']:.3f} to {row['to']:.3f})" if row["loop"] != "edgewise" else ""
            print(f"  {row['loop']:10s} {row['tokens_per_s']:8.0f} tokens/s   ours is times as fast: {times}".rstrip(": "))
        for loop, why in found["left_out"].items():
            print(f"  {loop:10s} left out: {why}")
    settings = {key: str(value) for key, value in vars(options).items()}
    record = {"settings": settings, "threads": options.threads or torch.get_num_threads(), "torch": torch.__version__, "results": results}
    text = json.dumps(record, indent=1) + "\n"
    if options.json is not None:
        options.json.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
