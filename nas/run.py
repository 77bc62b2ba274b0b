"""A run folder: one search on disk, from its manifest to the weights of its front.

```
manifest.json              what the run is: seed, versions, device, space, corpus, settings, the date it began
lock                       held by the process that searches
study.db                   Optuna storage (unless --storage)
tokenizers/2048.json       one per vocabulary size asked for
trials/00003.json          an `Evaluation`, growing step by step; 00003.json.damaged: set aside, done again
references/NAME.json       an `Evaluation` of a model that was measured beside the candidates; its trial is -1
noise/00003-1.json         an `Evaluation` of trial 3 trained once more, with seed 1
training/00003.safetensors where the training of a trial under way stands, at its last rung
weights/00003.safetensors  trained weights and their score; in the end for trials on the front only; .damaged: as above
front.json                 the front so far
log.jsonl                  when each step began and was done, and its seconds: the only file with wall-clock times
report.html
```

Everything but the manifest's date and `log.jsonl` depends on seed and settings alone, as far as the target's
measurements do.
"""

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nas.accuracy import HELD_OUT, accuracy_words, same_accuracy
from nas.errors import InvalidRun
from nas.evaluation import Evaluation, write_whole

FORMAT = 2
"""Version of the run folder's layout."""

_NEEDED = ("format", "seed", "space", "target", "corpus", "settings", "device", "id", "created", "versions")
"""What every manifest has; `target` and `device` are the name and the spec of the first of `targets`."""

_SETTLED = ("format", "seed", "space", "targets", "corpus", "settings")
"""What must be the same for a run to go on: of the corpus its text, of the devices what their times depend on."""

_DEVICE = ("triple", "cpu", "cores", "vector_bytes")
_DEVICE_LATER = ("features", "dot", "affinity", "backend", "arch", "options")
"""What a device's times depend on; the second kind is compared where the run has it, as older ones do not."""

_OPTIONS = {
    "seed": "--seed",
    "targets": "--target",
    "space": "--space",
    "corpus": "--corpus",
    "budget_bytes": "--budget",
    "rungs": "--rungs",
    "sampler": "--sampler",
    "speed": "--speed",
    "accuracy": "--accuracy",
    "weights": "--weights",
    "storage": "--storage",
    "ahead": "--ahead",
    "max_params": "--max-params",
    "max_memory_bytes": "--max-memory",
    "max_latency_s": "--max-latency",
}


