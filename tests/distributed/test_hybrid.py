"""Hybrid sharding: four gloo processes, in two pairs that each hold the factors in halves, train as one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from two_processes import adamw, alone, assert_close, join, leave, model, of_each, train

from beyondlora.adapters import StellaAdapter

STEPS = 20


def fsdp_2(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    for layer in net:
        fully_shard(layer, mesh=mesh) if isinstance(layer, StellaAdapter) else None
    return fully_shard(net, mesh=mesh)


def fsdp_1(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    return FullyShardedDataParallel(
        net,
        auto_wrap_policy=ModuleWrapPolicy({StellaAdapter}),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )


WAYS = {"FSDP2": fsdp_2, "FSDP1": fsdp_1}


def worker(rank: int, port: int, folder: Path) -> None:
    join(rank, port, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found: dict[str, Any] = {}
    for name, cut in WAYS.items():
        net = cut(model(torch.float64), mesh)
        train(net, adamw(net), range(STEPS), rank, 4)
        found[name] = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    leave(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_each(worker, tmp_path_factory.mktemp("hybrid"), 4)


@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_as_one_does(way: str, found: list[dict[str, Any]]) -> None:
    for process in found:
        assert_close(process[way], alone(STEPS, adamw, torch.float64), atol=1e-10)
