"""Where DeepSpeed (ZeRO 1, 2 and 3) keeps a factor: which of its optimizers has it, and which entries are here.

ZeRO lays the float32 copies of many weights end to end and hands its optimizer one vector a process. Nothing leads from
that optimizer to the weights, and ZeRO 1 and 2 leave nothing on a weight that lies wholly in other processes; so its
wrappers are looked for among all objects, once for every optimizer that steps beside such weights.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, distributed
from torch.optim import Optimizer

from .linear import StiefelLinear, is_cut_by_zero, live_stiefel_layers, weight_of

LAYOUTS = {  # class of the wrapper -> its weights group by group, and this process's vector of each group
    "DeepSpeedZeroOptimizer": ("bit16_groups", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp16_groups", "fp32_partitioned_groups_flat"),
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_flat_partition"),
}

_wrappers: "weakref.WeakSet[Any]" = weakref.WeakSet()
_asked: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


class Piece(NamedTuple):
    """What a process holds of a factor: `size` entries of the flat weight from `start`, in its vector from `offset`."""

    start: int
    offset: int
    size: int


def partitions_of(optimizer: Optimizer) -> list[tuple[Tensor, list[StiefelLinear]]]:
    """The vectors that an optimizer steps now and that are ZeRO's, with the Stiefel layers that lie in each.

    In the same order in every process. ZeRO has its optimizer step one group of weights after the other.
    """
    layers = {id(weight_of(layer)): layer for layer in live_stiefel_layers() if is_cut_by_zero(weight_of(layer))}
    if not layers:
        return []
    _look_for_wrappers(optimizer)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    groups = [(vector, [layers[id(w)] for w in group if id(w) in layers]) for group, vector in _groups(_wrappers)]
    return [(vector, inside) for vector, inside in groups if inside and id(vector) in stepped]


def is_in_a_known_partition(weight: Tensor) -> bool:
    """Whether a weight is stepped by a wrapper that has been found."""
    return any(weight is known for group, _ in _groups(_wrappers) for known in group)


def piece_of(layer: StiefelLinear) -> Piece:
    """What this process holds of a factor in a partition."""
    weight: Any = layer.weight
    if hasattr(weight, "ds_id"):
        # Stage 3 cuts every weight by itself, into equal parts; the last ones may be filled up with zeros.
        wrapper = weight._z3_optimizer
        _, offset, size = wrapper.grad_position[wrapper.get_param_id(weight)]
        start = min(size * distributed.get_rank(process_group(weight)), weight.ds_numel)
        return Piece(start, offset, min(size, weight.ds_numel - start))
    mapping = weight._hp_mapping
    if mapping is None:  # other processes hold it
        return Piece(0, 0, 0)
    address = mapping.lp_fragment_address
    return Piece(address.start, mapping.hp_fragment_address.start, address.numel)


def process_group(weight: Any) -> Any:
    """The processes that hold a weight together."""
    return weight.ds_process_group if hasattr(weight, "ds_id") else weight._dp_group


def _look_for_wrappers(optimizer: Optimizer) -> None:
    if optimizer not in _asked:
        _asked.add(optimizer)
        for found in gc.get_objects():
            if type(found).__name__ in LAYOUTS:
                _wrappers.add(found)


def _groups(wrappers: Iterable[Any]) -> Iterator[tuple[list[Tensor], Tensor]]:
    for wrapper in list(wrappers):
        weights, vectors = LAYOUTS[type(wrapper).__name__]
        yield from zip(getattr(wrapper, weights), getattr(wrapper, vectors), strict=True)
