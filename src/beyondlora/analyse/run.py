"""Adapter folders and data in, one result out: profiles, their averages, and the angles between adapters.

>>> result = analyse([Path("runs/a"), Path("runs/b")], data="text.txt", out=Path("runs/analysis"))
>>> result["adapters"][0]["mean"]["effective_rank"]
5.7
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from .. import models
from ..attach import config_in, holds_model
from ..evaluate import Opened, device, open_target
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import endings, environment
from .profiles import MAX_TOKENS, LayerProfile, profile
from .summary import as_mapping, compare_subspaces, mean_of
from .write import check_out, write


@dataclass(frozen=True)
class Profiled:
    """An adapter, what it is called beside others, and what was found in its layers."""

    label: str
    opened: Opened
    peft_type: str
    layers: list[LayerProfile]


def analyse(
    targets: Sequence[Path],
    *,
    data: str | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile adapters of one base model on the same rows, and compare where in output space they write.

    Args:
        targets: run folders or adapter folders.
        data: what to run through the model; None = the runs' own evaluation rows.
        recipe: how to read the data; None = each run's own.
        out: a folder for analysis.json, layers.csv, spectra.csv and the pictures; None = nothing is written.
        max_tokens: of the rows, in their order, at most.

    Returns: what analysis.json holds.
    Raises: FileNotFoundError, ValueError.
    """
    progress = progress or Progress()
    if max_tokens < 2:
        raise ValueError(f"--max-tokens {max_tokens}: a spectrum of centred outputs needs at least 2 tokens.")
    if out is not None:
        check_out(out)
    labels = _labels(targets)
    opened = [_open(target, data, recipe) for target in targets]
    _check_one_base(opened)
    started = time.monotonic()
    rows = [one.rows() for one in opened]
    if len({part.fingerprint for part in rows}) > 1:
        raise ValueError(
            "These adapters would see different rows, and their spectra could not be compared: the runs read their "
            "data in different ways. Name the rows with --data and how to read them with --recipe."
        )
    found = [
        Profiled(label, one, _type(one), _profile(label, one, part, max_tokens, progress))
        for label, one, part in zip(labels, opened, rows, strict=True)
    ]
    result = {
        "base_model": opened[0].recipe.model_name_or_path,
        "data": rows[0].description,
        "data_name": data,
        "max_tokens": max_tokens,
        "seconds": time.monotonic() - started,
        "adapters": [_adapter(one) for one in found],
        "subspaces": [
            {"a": a.label, "b": b.label} | compare_subspaces(a.layers, b.layers)
            for a, b in itertools.combinations(found, 2)
        ],
        "environment": environment(device=str(device()), seed=opened[0].recipe.seed, fingerprint=rows[0].fingerprint),
    }
    if out is not None:
        write(out, result, progress)
    return result


def _open(target: Path, data: str | None, recipe: Recipe | None) -> Opened:
    opened = None if holds_model(target) else open_target(target, data=data, recipe=recipe)
    if opened is None or holds_model(opened.folder):
        raise ValueError(
            f"{target} is a whole model, without an adapter beside it: what was merged or trained into its weights "
            "cannot be told from them. Analyse an adapter's own folder, from before merging."
        )
    return opened


def _labels(targets: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the adapters apart."""
    if not targets:
        raise ValueError("Name at least one run folder or adapter folder.")
    paths = [target.resolve() for target in targets]
    twice = [str(target) for target, path in zip(targets, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice.")
    return endings(paths)


def _check_one_base(opened: Sequence[Opened]) -> None:
    bases = {_place(one.recipe.model_name_or_path): one.recipe.model_name_or_path for one in opened}
    if len(bases) > 1:
        raise ValueError(
            f"These adapters belong to different base models ({', '.join(sorted(bases.values()))}): their layers see "
            "different inputs. Analyse them one base model at a time."
        )


def _place(base: str) -> str:
    """One word for a base model, however its folder is spelled."""
    found = Path(models.resolve_name(base))
    return str(found.resolve()) if found.is_dir() else base


def _type(opened: Opened) -> str:
    name = config_in(opened.folder).peft_type
    return str(getattr(name, "value", name))


def _profile(label: str, opened: Opened, rows: Any, max_tokens: int, progress: Progress) -> list[LayerProfile]:
    model: Any = opened.load()
    model.to(device())
    progress.begin(label, _tokens(rows, max_tokens))
    try:
        return profile(
            model,
            _batches(rows, opened.recipe.per_device_eval_batch_size),
            max_tokens=max_tokens,
            on_tokens=lambda done, _: progress.advance(done),
        )
    except ValueError as error:
        raise ValueError(f"{opened.folder}: {error}") from error
    finally:
        progress.end()


def _tokens(rows: Any, limit: int) -> int:
    """How many tokens of the rows will be looked at; the limit where rows are no tokens (images)."""
    if "input_ids" not in rows.rows.column_names:
        return limit
    count = 0
    for row in rows.rows:
        count += len(row["input_ids"])
        if count >= limit:
            return limit
    return count


def _batches(rows: Any, size: int) -> Iterator[Mapping[str, Any]]:
    for batch in DataLoader(rows.rows, batch_size=size, collate_fn=rows.collator):
        yield {name: value for name, value in batch.items() if name != "labels"}


def _adapter(found: Profiled) -> dict[str, Any]:
    return {
        "label": found.label,
        "folder": str(found.opened.folder),
        "peft_type": found.peft_type,
        "mean": mean_of(found.layers),
        "layers": [as_mapping(layer) for layer in found.layers],
    }
