"""Factors in partitions like ZeRO's, two gloo processes on a CPU: trained as one process trains whole ones.

DeepSpeed itself is tried in test_deepspeed.py where it is installed. Here stand-ins lay weights out as it does, so that
the step is tested everywhere: factors cut across processes, in the other process alone, in two groups, filled up.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from two_processes import (
    ROWS,
    Skipping,
    adamw,
    alone,
    assert_close,
    assert_orthonormal,
    both,
    join,
    leave,
    model,
    train,
)

from beyondlora.manifold import StiefelLinear, distance_to_stiefel

WORLD = 2


class DeepSpeedZeroOptimizer:
    """As stages 1 and 2: the weights of a group end to end, cut in two. Its name is what it is found by."""

    def __init__(self, net: nn.Module) -> None:
        weights = list(net.parameters())
        self.bit16_groups = [weights[0::2], weights[1::2]]
        self.single_partition_of_fp32_groups = []
        rank = distributed.get_rank()
        for group in self.bit16_groups:
            flat = self.flat([weight.detach() for weight in group])
            size = len(flat) // WORLD
            self.single_partition_of_fp32_groups.append(nn.Parameter(flat[rank * size : (rank + 1) * size].clone()))
            first = -rank * size  # of a weight in this process's vector
            for weight in group:
                begin, end = max(first, 0), min(first + weight.numel(), size)
                weight._dp_group = None
                weight._hp_mapping = None
                if begin < end:
                    weight._hp_mapping = SimpleNamespace(
                        lp_fragment_address=SimpleNamespace(start=begin - first, numel=end - begin),
                        hp_fragment_address=SimpleNamespace(start=begin, numel=end - begin),
                    )
                first += weight.numel()
        self.optimizer = adamw_of(self.single_partition_of_fp32_groups)

    @staticmethod
    def flat(tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(
            torch.promote_types(tensors[0].dtype, torch.float32)
        )
        return nn.functional.pad(flat, (0, -len(flat) % (2 * WORLD)))

    def step(self) -> None:
        groups, rank = self.optimizer.param_groups, distributed.get_rank()
        for i, (weights, vector) in enumerate(
            zip(self.bit16_groups, self.single_partition_of_fp32_groups, strict=True)
        ):
            gradient = self.flat([weight.grad for weight in weights])
            distributed.all_reduce(gradient)
            vector.grad = gradient.div_(WORLD)[rank * len(vector) : (rank + 1) * len(vector)].clone()
            self.optimizer.param_groups = [groups[i]]
            self.optimizer.step()
            self.optimizer.param_groups = groups
            for weight, whole in zip(weights, self.whole(i), strict=True):
                weight.data.copy_(whole)

    def zero_grad(self) -> None:
        for group in self.bit16_groups:
            for weight in group:
                weight.grad = None

    def whole(self, i: int) -> list[Tensor]:
        vector, weights = self.single_partition_of_fp32_groups[i].detach(), self.bit16_groups[i]
        parts = [torch.empty_like(vector) for _ in range(WORLD)]
        distributed.all_gather(parts, vector)
        sizes = [weight.numel() for weight in weights]
        flats = torch.cat(parts)[: sum(sizes)].split(sizes)
        return [flat.view(weight.shape) for flat, weight in zip(flats, weights, strict=True)]


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801
    """As stage 3: every weight cut in two by itself, and nothing left on the module while the optimizer steps."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = list(net.parameters())
        self.fp16_groups = [self.weights]
        self.grad_position = {}
        offset = 0
        for number, weight in enumerate(self.weights):
            weight.ds_id, weight.ds_numel, weight.ds_process_group = number, weight.numel(), None
            weight._z3_optimizer = self
            self.grad_position[number] = [0, offset, -(-weight.numel() // WORLD)]
            offset += self.grad_position[number][2]
        self.shapes = [weight.shape for weight in self.weights]
        self.fp32_partitioned_groups_flat = [nn.Parameter(self.mine([w.detach() for w in self.weights]))]
        self.optimizer = adamw_of(self.fp32_partitioned_groups_flat)

    def get_param_id(self, weight: Any) -> int:
        return weight.ds_id

    def mine(self, tensors: list[Tensor]) -> Tensor:
        rank = distributed.get_rank()
        filled = [nn.functional.pad(tensor.flatten(), (0, tensor.numel() % WORLD)) for tensor in tensors]
        return torch.cat([flat.view(WORLD, -1)[rank] for flat in filled])

    def step(self) -> None:
        gradients = [weight.grad for weight in self.weights]
        for gradient in gradients:
            distributed.all_reduce(gradient)
            gradient.div_(WORLD)
        vector = self.fp32_partitioned_groups_flat[0]
        vector.grad = self.mine(gradients)
        for weight in self.weights:
            weight.grad, weight.data = None, weight.new_empty(0)
        try:
            self.optimizer.step()
        finally:
            parts = [torch.empty_like(vector) for _ in range(WORLD)]
            distributed.all_gather(parts, vector.detach())
            for weight, shape in zip(self.weights, self.shapes, strict=True):
                _, offset, size = self.grad_position[weight.ds_id]
                flat = torch.cat([part[offset : offset + size] for part in parts])
                weight.data = flat[: weight.ds_numel].view(shape)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


def adamw_of(vectors: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Weight decay group by group, as AdamW's default would have it.
    return torch.optim.AdamW([{"params": [vector]} for vector in vectors], 0.01)


# What each of the two processes does ------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    found: dict[str, Any] = {}
    for stage, kind in (("2", DeepSpeedZeroOptimizer), ("3", DeepSpeedZeroOptimizer_Stage3)):
        net = model(torch.float64)
        zero = kind(net)
        train(net, zero, range(20), rank, 2)
        found[stage] = {name: weight.detach().clone() for name, weight in net.named_parameters()}
        found[f"poison {stage}"] = poisoned(net, zero, rank)
        if rank == 0:  # a step of this process alone, of something else: the other one must not be waited for
            beside = nn.Linear(2, 2)
            beside(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(beside.parameters(), 0.1).step()
    found["half"] = half_precision(rank)
    leave(found, folder / f"{rank}.pt")


def poisoned(net: nn.Module, zero: Any, rank: int) -> tuple[str, bool]:
    """What a nan in one process's gradient does."""
    before = {name: weight.detach().clone() for name, weight in net.named_parameters() if "core" not in name}
    net(torch.ones(ROWS, 12).double()).sum().backward()
    if rank == 0:
        net[0].up.weight.grad[0, 0] = float("nan")
    optimizer, message = zero.optimizer, ""
    zero.optimizer = Skipping(optimizer.param_groups)
    zero.step()  # a step that is skipped, as a gradient scaler has it, is no error
    zero.optimizer = optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        net(torch.ones(ROWS, 12).double()).sum().backward()
        net[0].up.weight.grad[0, 0] = float("nan")
    try:
        zero.step()
    except FloatingPointError as error:
        message = str(error)
    now = dict(net.named_parameters())
    # Factors of the other group have been retracted from where they were: rounding.
    return message, all(torch.allclose(now[name], value, rtol=0, atol=1e-14) for name, value in before.items())


def half_precision(rank: int) -> tuple[list[str], list[str], float, float]:
    """What is said of factors in bfloat16, and once their float32 copies were moved; how far these and they are off."""
    net = model()
    for layer in net.modules():
        if isinstance(layer, StiefelLinear):
            layer.weight.data = layer.weight.data.bfloat16()
    zero = DeepSpeedZeroOptimizer(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net.train()
            train(net, zero, range(3), rank, 2)
        said = [str(warning.message) for warning in caught if "Stiefel" in str(warning.message)]
        zero.single_partition_of_fp32_groups[0].data.mul_(1.001)  # nothing that rounding did
        train(net, zero, range(1), rank, 2)
    moved = [str(warning.message) for warning in caught if "Stiefel" in str(warning.message)]
    index = next(i for i, weight in enumerate(zero.bit16_groups[0]) if weight is net[0].up.weight)
    return (
        said,
        moved,
        distance_to_stiefel(zero.whole(0)[index]).item(),
        distance_to_stiefel(net[0].up.weight.float()).item(),
    )


# What is true of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return both(worker, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_in_partitions_they_train_as_one_process_does(stage: str, found: Any) -> None:
    expected = alone(20, adamw, torch.float64)
    for process in found:
        assert_close(process[stage], expected, atol=1e-10)
    assert_orthonormal(found[0][stage])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_nan_of_one_process_is_refused_by_both_and_the_factors_stay(stage: str, found: Any) -> None:
    for process in found:
        message, stayed = process[f"poison {stage}"]
        assert "AdamW made Stiefel factors nan or infinite" in message
        assert stayed


def test_beside_weights_in_bfloat16_the_float32_copies_are_on_the_manifold_and_nothing_is_said(found: Any) -> None:
    for process in found:
        said, moved, masters, weights = process["half"]
        assert said == []
        assert moved
        assert all("had left the manifold" in warning for warning in moved)
        assert masters <= 1e-6
        assert 1e-4 < weights < 1e-1
