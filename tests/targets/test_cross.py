"""The same schedules on processors that are not this machine's: right numbers and full vectors, under emulation.

Real stages are lowered for each processor, linked with a small C program (`cross/harness.c`) and run by QEMU, whose log
also says which instructions did the work.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from cross.emulation import Machine, link, run_stage
from cross.executed import Executed, executed
from numpy.typing import NDArray
from tvm import te, tirx

from nas.cli_show import cache_dir
from scripts.emulator import Unavailable, emulators
from search_spaces.config import SLMConfig
from search_spaces.stages import StageSpec, stage_uses
from targets.compile_cache import CompileCache
from targets.compiled_stage import CompiledStage, KernelStep, TensorForm, stage_steps
from targets.cpu import Cpu
from targets.kernels import KernelCache
from targets.link import link_shared, zig_target
from targets.program import Stage
from targets.tvm_compile import lower_stage

TOLERANCE = 1e-4
PROMPT, CACHED = 13, 37
"""Rows that leave the last tile of every size incomplete."""

NEON = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "num-cores": 4, "fast-math": True}
# Zve64d and Zvl128b are what V is made of. Told of V itself, TVM makes every vector loop one of unknown length.
# Without Zfhmin, which RVA22 asks for, TVM and LLVM disagree on the register in which a half-precision float is handed over.
RVV = ["+m", "+a", "+f", "+d", "+c", "+zfhmin", "+zve64d", "+zvl128b"]
MACHINES = {
    "cortex-a53": Machine(
        llvm=NEON | {"mcpu": "cortex-a53"},
        cpu=Cpu(vector_bytes=16, registers=32, cores=4),
        emulator="qemu-aarch64",
        model="cortex-a53",
    ),
    "cortex-a76": Machine(
        llvm=NEON | {"mcpu": "cortex-a76"},
        cpu=Cpu(vector_bytes=16, registers=32, cores=4, dot="sdot"),
        emulator="qemu-aarch64",
        model="cortex-a76",
    ),
    "riscv64": Machine(
        llvm={**NEON, "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mattr": RVV, "mabi": "lp64d"},
        cpu=Cpu(vector_bytes=16, registers=32, cores=4, halves=False),
        emulator="qemu-riscv64",
        model="rv64,Zfhmin=true,v=true,vlen=128,vext_spec=v1.0",
    ),
}

CONFIG = SLMConfig(
    vocab_size=200, d_model=64, num_layers=1, num_heads=4, attention="gqa", num_kv_heads=2, head_dim=32, ffn_dim=96, context=64
)
CONFIGS = {
    "gqa": CONFIG,
    "mla": dataclasses.replace(CONFIG, attention="mla", num_kv_heads=None, kv_rank=32, v_head_dim=32, rotary_dim=16),
}
STAGES = [("gqa", "block", "prefill", "fp32"), ("gqa", "block", "decode", "fp32")]
MORE_STAGES = [
    ("gqa", "head", "decode", "fp32"),
    ("mla", "block", "prefill", "fp32"),
    ("mla", "block", "decode", "fp32"),
    ("gqa", "block", "decode", "fp16"),
    ("gqa", "block", "decode", "int8"),
    ("gqa", "block", "prefill", "int4"),
    ("gqa", "block", "decode", "int4"),
]
CASES = [
    pytest.param(name, *stage, id="-".join((name, *stage)), marks=pytest.mark.slow if name == "cortex-a76" and stage in STAGES else ())
    for name in MACHINES
    for stage in (STAGES if name == "cortex-a53" else STAGES + MORE_STAGES)
]
"""What a Cortex-A76 would do with the float32 stages of an A53 differs by the compiler's scheduling of instructions only: slow."""


