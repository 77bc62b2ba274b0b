"""Programs for GPUs: built without one, their CUDA kernels run on this processor, measured where there is a GPU.

What runs is the linked library with the very source that is compiled for a GPU, each thread of a block on a stack of its
own (`emulated/`). OpenCL is compiled and linked only.
"""

import ctypes
import dataclasses
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from emulated.cuda import compile_kernels, compile_sources, device_kernel, emulated, install_driver
from tvm import te

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.precision import Precision
from search_spaces.workload import RequestTokens
from targets import tvm_compile, tvm_device_code
from targets.arrays import ArrayFile
from targets.gpu import cuda, opencl
from targets.layout import StoredArray
from targets.local import LocalTarget
from targets.machine import Machine
from targets.measurement import Timing
from targets.schedules.gpu import _check, schedule_for_gpu
from targets.spec import DeviceSpec, InvalidDevice
from targets.toolchain import toolchain
from targets.tvm_compile import compile_program
from targets.tvm_device_code import _Tree
from targets.tvm_gpu import NoGpu, detect
from targets.tvm_probe import detect as detect_processor

TOLERANCE = 1e-4
TOKENS = RequestTokens(prompt=5, generated=4)
CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=1, num_heads=4, ffn_dim=40, context=32)
CONFIGS = {
    "mha": CONFIG,
    "gqa": dataclasses.replace(CONFIG, attention="gqa", num_kv_heads=2),
    "mla": dataclasses.replace(CONFIG, attention="mla", num_kv_heads=None, kv_rank=9, v_head_dim=5, rotary_dim=4),
    "layernorm-bias": dataclasses.replace(
        CONFIG, norm="layernorm", norm_bias=True, qkv_bias=True, attention_bias=True, ffn="standard", activation="gelu",
        positions="learned", rotary_dim=None, tie_embeddings=False,
    ),
    # More rows, columns and cached rows than a tile or a group of threads has, and none of them whole tiles.
    "wide": dataclasses.replace(
        CONFIG, vocab_size=700, d_model=200, num_heads=6, head_dim=40, attention="gqa", num_kv_heads=2, ffn_dim=300, context=192,
    ),
}  # fmt: skip
REQUESTS = {"wide": RequestTokens(prompt=90, generated=2)}
JETSON = DeviceSpec(
    name="jetson",
    kind="rpc",
    backend="cuda",
    arch="sm_87",
    triple="aarch64-linux-gnu",
    cpu="cortex-a78ae",
    cores=6,
    vector_bytes=16,
    dot="",
)
PHONE = dataclasses.replace(JETSON, name="phone", backend="opencl", arch="")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A program compiled for a GPU, and the code of its kernels."""

    config: str
    precision: Precision
    artifact: Path
    codes: list[bytes]

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.artifact / "manifest.json").read_text(encoding="utf-8")))

    @property
    def library(self) -> Path:
        return self.artifact / str(self.manifest["library"])


@pytest.fixture(scope="module", autouse=True)
def _code_stays_source() -> Iterator[None]:
    """Also where CUDA could be compiled, or where TVM's runtime of it is, which has it compiled at once."""
    create = tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (tvm_device_code, tvm_compile):
            patch.setattr(module, "cuda_compiler", lambda: "")
        if create is not None:
            tvm_ffi.registry.remove_global_func("ffi.Module.create.cuda")
        yield
    if create is not None:
        tvm_ffi.register_global_func("ffi.Module.create.cuda", create)


def this_machine(arch: str = "sm_87") -> DeviceSpec:
    """This machine as the host of an NVIDIA GPU."""
    found = detect_processor()
    return DeviceSpec(name="gpu", kind="local", backend="cuda", arch=arch, cores=2, **found)


