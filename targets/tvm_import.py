"""`torch.export.ExportedProgram` -> Relax, without PyTorch's decompositions (milliseconds instead of a second).

Matrix products and attention become kernels here (`CpuKernels` or `GpuKernels`), because only here is it visible which
operand is a weight (it is then packed ahead of time, and the packing is recorded as a `Layout`) and which is a transposed
view (it is then read in place, never copied). Every other operator goes through TVM's own importer and legalisation.
"""

import dataclasses
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax, sym, te
from tvm.relax.frontend.torch import from_exported_program

from targets.cpu import Cpu
from targets.gpu import Gpu
from targets.layout import Layout, StoredArray
from targets.schedules.cpu_kernels import CpuKernels
from targets.schedules.gpu_kernels import GpuKernels
from targets.schedules.weights import WeightSpec

_VIEWS = ("view.default", "reshape.default", "transpose.int", "permute.default", "t.default")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedStage:
    """A stage in Relax.

    Attributes:
        module: IRModule whose `main` takes the inputs, then one tensor per entry of `weights`.
        weights: each weight argument, by the stage's own names.
    """

    module: Any
    weights: tuple[StoredArray, ...]


def import_stage(program: ExportedProgram, processor: Cpu | Gpu) -> ImportedStage:
    """Imports a stage for a processor or a GPU.

    Raises:
        Exception: whatever TVM's importer raises on an operator it does not know.
    """
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER:
            spec.kind = InputKind.PARAMETER  # TVM's importer bakes buffers into the program as constants
    names = {
        spec.arg.name: str(spec.target).removeprefix("stage.")
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
    }
    converter = _Converter(names, processor)
    converter.join(program.graph)
    module = from_exported_program(
        program,
        keep_params_as_input=True,
        run_ep_decomposition=False,
        custom_convert_map=converter.table(),
    )
    function = module["main"]
    inputs = list(function.params[: int(function.attrs["num_input"])])
    used = _used_vars(function)
    weights: list[StoredArray] = []
    params = []
    for var in function.params[len(inputs) :]:
        if var in used:
            params.append(var)
            weights.append(StoredArray(names=(names[var.name],), layout=Layout(dtype=str(var.ty.dtype))))
    for stored, var in converter.packed.items():
        params.append(var)
        weights.append(stored)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A weight in the exported program: names of its values and scales, views of it, its bits, its scales per row."""

    names: tuple[str, ...]
    views: tuple[tuple[str, tuple[int, ...]], ...]
    bits: int
    groups: int


class _Converter:
    """Converters for the operators that are ours, with the packed weights they ask for."""

    def __init__(self, names: dict[str, str], processor: Cpu | Gpu) -> None:
        self.names, self.processor = names, processor
        self.kernels = GpuKernels() if isinstance(processor, Gpu) else CpuKernels(processor)
        self.packed: dict[StoredArray, Any] = {}
        """What kernels take of the weights, as arguments."""
        self.joined: dict[fx.Node, tuple[fx.Node, ...]] = {}
        """By the weight of a linear layer: the weights stored in one array with it, itself among them."""
        self.products: dict[tuple[fx.Node, ...], Any] = {}
        """Products of an input with joined weights that were taken as one, by the input and the weights."""

    def table(self) -> dict[str, Callable[[fx.Node, Any], Any]]:
        return {
            "linear.default": self.linear,
            "matmul.default": self.matmul,
            "rms_norm.default": self.rms_norm,
            "layer_norm.default": self.layer_norm,
            "scaled_dot_product_attention.default": self.attention,
            "cached_attention.default": self.cached_attention,
            "latent_attention.default": self.latent_attention,
            "transpose.int": self.transpose,
            "slice.Tensor": self.slice,
            "dequantise.default": lambda node, importer: None,  # what uses it takes the weight as it is
            "embedding.default": self.embedding,
            "index.Tensor": lambda node, importer: self.gather(node, importer, *_args(node)[1]),
        }

    # --- weights ----------------------------------------------------------------------------

    def _weight(self, node: fx.Node) -> _Weight | None:
        """The weight that a node is a view of, in however many bits; None for anything computed."""
        views: list[tuple[str, tuple[int, ...]]] = []
        while node.op == "call_function":
            target = getattr(node.target, "__name__", "")
            source = _args(node)[0]
            if target == "dequantise.default":
                assert not views, f"{node.name}: a quantised weight is used as it is"
                _, scales, bits = _args(node)
                groups = 0 if scales is None else int(scales.meta["val"].shape[1])
                parts = (source,) if scales is None else (source, scales)
                return _Weight(names=tuple(self.names[part.name] for part in parts), views=(), bits=bits, groups=groups)
            if target not in _VIEWS or not isinstance(source, fx.Node):
                return None
            if target in ("view.default", "reshape.default"):
                views.append(("reshape", tuple(node.meta["val"].shape)))
            else:
                views.append(("transpose", _permutation(node)))
            node = source
        name = self.names.get(node.name)
        return None if name is None else _Weight(names=(name,), views=tuple(reversed(views)), bits=32, groups=0)

    def _pack(self, node: fx.Node) -> tuple[WeightSpec, list[Any]]:
        """A weight (outputs, inputs) packed for kernels, as new arguments: values, then scales if there are any."""
        weight = self._weight(node)
        assert weight is not None, f"{node.name}: the weight of a product or table is a parameter"
        rows, columns = node.meta["val"].shape
        spec = WeightSpec(
            rows=rows,
            columns=columns,
            tile=self.processor.tile_columns,
            bits=weight.bits,
            groups=weight.groups,
            halves=self.processor.halves,
        )
        others = [(self._weight(other), other.meta["val"].shape[0]) for other in self.joined.get(node, (node,))]
        tiles = [-(-size // spec.tile) for _, size in others]
        if len(others) > 1:
            first = sum(tiles[: self.joined[node].index(node)])
            spec = dataclasses.replace(spec, first_tile=first, all_tiles=sum(tiles))
        variables = []
        for part, (layout, shape) in enumerate(zip(spec.layouts(weight.views), spec.shapes, strict=True)):
            names = tuple(other.names[part] for other, _ in others if other is not None)
            variables.append(self._argument(StoredArray(names=names, layout=layout), shape))
        return spec, variables

    def _argument(self, stored: StoredArray, shape: Sequence[int]) -> Any:
        """The argument that is this array, a new one if there is none yet."""
        if stored not in self.packed:
            self.packed[stored] = relax.Var(f"w{len(self.packed)}_packed", relax.TensorType(list(shape), stored.layout.dtype))
        return self.packed[stored]

    def join(self, graph: fx.Graph) -> None:
        """Finds the weights of one part of a model (attention, FFN) that multiply the same input: they are stored together."""
        groups: dict[tuple[fx.Node, str], list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "linear.default":
                weight = self._weight(_args(node)[1])
                if weight is not None and not weight.views:
                    part = weight.names[0].partition(".")[0]
                    groups[_args(node)[0], part].append(_args(node)[1])
        uses = Counter(node for nodes in groups.values() for node in nodes)
        for nodes in groups.values():
            if len(nodes) > 1 and all(uses[node] == 1 for node in nodes):
                self.joined |= dict.fromkeys(nodes, tuple(nodes))

    def _transposed(self, node: fx.Node, order: tuple[int, ...]) -> Any:
        """A float32 weight with its axes permuted, as a new argument."""
        stored = StoredArray(names=(self.names[node.name],), layout=Layout(views=(("transpose", order),)))
        return self._argument(stored, [int(node.meta["val"].shape[axis]) for axis in order])

    # --- operators ----------------------------------------------------------------------------

    def linear(self, node: fx.Node, importer: Any) -> Any:
        x, weight, bias, *_ = (*_args(node), None)
        spec, packed = self._pack(weight)
        if spec.all_tiles and x.meta["val"].numel() == spec.columns:
            # A single row: all that is stored together is multiplied at once, in one kernel instead of several.
            together = (x, *self.joined[weight])
            if together not in self.products:
                every = dataclasses.replace(spec, rows=spec.all_tiles * spec.tile, first_tile=0, all_tiles=0)
                self.products[together] = self.kernels.product(importer.block_builder, every, importer.env[x], packed)
            begin = spec.first_tile * spec.tile
            out = importer.block_builder.emit_te(_slice, self.products[together], 2, begin, spec.rows, primfunc_name_hint="slice")
        else:
            out = self.kernels.product(importer.block_builder, spec, importer.env[x], packed)
        return out if bias is None else importer.block_builder.emit(relax.op.add(out, importer.env[bias]))

    def matmul(self, node: fx.Node, importer: Any) -> Any:
        a, b = _args(node)
        base, order = _base(b)
        second = importer.env[base]
        if base.name in self.names and order[-2] == len(order) - 1:
            # A weight read across its rows is laid out as it is read, so that columns are side by side.
            second, order = self._transposed(base, order), tuple(range(len(order)))
        return importer.block_builder.emit_te(_product, importer.env[a], second, order, primfunc_name_hint="product")

    def rms_norm(self, node: fx.Node, importer: Any) -> Any:
        x, _, weight, eps = _args(node)
        return importer.block_builder.emit(relax.op.nn.rms_norm(importer.env[x], importer.env[weight], axes=[-1], epsilon=eps))

    def layer_norm(self, node: fx.Node, importer: Any) -> Any:
        x, shape, weight, bias, eps = _args(node)[:5]
        scale = relax.const(np.ones(shape, np.float32)) if weight is None else importer.env[weight]
        shift = relax.const(np.zeros(shape, np.float32)) if bias is None else importer.env[bias]
        return importer.block_builder.emit(relax.op.nn.layer_norm(importer.env[x], scale, shift, axes=[-1], epsilon=eps))

    def attention(self, node: fx.Node, importer: Any) -> Any:
        """Causal attention over (1, heads, S, d) views of (1, S, heads, d) tensors."""
        assert node.kwargs.get("is_causal") or (len(_args(node)) > 5 and _args(node)[5]), "only causal attention is known"
        q, k, v = (importer.env[_heads_last(arg)] for arg in _args(node)[:3])
        out = self.kernels.causal_attention(importer.block_builder, q, k, v)
        node.meta["heads_last"] = out
        return importer.block_builder.emit(relax.op.permute_dims(out, [0, 2, 1, 3]))

    def cached_attention(self, node: fx.Node, importer: Any) -> Any:
        *nodes, scale = _args(node)
        q, k, v, k_new, v_new = (importer.env[arg] for arg in nodes)
        return self.kernels.cached_attention(importer.block_builder, q, k, v, k_new, v_new, scale)

    def latent_attention(self, node: fx.Node, importer: Any) -> Any:
        *nodes, scale = _args(node)
        q, q_rope, latent, k_rope, latent_new, k_rope_new = (importer.env[arg] for arg in nodes)
        return self.kernels.latent_attention(importer.block_builder, q, q_rope, latent, k_rope, latent_new, k_rope_new, scale)

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

    def embedding(self, node: fx.Node, importer: Any) -> Any:
        """Rows of the packed table: the same array that a tied output layer multiplies with."""
        table, rows = _args(node)[:2]
        spec, packed = self._pack(table)
        return self.kernels.gather(importer.block_builder, spec, importer.env[rows], packed)

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
