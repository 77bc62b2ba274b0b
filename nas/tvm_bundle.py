"""A model that leaves compiled: a folder that runs on its device with TVM's runtime, NumPy and tokenizers alone.

```
manifest.json         what the rest is: functions, target, needs, and the size and SHA-256 of every file
program.so            the compiled functions: prefills of several lengths, and decode
weights.safetensors   as the device holds them, one array after the other in the order that the functions take them
tokenizer.json        byte-level BPE, as Hugging Face tokenizers reads it
config.json           the architecture
run.py                what runs it: `nas/bundle_runner.py` in one file
README.md             the model card
```

The manifest is written last, so that a bundle of which something is missing is none.
"""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.bundle_runner import FORMAT, MANIFEST, TOKENIZER, WEIGHTS, manifest_sha256, processor_flags
from nas.describe import describe_config, format_bytes
from nas.errors import UserError
from nas.evaluation import write_whole
from nas.export import CARD, CONFIG, Chosen, model_card
from search_spaces.precision import Precision
from targets.arrays import write_arrays
from targets.files import whole
from targets.layout import StoredArray
from targets.measurement import Timing

if TYPE_CHECKING:
    from search_spaces.model import SLM
    from targets.target import Target

LIBRARY, RUNNER = "program.so", "run.py"
_SHARED = "from targets.machine import Machine, Memory\n"
"""The line of the runner in whose place its copy has the classes themselves."""
_CHECKED = Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0, profile_share=0.0)
"""Checks every number and times hardly anything."""
_MACHINE = ("triple", "cpu", "cores", "vector_bytes")


def write_bundle(chosen: Chosen, folder: Path) -> None:
    """Compiles the model for `chosen.target`, or the device it was searched on, checks it there against PyTorch, and writes a bundle.

    Raises:
        UserError: if that device compiles nothing, or is not what it was.
        TargetError: if compiling fails, or a number differs from PyTorch's.
    """
    from cost_models.program import build_serving_program, prefill_name, prefill_sizes
    from cost_models.serving import serving_sample

    precision = chosen.evaluation.weights
    with _device(chosen) as device, tempfile.TemporaryDirectory(prefix="edgewise-") as work:
        program = build_serving_program(chosen.config, precision)
        artifact = device.compile(program, Path(work))
        compiled = _compiled(artifact, device)
        device.measure(artifact, serving_sample(chosen.model, precision), _CHECKED)
        library = (artifact / compiled["library"]).read_bytes()
        target = _target(device, compiled)
    weights = _write_weights(folder / WEIGHTS, chosen.model, precision, compiled["weights"])
    write_whole(folder / LIBRARY, library)
    write_whole(folder / TOKENIZER, chosen.tokenizer_path.read_bytes())
    write_whole(folder / CONFIG, chosen.config.to_json())
    write_whole(folder / RUNNER, runner_source())
    memory = _memory(compiled, weights)
    write_whole(folder / CARD, _card(chosen, target, memory))
    manifest = {
        "format": FORMAT,
        "model": f"{chosen.run.name}, trial {chosen.evaluation.trial}",
        "architecture": describe_config(chosen.config),
        "params": chosen.evaluation.params,
        "precision": precision,
        "end_of_text": chosen.tokenizer.end_of_text,
        "target": target,
        "requires": {"apache-tvm": compiled["tvm"]},
        "program": {"library": LIBRARY, **{name: compiled[name] for name in ("functions", "state", "rows")}},
        "prefills": {prefill_name(size): size for size in prefill_sizes(chosen.config)},
        "weights": weights,
        "memory": memory,
        "files": {name: _stated(folder / name) for name in (LIBRARY, WEIGHTS, TOKENIZER, CONFIG, RUNNER, CARD)},
    }
    manifest = json.loads(json.dumps(manifest))  # what is hashed is what is read back
    write_whole(folder / MANIFEST, json.dumps({**manifest, "sha256": manifest_sha256(manifest)}, indent=1) + "\n")


def runner_source() -> str:
    """The text of run.py: the runner, with what it shares with the measuring of programs in place of the import."""
    runner = (resources.files("nas") / "bundle_runner.py").read_text(encoding="utf-8")
    machine = (resources.files("targets") / "machine.py").read_text(encoding="utf-8")
    _, _, code = machine.partition('"""\n\n')  # behind the module's docstring
    assert runner.count(_SHARED) == 1 and code, "the runner's import of the machine has another form"
    return runner.replace(_SHARED, code + "\n\n")


