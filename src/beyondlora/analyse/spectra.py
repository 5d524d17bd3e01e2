"""Spectra of tall or low-rank matrices without an SVD of anything larger than R×R. Pure functions, torch only.

An adapter's outputs on T tokens are Y = H Wᵀ with H (T, R) what enters the up-projection W (M, R). With H = Q₁ F and
W = Q₂ G, both Q orthonormal, the singular values of Y are those of F Gᵀ, which is R×R. F is accumulated by QR while
the tokens stream past, so neither Y nor H is ever held; nothing is squared, so small singular values keep their digits.

Legend: T tokens, N inputs, M outputs, R rank, C columns of a streamed matrix, K = min(T, C), k a subspace's dimension.
Everything runs in float64. Sources: Roy and Vetterli, The effective rank (2007); arXiv 2602.22911, mechanism analysis;
Björck and Golub, Numerical methods for computing angles between linear subspaces (1973).
"""

import torch
from torch import Tensor

from ..precise import precise

ENERGY = 0.90  # of the manifold dimension, as in arXiv 2602.22911


class CentredQR:
    """The triangular factor F of a tall matrix X (T, C) minus its column means, FᵀF = XcᵀXc, from blocks of rows.

    The factor of [1 | X] is [[±√T, ·], [0, F]]: orthogonalising against the column of ones is centring. Stacking a new
    block under the old factor and factorising again is exact (a TSQR), so the mean need not be known beforehand.

    >>> qr = CentredQR(columns=3)
    >>> for block_TC in blocks: qr.add(block_TC)
    >>> torch.linalg.svdvals(qr.factor())       # the singular values of the centred matrix
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = 0
        self._factor: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, X_TC: Tensor) -> None:
        """Take in rows, of any floating dtype; they may be kept for a while, so nothing may overwrite them."""
        self.rows += len(X_TC)
        self._waiting.append(X_TC)
        self._waiting_rows += len(X_TC)
        if self._waiting_rows > 2 * self.columns:  # small blocks would be factorised under a factor larger than they
            self._absorb()

    def factor(self) -> Tensor:
        """F (K, C): the R factor of the centred matrix of all rows so far, in float64; no rows if there were none."""
        self._absorb()
        if self._factor is None:
            return torch.zeros(0, self.columns, dtype=torch.float64)
        return self._factor[1:, 1:]

    def _absorb(self) -> None:
        if not self._waiting_rows:
            return
        X_TC = precise(torch.cat(self._waiting).detach())
        block = torch.cat([X_TC.new_ones(len(X_TC), 1), X_TC], dim=1)
        stacked = block if self._factor is None else torch.cat([self._factor, block])
        self._factor = torch.linalg.qr(stacked, mode="r").R
        self._waiting, self._waiting_rows = [], 0


def product_svd(F_KR: Tensor, W_MR: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of Q F Wᵀ for any Q with orthonormal columns, and the directions in output space they belong to.

    Args:
        F_KR: the triangular factor of what is multiplied.
        W_MR: the other factor; scaling included.

    Returns: σ (min(K, R, M),), descending, in the unit of F·W, and right singular vectors as columns (M, min(K, R, M)).
    """
    Q_MR, G_RR = torch.linalg.qr(precise(W_MR.detach()))
    _, sigma, Vh = torch.linalg.svd(precise(F_KR.detach()) @ G_RR.mT, full_matrices=False)
    return sigma, Q_MR @ Vh.mT


def factored_singular_values(P_MR: Tensor, Q_RN: Tensor) -> Tensor:
    """Singular values of P Q (M, N), descending, (min(M, R, N),): exact, from two QRs and an R×R SVD."""
    return torch.linalg.svdvals(
        torch.linalg.qr(precise(P_MR.detach()), mode="r").R @ torch.linalg.qr(precise(Q_RN.detach()).mT, mode="r").R.mT
    )


# --- one number of a spectrum ----------------------------------------------------------------------------------------


def normalised(sigma: Tensor) -> Tensor:
    """p_i = σ_i / Σσ, dimensionless. Raises: ValueError for a spectrum of zeros."""
    total = sigma.sum()
    if not total > 0:
        raise ValueError("A spectrum without a singular value above zero has no shape: the matrix is constant or zero.")
    return sigma / total


def effective_rank(sigma: Tensor) -> float:
    """exp(−Σ p ln p), between 1 and the number of singular values (Roy and Vetterli). Raises: ValueError for zeros."""
    return torch.special.entr(normalised(sigma)).sum().exp().item()


def manifold_dimension(sigma: Tensor, energy: float = ENERGY) -> int:
    """The smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i². Raises: ValueError for zeros."""
    p = normalised(sigma) ** 2
    # Compared with the last partial sum, which rounding cannot put out of reach.
    partial = p.sort(descending=True).values.cumsum(0)
    return int((partial < energy * partial[-1]).sum().item()) + 1


def stable_rank(sigma: Tensor) -> float:
    """Σσ² / σ_max², between 1 and the number of singular values. Raises: ValueError for zeros."""
    return ((normalised(sigma) / normalised(sigma).max()) ** 2).sum().item()


# --- two matrices ----------------------------------------------------------------------------------------------------


def unexplained_share(F_KC: Tensor, W_MR: Tensor) -> float | None:
    """The share of the variance of H Wᵀ that no affine function of Z explains, in [0, 1]; F is the factor of [Z | H].

    0 where H is affine in Z. The rows of F below Z's columns are H's residual after least squares on [1 | Z].

    Args:
        F_KC: from a `CentredQR` of Z's R columns followed by H's.
        W_MR: the up-projection.

    Returns: None where there are no more rows than Z has columns: then everything is explained.
    """
    rank = W_MR.shape[1]
    H_KR = F_KC[:, -rank:]
    before = F_KC.shape[1] - rank
    if len(F_KC) <= before:
        return None
    G_RR = torch.linalg.qr(precise(W_MR.detach()), mode="r").R
    total = torch.linalg.matrix_norm(H_KR @ G_RR.mT) ** 2
    return (torch.linalg.matrix_norm(H_KR[before:] @ G_RR.mT) ** 2 / total).item() if total > 0 else None


def nearest_affine(F_KC: Tensor, rank: int) -> Tensor:
    """C (R, R) with H ≈ Z Cᵀ + constant, by least squares; F is the factor of [Z | H], H with R columns.

    What no row of Z reaches is left out of C, the smallest of all solutions.
    """
    before = F_KC.shape[1] - rank
    F = precise(F_KC.detach())[:before]
    return (torch.linalg.pinv(F[:, :before]) @ F[:, before:]).mT


def principal_angles(A_Mk: Tensor, B_Mk: Tensor) -> Tensor:
    """Principal angles in radians between two column spaces, ascending.

    Small ones are taken from their sines and large ones from their cosines, where each is well conditioned.

    Args:
        A_Mk, B_Mk: orthonormal columns, as many in each.
    """
    A, B = precise(A_Mk.detach()), precise(B_Mk.detach())
    cos = torch.linalg.svdvals(A.mT @ B)
    sin = torch.linalg.svdvals(B - A @ (A.mT @ B)).flip(0)
    return torch.where(cos**2 > 0.5, sin.clamp(max=1).asin(), cos.clamp(max=1).acos())
