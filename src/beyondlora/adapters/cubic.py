"""AdaptiveCubic: tanh(H tanh(z)) plus a cubic spline on a uniform grid, in closed form, keeping z alone.

In each cell of a uniform grid four cubic basis functions differ from zero, and their values are the same four
polynomials of the place u in [0, 1) within the cell. The Cox–de Boor recursion (`bspline.bspline_basis`, the
definition and the test's other side) finds them through all functions of three degrees, and autograd keeps every one.

Two forms. On a CPU these four, added up at their functions' places: as little arithmetic as can be. Elsewhere, and
for a few entries, all K functions of the distance to their centres: few operations, and on a GPU sums whose order does
not depend on who is first.

Legend: T tokens, R rank, K = G + 3 basis functions, P = K + 7 with a margin where values beyond the grid go.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import written_out

FEW = 2**12  # entries of z up to which a CPU's time goes by the number of operations, not by their size
PIECE, LARGE_PIECE = 2**15, 2**18  # entries of z: what stays in a CPU's cache; what all functions of are no burden
MARGIN = (3, 4)  # functions that a cell at the lower and at the upper end reaches and that do not exist
tanh_backward = torch.ops.aten.tanh_backward  # g (1 − t²) in one pass
Four = tuple[Tensor, Tensor, Tensor, Tensor]  # of the functions of a cell, from the one that is leaving to the new one


class UniformGrid(NamedTuple):
    """G intervals of width `spacing` from `low`; `pooled`: the basis is summed over the components of z."""

    low: float
    spacing: float
    intervals: int
    pooled: bool

    def locate(self, z_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Where z lies: the index of its cell's first function in a flat table of rows of P, and u in the cell.

        A row a basis: (T, R) if pooled, else (R, T).
        """
        rows = (z_TR if self.pooled else z_TR.mT).contiguous()
        last = self.intervals + sum(MARGIN) - 1
        place = rows.sub(self.low).div_(self.spacing).add_(MARGIN[0]).clamp_(0, last)
        cell = place.detach().long().clamp_(0, last)  # a nan has no cell: any, and it stays nan in u
        u = place - cell
        starts = torch.arange(0, len(cell) * (last + 4), last + 4, device=cell.device)
        return cell.add_(starts[:, None]), u

    def from_centres(self, z_TR: Tensor) -> Tensor:
        """z minus the centre of each of the K functions, (T, R, K)."""
        first, last = self.low - self.spacing, self.low + (self.intervals + 1) * self.spacing
        centres_K = torch.linspace(first, last, self.intervals + 3, dtype=z_TR.dtype, device=z_TR.device)
        return z_TR.unsqueeze(-1) - centres_K

    def reach(self, from_TRK: Tensor) -> tuple[Tensor, Tensor]:
        """Two cells and one minus the distance to the centre, not below 0.

        A function is (far³ − 4 near³) / 6 cells³, and its derivative ∓ (far² − 4 near²) / 2 cells³.
        """
        near_TRK = torch.rsub(from_TRK.abs(), self.spacing)
        return (near_TRK + self.spacing).clamp_min_(0), near_TRK.clamp_min_(0)


def values(u: Tensor) -> Four:
    """Six times the four basis functions of a cell at u."""
    rest, square = 1 - u, u * u
    rest_square = rest * rest
    leaving, new = rest_square * rest, square * u
    second = torch.rsub(square, 4, alpha=6).add_(new, alpha=3)
    return leaving, second, torch.rsub(rest_square, 4, alpha=6).add_(leaving, alpha=3), new


def slopes(u: Tensor) -> Four:
    """Twice their derivatives with respect to u."""
    rest, square = 1 - u, u * u
    rest_square = rest * rest
    second = (3 * square).sub_(u, alpha=4)
    return -rest_square, second, (4 * rest).sub_(rest_square, alpha=3), square


def spread(index: Tensor, weights: Iterable[Tensor], width: int) -> Tensor:
    """Each row's weights, added at their functions' places in rows of P: (rows, P)."""
    weights = list(weights)
    table = weights[0].new_zeros(len(index), width)
    for first, weight in enumerate(weights):
        table.view(-1)[first:].scatter_add_(0, index.view(-1), weight.reshape(-1))
    return table


