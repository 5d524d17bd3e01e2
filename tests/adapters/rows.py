"""One row an adapter with its options: how to build it, and its equation from `reference`. Drives `test_adapter.py`.

The weights are drawn at random, U and V of StelLA too: the equations hold off the manifold as well.
Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank, K = G + k basis functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference
import torch

from beyondlora.adapters import Adapter, AuroraAdapter, CeraAdapter, StaticAuroraAdapter, StellaAdapter

Array = np.ndarray
Weights = dict[str, Array]
SCALING = 0.7


@dataclass(frozen=True)
class Row:
    """An adapter class, the options it takes, and what the papers say it computes.

    Attributes:
        make: the adapter's class, called with (N, M, R, scaling=, dropout=, **options).
        branch: (weights, x_TN, **equation options) to s · branch(x) in NumPy.
        parameters: (N, M, R) to the number of trainable parameters.
        delta: weights to ΔW in NumPy; None where there is none.
        exact: whether ΔW x is the branch's output for every x.
        options: of the adapter's constructor.
        equation: of the reference's function.
        bottleneck_dropout: dropout acts on the R units behind the activation and not on the input.
        kinks: values of the bottleneck at which the function has a kink or a jump; gradcheck keeps away.
    """

    make: Callable[..., Adapter]
    branch: Callable[..., Array]
    parameters: Callable[[int, int, int], int]
    delta: Callable[..., Array] | None
    exact: bool
    options: dict[str, Any] = field(default_factory=dict)
    equation: dict[str, Any] = field(default_factory=dict)
    bottleneck_dropout: bool = False
    kinks: Array = field(default_factory=lambda: np.array([]))

    def build(self, N: int, M: int, R: int, *, dropout: float = 0.0, seed: int = 0) -> Adapter:
        """Return the adapter in float64 with random weights."""
        adapter = self.make(N, M, R, scaling=SCALING, dropout=dropout, dtype=torch.float64, **self.options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in adapter.parts().values():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator, dtype=torch.float64) / 2)
        return adapter

    def output(self, adapter: Adapter, x: Array, **mask: Any) -> Array:
        """Return the equation's output (..., M) for inputs (..., N)."""
        x_TN = x.reshape(-1, x.shape[-1])
        return self.branch(weights(adapter), x_TN, **self.equation, **mask).reshape(*x.shape[:-1], -1)


def weights(adapter: Adapter) -> Weights:
    return {letter: module.weight.detach().numpy() for letter, module in adapter.parts().items()}


# ------------------------------------------------------------------------------------------------ LoRA and CeRA


def identity_core(N: int, M: int, R: int, *, scaling: float, dropout: float, dtype: torch.dtype) -> Adapter:
    down = torch.nn.Linear(N, R, bias=False, dtype=dtype)
    up = torch.nn.Linear(R, M, bias=False, dtype=dtype)
    return Adapter(down=down, up=up, scaling=scaling, dropout=dropout)


def lora_branch(w: Weights, x_TN: Array) -> Array:
    return reference.lora(x_TN, w["A"], w["B"], SCALING)


def lora_delta(w: Weights) -> Array:
    return reference.lora(np.eye(w["A"].shape[1]), w["A"], w["B"], SCALING).T


def lora_count(N: int, M: int, R: int) -> int:
    return R * (M + N)


def cera_branch(w: Weights, x_TN: Array, **options: Any) -> Array:
    return reference.cera(x_TN, w["A"], w["B"], scaling=SCALING, **options)


def cera_row(activation: str) -> Row:
    linear = activation == "identity"
    return Row(
        CeraAdapter,
        cera_branch,
        lora_count,
        lora_delta if linear else None,
        exact=linear,
        options={"activation": activation},
        equation={"activation": activation},
        bottleneck_dropout=True,
        kinks=np.array([0.0] if activation == "relu" else []),
    )


# ------------------------------------------------------------------------------------------------ AuroRA


def nonlinear(w: Weights) -> tuple[Array, Array]:
    """H and W_s, or what stands for the one that an ablation leaves out: NaN, which no result survives."""
    return w.get("H", np.array([[np.nan]])), w.get("spline", np.array([[np.nan]]))


