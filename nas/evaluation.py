"""`Evaluation`: everything known about one trial, growing step by step, kept as one JSON file.

A new value is made at each step (`evolve`) and written whole, so a run killed at any moment leaves either
the file before the step or the one after it, never half of one.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from nas.errors import InvalidRun
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.precision import PRECISIONS, Precision
from targets.files import whole

State = Literal["running", "complete", "stopped", "infeasible", "failed", "diverged"]
"""running: not finished; stopped: foretold at a rung to end hardly better than a finished trial as fast; infeasible: breaks a
limit; failed: could not be compiled or measured; diverged: training did."""

Speed = Literal["prefill", "decode", "request"]
"""Which time is traded against accuracy."""

WEIGHTS = "weights"
"""The sampler's name of the precision, where a search chooses among several."""

_INTS = ("trial", "duplicate_of", "params", "flops_per_token", "weight_bytes", "kv_bytes_per_token", "peak_bytes")
_FLOATS = ("bytes_per_token", "prefill_s", "decode_s_per_token", "request_s", "bytes_per_s", "val_bpb", "val_bpb_stderr")
_RECORDS = ("estimate", "measurement", "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResult:
    """What a trial comes to on one device; the fields are those of `Evaluation` with the same names.

    Raises:
        InvalidRun: if a field has a value of another kind than its own.
    """

    estimate: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    peak_bytes: int | None = None
    prefill_s: float | None = None
    decode_s_per_token: float | None = None
    request_s: float | None = None
    bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return {name: _plain(name, getattr(self, name)) for name in DEVICE_FIELDS}

    @classmethod
    def from_dict(cls, values: object) -> "DeviceResult":
        """The inverse of `to_dict`.

        Raises:
            InvalidRun: if it is no mapping, or on an unknown key.
        """
        if not isinstance(values, Mapping):
            raise InvalidRun(f"{values!r} is not what a device came to; give a mapping from names to figures")
        unknown = [key for key in values if key not in DEVICE_FIELDS]
        if unknown:
            raise InvalidRun(f"{unknown[0]!r} is not a field of what a device came to; it was written by another version or edited by hand")
        return cls(**values)


DEVICE_FIELDS = tuple(f.name for f in dataclasses.fields(DeviceResult))
"""What differs from device to device in a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One trial's complete record.

    A number that is not finite is kept as None: it is not a result, and JSON has no word for it.
    Records are copied into plain JSON values, so that what is read back equals what was written.

    Raises:
        InvalidRun: if a field has a value of another kind than its own.
    """

    trial: int
    state: State = "running"
    reason: str | None = None
    """Why the trial did not complete, in one line."""
    duplicate_of: int | None = None
    """The earlier trial with an equal config and precision, whose results these are."""

    params_drawn: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler proposed, by parameter name, before any repair."""
    config: SLMConfig | None = None
    weights: Precision = "fp32"
    """The precision of the matrices, in which the model is compiled, measured and scored."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text per token of this candidate's tokenizer."""

    params: int | None = None
    """Unique parameters; tied and shared ones once."""
    flops_per_token: int | None = None
    weight_bytes: int | None = None
    """Bytes of the weights in their precision, scales included."""
    kv_bytes_per_token: int | None = None
    peak_bytes: int | None = None
    """Memory counted from the architecture: weights, cache and workspace."""

    estimate: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    """The device's raw record."""
    prefill_s: float | None = None
    """Seconds to read the workload's prompt, a fixed number of bytes."""
    decode_s_per_token: float | None = None
    request_s: float | None = None
    """Seconds for the workload's whole request: prompt read and text generated."""
    bytes_per_s: float | None = None
    """Bytes of text generated in a second."""
    others: Mapping[str, DeviceResult] = field(default_factory=dict)
    """The same figures on the further devices of a search over several, by name in the order given; those above are of the first."""

    score: Mapping[str, Any] | None = None
    val_bpb: float | None = None
    """Validation bits per byte of text, of the weights in their precision."""
    val_bpb_stderr: float | None = None

    stage_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent by stage: count, tokenizer, compile, measure, train."""

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise InvalidRun(f"state={self.state!r} is not one of {', '.join(get_args(State))}; choose one")
        if self.weights not in PRECISIONS:
            raise InvalidRun(f"weights={self.weights!r} is not one of {', '.join(PRECISIONS)}; choose one")
        _check(self)
        if self.reason is not None and not isinstance(self.reason, str):
            raise InvalidRun(f"reason={self.reason!r} is not text; give a sentence")
        if self.config is not None and not isinstance(self.config, SLMConfig):
            raise InvalidRun(f"config is a {type(self.config).__name__}, not an architecture; give an SLMConfig")
        object.__setattr__(self, "others", dict(self.others))
        for stage, seconds in self.stage_s.items():
            if not isinstance(seconds, int | float) or isinstance(seconds, bool):
                raise InvalidRun(f"stage_s[{stage!r}]={seconds!r} is not a number of seconds; give one")

    @property
    def names_weights(self) -> bool:
        """Whether people are told the precision: it is not float32, or the search chose among several."""
        return self.weights != "fp32" or WEIGHTS in self.params_drawn

    @property
    def s_per_byte(self) -> float | None:
        """Seconds to generate one byte of text: decode seconds per token / bytes per token.

        Only this compares across vocabularies; a larger one needs fewer tokens for the same text.
        """
        if self.decode_s_per_token is None or not self.bytes_per_token:
            return None
        return self.decode_s_per_token / self.bytes_per_token

    def seconds(self, speed: Speed) -> float | None:
        """The time traded against accuracy, in seconds, or None if it is not known; on the first device, if there are several.

        decode: seconds per byte of text; prefill: seconds to read the prompt; request: seconds for a request.
        """
        return self._seconds(self, speed)

    def _seconds(self, of: "Evaluation | DeviceResult", speed: Speed) -> float | None:
        value = {"prefill": of.prefill_s, "decode": of.decode_s_per_token, "request": of.request_s}[speed]
        if value is not None and speed == "decode":
            value = value / self.bytes_per_token if self.bytes_per_token else None
        return value if value is not None and value > 0 else None

    def _everywhere(self) -> "list[Evaluation | DeviceResult]":
        """What holds the figures of each device, the first before the others."""
        return [self, *self.others.values()]

    def on(self, device: str | None) -> "Evaluation":
        """The trial as one device alone saw it: one of `others`, or the first for None.

        On a device that it did not come to, nothing is known of it there.
        """
        if device is None:
            return self if not self.others else self.evolve(others={})
        there = self.others.get(device, DeviceResult())
        return self.evolve(others={}, **{name: getattr(there, name) for name in DEVICE_FIELDS})

    def put(self, device: str | None, **figures: Any) -> "Evaluation":
        """A copy with these figures of one of `others` changed, or those of the first device for None."""
        if device is None:
            return self.evolve(**figures)
        return self.evolve(others={**self.others, device: dataclasses.replace(self.others.get(device, DeviceResult()), **figures)})

    @property
    def is_measured(self) -> bool:
        """Whether every device has measured it."""
        return all(of.measurement is not None for of in self._everywhere())

    def estimated_seconds(self, speed: Speed, *, baseline: bool = False) -> float | None:
        """The predicted time that `seconds` measures, by the cost model or by its simplest baseline; None if there is none."""
        record = self.estimate or {}
        record = record.get("baseline") or {} if baseline else record
        value: float | None = record.get("decode_s_per_token" if speed == "decode" else f"{speed}_s")
        if value is None or speed != "decode":
            return value
        return value / self.bytes_per_token if self.bytes_per_token else None

    @property
    def task(self) -> Mapping[str, Any] | None:
        """What it scored on the file of `--accuracy FILE` (see `nas.accuracy`); None where bits per byte are searched by."""
        return task_in(self.score)

    @property
    def loss(self) -> float | None:
        """What a search minimises beside time: `val_bpb`, or the loss on the file of `--accuracy FILE`."""
        return loss_in(self.score) if self.task is not None else self.val_bpb

    @property
    def loss_stderr(self) -> float | None:
        """The standard error of `loss` over the documents or items that it is of, the same for every candidate."""
        return self.val_bpb_stderr if self.task is None else _number("loss_stderr", self.task.get("loss_stderr"))

    @property
    def twin(self) -> SLMConfig | None:
        """The smaller model that was trained and scored in its place (`search_spaces.twin`); None if it was trained itself.

        Raises:
            InvalidRun: if the record of it describes no model.
        """
        values = (self.score or {}).get("twin")
        if not isinstance(values, Mapping):
            return None
        try:
            return SLMConfig.from_dict(values)
        except InvalidConfig as error:
            raise InvalidRun(f"the twin of trial {self.trial} does not describe a model: {error}") from error

    @property
    def is_trained(self) -> bool:
        """Whether its training has come to its end; on the way there `score` has nothing but `rungs`."""
        return self.score is not None and "val_bpb" in self.score

    @property
    def rungs(self) -> list[Mapping[str, Any]]:
        """What it scored at each rung below the top so far, the lowest first (see `nas.rungs`)."""
        rungs = (self.score or {}).get("rungs")
        return [dict(rung) for rung in rungs if isinstance(rung, Mapping)] if isinstance(rungs, list) else []

    @property
    def foretold_loss(self) -> float | None:
        """What a stopped trial's `loss` would have been, foretold from its last rung; None for any other."""
        foretold = (self.score or {}).get("foretold") if self.state == "stopped" else None
        return _number("loss", foretold.get("loss")) if isinstance(foretold, Mapping) else None

    @property
    def last_rung(self) -> Mapping[str, Any] | None:
        """The last rung that a stopped trial was scored at (see `nas.rungs`); None for any other."""
        rungs = self.rungs if self.state == "stopped" else []
        return rungs[-1] if rungs else None

    def is_ranked(self, speed: Speed) -> bool:
        """Whether the trial completed with all objectives known."""
        known = self.loss is not None and all(self._seconds(of, speed) is not None for of in self._everywhere())
        return self.state == "complete" and known

    def objectives(self, speed: Speed) -> tuple[float, ...]:
        """(loss, seconds on the first device, on the next, ...), all to be minimised; see `loss`, and `seconds` for what is timed.

        Raises:
            ValueError: if one of them is not known.
        """
        loss = self.loss
        seconds = [self._seconds(of, speed) for of in self._everywhere()]
        known = [value for value in seconds if value is not None]
        if loss is None or len(known) < len(seconds):
            missing = "score" if loss is None else f"{speed} time"
            raise ValueError(f"trial {self.trial} ({self.state}) has no {missing}; ask `is_ranked({speed!r})` first")
        return loss, *known

    def evolve(self, **changes: Any) -> "Evaluation":
        """A copy with these fields changed.

        Raises:
            TypeError: on a name that is not a field.
            InvalidRun: on a value of the wrong kind.
        """
        return dataclasses.replace(self, **changes)

    # --- files ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["config"] = None if self.config is None else self.config.to_dict()
        for name in (*_RECORDS, "params_drawn", "stage_s"):
            values[name] = _plain(name, values[name])
        values["others"] = {device: there.to_dict() for device, there in self.others.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`; fields left out take their defaults.

        Raises:
            InvalidRun: on an unknown key, a missing trial number, or a value of the wrong kind.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidRun(f"{key!r} is not a field of a trial's record; it was written by another version or edited by hand")
        if "trial" not in values:
            raise InvalidRun("trial is missing; a trial's record needs its number")
        values = dict(values)
        others = values.get("others", {})
        if not isinstance(others, Mapping):
            raise InvalidRun(f"others={others!r} is not a mapping; give one from device names to figures")
        values["others"] = {device: DeviceResult.from_dict(there) for device, there in others.items()}
        if values.get("config") is not None:
            if not isinstance(values["config"], Mapping):
                raise InvalidRun(f"config={values['config']!r} is not a JSON object; give an architecture config")
            try:
                values["config"] = SLMConfig.from_dict(values["config"])
            except InvalidConfig as error:
                raise InvalidRun(f"config does not describe a model: {error}") from error
        return cls(**values)

    def save(self, path: Path) -> None:
        """Writes the record whole, as indented JSON."""
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads a record that `save` wrote.

        Raises:
            InvalidRun: if the file cannot be read, is not JSON, or does not hold a trial's record.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRun(f"{path} cannot be read ({error.strerror}); give a trial's JSON file") from error
        except (ValueError, RecursionError) as error:
            raise InvalidRun(f"{path} is damaged: not JSON ({error}); delete it and resume the run to have the trial done again") from error
        if not isinstance(values, dict):
            raise InvalidRun(f"{path} is damaged: it holds {type(values).__name__}, not a JSON object; delete it and resume the run")
        try:
            return cls.from_dict(values)
        except InvalidRun as error:
            raise InvalidRun(f"{path} is damaged: {error}") from error


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes a file so that readers see all of it or what was there before; returns its path.

    Text is written as UTF-8. The content goes to a temporary file in the same folder, is flushed to the disk,
    and takes the name in one step; parent folders are made.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part, part.open("xb") as file:
        file.write(data)
    return path


def task_in(score: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What a score, of a trial or of one of its rungs, says of the file of `--accuracy FILE`; None if nothing."""
    task = (score or {}).get("task")
    return task if isinstance(task, Mapping) else None


def loss_in(score: Mapping[str, Any] | None) -> float | None:
    """The loss of a score, of a trial or of one of its rungs: what a search minimises (see `Evaluation.loss`)."""
    task = task_in(score)
    return _number("val_bpb", (score or {}).get("val_bpb")) if task is None else _number("loss", task.get("loss"))


def _check(record: Evaluation | DeviceResult) -> None:
    """Refuses fields of the wrong kind, makes numbers floats and records plain JSON values of their own."""
    names = {f.name for f in dataclasses.fields(record)}
    for name in (n for n in _INTS if n in names):
        value = getattr(record, name)
        if (value is not None or name == "trial") and (not isinstance(value, int) or isinstance(value, bool)):
            raise InvalidRun(f"{name}={value!r} is not an integer; give one")
    for name in (n for n in _FLOATS if n in names):
        object.__setattr__(record, name, _number(name, getattr(record, name)))
    for name in (n for n in (*_RECORDS, "params_drawn", "stage_s") if n in names):
        value = getattr(record, name)
        if value is None and name in _RECORDS:
            continue
        if not isinstance(value, Mapping):
            raise InvalidRun(f"{name}={value!r} is not a mapping; give one from names to JSON values")
        object.__setattr__(record, name, _plain(name, value))


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRun(f"{name}={value!r} is not a number; give one")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _plain(name: str, value: object) -> Any:
    """The value in JSON types only, copied; floats that are not finite become None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidRun(f"{name} has the key {key!r}, which is not text; use strings as keys")
        return {str(k): _plain(f"{name}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", v) for i, v in enumerate(value)]
    raise InvalidRun(f"{name} is a {type(value).__name__}, which JSON cannot hold; give text, numbers, lists or mappings")
