"""Two gloo processes on a CPU train as one does: DDP, and FSDP2 with factors in shards.

The two processes are started once, do everything of `worker`, and leave what they saw in files.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import (
    Skipping,
    Weights,
    adamw,
    alone,
    assert_close,
    assert_orthonormal,
    both,
    free_port,
    join,
    leave,
    model,
    train,
)

from beyondlora import processes
from beyondlora.adapters import StellaAdapter
from beyondlora.manifold import StiefelLinear, distance_to_stiefel


def sharded(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        fully_shard(layer) if isinstance(layer, StellaAdapter) else None
    return fully_shard(net)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


# What each of the two processes does ------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Notes how many numbers every collective call takes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and not func.__name__.startswith(("wait_tensor", "_wrap")):
            self.sizes.append((func.__name__, args[0].numel()))
        return func(*args, **(kwargs or {}))


def worker(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    found: dict[str, Any] = {}
    net = model()
    train(DistributedDataParallel(net), adamw(net), range(50), rank, 2)
    found["ddp"] = net.state_dict()
    for name, make, dtype in (("float64", adamw, torch.float64), ("float32", sgd, torch.float32)):
        net = sharded(model(dtype))
        optimizer = train(net, make(net), range(20), rank, 2)
        found[name] = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    found["collectives"] = collectives(net, optimizer)
    found["off"] = off(net, optimizer, rank)
    found["poison"] = poisoned(net, optimizer, rank)
    found["skipped"] = poisoned(net, Skipping(net.parameters(), 0.1), rank)
    found["resumed"] = resumed(folder, rank)
    found["whole"] = put_together()
    leave(found, folder / f"{rank}.pt")


def put_together() -> dict[str, Any]:
    """What `processes.whole` shows after a forward pass, which leaves the outermost module whole, and what stays."""
    net = model()
    net.append(nn.Linear(7, 7, bias=False)).append(nn.Linear(7, 7, bias=False))
    net[-1].weight = net[-2].weight
    net[0].up.weight.requires_grad_(False)
    fully_shard(net)
    with torch.no_grad():
        net(torch.zeros(2, 12))
    trained = [name for name, weight in net.named_parameters() if weight.requires_grad]
    with processes.whole(net):
        shown = {name: weight.clone() for name, weight in net.state_dict().items() if name in trained}
        tied = net[-1].weight is net[-2].weight
    with processes.whole(net, trained=False):
        frozen = net[0].up.weight.detach().clone()
    state = net.state_dict()
    found = {
        "shown": shown,
        "tied": tied,
        "frozen": frozen,
        "shards": all(isinstance(v, DTensor) for v in state.values()),
    }
    doubled = {name: 2 * weight for name, weight in shown.items()}
    net.load_state_dict(processes.cut_like(doubled, state), strict=False)
    kept = {name: processes.part_here(weight).clone() for name, weight in net.named_parameters()}
    for name, weight in net.named_parameters():
        processes.put_back(weight, kept[name] + 1)
    with processes.whole(net):
        found["changed"] = {name: weight.detach().clone() for name, weight in net.named_parameters() if name in shown}
    net(torch.zeros(2, 12)).sum().backward()  # it is called as before
    return found


def collectives(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    with Collectives() as seen:
        optimizer.step()
    return json.dumps(seen.sizes)


def off(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[str]:
    """What is said of a factor that one process has moved by hand, a little and a lot, and where it is afterwards."""
    said = []
    local = net[0].up.weight.detach().to_local()
    for factor in (1.001, 1.5):
        local.mul_(factor if rank == 1 else 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                optimizer.step()
            except ValueError as error:
                said.append(str(error))
                local.div_(factor if rank == 1 else 1.0)
        said += [str(warning.message) for warning in caught if "Stiefel" in str(warning.message)]
        said.append(f"{distance_to_stiefel(net[0].up.weight.full_tensor()).item():.0e}")
    return said


def poisoned(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> tuple[str, bool]:
    """What a nan in the gradient's rows of one process does."""
    before = {name: weight.full_tensor() for name, weight in net.named_parameters()}
    if rank == 0:
        net[0].up.weight.grad.detach().to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
        message = ""
    except FloatingPointError as error:
        message = str(error)
    factors = (name for name in before if "core" not in name)
    now = dict(net.named_parameters())
    same = [torch.equal(now[name].full_tensor(), before[name]) for name in factors]  # every process gathers every one
    return message, all(same)


def resumed(folder: Path, rank: int) -> Weights:
    """Leaves a checkpoint of two processes after 10 steps; goes on, from one that a single process left, to 20."""
    net = sharded(model(torch.float64))
    optimizer = train(net, adamw(net), range(10), rank, 2)
    save(net, optimizer, folder / "of-two")
    net = sharded(model(torch.float64))
    optimizer = adamw(net)
    load(net, optimizer, folder / "of-one")
    train(net, optimizer, range(10, 20), rank, 2)
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


