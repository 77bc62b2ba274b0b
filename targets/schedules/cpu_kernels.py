"""What a model computes with on a CPU: the kernels of this folder, emitted into a Relax function."""

import functools
from collections.abc import Sequence
from typing import Any

from tvm import relax

from targets.cpu import Cpu
from targets.schedules.attention import causal_attention
from targets.schedules.decode_attention import cached_attention, latent_attention
from targets.schedules.dot import can_dot, dot_product
from targets.schedules.weights import WeightSpec, cropped, packed_gather, packed_product


class CpuKernels:
    """Kernels for one processor; sizes are those of the arguments."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def product(self, builder: Any, weight: WeightSpec, x: Any, arrays: Sequence[Any]) -> Any:
        """out[..., n] = sum_k x[..., k] w[n, k]."""
        if not can_dot(weight, self._cpu, _sizes(x)):
            return builder.emit_te(functools.partial(packed_product, weight), x, *arrays, primfunc_name_hint="packed_product")
        shape = (1, 1, weight.tiles * weight.tile)
        out = _call(builder, "dot_product", dot_product(weight, self._cpu), [x, *arrays], shape)
        if weight.tiles * weight.tile == weight.rows:
            return out
        return builder.emit_te(cropped, out, weight.rows, primfunc_name_hint="cropped")

    def gather(self, builder: Any, weight: WeightSpec, rows: Any, arrays: Sequence[Any]) -> Any:
        """out[..., :] = w[rows[...], :], each row below `weight.rows`."""
        return builder.emit_te(functools.partial(packed_gather, weight), rows, *arrays, primfunc_name_hint="gather")

    def causal_attention(self, builder: Any, q: Any, k: Any, v: Any) -> Any:
        """See `attention.causal_attention`."""
        _, S, H, d = _sizes(q)
        K, dv = _sizes(v)[2:]
        return _call(builder, "causal_attention", causal_attention(S, H, K, d, dv, self._cpu), [q, k, v], (1, S, H, dv))

    def cached_attention(self, builder: Any, q: Any, k: Any, v: Any, k_new: Any, v_new: Any, scale: float) -> Any:
        """See `decode_attention.cached_attention`."""
        H, d = _sizes(q)[2:]
        K, dv = _sizes(v_new)[2:]
        kernel = cached_attention(H, K, d, dv, scale, self._cpu)
        return _call(builder, "cached_attention", kernel, [q, k, v, k_new, v_new], (1, 1, H, dv))

    def latent_attention(
        self, builder: Any, q: Any, q_rope: Any, latent: Any, k_rope: Any, latent_new: Any, k_rope_new: Any, scale: float
    ) -> Any:
        """See `decode_attention.latent_attention`."""
        (_, H, L), (_, _, R) = _sizes(q), _sizes(q_rope)
        kernel = latent_attention(H, L, R, scale, self._cpu)
        return _call(builder, "latent_attention", kernel, [q, q_rope, latent, k_rope, latent_new, k_rope_new], (1, H, L))


def _sizes(x: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in x.ty.shape)


def _call(builder: Any, name: str, kernel: Any, arguments: list[Any], shape: tuple[int, ...]) -> Any:
    """A call of a kernel that is written as loops."""
    var = builder.add_func(kernel, name)
    return builder.emit(relax.call_tir(var, arguments, relax.TensorType(shape, "float32")))
