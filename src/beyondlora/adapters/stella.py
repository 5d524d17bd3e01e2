"""StelLA (arXiv 2510.01938): learned subspaces. branch(x) = s · U S Vᵀ x with U and V on Stiefel manifolds.

Legend: T tokens, N inputs, M outputs, R rank.
"""

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..manifold.linear import StiefelLinear
from ..manifold.stiefel import RETRACTIONS, random_stiefel
from ..precise import precise, precise_device
from .adapter import Adapter
from .brief import weight_of
from .fused import Middle, has_hooks
from .reading import Reading

GEOMETRIES = ("stiefel", "euclidean")
STARTS = ("rando", "zero", "svd_major", "svd_minor")


class Dense(nn.Linear):
    """S as a full matrix (R, R): z ↦ S z, starting at I."""

    def __init__(
        self, rank: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(rank, rank, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """S = I."""
        nn.init.eye_(self.weight)

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R), in the input's dtype: the factors around S stay in float32 when S does not."""
        return self.product(z_TR, self.weight)

    @staticmethod
    def product(z_TR: Tensor, S_RR: Tensor) -> Tensor:
        """z Sᵀ."""
        return F.linear(z_TR, S_RR.to(z_TR.dtype))

    @staticmethod
    def gradients(dh_TR: Tensor, z_TR: Tensor, S_RR: Tensor) -> tuple[Tensor, Tensor]:
        """Of z (T, R) and of S, from that of `product`."""
        return dh_TR @ S_RR.to(z_TR.dtype), dh_TR.mT @ z_TR


class Diagonal(nn.Module):
    """S as a diagonal, held as a vector (R,): z ↦ diag(S) z, starting at I."""

    def __init__(
        self, rank: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """S = I."""
        nn.init.ones_(self.weight)

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R), in the input's dtype."""
        return self.product(z_TR, self.weight)

    @staticmethod
    def product(z_TR: Tensor, S_R: Tensor) -> Tensor:
        """z diag(S)."""
        return z_TR * S_R.to(z_TR.dtype)

    @staticmethod
    def gradients(dh_TR: Tensor, z_TR: Tensor, S_R: Tensor) -> tuple[Tensor, Tensor]:
        """Of z (T, R) and of S, from that of `product`."""
        return dh_TR * S_R.to(z_TR.dtype), (dh_TR * z_TR).sum(0)


class Scaled(Middle):
    """S z."""

    def __init__(self, core: Dense | Diagonal) -> None:
        self.core, self.extra = type(core), (weight_of(core),)

    def values(self, z_TR: Tensor, *extra: Tensor) -> Tensor:
        """See `Middle.values`."""
        return self.core.product(z_TR, *extra)

    def gradients(self, dh_TR: Tensor, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """See `Middle.gradients`."""
        return self.core.gradients(dh_TR, z_TR, *extra)


class StellaAdapter(Adapter):
    """s · U S Vᵀ x with U (M, R), V (N, R), UᵀU = VᵀV = I, and S (R, R) or diagonal.

    The start is not a no-op, on purpose: S = I, so ‖ΔW‖_F = s·sqrt(R) (zero S trains worse in the paper).

    Args:
        in_features: N >= R.
        out_features: M >= R.
        rank: R >= 1.
        scaling: s, dimensionless.
        dropout: probability in [0, 1) with which an input feature is dropped in training.
        diag_s: S diagonal instead of dense.
        retraction: "polar" or "exp_map".
        grad_scaling: d in the factor sqrt(d / rows) on each step of U and V (the model's hidden size), or None for no
            scaling.
        geometry: "stiefel", or "euclidean" for the unconstrained three-factor ablation.
        start: "rando" (random orthonormal), "zero" (the same with S = 0), "svd_major" or "svd_minor" (leading or
            trailing singular vectors of the base weight).
        base_weight: W0 (M, N), needed by the two SVD starts.
        reading: see `Adapter`. V's rows are tokens beside an embedding and kernel positions beside a convolution.
        device, dtype: of the weights.

    Raises: ValueError for R > min(M, N) or an unknown choice.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        diag_s: bool = False,
        retraction: Literal["polar", "exp_map"] = "polar",
        grad_scaling: float | None = None,
        geometry: Literal["stiefel", "euclidean"] = "stiefel",
        start: Literal["rando", "zero", "svd_major", "svd_minor"] = "rando",
        base_weight: Tensor | None = None,
        reading: Reading | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(
            rank_problem(in_features, out_features, rank),
            retraction=(retraction, RETRACTIONS),
            geometry=(geometry, GEOMETRIES),
            start=(start, STARTS),
        )

        def factor(inputs: int, outputs: int) -> nn.Linear:
            if geometry == "euclidean":
                return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
            step_scale = 1.0 if grad_scaling is None else math.sqrt(grad_scaling / max(inputs, outputs))
            return StiefelLinear(
                inputs, outputs, retraction=retraction, step_scale=step_scale, device=device, dtype=dtype
            )

        super().__init__(
            down=factor(in_features, rank),
            up=factor(rank, out_features),
            scaling=scaling,
            dropout=dropout,
            reading=reading,
        )
        self.core: Dense | Diagonal = (Diagonal if diag_s else Dense)(rank, device=device, dtype=dtype)
        self.reset_parameters(start=start, base_weight=base_weight)

    @torch.no_grad()
    def reset_parameters(self, *, start: str = "rando", base_weight: Tensor | None = None) -> None:
        """U and V random orthonormal or singular vectors of the base weight; S = I, or 0 for start="zero"."""
        if self.up.weight.is_meta:
            return
        U_MR, V_NR = self._start_factors(start, base_weight)
        self.up.weight.copy_(U_MR)
        self.down.weight.copy_(V_NR.mT)
        self.core.reset_parameters()
        if start == "zero":
            nn.init.zeros_(self.core.weight)

    def _start_factors(self, start: str, base_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if start in ("rando", "zero"):
            return tuple(
                random_stiefel(features, self.rank, dtype=self.up.weight.dtype, device=self.up.weight.device)
                for features in (self.up.out_features, self.down.in_features)
            )  # type: ignore[return-value]
        if base_weight is None:
            raise ValueError(f"start={start!r} takes singular vectors of the base weight: pass base_weight (M, N).")
        dtype = torch.promote_types(base_weight.dtype, torch.float32)
        U_MK, _, Vh_KN = torch.linalg.svd(
            base_weight.to(precise_device(base_weight.device), dtype), full_matrices=False
        )
        kept = slice(0, self.rank) if start == "svd_major" else slice(-self.rank, None)
        return U_MK[:, kept], Vh_KN[kept].mT

    def middle(self) -> Middle | None:
        """See `Adapter.middle`."""
        core: Any = self._modules["core"]
        return Scaled(core) if type(core) in (Dense, Diagonal) and not has_hooks(core) else None

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The LoRA that the adapter equals: s·U·S (M, R) and Vᵀ (R, N). No SVD: the factors are there already."""
        S_RR = self.core(torch.eye(self.rank, dtype=self.up.weight.dtype, device=self.up.weight.device)).mT
        return self.scaling * self.up.weight @ S_RR, self.down.weight

    @torch.no_grad()
    def adopt(self, up_MK: Tensor, down_KN: Tensor) -> None:
        """Become up · down: U, V the bases of its column and row space, S its singular values over the scaling."""
        Q_MK, upper_KK = torch.linalg.qr(precise(up_MK))
        Q_NK, lower_KK = torch.linalg.qr(precise(down_KN.mT))
        left_KR, sigma_R, right_RK = torch.linalg.svd(upper_KK @ lower_KK.mT, full_matrices=False)
        kept = slice(0, self.rank)
        self.up.weight.copy_((Q_MK @ left_KR)[:, kept])
        self.down.weight.copy_((right_RK @ Q_NK.mT)[kept])
        S_R = sigma_R[kept] / self.scaling
        self.core.weight.copy_(S_R if self.core.weight.dim() == 1 else S_R.diag())

    @property
    def sum_refusal(self) -> str | None:
        """A sum of such products is such a product."""
        return None

    def parts(self) -> dict[str, nn.Module]:
        """U, S and Vᵀ."""
        return {"U": self.up, "S": self.core, "Vt": self.down}


def rank_problem(in_features: int, out_features: int, rank: int) -> str | None:
    """Why a layer of this shape cannot take this rank; None where it can."""
    smaller = min(in_features, out_features)
    if rank <= smaller:
        return None
    return (
        f"r={rank} is larger than the smaller side of this {out_features}×{in_features} layer, and {rank} orthonormal "
        f"columns do not exist in {smaller} dimensions. Choose r ≤ {smaller}, a smaller rank for this layer by "
        "rank_pattern, or leave it out by exclude_modules."
    )


def _check(rank_refusal: str | None, **choices: tuple[str, Collection[str]]) -> None:
    """Raise a ValueError for a rank or a choice that StelLA cannot take."""
    if rank_refusal:
        raise ValueError(rank_refusal)
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {sorted(known)}.")
