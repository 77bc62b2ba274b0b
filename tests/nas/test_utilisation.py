"""The speed of a training: what is counted, what it is compared with, where it is shown and where it is not."""

import json
from pathlib import Path

import pytest
import torch
from search_helpers import Listener, run_search, write_speeches

from nas import utilisation
from nas.corpus import load_corpus
from nas.utilisation import Pace, product_flops_per_s, speed_words


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(utilisation, "time", clock)
    return clock


def test_a_pause_does_not_count(clock: Clock) -> None:
    pace = Pace(300.0, 2e6, 1e11)
    assert pace.tokens_per_s is None
    assert (pace.words(), pace.facts()) == ("", {})
    for step in range(70):
        clock.now += 60.0 if step == 30 else 0.03  # a minute in which something is measured
        pace.stepped()
        if step == 9:
            assert pace.tokens_per_s == pytest.approx(10_000)
    assert pace.facts() == {"tokens_per_s": 10_000.0, "mfu": 0.2}
    assert pace.words() == speed_words(10_000, 0.2) == "10,000 tokens/s  20% MFU"
    assert speed_words(10_000, None) == "10,000 tokens/s"


@pytest.mark.usefixtures("one_thread")
def test_what_it_is_compared_with_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = product_flops_per_s(torch.device("cpu"), "fp32", 1)
    assert 1e8 < first < 1e13
    monkeypatch.setattr(utilisation, "time", None)  # a second one would need the clock
    assert product_flops_per_s(torch.device("cpu"), "fp32", 1) == first


def test_a_search_logs_and_shows_it_and_keeps_it_out_of_its_records(tmp_path: Path) -> None:
    shown: list[str] = []

    class Reader(Listener):
        def stage(self, trial: int, stage_name: str, detail: str = "", fraction: float | None = None) -> None:
            if stage_name == "train":
                shown.append(detail)

    corpus = load_corpus(str(write_speeches(tmp_path / "speeches.jsonl")))
    run, _ = run_search(tmp_path / "run", corpus, trials=1, view=Reader())
    (done,) = (e for e in run.log_entries() if (e["step"], e["event"]) == ("train", "done"))
    assert done["tokens_per_s"] > 1
    assert 0 < done["mfu"] < 2
    assert any("tokens/s" in detail and "MFU" in detail for detail in shown)
    record = json.loads((run.path / "trials" / "00000.json").read_text())
    assert record["state"] == "complete"
    assert not {"tokens_per_s", "mfu", "train_s"} & {*record, *record["score"]}
