"""The tests that Edgewise ships for every target, on this one. Run with `pytest` where the package is installed."""

from pathlib import Path
from typing import Any

from edgewise_onnxruntime import OnnxRuntimeTarget

from targets.contract import TargetContract
from targets.spec import DeviceSpec


class TestOnnxRuntime(TargetContract):
    def make(self, cache_dir: Path, **options: Any) -> OnnxRuntimeTarget:
        return OnnxRuntimeTarget(DeviceSpec(name="ort", kind="onnxruntime", options=options), cache_dir)
