"""The layers of a base model that take an adapter: each seen as a matrix W0 (M, N), and how its input is read.

| layer | N | stored as | input |
|---|---|---|---|
| nn.Linear, plain or quantised | features | (M, N) | rows of features |
| a projection of an expert (`experts.py`) | features | a slice of all experts' parameter | rows of features |
| transformers' Conv1D | features | (N, M) | rows of features |
| nn.Embedding | tokens | (N, M) | indices |
| nn.Conv1d, Conv2d, Conv3d | channels · kernel positions | (M, channels, kernel...) | patches |
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..adapters.reading import Lookup, Patches, Reading

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)


def bare(module: nn.Module) -> nn.Module:
    """The layer itself, PEFT's wrapper taken off."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer (PEFT's wrappers taken off) is of a kind that takes an adapter."""
    return isinstance(layer, SUPPORTED) or resolve_quantization_backend(layer) is not None


def layer_problem(layer: nn.Module) -> str | None:
    """Why a layer cannot take an adapter, and what to do instead; None where it can."""
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads its projections' weights and never calls them, so nothing can be put beside "
            "them; adapt the linear layers around it, or use an attention with projections of its own."
        )
    if not is_supported(layer):
        return (
            "adapters go beside nn.Linear, transformers' Conv1D, nn.Embedding and nn.Conv1d/2d/3d. Leave it out of "
            "target_modules, or train it in full with modules_to_save."
        )
    if _is_tensor_parallel(layer):
        return (
            "it is split over devices by tensor parallelism, which PEFT opens to its own LoRA only. Shard the model "
            "with FSDP2 or DDP instead (accelerate launch)."
        )
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        return (
            f"it has groups={layer.groups}: a low-rank update mixes all channels, which no grouped kernel can hold. "
            "Leave it out of target_modules, or train it in full with modules_to_save."
        )
    return None


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(M, N) of a layer's weight seen as a matrix."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels, layer.weight[0].numel()
    in_features, out_features = _get_in_out_features(layer)
    return int(out_features or 0), int(in_features or 0)


def reading_of(layer: nn.Module) -> Reading | None:
    """How the layer reads its input, where that is not rows of features."""
    if isinstance(layer, nn.Embedding):
        return Lookup()
    if isinstance(layer, CONVOLUTIONS):
        return Patches(
            channels=layer.in_channels,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            dilation=layer.dilation,
            padding=layer.padding,
            padding_mode=layer.padding_mode,
            pads=tuple(layer._reversed_padding_repeated_twice),
        )
    return None


def as_matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    """A tensor of the shape of the layer's weight as (M, N)."""
    if isinstance(layer, CONVOLUTIONS):
        return weight.flatten(1)
    return weight.mT if _is_transposed(layer) else weight


def as_weight(matrix_MN: Tensor, layer: Any) -> Tensor:
    """A matrix (M, N) in the shape of the layer's weight."""
    if isinstance(layer, CONVOLUTIONS):
        return matrix_MN.reshape(layer.weight.shape)
    return matrix_MN.mT if _is_transposed(layer) else matrix_MN


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (Conv1D, nn.Embedding))


def _is_tensor_parallel(layer: nn.Module) -> bool:
    if getattr(layer, "_hf_tp_plan", None) is not None:  # transformers' mark
        return True
    weight = getattr(layer, "weight", None)
    # FSDP2 stores shards, too, but computes with whole weights; its meshes have this name or none.
    return isinstance(weight, DTensor) and not set(weight.device_mesh.mesh_dim_names or ()) <= {"fsdp"}