@pytest.fixture(scope="session")
def qemu() -> Path:
    """The folder of emulators. Only where there is no way to have them, what needs them is skipped."""
    try:
        return emulators(cache_dir())
    except Unavailable as reason:
        pytest.skip(f"no emulator: {reason}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A stage, its kernels' object files, and what to call the kernels in messages, both by symbol."""

    stage: CompiledStage
    objects: dict[str, Path]
    names: dict[str, str]


def compile_kernels(machine: Machine, kernels: Mapping[Any, Any], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Object files and names of kernels, by symbol. The files have readable names, since the linker's messages have them."""
    cache = KernelCache(CompileCache(folder / "cache", {}), machine.llvm)
    objects, names = {}, {}
    for var, kernel in kernels.items():
        symbol = cache.symbol(kernel)
        names[symbol] = var.name_hint
        objects[symbol] = folder / f"{var.name_hint}.o"
        objects[symbol].symlink_to(cache.object_file(kernel))
    return objects, names


def compile_for(machine: Machine, spec: StageSpec, folder: Path) -> Compiled:
    """The stage for that processor, by the steps by which a target compiles it."""
    with tvm.target.Target(dict(machine.llvm)):
        lowered = lower_stage(Stage(key=spec.key, export=spec.export), machine.cpu)
        kernels = {var: f for var, f in lowered.module.functions.items() if isinstance(f, tirx.PrimFunc)}
        objects, names = compile_kernels(machine, kernels, folder)
    symbols = {var: KernelCache.symbol(f) for var, f in kernels.items()}
    return Compiled(stage=stage_steps(lowered.module["main"], symbols, lowered.weights), objects=objects, names=names)


def random_like(tensor: torch.Tensor, name: str, precision: str, rng: np.random.Generator) -> torch.Tensor:
    """Weights of about unit gain: vectors near one, matrices that keep the size of what they multiply."""
    shape, columns = tuple(tensor.shape), tensor.shape[-1]
    if tensor.dtype is torch.int8:
        low, high = (-8, 7) if precision == "int4" else (-127, 127)
        return torch.from_numpy(rng.integers(low, high, shape, np.int8, endpoint=True))
    if name.endswith("_scales"):
        return torch.from_numpy(rng.uniform(0.5, 1.0, shape)) / (30 if precision == "int4" else 500)
    return torch.from_numpy(rng.standard_normal(shape)) * (0.2 if tensor.ndim < 2 else columns**-0.5) + (tensor.ndim < 2)


@torch.no_grad()
def expected_outputs(spec: StageSpec, stage: CompiledStage) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Random inputs and weights as the compiled stage takes them, and what PyTorch makes of them."""
    rng = np.random.default_rng(0)
    program = spec.export()
    for name, tensor in program.state_dict.items():
        tensor.copy_(random_like(tensor, name, spec.precision, rng))
    shapes = [[CACHED if size == "size" else size for size in form.shape] for form in stage.inputs]
    inputs = [rng.standard_normal(shape, np.float32) for shape in shapes]
    outputs = program.module()(*map(torch.from_numpy, inputs))
    weights = [weight.apply(lambda name: program.state_dict[f"stage.{name}"].numpy()) for weight in stage.weights]
    return inputs + weights, [output.numpy() for output in outputs]


@pytest.mark.parametrize(("machine", "config", "kind", "phase", "precision"), CASES)
def test_a_stage_gives_pytorchs_numbers_by_full_vectors(
    machine: str, config: str, kind: str, phase: str, precision: str, qemu: Path, tmp_path: Path
) -> None:
    uses = stage_uses(CONFIGS[config], phase, PROMPT, precision)  # type: ignore[arg-type]
    spec = next(use.spec for use in uses if use.spec.kind == kind)
    device = MACHINES[machine]
    compiled = compile_for(device, spec, tmp_path)
    arrays, expected = expected_outputs(spec, compiled.stage)
    program, log = link(device, compiled.objects, tmp_path / "program"), tmp_path / "log"
    got = run_stage(program, compiled.stage, arrays, qemu, CACHED, log)
    assert [o.shape for o in got] == [e.shape for e in expected]
    errors = [float(np.abs(o - e).max() / np.abs(e).max()) for o, e in zip(got, expected, strict=True)]
    assert all(error < TOLERANCE for error in errors), errors
    counts = executed(log, device.emulator.removeprefix("qemu-"))
    total = sum(count.full + count.other for count in counts.values())
    assert total > 10_000, "hardly a multiply-add was executed, or its encoding is not known"
    hot = {compiled.names[symbol]: count for symbol, count in counts.items() if 20 * (count.full + count.other) > total}
    problems = [f"{name}: {found}" for name, count in hot.items() if (found := trouble(name, count))]
    assert not problems, "\n".join(problems)


def trouble(name: str, count: Executed) -> str | None:
    """What is wrong with the instructions a kernel executed, if anything."""
    vectors = (count.full + count.other) / 4
    if count.share < 0.9:
        return f"only {count.share:.0%} of the multiply-adds are in full vectors"
    if "product" in name and count.stores > 0.5 * vectors:
        return f"{count.stores} vectors stored for {vectors:.0f} multiply-adds: sums do not stay in registers"
    if count.instructions > 12 * vectors:
        return f"{count.instructions} instructions for {vectors:.0f} multiply-adds: something else is not in vectors"
    return None


# --- what the checks can see -----------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "change"), [("cortex-a76", {"fast-math": False}), ("riscv64", {"mattr": RVV[:5]})])
def test_a_kernel_without_vectors_is_seen(machine: str, change: dict[str, Any], qemu: Path, tmp_path: Path) -> None:
    """Sums are scalar without leave to reorder them, or without vector instructions; and every one is counted."""
    device = dataclasses.replace(MACHINES[machine], llvm={**MACHINES[machine].llvm, **change})
    rows, columns, depth = 4, 30, 50
    x, y = te.placeholder((rows, depth), name="x"), te.placeholder((columns, depth), name="y")
    k = te.reduce_axis((0, depth), name="k")
    out = te.compute((rows, columns), lambda i, j: te.sum(x[i, k] * y[j, k], axis=k), name="out")
    objects, _ = compile_kernels(device, {tvm.ir.GlobalVar("naive"): te.create_prim_func([x, y, out])}, tmp_path)
    (symbol,) = objects
    forms = [TensorForm(shape=shape, dtype="float32") for shape in ((rows, depth), (columns, depth), (rows, columns))]
    step = KernelStep(symbol=symbol, arguments=(0, 1), results=(forms[2],))
    stage = CompiledStage(inputs=tuple(forms[:2]), weights=(), weight_forms=(), steps=(step,), outputs=(2,))
    arrays = [np.random.default_rng(i).standard_normal(form.shape, np.float32) for i, form in enumerate(forms[:2])]
    program, log = link(device, objects, tmp_path / "program"), tmp_path / "log"
    (got,) = run_stage(program, stage, arrays, qemu, 0, log)
    np.testing.assert_allclose(got, arrays[0] @ arrays[1].T, rtol=1e-4, atol=1e-5)
    count = executed(log, device.emulator.removeprefix("qemu-"))[symbol]
    assert count.share < 0.1
    assert rows * columns * (depth - 1) <= count.full + count.other <= rows * columns * depth  # the first may be a product alone


def test_a_kernel_that_calls_a_mathematical_library_is_refused(tmp_path: Path) -> None:
    """A call for each element is what vector loops must be free of."""
    device = MACHINES["cortex-a76"]
    x = te.placeholder((64,), name="x")
    kernel = te.create_prim_func([x, te.compute((64,), lambda i: te.exp(x[i]), name="out")])
    objects, _ = compile_kernels(device, {tvm.ir.GlobalVar("exponential"): kernel}, tmp_path)
    with pytest.raises(AssertionError, match=r"undefined symbol: expf\n.*\n.*exponential\.o"):
        link(device, objects, tmp_path / "program")


# --- libraries for other machines --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triple", "zig"),
    [
        ("aarch64-linux-gnu", "aarch64-linux-gnu"),
        ("aarch64-unknown-linux-gnu", "aarch64-linux-gnu"),
        ("arm64-linux-musl", "aarch64-linux-musl"),
        ("armv7l-linux-gnueabihf", "arm-linux-gnueabihf"),
        ("riscv64-linux-gnu", "riscv64-linux-gnu"),
    ],
)
def test_a_machine_has_a_name_in_zig(triple: str, zig: str) -> None:
    assert zig_target(triple) == zig


@pytest.mark.parametrize(("name", "number"), [("cortex-a76", 183), ("riscv64", 243)])
def test_a_library_is_linked_for_another_machine(name: str, number: int, tmp_path: Path) -> None:
    device = MACHINES[name]
    x = te.placeholder((64,), name="x")
    kernel = te.create_prim_func([x, te.compute((64,), lambda i: x[i] + 1, name="out")]).with_attr("global_symbol", "f")
    module = tvm.compile(tvm.IRModule({"f": kernel}), tvm.target.Target(dict(device.llvm)))
    link_shared(module, tmp_path / "library.so", triple=device.llvm["mtriple"])
    header = (tmp_path / "library.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[16:18], "little") == 3  # ET_DYN, a shared library
    assert int.from_bytes(header[18:20], "little") == number  # e_machine
