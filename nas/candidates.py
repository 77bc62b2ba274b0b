"""One trial, cheap steps first: count, tokenise, estimate, compile and measure, train.

Each step's result is on disk before the next begins, and a step whose result is there is not done again. A
candidate that breaks a limit stops at the step that showed it.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cost_models.baseline import BytesBaseline
from cost_models.estimate import CostModel
from nas.corpus import Corpus
from nas.describe import describe_config, format_bytes, format_count, format_ms
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation, Speed
from nas.run import Run, without_password
from search_spaces.config import SLMConfig
from search_spaces.counting import count, kv_bytes, peak_bytes
from search_spaces.space import Space
from search_spaces.workload import RequestTokens, Workload, assumed_bytes_per_token
from targets.measurement import Timing
from targets.target import Target, TargetError

if TYPE_CHECKING:
    from nas.proposals import Proposal
    from nas.training import Budget

ONE_THREAD_BELOW = 3_000_000
"""Models with fewer parameters train on one thread: their products are too small for a second to help (13 % more tokens a
second on an idle machine of two cores, many times fewer when another program wants one), and the score is then the same
to the bit whatever the number of cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a candidate must keep to; None: no limit.

    Raises:
        UserError: if a limit is not above 0.
    """

    max_params: int | None = None
    max_memory_bytes: int | None = None
    """Weights, cache of the whole request and workspace."""
    max_latency_s: float | None = None
    """Seconds to generate one token, at the request's mean context."""

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
    train_bytes: int = 384_000
    """Text that each candidate trains on."""
    workload: Workload = dataclasses.field(default_factory=Workload)
    limits: Limits = dataclasses.field(default_factory=Limits)
    storage: str | None = None
    """An Optuna storage URL; None: study.db in the run folder."""
    timing: Timing = dataclasses.field(default_factory=Timing)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is not within 0 and {2**32 - 1}; choose one that is")
        self.budget()

    def budget(self) -> "Budget":
        """The training budget.

        Raises:
            UserError: if it cannot be trained with.
        """
        from nas.training import Budget

        return Budget(train_bytes=self.train_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of what must stay the same in a run, the seed apart."""
        return {
            "sampler": self.sampler,
            "speed": self.speed,
            "train_bytes": self.train_bytes,
            "prompt_bytes": self.workload.prompt_bytes,
            "generate_bytes": self.workload.generate_bytes,
            **dataclasses.asdict(self.limits),
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
    target: Target
    corpus: Corpus
    settings: Settings
    cost_model: CostModel
    view: View


def evaluate(bench: Bench, proposal: "Proposal", before: Sequence[Evaluation]) -> Evaluation:
    """Takes a trial to its end, from wherever its record stands.

    Args:
        bench: what to try it with.
        proposal: its parameters, unless its record has them already.
        before: the finished trials before it, among which a duplicate may be.

    Returns:
        The finished record, as it is on disk.
    """
    evaluation = bench.run.load(proposal.trial) or Evaluation(trial=proposal.trial, params_drawn=proposal.params)
    for step in (_prepare, _measure, _train):
        if evaluation.state != "running":
            break
        evaluation = step(bench, evaluation, before)
    assert evaluation.state != "running"
    return evaluation


# --- steps ------------------------------------------------------------------------------------


def _prepare(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> Evaluation:
    """Counts, looks for an equal trial, and only then makes or reads the tokenizer, whose real size decides."""
    if evaluation.estimate is not None:
        return evaluation
    from nas.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    with _step(bench, evaluation, "count") as save:
        config = bench.space.config(evaluation.params_drawn)
        tokens = bench.settings.workload.tokens(assumed_bytes_per_token(vocab))
        requested = _counted(bench, evaluation, config, tokens)
        # The real vocabulary may be smaller than the requested one: a limit rules out only what would break it with none
        # but the bytes. (Both, as a space's smallest size is broken from the other side.)
        least = _counted(bench, evaluation, dataclasses.replace(config, vocab_size=min(config.vocab_size, MIN_VOCAB_SIZE)), tokens)
        early = _ruled_out(bench, requested, before, least.evolve(bytes_per_token=assumed_bytes_per_token(vocab)))
        if early is not None:
            return save(early)

    with _step(bench, evaluation, "tokenizer", f"vocabulary {vocab}") as save:
        tokenizer = train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab))
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        tokens = bench.settings.workload.tokens(tokenizer.bytes_per_token)
        counted = _counted(bench, evaluation, config, tokens).evolve(bytes_per_token=tokenizer.bytes_per_token)
        late = _ruled_out(bench, counted, before)
        if late is not None:
            return save(late)
        if tokens.total > config.context:
            reason = f"the request needs {tokens.total} tokens and the context holds {config.context}"
            return save(counted.evolve(state="infeasible", reason=reason))
        estimate = bench.cost_model.estimate(config, tokens, bench.target.spec).to_dict()
        estimate["baseline"] = BytesBaseline().estimate(config, tokens, bench.target.spec).to_dict()
        return save(counted.evolve(estimate=estimate))


def _ruled_out(bench: Bench, counted: Evaluation, before: Sequence[Evaluation], least: Evaluation | None = None) -> Evaluation | None:
    """The finished record, if counting alone decides: an equal trial is copied, a broken limit is infeasible.

    With `least`, a limit must be broken by that too.
    """
    original = next((e for e in before if e.config == counted.config and e.duplicate_of is None), None)
    if original is not None:
        return original.evolve(trial=counted.trial, params_drawn=counted.params_drawn, duplicate_of=original.trial, stage_s={})
    reason = _broken(bench, counted, least)
    return None if reason is None else counted.evolve(state="infeasible", reason=reason)


def _measure(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> Evaluation:
    """Compiles the request's program and measures it; a failure is a recorded outcome."""
    if evaluation.measurement is not None:
        return evaluation
    from cost_models.measured import latency, make_sample
    from cost_models.program import build_program

    config, workload = _config(evaluation), bench.settings.workload
    tokens = _tokens(bench, evaluation)
    folder = bench.run.artifact_path(evaluation.trial)
    try:
        with _step(bench, evaluation, "compile"):
            artifact = bench.target.compile(build_program(config, tokens), folder)
        with _step(bench, evaluation, "measure") as save:
            sample = make_sample(config, tokens, bench.settings.seed)
            measured = latency(bench.target.measure(artifact, sample, bench.settings.timing), config, tokens, workload)
            evaluation = evaluation.evolve(**measured.to_dict())
            reason = _broken(bench, evaluation)
            return save(evaluation if reason is None else evaluation.evolve(state="infeasible", reason=reason))
    except Exception as error:
        # Whatever a target or a compiler does wrong costs this trial only; a full disk is nobody's trial.
        if isinstance(error, OSError) or (not isinstance(error, TargetError) and os.environ.get("EDGEWISE_DEBUG") == "1"):
            raise
        kind = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
        failed = evaluation.evolve(state="failed", reason=kind + _first_line(error))
        failed.save(bench.run.trial_path(evaluation.trial))
        return failed
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


def _train(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> Evaluation:
    """Trains and scores; the weights are on disk, with their score, before the record says so."""
    from nas.weights import read_facts

    config, path = _config(evaluation), bench.run.weights_path(evaluation.trial)
    # A run killed between the weights and the record finds the score in the weights' header.
    facts = read_facts(path)
    if facts is not None and facts.get("config") == config.key and "score" in facts:
        scored = _scored(evaluation, facts["score"])
        scored.save(bench.run.trial_path(evaluation.trial))
        bench.run.log(evaluation.trial, "train", "done", recovered=True)
        return scored

    try:
        with _step(bench, evaluation, "train", format_count(evaluation.params) + " parameters") as save:
            return save(_scored(evaluation, _trained(bench, evaluation)))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        failed = evaluation.evolve(state="failed", reason=f"training ran out of memory: {_first_line(error)}")
        failed.save(bench.run.trial_path(evaluation.trial))
        return failed


def _trained(bench: Bench, evaluation: Evaluation) -> dict[str, Any]:
    """Trains, keeps the weights unless they diverged, and returns the score."""
    from nas.tokenizer import train_tokenizer
    from nas.training import train
    from nas.weights import save_weights

    config = _config(evaluation)
    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    model, score = train(
        config,
        bench.corpus,
        train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab)),
        bench.settings.budget(),
        bench.settings.seed,
        threads=1 if (evaluation.params or 0) < ONE_THREAD_BELOW else None,
        progress=lambda fraction: bench.view.stage(evaluation.trial, "train", describe_config(config), fraction),
    )
    # Wall-clock figures would make equal runs differ: they are in the log.
    values = {k: v for k, v in score.to_dict().items() if k not in ("train_s", "eval_s")}
    if not score.diverged:
        save_weights(bench.run.weights_path(evaluation.trial), model, {"score": values})
    return values


