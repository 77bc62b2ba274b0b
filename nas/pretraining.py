"""Training for real: one model, on a GPU or a CPU, for as long as it takes, ended and gone on with at any moment.

The folder of a training is a model to load in the end (`nas.export.load_exported`):

```
train.json                  what is trained on what and how; at the end, what came of it
config.json, model.safetensors, tokenizer.json, README.md    the model, once it is trained
log.jsonl                   a line per step: loss, rate, and the time
report.html                 the loss curve
work/                       tokens.bin, tokens.json (`nas.token_file`), checkpoint.safetensors (`nas.checkpoint`); gone at the end
```

What a step does is `nas.training_step`, as in a search. On a CPU with the same number of threads, the losses of a training
that was killed and gone on with are the same to the bit as those of one that was not.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nas.checkpoint import Progress, load_checkpoint, save_checkpoint
from nas.corpus import Corpus
from nas.errors import UserError
from nas.token_file import TokenFile, Windows, token_file
from nas.tokenizer import Tokenizer
from nas.training import evaluate, using_threads
from nas.training_folder import TrainingFolder
from nas.training_step import MATRIX_RATE, Arithmetic, Decay, Learner, Portion, has_diverged, schedule
from nas.utilisation import training_flops
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from targets.quiet import yield_to_measuring

MOST_WINDOW = 1024
"""Tokens of a window, unless more are asked for."""
_STEPS = 2000
_MOST_BATCH_TOKENS = 2**17
PORTION_TOKENS = 16 * 1024
"""Tokens of a portion, unless the number of portions is given: what fits in most memories."""
_REPORT_EVERY_S = 60.0
"""Seconds between two drawings of the loss curve, at least: the page is megabytes."""
_SELDOM = 20
"""Steps between two readings of the loss on a GPU, which waits for it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a model is trained; together with model and text it decides every weight.

    Raises:
        UserError: if a value cannot be trained with.
    """

    tokens: int | None = None
    """Tokens to train on, repeats counted again; either this or `text_bytes`."""
    text_bytes: int | None = None
    batch_tokens: int | None = None
    """Tokens of a step; None: a power of two that makes about 2,000 steps or more, at most 131,072."""
    accumulate: int | None = None
    """Portions of a step, to save memory; None: as many as make portions of at most 16,384 tokens."""
    window: int | None = None
    """Tokens of a window; None: the context, at most 1,024."""
    learning_rate: float = MATRIX_RATE
    """Peak rate of weight matrices at a width of 128 and 4 layers; see `nas.training_step.peak_rates`."""
    decay: Decay = "linear"
    arithmetic: Arithmetic = "fp32"
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.text_bytes is None):
            raise UserError("how long to train is not clear; give either --tokens or --bytes")
        for name in ("tokens", "text_bytes", "batch_tokens", "accumulate", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is below 1; give a positive integer")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"learning_rate={self.learning_rate} is not a positive number; give one above 0, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings worked out for a model and its text."""

    steps: int
    batch_windows: int
    """Windows of a step."""
    accumulate: int
    """Portions they are read in."""
    window: int
    epochs: float
    """How often all the text is read."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_windows * self.window

    @property
    def tokens(self) -> int:
        """Tokens trained on in all."""
        return self.steps * self.batch_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to."""

    val_bpb: float
    val_bpb_stderr: float | None
    """Standard error over held-out documents."""
    final_train_bpb: float
    """Mean over the last tenth of the steps."""
    steps: int
    tokens: int
    epochs: float
    window_tokens: int
    """Of the windows that it was trained and scored in."""
    train_s: float
    """Seconds spent on steps that counted: those lost with a killed process are not in it."""
    flops_per_token: float
    """Of training, by `training_flops`."""
    eval_s: float
    device: str
    threads: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on a second."""
        return self.tokens / self.train_s if self.train_s > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return dataclasses.asdict(self)


class Interrupted(Exception):
    """Asked to end; the checkpoint of the last whole step is on disk."""


class View(Protocol):
    """Where a training shows what it does."""

    def note(self, text: str) -> None:
        """Something to know, in a line."""

    def preparing(self, share: float) -> None:
        """The text is being tokenised."""

    def begin(self, plan: Plan, done: int, flops_per_token: float) -> None:
        """Steps begin, `done` of them taken earlier."""

    def stepped(self, done: int, loss: float) -> None:
        """So many steps are done; `loss` in bits per byte."""

    def scoring(self) -> None:
        """The steps are done; the held-out text is scored."""


def pretrain(
    folder: TrainingFolder,
    config: SLMConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: TrainSettings,
    view: View,
    *,
    init: SLM | None = None,
    device: torch.device,
    threads: int,
    checkpoint_every_s: float = 300.0,
) -> Trained:
    """Trains to the end, from wherever the folder's checkpoint stands.

    Args:
        folder: locked, and of these settings.
        config: the architecture; its `vocab_size` must hold every id of the tokenizer.
        corpus, tokenizer: the text, and its ids.
        settings: how.
        view: is told how it goes.
        init: weights to begin with; None: random ones of `settings.seed`.
        device: where to train.
        threads: of the CPU.
        checkpoint_every_s: seconds between two checkpoints.

    Raises:
        UserError: if the settings do not go with the model or the text, or the loss diverged.
        InvalidRun: if the checkpoint is damaged.
        Interrupted: on Ctrl-C or SIGTERM, after the step under way; the next call goes on from there.
    """
    with using_threads(threads):
        text = token_file(folder.work, corpus, tokenizer, view.preparing)
        plan = plan_of(settings, config, text)
        if plan.epochs > 1:
            view.note(f"the text has {len(text.ids) - 1:,} tokens, so it is read {plan.epochs:.1f} times")
        model = (SLM(config).initialise(settings.seed) if init is None else init).to(device)
        learner = Learner(model, settings.learning_rate, arithmetic=settings.arithmetic, compiled=settings.compiled)
        progress = load_checkpoint(folder.checkpoint, learner)
        flops = training_flops(config, plan.window)
        view.begin(plan, len(progress.losses), flops)
        training = _Training(
            folder=folder,
            learner=learner,
            windows=Windows(text.ids, plan.window, settings.seed),
            bytes_per_token=text.bytes_per_token,
            plan=plan,
            settings=settings,
            view=view,
            checkpoint_every_s=checkpoint_every_s,
        )
        progress = training.take_steps(progress)
        view.scoring()
        start = time.perf_counter()
        bpb, stderr = evaluate(model, tokenizer, corpus.validation, plan.window)
        last = progress.losses[-max(1, len(progress.losses) // 10) :]
        trained = Trained(
            val_bpb=bpb,
            val_bpb_stderr=stderr,
            final_train_bpb=sum(last) / len(last) / math.log(2) / text.bytes_per_token,
            steps=plan.steps,
            tokens=plan.tokens,
            epochs=plan.epochs,
            window_tokens=plan.window,
            train_s=progress.train_s,
            flops_per_token=flops,
            eval_s=time.perf_counter() - start,
            device=str(device),
            threads=threads,
        )
    folder.finish(model.cpu().eval(), tokenizer, trained.to_dict())
    folder.report(progress.losses, text.bytes_per_token, plan.batch_tokens)
    folder.clear()
    return trained


def plan_of(settings: TrainSettings, config: SLMConfig, text: TokenFile) -> Plan:
    """Steps and windows for a model and a text.

    Raises:
        UserError: if the window is longer than the model's context, or a step has fewer windows than portions.
    """
    if settings.window is not None and settings.window > config.context:
        raise UserError(f"--window {settings.window} is above the model's context={config.context}; give at most that")
    window = min(settings.window or MOST_WINDOW, config.context, len(text.ids) - 1)
    budget = settings.tokens if settings.tokens is not None else round((settings.text_bytes or 0) / text.bytes_per_token)
    wanted = settings.batch_tokens or default_batch_tokens(budget)
    batch = max(1, round(wanted / window))
    accumulate = settings.accumulate or max(1, min(batch, -(-batch * window // PORTION_TOKENS)))
    if accumulate > batch:
        raise UserError(f"--accumulate {accumulate} is more than the {batch} windows of a step; give at most that, or more --batch-tokens")
    steps = max(1, round(budget / (batch * window)))
    per_epoch = (len(text.ids) - 1) // window
    return Plan(steps=steps, batch_windows=batch, accumulate=accumulate, window=window, epochs=steps * batch / per_epoch)


def default_batch_tokens(tokens: int) -> int:
    """Tokens of a step of a training on so many: the power of two that makes 2,000 to 4,000 steps, at most 131,072."""
    return min(_MOST_BATCH_TOKENS, 1 << int(math.log2(max(1, tokens / _STEPS))))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """What the steps are taken with."""

    folder: TrainingFolder
    learner: Learner
    windows: Windows
    bytes_per_token: float
    plan: Plan
    settings: TrainSettings
    view: View
    checkpoint_every_s: float

    def take_steps(self, progress: Progress) -> Progress:
        """Takes the steps that are left, with a checkpoint now and then and after the last."""
        plan, losses, waiting = self.plan, list(progress.losses), list[torch.Tensor]()
        on_cpu = self._device.type == "cpu"
        self.folder.begin_log(len(losses))
        self.learner.model.train()
        begin = saved = drawn = time.perf_counter()
        with _asked_to_end() as asked:
            for step in range(len(losses), plan.steps):
                waiting.append(self.learner.step(self._portions(step), self._share(step)))
                now = time.perf_counter()
                # Looked at once: a signal may come at any moment from here on.
                ending = asked.is_set() or step == plan.steps - 1
                due = ending or now - saved >= self.checkpoint_every_s
                if on_cpu or len(waiting) == _SELDOM or due:
                    self._read(losses, waiting, progress.train_s + now - begin)
                if due:
                    train_s = progress.train_s + time.perf_counter() - begin
                    save_checkpoint(self.folder.checkpoint, self.learner, Progress(losses=tuple(losses), train_s=train_s))
                    saved = time.perf_counter()
                if due and (ending or now - drawn >= _REPORT_EVERY_S):
                    self.folder.report(losses, self.bytes_per_token, plan.batch_tokens)
                    drawn = now
                if ending and step < plan.steps - 1:
                    raise Interrupted
                yield_to_measuring()
        return Progress(losses=tuple(losses), train_s=progress.train_s + time.perf_counter() - begin)

    def _read(self, losses: list[float], waiting: list[torch.Tensor], train_s: float) -> None:
        """Takes the losses of the last steps from the device, logs and shows them."""
        first, new = len(losses), torch.stack(waiting).tolist()
        waiting.clear()
        losses += new
        self.folder.log(
            [
                {
                    "step": first + i + 1,
                    "tokens": (first + i + 1) * self.plan.batch_tokens,
                    "loss": loss if math.isfinite(loss) else None,
                    "rate_share": self._share(first + i),
                    "train_s": train_s,
                }
                for i, loss in enumerate(new)
            ]
        )
        if has_diverged(losses):
            log = self.folder.path / "log.jsonl"
            raise UserError(f"the loss diverged at step {len(losses)} (see {log}); train again with a lower --lr and another --out")
        self.view.stepped(len(losses), losses[-1] / math.log(2) / self.bytes_per_token)

    def _portions(self, step: int) -> list[Portion]:
        """The windows of a step in portions that differ by one window at most."""
        windows, parts = self.plan.batch_windows, self.plan.accumulate
        cuts = [step * windows + windows * i // parts for i in range(parts + 1)]
        pairs = (self.windows.read(a, b - a) for a, b in itertools.pairwise(cuts))
        return [(_on(inputs, self._device), _on(targets, self._device)) for inputs, targets in pairs]

    def _share(self, step: int) -> float:
        return schedule(step, self.plan.steps, self.settings.decay)

    @property
    def _device(self) -> torch.device:
        return next(self.learner.model.parameters()).device


def _on(values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    # From pinned memory the copy goes on beside what the GPU still computes.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextlib.contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Has the first Ctrl-C or `kill` set an event, as half a step cannot be gone on from; the second interrupts."""
    asked = threading.Event()

    def end(_number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
