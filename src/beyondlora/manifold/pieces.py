"""Where others keep a factor: which vector of an optimizer it lies in, and which entries of it are here.

DeepSpeed's ZeRO (1, 2 and 3) lays the float32 copies of many weights end to end and hands its optimizer one vector a
process; FSDP1 makes flat parameters of the weights, and hands over those, or the part of each weight that is here.
Little leads from those vectors to the weights; so what made them is looked for among all objects, once for every
optimizer that steps beside such weights.
"""

import gc
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from .linear import StiefelLinear, is_cut_by_fsdp, is_cut_by_zero, weight_of

LAYOUTS = {  # class of DeepSpeed's wrapper -> its weights group by group, and this process's vector of each group
    "DeepSpeedZeroOptimizer": ("bit16_groups", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp16_groups", "fp32_partitioned_groups_flat"),
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_flat_partition"),
}
HANDLE = "FlatParamHandle"  # class of what FSDP1 knows of a flat parameter

_makers: "weakref.WeakSet[Any]" = weakref.WeakSet()
_asked: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


class Piece(NamedTuple):
    """What a process holds of a factor: `size` entries of the flat weight from `start`, in a vector from `offset`.

    Attributes:
        processes: which hold the factor together.
        device: on which they talk to each other.
        is_cut: whether they hold a part each; otherwise every process has it all.
    """

    layer: StiefelLinear
    vector: Tensor
    start: int
    offset: int
    size: int
    processes: Any
    device: torch.device
    is_cut: bool = True


def pieces_of(optimizer: Optimizer, cut: Collection[StiefelLinear]) -> list[list[Piece]]:
    """The pieces of factors that are cut that an optimizer steps; those that one all-reduce can gather in a list.

    In the same order in every process. ZeRO has its optimizer step one group of weights after the other.
    """
    if not cut:
        return []
    _look_for_makers(optimizer)
    places = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    pieces = [piece for piece in (*_zero_pieces(cut), *_fsdp_pieces()) if id(piece.vector) in places]
    pieces.sort(key=lambda piece: places[id(piece.vector)])  # pieces of one vector stay in its order
    together: dict[Any, list[Piece]] = {}
    for piece in pieces:
        alike = (id(piece.processes), piece.vector.dtype, piece.device, piece.is_cut)
        together.setdefault(alike, []).append(piece)
    return list(together.values())


def is_cut(layer: StiefelLinear) -> bool:
    """Whether the factor is trained as a part of a vector."""
    return is_cut_by_zero(weight_of(layer)) or is_cut_by_fsdp(layer)


def cut_among(living: dict[StiefelLinear, Any]) -> set[StiefelLinear]:
    """The layers of which `is_cut` is true, quickly: every optimizer's step asks it of all factors."""
    return {
        layer
        for layer, weight in living.items()
        if (weight.dim() != 2 or "weight" in layer.__dict__ or is_cut_by_zero(weight)) and is_cut(layer)
    }


def may_be_stepped(layer: StiefelLinear) -> bool:
    """Whether what steps the factor has been found, or could have been if it were alive."""
    weight = weight_of(layer)
    if is_cut_by_zero(weight):
        return any(weight is known for group, _ in _zero_groups() for known in group)
    # FSDP1's wrapper may die before the modules inside, which are in cycles.
    return hasattr(sys.modules.get("torch.distributed.fsdp._flat_param"), HANDLE)


def _look_for_makers(optimizer: Optimizer) -> None:
    if optimizer not in _asked:
        _asked.add(optimizer)
        for found in gc.get_objects():
            if type(found).__name__ in (*LAYOUTS, HANDLE):
                _makers.add(found)


def _zero_pieces(cut: Iterable[StiefelLinear]) -> Iterator[Piece]:
    layers = {id(weight_of(layer)): layer for layer in cut}
    for group, vector in _zero_groups():
        for weight in group:
            if id(weight) in layers:
                layer = layers[id(weight)]
                stage_3 = hasattr(weight, "ds_id")
                processes = weight.ds_process_group if stage_3 else getattr(weight, "_dp_group", None)
                where = _zero_3_place(weight, processes) if stage_3 else _zero_place(weight)
                yield Piece(layer, vector, *where, processes, weight.device)


def _zero_groups() -> Iterator[tuple[list[Any], Tensor]]:
    for wrapper in list(_makers):
        if type(wrapper).__name__ in LAYOUTS:
            weights, vectors = LAYOUTS[type(wrapper).__name__]
            yield from zip(getattr(wrapper, weights), getattr(wrapper, vectors), strict=True)


def _zero_place(weight: Any) -> tuple[int, int, int]:
    mapping = weight._hp_mapping
    if mapping is None:  # other processes hold it
        return 0, 0, 0
    address = mapping.lp_fragment_address
    return address.start, mapping.hp_fragment_address.start, address.numel


def _zero_3_place(weight: Any, processes: Any) -> tuple[int, int, int]:
    # Stage 3 cuts every weight by itself, into equal parts; the last ones may be filled up with zeros.
    wrapper = weight._z3_optimizer
    _, offset, size = wrapper.grad_position[wrapper.get_param_id(weight)]
    start = min(size * distributed.get_rank(processes), weight.ds_numel)
    return start, offset, min(size, weight.ds_numel - start)


def _fsdp_pieces() -> Iterator[Piece]:
    for handle in list(_makers):
        if type(handle).__name__ != HANDLE:
            continue
        flat = handle.flat_param
        for known, shard in zip(flat._param_infos, flat._shard_param_infos, strict=True):
            layer = known.module
            if not isinstance(layer, StiefelLinear) or known.param_name != "weight" or not is_cut_by_fsdp(layer):
                continue
            start, size = (shard.intra_param_start_idx, shard.numel_in_shard) if shard.in_shard else (0, 0)
            # The optimizer has the flat parameter, or of each weight what is here.
            own = weight_of(layer) if handle._use_orig_params else None
            offset = shard.offset_in_shard if own is None and shard.in_shard else 0
            place = (start, offset, size, handle.process_group, handle.device, handle.uses_sharded_strategy)
            yield Piece(layer, flat if own is None else own, *place)
