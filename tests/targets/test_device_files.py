"""The user's device files: what is written reads back, what is changed by hand stays, and no name leads elsewhere."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.device_files import add_device, remove_device, set_values, to_toml
from targets.spec import DeviceSpec, InvalidDevice, load_spec, own_devices

BOARD = DeviceSpec(name="board", kind="rpc", host="127.0.0.1", port=9090, features=("+dotprod",), affinity=(4, 5), cooldown_s=0.5)


@pytest.fixture(autouse=True)
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEWISE_CONFIG", str(tmp_path))
    return tmp_path / "devices"


printable = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=20).filter(str.isprintable)
plain = printable | st.integers(-(2**40), 2**40) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    description=printable,
    key=printable,
    dot=st.sampled_from([None, "", "vnni", "madd", "sdot"]),
    rate=st.floats(0, 1e18),
    affinity=st.lists(st.integers(0, 99), unique=True),
    options=st.dictionaries(printable, plain | st.lists(plain, max_size=3), max_size=3),
)
def test_any_device_reads_back_as_it_was_written(
    description: str, key: str, dot: str | None, rate: float, affinity: list[int], options: dict[str, object]
) -> None:
    spec = dataclasses.replace(
        BOARD, description=description, key=key, dot=dot, read_bytes_per_s=rate, affinity=tuple(affinity), options=options
    )
    assert DeviceSpec.from_dict(tomllib.loads(to_toml(spec)), "again") == spec


def test_a_device_is_added_and_removed(devices: Path) -> None:
    path = add_device(BOARD)
    assert path == devices / "board.toml"
    assert load_spec("board") == BOARD
    assert "cores" not in path.read_text(), "what is left at its default stays out of the file"
    assert remove_device("board") == path
    assert not path.exists()
    assert list(devices.iterdir()) == []


def test_a_device_of_that_name_is_replaced_only_when_asked() -> None:
    add_device(BOARD)
    other = dataclasses.replace(BOARD, port=9091)
    with pytest.raises(InvalidDevice, match=r"^device 'board' is there already, in .*board\.toml; give --replace, or another name$"):
        add_device(other)
    assert load_spec("board") == BOARD
    add_device(other, replace=True)
    assert load_spec("board") == other


def test_shipped_names_are_neither_taken_nor_removed() -> None:
    with pytest.raises(InvalidDevice, match=r"^device 'pi5': the name is that of a shipped device; choose another, as in my-pi5$"):
        add_device(dataclasses.replace(BOARD, name="pi5"), replace=True)
    with pytest.raises(InvalidDevice, match=r"^device 'null' ships with edgewise; only devices that"):
        remove_device("null")
    with pytest.raises(InvalidDevice, match=r"^target 'bord' is not known"):
        remove_device("bord")


@pytest.mark.parametrize("name", ["../board", "a/b", ".hidden", "", "con board", "-x"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDevice, match=r"name=.* is not letters, digits"):
        add_device(dataclasses.replace(BOARD, name=name))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_outside_the_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('kind = "null"\n')
    with pytest.raises(InvalidDevice, match="is a file of yours; only devices that"):
        remove_device(str(tmp_path / "mine.toml"))
    assert (tmp_path / "mine.toml").exists()


def test_an_invalid_device_is_not_written(devices: Path) -> None:
    with pytest.raises(InvalidDevice, match=r"^device 'board': port=70000 is not a port"):
        add_device(dataclasses.replace(BOARD, port=70000))
    assert not devices.exists()


BY_HAND = """\
# my board
kind = "null"   # for now
read_bytes_per_s = 1e9  # guessed
cores=4

[options]
state = "solid"
"""


def test_values_change_and_everything_else_stays(devices: Path) -> None:
    devices.mkdir()
    path = devices / "board.toml"
    path.write_text(BY_HAND)
    assert set_values("board", {"read_bytes_per_s": 2.5e9, "state": "run", "flops_per_s": 1e11}) == path
    assert path.read_text() == (
        BY_HAND.replace("1e9  # guessed", "2500000000.0  # guessed").replace(
            "cores=4\n", 'cores=4\nstate = "run"\nflops_per_s = 100000000000.0\n'
        )
    )
    spec = load_spec("board")
    assert (spec.read_bytes_per_s, spec.flops_per_s, spec.state, spec.options) == (2.5e9, 1e11, "run", {"state": "solid"})


@pytest.mark.parametrize("text", ['kind = "null"', 'kind = "null"\n', '\n\nkind = "null"\n[options]\n', 'options = {}\nkind = "null"\n'])
def test_values_are_added_wherever_the_file_ends(text: str, devices: Path) -> None:
    devices.mkdir()
    (devices / "board.toml").write_text(text)
    set_values("board", {"cores": 3})
    assert load_spec("board") == DeviceSpec(name="board", kind="null", cores=3)


def test_a_file_that_cannot_be_changed_by_lines_is_left_alone(devices: Path) -> None:
    devices.mkdir()
    text = 'kind = "null"\ndescription = """\\\n  flops_per_s = 3\\\n"""\n'
    (devices / "board.toml").write_text(text)
    with pytest.raises(InvalidDevice, match=r"cannot be changed line by line; write these into it yourself: flops_per_s = 5\.0$"):
        set_values("board", {"flops_per_s": 5.0})
    assert (devices / "board.toml").read_text() == text


def test_a_shipped_device_has_no_file_to_change() -> None:
    with pytest.raises(InvalidDevice, match="device 'pi5' has no file of yours; `edgewise targets add NAME --like pi5` makes one"):
        set_values("pi5", {"cores": 3})
    assert not own_devices().exists()
