"""A compiled stage says in plain values all that a program is linked from, and is compiled once."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from child_functions import Exports
from kernel_helpers import llvm_target
from tvm import relax, te

from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets import stage_cache, tvm_compile
from targets.compile_cache import STAGE, CompileCache
from targets.compiled_stage import CompiledStage, emit_stage, stage_steps, tensor_type
from targets.cpu import Cpu
from targets.kernels import KernelCache
from targets.layout import StoredArray
from targets.link import link_shared
from targets.program import Program, Stage
from targets.stage_cache import StageCache
from targets.toolchain import Toolchain

CPU = Cpu(vector_bytes=16, registers=16, cores=1)
CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, ffn_dim=40, norm="layernorm", norm_bias=False, context=32)
LLVM = {"kind": "llvm", "num-cores": 1}


# --- a stage as values --------------------------------------------------------------------------


def _add(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    return te.compute(a.shape, lambda *i: a(*i) + b(*i), name="add")


def _two(x: te.Tensor, offset: te.Tensor, factor: te.Tensor, rows: Any) -> list[te.Tensor]:
    """Rows plus an offset and the number of rows; and the rows times a factor."""
    return [
        te.compute(x.shape, lambda i, j: x[i, j] + offset[j] + rows.astype("float32"), name="plus"),
        te.compute(x.shape, lambda i, j: x[i, j] * factor[()].astype("float32"), name="times"),
    ]


def _doubled(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    """Each row of a, then of b: twice as many rows as either has."""
    return te.compute((a.shape[0] * 2, a.shape[1]), lambda i, j: te.if_then_else(i % 2 == 0, a[i // 2, j], b[i // 2, j]), name="doubled")


def _module() -> Any:
    """A kernel of two results that takes constants and a size, a kernel whose rows are computed, and views of both kinds."""
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x, weight = relax.Var("x", relax.TensorType((n, 6), "float32")), relax.Var("w", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x, weight]):
        with builder.dataflow():
            both = builder.emit_te(_two, x, relax.const(np.arange(6, dtype=np.float32)), relax.const(2, "int64"), n)
            plus, times = builder.emit(relax.TupleGetItem(both, 0)), builder.emit(relax.TupleGetItem(both, 1))
            rows = builder.emit_te(_doubled, plus, times)
            flat = builder.emit(relax.op.reshape(weight, (6,)))
            result = builder.emit_output(relax.Tuple([rows, flat]))
        builder.emit_func_output(result)
    return builder.finalize()


def _linked(stage: CompiledStage, kernels: list[Path], path: Path) -> Any:
    """The stage as the whole of a program."""
    n = tvm.tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", tensor_type(form, n)) for i, form in enumerate((*stage.inputs, *stage.weight_forms))]
    with builder.function("main", params, attrs={"global_symbol": "main"}):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(emit_stage(builder, stage, params, n)))
        builder.emit_func_output(result)
    empty = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(tvm.tirx.const(0, "int32"))).with_attr("global_symbol", "empty")
    builder.add_func(empty, "empty")
    link_shared(tvm.compile(builder.finalize(), llvm_target()), path, kernels)
    return relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())["main"]


def test_a_stage_read_from_relax_and_linked_again_computes_the_same(tmp_path: Path) -> None:
    module = _module()
    kernels = KernelCache(CompileCache(tmp_path, {}), LLVM)
    functions = {var: f for var, f in module.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    stage = stage_steps(module["main"], {var: kernels.symbol(f) for var, f in functions.items()}, (StoredArray(names=("w",)),))
    assert [step.symbol == "" for step in stage.steps] == [False, False, True]
    assert stage.steps[1].results[0].shape == (("Mul", "size", 2), 6)
    again = CompiledStage.from_json(json.loads(json.dumps(stage.to_json())))
    assert again == stage
    run = _linked(again, [kernels.object_file(f) for f in functions.values()], tmp_path / "stage.so")
    x, weight = np.random.default_rng(0).standard_normal((3, 6), np.float32), np.ones((2, 3), np.float32)
    rows, flat = (array.numpy() for array in run(*(tvm.runtime.tensor(array, tvm.cpu()) for array in (x, weight))))
    np.testing.assert_allclose(rows[::2], x + np.arange(6) + 3, rtol=1e-6)
    np.testing.assert_allclose(rows[1::2], 2 * x, rtol=1e-6)
    assert flat.shape == (6,)


@pytest.mark.parametrize("dtype", ["int64", "float32", "float16", "int8"])
def test_a_constant_keeps_its_dtype(dtype: str) -> None:
    x = relax.Var("x", relax.TensorType((3,), dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            sum_ = builder.emit_te(_add, x, relax.const(np.array([1, 2, 3], dtype), dtype))
            result = builder.emit_output(relax.Tuple([sum_]))
        builder.emit_func_output(result)
    module = builder.finalize()
    stage = stage_steps(module["main"], dict.fromkeys(module.get_global_vars(), "kernel"), ())
    with builder.function("again", [x]):
        with builder.dataflow():
            (out,) = emit_stage(builder, stage, [x], None)
            operands = builder.lookup_binding(out).args[1].fields
            result = builder.emit_output(relax.Tuple([out]))
        builder.emit_func_output(result)
    assert operands[1].value.numpy().dtype == dtype
    assert operands[1].value.numpy().tolist() == [1, 2, 3]


# --- kept stages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(CONFIG, RequestTokens(prompt=6, generated=10))


@pytest.fixture(scope="module")
def compiled(program: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CompiledStage]]:
    """A cache that holds the program, and its stages."""
    folder = tmp_path_factory.mktemp("stages")
    kernels, cache = caches(folder)
    return folder, tvm_compile.compiled_stages(program, CPU, kernels, cache)


def caches(folder: Path, cpu: Cpu = CPU) -> tuple[KernelCache, StageCache]:
    files = CompileCache(folder, {})
    kernels = KernelCache(files, LLVM)
    return kernels, StageCache(files, kernels, cpu)


def test_known_stages_are_neither_exported_nor_lowered(
    program: Program, compiled: tuple[Path, dict[str, CompiledStage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_compile, "compile_stage", lambda *_: pytest.fail("compiled again"))
    kernels, cache = caches(compiled[0])
    found = tvm_compile.compiled_stages(program, CPU, kernels, cache)
    assert found == compiled[1]


def test_a_stage_is_known_by_all_that_it_is_made_from(
    program: Program, compiled: tuple[Path, dict[str, CompiledStage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = caches(compiled[0])
    stage = next(iter(program.stages.values()))
    assert cache.find(stage) is not None
    assert cache.find(Stage(key=stage.key, export=functools.partial(stage.export))) is not None
    assert cache.find(Stage(key=stage.key + "x", export=stage.export)) is None
    assert cache.find(Stage(key=stage.key, export=Exports("hang"))) is None  # another exporter
    assert caches(compiled[0], dataclasses.replace(CPU, cores=2))[1].find(stage) is None
    sources = stage_cache.sources
    for changed in ("targets", "search_spaces"):
        monkeypatch.setattr(
            stage_cache, "sources", lambda module, changed=changed: "new" if module.startswith(changed) else sources(module)
        )
        assert cache.find(stage) is None, changed
        monkeypatch.undo()
    assert cache.find(stage) is not None


def test_the_source_of_a_package_is_all_of_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "grown"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "inner/__init__.py", "inner/b.py"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import grown.a  # type: ignore[import-not-found]  # noqa: F401

    ask = stage_cache.sources.__wrapped__
    before = ask("grown.a")
    assert ask("grown.a") == before
    (package / "inner" / "b.py").write_text("x = 1")
    assert ask("grown.a") != before


def test_a_stage_without_one_of_its_kernels_or_damaged_is_compiled_again(
    program: Program, compiled: tuple[Path, dict[str, CompiledStage]], tmp_path: Path
) -> None:
    stage = next(stage for key, stage in program.stages.items() if key.startswith("head_decode"))
    expected = compiled[1][stage.key]
    for harm in ("kernel", "stage"):
        folder = Path(shutil.copytree(compiled[0], tmp_path / harm))
        kernels, cache = caches(folder)
        if harm == "kernel":
            lost = kernels.find(expected.symbols[0])
            assert lost is not None
            lost.unlink()
        else:
            (kept,) = folder.rglob(f"{stage.key}-*{STAGE}")
            kept.write_text(kept.read_text()[:-10])
        assert cache.find(stage) is None
        again = tvm_compile.compile_stage(stage, CPU, kernels, cache)
        assert again.symbols == expected.symbols
        assert cache.find(stage) is not None


def test_a_cache_emptied_in_the_middle_of_a_compile_costs_time_alone(
    program: Program, compiled: tuple[Path, dict[str, CompiledStage]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tvm_compile._plan

    def emptied(module: Any) -> Any:
        shutil.rmtree(tmp_path / "cache" / "compiled")
        return plan(module)

    small = dataclasses.replace(
        program,
        functions={"decode": dataclasses.replace(program.functions["decode"], calls=program.functions["decode"].calls[:1], outputs=("x",))},
        stages={key: stage for key, stage in program.stages.items() if key.startswith("embed_decode")},
    )
    monkeypatch.setattr(tvm_compile, "_plan", emptied)
    artifact = tvm_compile.compile_program(small, Toolchain(target=LLVM, cpu=CPU), tmp_path / "cache", tmp_path / "program")
    assert tvm.runtime.load_module(str(next(artifact.glob("program-*.so")))) is not None
