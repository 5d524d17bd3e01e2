"""The test rows: cut off before anything else, or named; and never among the validation rows.

A learning rate is chosen on validation rows. Where one of those is also a test row, the figure on the test rows is no
longer that of rows which nothing was chosen on; so that is refused, by the hash of what a model gets to see of a row.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .. import data
from ..recipe import Recipe
from ..run_folder import write_text

CUT, REST = "test", "train-and-validation"
LINES_OF_TEXT = 3  # of a plain text: so many lines in a row count as a row
CHARACTERS_OF_TEXT = 60  # shorter ones, such as a name on a line of its own, recur by nature


def cut_off(recipe: Recipe, fraction: float, folder: Path) -> tuple[Recipe, str]:
    """Cut test rows off the training rows; return the recipe on what is left, and the file of the test rows.

    They are drawn as validation rows are (by split_seed; of a single text, the end).
    Raises: FileNotFoundError, ValueError.
    """
    if recipe.columns is not None:
        raise ValueError("test_fraction does not know rows without a header line; name test_dataset_name instead")
    rest, test = data.hold_out(recipe, fraction)
    files = {name: _write(rows, folder / name, recipe) for name, rows in ((REST, rest), (CUT, test))}
    changes: dict[str, Any] = {"dataset_name": str(files[REST]), "dataset_config": None}
    if recipe.dataset_test_split is not None and recipe.eval_dataset_name is None:
        changes["eval_dataset_name"] = recipe.dataset_name
    return recipe.replace(**changes), str(files[CUT])


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
    tested = set(_hashes(data.read_checked(recipe, test, split), recipe))
    shared = [number for number, row in enumerate(_hashes(splits.evaluation, recipe), start=1) if row in tested]
    if shared:
        raise ValueError(
            f"{len(shared)} of the validation rows are test rows too (the first is validation row {shared[0]}; test "
            f"rows: {test}). What is chosen on a row cannot be judged on it: take them out of one of the two, or let "
            "test_fraction cut the test rows off."
        )
    return sum(row in tested for row in _hashes(splits.train, recipe))


def _hashes(rows: datasets.Dataset, recipe: Recipe) -> Iterator[bytes]:
    """What identifies a row: its texts or its image; of plain text, every few lines in a row."""
    for content in _contents(rows, recipe):
        yield hashlib.sha256(content).digest()


def _contents(rows: datasets.Dataset, recipe: Recipe) -> Iterator[bytes]:
    if recipe.task == "image-classification":
        for image in data.arrow_column(rows, recipe.image_field):
            stored = image.as_py()
            yield stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        return
    columns = [data.arrow_column(rows, name).to_pylist() for name in data.text_fields(recipe)]
    for values in zip(*columns, strict=True):
        if data.is_packed(recipe):
            yield from _windows(values[0])
        else:
            yield json.dumps(values).encode()


def _windows(text: str) -> Iterator[bytes]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(max(len(lines) - LINES_OF_TEXT + 1, 1)):
        window = "\n".join(lines[start : start + LINES_OF_TEXT])
        if len(window) >= CHARACTERS_OF_TEXT:
            yield window.encode()
