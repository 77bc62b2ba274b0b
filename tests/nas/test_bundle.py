"""Bundles: what is generated is PyTorch's, whatever the length; what is damaged or of another machine is refused."""

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_helpers import make_chosen

from nas import bundle_runner
from nas.bundle_runner import BundleError, Model, load, read_manifest
from nas.cli import main
from nas.errors import UserError
from nas.export import FORMATS, Chosen
from nas.run import Run
from nas.tvm_bundle import runner_source, write_bundle
from search_spaces.counting import count
from search_spaces.model import SLM
from search_spaces.quantisation import round_weights
from targets.local import LocalTarget
from targets.measurement import Measurement
from targets.target import TargetError

CONTEXT = 160


class Kept:
    """The session's target, lent: what an export closes stays open."""

    def __init__(self, target: LocalTarget) -> None:
        self.spec, self.compile, self.measure = target.spec, target.compile, target.measure

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def lent(local_target: LocalTarget) -> Iterator[LocalTarget]:
    """Exports of this module compile with the session's target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("targets.target.make_target", lambda spec, cache: Kept(local_target))
        yield local_target


def bundled(chosen: Chosen, folder: Path) -> Path:
    folder.mkdir()
    write_bundle(chosen, folder)
    return folder


@pytest.fixture(scope="module")
def chosen(lent: LocalTarget, tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    """A model that says something else all the time: its weights are large."""
    made = make_chosen(tmp_path_factory.mktemp("run"), lent.spec, attention="gqa", num_kv_heads=2, context=CONTEXT, tie_embeddings=False)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    return made


@pytest.fixture(scope="module")
def bundle(chosen: Chosen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled(chosen, tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@torch.inference_mode()
def greedy(model: SLM, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens by PyTorch, incrementally; independent of any end of text."""
    logits, caches = model.prefill(torch.tensor([prompt]))
    found = [int(logits.argmax())]
    while len(found) < tokens:
        logits, new = model.decode(torch.tensor([[found[-1]]]), caches)
        caches = [tuple(torch.cat(pair, dim=1) for pair in zip(*layer, strict=True)) for layer in zip(caches, new, strict=True)]
        found.append(int(logits.argmax()))
    return found


# --- the same numbers ---------------------------------------------------------------------------


def test_128_greedy_tokens_are_those_of_pytorch(model: Model, chosen: Chosen) -> None:
    prompt = model.encode("My fellow citizens")
    expected = greedy(chosen.model, prompt, 128)
    assert len(set(expected)) > 20, "a model that repeats itself would show little"
    assert model.end_of_text not in expected
    assert list(model.next_tokens(prompt, 128)) == expected
    assert model.stats.tokens == 128
    assert model.stats.ended == "tokens"


