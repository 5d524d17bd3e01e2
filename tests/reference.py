"""The papers' equations in plain NumPy/SciPy float64: the oracle of this test suite.

Nothing here imports the library or torch, and nothing here is fast. Every function is its equation, line by line.
Sources: LoRA (arXiv 2106.09685), CeRA (arXiv 2602.22911), AuroRA (arXiv 2505.18738), StelLA (arXiv 2510.01938),
"EAS" = Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints" (1998).

Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank, K = G + k basis functions
(G grid intervals, splines of order k, that is, of polynomial degree k).
A linear map is stored as (outputs, inputs), inputs are rows: ``A x`` for all tokens at once reads ``x_TN @ A_RN.T``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import scipy.linalg
import scipy.special

Array = np.ndarray


# ------------------------------------------------------------------------------------------------ activations


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    return scipy.special.expit(z)


def silu(z: Array) -> Array:
    """SiLU(z) = z · sigmoid(z)."""
    return z * sigmoid(z)


def relu(z: Array) -> Array:
    """max(z, 0)."""
    return np.maximum(z, 0.0)


def identity(z: Array) -> Array:
    """Return z."""
    return z


def leaky_relu(z: Array) -> Array:
    """z where z >= 0, 0.01 z elsewhere."""
    return np.where(z >= 0.0, z, 0.01 * z)


CERA_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": silu, "relu": relu, "identity": identity}
AURORA_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "leaky_relu": leaky_relu,
    "sigmoid": sigmoid,
}


# ------------------------------------------------------------------------------------------------ LoRA and CeRA


def lora(x_TN: Array, A_RN: Array, B_MR: Array, scaling: float) -> Array:
    """LoRA's branch output, s · B A x, shape (T, M)."""
    return scaling * (x_TN @ A_RN.T @ B_MR.T)


def cera(
    x_TN: Array,
    A_RN: Array,
    B_MR: Array,
    *,
    scaling: float = 1.0,
    activation: Literal["silu", "relu", "identity"] = "silu",
    keep_TR: Array | None = None,
    p: float = 0.0,
) -> Array:
    """CeRA's branch output, s · B · D_p(act(A x)), shape (T, M).

    D_p is ordinary dropout on the R bottleneck units with the outcome of its draw written out: units with ``keep_TR``
    false become zero, the others are divided by 1 − p. Without ``keep_TR`` (evaluation) D_p is the identity.
    """
    h_TR = CERA_ACTIVATIONS[activation](x_TN @ A_RN.T)
    if keep_TR is not None:
        h_TR = np.where(keep_TR, h_TR / (1.0 - p), 0.0)
    return scaling * (h_TR @ B_MR.T)


# ------------------------------------------------------------------------------------------------ B-splines


def bspline_knots(*, grid_size: int = 5, order: int = 3, grid_range: tuple[float, float] = (-1.0, 1.0)) -> Array:
    """The G + 2k + 1 uniform knots t_j = low + (j − k) h, h = (high − low) / G: the grid and k knots on either side."""
    low, high = grid_range
    h = (high - low) / grid_size
    return np.array([low + (j - order) * h for j in range(grid_size + 2 * order + 1)])


def cox_de_boor(z: float, j: int, order: int, knots: Array) -> float:
    """The B-spline N_{j,k}(z) by the Cox–de Boor recursion.

    N_{j,0}(z) = 1 on [t_j, t_{j+1}), else 0
    N_{j,k}(z) = (z − t_j) / (t_{j+k} − t_j) · N_{j,k−1}(z) + (t_{j+k+1} − z) / (t_{j+k+1} − t_{j+1}) · N_{j+1,k−1}(z)
    """
    if order == 0:
        return 1.0 if knots[j] <= z < knots[j + 1] else 0.0
    rise = (z - knots[j]) / (knots[j + order] - knots[j])
    fall = (knots[j + order + 1] - z) / (knots[j + order + 1] - knots[j + 1])
    return rise * cox_de_boor(z, j, order - 1, knots) + fall * cox_de_boor(z, j + 1, order - 1, knots)


def bspline_basis(
    z: Array, *, grid_size: int = 5, order: int = 3, grid_range: tuple[float, float] = (-1.0, 1.0)
) -> Array:
    """All K = G + k B-splines of order k at every (finite) entry of z, shape z.shape + (K,); zero off their support."""
    z = np.asarray(z, dtype=np.float64)
    knots = bspline_knots(grid_size=grid_size, order=order, grid_range=grid_range)
    basis = np.zeros((*z.shape, grid_size + order))
    for index in np.ndindex(*z.shape):
        for j in range(grid_size + order):
            basis[(*index, j)] = cox_de_boor(float(z[index]), j, order, knots)
    return basis


