"""Several processes on one job (accelerate, torchrun): who looks at which rows, and how each learns what all found.

With one process everything here is the identity. `torch.distributed` is asked, so whoever launched the processes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


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
def whole(weights: Iterable[Tensor], *, written: bool = False) -> Iterator[None]:
    """Put together weights that DeepSpeed (ZeRO 3) has cut over the processes, which all call this, for the time being.

    Args:
        weights: cut or not.
        written: the block writes into them, every process the same; else what it writes is lost.
    """
    cut = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not cut:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(cut, modifier_rank=0 if written else None):
        yield


def part_here(weight: Any) -> Tensor:
    """What this process keeps of a weight, without its gradient: all of it, or its part of one that is cut up."""
    here: Tensor = getattr(weight, "ds_tensor", weight).detach()
    return here


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