def build(spec: DeviceSpec, config: str, precision: Precision, folder: Path, to: str = "program", **changes: Any) -> Built:
    tools = dataclasses.replace(toolchain(spec), **changes)
    program = build_program(CONFIGS[config], REQUESTS.get(config, TOKENS), precision)
    artifact = compile_program(program, tools, folder / "cache", folder / to)
    return Built(config=config, precision=precision, artifact=artifact, codes=[path.read_bytes() for path in sorted(folder.rglob("*.gpu"))])


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(this_machine(), "gqa", "int4", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def on_opencl(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(PHONE, "mla", "fp32", tmp_path_factory.mktemp("opencl"))


# --- what is asked for ------------------------------------------------------------------------------


def test_a_gpus_target_holds_its_hosts() -> None:
    tools = toolchain(JETSON)
    assert tools.gpu == cuda("sm_87") == tools.processor
    assert (tools.target["kind"], tools.target["arch"], tools.target["thread_warp_size"]) == ("cuda", "sm_87", 32)
    assert (tools.target["host"]["mtriple"], tools.triple) == ("aarch64-linux-gnu", "aarch64-linux-gnu")
    target = tvm.target.Target(tools.target)
    assert (target.kind.name, target.host.kind.name) == ("cuda", "llvm")
    assert toolchain(PHONE).gpu == opencl()
    processor = toolchain(dataclasses.replace(JETSON, backend="llvm"))
    assert processor.gpu is None
    assert processor.processor == processor.cpu
    assert processor.target == tools.target["host"]


@pytest.mark.parametrize("arch", ["", "87", "sm_", "sm_87;", "compute_87"])
def test_an_nvidia_gpu_has_an_architecture(arch: str) -> None:
    with pytest.raises(InvalidDevice, match=r"jetson.*arch=.*sm_87"):
        toolchain(dataclasses.replace(JETSON, arch=arch))


def test_packed_modules_are_read_and_written_the_same() -> None:
    """One that imports the library, which imports two kernels; a third joins them."""

    def numbers(*values: int) -> bytes:
        return struct.pack(f"<{len(values) + 1}Q", len(values), *values)

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    entries = (b"machine", b"bytecode"), (b"_lib", None), (b"cuda", b"one"), (b"cuda", b"two")
    packed = b"".join(text(kind) + (b"" if code is None else text(code)) for kind, code in entries)
    blob = text(numbers(0, 1, 3, 3, 3) + numbers(1, 2, 3) + packed)
    tree = _Tree.parse(blob)
    assert tree.children == [[1], [2, 3], [], []]
    assert tree.to_bytes() == blob
    tree.add(b"cuda", b"three")
    again = _Tree.parse(tree.to_bytes())
    assert again.children == [[1], [2, 3, 4], [], [], []]
    assert again.modules[4] == (b"cuda", b"three")


@pytest.mark.parametrize(
    ("limit", "reason"), [({"threads": 4}, r"256 threads are more than the 4"), ({"shared_bytes": 0}, r"bytes are more than the 0")]
)
def test_a_kernel_that_a_gpu_is_too_small_for_is_refused_by_its_name(limit: dict[str, int], reason: str) -> None:
    x, k = te.placeholder((3, 512), name="x"), te.reduce_axis((0, 512), name="k")
    kernel = te.create_prim_func([x, te.compute((3,), lambda i: te.sum(x[i, k], axis=k), name="total")])
    gpu = opencl()
    with tvm.target.Target(gpu.target({"kind": "llvm"})):
        function, target = schedule_for_gpu(tvm.IRModule({"total": kernel}), gpu)["total"], tvm.target.Target.current()
        with pytest.raises(RuntimeError, match=reason):
            _check(function, target, dataclasses.replace(gpu, **limit))  # type: ignore[arg-type]


def test_a_kernel_that_no_rule_schedules_is_named() -> None:
    x = te.placeholder((64,), name="x")
    kernel = te.create_prim_func([x, te.compute((64,), lambda i: x[i] + 1, name="out")])
    gpu = dataclasses.replace(opencl(), threads=8)
    with (
        tvm.target.Target(opencl().target({"kind": "llvm"})),
        pytest.raises(RuntimeError, match=r"kernel plus_one .*threads are more than the 8"),
    ):
        schedule_for_gpu(tvm.IRModule({"plus_one": kernel}), gpu)


# --- what is built ----------------------------------------------------------------------------------


def test_every_cuda_kernel_is_spread_over_threads(on_cuda: Built) -> None:
    kernels = [device_kernel(code) for code in on_cuda.codes]
    called = {symbol for calls in on_cuda.manifest["operators"].values() for symbol, _ in calls}
    assert {kernel.name for kernel in kernels} == {f"{symbol}_kernel" for symbol in called}
    for kernel in kernels:
        assert "threadIdx.x" in kernel.launch
        assert "threadIdx.x" in kernel.body
        threads = re.search(r"__launch_bounds__\((\d+)\)", kernel.source)
        assert threads is not None
        assert 1 < int(threads[1]) <= 1024


def test_every_opencl_kernel_is_spread_over_threads(on_opencl: Built) -> None:
    assert on_opencl.manifest["device"] == "opencl"
    called = {symbol for calls in on_opencl.manifest["operators"].values() for symbol, _ in calls}
    assert len(on_opencl.codes) == len(called)
    for code in on_opencl.codes:
        source = code[code.index(b"__kernel") :].decode()
        assert "get_local_id(0)" in source
        threads = re.search(r"reqd_work_group_size\((\d+), (\d+), (\d+)\)", source)
        if threads is not None:
            assert int(np.prod([int(extent) for extent in threads.groups()])) <= 256


def test_the_library_is_linked_for_the_gpus_host_and_holds_its_kernels(on_opencl: Built, on_cuda: Built) -> None:
    header, text = on_opencl.library.read_bytes()[:20], on_cuda.library.read_bytes()
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # AArch64
    for code in on_cuda.codes:
        assert device_kernel(code).source.encode() in text
    assert on_cuda.manifest["device"] == "cuda"


def test_a_tied_table_is_held_once_and_in_its_bits(on_cuda: Built) -> None:
    weights = [StoredArray.from_json(weight) for weight in on_cuda.manifest["weights"]]
    tables = [weight for weight in weights if weight.names == ("embed.tokens.weight_values",)]
    (table,) = tables
    assert table.layout.word == "nibbles"
    assert ("attentions.0.q.weight_values", "attentions.0.k.weight_values", "attentions.0.v.weight_values") in [w.names for w in weights]


def test_known_stages_are_linked_with_their_kernels_into_an_archive_where_nothing_links(
    on_cuda: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_compile, "compile_stage", lambda *_: pytest.fail("compiled again"))
    again = build(this_machine(), on_cuda.config, on_cuda.precision, on_cuda.artifact.parent, "archive", linker="none")
    assert again.library.suffix == ".tar"
    with tarfile.open(fileobj=io.BytesIO(again.library.read_bytes())) as archive:
        names = archive.getnames()
        (packed,) = [name for name in names if name.endswith("devices.c")]
        assert len([name for name in names if name.endswith(".o")]) > len(on_cuda.codes)
        archive.extract(packed, again.artifact, filter="data")
    made = subprocess.run(["c++", "-c", "-x", "c++", packed, "-o", "devices.o"], cwd=again.artifact, check=False)  # as a device does
    assert made.returncode == 0


# --- what it computes ---------------------------------------------------------------------------------


def outputs_differ(built: Built, folder: Path) -> dict[str, float]:
    """Runs the steps of a sample on emulated kernels; the largest error of each function."""
    config, tokens = CONFIGS[built.config], REQUESTS.get(built.config, TOKENS)
    kernels = compile_kernels([device_kernel(code) for code in built.codes], folder)
    sample, path = make_sample(config, tokens, 0, None, built.precision), folder / "sample.safetensors"
    sample.write(path)
    arrays, errors = ArrayFile(path), dict.fromkeys(("prefill", "decode"), 0.0)
    with emulated(kernels):
        machine = Machine(tvm.runtime.load_module(str(built.library)), built.manifest, tvm.cpu())
        weights = [StoredArray.from_json(weight).apply(arrays.read) for weight in built.manifest["weights"]]
        machine.hold([tvm.runtime.tensor(weight, tvm.cpu()) for weight in weights])
        for step in sample.steps:
            outputs = machine.call(step.function, {name: arrays.read(array) for name, array in step.inputs.items()})
            for name, array in step.expected.items():
                got, expected = outputs[name].numpy(), arrays.read(array)
                assert got.shape == expected.shape
                error = float(np.abs(got - expected).max() / np.abs(expected).max())
                errors[step.function] = max(errors[step.function], np.inf if np.isnan(error) else error)
    return errors


def test_the_kernels_give_pytorchs_numbers(on_cuda: Built, tmp_path: Path) -> None:
    errors = outputs_differ(on_cuda, tmp_path)
    assert all(error < TOLERANCE for error in errors.values()), errors
    assert all(error > 0 for error in errors.values()), "PyTorch's own numbers"


MORE = [(name, precision) for name in ("mha", "gqa", "mla") for precision in ("fp32", "fp16", "int8", "int4")]
MORE += [("layernorm-bias", "fp32"), ("layernorm-bias", "int8"), ("wide", "fp32"), ("wide", "int4")]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "precision"), MORE, ids=["-".join(case) for case in MORE])
def test_every_choice_gives_pytorchs_numbers(config: str, precision: Precision, tmp_path: Path) -> None:
    errors = outputs_differ(build(this_machine(), config, precision, tmp_path), tmp_path)
    assert all(error < TOLERANCE for error in errors.values()), errors