# ------------------------------------------------------------------------------------------------ AuroRA


def aurora_core(
    z_TR: Array,
    H_RR: Array,
    W_RK: Array,
    *,
    spline: Literal["pooled", "per_dim"] = "pooled",
    activation: Literal["tanh", "leaky_relu", "sigmoid"] = "tanh",
    fixed: bool = True,
    learnable: bool = True,
    grid_size: int = 5,
    order: int = 3,
    grid_range: tuple[float, float] = (-1.0, 1.0),
) -> Array:
    """AuroRA's adaptive nonlinear layer σ(z) = F(z) + L(z), shape (T, R).

    F(z) = act( H · act(z) )                         (dropped where fixed=False)
    L(z) = W_s · Σ_i b(z_i)          "pooled"        (dropped where learnable=False)
    L_i(z) = Σ_j W_s[i, j] b_j(z_i)  "per_dim"
    """
    act = AURORA_ACTIVATIONS[activation]
    T, R = z_TR.shape
    out_TR = np.zeros((T, R))
    if fixed:
        out_TR += act(act(z_TR) @ H_RR.T)
    if learnable:
        b_TRK = bspline_basis(z_TR, grid_size=grid_size, order=order, grid_range=grid_range)
        for t in range(T):
            pooled_K = sum(b_TRK[t, i] for i in range(R))
            for i in range(R):
                out_TR[t, i] += W_RK[i] @ (pooled_K if spline == "pooled" else b_TRK[t, i])
    return out_TR


def aurora(
    x_TN: Array, A_RN: Array, B_MR: Array, H_RR: Array, W_RK: Array, scaling: float, **core_options: Any
) -> Array:
    """AuroRA's branch output, evaluated dynamically: s · B · σ(A x), shape (T, M). Options: see `aurora_core`."""
    return scaling * (aurora_core(x_TN @ A_RN.T, H_RR, W_RK, **core_options) @ B_MR.T)


def aurora_static_delta(
    A_RN: Array, B_MR: Array, H_RR: Array, W_RK: Array, scaling: float, **core_options: Any
) -> Array:
    """AuroRA's static weight update ΔW = s · B · σ(A), σ applied to each column of A; shape (M, N)."""
    delta_MN = np.zeros((B_MR.shape[0], A_RN.shape[1]))
    for j in range(A_RN.shape[1]):
        column_R = aurora_core(A_RN[:, j][None, :], H_RR, W_RK, **core_options)[0]
        delta_MN[:, j] = scaling * (B_MR @ column_R)
    return delta_MN


def aurora_parameter_count(
    in_features: int, out_features: int, rank: int, *, grid_size: int = 5, order: int = 3
) -> int:
    """Trainable parameters of one AuroRA layer: r (m + n) + r² + r (G + k)."""
    return rank * (out_features + in_features) + rank**2 + rank * (grid_size + order)


# ------------------------------------------------------------------------------------------------ StelLA


def stella(x_TN: Array, U_MR: Array, S: Array, Vt_RN: Array, scaling: float) -> Array:
    """StelLA's branch output, s · U S Vᵀ x, shape (T, M); S dense (R, R) or the diagonal (R,) of one."""
    S_RR = np.diag(S) if S.ndim == 1 else S
    return scaling * (x_TN @ Vt_RN.T @ S_RR.T @ U_MR.T)


# ------------------------------------------------------------------------------------------------ Stiefel geometry
# Y (M, R) has orthonormal columns, G is a Euclidean gradient at Y, D a direction; D is tangent where YᵀD is skew.


def sym(X_RR: Array) -> Array:
    """The symmetric part, (X + Xᵀ) / 2."""
    return (X_RR + X_RR.T) / 2.0


def riemannian_gradient(Y_MR: Array, G_MR: Array) -> Array:
    """The gradient for the canonical metric, G − Y Gᵀ Y (EAS 2.53; StelLA, step 1)."""
    return G_MR - Y_MR @ G_MR.T @ Y_MR


def tangent_projection(Y_MR: Array, D_MR: Array) -> Array:
    """Orthogonal projection to the tangent space at Y, D − Y sym(YᵀD) (EAS 2.4; StelLA, step 4)."""
    return D_MR - Y_MR @ sym(Y_MR.T @ D_MR)


