"""The command that trains a model for real: `edgewise train`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nas.cli_corpus import corpus_of, corpus_options
from nas.cli_show import say
from nas.cli_types import Count, Duration, Size
from targets.quiet import working

if TYPE_CHECKING:
    import torch

    from nas.models import NamedModel
    from nas.tokenizer import Tokenizer
    from nas.training_folder import TrainingFolder
    from nas.training_step import Arithmetic, Decay
    from search_spaces.model import SLM


@click.command("train")
@click.argument("model", metavar="CONFIG")
@corpus_options
@click.option("--text-field", default="text", show_default=True, help="The JSON field, or the column of a table, that holds the text.")
@click.option("--tokens", type=Count(), help="Tokens to train on, as in 10M; text that is shorter is read again.")
@click.option("--bytes", "text_bytes", type=Size(), help="The same in text, as in 40MB.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the trained model comes; a new folder.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="A tokenizer.json.  [default: CONFIG's, else one made]")
@click.option("--init", metavar="MODEL", help="Begin with these weights: a folder with a model, or RUN/weights/NUMBER.safetensors.")
@click.option("--batch-tokens", type=Count(), help="Tokens of a step.  [default: at most 128k, for 2,000 steps or more]")
@click.option("--accumulate", type=click.IntRange(min=1), help="Read a step in so many portions, to save memory.")
@click.option("--window", type=click.IntRange(min=1), help="Tokens of a window.  [default: the context, at most 1024]")
@click.option("--lr", type=float, help="Peak rate of matrices at width 128 and 4 layers, from which the model's follows.  [default: 8e-4]")
@click.option("--decay", type=click.Choice(["linear", "cosine"]), default="linear", show_default=True, help="How the rate falls to zero.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of products; weights are fp32.")
@click.option("--compile", "compiled", is_flag=True, help="Make faster code first, with torch.compile; takes minutes.")
@click.option("--checkpoint-every", type=Duration(), default="5m", show_default=True, help="What is lost at most when it is killed.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of weights and order of text.")
@click.option("--device", help="cpu, cuda or cuda:1.  [default: cuda where there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def train_command(
    *,
    model: str,
    corpus: str,
    held_out: str | None,
    corpus_bytes: int | None,
    text_field: str,
    tokens: int | None,
    text_bytes: int | None,
    out: Path,
    tokenizer: Path | None,
    init: str | None,
    batch_tokens: int | None,
    accumulate: int | None,
    window: int | None,
    lr: float | None,
    decay: "Decay",
    precision: "Arithmetic",
    compiled: bool,
    checkpoint_every: float,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Train a model, on a GPU or on the processor.

    CONFIG is a config.json, a folder with one (such as an export), or a published model's name; its weights are not used
    unless --init names them too. Ended or killed at any moment, the same command goes on where it was. DIR is then a
    model as `edgewise export` writes it; its report.html has the loss curve.

    \b
    Examples:
      edgewise train my-model --corpus ~/books --tokens 300M --out my-model-300M
      edgewise train my-model --init my-model --corpus ~/notes --bytes 20MB --out my-notes
      edgewise train smollm-135m --corpus ~/books --tokens 2.7B --precision bf16 --compile --out smol
    """
    # As in a search: threads that spin while they wait are many times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    click.get_current_context().with_resource(working())

    from nas.models import named_model
    from nas.pretraining import TrainSettings
    from nas.training_step import MATRIX_RATE

    settings = TrainSettings(
        tokens=tokens,
        text_bytes=text_bytes,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        window=window,
        learning_rate=MATRIX_RATE if lr is None else lr,
        decay=decay,
        arithmetic=precision,
        compiled=compiled,
        seed=seed,
    )
    named = named_model(model)
    loaded_corpus = corpus_of(corpus, held_out, corpus_bytes, text_field)

    import torch

    from nas.run import locked
    from nas.training_folder import check_free, training_folder

    where = _device(device)
    check_free(out)
    weights = _weights(init, named)
    given = _given_tokenizer(tokenizer, weights, named, Path(model))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock", f"the training in {str(out)!r}", "--out"):
        folder = training_folder(
            out,
            name=named.name,
            config=named.config,
            corpus=loaded_corpus,
            tokenizer=None if given is None else given[0],
            settings=settings,
            init=None if weights is None else weights[0],
            device=str(where),
            threads=torch.get_num_threads(),
        )
        if folder.result is not None:
            folder.clear()
            say(f"{out} is trained already; to train further, give it as --init and another --out")
        else:
            from nas.evaluation import write_whole
            from nas.pretraining import Interrupted, pretrain
            from nas.tokenizer import train_tokenizer
            from nas.training_view import TrainingView
            from nas.utilisation import product_flops_per_s

            if given is not None:
                write_whole(folder.tokenizer_path, given[1])
            used = given[0] if given is not None else train_tokenizer(loaded_corpus, named.config.vocab_size, folder.tokenizer_path)
            try:
                with TrainingView(ceiling=lambda: product_flops_per_s(where, precision, torch.get_num_threads())) as view:
                    pretrain(
                        folder,
                        named.config,
                        loaded_corpus,
                        used,
                        settings,
                        view,
                        init=None if weights is None else weights[0],
                        device=where,
                        threads=folder.manifest["threads"],
                        checkpoint_every_s=checkpoint_every,
                    )
            except Interrupted:
                say(f"interrupted; the same command goes on from there; so far: {folder.report_path}")
                raise click.exceptions.Exit(1) from None
    _show(folder, as_json)


