"""The step: any torch optimizer on StelLA's factors follows the paper's algorithm 1, and nothing else is touched.

The oracle is `reference.RiemannianReference` on a chain of layers whose gradients are worked out by hand in NumPy.
Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank.
"""

import collections
import copy
import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from beyondlora.adapters import StellaAdapter
from beyondlora.manifold import StiefelLinear, distance_to_stiefel, moves, riemannian

Array = np.ndarray
STEPS, TOLERANCE = 50, 1e-8  # rounding 1e-16, grown over 50 steps of optimizers that divide by small moments
FLOAT32 = 1e-5  # the same from a rounding of 1e-7; 1.4e-6 seen


@dataclass(frozen=True)
class LayerSpec:
    N: int
    M: int
    R: int
    diag_s: bool
    hidden: float | None  # d of the gradient scaling; None is off


# U and V tall, square (6×6) and a sphere (R = 1); dense and diagonal S; gradient scaling on and off.
LAYERS = [LayerSpec(7, 10, 3, False, 16.0), LayerSpec(10, 6, 6, True, None), LayerSpec(6, 8, 1, False, 3.0)]
TOKENS, SCALING = 12, 0.8


class Chain(nn.Module):
    """Frozen layers with StelLA beside them, one behind the other, and the mean squared distance to targets."""

    def __init__(
        self,
        retraction: Any = "polar",
        seed: int = 0,
        layers: list[LayerSpec] = LAYERS,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.bases, self.adapters = nn.ModuleList(), nn.ModuleList()
        for spec in layers:
            base = nn.Linear(spec.N, spec.M, bias=False, dtype=dtype)
            self.bases.append(base.requires_grad_(False))
            self.adapters.append(
                StellaAdapter(
                    spec.N,
                    spec.M,
                    spec.R,
                    scaling=SCALING,
                    diag_s=spec.diag_s,
                    retraction=retraction,
                    grad_scaling=spec.hidden,
                    dtype=dtype,
                )
            )
        self.x = torch.randn(TOKENS, layers[0].N, dtype=dtype)
        self.target = torch.randn(TOKENS, layers[-1].M, dtype=dtype)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        h = self.x[rows]
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            h = base(h) + adapter(h)
        return ((h - self.target[rows]) ** 2).sum() / (2 * TOKENS)

    def factors(self) -> list[Array]:
        """U, S, V of every layer, as copies; Stiefel factors stand upright."""
        found = []
        for adapter in self.adapters:
            found += [adapter.up.orthonormal, adapter.core.weight, adapter.down.orthonormal]
        return [factor.detach().numpy().copy() for factor in found]


class NumpyChain:
    """The same chain with the gradients of U, S and V from the chain rule, by hand."""

    def __init__(self, chain: Chain) -> None:
        self.W0 = [base.weight.numpy().astype(np.float64) for base in chain.bases]
        self.x, self.target = (rows.numpy().astype(np.float64) for rows in (chain.x, chain.target))
        self.params = [factor.astype(np.float64) for factor in chain.factors()]

    def gradients(self) -> list[Array]:
        inputs_TN, h = [], self.x
        triples = [self.params[i : i + 3] for i in range(0, len(self.params), 3)]
        for W0, (U, S, V) in zip(self.W0, triples, strict=True):
            inputs_TN.append(h)
            h = h @ (W0 + SCALING * U @ dense(S) @ V.T).T
        upstream_TM = (h - self.target) / TOKENS
        found: list[Array] = []
        for W0, (U, S, V), x in zip(reversed(self.W0), reversed(triples), reversed(inputs_TN), strict=True):
            dW_MN = SCALING * upstream_TM.T @ x  # gradient of the loss for s · U S Vᵀ, times s
            dS_RR = U.T @ dW_MN @ V
            found = [
                dW_MN @ V @ dense(S).T,
                np.diag(dS_RR).copy() if S.ndim == 1 else dS_RR,
                dW_MN.T @ U @ dense(S),
                *found,
            ]
            upstream_TM = upstream_TM @ (W0 + SCALING * U @ dense(S) @ V.T)
        return found

    def scales(self) -> list[float | None]:
        return [
            scale
            for spec in LAYERS
            for scale in (
                1.0 if spec.hidden is None else reference.hidden_size_scale(spec.hidden, spec.M),
                None,
                1.0 if spec.hidden is None else reference.hidden_size_scale(spec.hidden, spec.N),
            )
        ]


def dense(S: Array) -> Array:
    return np.diag(S) if S.ndim == 1 else S


def train(chain: Chain, optimizer: Optimizer, steps: int = STEPS, *, set_to_none: bool = True) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none)
        chain.loss().backward()
        optimizer.step()