def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    """Without its barriers a sum in shared memory is wrong where threads take turns."""
    x, k = te.placeholder((3, 512), name="x"), te.reduce_axis((0, 512), name="k")
    kernel = te.create_prim_func([x, te.compute((3,), lambda i: te.sum(x[i, k], axis=k), name="total")])
    gpu = dataclasses.replace(cuda("sm_87"), warp=1)  # so that sums are made in shared memory
    target = tvm.target.Target(gpu.target({"kind": "llvm"}))
    with target:
        scheduled = schedule_for_gpu(tvm.IRModule({"total": kernel}), gpu)["total"].with_attr("global_symbol", "total")
        right = device_kernel(tvm_device_code.device_code(tvm.tirx.build(tvm.IRModule({"total": scheduled}), target=target)))
    assert "__syncthreads();" in right.body
    wrong = dataclasses.replace(right, source=right.source.replace("__syncthreads();", ""))
    values = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    for kernel, is_right in ((right, True), (wrong, False)):
        (folder := tmp_path / str(is_right)).mkdir()
        run = tvm.runtime.load_module(str(compile_kernels([kernel], folder)))[kernel.name]
        arrays = {"x_ptr": tvm.runtime.tensor(values, tvm.cpu()), "total_ptr": tvm.runtime.tensor(np.zeros(3, np.float32), tvm.cpu())}
        threads = re.findall(r"__launch_bounds__\((\d+)\)", kernel.source)[0]
        sizes = {"blockIdx.x": 3, "threadIdx.x": int(threads)}
        names = [parameter.split()[-1] for parameter in kernel.declaration[2].split(", ")]
        run(*(ctypes.c_void_p(arrays[name].data_ptr()) for name in names), *(sizes[axis] for axis in kernel.launch))
        assert np.allclose(arrays["total_ptr"].numpy(), values.sum(axis=1), atol=1e-4) == is_right


