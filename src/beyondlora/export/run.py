"""From a run or an adapter folder to what a server loads: `beyondlora export`."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

from .. import data as data_module
from .. import models
from ..attach import config_in, holds_model
from ..evaluate import Opened, device, locate, open_target
from ..measure import as_dict, measure
from ..progress import Progress
from ..recipe import Recipe
from .folder import check_free
from .lora import check_config, export_lora
from .merged import export_merged
from .rows import Batch, prompts_for

OWN_ROWS = "train"
FEW = 2  # batches that an export is compared on where no report is asked for


def export(
    target: Path,
    folder: Path,
    *,
    to: str = "lora",
    distil: str | None = None,
    rank: int | None = None,
    round_rank: bool = False,
    data: str | None = None,
    recipe: Recipe | None = None,
    report: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a run's best adapter, or any adapter folder.

    Args:
        target: a run folder or an adapter folder.
        folder: to write.
        to: "lora" (a plain LoRA folder) or "merged" (a whole model).
        distil: data to fit the nearest LoRA on, for an adapter that is no weight update; "train" = the run's own
            training rows. Of the recipe's own training file, too, only those are used: the evaluation rows stay unseen.
        rank, round_rank: see `export_lora`.
        data, recipe: what to compare on and how to read it; None = the run's own evaluation rows.
        report: compare on all of these rows, and measure base, live and exported model; always done when distilling.
        progress: shows the way; None = silent.

    Returns: what export.json holds.
    Raises: FileNotFoundError, FileExistsError, ValueError.
    """
    if to not in ("lora", "merged"):
        raise ValueError(f"to={to!r} is unknown; choose 'lora' or 'merged'.")
    if to == "merged" and (distil or rank or round_rank):
        raise ValueError("--distil, --rank and --round-rank shape a LoRA; a merged model has none.")
    check_free(folder)
    source, _ = locate(target)
    if holds_model(source):
        raise ValueError(f"{source} is a whole model already, without an adapter to export: serve that folder.")
    if to == "lora":
        check_config(config_in(source), distilling=distil is not None)
    progress = progress or Progress()
    report = report or distil is not None
    opened = open_target(target, data=data, recipe=recipe, needs_rows=report)
    if to == "merged" and opened.recipe.bits:
        raise ValueError(
            f"The run's base model is held in {opened.recipe.bits} bits, which a merged weight would be rounded to. "
            "Export --to lora, or merge into the whole model: with --recipe, a copy of the run's recipe without "
            f"load_in_{opened.recipe.bits}bit."
        )
    evaluation = _rows(opened, progress, needed=report or data is not None) if opened.measurable else None
    distil_on = None
    if distil is not None:
        distil_on = _Shown(_batches(_rows_to_distil(opened, distil), opened.recipe), progress, "distilling")
    model: Any = opened.load()
    model.to(device())
    batches, about = _to_compare(opened, model, evaluation, report, progress)
    score = partial(_score, evaluation, opened.recipe, progress) if report and evaluation else None
    shared = {"batches": batches, "score": score, "compared_on": about}
    if to == "merged":
        return export_merged(
            model,
            folder,
            base_model=opened.recipe.model_name_or_path,
            processor=opened.processor,
            reload=partial(_reload, opened),
            **shared,
        )
    return export_lora(model, folder, distil_on=distil_on, rank=rank, round_rank=round_rank, **shared)


def _rows(opened: Opened, progress: Progress, *, needed: bool) -> data_module.Evaluation | None:
    """The rows to compare on; None where a text model's run had none, or has moved from them, and prompts will do."""
    if opened.data is None and not opened.recipe.evaluates and opened.recipe.task == "causal-lm" and not needed:
        return None
    try:
        return opened.rows()
    except FileNotFoundError as error:
        if needed or opened.recipe.task != "causal-lm":
            raise
        progress.say(f"The run's own rows are not found from here ({error}). Name them with --data to compare on them.")
        return None


def _rows_to_distil(opened: Opened, name: str) -> data_module.Evaluation | data_module.Splits:
    recipe = opened.recipe
    if name == OWN_ROWS or Path(name).resolve() == Path(recipe.dataset_name).resolve():
        return data_module.prepare(data_module.read_splits(recipe), opened.processor, recipe)
    return opened.rows(name, max_eval_samples=None)


def _batches(rows: data_module.Evaluation | data_module.Splits, recipe: Recipe) -> "DataLoader[Any]":
    chosen: Any = rows.train if isinstance(rows, data_module.Splits) else rows.rows
    return DataLoader(chosen, batch_size=recipe.per_device_eval_batch_size, collate_fn=rows.collator)


def _to_compare(
    opened: Opened, model: PeftModel, evaluation: data_module.Evaluation | None, report: bool, progress: Progress
) -> tuple[Any, str]:
    """Batches to compare on, and what they are."""
    if evaluation is None:
        return prompts_for(model.get_base_model(), opened.recipe.model_name_or_path)
    loader: Any = _batches(evaluation, opened.recipe)
    if report:
        return _Shown(loader, progress, "comparing"), evaluation.description
    return list(islice(loader, FEW)), f"the first {FEW} batches of {evaluation.description}"


def _score(
    evaluation: data_module.Evaluation, recipe: Recipe, progress: Progress, network: nn.Module
) -> dict[str, Any]:
    progress.begin("measuring", len(evaluation.rows))
    scores = measure(
        network,
        evaluation.rows,
        evaluation.collator,
        task=recipe.task,
        batch_size=recipe.per_device_eval_batch_size,
        bf16=recipe.bf16,
        on_batch=lambda done, _rows: progress.advance(done),
    )
    progress.end()
    return as_dict(scores)


class _Shown:
    """Batches whose passing shows on a progress bar."""

    def __init__(self, loader: "DataLoader[Any]", progress: Progress, what: str) -> None:
        self.loader, self.progress, self.what = loader, progress, what

    def __iter__(self) -> Iterator[Batch]:
        self.progress.begin(self.what, len(self.loader))
        try:
            for done, batch in enumerate(self.loader):
                self.progress.advance(done)
                yield batch
        finally:
            self.progress.end()


def _reload(opened: Opened, folder: Path) -> nn.Module:
    recipe = opened.recipe
    model: nn.Module = models.load_base(
        str(folder), task=recipe.task, label_names=opened.label_names, dtype=recipe.dtype
    )
    return model.to(device())
