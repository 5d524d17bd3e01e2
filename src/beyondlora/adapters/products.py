"""Products of a tall matrix with a narrow one that make nothing of the tall one's size: what `fused.py` is made of.

A mask (`dropout.py`) or another dtype is applied to a block of rows at a time; sums are in the narrow matrix's dtype.
Where gradients are recorded (a second derivative), or mapped over (vmap), each is its definition.

Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FEW = 2**15  # entries of which the product takes less time than what would be done to speed it up
BLOCK = 256  # rows a piece: small enough for a cache, large enough for a matrix product
DROPPING = {"cuda", "xpu"}  # devices with one kernel to draw, drop and scale, and one to do it again
drop_again = torch.ops.aten.native_dropout_backward  # x ∘ mask · scale in one pass


def written_out(*operands: Tensor) -> bool:
    """Whether products are to be in plain operations, which torch can differentiate in turn or map over."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return any(map(torch._C._functorch.is_legacy_batchedtensor, operands))


def narrow(x_TN: Tensor, A_RN: Tensor, mask: Tensor | None = None) -> Tensor:
    """(x ∘ mask) Aᵀ in A's dtype, (T, R); x ∘ mask, and x in another dtype, exist a block of rows at a time."""
    if mask is None and x_TN.dtype == A_RN.dtype:
        if x_TN.device.type != "cpu" or x_TN.numel() < FEW:
            return (flat(x_TN) @ A_RN.mT).view(*x_TN.shape[:-1], A_RN.shape[0])
        # The narrow matrix first: the other order is slower (docs/speed.md). Contiguous: dropout draws another mask for
        # another layout, and a recomputed forward pass must draw the same.
        return (A_RN @ flat(x_TN).mT).mT.contiguous().view(*x_TN.shape[:-1], A_RN.shape[0])
    if written_out(x_TN):
        return masked(x_TN, mask).to(A_RN.dtype) @ A_RN.mT
    z_TR = A_RN.new_empty(*x_TN.shape[:-1], A_RN.shape[0])
    for rows, block in masked_blocks(x_TN, mask, A_RN.dtype):
        torch.mm(block, A_RN.mT, out=flat(z_TR)[rows])
    return z_TR


def weight_gradient(g_TR: Tensor, x_TN: Tensor, mask: Tensor | None = None) -> Tensor:
    """gᵀ (x ∘ mask) in g's dtype, (R, N)."""
    if (mask is None and g_TR.dtype == x_TN.dtype) or written_out(g_TR, x_TN):
        return flat(g_TR).mT @ flat(masked(x_TN, mask)).to(g_TR.dtype)
    sum_RN = g_TR.new_zeros(g_TR.shape[-1], x_TN.shape[-1])
    for rows, block in masked_blocks(x_TN, mask, g_TR.dtype):
        sum_RN.addmm_(flat(g_TR)[rows].mT, block)
    return sum_RN


def read_twice(g_TM: Tensor, W_MR: Tensor) -> Tensor:
    """g for two products with matrices of W's dtype: in it, where they would not take it by blocks of rows."""
    return g_TM if g_TM.device.type == "cpu" else g_TM.to(W_MR.dtype)


def up_gradient(h_TR: Tensor, g_TM: Tensor) -> Tensor:
    """gᵀ h in h's dtype, (M, R), by the order of products that is fast where they are."""
    if g_TM.device.type != "cpu" and g_TM.dtype == h_TR.dtype:
        return flat(g_TM).mT @ flat(h_TR)
    return weight_gradient(h_TR, g_TM).mT


def widen_(dx_TN: Tensor, g_TR: Tensor, A_RN: Tensor, mask: Tensor | None) -> Tensor:
    """dx ← (g A) ∘ mask, for a dx that is contiguous."""
    if mask is not None and mask.dtype != torch.bool:
        widen_(dx_TN, g_TR, A_RN, None).view(-1).index_fill_(0, mask.long(), 0)
        return dx_TN
    if dx_TN.dtype == A_RN.dtype and (mask is None or dx_TN.device.type in DROPPING):
        torch.mm(flat(g_TR), A_RN, out=flat(dx_TN))
        return dx_TN if mask is None else dx_TN.mul_(mask.view(dx_TN.shape))
    for rows in blocks(dx_TN):
        flat(dx_TN)[rows] = masked(flat(g_TR)[rows] @ A_RN, None if mask is None else mask[rows])
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


def masked(x_TN: Tensor, mask: Tensor | None, share: float = 1) -> Tensor:
    """x ∘ mask / share."""
    if mask is not None and x_TN.device.type in DROPPING:
        kept_TN: Tensor = drop_again(x_TN, mask.view(x_TN.shape), 1 / share)
        return kept_TN
    if mask is None:
        kept_TN = x_TN
    elif mask.dtype == torch.bool:
        kept_TN = torch.where(mask.view(x_TN.shape), x_TN, 0)
    else:
        kept_TN = x_TN.reshape(-1).index_fill(0, mask.long(), 0).view(x_TN.shape)
    return kept_TN if share == 1 else kept_TN / share


def masked_blocks(x_TN: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of x ∘ mask in another dtype, each good until the next is asked for; and which rows."""
    x_flat = flat(x_TN)
    if mask is None or mask.dtype == torch.bool:
        for rows in blocks(x_TN):
            yield rows, masked(x_flat[rows], None if mask is None else mask[rows]).to(dtype)
        return
    buffer = x_TN.new_empty((min(BLOCK, len(x_flat)), x_flat.shape[1]), dtype=dtype)
    for rows in blocks(x_TN):
        start, end = rows.start * x_flat.shape[1], min(rows.stop * x_flat.shape[1], x_flat.numel())
        first, last = torch.searchsorted(mask, mask.new_tensor([start, end])).tolist()
        block = buffer[: len(x_flat[rows])].copy_(x_flat[rows])
        block.view(-1).index_fill_(0, mask[first:last].long() - start, 0)
        yield rows, block


def blocks(x_TN: Tensor) -> Iterator[slice]:
    """Slices of the rows of x: few enough each for a cache; on a device with few, large launches all of them."""
    rows = x_TN.shape[:-1].numel()
    size = BLOCK if x_TN.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def flat(x_TN: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x_TN if x_TN.dim() == 2 else x_TN.reshape(-1, x_TN.shape[-1])
