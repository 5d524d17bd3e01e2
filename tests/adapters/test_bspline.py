"""B-splines against SciPy's.

Legend: T tokens, R rank, K = G + k basis functions.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import stats
from scipy.interpolate import BSpline

from beyondlora.adapters.bspline import SPLINES, PerDimSpline, PooledSpline, bspline_basis

ROUNDING: dict[str, Any] = {"rtol": 0, "atol": 1e-12}  # float64 on both sides, values in [0, 1]
GRIDS = [
    {"grid_size": size, "order": order, "grid_range": grid_range}
    for size, order, grid_range in itertools.product(
        [1, 2, 5, 8], [0, 1, 2, 3, 4], [(-1.0, 1.0), (0.0, 1.0), (-2.5, 3.75)]
    )
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def grid_knots(grid: dict[str, Any]) -> np.ndarray:
    low, high = grid["grid_range"]
    reach = grid["order"] * (high - low) / grid["grid_size"]
    return np.linspace(low - reach, high + reach, grid["grid_size"] + 2 * grid["order"] + 1)


@every_grid
def test_basis_equals_scipys_inside_the_grid(grid: dict[str, Any]) -> None:
    z = np.random.default_rng(0).uniform(*grid["grid_range"], 50)
    expected = BSpline.design_matrix(z, grid_knots(grid), grid["order"]).toarray()
    ours = bspline_basis(torch.from_numpy(z), **grid)
    np.testing.assert_allclose(ours.numpy(), expected, **ROUNDING)
    np.testing.assert_allclose(ours.sum(-1).numpy(), 1.0, **ROUNDING)


@every_grid
def test_basis_equals_scipys_elements_everywhere(grid: dict[str, Any]) -> None:
    """SciPy's single basis elements are zero off their support, also where it lies beyond the grid."""
    knots, order = grid_knots(grid), grid["order"]
    span = knots[-1] - knots[0]
    z = np.random.default_rng(1).uniform(knots[0] - span / 2, knots[-1] + span / 2, 200)
    ours = bspline_basis(torch.from_numpy(z), **grid).numpy()
    assert ours.shape == (200, grid["grid_size"] + order)
    for j in range(ours.shape[1]):
        element = BSpline.basis_element(knots[j : j + order + 2], extrapolate=False)
        np.testing.assert_allclose(ours[:, j], np.nan_to_num(element(z)), **ROUNDING)


@every_grid
def test_basis_at_the_knots_equals_the_recursion(grid: dict[str, Any]) -> None:
    knots = reference.bspline_knots(**grid)
    z = np.r_[knots, np.nextafter(knots, np.inf), np.nextafter(knots, -np.inf), knots[0] - 9, knots[-1] + 9]
    ours = bspline_basis(torch.from_numpy(z), **grid).numpy()
    np.testing.assert_allclose(ours, reference.bspline_basis(z, **grid), **ROUNDING)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivative_equals_scipys(order: int) -> None:
    grid: dict[str, Any] = {"grid_size": 5, "order": order, "grid_range": (-1.0, 1.0)}
    z = np.random.default_rng(0).uniform(-1, 1, 30)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: bspline_basis(v, **grid)))(torch.from_numpy(z))
    identity = np.eye(5 + order)
    expected = BSpline(grid_knots(grid), identity, order).derivative()(z)
    np.testing.assert_allclose(jacobian.numpy(), expected, rtol=0, atol=1e-11)  # values up to 1 / spacing = 2.5


def test_intervals_are_half_open_and_everything_beyond_the_outermost_knots_is_zero() -> None:
    # Binary fractions: the knots −1, −½, 0, ½, 1 are exact, so equality is meant.
    boxes = bspline_basis(torch.tensor([-1.25, -1.0, -0.5, 0.75, 1.0]), grid_size=4, order=0)
    assert boxes.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert not bspline_basis(torch.tensor([-2.5, 2.5, -40.0, 40.0]), grid_size=4, order=3).any()