class Run:
    """A run folder that exists, with its manifest read.

    Made by `open_run` (to look at) or `resume_or_create` (to search in).
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    # --- names ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def report_path(self) -> Path:
        """Where the report is."""
        return self.path / "report.html"

    @property
    def front_path(self) -> Path:
        """Where the front so far is, as JSON."""
        return self.path / "front.json"

    def trial_path(self, trial: int) -> Path:
        """Where a trial's `Evaluation` is."""
        return self.path / "trials" / f"{trial:05d}.json"

    def weights_path(self, trial: int) -> Path:
        """Where a trial's trained weights are, if they are kept."""
        return self.path / "weights" / f"{trial:05d}.safetensors"

    def training_path(self, trial: int) -> Path:
        """Where the training of a trial under way stands; removed once the trial is over."""
        return self.path / "training" / f"{trial:05d}.safetensors"

    def tokenizer_path(self, vocab_size: int) -> Path:
        """Where the tokenizer for a requested vocabulary size is."""
        return self.path / "tokenizers" / f"{vocab_size}.json"

    def artifact_path(self, trial: int, place: int = 0) -> Path:
        """A folder for what the target at that place of `devices` compiles; removed once it is measured."""
        return self.path / "artifacts" / f"{trial:05d}-{place}"

    def reference_path(self, name: str) -> Path:
        """Where the record of a model measured beside the candidates is; the name must be one of a file."""
        assert name == Path(name).name and not name.startswith(".")
        return self.path / "references" / f"{name}.json"

    def repeat_path(self, trial: int, seed: int) -> Path:
        """Where the record of a trial that was trained once more, with another seed, is."""
        return self.path / "noise" / f"{trial:05d}-{seed}.json"

    # --- devices --------------------------------------------------------------------------

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The devices that the run is for, as `DeviceSpec.to_dict` gives them."""
        return list(targets_of(self.manifest))

    @property
    def devices(self) -> list[str]:
        """Their names, in the order given."""
        return [str(spec["name"]) for spec in self.specs]

    # --- evaluations ----------------------------------------------------------------------

    def load(self, trial: int) -> Evaluation | None:
        """A trial's record, or None if it has none yet.

        Raises:
            InvalidRun: if its file is damaged, or holds another trial.
        """
        path = self.trial_path(trial)
        if not path.exists():
            return None
        evaluation = Evaluation.load(path)
        if evaluation.trial != trial:
            raise InvalidRun(
                f"{path} is damaged: it holds trial {evaluation.trial}; delete it and resume the run to have the trial done again"
            )
        return evaluation

    def evaluations(self) -> list[Evaluation]:
        """Every trial's record, by number, with the seconds of its stages from the log.

        Raises:
            InvalidRun: if a file is damaged.
        """
        numbers = sorted(int(p.stem) for p in (self.path / "trials").glob("*.json") if p.stem.isdigit())
        seconds = self.stage_seconds()
        loaded = ((n, self.load(n)) for n in numbers)
        return [e.evolve(stage_s=seconds.get(n, {})) for n, e in loaded if e is not None]

    def references(self) -> dict[str, Evaluation]:
        """The records of the models measured beside the candidates, by name.

        Raises:
            InvalidRun: if a file is damaged.
        """
        return {path.stem: Evaluation.load(path) for path in sorted((self.path / "references").glob("*.json"))}

    def repeat_paths(self) -> list[Path]:
        """The records that there are of trials trained once more with other seeds (see `nas.noise`)."""
        return sorted((self.path / "noise").glob("*.json"))

    def set_aside(self, path: Path) -> Path:
        """Renames a damaged file out of the way and returns its new path; nothing is deleted."""
        aside = path.with_name(path.name + ".damaged")
        count = 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.damaged-{count}")
        return path.rename(aside)

    # --- log ------------------------------------------------------------------------------

    def log(self, trial: int, step: str, event: str, **facts: Any) -> None:
        """Appends one line: a step of a trial that began ("start") or whose result is on disk ("done")."""
        line = json.dumps({"time": utc_now(), "trial": trial, "step": step, "event": event, **facts}) + "\n"
        # One write of one line in append mode: a killed process leaves whole lines.
        descriptor = os.open(self.path / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def log_entries(self) -> Iterator[dict[str, Any]]:
        """Every line of the log that can be read, in order."""
        try:
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and {"trial", "step", "event"} <= entry.keys():
                yield entry

    def stage_seconds(self) -> dict[int, dict[str, float]]:
        """Seconds of each finished step, by trial and step; on all devices, to all rungs and with all seeds together."""
        last: dict[tuple[int, str, str], float] = {}
        for entry in self.log_entries():
            if entry["event"] == "done" and isinstance(entry.get("seconds"), int | float) and isinstance(entry["trial"], int):
                part = str(entry.get("device", entry.get("seed", entry.get("train_bytes", ""))))
                last[entry["trial"], str(entry["step"]), part] = float(entry["seconds"])
        seconds: dict[int, dict[str, float]] = {}
        for (trial, step, _), value in last.items():
            of = seconds.setdefault(trial, {})
            of[step] = of.get(step, 0.0) + value
        return seconds

    # --- one process at a time ------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; the lock goes with the process, however it ends.

        Raises:
            InvalidRun: if another process has it.
        """
        with locked(self.path / "lock", f"run {str(self.path)!r}", "--run"):
            yield


def file_name(name: str, otherwise: str) -> str:
    """A name as one that a file or folder may have: it cannot lead anywhere else; `otherwise` if nothing of it is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or otherwise


@contextmanager
def locked(path: Path, what: str, option: str) -> Iterator[None]:
    """Holds a lock file for this process; the lock goes with the process, however it ends.

    Args:
        path: the file.
        what: it stands for, in an error.
        option: that names another.

    Raises:
        InvalidRun: if another process has it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InvalidRun(f"{what} is in use by process {holder}; wait for it, or give another {option}") from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def open_run(path: Path) -> Run:
    """An existing run, to read.

    Raises:
        InvalidRun: if it is not a run folder, or its manifest is damaged.
    """
    if not path.is_dir():
        raise InvalidRun(f"run {str(path)!r} does not exist; give a folder that `edgewise search` made")
    if not (path / "manifest.json").exists():
        raise InvalidRun(f"{str(path)!r} is not a run: it has no manifest.json; give a folder that `edgewise search` made")
    return Run(path, _read_manifest(path))


