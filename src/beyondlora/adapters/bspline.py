"""Uniform B-splines: the G+k basis functions of order k on a grid of G intervals, and their learnable combinations.

Legend: T tokens, R rank, K = G + k basis functions.
Sources: de Boor, A Practical Guide to Splines; the grid convention of KAN (arXiv 2404.19756).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def bspline_basis(
    z: Tensor, *, grid_size: int = 5, order: int = 3, grid_range: tuple[float, float] = (-1.0, 1.0)
) -> Tensor:
    """Evaluate the basis functions b_1 … b_K at every entry of z by the Cox–de Boor recursion.

    The knots are uniform with spacing h = (hi − lo) / G and run from lo − k·h to hi + k·h. Intervals are half-open,
    [t_j, t_{j+1}); a value is zero outside its function's support, so all are zero beyond the outermost knots.

    Args:
        z: any shape, floating point. float16 and bfloat16 are evaluated in float32.
        grid_size: G >= 1, number of intervals on grid_range.
        order: k >= 0, degree of the pieces (3 = cubic).
        grid_range: (lo, hi), lo < hi, in the unit of z.

    Returns: z.shape + (K,) in z's dtype (float32 for half precision).

    >>> bspline_basis(torch.linspace(-1, 0.99, 7)).sum(-1)  # a partition of unity on the grid
    tensor([1., 1., 1., 1., 1., 1., 1.])
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32)).unsqueeze(-1)
    low, high = grid_range
    spacing = (high - low) / grid_size
    steps = torch.arange(-order, grid_size + order + 1, dtype=z.dtype, device=z.device)
    knots = low + spacing * steps
    z = z.clamp(knots[0] - spacing, knots[-1])  # beyond the knots there are zeros, and infinity times zero is nan
    basis = ((z >= knots[:-1]) & (z < knots[1:])).to(z.dtype)
    for degree in range(1, order + 1):
        rising = (z - knots[: -degree - 1]) / (degree * spacing) * basis[..., :-1]
        falling = (knots[degree + 1 :] - z) / (degree * spacing) * basis[..., 1:]
        basis = rising + falling
    return basis


def check_grid(grid_size: int, order: int, grid_range: tuple[float, float]) -> None:
    """Raise a ValueError for a grid on which no spline is defined."""
    if grid_size < 1 or order < 0:
        raise ValueError(
            f"grid_size={grid_size} and spline order={order} define no spline: there must be at least 1 interval, and "
            "the order (degree) must be 0 or more (3 is cubic)."
        )
    if len(grid_range) != 2 or not -math.inf < grid_range[0] < grid_range[1] < math.inf:
        raise ValueError(f"grid_range={grid_range} is not an interval: give (low, high), finite, with low < high.")


class Spline(nn.Module):
    """A learnable spline layer (..., R) → (..., R) with weights W (R, K); the two readings of the paper are its types.

    Args:
        rank: R.
        grid_size, order, grid_range: see `bspline_basis`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        rank: int,
        *,
        grid_size: int = 5,
        order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_grid(grid_size, order, grid_range)
        self.grid_size, self.order, self.grid_range = grid_size, order, grid_range
        self.weight = nn.Parameter(torch.empty(rank, grid_size + order, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small noise: uniform in (−0.1, 0.1)."""
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def basis(self, z_TR: Tensor) -> Tensor:
        """Basis values (..., R, K) at z, in the weight's dtype."""
        return bspline_basis(z_TR, grid_size=self.grid_size, order=self.order, grid_range=self.grid_range).to(
            self.weight.dtype
        )

    def curves(self, z_P: Tensor) -> Tensor:
        """What one component at z adds, (P, R): to each of the R outputs (pooled), or to its own (per_dim)."""
        return self.basis(z_P) @ self.weight.mT

    def occupancy(self, z: Tensor) -> Tensor:
        """How many entries of z fall below the grid, into each of its G intervals, and beyond it: (G + 2,)."""
        low, high = self.grid_range
        edges = torch.linspace(low, high, self.grid_size + 1, dtype=z.dtype, device=z.device)
        return torch.bincount(torch.bucketize(z.reshape(-1), edges, right=True), minlength=self.grid_size + 2)

    def extra_repr(self) -> str:
        """Grid for `repr`."""
        return f"grid_size={self.grid_size}, order={self.order}, grid_range={self.grid_range}"


class PooledSpline(Spline):
    """L(z) = W s(z) with the basis summed over the components, s(z) = Σ_i b(z_i) ∈ R^K."""

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R)."""
        return F.linear(self.basis(z_TR).sum(dim=-2), self.weight)


class PerDimSpline(Spline):
    """L_i(z) = Σ_j W[i, j] b_j(z_i): one curve for each component, as in KAN."""

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R)."""
        return (self.basis(z_TR) * self.weight).sum(dim=-1)


SPLINES: dict[str, type[Spline]] = {"pooled": PooledSpline, "per_dim": PerDimSpline}
