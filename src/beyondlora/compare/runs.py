"""The runs of a grid, and results.jsonl: one line a run, whole or not there.

A line holds what the run's folder says, what every test row came to, and what must be equal for two lines to stand in
one table. The last line of a run counts; a line cut short by a kill does not.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import measure, models
from ..data.fields import DataRecipe
from ..evaluate import evaluate
from ..measure import Outcomes
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import RunFolder, finite
from ..train import train
from ..workers import WorkerDiedError, side_by_side
from .grid import SEARCHED, Run
from .metrics import Metric

RESULTS = "results.jsonl"
COMPARABLE = (
    "task",
    "base_sha256",
    "data_sha256",
    "test_sha256",
    "forgetting_sha256",
    "metric_version",
    "harness_version",
)
MAY_DIFFER = {  # keys of a recipe that joined runs need not share
    *("adapter", "seed", *SEARCHED),  # what is compared, repeated and searched
    *(DataRecipe.__annotations__.keys() - {"max_new_tokens"}),  # COMPARABLE has the rows themselves
    *("model_name_or_path", "forgetting_dataset_name", "chat_template_path", "lm_eval_tasks", "lm_eval_include_path"),
    *("logging_steps", "save_steps", "dataloader_num_workers", "per_device_eval_batch_size"),  # change no figure
}
ALWAYS = ("method", "arm", "searched", "seed", "recipe", "status", "error")
WHERE_FINISHED = (
    "validation",
    "test",
    "items",
    "trainable_parameters",
    "total_parameters",
    "best_step",
    "steps",
    "train_loss",
    "train_seconds",
    "total_seconds",
    "peak_memory_bytes",
    "adapter_bytes",
    "tokens_per_row",
    "environment",
    "base_sha256",
    "data_sha256",
)
ENVIRONMENT = ("started", "device", "commit", "python", "platform", "cpus", "versions")
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
PROBE_STEPS = 4

Line = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """The rows that figures are reported on."""

    path: str
    sha256: str
    rows: int
    max_samples: int | None


# --- results.jsonl ---------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, Line]:
    """Run name -> its last line. Raises: ValueError."""
    path, lines = folder / RESULTS, dict[str, Line]()
    if not path.exists():
        return lines
    texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts[:-1], start=1):  # what follows the last newline was cut short by a kill
        try:
            line = json.loads(text)
            lines[line["run"]] = line
        except (ValueError, KeyError, TypeError):
            if text.strip():
                raise ValueError(
                    f"{path}, line {number} is damaged; delete the line, and its run is repeated"
                ) from None
    return lines


def append_result(folder: Path, line: Line) -> None:
    """Add a line in one write, after whatever a kill has left of an earlier one is cut off."""
    path = folder / RESULTS
    written = path.read_bytes() if path.exists() else b""
    with path.open("ab") as file:
        file.truncate(written.rfind(b"\n") + 1)
        file.write((json.dumps(finite(line)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def check_same(lines: Mapping[str, Line], expected: Mapping[str, Any], where: Path) -> None:
    """Refuse lines of another base model, other data, another version of the metrics. Raises: ValueError."""
    for name, line in lines.items():
        different = [key for key in COMPARABLE if key in line and key in expected and line[key] != expected[key]]
        if different:
            told = "; ".join(f"{key}: {_short(key, line[key])}, here {_short(key, expected[key])}" for key in different)
            raise ValueError(
                f"{where / RESULTS}: the run {name} cannot stand beside the runs of this grid ({told}). Figures of "
                "different models, rows or definitions are no comparison; choose another output_dir, or leave it out."
            )


def check_planned(lines: Mapping[str, Line], runs: Sequence[Run], where: Path) -> None:
    """Refuse to go on with a grid whose runs have changed since. Raises: ValueError."""
    for run in runs:
        if run.name in lines:
            different = run.recipe.differences(_recipe_of(lines[run.name], where))
            if different:
                told = "; ".join(f"{key}: {mine!r}, was {theirs!r}" for key, (mine, theirs) in different.items())
                raise ValueError(
                    f"{where / RESULTS} holds the run {run.name} with another recipe ({told}). Undo the change, or "
                    "choose another output_dir."
                )


def check_alike(lines: Mapping[str, Line], recipe: Recipe, where: Path) -> None:
    """Refuse joined runs that were trained or measured in another way than those of a recipe. Raises: ValueError."""
    for name, line in lines.items():
        found = recipe.differences(_recipe_of(line, where))
        told = "; ".join(
            f"{key}: {theirs!r}, here {mine!r}" for key, (mine, theirs) in found.items() if key not in MAY_DIFFER
        )
        if told:
            raise ValueError(
                f"{where / RESULTS}: the run {name} has another recipe than this grid ({told}). Its figures would show "
                "that, and not the method alone; repeat it with the same recipe, or leave it out."
            )


def check_whole(lines: Mapping[str, Line], metric: Metric, where: Path) -> None:
    """Refuse lines that lack what a table is made of. Raises: ValueError."""
    for name, line in lines.items():
        missing = [key for key in ALWAYS if key not in line]
        if line.get("status") == FINISHED:
            needed = WHERE_FINISHED + (("forgetting_sha256",) if metric.of == "corpus" else ())
            missing += [key for key in needed if key not in line]
            missing += [f"validation: {metric.name}"] * (metric.name not in line.get("validation", {}))
            missing += [f"items: {key}" for key in metric.needs if key not in line.get("items", {})]
        if missing:
            raise ValueError(
                f"{where / RESULTS}: the run {name} has no {', '.join(missing)}. Another version wrote it, or its "
                f"recipe did not ask for {metric.name}; delete the line, and its run is measured again, or leave the "
                "folder out."
            )


def _recipe_of(line: Line, where: Path) -> Recipe:
    try:
        return Recipe.from_mapping(line["recipe"])
    except ValueError as error:
        raise ValueError(
            f"{where / RESULTS}: the recipe of the run {line['run']} is none to this version ({error}), so another one "
            "wrote it; choose another output_dir, or leave the folder out."
        ) from None


def check_trained(runs: Sequence[Run], data_sha256: str) -> None:
    """Refuse run folders that would be taken up again, and were begun on other rows. Raises: ValueError."""
    for run in runs:
        folder = RunFolder(run.recipe.output_dir)
        if folder.environment.exists() and (folder.metrics.exists() or folder.newest_checkpoint()):
            before = json.loads(folder.environment.read_text(encoding="utf-8"))["data_sha256"]
            if before != data_sha256:
                raise ValueError(
                    f"{folder.path} holds a run that was trained on other rows than the recipe now names (data_sha256: "
                    f"{before[:12]}, here {data_sha256[:12]}). Delete that folder, or choose another output_dir."
                )


def _short(key: str, value: Any) -> str:
    return str(value)[:12] if key.endswith("sha256") else str(value)


# --- running ---------------------------------------------------------------------------------------------------------


def run_all(
    runs: Sequence[Run], test: HeldOut, shared: Mapping[str, Any], folder: Path, *, jobs: int, progress: Progress
) -> Iterator[Line]:
    """Train and measure every run, `jobs` at a time; yield each line after it has been written."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(run, test) for run in runs]
    with contextlib.closing(side_by_side(train_and_measure, tasks, count=jobs, progress=progress)) as finished:
        for number, result in finished:
            if isinstance(result, WorkerDiedError):
                result = {"status": FAILED, "error": str(result)}
            elif isinstance(result, Exception):
                raise result
            line = finite(_described(runs[number]) | dict(shared) | result)  # as it will be read again
            append_result(folder, line)
            yield line


