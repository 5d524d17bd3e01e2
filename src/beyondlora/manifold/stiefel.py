"""The Stiefel manifold St(M, R): matrices Y (M, R), M >= R, with orthonormal columns, YᵀY = I.

Pure functions; leading batch dimensions are allowed everywhere.
Legend: M rows, R columns (rank).  Y point, G Euclidean gradient, D any matrix, xi tangent vector (all (..., M, R)).

Retractions run in float64, on the CPU where the device has none, and are rounded once at the end: the matrices are tall
and thin, so the cost is small, and factors stay orthonormal to float32's own rounding for ever.

Sources: arXiv 2510.01938, algorithm 1; Edelman, Arias, Smith, The Geometry of Algorithms with Orthogonality
Constraints (1998).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..precise import precise


def sym(A_RR: Tensor) -> Tensor:
    """Symmetric part (A + Aᵀ) / 2 of square matrices (..., R, R)."""
    return (A_RR + A_RR.mT) / 2


def riemannian_gradient(Y_MR: Tensor, G_MR: Tensor) -> Tensor:
    """Turn a Euclidean gradient into the Riemannian one of the canonical metric: G − Y Gᵀ Y (Edelman et al., eq. 2.53).

    Args:
        Y_MR: orthonormal columns.
        G_MR: Euclidean gradient at Y (unit: loss per unit of Y).

    Returns: (..., M, R), tangent at Y, in the dtype of the arguments.

    >>> xi = riemannian_gradient(Y, G)
    >>> torch.allclose(to_tangent(Y, xi), xi)
    True
    """
    return G_MR - Y_MR @ (G_MR.mT @ Y_MR)


def to_tangent(Y_MR: Tensor, D_MR: Tensor) -> Tensor:
    """Project orthogonally onto the tangent space at Y: D − Y sym(YᵀD) (arXiv 2510.01938, algorithm 1).

    Args:
        Y_MR: orthonormal columns.
        D_MR: any matrix of Y's shape and unit.

    Returns: (..., M, R), xi with Yᵀxi skew-symmetric.
    """
    return D_MR - Y_MR @ sym(Y_MR.mT @ D_MR)


def polar_retraction(Y_MR: Tensor, xi_MR: Tensor) -> Tensor:
    """Step from Y along xi and land at the nearest point of the manifold: polar(Y + xi) (arXiv 2510.01938, alg. 1).

    polar(Z) = Z (ZᵀZ)^{-1/2}, so only an R×R eigendecomposition is needed and never an SVD of an M×R matrix. The
    actual Gram matrix is used, not I + xiᵀxi: the short form assumes YᵀY = I exactly and lets rounding pile up.
    A huge step of low rank (a diverging run) drowns the Gram matrix's small eigenvalues: it goes through a QR of Z.

    Args:
        Y_MR: orthonormal columns, M >= R.
        xi_MR: tangent at Y, learning rate already applied (unit: that of Y).

    Returns: (..., M, R) in Y's dtype. Columns of Y + xi must be independent, which a tangent xi guarantees.
    """
    Z_MR = precise(Y_MR) + precise(xi_MR)
    eigenvalues_R, Q_RR = torch.linalg.eigh(Z_MR.mT @ Z_MR)
    if (eigenvalues_R[..., 0] < torch.finfo(Z_MR.dtype).eps ** 0.5 * eigenvalues_R[..., -1]).any():
        Q_MR, R_RR = torch.linalg.qr(Z_MR)  # polar(QR) = Q polar(R)
        left_RR, _, right_RR = torch.linalg.svd(R_RR)
        return (Q_MR @ (left_RR @ right_RR)).to(Y_MR)
    inverse_root_RR = (Q_RR * eigenvalues_R.rsqrt().unsqueeze(-2)) @ Q_RR.mT
    return (Z_MR @ inverse_root_RR).to(Y_MR)


def exp_map(Y_MR: Tensor, xi_MR: Tensor) -> Tensor:
    """Follow the geodesic of the canonical metric from Y with velocity xi for unit time (Edelman et al., eq. 2.45).

    With A = Yᵀxi and the thin QR of (I − YYᵀ)xi, the end point is [Y Q] exp([[A, −Rᵀ], [R, 0]]) [I; 0]: one
    exponential of a 2R×2R matrix.

    Args:
        Y_MR: orthonormal columns, M >= R.
        xi_MR: tangent at Y, learning rate already applied (unit: that of Y).

    Returns: (..., M, R) in Y's dtype. Polished by one polar step, since Q is not exactly orthogonal to Y.
    """
    Y, xi = precise(Y_MR), precise(xi_MR)
    rank = Y.shape[-1]
    A_RR = Y.mT @ xi
    Q_MR, R_RR = torch.linalg.qr(xi - Y @ A_RR)
    top = torch.cat([A_RR, -R_RR.mT], dim=-1)
    bottom = torch.cat([R_RR, torch.zeros_like(R_RR)], dim=-1)
    columns = torch.linalg.matrix_exp(torch.cat([top, bottom], dim=-2))[..., :rank]
    end = Y @ columns[..., :rank, :] + Q_MR @ columns[..., rank:, :]
    return polar_retraction(end, torch.zeros_like(end)).to(Y_MR)


RETRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"polar": polar_retraction, "exp_map": exp_map}


def distance_to_stiefel(Y_MR: Tensor) -> Tensor:
    """How far columns are from orthonormal: max |YᵀY − I|, a tensor of shape (...). Zero on the manifold."""
    Y = precise(Y_MR)
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    return (Y.mT @ Y - identity).abs().amax(dim=(-2, -1))


def random_stiefel(
    rows: int, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Draw a matrix uniformly (Haar) from St(rows, columns): the Q of a Gaussian's QR, signs fixed by R's diagonal.

    Args:
        rows: M.
        columns: R <= M.
        dtype: of the result; drawn and factorised in float32 or better.
        device: of the result.

    Raises: ValueError if rows < columns.
    """
    if rows < columns:
        raise ValueError(
            f"{columns} orthonormal columns do not exist in {rows} dimensions; choose a rank of at most {rows}."
        )
    gaussian = torch.randn(rows, columns, dtype=torch.promote_types(dtype, torch.float32), device=device)
    Q_MR, R_RR = torch.linalg.qr(precise(gaussian))
    return (Q_MR * R_RR.diagonal().sgn()).to(gaussian.device, dtype)
