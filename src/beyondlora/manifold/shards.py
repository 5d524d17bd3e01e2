"""Factors in shards over processes (DTensor, as FSDP2 makes them): the step on rows of Y, R×R sums between processes.

YᵀY, GᵀY, YᵀΔ and ZᵀZ are sums over the rows of Y, so a process that holds some rows needs none of the others: the R×R
matrices of all factors travel in one all-reduce. FSDP2 cuts a weight along its first dimension, which are the rows of Y
where it is tall; a wide one changes its columns for rows and back, by a redistribution of the factor's size.

Every decision follows from such a sum, so that all processes take it alike: a collective call that one of them left out
would leave the others waiting for ever.

In float64, as `stiefel.py`. Legend: K factors, M rows of Y that are here, R columns (rank).
"""

import itertools
import weakref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .guard import must_return
from .linear import StiefelLinear
from .moves import Move, _alive, _gradient
from .stiefel import RETRACTIONS, sym


class Shards:
    """A step of factors that have one rank and one retraction, cut alike; see `Move`."""

    def __init__(self, layers: list[StiefelLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self.before: list[Tensor] = []

    @property
    def layers(self) -> list[StiefelLinear]:
        """The layers whose weights move."""
        return [_alive(layer) for layer in self._layers]

    def begin(self) -> bool:
        """See `Move`. Factors that have left the manifold are brought back or refused here, for all processes alike."""
        layers = self.layers
        Ys = [_rows(layer, layer.weight) for layer in layers]
        Gs = [_rows(layer, _gradient(layer.weight)) for layer in layers]
        sums = self._sum([Y_MR.mT @ Y_MR for Y_MR in Ys] + [G_MR.mT @ Y_MR for Y_MR, G_MR in zip(Ys, Gs, strict=True)])
        grams_KRR, products_KRR = sums.chunk(2)
        off_K = (grams_KRR - _eye_like(grams_KRR)).abs().amax(dim=(-2, -1)).tolist()
        for number, (layer, off) in enumerate(zip(layers, off_K, strict=True)):
            if must_return(layer, off):
                root_RR, _ = _inverse_roots(grams_KRR[number])
                Ys[number] = Ys[number] @ root_RR
                products_KRR[number] = products_KRR[number] @ root_RR
                _put(layer, layer.weight, Ys[number])
        self.before = Ys
        for layer, Y_MR, G_MR, product_RR in zip(layers, Ys, Gs, products_KRR, strict=True):
            _put(layer, _gradient(layer.weight), G_MR - Y_MR @ product_RR)
        return bool(torch.isfinite(products_KRR).all())  # nan and infinity survive every product and sum

    def end(self) -> bool:
        """See `Move`."""
        layers = self.layers
        steps = [
            (_rows(layer, layer.weight) - Y_MR) * layer.step_scale
            for layer, Y_MR in zip(layers, self.before, strict=True)
        ]
        products_KRR = self._sum([Y_MR.mT @ step for Y_MR, step in zip(self.before, steps, strict=True)])
        if not torch.isfinite(products_KRR).all():
            return False
        tangents = [
            step - Y_MR @ sym(product_RR)
            for Y_MR, step, product_RR in zip(self.before, steps, products_KRR, strict=True)
        ]
        for layer, after_MR in zip(layers, self._retract(layers, tangents), strict=True):
            _put(layer, layer.weight, after_MR)
        return True

    def is_still(self) -> bool:
        """See `Move`."""
        moved = [
            (_rows(layer, layer.weight) != Y_MR).any().double()
            for layer, Y_MR in zip(self.layers, self.before, strict=True)
        ]
        return not self._sum(moved).any()

    def undo(self) -> None:
        """See `Move`."""
        for layer, Y_MR in zip(self.layers, self.before, strict=True):
            _put(layer, layer.weight, Y_MR)

    def _retract(self, layers: list[StiefelLinear], tangents: list[Tensor]) -> list[Tensor]:
        ends = [Y_MR + xi_MR for Y_MR, xi_MR in zip(self.before, tangents, strict=True)]
        roots, usable = [], [False] * len(layers)
        if layers[0].retraction == "polar":
            roots_KRR, usable_K = _inverse_roots(self._sum([Z_MR.mT @ Z_MR for Z_MR in ends]))
            roots, usable = list(roots_KRR), usable_K.tolist()
        return [
            ends[number] @ roots[number] if fine else _retract_whole(layer, self.before[number], tangents[number])
            for number, (layer, fine) in enumerate(zip(layers, usable, strict=True))
        ]

    def _sum(self, matrices: list[Tensor]) -> Tensor:
        """Stack matrices, and add up over the processes that hold other rows."""
        weight = _in_shards(self.layers[0].weight)
        parts = [Replicate() if isinstance(cut, Replicate) else Partial() for cut in weight.placements]
        return DTensor.from_local(torch.stack(matrices), weight.device_mesh, parts).full_tensor()


def plan_shards(layers: list[StiefelLinear]) -> list[Move]:
    """The moves that step these factors, all of them in shards."""

    def kind(layer: StiefelLinear) -> tuple[str, ...]:
        weight, rank = _in_shards(layer.weight), min(layer.in_features, layer.out_features)
        copies = [isinstance(cut, Replicate) for cut in weight.placements]
        return tuple(map(str, (rank, layer.retraction, weight.device_mesh, copies)))

    order = sorted(layers, key=kind)  # stable, so the same on every process
    return [Shards(list(group)) for _, group in itertools.groupby(order, key=kind)]


def _inverse_roots(grams_KRR: Tensor) -> tuple[Tensor, Tensor]:
    """gram^{-1/2}, and where they can be used: not where small eigenvalues have drowned in a huge step's rounding."""
    eigenvalues_KR, Q_KRR = torch.linalg.eigh(grams_KRR)
    roots_KRR = (Q_KRR * eigenvalues_KR.rsqrt().unsqueeze(-2)) @ Q_KRR.mT
    return roots_KRR, eigenvalues_KR[..., 0] > torch.finfo(grams_KRR.dtype).eps ** 0.5 * eigenvalues_KR[..., -1]


def _retract_whole(layer: StiefelLinear, Y_MR: Tensor, xi_MR: Tensor) -> Tensor:
    """Retract on every process alike, with all rows gathered: geodesics, and steps of absurd size."""
    weight = _in_shards(layer.weight)
    mesh, cut = weight.device_mesh, _cut_in_rows(layer, weight)

    def whole(rows_MR: Tensor) -> Tensor:
        local = layer.tall(rows_MR).contiguous()
        gathered = DTensor.from_local(local, mesh, cut, shape=weight.shape, stride=weight.stride())
        return layer.tall(gathered.full_tensor())

    end = layer.tall(RETRACTIONS[layer.retraction](whole(Y_MR), whole(xi_MR))).contiguous()
    everywhere = DTensor.from_local(end, mesh, [Replicate()] * mesh.ndim)
    return layer.tall(everywhere.redistribute(placements=cut).to_local())


def _cut_in_rows(layer: StiefelLinear, tensor: DTensor) -> list[Placement]:
    """The placements of a weight or gradient that leave every process whole rows of Y."""
    rows = 0 if layer.out_features >= layer.in_features else 1
    return [cut if isinstance(cut, Replicate) else Shard(rows) for cut in tensor.placements]


def _rows(layer: StiefelLinear, tensor: Tensor) -> Tensor:
    """A copy of the rows of Y, or of a gradient at Y, that belong to this process, in float64."""
    shards = _in_shards(tensor)
    rows = shards.redistribute(placements=_cut_in_rows(layer, shards)).to_local()
    return layer.tall(rows).to(torch.float64, copy=True)


def _put(layer: StiefelLinear, tensor: Tensor, rows_MR: Tensor) -> None:
    """The inverse of `_rows`: write rows into a weight or gradient."""
    shards, local = _in_shards(tensor), layer.tall(rows_MR).to(tensor.dtype).contiguous()
    cut, shape, stride = _cut_in_rows(layer, shards), shards.shape, shards.stride()
    rows = DTensor.from_local(local, shards.device_mesh, cut, shape=shape, stride=stride)
    shards.to_local().copy_(rows.redistribute(placements=shards.placements).to_local())


def _in_shards(tensor: Tensor) -> DTensor:
    if not isinstance(tensor, DTensor):
        raise TypeError("A Stiefel factor was in shards and is a plain tensor within one step.")
    return tensor


def _eye_like(A_KRR: Tensor) -> Tensor:
    return torch.eye(A_KRR.shape[-1], dtype=A_KRR.dtype, device=A_KRR.device)
