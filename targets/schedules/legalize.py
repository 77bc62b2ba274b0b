"""Operators that TVM would lower to scalar library calls, written so that they vectorise."""

import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx, topi


def legalization() -> dict[str, Callable[[Any, Any], Any]]:
    """Our legalisations, by Relax operator."""
    return {
        "relax.nn.silu": _unary(silu),
        "relax.nn.gelu": _unary(gelu),
        "relax.nn.gelu_tanh": _unary(gelu_tanh),
    }


def _unary(function: Callable[[te.Tensor], te.Tensor]) -> Callable[[Any, Any], Any]:
    return lambda builder, call: builder.call_te(function, call.args[0], primfunc_name_hint=function.__name__)


def silu(x: te.Tensor) -> te.Tensor:
    """x / (1 + e^-x), the exponential by polynomial."""
    # fast_exp gives its argument back beyond 88.3, where 2^128 overflows; at e^87 the quotient is 0 all the same.
    decay = topi.fast_exp(topi.minimum(topi.negative(x), 87.0))
    return te.compute(x.shape, lambda *i: x(*i) / (1 + decay(*i)), name="silu")


def gelu(x: te.Tensor) -> te.Tensor:
    """x/2 (1 + erf(x / sqrt 2)), erf by rational approximation."""
    erf = topi.fast_erf(te.compute(x.shape, lambda *i: x(*i) * math.sqrt(0.5), name="scaled"))

    def value(*i: Any) -> Any:
        # The approximation may end a rounding above -1, which a large x would magnify; at -6 the value is -6e-9.
        return tirx.Select(x(*i) < tirx.const(-6.0, x.dtype), tirx.const(0.0, x.dtype), x(*i) * (0.5 + 0.5 * erf(*i)))

    return te.compute(x.shape, value, name="gelu")


def gelu_tanh(x: te.Tensor) -> te.Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), tanh by rational approximation."""
    inner = te.compute(x.shape, lambda *i: math.sqrt(2 / math.pi) * (x(*i) + 0.044715 * x(*i) * x(*i) * x(*i)), name="inner")
    tanh = topi.fast_tanh(inner)
    return te.compute(x.shape, lambda *i: 0.5 * x(*i) * (1 + tanh(*i)), name="gelu_tanh")
