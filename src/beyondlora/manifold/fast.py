"""The float32 step, fast: what `stiefel.py` defines, with as few passes over the tall matrices as there can be.

    before   G ← G − Y (GᵀY)                                  two products, in place
    after    Ỹ ← Y + c (Ỹ − Y)                                c the step scale
             H = YᵀỸ, K = ỸᵀỸ                                 two products
             A = I − sym H                                    Z = Y + to_tangent(Ỹ − Y) = Ỹ + Y A
             W = (ZᵀZ)^{-1/2} = (K + A H + (A H)ᵀ + A²)^{-1/2}
             Y ← Z W = Ỹ W + Y (A W)                          two products

Twice YᵀY is taken for I. In the projection, what that gets wrong is symmetric, and the polar factor removes it; in the
Gram matrix of Z it is multiplied by A², and A is as small as the step (where it is not, the definition is taken). K is
the actual Gram matrix, so that rounding does not pile up over steps. The inverse root is a series in ZᵀZ − I, repeated
(Newton–Schulz) where the step is long.

Two forms: products one after the other and R×R matrices together (CPU: no copies; a step that is too long is seen and
handed to the definition in float64), and a stack (GPUs: few launches, no look at a value, hence no synchronisation).
Legend: M rows, R columns (rank), B matrices of one shape. Y point, Z the step before retraction.
"""

import functools
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..precise import precise
from .stiefel import polar_retraction, to_tangent

NEAR, ROUNDS = 0.03, 8  # below NEAR one more round leaves 63/256 · NEAR⁵, under float32's rounding
REACH = 0.9  # from where the rounds converge
SHORT = 0.7  # of ‖A‖ ≤ ‖A²‖^{1/2}: each step leaves half of an error in YᵀY; from 1 on steps would add to it
BLOCK, SMALL_BLOCK = 512, 64  # rows of a product whose sum is to be exact; of one of fewer than two large blocks
SIDE_BY_SIDE = 16  # columns below which BLAS runs products at a fraction of its speed
UNEVEN = 2.0  # mean(λ) · mean(1/λ) of a Gram matrix from which its float32 rounding is felt; 1 for I
EXACT = ("none", "ieee")  # of torch's settings of float32 products, those that leave them alone
LAST_ROUND, CLOSE = (15 / 8, -5 / 4, 3 / 8), 7e-4  # Taylor's polynomial, which leaves 5/2 · CLOSE³


class _Products:
    """Float32 products that multiply in float32, in all threads for as long as one asks for it: torch has no other."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._asked: list[tuple[Any, str]] = []  # torch's settings that were lowered, and to what

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Keep TF32 and bfloat16 out; what was asked for is asked for again after the last user."""
        with self._lock:
            if not self._users:
                backends: Any = torch.backends
                settings = [(on, on.fp32_precision) for on in (backends.cuda.matmul, backends.mkldnn.matmul)]
                self._asked = [(on, asked) for on, asked in settings if asked not in EXACT]
                for on, _ in self._asked:
                    on.fp32_precision = "ieee"
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    for on, asked in self._asked:
                        on.fp32_precision = "none"  # what the setting above it says
                        if on.fp32_precision != asked:
                            on.fp32_precision = asked


_products = _Products()


@contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """Keep TF32, bfloat16 products and these devices' autocast away: they break orthonormality to 2e-3."""
    with _products.exact(), ExitStack() as off:
        for device_type in filter(torch.is_autocast_enabled, device_types):
            off.enter_context(torch.autocast(device_type, enabled=False))
        yield


def convert_gradient_(Y_MR: Tensor, G_MR: Tensor) -> Tensor:
    """Turn G into the Riemannian gradient at Y, in place. Returns: a number that is finite if G was."""
    total = G_MR.sum()  # nan and infinity survive every sum; and it streams G into the cache
    add_product_(G_MR, Y_MR, inner(G_MR, Y_MR), alpha=-1)
    return total


def retract_(before: list[Tensor], after: list[Tensor], scale: float, scratch_MR: Tensor) -> bool:
    """Turn the Euclidean steps from `before` to `after`, matrices (M, R), into polar ones, in place of `after`.

    Returns: whether every `after` was finite. Where one was not, `after` is of no use.
    """
    products = []
    for Y_MR, Z_MR in zip(before, after, strict=True):
        if scale != 1:
            torch.lerp(Y_MR, Z_MR, scale, out=Z_MR)
        products.append((inner(Y_MR, Z_MR), gram(Z_MR)))
    W_BRR, AW_BRR, near_B = polar_coefficients(*(torch.stack(small) for small in zip(*products, strict=True)))
    for Y_MR, Z_MR, W_RR, AW_RR, near in zip(before, after, W_BRR, AW_BRR, near_B.tolist(), strict=True):
        if near:
            add_product_(scratch_MR, Z_MR, W_RR, beta=0)
            Z_MR.copy_(add_product_(scratch_MR, Y_MR, AW_RR))
        elif torch.isfinite(Z_MR).all():
            step = Z_MR.double() - Y_MR.double()
            Z_MR.copy_(polar_retraction(Y_MR.double(), to_tangent(Y_MR.double(), step)))
        else:
            return False
    return True


