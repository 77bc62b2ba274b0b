"""Log-likelihoods of texts under a model, and what they come to on a file of tasks (`nas.tasks`).

Every text begins after the end-of-text token, as in training. A context and what follows it are encoded joined. Of the
tokens, those given are the ones that all options of an item and the context alone begin with; the rest is scored. So a token
that reaches over the seam is scored whole and never given away, and all options are compared after the same text. Where no
token reaches over it, that is what encoding the two apart would give.

An item with more tokens than the window loses the beginning of its context, the same for all of its options. A text that is
longer than that by itself is scored in windows that slide, each token once.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nas.errors import InvalidTasks
from nas.scoring import Row, log_likelihoods, overlap
from nas.tasks import Item, Kind, TaskSet
from nas.tokenizer import Tokenizer
from nas.training import bits_per_byte
from search_spaces.model import SLM

LOSS_UNITS: Mapping[Kind, str] = {"text": "bits/byte", "pairs": "bits/pair", "cloze": "bits/byte", "choice": "bits/byte"}
"""What the loss of each kind counts."""

_Z = 1.959963984540054
"""Quantile of the normal distribution for intervals of 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemScore:
    """How likely the options of one item are.

    Attributes:
        item: what was asked.
        log_likelihoods: natural logarithm of each option's probability after the context.
        greedy: of each option, whether every scored token is the likeliest one in its place.
        tokens: scored, of each option.
        is_shortened: the item is longer than the window, so some text before was not seen.
    """

    item: Item
    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]
    is_shortened: bool

    @property
    def is_right(self) -> bool:
        """The right option is likelier than every other (of one option alone: it is what greedy decoding gives)."""
        return self.greedy[0] if len(self.greedy) == 1 else _wins(self.log_likelihoods, self.item.answer)

    @property
    def is_right_per_byte(self) -> bool:
        """The right option has the highest log-likelihood per byte of its own text, without the delimiter."""
        return _wins([value / len(o.encode()) for value, o in zip(self.log_likelihoods, self.item.options, strict=True)], self.item.answer)

    @property
    def bits(self) -> float:
        """-log2 of the probability of the right option."""
        return -self.log_likelihoods[self.item.answer] / math.log(2)

    @property
    def share_bits(self) -> float:
        """-log2 of the right option's share of the probability of all options."""
        values = np.asarray(self.log_likelihoods)
        return float(np.logaddexp.reduce(values) - values[self.item.answer]) / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what was asked, and what came of it."""
        asked = {name: value for name, value in dataclasses.asdict(self.item).items() if value is not None}
        found = {"log_likelihoods": [_finite(v) for v in self.log_likelihoods], "greedy": list(self.greedy), "tokens": list(self.tokens)}
        return {**asked, "options": list(self.item.options), **found, "right": self.is_right, "is_shortened": self.is_shortened}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """What a model comes to on one file.

    Attributes:
        name, kind, sha256: of the file, as in `TaskSet`.
        n: items, or documents.
        loss: lower is better, and what a search minimises. text: bits per byte. cloze and choice: bits per byte of the right
            continuation after its context, sum of -log2 p over sum of bytes. pairs: mean of -log2 p(good) / (p(good) + p(bad)),
            1 for a coin. These move with every change of a small model, long before its accuracy does.
        loss_stderr: its standard error over items or documents (`bits_per_byte`); None for one.
        accuracy: share of items that are right (`ItemScore.is_right`); None of a text.
        accuracy_per_byte: of a choice, by log-likelihood per byte.
        chance: the accuracy of a guess; None where there is nothing to guess among.
        perplexity: text: of a word between white space, 2^(bits / words); cloze: of a target, exp(-mean log-likelihood).
        text_bytes, tokens: scored.
        shortened: items that are longer than the window.
        groups: the same for each label of the file's items, in alphabetical order; empty if they have none.
    """

    name: str
    kind: Kind
    n: int
    loss: float
    loss_stderr: float | None
    accuracy: float | None = None
    accuracy_per_byte: float | None = None
    chance: float | None = None
    perplexity: float | None = None
    text_bytes: int
    tokens: int
    shortened: int = 0
    sha256: str
    groups: Mapping[str, "TaskScore"] = field(default_factory=dict)

    @property
    def loss_unit(self) -> str:
        """What `loss` counts."""
        return LOSS_UNITS[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field and what follows from them; numbers that are not finite are None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "groups"}
        values |= {"loss_unit": self.loss_unit}
        for name in ("accuracy", "accuracy_per_byte"):
            share = values[name]
            values[f"{name}_stderr"] = binomial_stderr(share, self.n)
            values[f"{name}_interval"] = None if share is None else list(wilson_interval(share, self.n))
        finite = {name: _finite(value) if isinstance(value, float) else value for name, value in values.items()}
        return {**finite, "groups": {name: score.to_dict() for name, score in self.groups.items()}}


def score_tasks(
    model: SLM, tokenizer: Tokenizer, tasks: TaskSet, window: int | None = None, progress: Callable[[float], None] | None = None
) -> TaskScore:
    """What a model comes to on one file of tasks or text.

    On a CPU the same arguments and number of threads give the same score to the bit.

    Args:
        model: on any device; its mode is left as it is.
        tokenizer: whose ids the model knows.
        tasks: from `nas.tasks.load_tasks`.
        window: most tokens that the model sees at once, the end of text among them; None: the model's context, which it
            never exceeds.
        progress: called with the share that is done, 0 to 1.

    Raises:
        InvalidTasks: if `window` is below 2.
    """
    if tasks.kind != "text":
        return summary(tasks, score_items(model, tokenizer, tasks.items, window, progress))
    rows = [Row(np.asarray(ids, dtype=np.int64)) for ids in tokenizer.encode_batch(tasks.documents)]
    nats, _ = log_likelihoods(model, rows, _window(model, window), tokenizer.end_of_text, progress)
    bits, sizes = -nats / math.log(2), np.asarray([len(d.encode()) for d in tasks.documents], dtype=np.float64)
    loss, stderr = bits_per_byte(bits, sizes)
    words = sum(len(d.split()) for d in tasks.documents)
    return TaskScore(
        name=tasks.name,
        kind="text",
        n=len(rows),
        loss=loss,
        loss_stderr=stderr,
        perplexity=_exp(-float(nats.sum()) / max(1, words)),
        text_bytes=int(sizes.sum()),
        tokens=sum(len(row.ids) for row in rows),
        sha256=tasks.sha256,
    )


def score_items(
    model: SLM,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    window: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[ItemScore]:
    """The log-likelihoods of every option of every item, in their order; arguments and errors as of `score_tasks`."""
    most = _window(model, window)
    rows, shortened = [], []
    for options in _encoded(tokenizer, items):
        longest = max(len(row.ids) for row in options)
        shortened.append(longest > most)
        rows += [_shortened(row, longest, most) for row in options]
    nats, greedy = log_likelihoods(model, rows, most, tokenizer.end_of_text, progress)
    scores, at = [], 0
    for item, is_shortened in zip(items, shortened, strict=True):
        of = slice(at, at + len(item.options))
        scores.append(
            ItemScore(
                item=item,
                log_likelihoods=tuple(nats[of].tolist()),
                greedy=tuple(greedy[of].tolist()),
                tokens=tuple(len(row.ids) - row.first for row in rows[of]),
                is_shortened=is_shortened,
            )
        )
        at = of.stop
    return scores


def summary(tasks: TaskSet, scores: Sequence[ItemScore]) -> TaskScore:
    """What the scores of a file's items come to, all of them and by group."""
    whole = _summary(tasks, scores)
    labels = sorted({s.item.group for s in scores if s.item.group is not None})
    groups = {label: _summary(tasks, [s for s in scores if s.item.group == label]) for label in labels}
    return dataclasses.replace(whole, groups=groups)


