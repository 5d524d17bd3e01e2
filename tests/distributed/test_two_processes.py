"""Two gloo processes on a CPU train as one does (DDP); sharded factors are refused."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from beyondlora.adapters import StellaAdapter
from beyondlora.manifold import StiefelLinear, distance_to_stiefel

STEPS, ROWS = 10, 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(StellaAdapter(12, 9, 3, grad_scaling=16.0), nn.Tanh(), StellaAdapter(9, 7, 3))


def train(net: nn.Module, parameters: Any, rank: int = 0, world: int = 1) -> None:
    x, target = (torch.randn(STEPS, ROWS, width, generator=torch.Generator().manual_seed(width)) for width in (12, 7))
    optimizer = torch.optim.AdamW(parameters, 0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(x[step, rank::world]) - target[step, rank::world]).square().mean().backward()
        optimizer.step()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = model()
    train(DistributedDataParallel(net), net.parameters(), rank, 2)
    torch.save(net.state_dict(), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone = model()
    train(alone, alone.parameters())
    multiprocessing.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)  # float32 means of halves, through Adam
        if "core" not in name:
            tall = value if value.shape[0] > value.shape[1] else value.mT
            mine = first[name] if tall is value else first[name].mT
            assert distance_to_stiefel(mine) <= 1e-6


def test_sharded_factors_are_refused_before_anything_moved() -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        mesh, layer = init_device_mesh("cpu", (1,)), StiefelLinear(4, 16)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        layer.weight.grad = distribute_tensor(torch.randn(16, 4), mesh)
        before = layer.weight.full_tensor().clone()
        with pytest.raises(ValueError, match=r"sharded over processes.*use DDP"):
            torch.optim.SGD(layer.parameters(), 0.1).step()
        assert torch.equal(layer.weight.full_tensor(), before)
    finally:
        distributed.destroy_process_group()
