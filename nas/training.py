"""Short training from scratch, scored in bits per byte: the accuracy that the search ranks candidates by.

Every candidate reads the same text in the same order and takes (nearly) the same number of steps, whatever
its vocabulary: budgets and windows are in bytes of text. The learning rate ends at zero inside the budget,
because an unfinished decay ranks schedules, not architectures.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.corpus import Corpus
from nas.errors import UserError
from nas.tokenizer import Tokenizer, Tokens, tokenised
from nas.training_step import IGNORED, MATRIX_RATE, Learner, has_diverged, schedule
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from targets.quiet import yield_to_measuring

_MOST_LOGITS = 4 * 1024 * 1024
"""Logits made at once while scoring: 16 MB of float32, about what a cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much text a candidate reads, and in what portions.

    Raises:
        UserError: if a value cannot be trained with.
    """

    train_bytes: int
    window_bytes: int = 1024
    """Text in a training window; in tokens, ceil(window_bytes / bytes per token), at most the model's context."""
    batch_windows: int = 1
    """Windows a step; a context too short for a window makes more, shorter ones of the same text."""
    learning_rate: float | None = None
    """Peak rate of weight matrices at a width of 128 and 4 layers; None: the rule's."""

    def __post_init__(self) -> None:
        for name in ("train_bytes", "window_bytes", "batch_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is below 1; give a positive integer")
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UserError(f"learning_rate={rate} is not a positive number; give one above 0, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyScore:
    """What a short training came to. Divergence is an outcome: `diverged`, and no `val_bpb`."""

    val_bpb: float | None
    val_bpb_stderr: float | None
    """Standard error over held-out documents; None for one document."""
    diverged: bool
    train_bytes: int
    """Text really read, repeats counted again."""
    train_tokens: int
    steps: int
    train_s: float
    eval_s: float
    first_train_bpb: float | None
    """Before the first update."""
    final_train_bpb: float | None
    """Mean over the last tenth of the steps."""
    window_tokens: int
    batch_windows: int
    learning_rate: float
    """Peak rate of weight matrices at a width of 128 and 4 layers."""
    seed: int
    device: str
    threads: int
    """CPU threads: results are the same to the bit only for the same number."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on a second."""
        return self.train_tokens / self.train_s if self.train_s > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProxyScore":
        """The inverse of `to_dict`.

        Raises:
            TypeError: on an unknown or a missing key.
        """
        return cls(**values)


def train(
    config: SLMConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    budget: Budget,
    seed: int,
    device: str | torch.device | None = None,
    progress: Callable[[float], None] | None = None,
    threads: int | None = None,
) -> tuple[SLM, ProxyScore]:
    """Trains a model from scratch and scores it on the held-out documents.

    On a CPU the same arguments and number of threads give the same score to the bit; on CUDA some sums
    are taken in no fixed order.

    Args:
        config: the architecture; its `vocab_size` must hold every id of the tokenizer.
        corpus: the text.
        tokenizer: made for that corpus.
        budget: how much text, in what portions.
        seed: of the initial weights and of the order of the text (not of each other: every candidate
            with this seed reads the same text).
        device: None: CUDA where there is one, else the CPU.
        progress: called after each step with the share of the training done, 0 to 1.
        threads: CPU threads to use; None: as many as torch is set to. Set back afterwards.

    Returns:
        The model, in evaluation mode, and its score.

    Raises:
        UserError: if the tokenizer has more ids than the model.
    """
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={config.vocab_size} is below the {tokenizer.vocab_size} ids of the tokenizer; give the model "
            f"{tokenizer.vocab_size}, or train a smaller tokenizer"
        )
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    with using_threads(threads) as used_threads:
        window = min(config.context, math.ceil(budget.window_bytes / tokenizer.bytes_per_token))
        # By bytes, so that a short context or small vocabulary changes neither the text of a step nor the number of steps.
        batch = max(1, round(budget.batch_windows * budget.window_bytes / (window * tokenizer.bytes_per_token)))
        text = tokenised(corpus, tokenizer)
        stream, read_bytes = text.stream(budget.train_bytes, seed)
        model = SLM(config).initialise(seed).to(device)
        rate = MATRIX_RATE if budget.learning_rate is None else budget.learning_rate

        start = time.perf_counter()
        losses = _fit(model, _windows(stream, window, tokenizer.end_of_text, seed, device), batch, rate, progress)
        train_s = time.perf_counter() - start
        diverged = has_diverged(losses)

        start = time.perf_counter()
        bpb: float | None = None
        stderr: float | None = None
        if not diverged:
            bpb, stderr = _score(model, text.validation(), text.validation_bytes, window, tokenizer.end_of_text)
            if not math.isfinite(bpb):
                bpb, stderr, diverged = None, None, True
        eval_s = time.perf_counter() - start

    per_byte = (len(stream) - 1) / read_bytes / math.log(2)
    last = losses[-max(1, len(losses) // 10) :]
    score = ProxyScore(
        val_bpb=bpb,
        val_bpb_stderr=stderr,
        diverged=diverged,
        train_bytes=read_bytes,
        train_tokens=len(stream) - 1,
        steps=len(losses),
        train_s=train_s,
        eval_s=eval_s,
        first_train_bpb=losses[0] * per_byte if math.isfinite(losses[0]) else None,
        final_train_bpb=sum(last) / len(last) * per_byte if math.isfinite(sum(last)) else None,
        window_tokens=window,
        batch_windows=batch,
        learning_rate=rate,
        seed=seed,
        device=str(device),
        threads=used_threads,
    )
    return model.eval(), score


def evaluate(model: SLM, tokenizer: Tokenizer, documents: Sequence[str], window: int) -> tuple[float, float | None]:
    """Bits per byte of some documents, and its standard error over them.

    bits per byte = sum of -log2 p(token) / bytes of UTF-8. Every token is scored once, in windows that do
    not overlap; a window starts with the token before it, the first with the end of text.

    With b_i bits and n_i bytes of document i of N, R = sum b / sum n, and its standard error is
    sqrt(N/(N-1) sum (b_i - R n_i)^2) / sum n, that of a ratio estimate (Cochran, Sampling Techniques, 3rd
    ed. 1977, section 2.11): documents are drawn, not bytes, and long ones count for more.

    Args:
        model: on any device.
        tokenizer: whose ids the model knows.
        documents: texts; empty ones count for nothing.
        window: tokens a window, at most the model's context.

    Returns:
        (bits per byte, its standard error); the error is None for a single document.

    Raises:
        UserError: if there is no text.
    """
    documents = [d for d in documents if d]
    if not documents:
        raise UserError("there is no text to score; give at least one document that is not empty")
    encoded = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(documents)]
    return _score(model, encoded, [len(d.encode()) for d in documents], min(window, model.config.context), tokenizer.end_of_text)


# --- training ---------------------------------------------------------------------------------


def _fit(model: SLM, windows: tuple[Tensor, Tensor], batch: int, rate: float, progress: Callable[[float], None] | None) -> list[float]:
    """One pass over the windows; the mean loss in nats per token of each step, up to the one that diverged."""
    inputs_WS, targets_WS = windows
    steps = -(-inputs_WS.shape[0] // batch)
    learner = Learner(model, rate)
    on_cpu = inputs_WS.device.type == "cpu"
    losses: list[float] = []
    waiting: list[Tensor] = []
    model.train()
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        waiting.append(learner.step([(inputs_WS[rows], targets_WS[rows])], schedule(step, steps)))
        # Reading a loss waits for the device: free on a CPU, costly each step on CUDA.
        if on_cpu or len(waiting) == 20 or step == steps - 1:
            losses += torch.stack(waiting).tolist()
            waiting.clear()
            if has_diverged(losses):
                break
        if progress is not None:
            progress((step + 1) / steps)
        yield_to_measuring()
    return losses


def _windows(stream: Tokens, window: int, end_of_text: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (W, S) of a stream, windows in a random order; the targets of padding are ignored.

    The last window starts early, to be as long as the others: a step on a few tokens would be mostly noise.
    """
    length = len(stream) - 1
    stream = np.pad(stream.astype(np.int64), (0, max(0, window - length)), constant_values=end_of_text)
    starts = np.minimum(np.arange(0, length, window), max(0, length - window))
    positions_WS = starts[:, None] + np.arange(window)
    # Neighbours would put one document into a step; mixed windows give gradients that differ less from step to step.
    positions_WS = np.random.default_rng((seed, 1)).permutation(positions_WS)
    targets_WS = np.where(positions_WS < length, stream[positions_WS + 1], IGNORED)
    return torch.from_numpy(stream[positions_WS]).to(device), torch.from_numpy(targets_WS).to(device)


@contextmanager
def using_threads(threads: int | None) -> Iterator[int]:
    """Has torch use so many threads for a while (None: as many as it does); gives how many it uses."""
    before = torch.get_num_threads()
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


# --- scoring ----------------------------------------------------------------------------------


@torch.inference_mode()
def _score(model: SLM, documents: Sequence[Tokens], sizes: Sequence[int], window: int, end_of_text: int) -> tuple[float, float | None]:
    device = next(model.parameters()).device
    pieces: list[tuple[int, Tokens]] = []
    for i, ids in enumerate(documents):
        shifted = np.concatenate((np.asarray([end_of_text], dtype=np.int64), ids))
        pieces += ((i, shifted[at : at + window + 1]) for at in range(0, len(ids), window))
    # Longest first, so that a batch holds windows of like length and little padding.
    pieces.sort(key=lambda piece: -len(piece[1]))
    nats = np.zeros(len(documents), dtype=np.float64)
    batch = max(1, _MOST_LOGITS // (window * model.config.vocab_size))
    training = model.training
    model.eval()
    for at in range(0, len(pieces), batch):
        rows = pieces[at : at + batch]
        longest = len(rows[0][1]) - 1
        inputs = np.full((len(rows), longest), end_of_text, dtype=np.int64)
        targets = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        for row, (_, ids) in enumerate(rows):
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        logits_BSV = model(torch.from_numpy(inputs).to(device))
        losses = F.cross_entropy(
            logits_BSV.flatten(0, 1), torch.from_numpy(targets).to(device).flatten(), ignore_index=IGNORED, reduction="none"
        )
        per_row = losses.view(len(rows), longest).double().sum(dim=1).cpu().numpy()
        np.add.at(nats, [i for i, _ in rows], per_row)
        yield_to_measuring()
    model.train(training)
    return bits_per_byte(nats / math.log(2), np.asarray(sizes, dtype=np.float64))


def bits_per_byte(bits: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """Sum of bits over sum of bytes, and the standard error of that ratio over documents (see `evaluate`)."""
    ratio = float(bits.sum() / sizes.sum())
    n = len(bits)
    if n < 2:
        return ratio, None
    residuals = bits - ratio * sizes
    return ratio, float(math.sqrt(n / (n - 1) * float(residuals @ residuals)) / sizes.sum())
