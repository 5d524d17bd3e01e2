"""StelLA beyond its equation (`test_adapter.py`): starts, geometry, gradient scaling, refusals.

Legend of the shape suffixes: N inputs, M outputs, R rank.
"""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import nn

from beyondlora.adapters import StellaAdapter
from beyondlora.manifold import StiefelLinear, distance_to_stiefel

SHAPES = [(6, 9, 3), (9, 6, 3), (5, 5, 5), (7, 4, 1)]  # (N, M, R)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def factors(adapter: StellaAdapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U (M, R), S (R, R) or (R,), and V (N, R)."""
    U, S, Vt = (adapter.parts()[letter].weight.detach().numpy() for letter in ("U", "S", "Vt"))
    return U, S, Vt.T


@pytest.mark.parametrize("geometry", ["stiefel", "euclidean"])
@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("start", ["rando", "zero"])
@pytest.mark.parametrize(("N", "M", "R"), SHAPES)
def test_random_start_is_orthonormal_with_identity_or_zero_in_the_middle(
    N: int, M: int, R: int, start: Any, diag_s: bool, geometry: Any
) -> None:
    adapter = StellaAdapter(N, M, R, start=start, diag_s=diag_s, geometry=geometry, scaling=0.5)
    U, S, V = factors(adapter)
    assert (U.shape, V.shape, S.shape) == ((M, R), (N, R), (R,) if diag_s else (R, R))
    for Y in (U, V):
        np.testing.assert_allclose(Y.T @ Y, np.eye(R), rtol=0, atol=1e-6)  # float32
    middle = np.ones(R) if diag_s else np.eye(R)
    np.testing.assert_array_equal(S, middle if start == "rando" else 0 * middle)
    norm = torch.linalg.matrix_norm(adapter.delta_weight()).item()
    assert norm == pytest.approx(0.5 * np.sqrt(R) if start == "rando" else 0.0, rel=1e-6)


def test_zero_start_is_a_no_op_and_the_default_is_not() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(StellaAdapter(6, 5, 3, start="zero")(x), torch.zeros(4, 5))
    assert StellaAdapter(6, 5, 3)(x).abs().max() > 0.1


def test_random_starts_differ() -> None:
    one, other = StellaAdapter(6, 6, 2), StellaAdapter(6, 6, 2)
    for Y, Z in [(one.up.weight, other.up.weight), (one.down.weight, other.down.weight)]:
        assert (Y - Z).abs().max() > 0.01
    assert (one.up.weight - one.down.weight.mT).abs().max() > 0.01


