"""AdaptiveCubic: tanh(H tanh(z)) plus a cubic spline on a uniform grid, in closed form, keeping z alone.

In each cell of a uniform grid four cubic basis functions differ from zero, and their values are the same four
polynomials of the place u in [0, 1) within the cell. The Cox–de Boor recursion (`bspline.bspline_basis`, the
definition and the test's other side) finds them through all functions of three degrees, and autograd keeps every one.

Legend: T tokens, R rank, K = G + 3 basis functions, P = K + 7 with a margin where values beyond the grid go.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = (3, 4)  # functions that a cell at the lower and at the upper end reaches and that do not exist
Four = tuple[Tensor, Tensor, Tensor, Tensor]  # of the functions of a cell, from the one that is leaving to the new one


class UniformGrid(NamedTuple):
    """G intervals of width `spacing` from `low`; `pooled`: the basis is summed over the components of z."""

    low: float
    spacing: float
    intervals: int
    pooled: bool

    def locate(self, z_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Where z lies: its cell, which is the place of the cell's first function in a row of P, and u in it.

        A row a basis: (T, R) if pooled, else (R, T).
        """
        rows = z_TR if self.pooled else z_TR.mT
        place = ((rows - self.low) / self.spacing).add_(3).clamp_(0, self.intervals + 6)
        cell = place.detach().floor()
        return cell.nan_to_num(0).long(), place - cell  # a nan has no cell: the first, and it stays nan in u


def values(u_TR: Tensor) -> Four:
    """The four basis functions of a cell at u."""
    rest_TR, square_TR = 1 - u_TR, u_TR * u_TR
    leaving_TR, new_TR = (rest_TR * rest_TR * rest_TR).div_(6), (square_TR * u_TR).div_(6)
    second_TR = torch.sub(2 / 3 - square_TR, new_TR, alpha=-3)
    return leaving_TR, second_TR, 1 - leaving_TR - second_TR - new_TR, new_TR  # they add up to 1


def slopes(u_TR: Tensor) -> Four:
    """Their derivatives with respect to u."""
    rest_TR = 1 - u_TR
    leaving_TR, new_TR = (rest_TR * rest_TR).div_(-2), (u_TR * u_TR).div_(2)
    second_TR = (3 * new_TR).sub_(u_TR, alpha=2)
    return leaving_TR, second_TR, -leaving_TR - second_TR - new_TR, new_TR


def spread(cell_TR: Tensor, weights: Iterable[Tensor], size: int) -> Tensor:
    """Each row's weights (T, R), added at their functions' places: (T, K)."""
    weights = list(weights)
    table_TP = weights[0].new_zeros(len(cell_TR), size + sum(MARGIN))
    for first, weight_TR in enumerate(weights):
        table_TP[:, first:].scatter_add_(1, cell_TR, weight_TR)
    return table_TP[:, MARGIN[0] : -MARGIN[1]]


def collect(table_TK: Tensor, cell_TR: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """Σ weight · table entry over the four functions of each cell, by rows: (T, R)."""
    table_TP = F.pad(table_TK, MARGIN)
    parts = (table_TP[:, first:].gather(1, cell_TR).mul_(weight_TR) for first, weight_TR in enumerate(weights))
    return functools.reduce(Tensor.add_, parts)


class AdaptiveCubic(torch.autograd.Function):
    """σ(z) = tanh(H tanh(z)) + L(z) from (T, R) to (T, R), L(z) = W Σ_i b(z_i) if pooled, else Σ_j W[·, j] b_j(z)."""

    @staticmethod
    def forward(ctx: Any, z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
        """Values; saves its inputs."""
        ctx.save_for_backward(z_TR, H_RR, W_RK)
        ctx.grid = grid
        cell, u = grid.locate(z_TR)
        if grid.pooled:
            spline_TR = spread(cell, values(u), W_RK.shape[1]) @ W_RK.mT
        else:
            spline_TR = collect(W_RK, cell, values(u)).mT
        return torch.tanh_(torch.tanh(z_TR) @ H_RR.mT).add_(spline_TR)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from z again; written in differentiable operations, so they can be differentiated in turn."""
        z_TR, H_RR, W_RK = ctx.saved_tensors
        g_TR = gradients[0]
        tanh_TR = torch.tanh(z_TR)
        du_TR = g_TR * (1 - torch.tanh(tanh_TR @ H_RR.mT).square())
        dz_TR = (du_TR @ H_RR) * (1 - tanh_TR.square())
        cell, u = ctx.grid.locate(z_TR)
        if ctx.grid.pooled:
            spline_slope_TR = collect(g_TR @ W_RK, cell, slopes(u))
            dW_RK = g_TR.mT @ spread(cell, values(u), W_RK.shape[1])
        else:
            spline_slope_TR = g_TR * collect(W_RK, cell, slopes(u)).mT
            dW_RK = spread(cell, (g_TR.mT * value_RT for value_RT in values(u)), W_RK.shape[1])
        return dz_TR + spline_slope_TR / ctx.grid.spacing, du_TR.mT @ tanh_TR, dW_RK, None