def trained_reference(chain: Chain, optimizer: Any, retraction: Any = "polar", steps: int = STEPS) -> list[Array]:
    """What the paper's algorithm makes of the chain's present factors."""
    twin = NumpyChain(chain)
    algorithm = reference.RiemannianReference(optimizer, step_scale=twin.scales(), retraction=retraction)
    for _ in range(steps):
        algorithm.step(twin.params, twin.gradients())
    return twin.params


def assert_same(chain: Chain, expected: list[Array], atol: float = TOLERANCE) -> None:
    for ours, theirs in zip(chain.factors(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def stiefel_weights(chain: Chain) -> list[nn.Parameter]:
    return [layer.weight for layer in chain.modules() if isinstance(layer, StiefelLinear)]


# ------------------------------------------------------------------------------------------------ the algorithm


def test_the_gradients_by_hand_are_autograds() -> None:
    chain = Chain()
    chain.loss().backward()
    by_hand = iter(NumpyChain(chain).gradients())
    for adapter in chain.adapters:
        for module in (adapter.up, adapter.core, adapter.down):
            gradient = module.tall(module.weight.grad) if isinstance(module, StiefelLinear) else module.weight.grad
            np.testing.assert_allclose(gradient.numpy(), next(by_hand), rtol=0, atol=1e-13)


OPTIMIZERS: dict[str, tuple[Any, type[Optimizer], dict[str, Any]]] = {
    "sgd": (reference.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (reference.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.1}),
    "sgd-nesterov": (reference.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "sgd-l2": (reference.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "adam": (reference.Adam, torch.optim.Adam, {"lr": 0.01}),
    "adam-l2": (reference.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (reference.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    "rmsprop": (reference.RMSprop, torch.optim.RMSprop, {"lr": 0.003}),
    "adagrad": (reference.Adagrad, torch.optim.Adagrad, {"lr": 0.05}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_retractions = pytest.mark.parametrize("retraction", ["polar", "exp_map"])


@both_retractions
@every_optimizer
def test_training_follows_the_papers_algorithm(name: str, retraction: Any) -> None:
    make_reference, make, options = OPTIMIZERS[name]
    chain = Chain(retraction)
    start, first = chain.factors(), chain.loss().item()
    expected = trained_reference(chain, make_reference(**options), retraction)
    train(chain, make(chain.adapters.parameters(), **options))
    assert_same(chain, expected)
    assert chain.loss().item() < 0.9 * first  # it trains
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(chain.factors(), start, strict=True))  # every factor moved
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-14 for a in chain.adapters for layer in (a.up, a.down))


@every_optimizer
def test_in_float32_the_fast_step_follows_it_to_float32s_rounding(name: str) -> None:
    make_reference, make, options = OPTIMIZERS[name]
    chain = Chain(dtype=torch.float32)
    expected = trained_reference(chain, make_reference(**options))
    train(chain, make(chain.adapters.parameters(), **options))
    assert_same(chain, expected, atol=FLOAT32)
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-6 for a in chain.adapters for layer in (a.up, a.down))


IMPLEMENTATIONS = [
    (name, {kind: value})
    for name in ("sgd-momentum", "adam", "adamw", "rmsprop", "adagrad")
    for kind, value in (("foreach", True), ("foreach", False), ("fused", True))
    if not (name == "rmsprop" and kind == "fused")  # torch has none
]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS, ids=str)
def test_foreach_and_fused_implementations_take_the_same_step(name: str, implementation: dict[str, bool]) -> None:
    make_reference, make, options = OPTIMIZERS[name]
    chain = Chain()
    expected = trained_reference(chain, make_reference(**options), steps=20)
    train(chain, make(chain.adapters.parameters(), **options, **implementation), steps=20)
    assert_same(chain, expected)


def test_gradient_accumulation() -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.AdamW(0.01), steps=20)
    optimizer = torch.optim.AdamW(chain.adapters.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
            chain.loss(rows).backward()
        optimizer.step()
    assert_same(chain, expected)


def test_gradients_zeroed_in_place() -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=10)
    train(chain, torch.optim.SGD(chain.adapters.parameters(), 0.1), steps=10, set_to_none=False)
    assert_same(chain, expected)


def test_learning_rate_schedule() -> None:
    chain = Chain()
    optimizer = torch.optim.AdamW(chain.adapters.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * 0.97**step)
    twin, inner = NumpyChain(chain), reference.AdamW()
    algorithm = reference.RiemannianReference(inner, step_scale=twin.scales())
    for step in range(STEPS):
        inner.lr = 0.02 * min(1.0, (step + 1) / 5) * 0.97**step
        algorithm.step(twin.params, twin.gradients())
        optimizer.zero_grad()
        chain.loss().backward()
        optimizer.step()
        schedule.step()
    assert_same(chain, twin.params)


def test_parameter_groups_keep_their_own_options() -> None:
    chain = Chain()
    slow, fast = {"lr": 0.002, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.2}
    cores = [adapter.core.weight for adapter in chain.adapters]
    optimizer = torch.optim.AdamW([{"params": stiefel_weights(chain), **slow}, {"params": cores, **fast}])
    twin = NumpyChain(chain)
    is_core = [scale is None for scale in twin.scales()]
    algorithms = {
        core: reference.RiemannianReference(
            reference.AdamW(**options),
            step_scale=[scale for scale in twin.scales() if (scale is None) == core],
        )
        for core, options in ((False, slow), (True, fast))
    }
    for _ in range(STEPS):
        gradients = twin.gradients()
        for core, algorithm in algorithms.items():
            mine = [i for i, flag in enumerate(is_core) if flag == core]
            algorithm.step([twin.params[i] for i in mine], [gradients[i] for i in mine])
    train(chain, optimizer)
    assert_same(chain, twin.params)


def test_a_saved_and_loaded_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.AdamW(0.01), steps=20)
    optimizer = torch.optim.AdamW(chain.adapters.parameters(), 0.01)
    train(chain, optimizer, steps=10)
    resumed, other = Chain(seed=5), torch.optim.AdamW
    resumed.load_state_dict(chain.state_dict())
    resumed.x, resumed.target = chain.x, chain.target
    loaded = other(resumed.adapters.parameters(), 0.01)
    loaded.load_state_dict(optimizer.state_dict())
    train(resumed, loaded, steps=10)
    assert_same(resumed, expected)


def test_a_deep_copy_of_the_model_with_a_new_optimizer() -> None:
    original = Chain()
    expected = trained_reference(original, reference.Adam(0.01), steps=20)
    before = original.factors()
    chain = copy.deepcopy(original)
    train(chain, torch.optim.Adam(chain.adapters.parameters(), 0.01), steps=20)
    assert_same(chain, expected)
    assert_same(original, before, atol=0)


def test_a_deep_copy_of_model_and_optimizer_together() -> None:
    chain = Chain()
    optimizer = torch.optim.Adam(chain.adapters.parameters(), 0.01)
    expected = trained_reference(chain, reference.Adam(0.01), steps=20)
    train(chain, optimizer, steps=10)
    chain, optimizer = copy.deepcopy((chain, optimizer))
    train(chain, optimizer, steps=10)
    assert_same(chain, expected)


def test_a_weight_shared_by_two_modules_takes_one_step() -> None:
    torch.manual_seed(0)
    one, other = (StiefelLinear(3, 8, dtype=torch.float64) for _ in range(2))
    other.weight = one.weight
    Y = [one.weight.detach().numpy().copy()]
    inner = reference.SGD(0.1, momentum=0.9)
    algorithm = reference.RiemannianReference(inner, step_scale=[1.0])
    optimizer = torch.optim.SGD(nn.ModuleList([one, other]).parameters(), 0.1, momentum=0.9)
    for _ in range(10):
        G = torch.randn(8, 3, dtype=torch.float64)
        one.weight.grad = G.clone()
        optimizer.step()
        algorithm.step(Y, [G.numpy()])
    np.testing.assert_allclose(one.weight.detach().numpy(), Y[0], rtol=0, atol=1e-12)


@both_retractions
def test_decoupled_weight_decay_does_not_reach_the_factors(retraction: Any) -> None:
    decayed, plain = Chain(retraction), Chain(retraction)
    for chain, decay in ((decayed, 0.5), (plain, 0.0)):
        cores = [adapter.core.weight for adapter in chain.adapters]
        groups = [{"params": stiefel_weights(chain), "weight_decay": decay}, {"params": cores, "weight_decay": 0.0}]
        train(chain, torch.optim.AdamW(groups, lr=0.01))
    assert_same(decayed, plain.factors(), atol=1e-11)  # rounding, grown over 50 steps


# ------------------------------------------------------------------------------------------------ who is touched


@contextmanager
def without_hooks() -> Iterator[None]:
    """A process that never heard of Stiefel manifolds."""
    for handle in riemannian._handles:
        handle.remove()
    riemannian._handles.clear()
    try:
        yield
    finally:
        riemannian.install()


def plain_run(make: type[Optimizer], options: dict[str, Any], *, neighbour: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    x, target = torch.randn(8, 6), torch.randn(8, 4)
    optimizer = make(model.parameters(), **options)
    chain = Chain()
    stella = torch.optim.Adam(chain.adapters.parameters(), 0.01)
    for _ in range(10):
        if neighbour:
            train(chain, stella, steps=1)
        optimizer.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()] + [p.grad.clone() for p in model.parameters()]


@every_optimizer
def test_an_optimizer_that_owns_no_factor_runs_bit_for_bit_as_without_us(name: str) -> None:
    _, make, options = OPTIMIZERS[name]
    with_us = plain_run(make, options, neighbour=True)
    with without_hooks():
        alone = plain_run(make, options, neighbour=False)
    assert all(torch.equal(a, b) for a, b in zip(with_us, alone, strict=True))


def test_without_the_hooks_the_factors_would_leave_the_manifold() -> None:
    """What the tests of this file would see if the hooks did nothing."""
    with without_hooks():
        chain = Chain()
        train(chain, torch.optim.SGD(chain.adapters.parameters(), 0.1), steps=3)
    assert max(distance_to_stiefel(a.up.orthonormal).item() for a in chain.adapters) > 1e-3


def test_euclidean_geometry_is_stepped_as_any_weight() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        adapter = StellaAdapter(6, 5, 3, geometry="euclidean", grad_scaling=16.0)
        x, optimizer = torch.randn(4, 6), torch.optim.Adam(adapter.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            adapter(x).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in adapter.parameters()]

    with_us = run()
    with without_hooks():
        alone = run()
    assert all(torch.equal(a, b) for a, b in zip(with_us, alone, strict=True))


def test_two_models_with_two_optimizers_do_not_disturb_each_other() -> None:
    makers: list[Callable[[Any], Optimizer]] = [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01),
    ]
    alone, together = ([Chain("polar", seed=1), Chain("exp_map", seed=2)] for _ in range(2))
    for chain, make in zip(alone, makers, strict=True):
        train(chain, make(chain.adapters.parameters()), steps=15)
    optimizers = [make(chain.adapters.parameters()) for chain, make in zip(together, makers, strict=True)]
    for _ in range(15):
        for chain, optimizer in zip(together, optimizers, strict=True):
            optimizer.zero_grad()
            chain.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, expected in zip(together, alone, strict=True):
        assert_same(mine, expected.factors(), atol=0)


def test_two_optimizers_on_one_model_step_their_own_factors_only() -> None:
    chain = Chain()
    mine, others = chain.adapters[0], list(chain.adapters[1:].parameters())
    optimizer, _ = torch.optim.SGD(mine.parameters(), 0.1), torch.optim.SGD(others, 0.1)
    chain.loss().backward()
    gradients, values = [p.grad.clone() for p in others], [p.detach().clone() for p in others]
    optimizer.step()
    for p, gradient, value in zip(others, gradients, values, strict=True):
        assert torch.equal(p.grad, gradient)
        assert torch.equal(p, value)


@pytest.mark.parametrize("why", ["frozen", "no gradient"])
def test_factors_without_gradient_do_not_move(why: str) -> None:
    chain = Chain()
    optimizer = torch.optim.AdamW(chain.adapters.parameters(), 0.01, weight_decay=0.5)
    still = stiefel_weights(chain)[:2]
    with torch.no_grad():
        still[0] += 1e-4  # off the manifold: a retraction, even of nothing, would show
    before = [p.detach().clone() for p in still]
    for p in still:
        p.requires_grad_(why != "frozen")
    for _ in range(3):
        optimizer.zero_grad()
        chain.loss().backward()
        if why == "no gradient":
            for p in still:
                p.grad = None
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(still, before, strict=True))
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-14 for layer in (chain.adapters[1].up, chain.adapters[2].up))


