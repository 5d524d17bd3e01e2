"""The whole model with its adapter folded in, for readers that know no adapters."""

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..attach import quiet
from ..manifold.guard import check_manifold
from ..run_folder import replacing
from .folder import check_free, write_record
from .gap import compare
from .lora import record_of
from .rows import Batch


def export_merged(
    model: PeftModel,
    folder: Path,
    *,
    base_model: str,
    processor: Any,
    reload: Callable[[Path], nn.Module],
    batches: Iterable[Batch],
    compared_on: str = "the batches given",
    score: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the merged model and its processor, load it again and compare it with the live adapter.

    A copy is merged: the model stays as it is, and for a while there are two.

    Args:
        processor: the tokenizer or image processor; saved with the model.
        reload: loads the folder as a user would.
        batches, compared_on, score: see `export_lora`.

    Returns: what export.json holds.
    Raises: ValueError, FileExistsError; nothing is left under the folder's name then.
    """
    check_free(folder)
    check_manifold(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = _merged(model)
    said = {str(warning.message) for warning in caught if warning.category is UserWarning}
    for message in said:
        warnings.warn(message, stacklevel=2)
    with replacing(folder) as partial:
        with quiet():
            merged.save_pretrained(str(partial))
            processor.save_pretrained(str(partial))
        del merged
        exported = reload(partial)
        form = "static" if said else "exact"
        about = {"form": form, "base_model": base_model, "rank": None, "compared_on": compared_on}
        gap = compare(model, {}, exported, batches)
        record = record_of(model, exported, gap, about, score=score, folder=folder)
        write_record(partial, record)
    return record


def _merged(model: PeftModel) -> Any:
    try:
        return copy.deepcopy(model).merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # what PEFT raises for its own methods
        raise ValueError(f"This adapter cannot be merged: {error}") from error
