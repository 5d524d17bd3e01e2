"""One step of some factors: the gradients before it, the factors after it, and the way back where it went wrong.

Which form a factor takes follows from its weight: float32 with the polar retraction is fast, in groups on a CPU and
stacked on other devices; everything else (float64, geodesics) is the definition of `stiefel.py`.
Buffers are kept from step to step: in all, the bytes of the factors and a fifth at most.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import fast
from .linear import StiefelLinear
from .stiefel import RETRACTIONS, riemannian_gradient, to_tangent


class Move(Protocol):
    """A step of one or several factors."""

    def begin(self) -> bool:
        """Remember where the factors are and convert their gradients; False if one is known not to be finite."""

    def end(self) -> bool:
        """Retract the optimizer's step; False if a value is not finite; the factors are then undefined."""

    def is_still(self) -> bool:
        """Whether the factors are where they were at the beginning, bit for bit."""

    def undo(self) -> None:
        """Put the factors back to where they were at the beginning."""


class Defined:
    """One factor, by the definitions: float64, geodesics."""

    def __init__(self, layer: StiefelLinear) -> None:
        self._layer = weakref.ref(layer)  # a plan outlives its step, and must not keep a model alive
        self.before = torch.empty_like(layer.orthonormal.detach())

    @property
    def layer(self) -> StiefelLinear:
        """The layer whose weight moves."""
        return _alive(self._layer)

    def begin(self) -> bool:
        """See `Move`."""
        self.before.copy_(self.layer.orthonormal)
        gradient = self.layer.tall(_gradient(self.layer.weight))
        gradient.copy_(riemannian_gradient(self.before, gradient))
        return bool(torch.isfinite(gradient).all())

    def end(self) -> bool:
        """See `Move`."""
        if not torch.isfinite(self.layer.weight).all():
            return False
        step = (self.layer.orthonormal.detach() - self.before) * self.layer.step_scale
        self.layer.orthonormal.copy_(RETRACTIONS[self.layer.retraction](self.before, to_tangent(self.before, step)))
        return True

    def is_still(self) -> bool:
        """See `Move`."""
        return torch.equal(self.layer.orthonormal, self.before)

    def undo(self) -> None:
        """See `Move`."""
        self.layer.orthonormal.copy_(self.before)


class _Kept:
    """Factors with a copy of each as it was at the beginning of the step; see `Move`."""

    after: list[Tensor]  # the factors themselves
    before: list[Tensor]

    def is_still(self) -> bool:
        """See `Move`."""
        return all(torch.equal(after, before) for after, before in zip(self.after, self.before, strict=True))

    def undo(self) -> None:
        """See `Move`."""
        torch._foreach_copy_(self.after, self.before)


class Group(_Kept):
    """Float32 factors of one shape and step scale on a CPU, together no larger than what a cache holds.

    Its weights and gradients are looked up once a step; `riemannian` makes a new plan when a weight is another one.
    """

    BYTES = 2**22

    def __init__(self, layers: list[StiefelLinear], scratch: Callable[[Tensor], Tensor]) -> None:
        self.weights = [layer.weight for layer in layers]  # which the optimizer owns: no model is kept alive
        self.after = [layer.orthonormal.detach() for layer in layers]
        self.before = [torch.empty_like(after) for after in self.after]
        self.scratch = scratch(self.after[0])
        self.scale = layers[0].step_scale
        self.is_tall = layers[0].out_features >= layers[0].in_features

    def begin(self) -> bool:
        """See `Move`."""
        totals = []
        for weight, before, after in zip(self.weights, self.before, self.after, strict=True):
            before.copy_(after)
            gradient = _gradient(weight)
            totals.append(fast.convert_gradient_(before, gradient if self.is_tall else gradient.mT))
        return bool(torch.isfinite(torch.stack(totals)).all())

    def end(self) -> bool:
        """See `Move`."""
        return fast.retract_(self.before, self.after, self.scale, self.scratch)


@dataclass
class _Share:
    """Some factors of one shape and step scale: what of a stack is worked on at once, seen tall.

    Attributes:
        part: which of the stack's factors.
        before: (B, M, R), where they are at the beginning of a step.
        scratch: (B, M, R), the same memory for all shares of a stack.
    """

    part: slice
    before: Tensor
    scratch: Tensor
    scale: float


