"""What a model is run on to be compared, what its layers get to see meanwhile, and which rows of that are tokens."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..padding import token_rows

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward; `labels` may be among them."""

PROMPTS = (
    "Once upon a time, in a small village at the edge of the forest, there lived",
    "The capital of France is Paris. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: If a train travels 60 miles in 45 minutes, how fast is it going?\nAnswer:",
)


def prompts_for(base: nn.Module, base_model: str) -> tuple[list[Batch], str]:
    """Batches for a language model, and what they are: PROMPTS, or random tokens where it has no tokenizer.

    Raises: ValueError for a model that reads no text.
    """
    vocabulary = getattr(getattr(base, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(
            "This model reads no text, so nothing is known to compare the export on: pass batches=[...], keyword "
            "arguments of the model's forward."
        )
    try:
        tokenizer: Any = models.load_processor(base_model, task="causal-lm")
        rows = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
        about = "built-in prompts"
    except (OSError, ValueError):
        draw = torch.Generator().manual_seed(0)
        rows = [torch.randint(vocabulary, (1, 16), generator=draw) for _ in PROMPTS]
        about = "random tokens (the base model has no tokenizer)"
    if base.config.is_encoder_decoder:  # type: ignore[union-attr]
        return [{"input_ids": ids, "decoder_input_ids": ids} for ids in rows], about
    return [{"input_ids": ids} for ids in rows], about


@contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a mapping that fills with the inputs of each layer, one a call; clear it between batches."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(path: str) -> Any:
        def note(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[path].append(arguments[0].detach())

        return note

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(network: nn.Module, batch: Batch) -> Tensor:
    """The logits (or whatever a model without logits returns first) of a batch, on the network's device."""
    device = next(network.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    output = network(**{name: value for name, value in inputs.items() if name != "labels"})
    if torch.is_tensor(output):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def rows_of(x: Tensor, batch: Batch) -> Tensor:
    """Flatten (..., N) to (T, N), without the positions that the batch's attention mask leaves out."""
    return token_rows(x, batch.get("attention_mask"))
