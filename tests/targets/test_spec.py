"""Device files: what is shipped loads, what is malformed is refused with one line that names the field."""

import json

import pytest

from targets.null import NullTarget
from targets.spec import DeviceSpec, InvalidDevice, device_names, load_spec
from targets.target import load_target

GOOD = {"name": "board", "kind": "local", "cores": 4, "read_bytes_per_s": 5e9, "features": ["+neon"]}


def test_the_shipped_devices_load_under_their_own_names() -> None:
    assert {"local", "null"} <= set(device_names())
    for name in device_names():
        spec = load_spec(name)
        assert spec.name == name
        assert spec.description


def test_the_null_device_has_ceilings_and_the_local_one_leaves_everything_to_detection() -> None:
    null, local = load_spec("null"), load_spec("local")
    assert null.flops_per_s > 0
    assert null.read_bytes_per_s > 0
    assert (local.triple, local.cpu, local.cores, local.vector_bytes, local.flops_per_s, local.read_bytes_per_s) == (None, None, 0, 0, 0, 0)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidDevice, match=r"target 'pixel9' is not known; choose one of .*local.*null"):
        load_spec("pixel9")
    with pytest.raises(InvalidDevice, match=r"'\.\./null' is not known"):
        load_target("../null")


def test_load_target_makes_the_kind_that_the_file_says() -> None:
    target = load_target("null")
    assert isinstance(target, NullTarget)
    assert target.spec == load_spec("null")
    target.close()


def test_a_spec_survives_json() -> None:
    spec = DeviceSpec.from_dict(GOOD, "board.toml")
    assert spec.features == ("+neon",)
    assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict())), "again") == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "'colour' is not a field of a device; the fields are name, kind"),
        ({"kind": ["local"]}, r"kind=\['local'\] is not a text"),
        ({"name": 3}, "name=3 is not a text"),
        ({"cpu": 3}, "cpu=3 is not a text"),
        ({"triple": True}, "triple=True is not a text"),
        ({"cores": -1}, "cores=-1 is not a"),
        ({"cores": True}, "cores=True is not a"),
        ({"cores": "four"}, "cores='four' is not a"),
        ({"cores": 1.5}, "cores=1.5 is not a whole number"),
        ({"vector_bytes": 16.0}, "vector_bytes=16.0 is not a whole number"),
        ({"memory_bytes": -5}, "memory_bytes=-5 is not a"),
        ({"flops_per_s": float("nan")}, "flops_per_s=nan is not a"),
        ({"read_bytes_per_s": float("inf")}, "read_bytes_per_s=inf is not a"),
        ({"features": "+neon"}, r"features='\+neon' is not a list of texts"),
        ({"features": [1]}, r"features=\[1\] is not a list of texts"),
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
