"""The whole model with its adapter folded in, for readers that know no adapters."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.adapter import Adapter
from ..attach import quiet
from ..manifold.guard import check_manifold
from ..run_folder import replacing
from ..tuner.layer import AdapterLayer
from .folder import as_text, check_free, write_record
from .gap import compare
from .lora import check_rounding, record_of
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

    A copy is merged: the model stays as it is, and for a while there are two. Of a tied table of tokens, which is the
    embedding and the output layer in one, two are written where the adapter stands beside either.

    Args:
        processor: the tokenizer or image processor; saved with the model.
        reload: loads the folder as a user would.
        batches, compared_on, score: see `export_lora`.

    Returns: what export.json holds.
    Raises: ValueError, FileExistsError; nothing is left under the folder's name then.
    """
    check_free(folder)
    check_manifold(model)
    form = "static" if any(adapter.merge_warning for adapter in _active(model)) else "exact"
    merged = _merged(model)
    with replacing(folder) as partial:
        with quiet():
            merged.save_pretrained(str(partial))
            processor.save_pretrained(str(partial))
        del merged
        exported = reload(partial)
        about = {"form": form, "base_model": base_model, "rank": None, "experts": False, "compared_on": compared_on}
        gap = compare(model, {}, exported, batches)
        if form == "exact":
            check_rounding(gap, model, "merged model")
        record = record_of(model, exported, gap, about, score=score, folder=folder)
        write_record(partial, record)
    return record


def _merged(model: PeftModel) -> Any:
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning:
        raise ValueError(
            f"This adapter is of PEFT's type {as_text(config.peft_type)}: it puts vectors before the text and changes "
            "no weight, so there is nothing to merge. Serve it with PEFT."
        )
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:  # PEFT ties factors of its own by tensors that cannot be copied
        raise ValueError(
            f"The adapter's weights cannot be copied ({error}). Merge the model itself: model.merge_and_unload()."
        ) from error
    _untie(copied)
    try:
        return copied.merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # what PEFT raises for its own methods
        raise ValueError(f"This adapter cannot be merged: {error}") from error


def _active(model: PeftModel) -> list[Adapter]:
    """Our adapters that are at work; none where the method is PEFT's own."""
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    return [layer.adapters[name] for layer in layers for name in layer.active_adapters if name in layer.adapters]


def _untie(model: PeftModel) -> None:
    """Give each adapted layer a weight of its own where it shares one: merged into both, it would change the other."""
    holders = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    config: Any = model.get_base_model().config
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        if isinstance(layer, TrainableTokensLayer) or holders[id(weight)] < 2:  # the former changes all that share
            continue
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        config.tie_word_embeddings = False
