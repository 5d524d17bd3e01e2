"""Names of layers: which ones a list of target modules fits, and the shortest list for given layers."""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D


def fits(path: str, targets: Iterable[str]) -> bool:
    """Whether a layer is meant by a list of target modules (PEFT's rule: the whole name or an end of it)."""
    return any(path == target or path.endswith("." + target) for target in targets)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer maps vectors to vectors; quantised layers are nn.Linear, or have its sizes at least."""
    sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return isinstance(module, (nn.Linear, Conv1D)) or sizes


def shortest_targets(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The shortest ends of layers' names that fit linear layers only, sorted.

    >>> shortest_targets(["model.layers.0.self_attn.q_proj"], dict(model.named_modules()))
    ["q_proj"]
    """
    found = set()
    for path in paths:
        parts = path.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found.add(next(end for end in ends if _only_linear(end, modules)))
    return sorted(found)


def _only_linear(end: str, modules: Mapping[str, nn.Module]) -> bool:
    return all(is_linear(module) for path, module in modules.items() if fits(path, [end]))
