"""Which rows of what passes through a model are tokens: padding is none."""

from torch import Tensor


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens among (..., C), as (T, C).

    Args:
        mask: the batch's attention mask (B, L); it counts where x is (B, L, C), or (B·L, C) as some models flatten it.
    """
    if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
        return x.reshape(-1, x.shape[-1])[mask.flatten().bool().to(x.device)]
    return x.reshape(-1, x.shape[-1])
