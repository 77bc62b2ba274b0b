"""A trained model to take away: a folder that loads again, here or wherever safetensors and tokenizer.json are read.

```
import torch
from nas.export import load_exported

model, tokenizer = load_exported("my-model")
logits = model(torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("My fellow citizens")]]))
```
"""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.describe import describe_config, format_bpb, format_bytes, format_count, format_loss, format_ms, format_s, objective_words
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation
from nas.front import front_of, speed_of
from nas.run import Run
from search_spaces.config import SLMConfig
from search_spaces.counting import params
from search_spaces.precision import MEANINGS

if TYPE_CHECKING:
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

LOADING = """\
import torch
from nas.export import load_exported

model, tokenizer = load_exported("my-model")
logits = model(torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("My fellow citizens")]]))
"""

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
MARK = "<!-- written by edgewise export; another export may replace this folder's files -->"
"""The last line of a model card: a folder with it is an earlier export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a model can leave as.

    Attributes:
        exporter: the `Exporter` that writes it, as MODULE:FUNCTION; imported when it is asked for.
        files: every file that it may write.
        untrained: whether a model may leave in it without weights: one that was scored by a twin (`search_spaces.twin`) has none.
    """

    exporter: str
    files: tuple[str, ...]
    untrained: bool = False


_HF_FILES = (
    CONFIG, WEIGHTS, TOKENIZER, CARD, "tokenizer_config.json", "generation_config.json", "configuration_edgewise.py",
    "modeling_edgewise.py", "tokenization_edgewise.py", "edgewise_config.py", "edgewise_operators.py", "edgewise_model.py",
)  # fmt: skip
_BUNDLE_FILES = ("manifest.json", "program.so", "weights.safetensors", TOKENIZER, CONFIG, "run.py", CARD)
_RECIPE_FILES = ("train.py", "training_args.json", "recipe.json", "litgpt/model_config.yaml", "litgpt/pretrain.yaml")

FORMATS: Mapping[str, Format] = {
    "hf": Format(exporter="nas.huggingface.export:write_folder", files=_HF_FILES),
    "gguf": Format(exporter="nas.gguf_export:write_gguf_folder", files=("model.gguf", CARD)),
    "tvm": Format(exporter="nas.tvm_bundle:write_bundle", files=_BUNDLE_FILES),
    "recipe": Format(exporter="nas.recipe:write_recipe", files=(*_HF_FILES, *_RECIPE_FILES), untrained=True),
}
"""What a model can leave as, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A trial that leaves its run, with all that an exporter may need.

    Attributes:
        run, evaluation, config: where it comes from and what is known of it.
        model: with the float32 weights as trained, in evaluation mode; on the meta device, without any, if only a twin was trained.
        tokenizer, tokenizer_path: of the model, and its file.
        facts: what the header of the weights says, the score among it.
        target: the device to compile for, by name, where a format compiles; None: the run's own.
    """

    run: Run
    evaluation: Evaluation
    config: SLMConfig
    model: "SLM"
    tokenizer: "Tokenizer"
    tokenizer_path: Path
    facts: Mapping[str, Any]
    target: str | None = None


class Exporter(Protocol):
    """Writes a model in one format."""

    def __call__(self, chosen: Chosen, folder: Path) -> None:
        """Writes the files into `folder`, each whole; `folder` is there, and empty or an earlier export.

        Raises:
            UserError: if the model cannot leave in this format; the message has the field that is in the way.
        """
        ...


def export_trial(run: Run, trial: int, to: Path, format_name: str = "hf", target: str | None = None) -> Path:
    """Writes a trial's model into a folder; `target` is the device to compile for, if not the run's own.

    Returns:
        The folder.

    Raises:
        InvalidRun: if the trial has no weights, or the folder holds something that is not an export.
        UserError: if there is no such format, or the model cannot leave in it.
    """
    if format_name not in FORMATS:
        raise UserError(f"--format {format_name!r} is not known; choose one of {', '.join(FORMATS)}")
    form = FORMATS[format_name]
    chosen = dataclasses.replace(choose_trial(run, trial, untrained=form.untrained), target=target)
    _check_folder(to)
    module, _, function = form.exporter.partition(":")
    write: Exporter = getattr(importlib.import_module(module), function)
    to.mkdir(parents=True, exist_ok=True)
    names = {name for each in FORMATS.values() for name in each.files}
    before = {name: (to / name).stat().st_mtime_ns for name in names if (to / name).exists()}
    write(chosen, to)
    for name, written_ns in before.items():  # what is left of an earlier export: another format or trial has other files
        if (to / name).exists() and (to / name).stat().st_mtime_ns == written_ns:
            (to / name).unlink()
    return to


