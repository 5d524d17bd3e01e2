"""The float32 step, fast: what `stiefel.py` defines, with as few passes over the tall matrices as there can be.

    before   G ← G − Y (GᵀY)                                  two products, in place
    after    A = (1 − c) I − c sym(YᵀỸ − I)                   c the step scale: Y + to_tangent(c (Ỹ − Y)) = Y A + c Ỹ
             Z = Y A + c Ỹ                                    in place of Ỹ
             Y ← Z (ZᵀZ)^{-1/2}                               the inverse root by Newton–Schulz on R×R matrices

The projection may take YᵀY for I: what that gets wrong is symmetric, and the polar factor removes it. The Gram matrix
of Z is the actual one, so that rounding does not pile up over steps.

Two forms: one matrix after the other (CPU: no copies, and a step that is too long is seen and handed to the definition
in float64), and a stack (CUDA: few launches, no look at a value, hence no synchronisation).
Legend: M rows, R columns (rank), B matrices of one shape in a stack. Y point, Z the step before retraction.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .stiefel import polar_retraction, sym, to_tangent

NEAR, ROUNDS = 1e-3, 8  # below NEAR one more cubic round leaves 5/16 · NEAR³, under float32's rounding
STACKED_ROUNDS = 32  # σ grows by up to 3/2 a round
UNEVEN = 2.0  # mean(λ) · mean(1/λ) of a Gram matrix from which its float32 rounding is felt; 1 for I


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Keep TF32, bfloat16 products and autocast away: they break orthonormality to 2e-3."""
    asked = torch.get_float32_matmul_precision()
    if asked != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        if asked != "highest":
            torch.set_float32_matmul_precision(asked)


def convert_gradient_(Y_MR: Tensor, G_MR: Tensor) -> bool:
    """Turn G into the Riemannian gradient at Y, in place. Returns: whether G was finite."""
    H_RR = G_MR.mT @ Y_MR
    G_MR.addmm_(Y_MR, H_RR, alpha=-1)
    return bool(torch.isfinite(H_RR.sum()))  # nan and infinity survive every product and sum


def retract_(before_MR: Tensor, after_MR: Tensor, scale: float, scratch_MR: Tensor) -> bool:
    """Turn the Euclidean step from `before` to `after` into the polar one, in place of `after`.

    Returns: whether `after` was finite; where it was not, it is left as it is.
    """
    A_RR = _projection(before_MR.mT @ after_MR, scale)
    if not A_RR.abs().amax() < 2:  # a step longer than the manifold is wide: what Y A and c Ỹ share would cancel
        if not torch.isfinite(after_MR).all():
            return False
        step = (after_MR.double() - before_MR.double()) * scale
        after_MR.copy_(polar_retraction(before_MR.double(), to_tangent(before_MR.double(), step)))
        return True
    after_MR.addmm_(before_MR, A_RR, beta=scale)
    root_RR = inverse_root(after_MR.mT @ after_MR)
    if root_RR is None:
        after_MR.copy_(polar_retraction(after_MR, torch.zeros_like(after_MR)))
    else:
        torch.mm(after_MR, root_RR.to(after_MR.dtype), out=scratch_MR)
        after_MR.copy_(scratch_MR)
    return True


def inverse_root(gram_RR: Tensor) -> Tensor | None:
    """gram^{-1/2} of a matrix near I by cubic Newton–Schulz rounds; None where it is too far for them."""
    gram_RR = gram_RR.double()  # R×R work in float64 is free beside the tall products
    root_RR, rest_RR = None, _minus_identity(gram_RR)
    for _ in range(ROUNDS):
        distance = rest_RR.norm().item()
        if not distance < 0.9:
            return None
        factor_RR = _cubic(rest_RR)
        root_RR = factor_RR if root_RR is None else root_RR @ factor_RR
        if distance < NEAR:
            return root_RR
        rest_RR = _minus_identity(root_RR.mT @ gram_RR @ root_RR)
    return None


def convert_gradients_stacked_(Y_BMR: Tensor, G_BMR: Tensor) -> Tensor:
    """`convert_gradient_` for a stack. Returns: (B,), which gradients were finite."""
    H_BRR = G_BMR.mT @ Y_BMR
    G_BMR.baddbmm_(Y_BMR, H_BRR, alpha=-1)
    return torch.isfinite(H_BRR).all(dim=-1).all(dim=-1)


def retract_stacked_(before_BMR: Tensor, after_BMR: Tensor, scale: float, allowed_B: Tensor) -> Tensor:
    """`retract_` for a stack, the result in place of `before`.

    Matrices that are not allowed to move, not finite, or whose step is so absurd that a float32 Gram matrix cannot tell
    where it leads, stay where they were.

    Returns: (B,), which matrices took the step.
    """
    after_BMR.baddbmm_(before_BMR, _projection(before_BMR.mT @ after_BMR, scale), beta=scale)
    root_BRR, converged_B = _inverse_root_blind((after_BMR.mT @ after_BMR).double())
    moved_B = allowed_B & converged_B
    moved_B11 = moved_B[:, None, None]
    root_BRR = torch.where(moved_B11, root_BRR, torch.zeros_like(root_BRR)).to(after_BMR.dtype)
    after_BMR.copy_(torch.where(moved_B11, after_BMR, torch.zeros_like(after_BMR)))
    before_BMR.mul_(~moved_B11)
    before_BMR.baddbmm_(after_BMR, root_BRR)
    return moved_B


def _inverse_root_blind(gram_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """gram^{-1/2} with a fixed number of rounds, scaled so that they converge from anywhere, and where they did."""
    size_B11 = gram_BRR.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # the trace bounds the largest eigenvalue
    rest_BRR = gram_BRR / size_B11
    eye_RR = torch.eye(gram_BRR.shape[-1], dtype=gram_BRR.dtype, device=gram_BRR.device)
    root_BRR = eye_RR.expand_as(gram_BRR)
    for _ in range(STACKED_ROUNDS):
        factor_BRR = 1.5 * eye_RR - 0.5 * rest_BRR
        root_BRR = root_BRR @ factor_BRR
        rest_BRR = sym(factor_BRR @ rest_BRR @ factor_BRR)
    root_BRR = root_BRR * size_B11.rsqrt()
    # Against the Gram matrix itself: one whose small eigenvalues drowned in rounding converges to the wrong root.
    check_BRR = root_BRR @ gram_BRR @ root_BRR - eye_RR
    mean_B = size_B11[:, 0, 0] * root_BRR.square().sum(dim=(-2, -1)) / gram_BRR.shape[-1] ** 2
    return root_BRR, (check_BRR.abs().amax(dim=(-2, -1)) < 1e-6) & (mean_B < UNEVEN)


def _projection(H_RR: Tensor, scale: float) -> Tensor:
    """A with Y + to_tangent(c (Ỹ − Y)) = Y A + c Ỹ, from H = YᵀỸ: (1 − c) I − c (sym H − I) = I − c sym H."""
    A_RR = sym(H_RR).mul_(-scale)
    A_RR.diagonal(dim1=-2, dim2=-1).add_(1)
    return A_RR


def _minus_identity(gram_RR: Tensor) -> Tensor:
    gram = gram_RR.clone()
    gram.diagonal().sub_(1)
    return gram


def _cubic(rest_RR: Tensor) -> Tensor:
    """I − E/2 + 3/8 E², the inverse root of I + E to third order."""
    factor = torch.addmm(rest_RR, rest_RR, rest_RR, beta=-0.5, alpha=0.375)
    factor.diagonal().add_(1)
    return factor
