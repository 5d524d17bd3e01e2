"""The maths of spectra against the direct SVD of the whole matrix, SciPy, constructions of known rank, and laws."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from beyondlora.analyse.spectra import (
    CentredQR,
    effective_rank,
    factored_singular_values,
    manifold_dimension,
    normalised,
    principal_angles,
    product_svd,
    stable_rank,
    unexplained_share,
)

RNG = np.random.default_rng(0)
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}  # rounding of a few hundred operations


def tensor(array):
    return torch.from_numpy(np.asarray(array))


def random(*shape):
    return tensor(RNG.standard_normal(shape))


def direct(Y):
    """Singular values of the centred matrix, from all of it."""
    Y = Y.double().numpy()
    return np.linalg.svd(Y - Y.mean(axis=0), compute_uv=False)


def streamed(X_TC, *sizes):
    qr = CentredQR(X_TC.shape[1])
    for block in X_TC.split(list(sizes) or len(X_TC)):
        qr.add(block)
    return qr


@pytest.mark.parametrize("sizes", [(), (1,) * 50, (3, 17, 0, 30), (49, 1)])
@pytest.mark.parametrize("shape", [(50, 6, 40), (50, 12, 5), (50, 60, 20)])  # (T, R, M): thin; R > M; R > T
def test_the_spectrum_is_that_of_the_whole_centred_matrix_however_it_is_cut(shape, sizes):
    T, R, M = shape
    H, W = random(T, R) + 5, random(M, R)
    sigma, directions = product_svd(streamed(H, *sizes).factor(), W)
    expected = direct(H @ W.mT)
    count = min(len(sigma), len(expected))
    np.testing.assert_allclose(sigma[:count], expected[:count], rtol=1e-10, atol=1e-12 * expected[0])
    assert (expected[count:] < 1e-12 * expected[0]).all()
    np.testing.assert_allclose(directions.mT @ directions, np.eye(directions.shape[1]), atol=1e-12)
    # The directions are where the outputs go: projecting on the first k keeps the first k singular values.
    Y = (H - H.mean(dim=0)) @ W.mT
    np.testing.assert_allclose(torch.linalg.vector_norm(Y @ directions, dim=0), sigma, rtol=1e-9, atol=1e-12 * sigma[0])


def test_small_singular_values_keep_their_digits_where_a_gram_matrix_would_lose_them():
    decay = 10.0 ** -np.arange(10.0)  # a condition number of 1e9; its square is beyond float64
    H = tensor(
        scipy.stats.ortho_group.rvs(200, random_state=1)[:, :10]
        * decay
        @ scipy.stats.ortho_group.rvs(10, random_state=3)
    )
    W = tensor(scipy.stats.ortho_group.rvs(30, random_state=2)[:, :10])
    sigma, _ = product_svd(streamed(H, 64, 64, 72).factor(), W)
    np.testing.assert_allclose(sigma, direct(H @ W.mT)[:10], rtol=1e-5)
    gram = np.cov(H.numpy(), rowvar=False, bias=True) * 200
    assert abs(math.sqrt(abs(np.linalg.eigvalsh(gram)[0])) / sigma[-1] - 1) > 1e-2


def test_a_large_mean_does_not_drown_the_spectrum():
    H, W = random(400, 8), random(20, 8)
    near, _ = product_svd(streamed(H, 100, 100, 200).factor(), W)
    far, _ = product_svd(streamed(H + 1e5, 100, 100, 200).factor(), W)
    np.testing.assert_allclose(far, near, rtol=1e-9)


def test_no_rows_and_one_row_have_no_spectrum():
    assert CentredQR(3).factor().shape == (0, 3)
    assert not streamed(random(1, 3)).factor().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_taken_in_and_computed_in_float64(dtype):
    H = random(60, 4).to(dtype)
    np.testing.assert_allclose(torch.linalg.svdvals(streamed(H, 20, 40).factor()), direct(H), **FLOAT64)


@pytest.mark.parametrize("shape", [(30, 4, 20), (5, 9, 40), (12, 12, 3)])
def test_a_weight_updates_spectrum_is_exact(shape):
    M, R, N = shape
    P, Q = random(M, R), random(R, N)
    expected = np.linalg.svd((P @ Q).numpy(), compute_uv=False)
    sigma = factored_singular_values(P, Q)
    np.testing.assert_allclose(sigma, expected[: len(sigma)], rtol=1e-11, atol=1e-12 * expected[0])
    assert len(sigma) == min(shape)


# Numbers of a spectrum ----------------------------------------------------------------------------------------------


def test_the_effective_rank_is_the_exponential_of_scipys_entropy():
    for sigma in (RNG.random(20), 2.0 ** -np.arange(30), np.r_[RNG.random(5), np.zeros(5)]):
        assert effective_rank(tensor(sigma)) == pytest.approx(np.exp(scipy.stats.entropy(sigma)), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_equal_singular_values_have_their_number_as_every_rank(rank):
    sigma = tensor(np.r_[np.full(rank, 2.5), np.zeros(4)])
    assert effective_rank(sigma) == pytest.approx(rank, rel=1e-12)
    assert stable_rank(sigma) == pytest.approx(rank, rel=1e-12)
    assert manifold_dimension(sigma) == math.ceil(0.9 * rank)


def test_the_manifold_dimension_counts_squares_up_to_ninety_percent():
    sigma = np.sort(RNG.random(40))[::-1]
    shares = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert manifold_dimension(tensor(sigma.copy())) == next(k for k in range(1, 41) if shares[k - 1] >= 0.9)
    assert manifold_dimension(tensor(sigma.copy()), energy=1.0) == 40


def test_the_stable_rank_is_the_ratio_of_frobenius_and_spectral_norm():
    A = RNG.standard_normal((9, 7))
    expected = np.linalg.norm(A) ** 2 / np.linalg.norm(A, 2) ** 2
    assert stable_rank(torch.linalg.svdvals(tensor(A))) == pytest.approx(expected, rel=1e-12)


def test_ranks_do_not_depend_on_scale_or_rotation():
    A = random(30, 6)
    rotation = tensor(scipy.stats.ortho_group.rvs(6, random_state=3))
    one, other = torch.linalg.svdvals(A), torch.linalg.svdvals(1e-9 * A @ rotation)
    for number in (effective_rank, stable_rank, manifold_dimension):
        assert number(one) == pytest.approx(number(other), rel=1e-9)


@pytest.mark.parametrize("number", [normalised, effective_rank, stable_rank, manifold_dimension])
def test_a_spectrum_of_zeros_is_refused(number):
    with pytest.raises(ValueError, match="no shape"):
        number(torch.zeros(4))


# Two matrices -------------------------------------------------------------------------------------------------------


def test_the_unexplained_share_is_that_of_least_squares():
    Z, W = random(80, 5), random(12, 5)
    H = torch.nn.functional.silu(3 * Z)
    Y = (H @ W.mT).numpy()
    design = np.c_[np.ones(80), Z.numpy()]
    residual = Y - design @ np.linalg.lstsq(design, Y, rcond=None)[0]
    expected = (residual**2).sum() / ((Y - Y.mean(axis=0)) ** 2).sum()
    assert unexplained_share(streamed(torch.cat([Z, H], 1), 30, 50).factor(), W) == pytest.approx(expected, rel=1e-10)


def test_an_affine_hidden_is_explained_and_too_few_rows_explain_anything():
    Z, W = random(80, 5), random(12, 5)
    affine = Z @ random(5, 5) + 2
    assert unexplained_share(streamed(torch.cat([Z, affine], 1)).factor(), W) < 1e-20
    assert unexplained_share(streamed(torch.cat([Z, Z**2], 1)[:6]).factor(), W) is None


def test_principal_angles_are_scipys_down_to_the_smallest():
    A, _ = torch.linalg.qr(random(20, 4))
    for B in (random(20, 4), A + 1e-9 * random(20, 4), A @ random(4, 4)):
        B, _ = torch.linalg.qr(B)
        expected = np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy()))
        np.testing.assert_allclose(principal_angles(A, B).sort().values, expected, rtol=1e-5, atol=1e-14)
