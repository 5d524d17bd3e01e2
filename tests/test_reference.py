"""The oracle against third parties: SciPy, torch, geoopt, pymanopt, and laws that hold whatever the code.

Run: OMP_NUM_THREADS=1 pytest tests/test_reference.py
Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank, K = G + k basis functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from manifold.third_party import geoopt, pymanopt, random_point, random_tangent
from scipy.interpolate import BSpline

Array = np.ndarray
ROUNDING: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides, values of order one
SHAPES = [(7, 3), (12, 1), (10, 5), (5, 5)]  # (M, R): tall, a sphere, wide enough, square


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------ B-splines

GRIDS = list(itertools.product([1, 2, 5, 8], [0, 1, 2, 3, 4], [(-1.0, 1.0), (0.0, 1.0), (-2.5, 3.75)]))


def scipy_basis(z: Array, knots: Array, order: int) -> Array:
    """SciPy's own basis functions, made half-open everywhere.

    SciPy closes the last interval of a spline's base interval, so the knots are continued until every support of ours
    lies strictly inside it.
    """
    pad, h = order + 1, knots[1] - knots[0]
    left = knots[0] - h * np.arange(pad, 0, -1)
    right = knots[-1] + h * np.arange(1, pad + 1)
    count = len(knots) - order - 1
    every = BSpline(np.r_[left, knots, right], np.eye(count + 2 * pad), order, extrapolate=False)
    return np.nan_to_num(every(z))[..., pad : pad + count]


@pytest.mark.parametrize(("grid_size", "order", "grid_range"), GRIDS)
def test_bspline_basis_equals_scipys(
    rng: np.random.Generator, grid_size: int, order: int, grid_range: tuple[float, float]
) -> None:
    grid: dict[str, Any] = {"grid_size": grid_size, "order": order, "grid_range": grid_range}
    knots = reference.bspline_knots(**grid)
    span = knots[-1] - knots[0]
    z = np.r_[rng.uniform(knots[0] - 0.5 * span, knots[-1] + 0.5 * span, 60), knots, knots[0] - 9, knots[-1] + 9]
    ours = reference.bspline_basis(z, **grid)
    assert ours.shape == (len(z), grid_size + order)
    np.testing.assert_allclose(ours, scipy_basis(z, knots, order), **ROUNDING)


@pytest.mark.parametrize(("grid_size", "order", "grid_range"), GRIDS)
def test_bspline_basis_equals_scipys_design_matrix_inside_the_range(
    rng: np.random.Generator, grid_size: int, order: int, grid_range: tuple[float, float]
) -> None:
    low, high = grid_range
    h = (high - low) / grid_size
    knots = np.linspace(low - order * h, high + order * h, grid_size + 2 * order + 1)
    z = rng.uniform(low, high, 40)
    ours = reference.bspline_basis(z, grid_size=grid_size, order=order, grid_range=grid_range)
    np.testing.assert_allclose(ours, BSpline.design_matrix(z, knots, order).toarray(), **ROUNDING)
    np.testing.assert_allclose(ours.sum(-1), 1.0, **ROUNDING)  # partition of unity


@pytest.mark.parametrize(("grid_size", "order", "grid_range"), GRIDS)
def test_bspline_knots_are_the_grid_continued_by_k_on_both_sides(
    grid_size: int, order: int, grid_range: tuple[float, float]
) -> None:
    knots = reference.bspline_knots(grid_size=grid_size, order=order, grid_range=grid_range)
    assert len(knots) == grid_size + 2 * order + 1
    np.testing.assert_allclose(
        knots[order : order + grid_size + 1], np.linspace(*grid_range, grid_size + 1), **ROUNDING
    )
    np.testing.assert_allclose(np.diff(knots), (grid_range[1] - grid_range[0]) / grid_size, **ROUNDING)


def test_bspline_basis_is_half_open_and_zero_outside_its_support() -> None:
    # Binary fractions: the knots −1, −½, 0, ½, 1 are exact, so equality is meant.
    boxes = reference.bspline_basis(np.array([-1.25, -1.0, -0.5, 0.75, 1.0]), grid_size=4, order=0)
    np.testing.assert_array_equal(boxes, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    cubic = reference.bspline_basis(np.array([-2.5, 2.5, -40.0, 40.0]), grid_size=4, order=3)  # ends of the support
    np.testing.assert_array_equal(cubic, np.zeros((4, 7)))


def test_cubic_basis_at_a_knot_is_one_sixth_two_thirds_one_sixth() -> None:
    b_K = reference.bspline_basis(np.array(0.0), grid_size=4, order=3)
    np.testing.assert_allclose(b_K, [0, 0, 1 / 6, 2 / 3, 1 / 6, 0, 0], **ROUNDING)


def test_bspline_basis_keeps_leading_dimensions(rng: np.random.Generator) -> None:
    z = rng.uniform(-1.5, 1.5, (2, 3, 4))
    b = reference.bspline_basis(z)
    assert b.shape == (2, 3, 4, 8)
    np.testing.assert_array_equal(b[1, 2], reference.bspline_basis(z[1, 2]))


# ------------------------------------------------------------------------------------------------ branches


def as_torch(*arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def test_lora_equals_torchs_linear_layers(rng: np.random.Generator) -> None:
    x_TN, A_RN, B_MR = (rng.standard_normal(s) for s in [(6, 5), (3, 5), (4, 3)])
    x, A, B = as_torch(x_TN, A_RN, B_MR)
    expected = 0.7 * torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)
    np.testing.assert_allclose(reference.lora(x_TN, A_RN, B_MR, 0.7), expected.numpy(), **ROUNDING)


@pytest.mark.parametrize("activation", ["silu", "relu", "identity"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_cera_equals_torchs_functional_layers(rng: np.random.Generator, activation: Any, p: float) -> None:
    x_TN, A_RN, B_MR = (rng.standard_normal(s) for s in [(6, 5), (3, 5), (4, 3)])
    x, A, B = as_torch(x_TN, A_RN, B_MR)
    act: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": torch.nn.functional.silu,
        "relu": torch.nn.functional.relu,
        "identity": lambda z: z,
    }
    with torch.random.fork_rng():  # torch's dropout draws the mask; the same seed on ones shows which units it kept
        torch.manual_seed(1)
        h = torch.nn.functional.dropout(act[activation](x @ A.T), p)
        torch.manual_seed(1)
        keep_TR = torch.nn.functional.dropout(torch.ones_like(h), p).numpy() != 0
    assert keep_TR.all() == (p == 0.0)
    ours = reference.cera(x_TN, A_RN, B_MR, scaling=2.0, activation=activation, keep_TR=keep_TR, p=p)
    np.testing.assert_allclose(ours, (2.0 * h @ B.T).numpy(), **ROUNDING)


def test_cera_without_a_mask_is_the_evaluation_form_and_without_activation_lora(rng: np.random.Generator) -> None:
    x_TN, A_RN, B_MR = (rng.standard_normal(s) for s in [(6, 5), (3, 5), (4, 3)])
    np.testing.assert_array_equal(reference.cera(x_TN, A_RN, B_MR, p=0.3), reference.cera(x_TN, A_RN, B_MR))
    expected = torch.nn.functional.silu(torch.from_numpy(x_TN @ A_RN.T)).numpy() @ B_MR.T
    np.testing.assert_allclose(reference.cera(x_TN, A_RN, B_MR), expected, **ROUNDING)
    linear = reference.cera(x_TN, A_RN, B_MR, activation="identity")
    np.testing.assert_allclose(linear, reference.lora(x_TN, A_RN, B_MR, 1.0), **ROUNDING)


AURORA_TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("grid", [(5, 3, (-1.0, 1.0)), (3, 2, (-2.0, 1.0))])
@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu", "sigmoid"])
@pytest.mark.parametrize(("fixed", "learnable"), [(True, True), (True, False), (False, True), (False, False)])
def test_aurora_equals_torch_and_scipy(
    rng: np.random.Generator, activation: Any, spline: Any, fixed: bool, learnable: bool, grid: Any
) -> None:
    grid_size, order, (low, high) = grid
    K = grid_size + order
    x_TN, A_RN, B_MR, H_RR, W_RK = (rng.standard_normal(s) for s in [(9, 5), (3, 5), (4, 3), (3, 3), (3, K)])
    x, A, B, H, W = as_torch(x_TN, A_RN, B_MR, H_RR, W_RK)
    act, z = AURORA_TORCH[activation], x @ A.T
    h = (high - low) / grid_size
    knots = np.linspace(low - order * h, high + order * h, grid_size + 2 * order + 1)
    b_TRK = torch.from_numpy(scipy_basis(z.numpy(), knots, order))
    F = act(torch.einsum("rq,tq->tr", H, act(z)))
    L = torch.einsum("rk,tik->tr" if spline == "pooled" else "rk,trk->tr", W, b_TRK)
    expected = 0.7 * (F * fixed + L * learnable) @ B.T
    ours = reference.aurora(
        x_TN, A_RN, B_MR, H_RR, W_RK, 0.7,
        spline=spline, activation=activation, fixed=fixed, learnable=learnable,
        grid_size=grid_size, order=order, grid_range=(low, high),
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected.numpy(), **ROUNDING)


def test_aurora_defaults_are_the_papers(rng: np.random.Generator) -> None:
    z_TR, H_RR, W_RK = rng.uniform(-2, 2, (6, 3)), rng.standard_normal((3, 3)), rng.standard_normal((3, 8))
    spelled: dict[str, Any] = {"spline": "pooled", "activation": "tanh", "fixed": True, "learnable": True}
    grid: dict[str, Any] = {"grid_size": 5, "order": 3, "grid_range": (-1.0, 1.0)}
    np.testing.assert_array_equal(
        reference.aurora_core(z_TR, H_RR, W_RK), reference.aurora_core(z_TR, H_RR, W_RK, **spelled, **grid)
    )


def test_the_two_spline_readings_agree_at_rank_one_and_differ_above(rng: np.random.Generator) -> None:
    for R, same in [(1, True), (2, False)]:
        z, H, W = rng.uniform(-1, 1, (6, R)), rng.standard_normal((R, R)), rng.standard_normal((R, 8))
        pooled = reference.aurora_core(z, H, W, spline="pooled")
        per_dim = reference.aurora_core(z, H, W, spline="per_dim")
        assert np.allclose(pooled, per_dim, **ROUNDING) == same


@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
def test_aurora_static_delta_is_the_branch_at_the_unit_vectors(rng: np.random.Generator, spline: Any) -> None:
    A_RN, B_MR, H_RR, W_RK = (rng.standard_normal(s) for s in [(3, 5), (4, 3), (3, 3), (3, 8)])
    delta_MN = reference.aurora_static_delta(A_RN, B_MR, H_RR, W_RK, 2.0, spline=spline)
    columns_NM = reference.aurora(np.eye(5), A_RN, B_MR, H_RR, W_RK, 2.0, spline=spline)  # A e_j = column j of A
    np.testing.assert_allclose(delta_MN, columns_NM.T, **ROUNDING)


def test_aurora_parameter_count_is_that_of_its_tensors_and_of_the_papers_table() -> None:
    n, m, r, G, k = 11, 7, 3, 4, 2
    tensors = [np.empty((r, n)), np.empty((m, r)), np.empty((r, r)), np.empty((r, G + k))]
    assert reference.aurora_parameter_count(n, m, r, grid_size=G, order=k) == sum(t.size for t in tensors)
    roberta_base = 12 * 2 * reference.aurora_parameter_count(768, 768, 2)  # query and value of 12 layers
    assert roberta_base == pytest.approx(0.075e6, abs=1e3)  # "0.075 M" is rounded; without H and W_s: 0.0737 M
    assert roberta_base == 74_208


@pytest.mark.parametrize("diagonal", [False, True])
def test_stella_equals_torchs_product_of_its_factors(rng: np.random.Generator, diagonal: bool) -> None:
    x_TN, U_MR, Vt_RN = (rng.standard_normal(s) for s in [(6, 5), (4, 3), (3, 5)])
    S = rng.standard_normal(3) if diagonal else rng.standard_normal((3, 3))
    x, U, S_, Vt = as_torch(x_TN, U_MR, S, Vt_RN)
    weight = torch.linalg.multi_dot([U, torch.diag_embed(S_) if diagonal else S_, Vt])
    expected = 0.7 * torch.nn.functional.linear(x, weight)
    np.testing.assert_allclose(reference.stella(x_TN, U_MR, S, Vt_RN, 0.7), expected.numpy(), **ROUNDING)


# ------------------------------------------------------------------------------------------------ Stiefel geometry


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_riemannian_gradient_equals_geoopts(rng: np.random.Generator, M: int, R: int) -> None:
    Y, G = random_point(rng, M, R), rng.standard_normal((M, R))
    expected = geoopt.CanonicalStiefel().egrad2rgrad(*as_torch(Y, G))
    np.testing.assert_allclose(reference.riemannian_gradient(Y, G), expected.numpy(), **ROUNDING)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_riemannian_gradient_represents_the_differential(rng: np.random.Generator, M: int, R: int) -> None:
    """<grad, D> in the canonical metric is the directional derivative tr(GᵀD), for every tangent D."""
    Y, G = random_point(rng, M, R), rng.standard_normal((M, R))
    D = random_tangent(rng, Y)
    gradient = reference.riemannian_gradient(Y, G)
    np.testing.assert_allclose(Y.T @ gradient + gradient.T @ Y, 0.0, **ROUNDING)
    np.testing.assert_allclose(reference.canonical_inner(Y, gradient, D), np.sum(G * D), **ROUNDING)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_canonical_inner_equals_geoopts(rng: np.random.Generator, M: int, R: int) -> None:
    Y, D1, D2 = random_point(rng, M, R), rng.standard_normal((M, R)), rng.standard_normal((M, R))
    expected = geoopt.CanonicalStiefel().inner(*as_torch(Y, D1, D2))
    np.testing.assert_allclose(reference.canonical_inner(Y, D1, D2), float(expected), **ROUNDING)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_tangent_projection_equals_pymanopts(rng: np.random.Generator, M: int, R: int) -> None:
    Y, D = random_point(rng, M, R), rng.standard_normal((M, R))
    expected = pymanopt.manifolds.Stiefel(M, R).projection(Y, D)
    np.testing.assert_allclose(reference.tangent_projection(Y, D), expected, **ROUNDING)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_tangent_projection_keeps_tangents_and_removes_normals(rng: np.random.Generator, M: int, R: int) -> None:
    Y, Z = random_point(rng, M, R), rng.standard_normal((R, R))
    D = random_tangent(rng, Y)
    np.testing.assert_allclose(reference.tangent_projection(Y, D + Y @ (Z + Z.T)), D, **ROUNDING)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_polar_retraction_equals_scipys_polar_factor(rng: np.random.Generator, M: int, R: int) -> None:
    Y = random_point(rng, M, R)
    D = random_tangent(rng, Y)
    np.testing.assert_allclose(reference.polar_retraction(Y, D), scipy.linalg.polar(Y + D)[0], **ROUNDING)


@pytest.mark.parametrize("name", ["polar_retraction", "exp_map"])
@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_retractions_stay_on_the_manifold_and_start_along_the_tangent(
    rng: np.random.Generator, name: str, M: int, R: int
) -> None:
    retract, Y = getattr(reference, name), random_point(rng, M, R)
    D = random_tangent(rng, Y)
    for t in (0.0, 1e-3, 1.0, 5.0):
        X = retract(Y, t * D)
        np.testing.assert_allclose(X.T @ X, np.eye(R), **ROUNDING)
    np.testing.assert_allclose(retract(Y, 0.0 * D), Y, **ROUNDING)
    t = 1e-5  # central difference: truncation t² |D|³ / 6 ~ 1e-9, rounding 1e-16 / t ~ 1e-11
    np.testing.assert_allclose((retract(Y, t * D) - retract(Y, -t * D)) / (2 * t), D, rtol=0, atol=1e-7)


def integrated_geodesic(Y_MR: Array, D_MR: Array) -> Array:
    """Solve the canonical metric's geodesic equation, Ÿ + ẎẎᵀY + Y((YᵀẎ)² + ẎᵀẎ) = 0 (EAS 2.41), over unit time."""
    shape = Y_MR.shape

    def derivative(_: float, state: Array) -> Array:
        Y, V = state[: Y_MR.size].reshape(shape), state[Y_MR.size :].reshape(shape)
        acceleration = -V @ V.T @ Y - Y @ ((Y.T @ V) @ (Y.T @ V) + V.T @ V)
        return np.r_[V.ravel(), acceleration.ravel()]

    start = np.r_[Y_MR.ravel(), D_MR.ravel()]
    solution = scipy.integrate.solve_ivp(derivative, (0.0, 1.0), start, method="DOP853", rtol=1e-12, atol=1e-13)
    return solution.y[: Y_MR.size, -1].reshape(shape)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_exp_map_solves_the_geodesic_equation(rng: np.random.Generator, M: int, R: int) -> None:
    Y = random_point(rng, M, R)
    D = 0.5 * random_tangent(rng, Y)
    # The integrator keeps 1e-12 a step over some tens of steps.
    np.testing.assert_allclose(reference.exp_map(Y, D), integrated_geodesic(Y, D), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_exp_map_has_constant_canonical_speed(rng: np.random.Generator, M: int, R: int) -> None:
    Y = random_point(rng, M, R)
    D, t = random_tangent(rng, Y), 1e-5
    for s in (0.0, 0.4, 1.3):
        velocity = (reference.exp_map(Y, (s + t) * D) - reference.exp_map(Y, (s - t) * D)) / (2 * t)
        speed = reference.canonical_inner(reference.exp_map(Y, s * D), velocity, velocity)
        np.testing.assert_allclose(speed, reference.canonical_inner(Y, D, D), rtol=1e-7)  # central difference


@pytest.mark.parametrize(("M", "R", "part"), [(9, 3, "horizontal"), (5, 5, "vertical"), (9, 3, "vertical")])
def test_exp_map_equals_geoopts_and_pymanopts_where_the_metrics_share_geodesics(
    rng: np.random.Generator, M: int, R: int, part: str
) -> None:
    """Both libraries follow the Euclidean metric; its geodesics are the canonical ones for YᵀD = 0 and for D = Y A."""
    Y = random_point(rng, M, R)
    vertical = Y @ (Y.T @ random_tangent(rng, Y))
    D = vertical if part == "vertical" else random_tangent(rng, Y)
    D = D if part == "vertical" else D - Y @ (Y.T @ D)
    expected = pymanopt.manifolds.Stiefel(M, R).exp(Y, D)
    np.testing.assert_allclose(reference.exp_map(Y, D), expected, rtol=0, atol=1e-11)  # their block expm is not skew
    geoopts = geoopt.EuclideanStiefelExact().expmap(*as_torch(Y, D))
    np.testing.assert_allclose(reference.exp_map(Y, D), geoopts.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["polar_retraction", "exp_map"])
@pytest.mark.parametrize(("M", "R"), SHAPES)
def test_taylor_remainder_is_of_second_order(rng: np.random.Generator, name: str, M: int, R: int) -> None:
    """f(R_Y(tD)) − f(Y) − t <grad f, D> shrinks as t²: gradient, metric and retraction fit together."""
    retract, Y = getattr(reference, name), random_point(rng, M, R)
    Q, C = rng.standard_normal((M, M)), rng.standard_normal((M, R))
    D = random_tangent(rng, Y)
    D /= np.linalg.norm(D)

    def f(X: Array) -> float:
        return 0.5 * float(np.sum((Q @ X - C) ** 2))

    gradient = reference.riemannian_gradient(Y, Q.T @ (Q @ Y - C))
    slope_at_zero = reference.canonical_inner(Y, gradient, D)
    steps = np.logspace(-4, -2, 9)  # remainders 1e-8 to 1e-4, rounding 1e-14: two digits of slope and more
    remainders = [abs(f(retract(Y, t * D)) - f(Y) - t * slope_at_zero) for t in steps]
    slope = np.polyfit(np.log(steps), np.log(remainders), 1)[0]
    assert slope == pytest.approx(2.0, abs=0.05)


# ------------------------------------------------------------------------------------------------ optimizers

OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (reference.SGD, torch.optim.SGD, {"lr": 0.05}),
    "sgd_l2": (reference.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd_momentum": (reference.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd_dampening": (reference.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3}),
    "sgd_nesterov": (reference.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adam": (reference.Adam, torch.optim.Adam, {"lr": 0.05}),
    "adam_l2": (reference.Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "adamw": (reference.AdamW, torch.optim.AdamW, {"lr": 0.05}),
    "adamw_decay": (reference.AdamW, torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    "rmsprop": (reference.RMSprop, torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop_momentum": (
        reference.RMSprop,
        torch.optim.RMSprop,
        {"lr": 0.005, "alpha": 0.9, "momentum": 0.8, "eps": 1e-4, "weight_decay": 0.1},
    ),
    "adagrad": (reference.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad_decay": (
        reference.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-4},
    ),
}
DEFAULTS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]


def compare_over_thirty_steps(rng: np.random.Generator, ours: Any, make_torchs: Callable[[Any], Any]) -> None:
    """Step both along one random sequence of gradients that depends on the parameters, as training does."""
    params = [rng.standard_normal((4, 3)), rng.standard_normal(5)]
    twins = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    theirs = make_torchs(twins)
    for _ in range(30):
        noise = [rng.standard_normal(p.shape) for p in params]
        for twin, n in zip(twins, noise, strict=True):
            twin.grad = torch.from_numpy(n) + twin.detach()
        ours.step(params, [n + p for n, p in zip(noise, params, strict=True)])
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            np.testing.assert_allclose(p, twin.detach().numpy(), **ROUNDING)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_torchs(rng: np.random.Generator, name: str) -> None:
    ours, theirs, options = OPTIMIZERS[name]
    compare_over_thirty_steps(rng, ours(**options), lambda twins: theirs(twins, **options))


@pytest.mark.parametrize("name", DEFAULTS)
def test_optimizer_defaults_are_torchs(rng: np.random.Generator, name: str) -> None:
    compare_over_thirty_steps(rng, getattr(reference, name)(), getattr(torch.optim, name))


def test_optimizers_follow_a_schedule_on_lr(rng: np.random.Generator) -> None:
    params, twin = [np.ones(3)], torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    ours, theirs = reference.AdamW(lr=0.1), torch.optim.AdamW([twin], lr=0.1)
    for lr in (0.1, 0.05, 0.01):
        g = rng.standard_normal(3)
        ours.lr = theirs.param_groups[0]["lr"] = lr
        twin.grad = torch.from_numpy(g)
        ours.step(params, [g])
        theirs.step()
    np.testing.assert_allclose(params[0], twin.detach().numpy(), **ROUNDING)


# ------------------------------------------------------------------------------------------------ StelLA's scheme


def stella_problem(rng: np.random.Generator) -> tuple[list[Array], list[float | None]]:
    M, N, R, hidden = 7, 5, 3, 6
    params = [random_point(rng, M, R), np.eye(R), random_point(rng, N, R)]
    return params, [np.sqrt(hidden / M), None, np.sqrt(hidden / N)]


@pytest.mark.parametrize(("retraction", "steps", "tolerance"), [("polar", 30, 1e-11), ("exp_map", 5, 1e-8)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_riemannian_reference_equals_the_scheme_put_together_from_libraries(
    rng: np.random.Generator, name: str, retraction: Any, steps: int, tolerance: float
) -> None:
    """torch.optim, geoopt's gradient, pymanopt's projection, SciPy's polar factor or integrated geodesic.

    Tolerance: rounding grown over thirty steps of an adaptive optimizer; the integrator's 1e-9 over five.
    """
    make_ours, make_theirs, options = OPTIMIZERS[name]
    params, scales = stella_problem(rng)
    ours = reference.RiemannianReference(make_ours(**options), step_scale=scales, retraction=retraction)
    twins = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    theirs = make_theirs(twins, **options)
    for _ in range(steps):
        grads = [rng.standard_normal(p.shape) for p in params]
        kept = [g.copy() for g in grads]
        ours.step(params, grads)
        for g, k in zip(grads, kept, strict=True):
            np.testing.assert_array_equal(g, k)

        starts = [twin.detach().clone() for twin in twins]
        for twin, g, scale in zip(twins, kept, scales, strict=True):
            G = torch.from_numpy(g)
            twin.grad = G if scale is None else geoopt.CanonicalStiefel().egrad2rgrad(twin.detach(), G)
        theirs.step()
        for twin, start, scale in zip(twins, starts, scales, strict=True):
            if scale is not None:
                Y, moved = start.numpy(), twin.detach().numpy()
                delta = pymanopt.manifolds.Stiefel(*Y.shape).projection(Y, (moved - Y) * scale)
                end = scipy.linalg.polar(Y + delta)[0] if retraction == "polar" else integrated_geodesic(Y, delta)
                twin.data.copy_(torch.from_numpy(end))
    for p, twin in zip(params, twins, strict=True):
        np.testing.assert_allclose(p, twin.detach().numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("retraction", ["polar", "exp_map"])
def test_decoupled_weight_decay_does_not_touch_a_stiefel_factor(rng: np.random.Generator, retraction: Any) -> None:
    params, scales = stella_problem(rng)
    twins = [p.copy() for p in params]
    decayed = reference.RiemannianReference(
        reference.AdamW(lr=0.05, weight_decay=0.3), step_scale=scales, retraction=retraction
    )
    plain = reference.RiemannianReference(
        reference.AdamW(lr=0.05, weight_decay=0.0), step_scale=scales, retraction=retraction
    )
    for _ in range(10):
        grads = [rng.standard_normal(p.shape) for p in params]
        decayed.step(params, grads)
        plain.step(twins, grads)
    for i in (0, 2):
        np.testing.assert_allclose(params[i], twins[i], rtol=0, atol=1e-11)  # rounding, grown over ten steps
    assert not np.allclose(params[1], twins[1], rtol=0, atol=1e-3)  # S decays


@pytest.mark.parametrize("retraction", ["polar", "exp_map"])
def test_riemannian_reference_descends_to_the_leading_subspace(rng: np.random.Generator, retraction: Any) -> None:
    """Minimising −tr(YᵀQY) finds the leading eigenvectors' subspace; NumPy's eigh knows the minimum."""
    C = rng.standard_normal((8, 8))
    Q = C @ C.T / 8
    params = [random_point(rng, 8, 3)]
    riemannian = reference.RiemannianReference(reference.SGD(lr=0.1), step_scale=[1.0], retraction=retraction)
    for _ in range(2000):
        riemannian.step(params, [-2 * Q @ params[0]])
    best = np.linalg.eigvalsh(Q)[-3:].sum()
    np.testing.assert_allclose(np.trace(params[0].T @ Q @ params[0]), best, rtol=1e-9)  # converged


def test_hidden_size_scale_is_the_square_root_of_the_ratio() -> None:
    assert reference.hidden_size_scale(4096, 1024) == 2.0


# ------------------------------------------------------------------------------------------------ analysis


def with_spectrum(rng: np.random.Generator, sigma: list[float], T: int = 20, M: int = 9) -> Array:
    """Outputs whose centred form has these singular values, plus an arbitrary mean."""
    C = rng.standard_normal((T, len(sigma)))
    left = scipy.linalg.orth(C - C.mean(0))
    return left @ np.diag(sigma) @ random_point(rng, M, len(sigma)).T + rng.standard_normal(M)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_effective_rank_of_k_equal_singular_values_is_k(rng: np.random.Generator, k: int) -> None:
    assert reference.effective_rank(with_spectrum(rng, [3.0] * k)) == pytest.approx(k, rel=1e-9)  # σ noise 1e-15 · ln


def test_spectrum_effective_rank_and_manifold_dimension_of_a_known_spectrum(rng: np.random.Generator) -> None:
    sigma = np.sqrt([0.50, 0.30, 0.15, 0.048, 0.002])
    Y_TM = with_spectrum(rng, list(sigma))
    np.testing.assert_allclose(reference.centred_singular_values(Y_TM), [*sigma, 0, 0, 0, 0], **ROUNDING)
    np.testing.assert_allclose(reference.normalised_spectrum(Y_TM)[:5], sigma / sigma.sum(), **ROUNDING)
    assert reference.effective_rank(Y_TM) == pytest.approx(np.exp(scipy.stats.entropy(sigma)), rel=1e-9)
    assert reference.manifold_dimension(Y_TM) == 3  # 0.50, 0.80, 0.95, 0.998, 1.00
    assert [reference.manifold_dimension(Y_TM, energy=e) for e in (0.45, 0.55, 0.85, 0.99, 0.999)] == [1, 2, 3, 4, 5]


def test_analysis_of_constant_outputs_says_why_there_is_none() -> None:
    for analysis in (reference.normalised_spectrum, reference.effective_rank, reference.manifold_dimension):
        with pytest.raises(ValueError, match="all zero: they have no normalised spectrum"):
            analysis(np.zeros((4, 3)))
