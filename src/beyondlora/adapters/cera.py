"""CeRA (arXiv 2602.22911): a gated bottleneck. branch(x) = s · B · D_p(SiLU(A x)).

Legend: T tokens, N inputs, M outputs, R rank.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, dropout_layer
from .brief import call, is_watched
from .dropout import draw
from .fused import Middle, has_hooks, is_dropping, is_nothing
from .products import masked
from .reading import Reading

NOTHING = nn.Identity()


def silu_gradient(dh_TR: Tensor, z_TR: Tensor) -> Tensor:
    """Of z, from that of z · sigmoid(z). torch's own kernel has no derivative."""
    if not torch.is_grad_enabled():
        gradient: Tensor = torch.ops.aten.silu_backward(dh_TR, z_TR)
        return gradient
    share_TR = z_TR.sigmoid()
    return dh_TR * share_TR * (1 + z_TR * (1 - share_TR))


ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "identity": nn.Identity}
GRADIENTS: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {  # of act(z)'s, and of z
    nn.SiLU: silu_gradient,
    nn.ReLU: functools.partial(torch.ops.aten.threshold_backward, threshold=0),
    nn.Identity: lambda dh_TR, z_TR: dh_TR,
}


class Activated(Middle):
    """act(z), with dropout behind it if p > 0."""

    def __init__(self, activation: nn.Module, p: float) -> None:
        self.activation, self.gradient, self.p = activation.forward, GRADIENTS[type(activation)], p
        self.share = 1.0  # of the entries that dropout keeps

    def begin(self, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Middle.begin`: draws which entries are dropped."""
        h_TR = self.activation(z_TR)
        if not self.p:
            return h_TR, ()
        mask, self.share, rest_TR = draw(h_TR, self.p)
        kept_TR = masked(h_TR, mask, self.share) if rest_TR is None else rest_TR
        return kept_TR, () if mask is None else (mask,)

    def values(self, z_TR: Tensor, *extra: Tensor) -> Tensor:
        """See `Middle.values`."""
        return masked(self.activation(z_TR), extra[0] if extra else None, self.share)

    def gradients(self, dh_TR: Tensor, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """See `Middle.gradients`."""
        return (self.gradient(masked(dh_TR, extra[0] if extra else None, self.share), z_TR),)


class Gate(nn.Module):
    """An activation, and dropout behind it."""

    def __init__(self, activation: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R)."""
        h_TR = self.activation(z_TR)
        return self.dropout(h_TR) if self.dropout.training else h_TR


class CeraAdapter(Adapter):
    """s · B · D_p(act(A x)) with A (R, N) and B (M, R).

    The nonlinearity stays at inference: no weight matrix equals base + adapter, so there is nothing to merge (but for
    the ablation activation="identity", which is LoRA with its dropout moved into the bottleneck, and beside embeddings,
    where x picks a column: B act(A) is a table to add).

    Args:
        in_features: N.
        out_features: M.
        rank: R >= 1.
        scaling: s, dimensionless; the paper has none (1).
        dropout: probability p in [0, 1), on the R bottleneck units after the activation, in training only.
        activation: "silu", or "relu" and "identity" for ablations.
        noop_start: True starts at zero (B = 0, the paper's); False draws B at random, like PEFT's
            `init_lora_weights=False`.
        reading: see `Adapter`.
        device, dtype: of the weights.

    Raises: ValueError for an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.1,
        activation: str = "silu",
        noop_start: bool = True,
        reading: Reading | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {sorted(ACTIVATIONS)}.")
        down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        up = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        super().__init__(down=down, up=up, scaling=scaling, reading=reading)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = dropout_layer(dropout)
        self.core = Gate(self.activation, self.dropout)
        self.reset_parameters(noop_start=noop_start)

    def reset_parameters(self, *, noop_start: bool = True) -> None:
        """A Kaiming-normal with the ReLU gain, std = sqrt(2 / N); B zero, or Kaiming-uniform if not `noop_start`."""
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        if noop_start:
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.kaiming_uniform_(self.up.weight, a=math.sqrt(5))

    def hidden(self, x_TN: Tensor) -> Tensor:
        """D_p(act(A x)), (..., R): no dropout on x."""
        return self.core(self.read(x_TN))

    def hidden_briefly(self, x_TN: Tensor) -> Tensor:
        """See `Adapter.hidden_briefly`."""
        parts: Any = self._modules
        z_TR = call(parts["down"], x_TN)
        if self.drops or is_watched(parts["core"]):
            return call(parts["core"], z_TR)
        return call(parts["activation"], z_TR)

    @property
    def input_dropout(self) -> nn.Module:
        """None: CeRA's is R wide, behind the activation."""
        return NOTHING

    def middle(self) -> Middle | None:
        """See `Adapter.middle`."""
        parts: Any = self._modules
        activation, dropout = parts["activation"], parts["dropout"]
        if type(activation) not in GRADIENTS or has_hooks(parts["core"]) or has_hooks(activation):
            return None
        if is_dropping(dropout):
            return Activated(activation, dropout.p)
        return Activated(activation, 0.0) if is_nothing(dropout) else None

    def static_down_weight(self) -> Tensor:
        """act(A): what each column becomes; dropout is no part of it."""
        return self.activation(self.down.weight)

    @torch.no_grad()
    def adopt(self, up_MK: Tensor, down_KN: Tensor) -> None:
        """Become up · down (identity activation only); where K > R = min(M, N), one factor is the identity."""
        if self.sum_refusal:
            raise ValueError(self.sum_refusal)
        if self.rank < len(down_KN):
            product_MN = up_MK @ down_KN
            identity_RR = torch.eye(self.rank, dtype=product_MN.dtype, device=product_MN.device)
            tall = self.rank == self.down.in_features
            up_MK, down_KN = (product_MN, identity_RR) if tall else (identity_RR, product_MN)
        self.up.weight.copy_(up_MK / self.scaling)
        self.down.weight.copy_(down_KN)

    @property
    def sum_refusal(self) -> str | None:
        """Only the identity activation is linear."""
        return None if isinstance(self.activation, nn.Identity) else super().sum_refusal

    @property
    def merge_refusal(self) -> str | None:
        """CeRA is nonlinear in x, but for embeddings."""
        if isinstance(self.activation, nn.Identity) or self.picks_columns:
            return None
        return (
            "Cannot merge a CeRA adapter: it is nonlinear in x, so no weight matrix equals base + adapter. Keep it "
            "attached (model.save_pretrained, PeftModel.from_pretrained), distil it to the nearest LoRA on your data "
            "(beyondlora export ADAPTER --to lora --distil DATA), or train LoRA or StelLA, which merge exactly."
        )