@pytest.mark.parametrize("length", [65, 1, 17, CONTEXT - 1, 2, 64, 15, 16])
def test_a_prompt_of_any_length_reads_as_in_pytorch_whatever_came_before(model: Model, chosen: Chosen, length: int) -> None:
    ids = torch.randint(chosen.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        expected = chosen.model(ids)[0].numpy()
    for row, logits in ((-2, model.prefill(ids[0, :-1].tolist())), (-1, model.decode(int(ids[0, -1])))):
        assert abs(logits - expected[row]).max() <= 1e-5 * abs(expected[row]).max()


def test_generation_ends_with_the_context_and_a_full_one_is_refused(model: Model) -> None:
    prompt = [1] * (CONTEXT - 3)
    assert len(list(model.next_tokens(prompt, 10))) == 3
    assert model.stats.ended == "context"
    with pytest.raises(BundleError, match=f"the prompt is {CONTEXT} tokens, and the context {CONTEXT}; give a shorter one"):
        next(model.next_tokens([1] * CONTEXT))


@pytest.mark.parametrize(
    ("precision", "config"),
    [
        ("int8", {"attention": "mla", "kv_rank": 16, "rotary_dim": 8}),
        pytest.param(
            "int4",
            {"positions": "learned", "norm": "layernorm", "norm_bias": True, "sharing": "cycle", "num_unique_layers": 1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_rounded_models_generate_what_pytorch_does_with_the_rounded_weights(
    precision: Any, config: dict[str, Any], lent: LocalTarget, tmp_path: Path
) -> None:
    chosen = make_chosen(tmp_path, lent.spec, precision, context=16, **config)
    before = {name: value.clone() for name, value in chosen.model.state_dict().items()}
    model = load(bundled(chosen, tmp_path / "bundle"))
    assert all(torch.equal(value, before[name]) for name, value in chosen.model.state_dict().items())
    round_weights(chosen.model, precision)
    assert list(model.next_tokens([5, 7, 11])) == greedy(chosen.model, [5, 7, 11], 13)
    assert model.manifest["memory"]["weights_bytes"] < 4 * sum(p.numel() for p in chosen.model.parameters()) / 2


# --- the folder -----------------------------------------------------------------------------------


def test_the_runner_in_the_bundle_needs_nothing_of_ours(bundle: Path, model: Model, tmp_path: Path) -> None:
    expected = "".join(model.generate("My fellow", tokens=24))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-W", "error", str(bundle / "run.py"), "My fellow", "--tokens", "24", "--stats"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == expected + "\n"
    assert "24 generated" in done.stderr.decode()
    assert "import targets" not in runner_source()
    assert "from targets" not in runner_source()


def test_a_bundle_holds_what_it_states(bundle: Path, chosen: Chosen) -> None:
    from safetensors.numpy import load_file

    manifest = read_manifest(bundle)
    assert {p.name for p in bundle.iterdir()} == {*manifest["files"], "manifest.json"} == set(FORMATS["tvm"].files)
    arrays = load_file(bundle / "weights.safetensors")
    assert sum(array.nbytes for array in arrays.values()) == manifest["memory"]["weights_bytes"]
    assert set(arrays) == {weight["name"] for weight in manifest["weights"]}
    assert manifest["prefills"] == {"prefill_16": 16, "prefill_64": 64, "prefill_160": 160}
    counted = count(chosen.config)
    assert manifest["memory"]["state_bytes"] == counted.kv_bytes
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "python run.py" in card
    assert "load_exported" not in card


@pytest.mark.slow
def test_a_bundle_runs_in_a_fresh_environment_of_its_three_packages(bundle: Path, model: Model, tmp_path: Path) -> None:
    from importlib.metadata import version

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = [f"{name}=={version(name)}" for name in ("apache-tvm", "numpy", "tokenizers")]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    listed = json.loads(subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True).stdout)
    assert not {"torch", "edgewise", "safetensors", "transformers"} & {package["name"] for package in listed}
    done = subprocess.run([python, bundle / "run.py", "My fellow", "--tokens", "24"], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.decode() == "".join(model.generate("My fellow", tokens=24)) + "\n"


SERVER = """
import sys
sys.modules["torch"] = None
from tvm.rpc.server import PopenRPCServerState
PopenRPCServerState("127.0.0.1", int(sys.argv[1]), int(sys.argv[1]) + 1).thread.join()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The port of an RPC server on this machine, as a board would run it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "TVM_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SERVER, str(port)]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as child:
        try:
            deadline = time.monotonic() + 60
            while b"bind to" not in (tmp_path / "server.log").read_bytes():
                assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.05)
            yield port
        finally:
            child.kill()


@pytest.mark.skipif(importlib.util.find_spec("tornado") is None, reason="pip install tornado psutil cloudpickle, for RPC")
def test_a_device_reached_by_rpc_generates_the_same_text(
    bundle: Path, model: Model, server: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device = tmp_path / "board.toml"
    device.write_text(
        f'name = "board"\nkind = "rpc"\nhost = "127.0.0.1"\nport = {server}\ntriple = "x86_64-linux-gnu"\ncpu = "x86-64"\n'
        "cores = 1\nvector_bytes = 16\n"
    )
    assert main(["generate", str(bundle), "My fellow", "--tokens", "24", "--target", str(device)]) == 0
    assert capfd.readouterr().out == "".join(model.generate("My fellow", tokens=24)) + "\n"
    device.write_text(device.read_text().replace(str(server), "1"))
    assert main(["generate", str(bundle), "My fellow", "--target", str(device)]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: target ") and "at 127.0.0.1:1 gives no session" in error
    assert error.count("\n") == 1
    assert main(["generate", str(bundle), "My fellow", "--target", "local"]) == 2
    assert "is not reached by RPC (kind='local'); leave out --target to run on this machine" in capfd.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["program.so", "weights.safetensors", "tokenizer.json", "config.json", "run.py", "README.md"])
def test_a_file_that_was_changed_cut_off_or_lost_is_refused(copied: Path, name: str) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        refused(copied, f"{name} was changed after the bundle was made")
    path.write_bytes(content[:-1])
    refused(copied, f"{name} has {len(content) - 1} bytes, not {len(content)}: it was cut off or changed; export the model again")
    path.write_bytes(content + b"\n")
    refused(copied, f"{name} has {len(content) + 1} bytes")
    path.unlink()
    refused(copied, f"{name} is missing; export the model again")


def test_a_manifest_that_was_changed_cut_off_or_lost_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"context 160', '"context 161').replace('"end_of_text": 0', '"end_of_text": 1'), encoding="utf-8")
    refused(copied, "manifest.json was changed after the bundle was made")
    for part in (text[: len(text) // 2], "[]", "{}", "[" * 100_000, ""):
        path.write_text(part, encoding="utf-8")
        refused(copied, "manifest.json is damaged, or not the manifest of a bundle")
    path.write_bytes(b"\xff\xfe")
    refused(copied, "manifest.json is damaged")
    path.unlink()
    refused(copied, "is no bundle: it has no manifest.json; give a folder of `edgewise export --format tvm`")


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest by somebody who knows how to make its hash right."""
    manifest = read_manifest(folder)
    change(manifest)
    manifest["sha256"] = bundle_runner.manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_forged_manifest_leads_nowhere_else_and_gives_no_traceback(copied: Path) -> None:
    before = (copied / "manifest.json").read_bytes()
    (copied.parent / "outside").write_bytes(b"x")
    stated = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    for change, message in (
        (lambda m: m["files"].update({"../outside": stated}), "which is outside the bundle"),
        (lambda m: m["program"].update(library="../outside"), "does not state the file '../outside'"),
        (lambda m: m["files"].pop("program.so"), "does not state the file 'program.so'"),
        (lambda m: m["files"].pop("tokenizer.json"), "does not state the file 'tokenizer.json'"),
        (lambda m: m["weights"][0].update(bytes=10**12), "bytes, and its shape"),
        (
            lambda m: m["weights"][0].update(bytes=4 * 10**14, shape=[10**7, 10**7]),
            "states weights of more bytes than weights.safetensors has",
        ),
        (lambda m: m["weights"][0].update(dtype="object"), "is damaged"),
        (lambda m: m.update(files=None), "is damaged"),
        (lambda m: m.update(prefills=None), "is damaged"),
        (lambda m: m.update(format=2), "has format 2, not 1"),
    ):
        (copied / "manifest.json").write_bytes(before)
        forged(copied, change)
        refused(copied, message)


def test_another_processor_is_refused_before_anything_is_loaded(copied: Path) -> None:
    forged(copied, lambda m: m["target"]["flags"].append("avx9000"))
    refused(copied, "lacks avx9000")


# --- writing one ----------------------------------------------------------------------------------


def test_a_target_that_computes_nothing_is_refused(chosen: Chosen, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--format tvm: target 'null' compiles nothing; give a device that runs programs, as in --target local"
    ):
        write_bundle(dataclasses.replace(chosen, target="null"), tmp_path)


def test_a_run_of_another_machine_is_refused_unless_a_target_is_named(chosen: Chosen, tmp_path: Path) -> None:
    device = {**chosen.run.manifest["device"], "cpu": "z80"}
    moved = dataclasses.replace(chosen, run=Run(tmp_path, {**chosen.run.manifest, "device": device}), target=None)
    with pytest.raises(
        UserError, match=r"the run was measured on another 'local' \(cpu z80, not .*\); export there, or give --target local"
    ):
        write_bundle(moved, tmp_path)


def test_a_program_that_differs_from_pytorch_leaves_no_bundle(
    chosen: Chosen, lent: LocalTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> Measurement:
        raise TargetError("measuring failed: output logits differs")

    monkeypatch.setattr(
        Kept, "__init__", lambda self, target: self.__dict__.update(spec=target.spec, compile=target.compile, measure=measure)
    )
    with pytest.raises(TargetError, match="output logits differs"):
        write_bundle(chosen, tmp_path)
    assert not list(tmp_path.iterdir())


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys
from nas import bundle_runner
folder, prompt = sys.argv[1], int(sys.argv[2])
bundle_runner.prepare({"cores": 2})
import tokenizers, tvm
from tvm.runtime.vm import VirtualMachine
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
bare = peak()
model = bundle_runner.load(folder)
model.prefill([1] * prompt)
for token in range(model.context - prompt):
    model.decode(token)
print(peak() - bare)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux")
def test_the_peak_is_what_was_counted(lent: LocalTarget, tmp_path: Path) -> None:
    chosen = make_chosen(tmp_path, lent.spec, d_model=512, num_layers=6, num_heads=8, ffn_dim=1408, context=16)
    folder = bundled(chosen, tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), "3"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    counted = count(chosen.config).peak_bytes
    stated = read_manifest(folder)["memory"]["peak_bytes"]
    for expected in (counted, stated):
        assert 0.9 * expected <= int(done.stdout) <= 1.1 * expected
