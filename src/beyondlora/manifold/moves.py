"""One step of some factors: the gradients before it, the factors after it, and the way back where it went wrong.

Which form a factor takes follows from its weight: float32 with the polar retraction is fast, in groups on a CPU and
stacked on CUDA; everything else (float64, geodesics) is the definition of `stiefel.py`.
Buffers are kept from step to step: in all, the bytes of the factors and a fifth.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable
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
        """Retract the optimizer's step; False, and nothing promised, if it is known not to be finite."""

    def is_still(self) -> bool:
        """Whether the factors are where they were at the beginning, bit for bit."""

    def undo(self) -> None:
        """Put the factors back to where they were at the beginning."""


class Defined:
    """One factor, by the definitions: float64, geodesics, devices of other kinds."""

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


class Group:
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

    def is_still(self) -> bool:
        """See `Move`."""
        return all(torch.equal(after, before) for after, before in zip(self.after, self.before, strict=True))

    def undo(self) -> None:
        """See `Move`."""
        torch._foreach_copy_(self.after, self.before)


class Stack:
    """Float32 factors of one shape and step scale on CUDA: few launches, and no look at a value.

    A factor whose gradient or step is not finite stays where it was, without an error: raising one would mean waiting
    for the device at every step. `refused` counts such steps, on the device, until `refused_steps` asks.
    """

    SHARES = 5  # the scratch is a fifth of the stack

    def __init__(self, layers: list[StiefelLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        rows = layers[0].weight
        self.before = rows.new_empty((len(layers), *rows.shape), requires_grad=False)
        self.scratch = rows.new_empty((-(-len(layers) // self.SHARES), *rows.shape), requires_grad=False)
        self.finite = torch.ones(len(layers), dtype=torch.bool, device=rows.device)
        self.refused = torch.zeros((), dtype=torch.int64, device=rows.device)
        _stacks.add(self)

    @property
    def layers(self) -> list[StiefelLinear]:
        """The layers whose weights move."""
        return [_alive(layer) for layer in self._layers]

    def begin(self) -> bool:
        """See `Move`."""
        tall = self.layers[0].tall
        torch._foreach_copy_(list(self.before), [layer.weight.detach() for layer in self.layers])
        for part, stack in self._shares():
            gradients = [_gradient(layer.weight) for layer in self.layers[part]]
            torch._foreach_copy_(list(stack), gradients)
            self.finite[part] = fast.convert_gradients_stacked_(tall(self.before[part]), tall(stack))
            torch._foreach_copy_(gradients, list(stack))
        return True

    def end(self) -> bool:
        """See `Move`."""
        tall, scale = self.layers[0].tall, self.layers[0].step_scale
        for part, stack in self._shares():
            weights = [layer.weight.detach() for layer in self.layers[part]]
            torch._foreach_copy_(list(stack), weights)
            moved = fast.retract_stacked_(tall(self.before[part]), tall(stack), scale, self.finite[part])
            self.refused += (~moved).sum()
            torch._foreach_copy_(weights, list(self.before[part]))
        return True

    def is_still(self) -> bool:
        """See `Move`."""
        return all(torch.equal(layer.weight, kept) for layer, kept in zip(self.layers, self.before, strict=True))

    def undo(self) -> None:
        """See `Move`."""
        torch._foreach_copy_([layer.weight.detach() for layer in self.layers], list(self.before))

    def _shares(self) -> Iterable[tuple[slice, Tensor]]:
        size, count = len(self.scratch), len(self.before)
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            yield part, self.scratch[: part.stop - part.start]


_stacks: "weakref.WeakSet[Stack]" = weakref.WeakSet()


def refused_steps() -> int:
    """How many steps of single factors all stacks have refused since the last call. Waits for their devices."""
    count = sum(int(stack.refused.item()) for stack in _stacks)
    for stack in _stacks:
        stack.refused.zero_()
    return count


def plan(layers: list[StiefelLinear]) -> list[Move]:
    """The moves that step these factors."""
    quick = sorted(filter(_is_fast, layers), key=_kind)
    largest = max((layer.weight.numel() for layer in quick), default=0)
    flat: dict[torch.device, Tensor] = {}

    def scratch(like: Tensor) -> Tensor:
        """One for all groups of a device, seen in the shape and the order of this one."""
        if like.device not in flat:
            flat[like.device] = torch.empty(largest, device=like.device)
        return flat[like.device].as_strided(like.shape, like.stride())

    moves: list[Move] = [Defined(layer) for layer in layers if not _is_fast(layer)]
    for (_, device, _), kind in itertools.groupby(quick, key=_kind):
        alike = list(kind)
        if device == "cpu":
            size = max(1, Group.BYTES // alike[0].weight.nbytes)
            moves += [Group(alike[i : i + size], scratch) for i in range(0, len(alike), size)]
        else:
            moves.append(Stack(alike))
    return moves


def _is_fast(layer: StiefelLinear) -> bool:
    weight = layer.weight
    return weight.dtype == torch.float32 and layer.retraction == "polar" and weight.device.type in ("cpu", "cuda")


def _kind(layer: StiefelLinear) -> tuple[tuple[int, ...], str, float]:
    return tuple(layer.weight.shape), str(layer.weight.device), layer.step_scale


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
