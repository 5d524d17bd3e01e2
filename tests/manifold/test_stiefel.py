"""The pure functions of the Stiefel manifold against NumPy, SciPy, pymanopt, geoopt, and by the Taylor-slope law.

Legend of the shape suffixes: M rows, R columns. Y point, D any matrix, xi tangent.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import scipy.linalg
import torch
from manifold.third_party import SHAPES, float64, geoopt, pymanopt, random_point, random_tangent, tensors
from scipy import stats
from torch import Tensor

from beyondlora.manifold.stiefel import (
    RETRACTIONS,
    distance_to_stiefel,
    exp_map,
    polar_retraction,
    random_stiefel,
    riemannian_gradient,
    sym,
    to_tangent,
)

every_shape = pytest.mark.parametrize(("M", "R"), SHAPES)
every_retraction = pytest.mark.parametrize("retract", RETRACTIONS.values(), ids=RETRACTIONS)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------ gradient, tangent


@every_shape
def test_riemannian_gradient_equals_geoopts_and_the_reference(rng: np.random.Generator, M: int, R: int) -> None:
    Y, G = random_point(rng, M, R), rng.standard_normal((M, R))
    ours = riemannian_gradient(*tensors(Y, G))
    np.testing.assert_allclose(ours, geoopt.CanonicalStiefel().egrad2rgrad(*tensors(Y, G)), **float64)
    np.testing.assert_allclose(ours, reference.riemannian_gradient(Y, G), **float64)


@every_shape
def test_to_tangent_equals_pymanopts_and_geoopts(rng: np.random.Generator, M: int, R: int) -> None:
    Y, D = random_point(rng, M, R), rng.standard_normal((M, R))
    ours = to_tangent(*tensors(Y, D))
    np.testing.assert_allclose(ours, pymanopt.manifolds.Stiefel(M, R).projection(Y, D), **float64)
    np.testing.assert_allclose(ours, geoopt.EuclideanStiefel().proju(*tensors(Y, D)), **float64)
    np.testing.assert_allclose(ours, reference.tangent_projection(Y, D), **float64)


@every_shape
def test_to_tangent_keeps_tangents_and_removes_normals(rng: np.random.Generator, M: int, R: int) -> None:
    Y, Z = random_point(rng, M, R), rng.standard_normal((R, R))
    xi = random_tangent(rng, Y)
    np.testing.assert_allclose(to_tangent(*tensors(Y, xi + Y @ (Z + Z.T))), xi, **float64)


@every_shape
def test_riemannian_gradient_is_tangent(rng: np.random.Generator, M: int, R: int) -> None:
    Y, G = tensors(random_point(rng, M, R), rng.standard_normal((M, R)))
    gradient = riemannian_gradient(Y, G)
    np.testing.assert_allclose(to_tangent(Y, gradient), gradient, **float64)


def test_sym_is_the_symmetric_part(rng: np.random.Generator) -> None:
    A = rng.standard_normal((2, 3, 3))
    np.testing.assert_array_equal(sym(*tensors(A)), (A + A.transpose(0, 2, 1)) / 2)


# ------------------------------------------------------------------------------------------------ retractions


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 1.0, 30.0])
@every_shape
def test_polar_retraction_equals_scipys_pymanopts_and_the_references_polar_factor(
    rng: np.random.Generator, M: int, R: int, size: float
) -> None:
    Y = random_point(rng, M, R)
    xi = size * random_tangent(rng, Y)
    ours = polar_retraction(*tensors(Y, xi))
    np.testing.assert_allclose(ours, scipy.linalg.polar(Y + xi)[0], **float64)
    pymanopts = pymanopt.manifolds.Stiefel(M, R, retraction="polar").retraction(Y, xi)
    np.testing.assert_allclose(ours, pymanopts, **float64)
    np.testing.assert_allclose(ours, reference.polar_retraction(Y, xi), **float64)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 1.0, 5.0])
@every_shape
def test_exp_map_equals_the_references_exponential_of_an_m_by_m_matrix(
    rng: np.random.Generator, M: int, R: int, size: float
) -> None:
    Y = random_point(rng, M, R)
    xi = size * random_tangent(rng, Y)
    np.testing.assert_allclose(exp_map(*tensors(Y, xi)), reference.exp_map(Y, xi), **float64)


@pytest.mark.parametrize("part", ["vertical", "horizontal", "rank one"])
@every_shape
def test_exp_map_of_tangents_whose_normal_part_lacks_rank(rng: np.random.Generator, M: int, R: int, part: str) -> None:
    """QR then leaves columns of Q that mean nothing and must not matter."""
    Y = random_point(rng, M, R)
    xi = random_tangent(rng, Y)
    xi = {
        "vertical": Y @ (Y.T @ xi),
        "horizontal": xi - Y @ (Y.T @ xi),
        "rank one": reference.tangent_projection(Y, np.outer(xi[:, 0], np.ones(R))),
    }[part]
    np.testing.assert_allclose(exp_map(*tensors(Y, xi)), reference.exp_map(Y, xi), **float64)


@pytest.mark.parametrize(("M", "R", "part"), [(9, 3, "horizontal"), (5, 5, "vertical"), (9, 3, "vertical")])
def test_exp_map_equals_geoopts_and_pymanopts_where_the_metrics_share_geodesics(
    rng: np.random.Generator, M: int, R: int, part: str
) -> None:
    """Both libraries follow the Euclidean metric: the same geodesics as the canonical one for Yᵀxi = 0 and xi = Y A."""
    Y = random_point(rng, M, R)
    xi = random_tangent(rng, Y)
    xi = Y @ (Y.T @ xi) if part == "vertical" else xi - Y @ (Y.T @ xi)
    ours = exp_map(*tensors(Y, xi))
    np.testing.assert_allclose(ours, pymanopt.manifolds.Stiefel(M, R).exp(Y, xi), **float64)
    np.testing.assert_allclose(ours, geoopt.EuclideanStiefelExact().expmap(*tensors(Y, xi)), **float64)


def metric(name: str, Y: Tensor, a: Tensor, b: Tensor) -> float:
    """geoopt's inner products: tr(aᵀ(I − ½YYᵀ)b), the canonical one, and tr(aᵀb), the Euclidean one."""
    manifold = {"canonical": geoopt.CanonicalStiefel(), "euclidean": geoopt.EuclideanStiefel()}[name]
    return float(manifold.inner(Y, a, b))


