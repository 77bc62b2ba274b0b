"""What a user needs to train an architecture for real: `edgewise export --format recipe`.

Beside the model as transformers reads it there are settings and a script for its `Trainer`, settings for litgpt where it has
such an architecture, and the command that trains the same here. Rates are those of `nas.training_step.peak_rates`.
"""

import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.describe import format_count, significant
from nas.evaluation import write_whole
from nas.export import CARD, MARK, Chosen
from nas.huggingface.export import native_form, write_folder
from nas.litgpt_config import litgpt_config
from nas.pretraining import MOST_WINDOW, PORTION_TOKENS, default_batch_tokens
from nas.training_step import BETAS, EPSILON, MOST_GRADIENT_NORM, WARMUP_SHARE, WEIGHT_DECAY, peak_rates
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import params

TOKENS_PER_PARAMETER = 20
"""Training tokens for each parameter at which loss is least for the compute (Hoffmann et al., arXiv 2203.15556, table 3)."""

SCRIPT, ARGUMENTS, RATES, LITGPT = "train.py", "training_args.json", "recipe.json", "litgpt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How much text an architecture is worth training on, in what portions and at what rates."""

    tokens: int
    """20 for each parameter, to two digits."""
    window: int
    micro_windows: int
    """Windows that are read at once."""
    accumulate: int
    """Portions of a step."""
    matrix_rate: float
    other_rate: float
    """Of embeddings and vectors."""

    @property
    def batch_windows(self) -> int:
        """Windows of a step."""
        return self.micro_windows * self.accumulate

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, round(self.tokens / (self.batch_windows * self.window)))


def recipe_for(config: SLMConfig) -> Recipe:
    """The recipe of an architecture."""
    count = TOKENS_PER_PARAMETER * params(config)
    unit = 10 ** max(0, int(math.log10(count)) - 1)
    tokens = round(count / unit) * unit
    window = min(config.context, MOST_WINDOW)
    batch = max(1, round(default_batch_tokens(tokens) / window))
    accumulate = -(-batch * window // PORTION_TOKENS)
    matrix_rate, other_rate = peak_rates(config)
    return Recipe(
        tokens=tokens,
        window=window,
        micro_windows=max(1, round(batch / accumulate)),
        accumulate=accumulate,
        matrix_rate=matrix_rate,
        other_rate=other_rate,
    )


def write_recipe(chosen: Chosen, folder: Path) -> None:
    """The model's files, those to train it with, and what to do with them in the model card."""
    write_folder(chosen, folder)
    recipe = recipe_for(chosen.config)
    source = importlib.resources.files("nas").joinpath("recipe_train.py").read_text(encoding="utf-8")
    write_whole(folder / SCRIPT, source)
    write_whole(folder / ARGUMENTS, json.dumps(_training_arguments(recipe), indent=1) + "\n")
    write_whole(folder / RATES, json.dumps({"window_tokens": recipe.window, "other_rate": recipe.other_rate}, indent=1) + "\n")
    trial = f"trial-{chosen.evaluation.trial}"
    try:
        model: dict[str, Any] | None = litgpt_config(chosen.config, trial)
        why = ""
    except InvalidConfig as error:
        model, why = None, str(error)
    if model is not None:
        write_whole(folder / LITGPT / "model_config.yaml", yaml_of(model))
        write_whole(folder / LITGPT / "pretrain.yaml", yaml_of(_litgpt_pretrain(recipe, model, chosen.config.tie_embeddings)))
    else:
        for name in ("model_config.yaml", "pretrain.yaml"):
            (folder / LITGPT / name).unlink(missing_ok=True)  # of an earlier export
    card = (folder / CARD).read_text(encoding="utf-8").rstrip().removesuffix(MARK).rstrip()
    if chosen.evaluation.twin is not None:
        card = card.partition("\n## Loading\n")[0].rstrip()  # there is nothing to load before it is trained
    write_whole(folder / CARD, "\n".join([card, "", *_how(chosen, recipe, why), MARK, ""]))


def _training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Fields of transformers' `TrainingArguments` (4 and 5)."""
    return {
        "output_dir": "trained",
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.micro_windows,
        "gradient_accumulation_steps": recipe.accumulate,
        "learning_rate": recipe.matrix_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, round(WARMUP_SHARE * recipe.steps)),
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "max_grad_norm": MOST_GRADIENT_NORM,
        "logging_steps": 10,
        "save_steps": max(1, recipe.steps // 20),
        "save_total_limit": 2,
        "report_to": "none",
        "seed": 0,
    }


def _litgpt_pretrain(recipe: Recipe, model: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Arguments of `litgpt pretrain` (0.5.13)."""
    return {
        "model_name": model["name"],
        "model_config": dict(model),
        "out_dir": "trained",
        "data": {"class_path": "TextFiles", "init_args": {"train_data_path": "text"}},
        "tokenizer_dir": ".",
        "train": {
            "save_interval": max(1, recipe.steps // 20),
            "log_interval": 10,
            "global_batch_size": recipe.batch_windows,
            "micro_batch_size": recipe.micro_windows,
            "lr_warmup_steps": max(1, round(WARMUP_SHARE * recipe.steps)),
            "max_tokens": recipe.tokens,
            "max_seq_length": recipe.window,
            "tie_embeddings": tied,
            "max_norm": MOST_GRADIENT_NORM,
            "min_lr": 0.0,
        },
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": recipe.matrix_rate, "weight_decay": WEIGHT_DECAY, "betas": list(BETAS)},
        },
        "seed": 0,
    }


def yaml_of(values: Mapping[str, Any], depth: int = 0) -> str:
    """Plain values as YAML, a line each; nothing in it can be anything but a value."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{'  ' * depth}{key}:\n{yaml_of(value, depth + 1)}")
            continue
        text = json.dumps(value)
        if isinstance(value, float) and "e" in text and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 takes 8e-05 for a text
        lines.append(f"{'  ' * depth}{key}: {text}\n")
    return "".join(lines)


def _how(chosen: Chosen, recipe: Recipe, why_not_litgpt: str) -> list[str]:
    """The card's section on training."""
    trust = "" if native_form(chosen.config) is not None else " --trust"
    warm = "" if chosen.evaluation.twin is not None else "; add `--init my-model` to go on from the weights here"
    litgpt = [
        "With litgpt, where `text` holds .txt files (its TextFiles data need `litgpt[extra]`; it has one rate for everything, "
        "and its decay is half a cosine):",
        "",
        "```",
        f"litgpt pretrain --config {LITGPT}/pretrain.yaml",
        "```",
    ]
    return [
        "## Training it for real",
        "",
        f"About {format_count(recipe.tokens)} tokens are worth it: {TOKENS_PER_PARAMETER} for each parameter (Hoffmann et al. 2022, "
        f"arXiv 2203.15556). In {recipe.steps:,} steps of {recipe.batch_windows} windows of {recipe.window} tokens; peak rate "
        f"{significant(recipe.matrix_rate, 2)} for weight matrices and {significant(recipe.other_rate, 2)} for embeddings, norms and "
        "biases, by the rule of the search's own training for this size.",
        "",
        f"With edgewise, from random weights{warm}:",
        "",
        "```",
        f"edgewise train my-model --corpus TEXT --tokens {recipe.tokens} --out trained",
        "```",
        "",
        "With transformers and accelerate (`--set bf16=true` on a GPU that has it):",
        "",
        "```",
        f"python {SCRIPT} TEXT.txt --out trained{trust}",
        "```",
        "",
        *(litgpt if not why_not_litgpt else [f"There is nothing for litgpt: {why_not_litgpt}."]),
        "",
    ]
