"""A grid: one recipe, several methods, learning rates and seeds, in one YAML file.

>>> grid = Grid.load("configs/grids/compare-first.yaml")
>>> len(grid.runs), [arm for arm in grid.arms]

The file is a recipe (recipe.py; what its `adapter:` says holds for every method that has the key) with one more block:

    grid:
      methods:                          name -> adapter block, as in adapter_config.json
        LoRA: {peft_type: LORA, r: [4, 8]}
        DoRA: {peft_type: LORA, use_dora: true, _r: [4, 8], _lora_alpha: [8, 16]}
        full fine-tuning: {peft_type: FULL}
      learning_rate: [1e-3, 3e-3]       searched on the validation rows, for every method alike
      seed: [0, 1, 2]                   repeated
      baseline: LoRA                    default: the first method
      pairs: [[LoRA r=4, LoRA r=8]]     questions of their own beside the baseline's: the first arm against the second

A list is a grid; lists whose keys begin with `_` are paired, first with first. A value that is itself a list goes into
`adapter:`, or into a list of its own. What a method is at one choice of its block is an *arm*, named after what sets
it apart: LoRA r=8, DoRA r=4 (of paired lists only the first ones that tell the pairs apart).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attach import keys_of
from ..recipe import Recipe, load, nearest
from .metrics import Metric, metric_named

SEARCHED = (  # what may be chosen on validation rows; everything else is the same for all methods
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)
SETTINGS = (
    "baseline",
    "confidence",
    "max_test_samples",
    "methods",
    "metric",
    "pairs",
    "seed",
    "test_dataset_name",
    "test_fraction",
    "title",
)
KINDS = {  # of the settings: what they may hold, and how it is told
    "baseline": (str, "the name of a method or an arm"),
    "confidence": (float, "a number such as 0.95"),
    "max_test_samples": (int, "a whole number greater than 0"),
    "metric": (str, "the name of a metric"),
    "test_dataset_name": (str, "a file, a folder or a hub name"),
    "test_fraction": (float, "a number between 0 and 1"),
    "title": (str, "text (put it in quotes)"),
}
NEEDED = ("baseline", "confidence")  # have a default, and no meaning when empty


@dataclass(frozen=True)
class Run:
    """One training: an arm, at one choice of what is searched, with one seed."""

    name: str  # unique in the grid, and the name of its folder
    method: str
    arm: str
    searched: dict[str, Any]
    recipe: Recipe

    @property
    def seed(self) -> int:
        """The recipe's."""
        return self.recipe.seed


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison, and how they are compared. Raises: ValueError, FileNotFoundError (`load`)."""

    output: Path
    runs: list[Run]
    baseline: str  # an arm or a method
    pairs: list[tuple[str, str]]  # arms: the first is compared with the second
    metric: Metric
    confidence: float
    test_dataset_name: str | None
    test_fraction: float | None
    max_test_samples: int | None
    title: str | None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Grid:
        """Read a file, with `key=value` changes of the recipe in it."""
        return load(Path(path), overrides, cls.from_mapping)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Grid:
        """A grid from the mapping a file holds."""
        recipe = {name: value for name, value in values.items() if name != "grid"}
        block = values.get("grid")
        if not isinstance(block, dict):
            raise ValueError("there is no grid: block; a grid is a recipe with grid: {methods: ..., seed: [...]}")
        _check_keys(block)
        _check_kinds(block)
        searches = choices({name: block[name] for name in block if name not in SETTINGS}, "grid")
        runs = _runs(recipe, block, searches, _seeds(block))
        first = runs[0].recipe
        if first.eval_fraction == 0 and first.eval_dataset_name is None and first.dataset_test_split is None:
            raise ValueError("eval_fraction is 0: without validation rows nothing can be chosen; hold some out")
        grid = cls(
            output=Path(first.output_dir).parent.parent,
            runs=runs,
            baseline=block.get("baseline", runs[0].method),
            pairs=_pairs(block.get("pairs") or [], list(dict.fromkeys(run.arm for run in runs))),
            metric=metric_named(block.get("metric"), first),
            confidence=float(block.get("confidence", 0.95)),
            test_dataset_name=block.get("test_dataset_name"),
            test_fraction=block.get("test_fraction"),
            max_test_samples=block.get("max_test_samples"),
            title=block.get("title"),
        )
        grid._check()
        return grid

    @property
    def arms(self) -> dict[str, list[Run]]:
        """Arm -> its runs."""
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        return arms

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len({run.seed for run in self.runs})

    @property
    def settings(self) -> int:
        """How many of what is searched, in every arm."""
        return len(self.runs) // len(self.arms) // self.seeds

    def describe(self) -> str:
        """The number of runs and where it comes from."""
        return f"{len(self.runs)} runs: {len(self.arms)} arms x {self.settings} settings x {self.seeds} seeds"

    def _check(self) -> None:
        methods = list(dict.fromkeys(run.method for run in self.runs))
        if self.baseline not in methods and self.baseline not in self.arms:
            raise ValueError(
                f"grid: baseline {self.baseline!r} is none of the methods; {nearest(self.baseline, methods)}"
            )
        if (self.test_dataset_name is None) == (self.test_fraction is None):
            raise ValueError(
                "grid: figures are reported on rows that nothing was chosen on: give test_dataset_name (a file, folder "
                "or hub name) or test_fraction (cut off the training rows first), one of the two"
            )
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"grid: test_fraction={self.test_fraction!r} must lie between 0 and 1")
        of_baseline = {run.arm for run in self.runs if self.baseline in (run.arm, run.method)}
        if not self.metric.on_test_rows and max(self.settings, len(of_baseline)) > 1:
            raise ValueError(
                f"grid: {self.metric.name} is of the same rows in validation as in testing, so what was chosen by it "
                f"cannot be judged by it, and here are {self.settings} settings an arm and {len(of_baseline)} arms to "
                "choose the baseline from. Search by another metric; then give one setting, and one arm as baseline"
            )
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"grid: confidence={self.confidence!r} must lie between 0.5 and 1, for example 0.95")


def choices(block: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Every choice of a block: lists are grids, lists of `_` keys are paired. Raises: ValueError."""
    for name, values in block.items():
        if isinstance(values, list):
            _check_list(f"{where}: {name}", values[:1] if name.startswith("_") else values)
        elif name.startswith("_"):
            raise ValueError(f"{where}: {name} begins with _, which pairs lists, but holds {values!r}; give a list")
    paired = {name[1:]: values for name, values in block.items() if name.startswith("_")}
    lengths = {name: len(values) for name, values in paired.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"_{name}: {length}" for name, length in lengths.items())
        raise ValueError(f"{where}: paired lists need one length, these have {told}")
    both = sorted(set(paired) & set(block))
    if both:
        raise ValueError(f"{where}: {both[0]} and _{both[0]} say the same thing; give one of them")
    pairs = [dict(zip(paired, values, strict=True)) for values in zip(*paired.values(), strict=True)] or [{}]
    _check_list(f"{where}: {', '.join(f'_{name}' for name in paired)}", pairs)
    free = {name: values for name, values in block.items() if not name.startswith("_")}
    axes = [values if isinstance(values, list) else [values] for values in free.values()]
    return [dict(zip(free, point, strict=True)) | pair for point in itertools.product(*axes) for pair in pairs]


