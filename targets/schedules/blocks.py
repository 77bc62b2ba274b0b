"""Small questions about the blocks of a kernel, shared by the schedule rules."""

from typing import Any

from tvm import tirx


def block_handles(sch: Any) -> list[Any]:
    """Every block of `main` below the root, in program order."""
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def is_reduction(sch: Any, block: Any) -> bool:
    """Whether any of the block's axes is reduced."""
    return any(iter_var.iter_type == tirx.IterVar.CommReduce for iter_var in sch.get(block).iter_vars)


def output_block(sch: Any) -> Any:
    """The block that writes the kernel's (one) output."""
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    return out


def inline_all(sch: Any, keep: tuple[Any, ...]) -> None:
    """Inlines every block that is not kept into what reads it."""
    kept = [sch.get(block) for block in keep]
    for block in block_handles(sch):
        if not any(sch.get(block).same_as(other) for other in kept):
            sch.compute_inline(block)
            kept = [sch.get(other) for other in keep]


def int_or_none(extent: Any) -> int | None:
    """The value of a constant extent, None for a varying one."""
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None