def resume_or_create(path: Path, manifest: Mapping[str, Any]) -> Run:
    """The run at `path` to search in: made if there is none, taken up again if it is this one.

    Raises:
        InvalidRun: if the folder cannot be made or written, holds something else, or another run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in path.iterdir() if p.name != "lock" and not p.name.endswith(".part")]
        if "manifest.json" not in strangers:
            if strangers:
                raise InvalidRun(f"{str(path)!r} holds {strangers[0]!r} and no manifest.json, so it is not a run; give another --run")
            write_whole(path / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        elif not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError | PermissionError) or error.strerror in _UNWRITABLE:
            raise InvalidRun(f"run folder {str(path)!r} cannot be written ({error.strerror}); give another --run") from error
        raise
    run = open_run(path)
    _same_run(run, manifest)
    return run


_UNWRITABLE = ("Read-only file system", "No such file or directory", "File name too long", "Invalid argument", "Operation not permitted")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRun(f"{file} cannot be read ({error.strerror}); check the folder's permissions") from error
    except ValueError as error:
        raise InvalidRun(f"{file} is damaged ({error}); restore it, or give another --run") from error
    missing = [key for key in _NEEDED if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise InvalidRun(f"{file} is damaged: it lacks {missing[0]!r}; restore it, or give another --run")
    if manifest["format"] != FORMAT:
        raise InvalidRun(
            f"{file} has format {manifest['format']!r}, not {FORMAT}; use the version of edgewise that made it, or another --run"
        )
    assert isinstance(manifest, dict)
    specs = targets_of(manifest)
    if not isinstance(specs, list) or not specs or not all(isinstance(spec, dict) and isinstance(spec.get("name"), str) for spec in specs):
        raise InvalidRun(f"{file} is damaged: targets={specs!r} is not a list of devices; restore it, or give another --run")
    return manifest


def targets_of(manifest: Mapping[str, Any]) -> Any:
    """What a manifest says of the run's devices; one from before there could be several has just `device`."""
    return manifest.get("targets", [manifest["device"]])


def _same_run(run: Run, wanted: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings; the first difference is named."""
    wanted = json.loads(json.dumps(wanted))
    for key in _SETTLED:
        before, now = (_comparable(key, targets_of(m) if key == "targets" else m[key]) for m in (run.manifest, wanted))
        if before == now:
            continue
        name: str = key
        if key == "settings":
            inner = next((k for k in (*before, *now) if before.get(k) != now.get(k)), "")
            name, before, now = inner, before.get(inner), now.get(inner)
            if inner == "accuracy":
                before, now = (accuracy_words(m["settings"].get(inner, HELD_OUT)) for m in (run.manifest, wanted))
        elif key == "corpus":
            before, now = (f"{c.get('name')} (sha256 {str(c.get('sha256'))[:12]})" for c in (run.manifest[key], wanted[key]))
        elif key == "space":
            before, now = (s.get("name") for s in (before, now))
            if before == now:
                raise InvalidRun(f"run {str(run.path)!r} was made when space {before!r} had other parameters; give another --run")
        option = _OPTIONS.get(name, name)
        raise InvalidRun(
            f"run {str(run.path)!r} was made with {option} {_shown(before)}, not {_shown(now)}; "
            "use the same to go on with it, or give another --run"
        )
    _same_devices(run, targets_of(wanted))


def _same_devices(run: Run, wanted: list[dict[str, Any]]) -> None:
    """Refuses devices of the same names that are others."""
    for before, now in zip(run.specs, wanted, strict=True):
        name = next((k for k in (*_DEVICE, *_DEVICE_LATER) if before.get(k) != now.get(k) and (k in _DEVICE or k in before)), None)
        if name is not None:
            which = "on another machine" if len(wanted) == 1 else f"with another {now['name']!r}"
            raise InvalidRun(
                f"run {str(run.path)!r} was made {which} ({name} {_shown(before.get(name))}, not {_shown(now.get(name))}), whose times "
                "do not compare; go on with it there, or give another --run"
            )


def _comparable(key: str, value: Any) -> Any:
    """The part of a manifest's entry that must stay the same."""
    if key == "targets":
        return ", ".join(str(spec["name"]) for spec in value)
    if not isinstance(value, dict):
        return value
    if key == "corpus":
        return value.get("sha256")  # the same text under another name or path is the same corpus
    if key == "settings":
        value = {"weights": "fp32", "ahead": 1, "accuracy": HELD_OUT, "rungs": "none", **value}  # a run from before there was a choice
        value["accuracy"] = same_accuracy(value["accuracy"])
        if isinstance(value.get("storage"), str):
            value["storage"] = without_password(value["storage"])
    return value


def without_password(url: str) -> str:
    """A database URL with *** in place of its password."""
    hidden = re.sub(r"(:/+[^:/@]*:)[^@]*@", r"\1***@", url)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd)=)[^&]*", r"\1***", hidden)


def _shown(value: object) -> str:
    return "unset" if value is None else str(value)


def versions() -> dict[str, str]:
    """Versions of what results depend on, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("edgewise", "torch", "apache-tvm", "optuna", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def changed_versions(run: Run) -> str | None:
    """What is installed otherwise than when a run was made, in one line; None if nothing is."""
    before, now = run.manifest["versions"], versions()
    if not isinstance(before, dict):
        return None
    changed = [f"{name} {before[name]}, now {now[name]}" for name in now if name in before and before[name] != now[name]]
    return f"the run was made with {'; '.join(changed)}: results may differ from earlier trials'" if changed else None


def utc_now() -> str:
    """The date and time in ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
