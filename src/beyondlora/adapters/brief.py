"""Modules called with the least Python: where a model writes word by word, calling them takes as long as their sums.

A projection of one token takes 3 µs, and 6 by `module(x)`: the call's ceremony, and every `self.weight` a search by
`nn.Module.__getattr__`. `call` goes by the dictionaries behind both, and gives way to the module where anybody watches.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

FEW = 2**15  # entries that take less time to write twice than to look whether once is enough


def is_brief(y_TM: Tensor) -> bool:
    """Small and without gradients, as when a model writes word by word: looking what to fuse would cost more."""
    return not torch.is_grad_enabled() and not is_recorded() and y_TM.numel() < FEW


def is_recorded() -> bool:
    """Whether a compiler or tracer writes down which modules are called."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def call(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) where no gradients are wanted.

    A module whose type has a static `product(x, weight)` is nothing but that.
    """
    if is_watched(module):
        return module(x)
    kind, weights = type(module), module._parameters
    if kind is nn.Linear and "weight" in weights:  # a wrapper may hold it elsewhere
        return F.linear(x, weights["weight"], weights["bias"])  # type: ignore[arg-type]
    product = getattr(kind, "product", None)
    if product is None or "weight" not in weights:
        return module.forward(x)
    return product(x, weights["weight"])


def is_watched(module: nn.Module) -> bool:
    """Whether anybody would notice, without gradients, that the module is not called."""
    state = module.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or state.get("_compiled_call_impl"):
        return True
    return "forward" in state or has_any_global_hook()  # the first is accelerate's way to move weights in and out


def weight_of(module: nn.Module) -> Tensor:
    """Its weight; see `_held`."""
    return _held(module, "weight")


def bias_of(module: nn.Module) -> Tensor | None:
    """Its bias, if it has one; see `_held`."""
    return _held(module, "bias")


def _held(module: nn.Module, name: str) -> Any:
    """A tensor that a wrapper may hold elsewhere than among the parameters.

    FSDP1 has a view there while it computes, `nn.DataParallel` a copy, a parametrization what it makes.
    """
    held = module._parameters
    return held[name] if name in held else getattr(module, name, None)
