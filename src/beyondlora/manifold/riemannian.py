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

import sys
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
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
from .pieces import Piece, cut_among, pieces_of
from .shards import plan_shards

_Key = tuple[tuple[int, int, torch.dtype, float, str], ...]


@dataclass(eq=False)
class _Step:
    """A step that has begun.

    Attributes:
        layers: the layers whose own weights are stepped.
        moves: how the layers are stepped.
        weights: what the optimizer steps.
        gradients: the converted gradients of those, each with its version counter.
        finite: whether the gradients are, as far as that is known.
        key: see `_key`.
        nested: whether the optimizer's step has called its parent class's within it.
    """

    layers: list[StiefelLinear]
    moves: list[Move] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[tuple[Tensor, int]] = field(default_factory=list)
    finite: bool = True
    key: _Key = ()
    nested: bool = False

    def is_begun_again(self, layers: list[StiefelLinear]) -> bool:
        """Whether these layers have the very gradients that it has converted, before it raised."""
        return (
            self.gradients != []
            and self.key == _key(layers)
            and all(
                weight.grad is gradient and _version(gradient) == version
                for weight, (gradient, version) in zip(self.weights, self.gradients, strict=True)
            )
        )


_steps: "weakref.WeakKeyDictionary[Optimizer, _Step]" = weakref.WeakKeyDictionary()
_plans: "weakref.WeakKeyDictionary[Optimizer, dict[_Key, list[Move]]]" = weakref.WeakKeyDictionary()
_unowned = Unowned()
_lock = threading.RLock()  # on what is above, and on looks at factors of others: none of them begins a step meanwhile
_handles: list[RemovableHandle] = []


def install() -> None:
    """Install the step hooks in this process. Calling it again does nothing."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        with _lock:
            known = _steps.get(optimizer)
            if known is not None and _calls_of(optimizer) > 1:
                known.nested = True
                return
            _steps.pop(optimizer, None)  # of a step that raised
            layers, pieces = _to_step(optimizer, [*args[1:], *kwargs.values()])
            if not layers and not pieces:
                return
            again = known is not None and not pieces and known.is_begun_again(layers)
            step = _steps[optimizer] = known if known is not None and again else _Step(layers)
        if not again:
            _begin(optimizer, step, pieces)


def _to_step(optimizer: Optimizer, arguments: list[Any]) -> tuple[list[StiefelLinear], list[list[Piece]]]:
    """The layers whose own weights the optimizer is about to step, and the pieces of others."""
    living = live_stiefel_layers()
    cut = cut_among(living)
    pieces = pieces_of(optimizer, cut)
    inside = {piece.layer for together in pieces for piece in together}
    owned = [layer for layer in _owned(optimizer, living) if layer not in inside]
    if not owned and not pieces:
        refuse_out_of_reach(layer for layer in living if layer in cut or "weight" not in layer._parameters)
    refuse_strays(layer for layer in owned if layer in cut)
    _unowned.watch(optimizer, living, owned, inside)
    # A frozen weight that still has a gradient is stepped, too: torch's optimizers ask no more of it.
    layers = [layer for layer in owned if weight_of(layer).requires_grad or weight_of(layer).grad is not None]
    if not layers and not pieces:
        return [], []
    # Before the look at gradients: there may be none yet, the closure makes them.
    _refuse_closure(optimizer, arguments)
    refuse_optimizer(type(optimizer))
    # Where an optimizer calls another one inside its step, the outer one takes the step of the weights they share.
    outer = [step for other, step in _steps.items() if _calls_of(other)]
    taken = {id(gradient) for step in outer for gradient, _ in step.gradients}
    gradients = [(layer, weight_of(layer).grad) for layer in layers]
    return [layer for layer, gradient in gradients if gradient is not None and id(gradient) not in taken], pieces


def _owned(optimizer: Optimizer, living: dict[StiefelLinear, Any]) -> list[StiefelLinear]:
    """The layers whose weight is one of the optimizer's parameters, each weight once."""
    # In the optimizer's order, so that every process and every run goes the same way.
    owned = dict.fromkeys(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    by_weight = {id(weight): layer for layer, weight in living.items() if id(weight) in owned}
    return [by_weight[weight] for weight in owned if weight in by_weight]


def _calls_of(optimizer: Optimizer) -> int:
    """How many calls of the optimizer's `step`, one inside the other, this thread is in: in none of one that raised.

    No hook is told of an error, and frames are looked for, not kept: they would keep whatever is around them.
    """
    calls, frame = 0, sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        # Of torch's own functions only: their variables may be read, those of others would live longer by it.
        if frame.f_globals.get("__name__") == Optimizer.__module__ and frame.f_locals.get("self") is optimizer:
            calls += 1
    return calls


def _begin(optimizer: Optimizer, step: _Step, pieces: list[list[Piece]]) -> None:
    for layer in step.layers:
        check_layer(layer)
    warn_of_used_gradients([weight_of(layer).grad for layer in step.layers])
    step.key = _key(step.layers)
    step.moves = [*map(Gathered, pieces), *_moves(optimizer, step.layers, step.key)]
    weights = [layer.weight for layer in step.layers] + [piece.vector for together in pieces for piece in together]
    with full_precision({weight.device.type for weight in weights}):
        finite = [move.begin() for move in step.moves]
    step.finite = all(finite)
    stepped = [(weight, weight.grad) for weight in dict.fromkeys(weights) if weight.grad is not None]
    step.weights = [weight for weight, _ in stepped]
    step.gradients = [(gradient, _version(gradient)) for _, gradient in stepped]
    for gradient, version in step.gradients[: len(step.layers)]:
        gradient._used_at_version = version  # type: ignore[attr-defined]


def _moves(optimizer: Optimizer, layers: list[StiefelLinear], key: _Key) -> list[Move]:
    """The moves for these layers, and their buffers: those of an earlier step where the key is the same.

    Of plans that share a weight the last is kept, so all buffers together are as large as those of one for all weights.
    """
    plans = _plans.get(optimizer, {})
    moves = plans.get(key)
    if moves is None:
        sharded = [layer for layer in layers if isinstance(layer.weight, DTensor)]
        whole = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
        others = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        others.difference_update(weight for weight, *_ in key)
        plans = {old: plans[old] for old in plans if others.issuperset(weight for weight, *_ in old)}
        _plans[optimizer] = plans  # those dropped are gone before the new buffers are made
        moves = plans[key] = [*plan_shards(sharded), *plan(whole)]
    return moves


def _key(layers: list[StiefelLinear]) -> _Key:
    """What the moves of these layers depend on."""
    return tuple(
        (id(weight), weight.data_ptr(), weight.dtype, layer.step_scale, layer.retraction)
        for layer, weight in zip(layers, map(weight_of, layers), strict=True)
    )


def _version(gradient: Tensor) -> int:
    """Its counter of writes; where it is in shards, that of the shard: the whole one's stands still."""
    return (gradient.to_local() if isinstance(gradient, DTensor) else gradient)._version


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = _steps.get(optimizer)
    if step is None or (step.nested and _calls_of(optimizer) > 1):
        return
    try:
        with torch.no_grad():
            # A gradient scaler lets a fused optimizer see that a gradient is infinite, and skip.
            if step.finite or not all(move.is_still() for move in step.moves):
                with full_precision({weight.device.type for weight in step.weights}):
                    _end(optimizer, step)
        for layer in step.layers:
            settle(layer)
    finally:
        with _lock:
            _steps.pop(optimizer, None)


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
