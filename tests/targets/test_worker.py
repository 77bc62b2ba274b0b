"""A child that crashes, hangs, raises or prints costs one call and no more."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from targets.worker import Worker, WorkerError

SOON_S = 30.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker({"EDGEWISE_TEST": "set"})
    yield worker
    worker.close()


def ask(worker: Worker, function: str, *args: object, timeout_s: float = SOON_S) -> object:
    return worker.call(f"child_functions:{function}", *args, timeout_s=timeout_s)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_call_returns_the_functions_value_from_another_process(worker: Worker) -> None:
    assert ask(worker, "add", 2, 3) == 5
    assert ask(worker, "pid") != os.getpid()


def test_the_child_is_reused_between_calls(worker: Worker) -> None:
    assert ask(worker, "pid") == ask(worker, "pid")


def test_the_environment_given_is_set_in_the_child(worker: Worker) -> None:
    assert ask(worker, "environment", "EDGEWISE_TEST") == "set"
    assert ask(worker, "environment", "HOME") == os.environ.get("HOME")


def test_a_module_the_child_must_do_without_is_not_there() -> None:
    worker = Worker({}, without=("fractions", "no.such.thing"))
    with pytest.raises(WorkerError, match=r"^ModuleNotFoundError: import of fractions halted"):
        worker.call("fractions:Fraction", 1, 2, timeout_s=SOON_S)
    assert ask(worker, "add", 1, 2) == 3
    worker.close()


def test_an_exception_is_one_line_and_the_child_lives_on(worker: Worker) -> None:
    before = ask(worker, "pid")
    with pytest.raises(WorkerError, match=r"^ValueError: first second$") as caught:
        ask(worker, "fail", "first\n  second")
    assert "\n" not in str(caught.value)
    assert ask(worker, "pid") == before


@pytest.mark.parametrize("missing", ["no_such_module:f", "child_functions:no_such_function"])
def test_a_function_that_is_not_there_is_an_error(worker: Worker, missing: str) -> None:
    with pytest.raises(WorkerError, match="no_such"):
        worker.call(missing, timeout_s=SOON_S)
    assert ask(worker, "add", 1, 1) == 2


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        ("abort", (), "was ended by SIGABRT: last words"),
        ("segfault", (), "was ended by SIGSEGV"),
        ("leave", (7,), "ended with status 7"),
        ("unpicklable", (), "ended with status 1: .*pickle"),
    ],
)
def test_a_crash_is_one_call_and_the_next_has_a_new_child(worker: Worker, function: str, args: tuple[int, ...], reason: str) -> None:
    before = ask(worker, "pid")
    with pytest.raises(WorkerError, match=reason) as caught:
        ask(worker, function, *args)
    assert "\n" not in str(caught.value)
    assert ask(worker, "pid") != before


def test_the_last_words_of_one_crash_are_not_those_of_the_next(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="last words"):
        ask(worker, "abort")
    with pytest.raises(WorkerError, match=r"status 7$"):
        ask(worker, "leave", 7)


def test_a_hang_ends_at_the_time_limit_and_takes_its_process_along(worker: Worker) -> None:
    before = ask(worker, "pid")
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        ask(worker, "hang", timeout_s=1.0)
    assert time.monotonic() - begin >= 1.0
    assert not alive(before)
    assert ask(worker, "pid") != before


def test_what_a_child_prints_does_not_mix_with_its_answers(worker: Worker) -> None:
    assert [ask(worker, "noisy", n) for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 24) + 1])
def test_a_payload_of_any_size_goes_there_and_back(worker: Worker, size: int) -> None:
    value = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert ask(worker, "echo", value) == value


def test_a_child_killed_between_calls_is_replaced(worker: Worker) -> None:
    before = ask(worker, "pid")
    assert isinstance(before, int)
    os.kill(before, signal.SIGKILL)
    while alive(before) and not zombie(before):
        time.sleep(0.01)
    assert ask(worker, "pid") != before


def zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_close_ends_the_child_and_may_be_repeated(worker: Worker) -> None:
    before = ask(worker, "pid")
    assert isinstance(before, int)
    worker.close()
    assert not alive(before)
    worker.close()
    assert ask(worker, "pid") != before


def test_an_interrupt_while_waiting_ends_the_child_and_reaches_the_caller(worker: Worker) -> None:
    before = ask(worker, "pid")
    assert isinstance(before, int)
    # Python's default handler turns the signal into KeyboardInterrupt in the main thread, as Ctrl-C does.
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ask(worker, "hang")
    finally:
        signal.signal(signal.SIGINT, previous)
        timer.join()
    assert not alive(before)
    assert ask(worker, "add", 1, 2) == 3


def test_ctrl_c_in_the_terminal_does_not_reach_the_child() -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *(p for p in sys.path if p)])}
    done = subprocess.run(
        [sys.executable, "-c", "import child_functions; child_functions.interrupted_parent()"],
        env=environment, start_new_session=True, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["parent interrupted", "same child"]


def test_nothing_in_the_folder_a_user_is_in_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "targets").mkdir()
    for name in ("targets/__init__.py", "pickle.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    worker = Worker({})
    assert ask(worker, "add", 2, 2) == 4
    worker.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_hanging_child_ends_with_a_killed_parent() -> None:
    script = (
        "import threading, time; from targets.worker import Worker; w = Worker({})\n"
        "print(w.call('child_functions:pid', timeout_s=30), flush=True); w.call('time:sleep', 60, timeout_s=60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + SOON_S
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