def restore(bench: Bench, evaluation: Evaluation) -> Evaluation:
    """Makes a complete trial's tokenizer or weights anew if they are lost or damaged; a damaged weight file is set aside.

    Returns:
        The record, with the score of the new weights if they were trained again (on the same machine, the same score).
    """
    from nas.tokenizer import train_tokenizer
    from nas.weights import load_weights

    config, path = _config(evaluation), bench.run.weights_path(evaluation.trial)
    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    tokenizer = train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab))
    if tokenizer.vocab_size != config.vocab_size:
        bench.view.note(f"the tokenizer of trial {evaluation.trial} cannot be made again: another version makes another one")
        return evaluation
    try:
        load_weights(path, config)
    except InvalidRun:
        kept = f"damaged (kept as {bench.run.set_aside(path).name})" if path.exists() else "lost"
        bench.view.note(f"the weights of trial {evaluation.trial} were {kept}; it is trained again")
    else:
        return evaluation
    with _step(bench, evaluation, "train", "again") as save:
        again = _scored(evaluation, _trained(bench, evaluation))
        return save(again) if again != evaluation else evaluation


@contextmanager
def _step(bench: Bench, evaluation: Evaluation, step: str, detail: str = "") -> Iterator[Callable[[Evaluation], Evaluation]]:
    """Shows and logs a step; gives `save`, which puts the step's result on disk before the log says it is done."""
    bench.view.stage(evaluation.trial, step, detail)
    bench.run.log(evaluation.trial, step, "start")
    start = time.perf_counter()

    def save(result: Evaluation) -> Evaluation:
        result.save(bench.run.trial_path(result.trial))
        return result

    yield save
    bench.run.log(evaluation.trial, step, "done", seconds=round(time.perf_counter() - start, 6))


