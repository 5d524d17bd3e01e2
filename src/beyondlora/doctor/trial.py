"""Will this recipe run? Everything a training does, on all of its data, for three steps, in a folder that goes away."""

import math
import tempfile
from pathlib import Path
from typing import Any

from .. import data, models
from ..attach import config_from
from ..evaluate import load_processor
from ..progress import Progress
from ..recipe import Recipe, warmup_problem
from ..run_folder import RunFolder
from ..tracking import trackers_of
from ..train import train

STEPS = 3


def try_recipe(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Take the recipe's first steps, evaluate a batch, save and load the adapter; then say how long the rest takes.

    All rows are read, checked and tokenised as for the run itself, so that nothing about them is found out later.
    The run's own output_dir is looked at and left alone.

    Returns: steps (of the whole run), seconds_per_step, seconds (of the steps; evaluations come on top), loss_before
        and loss_after (training loss of the first and the last step tried), trainable_parameters, data, notes.
    Raises: whatever the training itself would raise: ValueError, OSError, FloatingPointError.
    """
    progress = progress or Progress()
    config_from(recipe)
    trackers_of(recipe.report_to)
    run = RunFolder(recipe.output_dir)
    begun = run.recipe.exists()
    run.claim(resume=begun, overwrite=False)
    rows = _training_rows(recipe)
    with tempfile.TemporaryDirectory(prefix="beyondlora-trial-") as folder:
        short = recipe.replace(
            output_dir=str(Path(folder) / "run"),
            max_steps=STEPS,
            max_eval_samples=min(recipe.max_eval_samples or rows, recipe.per_device_eval_batch_size),
            warmup_steps=0,
            warmup_ratio=0.0,
            logging_steps=1,
            eval_steps=STEPS,
            save_steps=STEPS,
            report_to=None,
        )
        try:
            summary = train(short, progress=progress)
        except FloatingPointError as error:  # which says where the weights are, and that folder goes away
            stop = RunFolder(short.output_dir).rows()[-1]
            raise FloatingPointError(
                f"In step {stop['step']} of {STEPS}, without warm-up, {stop['stopped']}. Try a lower learning_rate "
                f"(it is {recipe.learning_rate:g}) or a smaller max_grad_norm; where it is to warm up, begin the run."
            ) from error
        steps = [row for row in RunFolder(short.output_dir).rows() if "loss" in row]
    per_step = steps[1]["seconds"] - steps[0]["seconds"]  # neither the first, which warms up, nor the last, which saves
    total = _steps(recipe, rows)
    notes = [warmup] if (warmup := warmup_problem(recipe, total)) else []
    if begun:
        notes.append(
            f"output_dir {recipe.output_dir!r} holds a run: train it with --resume or --overwrite, or elsewhere."
        )
    return {
        "steps": total,
        "seconds_per_step": per_step,
        "seconds": per_step * total,
        "loss_before": steps[0]["loss"],
        "loss_after": steps[-1]["loss"],
        "trainable_parameters": summary["trainable_parameters"],
        "data": summary["data"],
        "notes": notes,
    }


def _training_rows(recipe: Recipe) -> int:
    """Read, check and tokenise all rows; returns how many there are to train on."""
    processor = load_processor(recipe)
    extra = models.extra_inputs(recipe.model_name_or_path, task=recipe.task, image_size=recipe.image_size)
    return len(data.prepare(data.read_splits(recipe), processor, recipe, extra_inputs=extra).train)


def _steps(recipe: Recipe, rows: int) -> int:
    if recipe.max_steps > 0:
        return recipe.max_steps
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    return math.ceil(math.ceil(rows / batch) * recipe.num_train_epochs)
