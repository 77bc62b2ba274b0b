"""Device files: what is shipped loads and is complete, what is malformed is refused with one line that names the field."""

import json
from pathlib import Path

import pytest

from targets.link import link_command
from targets.null import NullTarget
from targets.spec import DeviceSpec, InvalidDevice, device_names, device_origins, load_spec, own_devices, own_file, read_device
from targets.target import load_target, make_target
from targets.toolchain import toolchain

GOOD = {"name": "board", "kind": "local", "cores": 4, "read_bytes_per_s": 5e9, "features": ["+neon"]}
BOARDS = [name for name, origin in device_origins().items() if origin == "shipped" and load_spec(name).kind in ("rpc", "tracker")]


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's device files, empty."""
    monkeypatch.setenv("EDGEWISE_CONFIG", str(tmp_path))
    (tmp_path / "devices").mkdir()
    return tmp_path / "devices"


# --- what ships --------------------------------------------------------------------------------


def test_the_shipped_devices_load_under_their_own_names() -> None:
    wanted = {"local", "null", "x86-64-avx2", "x86-64-avx512", "pi4", "pi5", "rk3588", "jetson-orin", "jetson-orin-cuda"}
    wanted |= {"android-arm64", "apple-silicon", "riscv64-rvv", "cuda"}
    assert wanted <= set(device_names())
    for name in device_names():
        spec = load_spec(name)
        assert spec.name == name
        assert spec.description
        assert spec.state in ("run", "cross-compiled", "described")


def test_the_null_device_has_ceilings_and_the_local_one_leaves_everything_to_detection() -> None:
    null, local = load_spec("null"), load_spec("local")
    assert null.flops_per_s > 0
    assert null.read_bytes_per_s > 0
    assert (local.triple, local.cpu, local.cores, local.vector_bytes, local.flops_per_s, local.read_bytes_per_s) == (None, None, 0, 0, 0, 0)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_needs_nothing_but_an_address(name: str) -> None:
    """All that compiling needs is in its row, and it is honest: nobody has run one here."""
    spec = load_spec(name)
    assert spec.triple and spec.cpu and spec.cores and spec.vector_bytes and spec.dot is not None
    assert spec.state != "run"
    assert not spec.host
    tools = toolchain(spec)
    assert tools.triple == spec.triple
    assert tools.cpu.lanes == spec.vector_bytes // 4
    assert link_command(spec.triple)
    with pytest.raises(
        InvalidDevice, match=rf"^target '{name}' has no host; say where yours is: `edgewise targets add NAME --like {name} --"
    ):
        load_target(name)


# --- what users write ---------------------------------------------------------------------------


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidDevice, match=r"target 'pixel9' is not known; choose one of .*local.*null"):
        load_spec("pixel9")
    with pytest.raises(InvalidDevice, match=r"target 'pi55' is not known; did you mean 'pi5'\?"):
        load_spec("pi55")
    with pytest.raises(InvalidDevice, match=r"'\.\./null' does not exist; give a TOML file, or a name"):
        load_target("../null")


def test_a_file_in_the_users_folder_is_a_device_by_its_name(devices: Path) -> None:
    (devices / "board.toml").write_text('kind = "null"\ncores = 2\nread_bytes_per_s = 1e9\nflops_per_s = 2e9\n')
    assert own_devices() == devices
    assert device_origins()["board"] == "own"
    assert load_spec("board") == DeviceSpec(name="board", kind="null", cores=2, read_bytes_per_s=1e9, flops_per_s=2e9)
    assert own_file("board") == devices / "board.toml"
    assert own_file("null") is None


def test_a_file_is_a_device_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "null"\n')
    assert load_spec(str(path)).name == "mine"
    path.write_text('kind = "null"\nname = "other"\n')
    assert load_spec(str(path)).name == "other"
    assert own_file(str(path)) == path


def test_the_users_folder_follows_the_systems_conventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEWISE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert own_devices() == tmp_path / "edgewise" / "devices"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_devices() == tmp_path / ".config" / "edgewise" / "devices"


def test_a_shipped_name_is_never_taken_over(devices: Path, tmp_path: Path) -> None:
    (devices / "pi5.toml").write_text('kind = "null"\n')
    with pytest.raises(InvalidDevice, match=r"pi5\.toml has the name of a shipped device; rename it"):
        load_spec("pi5")
    (devices / "pi5.toml").unlink()
    (tmp_path / "a.toml").write_text('name = "pi5"\nkind = "null"\n')
    with pytest.raises(InvalidDevice, match="name='pi5' is that of a shipped device; choose another"):
        load_spec(str(tmp_path / "a.toml"))


def test_a_file_that_says_another_name_than_its_own_is_refused(devices: Path) -> None:
    (devices / "board.toml").write_text('name = "plank"\nkind = "null"\n')
    with pytest.raises(InvalidDevice, match="name='plank' is not that of the file; leave it out, or rename the file"):
        load_spec("board")