def test_a_frozen_factor_that_momentum_still_moves_stays_on_the_manifold() -> None:
    """As an adapter that another one takes the place of, where gradients are zeroed and not dropped."""
    chain = Chain()
    optimizer = torch.optim.AdamW(chain.adapters.parameters(), 0.01)
    train(chain, optimizer, steps=5, set_to_none=False)
    layer = chain.adapters[0].up.requires_grad_(False)
    before = layer.weight.clone()
    train(chain, optimizer, steps=5, set_to_none=False)
    assert not torch.equal(layer.weight, before)
    assert distance_to_stiefel(layer.orthonormal) < 1e-14


def test_installing_twice_is_installing_once() -> None:
    from torch.optim import optimizer as torchs

    hooks = [len(torchs._global_optimizer_pre_hooks), len(torchs._global_optimizer_post_hooks)]
    riemannian.install()
    assert [len(torchs._global_optimizer_pre_hooks), len(torchs._global_optimizer_post_hooks)] == hooks


def test_nothing_is_kept_of_a_step() -> None:
    chain = Chain()
    optimizer = torch.optim.SGD(chain.adapters.parameters(), 0.1)
    train(chain, optimizer, steps=1)
    assert optimizer not in riemannian._steps


class Fragile(torch.optim.SGD):
    broken = True

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_that_raised_leaves_nothing_for_the_next(frozen: bool) -> None:
    torch.manual_seed(0)
    layer = StiefelLinear(3, 8)
    optimizer = Fragile(layer.parameters(), 0.1)
    layer.weight.grad = torch.randn(8, 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    layer.reset_parameters()
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    layer.requires_grad_(not frozen)
    optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_goes_on_after_a_step_that_raised(set_to_none: bool) -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=3)
    optimizer = Fragile(chain.adapters.parameters(), 0.1)
    chain.loss().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    train(chain, optimizer, steps=3, set_to_none=set_to_none)
    assert_same(chain, expected)


