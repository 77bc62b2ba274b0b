"""Which score a search trades against time: bits per byte on the corpus's held-out documents, or the loss on a user's file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nas.corpus import expanded, much_to_score, words_of
from nas.tasks import TaskSet, load_tasks

if TYPE_CHECKING:
    from nas.corpus import Corpus
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM

HELD_OUT = "bpb"
"""What `--accuracy` is called without a file."""

UNTRAINED_BPB = 8.0
"""Bits per byte of a model that knows nothing: 256 equally likely bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A file of `--accuracy FILE`: each model is scored on it beside the held-out documents, and that loss is minimised."""

    path: str
    """As the user wrote it."""
    tasks: TaskSet

    @property
    def name(self) -> str:
        """The file's own name."""
        return expanded(self.path).resolve().name

    @property
    def untrained_loss(self) -> float:
        """The loss of a model that knows nothing: one bit for a pair, and for a byte as many as there are (`nas.likelihood.TaskScore`)."""
        return 1.0 if self.tasks.kind == "pairs" else UNTRAINED_BPB

    def score(self, model: "SLM", tokenizer: "Tokenizer", window: int) -> dict[str, Any]:
        """What a model scores on the file: plain values of `nas.likelihood.TaskScore`, under the file's name.

        Args:
            model: in the precision to be scored, on any device.
            tokenizer: of the model.
            window: tokens that the model sees at once, at most.
        """
        from nas.likelihood import score_tasks

        return {**score_tasks(model, tokenizer, self.tasks, window).to_dict(), "name": self.name}

    def doubts(self, corpus: "Corpus") -> list[str]:
        """What a user should know before searching by it, a line each: text that is trained on as well, text that is much."""
        if not self.tasks.documents:
            return []
        trained, found = {words_of(document) for document in corpus.train}, []
        copies = sum(words_of(document) in trained for document in self.tasks.documents)
        if copies:
            found.append(f"{copies:,} documents of --accuracy {self.path} are trained on, too; give it as --held-out as well")
        return found + much_to_score(sum(len(document.encode()) for document in self.tasks.documents), self.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for a run's manifest; `sha256` and `kind` must stay the same in a run."""
        return {"path": self.path, "sha256": self.tasks.sha256, "kind": self.tasks.kind}


def load_accuracy(word: str) -> Accuracy | None:
    """What `--accuracy` says: a file, or None for `HELD_OUT`.

    Raises:
        InvalidTasks: if there is nothing to score on in the file, or a line breaks a rule.
        InvalidCorpus: if it cannot be read.
    """
    return None if word == HELD_OUT else Accuracy(path=word, tasks=load_tasks(word))


def same_accuracy(kept: object) -> str:
    """What must stay the same of a manifest's `accuracy`: that it is of the held-out documents, or the file's content."""
    return f"{kept.get('kind')} {kept.get('sha256')}" if isinstance(kept, Mapping) else HELD_OUT


def accuracy_words(kept: object) -> str:
    """A manifest's `accuracy` in words."""
    return f"{kept.get('path')} ({kept.get('kind')}, sha256 {str(kept.get('sha256'))[:12]})" if isinstance(kept, Mapping) else HELD_OUT