def choose_trial(run: Run, trial: int, *, untrained: bool = False) -> Chosen:
    """A trial with its weights and tokenizer.

    Args:
        run: where it is.
        trial: its number.
        untrained: whether one that was scored by a twin will do, which has no weights.

    Raises:
        InvalidRun: if it has none.
    """
    evaluation = run.load(trial)
    front = front_of(run.evaluations(), speed_of(run))
    choices = f"choose one of {', '.join(str(e.trial) for e in front)}" if front else "search until a trial completes"
    if evaluation is None:
        raise InvalidRun(f"trial {trial} is not in run {str(run.path)!r}; {choices}")
    source = run.weights_path(trial if evaluation.duplicate_of is None else evaluation.duplicate_of)
    if evaluation.state != "complete":
        raise InvalidRun(f"trial {trial} is {evaluation.state}, so it has no trained weights; {choices}")
    from nas.tokenizer import REMEDY, Tokenizer
    from nas.weights import load_weights, read_facts
    from search_spaces.model import SLM

    twin = evaluation.twin
    if twin is not None and not untrained:
        raise InvalidRun(
            f"trial {trial} was scored by a twin of {format_count(params(twin))} parameters, so it has no weights of its own; "
            "export it with --format recipe, and train that with `edgewise train`"
        )
    if twin is None and not source.exists():
        if any(e.trial in (trial, evaluation.duplicate_of) for e in front):
            raise InvalidRun(f"the weights of trial {trial}, {source}, are lost; {REMEDY}")
        raise InvalidRun(f"trial {trial} is not on the front of run {str(run.path)!r}, so its weights were not kept; {choices}")
    config = evaluation.config
    assert config is not None
    tokenizer_path = run.tokenizer_path(_requested_vocab(run, evaluation))
    return Chosen(
        run=run,
        evaluation=evaluation,
        config=config,
        model=load_weights(source, config, REMEDY) if twin is None else SLM(config, "meta").eval(),
        tokenizer=Tokenizer.from_file(tokenizer_path),
        tokenizer_path=tokenizer_path,
        facts=read_facts(source) or {} if twin is None else {},
    )


def load_exported(folder: str | Path) -> "tuple[SLM, Tokenizer]":
    """The model, in evaluation mode, and the tokenizer of an exported folder.

    Raises:
        InvalidConfig: if config.json cannot be read or breaks a rule.
        InvalidRun: if the weights or the tokenizer are missing, damaged, or of another model.
    """
    from nas.models import model_at

    folder = Path(folder)
    loaded = model_at(folder).load()
    if loaded is None or loaded[1] is None:
        missing = next((name for name in (WEIGHTS, TOKENIZER) if not (folder / name).exists()), "a tokenizer")
        raise InvalidRun(f"{folder} lacks {missing} (there is no such file); export the model again")
    return loaded[0], loaded[1]


