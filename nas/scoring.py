"""The probability of tokens under a model: rows of any length, each token scored once, in windows that slide."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from nas.tokenizer import Tokens
from nas.training_kernels import IGNORED, training_kernels
from search_spaces.model import SLM
from targets.quiet import yield_to_measuring

_MOST_LOGITS = 4 * 1024 * 1024
"""Logits made at once: 16 MB of float32, about what a cache holds."""
_MOST_TOKENS = 8192
"""Tokens of a batch, which bounds what lies between layers where few of them are scored."""

OVERLAP = 0.25
"""Share of a scoring window that is only context. Width 64, vocabulary 1,024, 256 KB: 0, 0.25, 0.5 and 0.75 score 2.2022, 2.1983,
2.1982 and 2.1983; width 128, vocabulary 2,048: 2.0106, 2.0079, 2.0079, 2.0079. The time grows as 1 / (1 - overlap)."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one text; those from `first` on are scored, those before are given."""

    ids: Tokens
    first: int = 0


def overlap(window: int) -> int:
    """Tokens of a window that slides that are context only."""
    return min(window - 1, round(OVERLAP * window))


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens begin to end of a row, after an end of text; those from `first` on are scored."""

    row: int
    begin: int
    first: int
    end: int


def _windows(number: int, row: Row, window: int) -> Iterator[_Window]:
    """What the model sees of a row: all of it at once, or windows that overlap."""
    first, length = row.first, len(row.ids)
    while first < length:
        begin = 0 if length <= window else max(0, first - overlap(window))
        end = min(length, begin + window)
        yield _Window(number, begin, first, end)
        first = end


@torch.inference_mode()
def log_likelihoods(
    model: SLM, rows: Sequence[Row], window: int, end_of_text: int, progress: Callable[[float], None] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The natural logarithm of the probability of each row's scored tokens, and whether all of them are the likeliest.

    Args:
        model: on any device; its mode is left as it is.
        rows: texts; one without a scored token gets 0 and True.
        window: most tokens that the model sees at once, the end of text among them; at most its context.
        end_of_text: stands before each window.
        progress: called with the share that is done, 0 to 1.

    Returns:
        Of each row, in order: (R,) float64 and (R,) bool.
    """
    device = next(model.parameters()).device
    pieces = [piece for i, row in enumerate(rows) for piece in _windows(i, row, window)]
    # Longest first, so that a batch holds windows of like length and little padding.
    pieces.sort(key=lambda piece: piece.begin - piece.end)
    nats, greedy = np.zeros(len(rows)), np.ones(len(rows), dtype=np.bool_)
    training = model.training
    model.eval()
    # Where keys are wider than values, PyTorch's attention on a CPU takes twice as long; else it is the faster one here.
    written_out = device.type == "cpu" and model.config.attention == "mla"
    body = partial(model.body, kernels=training_kernels()) if written_out else model.body
    done = 0
    while done < len(pieces):
        batch = _batch(pieces, done, model.config.vocab_size)
        inputs, targets = _padded(rows, batch, end_of_text)
        counted = targets != IGNORED
        x_BSD = body(torch.from_numpy(inputs).to(device))
        logits_NV = model.head(x_BSD[torch.from_numpy(counted).to(device)][None])[0]
        targets_N = torch.from_numpy(targets[counted]).to(device)
        losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none").double().cpu().numpy()
        # Without argmax, which takes as long as the head's product.
        likeliest_N = (logits_NV.gather(1, targets_N[:, None])[:, 0] >= logits_NV.amax(dim=1)).cpu().numpy()
        row_N = np.repeat([piece.row for piece in batch], inputs.shape[1]).reshape(counted.shape)[counted]
        np.subtract.at(nats, row_N, losses_N)
        np.logical_and.at(greedy, row_N, likeliest_N)
        done += len(batch)
        if progress is not None:
            progress(done / len(pieces))
        yield_to_measuring()
    model.train(training)
    return nats, greedy


def _batch(pieces: Sequence[_Window], start: int, vocab_size: int) -> Sequence[_Window]:
    """The windows from `start` on that fit into a batch, longest first; at least one."""
    longest, scored, count = pieces[start].end - pieces[start].begin, 0, 0
    for place in range(start, len(pieces)):
        piece = pieces[place]
        scored += piece.end - piece.first
        if count and (scored * vocab_size > _MOST_LOGITS or (count + 1) * longest > _MOST_TOKENS):
            break
        count += 1
    return pieces[start : start + count]


def _padded(rows: Sequence[Row], batch: Sequence[_Window], end_of_text: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and targets (B, S) of some windows, the longest first; what is not scored is `IGNORED` among the targets."""
    longest = batch[0].end - batch[0].begin
    inputs = np.full((len(batch), longest), end_of_text, dtype=np.int64)
    targets = np.full((len(batch), longest), IGNORED, dtype=np.int64)
    for place, piece in enumerate(batch):
        ids, size = rows[piece.row].ids, piece.end - piece.begin
        inputs[place, 1:size] = ids[piece.begin : piece.end - 1]
        targets[place, piece.first - piece.begin : size] = ids[piece.first : piece.end]
    return inputs, targets
