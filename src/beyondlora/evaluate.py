"""Measure what a folder holds: a run's best adapter, any PEFT adapter, or a fine-tuned model, loaded strictly.

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
from accelerate import PartialState
from peft import PeftModel

from . import data as data_module
from . import models
from .attach import Trained, check_folder, config_in, holds_model, load_trained
from .figures import Examination, check_extras
from .measure import Outcomes, as_dict, moved
from .recipe import Recipe
from .run_folder import RunFolder, check_writable
from .tuner.packing import keep_unpacked

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
    keep: Path | None = None,
) -> dict[str, Any]:
    """Measure a run's best adapter, or any adapter folder. Several processes share the rows out.

    Args:
        target: a run folder or an adapter folder.
        data: what to evaluate on; None = the recipe's own evaluation rows.
        recipe: how to read the data; None = the run's own.
        batch_size: None = the recipe's.
        merged: fold the adapter into the base first; for methods whose merge is an approximation this measures it.
        on_batch, on_outcomes, keep: see `Examination.measure`.

    Returns: a mapping with "metrics" ({name: {value, stderr, n}}) and what they were measured on.
    Raises: FileNotFoundError, ValueError; IsADirectoryError, NotADirectoryError, PermissionError for `keep`.
    """
    started = time.monotonic()
    main = PartialState(cpu=device().type == "cpu").is_main_process  # and several processes find each other
    opened = open_target(target, data=data, recipe=recipe)
    recipe = opened.recipe
    if keep is not None:
        _check_keep(keep, recipe)
    evaluation = opened.rows()
    check_extras(recipe)
    examination = Examination.of(recipe, opened.processor, evaluation)
    base = opened.base()
    examination = examination.begun_with(base, device())
    model = opened.load(base)
    network: Any = moved(_merge(model) if merged else model, device())
    scores = examination.measure(
        network, batch_size=batch_size, on_batch=on_batch, on_outcomes=on_outcomes, keep=keep if main else None
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

    def base(self) -> Any:
        """The base model, on the CPU."""
        return load_base(self.recipe, self.processor, self.label_names)

    def load(self, base: Any = None) -> Trained:
        """What the folder holds, on its base model (loaded anew if not given), in evaluation mode."""
        return load_trained(self.folder, self.base() if base is None else base)

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
    check_folder(folder)  # before anything that takes long
    measurable = not (recipe is None and run is None and data is None)
    recipe = recipe or _recipe_of(folder, run, data if measurable or needs_rows else "(none)")
    processor = load_processor(recipe)
    return Opened(folder, recipe, processor, _label_names(recipe, run), data, measurable)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU; what the Trainer chooses too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_processor(recipe: Recipe) -> Any:
    """The tokenizer or image processor that a recipe names, with the recipe's chat template if it has one."""
    return models.load_processor(
        recipe.model_name_or_path,
        task=recipe.task,
        image_size=recipe.image_size,
        chat_template_path=recipe.chat_template_path,
    )


def load_base(recipe: Recipe, processor: Any, label_names: list[str] | None) -> Any:
    """Load the base model that a recipe names, with a head for the recipe's labels."""
    base = models.load_base(
        recipe.model_name_or_path,
        task=recipe.task,
        label_names=label_names,
        dtype=recipe.dtype,
        bits=recipe.bits,
        pad_token_id=getattr(processor, "pad_token_id", None),
    )
    keep_unpacked(base)  # it may be measured before an adapter is attached
    return base


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
    config = None if holds_model(folder) else config_in(folder)
    task = TASK_OF_TYPE.get(str(getattr(config.task_type, "value", config.task_type))) if config else None
    if config is None or task is None or data is None or not config.base_model_name_or_path:
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


def _check_keep(path: Path, recipe: Recipe) -> None:
    """Raises: ValueError, IsADirectoryError; see also `check_writable`."""
    if not recipe.asks:
        raise ValueError(
            f"--keep {path}: nothing is asked that could be kept. It takes metrics or lm_eval_tasks in the recipe "
            "(--set 'metrics=[...]'); the loss alone has no answers."
        )
    if path.is_dir():
        raise IsADirectoryError(f"--keep {path} is a folder; name a file.")
    check_writable(path)


def _merge(model: Trained) -> torch.nn.Module:
    if not isinstance(model, PeftModel):
        raise ValueError("This is a whole model: it has no adapter that could be merged into it. Leave --merged out.")
    try:
        merged: torch.nn.Module = model.merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # what PEFT raises for its own methods
        raise ValueError(f"This adapter cannot be merged: {error}") from error
    return merged
