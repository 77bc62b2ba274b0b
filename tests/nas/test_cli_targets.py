"""`edgewise targets`: a device is described, listed, shown, checked and removed, each in a command."""

import json
from pathlib import Path

import pytest

from nas.cli import main
from targets.spec import DeviceSpec, load_spec

NULL = 'kind = "null"\ncores = 1\nread_bytes_per_s = 1e9\nflops_per_s = 1e10\n'


@pytest.fixture(autouse=True)
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's device files."""
    monkeypatch.setenv("EDGEWISE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "config" / "devices"


def said(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    assert main(["targets", *args]) == status
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line on stderr of a command that refuses."""
    assert main(["targets", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    return err


# --- add ------------------------------------------------------------------------------------------


def test_a_board_is_one_command(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--like", "pi5", "--host", "192.168.1.7", "--memory", "8GB", "--cooldown", "5s", "--affinity", "2, 3", "--cores", "2")
    assert said(capsys, "add", "board", *args) == f"{devices / 'board.toml'}\n"
    spec, like = load_spec("board"), load_spec("pi5")
    assert (spec.kind, spec.host, spec.port, spec.memory_bytes, spec.cooldown_s) == ("rpc", "192.168.1.7", 9090, 8_000_000_000, 5.0)
    assert (spec.affinity, spec.cores) == ((2, 3), 2)
    assert (spec.triple, spec.cpu, spec.features, spec.dot, spec.state) == (like.triple, like.cpu, like.features, like.dot, like.state)


def test_a_farm_is_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "add", "farm", "--like", "rk3588", "--tracker", "10.0.0.1:9999", "--key", "rock")
    spec = load_spec("farm")
    assert (spec.kind, spec.host, spec.port, spec.key) == ("tracker", "10.0.0.1", 9999, "rock")
    said(capsys, "add", "other", "--like", "rk3588", "--tracker", "10.0.0.1", "--key", "rock")
    assert load_spec("other").port == 9190


def test_everything_can_be_said_without_a_likeness(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--triple", "riscv64-linux-gnu", "--cpu", "generic-rv64", "--feature", "+zve64d", "--feature", "+zvl128b", "--cores", "8")
    more = ("--vector-bytes", "16", "--dot", "none", "--linker", "gcc", "--timeout", "10m", "--backend", "llvm", "--description", "A board")
    said(capsys, "add", "v", "--host", "localhost", "--port", "9091", "--key", "k", *args, *more)
    assert load_spec("v") == DeviceSpec(
        name="v", kind="rpc", host="localhost", port=9091, key="k", triple="riscv64-linux-gnu", cpu="generic-rv64",
        features=("+zve64d", "+zvl128b"), cores=8, vector_bytes=16, dot="", linker="gcc", timeout_s=600.0, description="A board",
    )  # fmt: skip


def test_a_plugins_device_has_options(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "add", "beads", "--kind", "abacus", "--option", "rows=10", "--option", "colour=red", "--option", "sizes=[1, 2]")
    spec = load_spec("beads")
    assert (spec.kind, spec.options) == ("abacus", {"rows": 10, "colour": "red", "sizes": [1, 2]})


def test_what_was_measured_of_the_likeness_is_not_copied(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.mkdir(parents=True)
    (devices / "a.toml").write_text('kind = "local"\ncores = 1\nread_bytes_per_s = 1e9\nflops_per_s = 1e10\n')
    said(capsys, "add", "b", "--like", "a")
    spec = load_spec("b")
    assert (spec.cores, spec.read_bytes_per_s, spec.flops_per_s) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["b"], "nothing says how it is reached; give --host, --tracker, --kind, or --like a device that does"),
        (["b", "--host", "h", "--tracker", "t", "--key", "k"], "--host and --tracker say two ways to reach it; give one"),
        (["b", "--tracker", "t"], "--tracker needs --key"),
        (["b", "--tracker", "t:x", "--key", "k"], "--tracker 't:x' is not HOST or HOST:PORT"),
        (["b", "--like", "local", "--port", "1"], "--port is that of a server; give --host or --tracker, too"),
        (["b", "--like", "pi55"], "target 'pi55' is not known; did you mean 'pi5'?"),
        (["pi5", "--like", "pi5", "--host", "h"], "the name is that of a shipped device; choose another, as in my-pi5"),
        (["../b", "--like", "pi5", "--host", "h"], "name='../b' is not letters, digits"),
        (["b", "--like", "pi5", "--host", "h", "--affinity", "1,x"], "affinity=[1, 'x'] is not a list of processor numbers"),
        (["b", "--like", "pi5", "--host", "h", "--feature", "dotprod"], "each with its sign"),
        (["b", "--like", "pi5", "--host", "h", "--memory", "8"], ""),
        (["b", "--like", "pi5", "--host", "h", "--memory", "lots"], "'lots' is not a size"),
        (["b", "--kind", "abacus", "--option", "rows"], "'rows' is not KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not message:  # eight bytes are odd, and no mistake
        said(capsys, "add", *args)
        return
    assert message in refused(capsys, "add", *args)
    assert not devices.exists()


def test_replacing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "add", "b", "--like", "pi5", "--host", "one")
    assert "is there already" in refused(capsys, "add", "b", "--like", "pi5", "--host", "two")
    said(capsys, "add", "b", "--like", "pi5", "--host", "two", "--replace")
    assert load_spec("b").host == "two"


# --- list, show, remove -----------------------------------------------------------------------------


def test_the_list_has_all_devices_with_their_states(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.mkdir(parents=True)
    (devices / "mine.toml").write_text(NULL)
    (devices / "bad.toml").write_text('kind = "null"\ncolour = "red"\n')
    rows = {row["name"]: row for row in json.loads(said(capsys, "list", "--json"))}
    assert rows["pi5"] | {"description": ""} == {
        "name": "pi5",
        "origin": "shipped",
        "kind": "rpc",
        "state": "cross-compiled",
        "description": "",
    }
    assert (rows["mine"]["origin"], rows["mine"]["state"]) == ("own", "described")
    assert rows["bad"]["state"] == "malformed" and "'colour' is not a field" in rows["bad"]["description"]
    lines = {line.split()[0]: line for line in said(capsys, "list").splitlines()}
    assert lines.keys() == rows.keys()
    assert all(word in lines["pi5"] for word in ("rpc", "cross-compiled", "shipped", "Raspberry Pi 5"))


def test_a_board_is_shown_without_being_asked(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "add", "b", "--like", "pi5", "--host", "192.0.2.1")
    assert json.loads(said(capsys, "show", "b", "--json")) == load_spec("b").to_dict()
    shown = dict(line.split(maxsplit=1) for line in said(capsys, "show", "pi5").splitlines())
    assert (shown["cpu"], shown["features"]) == ("cortex-a76", "+dotprod")
    assert "options" not in shown and "host" not in shown


def test_a_device_is_removed(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "add", "b", "--like", "null")
    assert main(["targets", "remove", "b"]) == 0
    assert f"removed {devices / 'b.toml'}" in capsys.readouterr().err
    assert "target 'b' is not known" in refused(capsys, "show", "b")
    assert "ships with edgewise" in refused(capsys, "remove", "null")


# --- check, and use -----------------------------------------------------------------------------------


def test_a_check_says_each_step_and_writes_what_it_measured(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.mkdir(parents=True)
    (devices / "mine.toml").write_text(NULL + "# a comment\n")
    lines = said(capsys, "check", "mine", "--repeats", "6").splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["✓", name] for name in ("probe", "roofline", "numerics", "spread", "drift", "clock")
    ]
    assert lines[-1] == f"written to {devices / 'mine.toml'}"
    assert load_spec("mine").state == "run"
    assert "# a comment" in (devices / "mine.toml").read_text()


def test_a_check_in_json_and_without_writing(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.mkdir(parents=True)
    (devices / "mine.toml").write_text(NULL)
    values = json.loads(said(capsys, "check", "mine", "--json", "--no-save"))
    assert (values["target"], values["ok"], values["saved"]) == ("mine", True, None)
    assert [step["name"] for step in values["steps"]] == ["probe", "roofline", "numerics", "spread", "drift", "clock"]
    assert values["steps"][1]["values"] == {"read_bytes_per_s": 1e9, "flops_per_s": 1e10}
    assert (devices / "mine.toml").read_text() == NULL


def test_a_shipped_device_is_checked_and_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "check", "null").splitlines()[-1] == (
        "nothing is written: 'null' has no file of yours; `edgewise targets add NAME --like null` makes one"
    )


def test_a_check_that_fails_has_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "check", "pi5", status=1).splitlines()
    assert lines[-1].startswith("✗ ")
    assert json.loads(said(capsys, "check", "pi5", "--json", status=1))["ok"] is False
    assert "is not known" in refused(capsys, "check", "pi55")


def test_a_model_is_measured_on_a_device_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slow.toml").write_text(NULL)
    times = []
    for target in ("null", str(tmp_path / "slow.toml")):
        assert main(["measure", "smollm-135m", "--target", target, "--prompt-bytes", "50", "--generate-bytes", "50", "--json"]) == 0
        times.append(json.loads(capsys.readouterr().out)["decode_s_per_token"])
    assert times[1] == pytest.approx(10 * times[0], rel=0.01)
