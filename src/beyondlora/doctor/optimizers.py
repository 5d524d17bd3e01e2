"""The optimizers that can be found, each tried on factors that have to stay orthonormal."""

import importlib
import importlib.util
import inspect
import io
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import nn

from ..evaluate import device
from ..manifold.linear import StiefelLinear
from ..manifold.stiefel import distance_to_stiefel
from .answer import Answer, WrongResultError, ask

HOMES = {  # what to call it -> the module that holds it, the package it comes with
    "torch": ("torch.optim", "torch"),
    "transformers": ("transformers.optimization", "transformers"),
    "bitsandbytes": ("bitsandbytes.optim", "bitsandbytes"),
    "torchao": ("torchao.optim", "torchao"),
    "schedule-free": ("schedulefree", "schedulefree"),
}


def probe_optimizers() -> dict[str, Answer]:
    """Every optimizer at hand: does it train a Stiefel factor, and does the factor stay on the manifold?"""
    found = {}
    for home, (module, package) in HOMES.items():
        if importlib.util.find_spec(package) is None:
            found[home] = Answer("absent", f"{package} is not installed")
            continue
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found |= _probe_home(home, module)
    return found


def _probe_home(home: str, module: str) -> dict[str, Answer]:
    """The answers of a package's optimizers, or its own where it is there and broken."""
    classes = list[tuple[str, type[torch.optim.Optimizer]]]()
    imported = ask(lambda: classes.extend(_classes(module)))
    if imported.state != "yes":
        return {home: imported}
    return {f"{home} {name}": ask(partial(_train_a_factor, optimizer_cls)) for name, optimizer_cls in classes}


def _classes(module: str) -> Iterator[tuple[str, type[torch.optim.Optimizer]]]:
    for name, member in sorted(vars(importlib.import_module(module)).items()):
        is_optimizer = inspect.isclass(member) and issubclass(member, torch.optim.Optimizer)
        is_optimizer = is_optimizer and member is not torch.optim.Optimizer and name == member.__name__
        if is_optimizer and name[0] != "_" and "Dummy" not in name:  # one that others step in place of
            yield name, member


def _train_a_factor(optimizer_cls: type[torch.optim.Optimizer]) -> None:
    """Five steps on a small regression; the factor must move and stay orthonormal."""
    torch.manual_seed(0)
    factor = StiefelLinear(4, 64).to(device())
    x, y = torch.randn(32, 4).to(device()), torch.randn(32, 64).to(device())
    before = factor.weight.detach().clone()
    optimizer = optimizer_cls(factor.parameters(), **_options(optimizer_cls))
    getattr(optimizer, "train", lambda: None)()  # schedule-free ones have two modes
    for _ in range(5):
        nn.functional.mse_loss(factor(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if (before - factor.weight).abs().max() < 1e-6:  # the way back to the manifold rounds
        raise WrongResultError("the factor did not move")
    distance = distance_to_stiefel(factor.orthonormal).item()
    if not distance < 1e-5:
        raise WrongResultError(f"the factor left the manifold by {distance:.1e}")


def _options(optimizer_cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """A learning rate, where the optimizer does not find its own, and momentum, without which some do nothing."""
    parameters = inspect.signature(optimizer_cls).parameters
    wanted = {"lr": 1e-2, "momentum": 0.9}
    return {
        name: value for name, value in wanted.items() if name in parameters and parameters[name].default is not None
    }
