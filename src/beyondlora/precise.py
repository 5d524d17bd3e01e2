"""float64 for a tensor on any device: there, or on the CPU if the device has none (Apple's GPUs, some of Intel's)."""

import functools

import torch
from torch import Tensor


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, found out by doing it, once."""
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:  # a RuntimeError, and no answer
        raise
    except (TypeError, RuntimeError):  # MPS raises the first, XPU the second
        return False
    return True


def precise_device(device: torch.device) -> torch.device:
    """The device itself where it has float64 (and with it the factorisations of `torch.linalg`), otherwise the CPU."""
    return device if device.type == "cpu" or has_float64(device) else torch.device("cpu")


def precise(A: Tensor) -> Tensor:
    """A in float64, on the CPU if its own device has none.

    >>> precise(torch.ones(2)).dtype
    torch.float64
    """
    return A.to(precise_device(A.device)).to(torch.float64)
