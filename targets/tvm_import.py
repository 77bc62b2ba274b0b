"""`torch.export.ExportedProgram` -> Relax, without PyTorch's decompositions (milliseconds instead of a second).

Matrix products become TE kernels here, because only here is it visible which operand is a weight (it is then
packed ahead of time, and the packing is recorded as a `Layout`) and which is a transposed view (it is then read
in place, never copied). Every other operator goes through TVM's own importer and legalisation.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax, sym, te, tirx
from tvm.relax.frontend.torch import from_exported_program

from targets.layout import Layout, packed_shape

_VIEWS = ("view.default", "reshape.default", "transpose.int", "permute.default", "t.default")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedStage:
    """A stage in Relax.

    Attributes:
        module: IRModule whose `main` takes the inputs, then one tensor per entry of `weights`.
        weights: for each weight argument the stage's own name and how to lay it out.
    """

    module: Any
    weights: tuple[tuple[str, Layout], ...]


def import_stage(program: ExportedProgram, tile: int) -> ImportedStage:
    """Imports a stage; `tile` is the number of output columns a packed weight holds together.

    Raises:
        Exception: whatever TVM's importer raises on an operator it does not know.
    """
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER:
            spec.kind = InputKind.PARAMETER  # TVM's importer bakes buffers into the program as constants
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER}
    converter = _Converter(names, tile)
    module = from_exported_program(
        program,
        keep_params_as_input=True,
        run_ep_decomposition=False,
        custom_convert_map=converter.table(),
    )
    function = module["main"]
    inputs = list(function.params[: int(function.attrs["num_input"])])
    used = _used_vars(function)
    weights: list[tuple[str, Layout]] = []
    params = []
    for var in function.params[len(inputs) :]:
        if var in used:
            name = names[var.name]
            assert name is not None
            params.append(var)
            weights.append((name.removeprefix("stage."), Layout(dtype=str(var.ty.dtype))))
    for var, name, layout in converter.packed.values():
        params.append(var)
        weights.append((name.removeprefix("stage."), layout))
    main = relax.Function([*inputs, *params], function.body, function.ret_ty, is_pure=True).with_attr("global_symbol", "main")
    module.update_func(module.get_global_var("main"), main)
    module = relax.transform.DeadCodeElimination()(module)
    return ImportedStage(module=module, weights=tuple(weights))


def _used_vars(function: Any) -> set[Any]:
    used = set()

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Var):
            used.add(expr)

    # Only what the result needs counts: a permuted view of a packed weight is dead code.
    block = relax.analysis.remove_all_unused(function)
    relax.analysis.post_order_visit(block.body, visit)
    return used


class _Converter:
    """Converters for the operators that are ours, with the packed weights they ask for."""

    def __init__(self, names: dict[str, str | None], tile: int) -> None:
        self.names, self.tile = names, tile
        self.packed: dict[tuple[str, Layout], tuple[Any, str, Layout]] = {}

    def table(self) -> dict[str, Callable[[fx.Node, Any], Any]]:
        return {
            "linear.default": self.linear,
            "matmul.default": self.matmul,
            "rms_norm.default": self.rms_norm,
            "layer_norm.default": self.layer_norm,
            "scaled_dot_product_attention.default": self.attention,
            "transpose.int": self.transpose,
            "slice.Tensor": self.slice,
            "embedding.default": lambda node, importer: self.gather(node, importer, _args(node)[1]),
            "index.Tensor": lambda node, importer: self.gather(node, importer, *_args(node)[1]),
        }

    # --- weights ----------------------------------------------------------------------------

    def _weight(self, node: fx.Node) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]] | None:
        """The weight that a node is a view of, and the views in order; None for anything computed."""
        views: list[tuple[str, tuple[int, ...]]] = []
        while node.op == "call_function":
            target = getattr(node.target, "__name__", "")
            source = _args(node)[0]
            if target not in _VIEWS or not isinstance(source, fx.Node):
                return None
            if target in ("view.default", "reshape.default"):
                views.append(("reshape", tuple(node.meta["val"].shape)))
            else:
                views.append(("transpose", _permutation(node)))
            node = source
        name = self.names.get(node.name)
        return None if name is None else (name, tuple(reversed(views)))

    def _pack(self, name: str, views: tuple[tuple[str, tuple[int, ...]], ...], rows: int, columns: int) -> Any:
        """The packed form of a weight of `rows` outputs by `columns` inputs, as a new argument."""
        layout = Layout(views=views, tile=self.tile)
        key = (name, layout)
        if key not in self.packed:
            shape = packed_shape(rows, columns, self.tile)
            self.packed[key] = (relax.Var(f"w{len(self.packed)}_packed", relax.TensorType(shape, "float32")), name, layout)
        return self.packed[key][0]

    # --- operators ----------------------------------------------------------------------------

    def linear(self, node: fx.Node, importer: Any) -> Any:
        x, weight, bias, *_ = (*_args(node), None)
        found = self._weight(weight)
        assert found is not None, "a linear layer's weight is a parameter"
        columns, rows = weight.meta["val"].shape[1], weight.meta["val"].shape[0]
        packed = self._pack(*found, rows, columns)
        builder = importer.block_builder
        out = builder.emit_te(_packed_product, importer.env[x], packed, rows, primfunc_name_hint="packed_product")
        return out if bias is None else builder.emit(relax.op.add(out, importer.env[bias]))

    def matmul(self, node: fx.Node, importer: Any) -> Any:
        a, b = _args(node)
        base, order = _base(b)
        return importer.block_builder.emit_te(_product, importer.env[a], importer.env[base], order, primfunc_name_hint="product")

    def rms_norm(self, node: fx.Node, importer: Any) -> Any:
        x, _, weight, eps = _args(node)
        return importer.block_builder.emit(relax.op.nn.rms_norm(importer.env[x], importer.env[weight], axes=[-1], epsilon=eps))

    def layer_norm(self, node: fx.Node, importer: Any) -> Any:
        x, shape, weight, bias, eps = _args(node)[:5]
        scale = importer.env[weight]
        shift = relax.const(np.zeros(shape, np.float32)) if bias is None else importer.env[bias]
        return importer.block_builder.emit(relax.op.nn.layer_norm(importer.env[x], scale, shift, axes=[-1], epsilon=eps))

    def attention(self, node: fx.Node, importer: Any) -> Any:
        """Causal attention over (1, heads, S, d) views of (1, S, heads, d) tensors."""
        assert node.kwargs.get("is_causal") or (len(_args(node)) > 5 and _args(node)[5]), "only causal attention is known"
        nodes = [_heads_last(arg) for arg in _args(node)[:3]]
        q, k, v = (importer.env[source] for source in nodes)
        builder = importer.block_builder
        from targets.schedules.attention import causal_attention

        _, S, H, d = nodes[0].meta["val"].shape
        K, dv = nodes[2].meta["val"].shape[2:]
        var = builder.add_func(causal_attention(S, H, K, d, dv), f"causal_attention_{S}_{H}_{K}_{d}_{dv}")
        out = builder.emit(relax.call_tir(var, [q, k, v], relax.TensorType((1, S, H, dv), "float32")))
        node.meta["heads_last"] = out
        return builder.emit(relax.op.permute_dims(out, [0, 2, 1, 3]))

    def transpose(self, node: fx.Node, importer: Any) -> Any:
        source = _args(node)[0]
        if "heads_last" in source.meta and _permutation(node) == (0, 2, 1, 3):
            return source.meta["heads_last"]
        return importer.block_builder.emit(relax.op.permute_dims(importer.env[source], list(_permutation(node))))

    def slice(self, node: fx.Node, importer: Any) -> Any:
        """One axis cut with step 1; bounds may vary (TVM's own converter loses such shapes)."""
        x = importer.env[_args(node)[0]]
        axis = int(_args(node)[1]) % len(x.ty.shape) if len(_args(node)) > 1 else 0
        begin, end = (importer.env.get(arg, arg) for arg in (*_args(node)[2:4], None, None)[:2])
        size = x.ty.shape[axis]
        begin = 0 if begin is None else begin
        end = size if end is None or (isinstance(end, int) and end >= sys.maxsize) else end
        begin, end = (int(size) + bound if isinstance(bound, int) and bound < 0 else bound for bound in (begin, end))
        extent = sym.Analyzer().simplify(end - begin) if not isinstance(end, int) or not isinstance(begin, int) else end - begin
        return importer.block_builder.emit_te(_slice, x, axis, begin, extent, primfunc_name_hint="slice")

    def gather(self, node: fx.Node, importer: Any, rows: fx.Node) -> Any:
        """Rows of a table by index; the caller keeps indices inside it."""
        return importer.block_builder.emit_te(_gather, importer.env[_args(node)[0]], importer.env[rows], primfunc_name_hint="gather")


def _args(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, typed as what the operators here take."""
    return tuple(node.args)


def _permutation(node: fx.Node) -> tuple[int, ...]:
    ndim = node.meta["val"].ndim
    target = getattr(node.target, "__name__", "")
    if target == "permute.default":
        return tuple(int(axis) % ndim for axis in _args(node)[1])
    first, second = (0, 1) if target == "t.default" else (int(_args(node)[1]) % ndim, int(_args(node)[2]) % ndim)
    order = list(range(ndim))
    order[first], order[second] = second, first
    return tuple(order)


def _base(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """What a permuted view is of, and the permutation (identity if it is no view)."""
    order = tuple(range(node.meta["val"].ndim))
    while node.op == "call_function" and getattr(node.target, "__name__", "") in ("transpose.int", "permute.default", "t.default"):
        step = _permutation(node)
        order = tuple(step[axis] for axis in order)
        node = _args(node)[0]
    return node, order


def _heads_last(node: fx.Node) -> fx.Node:
    base, order = _base(node)
    assert order == (0, 2, 1, 3), f"attention operand {node.name} is not a heads-first view"
    return base


def _packed_product(x: te.Tensor, packed: te.Tensor, rows: int) -> te.Tensor:
    """out[..., n] = sum_k x[..., k] packed[n // tile, k, n % tile].

    The product runs over whole tiles, and a copy drops the padding: inside a tile nothing is ever guarded.
    """
    tile = int(packed.shape[2])
    k = te.reduce_axis((0, packed.shape[1]), name="k")
    padded = te.compute(
        (*x.shape[:-1], int(packed.shape[0]) * tile),
        lambda *i: te.sum(x[(*i[:-1], k)] * packed[tirx.indexdiv(i[-1], tile), k, tirx.indexmod(i[-1], tile)], axis=k),
        name="packed_product",
    )
    if int(packed.shape[0]) * tile == rows:
        return padded
    return te.compute((*x.shape[:-1], rows), lambda *i: padded(*i), name="cropped")


def _product(a: te.Tensor, base: te.Tensor, order: tuple[int, ...]) -> te.Tensor:
    """out[..., m, n] = sum_k a[..., m, k] b[..., k, n] with b = permute(base, order), leading axes broadcast."""
    b_shape = [base.shape[axis] for axis in order]
    k = te.reduce_axis((0, a.shape[-1]), name="k")
    lead = len(a.shape) - 2
    missing = lead - (len(b_shape) - 2)
    assert missing >= 0, "the second operand has more axes than the first"

    def element(*i: Any) -> Any:
        batch = [j if int(size) != 1 else 0 for j, size in zip(i[missing:lead], b_shape[:-2], strict=True)]
        b_index = [*batch, k, i[-1]]
        base_index: list[Any] = [None] * len(order)
        for position, axis in enumerate(order):
            base_index[axis] = b_index[position]
        return te.sum(a[(*i[:-1], k)] * base[tuple(base_index)], axis=k)

    return te.compute((*a.shape[:-1], b_shape[-1]), element, name="product")


def _slice(x: te.Tensor, axis: int, begin: Any, extent: Any) -> te.Tensor:
    shape = [extent if i == axis else size for i, size in enumerate(x.shape)]
    return te.compute(shape, lambda *i: x[tuple(j + begin if n == axis else j for n, j in enumerate(i))], name="slice")


def _gather(table: te.Tensor, rows: te.Tensor) -> te.Tensor:
    lead = len(rows.shape)
    return te.compute((*rows.shape, *table.shape[1:]), lambda *i: table[(rows[i[:lead]], *i[lead:])], name="gather")