@every_grid
@pytest.mark.parametrize("far", [1e30, 3e38, float("inf")])
def test_however_far_from_the_grid_it_is_zero_and_so_is_its_slope(grid: dict[str, Any], far: float) -> None:
    z = torch.tensor([far, -far, float("nan"), 0.1], requires_grad=True)
    basis = bspline_basis(z, **grid)
    assert not basis[:2].any()
    assert basis[3].sum() > 0.99
    if grid["order"]:  # steps have no slope
        assert basis[2].isnan().any()
        (slope,) = torch.autograd.grad(basis[:2].sum(), z)
        assert not slope[[0, 1, 3]].any()  # at nan, 0 or nan by the version of torch


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32)]
    + [(half, torch.float32) for half in (torch.float16, torch.bfloat16)],
)
def test_half_precision_is_evaluated_in_float32(given: torch.dtype, returned: torch.dtype) -> None:
    z = torch.linspace(-1.5, 1.5, 41).to(given)
    basis = bspline_basis(z)
    assert basis.dtype == returned
    exact = bspline_basis(z.double())  # the same rounded inputs: only the arithmetic differs
    torch.testing.assert_close(basis.double(), exact, rtol=0, atol=1e-5 if returned == torch.float32 else 1e-15)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("kind", SPLINES)
@pytest.mark.parametrize("grid", GRIDS[::7], ids=str)
def test_spline_layers_equal_scipys_splines(kind: str, grid: dict[str, Any], lead: tuple[int, ...]) -> None:
    """W[i] holds B-spline coefficients, so SciPy evaluates the curve C_i(z) = Σ_j W[i, j] b_j(z) itself."""
    R = 3
    layer = SPLINES[kind](R, **grid, dtype=torch.float64)
    z = np.random.default_rng(2).uniform(*grid["grid_range"], (*lead, R))
    curves = [BSpline(grid_knots(grid), row, grid["order"]) for row in layer.weight.detach().numpy()]
    if kind == "pooled":
        expected = np.stack([curve(z).sum(-1) for curve in curves], axis=-1)
    else:
        expected = np.stack([curve(z[..., i]) for i, curve in enumerate(curves)], axis=-1)
    np.testing.assert_allclose(layer(torch.from_numpy(z)).detach().numpy(), expected, **ROUNDING)


def test_the_two_readings_are_known_by_their_names() -> None:
    assert {"pooled": PooledSpline, "per_dim": PerDimSpline} == SPLINES


def test_weights_start_as_small_uniform_noise() -> None:
    torch.manual_seed(0)
    noise = PooledSpline(500).weight.detach().flatten().numpy()
    assert noise.shape == (500 * 8,)
    assert stats.kstest(noise, "uniform", args=(-0.1, 0.2)).pvalue > 1e-3


def test_half_precision_layers_return_the_weights_dtype() -> None:
    layer = PerDimSpline(3, dtype=torch.bfloat16)
    assert layer(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", SPLINES)
@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"grid_size": 0}, "grid_size=0 and spline order=3 define no spline: there must be at least 1 interval"),
        ({"order": -1}, "grid_size=5 and spline order=-1 define no spline"),
        ({"grid_range": (1.0, 1.0)}, r"grid_range=\(1.0, 1.0\) is not an interval: give \(low, high\), finite, with"),
        ({"grid_range": (1.0, -1.0)}, "is not an interval"),
        ({"grid_range": (0.0, float("inf"))}, "is not an interval"),
        ({"grid_range": (float("nan"), 1.0)}, "is not an interval"),
        ({"grid_range": (-float("inf"), 0.0)}, "is not an interval"),
        ({"grid_range": (0.0, 1.0, 2.0)}, "is not an interval"),
    ],
)
def test_nonsense_grids_are_refused(kind: str, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPLINES[kind](3, **grid)


def test_an_interval_has_the_knot_that_it_begins_with() -> None:
    knots = torch.linspace(-1, 1, 6)
    assert PooledSpline(2).occupancy(torch.cat([knots, knots - 2])).tolist() == [5, 2, 1, 1, 1, 1, 1]


def test_repr_shows_the_grid() -> None:
    assert repr(PooledSpline(2)) == "PooledSpline(grid_size=5, order=3, grid_range=(-1.0, 1.0))"
