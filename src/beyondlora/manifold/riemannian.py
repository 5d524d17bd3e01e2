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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .fast import full_precision
from .gathered import Gathered
from .guard import (
    Unowned,
    check_layer,
    refuse_optimizer,
    refuse_out_of_reach,
    refuse_strays,
    settle,
    warn_of_used_gradients,
)
from .linear import StiefelLinear, live_stiefel_layers, weight_of
from .moves import Move, plan
from .pieces import Piece, is_cut, pieces_of
from .shards import plan_shards


@dataclass
class _Step:
    """A step that has begun.

    Attributes:
        layers: the layers whose own weights are stepped.
        moves: how each is stepped.
        weights: what the optimizer steps.
        gradients: the converted gradients of those, each with its version counter.
        finite: whether the gradients are, as far as that is known.
        depth: how many calls of `step` are inside one another (an optimizer's step may call its parent class's).
    """

    layers: list[StiefelLinear]
    moves: list[Move]
    weights: list[Tensor]
    gradients: list[tuple[Tensor, int]]
    finite: bool
    depth: int = 1

    def is_running(self) -> bool:
        """False for what a step that raised has left behind: since then there have been new gradients."""
        return all(
            weight.grad is gradient and gradient._version == version
            for weight, (gradient, version) in zip(self.weights, self.gradients, strict=True)
        )


@dataclass
class _Plan:
    """The moves of an optimizer's last step, with their buffers, and which weights they are for."""

    weights: list[tuple[int, int, torch.dtype, float, str]]
    moves: list[Move]


_steps: "weakref.WeakKeyDictionary[Optimizer, _Step]" = weakref.WeakKeyDictionary()
_plans: "weakref.WeakKeyDictionary[Optimizer, _Plan]" = weakref.WeakKeyDictionary()
_unowned = Unowned()
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
    by_weight = {id(weight_of(layer)): layer for layer in layers}
    # In the optimizer's order, not the set's, so that every process and every run goes the same way.
    owned = dict.fromkeys(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return [by_weight[weight] for weight in owned if weight in by_weight]


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running = _steps.get(optimizer)
    if running is not None and running.is_running():
        running.depth += 1
        return
    _steps.pop(optimizer, None)  # of a step that raised
    cut = {layer for layer in live_stiefel_layers() if is_cut(layer)}
    pieces = pieces_of(optimizer, cut)
    inside = {piece.layer for together in pieces for piece in together}
    owned = [layer for layer in stiefel_layers_of(optimizer) if layer not in inside]
    if not owned and not pieces:
        refuse_out_of_reach(live_stiefel_layers())
    refuse_strays(layer for layer in owned if layer in cut)
    _unowned.watch(optimizer, owned, inside)
    layers = [layer for layer in owned if weight_of(layer).requires_grad]
    if not layers and not pieces:
        return
    # Before the look at gradients: there may be none yet, the closure makes them.
    _refuse_closure(optimizer, [*args[1:], *kwargs.values()])
    refuse_optimizer(optimizer)
    # Where an optimizer calls another one inside its step, the outer one takes the step of the weights they share.
    elsewhere = {id(gradient): version for step in _steps.values() for gradient, version in step.gradients}
    gradients = [(layer, weight_of(layer).grad) for layer in layers]
    stepped = [
        layer
        for layer, gradient in gradients
        if gradient is not None and elsewhere.get(id(gradient)) != gradient._version
    ]
    if stepped or pieces:
        _begin(optimizer, stepped, pieces)


def _begin(optimizer: Optimizer, layers: list[StiefelLinear], pieces: list[list[Piece]]) -> None:
    for layer in layers:
        check_layer(layer)
    warn_of_used_gradients([weight_of(layer).grad for layer in layers])
    moves = [*map(Gathered, pieces), *_moves(optimizer, layers)]
    weights = [layer.weight for layer in layers] + [piece.vector for together in pieces for piece in together]
    with full_precision({weight.device.type for weight in weights}):
        finite = [move.begin() for move in moves]
    stepped = [(weight, weight.grad) for weight in dict.fromkeys(weights) if weight.grad is not None]
    gradients = [(gradient, gradient._version) for _, gradient in stepped]
    _steps[optimizer] = _Step(layers, moves, [weight for weight, _ in stepped], gradients, finite=all(finite))
    for gradient, version in gradients[: len(layers)]:
        gradient._used_at_version = version  # type: ignore[attr-defined]


def _moves(optimizer: Optimizer, layers: list[StiefelLinear]) -> list[Move]:
    """The moves for these layers: those of the last step where the weights are the same, buffers and all."""
    weights = [
        (id(weight), weight.data_ptr(), weight.dtype, layer.step_scale, layer.retraction)
        for layer, weight in zip(layers, map(weight_of, layers), strict=True)
    ]
    known = _plans.get(optimizer)
    if known is None or known.weights != weights:
        sharded = [layer for layer in layers if isinstance(layer.weight, DTensor)]
        whole = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
        known = _plans[optimizer] = _Plan(weights, [*plan_shards(sharded), *plan(whole)])
    return known.moves


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = _steps.get(optimizer)
    if step is None:
        return
    step.depth -= 1
    if step.depth == 0:
        del _steps[optimizer]
        # A gradient scaler lets a fused optimizer see that a gradient is infinite, and skip.
        if step.finite or not all(move.is_still() for move in step.moves):
            with full_precision({weight.device.type for weight in step.weights}):
                _end(optimizer, step)
        for layer in step.layers:
            settle(layer)


def _end(optimizer: Optimizer, step: _Step) -> None:
    """Retract, or put every factor back and raise if the optimizer has made one of them nan or infinite."""
    if step.finite and all(move.end() for move in step.moves):
        return
    for move in step.moves:
        move.undo()
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
