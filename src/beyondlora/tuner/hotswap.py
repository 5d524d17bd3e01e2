"""Other weights for an adapter in place: no new layers, no new memory, no new compilation at the same scaling.

PEFT's own `hotswap_adapter` is LoRA's alone.
"""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from .config import AdapterConfig
from .layer import AdapterLayer


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace an adapter's weights by those of a saved adapter of the same method, shape by shape, in place.

    Args:
        model: has the adapter already.
        model_name_or_path: folder or hub name of the other adapter.
        adapter_name: the adapter to overwrite.
        torch_device: where the file is loaded to; default: the CPU.
        **kwargs: passed to PEFT's loading functions (revision, token, ...).

    Raises: ValueError, with the model as it was, where the other adapter does not fit.
    """
    current = model.peft_config.get(adapter_name)
    if not isinstance(current, AdapterConfig):
        ours = [name for name, config in model.peft_config.items() if isinstance(config, AdapterConfig)]
        raise ValueError(
            f"adapter_name={adapter_name!r} is no adapter of beyondlora on this model; there are {ours}. For LoRA use "
            "peft.utils.hotswap.hotswap_adapter."
        )
    new = PeftConfig.from_pretrained(str(model_name_or_path), **kwargs)
    _check_config(current, new)
    loaded = load_peft_weights(str(model_name_or_path), device=torch_device or "cpu", **kwargs)
    # Beside an adapted embedding PEFT also saves the base model's own table, which nothing of ours has changed.
    weights = {name: tensor for name, tensor in loaded.items() if ".base_layer." not in name}
    target = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_shapes(target, weights)
    _refuse_merged(model, adapter_name)
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)  # orthonormal factors take a rounded file, too
    for layer_name, layer in model.get_base_model().named_modules():
        if isinstance(layer, AdapterLayer) and adapter_name in layer.adapters:
            adapter = layer.adapters[adapter_name]
            alpha = new.alpha_pattern.get(get_pattern_key(list(new.alpha_pattern), layer_name), new.lora_alpha)
            adapter.scaling = new.scaling_for(adapter.rank, alpha)
    current.lora_alpha, current.alpha_pattern, current.use_rslora = new.lora_alpha, new.alpha_pattern, new.use_rslora


def _check_config(current: AdapterConfig, new: PeftConfig) -> None:
    if type(new) is not type(current):
        raise ValueError(
            f"A {type(new).__name__} cannot take the place of a {type(current).__name__}: hotswapping replaces "
            "weights of the same method. Use model.load_adapter."
        )
    fixed = [name for name in vars(current) if name.startswith(f"{current.method}_")]
    for name in [*fixed, "bias", "modules_to_save", "trainable_token_indices", "lora_dropout"]:
        if getattr(new, name) != getattr(current, name):
            raise ValueError(
                f"{name} is {getattr(new, name)!r} in the other adapter and {getattr(current, name)!r} here: "
                "hotswapping replaces weights, not what is computed with them. Use model.load_adapter."
            )


def _check_shapes(target: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    strangers = sorted(target.keys() ^ weights.keys())
    if strangers:
        side = "is missing in the other adapter" if strangers[0] in target else "has no place here"
        raise ValueError(
            f"The two adapters do not have the same layers: {strangers[0]} {side}, and so on for {len(strangers)} "
            "tensors. Use model.load_adapter."
        )
    for name, tensor in target.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weights[name].shape)} in the other adapter and {tuple(tensor.shape)} here: "
                "hotswapping needs equal ranks. Use model.load_adapter."
            )


def _refuse_merged(model: PeftModel, adapter_name: str) -> None:
    if any(isinstance(m, AdapterLayer) and adapter_name in m.merged_adapters for m in model.modules()):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights; call model.unmerge_adapter() first."
        )
