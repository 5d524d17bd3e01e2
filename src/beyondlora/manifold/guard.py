"""Never silent: factors that moved without the step, and optimizers that cannot take it.

At a step a factor's version counter tells, at no cost, that nobody touched it since the last look; only where it moved
is YᵀY computed. Writing through `.data` does not move the counter: such a change is seen at the next save, merge or
export, which always look.
"""

import warnings
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .linear import PRECISE, StiefelLinear, is_cut_by_fsdp, is_cut_by_zero, weight_of
from .moves import refused_steps
from .pieces import is_cut, may_be_stepped
from .stiefel import distance_to_stiefel, polar_retraction

ROUNDED = 5e-6  # what float32 leaves
DRIFTED = 0.1  # beyond it, the nearest orthonormal matrix is a guess
PATIENCE = 10  # steps with a gradient that no optimizer takes

REFUSED = {  # part of a class's name -> why
    "LBFGS": "it evaluates the loss several times within one step, and every point but the first is off the manifold",
    "ScheduleFree": "it evaluates and saves an average of what it trains, and averages leave the manifold",
    "DummyOptim": "it is a placeholder for one that DeepSpeed makes, and was never replaced",
    "CPUOffloadOptimizer": "it steps copies of the weights on another device",
    "Lomo": "it steps weights inside the backward pass, without a call that could be answered",
}


def refuse_optimizer(kind: type) -> None:
    """Raise a ValueError for a kind of optimizer that cannot take the Riemannian step."""
    names = [base.__name__ for base in kind.__mro__]
    reason = next((why for part, why in REFUSED.items() if any(part in name for name in names)), None)
    if reason is not None:
        raise ValueError(
            f"{kind.__name__} cannot step Stiefel factors: {reason}. Take AdamW or another optimizer "
            "that steps the module's own parameters once a call, or give the factors a Euclidean geometry."
        )


def refuse_out_of_reach(layers: Iterable[StiefelLinear]) -> None:
    """Raise a ValueError for a factor that is trained as something else than its module's parameter.

    To be asked where an optimizer owns no factor: one that steps such parts cannot be told by what it owns.
    """
    for layer in layers:
        trained = layer.weight.requires_grad or any(made.requires_grad for made in layer.parameters())
        if trained and (why := _out_of_reach(layer)):
            raise ValueError(_cannot(layer, why))


def _cannot(layer: StiefelLinear, why: str) -> str:
    return (
        f"A Stiefel factor of shape {layer.whole_shape} cannot be stepped: {why}. Use DDP, FSDP or DeepSpeed's ZeRO, "
        "or give the factors a Euclidean geometry."
    )


def refuse_strays(owned: Iterable[StiefelLinear]) -> None:
    """Raise a ValueError for a weight that an optimizer owns and that is a part of one, of which nobody knows which."""
    for layer in owned:
        if is_cut_by_fsdp(layer):
            raise ValueError(_cannot(layer, f"its weight has become a flat shard of shape {tuple(layer.weight.shape)}"))


def _out_of_reach(layer: StiefelLinear) -> str | None:
    if is_cut(layer):
        if may_be_stepped(layer):
            return None
        if is_cut_by_zero(weight_of(layer)):
            return "DeepSpeed steps it in partitions, and not by an optimizer of ZeRO 1, 2 or 3"
        return "FSDP1 steps it in pieces, and this torch does not say which"
    if "weight" not in layer._parameters:
        return "its weight is made from other parameters (a parametrization), which are stepped"
    return None


def settle(layer: StiefelLinear) -> None:
    """Note that the factor is on the manifold now."""
    weight = weight_of(layer)
    vars(layer)["settled"] = (id(weight), weight._version)  # not by nn.Module's __setattr__, which takes its time


