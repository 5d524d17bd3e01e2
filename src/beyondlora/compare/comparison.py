"""From a grid to its report: check everything, say how much it is, run what is missing, show what came out."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import curves, data, models
from ..attach import config_from
from ..evaluate import device, load_base, load_processor
from ..figures import Examination, check_extras
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import alone_in, endings, write_json, write_text
from ..tracking import trackers_of
from ..train import check_beginning
from . import pictures, published
from .arms import Outcome, as_mapping, outcome_of
from .grid import Grid, Run, choice_of
from .held_out import check_apart, cut_off
from .report import page
from .runs import (
    FAILED,
    FINISHED,
    RESULTS,
    HeldOut,
    Line,
    check_alike,
    check_planned,
    check_same,
    check_trained,
    check_whole,
    expected,
    probe,
    read_results,
    run_all,
)
from .statistics import check_rows
from .words import markdown

MAX_RUNS, MAX_HOURS = 60, 1.0  # beyond one of them, only with `yes`


class NoVerdictError(ValueError):
    """A comparison whose baseline has no result; `outcome` has what there is."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


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

    Raises:
        ValueError, FileNotFoundError: bad input.
        NoVerdictError: a baseline without a result, once the report is written.
        BlockingIOError: another comparison is at work in that folder.
    """
    progress = progress or Progress()
    _check_extras()
    check_extras(grid.runs[0].recipe)
    trackers_of(grid.runs[0].recipe.report_to)
    for runs in grid.arms.values():
        config_from(runs[0].recipe)  # an unknown method or key
    with alone_in(grid.output, "comparison"):
        grid, test, shared = _settled(grid, progress)
        others = _joined(joined, grid, shared)
        lines = _lines(grid, test, shared, jobs, yes, progress)
        name, notes = title or grid.output.name, shared_notes(grid, others)
        outcome = outcome_of(grid, [*lines, *others], title=name, notes=notes)
        _write(outcome, grid, command or ["beyondlora", "compare"], progress)
    _check_baseline(outcome, grid, lines)
    return outcome


def _lines(
    grid: Grid, test: HeldOut, shared: dict[str, Any], jobs: int | None, yes: bool, progress: Progress
) -> list[Line]:
    """The line of every run of the grid, those that are missing trained first. Raises: ValueError."""
    lines = read_results(grid.output)
    check_planned(lines, grid.runs, grid.output)
    there = {run.name: lines[run.name] for run in grid.runs if run.name in lines}
    check_whole(there, grid.metric, grid.output)
    check_same(there, shared, grid.output)
    left = [run for run in grid.runs if lines.get(run.name, {"status": FAILED})["status"] == FAILED]
    jobs = jobs or (1 if _on_accelerator() else os.cpu_count() or 1)
    progress.say(f"{grid.describe()}" + (f"; {len(left)} left" if len(left) < len(grid.runs) else ""))
    if left:
        check_trained(left, shared["data_sha256"])
        _check_beginnings(left)
        seconds, steps = probe(left[0]) or (None, max(left[0].recipe.max_steps, 1))
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
    corpus = None if examination.corpus is None else examination.corpus.rows.fingerprint
    shared = expected(recipe, test, splits.fingerprint, harness, corpus)
    return grid, test, shared | {"tokens_per_row": _tokens_per_row(recipe, splits)}


def _tokens_per_row(recipe: Recipe, splits: data.Splits) -> float:
    if recipe.task == "image-classification":
        return 0.0
    lengths = [len(ids) for ids in splits.train["input_ids"]]
    return sum(lengths) / len(lengths)


def _check_beginnings(runs: Sequence[Run]) -> None:
    """Begin every arm once, with each optimizer and schedule that it will have. Raises: ValueError."""
    first = {(run.arm, run.recipe.optim, run.recipe.lr_scheduler_type): run for run in reversed(runs)}
    for run in reversed(first.values()):
        recipe = run.recipe
        with warnings.catch_warnings():  # which the run itself will show
            warnings.simplefilter("ignore")
            try:
                check_beginning(recipe, models.empty_base(recipe.model_name_or_path, task=recipe.task))
            except Exception:  # some ways to begin want the weights themselves
                try:
                    labels = data.read_splits(recipe).label_names
                    check_beginning(recipe, load_base(recipe, load_processor(recipe), labels))
                except Exception as error:
                    raise ValueError(f"grid: {run.arm} cannot be trained: {error}") from error


def _joined(folders: Sequence[Path], grid: Grid, shared: dict[str, Any]) -> list[Line]:
    """The lines of other comparisons, arms and runs named after their folder. Raises: FileNotFoundError, ValueError."""
    places, lines = [folder.resolve() for folder in folders], list[Line]()
    for number, place in enumerate(places):
        if place == grid.output.resolve():
            raise ValueError(
                f"--join {folders[number]} is this comparison's own folder: its runs are in the table anyway"
            )
        if place in places[:number]:
            raise ValueError(
                f"--join names {place} twice: the same runs again would count as new evidence; name it once"
            )
    for folder, label in zip(folders, endings(places), strict=True):
        found = read_results(folder)
        if not found:
            raise FileNotFoundError(f"--join {folder}: there is no results.jsonl with a run in it")
        check_whole(found, grid.metric, folder)
        check_same(found, shared, folder)
        check_alike(found, grid.runs[0].recipe, folder)
        _check_once(found, folder)
        ending = re.sub(r"[^A-Za-z0-9._+-]+", "-", label)
        lines += [
            line | {"arm": f"{line['arm']} ({label})", "run": f"{line['run']}--{ending}"} for line in found.values()
        ]
    taken = sorted({line["arm"] for line in lines} & grid.arms.keys())
    if taken:
        raise ValueError(f"--join: {taken[0]!r} is an arm of this grid too; give its method another name")
    return lines


def _check_once(lines: dict[str, Line], where: Path) -> None:
    seen = dict[str, str]()
    for name, line in lines.items():
        what = json.dumps([line["arm"], line["searched"], line["seed"]], sort_keys=True)
        if what in seen:
            raise ValueError(
                f"{where / RESULTS}: the runs {seen[what]} and {name} are of one arm, setting and seed, and would "
                "count as two; delete the line of one of them"
            )
        seen[what] = name


def shared_notes(grid: Grid, joined: Sequence[Line]) -> list[str]:
    """What stands above the notes on the arms."""
    if not joined:
        return []
    notes = [f"{len(joined)} runs were joined from other folders."]
    here, by_arm = {choice_of(vars(run.recipe)) for run in grid.runs}, dict[str, set[str]]()
    for line in joined:
        by_arm.setdefault(line["arm"], set()).add(choice_of(line["recipe"]))
    other = [arm for arm, searched in by_arm.items() if searched != here]
    if other:
        notes.append(
            f"Not searched like the arms of this grid: {', '.join(other)}. More settings to choose from, or better "
            "ones, are an advantage of their own; the table of the search shows them."
        )
    return notes


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


def _check_baseline(outcome: Outcome, grid: Grid, lines: Sequence[Line]) -> None:
    """Say as an error that nothing was compared. Raises: NoVerdictError."""
    if outcome.baseline is not None:
        return
    bad = [line for line in lines if line["status"] != FINISHED and grid.baseline in (line["arm"], line["method"])]
    why = f"{len(bad)} of its runs did not finish; {bad[0]['run']}: {bad[0]['error']}" if bad else "no figure is finite"
    again = " The same command tries runs that failed again." if any(line["status"] == FAILED for line in bad) else ""
    raise NoVerdictError(
        f"The baseline {grid.baseline} has no result ({why}), so there is no verdict. {grid.output / 'report.html'} "
        f"has what there is.{again}",
        outcome,
    )


def _machine(outcome: Outcome) -> list[str]:
    """What the runs ran on, once for each that differs."""
    told: dict[str, None] = {}
    for line in outcome.lines:
        if line["status"] == FINISHED:
            environment = line["environment"]
            versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
            cores = f"{environment['cpus']} CPU cores" if environment.get("cpus") else None
            where = ", ".join(filter(None, (environment["device"], cores, environment.get("platform"))))
            told[f"{environment['started'][:10]}, {where}, Python {environment['python']}, {versions}"] = None
    return list(told)