def test_a_step_that_raised_can_be_taken_again_on_the_same_gradients() -> None:
    """As after an OutOfMemoryError that somebody caught: the gradients have been converted, and are not twice."""
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=3)
    optimizer = Fragile(chain.adapters.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        chain.loss().backward()
        optimizer.broken = True
        for _ in range(step):
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        optimizer.broken = False
        optimizer.step()
    assert_same(chain, expected)


class HalfWay(torch.optim.SGD):
    """Raises when it has moved every second weight."""

    broken = True

    def step(self, closure: Any = None) -> None:
        for number, p in enumerate(self.param_groups[0]["params"]):
            if self.broken and number % 2:
                self.broken = False
                raise RuntimeError("out of memory")
            p.data.sub_(p.grad, alpha=0.1)


def test_factors_that_a_step_had_moved_before_it_raised_are_on_the_manifold_after_the_next() -> None:
    chain = Chain()
    optimizer = HalfWay(stiefel_weights(chain), 0.1)
    chain.loss().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.step()
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-14 for a in chain.adapters for layer in (a.up, a.down))


def test_another_optimizer_on_the_gradients_of_a_step_that_raised_keeps_to_the_manifold_and_says_so() -> None:
    chain = Chain()
    chain.loss().backward()
    fragile = Fragile(chain.adapters.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        fragile.step()
    with pytest.warns(UserWarning, match="gradients that a step has used before"):
        torch.optim.SGD(chain.adapters.parameters(), 0.1).step()
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-14 for a in chain.adapters for layer in (a.up, a.down))