@contextlib.contextmanager
def _device(chosen: Chosen) -> "Iterator[Target]":
    """The device to compile for, found to be what the run was measured on unless another was asked for."""
    from nas.cli_show import cache_dir
    from targets.spec import DeviceSpec, load_spec
    from targets.target import make_target

    searched = DeviceSpec.from_dict(chosen.run.manifest["device"], "manifest.json")
    name = searched.name if chosen.target is None else chosen.target
    # A machine that can be looked at is looked at anew: the run may have come from another.
    declared = searched if chosen.target is None and searched.kind != "local" else load_spec(name)
    if declared.kind == "null":
        raise UserError(f"--format tvm: target {name!r} compiles nothing; give a device that runs programs, as in --target local")
    device = make_target(declared, cache_dir())
    try:
        changed = next((name for name in _MACHINE if getattr(device.spec, name) != getattr(searched, name)), None)
        if chosen.target is None and changed is not None:
            raise UserError(
                f"the run was measured on another {name!r} ({changed} {getattr(searched, changed)}, not "
                f"{getattr(device.spec, changed)}); export there, or give --target {name} to have this one"
            )
        yield device
    finally:
        device.close()


def _compiled(artifact: Path, device: "Target") -> dict[str, Any]:
    """What compiling wrote of the program.

    Raises:
        UserError: if it is not a shared library of TVM's.
    """
    name = device.spec.name
    try:
        compiled: dict[str, Any] = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
        library = Path(compiled["library"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--format tvm: target {name!r} runs programs without TVM; give another --target, or another --format") from None
    if library.suffix != ".so":
        raise UserError(
            f"--format tvm: target {name!r} makes {library.suffix} files, which only it can link; give its device file a linker"
        )
    return compiled


def _target(device: "Target", compiled: Mapping[str, Any]) -> dict[str, Any]:
    """What the library was compiled for, as a machine can compare it with itself."""
    spec = device.spec
    architecture = (spec.triple or "").partition("-")[0]
    names = {"arm64": "aarch64", "amd64": "x86_64"}
    machine = "armv7l" if architecture.startswith("armv") else names.get(architecture, architecture)
    flags = compiled["flags"]
    if spec.kind == "local":  # a virtual machine may hide what its processor has, and this one has just run it
        flags = [flag for flag in flags if flag in processor_flags()]
    return {
        "name": spec.name,
        "machine": machine,
        "cpu": spec.cpu,
        "cores": spec.cores,
        "flags": flags,
        "device": compiled.get("device", "cpu"),
        "tvm": compiled["target"],
    }


def _write_weights(path: Path, model: "SLM", precision: Precision, stored: list[Any]) -> list[dict[str, Any]]:
    """Packs and writes the arrays one at a time; returns what they are, in order."""
    from search_spaces.quantisation import stored_tensors

    tensors = {name: tensor.detach() for name, tensor, _ in stored_tensors(model, precision)}
    arrays = [StoredArray.from_json(values) for values in stored]
    names = ["+".join(array.names) for array in arrays]
    names = [name if names.index(name) == i else f"{name}#{i}" for i, name in enumerate(names)]  # one weight in two layouts
    made: list[dict[str, Any]] = []

    def packed() -> Iterator[tuple[str, Any]]:
        for name, array in zip(names, arrays, strict=True):
            value = array.apply(lambda weight: tensors[weight].numpy())
            made.append({"name": name, "shape": list(value.shape), "dtype": str(value.dtype), "bytes": value.nbytes})
            yield name, value

    with whole(path) as part:
        write_arrays(part, packed(), header_bytes=64 + sum(len(name) + 200 for name in names))
    return made


def _memory(compiled: Mapping[str, Any], weights: list[dict[str, Any]]) -> dict[str, Any]:
    """Counted bytes: weights and state as the device holds them, and what each function needs beside them."""
    held = sum(weight["bytes"] for weight in weights)
    state = sum(
        4 * math.prod(compiled["rows"] if isinstance(size, str) else size for size in shape) for shape, _ in compiled["state"].values()
    )
    workspace = compiled["workspace_bytes"]
    return {
        "weights_bytes": held,
        "state_bytes": state,
        "workspace_bytes": workspace,
        "peak_bytes": held + state + max(workspace.values()),
    }


def _stated(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _card(chosen: Chosen, target: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    return model_card(
        chosen.run,
        chosen.evaluation,
        chosen.tokenizer.vocab_size,
        form=f"This folder is the model compiled for {target['machine']} processors with what {target['cpu']} has, its weights in "
        f"{chosen.evaluation.weights}. With a full context it takes {format_bytes(memory['peak_bytes'])} beside Python.",
        loading=_RUNNING,
    )


_RUNNING = """\
With Python 3.11, apache-tvm, numpy and tokenizers:

```
python run.py "My fellow citizens"
```

`program.so` is machine code: run a bundle only if you trust where it comes from. `run.py` first compares every file with its
size and SHA-256 in manifest.json, and this machine with what the program needs."""
