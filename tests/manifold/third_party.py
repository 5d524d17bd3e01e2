"""geoopt, pymanopt and random points, for the oracles here and in test_reference.py; geoopt is imported only here.

`float64` is the rounding of one evaluation in float64 with values of order one.
"""

import warnings
from typing import Any

import numpy as np
import pymanopt as pymanopt
import scipy.linalg
import torch

with warnings.catch_warnings():
    # geoopt 0.5.1 compiles its helpers with torch.jit.script while it is imported; torch 2.13 calls that deprecated.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    import geoopt as geoopt

Array = np.ndarray
float64: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
SHAPES = [(7, 3), (12, 1), (10, 5), (6, 4), (5, 5)]  # (M, R): tall, a sphere, M = 2R, M < 2R, square


def random_point(rng: np.random.Generator, M: int, R: int) -> Array:
    return scipy.linalg.qr(rng.standard_normal((M, R)), mode="economic")[0]


def random_tangent(rng: np.random.Generator, Y_MR: Array) -> Array:
    """Y A + (I − YYᵀ) C with A skew: every tangent has this form (Edelman et al., 2.6), no projection involved."""
    M, R = Y_MR.shape
    A_RR, C_MR = rng.standard_normal((R, R)), rng.standard_normal((M, R))
    return Y_MR @ (A_RR - A_RR.T) / 2 + C_MR - Y_MR @ (Y_MR.T @ C_MR)


def tensors(*arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(a)) for a in arrays]