def test_a_step_that_raised_keeps_nothing_of_what_was_around_it() -> None:
    """Memory is to be free for another attempt, which may be with another model and optimizer."""
    before = set(riemannian._steps)  # of other tests, whose optimizers live as long as what they raised
    layer = StiefelLinear(3, 8)
    optimizer = Fragile(layer.parameters(), 0.1)

    def attempt() -> "weakref.ref[nn.Module]":
        large = nn.Linear(3, 3)
        layer.weight.grad = torch.randn(8, 3)
        try:
            optimizer.step()
        except RuntimeError:
            return weakref.ref(large)
        raise AssertionError

    kept = attempt()
    gc.collect()
    assert kept() is None
    optimizer = None
    gc.collect()
    assert set(riemannian._steps) <= before


# torch runs the hooks of every `step` method in the chain of calls. The outermost one is the optimizer's step.


class InTwoHalves(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        super().step()


def test_an_optimizer_whose_step_calls_its_parents_takes_one_step() -> None:
    chain = Chain()
    torch.optim.SGD(chain.adapters.parameters(), 0.1)  # torch hooks a class's step when its first instance is made
    expected = trained_reference(chain, reference.SGD(0.1), steps=5)
    train(chain, InTwoHalves(chain.adapters.parameters(), 0.05), steps=5)
    assert_same(chain, expected)


class Clipping(torch.optim.SGD):
    """Changes gradients in place within its step, before the hooked one of its parent."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.1)
        super().step()


class ClippingAlone(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.1)
        torch.optim.SGD.step.__wrapped__(self)  # type: ignore[attr-defined]


class ClippingAround(Optimizer):
    """The same, with another optimizer inside."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = torch.optim.SGD(params, lr)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.1)
        self.inner.step()


@pytest.mark.parametrize("make", [Clipping, ClippingAround])
def test_gradients_changed_within_a_step_are_converted_once(make: Any) -> None:
    chain, alone = Chain(), Chain()
    train(chain, make(chain.adapters.parameters(), 0.1), steps=5)
    train(alone, ClippingAlone(alone.adapters.parameters(), 0.1), steps=5)
    assert_same(chain, alone.factors(), atol=1e-13)


class Stubborn(torch.optim.SGD):
    """Tries one way inside its step, which raises, and takes another."""

    def step(self, closure: Any = None) -> None:
        try:
            Fragile.step(self)  # type: ignore[arg-type]
        except RuntimeError:
            super().step()

    broken = True


def test_an_error_that_a_step_overcomes_is_none() -> None:
    chain = Chain()
    Fragile(chain.adapters.parameters(), 0.1)  # hooks its step
    expected = trained_reference(chain, reference.SGD(0.1), steps=3)
    train(chain, Stubborn(chain.adapters.parameters(), 0.1), steps=3)
    assert_same(chain, expected)


def test_hooks_of_others_may_replace_the_arguments_of_a_step() -> None:
    before = set(riemannian._steps)
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=3)
    optimizer = InTwoHalves(chain.adapters.parameters(), 0.05)
    outer = Wrapper(optimizer)
    for each in (optimizer, outer):
        each.register_step_pre_hook(lambda _, args, kwargs: (args, dict(kwargs)))
    train(chain, outer, steps=3)
    assert_same(chain, expected)
    assert set(riemannian._steps) <= before


