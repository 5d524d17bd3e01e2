"""Products of a tall matrix with a narrow one that make nothing of the tall one's size: what `fused.py` is made of.

A mask or another dtype is applied to a block of rows at a time; sums are in the narrow matrix's dtype. Where gradients
are recorded (a second derivative) each is its definition.

Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256  # rows a piece: small enough for a cache, large enough for a matrix product


def narrow(x_TN: Tensor, A_RN: Tensor, keep_TN: Tensor | None = None) -> Tensor:
    """(x ∘ keep) Aᵀ in A's dtype, (T, R); x ∘ keep, and x in another dtype, exist a block of rows at a time."""
    if keep_TN is None and x_TN.dtype == A_RN.dtype:
        # The narrow matrix first: the other order is slower (docs/speed.md). Contiguous: dropout draws another mask for
        # another layout, and a recomputed forward pass must draw the same.
        return (A_RN @ flat(x_TN).mT).mT.contiguous().view(*x_TN.shape[:-1], A_RN.shape[0])
    if torch.is_grad_enabled():
        return masked(x_TN, keep_TN).to(A_RN.dtype) @ A_RN.mT
    z_TR = A_RN.new_empty(*x_TN.shape[:-1], A_RN.shape[0])
    for rows in blocks(x_TN):
        torch.mm(masked(flat(x_TN), keep_TN, rows).to(A_RN.dtype), A_RN.mT, out=flat(z_TR)[rows])
    return z_TR


def weight_gradient(g_TR: Tensor, x_TN: Tensor, keep_TN: Tensor | None = None) -> Tensor:
    """gᵀ (x ∘ keep) in g's dtype, (R, N)."""
    if torch.is_grad_enabled() or (keep_TN is None and g_TR.dtype == x_TN.dtype):
        return flat(g_TR).mT @ flat(masked(x_TN, keep_TN)).to(g_TR.dtype)
    sum_RN = g_TR.new_zeros(g_TR.shape[-1], x_TN.shape[-1])
    for rows in blocks(x_TN):
        sum_RN.addmm_(flat(g_TR)[rows].mT, masked(flat(x_TN), keep_TN, rows).to(g_TR.dtype))
    return sum_RN


def add_widened_(dx_TN: Tensor, g_TR: Tensor, A_RN: Tensor, keep_TN: Tensor | None, beta: float = 1) -> Tensor:
    """dx ← beta dx + (g A) ∘ keep, for beta 0 or 1."""
    if keep_TN is None and dx_TN.dtype == A_RN.dtype:
        flat(dx_TN).addmm_(flat(g_TR), A_RN, beta=beta)
        return dx_TN
    for rows in blocks(dx_TN):
        part = masked(flat(g_TR)[rows] @ A_RN, None if keep_TN is None else keep_TN[rows])
        flat(dx_TN)[rows] = part if beta == 0 else flat(dx_TN)[rows] + part
    return dx_TN


def add_product_(y_TM: Tensor, h_TR: Tensor, W_MR: Tensor, scaling: float) -> Tensor:
    """y ← y + s · h Wᵀ, in float32 a block of rows at a time where y is narrower."""
    y_flat, h_flat = y_TM.view(-1, W_MR.shape[0]), flat(h_TR)
    if y_TM.dtype == W_MR.dtype:
        y_flat.addmm_(h_flat, W_MR.mT, alpha=scaling)
    else:
        for rows in blocks(y_TM):
            y_flat[rows].add_(h_flat[rows] @ W_MR.mT, alpha=scaling)
    return y_TM


def keep_mask(like_TN: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask (T, N) of the entries to keep, and the share of them expected: 1 − p to 16 bits.

    Sixteen random bits an entry, compared with a threshold: a third of the time of `bernoulli_`, which draws one number
    after the other.
    """
    dropped = min(max(round(p * 2**16), 1), 2**16 - 1)
    keep_TN = torch.empty(flat(like_TN).shape, dtype=torch.bool, device=like_TN.device)
    for block in blocks(keep_TN):
        rows = keep_TN[block]
        words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64, device=rows.device).random_(-(2**63), None)
        torch.ge(words.view(torch.int16)[: rows.numel()].view(rows.shape), dropped - 2**15, out=rows)
    return keep_TN, 1 - dropped / 2**16


def masked(x: Tensor, keep_TN: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """x ∘ keep, of some rows."""
    return x[rows] if keep_TN is None else torch.where(keep_TN[rows].view(x[rows].shape), x[rows], 0)


def blocks(x_TN: Tensor) -> Iterator[slice]:
    """Slices of the rows of x: few enough each for a cache; on a device with few, large launches all of them."""
    rows = x_TN.shape[:-1].numel()
    size = BLOCK if x_TN.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def flat(x_TN: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x_TN.reshape(-1, x_TN.shape[-1])
