"""Batches that mix adapters: `model(..., adapter_names=["a", "__base__", "b"])`, one name a row.

PEFT opens a context around every forward and `generate`. In it, hooks give the names to every layer that acts by them,
and each layer adds to each row the branch of its own adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BASE = "__base__"


@contextmanager
def handing_out(
    model: nn.Module, names: Sequence[str], *, layers: Sequence[nn.Module], beams: int = 1
) -> Iterator[None]:
    """Give every row its adapter's name, in all layers of a model, until the context ends, also by an exception.

    Args:
        names: of each input row, an adapter or "__base__".
        layers: those that act by it, besides PEFT's wrappers (`modules_to_save`, trainable tokens).
        beams: how often a beam search repeats each row, in all but the encoder of an encoder-decoder model.
    """
    encoder = _encoder(model)
    in_encoder = set() if encoder is None else set(encoder.modules())
    repeated = [name for name in names for _ in range(beams)]
    handles: list[RemovableHandle] = []
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    try:
        for module in (*layers, *wrappers):
            own = list(names) if module in in_encoder else repeated
            handles.append(module.register_forward_pre_hook(_passing(own), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_by_adapter(names: Sequence[str]) -> dict[str, list[int]]:
    """The row numbers of each adapter, the base model's left out."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != BASE:
            rows.setdefault(name, []).append(row)
    return rows


def check_names(names: Sequence[str], known: set[str]) -> None:
    """Refuse names that no layer knows: one layer may lack an adapter, all of them together may not."""
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"adapter_names is a {type(names).__name__}; give a list with one adapter name a row.")
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Known are {sorted(known)} and "
            f"{BASE!r} for none."
        )


def check_rows(x: Tensor, names: Sequence[str], *, merged: bool) -> None:
    """Refuse what a layer cannot act by."""
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def _passing(names: list[str]) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, whose rows a beam search does not repeat."""
    base: Any = getattr(model, "model", model)
    encoder = base.get_encoder() if hasattr(base, "get_encoder") else None
    return None if encoder is base else encoder  # transformers answers with the model itself where there is none
