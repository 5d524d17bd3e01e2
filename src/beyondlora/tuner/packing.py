"""bitsandbytes' 4-bit weights, packed anew for inference on some processors (AVX512-BF16).

Its Linear4bit does so in the first forward pass in eval mode on such a CPU. A packed weight passes no gradient on to
its input, and what PEFT dequantises from it is noise: a merge after an evaluation would be silently wrong.
"""

from typing import Any

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Leave the model's 4-bit weights as they are from now on: slower to evaluate on a CPU, right in the rest."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def refuse_packed(layer: nn.Module) -> None:
    """Raise a ValueError for a layer whose weight was packed before there was an adapter to keep it from that."""
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has packed this layer's 4-bit weight for inference on this CPU, because the base model was "
            "evaluated before it had an adapter; there is no exact way back. Load the base model again, and put the "
            "adapter on it before the first evaluation."
        )