# --- rules ------------------------------------------------------------------------------------


def violation(bench: Bench, evaluation: Evaluation) -> float:
    """By which share the candidate breaks the worst of its limits; at most 0 if it keeps them all, -1 if there are none.

    The violation of value v against a most of m is v/m - 1. Failed and diverged candidates, and requests beyond
    the context, have 1.
    """
    worst = max((value / most - 1 for _, value, most in _limits(bench, evaluation)), default=-1.0)
    if evaluation.state == "complete":
        return min(worst, 0.0)
    return worst if worst > 0 else 1.0


def _limits(bench: Bench, evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """(what, value, most) of every limit whose value is known."""
    limits, e = bench.settings.limits, evaluation
    least, most = bench.space.params_range or (None, None)
    memory = bench.target.spec.memory_bytes or None
    needed = _memory_bytes(bench, e)
    rows: list[tuple[str, float | None, float | None]] = [
        ("--max-params", e.params, limits.max_params),
        (f"the largest size in space {bench.space.name!r}", e.params, most),
        ("--max-memory", needed, limits.max_memory_bytes),
        (f"the memory of {bench.target.spec.name!r}", needed, memory),
        ("--max-latency", e.decode_s_per_token, limits.max_latency_s),
    ]
    if least is not None and e.params:
        # "At least" turned into "at most": how far below is how far 1/params is above 1/least.
        rows.append((f"the smallest size in space {bench.space.name!r}", 1 / e.params, 1 / least))
    return [(what, value, limit) for what, value, limit in rows if value is not None and limit is not None]


def _memory_bytes(bench: Bench, evaluation: Evaluation) -> int | None:
    """The peak once the target has counted it; before that what is sure: weights and the cache of the request.

    The workspace depends on how a target computes, so an estimate of it rules no candidate out.
    """
    config = evaluation.config
    if evaluation.measurement is not None or config is None or evaluation.weight_bytes is None:
        return evaluation.peak_bytes
    bytes_per_token = evaluation.bytes_per_token or assumed_bytes_per_token(config.vocab_size)
    total = min(bench.settings.workload.tokens(bytes_per_token).total, config.context)
    return evaluation.weight_bytes + kv_bytes(config, total)


def _broken(bench: Bench, evaluation: Evaluation, least: Evaluation | None = None) -> str | None:
    """The limit that is broken (by `least` too, if that is given), in one line, or None."""
    broken_by_least = None if least is None else {what for what, value, most in _limits(bench, least) if value > most}
    for what, value, most in _limits(bench, evaluation):
        if value <= most or (broken_by_least is not None and what not in broken_by_least):
            continue
        if what == "--max-latency":
            return f"{format_ms(value)} ms a token is above --max-latency {format_ms(most)} ms"
        if "memory" in what:
            return f"{format_bytes(value)} of memory is above {what}, {format_bytes(most)}"
        if "smallest" in what:
            return f"{format_count(evaluation.params)} parameters is below {what}, {format_count(1 / most)}"
        return f"{format_count(value)} parameters is above {what}, {format_count(most)}"
    return None


def _counted(bench: Bench, evaluation: Evaluation, config: SLMConfig, tokens: RequestTokens) -> Evaluation:
    """The record with what the architecture alone says; memory and FLOPs are those of the request, as far as it fits."""
    total = min(tokens.total, config.context)
    prompt = min(tokens.prompt, total)
    counts = count(config, context=min(tokens.mid_context, config.context - 1))
    return evaluation.evolve(
        config=config,
        params=counts.params,
        flops_per_token=counts.flops_per_token,
        weight_bytes=counts.weight_bytes,
        kv_bytes_per_token=counts.kv_bytes_per_token,
        peak_bytes=peak_bytes(config, prompt_tokens=prompt, context=total),
    )


def _scored(evaluation: Evaluation, score: Mapping[str, Any]) -> Evaluation:
    diverged = bool(score["diverged"])
    return evaluation.evolve(
        state="diverged" if diverged else "complete",
        reason="the training loss exploded or was not a number" if diverged else None,
        score=score,
        val_bpb=score["val_bpb"],
        val_bpb_stderr=score["val_bpb_stderr"],
    )


def _config(evaluation: Evaluation) -> SLMConfig:
    assert evaluation.config is not None
    return evaluation.config


def _tokens(bench: Bench, evaluation: Evaluation) -> RequestTokens:
    assert evaluation.bytes_per_token is not None
    return bench.settings.workload.tokens(evaluation.bytes_per_token)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:500]


def _out_of_memory(error: BaseException) -> bool:
    if os.environ.get("EDGEWISE_DEBUG") == "1":
        return False
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
