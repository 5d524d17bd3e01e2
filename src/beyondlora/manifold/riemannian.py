"""The Riemannian step around any torch optimizer (arXiv 2510.01938, algorithm 1).

For a factor Y with Euclidean gradient G, around one step of the optimizer:

    before   G ← G − Y Gᵀ Y                  the Riemannian gradient of the canonical metric
    step     Y → Ỹ                           the optimizer's own business
    after    Δ ← (Ỹ − Y) · step_scale        gradient scaling
             Δ ← Δ − Y sym(YᵀΔ)              Adam and others rescale entry by entry: back to the tangent space
             Y ← retraction(Y, Δ)            back to the manifold

torch's global step hooks carry it to every optimizer: nothing to wrap, nothing to call. An optimizer that owns no
weight of a living `StiefelLinear` is left alone.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .linear import StiefelLinear, live_stiefel_layers
from .stiefel import RETRACTIONS, riemannian_gradient, to_tangent


@dataclass
class _Step:
    """A step that has begun.

    Attributes:
        starts: each layer with its Y before the step.
        gradients: the converted gradients, each with its version counter.
        depth: how many calls of `step` are inside one another (an optimizer's step may call its parent class's).
    """

    starts: list[tuple[StiefelLinear, Tensor]]
    gradients: list[tuple[Tensor, int]]
    depth: int = 1

    def is_running(self) -> bool:
        """False for what a step that raised has left behind: since then there have been new gradients."""
        return all(
            layer.weight.grad is gradient and gradient._version == version
            for (layer, _), (gradient, version) in zip(self.starts, self.gradients, strict=True)
        )


_steps: "weakref.WeakKeyDictionary[Optimizer, _Step]" = weakref.WeakKeyDictionary()
_handles: list[RemovableHandle] = []


def install() -> None:
    """Install the step hooks in this process. Calling it again does nothing."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def stiefel_layers_of(optimizer: Optimizer) -> list[StiefelLinear]:
    """The living Stiefel layers whose weight is one of the optimizer's parameters, each weight once."""
    layers = live_stiefel_layers()
    if not layers:
        return []
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return list({id(layer.weight): layer for layer in layers if id(layer.weight) in owned}.values())


def convert_gradient(layer: StiefelLinear) -> None:
    """Replace the gradient of the layer's weight by the Riemannian one, in place."""
    if layer.weight.grad is not None:
        gradient = layer.tall(layer.weight.grad)
        gradient.copy_(riemannian_gradient(layer.orthonormal.detach(), gradient))


def retract(layer: StiefelLinear, before: Tensor) -> None:
    """Turn the Euclidean step from `before` (the old Y) to the layer's weight into the Riemannian step, in place."""
    step = (layer.orthonormal.detach() - before) * layer.step_scale
    layer.orthonormal.copy_(RETRACTIONS[layer.retraction](before, to_tangent(before, step)))


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running = _steps.get(optimizer)
    if running is not None and running.is_running():
        running.depth += 1
        return
    _steps.pop(optimizer, None)  # of a step that raised
    layers = [layer for layer in stiefel_layers_of(optimizer) if layer.weight.requires_grad]
    if not layers:
        return
    # Before the look at gradients: there may be none yet, the closure makes them.
    _refuse_closure(optimizer, [*args[1:], *kwargs.values()])
    # Where an optimizer calls another one inside its step, the outer one takes the step of the weights they share.
    elsewhere = {id(gradient): version for step in _steps.values() for gradient, version in step.gradients}
    stepped = [
        (layer, layer.weight.grad)
        for layer in layers
        if layer.weight.grad is not None and elsewhere.get(id(layer.weight.grad)) != layer.weight.grad._version
    ]
    for layer, _ in stepped:
        convert_gradient(layer)
    if stepped:
        _steps[optimizer] = _Step(
            starts=[(layer, layer.orthonormal.detach().clone()) for layer, _ in stepped],
            gradients=[(gradient, gradient._version) for _, gradient in stepped],
        )


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = _steps.get(optimizer)
    if step is None:
        return
    step.depth -= 1
    if step.depth == 0:
        del _steps[optimizer]
        _refuse_infinite(optimizer, step)
        for layer, before in step.starts:
            retract(layer, before)


def _refuse_infinite(optimizer: Optimizer, step: _Step) -> None:
    """Put the factors back and raise if the optimizer has made one of them nan or infinite."""
    if all(torch.isfinite(layer.weight).all() for layer, _ in step.starts):
        return
    for layer, before in step.starts:
        layer.orthonormal.copy_(before)
    raise FloatingPointError(
        f"The step of {type(optimizer).__name__} made Stiefel factors nan or infinite: the loss or its gradient was. "
        "The factors have been put back to where they were before the step; other weights and the optimizer's state "
        "have not. Try a lower learning rate or gradient clipping, and go on from a checkpoint."
    )


def _refuse_closure(optimizer: Optimizer, arguments: Iterable[Any]) -> None:
    if any(callable(argument) for argument in arguments):
        raise ValueError(
            f"{type(optimizer).__name__}.step was called with a closure, and it owns Stiefel factors. A closure "
            "computes new gradients inside the step, after the point where they are converted to Riemannian ones, so "
            "the step would go the wrong way. Call loss.backward() and then optimizer.step() without a closure; an "
            "optimizer that cannot do so (LBFGS) needs factors with a Euclidean geometry."
        )
