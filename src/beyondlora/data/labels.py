"""What is to be predicted: the classes of a classification, the numbers of a regression."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa

from .fields import DataRecipe
from .rows import arrow_column

LARGEST = math.sqrt(np.finfo(np.float32).max)  # 1.8e19


def class_names(rows: datasets.Dataset, recipe: DataRecipe) -> list[str]:
    """The classes: those of the data set's ClassLabel feature, else the sorted distinct values (numbers by size)."""
    feature = rows.features[recipe.label_field]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    names = set(_classes(rows, recipe, recipe.dataset_name))
    if len(names) < 2:
        raise ValueError(
            f"{recipe.dataset_name}: field {recipe.label_field!r} is {names.pop()!r} in every row; two classes needed"
        )
    return sorted(names, key=lambda name: (0, int(name), "") if name.removeprefix("-").isdecimal() else (1, 0, name))


def with_labels(
    rows: datasets.Dataset, recipe: DataRecipe, names: Sequence[str] | None, where: str
) -> datasets.Dataset:
    """The label field as a column "labels" of class numbers, or of floats for regression."""
    if recipe.task == "causal-lm":
        return rows
    if names is None:
        labels = pa.array(_numbers(rows, recipe.label_field, where), pa.float32())
    else:
        number = {name: i for i, name in enumerate(names)}
        classes = _classes(rows, recipe, where)
        unknown = sorted(set(classes) - set(number))
        if unknown:
            row = classes.index(unknown[0]) + 1
            raise ValueError(
                f"{where}: field {recipe.label_field!r} holds classes that the training rows do not: "
                f"{', '.join(unknown[:10])} (first in row {row}); known: {', '.join(list(names)[:20])}"
            )
        labels = pa.array([number[name] for name in classes], pa.int64())
    rows = rows.remove_columns(recipe.label_field)
    return datasets.concatenate_datasets([rows, datasets.Dataset(pa.table({"labels": labels}))], axis=1)


def _classes(rows: datasets.Dataset, recipe: DataRecipe, where: str) -> list[str]:
    """The class name of every row."""
    feature, values = rows.features[recipe.label_field], arrow_column(rows, recipe.label_field).to_pylist()
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    classes = []
    for row, value in enumerate(values, start=1):
        if names is not None and not 0 <= value < len(names):
            raise ValueError(
                f"{where}, row {row}: label {value} is out of range 0 to {len(names) - 1} (-1 means unlabelled)"
            )
        if (isinstance(value, float) and not value.is_integer()) or isinstance(value, list | dict) or value == "":
            raise ValueError(
                f"{where}, row {row}: {recipe.label_field}={value!r} is no class, which is a whole number or a name; "
                "for numbers to predict take task: sequence-regression"
            )
        classes.append(names[value] if names is not None else str(int(value) if isinstance(value, float) else value))
    return classes


def _numbers(rows: datasets.Dataset, name: str, where: str) -> list[float]:
    numbers = []
    for row, value in enumerate(arrow_column(rows, name).to_pylist(), start=1):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not abs(numbers[-1]) <= LARGEST:
            raise ValueError(
                f"{where}, row {row}: {name}={value!r} is no finite number, or its square, a loss, is none"
            )
    return numbers