def polar_retraction(Y_MR: Array, D_MR: Array) -> Array:
    """polar(Y + D): with the thin SVD Y + D = U Σ Vᵀ, the nearest matrix with orthonormal columns, U Vᵀ."""
    U_MR, _, Vt_RR = np.linalg.svd(Y_MR + D_MR, full_matrices=False)
    return U_MR @ Vt_RR


def exp_map(Y_MR: Array, D_MR: Array) -> Array:
    """The canonical metric's geodesic from Y with velocity D (tangent), followed for unit time: expm(W) Y.

    W = P D Yᵀ − Y Dᵀ P with P = I − ½ Y Yᵀ is skew (M, M) and W Y = D for tangent D.
    """
    P_MM = np.eye(Y_MR.shape[0]) - 0.5 * Y_MR @ Y_MR.T
    W_MM = P_MM @ D_MR @ Y_MR.T - Y_MR @ D_MR.T @ P_MM
    return scipy.linalg.expm(W_MM) @ Y_MR


def canonical_inner(Y_MR: Array, D1_MR: Array, D2_MR: Array) -> float:
    """The canonical metric, tr( D1ᵀ (I − ½ Y Yᵀ) D2 ) (EAS 2.39)."""
    return float(np.trace(D1_MR.T @ (np.eye(Y_MR.shape[0]) - 0.5 * Y_MR @ Y_MR.T) @ D2_MR))


RETRACTIONS: dict[str, Callable[[Array, Array], Array]] = {"polar": polar_retraction, "exp_map": exp_map}


# ------------------------------------------------------------------------------------------------ Euclidean optimizers
# Conventions and defaults are those documented for torch.optim. Every optimizer works on each parameter on its own:
# parameters that need different options (no weight decay on U and V) take two optimizers.


class Optimizer(Protocol):
    """Anything that steps a list of parameters in place."""

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step."""


class SGD:
    """g ← g + λθ;  b ← g at the first step, then μ b + (1 − τ) g;  θ ← θ − lr (b, or g + μ b with Nesterov).

    Without momentum (μ = 0) θ ← θ − lr g. Weight decay λ (L2), momentum μ, dampening τ.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.momentum, self.dampening, self.nesterov = lr, momentum, dampening, nesterov
        self.weight_decay = weight_decay
        self.buffers: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place."""
        for i, (theta, grad) in enumerate(zip(params, grads, strict=True)):
            g = grad + self.weight_decay * theta
            if self.momentum != 0.0:
                if i not in self.buffers:
                    self.buffers[i] = g.copy()
                else:
                    self.buffers[i] = self.momentum * self.buffers[i] + (1.0 - self.dampening) * g
                g = g + self.momentum * self.buffers[i] if self.nesterov else self.buffers[i]
            theta[...] = theta - self.lr * g


class Adam:
    """Adam (arXiv 1412.6980, Algorithm 1), with L2 weight decay g ← g + λθ.

    m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;  θ ← θ − lr · m̂ / (√v̂ + ε),  m̂ = m / (1 − β1ᵗ), v̂ = v / (1 − β2ᵗ).
    """

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t = 0
        self.m: dict[int, Array] = {}
        self.v: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place."""
        self.t += 1
        for i, (theta, grad) in enumerate(zip(params, grads, strict=True)):
            self._update(i, theta, grad + self.weight_decay * theta)

    def _update(self, i: int, theta: Array, g: Array) -> None:
        beta1, beta2 = self.betas
        self.m[i] = beta1 * self.m.get(i, np.zeros_like(theta)) + (1.0 - beta1) * g
        self.v[i] = beta2 * self.v.get(i, np.zeros_like(theta)) + (1.0 - beta2) * g**2
        m_hat = self.m[i] / (1.0 - beta1**self.t)
        v_hat = self.v[i] / (1.0 - beta2**self.t)
        theta[...] = theta - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


class AdamW(Adam):
    """AdamW (arXiv 1711.05101, Algorithm 2): θ ← θ − lr λ θ, decoupled from the gradient, then Adam's step."""

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place."""
        self.t += 1
        for i, (theta, grad) in enumerate(zip(params, grads, strict=True)):
            theta[...] = theta - self.lr * self.weight_decay * theta
            self._update(i, theta, grad)


class RMSprop:
    """v ← α v + (1 − α) g²;  u = g / (√v + ε);  b ← μ b + u;  θ ← θ − lr b (with μ = 0: θ ← θ − lr u)."""

    def __init__(
        self,
        lr: float = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.alpha, self.eps, self.momentum, self.weight_decay = lr, alpha, eps, momentum, weight_decay
        self.v: dict[int, Array] = {}
        self.buffers: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place."""
        for i, (theta, grad) in enumerate(zip(params, grads, strict=True)):
            g = grad + self.weight_decay * theta
            self.v[i] = self.alpha * self.v.get(i, np.zeros_like(theta)) + (1.0 - self.alpha) * g**2
            update = g / (np.sqrt(self.v[i]) + self.eps)
            self.buffers[i] = self.momentum * self.buffers.get(i, np.zeros_like(theta)) + update
            theta[...] = theta - self.lr * self.buffers[i]