class Wrapper(Optimizer):
    """As Lookahead or torch's ZeroRedundancyOptimizer: an optimizer around an optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_around_an_optimizer_takes_one_step() -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=5)
    train(chain, Wrapper(torch.optim.SGD(chain.adapters.parameters(), 0.1)), steps=5)
    assert_same(chain, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what dynamo says where it leaves a graph
@pytest.mark.parametrize("nested", [False, True])
def test_a_compiled_step_is_the_same_step(nested: bool) -> None:
    before = set(riemannian._steps)
    chain = Chain(dtype=torch.float32)
    expected = trained_reference(chain, reference.SGD(0.1), steps=3)
    optimizer: Optimizer = torch.optim.SGD(chain.adapters.parameters(), 0.1)
    if nested:
        optimizer = Wrapper(optimizer)
    torch.compiler.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        chain.loss().backward()
        step()
    assert_same(chain, expected, atol=FLOAT32)
    assert set(riemannian._steps) <= before


class Smoothing(Optimizer):
    """Takes what is no number for zero."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__(weights, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.sub_(0.1 * weight.grad.nan_to_num(0.0, 0.0, 0.0))


FAULTS: dict[str, tuple[float, Callable[[list[nn.Parameter]], Optimizer]]] = {
    "nan": (math.nan, lambda weights: torch.optim.SGD(weights, 0.1)),
    "infinity": (math.inf, lambda weights: torch.optim.SGD(weights, 0.1)),
    "a gradient whose step is finite": (math.nan, Smoothing),
    "the step alone": (1.0, lambda weights: torch.optim.SGD(weights, math.inf)),
}