def _check_list(where: str, values: list[Any]) -> None:
    if not values:
        raise ValueError(f"{where} is an empty list: the grid would have no run")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{where} lists {value!r} twice: the same run again would count as new evidence")


def _check_keys(block: Mapping[str, Any]) -> None:
    known = [*SETTINGS, *SEARCHED]
    for name in block:
        if name.removeprefix("_") not in known:
            raise ValueError(f"grid: {name!r} is not a key of a grid; {nearest(name, known)}")
    if not isinstance(block.get("methods"), dict) or not block["methods"]:
        raise ValueError("grid: methods is missing; name some, as methods: {LoRA: {peft_type: LORA, r: [4, 8]}}")


def _check_kinds(block: Mapping[str, Any]) -> None:
    for name, (kind, told) in KINDS.items():
        value = block.get(name)
        if name not in block or (value is None and name not in NEEDED):
            continue
        fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, int) and kind is int and value < 1):
            given = "empty" if value is None else f"{value!r} ({type(value).__name__})"
            raise ValueError(f"grid: {name} is {given}; give {told}, or leave the key out")


def _seeds(block: Mapping[str, Any]) -> list[int]:
    seeds = block.get("seed", [0, 1, 2])
    seeds = seeds if isinstance(seeds, list) else [seeds]
    _check_list("grid: seed", seeds)
    return seeds


def _pairs(asked: Any, arms: Sequence[str]) -> list[tuple[str, str]]:
    pairs = list[tuple[str, str]]()
    for pair in asked if isinstance(asked, list) else [asked]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(f"grid: pairs holds {pair!r}; give lists of two arms, as [[{arms[-1]}, {arms[0]}]]")
        for name in pair:
            if name not in arms:
                raise ValueError(f"grid: pairs: {name!r} is none of the arms; {nearest(name, arms)}")
        if pair[0] == pair[1]:
            raise ValueError(f"grid: pairs: {pair[0]!r} is compared with itself")
        if tuple(pair) in pairs or tuple(pair[::-1]) in pairs:
            raise ValueError(f"grid: pairs lists {pair[0]!r} and {pair[1]!r} twice; each question counts once")
        pairs.append((pair[0], pair[1]))
    return pairs