def _show(folder: "TrainingFolder", as_json: bool) -> None:
    """What came of it."""
    result = folder.result
    assert result is not None
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    from nas.describe import format_bpb, format_count, format_rate, format_s

    rate = format_rate(result["tokens"] / result["train_s"] if result["train_s"] > 0 else None)
    bpb = format_bpb(result["val_bpb"], result["val_bpb_stderr"])
    click.echo(f"{bpb} bits per byte after {format_count(result['tokens'])} tokens, {format_s(result['train_s'])}, {rate} tokens/s")
    say(f"the model: {folder.path}; report: {folder.report_path}")


def _device(name: str | None) -> "torch.device":
    """The device of that name.

    Raises:
        UserError: if there is none.
    """
    import torch

    from nas.errors import UserError

    try:
        device = torch.device(name if name is not None else "cuda" if torch.cuda.is_available() else "cpu")
        there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        there = False
    if not there:
        found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UserError(f"--device {name!r} is not here; give one of {found}")
    return device


_Weights = tuple["SLM", "tuple[Tokenizer, bytes] | None"]


def _weights(init: str | None, named: "NamedModel") -> "_Weights | None":
    """The weights to begin with, and the tokenizer they know with its file.

    Raises:
        UserError: if they are of another architecture, or there are none.
    """
    if init is None:
        return None
    from nas.errors import UserError

    path = Path(init)
    if path.parent.name == "weights" and path.suffix == ".safetensors" and path.stem.isdigit():
        from nas.export import choose_trial
        from nas.run import open_run

        chosen = choose_trial(open_run(path.parent.parent), int(path.stem))
        config = chosen.config
        weights: _Weights = (chosen.model, (chosen.tokenizer, chosen.tokenizer_path.read_bytes()))
    else:
        from nas.models import named_model

        other = named_model(init)
        loaded = other.load()
        if loaded is None:
            raise UserError(f"--init {init!r} has no weights; give a folder with model.safetensors, or RUN/weights/NUMBER.safetensors")
        config = other.config
        weights = (loaded[0], _with_file(loaded[1], other))
    if config != named.config:
        theirs, wanted = config.to_dict(), named.config.to_dict()
        name = next(key for key in wanted if theirs[key] != wanted[key])
        raise UserError(f"--init {init!r} has {name}={theirs[name]} and CONFIG {wanted[name]}; give weights of the same model")
    return weights


def _with_file(tokenizer: "Tokenizer | None", named: "NamedModel") -> "tuple[Tokenizer, bytes] | None":
    from nas.export import TOKENIZER

    if tokenizer is None or named.folder is None:
        return None
    return tokenizer, (named.folder / TOKENIZER).read_bytes()


def _given_tokenizer(path: Path | None, weights: "_Weights | None", named: "NamedModel", model: Path) -> "tuple[Tokenizer, bytes] | None":
    """The tokenizer that was asked for, else that of the weights to begin with, else CONFIG's; None: one is to be made.

    Raises:
        UserError: if it has more ids than the model.
        InvalidRun: if it cannot be read.
    """
    from nas.errors import UserError
    from nas.export import TOKENIZER
    from nas.tokenizer import Tokenizer

    found = None
    if path is not None:
        if path.with_suffix(".meta.json").exists():  # of a search's run
            tokenizer = Tokenizer.from_file(path, remedy="give another --tokenizer")
        elif path.name == TOKENIZER:
            tokenizer = Tokenizer.published(path.parent)
        else:
            raise UserError(f"--tokenizer {str(path)!r} is not named {TOKENIZER}; give that file of a model's folder, or of a run")
        found = tokenizer, path.read_bytes()
    elif weights is not None:
        found = weights[1]
    elif named.folder is None:
        if (model / TOKENIZER).is_file():  # a folder without weights
            found = Tokenizer.published(model), (model / TOKENIZER).read_bytes()
    else:
        loaded = named.load()
        found = _with_file(loaded[1], named) if loaded is not None else None
    if found is not None and found[0].vocab_size > named.config.vocab_size:
        raise UserError(
            f"the tokenizer has {found[0].vocab_size} ids and the model vocab_size={named.config.vocab_size}; give one that goes with it"
        )
    return found
