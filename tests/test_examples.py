"""The worked example of a plug-in, installed as its users would: found, put through the shipped contract, measured and searched on."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from search_helpers import SPACE_FILE, write_speeches

from search_spaces.config import SLMConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "edgewise-onnxruntime"
NEEDED = ("onnx", "onnxruntime", "onnxscript")

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"the example needs {', '.join(NEEDED)}: pip install 'edgewise[dev]'"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the example by pip, and everything else from this one."""
    folder = tmp_path_factory.mktemp("example")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "rest.pth").write_text("\n".join(["import os", *(p for p in sys.path if p.endswith("site-packages")), str(ROOT)]) + "\n")
    source = shutil.copytree(EXAMPLE, folder / "source")  # building leaves files beside the source
    try:
        isolated = int(importlib.metadata.version("setuptools").partition(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        isolated = True
    made = folder / "venv" / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", *([] if isolated else ["--no-build-isolation"])]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(made), "install", *options, str(source)], check=True, timeout=120)
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("state")
    return {**os.environ, "OMP_NUM_THREADS": "1", "EDGEWISE_CACHE": str(folder / "cache"), "EDGEWISE_CONFIG": str(folder / "config")}


def edgewise(python: Path, environment: dict[str, str], cwd: Path, *args: str) -> str:
    done = subprocess.run(
        [str(python), "-m", "nas", *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_listed_once_it_is_installed(python: Path, environment: dict[str, str], tmp_path: Path) -> None:
    listed = {row["name"]: row for row in json.loads(edgewise(python, environment, tmp_path, "targets", "list", "--json"))}
    assert listed["onnxruntime"]["origin"] == "plug-in"
    assert listed["onnxruntime"]["description"] == "This machine's processor through ONNX Runtime instead of TVM"
    code = "import sys; from nas.cli import main; main(['targets', 'list']); print('edgewise_onnxruntime' in sys.modules, file=sys.stderr)"
    done = subprocess.run([str(python), "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False", "a list imports no plug-in"


def test_it_passes_the_contract_that_ships(python: Path, environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "test_contract.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_contract.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_model_is_measured_with_it(python: Path, environment: dict[str, str], tmp_path: Path) -> None:
    config = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, context=32)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    edgewise(
        python, environment, tmp_path, "targets", "add", "one", "--kind", "onnxruntime", "--cores", "1", "--option", "optimization=basic"
    )
    arguments = ("measure", "config.json", "--target", "one", "--prompt-bytes", "6", "--generate-bytes", "10", "--json")
    measured = json.loads(edgewise(python, environment, tmp_path, *arguments))
    assert measured["target"] == "one"
    assert measured["decode_s_per_token"] > 0
    assert 0 < max(measured["measurement"]["errors"].values()) < 1e-4
    assert measured["ceilings"]["flops_per_s"] > 1e8


@pytest.mark.slow
def test_a_search_runs_on_it(python: Path, environment: dict[str, str], tmp_path: Path) -> None:
    speeches = write_speeches(tmp_path / "speeches.jsonl")
    small = ("search", "--space", str(SPACE_FILE), "--corpus", str(speeches), "--budget", "3kB", "--trials", "2", "--json")
    front = json.loads(edgewise(python, environment, tmp_path, *small, "--target", "onnxruntime"))["front"]
    assert front
    assert all(member["decode_s_per_token"] > 0 for member in front)