@pytest.mark.parametrize(("name", "slope"), [("canonical", 2.0), ("euclidean", 1.0)])
@every_retraction
@pytest.mark.parametrize(("M", "R"), [shape for shape in SHAPES if shape[1] > 1])  # on a sphere the metrics agree
def test_taylor_remainder_is_of_second_order_for_the_canonical_metric_only(
    rng: np.random.Generator, M: int, R: int, retract: Callable[[Tensor, Tensor], Tensor], name: str, slope: float
) -> None:
    """f(R_Y(t xi)) − f(Y) − t <grad f, xi> is O(t²) if gradient and metric belong together, and O(t) if they do not."""
    Y = random_point(rng, M, R)
    xi = random_tangent(rng, Y)
    Y, xi, Q, C = tensors(Y, xi / np.linalg.norm(xi), rng.standard_normal((M, M)), rng.standard_normal((M, R)))

    def f(X: Tensor) -> float:
        return 0.5 * float(((Q @ X - C) ** 2).sum())

    gradient = riemannian_gradient(Y, Q.T @ (Q @ Y - C))
    steps = np.logspace(-4, -2, 9)  # remainders from 1e-8, rounding 1e-14: two digits of slope and more
    first_order = metric(name, Y, gradient, xi)
    remainders = [abs(f(retract(Y, t * xi)) - f(Y) - t * first_order) for t in steps]
    assert np.polyfit(np.log(steps), np.log(remainders), 1)[0] == pytest.approx(slope, abs=0.1)


@every_retraction
def test_leading_batch_dimensions(rng: np.random.Generator, retract: Callable[[Tensor, Tensor], Tensor]) -> None:
    points = [random_point(rng, 7, 3) for _ in range(6)]
    tangents = [random_tangent(rng, Y) for Y in points]
    Y, xi = (torch.from_numpy(np.stack(a)).reshape(2, 3, 7, 3) for a in (points, tangents))
    for function in (retract, to_tangent, riemannian_gradient):
        batched = function(Y, xi)
        assert batched.shape == (2, 3, 7, 3)
        single = torch.stack([function(y, v) for y, v in zip(Y.flatten(0, 1), xi.flatten(0, 1), strict=True)])
        np.testing.assert_allclose(batched.flatten(0, 1), single, **float64)
    assert distance_to_stiefel(Y).shape == (2, 3)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3, 1e6, 1e8])
