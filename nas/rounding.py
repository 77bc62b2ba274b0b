"""The score of a model in the precision that a device holds its weights in, beside the one it was trained to.

On the held-out documents, and on the file that a search may minimise the loss of instead.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

from nas.accuracy import Accuracy
from nas.corpus import Corpus
from nas.tokenizer import Tokenizer
from nas.training import evaluate, using_threads
from search_spaces.model import SLM
from search_spaces.precision import Precision
from search_spaces.quantisation import round_weights

_FLOAT = "_fp32"
"""Suffix of what the float32 weights scored."""


def rounded_score(
    model: SLM, precision: Precision, tokenizer: Tokenizer, corpus: Corpus, score: Mapping[str, Any], accuracy: Accuracy | None = None
) -> dict[str, Any]:
    """A score record with the bits per byte of the rounded weights, and what they score on a file.

    Args:
        model: as trained, on any device; left as it is.
        precision: to round to; fp32 changes nothing.
        tokenizer, corpus: what it was trained with.
        score: the record of that training, not diverged.
        accuracy: the file.

    Returns:
        The record, with `val_bpb` and `val_bpb_stderr` of the rounded weights (None if they are not finite), those of the
        float32 ones as `val_bpb_fp32` and `val_bpb_stderr_fp32` if the weights were rounded, and `task` if there is a file.
    """
    if precision == "fp32":
        return {**score, **_on_file(model, tokenizer, score, accuracy)}
    # Rounded on the CPU, as the device's weights are: the same to the bit.
    rounded = copy.deepcopy(model).cpu()
    round_weights(rounded, precision)
    with using_threads(score["threads"]):
        bpb, stderr = evaluate(rounded.to(next(model.parameters()).device), tokenizer, corpus.validation, score["window_tokens"])
    task = _on_file(rounded, tokenizer, score, accuracy)
    found = {"val_bpb": bpb, "val_bpb_stderr": stderr}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}
    return {**score, **finite, **{name + _FLOAT: score[name] for name in found}, **task}


def _on_file(model: SLM, tokenizer: Tokenizer, score: Mapping[str, Any], accuracy: Accuracy | None) -> dict[str, Any]:
    """What a model scores on the file, as part of a record; nothing without one. It sees as much at once as when it is scored on text."""
    if accuracy is None:
        return {}
    with using_threads(score["threads"]):
        return {"task": accuracy.score(model, tokenizer, score["window_tokens"])}


def float_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it was before `rounded_score`; one that was not rounded is as it is."""
    return {name: score.get(name + _FLOAT, value) for name, value in score.items() if not name.endswith(_FLOAT)}