class Stack(_Kept):
    """Float32 factors of one rank on a GPU: few launches, and no look at a value (but where it has no float64).

    The R×R work of all shapes is done together, what is as large as the factors in shares. A factor whose gradient or
    step is not finite stays where it was, without an error: raising one would mean waiting for the device at every
    step. Such steps are counted on the device, until `refused_steps` asks.
    """

    SHARES = 8  # the scratch is an eighth of the factors
    ROOTS = 80  # and each array of the R×R work an eightieth, or a MiB

    def __init__(self, layers: list[StiefelLinear]) -> None:
        """Make the buffers. Of layers of one shape and step scale, neighbours in the list are stepped together."""
        self.weights = [layer.weight for layer in layers]  # which the optimizer owns: no model is kept alive
        self.after = [weight.detach() for weight in self.weights]
        first, entries = self.after[0], sum(weight.numel() for weight in self.weights)
        self.flat = first.new_empty(max(entries // self.SHARES, *(weight.numel() for weight in self.weights)))
        self.before, self.scratch = list[Tensor](), list[Tensor]()
        self.shares = list(self._shares(layers))
        rank = min(first.shape)
        self.grams = first.new_empty((len(layers), rank, rank))
        size = max(1, max(2**20, entries * first.itemsize // self.ROOTS) // (8 * rank**2))
        self.pieces = [slice(i, i + size) for i in range(0, len(layers), size)]
        self.finite = torch.ones(len(layers), dtype=torch.bool, device=first.device)
        self.refused = _refused.setdefault(first.device, torch.zeros((), dtype=torch.int64, device=first.device))

    def begin(self) -> bool:
        """See `Move`."""
        torch._foreach_copy_(self.before, self.after)
        gradients = [_gradient(weight) for weight in self.weights]
        for share in self.shares:
            torch._foreach_copy_(self.scratch[share.part], gradients[share.part])
            fast.convert_gradients_stacked_(share.before, share.scratch, self.grams[share.part])
            torch._foreach_copy_(gradients[share.part], self.scratch[share.part])
        torch.all(self.grams.isfinite().flatten(1), dim=1, out=self.finite)
        return True

    def end(self) -> bool:
        """See `Move`. Nothing is known not to be finite, so this cannot fail, and cannot be undone."""
        for share in self.shares:
            torch._foreach_copy_(self.scratch[share.part], self.after[share.part])
            fast.project_stacked_(share.before, share.scratch, share.scale, self.grams[share.part])
            torch._foreach_copy_(self.after[share.part], self.scratch[share.part])
        for piece in self.pieces:
            self.grams[piece], self.finite[piece] = fast.inverse_roots_blind(self.grams[piece], self.finite[piece])
        self.refused += (~self.finite).sum()
        for share in self.shares:
            torch._foreach_copy_(self.scratch[share.part], self.after[share.part])
            fast.replace_stacked_(share.before, share.scratch, self.grams[share.part], self.finite[share.part])
        torch._foreach_copy_(self.after, self.before)
        return True

    def _shares(self, layers: list[StiefelLinear]) -> Iterator[_Share]:
        """Cut the factors into shares, and note a view of each one's place in `before` and `scratch`."""
        first = 0
        for _, alike in itertools.groupby(layers, key=_kind):
            left = list(alike)
            while left:
                size = self.flat.numel() // left[0].weight.numel()
                taken, left = left[:size], left[size:]
                shape = (len(taken), *taken[0].weight.shape)
                before = self.flat.new_empty(shape)
                scratch = self.flat[: before.numel()].view(shape)
                self.before += before.unbind()
                self.scratch += scratch.unbind()
                tall = taken[0].tall
                yield _Share(slice(first, first + len(taken)), tall(before), tall(scratch), taken[0].step_scale)
                first += len(taken)


# One for a device, for as long as the process lives: a stack may be gone when somebody asks. Made with the first stack,
# in the steps that are taken before a CUDA graph records one.
_refused: dict[torch.device, Tensor] = {}


def refused_steps() -> int:
    """How many steps of single factors all stacks have refused since the last call. Waits for their devices."""
    counts = [(counter, int(counter.item())) for counter in list(_refused.values())]
    for counter, count in counts:
        counter.sub_(count)
    return sum(count for _, count in counts)


def plan(layers: list[StiefelLinear]) -> list[Move]:
    """The moves that step these factors."""
    quick = sorted(filter(_is_fast, layers), key=_kind)
    on_cpu = [layer for layer in quick if layer.weight.device.type == "cpu"]
    stacked = sorted((layer for layer in quick if layer.weight.device.type != "cpu"), key=_rank_and_device)
    flat = torch.empty(max((layer.weight.numel() for layer in on_cpu), default=0), dtype=torch.float32, device="cpu")

    def scratch(like: Tensor) -> Tensor:
        """One for all groups, seen in the shape and the order of this one."""
        return flat.as_strided(like.shape, like.stride())

    moves: list[Move] = [Defined(layer) for layer in layers if not _is_fast(layer)]
    for _, kind in itertools.groupby(on_cpu, key=_kind):
        alike = list(kind)
        size = max(1, Group.BYTES // alike[0].weight.nbytes)
        moves += [Group(alike[i : i + size], scratch) for i in range(0, len(alike), size)]
    # Last: they cannot fail, and cannot be undone where something else does.
    return moves + [Stack(list(alike)) for _, alike in itertools.groupby(stacked, key=_rank_and_device)]


def _is_fast(layer: StiefelLinear) -> bool:
    return layer.weight.dtype == torch.float32 and layer.retraction == "polar"


def _kind(layer: StiefelLinear) -> tuple[tuple[int, ...], str, float]:
    return tuple(layer.weight.shape), str(layer.weight.device), layer.step_scale


def _rank_and_device(layer: StiefelLinear) -> tuple[int, str]:
    return min(layer.weight.shape), str(layer.weight.device)


def _alive(reference: "weakref.ref[StiefelLinear]") -> StiefelLinear:
    layer = reference()
    if layer is None:
        raise RuntimeError("A layer died while its optimizer stepped.")
    return layer


def _gradient(weight: Tensor) -> Tensor:
    gradient = weight.grad
    if gradient is None:
        raise RuntimeError("A Stiefel factor lost its gradient while its optimizer stepped.")
    return gradient
