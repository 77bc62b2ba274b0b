"""Trains the model of this folder with transformers: `python train.py TEXT.txt ...`.

Needs transformers, accelerate and torch. How it is trained is in training_args.json (fields of
transformers.TrainingArguments) and recipe.json beside this file. The model begins with random weights, or with those in
this folder if --warm is given. Text files are joined, an end of text between them, and cut into windows.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of equal length, side by side; transformers moves the labels by one itself."""

    def __init__(self, files: Sequence[Path], tokenizer: Any, window: int) -> None:
        ids: list[int] = []
        for file in files:
            text = file.read_text(encoding="utf-8")
            ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        count = len(ids) // window
        if count == 0:
            raise SystemExit(f"the text has {len(ids)} tokens and a window {window}; give more text")
        self.ids = torch.tensor(ids[: count * window]).view(count, window)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def groups(model: Any, matrix_rate: float, other_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Embeddings and vectors learn at one rate whatever the model's size, matrices at one that falls with it and with decay."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= {id(head.weight)} if head is not None else set()
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in tables and not name.endswith(("head.weight", ".scale", ".shift"))
        (matrices if is_matrix else others).append(parameter)
    return [
        {"params": matrices, "lr": matrix_rate, "weight_decay": weight_decay},
        {"params": others, "lr": other_rate, "weight_decay": 0.0},
    ]


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", default="trained", help="where checkpoints and the trained model come")
    parser.add_argument("--warm", action="store_true", help="begin with the weights in this folder")
    parser.add_argument("--trust", action="store_true", help="run the modelling files in this folder (it has some if no family fits)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="another training argument, as in bf16=true")
    options = parser.parse_args()
    recipe = json.loads((HERE / "recipe.json").read_text(encoding="utf-8"))
    values = json.loads((HERE / "training_args.json").read_text(encoding="utf-8"))
    for text in options.set:
        name, _, value = text.partition("=")
        values[name] = json.loads(value)
    args = TrainingArguments(**{**values, "output_dir": options.out})

    tokenizer = AutoTokenizer.from_pretrained(HERE)
    torch.manual_seed(args.seed)
    auto: Any = AutoModelForCausalLM
    if options.warm:
        model = auto.from_pretrained(HERE, trust_remote_code=options.trust)
    else:
        config = AutoConfig.from_pretrained(HERE, trust_remote_code=options.trust)
        model = auto.from_config(config, trust_remote_code=options.trust)
        if options.trust:
            model.model.initialise(args.seed)  # that file leaves weights as they are, for others to fill
    optimizer = torch.optim.AdamW(
        groups(model, args.learning_rate, recipe["other_rate"], args.weight_decay),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    windows = Windows(options.text, tokenizer, recipe["window_tokens"])
    trainer = Trainer(model=model, args=args, train_dataset=windows, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
