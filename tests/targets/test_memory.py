"""Held memory counts what is still there, not what was for a moment."""

from pathlib import Path

import numpy as np
import pytest

from targets import memory
from targets.memory import held_bytes

MIB = 1 << 20


def test_held_memory_counts_what_is_there_and_not_what_is_gone() -> None:
    before = held_bytes()
    if before is None:
        pytest.skip("this system does not tell a process how much memory it holds")
    kept = np.ones(96 * MIB, np.uint8)  # written, so resident
    during = held_bytes()
    assert during is not None
    assert 95 * MIB <= during - before < 112 * MIB
    del kept
    after = held_bytes()
    assert after is not None
    assert after - before < 16 * MIB


def test_file_pages_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    before = held_bytes()
    if before is None:
        pytest.skip("this system does not tell a process how much memory it holds")
    mapped = np.memmap(tmp_path / "file", mode="r")
    assert int(mapped[::4096].sum()) == 0
    after = held_bytes()
    assert after is not None
    assert after - before < 16 * MIB
    del mapped


def test_a_system_without_these_counters_says_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    assert held_bytes() is None