# --- a GPU in every respect but that it computes here ---------------------------------------------------


@pytest.mark.slow
def test_a_gpu_is_found_out_about_and_measured_through_tvms_cuda_runtime(
    tmp_path: Path, quick: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is ours; what is above it is what runs on a GPU, two worker processes included."""
    for name, value in install_driver(tmp_path).items():
        monkeypatch.setenv(name, value)
    declared = DeviceSpec(name="gpu", kind="local", backend="cuda", flops_per_s=1e12, read_bytes_per_s=1e11)
    target = LocalTarget(declared, tmp_path / "cache")
    try:
        assert (target.spec.arch, target.spec.memory_bytes) == ("sm_87", 1 << 30)
        config = CONFIGS["gqa"]
        artifact = target.compile(build_program(config, TOKENS, "int8"), tmp_path / "program")
        compile_sources(tmp_path)
        measurement = target.measure(artifact, make_sample(config, TOKENS, 0, None, "int8"), quick)
        assert all(0 < error < TOLERANCE for error in measurement.errors.values())
        assert set(measurement.times_s) == {"prefill", "decode"}
        assert measurement.profile is None
    finally:
        target.close()


def test_a_machine_without_a_gpu_says_so() -> None:
    for kind in ("cuda", "opencl"):
        if not tvm.device(kind, 0).exist:
            with pytest.raises(NoGpu, match=r"GPU that|docs/gpu\.md"):
                detect(kind)  # type: ignore[arg-type]


@pytest.mark.skipif(not tvm.cuda(0).exist, reason="no NVIDIA GPU that TVM's CUDA runtime can reach (tvm.cuda(0).exist is false)")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_real_gpu_gives_pytorchs_numbers_and_is_timed(precision: Precision, tmp_path: Path, quick: Timing) -> None:
    target = LocalTarget(DeviceSpec(name="cuda", kind="local", backend="cuda"), tmp_path / "cache")
    try:
        assert re.fullmatch(r"sm_[0-9]+", target.spec.arch)
        assert target.spec.flops_per_s > 1e10
        assert target.spec.read_bytes_per_s > 1e9
        config, tokens = CONFIGS["wide"], REQUESTS["wide"]
        artifact = target.compile(build_program(config, tokens, precision), tmp_path / "program")
        measurement = target.measure(artifact, make_sample(config, tokens, 0, None, precision), quick)
        assert all(0 < error < TOLERANCE for error in measurement.errors.values())
        assert all(time_s > 0 for times_s in measurement.times_s.values() for time_s in times_s)
    finally:
        target.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("config", ["gqa", "mla"])
def test_nvcc_takes_every_kernel(config: str, tmp_path: Path) -> None:
    sources = [device_kernel(code).source for code in build(this_machine(), config, "int4", tmp_path).codes]
    for number, source in enumerate(sources):
        path = tmp_path / f"{number}.cu"
        path.write_text(source, encoding="utf-8")
        command = ["nvcc", "-w", "-cubin", "-arch=sm_87", "-o", str(path.with_suffix(".cubin")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
