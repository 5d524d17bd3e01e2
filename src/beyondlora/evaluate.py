"""Measure what a folder holds: a run's best adapter, or any PEFT adapter, loaded strictly.

>>> evaluate(Path("runs/shakespeare"))["metrics"]["perplexity"]
{"value": 9.1, "stderr": 0.2, "n": 218}
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from . import data as data_module
from . import models
from .attach import config_in, load_adapter
from .measure import Outcomes, as_dict, measure
from .recipe import Recipe
from .run_folder import RunFolder

TASK_OF_TYPE = {"CAUSAL_LM": "causal-lm"}  # the only PEFT task type that says how a row is to be read


def evaluate(
    target: Path,
    *,
    data: str | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    merged: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
    on_outcomes: Callable[[Outcomes], None] | None = None,
) -> dict[str, Any]:
    """Measure a run's best adapter, or any adapter folder.

    Args:
        target: a run folder or an adapter folder.
        data: what to evaluate on; None = the recipe's own evaluation rows.
        recipe: how to read the data; None = the run's own.
        batch_size: None = the recipe's.
        merged: fold the adapter into the base first; for methods whose merge is an approximation this measures it.
        on_batch, on_outcomes: see `measure`.

    Returns: a mapping with "metrics" ({name: {value, stderr, n}}) and what they were measured on.
    Raises: FileNotFoundError, ValueError.
    """
    started = time.monotonic()
    opened = open_target(target, data=data, recipe=recipe)
    recipe, evaluation = opened.recipe, opened.rows()
    model = opened.load()
    network: torch.nn.Module = _merge(model) if merged else model
    network.to(device())
    scores = measure(
        network,
        evaluation.rows,
        evaluation.collator,
        task=recipe.task,
        batch_size=batch_size or recipe.per_device_eval_batch_size,
        bf16=recipe.bf16,
        on_batch=on_batch,
        on_outcomes=on_outcomes,
    )
    return {
        "adapter": str(opened.folder),
        "task": recipe.task,
        "data": evaluation.description,
        "data_sha256": evaluation.fingerprint,
        "merged": merged,
        "seconds": time.monotonic() - started,
        "metrics": as_dict(scores),
    }


@dataclass(frozen=True)
class Opened:
    """An adapter folder, and what says how its base model and its rows are loaded.

    Attributes:
        data: what to measure on; None = the recipe's own evaluation rows.
        measurable: whether there is anything to measure on.
    """

    folder: Path
    recipe: Recipe
    processor: Any
    label_names: list[str] | None
    data: str | None
    measurable: bool

    def load(self) -> PeftModel:
        """The adapter on its base model, in evaluation mode, on the CPU."""
        return load_adapter(self.folder, load_base(self.recipe, self.processor, self.label_names))

    def rows(self, data: str | None = None, **changes: Any) -> data_module.Evaluation:
        """Model-ready rows: of `data` or else of what was opened to measure on, by the recipe with some changes."""
        recipe = self.recipe.replace(**changes)
        extra = models.extra_inputs(recipe.model_name_or_path, task=recipe.task, image_size=recipe.image_size)
        return data_module.prepare_evaluation(
            recipe, self.processor, data or self.data, label_names=self.label_names, extra_inputs=extra
        )


def open_target(
    target: Path, *, data: str | None = None, recipe: Recipe | None = None, needs_rows: bool = True
) -> Opened:
    """Find out what a run's best adapter, or any adapter folder, is and needs; loads no model yet.

    Args:
        target, data, recipe: see `evaluate`.
        needs_rows: False = an adapter that nothing says how to measure is opened all the same.

    Raises: FileNotFoundError, ValueError.
    """
    folder, run = locate(target)
    config_in(folder)  # before anything that takes long
    measurable = not (recipe is None and run is None and data is None)
    recipe = recipe or _recipe_of(folder, run, data if measurable or needs_rows else "(none)")
    processor = models.load_processor(recipe.model_name_or_path, task=recipe.task, image_size=recipe.image_size)
    return Opened(folder, recipe, processor, _label_names(recipe, run), data, measurable)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU; what the Trainer chooses too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_base(recipe: Recipe, processor: Any, label_names: list[str] | None) -> Any:
    """Load the base model that a recipe names, with a head for the recipe's labels."""
    return models.load_base(
        recipe.model_name_or_path,
        task=recipe.task,
        label_names=label_names,
        dtype=recipe.dtype,
        pad_token_id=getattr(processor, "pad_token_id", None),
    )


def locate(target: Path) -> tuple[Path, RunFolder | None]:
    """The adapter's folder, and the run it belongs to. Raises: FileNotFoundError."""
    if not target.is_dir():
        raise FileNotFoundError(f"{target} does not exist or is not a folder; name a run folder or an adapter folder.")
    run = RunFolder(target)
    if run.recipe.exists():
        if not run.adapter.exists():
            raise FileNotFoundError(f"The run in {target} has no adapter yet; continue it with --resume.")
        return run.adapter, run
    parent = RunFolder(target.resolve().parent)
    return target, parent if parent.recipe.exists() else None


def _recipe_of(folder: Path, run: RunFolder | None, data: str | None) -> Recipe:
    if run is not None:
        return Recipe.load(run.recipe)
    config = config_in(folder)
    task = TASK_OF_TYPE.get(str(getattr(config.task_type, "value", config.task_type)))
    if task is None or data is None or not config.base_model_name_or_path:
        raise ValueError(
            f"{folder} does not belong to a run, so nothing says how to evaluate it: name the rows with --data and, "
            "for anything but plain text for a causal language model, how to read them with --recipe."
        )
    return Recipe(
        task=task,
        model_name_or_path=config.base_model_name_or_path,
        adapter={"peft_type": str(getattr(config.peft_type, "value", config.peft_type))},
        output_dir=str(folder),
        dataset_name=data,
    )


def _label_names(recipe: Recipe, run: RunFolder | None) -> list[str] | None:
    if recipe.task not in ("sequence-classification", "image-classification"):
        return None
    if run is not None and run.environment.exists():
        names: list[str] | None = json.loads(run.environment.read_text(encoding="utf-8")).get("label_names")
        return names
    return data_module.read_splits(recipe).label_names


def _merge(model: PeftModel) -> torch.nn.Module:
    try:
        merged: torch.nn.Module = model.merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # what PEFT raises for its own methods
        raise ValueError(f"This adapter cannot be merged: {error}") from error
    return merged
