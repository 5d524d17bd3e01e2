"""Llamas with random weights, to time: a small one for a CPU, and one of TinyLlama's shape."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def llama(size: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """One of `SIZES`, frozen, with so many layers if a number is given; the same weights each time."""
    torch.manual_seed(0)
    shape = SIZES[size] | ({} if layers is None else {"num_hidden_layers": layers})
    return LlamaForCausalLM(LlamaConfig(**shape)).to(device, dtype).requires_grad_(False)
