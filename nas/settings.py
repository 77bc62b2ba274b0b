"""What a search is told, and everything a candidate is tried with."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cost_models.estimate import CostModel
from nas.accuracy import HELD_OUT, Accuracy
from nas.corpus import Corpus
from nas.errors import UserError
from nas.evaluation import Evaluation, Speed
from nas.run import Run, without_password
from nas.rungs import rungs_below
from search_spaces.precision import PRECISIONS, Precision
from search_spaces.space import Space
from search_spaces.workload import Workload
from targets.measurement import Timing
from targets.target import Target

if TYPE_CHECKING:
    from nas.tokenizer import Tokenizer
    from nas.training import Budget

MOST_AHEAD = 64
"""Trials under way at once, at most: so many searches propose without having learned anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a candidate must keep to, on every device of the search; None: no limit.

    Raises:
        UserError: if a limit is not above 0.
    """

    max_params: int | None = None
    max_memory_bytes: int | None = None
    """Weights, cache of the whole request and workspace."""
    max_latency_s: float | None = None
    """Seconds to generate one token, at the request's mean context, on every device."""

    def __post_init__(self) -> None:
        for name in ("max_params", "max_memory_bytes", "max_latency_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} is not above 0; give a positive limit, or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a search does with each candidate; the same for a whole run."""

    seed: int = 0
    sampler: str = "tpe"
    speed: Speed = "request"
    budget_bytes: int = 384_000
    """Text that a candidate trains on unless it is stopped before: the top rung."""
    rungs: tuple[int, ...] | None = None
    """Text at which a candidate is scored on the way, and may be stopped, ascending; None: `nas.rungs.rungs_below` chooses."""
    accuracy: Accuracy | None = None
    """The file whose loss is minimised; None: bits per byte of the corpus's held-out documents are."""
    weights: tuple[Precision, ...] = ("fp32",)
    """Precision of the deployed matrices; of several, the search chooses."""
    workload: Workload = dataclasses.field(default_factory=Workload)
    limits: Limits = dataclasses.field(default_factory=Limits)
    storage: str | None = None
    """An Optuna storage URL; None: study.db in the run folder."""
    timing: Timing = dataclasses.field(default_factory=Timing)
    ahead: int = 1
    """Trials under way at once: trial k is proposed from the finished trials up to k - ahead."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is not within 0 and {2**32 - 1}; choose one that is")
        wrong = [precision for precision in self.weights if precision not in PRECISIONS]
        if wrong or len(set(self.weights)) != len(self.weights) or not self.weights:
            raise UserError(f"weights={','.join(self.weights)} does not name each of some of {', '.join(PRECISIONS)} once; correct it")
        if not 1 <= self.ahead <= MOST_AHEAD:
            raise UserError(f"ahead={self.ahead} is not within 1 and {MOST_AHEAD}; choose one that is")
        self.budget()
        self.all_rungs()

    def all_rungs(self) -> tuple[int, ...]:
        """Text at which a candidate is scored, in bytes, ascending; the last is the budget.

        Raises:
            UserError: if they do not ascend to it.
        """
        return (*rungs_below(self.budget_bytes, self.rungs), self.budget_bytes)

    def budget(self) -> "Budget":
        """The training budget.

        Raises:
            UserError: if it cannot be trained with.
        """
        from nas.training import Budget

        return Budget(train_bytes=self.budget_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of what must stay the same in a run, the seed apart."""
        return {
            "sampler": self.sampler,
            "speed": self.speed,
            "budget_bytes": self.budget_bytes,
            "rungs": ",".join(map(str, self.all_rungs()[:-1])) or "none",
            "accuracy": HELD_OUT if self.accuracy is None else self.accuracy.to_dict(),
            "weights": ",".join(self.weights),
            "prompt_bytes": self.workload.prompt_bytes,
            "generate_bytes": self.workload.generate_bytes,
            **dataclasses.asdict(self.limits),
            "ahead": self.ahead,
            "storage": None if self.storage is None else without_password(self.storage),
        }


class View(Protocol):
    """Who is told how a search goes."""

    def start(self, total_trials: int | None, deadline_s: float | None, earlier: Sequence[Evaluation] = ()) -> None:
        """The search begins, or goes on after `earlier` trials."""

    def stage(self, trial: int, stage_name: str, detail: str = "", fraction: float | None = None) -> None:
        """A step of a trial began, or is `fraction` done."""

    def finished(self, evaluation: Evaluation) -> None:
        """A trial is over, whatever its state."""

    def note(self, text: str) -> None:
        """Something that people should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Everything a candidate is tried with."""

    run: Run
    space: Space
    targets: tuple[Target, ...]
    """The devices, of different names; what the first says stands in a trial's own fields."""
    servers: tuple[int, ...]
    """How many measurements each of them takes at once."""
    corpus: Corpus
    settings: Settings
    cost_model: CostModel
    view: View

    def tokenizer(self, params_drawn: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer of a trial with these parameters: read from the run folder, or made."""
        from nas.tokenizer import train_tokenizer

        vocab = self.space.requested_vocab(params_drawn)
        return train_tokenizer(self.corpus, vocab, self.run.tokenizer_path(vocab))

    def devices(self) -> list[tuple[str | None, Target]]:
        """The targets, each with the name that `Evaluation.on` and `Evaluation.put` take: None for the first."""
        return [(None if i == 0 else target.spec.name, target) for i, target in enumerate(self.targets)]
