"""Factors cut into vectors (DeepSpeed's ZeRO 1, 2 and 3, FSDP1): the step on whole matrices, gathered before and after.

A factor lies in a vector of one process, or across those of several. Its entries are put together by a sum over the
processes, of vectors that are zero where a process holds nothing; every process takes the same step, and writes what it
holds.

In float64, as `stiefel.py`. Legend: M rows, R columns (rank).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed

from .guard import must_return, settle
from .linear import PRECISE, SURELY_NO_ROUNDING
from .pieces import Piece
from .stiefel import RETRACTIONS, distance_to_stiefel, polar_retraction, riemannian_gradient, to_tangent

Reading = Callable[[Tensor], Tensor | None]  # of a vector: its values, or its gradient


class Gathered:
    """A step of factors of which each process holds pieces; see `Move`."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.before: list[Tensor] = []

    def begin(self) -> bool:
        """See `Move`. Factors that have left the manifold are brought back or refused here, for all processes alike."""
        self.before = self._gather(_values)
        for number, (piece, Y_MR) in enumerate(zip(self.pieces, self.before, strict=True)):
            # The float32 copies were made of the model's weights, by rounding where those are in half precision.
            rounded = piece.layer.settled is None and piece.layer.weight.dtype not in PRECISE
            off = distance_to_stiefel(Y_MR).item()
            if (rounded and off < SURELY_NO_ROUNDING) or must_return(piece.layer, off):
                self.before[number] = polar_retraction(Y_MR, torch.zeros_like(Y_MR))
        self.undo()
        converted = [
            riemannian_gradient(Y_MR, G_MR) for Y_MR, G_MR in zip(self.before, self._gather(_gradient), strict=True)
        ]
        self._put(_gradient, converted)
        return all(bool(torch.isfinite(G_MR).all()) for G_MR in converted)

    def end(self) -> bool:
        """See `Move`."""
        steps = [
            (after_MR - Y_MR) * piece.layer.step_scale
            for piece, Y_MR, after_MR in zip(self.pieces, self.before, self._gather(_values), strict=True)
        ]
        if not all(torch.isfinite(step_MR).all() for step_MR in steps):
            return False
        ends = [
            RETRACTIONS[piece.layer.retraction](Y_MR, to_tangent(Y_MR, step_MR))
            for piece, Y_MR, step_MR in zip(self.pieces, self.before, steps, strict=True)
        ]
        self._put(_values, ends)
        for piece in self.pieces:
            settle(piece.layer)
        return True

    def is_still(self) -> bool:
        """See `Move`."""
        # As it is stored; what is not finite is equal to nothing, so it has moved.
        before = (Y_MR.to(self.pieces[0].vector.dtype).double() for Y_MR in self.before)
        return all(map(torch.equal, self._gather(_values), before))

    def undo(self) -> None:
        """See `Move`."""
        self._put(_values, self.before)

    def _gather(self, read: Reading) -> list[Tensor]:
        """The whole matrices, seen tall and in float64, of what lies in the vectors of all processes."""
        sizes = [piece.layer.in_features * piece.layer.out_features for piece in self.pieces]
        first = self.pieces[0]
        whole = torch.zeros(sum(sizes), dtype=first.vector.dtype, device=first.device)
        flats = whole.split(sizes)
        for piece, flat in zip(self.pieces, flats, strict=True):
            vector = read(piece.vector)
            if vector is not None and piece.size:
                flat[piece.start : piece.start + piece.size] = vector[piece.offset : piece.offset + piece.size]
        if first.is_cut:
            distributed.all_reduce(whole, group=first.processes)
        return [
            piece.layer.tall(flat.view(piece.layer.whole_shape)).double()
            for piece, flat in zip(self.pieces, flats, strict=True)
        ]

    def _put(self, read: Reading, matrices: Iterable[Tensor]) -> None:
        """The inverse of `_gather`: write what this process holds of the matrices into its vectors."""
        for piece, matrix in zip(self.pieces, matrices, strict=True):
            vector = read(piece.vector)
            if vector is not None and piece.size:
                flat = piece.layer.tall(matrix).reshape(-1)
                vector[piece.offset : piece.offset + piece.size] = flat[piece.start : piece.start + piece.size]


def _values(vector: Tensor) -> Tensor:
    return vector.detach()


def _gradient(vector: Tensor) -> Tensor | None:
    return vector.grad  # none in a process that holds nothing of the weight
