"""The test rows: cut off before anything else, or named; and never among the validation rows.

A learning rate is chosen on validation rows. Where one of those is also a test row, the figure on the test rows is no
longer that of rows which nothing was chosen on; so that is refused, by the hash of what a model gets to see of a row.
Rows of plain text are looked at in stretches of a few lines, for they share lines by nature (a licence's), and one may
begin in another's middle: one is a test row if more than half of it is. A text alone is all its stretches.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .. import data
from ..recipe import Recipe
from ..run_folder import write_text

CUT, REST = "test", "train-and-validation"
LINES_OF_TEXT = 3  # of a plain text: so many lines in a row count as a row
CHARACTERS_OF_TEXT = 60  # shorter ones, such as a name on a line of its own, recur by nature


def cut_off(recipe: Recipe, fraction: float, folder: Path) -> tuple[Recipe, str]:
    """Cut test rows off the training rows; return the recipe on what is left, and the file of the test rows.

    They are drawn as validation rows are (by split_seed; of a single text, the end), rows that are the same together.
    Raises: FileNotFoundError, ValueError.
    """
    if recipe.columns is not None:
        raise ValueError("test_fraction does not know rows without a header line; name test_dataset_name instead")
    rows = data.read_checked(recipe, recipe.dataset_name, recipe.dataset_train_split)
    alone = len(rows) == 1  # which is cut, or refused
    rest, test = data.hold_out(recipe, fraction) if alone else _drawn(rows, recipe, fraction)
    files = {name: _write(rows, folder / name, recipe) for name, rows in ((REST, rest), (CUT, test))}
    changes: dict[str, Any] = {"dataset_name": str(files[REST])}  # dataset_config is for evaluation rows of the hub
    if recipe.dataset_test_split is not None and recipe.eval_dataset_name is None:
        changes["eval_dataset_name"] = recipe.dataset_name
    return recipe.replace(**changes), str(files[CUT])


def _drawn(rows: datasets.Dataset, recipe: Recipe, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What is left, and the test rows. Raises: ValueError."""
    alike = dict[bytes, list[int]]()
    for number, content in enumerate(_contents(rows, recipe)):
        alike.setdefault(hashlib.sha256(content).digest(), []).append(number)
    groups, wanted = list(alike.values()), min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    test = list[int]()
    for number in np.random.RandomState(recipe.split_seed).permutation(len(groups)):
        if len(test) + len(groups[number]) <= wanted:
            test += groups[number]
    if not test:
        raise ValueError(
            f"{recipe.dataset_name}: its {len(rows)} rows are {len(groups)} different ones, and none comes so seldom "
            f"that test_fraction={fraction} could cut it off whole; give a larger one, or name test_dataset_name"
        )
    kept = np.setdiff1d(np.arange(len(rows)), test)
    return rows.select(kept), rows.select(np.sort(np.array(test)))


def _write(rows: datasets.Dataset, path: Path, recipe: Recipe) -> Path:
    if data.is_packed(recipe) and len(rows) == 1:
        path = path.with_suffix(".txt")
        write_text(path, rows[0][recipe.dataset_text_field])
        return path
    path = path.with_suffix(".parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.to_parquet(str(partial))
    finally:
        if bars:
            datasets.enable_progress_bars()
    partial.replace(path)
    return path


def check_apart(recipe: Recipe, splits: data.RawSplits, test: str) -> int:
    """Refuse validation rows that are test rows; return how many *training* rows are (a thing to be said).

    Raises: ValueError.
    """
    split = recipe.dataset_test_split or "test"
    tested = {part for parts in _hashes(data.read_checked(recipe, test, split), recipe) for part in parts}

    def known(rows: datasets.Dataset) -> Iterator[bool]:
        return (2 * sum(part in tested for part in parts) > len(parts) for parts in _hashes(rows, recipe))

    shared = [number for number, is_known in enumerate(known(splits.evaluation), start=1) if is_known]
    if shared:
        raise ValueError(
            f"{len(shared)} of the validation rows are test rows too (the first is validation row {shared[0]}; test "
            f"rows: {test}). What is chosen on a row cannot be judged on it: take them out of one of the two, or let "
            "test_fraction cut test rows off, which keeps rows that are the same together."
        )
    return sum(known(splits.train))


def _hashes(rows: datasets.Dataset, recipe: Recipe) -> Iterator[list[bytes]]:
    """What identifies a row: its texts or its image; of plain text, every few lines in a row."""
    for content in _contents(rows, recipe):
        parts = _windows(content.decode()) if data.is_packed(recipe) else [content]
        hashes = [hashlib.sha256(part).digest() for part in parts]
        if data.is_packed(recipe) and len(rows) == 1:
            yield from ([part] for part in hashes)
        else:
            yield hashes


def _contents(rows: datasets.Dataset, recipe: Recipe) -> Iterator[bytes]:
    """What a model gets to see of a row."""
    if recipe.task == "image-classification":
        for image in data.arrow_column(rows, recipe.image_field):
            stored = image.as_py()
            yield stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        return
    columns = [data.arrow_column(rows, name).to_pylist() for name in data.text_fields(recipe)]
    for values in zip(*columns, strict=True):
        yield values[0].encode() if data.is_packed(recipe) else json.dumps(values).encode()


def _windows(text: str) -> Iterator[bytes]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(max(len(lines) - LINES_OF_TEXT + 1, 1)):
        window = "\n".join(lines[start : start + LINES_OF_TEXT])
        if len(window) >= CHARACTERS_OF_TEXT:
            yield window.encode()
