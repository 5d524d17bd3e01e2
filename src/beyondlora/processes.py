"""Several processes on one job (accelerate, torchrun): who looks at which rows, what all found, weights cut over them.

With one process everything here is the identity. `torch.distributed` is asked, so whoever launched the processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def count() -> int:
    """How many processes work on this."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share(rows: int) -> list[int]:
    """The numbers of the rows that fall to this process.

    Every process gets equally many, the last rows again where they do not come out even: a sharded model (FSDP) takes
    every process for every forward pass.
    """
    number, processes = (distributed.get_rank() if count() > 1 else 0), count()
    return [min(first + number, rows - 1) for first in range(0, rows, processes)]


def gathered(mine: torch.Tensor, rows: int) -> torch.Tensor:
    """What all processes found for their `share` of the rows, in the order of the rows."""
    return torch.stack(_all(mine), dim=1).flatten(0, 1)[:rows]


def gathered_list(mine: list[Any], rows: int) -> list[Any]:
    """The same for anything that can be pickled."""
    return [value for values in zip(*_all(mine), strict=True) for value in values][:rows]


def anywhere(true_here: torch.Tensor) -> bool:
    """Whether something is so in any of the processes, which all ask; on the device that they talk over."""
    if count() > 1:
        true_here = true_here.int()
        distributed.all_reduce(true_here, distributed.ReduceOp.MAX)
    return bool(true_here)


@contextmanager
def whole(model: nn.Module, *, trained: bool = True) -> Iterator[None]:
    """Put together, to be read, weights that are cut over the processes, which all call this: by ZeRO 3 or FSDP2.

    Args:
        trained: the weights that train; False = all.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost may stay whole after a forward pass
    weights = [weight for weight in model.parameters() if weight.requires_grad or not trained]
    with _put_together_by_zero(weights), _copies_in_place_of_shards(model, weights):
        yield


@contextmanager
def writable(model: nn.Module) -> Iterator[None]:
    """For a block in which every process loads the same state dict, `cut_like` the model's, into weights that train."""
    with _put_together_by_zero([weight for weight in model.parameters() if weight.requires_grad], written=True):
        yield


@contextmanager
def _put_together_by_zero(weights: list[nn.Parameter], *, written: bool = False) -> Iterator[None]:
    cut = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not cut:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(cut, modifier_rank=0 if written else None):
        yield


@contextmanager
def _copies_in_place_of_shards(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """FSDP2's own `unshard` would put the frozen weights together, too."""
    cut: list[Any] = [weight for weight in weights if isinstance(weight, DTensor)]
    copies = {id(weight): nn.Parameter(weight.detach().full_tensor(), weight.requires_grad) for weight in cut}
    places = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if id(weight) in copies
    ]
    for held, name, weight in places:
        held[name] = copies[id(weight)]
    try:
        yield
    finally:
        for held, name, weight in places:
            held[name] = weight


def has_shards(model: nn.Module) -> bool:
    """Whether FSDP2 has cut the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def cut_like(state: dict[str, Tensor], model_state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict with its tensors cut as the model's are, where FSDP2 has cut them."""
    return {
        name: distribute_tensor(tensor, there.device_mesh, there.placements)
        if isinstance(there := model_state.get(name), DTensor)
        else tensor
        for name, tensor in state.items()
    }


def part_here(weight: Any) -> Tensor:
    """What this process keeps of a weight, without its gradient: all of it, or its part of one that is cut up."""
    here: Tensor = getattr(weight, "ds_tensor", weight).detach()
    return here.to_local() if isinstance(here, DTensor) else here


def put_back(weight: Any, part: Tensor) -> None:
    """Write what `part_here` gave before."""
    part_here(weight).copy_(part)
    if hasattr(weight, "ds_tensor"):
        weight.partition()  # it may be whole at the moment, and not know of this


def _all(mine: Any) -> list[Any]:
    found: list[Any] = [mine] * count()
    if count() > 1:
        distributed.all_gather_object(found, mine)
    return found
