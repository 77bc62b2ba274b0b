"""Compiled stages kept on disk by all that they are made from, so that a program of known stages is only linked."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets.compile_cache import STAGE, CompileCache, sources
from targets.compiled_stage import CompiledStage
from targets.cpu import Cpu
from targets.gpu import Gpu
from targets.kernels import KernelCache
from targets.program import Stage


class StageCache:
    """Stages compiled for one target and processor, which may be a GPU.

    A stage's identity is its key, the processor as schedules see it, the version of PyTorch, and the source code of what
    exports and lowers it: a change of the model or of a schedule makes every stage new. The target and the compiler's
    version are the folder's.

    Args:
        files: where they are kept.
        kernels: the kernels they call; a stage that misses one of them counts as not there.
    """

    def __init__(self, files: CompileCache, kernels: KernelCache, processor: Cpu | Gpu) -> None:
        self._files, self._kernels, self._processor = files, kernels, processor

    def find(self, stage: Stage) -> CompiledStage | None:
        """The stage, if it was compiled before and all its kernels are there."""
        path = self._files.find(self._name(stage))
        if path is None:
            return None
        try:
            found = CompiledStage.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):  # a damaged file, or one that is just being removed
            return None
        return found if all(self._kernels.find(symbol) for symbol in found.symbols) else None

    def add(self, stage: Stage, compiled: CompiledStage) -> None:
        """Keeps a stage; its kernels must be there."""
        text = json.dumps(compiled.to_json(), separators=(",", ":"))
        self._files.add(self._name(stage), lambda path: _write(path, text))

    def _name(self, stage: Stage) -> str:
        identity = [stage.key, repr(self._processor), _version("torch"), sources(__name__), sources(_module(stage.export))]
        return f"{stage.key}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}{STAGE}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module(export: Callable[..., Any]) -> str:
    """The module that a stage's exporter was defined in."""
    while isinstance(export, functools.partial):
        export = export.func
    return export.__module__
