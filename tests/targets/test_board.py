"""An aarch64 board, emulated: what is compiled here runs there, over a tracker, with PyTorch's numbers."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rpc_helpers import Process, board_spec
from search_helpers import SPACE_FILE, repeated_steps, run_search, settings, write_speeches

from cost_models.measured import make_sample
from cost_models.program import build_program
from nas.corpus import load_corpus
from scripts.emulated_board import main
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens, Workload
from targets.link import link_command
from targets.measurement import Timing
from targets.program import Sample
from targets.rpc import Patience, RpcTarget
from targets.spec import DeviceSpec
from targets.target import TargetError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, attention="gqa", num_kv_heads=2, ffn_dim=40, context=16)
TOKENS = RequestTokens(prompt=5, generated=6)
QUICK = Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0, timeout_s=120.0)


@pytest.fixture(scope="session")
def spec(board_desk: Process) -> DeviceSpec:
    return board_spec(board_desk)


@pytest.fixture(scope="module")
def target(spec: DeviceSpec, kernel_cache: Path) -> Iterator[RpcTarget]:
    made = RpcTarget(spec, kernel_cache, Patience(attempts=2, absent_s=60.0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def program(target: RpcTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return target.compile(build_program(CONFIG, TOKENS), tmp_path_factory.mktemp("program") / "program")


def test_a_model_runs_on_the_board_with_pytorchs_numbers(target: RpcTarget, program: Path) -> None:
    found = target.measure(program, make_sample(CONFIG, TOKENS, 0), QUICK)
    assert found.device == "board"
    assert set(found.errors) == set(found.times_s) == {"prefill", "decode"}
    assert all(error < 1e-5 for error in found.errors.values())
    assert all(t > 0 for times in found.times_s.values() for t in times)


def test_integer_weights_run_there_by_its_dot_products(target: RpcTarget, tmp_path: Path) -> None:
    made = target.compile(build_program(CONFIG, TOKENS, "int8"), tmp_path / "program")
    assert all(error < 1e-4 for error in target.measure(made, make_sample(CONFIG, TOKENS, 0, None, "int8"), QUICK).errors.values())


def test_wrong_numbers_are_refused(target: RpcTarget, program: Path) -> None:
    right, other = make_sample(CONFIG, TOKENS, 0), make_sample(CONFIG, TOKENS, 1)
    swapped = Sample(write=other.write, steps=right.steps, timed=right.timed, tolerance=1e-9)
    with pytest.raises(TargetError, match="CheckFailed: step 0"):
        target.measure(program, swapped, QUICK)


def test_the_board_begins_anew_when_a_program_crashes_it(target: RpcTarget, program: Path, tmp_path: Path) -> None:
    (library,) = program.glob("program-*.so")
    crashing = tmp_path / "crashing"
    crashing.mkdir()
    (crashing / "manifest.json").write_bytes((program / "manifest.json").read_bytes())
    (tmp_path / "crash.c").write_text("__attribute__((constructor)) static void crash(void) { __builtin_trap(); }\n")
    compiler = link_command(target.spec.triple)
    subprocess.run([*compiler, "-shared", "-nostdlib", "-fPIC", "-o", str(crashing / library.name), str(tmp_path / "crash.c")], check=True)
    with pytest.raises(TargetError, match="measuring failed in each of 2 sessions on target 'board'"):
        target.measure(crashing, make_sample(CONFIG, TOKENS, 0), QUICK)
    assert target.measure(program, make_sample(CONFIG, TOKENS, 0), QUICK).errors


@pytest.mark.slow
def test_a_search_runs_against_the_board(target: RpcTarget, tmp_path: Path) -> None:
    corpus = load_corpus(str(write_speeches(tmp_path / "speeches.jsonl")))
    given = settings(timing=QUICK, workload=Workload(prompt_bytes=16, generate_bytes=16))
    run, outcome = run_search(tmp_path / "run", corpus, trials=2, target=target, given=given)
    assert [e.state for e in outcome.evaluations] == ["complete"] * 2
    assert repeated_steps(run) == []
    for evaluation in outcome.evaluations:
        assert evaluation.measurement is not None
        assert evaluation.measurement["device"] == "board"
        assert max(evaluation.measurement["errors"].values()) < 1e-4


def test_the_commands_of_the_page_work_with_the_board(board_desk: Process, tmp_path: Path) -> None:
    """As a user adds a pool and checks it; then a search on it and a model that it has no room for, from the command line."""
    places = {"PYTHONPATH": ROOT, "EDGEWISE_CACHE": tmp_path / "cache", "EDGEWISE_CONFIG": tmp_path / "config"}
    environment = {**os.environ, **{name: str(path) for name, path in places.items()}}

    def edgewise(line: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nas", *shlex.split(line)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    shown = re.findall(r"^edgewise (targets .* my-pool.*)$", (ROOT / "docs/rpc.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 2
    add, check = (line.replace(":9190", f":{board_desk.port}").replace("--key pi5", "--key board") for line in shown)
    edgewise(f"{add} --cores 1 --memory 1GB")
    report = edgewise(f"{check} --repeats 3")
    assert all(f"✓ {name}" in report for name in ("reachable", "probe", "roofline", "numerics")), report
    write_speeches(tmp_path / "speeches.jsonl")
    edgewise(f"search --space {SPACE_FILE} --corpus speeches.jsonl --budget 3000 --target my-pool --trials 1 --run run")
    assert json.loads((tmp_path / "run" / "trials" / "00000.json").read_text())["state"] == "complete"
    assert "of memory and target 'my-pool' has" in edgewise("measure qwen2-0.5b --target my-pool", status=2)


def test_without_a_way_to_have_it_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["emulated_board", "--cache", str(tmp_path)])
    assert main() == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"no emulated board: apt-get is not installed, so a system for arm64 cannot be downloaded\n", err)
    assert sorted(path.name for path in (tmp_path / "boards").iterdir()) == [".lock"]
