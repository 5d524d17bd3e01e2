"""Stage 1: read, check and split. Every complaint about the rows themselves comes from here, before any model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from .conversations import check_conversations
from .fields import DataRecipe, answer_field, is_packed, text_fields
from .labels import class_names, with_labels
from .rows import arrow_column, read_rows


@dataclass(frozen=True)
class RawSplits:
    """Checked rows before any model is known. Labels, where the task has them, are numbers in a column "labels"."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    label_names: list[str] | None  # classification: class number -> name


def read_splits(recipe: DataRecipe) -> RawSplits:
    """Read, check and split what a recipe names. Raises: FileNotFoundError, ValueError."""
    train = read_checked(recipe, recipe.dataset_name, recipe.dataset_train_split)
    names = class_names(train, recipe) if recipe.task.endswith("-classification") else None
    train = with_labels(train, recipe, names, recipe.dataset_name)
    evaluation = _read_evaluation(recipe, names)
    if evaluation is None and recipe.eval_fraction > 0:
        train, evaluation = _split(train, recipe, recipe.eval_fraction)
    if not is_packed(recipe):
        train = sample(train, recipe.max_train_samples, recipe.split_seed)
        evaluation = evaluation and sample(evaluation, recipe.max_eval_samples, recipe.split_seed)
    return RawSplits(train, evaluation, names)


def hold_out(recipe: DataRecipe, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut the training rows that a recipe names in two, as it would for evaluation; labels stay as they stand there.

    Raises: FileNotFoundError, ValueError.
    """
    return _split(read_checked(recipe, recipe.dataset_name, recipe.dataset_train_split), recipe, fraction)


def read_checked(recipe: DataRecipe, name: str, split: str) -> datasets.Dataset:
    """Rows with the task's fields: texts are text, conversations are messages, images are whole."""
    texts = text_fields(recipe)
    fields = list(texts)
    if recipe.task == "image-classification":
        fields.append(recipe.image_field)
    if recipe.task != "causal-lm":
        fields.append(recipe.label_field)
    answer = answer_field(recipe)
    if answer is not None and answer not in fields:
        fields.append(answer)
    rows = read_rows(name, split=split, config=recipe.dataset_config, columns=recipe.columns, fields=fields)
    for text in texts:
        kind = arrow_column(rows, text).type
        if text == recipe.messages_field:
            check_conversations(arrow_column(rows, text), text, name)
        elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{name}: field {text!r} holds {kind}, expected text")
    if recipe.task == "image-classification":
        rows = _check_images(rows, recipe.image_field, name)
    return rows


def _check_images(rows: datasets.Dataset, name: str, where: str) -> datasets.Dataset:
    """Every image can be decoded, to its end: one that was cut off opens as well as any."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ValueError("image tasks need Pillow, which is not installed: pip install 'beyondlora[images]'") from None
    try:
        rows = rows.cast_column(name, datasets.Image(mode="RGB", decode=True))
    except (pa.ArrowException, TypeError, ValueError):
        raise ValueError(
            f"{where}: field {name!r} holds {rows.features[name]}, expected images (encoded bytes or paths)"
        ) from None
    for number, image in enumerate(arrow_column(rows, name), start=1):
        content = image.as_py()
        source = io.BytesIO(content["bytes"]) if content["bytes"] is not None else content["path"]
        try:
            with Image.open(source) as opened:
                opened.draft(None, (1, 1))  # a JPEG is read to its end all the same, in less time
                opened.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all are Pillow's
            file = f" in {content['path']}" if content["path"] else ""
            raise ValueError(f"{where}, row {number}: field {name!r}{file} is no whole image ({error})") from None
    return rows


def _read_evaluation(recipe: DataRecipe, names: Sequence[str] | None) -> datasets.Dataset | None:
    if recipe.eval_dataset_name is not None:
        name, split = recipe.eval_dataset_name, recipe.dataset_test_split or "test"
    elif recipe.dataset_test_split is not None:
        name, split = recipe.dataset_name, recipe.dataset_test_split
        if Path(name).expanduser().is_file():
            raise ValueError(
                f"dataset_test_split={split!r}: the file {name} has no splits; name a second file as eval_dataset_name"
            )
    else:
        return None
    return with_labels(read_checked(recipe, name, split), recipe, names, name)


def _split(rows: datasets.Dataset, recipe: DataRecipe, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    if is_packed(recipe) and len(rows) == 1:
        return _cut_text(rows, recipe.dataset_text_field, fraction)
    held_out = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    if held_out < 1:
        raise ValueError(
            f"{recipe.dataset_name} holds one row: nothing is left to train on with a fraction of {fraction} held out"
        )
    order = np.random.RandomState(recipe.split_seed).permutation(len(rows))
    # Arrays of row numbers: `select` takes seconds over a list of as many.
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


def _cut_text(rows: datasets.Dataset, name: str, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The end of one text for evaluation: from the first line (else the first word) that begins in that part."""
    text: str = rows[0][name]
    wanted = int(len(text) * (1 - fraction))
    cut = next((at + 1 for mark in ("\n", " ") if 0 <= (at := text.find(mark, wanted)) < len(text) - 1), wanted)
    parts = text[:cut], text[cut:]
    if not all(part.strip() for part in parts):
        raise ValueError(
            f"a text of {len(text)} characters is too short to hold out {fraction} of it; name eval_dataset_name"
        )
    train, evaluation = (datasets.Dataset(pa.table({name: pa.array([part], pa.large_string())})) for part in parts)
    return train, evaluation


def sample(rows: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """At most `count` rows, drawn by the seed, in their old order."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.sort(np.random.RandomState(seed).permutation(len(rows))[:count]))