def _summary(tasks: TaskSet, scores: Sequence[ItemScore]) -> TaskScore:
    n = len(scores)
    if tasks.kind == "pairs":
        bits, units = [s.share_bits for s in scores], [1] * n
    else:
        bits, units = [s.bits for s in scores], [len(s.item.continuation(s.item.answer).encode()) for s in scores]
    loss, stderr = bits_per_byte(np.asarray(bits, dtype=np.float64), np.asarray(units, dtype=np.float64))
    return TaskScore(
        name=tasks.name,
        kind=tasks.kind,
        n=n,
        loss=loss,
        loss_stderr=stderr,
        accuracy=sum(s.is_right for s in scores) / n,
        accuracy_per_byte=sum(s.is_right_per_byte for s in scores) / n if tasks.kind == "choice" else None,
        chance=None if tasks.kind == "cloze" else sum(1 / len(s.item.options) for s in scores) / n,
        perplexity=_exp(sum(bits) * math.log(2) / n) if tasks.kind == "cloze" else None,
        text_bytes=sum(len(option.encode()) for s in scores for option in s.item.options),
        tokens=sum(sum(s.tokens) for s in scores),
        shortened=sum(s.is_shortened for s in scores),
        sha256=tasks.sha256,
    )


# --- errors of a share ------------------------------------------------------------------------


def binomial_stderr(share: float | None, n: int) -> float | None:
    """Standard error of a share of n items, sqrt(p (1 - p) / (n - 1)); None without a share, or of one item."""
    return None if share is None or n < 2 else math.sqrt(share * (1 - share) / (n - 1))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n items (Wilson, JASA 22 (1927) 209): unlike p ± 2 errors it is right near 0 and 1, too.

    centre = (p + z²/2n) / (1 + z²/n), half width = z sqrt(p (1 - p)/n + z²/4n²) / (1 + z²/n).
    """
    scale = 1 + _Z * _Z / n
    centre = (share + _Z * _Z / (2 * n)) / scale
    half = _Z * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


# --- tokens -----------------------------------------------------------------------------------


def _encoded(tokenizer: Tokenizer, items: Sequence[Item]) -> Iterator[list[Row]]:
    """Each item's options, joined with its context; they are scored from the same place on."""
    texts = [text for item in items for text in (item.context, *(item.context + item.continuation(i) for i in range(len(item.options))))]
    encoded = iter(tokenizer.encode_batch(texts))
    for item in items:
        context, *joined = (next(encoded) for _ in range(1 + len(item.options)))
        # A tokenizer that drops white space may find nothing new in an option; its last token is scored nevertheless.
        first = min([_common(context, ids) for ids in joined] + [max(0, len(ids) - 1) for ids in joined])
        yield [Row(np.asarray(ids, dtype=np.int64), first) for ids in joined]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shortened(row: Row, longest: int, window: int) -> Row:
    """The row without the beginning of what is given, so far that the item's longest row fits into the window.

    Where the scored part alone does not fit, as much is kept as windows that slide have in common.
    """
    room = window - (longest - row.first)
    kept = min(row.first, room if room >= 0 else overlap(window))
    return Row(row.ids[row.first - kept :], kept)


def _window(model: SLM, window: int | None) -> int:
    if window is not None and window < 2:
        raise InvalidTasks(f"window={window} is below 2 tokens, the end of text and one more; give a larger one")
    return model.config.context if window is None else min(window, model.config.context)


# --- numbers ----------------------------------------------------------------------------------


def _wins(values: Sequence[float], place: int) -> bool:
    return all(values[place] > value for i, value in enumerate(values) if i != place)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
