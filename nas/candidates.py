"""One trial, cheap steps first: count, tokenise, estimate, then compile and measure, and train.

Each step's result is on disk before the next begins, and a step whose result is there is not done again. A
candidate that breaks a limit stops at the step that showed it. Compiling goes on in the background, while the
model trains if measuring cannot make that needless.
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cost_models.baseline import BytesBaseline
from cost_models.estimate import CostModel
from nas.corpus import Corpus
from nas.describe import describe_config, format_bytes, format_count, format_ms
from nas.errors import InvalidRun, UserError
from nas.evaluation import WEIGHTS, Evaluation, Speed
from nas.run import Run, without_password
from search_spaces.config import SLMConfig
from search_spaces.counting import count, kv_bytes, peak_bytes
from search_spaces.precision import PRECISIONS, Precision
from search_spaces.space import Space
from search_spaces.workload import RequestTokens, Workload, assumed_bytes_per_token
from targets.measurement import Timing
from targets.quiet import resting, working, yield_to_measuring
from targets.target import Target, TargetError

if TYPE_CHECKING:
    from nas.proposals import Proposal
    from nas.tokenizer import Tokenizer
    from nas.training import Budget
    from search_spaces.model import SLM

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
    weights: tuple[Precision, ...] = ("fp32",)
    """Precision of the deployed matrices; of several, the search chooses."""
    workload: Workload = dataclasses.field(default_factory=Workload)
    limits: Limits = dataclasses.field(default_factory=Limits)
    storage: str | None = None
    """An Optuna storage URL; None: study.db in the run folder."""
    timing: Timing = dataclasses.field(default_factory=Timing)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is not within 0 and {2**32 - 1}; choose one that is")
        wrong = [precision for precision in self.weights if precision not in PRECISIONS]
        if wrong or len(set(self.weights)) != len(self.weights) or not self.weights:
            raise UserError(f"weights={','.join(self.weights)} does not name each of some of {', '.join(PRECISIONS)} once; correct it")
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
            "weights": ",".join(self.weights),
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
    weights = proposal.params.get(WEIGHTS, bench.settings.weights[0])
    evaluation = bench.run.load(proposal.trial) or Evaluation(trial=proposal.trial, params_drawn=proposal.params, weights=weights)
    if evaluation.state == "running":
        evaluation = _prepare(bench, evaluation, before)
    if evaluation.state == "running":
        with _compiling(bench, evaluation) as compiled:
            # A time or a measured peak may break a limit, and then nothing needs to be trained; else it is known last.
            train = functools.partial(_train, before=before)
            steps = (_measure, train) if _may_spare_training(bench) else (train, _measure)
            for step in steps:
                if evaluation.state == "running":
                    evaluation = step(bench, evaluation, compiled)
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
        asked = (config, tokens, bench.target.spec, evaluation.weights)
        estimate = bench.cost_model.estimate(*asked).to_dict()
        estimate["baseline"] = BytesBaseline().estimate(*asked).to_dict()
        return save(counted.evolve(estimate=estimate))


def _ruled_out(bench: Bench, counted: Evaluation, before: Sequence[Evaluation], least: Evaluation | None = None) -> Evaluation | None:
    """The finished record, if counting alone decides: an equal trial of the same precision is copied, a broken limit is infeasible.

    With `least`, a limit must be broken by that too.
    """
    same = (counted.config, counted.weights)
    original = next((e for e in before if (e.config, e.weights) == same and e.duplicate_of is None), None)
    if original is not None:
        return original.evolve(trial=counted.trial, params_drawn=counted.params_drawn, duplicate_of=original.trial, stage_s={})
    reason = _broken(bench, counted, least)
    return None if reason is None else counted.evolve(state="infeasible", reason=reason)


def _may_spare_training(bench: Bench) -> bool:
    """Whether the user gave a limit that only a measured candidate is known to keep."""
    limits = bench.settings.limits
    return limits.max_latency_s is not None or limits.max_memory_bytes is not None


@functools.cache
def _background() -> ThreadPoolExecutor:
    """The thread in which targets compile, for as long as the process lives.

    It must not end earlier: on Linux a child that asks to end with its parent (PR_SET_PDEATHSIG, prctl(2)) ends with the
    thread that started it, and a target may start its compiler here.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="compile")


