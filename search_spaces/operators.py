"""Attention of one new token over a cache, as operators of their own.

`torch.export` keeps a call as one node (`torch.ops.edgewise.cached_attention.default`), for which a device may have one
kernel; `run_decompositions()` turns it into plain PyTorch operators for everyone else. Shape suffixes as in `model.py`.
"""

import torch
from torch import Tensor

OPERATORS = torch.ops.edgewise
"""Where the operators are called from."""
_LIBRARY = torch.library.Library("edgewise", "FRAGMENT")  # type: ignore[no-untyped-call]


def cached_attention(q_B1Hd: Tensor, k_BCKd: Tensor, v_BCKv: Tensor, k_B1Kd: Tensor, v_B1Kv: Tensor, scale: float) -> Tensor:
    """softmax(scale q [k; k_new]^T) [v; v_new] -> (B, 1, H, v); scores are concatenated, never the cache."""
    B, _, H, d = q_B1Hd.shape
    K, v = v_B1Kv.shape[2:]
    q_BKGd = q_B1Hd.view(B, K, H // K, d)
    old_BKGC = torch.matmul(q_BKGd, k_BCKd.permute(0, 2, 3, 1))
    new_BKG1 = (q_BKGd * k_B1Kd.view(B, K, 1, d)).sum(dim=-1, keepdim=True)
    p_BKGC, p_BKG1 = _split_softmax(old_BKGC, new_BKG1, scale)
    o_BKGv = torch.matmul(p_BKGC, v_BCKv.permute(0, 2, 1, 3)) + p_BKG1 * v_B1Kv.view(B, K, 1, v)
    return o_BKGv.reshape(B, 1, H, v)


def latent_attention(q_BHL: Tensor, q_BHR: Tensor, c_BCL: Tensor, k_BCR: Tensor, c_B1L: Tensor, k_B1R: Tensor, scale: float) -> Tensor:
    """softmax(scale (q [c; c_new]^T + q_rope [k_rope; k_rope_new]^T)) [c; c_new] -> (B, H, L): latents are keys and values."""
    old_BHC = torch.matmul(q_BHL, c_BCL.transpose(1, 2)) + torch.matmul(q_BHR, k_BCR.transpose(1, 2))
    new_BH1 = (q_BHL * c_B1L).sum(dim=-1, keepdim=True) + (q_BHR * k_B1R).sum(dim=-1, keepdim=True)
    p_BHC, p_BH1 = _split_softmax(old_BHC, new_BH1, scale)
    return torch.matmul(p_BHC, c_BCL) + p_BH1 * c_B1L


def _split_softmax(old: Tensor, new: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the C cached scores and the one new score, given back apart."""
    p = torch.softmax(torch.cat((old, new), dim=-1) * scale, dim=-1)
    C = old.shape[-1]
    return p[..., :C], p[..., C : C + 1]


def _define(schema: str, function: object) -> None:
    name = schema.partition("(")[0]
    if hasattr(OPERATORS, name):  # exported models carry this file with them: several copies may meet in one process
        return
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


_define("cached_attention(Tensor q, Tensor k, Tensor v, Tensor k_new, Tensor v_new, float scale) -> Tensor", cached_attention)
_define(
    "latent_attention(Tensor q, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor latent_new, Tensor k_rope_new, float scale) -> Tensor",
    latent_attention,
)
