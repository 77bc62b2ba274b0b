"""The folder of a training (`nas.pretraining` shows its files): what it is for, its log, and what it ends as."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.corpus import Corpus
from nas.describe import describe_config, format_bpb, format_count, format_s
from nas.errors import InvalidRun
from nas.evaluation import write_whole
from nas.export import CARD, TOKENIZER, plain
from nas.run import locked, utc_now, versions
from nas.training_report import write_training_report
from search_spaces.config import SLMConfig
from search_spaces.counting import params

if TYPE_CHECKING:
    from nas.pretraining import TrainSettings
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

FORMAT = 1
_MANIFEST = "train.json"
_SETTLED = {"config": "CONFIG", "corpus": "--corpus", "tokenizer": "--tokenizer", "init": "--init", "settings": "", "device": "--device"}
"""What must be the same for a training to go on, and what names it on the command line."""
_OPTIONS = {
    "tokens": "--tokens",
    "text_bytes": "--bytes",
    "batch_tokens": "--batch-tokens",
    "accumulate": "--accumulate",
    "window": "--window",
    "learning_rate": "--lr",
    "decay": "--decay",
    "arithmetic": "--precision",
    "compiled": "--compile",
    "seed": "--seed",
}


class TrainingFolder:
    """A folder to train in, with what it is for read.

    Made by `training_folder`.

    Attributes:
        path: the folder.
        manifest: what train.json says.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def work(self) -> Path:
        """Where the text and the checkpoint are while it trains."""
        return self.path / "work"

    @property
    def checkpoint(self) -> Path:
        """Where training goes on from."""
        return self.work / "checkpoint.safetensors"

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer's file is while it trains."""
        return self.work / TOKENIZER

    @property
    def report_path(self) -> Path:
        """Where the loss curve is."""
        return self.path / "report.html"

    @property
    def result(self) -> Mapping[str, Any] | None:
        """What the training came to (`nas.pretraining.Trained.to_dict`); None while it has not ended."""
        result = self.manifest["result"]
        return result if isinstance(result, Mapping) else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process.

        Raises:
            InvalidRun: if another process has it.
        """
        with locked(self.path / "lock", f"the training in {str(self.path)!r}", "--out"):
            yield

    # --- log ------------------------------------------------------------------------------

    def begin_log(self, steps: int) -> None:
        """Drops the lines of steps that are to be taken again: those after the first `steps`."""
        log = self.path / "log.jsonl"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue  # half a line, of a machine that lost power
            if isinstance(step, int) and step <= steps:
                kept.append(line + "\n")
        write_whole(log, "".join(kept))

    def log(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line for each step."""
        lines = "".join(json.dumps({**step, "time": utc_now()}) + "\n" for step in steps)
        # One write in append mode: a killed process leaves whole lines.
        descriptor = os.open(self.path / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)

    # --- results --------------------------------------------------------------------------

    def report(self, losses: Sequence[float], bytes_per_token: float, batch_tokens: int) -> None:
        """Draws the loss curve so far.

        Args:
            losses: of each step, nats a token.
            bytes_per_token: of the training text.
            batch_tokens: tokens of a step.
        """
        curve = [loss / math.log(2) / bytes_per_token for loss in losses]
        write_training_report(self.report_path, self.path.resolve().name, self.manifest, curve, batch_tokens)

    def finish(self, model: "SLM", tokenizer: "Tokenizer", result: Mapping[str, Any]) -> None:
        """Writes the model, then what it came to.

        Args:
            model: trained, on the CPU.
            tokenizer: of the model.
            result: `nas.pretraining.Trained.to_dict`.
        """
        from nas.huggingface.export import write_model

        facts = {key: result[key] for key in ("val_bpb", "val_bpb_stderr", "tokens", "steps", "window_tokens")}
        form, loading = write_model(model, tokenizer, self.tokenizer_path.read_bytes(), facts, self.path)
        write_whole(self.path / CARD, self._card(model.config, tokenizer, result, form, loading))
        self.manifest = {**self.manifest, "result": dict(result)}
        write_whole(self.path / _MANIFEST, json.dumps(self.manifest, indent=1) + "\n")

    def clear(self) -> None:
        """Removes checkpoint and tokenised text of a training that has ended."""
        assert self.result is not None
        shutil.rmtree(self.work, ignore_errors=True)

    def _card(self, config: SLMConfig, tokenizer: "Tokenizer", result: Mapping[str, Any], form: str, loading: str) -> str:
        corpus, settings = self.manifest["corpus"], self.manifest["settings"]
        began = "weights given with --init" if self.manifest["init"] else f"random weights of seed {settings['seed']}"
        return "\n".join(
            [
                f"# {plain(self.path.resolve().name)}",
                "",
                f"A decoder-only language model: {describe_config(config)}. {format_count(params(config))} parameters, context "
                f"{config.context} tokens, {tokenizer.vocab_size} tokens of {tokenizer.bytes_per_token:.2f} bytes. {form}",
                "",
                f"Trained with `edgewise train` from {began}, begun {self.manifest['created']}: {result['tokens']:,} tokens in "
                f"{result['steps']:,} steps, the text read {result['epochs']:.2f} times, in {format_s(result['train_s'])} on "
                f"{plain(result['device'])}, {settings['arithmetic']}.",
                "",
                f"Bits per byte: {format_bpb(result['val_bpb'], result['val_bpb_stderr'])}, on documents held out from training.",
                "",
                f"Text: {plain(corpus['name'])} (licence: {plain(corpus['licence'])}), sha256 {corpus['sha256']}. "
                + ", ".join(f"{name} {version}" for name, version in self.manifest["versions"].items())
                + ".",
                "",
                "## Loading",
                "",
                loading,
                "",
            ]
        )


