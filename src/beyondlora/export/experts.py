"""A mixture's experts in a plain LoRA folder, as PEFT holds a LoRA of a parameter: two matrices for all experts.

    lora_A (E·R, N)   the experts one after the other
    lora_B (M, R·E)   the directions one after the other: column r·E + e is the r-th of expert e
    names             <experts>.lora_A.weight; where both projections have a LoRA, the first one's are called
                      <experts>.base_layer.lora_A.weight

Legend: E experts, N inputs, M outputs, R rank of each expert.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..targets import fits
from ..tuner.experts import count_of, expert_shape, is_experts, layer_index, parameter_name, projections_of

Pair = tuple[Tensor, Tensor]
"""(B (M, R), A (R, N))."""

Stacks = dict[str, dict[int, Pair]]
"""Parameter → of the experts that have an adapter, the index and the factors."""


def parted(factors: Mapping[str, Pair], modules: Collection[str]) -> tuple[dict[str, Pair], Stacks]:
    """The factors of layers that the closed base model has, and those of its experts, by parameter."""
    layers: dict[str, Pair] = {}
    stacks: Stacks = {}
    for path, pair in factors.items():
        if path in modules:
            layers[path] = pair
        else:
            stacks.setdefault(parameter_name(path), {})[layer_index(path)] = pair
    return layers, stacks


def target_parameters(stacks: Stacks, base: nn.Module) -> list[str]:
    """The shortest names that mean these parameters and none but experts', sorted: ["experts.down_proj"]."""
    targets = set()
    for parameter in stacks:
        end = ".".join(parameter.split(".")[-2:])
        meant = [name for name, _ in base.named_parameters() if fits(name, [end])]
        targets.add(end if all(_is_of_experts(name, base) for name in meant) else parameter)
    return sorted(targets)


def _is_of_experts(name: str, base: nn.Module) -> bool:
    holder, _, key = name.rpartition(".")
    experts = base.get_submodule(holder)
    return is_experts(experts) and key in projections_of(experts)


def stacked(stacks: Stacks, targets: list[str], base: nn.Module, rank: int) -> dict[str, Tensor]:
    """The tensors of a LoRA folder, without their prefix; zeros for what the targets mean beyond the factors."""
    parameters = [name for name, _ in base.named_parameters() if fits(name, targets)]
    tensors = {}
    for parameter in parameters:
        holder, _, key = parameter.rpartition(".")
        experts: Any = base.get_submodule(holder)
        (M, N), E = expert_shape(experts, key), count_of(experts)
        A_ERN, B_EMR = torch.zeros(E, rank, N), torch.zeros(E, M, rank)
        for index, (B_MR, A_RN) in stacks.get(parameter, {}).items():
            A_ERN[index, : len(A_RN)] = A_RN.detach()
            B_EMR[index, :, : B_MR.shape[1]] = B_MR.detach()
        first, second = projections_of(experts)
        inner = key == first and f"{holder}.{second}" in parameters
        place = f"{holder}.base_layer" if inner else holder
        tensors[f"{place}.lora_A.weight"] = A_ERN.flatten(0, 1)
        tensors[f"{place}.lora_B.weight"] = B_EMR.permute(1, 2, 0).flatten(1)
    return tensors


def loaded(exported: nn.Module, path: str) -> tuple[Tensor, Tensor, float]:
    """Of one expert's layer: B (M, R), A (R, N) and the scaling in the LoRA that PEFT loaded.

    Args:
        exported: the base model with PEFT's layers.
        path: of the layer in the live base model.
    """
    holder, _, name = parameter_name(path).rpartition(".")
    layer: Any = exported.get_submodule(holder)
    index = layer_index(path)
    while layer.parameter_name != name:
        layer = layer.base_layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A_RN = A.unflatten(0, (layer.num_experts, -1))[index]
    B_MR = B.unflatten(1, (-1, layer.num_experts))[..., index]
    return B_MR, A_RN, layer.scaling["default"]