def _runs(
    recipe: Mapping[str, Any], block: Mapping[str, Any], searches: Sequence[dict[str, Any]], seeds: Sequence[int]
) -> list[Run]:
    output, shared = recipe.get("output_dir"), recipe.get("adapter") or {}
    _check_shared(shared, block["methods"])
    if not isinstance(output, str):
        raise ValueError("output_dir is missing: name the folder of the whole comparison")
    runs: list[Run] = []
    for method, adapter, arm in _arms(block["methods"]):
        for searched, seed in itertools.product(searches, seeds):
            name = _slug("-".join([arm, *(_told(key, value) for key, value in searched.items()), f"seed{seed}"]))
            if name in {run.name for run in runs}:
                raise ValueError(f"grid: two runs would share the folder {name}; give methods names that differ more")
            changes = {
                "adapter": {**_known_to(adapter, shared), **adapter},
                "seed": seed,
                "output_dir": f"{output}/runs/{name}",
                **searched,
            }
            runs.append(Run(name, method, arm, searched, Recipe.from_mapping({**recipe, **changes})))
    return runs


def _check_shared(shared: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Refuse a key that holds for every method and that none of them has: it is misspelt, and would do nothing."""
    blocks = [{**shared, **block} for block in methods.values() if isinstance(block, dict)]
    known = {key for block in blocks for key in ("peft_type", *_keys(block))}
    for key in shared:
        if blocks and key not in known:
            raise ValueError(f"adapter: no method of the grid has a key {key!r}; {nearest(key, sorted(known))}")


def _known_to(adapter: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What of the block that holds for every method this method has a key for (full fine-tuning has none at all)."""
    known = ["peft_type", *_keys({**shared, **adapter})]
    return {key: value for key, value in shared.items() if key in known}


def _keys(adapter: Mapping[str, Any]) -> list[str]:
    peft_type = adapter.get("peft_type")
    return keys_of(peft_type) if isinstance(peft_type, str) else []


def _arms(methods: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any], str]]:
    """(method, adapter block, arm) of every method at every choice of its block."""
    for method, block in methods.items():
        if not isinstance(method, str):
            raise ValueError(f"grid: methods: {method!r} is a {type(method).__name__}, and a name is text; quote it")
        if not isinstance(block, dict):
            raise ValueError(
                f"grid: methods: {method} holds {block!r}; give an adapter block, as {{peft_type: LORA, r: 8}}"
            )
        _check_literal_lists(method, block)
        varied = _telling(block)
        for adapter in choices(block, f"grid: methods: {method}"):
            yield method, adapter, " ".join([method, *(f"{name}={adapter[name]}" for name in varied)])


def _telling(block: Mapping[str, Any]) -> list[str]:
    """The keys that set the choices of a block apart; of paired ones the shortest beginning that does."""
    varied = [name for name, values in block.items() if isinstance(values, list) and len(values) > 1]
    paired = [name for name in varied if name.startswith("_")]
    while len(paired) > 1 and _distinct([block[name] for name in paired[:-1]]):
        varied.remove(paired.pop())
    return [name.removeprefix("_") for name in varied]


def _distinct(lists: Sequence[list[Any]]) -> bool:
    rows = list(zip(*lists, strict=False))  # lengths are checked where they are paired
    return not any(row in rows[:number] for number, row in enumerate(rows))


def _check_literal_lists(method: str, block: Mapping[str, Any]) -> None:
    """[q_proj, v_proj] would be two runs with one target each, where one run with two is meant."""
    for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"):
        values = block.get(name)
        if isinstance(values, list) and not any(isinstance(value, list) for value in values):
            raise ValueError(
                f"grid: methods: {method}: {name}={values!r} would be a grid of single modules; for one run with all "
                f"of them write {name}: [{values!r}], or put it into the adapter: block, which holds for every method"
            )


def choice_of(recipe: Mapping[str, Any]) -> str:
    """What a run's recipe has of what is searched; equal words are equal choices."""
    return json.dumps([recipe.get(key) for key in SEARCHED])


def _told(key: str, value: Any) -> str:
    return f"lr{value:g}" if key == "learning_rate" and isinstance(value, float) else f"{key}{value}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-")
