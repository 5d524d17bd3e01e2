"""Which rows of what passes through a model are tokens: padding is none."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens among (..., C), as (T, C).

    Args:
        mask: the batch's attention mask (B, L); it counts where x is (B, L, C), or (B·L, C) as some models flatten it.
    """
    if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
        return x.reshape(-1, x.shape[-1])[mask.flatten().bool().to(x.device)]
    return x.reshape(-1, x.shape[-1])


def without_padding(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows of padded batches one by one, without it: an expert gets tokens, and no word of which they are.

    Args:
        batches: keyword arguments of a model's forward; tensors of shape (B, L, ...) lose the positions that the
            attention mask (B, L) leaves out.
    """
    for batch in batches:
        mask = batch.get("attention_mask")
        if mask is None or mask.bool().all():
            yield batch
            continue
        for row, kept in enumerate(mask.bool()):
            parts = {name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in batch.items()}
            yield {
                name: value[:, kept] if torch.is_tensor(value) and value.shape[:2] == kept.unsqueeze(0).shape else value
                for name, value in parts.items()
            }
