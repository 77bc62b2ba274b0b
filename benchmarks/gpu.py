"""Programs of ours on this machine's NVIDIA GPU against PyTorch on the same GPU, eager and compiled, in float32.

    python benchmarks/gpu.py [--config small] [--tokens 128] [--repeats 20]

Every program is checked against PyTorch on the processor before it is timed, as always; PyTorch on the GPU against the same
logits. All sides are timed one after the other, a call at a time, the GPU idle before and after; CUDA graphs are off. TF32 is
off, too: with it PyTorch's logits are not float32's. Prints JSON, then a table with medians and interquartile ranges.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models.measured import make_sample, randomise
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.local import LocalTarget
from targets.measurement import Timing, interquartile_range
from targets.spec import load_spec
from targets.target import TargetError

CONFIGS = {
    "small": SLMConfig(
        vocab_size=8192, d_model=512, num_layers=8, num_heads=8, attention="gqa", num_kv_heads=4, ffn_dim=1408, context=2048,
    ),
    "mla": SLMConfig(
        vocab_size=8192, d_model=512, num_layers=8, num_heads=8, attention="mla", kv_rank=128, v_head_dim=64, rotary_dim=32, ffn_dim=1408,
        context=2048,
    ),
    "medium": SLMConfig(vocab_size=32000, d_model=1024, num_layers=16, num_heads=16, ffn_dim=2816, context=2048),
}  # fmt: skip
SEED, GENERATED = 0, 16
TOLERANCE = 1e-3
"""Of PyTorch on the GPU, against itself on the processor."""


@click.command()
@click.option("--config", "names", multiple=True, type=click.Choice(list(CONFIGS)), help="Which models; all if none is named.")
@click.option("--tokens", default=128, show_default=True, help="Length of the prompt; a decode step sees eight rows more.")
@click.option("--repeats", default=20, show_default=True, help="Calls that are timed.")
def main(names: tuple[str, ...], tokens: int, repeats: int) -> None:
    """Times everything and prints it."""
    import torch

    target = LocalTarget(load_spec("cuda"))
    try:
        print(f"{target.spec.arch}, PyTorch {torch.__version__}", file=sys.stderr)  # detecting the GPU fails first where there is none
        if not torch.cuda.is_available():
            raise TargetError("this PyTorch was built without CUDA; install one that has it")
        rows = [row for name in names or CONFIGS for row in compared(target, name, tokens, repeats)]
    except TargetError as reason:
        print(f"no comparison: {reason}", file=sys.stderr)
        sys.exit(1)
    finally:
        target.close()
    print(json.dumps(rows, indent=1))
    Console().print(table(rows))


def compared(target: LocalTarget, name: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Times of one model's prefill and decode on every side, in seconds."""
    import torch

    from search_spaces.model import SLM

    config, request = CONFIGS[name], RequestTokens(prompt=tokens, generated=GENERATED)
    model = randomise(SLM(config), SEED).eval()
    timing = Timing(repeats=repeats, min_repeat_s=0.0, budget_s=60.0)
    with tempfile.TemporaryDirectory() as folder:
        artifact = target.compile(build_program(config, request), Path(folder) / "program")
        measurement = target.measure(artifact, make_sample(config, request, SEED, model), timing)
    found = {("edgewise", phase): list(times_s) for phase, times_s in measurement.times_s.items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    cached = request.mid_context  # the rows that our decode was timed with
    ids = torch.randint(config.vocab_size, (1, cached + 1), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        expected, _ = model.prefill(ids[:, :tokens])
        _, caches = model.prefill(ids[:, :cached])
        expected_next, _ = model.decode(ids[:, cached:], caches)
        model, ids = model.cuda(), ids.cuda()
        caches = [tuple(rows.cuda() for rows in layer) for layer in caches]
        calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], torch.Tensor]] = {
            "prefill": (model.prefill, (ids[:, :tokens],), expected),
            "decode": (model.decode, (ids[:, cached:], caches), expected_next),
        }
        for phase, (call, arguments, logits) in calls.items():
            for side, run in (("PyTorch", call), ("torch.compile", torch.compile(call, options={"triton.cudagraphs": False}))):
                error = float((run(*arguments)[0].cpu() - logits).abs().max() / logits.abs().max())
                if not error < TOLERANCE:
                    raise TargetError(f"{side} differs from PyTorch on the processor by {error:.2g} in {phase} of {name}")
                found[side, phase] = [seconds(run, arguments) for _ in range(repeats + 3)][3:]
    return [
        {
            "config": name,
            "phase": phase,
            "side": side,
            "tokens": tokens,
            "median_s": statistics.median(times_s),
            "iqr_s": interquartile_range(tuple(times_s)),
            "times_s": times_s,
        }
        for (side, phase), times_s in found.items()
    ]


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """One call, the GPU idle before and after."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds, and how many times as long as ours."""
    shown = Table("config", "phase", "side", "median ms", "IQR ms", "ours = 1", title="float32, batch 1")
    ours = {(row["config"], row["phase"]): row["median_s"] for row in rows if row["side"] == "edgewise"}
    for row in sorted(rows, key=lambda row: (row["config"], row["phase"])):
        factor = row["median_s"] / ours[row["config"], row["phase"]]
        shown.add_row(
            row["config"], row["phase"], row["side"], f"{1e3 * row['median_s']:.3f}", f"{1e3 * row['iqr_s']:.3f}", f"{factor:.2f}"
        )
    return shown


if __name__ == "__main__":
    main()
