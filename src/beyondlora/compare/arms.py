"""From lines to a table: each arm at the learning rate that its validation rows chose, and its verdict."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .grid import Grid, choice_of
from .metrics import Metric
from .runs import DIVERGED, FAILED, FINISHED, Line
from .statistics import Comparison, compare_pairs, compare_with, set_apart, sets_margin


@dataclass(frozen=True)
class Setting:
    """One choice of what is searched: its runs, and how good they are on the validation rows."""

    searched: dict[str, Any]
    lines: list[Line]  # by seed
    validation: float | None  # mean over the seeds; None where one diverged, failed or has no figure

    @property
    def learning_rate(self) -> float:
        """That of its runs."""
        return float(self.lines[0]["recipe"]["learning_rate"])


@dataclass(frozen=True)
class Arm:
    """A method at one choice of its block, after the search."""

    name: str
    method: str
    settings: list[Setting]
    chosen: Setting | None  # None where no setting has a figure with every seed, on validation and on test rows
    at_edge: bool  # the chosen learning rate is the smallest or largest tried
    figures: np.ndarray  # on the test rows, one a seed
    outcomes: dict[str, np.ndarray]  # (seeds, rows)

    @property
    def lines(self) -> list[Line]:
        """The runs that the arm is judged by."""
        return self.chosen.lines if self.chosen else []

    def count(self, status: str) -> int:
        """How many of all its runs ended so."""
        return sum(line["status"] == status for setting in self.settings for line in setting.lines)

    def mean_of(self, key: str) -> float:
        """The mean of a number in its lines."""
        return float(np.mean([line[key] for line in self.lines]))


@dataclass(frozen=True)
class Outcome:
    """A whole comparison: what table, page and pictures are made of."""

    title: str
    metric: Metric
    confidence: float
    arms: list[Arm]  # best validation first, those without a result last
    baseline: Arm | None
    comparisons: dict[str, Comparison]  # arm -> against the baseline
    pairs: dict[tuple[str, str], Comparison]  # the grid's: the first arm against the second
    lines: list[Line]
    notes: list[str]  # what a reader must know before believing the table

    @property
    def seeds(self) -> int:
        """The most seeds an arm is judged by."""
        return max((len(arm.lines) for arm in self.arms), default=0)

    @property
    def alike(self) -> bool:
        """Whether every arm was chosen from the same settings."""
        searches = {
            tuple(sorted(choice_of(setting.lines[0]["recipe"]) for setting in arm.settings)) for arm in self.arms
        }
        return len(searches) < 2

    @property
    def rows(self) -> int:
        """The number of test rows that the metric is of."""
        return next((rows.shape[-1] for arm in self.arms for rows in arm.outcomes.values()), 0)


def outcome_of(grid: Grid, lines: Sequence[Line], *, title: str, notes: Sequence[str] = ()) -> Outcome:
    """Choose on validation, compare on test."""
    arms = [_arm(name, group, grid.metric) for name, group in _grouped(lines, lambda line: line["arm"]).items()]
    sign = -1 if grid.metric.higher_is_better else 1
    arms.sort(key=lambda arm: math.inf if arm.chosen is None else sign * (arm.chosen.validation or 0.0))
    judged = [arm for arm in arms if arm.chosen]
    own = [arm for arm in judged if arm.name in grid.arms]  # a joined one is nobody's baseline
    baseline = next((arm for arm in own if grid.baseline in (arm.name, arm.method)), None)
    how: dict[str, Any] = {"higher_is_better": grid.metric.higher_is_better, "confidence": grid.confidence}
    outcomes = {arm.name: arm.outcomes for arm in judged}
    comparisons = {}
    if baseline is not None:
        others = {name: rows for name, rows in outcomes.items() if name != baseline.name}
        comparisons = compare_with(baseline.outcomes, others, grid.metric.value, **how)
    asked = {(one, two): (outcomes[one], outcomes[two]) for one, two in grid.pairs if {one, two} <= outcomes.keys()}
    pairs = compare_pairs(asked, grid.metric.value, **how)
    told = [*notes, *_notes(grid, arms, baseline)]
    return Outcome(title, grid.metric, grid.confidence, arms, baseline, comparisons, pairs, list(lines), told)


def _arm(name: str, lines: Sequence[Line], metric: Metric) -> Arm:
    groups = _grouped(lines, lambda line: json.dumps(line["searched"], sort_keys=True))
    settings = [_setting(group, metric) for group in groups.values()]
    complete = [setting for setting in settings if setting.validation is not None]
    best = max if metric.higher_is_better else min
    chosen = best(complete, key=lambda setting: setting.validation or 0.0) if complete else None
    rates = [setting.learning_rate for setting in settings]
    kept = [line["items"] for line in chosen.lines] if chosen else []
    outcomes = {key: np.array([items[key] for items in kept]) for key in metric.needs} if kept else {}
    with warnings.catch_warnings():  # predictions that are all alike have no correlation, and numpy says so
        warnings.simplefilter("ignore")
        figures = metric.value(outcomes) if chosen else np.array([])
    if not np.isfinite(figures).all():
        chosen, figures, outcomes = None, np.array([]), {}
    return Arm(
        name=name,
        method=lines[0]["method"],
        settings=settings,
        chosen=chosen,
        at_edge=chosen is not None and len(set(rates)) > 1 and chosen.learning_rate in (min(rates), max(rates)),
        figures=figures,
        outcomes=outcomes,
    )


def _close_choice(arm: Arm, metric: Metric) -> str:
    """How the chosen setting of an arm and the next best lie within the error of the validation rows; "" = apart."""
    others = [s.validation for s in arm.settings if s is not arm.chosen and s.validation is not None]
    errors = [line["validation"][metric.name].get("stderr") for line in arm.lines]  # of one and the same rows
    if arm.chosen is None or arm.chosen.validation is None or not others or None in errors:
        return ""
    best, error = arm.chosen.validation, float(np.mean(errors))
    second = min(others, key=lambda value: abs(value - best))
    if abs(second - best) >= error:
        return ""
    return f"{arm.name} ({best:.{metric.decimals}f} and {second:.{metric.decimals}f}, ± {error:.{metric.decimals}f})"


def _setting(lines: Sequence[Line], metric: Metric) -> Setting:
    lines = sorted(lines, key=lambda line: line["seed"])
    values = [line["validation"][metric.name]["value"] for line in lines if line["status"] == FINISHED]
    complete = len(values) == len(lines) and all(value is not None for value in values)
    return Setting(lines[0]["searched"], lines, float(np.mean(values)) if complete else None)


def _grouped(lines: Iterable[Line], key: Any) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def _notes(grid: Grid, arms: Sequence[Arm], baseline: Arm | None) -> list[str]:
    notes = []
    edges = [arm.name for arm in arms if arm.at_edge]
    if edges:
        notes.append(
            f"The best learning rate of {', '.join(edges)} is the smallest or largest that was tried (marked *): "
            "another might do better."
        )
    close = [told for arm in arms if (told := _close_choice(arm, grid.metric))]
    if close:
        notes.append(
            f"Chosen by less than a standard error of the validation rows: {'; '.join(close)}. Other rows might have "
            "chosen otherwise, and no verdict counts that: compare on more validation rows where it matters."
        )
    for status, what in ((DIVERGED, "diverged"), (FAILED, "failed")):
        counts = {arm.name: arm.count(status) for arm in arms if arm.count(status)}
        if counts:
            told = ", ".join(f"{count} of {name}" for name, count in counts.items())
            notes.append(f"Runs that {what}: {told}. A setting with such a run is not chosen.")
    notes += _undefined(arms)
    notes += _spreads({arm.name: arm.figures for arm in arms if arm.chosen})
    if baseline is None:
        notes.append(f"The baseline {grid.baseline} has no result: no verdict.")
    elif (
        baseline.name != grid.baseline and sum(arm.method == grid.baseline for arm in arms if arm.name in grid.arms) > 1
    ):
        notes.append(f"The baseline is {baseline.name}, the best of {grid.baseline} on the validation rows.")
    judged = {arm.name for arm in arms if arm.chosen}
    lost = [f"{one} and {two}" for one, two in grid.pairs if not {one, two} <= judged]
    if lost:
        notes.append(f"Not compared, for want of a result: {', '.join(lost)}.")
    seeds = len({run.seed for run in grid.runs})
    if seeds == 1:
        notes.append("One seed: how much chance there is in a training is not known, so no verdict is given.")
    if seeds == 2:
        notes.append(
            "Two seeds: where the baseline's results spread several times as wide as the others', a verdict is wrong "
            "more often than in 5 of 100 grids (8 to 10 of 100 simulated ones); a third seed mends it."
        )
    return notes


def _undefined(arms: Sequence[Arm]) -> list[str]:
    """What was measured, and came to no number: a correlation of predictions that are all alike, a loss too large."""
    notes = []
    unseen = {
        arm.name: sum(
            s.validation is None and all(line["status"] == FINISHED for line in s.lines) for s in arm.settings
        )
        for arm in arms
    }
    if any(unseen.values()):
        told = ", ".join(f"{count} of {name}" for name, count in unseen.items() if count)
        notes.append(f"Settings whose figure on the validation rows is no finite number: {told}. They are not chosen.")
    lost = [arm.name for arm in arms if not arm.chosen and any(s.validation is not None for s in arm.settings)]
    if lost:
        notes.append(f"No result, for the figure on the test rows is no finite number: {', '.join(lost)}.")
    return notes


def _spreads(figures: Mapping[str, np.ndarray]) -> list[str]:
    """Whose seeds spread so much that the verdicts on the others feel it, or would if it were not left out."""
    notes, apart, widest = [], set_apart(figures), sets_margin(figures)
    if apart:
        notes.append(
            f"The seeds of {', '.join(apart)} spread clearly more than the others': that spread counts in verdicts on "
            f"{'them' if len(apart) > 1 else 'it'}, and not in the others' margins."
        )
    if widest:
        notes.append(
            f"{widest} sets the margin: without it, what every verdict allows for seeds would be less than half as "
            "much. It is left out only where three or more seeds show clearly that they spread more."
        )
    return notes


def as_mapping(outcome: Outcome) -> Mapping[str, Any]:
    """Everything the table says, for JSON."""
    return {
        "title": outcome.title,
        "metric": outcome.metric.name,
        "higher_is_better": outcome.metric.higher_is_better,
        "confidence": outcome.confidence,
        "baseline": outcome.baseline.name if outcome.baseline else None,
        "seeds": outcome.seeds,
        "test_rows": outcome.rows,
        "notes": outcome.notes,
        "arms": [_arm_mapping(arm, outcome.comparisons.get(arm.name)) for arm in outcome.arms],
        "pairs": [{"arm": one, "against": two, **vars(found)} for (one, two), found in outcome.pairs.items()],
    }


def _arm_mapping(arm: Arm, comparison: Comparison | None) -> dict[str, Any]:
    judged: dict[str, Any] = {}
    if arm.chosen:
        judged = {
            "chosen": arm.chosen.searched,
            "at_edge": arm.at_edge,
            "validation": arm.chosen.validation,
            "test": [float(value) for value in arm.figures],
            "trainable_parameters": arm.lines[0]["trainable_parameters"],
            "train_seconds": arm.mean_of("train_seconds"),
            "peak_memory_bytes": arm.mean_of("peak_memory_bytes"),
        }
    counts = {status: arm.count(status) for status in (FINISHED, DIVERGED, FAILED)}
    against = None if comparison is None else vars(comparison)
    return {"arm": arm.name, "method": arm.method, "runs": counts, **judged, "against_baseline": against}