def polar_coefficients(H_BRR: Tensor, K_BRR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and A W with polar(Ỹ + Y A) = Ỹ W + Y (A W), from H = YᵀỸ and K = ỸᵀỸ.

    Returns: both, and (B,), for which matrices they hold: the others' steps are too long, or not finite.
    """
    A_BRR = torch.add(H_BRR, H_BRR.mT).mul_(-0.5)  # I − sym H
    A_BRR.diagonal(dim1=-2, dim2=-1).add_(1)
    AH_BRR = A_BRR @ H_BRR
    square_BRR = A_BRR @ A_BRR
    rest_BRR = torch.add(K_BRR, square_BRR).add_(AH_BRR).add_(AH_BRR.mT)
    rest_BRR.diagonal(dim1=-2, dim2=-1).sub_(1)
    W_BRR, near_B = inverse_root(rest_BRR)
    return W_BRR, A_BRR @ W_BRR, near_B & (square_BRR.flatten(1).norm(dim=1) < SHORT**2)


def inverse_root(rest_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """(I + E)^{-1/2} for E near 0, by rounds of Newton–Schulz of fifth order. Returns: it, and (B,), where it holds."""
    within_B = rest_BRR.flatten(1).norm(dim=1)
    root_BRR = _series(rest_BRR)
    if within_B.max() < NEAR:
        return root_BRR, within_B < NEAR
    gram_BRR = rest_BRR.double()
    gram_BRR.diagonal(dim1=-2, dim2=-1).add_(1)
    root_BRR = root_BRR.double()
    reachable_B = within_B < REACH
    for _ in range(ROUNDS):
        rest_BRR = root_BRR.mT @ gram_BRR @ root_BRR
        rest_BRR.diagonal(dim1=-2, dim2=-1).sub_(1)
        near_B = rest_BRR.flatten(1).norm(dim=1) < NEAR
        root_BRR = root_BRR @ _series(rest_BRR)
        if near_B[reachable_B].all():
            break
    return root_BRR.to(torch.float32), near_B & reachable_B


def gram(A_MR: Tensor) -> Tensor:
    """AᵀA, summed over blocks of rows: in one go float32 loses a digit on a tall matrix."""
    M = A_MR.shape[0]
    block = BLOCK if M >= 2 * BLOCK else SMALL_BLOCK
    if 2 * block > M or _rows_side_by_side(A_MR, A_MR) > 1:
        return inner(A_MR, A_MR)
    whole = M - M % block
    blocks = A_MR[:whole].unflatten(0, (-1, block))
    total_RR = torch.bmm(blocks.mT, blocks).sum(0)
    return total_RR.addmm_(A_MR[whole:].mT, A_MR[whole:]) if whole < M else total_RR


def inner(A_MR: Tensor, B_MR: Tensor) -> Tensor:
    """AᵀB."""
    rows, rank = _rows_side_by_side(A_MR, B_MR), A_MR.shape[1]
    if rows == 1:
        return A_MR.mT @ B_MR
    blocks = A_MR.view(-1, rows * rank).mT @ B_MR.view(-1, rows * rank)
    return blocks.view(rows, rank, rows, rank).diagonal(dim1=0, dim2=2).sum(-1)


def add_product_(C_MR: Tensor, A_MR: Tensor, S_RR: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """C ← beta C + alpha A S."""
    rows, rank = _rows_side_by_side(A_MR, C_MR), S_RR.shape[0]
    if rows == 1:
        return C_MR.addmm_(A_MR, S_RR, beta=beta, alpha=alpha)
    spread = S_RR.new_zeros(rows, rank, rows, rank)
    spread.diagonal(dim1=0, dim2=2).copy_(S_RR[..., None])
    width = rows * rank
    C_MR.view(-1, width).addmm_(A_MR.view(-1, width), spread.view(width, width), beta=beta, alpha=alpha)
    return C_MR


def _rows_side_by_side(A_MR: Tensor, B_MR: Tensor) -> int:
    """How many rows of tall, thin matrices to see as one, so that products are neither slow nor summed in one go."""
    M, R = A_MR.shape
    rows = SIDE_BY_SIDE // R
    return rows if rows > 1 and M >= BLOCK and M % rows == 0 and A_MR.is_contiguous() and B_MR.is_contiguous() else 1


def convert_gradients_stacked_(Y_BMR: Tensor, G_BMR: Tensor, H_BRR: Tensor) -> None:
    """`convert_gradient_` for a stack; H becomes GᵀY, all finite where a gradient was."""
    torch.bmm(G_BMR.mT, Y_BMR, out=H_BRR)
    G_BMR.baddbmm_(Y_BMR, H_BRR, alpha=-1)


def project_stacked_(before_BMR: Tensor, after_BMR: Tensor, scale: float, gram_BRR: Tensor) -> None:
    """Turn the Euclidean steps from `before` to `after` into tangent ones, in place of `after`.

    `gram` becomes ZᵀZ for every Z = `after` then.
    """
    torch.bmm(before_BMR.mT, after_BMR, out=gram_BRR)
    twice_BRR = torch.add(gram_BRR, gram_BRR.mT)  # Y + to_tangent(c (Ỹ − Y)) = c Ỹ + Y (I − c sym H)
    twice_BRR.diagonal(dim1=-2, dim2=-1).sub_(2 / scale)
    after_BMR.baddbmm_(before_BMR, twice_BRR, beta=scale, alpha=-scale / 2)
    torch.bmm(after_BMR.mT, after_BMR, out=gram_BRR)


@functools.cache
def polynomials(rank: int) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of odd polynomials aσ + bσ³ + cσ⁵ that, one after another, take every σ² in [1 / (UNEVEN R²), 1] to 1.

    Each is the nearest to 1 on what the one before has left (Remez; Amsel and others, arXiv 2505.16932), divided by the
    largest value that it has there.
    """
    low, chosen = (UNEVEN * rank**2) ** -0.5, []
    while 1 - low > CLOSE:
        *polynomial, error = _nearest_to_one(low)
        chosen.append(tuple(coefficient / (1 + error) for coefficient in polynomial))
        low = (1 - error) / (1 + error)
    return (*chosen, LAST_ROUND)  # type: ignore[arg-type]


def _nearest_to_one(low: float) -> tuple[float, float, float, float]:
    """The odd polynomial of fifth degree nearest to 1 on [low, 1], a, b, c, and how far it is from it at most."""
    nodes = [low, (3 * low + 1) / 4, (low + 3) / 4, 1.0]
    for _ in range(50):
        # As far above 1 as below it at the four nodes; then these where it turns.
        rows = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(nodes)]
        system = (torch.tensor(side, dtype=torch.float64, device="cpu") for side in (rows, [1.0] * 4))
        a, b, c, error = torch.linalg.solve(*system).tolist()
        turn = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * turn) / (10 * c)) for sign in (-1, 1)]
        if max(abs(x - y) for x, y in zip(inner, nodes[1:3], strict=True)) < 1e-13:
            break
        nodes[1:3] = inner
    return a, b, c, abs(error)