@pytest.mark.parametrize("geometry", ["stiefel", "euclidean"])
@pytest.mark.parametrize("start", ["svd_major", "svd_minor"])
@pytest.mark.parametrize(("N", "M", "R"), SHAPES)
def test_svd_starts_are_numpys_singular_vectors(N: int, M: int, R: int, start: Any, geometry: Any) -> None:
    W0_MN = torch.randn(M, N, dtype=torch.float64)
    U, S, V = factors(StellaAdapter(N, M, R, start=start, base_weight=W0_MN, geometry=geometry, dtype=torch.float64))
    left, _, right = np.linalg.svd(W0_MN.numpy(), full_matrices=False)
    kept = range(R) if start == "svd_major" else range(min(M, N) - R, min(M, N))
    for column, i in enumerate(kept):  # u_i v_iᵀ is the same whichever sign the pair took
        pair = np.outer(U[:, column], V[:, column])
        np.testing.assert_allclose(pair, np.outer(left[:, i], right[i]), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(S, np.eye(R))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_svd_start_of_a_half_precision_base_is_orthonormal_in_float32(dtype: torch.dtype) -> None:
    W0_MN = torch.randn(12, 8).to(dtype)
    adapter = StellaAdapter(8, 12, 3, start="svd_major", base_weight=W0_MN)
    assert adapter.up.weight.dtype == adapter.down.weight.dtype == torch.float32
    for layer in (adapter.up, adapter.down):
        assert distance_to_stiefel(layer.orthonormal) < 2e-6  # LAPACK's float32 SVD


@pytest.mark.parametrize("start", ["svd_major", "svd_minor"])
def test_svd_start_without_the_base_weight_says_what_to_pass(start: Any) -> None:
    with pytest.raises(ValueError, match=f"start='{start}' takes singular vectors of the base weight: pass base_weig"):
        StellaAdapter(6, 5, 3, start=start)


# ------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("retraction", ["polar", "exp_map"])
@pytest.mark.parametrize("grad_scaling", [None, 4096.0, 3])
@pytest.mark.parametrize(("N", "M", "R"), SHAPES)
def test_factors_carry_retraction_and_step_scale(
    N: int, M: int, R: int, grad_scaling: float | None, retraction: Any
) -> None:
    adapter = StellaAdapter(N, M, R, grad_scaling=grad_scaling, retraction=retraction)
    for layer, rows in [(adapter.up, M), (adapter.down, N)]:
        assert isinstance(layer, StiefelLinear)
        assert layer.retraction == retraction
        expected = 1.0 if grad_scaling is None else reference.hidden_size_scale(grad_scaling, rows)
        assert layer.step_scale == pytest.approx(expected, rel=1e-15)
        assert layer.orthonormal.shape == (rows, R)


def test_euclidean_geometry_has_no_stiefel_factor() -> None:
    adapter = StellaAdapter(6, 5, 3, geometry="euclidean", grad_scaling=16.0)
    assert type(adapter.up) is type(adapter.down) is nn.Linear


def test_only_the_factors_keep_float32() -> None:
    adapter = StellaAdapter(6, 5, 3).to(torch.bfloat16)
    dtypes = {letter: module.weight.dtype for letter, module in adapter.parts().items()}
    assert dtypes == {"U": torch.float32, "S": torch.bfloat16, "Vt": torch.float32}
    assert adapter(torch.randn(2, 6)).dtype == torch.float32
    diagonal = StellaAdapter(6, 5, 3, diag_s=True).to(torch.bfloat16)
    assert diagonal(torch.randn(2, 6)).dtype == diagonal.delta_weight().dtype == torch.float32


@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("start", ["rando", "svd_major"])
def test_meta_device(start: Any, diag_s: bool) -> None:
    adapter = StellaAdapter(6, 5, 3, start=start, diag_s=diag_s, device="meta")
    assert {p.device.type for p in adapter.parameters()} == {"meta"}
    adapter.to_empty(device="cpu").reset_parameters()
    for layer in (adapter.up, adapter.down):
        assert distance_to_stiefel(layer.orthonormal) < 1e-6


def test_no_stella_adapter_refuses_or_warns_on_merging() -> None:
    for options in ({}, {"diag_s": True}, {"geometry": "euclidean"}):
        adapter = StellaAdapter(6, 5, 3, **options)
        assert adapter.merge_refusal is adapter.merge_warning is None


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (6, 5, 6),
            {},
            "r=6 is larger than the smaller side of this 5×6 layer, and 6 orthonormal columns do not exist in 5 "
            "dimensions. Choose r ≤ 5, a smaller rank for this layer by rank_pattern, or leave it out by "
            "exclude_modules.",
        ),
        ((3, 8, 4), {}, "r=4 is larger than the smaller side of this 8×3 layer"),
        ((3, 8, 4), {"geometry": "euclidean"}, "r=4 is larger than the smaller side of this 8×3 layer"),
        ((6, 5, 3), {"retraction": "qr"}, "retraction='qr' is unknown; choose one of ['exp_map', 'polar']."),
        ((6, 5, 3), {"geometry": "flat"}, "geometry='flat' is unknown; choose one of ['euclidean', 'stiefel']."),
        (
            (6, 5, 3),
            {"start": "pseudo-zero"},
            "start='pseudo-zero' is unknown; choose one of ['rando', 'svd_major', 'svd_minor', 'zero'].",
        ),
    ],
)
def test_what_cannot_be_is_refused(shape: tuple[int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the text is compared below, brackets and all
        StellaAdapter(*shape, **options)
    assert message in str(refusal.value)
