"""Parts of a training step on a CPU, with their gradients written down: PyTorch's own are slow for small models.

Shape suffixes as in `search_spaces/model.py`; N is B * H, b the query rows of a part, c the keys that they see.
"""

import contextlib
import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from search_spaces.model import Head, Kernels, Rope, attend, rotate

IGNORED = -100
"""The target of a position that has none."""

_PART_ROWS = 96
"""Query rows whose scores are made at once, about: fewer leave out more of what is masked, more make larger products.
Forward and backward, one thread, 300 tokens, 8 heads of 16, 1 to 4 and 6 parts: 4.34, 3.23, 2.82, 2.80, 2.87 ms."""

_MOST_SCORES = 4 * 1024 * 1024
"""Scores (B H S S) above which they are not kept for the backward pass: PyTorch's attention needs no memory for them."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""What mallopt(3) can be told, from malloc.h."""


def causal_attention(q_BHSd: Tensor, k_BKSd: Tensor, v_BKSv: Tensor) -> Tensor:
    """What `search_spaces.model.attend` computes, faster where heads are narrow or windows short: (B, H, S, v).

    Forward and backward of one layer, one thread, milliseconds, PyTorch's and this: 3.32 and 2.80 (8 heads of 16, 300
    tokens), 3.31 and 2.50 (4 of 16, 430), 4.34 and 3.19 (4 of 64, 300), 8.73 and 3.95 (MLA: 8 of 32, values of 16, 350).
    """
    B, H, S, _ = q_BHSd.shape
    if B * H * S * S > _MOST_SCORES:
        if B == 1 or torch.is_grad_enabled():
            return attend(q_BHSd, k_BKSd, v_BKSv)
        # Nothing is kept, so a few rows of the batch at a time.
        some = max(1, _MOST_SCORES // (H * S * S))
        parts = zip(*(torch.split(x, some) for x in (q_BHSd, k_BKSd, v_BKSv)), strict=True)
        return torch.cat([causal_attention(*part) for part in parts])
    groups = H // k_BKSd.shape[1]
    if groups > 1:
        k_BKSd, v_BKSv = k_BKSd.repeat_interleave(groups, dim=1), v_BKSv.repeat_interleave(groups, dim=1)
    return _CausalAttention.apply(q_BHSd, k_BKSd, v_BKSv)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    """P = softmax(q k^T / sqrt(d)) and P v by parts of the query rows, each against the keys up to its last row.

    With dP = do v^T and dS = P * (dP - rowsum(dP * P)): dq = dS k / sqrt(d), dk = dS^T q / sqrt(d), dv = P^T do.
    """

    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSv: Tensor) -> Tensor:
        B, H, S, d = q_BHSd.shape
        q_NSd, k_NSd, v_NSv = (x.reshape(B * H, S, -1) for x in (q_BHSd, k_BHSd, v_BHSv))
        ctx.rows = rows = -(-S // max(1, round(S / _PART_ROWS)))
        ahead_bb = q_NSd.new_full((rows, rows), -math.inf).triu_(1)
        # As the model wants it: what it does next with it is then no copy.
        o_BHSv = q_NSd.new_empty(B, S, H, v_NSv.shape[-1]).transpose(1, 2)
        parts = []
        for a in range(0, S, rows):
            b = min(S, a + rows)
            p_Nbc = _product(q_NSd[:, a:b], k_NSd[:, :b].transpose(1, 2), 1 / math.sqrt(d))
            p_Nbc[:, :, a:].add_(ahead_bb[: b - a, : b - a])
            torch.softmax(p_Nbc, dim=-1, out=p_Nbc)
            o_BHSv[:, :, a:b] = torch.bmm(p_Nbc, v_NSv[:, :b]).view(B, H, b - a, -1)
            parts.append(p_Nbc)
        ctx.save_for_backward(q_NSd, k_NSd, v_NSv, *parts)
        return o_BHSv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BHSv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_NSd, k_NSd, v_NSv, *parts = ctx.saved_tensors
        B, H, S, _ = do_BHSv.shape
        do_NSv, scale = do_BHSv.reshape(B * H, S, -1), 1 / math.sqrt(q_NSd.shape[-1])
        dq_BHSd = q_NSd.new_empty(B, S, H, q_NSd.shape[-1]).transpose(1, 2)
        dk_NSd, dv_NSv = k_NSd.new_empty(0), v_NSv.new_empty(0)
        # From the last part, which sees every key: the others are added to its rows.
        for a in reversed(range(0, S, ctx.rows)):
            b = min(S, a + ctx.rows)
            p_Nbc = parts[a // ctx.rows]
            ds_Nbc = torch.bmm(do_NSv[:, a:b], v_NSv[:, :b].transpose(1, 2))
            torch._softmax_backward_data(ds_Nbc, p_Nbc, -1, p_Nbc.dtype, grad_input=ds_Nbc)
            dq_BHSd[:, :, a:b] = _product(ds_Nbc, k_NSd[:, :b], scale).view(B, H, b - a, -1)
            if b == S:
                dk_NSd = _product(ds_Nbc.transpose(1, 2), q_NSd[:, a:b], scale)
                dv_NSv = torch.bmm(p_Nbc.transpose(1, 2), do_NSv[:, a:b])
            else:
                dk_NSd[:, :b].baddbmm_(ds_Nbc.transpose(1, 2), q_NSd[:, a:b], alpha=scale)
                dv_NSv[:, :b].baddbmm_(p_Nbc.transpose(1, 2), do_NSv[:, a:b])
        return dq_BHSd, dk_NSd.view(B, H, S, -1), dv_NSv.view(B, H, S, -1)


def _product(a_Nij: Tensor, b_Njk: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a_Nij.new_empty(()), a_Nij, b_Njk, beta=0, alpha=scale)


class Rotation:
    """What `search_spaces.model.rotate` computes, to the bit, for the positions from 0 on.

    Forward and backward, one thread, microseconds, that and this: 298 and 165 (300 tokens, 8 heads of 16), 289 and 142 (430, 4 of 16).
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int], Rope] = {}

    def __call__(self, x_BSHd: Tensor, rope: Rope) -> Tensor:
        S, H, d = x_BSHd.shape[1:]
        if 2 * rope[0].shape[1] != d:
            return rotate(x_BSHd, rope)
        tables = self._tables.get((H, d))
        if tables is None or tables[0].shape[0] < S:
            tables = self._tables[H, d] = _tables(rope, H)
        return _Rotated.apply(x_BSHd, tables[0][:S], tables[1][:S])  # type: ignore[no-any-return, no-untyped-call]


def _tables(rope: Rope, heads: int) -> Rope:
    """What a head and its halves, exchanged, are multiplied with, (S, H, d): written out for every head, as rows of 8 are slow."""
    cos_Sj, sin_Sj = rope
    pair = torch.cat((cos_Sj, cos_Sj), dim=1), torch.cat((-sin_Sj, sin_Sj), dim=1)
    cos_SHd, sin_SHd = (x_Sd[:, None].repeat(1, heads, 1) for x_Sd in pair)
    return cos_SHd, sin_SHd


class _Rotated(torch.autograd.Function):
    """y = x cos + exchanged(x) sin, where sin has the sign of the half; the gradient is turned back: g cos - exchanged(g) sin."""

    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos_SHd: Tensor, sin_SHd: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SHd, sin_SHd)
        return (x_BSHd * cos_SHd).add_(_exchanged(x_BSHd).mul_(sin_SHd))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BSHd: Tensor) -> tuple[Tensor, None, None]:
        cos_SHd, sin_SHd = ctx.saved_tensors
        return (g_BSHd * cos_SHd).sub_(_exchanged(g_BSHd).mul_(sin_SHd)), None, None


def _exchanged(x_BSHd: Tensor) -> Tensor:
    half = x_BSHd.shape[-1] // 2
    return torch.cat((x_BSHd[..., half:], x_BSHd[..., :half]), dim=-1)


def training_kernels() -> Kernels:
    """What training and scoring on a CPU make the body of a model with."""
    return Kernels(attend=causal_attention, rotate=Rotation())


@torch.no_grad()
def head_gradients(head: Head, h_nD: Tensor, targets_n: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the logits of some normalised tokens; adds the gradients of the head's weight and bias to theirs.

    With p = softmax(h W^T) and e the targets as rows of one 1: dlogits = (p - e) / count, in the memory of the logits. So
    they are read twice and not six times: 12.45 for 14.55 ms with the products (128 wide, 300 tokens, vocabulary 4,096).

    Args:
        head: whose products are taken.
        h_nD: what its norm gave.
        targets_n: those that are `IGNORED` count for nothing.
        count: what the sum of losses is divided by, a scalar.

    Returns:
        The loss, a scalar, at most 87 nats for one token, and the gradient of h, (n, D).
    """
    weight_VD = head.weight
    p_nV = F.linear(h_nD, weight_VD, head.bias)
    torch.softmax(p_nV, dim=-1, out=p_nV)
    weighed_n1 = ((targets_n != IGNORED) / count)[:, None]
    at_n1 = targets_n.clamp(min=0)[:, None]
    right_n1 = p_nV.gather(1, at_n1)
    loss = -(right_n1.clamp(min=torch.finfo(p_nV.dtype).tiny).log_() * weighed_n1).sum()
    p_nV.scatter_(1, at_n1, right_n1 - 1)
    # The weights of the tokens are put on the narrow side of each product.
    if weight_VD.grad is None:
        weight_VD.grad = torch.mm(p_nV.t(), h_nD * weighed_n1)
    else:
        weight_VD.grad.addmm_(p_nV.t(), h_nD * weighed_n1)
    if head.bias is not None:
        bias_V = torch.mv(p_nV.t(), weighed_n1[:, 0])
        head.bias.grad = bias_V if head.bias.grad is None else head.bias.grad.add_(bias_V)
    return loss, torch.mm(p_nV, weight_VD).mul_(weighed_n1)


def keep_memory() -> None:
    """Has the C library keep what a step frees for the next one, in the whole process from now on; glibc alone can.

    Else it returns large blocks to the system and takes them anew, which clears each page again. On two cores, medians of
    six steps in new processes by turns: 1,592 and 1,595 tokens a second without, 1,780 and 1,685 with it (14 M parameters);
    474,309 page faults without, 40,260 with it. At the size of a search's models, on one thread: 82.8 ms a step and 2,750
    faults without, 74.9 ms and none with it (MLA, 1.0 M parameters).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            mallopt(parameter, value)