@pytest.mark.parametrize("content", [b"kind = ", b"kind = 1979-05-27\nkind", b"\xff\xfe"], ids=["cut", "twice", "bytes"])
def test_what_is_not_toml_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidDevice, match=r"board\.toml: this is not TOML \(.*\); correct it$") as caught:
        read_device(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidDevice, match=r"cannot be read \(Is a directory\)"):
        read_device(tmp_path)


def test_a_spec_survives_json() -> None:
    spec = DeviceSpec.from_dict({**GOOD, "options": {"threads": 2}, "affinity": [4, 5]}, "board.toml")
    assert spec.features == ("+neon",)
    assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict())), "again") == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "'colour' is not a field of a device; the fields are name, kind"),
        ({"memory": 5}, r"'memory' is not a field of a device; did you mean 'memory_bytes'\?; the fields are"),
        ({"kind": ["local"]}, r"kind=\['local'\] is not a text"),
        ({"kind": ""}, "kind='' is not local, rpc, tracker, null or the name of a plug-in"),
        ({"name": 3}, "name=3 is not a text"),
        ({"name": "../board"}, r"name='\.\./board' is not letters, digits"),
        ({"name": "b" * 65}, "name='b+' is not letters, digits, .* at most 64"),
        ({"description": "two\nlines"}, r"description='two\\nlines' is not a line of printable characters"),
        ({"key": "\x1b[2J"}, r"key='\\x1b\[2J' is not a line of printable"),
        ({"cpu": 3}, "cpu=3 is not a text"),
        ({"cpu": "-cortex"}, "cpu='-cortex' is not LLVM's name of a processor"),
        ({"triple": True}, "triple=True is not a text"),
        ({"triple": "--version"}, "triple='--version' is not LLVM's name of a machine"),
        ({"triple": "aarch64"}, "triple='aarch64' is not LLVM's name of a machine, as in aarch64-linux-gnu"),
        ({"host": "-h"}, "host='-h' is not a host's name or address"),
        ({"cores": -1}, "cores=-1 is not a"),
        ({"cores": True}, "cores=True is not a"),
        ({"cores": "four"}, "cores='four' is not a"),
        ({"cores": 1.5}, "cores=1.5 is not a whole number"),
        ({"port": 70000}, "port=70000 is not a port, which are 1 to 65535"),
        ({"vector_bytes": 16.0}, "vector_bytes=16.0 is not a whole number"),
        ({"vector_bytes": 12}, "vector_bytes=12 is not a power of two from 4 to 256"),
        ({"memory_bytes": -5}, "memory_bytes=-5 is not a"),
        ({"cooldown_s": -1}, "cooldown_s=-1 is not a number"),
        ({"flops_per_s": float("nan")}, "flops_per_s=nan is not a"),
        ({"read_bytes_per_s": float("inf")}, "read_bytes_per_s=inf is not a"),
        ({"features": "+neon"}, r"features='\+neon' is not a list of texts"),
        ({"features": [1]}, r"features=\[1\] is not a list of texts"),
        ({"features": ["neon"]}, r"features=\['neon'\] is not a list of LLVM's names of features, each with its sign"),
        ({"affinity": [1, 1]}, r"affinity=\[1, 1\] is not a list of processor numbers, each once"),
        ({"affinity": 3}, "affinity=3 is not a list of processor numbers"),
        ({"state": "works"}, "state='works' is not one of run, cross-compiled, described"),
        ({"backend": "metal"}, "backend='metal' is not one of llvm, cuda, opencl"),
        ({"linker": "ld"}, "linker='ld' is not one of auto, zig, gcc, ndk, none"),
        ({"dot": "yes"}, "dot='yes' is not one of vnni, madd, sdot or empty"),
        ({"options": [1]}, r"options=\[1\] is not a table"),
        ({"options": {"a": {1, 2}}}, "options=.* is not a table of texts, numbers"),
    ],
)
def test_a_malformed_field_is_one_line_with_source_name_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidDevice, match=f"^board.toml: {message}") as caught:
        DeviceSpec.from_dict({**GOOD, **change}, "board.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "kind"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(InvalidDevice, match=f"{key} is missing"):
        DeviceSpec.from_dict({k: v for k, v in GOOD.items() if k != key}, "board.toml")


# --- which target a device is ---------------------------------------------------------------------


def test_load_target_makes_the_kind_that_the_file_says() -> None:
    target = load_target("null")
    assert isinstance(target, NullTarget)
    assert target.spec == load_spec("null")
    target.close()


def test_what_does_not_fit_the_kind_is_refused() -> None:
    with pytest.raises(InvalidDevice, match=r"target 'b': options=\{'a': 1\} are for plug-ins, and kind='null'"):
        make_target(DeviceSpec(name="b", kind="null", options={"a": 1}))
    with pytest.raises(InvalidDevice, match="target 'b': linker='none' is for devices that link themselves"):
        make_target(DeviceSpec(name="b", kind="local", linker="none"))
    with pytest.raises(InvalidDevice, match="target 'b': kind='abacus' is not one of local, rpc, tracker, null"):
        make_target(DeviceSpec(name="b", kind="abacus"))
