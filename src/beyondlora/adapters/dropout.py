"""Which entries dropout drops, of a layer's input or of a bottleneck: drawn with few random numbers, kept in few bytes.

A mask is one of two tensors. On a CPU, for the small probabilities of fine-tuning and more than a few entries: the
positions (D,) of the entries dropped in x seen as one row, ascending, int32 where that suffices. The gaps between them
are geometric, so p numbers an entry are drawn and not one. Elsewhere, where the number of entries dropped could not be
known without waiting for the device: bool (T, N), what to keep. A GPU draws it in one kernel, which drops and scales as
well; a CPU compares sixteen random bits an entry with a threshold.

Legend: T tokens (any leading dimensions), N inputs, D entries dropped.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .products import DROPPING, blocks, flat

SMALL = 0.2  # up to which positions are drawn faster than bits, and held in fewer bytes
FEW = 2**13  # entries up to which a number an entry is drawn faster than either


class Drawn(NamedTuple):
    """What dropout does to an x this time.

    Attributes:
        mask: what it keeps or drops; None = it is not at work.
        share: of the entries that it keeps.
        rest: x ∘ mask / share, where that came with drawing the mask.
    """

    mask: Tensor | None = None
    share: float = 1.0
    rest: Tensor | None = None


def draw(x_TN: Tensor, p: float) -> Drawn:
    """Draw a mask, every entry dropped with probability p on its own.

    Args:
        x_TN: the input.
        p: in (0, 1); rounded to 16 bits, and the share with it, where bits are drawn.
    """
    if x_TN.device.type in DROPPING:
        with torch.no_grad():
            rest_TN, mask = torch.native_dropout(x_TN, p, True)
        return Drawn(flat(mask), 1 - p, rest_TN)
    return Drawn(*draw_mask(x_TN, p))


def draw_mask(like_TN: Tensor, p: float) -> tuple[Tensor, float]:
    """The mask and the share of `draw`, for an input like this one, where nothing is dropped on the way."""
    kind = like_TN.device.type
    if kind != "cpu" or like_TN.numel() <= FEW:
        return flat(torch.empty_like(like_TN, dtype=torch.float32).bernoulli_(1 - p)).bool(), 1 - p
    if p <= SMALL:
        return dropped_positions(like_TN.numel(), p), 1 - p
    dropped = min(max(round(p * 2**16), 1), 2**16 - 1)
    return kept_entries(like_TN, dropped), 1 - dropped / 2**16


def dropped_positions(n: int, p: float) -> Tensor:
    """Positions out of n >= 1, each with probability p: (D,), ascending. P(gap ≥ k) = (1 − p)ᵏ."""
    drawn, last = [], -1
    while last < n - 1:
        left = n - 1 - last
        expected = left * p
        gaps = torch.empty(int(expected + 5 * math.sqrt(expected) + 16), dtype=torch.float32, device="cpu").uniform_()
        gaps.neg_().log1p_().mul_(1 / math.log1p(-p)).clamp_(max=left)
        drawn.append(gaps.long().add_(1).cumsum(0).add_(last))
        last = int(drawn[-1][-1])
    positions = torch.cat(drawn)
    within = int(torch.searchsorted(positions, n))  # a comparison and its indices take as long as all the rest
    return positions[:within].to(torch.int32 if n < 2**31 else torch.int64)


def kept_entries(like_TN: Tensor, dropped: int) -> Tensor:
    """What to keep, bool (T, N): all but `dropped` of 2¹⁶."""
    keep_TN = torch.empty(flat(like_TN).shape, dtype=torch.bool, device=like_TN.device)
    for block in blocks(keep_TN):
        rows = keep_TN[block]
        words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64, device=rows.device).random_(-(2**63), None)
        torch.ge(words.view(torch.int16)[: rows.numel()].view(rows.shape), dropped - 2**15, out=rows)
    return keep_TN
