"""export_lora: the active adapter as a plain LoRA folder, written, loaded again with PEFT and compared, then named."""

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn

from ..attach import quiet
from ..manifold.guard import check_manifold
from ..measure import inference
from ..run_folder import replacing
from ..targets import is_linear
from ..tuner.config import AdapterConfig
from ..tuner.experts import ExpertLinear
from ..tuner.layer import AdapterLayer
from ..tuner.packing import take_out_8bit
from .distil import distil
from .folder import PREFIX, Factors, as_text, check_free, serving_command, vllm_rank, write_lora, write_record
from .gap import OTHERWISE, Adapted, Gap, compare
from .rows import Batch, prompts_for


def export_lora(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    batches: Iterable[Batch] | None = None,
    compared_on: str = "the batches given",
    distil_on: Iterable[Batch] | None = None,
    rank: int | None = None,
    round_rank: bool = False,
    score: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the active adapter as a plain LoRA that any server loads, where one exists.

    The folder is loaded again with PEFT onto the bare base model and compared with the live adapter before it gets its
    name: what an adapter that is exactly a weight update loses is rounding, or an error. What the comparison found is
    returned, and stands in export.json.

    Args:
        model: with one active adapter, not merged.
        folder: to write; an older export there is replaced, anything else refused.
        base_model: name or folder of the base model, for the server; None = as the adapter's config says.
        batches: what to compare on, keyword arguments of the model's forward; None = a few prompts.
        compared_on: what the batches are, for the record.
        distil_on: the same; for an adapter that is no exact weight update: fit the nearest LoRA on these.
        rank: of the distilled LoRA, at most the adapter's; None = the adapter's.
        round_rank: pad the rank to one that vLLM takes as --max-lora-rank.
        score: measures a model (loss, ...); its figures for base, live and exported model go into the record.

    Returns: what export.json holds.
    Raises: TypeError, ValueError, FileExistsError; nothing is left under the folder's name then.

    >>> export_lora(model, "lora_out")["logits_max"]
    1.2e-06
    """
    folder = Path(folder)
    check_free(folder)
    adapted = adapted_layers(model)
    check_manifold(model)
    form = _form(model, adapted, distilling=distil_on is not None, rank=rank)
    config = model.peft_config[model.active_adapter]
    base_model = base_model or config.base_model_name_or_path
    if not base_model:
        raise ValueError(
            "A LoRA folder has to name its base model, and this model was not loaded from anywhere: pass base_model."
        )
    with inference(model):
        factors = _exact_factors(adapted) if distil_on is None else distil(model, adapted, distil_on, rank=rank)
    widest = max(A_RN.shape[0] for _, A_RN in factors.values())
    width = vllm_rank(widest) if round_rank else widest
    with plain_base(model) as base, replacing(folder) as partial:
        if batches is None:
            batches, compared_on = prompts_for(base, base_model)
        write_lora(partial, factors, base, base_model=base_model, task_type=as_text(config.task_type), rank=width)
        exported = _load_with_peft(partial, base)
        gap = compare(model, adapted, exported, batches)
        if form == "exact":
            check_rounding(gap, model, "LoRA")
        about = {"form": form, "base_model": base_model, "rank": width, "compared_on": compared_on}
        about["experts"] = any(isinstance(layer.get_base_layer(), ExpertLinear) for layer, _ in adapted.values())
        record = record_of(model, exported, gap, about, score=score, folder=folder)
        write_record(partial, record)
    return record


def lora_gap(model: PeftModel, batches: Iterable[Batch]) -> Gap:
    """How far the active adapter is from its LoRA form on these batches, without writing a folder.

    For an adapter that merges in a static form: how far static inference is from dynamic, per layer and at the end.

    Raises: TypeError, ValueError.
    """
    adapted = adapted_layers(model)
    with warnings.catch_warnings(), plain_base(model) as base, TemporaryDirectory() as name:
        warnings.simplefilter("ignore", UserWarning)  # that the form is an approximation is what is measured here
        _form(model, adapted, distilling=False, rank=None)
        write_lora(Path(name), _exact_factors(adapted), base, base_model="(live)")
        return compare(model, adapted, _load_with_peft(Path(name), base), batches)


def record_of(
    model: PeftModel,
    exported: nn.Module,
    gap: Gap,
    about: dict[str, Any],
    *,
    score: Callable[[nn.Module], dict[str, Any]] | None,
    folder: Path,
) -> dict[str, Any]:
    """What export.json says of any export: what it is, how far from the live adapter and computed in which dtype, how
    it measures, how to serve it.

    Args:
        model: the live adapter's.
        exported: what was loaded again.
        gap: between them.
        about: the form, base model, rank (None: merged), whether experts have a LoRA, and what was compared on.
        score: measures a model, for the base, the live and the exported one.
        folder: the export's final name.
    """
    made_from = as_text(model.peft_config[model.active_adapter].peft_type)
    computed_in = str(_coarsest(model)).removeprefix("torch.")
    record = {"made_from": made_from, **about, **gap.as_dict(), "computed_in": computed_in}
    if score is not None:
        with model.disable_adapter():
            base = score(model)
        record["scores"] = {"base": base, "live": score(model), "exported": score(exported)}
    served = {name: about[name] for name in ("base_model", "rank", "experts")}
    return record | {"serve": serving_command(folder, **served)}


def adapted_layers(model: PeftModel) -> Adapted:
    """The layers that the one active adapter stands beside. Raises: TypeError, ValueError."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"A PeftModel is exported, not a {type(model).__name__}: wrap it with get_peft_model.")
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"Adapters {active} are active; choose the one to export: model.set_adapter(NAME).")
    adapted = {
        path.removeprefix(PREFIX): (layer, layer.adapters[active[0]])
        for path, layer in model.named_modules()
        if isinstance(layer, AdapterLayer) and active[0] in layer.adapters
    }
    if not adapted:
        _refuse_pefts_own(model.peft_config[active[0]])
    if any(layer.disable_adapters for layer, _ in adapted.values()):
        raise ValueError(
            "The adapters are disabled (as inside model.disable_adapter()), and an export is compared with the live "
            "adapter: enable them first (leave the block, or model.base_model.enable_adapter_layers())."
        )
    return adapted