def check_layer(layer: StiefelLinear, *, again: bool = False) -> None:
    """Look at a factor that moved since the last look: bring it back and say so, or refuse it.

    Args:
        layer: of the factor.
        again: look even where nothing says that it moved.

    Raises: ValueError for a factor without data, or too far from the manifold to be brought back.
    """
    weight = weight_of(layer)
    if weight.is_meta:
        raise ValueError(
            f"A Stiefel factor of shape {tuple(weight.shape)} is on the meta device: it has no values to step. "
            "Materialise the model first (to_empty and load the weights)."
        )
    layer.restore_precision()
    if weight.is_inference() or (layer.settled == (id(weight), weight._version) and not again):
        return
    if is_cut_by_fsdp(layer):
        return  # processes look together, at the beginning of their step
    if not is_cut_by_zero(weight):
        refuse_out_of_reach([layer])
    elif weight.shape != layer.whole_shape or weight.dtype not in PRECISE:
        return  # ZeRO's float32 copies are what counts; a whole weight may be stepped plainly after it
    if isinstance(weight, DTensor):
        return  # processes look together, at the beginning of their step
    with torch.no_grad():
        _bring_back(layer, layer.orthonormal.detach())
    settle(layer)


def check_manifold(model: nn.Module) -> None:
    """`check_layer` for every Stiefel factor of a model that has values, whether it is known to have moved or not."""
    _say_what_was_refused()
    for module in model.modules():
        if isinstance(module, StiefelLinear) and not module.weight.is_meta:
            check_layer(module, again=True)


@torch.no_grad()
def check_state(model: nn.Module, state: dict[str, Any]) -> None:
    """`check_manifold` for weights about to be saved, which may have been gathered from elsewhere.

    What half precision has rounded is left: it is put back when it is loaded.
    """
    _say_what_was_refused()
    for name, module in model.named_modules():
        saved = state.get(f"{unwrapped(name)}.weight")
        if not isinstance(module, StiefelLinear) or not isinstance(saved, Tensor) or isinstance(saved, DTensor):
            continue
        if saved.dtype in (torch.float32, torch.float64) and not saved.is_meta:
            _bring_back(module, module.tall(saved.detach()))


def unwrapped(name: str) -> str:
    """A module's name as keys of state dicts have it: without what FSDP1's wrapper calls the module inside it."""
    return name.replace("_fsdp_wrapped_module.", "")


def _say_what_was_refused() -> None:
    count = refused_steps()
    if count:
        warnings.warn(
            f"{count} steps of single Stiefel factors were refused since the last save, and the factors stayed where "
            "they were: their gradients or steps were nan, infinite or absurdly large. Try a lower learning rate or "
            "gradient clipping.",
            stacklevel=4,
        )


def warn_of_used_gradients(gradients: list[Tensor]) -> None:
    """Warn of gradients that a step has converted already.

    The conversion works in place, so a second optimizer that owns the factor, or a second step without a backward pass,
    would convert it twice: what turns the factor within its subspace counts double then.
    """
    used = [
        gradient
        for gradient in gradients
        if getattr(gradient, "_used_at_version", None) == gradient._version and not isinstance(gradient, DTensor)
    ]  # a DTensor's counter stands still when its shards are written
    if used:
        warnings.warn(
            f"{len(used)} Stiefel factors are stepped on gradients that a step has used before: by a second optimizer "
            "that owns them too, or without a backward pass in between. Such gradients have been converted already, "
            "and parts of them count double. Give a factor to one optimizer; zero_grad and backward before each step.",
            stacklevel=4,
        )


def _bring_back(layer: StiefelLinear, Y_MR: Tensor) -> None:
    """Put the layer's factor, or a copy of it, back on the manifold, in place."""
    if must_return(layer, distance_to_stiefel(Y_MR).item()):
        Y_MR.copy_(polar_retraction(Y_MR, torch.zeros_like(Y_MR)))