def aurora_branch(w: Weights, x_TN: Array, **options: Any) -> Array:
    return reference.aurora(x_TN, w["A"], w["B"], *nonlinear(w), SCALING, **options)


def aurora_delta(w: Weights, **options: Any) -> Array:
    return reference.aurora_static_delta(w["A"], w["B"], *nonlinear(w), SCALING, **options)


def aurora_static_branch(w: Weights, x_TN: Array, **options: Any) -> Array:
    return x_TN @ aurora_delta(w, **options).T


def aurora_row(make: type[AuroraAdapter] = AuroraAdapter, **options: Any) -> Row:
    static = make is StaticAuroraAdapter
    renamed = {"spline_order": "order"}
    equation = {renamed.get(name, name): value for name, value in options.items()}
    grid = {name: equation[name] for name in ("grid_size", "order", "grid_range") if name in equation}
    fixed, learnable = options.get("fixed", True), options.get("learnable", True)

    def parameters(N: int, M: int, R: int) -> int:
        sizes = {name: value for name, value in grid.items() if name != "grid_range"}
        full = reference.aurora_parameter_count(N, M, R, **sizes)
        spline = R * (sizes.get("grid_size", 5) + sizes.get("order", 3))
        return full - (0 if fixed else R**2) - (0 if learnable else spline)

    knots = reference.bspline_knots(**grid) if learnable and grid.get("order", 3) < 2 else np.array([])
    zero = np.array([0.0] if fixed and options.get("activation") == "leaky_relu" else [])
    return Row(
        make,
        aurora_static_branch if static else aurora_branch,
        parameters,
        lambda w: aurora_delta(w, **equation),
        exact=static,
        options=options,
        equation=equation,
        kinks=np.r_[knots, zero],
    )


# ------------------------------------------------------------------------------------------------ StelLA


def stella_branch(w: Weights, x_TN: Array) -> Array:
    return reference.stella(x_TN, w["U"], w["S"], w["Vt"], SCALING)


def stella_delta(w: Weights) -> Array:
    return reference.stella(np.eye(w["Vt"].shape[1]), w["U"], w["S"], w["Vt"], SCALING).T


def stella_row(**options: Any) -> Row:
    core = (lambda R: R) if options.get("diag_s") else (lambda R: R**2)
    return Row(
        StellaAdapter, stella_branch, lambda N, M, R: R * (M + N) + core(R), stella_delta, exact=True, options=options
    )


ROWS: dict[str, Row] = {
    "lora": Row(identity_core, lora_branch, lora_count, lora_delta, exact=True),
    **{f"cera-{activation}": cera_row(activation) for activation in ("silu", "relu", "identity")},
    **{
        f"aurora-{spline}-{activation}": aurora_row(spline=spline, activation=activation)
        for spline in ("pooled", "per_dim")
        for activation in ("tanh", "leaky_relu", "sigmoid")
    },
    "aurora-without-spline": aurora_row(learnable=False),
    "aurora-without-fixed": aurora_row(fixed=False),
    "aurora-without-fixed-per_dim": aurora_row(fixed=False, spline="per_dim"),
    **{
        f"aurora-order{order}-grid{size}-{spline}": aurora_row(
            spline=spline, grid_size=size, spline_order=order, grid_range=grid_range
        )
        for spline in ("pooled", "per_dim")
        for size, order, grid_range in [(1, 0, (-2.0, 1.0)), (4, 0, (-1.0, 1.0)), (8, 1, (0.0, 1.5)), (3, 4, (-3.0, 2))]
    },
    "aurora-order2": aurora_row(spline_order=2),
    "aurora-static-pooled": aurora_row(StaticAuroraAdapter),
    "aurora-static-per_dim": aurora_row(StaticAuroraAdapter, spline="per_dim", activation="sigmoid", grid_size=2),
    "stella-dense": stella_row(),
    "stella-diagonal": stella_row(diag_s=True),
    "stella-euclidean": stella_row(geometry="euclidean"),
    "stella-exp_map": stella_row(retraction="exp_map", grad_scaling=16.0, diag_s=True),
}
