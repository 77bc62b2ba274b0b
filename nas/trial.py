"""A trial under way: its record, which its steps grow, on disk as it is here."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nas.evaluation import Evaluation
from nas.settings import Bench
from search_spaces.config import SLMConfig
from search_spaces.counting import count, peak_bytes
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets.quiet import yield_to_measuring


class Trial:
    """The record of one trial; several threads may add to it.

    Args:
        bench: what it is tried with.
        evaluation: its record so far.
    """

    def __init__(self, bench: Bench, evaluation: Evaluation) -> None:
        self.bench = bench
        self.number = evaluation.trial
        self._evaluation = evaluation
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def evaluation(self) -> Evaluation:
        """The record as it stands, here and on disk."""
        return self._evaluation

    @property
    def is_running(self) -> bool:
        """Whether it is not finished."""
        return self._evaluation.state == "running"

    def save(self, change: Callable[[Evaluation], Evaluation]) -> Evaluation:
        """Changes the record, on disk first; once it is closed, nothing.

        Returns:
            The record after the change.
        """
        with self._lock:
            if not self._is_closed:
                changed = change(self._evaluation)
                changed.save(self.bench.run.trial_path(self.number))
                self._evaluation = changed
            return self._evaluation

    def close(self) -> None:
        """From now on the record stays as it is, whatever still runs in the background."""
        with self._lock:
            self._is_closed = True

    @contextmanager
    def step(self, name: str, detail: str = "", **facts: Any) -> Iterator[dict[str, Any]]:
        """Shows and logs a step, whose result is on disk (`save`) before the log says that it is done.

        Yields:
            Where to put what else the log is to say of it then.
        """
        yield_to_measuring()
        self.bench.view.stage(self.number, name, detail)
        self.log(name, "start", **facts)
        start = time.perf_counter()
        found: dict[str, Any] = {}
        yield found
        self.log(name, "done", **facts, **found, seconds=round(time.perf_counter() - start, 6))

    def log(self, step: str, event: str, **facts: Any) -> None:
        """A line in the run's log."""
        self.bench.run.log(self.number, step, event, **facts)

    # --- what is known once it is counted ---------------------------------------------------

    @property
    def config(self) -> SLMConfig:
        """The architecture."""
        assert self._evaluation.config is not None
        return self._evaluation.config

    @property
    def weights(self) -> Precision:
        """The precision of the matrices."""
        return self._evaluation.weights

    @property
    def tokens(self) -> RequestTokens:
        """The request in tokens of its tokenizer."""
        assert self._evaluation.bytes_per_token is not None
        return self.bench.settings.workload.tokens(self._evaluation.bytes_per_token)


def with_counts(evaluation: Evaluation, config: SLMConfig, tokens: RequestTokens) -> Evaluation:
    """The record with what the architecture alone says; memory and FLOPs are those of the request, as far as it fits."""
    total = min(tokens.total, config.context)
    prompt = min(tokens.prompt, total)
    counts = count(config, context=min(tokens.mid_context, config.context - 1), precision=evaluation.weights)
    return evaluation.evolve(
        config=config,
        params=counts.params,
        flops_per_token=counts.flops_per_token,
        weight_bytes=counts.weight_bytes,
        kv_bytes_per_token=counts.kv_bytes_per_token,
        peak_bytes=peak_bytes(config, prompt_tokens=prompt, context=total, precision=evaluation.weights),
    )


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:500]
