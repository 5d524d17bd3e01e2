"""What tests of two processes share: a model with every kind of factor, its training, and what came of it."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, multiprocessing, nn

from beyondlora.adapters import StellaAdapter
from beyondlora.manifold import distance_to_stiefel

ROWS = 8
Weights = dict[str, Tensor]


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Factors that halve evenly and not, a rank of 1 that leaves a process nothing of Vᵀ, and a geodesic."""
    torch.manual_seed(0)
    return nn.Sequential(
        StellaAdapter(12, 9, 3, grad_scaling=16.0, dtype=dtype),
        nn.Tanh(),
        StellaAdapter(9, 8, 1, dtype=dtype),
        nn.Tanh(),
        StellaAdapter(8, 7, 3, retraction="exp_map", dtype=dtype),
    )


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 0.01)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1
) -> torch.optim.Optimizer:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        dtype = next(net.parameters()).dtype
        x, target = (torch.randn(ROWS, width, generator=generator).to(dtype) for width in (12, 7))
        optimizer.zero_grad()
        (net(x[rank::world]) - target[rank::world]).square().mean().backward()
        optimizer.step()
    return optimizer


class Skipping(torch.optim.SGD):
    """As a fused optimizer that a gradient scaler tells of an infinite gradient."""

    def step(self, closure: Any = None) -> None:
        pass


def alone(steps: int, make: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype) -> Weights:
    net = model(dtype)
    train(net, make(net), range(steps))
    return net.state_dict()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, port: int, world: int = 2) -> None:
    """Make this one of some gloo processes, of one thread each."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    # A call that one process leaves out is an error after some minutes, and no test that never ends.
    patience = timedelta(minutes=4)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=patience)


def of_each(worker: Callable[[int, int, Path], None], folder: Path, world: int) -> list[dict[Any, Any]]:
    """What came out of the worker in each of some processes."""
    multiprocessing.spawn(worker, (free_port(), folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def both(worker: Callable[[int, int, Path], None], folder: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What came out of the worker in each of two processes."""
    first, second = of_each(worker, folder, 2)
    return first, second


def leave(found: Any, path: Path) -> NoReturn:
    """Save what came out and end this process, at once: in an orderly exit gloo's threads may abort it under load."""
    torch.save(found, path)
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


def assert_close(ours: Weights, expected: Weights, atol: float) -> None:
    assert list(ours) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_orthonormal(weights: Weights) -> None:
    for name, value in weights.items():
        if "core" not in name:
            assert distance_to_stiefel(value if value.shape[0] > value.shape[1] else value.mT) <= 1e-6, name