class Adagrad:
    """c ← c + g²;  θ ← θ − lr / (1 + (t − 1) η) · g / (√c + ε), with learning-rate decay η."""

    def __init__(
        self,
        lr: float = 1e-2,
        *,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        self.lr, self.lr_decay, self.weight_decay, self.eps = lr, lr_decay, weight_decay, eps
        self.initial_accumulator_value = initial_accumulator_value
        self.t = 0
        self.c: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place."""
        self.t += 1
        lr = self.lr / (1.0 + (self.t - 1) * self.lr_decay)
        for i, (theta, grad) in enumerate(zip(params, grads, strict=True)):
            g = grad + self.weight_decay * theta
            self.c[i] = self.c.get(i, np.full_like(theta, self.initial_accumulator_value)) + g**2
            theta[...] = theta - lr * g / (np.sqrt(self.c[i]) + self.eps)


# ------------------------------------------------------------------------------------------------ StelLA, Algorithm 1


def hidden_size_scale(hidden_size: float, rows: int) -> float:
    """StelLA's gradient scaling for a Stiefel factor of that many rows, √(d / rows)."""
    return float(np.sqrt(hidden_size / rows))


class RiemannianReference:
    """StelLA's five-step scheme (its Algorithm 1) around a Euclidean optimizer.

    Args:
        optimizer: any of the optimizers above; its moments see the Riemannian gradients.
        step_scale: one entry a parameter. A number marks a Stiefel factor, given as Y (rows, R) with orthonormal
            columns (the caller transposes Vᵀ), and multiplies its step: `hidden_size_scale`, or 1.0 for no scaling.
            None marks a Euclidean parameter (S), which the optimizer steps as usual.
        retraction: "polar" or "exp_map".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        step_scale: list[float | None],
        retraction: Literal["polar", "exp_map"] = "polar",
    ) -> None:
        self.optimizer, self.step_scale, self.retract = optimizer, step_scale, RETRACTIONS[retraction]

    def step(self, params: list[Array], grads: list[Array]) -> None:
        """Take one step, in place; `grads` are Euclidean gradients and stay as they are."""
        starts = [Y.copy() for Y in params]
        converted = [
            G if scale is None else riemannian_gradient(Y, G)  # step 1
            for Y, G, scale in zip(params, grads, self.step_scale, strict=True)
        ]
        self.optimizer.step(params, converted)  # step 2
        for Y, moved, scale in zip(starts, params, self.step_scale, strict=True):
            if scale is None:
                continue
            delta = (moved - Y) * scale  # step 3
            delta = tangent_projection(Y, delta)  # step 4
            moved[...] = self.retract(Y, delta)  # step 5


# ------------------------------------------------------------------------------------------------ analysis


def centred_singular_values(Y_TM: Array) -> Array:
    """Singular values, descending, of the output matrix with each output's mean over the tokens subtracted."""
    return np.linalg.svd(Y_TM - Y_TM.mean(axis=0, keepdims=True), compute_uv=False)


def normalised_spectrum(Y_TM: Array) -> Array:
    """p_i = σ_i / Σ σ of the centred outputs; ValueError where Σ σ = 0 (an adapter that still is a no-op)."""
    sigma = centred_singular_values(Y_TM)
    if sigma.sum() == 0.0:
        raise ValueError("The centred outputs are all zero: they have no normalised spectrum. Train the adapter first.")
    return sigma / sigma.sum()


def effective_rank(Y_TM: Array) -> float:
    """exp(−Σ p_i ln p_i), with 0 ln 0 = 0 (Roy & Vetterli 2007)."""
    return float(np.exp(-sum(p * np.log(p) for p in normalised_spectrum(Y_TM) if p > 0.0)))


def manifold_dimension(Y_TM: Array, energy: float = 0.90) -> int:
    """The smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i² (CeRA); ValueError where Σ σ = 0."""
    power = normalised_spectrum(Y_TM) ** 2
    return next(k for k in range(1, len(power) + 1) if power[:k].sum() >= energy * power.sum())