@pytest.mark.parametrize("kind", ["any", "rank one"])
@every_retraction
@pytest.mark.parametrize(("M", "R"), [(64, 8), (48, 4), (7, 7), (300, 32), (9, 1)])
def test_float32_results_are_orthonormal_however_absurd_the_step(
    M: int, R: int, retract: Callable[[Tensor, Tensor], Tensor], kind: str, size: float
) -> None:
    """A rank-one step is what one token gives: Y + xi then has singular values 1 and 1e8 beside each other."""
    torch.manual_seed(0)
    Y = random_stiefel(M, R)
    D = torch.randn(M, R) if kind == "any" else torch.randn(M, 1) @ torch.randn(1, R)
    xi = to_tangent(Y, size * D / D.norm())
    end = retract(Y, xi)
    assert end.dtype == torch.float32
    assert distance_to_stiefel(end) < 1e-6  # rounding to float32 once
    if size <= 1:
        torch.testing.assert_close(end.double(), retract(Y.double(), xi.double()), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("kind", ["any", "rank one"])
@every_shape
def test_polar_retraction_is_the_polar_factor_of_an_absurd_step_too(
    rng: np.random.Generator, M: int, R: int, kind: str, size: float
) -> None:
    Y = random_point(rng, M, R)
    D = rng.standard_normal((M, R)) if kind == "any" else np.outer(rng.standard_normal(M), rng.standard_normal(R))
    xi = size * reference.tangent_projection(Y, D)
    ours = polar_retraction(*tensors(Y, xi))
    # The Gram matrix squares the condition number: 1e-16 · 1e8 at worst, beyond which it is not used.
    np.testing.assert_allclose(ours, reference.polar_retraction(Y, xi), rtol=0, atol=1e-8)


@every_retraction
def test_retractions_repair_a_point_that_has_drifted(retract: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    Y = random_stiefel(20, 4) + 1e-3 * torch.randn(20, 4)
    assert distance_to_stiefel(Y) > 1e-3
    assert distance_to_stiefel(retract(Y, torch.zeros(20, 4))) < 1e-6


def test_retractions_are_known_by_their_names() -> None:
    assert {"polar": polar_retraction, "exp_map": exp_map} == RETRACTIONS


# ------------------------------------------------------------------------------------------------ points


@every_shape
def test_distance_to_stiefel_is_the_largest_entry_of_gram_minus_identity(
    rng: np.random.Generator, M: int, R: int
) -> None:
    D = rng.standard_normal((M, R))
    expected = np.abs(D.T @ D - np.eye(R)).max()
    assert distance_to_stiefel(*tensors(D)).item() == pytest.approx(expected, rel=1e-12)
    assert distance_to_stiefel(*tensors(random_point(rng, M, R))) < 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@every_shape
def test_random_stiefel_is_orthonormal(M: int, R: int, dtype: torch.dtype, tolerance: float) -> None:
    Y = random_stiefel(M, R, dtype=dtype)
    assert (Y.shape, Y.dtype) == ((M, R), dtype)
    assert distance_to_stiefel(Y) < tolerance


@pytest.mark.parametrize("entry", [(0, 0), (3, 1), (4, 2)])
def test_random_stiefel_is_uniform(entry: tuple[int, int]) -> None:
    """An entry u of a Haar matrix is a coordinate of a uniform unit vector: (u + 1) / 2 ~ Beta((M−1)/2, (M−1)/2)."""
    torch.manual_seed(0)
    M = 5
    entries = np.array([random_stiefel(M, 3)[entry].item() for _ in range(2000)])
    shape = (M - 1) / 2
    assert stats.kstest((entries + 1) / 2, "beta", args=(shape, shape)).pvalue > 1e-3


def test_random_stiefel_refuses_more_columns_than_rows() -> None:
    message = "5 orthonormal columns do not exist in 4 dimensions; choose a rank of at most 4."
    with pytest.raises(ValueError, match=message):
        random_stiefel(4, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_or_better_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Y = random_stiefel(20, 4, dtype=dtype)
    xi = torch.randn(20, 4).to(dtype)
    options: dict[str, Any] = {"rtol": 0, "atol": 0}
    for retract in RETRACTIONS.values():
        torch.testing.assert_close(retract(Y, xi), retract(Y.double(), xi.double()).to(dtype), **options)
