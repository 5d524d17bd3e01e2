"""From a grid to its report: check everything, say how much it is, run what is missing, show what came out."""

import dataclasses
import importlib.util
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import curves, data
from ..attach import config_from
from ..evaluate import device, load_processor
from ..figures import Examination, check_extras
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import alone_in, write_json, write_text
from ..tracking import trackers_of
from . import pictures, published
from .arms import Outcome, as_mapping, outcome_of
from .grid import Grid
from .held_out import check_apart, cut_off
from .report import page
from .runs import (
    FAILED,
    FINISHED,
    HeldOut,
    Line,
    check_planned,
    check_same,
    expected,
    probe,
    read_results,
    run_all,
)
from .statistics import check_rows
from .words import markdown

MAX_RUNS, MAX_HOURS = 60, 1.0  # beyond one of them, only with `yes`


def compare(
    grid: Grid,
    *,
    title: str = "",
    command: Sequence[str] = (),
    joined: Sequence[Path] = (),
    jobs: int | None = None,
    yes: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Run what of the grid has not been run, and write the report into its output folder.

    Everything that can be refused is refused before the first run. Whatever moment it is killed at, the same call goes
    on where it stopped; runs that failed are tried again.

    Args:
        command: shown in the report as what makes it again.
        joined: output folders of other comparisons whose runs stand in the table too.
        jobs: runs at a time; None = one a core, or one on an accelerator.
        yes: more than MAX_RUNS runs or MAX_HOURS hours are meant.

    Raises: ValueError, FileNotFoundError: bad input. BlockingIOError: another comparison is at work in that folder.
    """
    progress = progress or Progress()
    _check_extras()
    check_extras(grid.runs[0].recipe)
    trackers_of(grid.runs[0].recipe.report_to)
    for runs in grid.arms.values():
        config_from(runs[0].recipe)  # an unknown method or key
    with alone_in(grid.output, "comparison"):
        grid, test, shared = _settled(grid, progress)
        others = _joined(joined, shared)
        lines = _lines(grid, test, shared, jobs, yes, progress)
        name, notes = title or grid.output.name, shared_notes(grid, others)
        outcome = outcome_of(grid, [*lines, *others], title=name, notes=notes)
        _write(outcome, grid, command or ["beyondlora", "compare"], progress)
    return outcome


def _lines(
    grid: Grid, test: HeldOut, shared: dict[str, Any], jobs: int | None, yes: bool, progress: Progress
) -> list[Line]:
    """The line of every run of the grid, those that are missing trained first. Raises: ValueError."""
    lines = read_results(grid.output)
    check_planned(lines, grid.runs, grid.output)
    check_same({run.name: lines[run.name] for run in grid.runs if run.name in lines}, shared, grid.output)
    left = [run for run in grid.runs if lines.get(run.name, {"status": FAILED})["status"] == FAILED]
    jobs = jobs or (1 if _on_accelerator() else os.cpu_count() or 1)
    progress.say(f"{grid.describe()}" + (f"; {len(left)} left" if len(left) < len(grid.runs) else ""))
    if left:
        seconds, steps = probe(left[0], test) or (None, max(left[0].recipe.max_steps, 1))
        _agree(len(left), seconds, min(jobs, len(left)), yes, progress)
        progress.begin("compare", steps * len(left))
        try:
            for line in run_all(left, test, shared, grid.output, jobs=jobs, progress=progress):
                lines[line["run"]] = line
                _say_if_bad(line, progress)
        finally:
            progress.end()
    return [lines[run.name] for run in grid.runs if run.name in lines]


# --- before the runs -------------------------------------------------------------------------------------------------


def _check_extras() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("compare needs scipy, which is not installed: pip install 'beyondlora[metrics]'")


def _settled(grid: Grid, progress: Progress) -> tuple[Grid, HeldOut, dict[str, Any]]:
    """The grid on its final rows, its test rows, and what all its lines have in common."""
    recipe, path = grid.runs[0].recipe, grid.test_dataset_name
    if grid.test_fraction is not None:
        recipe, path = cut_off(recipe, grid.test_fraction, grid.output / "data")
        names = ("dataset_name", "dataset_config", "eval_dataset_name")
        changes = {name: getattr(recipe, name) for name in names}
        runs = [dataclasses.replace(run, recipe=run.recipe.replace(**changes)) for run in grid.runs]
        grid = dataclasses.replace(grid, runs=runs)
    if path is None:
        raise ValueError("no test rows are named")
    raw = data.read_splits(recipe)
    known = check_apart(recipe, raw, path)
    if known:
        progress.say(f"Note: {known} training rows are test rows too; figures on them flatter every method alike.")
    processor = load_processor(recipe)
    splits = data.prepare(raw, processor, recipe)
    tested = recipe.replace(max_eval_samples=grid.max_test_samples)
    evaluation = data.prepare_evaluation(tested, processor, path, label_names=splits.label_names)
    examination = Examination.of(tested, processor, evaluation)
    rows = examination.counts[grid.metric.of]
    check_rows(rows, grid.confidence)
    progress.say(f"{splits.description}; test: {evaluation.description}")
    test = HeldOut(path, evaluation.fingerprint, rows, grid.max_test_samples)
    harness = None if examination.harness is None else examination.harness.version
    shared = expected(recipe, test, splits.fingerprint, harness) | {"tokens_per_row": _tokens_per_row(recipe, splits)}
    return grid, test, shared


def _tokens_per_row(recipe: Recipe, splits: data.Splits) -> float:
    if recipe.task == "image-classification":
        return 0.0
    lengths = [len(ids) for ids in splits.train["input_ids"]]
    return sum(lengths) / len(lengths)


def _joined(folders: Sequence[Path], shared: dict[str, Any]) -> list[Line]:
    """The lines of other comparisons, their arms named after their folder. Raises: FileNotFoundError, ValueError."""
    lines = []
    for folder in folders:
        found = read_results(folder)
        if not found:
            raise FileNotFoundError(f"--join {folder}: there is no results.jsonl with a run in it")
        check_same(found, shared, folder)
        lines += [line | {"arm": f"{line['arm']} ({folder.name})"} for line in found.values()]
    return lines


def shared_notes(grid: Grid, joined: Sequence[Line]) -> list[str]:
    """What stands above the notes on the arms."""
    return [f"{len(joined)} runs were joined from other folders."] if joined else []


def _agree(runs: int, run_seconds: float | None, jobs: int, yes: bool, progress: Progress) -> None:
    """Say how long it will take; refuse what nobody may have meant. Raises: ValueError."""
    seconds = (run_seconds or 0) * runs / jobs
    told = f"{runs} runs, about {_duration(seconds)} with {jobs} at a time" if run_seconds else f"{runs} runs"
    progress.say(told + ".")
    if not yes and (runs > MAX_RUNS or seconds > MAX_HOURS * 3600):
        raise ValueError(
            f"{told}: more than {MAX_RUNS} runs or {MAX_HOURS:g} h are only begun with --yes. "
            "Or shorten the grid: fewer ranks, learning rates, seeds or steps."
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _on_accelerator() -> bool:
    return device().type != "cpu"


def _say_if_bad(line: Line, progress: Progress) -> None:
    if line["status"] != FINISHED:
        progress.say(f"{line['run']} {line['status']}: {line['error']}")


# --- after the runs --------------------------------------------------------------------------------------------------


def _write(outcome: Outcome, grid: Grid, command: Sequence[str], progress: Progress) -> None:
    drawn, missing = {}, ""
    if curves.can_draw():
        drawn = pictures.draw(outcome)
        pictures.write(drawn, grid.output / "pictures")
    else:
        missing = "No pictures: matplotlib is not installed (pip install 'beyondlora[plots]')."
        progress.say(missing)
    machine = _machine(outcome)
    shown = shlex.join(command)
    write_text(grid.output / "report.html", page(outcome, drawn, command=shown, machine=machine, missing=missing))
    write_text(grid.output / "report.md", markdown(outcome, command=shown, machine=machine))
    write_json(grid.output / "report.json", dict(as_mapping(outcome)))
    published.publish(outcome, grid.output / "method_comparison")


def _machine(outcome: Outcome) -> list[str]:
    """What the runs ran on, once for each that differs."""
    told: dict[str, None] = {}
    for line in outcome.lines:
        if line["status"] == FINISHED:
            environment = line["environment"]
            versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
            where = f"{environment['device']}, {os.cpu_count()} CPU cores, {platform.machine()}"
            told[f"{environment['started'][:10]}, {where}, Python {environment['python']}, {versions}"] = None
    return list(told)