def _described(run: Run) -> Line:
    return {
        "run": run.name,
        "method": run.method,
        "arm": run.arm,
        "searched": run.searched,
        "seed": run.seed,
        "recipe": dataclasses.asdict(run.recipe),
    }


def train_and_measure(run: Run, test: HeldOut, progress: Progress) -> Line:
    """One run in a worker: what it came to, or why it came to nothing; an error of one run is not the grid's."""
    begun = time.monotonic()
    try:
        return _measured(run, test, progress) | {"total_seconds": time.monotonic() - begun}
    except FloatingPointError as error:
        return {"status": DIVERGED, "error": str(error), "total_seconds": time.monotonic() - begun}
    except Exception as error:
        return {"status": FAILED, "error": f"{type(error).__name__}: {error}"}


def _measured(run: Run, test: HeldOut, progress: Progress) -> Line:
    folder, kept = RunFolder(run.recipe.output_dir), list[Outcomes]()
    summary = train(run.recipe, resume=True, progress=progress)
    recipe = run.recipe.replace(max_eval_samples=test.max_samples)
    answers = folder.test_generations if recipe.asks else None
    tested = evaluate(folder.path, data=test.path, recipe=recipe, on_outcomes=kept.append, keep=answers)
    if tested["data_sha256"] != test.sha256:
        raise ValueError(f"the test rows in {test.path} have changed since the comparison began")
    outcomes = {name: values.astype(float) for name, values in kept[0].items()}
    if not all(math.isfinite(value) for values in outcomes.values() for value in values):
        raise FloatingPointError("the trained model's outputs on the test rows are not finite")
    environment = json.loads(folder.environment.read_text(encoding="utf-8"))
    return {
        "status": FINISHED,
        "error": "",
        "validation": summary["metrics"],
        "test": tested["metrics"],
        "items": {name: values.tolist() for name, values in outcomes.items()},
        **{
            key: summary[key]
            for key in ("trainable_parameters", "total_parameters", "best_step", "steps", "train_loss")
        },
        "train_seconds": summary["seconds"],
        "peak_memory_bytes": _peak_memory(),
        "adapter_bytes": sum(path.stat().st_size for path in folder.adapter.glob("*.safetensors")),
        "data_sha256": environment["data_sha256"],
        "environment": {key: environment[key] for key in ENVIRONMENT},
    }