def is_export(folder: Path) -> bool:
    """Whether a folder holds a model that `load_exported` reads, as far as its names tell."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS, TOKENIZER))


def model_card(run: Run, evaluation: Evaluation, vocab_size: int, *, form: str = "", loading: str = f"```python\n{LOADING}```") -> str:
    """What the model is, how it was found, what was measured where, and what it was trained on, as Markdown.

    Args:
        run, evaluation: where it is from.
        vocab_size: of its tokenizer.
        form: a sentence on what the files of this export are.
        loading: how to use them.
    """
    manifest = run.manifest
    corpus, settings = manifest["corpus"], manifest["settings"]
    score: Any = evaluation.score or {}
    config, twin = evaluation.config, evaluation.twin
    assert config is not None
    seen = [(device, evaluation.on(None if place == 0 else device["name"])) for place, device in enumerate(run.specs)]
    return "\n".join(
        [
            f"# {plain(run.name)}, trial {evaluation.trial}",
            "",
            f"A decoder-only language model: {describe_config(config)}. {format_count(evaluation.params)} parameters, "
            f"context {config.context} tokens, byte-level BPE of {vocab_size} tokens ({evaluation.bytes_per_token:.2f} bytes each).",
            "",
            "A short training from scratch made it, to compare architectures: it is a starting point, not a finished model."
            if twin is None
            else f"It has no weights yet. To compare architectures a smaller model of the same kind was trained for a short while, of "
            f"{format_count(params(twin))} parameters: {describe_config(twin)}.",
            "",
            *([form, ""] if form else []),
            "## Measured",
            "",
            f"{'; '.join(_where(device) for device, _ in seen)}. Search begun {manifest['created']}; {_weights(evaluation)}, one request "
            f"at a time, {settings['prompt_bytes']} bytes of prompt, {settings['generate_bytes']} generated.",
            "",
            "| what | value |",
            "|---|---|",
            *(row for device, on in seen for row in _figures(device, on, named=len(seen) > 1)),
            f"| weights | {format_bytes(evaluation.weight_bytes)} |",
            f"| {_scored(evaluation)} | {format_bpb(evaluation.val_bpb, evaluation.val_bpb_stderr)} |",
            *_unrounded(evaluation, score),
            *([f"| {plain(objective_words([evaluation]))} | {format_loss(evaluation)} |"] if evaluation.task is not None else []),
            "",
            "## How it was found",
            "",
            f"Search space {plain(manifest['space']['name'])}, sampler {settings['sampler']}, seed {manifest['seed']}; on the front of "
            f"{plain(objective_words([evaluation]))} against {settings['speed']} time. "
            + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
            + ".",
            "",
            "## Training text",
            "",
            f"{plain(corpus['name'])} (licence: {plain(corpus['licence'])}), {score.get('train_bytes', settings['budget_bytes'])} bytes "
            f"read in {score.get('steps', '?')} steps; scored on documents held out from training and tokenizer. "
            f"sha256 of the text: {corpus['sha256']}.",
            "",
            "## Loading",
            "",
            loading,
            "",
            MARK,
            "",
        ]
    )


def _where(device: Mapping[str, Any]) -> str:
    """Where figures are from, in words."""
    return f"On {plain(device['name'])}{_cpu(device)}" if device["kind"] != "null" else "Counted, not measured (target null)"


def _figures(device: Mapping[str, Any], evaluation: Evaluation, named: bool) -> list[str]:
    """The table's rows of one device."""
    on = f" on {plain(device['name'])}" if named else ""
    return [
        f"| prefill of the prompt{on} | {format_s(evaluation.prefill_s)} |",
        f"| decode{on} | {format_ms(evaluation.decode_s_per_token)} ms a token |",
        f"| whole request{on} | {format_s(evaluation.request_s)} |",
        f"| peak memory{on} | {format_bytes(evaluation.peak_bytes)} |",
    ]


def _weights(evaluation: Evaluation) -> str:
    """The precision that was measured, in words."""
    if evaluation.weights == "fp32":
        return "float32"
    return (
        f"{evaluation.weights} weights ({MEANINGS[evaluation.weights]}), rounded from the float32 ones that were trained "
        f"(`edgewise measure` does the same with `--weights {evaluation.weights}`)"
    )


def _scored(evaluation: Evaluation) -> str:
    """What was scored, in words."""
    return "validation bits per byte" if evaluation.twin is None else "validation bits per byte of the smaller model"


def _unrounded(evaluation: Evaluation, score: dict[str, Any]) -> list[str]:
    """The table's row of what the float32 weights scored, where others were scored."""
    if evaluation.weights == "fp32":
        return []
    return [f"| the same of the float32 weights | {format_bpb(score.get('val_bpb_fp32'), score.get('val_bpb_stderr_fp32'))} |"]


def _cpu(device: Mapping[str, Any]) -> str:
    return f" ({device['cores']} cores of {plain(device['cpu'])})" if device.get("cpu") and device.get("cores") else ""


def plain(text: object) -> str:
    """Text from users as it is, without what Markdown or HTML would act on."""
    kept = " ".join(str(text).split())
    for mark in "\\`*_[]<>|#":
        kept = kept.replace(mark, "\\" + mark)
    return kept


def _requested_vocab(run: Run, evaluation: Evaluation) -> int:
    from search_spaces.space import Space

    return Space.from_dict(run.manifest["space"]).requested_vocab(evaluation.params_drawn)


def _check_folder(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise InvalidRun(f"--to {str(to)!r} is a file; give a folder")
    if not to.exists() or not any(to.iterdir()):
        return
    try:
        ours = (to / CARD).read_text(encoding="utf-8").rstrip().endswith(MARK)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise InvalidRun(f"--to {str(to)!r} holds other files and no exported model; give a new or empty folder")
