"""The command line as a new user meets it: what it says, what it refuses, how it ends."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from search_helpers import SPACE_FILE, contents, write_speeches

from nas.cli import main
from nas.run import open_run
from search_spaces.config import SLMConfig
from targets.local import LocalTarget

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "tvm", "optuna", "plotly", "tokenizers", "pandas", "pyarrow", "numpy", "rich", "sqlalchemy")
NAMES = {
    *("trial", "config", "params", "flops_per_token", "weight_bytes", "kv_bytes_per_token", "peak_bytes", "prefill_s"),
    *("decode_s_per_token", "request_s", "bytes_per_s", "val_bpb", "val_bpb_stderr", "state"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> list[str]:
    """Arguments of a search of a second, and an empty folder to run it in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    return ["search", "--space", str(SPACE_FILE), "--target", "null", "--corpus", str(corpus), "--budget", "3kB"]


def run(*args: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`edgewise` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "nas", *map(str, args)],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line on stderr that a refusal prints."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


# --- at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["search", "--help"],
        ["spaces", "list"],
        ["spaces", "show", "tiny"],
        ["targets", "list"],
        ["count", "gpt2-124m"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy_and_answer_at_once(args: list[str]) -> None:
    code = f"import sys; from nas.cli import main; s = main({args!r}); print(s, sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        fastest = min(fastest, time.perf_counter() - start)
        assert done.stderr == "0 []\n"
        assert len(done.stdout) > 5
        if fastest < 0.5:
            break
    assert fastest < 1.0


@pytest.mark.parametrize("command", ["search", "front", "report", "export", "measure", "count", "targets", "targets show", "spaces show"])
def test_every_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: edgewise {command}")
    assert command == "targets" or "edgewise " + command.split()[0] in out.split("\n", 1)[1]


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "First steps" in capsys.readouterr().err


# --- one model, one device, one space -------------------------------------------------------


def test_counts_in_json_use_the_names_of_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "gpt2-124m", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["params"] == 124_439_808
    assert {"config", "params", "flops_per_token", "weight_bytes", "kv_bytes_per_token", "peak_bytes"} <= values.keys()
    assert sum(values["by_component"]["params"].values()) == values["params"]
    assert values["context"] == 1023
    assert main(["count", "gpt2-124m"]) == 0
    assert "124,439,808" in capsys.readouterr().out


def test_a_config_file_is_counted_like_the_reference_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["count", "smollm-135m", "--json"])
    reference = json.loads(capsys.readouterr().out)
    (tmp_path / "mine.json").write_text(json.dumps(reference["config"]))
    assert main(["count", str(tmp_path / "mine.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == reference | {"model": "mine.json"}


def test_a_reference_is_measured_with_an_assumed_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["measure", "smollm-135m", "--target", "null", "--prompt-bytes", "100", "--generate-bytes", "50"]
    assert main([*args, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["bytes_per_token_assumed"] is True
    assert NAMES - {"trial", "val_bpb", "val_bpb_stderr", "state"} <= values.keys()
    assert values["request_s"] == pytest.approx(values["prefill_s"] + values["generated_tokens"] * values["decode_s_per_token"])
    assert len(values["measurement"]["times_s"]["decode"]) >= 5
    assert (values["noisy"], values["slow"]) == ([], False)
    assert values["slowdown"] > 0
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert "(assumed)" in shown
    assert "steady" in shown


@pytest.fixture
def on_local_target(local_target: LocalTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands measure on the target that other tests go on with."""
    monkeypatch.setattr("targets.target.load_target", lambda name, cache: local_target)
    monkeypatch.setattr(local_target, "close", lambda: None)


def tiny_config(folder: Path, num_layers: int) -> str:
    config = SLMConfig(vocab_size=61, d_model=32, num_layers=num_layers, num_heads=4, ffn_dim=40, context=32)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return str(folder / "config.json")


def test_a_model_in_fewer_bits_is_counted_measured_and_checked(
    tmp_path: Path, on_local_target: None, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tiny_config(tmp_path, num_layers=1)
    args = ["measure", name, "--prompt-bytes", "6", "--generate-bytes", "10", "--weights", "int4"]
    assert main([*args, "--profile", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert main(["count", name, "--weights", "int4", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert measured["weights"] == counted["weights"] == "int4"
    assert measured["weight_bytes"] == counted["weight_bytes"] < 61 * 32 * 4
    assert 0 < max(measured["measurement"]["errors"].values()) < 1e-4
    head = next(o for o in measured["profile"]["decode"]["operators"] if o["operator"] == "head")
    assert head["read_bytes"] == 61 * (16 + 2)
    assert main(["count", name, "--weights", "int4"]) == 0
    assert re.search(rf"^weights \(int4\) +{counted['weight_bytes']:,} bytes", capsys.readouterr().out, re.MULTILINE)


def test_a_search_in_several_precisions_says_which(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--trials", "4", "--weights", "int8,int4"]) == 0
    out = capsys.readouterr().out
    assert set(re.findall(r"weights=(\w+)", out)) == {"int8", "int4"}
    assert main(["front", "runs/small-null"]) == 0
    assert re.search(r"\bweights\b.*\n.*\bint[84]\b", capsys.readouterr().out)
    assert main(["front", "runs/small-null", "--json"]) == 0
    assert {m["weights"] for m in json.loads(capsys.readouterr().out)["front"]} <= {"int8", "int4"}


def test_a_profile_is_shown_and_written(tmp_path: Path, on_local_target: None, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["measure", tiny_config(tmp_path, num_layers=2), "--prompt-bytes", "6", "--generate-bytes", "10"]
    assert main([*args, "--profile"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^prefill of 6 tokens$", shown, re.MULTILINE)
    assert re.search(r"^decode of a token after 11 others$", shown, re.MULTILINE)
    assert len(re.findall(r"^FFN +\d[\d.]* .?s +\d+\.\d %", shown, re.MULTILINE)) == 2
    assert len(re.findall(r"^device's best +100 +10\.0$", shown, re.MULTILINE)) == 2
    assert main([*args, "--profile", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["ceilings"] == {"flops_per_s": 1e11, "read_bytes_per_s": 1e10}
    for phase in ("prefill", "decode"):
        parts = values["profile"][phase]
        assert {o["operator"]: o["time_s"] for o in parts["operators"]} == values["measurement"]["profile"][phase]
    assert main([*args, "--json"]) == 0
    assert "profile" not in json.loads(capsys.readouterr().out)


def test_a_device_that_cannot_tell_is_not_asked_for_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "smollm-135m", "--target", "null", "--profile"]) == 2
    assert "target 'null' cannot tell where its time goes; leave out --profile" in refused(capsys)


def test_a_measurement_that_was_slow_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from targets.measurement import Measurement

    monkeypatch.setattr(Measurement, "slowdown", property(lambda self: 2.5))
    args = ["measure", "smollm-135m", "--target", "null", "--prompt-bytes", "100", "--generate-bytes", "50"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^state +slow$", out, re.MULTILINE)
    assert "ran 2.50 times slower than it can" in err
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slow"] is True


def test_a_space_is_shown_as_a_file_that_can_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from search_spaces.space import load_space

    assert main(["spaces", "show", "tiny"]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    assert load_space(path).key == load_space("tiny").key


def test_lists_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "list", "--json"]) == 0
    assert {"local", "null"} <= {t["name"] for t in json.loads(capsys.readouterr().out)}
    assert main(["spaces", "list", "--json"]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)] == ["tiny", "wearable", "phone", "laptop"]
    assert main(["targets", "show", "null", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] == 8_000_000_000


# --- a search ---------------------------------------------------------------------------------


def test_from_a_search_to_an_exported_model(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--trials", "3"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["trial=0", "trial=1", "trial=2"]
    assert "runs/small-null/report.html" in err
    assert "edgewise export runs/small-null --trial" in err

    # The same command again finds everything done; a larger one goes on.
    assert main([*small, "--trials", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "trial=" not in out
    assert found == json.loads(Path("runs/small-null/front.json").read_text())
    assert all(model.keys() >= NAMES for model in found["front"])
    assert main([*small, "--trials", "4"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["trial=3"]

    assert main(["front", "runs/small-null"]) == 0
    table = capsys.readouterr().out
    assert "★" in table
    assert "bits/byte" in table
    assert main(["front", "runs/small-null", "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    assert front == json.loads(Path("runs/small-null/front.json").read_text())

    Path("runs/small-null/report.html").unlink()
    assert main(["report", "runs/small-null"]) == 0
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 10_000

    assert main(["export", "runs/small-null", "--trial", str(front["chosen"]), "--to", "model"]) == 0
    assert main(["measure", "model", "--target", "null", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    chosen = next(m for m in front["front"] if m["trial"] == front["chosen"])
    assert measured["bytes_per_token_assumed"] is False
    same = NAMES - {"trial", "val_bpb", "val_bpb_stderr", "state"}
    assert {k: measured[k] for k in same} == {k: chosen[k] for k in same}


def test_two_processes_write_the_same_bytes(small: list[str], tmp_path: Path) -> None:
    """This one and another, with another seed of Python's hashes."""
    assert main([*small, "--trials", "3", "--run", "a"]) == 0
    done = run(*small, "--trials", "3", "--run", "b", cwd=tmp_path, PYTHONHASHSEED="97")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_end_with_a_usable_front(small: list[str], tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nas", *small, "--trials", "500"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline().startswith("trial=")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("interrupted with ")
    assert "the same command goes on" in err
    assert len(err.splitlines()) == 1
    found = open_run(tmp_path / "runs" / "small-null")
    assert json.loads(found.front_path.read_text())["front"]
    assert found.report_path.exists()


def test_a_storage_url_is_used_and_kept_apart(small: list[str], tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in ("a", "b"):
        assert main([*small, "--trials", "2", "--storage", url, "--run", name]) == 0
        assert not (tmp_path / name / "study.db").exists()
    connection = sqlite3.connect(tmp_path / "shared.db")
    assert connection.execute("select count(*) from studies").fetchone() == (2,)
    assert connection.execute("select count(*) from trials").fetchone() == (4,)
    connection.close()


def test_a_run_name_cannot_lead_out_of_its_folder(small: list[str], tmp_path: Path) -> None:
    space = tmp_path / "s.toml"
    space.write_text(SPACE_FILE.read_text().replace('"small"', '"../../evil <b>"'))
    small[2] = str(space)
    assert main([*small, "--trials", "1"]) == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["evil-b-null"]


# --- what a new user gets wrong ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["search", "--space", "tny"], "did you mean 'tiny'"),
        (["search", "--target", "locl"], "target 'locl' is not known; did you mean 'local'?; choose one of"),
        (["search", "--sampler", "tp"], "sampler 'tp' is not known; choose one of tpe"),
        (["search", "--speed", "fast"], "'fast' is not one of"),
        (["search", "--weights", "fp32,int5"], "'int5' is not a precision; use one or several of fp32, fp16, int8, int4, as in fp32,int8"),
        (["search", "--weights", ""], "'' is not a precision"),
        (["search", "--weights", "int8,int8"], "'int8,int8' names a precision twice; name each once"),
        (["count", "gpt2-124m", "--weights", "int5"], "'int5' is not one of 'fp32', 'fp16', 'int8', 'int4'"),
        (["measure", "gpt2-124m", "--weights", "fp32,int8"], "'fp32,int8' is not one of"),
        (["measure", "llama-7b", "--target", "null"], "measure a smaller model, or one in fewer bits with --weights"),
        (["search", "--corpus", "nowhere.txt"], "corpus 'nowhere.txt' does not exist"),
        (["search", "--trials", "0"], "--trials"),
        (["search", "--trials", "many"], "--trials"),
        (["search", "--timeout", "10"], "'10' has no unit; write it as in 5ms, 30s, 10m or 2h"),
        (["search", "--timeout", "0s"], "is not above 0"),
        (["search", "--timeout", "1y"], "'y' is not a unit of duration"),
        (["search", "--max-memory", "big"], "'big' is not a size; write it as in 64MB"),
        (["search", "--max-params", "-5"], "'-5' is not a count"),
        (["search", "--max-parms", "5M"], "No such option '--max-parms'"),
        (["serch"], "No such command 'serch'"),
        (["front", "nowhere"], "run 'nowhere' does not exist; give a folder that `edgewise search` made"),
        (["report", "."], "is not a run: it has no manifest.json"),
        (["export", "nowhere", "--trial", "1", "--to", "x"], "run 'nowhere' does not exist"),
        (["export", "nowhere"], "Missing option '--trial'"),
        (["measure", "gpt3"], "'gpt3'"),
        (["measure", "no/such/config.json"], "'no/such/config.json' does not exist"),
        (["measure", "llama-7b", "--target", "null"], "llama-7b needs 27.1 GB of memory and target 'null' has 8.00 GB"),
        (["measure", "gpt2-124m", "--target", "null", "--prompt-bytes", "90000"], "gpt2-124m has context=1024; give fewer"),
        (["count", "smollm135m"], "smollm-135m"),
        (["targets", "show", "nul"], "target 'nul' is not known"),
        (["spaces", "show", "tinny"], "did you mean 'tiny'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_names_and_values_give_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    assert main(args) == 2
    assert message in refused(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (bytes(range(256)) * 200, "not"), (b"one line " * 9000, "corpus"), (b"short\n", "corpus")],
    ids=["empty", "binary", "one line", "short"],
)
def test_a_corpus_that_cannot_be_used(small: list[str], capsys: pytest.CaptureFixture[str], data: bytes, message: str) -> None:
    Path("text.txt").write_bytes(data)
    small[6] = "text.txt"
    assert main(small) == 2
    assert message in refused(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("d_model = 16", "d_model"), ("[parameters]\nd_modle = 16", "d_model"), ("= 3", "TOML")],
    ids=["key", "parameter", "not TOML"],
)
def test_a_space_that_cannot_be_used(small: list[str], capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("mine.toml").write_text(text)
    small[2] = "mine.toml"
    assert main(small) == 2
    assert message in refused(capsys)


def test_an_unknown_key_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "d_model": 16, "num_layers": 1, "num_head": 2}')
    for command in (["count", str(tmp_path)], ["measure", str(tmp_path), "--target", "null"]):
        assert main(command) == 2
        assert "'num_head' is not a field of an architecture config; did you mean 'num_heads'?" in refused(capsys)


def test_a_space_whose_candidates_all_break_a_limit(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--trials", "4", "--max-params", "1k"]) == 2
    out, err = capsys.readouterr()
    assert out.count("state=infeasible") == 4
    assert len(err.splitlines()) == 1
    assert err.startswith("error: no candidate keeps the limits: 4 infeasible (the last: ")
    assert Path("runs/small-null/report.html").exists()


def test_a_run_folder_with_other_settings_or_damage(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--trials", "2"]) == 0
    capsys.readouterr()
    before = contents(Path("runs/small-null"))
    assert main([*small, "--trials", "2", "--seed", "1"]) == 2
    assert "was made with --seed 0, not 1" in refused(capsys)
    Path("runs/small-null/trials/00001.json").write_text("{")
    assert main(["front", "runs/small-null"]) == 2
    assert "00001.json is damaged" in refused(capsys)
    assert main([*small, "--trials", "2"]) == 0
    capsys.readouterr()
    Path("runs/small-null/trials/00001.json.damaged").unlink()
    assert contents(Path("runs/small-null")) == before
    Path("runs/small-null/manifest.json").write_text("{")
    assert main([*small, "--trials", "2"]) == 2
    assert "manifest.json is damaged" in refused(capsys)
    assert contents(Path("runs/small-null")) == before


@pytest.mark.parametrize("where", ["file/run", "/proc/edgewise/run"])
def test_a_folder_that_cannot_be_written(small: list[str], capsys: pytest.CaptureFixture[str], where: str) -> None:
    Path("file").touch()
    assert main([*small, "--run", where]) == 2
    assert "cannot be written" in refused(capsys)


def test_a_storage_that_cannot_be_opened(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("nonsense", "sqlite:////no/such/folder/x.db", "nodb://user:secret@host/db"):
        assert main([*small, "--trials", "1", "--storage", url, "--run", url[:6]]) == 2
        line = refused(capsys)
        assert "cannot be opened" in line
        assert "secret" not in line


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_loses_nothing(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Files end at 300 kB, as on a disk that fills up: the report (megabytes) does not fit, everything before it does.
    done = subprocess.run(
        [sys.executable, "-m", "nas", *small, "--trials", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=_limit_files,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "make room and run the same command again" in done.stderr
    before = contents(tmp_path / "runs" / "small-null")
    assert sum(name.startswith("trials/") for name in before) == 3
    assert not list((tmp_path / "runs").rglob("*.part"))
    assert main([*small, "--trials", "3"]) == 0
    assert capsys.readouterr().out == ""
    assert contents(tmp_path / "runs" / "small-null") == before


def test_a_disk_that_is_really_full(small: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting needs privileges that this process does not have")
    try:
        done = run(*small, "--trials", "8", "--run", disk / "run", cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "error: " in done.stderr
        assert "nothing finished is lost" in done.stderr
        kept = {p.name: p.read_bytes() for p in (disk / "run" / "trials").glob("*.json")}
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert main([*small, "--trials", "8", "--run", str(disk / "run")]) == 0
        for name, data in kept.items():
            assert json.loads(data)["state"] == "running" or (disk / "run" / "trials" / name).read_bytes() == data
        assert len(list((disk / "run" / "trials").glob("*.json"))) == 8
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_bug_is_one_line_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import search_spaces.space

    def broken() -> tuple[str, ...]:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(search_spaces.space, "space_names", broken)
    assert main(["spaces", "list"]) == 1
    assert refused(capsys) == "error: ZeroDivisionError: by zero; EDGEWISE_DEBUG=1 shows where it came from"
    monkeypatch.setenv("EDGEWISE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["spaces", "list"])


# --- several devices, references ---------------------------------------------------------------


def test_a_search_over_two_devices_is_shown_together_and_one_by_one(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("boards").mkdir()
    Path("boards/other.toml").write_text(
        'name = "other"\nkind = "null"\ncores = 1\nvector_bytes = 16\nmemory_bytes = 8_000_000_000\n'
        "read_bytes_per_s = 1.0e8\nflops_per_s = 5.0e11\n"
    )
    folder = "runs/small-null-other"
    args = [*small, "--target", "boards/other.toml"]
    assert main([*args, "--trials", "2", "--ahead", "2", "--reference", "gpt2-124m"]) == 0
    out, err = capsys.readouterr()
    assert out.count(" other.request_s=") == 2
    assert f"on the joint front: edgewise front {folder};" in err
    assert main([*args, "--trials", "3", "--json"]) == 0  # --ahead is that of the run
    whole = json.loads(capsys.readouterr().out)
    assert open_run(Path(folder)).manifest["settings"]["ahead"] == 2
    assert list(whole["devices"]) == ["null", "other"]
    assert [r["name"] for r in whole["references"]] == ["gpt2-124m"]
    assert main(["front", folder]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"bits/byte +null +other +params", shown)
    assert re.search(r"^gpt2-124m +ref +– ", shown, re.MULTILINE)
    assert main(["front", folder, "--target", "other"]) == 0
    assert "ms/token" in capsys.readouterr().out
    assert main(["front", folder, "--target", "other", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert [m["trial"] for m in there["front"]] == whole["devices"]["other"]["front"]
    assert there["front"][0]["request_s"] == next(
        m["devices"]["other"]["request_s"] for m in whole["front"] if m["trial"] == there["front"][0]["trial"]
    )
    assert main(["front", folder, "--target", "pi5"]) == 2
    assert refused(capsys).endswith("--target 'pi5' is not a device of run 'runs/small-null-other'; choose one of null, other")
    assert main([*args, "--target", "null", "--trials", "3"]) == 2
    assert "target 'null' is there twice" in refused(capsys)
    assert main([*small, "--run", folder, "--trials", "3"]) == 2
    assert "was made with --target null, other, not null; use the same to go on with it" in refused(capsys)


def test_an_unknown_reference_costs_nothing(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--reference", "no/such/config.json"]) == 2
    assert "'no/such/config.json' does not exist" in refused(capsys)
    assert not Path("runs").exists()
