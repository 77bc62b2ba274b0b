"""The compile cache gives whole files or none, whoever uses it at the same time, and keeps to its size."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from targets import compile_cache
from targets.compile_cache import PARTS, CompileCache, clear, usage

ROOT = Path(__file__).parents[2]


def put(cache: CompileCache, name: str, size: int = 100, age_s: float = 0.0) -> Path:
    path = cache.add(name, lambda made: made.write_bytes(b"x" * size) and None)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files in one folder, so that its share is the whole bound."""
    monkeypatch.setattr(compile_cache, "PARTS", 1)


def test_what_is_added_is_found_and_nothing_else(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, {"target": "a"})
    assert cache.find("k.o") is None
    path = put(cache, "k.o")
    assert CompileCache(tmp_path, {"target": "a"}).find("k.o") == path
    assert CompileCache(tmp_path, {"target": "b"}).find("k.o") is None
    assert cache.find("l.o") is None


def test_an_empty_file_is_none_and_is_made_again(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, {})
    put(cache, "k.o").write_bytes(b"")
    assert cache.find("k.o") is None
    assert put(cache, "k.o").stat().st_size == 100


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no more")

    cache = CompileCache(tmp_path, {})
    with pytest.raises(RuntimeError, match="no more"):
        cache.add("k.o", write)
    assert cache.find("k.o") is None
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == ["about.json"]


@pytest.mark.usefixtures("one_part")
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_least_recently_used_go_first(tmp_path: Path, kept: int) -> None:
    cache = CompileCache(tmp_path, {}, most_bytes=100 * kept)
    paths = [put(cache, f"{n}.o", age_s=1e6 + 10 * n) for n in range(3)]
    assert cache.find("2.o") == paths[2]  # used again: now the youngest
    os.utime(paths[2], (time.time() - 1e5,) * 2)
    put(cache, "new.o")
    order = [cache.folder / "00" / "new.o", paths[2], paths[0], paths[1]]
    assert [path.exists() for path in order] == [i < kept for i in range(4)]


@pytest.mark.usefixtures("one_part")
def test_what_was_used_within_a_compile_stays_whatever_the_size(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, {}, most_bytes=100)
    old = put(cache, "old.o", age_s=compile_cache.KEPT_S + 60)
    used = put(cache, "used.o", age_s=compile_cache.KEPT_S + 60)
    assert cache.find("used.o") == used
    put(cache, "new.o")
    assert not old.exists()
    assert used.exists()


def test_many_files_keep_near_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "KEPT_S", 0.0)
    most_bytes = 300 * PARTS
    cache = CompileCache(tmp_path, {}, most_bytes)
    for number in range(2 * PARTS):
        put(cache, f"{number}.o", 150, age_s=1.0)
    (found,) = usage(tmp_path)
    assert 0.5 * most_bytes < found.nbytes <= most_bytes < 2 * PARTS * 150 + 1


@pytest.mark.usefixtures("one_part")
def test_what_a_killed_process_left_half_written_goes_too(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, {}, most_bytes=100)
    left = put(cache, "k.o").with_name(".abc-k.o")
    left.write_bytes(b"x" * 1000)
    os.utime(left, (1000, 1000))
    put(cache, "l.o")
    assert not left.exists()


_SHARED = """
import os, sys
from pathlib import Path
from targets import compile_cache
compile_cache.KEPT_S = 0.0
cache = compile_cache.CompileCache(Path(sys.argv[1]), {"a": 1}, most_bytes=4000 * compile_cache.PARTS)
compile_cache.PARTS = 2
seed = int(sys.argv[2])
for n in range(400):
    name = f"{(n * (seed + 3)) % 7}.o"
    path = cache.find(name) or cache.add(name, lambda made: made.write_bytes(name.encode() * 1000) and None)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        continue
    assert content == name.encode() * 1000, (name, len(content))
    if n % 50 == seed:
        compile_cache.clear(Path(sys.argv[1]))
"""


def test_processes_that_write_read_trim_and_clear_at_once_see_whole_files(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", _SHARED, str(tmp_path), str(seed)], env=environment, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in processes] == [("", 0)] * 3


def test_usage_counts_each_target_and_clear_removes_what_was_compiled_alone(tmp_path: Path) -> None:
    assert usage(tmp_path / "none") == []
    assert clear(tmp_path / "none") == []
    a, b = CompileCache(tmp_path, {"target": "a"}), CompileCache(tmp_path, {"target": "b"})
    for n in range(3):
        put(a, f"{n}.o", 1000)
    put(a, "stage.json", 10)
    put(b, "0.o", 50)
    (tmp_path / "ceilings.json").write_text("{}")
    found = usage(tmp_path)
    assert [(e.about, e.nbytes, e.stages, e.kernels) for e in found] == [({"target": "a"}, 3010, 1, 3), ({"target": "b"}, 50, 0, 1)]
    being_made = a.folder / "00" / ".abc-k.o"
    being_made.parent.mkdir(exist_ok=True)
    being_made.touch()
    assert clear(tmp_path) == found
    assert being_made.exists()
    being_made.unlink()
    assert usage(tmp_path) == []
    assert (tmp_path / "ceilings.json").exists()
    assert a.find("0.o") is None
    assert put(a, "0.o").exists()
