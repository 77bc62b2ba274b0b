"""Copies of a process share its work, and none outlives it or spoils it."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from targets.quiet import measuring
from targets.worker import Worker, WorkerError

PROCESSORS = len(os.sched_getaffinity(0))


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    yield worker
    worker.close()


@pytest.mark.parametrize("items", [0, 1, 2, 9])
def test_every_item_is_done_once_by_no_more_processes_than_there_are_processors(worker: Worker, tmp_path: Path, items: int) -> None:
    found = worker.call("forked_functions:done_by", tmp_path, items, timeout_s=30)
    (this,) = found.pop("this")
    assert {int(item): len(pids) for item, pids in found.items()} == dict.fromkeys(range(items), 1)
    pids = {pid for (pid,) in found.values()}
    assert len(pids) <= PROCESSORS
    if items == 9:
        assert this in pids
        assert len(pids) > 1 or PROCESSORS == 1


def test_beside_another_thread_nothing_is_forked(worker: Worker, tmp_path: Path) -> None:
    found = worker.call("forked_functions:done_by", tmp_path, 4, True, timeout_s=30)
    assert {item: pids for item, pids in found.items() if item != "this"} == {str(item): found["this"] for item in range(4)}


def test_a_copy_that_ends_costs_the_items_it_took(worker: Worker, tmp_path: Path) -> None:
    done = worker.call("forked_functions:copies_fail", tmp_path, 8, timeout_s=30)["done"]
    assert set(done) < set(range(8)) or PROCESSORS == 1
    assert len(done) >= 8 - min(PROCESSORS - 1, 7)


def test_an_error_here_is_raised_and_ends_the_work(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="ValueError: this process failed"):
        worker.call("forked_functions:fail_here", tmp_path, 1000, timeout_s=30)
    done = len(list(tmp_path.iterdir()))
    assert done < 100 * PROCESSORS
    assert worker.call("child_functions:add", done, 0, timeout_s=30) == len(list(tmp_path.iterdir()))


def test_a_measurement_waits_for_an_item_and_not_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks, folder = tmp_path / "locks", tmp_path / "done"
    locks.mkdir()
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(locks))
    items = 150 * PROCESSORS
    with ThreadPoolExecutor(1) as pool:
        worker = Worker({})
        done = pool.submit(worker.call, "targets.quiet:at_work", "forked_functions:done_by", folder, items, timeout_s=60)
        while not any(folder.iterdir()):
            time.sleep(0.01)
        with measuring(30.0) as is_quiet:
            assert is_quiet
            before = len(list(folder.iterdir()))
            time.sleep(0.2)
            assert len(list(folder.iterdir())) == before < items
        assert len(done.result()) == items + 1
        worker.close()
