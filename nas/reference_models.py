"""Models that people know, measured on a run's devices and scored on its text: beside the candidates, never among them.

Each has a record like that of a trial, in the run folder under its name, and is measured once in a run.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.describe import format_bytes
from nas.errors import UserError
from nas.evaluation import Evaluation
from nas.models import NamedModel
from nas.run import file_name
from nas.settings import Bench
from nas.trial import first_line, with_counts
from search_spaces.counting import kv_bytes
from search_spaces.workload import assumed_bytes_per_token
from targets.target import Target, TargetError

if TYPE_CHECKING:
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

NO_TRIAL = -1
"""The number in a reference's record, which is of no trial."""


def file_names(models: Sequence[NamedModel]) -> list[str]:
    """A file name for each model, made of its name.

    Raises:
        UserError: if two models come to the same.
    """
    names = [file_name(model.name, "model") for model in models]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"--reference {twice} is there twice; name each model once, and rename folders that are called alike")
    return names


def measure_references(bench: Bench, models: Sequence[NamedModel]) -> None:
    """Measures and scores the models that the run has not kept a finished record of.

    Raises:
        UserError: if two of them are called alike.
        InvalidRun: if a model's weights or tokenizer are damaged.
    """
    for name, model in zip(file_names(models), models, strict=True):
        path = bench.run.reference_path(name)
        kept = Evaluation.load(path) if path.exists() else None
        if kept is None or not _is_done(bench, kept, model):
            bench.view.stage(NO_TRIAL, "reference", name)
            bench.run.log(NO_TRIAL, "reference", "start", name=name)
            _try(bench, model, kept, path)
            bench.run.log(NO_TRIAL, "reference", "done", name=name)


def _is_done(bench: Bench, kept: Evaluation, model: NamedModel) -> bool:
    same = kept.config == model.config and kept.weights == bench.settings.weights[0]
    return same and kept.state in ("complete", "infeasible") and (kept.score is not None or model.folder is None)


def _try(bench: Bench, model: NamedModel, kept: Evaluation | None, path: Path) -> None:
    """Takes a model as far as it goes; every result is on disk before the next is asked for."""
    loaded = model.load()
    weights, tokenizer = loaded if loaded is not None else (None, None)
    record = _counted(bench, model, tokenizer)
    if kept is not None and (kept.config, kept.weights, kept.bytes_per_token) == (record.config, record.weights, record.bytes_per_token):
        record = kept.evolve(state="running", reason=None)
    reasons: list[tuple[Any, str]] = []
    for device, target in bench.devices():
        if record.on(device).measurement is not None:
            continue
        where = f"{target.spec.name}: " if len(bench.targets) > 1 else ""
        reason = _does_not_fit(bench, model, record, target)
        try:
            if reason is None:
                record = record.put(device, **_figures(bench, record, weights, target))
                record.save(path)
            else:
                reasons.append(("infeasible", where + reason))
        except (TargetError, RuntimeError, ValueError, KeyError) as error:
            kind = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
            reasons.append(("failed", where + kind + first_line(error)))
    if weights is not None and tokenizer is not None and record.score is None:
        record = _scored(bench, model, record, weights, tokenizer)
    state, reason = reasons[0] if reasons else ("complete", None)
    record.evolve(state=state, reason=reason).save(path)
    if reason is not None:
        bench.view.note(f"reference {path.stem}: {reason}")


def _counted(bench: Bench, model: NamedModel, tokenizer: "Tokenizer | None") -> Evaluation:
    """The record with what the architecture says, and the bytes of this run's text that a token stands for."""
    config, precision = model.config, bench.settings.weights[0]
    if tokenizer is None:
        bytes_per_token = assumed_bytes_per_token(config.vocab_size)
    else:
        text = bench.corpus.validation
        bytes_per_token = sum(len(d.encode()) for d in text) / max(1, sum(map(len, tokenizer.encode_batch(text))))
    record = Evaluation(trial=NO_TRIAL, weights=precision, bytes_per_token=bytes_per_token)
    return with_counts(record, config, bench.settings.workload.tokens(bytes_per_token))


def _does_not_fit(bench: Bench, model: NamedModel, record: Evaluation, target: Target) -> str | None:
    """Why the model is not even compiled, in one line; None if it is."""
    assert record.bytes_per_token is not None
    assert record.weight_bytes is not None
    tokens = bench.settings.workload.tokens(record.bytes_per_token)
    most = min(model.config.context, model.exact_tokens)
    if tokens.total > most:
        return f"the request needs {tokens.total} tokens and the model is good for {most}"
    # What is sure: the workspace depends on how the device computes.
    needed, memory = record.weight_bytes + kv_bytes(model.config, tokens.total), target.spec.memory_bytes
    if memory and needed > memory:
        return f"{format_bytes(needed)} of memory is above that of {target.spec.name!r}, {format_bytes(memory)}"
    return None


def _figures(bench: Bench, record: Evaluation, weights: "SLM | None", target: Target) -> dict[str, Any]:
    """What the model costs on a device, as a trial's record has it; its numbers are checked first."""
    from cost_models.measured import measure_request

    assert record.config is not None
    assert record.bytes_per_token is not None
    settings = bench.settings
    tokens = settings.workload.tokens(record.bytes_per_token)
    measured = measure_request(
        target, record.config, tokens, settings.workload,
        seed=settings.seed, model=weights, precision=record.weights, timing=settings.timing,
    )  # fmt: skip
    return measured.to_dict()


def _scored(bench: Bench, model: NamedModel, record: Evaluation, weights: "SLM", tokenizer: "Tokenizer") -> Evaluation:
    """The record with the bits per byte of the held-out documents, in the windows of text that candidates are scored in, and
    what it scores on the file of `--accuracy`, if there is one.

    The weights are rounded, in place, to the precision that was measured.
    """
    import torch

    from nas.training import evaluate
    from search_spaces.quantisation import round_weights

    assert record.bytes_per_token is not None
    if record.weights != "fp32":
        round_weights(weights, record.weights)
    window = min(model.config.context, model.exact_tokens, math.ceil(bench.settings.budget().passage_bytes / record.bytes_per_token))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bpb, stderr = evaluate(weights.to(device), tokenizer, bench.corpus.validation, window)
    found = {"val_bpb": bpb, "val_bpb_stderr": stderr}
    accuracy = bench.settings.accuracy
    task = {} if accuracy is None else {"task": accuracy.score(weights, tokenizer, window)}
    return record.evolve(score={**found, "window_tokens": window, "device": device, **task}, **found)
