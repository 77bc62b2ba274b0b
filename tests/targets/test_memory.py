"""The measured peak sees what was allocated and freed in between."""

from pathlib import Path

import numpy as np
import pytest

from targets import memory
from targets.memory import PeakMemory

MIB = 1 << 20


def touch(size_bytes: int) -> None:
    np.ones(size_bytes, np.uint8)  # written, so resident; freed at once


def test_the_peak_counts_memory_that_is_gone_again() -> None:
    with PeakMemory() as peak:
        touch(96 * MIB)
    assert peak.peak_bytes is not None
    assert 95 * MIB <= peak.peak_bytes < 160 * MIB


def test_what_happened_before_does_not_count() -> None:
    touch(96 * MIB)
    with PeakMemory() as peak:
        touch(8 * MIB)
    assert peak.peak_bytes is not None
    assert peak.peak_bytes < 64 * MIB


def test_the_peak_is_kept_when_the_body_raises() -> None:
    peak = PeakMemory()

    def fail() -> None:
        with peak:
            touch(96 * MIB)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert peak.peak_bytes is not None
    assert peak.peak_bytes >= 95 * MIB


def test_a_system_without_these_counters_says_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    with PeakMemory() as peak:
        touch(MIB)
    assert peak.peak_bytes is None
