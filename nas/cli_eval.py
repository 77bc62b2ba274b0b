"""The command that scores a model on the user's own files: `edgewise eval`."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nas.cli_show import say
from nas.cli_types import PRECISION, PRECISION_HELP

if TYPE_CHECKING:
    from rich.table import Table

    from nas.likelihood import TaskScore
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM
    from search_spaces.precision import Precision


@click.command("eval")
@click.argument("model", metavar="MODEL")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--trial", type=click.IntRange(min=0), help="Which trial of the run that MODEL is.  [default: its default choice]")
@click.option("--weights", type=PRECISION, help=f"{PRECISION_HELP}  [default: that of the trial, else fp32]")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many of the first items or documents of each file.")
@click.option(
    "--window", type=click.IntRange(min=2), help="Most tokens seen at once.  [default: as many as it was trained on, else its context]"
)
@click.option("--text-field", default="text", show_default=True, help="The JSON field or Parquet column that holds text.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: as many as PyTorch takes]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--items", "with_items", is_flag=True, help="With --json: what came of each item of a task, too.")
def eval_command(
    model: str,
    files: tuple[str, ...],
    trial: int | None,
    weights: "Precision | None",
    limit: int | None,
    window: int | None,
    text_field: str,
    threads: int | None,
    as_json: bool,
    with_items: bool,
) -> None:
    """Score MODEL on files of tasks or text.

    MODEL is a run, or a folder with a trained model, such as an export. A FILE is a .jsonl of tasks; or a text, for bits per
    byte: .txt, .md, .jsonl, .parquet, or a folder of these.

    \b
    Tasks, one JSON object a line:
      {"good": "The dogs bark.", "bad": "The dogs barks."}
      {"context": "It was a dark and stormy", "target": "night"}
      {"context": "Snow is", "choices": ["white", "green"], "answer": 0}

    \b
    Examples:
      edgewise eval runs/tiny-local notes.txt
      edgewise eval runs/tiny-local --trial 3 pairs.jsonl
      edgewise eval my-model arc.jsonl lambada.jsonl --weights int8 --json
    """
    if with_items and not as_json:
        raise click.UsageError("--items is a part of the JSON; give --json as well", click.get_current_context())
    from nas.tasks import load_tasks

    tasks = [load_tasks(file, text_field=text_field) for file in files]
    if limit is not None:
        tasks = [asked.first(limit) for asked in tasks]
    chosen = _chosen(model, trial, weights, window)
    from nas.describe import printable
    from nas.likelihood import score_items, score_tasks, summary
    from nas.training import using_threads

    scores, items = [], []
    with using_threads(threads), _progress() as begun:
        for asked in tasks:
            each = score_items(chosen.model, chosen.tokenizer, asked.items, chosen.window, begun(asked.name)) if asked.items else []
            whole = summary(asked, each) if each else score_tasks(chosen.model, chosen.tokenizer, asked, chosen.window, begun(asked.name))
            items.append([item.to_dict() for item in each])
            scores.append(whole)
    for score in scores:
        if score.shortened:
            longer = f"{score.shortened} of {score.n} items are longer than {chosen.window} tokens"
            say(f"{printable(score.name)}: {longer}; their beginnings were cut")
    if as_json:
        records = [{"file": file, **score.to_dict()} for file, score in zip(files, scores, strict=True)]
        if with_items:
            records = [{**record, "items": each} for record, each in zip(records, items, strict=True)]
        about = {"model": chosen.name, "trial": chosen.trial, "weights": chosen.weights, "window": chosen.window}
        click.echo(json.dumps({**about, "files": records}, indent=1))
        return
    from rich.console import Console

    names = [score.name for score in scores]
    # Two files of one name are told apart by the words they were given by.
    scores = [dataclasses.replace(s, name=file) if names.count(s.name) > 1 else s for file, s in zip(files, scores, strict=True)]
    click.echo(chosen.title)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(_table(scores))


# --- the model --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is scored; `window` is the most tokens that it is to see at once, `exact_tokens` that it can."""

    name: str
    title: str
    trial: int | None
    weights: "Precision"
    window: int
    exact_tokens: int
    model: "SLM"
    tokenizer: "Tokenizer"


def _chosen(text: str, trial: int | None, weights: "Precision | None", window: int | None) -> _Model:
    """The model of a run or a folder, with its matrices rounded, on CUDA where there is one.

    Raises:
        UserError: if it has no weights or no tokenizer, a trial is asked for where there are none, or the window is too long.
        InvalidConfig: if `text` means no model.
    """
    from nas.errors import UserError

    path = Path(text)
    if (path / "manifest.json").is_file() and not (path / "config.json").exists():
        found = _of_run(path, trial, weights)
    else:
        found = _of_folder(text, trial, weights)
    most = min(found.exact_tokens, found.model.config.context)
    if window is not None and window > most:
        raise UserError(f"--window {window} is more than the {most} tokens that {found.name} can see at once; give at most that")
    found = dataclasses.replace(found, window=window or min(found.window, most))
    import torch

    from search_spaces.quantisation import round_weights

    # Rounded on the CPU, as the device's weights are: the same to the bit.
    round_weights(found.model, found.weights)
    found.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return found