def _peak_memory() -> int:
    """The most this process has held: on the accelerator where there is one, else of the machine's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    if sys.platform == "win32":
        import psutil  # accelerate, which Trainer needs, depends on it

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def base_sha256(name_or_path: str) -> str:
    """What tells two base models apart: their weights and config; of a hub name, the name."""
    folder = Path(models.resolve_name(name_or_path))
    digest = hashlib.sha256()
    files = sorted(
        path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else name_or_path


def expected(
    recipe: Recipe, test: HeldOut, data_sha256: str, harness_version: str | None, corpus_sha256: str | None = None
) -> dict[str, Any]:
    """What every line of a table must have in common; of the second corpus only those that measured forgetting."""
    held = f"{recipe.bits} bits " if recipe.bits else ""  # another model than the whole one
    forgetting = {"forgetting_sha256": corpus_sha256} if corpus_sha256 else {}
    return forgetting | {
        "task": recipe.task,
        "base_sha256": held + base_sha256(recipe.model_name_or_path),
        "data_sha256": data_sha256,
        "test_sha256": test.sha256,
        "metric_version": measure.VERSION,
        "harness_version": harness_version,
    }


# --- how long it will take -------------------------------------------------------------------------------------------


def probe(run: Run) -> tuple[float, int] | None:
    """(seconds, training steps) that a run is likely to take, from a few steps of it in a folder that is then gone.

    None where not even those could be taken: the run itself will say why.
    """
    ((_, result),) = side_by_side(_probe, [(run,)], count=1)
    return None if isinstance(result, Exception) else result


def _probe(run: Run, _progress: Progress) -> tuple[float, int]:
    folder = tempfile.mkdtemp(prefix="beyondlora-probe-")
    begun = time.monotonic()
    try:
        short: dict[str, Any] = {"max_steps": PROBE_STEPS, "eval_steps": PROBE_STEPS, "warmup_steps": 0}
        short |= {"logging_steps": 1, "report_to": None}
        with contextlib.suppress(FloatingPointError):
            train(run.recipe.replace(output_dir=folder, **short))
        rows = RunFolder(folder).rows()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _extrapolated(run.recipe, rows, time.monotonic() - begun)


def _extrapolated(recipe: Recipe, rows: Sequence[Mapping[str, Any]], wall: float) -> tuple[float, int]:
    """What the steps of a probe promise of the whole run: its test rows are taken to last as its validation rows."""
    logged = [row for row in rows if "loss" in row]
    if len(logged) < 3:  # diverged at once
        return wall, max(recipe.max_steps, 1)
    steps = recipe.max_steps
    if steps < 0:
        steps = max(1, round(recipe.num_train_epochs * logged[0]["step"] / logged[0]["epoch"]))
    step = logged[2]["seconds"] - logged[1]["seconds"]
    evaluation = max(rows[-1]["seconds"] - logged[2]["seconds"] - step, 0)
    setup = max(wall - PROBE_STEPS * step - 2 * evaluation, 0)
    return setup + steps * step + (steps // recipe.eval_steps + 2 + 1) * evaluation, steps