def collect(table: Tensor, index: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """Σ weight · table entry over the four functions of each cell, by rows; table (rows, P)."""
    flat = table.view(-1)
    parts = (flat[first:].index_select(0, index.view(-1)).view_as(w).mul_(w) for first, w in enumerate(weights))
    return functools.reduce(Tensor.add_, parts)


def adaptive_cubic(z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
    """See `AdaptiveCubic`, which without gradients only costs."""
    if torch.is_grad_enabled():
        y_TR: Tensor = AdaptiveCubic.apply(z_TR, H_RR, W_RK, grid)
        return y_TR
    return all_values(z_TR, H_RR, W_RK, grid)


class AdaptiveCubic(torch.autograd.Function):
    """σ(z) = tanh(H tanh(z)) + L(z) from (T, R) to (T, R), L(z) = W Σ_i b(z_i) if pooled, else Σ_j W[·, j] b_j(z)."""

    @staticmethod
    def forward(ctx: Any, z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
        """Values; saves its inputs."""
        ctx.save_for_backward(z_TR, H_RR, W_RK)
        ctx.grid = grid
        return all_values(z_TR, H_RR, W_RK, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from z again; written in differentiable operations, so they can be differentiated in turn."""
        z_TR, H_RR, W_RK = ctx.saved_tensors
        return *all_gradients(gradients[0], z_TR, H_RR, W_RK, ctx.grid), None


def all_gradients(
    dy_TR: Tensor, z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Of z, H and W, from that of σ(z)."""
    dz, sums = list[Tensor](), list[Tensor]()
    rows = _rows(z_TR)
    for g_TR, part_TR in zip(dy_TR.split(rows), z_TR.split(rows), strict=True):
        dz_TR, *more = _gradients(g_TR, part_TR, H_RR, W_RK, grid)
        dz.append(dz_TR)
        sums = [*map(torch.add, sums, more)] if sums else more  # at once: a large rank's H is larger than a piece
    dH_RR, dW_RK = sums
    return dz[0] if len(dz) == 1 else torch.cat(dz), dH_RR, dW_RK


def all_values(z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
    """σ(z), a piece of z after the other."""
    rows = _rows(z_TR)
    if len(z_TR) <= rows:
        return _values(z_TR, H_RR, W_RK, grid)
    return torch.cat([_values(part_TR, H_RR, W_RK, grid) for part_TR in z_TR.split(rows)])


def _has_all_functions(z_TR: Tensor) -> bool:
    return z_TR.device.type != "cpu" or z_TR.numel() <= FEW


def _values(z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
    adapted_TR = torch.tanh_(torch.tanh(z_TR) @ H_RR.mT)
    if _has_all_functions(z_TR):
        far_TRK, near_TRK = grid.reach(grid.from_centres(z_TR))
        basis_TRK, sixth = far_TRK.pow_(3).sub_(near_TRK.pow_(3), alpha=4), 1 / (6 * grid.spacing**3)
        if grid.pooled:
            return adapted_TR.addmm_(basis_TRK.sum(1), W_RK.mT, alpha=sixth)
        return adapted_TR.add_(basis_TRK.mul_(W_RK).sum(-1), alpha=sixth)
    index, u = grid.locate(z_TR)
    W_RP = F.pad(W_RK / 6, MARGIN)
    if grid.pooled:
        return adapted_TR.addmm_(spread(index, values(u), W_RP.shape[1]), W_RP.mT)
    return adapted_TR.add_(collect(W_RP, index, values(u)).mT)


def _gradients(
    g_TR: Tensor, z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid
) -> tuple[Tensor, Tensor, Tensor]:
    tanh_TR = torch.tanh(z_TR)
    du_TR = tanh_backward(g_TR, torch.tanh(tanh_TR @ H_RR.mT))
    dz_TR = tanh_backward(du_TR @ H_RR, tanh_TR)
    dH_RR = du_TR.mT @ tanh_TR
    if _has_all_functions(z_TR) and not written_out(g_TR):  # its second derivative at a centre is another one
        from_TRK = grid.from_centres(z_TR)
        far_TRK, near_TRK = grid.reach(from_TRK)
        squares = far_TRK * far_TRK, near_TRK * near_TRK
        basis_TRK = far_TRK.mul_(squares[0]).addcmul_(near_TRK, squares[1], value=-4)
        slope_TRK = squares[0].sub_(squares[1], alpha=4).mul_(from_TRK.sign_())
        if grid.pooled:
            slope_TR = slope_TRK.mul_((g_TR @ W_RK).unsqueeze(1)).sum(-1)
            dW_RK = g_TR.mT @ basis_TRK.sum(1)
        else:
            slope_TR = slope_TRK.mul_(W_RK).sum(-1).mul_(g_TR)
            dW_RK = basis_TRK.mul_(g_TR.unsqueeze(-1)).sum(0)
        cube = grid.spacing**3
        return dz_TR.sub_(slope_TR, alpha=0.5 / cube), dH_RR, dW_RK.div_(6 * cube)
    index, u = grid.locate(z_TR)
    W_RP = F.pad(W_RK, MARGIN)
    if grid.pooled:
        slope_TR = collect(g_TR @ W_RP, index, slopes(u))
        dW_RP = g_TR.mT @ spread(index, values(u), W_RP.shape[1])
    else:
        slope_TR = g_TR * collect(W_RP, index, slopes(u)).mT
        dW_RP = spread(index, (g_TR.mT * value_RT for value_RT in values(u)), W_RP.shape[1])
    dz_TR = torch.add(dz_TR, slope_TR, alpha=0.5 / grid.spacing)
    return dz_TR, dH_RR, dW_RP[:, MARGIN[0] : -MARGIN[1]] / 6


def _rows(z_TR: Tensor) -> int:
    """How many rows to go through at a time."""
    return max((PIECE if z_TR.device.type == "cpu" else LARGE_PIECE) // z_TR.shape[1], 1)
