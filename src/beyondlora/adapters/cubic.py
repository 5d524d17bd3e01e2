"""AdaptiveCubic: tanh(H tanh(z)) plus a cubic spline on a uniform grid, in closed form, keeping z alone.

In each cell of a uniform grid four cubic basis functions differ from zero, and their values are the same four
polynomials of the place u in [0, 1) within the cell. The Cox–de Boor recursion (`bspline.bspline_basis`, the
definition and the test's other side) finds them through all functions of three degrees, and autograd keeps every one.

Legend: T tokens, R rank, K = G + 3 basis functions, P = K + 7 with a margin where values beyond the grid go.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = (3, 4)  # functions that a cell at the lower and at the upper end reaches and that do not exist
# The functions of a cell, from the one that is leaving to the one that begins: coefficients of 1, u, u², u³.
VALUES = ((1 / 6, -1 / 2, 1 / 2, -1 / 6), (2 / 3, 0, -1, 1 / 2), (1 / 6, 1 / 2, 1 / 2, -1 / 2), (0, 0, 0, 1 / 6))


class UniformGrid(NamedTuple):
    """G intervals of width `spacing` from `low`; `pooled`: the basis is summed over the components of z."""

    low: float
    spacing: float
    intervals: int
    pooled: bool

    def locate(self, z_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Where z lies: the index, in a flat table of P entries a row, of its cell's first function; and u."""
        place_TR = ((z_TR - self.low) / self.spacing + 3).clamp(0, self.intervals + 6)
        cell_TR = place_TR.detach().floor()
        rows = z_TR.shape[0 if self.pooled else 1]
        first = torch.arange(rows, device=z_TR.device) * (self.intervals + 3 + sum(MARGIN))
        # A nan has no cell: it takes the first one, and stays nan in u.
        return cell_TR.nan_to_num(0).long() + (first[:, None] if self.pooled else first), place_TR - cell_TR


def values(u_TR: Tensor) -> Tensor:
    """The four basis functions of a cell at u, (4, T, R)."""
    return polynomials(u_TR, VALUES)


def slopes(u_TR: Tensor) -> Tensor:
    """Their derivatives with respect to u, (4, T, R)."""
    return polynomials(u_TR, [[degree * c for degree, c in enumerate(powers)][1:] for powers in VALUES])


def polynomials(u_TR: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Σ_i c_i uⁱ for each row of coefficients, by Horner's rule."""
    *rest, result = u_TR.new_tensor(coefficients).mT[:, :, None, None]
    for coefficient in reversed(rest):
        result = torch.addcmul(coefficient, result, u_TR)
    return result


def spread(index_TR: Tensor, weights_4TR: Tensor, rows: int, size: int) -> Tensor:
    """Add each weight at its function's place: (rows, K)."""
    width = size + sum(MARGIN)
    table = weights_4TR.new_zeros(rows * width)
    table.scatter_add_(0, four(index_TR).reshape(-1), weights_4TR.reshape(-1))
    return table.view(rows, width)[:, MARGIN[0] : -MARGIN[1]]


def collect(table_K: Tensor, index_TR: Tensor, weights_4TR: Tensor) -> Tensor:
    """Σ weight · table entry over the four functions of each cell, (T, R)."""
    entries = F.pad(table_K, MARGIN).view(-1).index_select(0, four(index_TR).reshape(-1))
    return (entries.view_as(weights_4TR) * weights_4TR).sum(0)


def four(index_TR: Tensor) -> Tensor:
    """The indices of a cell's four functions, (4, T, R)."""
    return index_TR + torch.arange(4, device=index_TR.device)[:, None, None]


class AdaptiveCubic(torch.autograd.Function):
    """σ(z) = tanh(H tanh(z)) + L(z) from (T, R) to (T, R), L(z) = W Σ_i b(z_i) if pooled, else Σ_j W[·, j] b_j(z)."""

    @staticmethod
    def forward(ctx: Any, z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
        """Values; saves its inputs."""
        ctx.save_for_backward(z_TR, H_RR, W_RK)
        ctx.grid = grid
        index_TR, u_TR = grid.locate(z_TR)
        if grid.pooled:
            spline_TR = spread(index_TR, values(u_TR), z_TR.shape[0], W_RK.shape[1]) @ W_RK.mT
        else:
            spline_TR = collect(W_RK, index_TR, values(u_TR))
        return spline_TR.add_(torch.tanh_(torch.tanh(z_TR) @ H_RR.mT))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from z again; written in differentiable operations, so they can be differentiated in turn."""
        z_TR, H_RR, W_RK = ctx.saved_tensors
        g_TR = gradients[0]
        tanh_TR = torch.tanh(z_TR)
        du_TR = g_TR * (1 - torch.tanh(tanh_TR @ H_RR.mT).square())
        dz_TR = (du_TR @ H_RR) * (1 - tanh_TR.square())
        index_TR, u_TR = ctx.grid.locate(z_TR)
        if ctx.grid.pooled:
            spline_slope_TR = collect(g_TR @ W_RK, index_TR, slopes(u_TR))
            dW_RK = g_TR.mT @ spread(index_TR, values(u_TR), z_TR.shape[0], W_RK.shape[1])
        else:
            spline_slope_TR = g_TR * collect(W_RK, index_TR, slopes(u_TR))
            dW_RK = spread(index_TR, g_TR * values(u_TR), *W_RK.shape)
        return dz_TR + spline_slope_TR / ctx.grid.spacing, du_TR.mT @ tanh_TR, dW_RK, None
