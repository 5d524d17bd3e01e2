"""Factors in DeepSpeed's partitions (ZeRO 1, 2 and 3): the step on whole matrices, gathered before and after.

A factor lies in the partition of one process, or across those of several. Its entries are put together by a sum over
the processes, of vectors that are zero where a process holds nothing; every process takes the same step, and writes
what it holds.

In float64, as `stiefel.py`. Legend: M rows, R columns (rank).
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from .guard import must_return, settle
from .linear import PRECISE, SURELY_NO_ROUNDING, StiefelLinear
from .moves import _alive
from .partitions import piece_of, process_group
from .stiefel import RETRACTIONS, distance_to_stiefel, polar_retraction, riemannian_gradient, to_tangent


class Partitioned:
    """A step of the factors that lie in one vector of every process; see `Move`."""

    def __init__(self, vector: Tensor, layers: list[StiefelLinear]) -> None:
        self._vector = weakref.ref(vector)
        self._layers = [weakref.ref(layer) for layer in layers]
        self.before: list[Tensor] = []

    @property
    def vector(self) -> Tensor:
        """What this process holds of all weights of the group, which the optimizer steps."""
        vector = self._vector()
        if vector is None:
            raise RuntimeError("A partition of ZeRO died while its optimizer stepped.")
        return vector

    @property
    def layers(self) -> list[StiefelLinear]:
        """The layers whose weights move."""
        return [_alive(layer) for layer in self._layers]

    def begin(self) -> bool:
        """See `Move`. Factors that have left the manifold are brought back or refused here, for all processes alike."""
        self.before = self._gather(self.vector.detach())
        for number, (layer, Y_MR) in enumerate(zip(self.layers, self.before, strict=True)):
            # The float32 copies were made of the model's weights, by rounding where those are in half precision.
            rounded = layer.settled is None and layer.weight.dtype not in PRECISE
            off = distance_to_stiefel(Y_MR).item()
            if (rounded and off < SURELY_NO_ROUNDING) or must_return(layer, off):
                self.before[number] = polar_retraction(Y_MR, torch.zeros_like(Y_MR))
        self.undo()
        gradient = self.vector.grad
        if gradient is None:
            raise RuntimeError("A partition of ZeRO has no gradient where its optimizer steps.")
        converted = [
            riemannian_gradient(Y_MR, G_MR) for Y_MR, G_MR in zip(self.before, self._gather(gradient), strict=True)
        ]
        self._put(gradient, converted)
        return all(bool(torch.isfinite(G_MR).all()) for G_MR in converted)

    def end(self) -> bool:
        """See `Move`."""
        steps = [
            (after_MR - Y_MR) * layer.step_scale
            for layer, Y_MR, after_MR in zip(self.layers, self.before, self._gather(self.vector), strict=True)
        ]
        if not all(torch.isfinite(step_MR).all() for step_MR in steps):
            return False
        ends = [
            RETRACTIONS[layer.retraction](Y_MR, to_tangent(Y_MR, step_MR))
            for layer, Y_MR, step_MR in zip(self.layers, self.before, steps, strict=True)
        ]
        self._put(self.vector, ends)
        for layer in self.layers:
            settle(layer)
        return True

    def is_still(self) -> bool:
        """See `Move`."""
        # As it is stored; what is not finite is equal to nothing, so it has moved.
        before = (Y_MR.to(self.vector.dtype).double() for Y_MR in self.before)
        return all(map(torch.equal, self._gather(self.vector), before))

    def undo(self) -> None:
        """See `Move`."""
        self._put(self.vector, self.before)

    def _gather(self, vector: Tensor) -> list[Tensor]:
        """The whole matrices, seen tall and in float64, of what lies in a vector like the optimizer's, everywhere."""
        layers = self.layers
        sizes = [layer.in_features * layer.out_features for layer in layers]
        whole = torch.zeros(sum(sizes), dtype=vector.dtype, device=layers[0].weight.device)
        flats = whole.split(sizes)
        for layer, flat in zip(layers, flats, strict=True):
            start, offset, size = piece_of(layer)
            flat[start : start + size] = vector[offset : offset + size]
        distributed.all_reduce(whole, group=process_group(layers[0].weight))
        return [layer.tall(flat.view(layer.whole_shape)).double() for layer, flat in zip(layers, flats, strict=True)]

    def _put(self, vector: Tensor, matrices: Iterable[Tensor]) -> None:
        """The inverse of `_gather`: write what this process holds of the matrices into its vector."""
        for layer, matrix in zip(self.layers, matrices, strict=True):
            start, offset, size = piece_of(layer)
            vector[offset : offset + size] = layer.tall(matrix).reshape(-1)[start : start + size]