def _of_run(path: Path, trial: int | None, weights: "Precision | None") -> _Model:
    from nas.describe import describe_config
    from nas.errors import InvalidRun
    from nas.export import choose_trial
    from nas.front import choose, front_of, speed_of
    from nas.run import open_run

    run = open_run(path)
    if trial is None:
        best = choose(front_of(run.evaluations(), speed_of(run)), speed_of(run))
        if best is None:
            raise InvalidRun(f"run {str(path)!r} has no model on its front; search until a trial completes")
        trial = best.trial
    found = choose_trial(run, trial)
    precision = weights or found.evaluation.weights
    name = f"{run.name}, trial {trial}"
    return _Model(
        name=run.name,
        title=f"{name}: {describe_config(found.config)}, {precision} weights",
        trial=trial,
        weights=precision,
        window=_trained_window(found.facts) or found.model.config.context,
        exact_tokens=found.model.config.context,
        model=found.model,
        tokenizer=found.tokenizer,
    )


def _of_folder(text: str, trial: int | None, weights: "Precision | None") -> _Model:
    from nas.describe import describe_config
    from nas.errors import UserError
    from nas.export import WEIGHTS
    from nas.models import named_model
    from nas.weights import read_facts

    named = named_model(text)
    if trial is not None:
        raise UserError(f"--trial {trial} is of a run and {text!r} is none; leave it out, or give the run's folder")
    loaded = named.load()
    if loaded is None or loaded[1] is None:
        lacks = "no trained weights" if loaded is None else "no tokenizer.json"
        raise UserError(f"{text!r} has {lacks}; give a run, or a folder from `edgewise export` or `edgewise train`")
    for note in named.notes:
        say(f"{named.name}: {note}")
    precision: Precision = weights or "fp32"
    return _Model(
        name=named.name,
        title=f"{named.name}: {describe_config(named.config)}, {precision} weights",
        trial=None,
        weights=precision,
        window=_trained_window(read_facts(Path(text) / WEIGHTS) or {}) or named.config.context,
        exact_tokens=named.exact_tokens,
        model=loaded[0],
        tokenizer=loaded[1],
    )


def _trained_window(facts: Mapping[str, Any]) -> int | None:
    """How many tokens a model was trained on at once, by a search or by `edgewise train`: of places further on it knows nothing.

    None if its weights do not say.
    """
    score = facts.get("score")
    window = (score if isinstance(score, dict) else facts).get("window_tokens")
    return window if isinstance(window, int) and window > 1 else None


# --- what people see --------------------------------------------------------------------------


@contextmanager
def _progress() -> "Iterator[Callable[[str], Callable[[float], None]]]":
    """A bar for each file, by name, on a terminal; nothing anywhere else. Gives what begins one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def begun(name: str) -> Callable[[float], None]:
            bar = bars.add_task(escape(name), total=1.0)
            return lambda share: bars.update(bar, completed=share)

        yield begun


def _table(scores: "Sequence[TaskScore]") -> "Table":
    """A row for each file and, indented, for each of its groups; columns in which nothing stands are left out."""
    from rich.table import Table
    from rich.text import Text

    from nas.describe import printable

    names = ["file", "kind", "n", "accuracy", "95 %", "per byte", "95 %", "chance", "loss", "", "perplexity"]
    rows = []
    for score in scores:
        rows.append([printable(score.name), *_cells(score)])
        rows += [[f"  {printable(label)}", *_cells(group)] for label, group in score.groups.items()]
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    keep = [i for i in range(len(names)) if any(row[i] for row in rows)]
    for i in keep:
        table.add_column(Text(names[i]), justify="left" if names[i] in ("file", "kind", "") else "right", no_wrap=i > 0)
    for row in rows:
        # `Text`, not `str`: a string would be read as markup.
        table.add_row(*(Text(row[i]) for i in keep))
    return table


def _cells(score: "TaskScore") -> list[str]:
    """The figures of a file or group."""
    from nas.describe import format_bpb

    return [
        score.kind,
        f"{score.n:,}",
        *_share(score.accuracy, score.n),
        *_share(score.accuracy_per_byte, score.n),
        "" if score.chance is None else f"{100 * score.chance:.1f} %",
        format_bpb(score.loss, score.loss_stderr),
        score.loss_unit,
        "" if score.perplexity is None else f"{score.perplexity:,.{0 if score.perplexity >= 1000 else 1}f}",
    ]


def _share(share: float | None, n: int) -> list[str]:
    """A share, and the interval that it lies in with 95 %."""
    if share is None:
        return ["", ""]
    from nas.likelihood import wilson_interval

    low, high = wilson_interval(share, n)
    return [f"{100 * share:.1f} %", f"{100 * low:.1f}–{100 * high:.1f}"]