def must_return(layer: StiefelLinear, distance: float) -> bool:
    """Whether a factor this far from the manifold is to be brought back, which is said; too far, it is refused."""
    if not distance <= DRIFTED:
        raise ValueError(_far(layer, distance))
    if distance <= ROUNDED:
        return False
    warnings.warn(
        f"A Stiefel factor of shape {layer.whole_shape} had left the manifold by {distance:.1e} without our step, and "
        "has been brought back to the nearest orthonormal matrix. Reasons: weights stored in half precision, an edit "
        "by hand, an optimizer that does not run torch's step hooks.",
        stacklevel=4,
    )
    return True


def _far(layer: StiefelLinear, distance: float) -> str:
    return (
        f"A Stiefel factor of shape {layer.whole_shape} is off the manifold by {distance:.1e} (max |YᵀY − I|): "
        "something moved it without the Riemannian step. Load a good checkpoint; step it with an optimizer that runs "
        "torch's step hooks; or, to keep these weights, project them yourself: "
        "weight.copy_(polar_retraction(weight, zeros))."
    )


class Unowned:
    """Notices trainable factors that no optimizer owns: of an adapter added after it was made, or stepped as copies."""

    def __init__(self) -> None:
        self._waits: weakref.WeakKeyDictionary[StiefelLinear, int] = weakref.WeakKeyDictionary()
        self._orthonormal: weakref.WeakSet[StiefelLinear] = weakref.WeakSet()  # when they began to wait

    def watch(
        self,
        optimizer: Optimizer,
        living: dict[StiefelLinear, Any],
        owned: list[StiefelLinear],
        cut: Collection[StiefelLinear],
    ) -> None:
        """Count a step for every living factor with a new gradient that no optimizer has owned yet; warn once.

        Those that are cut into vectors are left out, and those in a vector of its own are owned.

        A gradient that nobody adds to any more (computed once, to be looked at) is not waiting for a step.

        Raises: ValueError for a factor that has left the manifold meanwhile: a copy of it is being stepped.
        """
        weights = {id(weight_of(layer)) for layer in (*owned, *cut)}
        late = []
        for layer, weight in living.items():
            if layer.owned == id(weight) or not weight.requires_grad or is_cut_by_fsdp(layer):
                continue
            if id(weight) in weights:
                vars(layer)["owned"] = id(weight)
            elif _has_new_gradient(layer):
                self._waits[layer] = self._waits.get(layer, 0) + 1
                self._refuse_moved(layer, optimizer)
                late += [layer] if self._waits[layer] == PATIENCE else []
        if late:
            warnings.warn(
                f"{len(late)} Stiefel factors have had gradients for {PATIENCE} optimizer steps, and no optimizer that "
                "stepped owns them: they are not being trained. Was an adapter added after the optimizer was made? "
                "Make the optimizer from model.parameters() after the last adapter, or freeze what is not to train.",
                stacklevel=3,
            )

    def _refuse_moved(self, layer: StiefelLinear, optimizer: Optimizer) -> None:
        weight = layer.weight
        elsewhere = isinstance(weight, DTensor) or is_cut_by_zero(weight) or _out_of_reach(layer)
        if elsewhere or self._waits[layer] > PATIENCE:
            return
        distance = distance_to_stiefel(layer.orthonormal.detach()).item()
        if distance <= ROUNDED:
            self._orthonormal.add(layer)
        elif layer in self._orthonormal:
            raise ValueError(
                f"A Stiefel factor of shape {layer.whole_shape} has left the manifold by {distance:.1e} since "
                f"{type(optimizer).__name__} stepped last, and it does not own the factor: a copy of it is stepped and "
                "written back, as half-precision optimizers with master weights do (DeepSpeed's without ZeRO, apex's). "
                "Use DDP, FSDP or DeepSpeed's ZeRO, or give the factors a Euclidean geometry."
            )


def _has_new_gradient(layer: StiefelLinear) -> bool:
    """Whether the factor's gradient is another one, or more was added to it, since the last look."""
    gradient: Any = layer.weight.grad
    if gradient is None:
        return False
    seen, gradient._seen_at_version = getattr(gradient, "_seen_at_version", None), gradient._version
    return bool(seen != gradient._seen_at_version)