def check_config(config: Any, *, distilling: bool) -> None:
    """Refuse what no plain LoRA can hold as far as the adapter's config says so: no model is needed.

    Raises: ValueError.
    """
    if not isinstance(config, AdapterConfig):
        _refuse_pefts_own(config)
    more = {
        "modules_to_save": config.modules_to_save,
        "bias": None if config.bias == "none" else config.bias,
        "trainable_token_indices": config.trainable_token_indices,
    }
    held = [f"{name}={value!r}" for name, value in more.items() if value]
    if held:
        raise ValueError(
            f"This adapter trains more than a LoRA holds ({', '.join(held)}), which servers refuse or drop silently. "
            "Export the model merged: beyondlora export ADAPTER --to merged."
        )
    if config.merge_refusal and not distilling:
        raise ValueError(config.merge_refusal)


def _refuse_pefts_own(config: Any) -> NoReturn:
    variants = [f"{name}={value}" for name, value in vars(config).items() if name.startswith("use_") and value]
    if as_text(config.peft_type) == "LORA" and variants:
        raise ValueError(
            f"The active adapter is PEFT's LoRA with {', '.join(variants)}, which is no plain LoRA: not every server "
            "knows it. Export the model merged: beyondlora export ADAPTER --to merged."
        )
    raise ValueError(
        f"The active adapter is of PEFT's own type {as_text(config.peft_type)}: a LoRA is one already, and for what "
        "else merges PEFT has peft.convert_to_lora. --to merged works for all of them."
    )


def _form(model: PeftModel, adapted: Adapted, *, distilling: bool, rank: int | None) -> str:
    """Refuse what no plain LoRA can hold; return what the LoRA is: "exact", "static" or "distilled"."""
    check_config(model.peft_config[model.active_adapter], distilling=distilling)
    for path, (layer, _) in adapted.items():
        if not is_linear(layer.get_base_layer()):
            raise ValueError(
                f"{path} is a {type(layer.get_base_layer()).__name__}: servers take LoRA beside linear layers only. "
                "Export the model merged (--to merged), or leave the layer out of target_modules."
            )
    if any(layer.merged for layer, _ in adapted.values()):
        raise ValueError("The adapter is merged into the base weights; call model.unmerge_adapter() first.")
    refusals = {adapter.merge_refusal for _, adapter in adapted.values()} - {None}
    warned = {adapter.merge_warning for _, adapter in adapted.values()} - {None}
    if distilling and not (refusals or warned):
        raise ValueError("This adapter equals a LoRA exactly; export it without distilling.")
    if distilling:
        return "distilled"
    if rank is not None:
        raise ValueError(f"rank={rank} is that of a distilled LoRA; without distilling it is the adapter's own.")
    for warning in warned:
        warnings.warn(str(warning), stacklevel=4)
    return "static" if warned else "exact"


def _exact_factors(adapted: Adapted) -> Factors:
    return {path: adapter.lora_factors() for path, (_, adapter) in adapted.items()}


def check_rounding(gap: Gap, model: PeftModel, what: str) -> None:
    """Refuse an export (`what`) that should equal the live adapter and does not. Raises: ValueError."""
    problem = gap.beyond_rounding(_coarsest(model))
    if problem:
        raise ValueError(
            f"The {what} differs from the adapter it should equal: {problem}. Nothing was written; served, it would be "
            "another model in silence."
        )


def _coarsest(model: PeftModel) -> torch.dtype:
    """The dtype with the largest rounding error that the live model computes in."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtypes |= {torch.float16 for parameter in model.parameters() if parameter.dtype == torch.int8}  # bitsandbytes' way
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def plain_base(model: PeftModel) -> Iterator[nn.Module]:
    """The base model without adapters, as new modules around the very same weights; no memory is doubled."""
    take_out_8bit(model)
    shared = list(itertools.chain(model.parameters(), model.buffers()))
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with quiet():
        bare = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).unload()
    try:
        yield bare
    finally:  # attaching a LoRA froze the weights, which are the live model's too
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def _load_with_peft(folder: Path, base: nn.Module) -> PeftModel:
    """Load as any user of PEFT would. Raises: ValueError where that loads something else than was written."""
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        try:
            return PeftModel.from_pretrained(base, str(folder))
        except UserWarning as warning:
            raise ValueError(f"{str(warning).rstrip('.')}: {OTHERWISE}") from warning