def inverse_roots_blind(gram_BRR: Tensor, allowed_B: Tensor) -> tuple[Tensor, Tensor]:
    """gram^{-1/2} by polynomials of fifth degree in it, a fixed number of rounds.

    Matrices that are not allowed to move, not finite, or so uneven that their float32 rounding is felt (an absurd step)
    get I. The eigenvalues of all others, divided by their sum, are above 1 / (UNEVEN R²): the rounds are what that
    takes.

    Returns: the roots, and (B,), which matrices move.
    """
    rank = gram_BRR.shape[-1]
    rest_BRR = precise(gram_BRR)
    eye_RR = torch.eye(rank, dtype=torch.float64, device=rest_BRR.device)
    size_B11 = rest_BRR.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # the trace bounds the largest eigenvalue
    rest_BRR = rest_BRR / size_B11
    first, *others = polynomials(rank)
    root_BRR = factor_BRR = _factor(rest_BRR, eye_RR, *first)
    for polynomial in others:
        rest_BRR = factor_BRR @ rest_BRR @ factor_BRR
        factor_BRR = _factor(rest_BRR, eye_RR, *polynomial)
        root_BRR = root_BRR @ factor_BRR
    root_BRR = root_BRR * size_B11.rsqrt()
    # The smaller an eigenvalue, the larger what the rounds make of its inverse: one too small for them is seen, too.
    mean_B = size_B11[:, 0, 0] * root_BRR.square().sum(dim=(-2, -1)) / rank**2
    moved_B = allowed_B.to(mean_B.device) & (mean_B < UNEVEN)
    return torch.where(moved_B[:, None, None], root_BRR, eye_RR).to(gram_BRR), moved_B.to(allowed_B.device)


def _factor(gram_BRR: Tensor, eye_RR: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b gram + c gram²."""
    return torch.baddbmm(eye_RR, gram_BRR, torch.add(gram_BRR, eye_RR, alpha=b / c), beta=a, alpha=c)


def replace_stacked_(before_BMR: Tensor, after_BMR: Tensor, root_BRR: Tensor, moved_B: Tensor) -> None:
    """`before` ← Z root for every Z = `after` that moves; the others, whose root is I, stay to the bit."""
    torch.where(moved_B[:, None, None], after_BMR, before_BMR, out=after_BMR)
    before_BMR.baddbmm_(after_BMR, root_BRR, beta=0)


def _series(rest_BRR: Tensor) -> Tensor:
    """I − E/2 + 3/8 E² − 5/16 E³ + 35/128 E⁴: the inverse root of I + E but for 63/256 E⁵."""
    square_BRR = rest_BRR @ rest_BRR
    inner_BRR = torch.add(square_BRR, rest_BRR, alpha=-8 / 7).mul_(35 / 128)
    inner_BRR.diagonal(dim1=-2, dim2=-1).add_(3 / 8)
    series_BRR = torch.baddbmm(rest_BRR, square_BRR, inner_BRR, beta=-0.5)
    series_BRR.diagonal(dim1=-2, dim2=-1).add_(1)
    return series_BRR
