"""A search killed with SIGKILL at random moments, and resumed each time, is the search that nobody killed."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from search_helpers import SPACE_FILE, contents, repeated_steps, write_speeches

from nas.run import open_run

ROOT = Path(__file__).parents[2]
TRIALS = 8
KILLS = 12


BOARD = """
name = "board"
kind = "null"
cores = 1
vector_bytes = 16
memory_bytes = 8_000_000_000
read_bytes_per_s = 1.0e8
flops_per_s = 5.0e11
"""


def command(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """A real search of a few seconds: compile and measure on the null target, train, write everything."""
    return [
        *(sys.executable, "-m", "nas", "search", "--space", str(SPACE_FILE), "--target", "null", "--trials", str(TRIALS)),
        *(
            "--corpus",
            str(folder / "speeches.jsonl"),
            "--budget",
            "15kB",
            "--rungs",
            "3kB,7kB",
            "--weights",
            "fp32,int4",
            "--run",
            str(folder / "run"),
            "--json",
        ),
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def log_size(folder: Path) -> int:
    log = folder / "run" / "log.jsonl"
    return log.stat().st_size if log.exists() else 0


@pytest.mark.parametrize(
    ("seed", "more"),
    [(0, ()), pytest.param(1, ("--target", "board.toml", "--ahead", "3"), marks=pytest.mark.slow)],
    ids=["one device", "two devices, three ahead"],
)
def test_killed_a_dozen_times_it_ends_as_if_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, more: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("board.toml").write_text(BOARD)
    rng = random.Random(seed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        write_speeches(folder / "speeches.jsonl")
    start = time.monotonic()
    subprocess.run(command(whole, more), env=environment(), check=True, capture_output=True, timeout=120)
    log = [json.loads(line)["time"] for line in (whole / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) >= 8 * TRIALS

    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(command(broken, more), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            if kills in (0, 5):
                # At any moment from the first instruction on: mostly while it starts.
                time.sleep(rng.uniform(0.05, 2.0))
            else:
                # At any moment of its work: from its first sign of life, for about a trial's time.
                before = log_size(broken)
                deadline = time.monotonic() + 60
                while log_size(broken) == before and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0.0, 0.3))
            assert process.poll() is None, (
                f"the search ended before kill {kills}: {process.stderr.read().decode() if process.stderr else ''}"
            )
        finally:
            process.kill()
            process.communicate()
        kills += 1

    last = subprocess.run(command(broken, more), env=environment(), check=False, capture_output=True, text=True, timeout=120)
    assert last.returncode == 0, last.stderr
    assert last.stderr.count("damaged") == 0
    expected, found = contents(whole / "run"), contents(broken / "run")
    assert sum(name.startswith("trials/") for name in found) == TRIALS
    assert found == expected
    states = [json.loads(content)["state"] for name, content in found.items() if name.startswith("trials/")]
    assert {"complete", "stopped"} <= set(states)
    assert not (broken / "run" / "training").exists()
    assert repeated_steps(open_run(broken / "run")) == []
    print(f"{kills} kills, {time.monotonic() - start:.0f} s")
