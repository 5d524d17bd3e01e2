"""bitsandbytes' weights, which their layers change in the first forward pass.

Linear4bit packs its weight anew for inference, in eval mode on some processors (AVX512-BF16). A packed weight passes no
gradient on to its input, and what PEFT dequantises from it is noise: a merge after an evaluation would be silently
wrong. Linear8bitLt takes the numbers out of the weight: a second layer around the same one finds none.
"""

from typing import Any

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Leave the model's 4-bit weights as they are from now on: slower to evaluate on a CPU, right in the rest."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def refuse_packed(layer: nn.Module, consequence: str = "there is no exact way back") -> None:
    """Raise a ValueError for a layer whose weight was packed before there was an adapter to keep it from that."""
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has packed this layer's 4-bit weight for inference on this CPU, because the base model was "
            f"evaluated before it had an adapter; {consequence}. Load the base model again, and put the adapter on it "
            "before the first evaluation."
        )


def take_out_8bit(model: nn.Module) -> None:
    """Let the model's 8-bit layers take their numbers now: copies of them, around the same weights, have them too."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "init_8bit_state")]
    for layer in layers:
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()