def save(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, state = get_state_dict(net, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, state = get_state_dict(net, optimizer)
    kept = {"model": weights, "optimizer": state}
    checkpoint.load(kept, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])


# What is true of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has left a checkpoint, and two leave theirs."""
    place = tmp_path_factory.mktemp("two")
    net = model(torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(net, train(net, adamw(net), range(10)), place / "of-one")
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return both(worker, folder)


def test_under_ddp_both_hold_the_same_bits_after_fifty_steps_and_what_one_process_holds(found: Any) -> None:
    first, second = (process["ddp"] for process in found)
    assert_close(first, second, atol=0)
    assert_close(first, alone(50, adamw, torch.float32), atol=1e-4)  # float32 means of halves, through Adam
    assert_orthonormal(first)


@pytest.mark.parametrize(("name", "make", "atol"), [("float64", adamw, 1e-10), ("float32", sgd, 1e-6)])
def test_in_shards_they_train_as_one_process_does(name: str, make: Any, atol: float, found: Any) -> None:
    expected = alone(20, make, getattr(torch, name))
    start = model(getattr(torch, name)).state_dict()
    for process in found:
        assert_close(process[name], expected, atol)
    assert_orthonormal(found[0][name])
    assert all((expected[key] - start[key]).abs().max() > 1e-2 for key in expected)  # every weight moved


def test_between_processes_go_sums_of_r_by_r_matrices_and_nothing_larger_than_a_factor(found: Any) -> None:
    seen = json.loads(found[0]["collectives"])
    assert seen == json.loads(found[1]["collectives"])
    sums = [size for name, size in seen if "all_reduce" in name]
    others = [size for name, size in seen if "all_reduce" not in name]
    # Polar factors of rank 3 and of rank 1: one sum before the step and two after it; geodesics need no third.
    assert sorted(sums) == sorted([2 * 2 * 9, 2 * 9, 2 * 9, 2 * 2 * 1, 2 * 1, 2 * 1, 2 * 2 * 9, 2 * 9])
    assert max(others) <= 12 * 3


def test_a_factor_that_one_process_has_moved_is_brought_back_or_refused_by_both(found: Any) -> None:
    for process in found:
        warning, back, error, _ = process["off"]
        assert "shape (9, 3) had left the manifold by" in warning
        assert float(back) <= 1e-6
        assert "shape (9, 3) is off the manifold by" in error


def test_a_nan_of_one_process_is_refused_by_both_and_the_factors_stay(found: Any) -> None:
    for process in found:
        message, stayed = process["poison"]
        assert "SGD made Stiefel factors nan or infinite" in message
        assert stayed
        assert process["skipped"] == ("", True)


def test_shards_are_put_together_to_be_read_and_cut_again(found: Any) -> None:
    net = model()
    net.append(nn.Linear(7, 7, bias=False))
    expected = {name: weight.detach() for name, weight in net.named_parameters() if name != "0.up.weight"}
    for mine in (one["whole"] for one in found):
        assert mine["tied"]
        assert mine["shards"]
        assert_close(mine["shown"], expected, atol=0)
        torch.testing.assert_close(mine["frozen"], net[0].up.weight.detach(), rtol=0, atol=0)
        assert_close(mine["changed"], {name: 2 * weight + 1 for name, weight in expected.items()}, atol=0)


def test_checkpoints_go_from_one_process_to_two_and_from_two_to_one(folder: Path, found: Any) -> None:
    expected = alone(20, adamw, torch.float64)
    assert_close(found[0]["resumed"], expected, atol=1e-10)
    net = model(torch.float64)
    optimizer = adamw(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(net, optimizer, folder / "of-two")
    train(net, optimizer, range(10, 20))
    assert_close(net.state_dict(), expected, atol=1e-10)


@pytest.mark.parametrize("sizes", [(4, 16), (16, 4)], ids=["tall", "wide"])
@pytest.mark.parametrize(("rate", "off"), [(1e7, 0.0), (0.1, 1e-3)], ids=["absurd", "off the manifold before"])
@pytest.mark.filterwarnings("ignore:A Stiefel factor .* had left the manifold")
def test_a_step_in_shards_lands_where_a_whole_factor_lands(sizes: tuple[int, int], rate: float, off: float) -> None:
    torch.manual_seed(0)
    whole, layer = (StiefelLinear(*sizes, dtype=torch.float64) for _ in range(2))
    nn.init.zeros_(layer.weight).data.add_(whole.weight.data.mul_(1 + off))
    gradient = torch.outer(torch.randn(sizes[1]), torch.randn(sizes[0])).double()
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        layer.weight.grad = distribute_tensor(gradient.clone(), mesh)
        whole.weight.grad = gradient
        for one in (layer, whole):
            torch.optim.SGD(one.parameters(), rate).step()
        assert isinstance(layer.weight, DTensor)
        torch.testing.assert_close(layer.weight.full_tensor(), whole.weight, rtol=0, atol=1e-8)  # of a step of 1e7
    finally:
        distributed.destroy_process_group()


def test_a_step_in_shards_that_is_not_finite_is_refused_and_the_factor_stays() -> None:
    """The gradient is finite here, and what the optimizer makes of it is not."""
    layer = StiefelLinear(4, 16)
    before = layer.weight.detach().clone()
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(before, mesh))
        layer.weight.grad = distribute_tensor(torch.randn(16, 4), mesh)
        with pytest.raises(FloatingPointError, match="put back"):
            torch.optim.SGD(layer.parameters(), float("inf")).step()
        assert torch.equal(layer.weight.full_tensor(), before)
    finally:
        distributed.destroy_process_group()