@contextmanager
def _compiling(bench: Bench, evaluation: Evaluation) -> Iterator[Callable[[], Path]]:
    """Has the request's program compiled in the background, unless it is measured already.

    What the log calls `seconds` of this step is how long the trial waited for it; `overlapped_seconds` went by beside
    another step. So the seconds of all steps add up to the time that passed.

    Yields:
        A function that waits for the artifact, and raises what compiling raised. The artifact is gone afterwards.
    """
    from cost_models.program import build_program

    trial, folder = evaluation.trial, bench.run.artifact_path(evaluation.trial)

    def compile_() -> tuple[Path, float]:
        begin = time.perf_counter()
        with working():
            program = build_program(_config(evaluation), _tokens(bench, evaluation), evaluation.weights)
        return bench.target.compile(program, folder), time.perf_counter() - begin

    def wait() -> Path:
        if not compiling.done():
            bench.view.stage(trial, "compile")
        begin = time.perf_counter()
        with resting():
            artifact, took_s = compiling.result()
        waited_s = time.perf_counter() - begin
        overlapped_s = max(0.0, took_s - waited_s)
        bench.run.log(trial, "compile", "done", seconds=round(waited_s, 6), overlapped_seconds=round(overlapped_s, 6))
        return artifact

    compiling: Future[tuple[Path, float]] = Future()
    if evaluation.measurement is None:
        bench.view.stage(trial, "compile")
        bench.run.log(trial, "compile", "start")
        compiling = _background().submit(compile_)
    try:
        yield wait
    finally:
        # After Ctrl-C compiling goes on until the target is closed; the folder goes when it has ended.
        compiling.cancel()
        compiling.add_done_callback(lambda _: _remove_artifact(folder))


