"""The compile job: a `Program` -> one shared library with a Relax VM executable, and its manifest.

Runs in a worker process. Each distinct stage is exported, imported, fused and scheduled once (`lower_stage`);
a program is linked from lowered stages and only then lowered to bytecode and machine code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import transform

from targets.cpu import Cpu
from targets.job import LIBRARY, MANIFEST
from targets.kernels import KernelCache
from targets.layout import Layout
from targets.link import link_shared
from targets.program import Function, Program, Stage, TensorSpec
from targets.schedules.legalize import legalization
from targets.schedules.rules import schedule_module
from targets.tvm_import import import_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredStage:
    """A stage as scheduled kernels and the Relax function that calls them."""

    module: Any
    weights: tuple[tuple[str, Layout], ...]


def compile_program(program: Program, llvm: Mapping[str, Any], cpu: Cpu, cache_dir: Path, out_dir: Path) -> Path:
    """Compiles a program into `out_dir` and returns that folder.

    Args:
        llvm: the TVM target, as its dict form.
        cpu: what the schedules need to know.
        cache_dir: where compiled kernels are kept.

    Raises:
        Exception: whatever the compiler raises; the caller reports it.
    """
    target = tvm.target.Target(dict(llvm))
    out_dir.mkdir(parents=True, exist_ok=True)
    with target:
        lowered = {key: lower_stage(stage, cpu) for key, stage in program.stages.items()}
        module, weights = link_program(program, lowered)
        module, workspace = _plan(module)
        module, kernels = _split_kernels(module)
        cache = KernelCache(cache_dir / "kernels", llvm)
        objects = [cache.object_file(kernel) for kernel in kernels]
        executable = tvm.compile(module, target, relax_pipeline=_bytecode())
    link_shared(executable, out_dir / LIBRARY, objects)
    cache.trim()
    manifest = {
        "functions": {name: _function_manifest(f, program) for name, f in program.functions.items()},
        "weights": [[name, layout.to_json()] for name, layout in weights],
        "state": {name: [list(spec.shape), spec.dtype] for name, spec in program.state.items()},
        "rows": program.bounds["C"],
        "workspace_bytes": workspace,
        "target": dict(llvm),
        "tvm": tvm.__version__,
    }
    (out_dir / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return out_dir


def _function_manifest(function: Function, program: Program) -> dict[str, Any]:
    return {
        "inputs": [name for name in function.inputs if name not in program.state],
        "state": [name for name in function.inputs if name in program.state],
        "outputs": list(function.outputs),
    }


def lower_stage(stage: Stage, cpu: Cpu) -> LoweredStage:
    """Exports, imports, legalises, fuses and schedules one stage."""
    imported = import_stage(stage.export(), cpu.tile_columns)
    module = tvm.transform.Sequential(
        [
            transform.LegalizeOps(legalization()),
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
        ]
    )(imported.module)
    return LoweredStage(module=schedule_module(module, cpu), weights=imported.weights)


def link_program(program: Program, lowered: Mapping[str, LoweredStage]) -> tuple[Any, list[tuple[str, Layout]]]:
    """One module whose functions call their stages; also which weights, in which layout, they take.

    Every function takes its inputs, its state, and one tuple of all weights.
    """
    builder = relax.BlockBuilder()
    sizes = {name: tirx.Var(name, "int64") for name in program.bounds}
    bodies = {key: _add_stage(builder, stage.module, sizes) for key, stage in lowered.items()}
    weights: dict[tuple[str, Layout], tuple[int, Any]] = {}
    for function in program.functions.values():
        for call in function.calls:
            stage = lowered[call.stage]
            params = stage.module["main"].params[-len(stage.weights) :] if stage.weights else []
            for (local, layout), var in zip(stage.weights, params, strict=True):
                weights.setdefault((call.weights[local], layout), (len(weights), var.ty))
    tuple_type = relax.TupleType([ty for _, ty in weights.values()])
    for function in program.functions.values():
        _add_function(builder, program, function, lowered, bodies, weights, tuple_type, sizes)
    return builder.finalize(), list(weights)


@relax.expr_functor.mutator
class _Substitute(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces variables and kernel names."""

    def __init__(self, variables: dict[Any, Any], kernels: dict[Any, Any]) -> None:
        super().__init__()
        self.variables, self.kernels = variables, kernels

    def visit_var_(self, op: Any) -> Any:
        return self.variables.get(op, op)

    def visit_dataflow_var_(self, op: Any) -> Any:
        return self.variables.get(op, op)

    def visit_global_var_(self, op: Any) -> Any:
        return self.kernels.get(op, op)


def _add_stage(builder: Any, module: Any, sizes: Mapping[str, Any]) -> Any:
    """Adds a stage's kernels (the same kernel of two stages once); returns its function on those kernels.

    Its varying size becomes the program's, so that memory is planned for the program's bound.
    """
    kernels = {var: builder.add_func(f, var.name_hint) for var, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    function = _Substitute({}, kernels).visit_expr(module["main"])
    varying = relax.analysis.defined_symbolic_vars(function)
    if varying:
        (var,), (size,) = varying, sizes.values()  # one varying size is all that a program has
        function = function.bind_symbolic_vars({var: size})
    return function


def _inline(builder: Any, function: Any, arguments: list[Any]) -> list[Any]:
    """Emits the body of a stage on the given arguments; returns its results."""
    substitute = _Substitute(dict(zip(function.params, arguments, strict=True)), {})
    for block in function.body.blocks:
        for binding in block.bindings:
            substitute.variables[binding.var] = builder.emit(substitute.visit_expr(binding.value))
    result = substitute.variables[function.body.body]
    return list(builder.lookup_binding(result).fields)


def _add_function(
    builder: Any,
    program: Program,
    function: Function,
    lowered: Mapping[str, LoweredStage],
    bodies: Mapping[str, Any],
    weights: Mapping[tuple[str, Layout], tuple[int, Any]],
    tuple_type: Any,
    sizes: Mapping[str, Any],
) -> None:
    params = {name: relax.Var(_identifier(name), _type(spec, sizes)) for name, spec in function.inputs.items()}
    pack = relax.Var("weights", tuple_type)
    attrs = {"global_symbol": function.name, "tir_var_upper_bound": dict(program.bounds)}
    with builder.function(function.name, [*params.values(), pack], attrs=attrs):
        with builder.dataflow():
            values = dict(params)
            for call in function.calls:
                stage = lowered[call.stage]
                arguments = [values[name] for name in call.inputs]
                arguments += [
                    builder.emit(relax.TupleGetItem(pack, weights[call.weights[local], layout][0])) for local, layout in stage.weights
                ]
                values |= zip(call.outputs, _inline(builder, bodies[call.stage], arguments), strict=True)
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
            transform.RewriteDataflowReshape(),
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


def _split_kernels(module: Any) -> tuple[Any, list[Any]]:
    """The functions, calling kernels by symbol, and the distinct kernels; one empty kernel makes it a library."""
    symbols = {var: KernelCache.symbol(f) for var, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    kernels = {symbol: module[var] for var, symbol in symbols.items()}
    substitute = _Substitute({}, {var: relax.ExternFunc(symbol) for var, symbol in symbols.items()})
    functions = {var: substitute.visit_expr(f) for var, f in module.functions.items() if isinstance(f, relax.Function)}
    empty = tirx.PrimFunc([], tirx.Evaluate(tirx.const(0, "int32"))).with_attr("global_symbol", "edgewise_empty")
    return tvm.IRModule({**functions, tvm.ir.GlobalVar("edgewise_empty"): empty}), list(kernels.values())


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