@pytest.mark.parametrize("form", [{}, {"dtype": torch.float64}, {"retraction": "exp_map"}], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_is_refused_and_the_factors_put_back(fault: str, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layers = [StiefelLinear(3, 8, **form), StiefelLinear(8, 3, **form)]
    weights = [layer.weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    poison, make = FAULTS[fault]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    layers[1].weight.grad[0, 0] = poison
    name = type(optimizer).__name__
    with pytest.raises(FloatingPointError, match=rf"{name} made Stiefel factors nan or infinite.*put back"):
        optimizer.step()
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.SGD(weights, 0.1).step()
    assert all(distance_to_stiefel(layer.orthonormal) < 1e-6 for layer in layers)


# ------------------------------------------------------------------------------------------------ threads


def in_threads(work: Callable[[], None], count: int) -> list[BaseException]:
    """Do the work in several threads that change places as often as can be. Returns: what they raised."""
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=attempt) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return raised


def test_models_are_made_and_trained_in_several_threads() -> None:
    def work() -> None:
        for _ in range(30):
            layers = [StiefelLinear(4, 32) for _ in range(4)]
            for layer in layers:
                optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
                layer.weight.grad = torch.ones_like(layer.weight)
                optimizer.step()
                copies = [StiefelLinear.__new__(StiefelLinear) for _ in range(50)]  # as deepcopy begins
            assert all(distance_to_stiefel(layer.orthonormal) < 1e-6 for layer in layers)
            del copies

    assert in_threads(work, 4) == []


def test_a_factor_that_another_thread_is_about_to_step_is_not_taken_for_a_stray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, other = StiefelLinear(4, 32), nn.Linear(2, 2)
    bystander = torch.optim.SGD(other.parameters(), 0.1)
    moved, looked = threading.Event(), threading.Event()

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            layer.weight.data.mul_(1.5)
            moved.set()
            looked.wait(10)

    def look_late(Y_MR: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            moved.wait(0.5)
        return distance_to_stiefel(Y_MR)

    layer.weight.grad = torch.randn(32, 4)
    bystander.step()  # it sees the factor on the manifold, and with a gradient
    layer.weight.grad = torch.randn(32, 4)
    monkeypatch.setattr("beyondlora.manifold.guard.distance_to_stiefel", look_late)
    stepping = threading.Timer(0.1, Slow(layer.parameters(), 0.1).step)
    stepping.start()
    try:
        bystander.step()
    finally:
        looked.set()
        stepping.join()
    assert distance_to_stiefel(layer.orthonormal) < 1e-6


# ------------------------------------------------------------------------------------------------ closures


@pytest.mark.parametrize("gradients", ["stale", "none"])
@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_closure_is_refused_with_the_reason_and_before_anything_moved(
    make: type[Optimizer], how: str, gradients: str
) -> None:
    chain = Chain()
    optimizer = make(chain.adapters.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = chain.loss()
        loss.backward()
        return loss

    if gradients == "stale":
        closure()
    found = [p.grad.clone() for p in stiefel_weights(chain) if p.grad is not None]
    before = chain.factors()
    with pytest.raises(
        ValueError, match=f"{make.__name__}.step was called with a closure, and it owns Stiefel fac"
    ) as e:
        optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    for part in ("computes new gradients inside the step", "Call loss.backward() and then optimizer.step()", "LBFGS"):
        assert part in str(e.value)
    assert_same(chain, before, atol=0)
    now = [p.grad for p in stiefel_weights(chain) if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(now, found, strict=True))


@pytest.mark.parametrize("arguments", [((), {}), ((None,), {}), ((), {"closure": None})])
def test_no_closure_is_no_closure(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    chain = Chain()
    expected = trained_reference(chain, reference.SGD(0.1), steps=1)
    optimizer = torch.optim.SGD(chain.adapters.parameters(), 0.1)
    chain.loss().backward()
    optimizer.step(*arguments[0], **arguments[1])
    assert_same(chain, expected)


def test_closures_of_others_are_welcome() -> None:
    """An optimizer with frozen factors, or with a Euclidean geometry, may do as it likes."""
    torch.manual_seed(0)
    frozen = StiefelLinear(3, 8).requires_grad_(False)
    free = StellaAdapter(6, 5, 3, geometry="euclidean")
    x = torch.randn(9, 6)
    optimizer = torch.optim.LBFGS([*frozen.parameters(), *free.parameters()], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (free(x) - x[:, :5]).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < first


# ------------------------------------------------------------------------------------------------ cost and precision


def test_two_models_trained_in_turns_keep_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def plan(layers: list[StiefelLinear]) -> list[Any]:
        made.append(len(layers))
        return moves.plan(layers)

    monkeypatch.setattr(riemannian, "plan", plan)
    pairs = [[StiefelLinear(4, 32) for _ in range(2)] for _ in range(2)]
    every = [layer for pair in pairs for layer in pair]
    optimizer = torch.optim.SGD([layer.weight for layer in every], 0.1)

    def step(layers: list[StiefelLinear]) -> None:
        optimizer.zero_grad()
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()

    for turn in range(6):
        step(pairs[turn % 2])
    assert made == [2, 2]
    step(every)
    assert len(riemannian._plans[optimizer]) == 1  # buffers of no weight are there twice
    step(pairs[0])
    step(pairs[1])
    assert made == [2, 2, 4, 2, 2]
    del optimizer.param_groups[0]["params"][:2]
    step(pairs[1][:1])
    assert len(riemannian._plans[optimizer]) == 1  # nor those of weights that are no longer stepped


def test_what_an_optimizer_does_not_own_costs_it_little() -> None:
    """One optimizer a weight: every step asks all factors, so it is counted how often."""
    torch.manual_seed(0)
    layers = [StiefelLinear(2, 4) for _ in range(300)]
    for layer in layers:
        layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight for layer in layers], 0.1).step()
    mine = torch.optim.SGD(layers[0].parameters(), 0.1)
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    for optimizer in (mine, foreign):
        calls = collections.Counter[str]()
        gc.collect()
        count = len(riemannian.live_stiefel_layers())
        layers[0].weight.grad = torch.randn_like(layers[0].weight)
        sys.setprofile(lambda frame, event, _, calls=calls: calls.update([event]))
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        assert calls["call"] <= 3 * count + 300


class Decompositions(TorchDispatchMode):
    """Notes the matrix shapes that reach an SVD or an eigendecomposition, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.svd: list[tuple[int, ...]] = []
        self.eigh: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in ("svd", "eigh"):
            if kind in func.__name__:
                getattr(self, kind).append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@both_retractions
def test_no_tall_matrix_meets_an_svd(retraction: Any) -> None:
    chain = Chain(retraction)
    with Decompositions() as seen:
        train(chain, torch.optim.AdamW(chain.adapters.parameters(), 0.01), steps=2)
    assert seen.svd == []
    assert len(seen.eigh) == 2 * len(stiefel_weights(chain))
    assert all(rows == columns <= 6 for rows, columns in seen.eigh)
    with Decompositions() as control:  # that the spy sees what it should
        torch.linalg.svdvals(torch.randn(4, 3))
    assert control.svd == [(4, 3)]


@both_retractions
def test_no_tall_matrix_meets_an_svd_in_a_run_that_diverges_either(retraction: Any) -> None:
    layer = StiefelLinear(3, 20, retraction=retraction)
    layer.weight.grad = torch.outer(torch.randn(20), torch.randn(3))
    with Decompositions() as seen:
        torch.optim.SGD(layer.parameters(), 1e7).step()
    assert all(shape == (3, 3) for shape in seen.svd + seen.eigh)
    assert distance_to_stiefel(layer.orthonormal) < 1e-6


@pytest.mark.parametrize("retraction", ["polar", pytest.param("exp_map", marks=pytest.mark.slow)])
def test_float32_factors_stay_orthonormal_over_ten_thousand_steps(retraction: Any) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([StiefelLinear(8, 64, retraction=retraction), StiefelLinear(48, 4, retraction=retraction)])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=5e-3, weight_decay=0.01)
    noise = [torch.randn(100, *layer.weight.shape) for layer in layers]
    worst = 0.0
    for step in range(10_000):
        for layer, draws in zip(layers, noise, strict=True):
            layer.weight.grad = draws[step % 100] - draws[0] * (step % 7)
        optimizer.step()
        if step % 500 == 499:
            worst = max(worst, *(distance_to_stiefel(layer.orthonormal).item() for layer in layers))
    assert worst <= 2e-6
