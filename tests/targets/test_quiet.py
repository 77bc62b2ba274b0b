"""Measuring and working never overlap, nobody waits for ever, and nothing outlives a process. Real processes, real locks."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from targets import quiet
from targets.quiet import at_work, lock_folder, measuring, resting, working, yield_to_measuring

SOON_S = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder of the test's own: others on this machine measure, too."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts Python on some lines, after an import of everything here; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(lines: str) -> "subprocess.Popen[str]":
        code = "import time\nfrom targets.quiet import *\n" + textwrap.dedent(lines)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def says(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


WORKER = """
with working():
    print("works", flush=True)
    input()
    yield_to_measuring()
    print(time.monotonic(), flush=True)
    time.sleep(60)
"""
TRAINER = """
with working():
    print("works", flush=True)
    while True:
        time.sleep(0.002)
        yield_to_measuring()
"""
MEASURER = """
with measuring() as quiet:
    print(quiet, flush=True)
    input()
    ended = time.monotonic()
print(ended, flush=True)
time.sleep(60)
"""


def moment(process: "subprocess.Popen[str]") -> float:
    """A time of the clock that all processes of this machine share."""
    assert process.stdout is not None
    return float(process.stdout.readline())


def answer(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def waits_for_quiet() -> bool:
    """Whether a measurer has the gate."""
    place = quiet._Place(quiet._lock_file((lock_folder() or Path()) / "gate"), None)
    try:
        return place.is_wanted()
    finally:
        assert place._gate is not None
        os.close(place._gate)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- who waits for whom -----------------------------------------------------------------------


def test_a_measurement_waits_for_the_work_that_is_under_way(start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    worker = start(WORKER)
    says(worker, "works")
    with measuring(0.05) as found:
        assert found is False
    measurer = start(MEASURER)
    until(waits_for_quiet)
    answer(worker)  # it comes to the end of its piece of work only now
    says(measurer, "True")
    answer(measurer)
    assert moment(measurer) <= moment(worker)


def test_work_that_never_rests_does_not_keep_a_measurement_out(start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    """Each takes the room again at once: without a gate, three of them would hardly ever leave it empty."""
    for trainer in [start(TRAINER) for _ in range(3)]:
        says(trainer, "works")
    for _ in range(20):
        with measuring(SOON_S) as found:
            assert found is True


def test_measurements_of_two_processes_are_taken_one_after_the_other(start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    first = start(MEASURER)
    says(first, "True")
    with measuring(0.05) as found:
        assert found is False
    answer(first)
    moment(first)
    with measuring(SOON_S) as found:
        assert found is True


def test_work_begins_only_after_the_measurement(start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    with measuring() as found:
        assert found is True
        worker = start("print('there', flush=True)\nwith working():\n    print(time.monotonic(), flush=True)")
        says(worker, "there")
        time.sleep(0.05)
        ended = time.monotonic()
    assert moment(worker) >= ended


@pytest.mark.parametrize("code", [WORKER, MEASURER], ids=["worker", "measurer"])
def test_a_killed_process_holds_nothing(code: str, start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    process = start(code)
    says(process, "works" if code is WORKER else "True")
    os.kill(process.pid, signal.SIGKILL)
    with measuring(SOON_S) as found:
        assert found is True


def test_a_measurer_that_is_stopped_does_not_stop_work_for_ever(
    start: Callable[[str], "subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "MOST_PAUSE_S", 0.2)
    measurer = start(MEASURER)
    says(measurer, "True")
    begin = time.monotonic()
    with working():
        assert time.monotonic() - begin >= 0.2
        monkeypatch.setattr(quiet, "MOST_PAUSE_S", SOON_S)
        begin = time.monotonic()
        for _ in range(10):  # given up once, not once a step
            yield_to_measuring()
        assert time.monotonic() - begin < SOON_S / 2


# --- within one process -----------------------------------------------------------------------


def test_a_thread_that_works_and_measures_does_not_wait_for_itself() -> None:
    with working():
        with measuring(0.0) as found:
            assert found is True
            with working():
                yield_to_measuring()
        # At work again: nobody else is alone now.
        assert _from_a_thread(lambda: _measured(0.02)) is False
    assert _from_a_thread(lambda: _measured(SOON_S)) is True


def test_within_work_more_work_is_the_same_work() -> None:
    with working():
        with working():
            pass
        assert _from_a_thread(lambda: _measured(0.02)) is False


def test_who_rests_keeps_no_measurement_waiting() -> None:
    with working():
        with resting():
            assert _from_a_thread(lambda: _measured(0.0)) is True
        assert _from_a_thread(lambda: _measured(0.02)) is False
    with resting():
        pass
    with measuring(0.0), resting():
        assert _from_a_thread(lambda: _measured(0.02)) is False


def test_a_copy_of_a_working_process_does_not_let_go_of_what_the_process_holds(start: Callable[[str], "subprocess.Popen[str]"]) -> None:
    worker = start("""
        import os
        with working():
            if os.fork() == 0:
                for _ in range(60):
                    time.sleep(0.005)
                    yield_to_measuring()
                os._exit(0)
            print("works", flush=True)
            input()
    """)
    says(worker, "works")
    with measuring(0.2) as found:
        assert found is False


def test_threads_work_and_measure_each_for_itself() -> None:
    with measuring(0.0) as found:
        assert found is True
        assert _from_a_thread(lambda: _measured(0.02)) is False


def test_an_error_lets_go_of_everything() -> None:
    for context in (working, measuring):
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
    assert _measured(0.0) is True


def test_a_function_called_at_work_is_at_work() -> None:
    assert at_work("test_quiet:_measured_elsewhere") is False
    assert at_work("operator:add", 2, 3) == 5


def _measured(most_wait_s: float) -> bool | None:
    with measuring(most_wait_s) as found:
        return found


def _measured_elsewhere() -> bool | None:
    return _from_a_thread(lambda: _measured(0.02))


def _from_a_thread(function: Callable[[], bool | None]) -> bool | None:
    found: list[bool | None] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


# --- the folder -------------------------------------------------------------------------------


def test_the_folder_is_the_users_alone(runtime: Path) -> None:
    folder = lock_folder()
    assert folder == runtime / "edgewise"
    assert folder.stat().st_mode & 0o777 == 0o700
    with working():
        assert sorted(path.name for path in folder.iterdir()) == ["gate", "room"]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


@pytest.mark.parametrize("what", ["link", "open", "file"])
def test_a_folder_that_others_may_have_prepared_is_not_used(
    what: str, runtime: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    place = runtime / "edgewise"
    if what == "link":
        (runtime / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(runtime / "elsewhere")
    elif what == "open":
        place.mkdir()
        place.chmod(0o770)
    else:
        place.touch()
    assert lock_folder() == other / f"edgewise-{os.getuid()}"


def test_a_lock_file_that_is_a_link_is_not_opened(runtime: Path) -> None:
    folder = lock_folder()
    assert folder is not None
    (folder / "room").symlink_to(runtime / "made")
    with measuring() as found:
        assert found is None
    assert not (runtime / "made").exists()


def test_without_a_folder_everything_goes_on_and_nothing_is_claimed(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "not-there"))
    monkeypatch.setattr(tempfile, "tempdir", str(runtime / "nor-there"))
    assert lock_folder() is None
    with working():
        yield_to_measuring()
        with measuring() as found:
            assert found is None


def test_work_that_gave_up_once_is_stopped_by_the_next_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """It went on beside a measurement that took too long; when that has ended, it is work like any other."""
    monkeypatch.setattr(quiet, "MOST_PAUSE_S", 0.05)
    began, ended, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with working():
            began.set()
            ended.wait(SOON_S)
            yield_to_measuring()
            done.wait(SOON_S)

    with measuring(SOON_S) as found:
        assert found is True
        thread = threading.Thread(target=work)
        thread.start()
        assert began.wait(SOON_S)  # without the room, which the measurement has
    ended.set()
    until(lambda: not quiet_now())
    done.set()
    thread.join(SOON_S)
    assert quiet_now()


def quiet_now() -> bool:
    """Whether a measurement finds all work stopped."""
    with measuring(0.0) as found:
        return found is True
