"""Plug-ins: found without being imported, and no fault of theirs is more than one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from targets.null import NullTarget
from targets.plugins import plugins
from targets.spec import DeviceSpec, InvalidDevice, device_origins, load_spec
from targets.target import TargetError, load_target, make_target

ROOT = Path(__file__).parents[2]


CODE = """
from targets.null import NullTarget

def make(spec, cache_dir):
    target = NullTarget(spec)
    target.cache = cache_dir
    return target
"""


def install(folder: Path, package: str, kind: str, value: str, summary: str = "Counts beads") -> None:
    """What pip leaves of a package, without its code."""
    about = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\nSummary: {summary}\n")
    (about / "entry_points.txt").write_text(f"[edgewise.targets]\n{kind} = {value}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_plugin_is_a_device_by_the_name_of_its_kind(packages: Path) -> None:
    install(packages, "edgewise-abacus", "abacus", "abacus_target:make")
    (packages / "abacus_target.py").write_text(CODE)
    (plugin,) = [plugin for plugin in plugins() if plugin.kind == "abacus"]
    assert (plugin.package, plugin.value) == ("edgewise-abacus 1.2", "abacus_target:make")
    assert device_origins()["abacus"] == "plug-in"
    assert load_spec("abacus") == DeviceSpec(name="abacus", kind="abacus", description="Counts beads")
    assert "abacus_target" not in sys.modules
    target = load_target("abacus", Path("somewhere"))
    assert isinstance(target, NullTarget)
    assert target.cache == Path("somewhere")  # type: ignore[attr-defined]
    assert make_target(DeviceSpec(name="mine", kind="abacus", options={"beads": 10})).spec.options == {"beads": 10}


def test_its_faults_are_one_line_that_names_it(packages: Path) -> None:
    install(packages, "edgewise-absent", "absent", "nowhere_to_be_found:make")
    install(packages, "edgewise-failing", "failing", "failing_target:make")
    (packages / "failing_target.py").write_text("def make(spec, cache_dir):\n    raise RuntimeError('no\\nbeads')\n")
    absent = r"^target 'absent': the plug-in nowhere_to_be_found:make of edgewise-absent 1\.2 does not start \(ModuleNotFoundError: .*\)$"
    with pytest.raises(TargetError, match=absent):
        load_target("absent")
    with pytest.raises(TargetError, match=r"failing_target:make of edgewise-failing 1\.2 does not start \(RuntimeError: no beads\)$"):
        load_target("failing")


def test_two_packages_cannot_make_one_kind(packages: Path) -> None:
    install(packages, "edgewise-one", "abacus", "one:make")
    install(packages, "edgewise-two", "abacus", "two:make")
    with pytest.raises(InvalidDevice, match=r"kind='abacus' is claimed by edgewise-one 1\.2 and edgewise-two 1\.2; uninstall one"):
        load_target("abacus")


def test_a_plugin_takes_no_name_that_ships(packages: Path) -> None:
    install(packages, "edgewise-greedy", "null", "greedy:make")
    install(packages, "edgewise-odd", "../odd", "odd:make")
    assert device_origins()["null"] == "shipped"
    assert "../odd" not in device_origins()
    assert isinstance(load_target("null"), NullTarget)


def test_listing_imports_none(packages: Path) -> None:
    install(packages, "edgewise-loud", "loud", "loud_target:make")
    (packages / "loud_target.py").write_text("raise SystemExit('imported')\n")
    code = "from nas.cli import main; raise SystemExit(main(['targets', 'list']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": f"{packages}:{ROOT}"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loud" in done.stdout