def training_folder(
    path: Path,
    *,
    name: str,
    config: SLMConfig,
    corpus: Corpus,
    tokenizer: "Tokenizer | None",
    settings: "TrainSettings",
    init: "SLM | None",
    device: str,
    threads: int,
) -> TrainingFolder:
    """The folder to train in: made if there is none, taken up again if it is of the same training.

    Args:
        path: the folder.
        name: of the model, as the user called it.
        config, corpus, tokenizer, settings, init, device: all that decides what comes out; without a tokenizer it is made
            for the corpus.
        threads: of the CPU; of a training that has begun those it began with count.

    Raises:
        InvalidRun: if the folder holds something else, or another training.
    """
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "model": name,
        "created": utc_now(),
        "versions": versions(),
        "config": config.to_dict(),
        "corpus": {
            "name": corpus.name,
            "licence": corpus.licence,
            "held_out": corpus.held_out,
            "sha256": corpus.sha256,
            "train_bytes": corpus.train_bytes,
            "validation_bytes": corpus.validation_bytes,
        },
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "init": None if init is None else _digest(init),
        "settings": dataclasses.asdict(settings),
        "device": device,
        "threads": threads,
        "result": None,
    }
    manifest = path / _MANIFEST
    if manifest.exists():
        known = _read(manifest)
        if known["result"] is None and not (path / "log.jsonl").exists():
            known = wanted  # no step was taken: what was wrong with the settings may be mended
            write_whole(manifest, json.dumps(known, indent=1) + "\n")
        _same(path, known, wanted)
        return TrainingFolder(path, known)
    write_whole(manifest, json.dumps(wanted, indent=1) + "\n")
    return TrainingFolder(path, wanted)


def check_free(path: Path) -> None:
    """Refuses a folder that holds something other than a training, before anything is written into it.

    Raises:
        InvalidRun: if it does.
    """
    if path.exists() and not path.is_dir():
        raise InvalidRun(f"--out {str(path)!r} is a file; give a folder")
    ours = {_MANIFEST, "lock", "work"}
    strangers = [p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(".part")] if path.exists() else []
    if strangers and not (path / _MANIFEST).exists():
        raise InvalidRun(f"--out {str(path)!r} holds {sorted(strangers)[0]!r} and no {_MANIFEST}; give a new or empty folder")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in (*_SETTLED, "format", "threads", "result", "created", "versions") if key not in values]
    except OSError as error:
        raise InvalidRun(f"{path} cannot be read ({error.strerror}); check the folder's permissions") from error
    except (ValueError, TypeError) as error:
        raise InvalidRun(f"{path} is damaged ({error}); restore it, or give another --out") from error
    if missing or not isinstance(values, dict):
        raise InvalidRun(f"{path} is damaged: it lacks {missing[0]!r}; restore it, or give another --out")
    if values["format"] != FORMAT:
        raise InvalidRun(
            f"{path} has format {values['format']!r}, not {FORMAT}; use the version of edgewise that made it, or another --out"
        )
    return values


def _same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses to go on with anything else; the first difference is named."""
    wanted = json.loads(json.dumps(wanted))
    for key, option in _SETTLED.items():
        before, now = known[key], wanted[key]
        if key == "corpus":
            before, now = before["sha256"], now["sha256"]
        if before == now:
            continue
        if key in ("settings", "config"):
            inner = next(k for k in (*before, *now) if before.get(k) != now.get(k))
            option, before, now = _OPTIONS.get(inner, f"{option} with {inner}="), before.get(inner), now.get(inner)
        before, now = (str(value)[:12] if isinstance(value, str) else "unset" if value is None else value for value in (before, now))
        raise InvalidRun(f"{str(path)!r} was begun with {option} {before}, not {now}; use the same to go on with it, or give another --out")


def _digest(model: "SLM") -> str:
    """A hash of all weights, by name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + b"\0" + parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
