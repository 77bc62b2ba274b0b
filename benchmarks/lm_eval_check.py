"""Whether lm-evaluation-harness, given a model that left as `hf`, comes to what `edgewise eval` does on the same items.

    python -m venv build/lm-eval && build/lm-eval/bin/pip install -e '.[hf]' 'lm-eval[hf]'
    build/lm-eval/bin/python benchmarks/lm_eval_check.py

Two small models, one of a family of transformers and one that carries its own code, are trained for a minute on the
packaged speeches. Items of every kind are made of the speeches held out, and scored by both from local files, with no
network. Every log-likelihood must agree to 1e-4, and every accuracy exactly.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from nas.corpus import load_corpus
from search_spaces.config import SLMConfig

ROOT = Path(__file__).resolve().parent.parent

LLAMA = SLMConfig(vocab_size=1024, d_model=64, num_layers=2, context=256, num_heads=4, ffn_dim=160)
MODELS = {
    "llama": LLAMA,
    "own code": dataclasses.replace(LLAMA, num_layers=4, sharing="cycle", num_unique_layers=2, augmented_shortcuts=1, series_activation=3),
}
LIMIT = 1e-4
"""Largest difference of a log-likelihood, in nats."""
TASKS: Mapping[str, str] = {
    "pairs": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + target}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
}
"""Each kind of file of `edgewise eval` as a task of lm-evaluation-harness."""
NAMES = {"accuracy": "acc,none", "accuracy_per_byte": "acc_norm,none", "perplexity": "perplexity,none"}
"""What each side calls a figure."""


def items(kind: str, words: Sequence[str], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Tasks on running text: the right answer is what follows, the wrong ones follow elsewhere."""

    def some(least: int, most: int, at: int | None = None) -> str:
        at = rng.randrange(len(words) - 40) if at is None else at
        return " ".join(words[at : at + rng.randint(least, most)])

    made = []
    for _ in range(count):
        at = rng.randrange(len(words) - 40)
        context = " ".join(words[at : at + 12])
        if kind == "pairs":
            good = some(6, 12, at).split()
            made.append({"good": " ".join(good), "bad": " ".join([*good[1:], good[0]])})
        elif kind == "cloze":
            made.append({"context": context, "target": words[at + 12]})
        else:
            right = some(2, 6, at + 12)
            choices = [right, *(some(2, 6) for _ in range(3))]
            rng.shuffle(choices)
            made.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return [item for item in made if _differ(item)]


def _differ(item: Mapping[str, Any]) -> bool:
    options = item.get("choices") or [item.get("good"), item.get("bad")]
    return "target" in item or len(set(options)) == len(options)


def trained(folder: Path, config: SLMConfig, text_bytes: int) -> Path:
    """A model as `edgewise train` leaves it, which is an export as `hf`."""
    (folder / "config.json").write_text(json.dumps({"model_type": "edgewise", **config.to_dict()}))
    how = ["--bytes", str(text_bytes), "--batch-tokens", "2048", "--lr", "3e-3", "--device", "cpu"]
    call(["-m", "nas", "train", str(folder / "config.json"), *how, "--out", str(folder / "model")])
    return folder / "model"


def call(arguments: Sequence[str]) -> str:
    """What a Python program prints, without a network; what it says meanwhile is shown if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def ours(model: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    """`edgewise eval`: by kind of file."""
    told = json.loads(call(["-m", "nas", "eval", str(model), *map(str, files.values()), "--threads", "1", "--json", "--items"]))
    return dict(zip(files, told["files"], strict=True))


def theirs(model: Path, files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """lm-evaluation-harness: by kind, its figures and each item's log-likelihoods."""
    for kind, file in files.items():
        data = f"task: edgewise_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        (folder / f"{kind}.yaml").write_text(data + TASKS[kind].lstrip())
    about = f"pretrained={model},trust_remote_code=True,add_bos_token=True,dtype=float32"
    names = ",".join(f"edgewise_{kind}" for kind in files)
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", about, "--tasks", names, "--include_path", str(folder)]
    command += ["--device", "cpu", "--batch_size", "16", "--output_path", str(folder / "out"), "--log_samples", "--seed", "0"]
    call(command)
    (results,) = (folder / "out").rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    found = {}
    for kind in files:
        (samples,) = (folder / "out").rglob(f"samples_edgewise_{kind}_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[kind] = {**figures[f"edgewise_{kind}"], "items": [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]}
    return found


def compared(model: Path, files: Mapping[str, Path], folder: Path) -> list[dict[str, Any]]:
    """A row for each kind: both sides' figures, and the largest difference of a log-likelihood."""
    folder.mkdir()
    mine, other = ours(model, files), theirs(model, files, folder)
    rows = []
    for kind in files:
        pairs = zip(mine[kind]["items"], other[kind]["items"], strict=True)
        gaps = [abs(a - b) for item, values in pairs for a, b in zip(item["log_likelihoods"], values, strict=True)]
        figures = {name: (mine[kind][name], other[kind][theirs_]) for name, theirs_ in NAMES.items() if theirs_ in other[kind]}
        equal = all(abs(a - b) <= (1e-3 * b if name == "perplexity" else 0) for name, (a, b) in figures.items())
        rows.append({"kind": kind, "n": mine[kind]["n"], **figures, "largest_gap": max(gaps), "agrees": equal and max(gaps) <= LIMIT})
    return rows


def main() -> int:
    """Trains, scores, prints; 1 if anything disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200, help="of each kind")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="text that each model trains on")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    given = parser.parse_args()
    words = " ".join(load_corpus().validation).split()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = {kind: folder / f"{kind}.jsonl" for kind in TASKS}
        for seed, (kind, file) in enumerate(files.items()):
            file.write_text("".join(json.dumps(item) + "\n" for item in items(kind, words, given.items, random.Random(seed))))
        for name, config in MODELS.items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            found[name] = compared(trained(place, config, given.bytes), files, place / "lm-eval")
    text = json.dumps(found, indent=1)
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)
    Console(stderr=True, width=160).print(_table(found))
    return 0 if all(row["agrees"] for rows in found.values() for row in rows) else 1


def _table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    table = Table("model", "kind", "n", *(f"{name}: edgewise, lm-eval" for name in NAMES), "largest gap, nats", "agrees")
    for model, rows in found.items():
        for row in rows:
            figures = [" ".join(f"{value:.4f}" for value in row[name]) if name in row else "" for name in NAMES]
            table.add_row(model, row["kind"], str(row["n"]), *figures, f"{row['largest_gap']:.1e}", "yes" if row["agrees"] else "NO")
    return table


if __name__ == "__main__":
    sys.exit(main())