def _remove_artifact(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _measure(bench: Bench, evaluation: Evaluation, compiled: Callable[[], Path]) -> Evaluation:
    """Measures the request's program once it is compiled; a failure of either is a recorded outcome."""
    if evaluation.measurement is not None:
        return evaluation
    from cost_models.measured import latency, make_sample

    config, tokens = _config(evaluation), _tokens(bench, evaluation)
    try:
        artifact = compiled()
        with _step(bench, evaluation, "measure") as save:
            sample = make_sample(config, tokens, bench.settings.seed, precision=evaluation.weights)
            measurement = bench.target.measure(artifact, sample, bench.settings.timing)
            measured = latency(measurement, config, tokens, bench.settings.workload)
            return save(_settled(bench, evaluation.evolve(**measured.to_dict())))
    except Exception as error:
        # Whatever a target or a compiler does wrong costs this trial only; a full disk is nobody's trial.
        if isinstance(error, OSError) or (not isinstance(error, TargetError) and os.environ.get("EDGEWISE_DEBUG") == "1"):
            raise
        kind = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
        failed = evaluation.evolve(state="failed", reason=kind + _first_line(error))
        failed.save(bench.run.trial_path(evaluation.trial))
        return failed


def _train(bench: Bench, evaluation: Evaluation, compiled: Callable[[], Path], before: Sequence[Evaluation]) -> Evaluation:
    """Trains and scores; the weights are on disk, with their score, before the record says so."""
    if evaluation.score is not None:
        return evaluation
    # A run killed between the weights and the record finds the score in the weights' header.
    score = _kept_score(bench, evaluation)
    if score is not None:
        scored = _scored(bench, evaluation, score)
        scored.save(bench.run.trial_path(evaluation.trial))
        bench.run.log(evaluation.trial, "train", "done", recovered=True)
        return scored

    try:
        with _step(bench, evaluation, "train", format_count(evaluation.params) + " parameters") as save:
            return save(_scored(bench, evaluation, _trained(bench, evaluation, before)))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        failed = evaluation.evolve(state="failed", reason=f"training ran out of memory: {_first_line(error)}")
        failed.save(bench.run.trial_path(evaluation.trial))
        return failed


def _kept_score(bench: Bench, evaluation: Evaluation) -> Mapping[str, Any] | None:
    """The score that a trial's weights on disk were written with; None if they are not those of its model and precision."""
    from nas.weights import read_facts

    facts = read_facts(bench.run.weights_path(evaluation.trial)) or {}
    if facts.get("config") != _config(evaluation).key or facts.get("weights", "fp32") != evaluation.weights:
        return None
    score: Mapping[str, Any] | None = facts.get("score")
    return score


def _trained(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> Mapping[str, Any]:
    """Trains in float32, or takes the weights of an equal trial `before`, and scores in the trial's precision.

    The float32 weights are kept with the score, unless they diverged.
    """
    from nas.rounding import rounded_score
    from nas.tokenizer import train_tokenizer
    from nas.weights import save_weights

    vocab = bench.space.requested_vocab(evaluation.params_drawn)
    tokenizer = train_tokenizer(bench.corpus, vocab, bench.run.tokenizer_path(vocab))
    model, score = _from_other_precision(bench, evaluation, before) or _from_scratch(bench, evaluation, tokenizer)
    if score["diverged"]:
        return score
    score = rounded_score(model, evaluation.weights, tokenizer, bench.corpus, score)
    save_weights(bench.run.weights_path(evaluation.trial), model, {"score": score, "weights": evaluation.weights})
    return score


def _from_scratch(bench: Bench, evaluation: Evaluation, tokenizer: "Tokenizer") -> "tuple[SLM, dict[str, Any]]":
    from nas.training import train

    config = _config(evaluation)
    model, score = train(
        config,
        bench.corpus,
        tokenizer,
        bench.settings.budget(),
        bench.settings.seed,
        threads=1 if (evaluation.params or 0) < ONE_THREAD_BELOW else None,
        progress=lambda fraction: bench.view.stage(evaluation.trial, "train", describe_config(config), fraction),
    )
    # Wall-clock figures would make equal runs differ: they are in the log.
    return model, {k: v for k, v in score.to_dict().items() if k not in ("train_s", "eval_s")}


def _from_other_precision(bench: Bench, evaluation: Evaluation, before: Sequence[Evaluation]) -> "tuple[SLM, dict[str, Any]] | None":
    """The float32 weights and score of an equal model that was trained for another precision, if they are still on disk.

    Training it again would come to the same weights.
    """
    from nas.rounding import float_score
    from nas.weights import load_weights

    for other in before:
        if other.config != evaluation.config or (score := _kept_score(bench, other)) is None:
            continue
        try:
            model = load_weights(bench.run.weights_path(other.trial), _config(evaluation))
        except InvalidRun:
            continue
        return model, float_score(score)
    return None


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
        again = _scored(bench, evaluation, _trained(bench, evaluation, ()))
        return save(again) if again != evaluation else evaluation


@contextmanager
def _step(bench: Bench, evaluation: Evaluation, step: str, detail: str = "") -> Iterator[Callable[[Evaluation], Evaluation]]:
    """Shows and logs a step; gives `save`, which puts the step's result on disk before the log says it is done."""
    yield_to_measuring()
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
    counts = count(config, context=min(tokens.mid_context, config.context - 1), precision=evaluation.weights)
    return evaluation.evolve(
        config=config,
        params=counts.params,
        flops_per_token=counts.flops_per_token,
        weight_bytes=counts.weight_bytes,
        kv_bytes_per_token=counts.kv_bytes_per_token,
        peak_bytes=peak_bytes(config, prompt_tokens=prompt, context=total, precision=evaluation.weights),
    )


def _scored(bench: Bench, evaluation: Evaluation, score: Mapping[str, Any]) -> Evaluation:
    scored = evaluation.evolve(score=score, val_bpb=score["val_bpb"], val_bpb_stderr=score["val_bpb_stderr"])
    return _settled(bench, scored)


def _settled(bench: Bench, evaluation: Evaluation) -> Evaluation:
    """The record with the state that its results decide, whichever came first; running while one that is needed lacks."""
    if evaluation.measurement is None:
        return evaluation
    reason = _broken(bench, evaluation)
    if reason is not None:
        return evaluation.evolve(state="infeasible", reason=reason)
    if evaluation.score is None:
        return evaluation
    if evaluation.score["diverged"]:
        return evaluation.evolve(state="diverged", reason="the training loss exploded or was not a number")
    if evaluation.val_bpb is None:
        return evaluation.evolve(state="failed", reason=f"with {evaluation.weights} weights its bits per byte are not a number")
    return evaluation.evolve(state="complete", reason=None)


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
