"""How the compiled model compares with PyTorch on the same weights, threads and machine.

    python benchmarks/engine.py [--quick] [--rounds 5]

Both run in processes of their own, in turn, `--rounds` times in one sitting; a cell is the median over rounds of the
ratio PyTorch / ours (above 1: ours is faster) with its smallest and largest value. Prints a table, then JSON.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.references import reference
from search_spaces.workload import RequestTokens
from targets.measurement import Timing
from targets.target import load_target
from targets.worker import Worker

CONFIGS = {
    "mha-5m": SLMConfig(vocab_size=4096, d_model=256, num_layers=4, num_heads=8, ffn="standard", activation="gelu", norm="layernorm"),
    "gqa-32m": SLMConfig(vocab_size=8192, d_model=512, num_layers=8, attention="gqa", num_heads=8, num_kv_heads=4, ffn_dim=1408),
    "mqa-32m": SLMConfig(vocab_size=8192, d_model=512, num_layers=8, attention="mqa", num_heads=8, ffn_dim=1408),
    "mla-30m": SLMConfig(
        vocab_size=8192, d_model=512, num_layers=8, attention="mla", num_heads=8, head_dim=64, kv_rank=128, rotary_dim=32, ffn_dim=1408
    ),
    "smollm-135m": reference("smollm-135m"),
}
PHASES = ("prefill", "decode")


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often each pair is taken.")
@click.option("--prompt", default=128, show_default=True, help="Prompt tokens.")
@click.option("--context", default=160, show_default=True, help="Cached rows that a timed decode step sees.")
@click.option("--quick", is_flag=True, help="The two smallest configs and two rounds only.")
def main(rounds: int, prompt: int, context: int, quick: bool) -> None:
    """Compare compiled models with PyTorch eager."""
    chosen = dict(list(CONFIGS.items())[:2]) if quick else CONFIGS
    rounds = 2 if quick else rounds
    tokens = RequestTokens(prompt=prompt, generated=2 * (context - prompt))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        target = load_target("local", Path(folder) / "cache")
        spec = target.spec
        peer = Worker({"OMP_NUM_THREADS": str(spec.cores)})
        try:
            for name, config in chosen.items():
                artifact = target.compile(build_program(config, tokens), Path(folder) / name)
                pairs: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
                for _ in range(rounds):
                    ours = target.measure(artifact, make_sample(config, tokens, 0), Timing(repeats=7, retries=0))
                    theirs = peer.call("engine_peers:torch_eager", config.to_dict(), prompt, context, timeout_s=600)
                    for phase in PHASES:
                        pairs[phase].append((ours.median_s(phase), theirs[phase]))
                for phase in PHASES:
                    ratios = [b / a for a, b in pairs[phase]]
                    rows.append(
                        {
                            "config": name,
                            "params": params(config),
                            "phase": phase,
                            "edgewise_s": statistics.median(a for a, _ in pairs[phase]),
                            "torch_eager_s": statistics.median(b for _, b in pairs[phase]),
                            "ratio": statistics.median(ratios),
                            "ratio_min": min(ratios),
                            "ratio_max": max(ratios),
                        }
                    )
        finally:
            peer.close()
            target.close()
    table = Table("config", "phase", "edgewise ms", "PyTorch ms", "ratio", "spread")
    for row in rows:
        table.add_row(
            str(row["config"]), str(row["phase"]), f"{1e3 * row['edgewise_s']:.3g}", f"{1e3 * row['torch_eager_s']:.3g}",
            f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
        )  # fmt: skip
    Console().print(table)
    settings = {"prompt": prompt, "context": context, "rounds": rounds}
    click.echo(json.dumps({"device": spec.to_dict(), **settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
