"""Short training from scratch, scored in bits per byte: the accuracy that the search ranks candidates by.

Every candidate reads the same text in the same order, passage by passage (`nas.passages`), one a step, whatever its
vocabulary: budgets, steps and windows are in bytes of text. The rate rises, stays, and ends at zero inside the budget,
because an unfinished decay ranks schedules, not architectures. As the rate stays, one training gives the scores of several
budgets (rungs): at each, a copy of the model is taken down to rate zero and scored, and the trunk goes on from where it was.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nas.checkpoint import Progress, load_checkpoint, save_checkpoint
from nas.corpus import Corpus
from nas.errors import InvalidRun, UserError
from nas.passages import PASSAGE_BYTES, tokenised
from nas.scoring import Row, log_likelihoods
from nas.tokenizer import Tokenizer, Tokens
from nas.training_step import Learner, Portion, cooldown_steps, has_diverged, trapezoid
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from targets.quiet import yield_to_measuring

MATRIX_RATE = 5e-4
OTHER_RATE = 2e-2
"""Peak rates of a short training, of weight matrices at a width of 128 and 4 layers and of embeddings and vectors. The first is lower
than where the rate falls all the way (`nas.training_step.MATRIX_RATE`), as it stays at its peak for most of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much text a candidate reads, and in what portions.

    Raises:
        UserError: if a value cannot be trained with.
    """

    train_bytes: int
    passage_bytes: int = PASSAGE_BYTES
    """Text of a step; a context that is too short for a passage reads it in parts."""
    learning_rate: float | None = None
    """Peak rate of weight matrices at a width of 128 and 4 layers; None: the rule's."""

    def __post_init__(self) -> None:
        for name in ("train_bytes", "passage_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is below 1; give a positive integer")
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UserError(f"learning_rate={rate} is not a positive number; give one above 0, or leave it out")

    def window_tokens(self, config: SLMConfig, tokenizer: Tokenizer) -> int:
        """Tokens of a window that a model is scored on: about a passage, at most the context."""
        return min(config.context, math.ceil(self.passage_bytes / tokenizer.bytes_per_token))


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
    """Of all steps up to this score, the decays of earlier rungs left out."""
    eval_s: float
    first_train_bpb: float | None
    """Before the first update."""
    final_train_bpb: float | None
    """Mean over the last tenth of the steps."""
    window_tokens: int
    """Of the windows that it is scored on."""
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

    def to_record(self) -> dict[str, Any]:
        """The same without wall-clock figures, which would make equal runs differ: they are in the log."""
        return {name: value for name, value in self.to_dict().items() if name not in ("train_s", "eval_s")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProxyScore":
        """The inverse of `to_dict`.

        Raises:
            TypeError: on an unknown or a missing key.
        """
        return cls(**values)


class ShortTraining:
    """A model in training, scored at one budget or, in ascending order, at several.

    On a CPU the same arguments and number of threads give the same score to the bit, at every rung, whichever rungs came
    before and wherever the training was saved and resumed; on CUDA some sums are taken in no fixed order.

    Args:
        config: the architecture; its `vocab_size` must hold every id of the tokenizer.
        corpus: the text.
        tokenizer: made for that corpus.
        budget: of its portions and its rate; how far to train is said at `to`.
        seed: of the initial weights and of the order of the text (not of each other: every candidate
            with this seed reads the same text).
        device: None: CUDA where there is one, else the CPU.
        threads: CPU threads to use; None: as many as torch is set to. Set back after each call.

    Raises:
        UserError: if the tokenizer has more ids than the model.
    """

    def __init__(
        self,
        config: SLMConfig,
        corpus: Corpus,
        tokenizer: Tokenizer,
        budget: Budget,
        seed: int,
        *,
        device: str | torch.device | None = None,
        threads: int | None = None,
    ) -> None:
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"vocab_size={config.vocab_size} is below the {tokenizer.vocab_size} ids of the tokenizer; give the model "
                f"{tokenizer.vocab_size}, or train a smaller tokenizer"
            )
        self._config, self._tokenizer, self._budget, self._seed, self._threads = config, tokenizer, budget, seed, threads
        self._device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        self._text = tokenised(corpus, tokenizer, budget.passage_bytes)
        self._rate = MATRIX_RATE if budget.learning_rate is None else budget.learning_rate
        self._begin()
        threads = threads or torch.get_num_threads()
        what = [corpus.sha256, tokenizer.sha256, budget.passage_bytes, self._rate, seed, str(self._device), threads]
        self._identity = json.dumps(what)

    def _begin(self) -> None:
        model = SLM(self._config).initialise(self._seed).to(self._device)
        self._learner = self._new_learner(model)
        self._losses: list[float] = []
        self._train_s = 0.0

    @property
    def trunk(self) -> SLM:
        """The model at the constant rate, as far as it is."""
        return self._learner.model

    def save(self, path: Path) -> None:
        """Writes the trunk whole: weights, moments, losses and with them its place."""
        if not self._losses:  # nothing to go on from, and no moments yet
            path.unlink(missing_ok=True)
            return
        save_checkpoint(path, self._learner, Progress(losses=tuple(self._losses), train_s=self._train_s), self._identity)

    def resume(self, path: Path) -> bool:
        """Takes up the trunk that `save` wrote; False, and at its beginning, if there is none of this very training."""
        self._begin()
        if not path.is_file():
            return False
        try:
            progress = load_checkpoint(path, self._learner, self._identity)
        except InvalidRun:
            self._begin()
            return False
        self._losses, self._train_s = list(progress.losses), progress.train_s
        return True

    def to(self, train_bytes: int, progress: Callable[[float], None] | None = None) -> tuple[SLM, ProxyScore]:
        """Trains until so much text is read, the rate at zero, and scores on the held-out documents.

        Args:
            train_bytes: text to read, rounded up to whole passages; above that of the call before.
            progress: called after each step with the share of this call's steps that are done, 0 to 1.

        Returns:
            The model, in evaluation mode, and its score.
        """
        order = self._text.order(train_bytes, self._seed)
        rows = self._text.ids(order)
        steps = len(order)
        turn = steps - cooldown_steps(steps)
        begun = len(self._losses)
        assert begun <= turn, "rungs ascend"

        def tell(step: int) -> None:
            if progress is not None:
                progress((step + 1 - begun) / (steps - begun))
            yield_to_measuring()

        with using_threads(self._threads) as threads:
            start = time.perf_counter()
            self._learner.model.train()
            self._fit(self._learner, self._losses, rows[:turn], steps, tell)
            self._train_s += time.perf_counter() - start

            start = time.perf_counter()
            # The trunk stays as it is: what is scored is a copy. (A diverged one has nothing to copy.)
            learner, losses = (self._learner, self._losses) if has_diverged(self._losses or [0.0]) else self._copy()
            self._fit(learner, losses, rows, steps, tell)
            train_s = self._train_s + time.perf_counter() - start

            return learner.model.eval(), self._scored(learner.model, losses, rows, order, train_s, threads)

    def _new_learner(self, model: SLM) -> Learner:
        return Learner(model, self._rate, other_rate=self._rate * OTHER_RATE / MATRIX_RATE)

    def _copy(self) -> tuple[Learner, list[float]]:
        learner = self._new_learner(copy.deepcopy(self._learner.model))
        state = copy.deepcopy(self._learner.optimiser.state_dict())
        learner.optimiser.load_state_dict(state)
        return learner, list(self._losses)

    def _fit(self, learner: Learner, losses: list[float], rows: Sequence[Tokens], steps: int, tell: Callable[[int], None]) -> None:
        """Takes the steps from `len(losses)` to the last of `rows`, or to the one that diverged; adds the mean loss of each."""
        on_cpu = self._device.type == "cpu"
        waiting: list[Tensor] = []
        first = len(losses)
        if first and has_diverged(losses):
            return
        for step in range(first, len(rows)):
            share = trapezoid(step, steps, self._budget.passage_bytes)
            waiting.append(learner.step(self._portions(rows[step]), share))
            # Reading a loss waits for the device: free on a CPU, costly each step on CUDA.
            if on_cpu or len(waiting) == 20 or step == len(rows) - 1:
                losses += torch.stack(waiting).tolist()
                waiting.clear()
                if has_diverged(losses):
                    return
            tell(step)

    def _portions(self, ids: Tokens) -> list[Portion]:
        """A passage as inputs and targets, in parts of at most the context."""
        row = torch.from_numpy(ids.astype(np.int64)).to(self._device)[None]
        size = self._config.context
        return list(zip(torch.split(row[:, :-1], size, 1), torch.split(row[:, 1:], size, 1), strict=True))

    def _scored(
        self, model: SLM, losses: Sequence[float], rows: Sequence[Tokens], order: Sequence[int], train_s: float, threads: int
    ) -> ProxyScore:
        start = time.perf_counter()
        diverged = has_diverged(losses)
        window = self._budget.window_tokens(self._config, self._tokenizer)
        bpb: float | None = None
        stderr: float | None = None
        if not diverged:
            bpb, stderr = _score(model, self._text.validation(), self._text.validation_bytes, window, self._tokenizer.end_of_text)
            if not math.isfinite(bpb):
                bpb, stderr, diverged = None, None, True
        eval_s = time.perf_counter() - start
        read_bytes = sum(self._text.sizes[i] for i in order[: len(losses)])
        tokens = sum(len(ids) - 1 for ids in rows[: len(losses)])
        per_byte = tokens / read_bytes / math.log(2)
        last = losses[-max(1, len(losses) // 10) :]
        return ProxyScore(
            val_bpb=bpb,
            val_bpb_stderr=stderr,
            diverged=diverged,
            train_bytes=read_bytes,
            train_tokens=tokens,
            steps=len(losses),
            train_s=train_s,
            eval_s=eval_s,
            first_train_bpb=losses[0] * per_byte if math.isfinite(losses[0]) else None,
            final_train_bpb=sum(last) / len(last) * per_byte if math.isfinite(sum(last)) else None,
            window_tokens=window,
            learning_rate=self._rate,
            seed=self._seed,
            device=str(self._device),
            threads=threads,
        )


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
    """Trains a model from scratch on the whole budget and scores it: a `ShortTraining` of one rung, whose arguments these are."""
    training = ShortTraining(config, corpus, tokenizer, budget, seed, device=device, threads=threads)
    return training.to(budget.train_bytes, progress)


def evaluate(model: SLM, tokenizer: Tokenizer, documents: Sequence[str], window: int) -> tuple[float, float | None]:
    """Bits per byte of some documents, and its standard error over them.

    bits per byte = sum of -log2 p(token) / bytes of UTF-8. Every token is scored once. Windows slide: each begins with the end
    of text, as passages in training do, and its first quarter (but for a document's first window) is the text before,
    which is context only. So no token is scored without context because of where a window happens to begin.

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


def _score(model: SLM, documents: Sequence[Tokens], sizes: Sequence[int], window: int, end_of_text: int) -> tuple[float, float | None]:
    nats, _ = log_likelihoods(model, [Row(ids) for ids in documents], window, end_of_text)
    return bits_per_byte(-nats / math.log(2), np.asarray(sizes, dtype=np.float64))


def bits_per_byte(bits: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """Sum of bits over sum of bytes, and the standard error of that ratio over documents (see `evaluate`)."""
    ratio = float(bits.sum() / sizes.sum())
    n = len(bits)
    if n < 2:
        return ratio, None
    residuals = bits - ratio * sizes
    return ratio, float(math.sqrt(n / (n - 1) * float(residuals @ residuals)) / sizes.sum())
