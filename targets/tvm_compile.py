"""The compile job: a `Program` -> one shared library with a Relax VM executable, and its manifest.

Runs in a worker process. Each distinct stage is exported, imported, fused and scheduled, and its kernels compiled, once for all
programs (`compile_stage`); a program is linked from compiled stages, and only what calls their kernels is compiled with it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax import transform

from targets.compile_cache import CompileCache
from targets.compiled_stage import CompiledStage, TensorForm, emit_stage, stage_steps, tensor_type
from targets.cpu import Cpu
from targets.forked import in_parallel
from targets.gpu import Gpu
from targets.job import MANIFEST
from targets.kernels import KernelCache
from targets.layout import StoredArray
from targets.link import link_shared
from targets.program import ROWS, Function, Program, Stage, TensorSpec
from targets.schedules.gpu import schedule_for_gpu
from targets.schedules.legalize import legalization
from targets.schedules.rules import schedule_module
from targets.stage_cache import StageCache
from targets.toolchain import Toolchain
from targets.tvm_device_code import DeviceExecutable, cuda_compiler
from targets.tvm_features import processor_flags
from targets.tvm_import import import_stage
from targets.tvm_operators import call_operators, weight_uses

_LINK_ATTEMPTS = 3
_FORMAT = 8
"""Counts up when what is kept of stages or kernels, or the way kernels are built, changes."""
_EMPTY = "edgewise_empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredStage:
    """A stage as scheduled kernels and the Relax function that calls them."""

    module: Any
    weights: tuple[StoredArray, ...]


def compile_program(program: Program, tools: Toolchain, cache_dir: Path, out_dir: Path) -> Path:
    """Compiles a program into `out_dir` and returns that folder.

    Args:
        tools: of the device.
        cache_dir: where compiled stages and kernels are kept.

    Raises:
        Exception: whatever the compiler raises; the caller reports it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    about = {"format": _FORMAT, "tvm": tvm.__version__, "tvm_ffi": tvm_ffi.__version__, "target": tools.target}
    about |= {"cuda_compiler": cuda_compiler()} if tools.gpu else {}
    files = CompileCache(cache_dir, about)
    kernels = KernelCache(files, tools.target)
    target = tvm.target.Target(tools.target)
    cache = StageCache(files, kernels, tools.processor)
    with target:
        stages = compiled_stages(program, tools.processor, kernels, cache)
        module, weights = link_program(program, stages)
        module, workspace = _plan(module)
        executable = tvm.compile(module, target, relax_pipeline=_bytecode())
        library = _linked(executable, program, stages, tools, kernels, cache, out_dir)
    manifest = {
        "library": library.name,
        "device": tools.gpu.kind if tools.gpu else "cpu",
        "functions": {name: _function_manifest(f, program) for name, f in program.functions.items()},
        "weights": [weight.to_json() for weight in weights],
        "state": {name: [list(spec.shape), spec.dtype] for name, spec in program.state.items()},
        "rows": program.bounds["C"],
        "workspace_bytes": workspace,
        "operators": {
            name: call_operators(module[name], weight_uses(function, {key: stage.weights for key, stage in stages.items()}, weights))
            for name, function in program.functions.items()
        },
        "target": tools.target,
        "flags": processor_flags(tools.target),
        "tvm": tvm.__version__,
    }
    (out_dir / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return out_dir


def _linked(
    executable: Any,
    program: Program,
    stages: Mapping[str, CompiledStage],
    tools: Toolchain,
    kernels: KernelCache,
    cache: StageCache,
    out_dir: Path,
) -> Path:
    """The library, linked from the kernels, named by its content: a process does not load a path again that it has loaded."""
    symbols = dict.fromkeys(symbol for stage in stages.values() for symbol in stage.symbols)
    for _ in range(_LINK_ATTEMPTS):
        objects = [kernels.find(symbol) for symbol in symbols]
        codes = [kernels.device_code(symbol) for symbol in symbols] if tools.gpu else []
        if None in objects or None in codes:  # somebody has emptied the cache
            compiled_stages(program, tools.processor, kernels, cache)
            continue
        kept = [path for path in objects if path is not None]
        exported = DeviceExecutable(executable=executable, codes=[code for code in codes if code is not None]) if tools.gpu else executable
        made = link_shared(exported, out_dir / "program.so", kept, tools.triple, tools.linker)
        return made.rename(out_dir / f"program-{hashlib.sha256(made.read_bytes()).hexdigest()[:16]}{made.suffix}")
    raise RuntimeError("kernels went from the cache while a program was linked from them, several times; compile again")


def _function_manifest(function: Function, program: Program) -> dict[str, Any]:
    return {
        "inputs": [name for name in function.inputs if name not in program.state],
        "state": [name for name in function.inputs if name in program.state],
        "outputs": list(function.outputs),
        "rows": {name: name.removesuffix(ROWS) for name in function.outputs if name.endswith(ROWS)},
        "last": function.last,
    }


def lower_stage(stage: Stage, processor: Cpu | Gpu) -> LoweredStage:
    """Exports, imports, legalises, fuses and schedules one stage; the target in force is the processor's."""
    imported = import_stage(stage.export(), processor)
    module = tvm.transform.Sequential(
        [
            transform.LegalizeOps(None if isinstance(processor, Gpu) else legalization()),
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.RewriteDataflowReshape(),  # before scheduling hides that a kernel only copies
            transform.DeadCodeElimination(),
        ]
    )(imported.module)
    module = schedule_for_gpu(module, processor) if isinstance(processor, Gpu) else schedule_module(module, processor)
    return LoweredStage(module=module, weights=imported.weights)


def compiled_stages(program: Program, processor: Cpu | Gpu, kernels: KernelCache, cache: StageCache) -> dict[str, CompiledStage]:
    """Every stage of the program, the new ones compiled now on all processors; their kernels are in the cache, too."""
    found = {key: cache.find(stage) for key, stage in program.stages.items()}
    missing = [program.stages[key] for key, stage in found.items() if stage is None]
    if len(missing) > 1:
        in_parallel(lambda stage: compile_stage(stage, processor, kernels, cache), missing)
    return {
        key: stage or cache.find(program.stages[key]) or compile_stage(program.stages[key], processor, kernels, cache)
        for key, stage in found.items()
    }


def compile_stage(stage: Stage, processor: Cpu | Gpu, kernels: KernelCache, cache: StageCache) -> CompiledStage:
    """Compiles a stage and its kernels, and keeps them."""
    lowered = lower_stage(stage, processor)
    functions = {var: f for var, f in lowered.module.functions.items() if isinstance(f, tirx.PrimFunc)}
    for function in functions.values():
        kernels.object_file(function)
    symbols = {var: kernels.symbol(f) for var, f in functions.items()}
    compiled = stage_steps(lowered.module["main"], symbols, lowered.weights)
    cache.add(stage, compiled)
    return compiled


def link_program(program: Program, stages: Mapping[str, CompiledStage]) -> tuple[Any, list[StoredArray]]:
    """One module whose functions call their stages' kernels; also the arrays of weights they take.

    Every function takes its inputs, its state, and one tuple of all weights.
    """
    sizes = {name: tirx.Var(name, "int64") for name in program.bounds}
    weights: dict[StoredArray, TensorForm] = {}
    for function in program.functions.values():
        for call in function.calls:
            stage = stages[call.stage]
            for weight, form in zip(stage.weights, stage.weight_forms, strict=True):
                weights.setdefault(weight.renamed(call.weights), form)
    builder = relax.BlockBuilder()
    for function in program.functions.values():
        _add_function(builder, program, function, stages, weights, sizes)
    # One empty kernel makes the executable a library.
    empty = tirx.PrimFunc([], tirx.Evaluate(tirx.const(0, "int32"))).with_attr("global_symbol", _EMPTY)
    builder.add_func(empty, _EMPTY)
    return builder.finalize(), list(weights)


def _add_function(
    builder: Any,
    program: Program,
    function: Function,
    stages: Mapping[str, CompiledStage],
    weights: Mapping[StoredArray, TensorForm],
    sizes: Mapping[str, Any],
) -> None:
    varying = next(iter(sizes.values()), None)  # one varying size is all that a program has
    places = {weight: place for place, weight in enumerate(weights)}
    params = {name: relax.Var(_identifier(name), _type(spec, sizes)) for name, spec in function.inputs.items()}
    pack = relax.Var("weights", relax.TupleType([tensor_type(form, varying) for form in weights.values()]))
    attrs = {"global_symbol": function.name, "tir_var_upper_bound": dict(program.bounds)}
    with builder.function(function.name, [*params.values(), pack], attrs=attrs):
        with builder.dataflow():
            values = dict(params)
            for call in function.calls:
                stage = stages[call.stage]
                arguments = [values[name] for name in call.inputs]
                arguments += [builder.emit(relax.TupleGetItem(pack, places[weight.renamed(call.weights)])) for weight in stage.weights]
                values |= zip(call.outputs, emit_stage(builder, stage, arguments, varying), strict=True)
            result = builder.emit_output(relax.Tuple([values[name] for name in function.outputs]))
        builder.emit_func_output(result)


def _type(spec: TensorSpec, sizes: Mapping[str, Any]) -> Any:
    return relax.TensorType([sizes[s] if isinstance(s, str) else s for s in spec.shape], spec.dtype)


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _plan(module: Any) -> tuple[Any, dict[str, int]]:
    """Lowers calls to kernels and plans memory; also the planned bytes of each function."""
    module = tvm.transform.Sequential(
        [
            transform.DeadCodeElimination(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
        ]
    )(module)
    workspace = {}
    for var, function in module.functions.items():
        if isinstance(function, relax.Function):
            workspace[var.name_hint] = _storage_bytes(function)
    return module, workspace


def _storage_bytes(function: Any) -> int:
    """Planned intermediates and outputs, in bytes."""
    total = 0

    def visit(expr: Any) -> None:
        nonlocal total
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.memory.alloc_storage":
            total += int(expr.args[0].values[0])
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.builtin.alloc_tensor":
            total += 4 * math.prod(int(size) for size in expr.args[0].values)

    relax.analysis.post_order_visit(function.body, visit)
    return total


def _bytecode() -> Any:
    return tvm.transform.Sequential(
        [
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
