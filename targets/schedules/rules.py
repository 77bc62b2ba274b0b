"""Which rule schedules which kernel."""

from typing import Any

import tvm
from tvm import s_tir, tirx

from targets.cpu import Cpu
from targets.schedules.blocks import block_handles
from targets.schedules.dot import schedule_dot_product
from targets.schedules.prefetch import with_prefetches
from targets.schedules.product import schedule_packed_product, schedule_product
from targets.schedules.rowwise import schedule_rowwise

_PRODUCTS = {"dot_product": schedule_dot_product, "packed_product": schedule_packed_product, "product": schedule_product}


def schedule_module(module: Any, cpu: Cpu) -> Any:
    """Schedules every kernel of the module for `cpu`; kernels written as loops stay as they are."""
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and not (function.attrs and "edgewise.scheduled" in function.attrs):
            module.update_func(var, _schedule(function, cpu))
    return module


def _schedule(function: Any, cpu: Cpu) -> Any:
    sch = s_tir.Schedule(tvm.IRModule({"main": function}))
    names = {sch.get(block).name_hint for block in block_handles(sch)}
    rule = next((_PRODUCTS[name] for name in _PRODUCTS if name in names), schedule_rowwise)
    rule(sch, cpu)
    module = sch.mod
    if rule is schedule_packed_product:
        # With 64-bit loops TVM loses the mark that has a last, smaller row tile split off, and guards every one of them.
        module = tirx.transform.ForceNarrowIndexToInt32()(module)
    return with_prefetches(module["main"]).with_attr("edgewise.scheduled", True)
