"""lm-evaluation-harness: its tasks by name, as one more kind of figure. It takes the extra `lm_eval`.

A figure is called TASK_METRIC, as in arc_easy_acc; the harness's filter joins in where a metric has several of them, as
in gsm8k_exact_match_strict-match. A group has a figure of its own, where the harness gives it one, beside its tasks'.
"""

import copy
import difflib
import importlib.metadata
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import processes
from ..measure import RESAMPLES, Measurement, Measurements, Outcomes, inference
from ..recipe import Recipe

UNVERSIONED = "Yaml"  # what the harness calls the version of a task whose file names none


@dataclass(frozen=True)
class Mean:
    """A figure that is the mean of a number for each row of a task; others (BLEU, perplexity) are of all at once."""

    task: str
    metric: str
    filter: str
    rows: int
    higher_is_better: bool


@dataclass(frozen=True)
class Harness:
    """The tasks that a recipe names, with their rows; `measure` may be called on as many models as one likes."""

    manager: Any
    asked: list[list[Any]]  # for each name the harness's task or group; of a tag, all its tasks
    means: dict[str, Mean]  # by the names of their figures
    limit: int | None
    version: str  # of the harness and of each task: what two runs must share for their figures to be comparable

    @classmethod
    def of(cls, recipe: Recipe) -> "Harness | None":
        """The tasks that a recipe names, found and read. Raises: ValueError, FileNotFoundError."""
        if not recipe.lm_eval_tasks:
            return None
        if processes.count() > 1:
            raise ValueError(
                "lm_eval_tasks are measured by one process, and here are several; leave them out of this run's recipe, "
                "and evaluate the run by a recipe that has them in one process"
            )
        own = recipe.lm_eval_include_path
        if own is not None and not Path(own).is_dir():
            raise FileNotFoundError(
                f"lm_eval_include_path={own!r} is no folder; relative paths start from {Path.cwd()}"
            )
        limit, asked, means = recipe.max_eval_samples, [], dict[str, Mean]()
        versions = dict[str, str]()
        with _apart():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=own)
            for name in recipe.lm_eval_tasks:
                loaded = _loaded(manager, name)
                asked.append([*loaded["groups"].values()][:1] or [*loaded["tasks"].values()])
                for task in loaded["tasks"].values():
                    means |= _means(task, limit)
                    versions[task.task_name] = "" if task.VERSION == UNVERSIONED else f" {task.VERSION}"
        told = ", ".join(f"{task}{version}" for task, version in sorted(versions.items()))
        return cls(manager, asked, means, limit, f"lm_eval {importlib.metadata.version('lm_eval')}: {told}")

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        bf16: bool = False,
        on_batch: Callable[[int, int], None] | None = None,
        on_outcomes: Callable[[Outcomes], None],
        on_records: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> Measurements:
        """Every figure of the tasks as the harness has it; it resamples for errors without a formula.

        Args:
            on_batch: called with (names done, names in all).
            on_outcomes: called after each name with a number a row for each of the `means`.
            on_records: called after each name with what was asked and answered, a mapping a row and filter.
        """
        scores: Measurements = {}
        with inference(model):
            for number, tasks in enumerate(self.asked, start=1):
                with _apart(), _errors_of_commands_dropped(), _weights_left_alone(model):
                    from lm_eval import simple_evaluate
                    from lm_eval.models.huggingface import HFLM

                    wrapped = HFLM(
                        pretrained=model,
                        tokenizer=copy.deepcopy(tokenizer),  # it may be given a token for padding
                        batch_size=batch_size,
                        mixed_precision_dtype="bfloat16" if bf16 else None,
                    )
                    found = simple_evaluate(
                        wrapped, tasks=tasks, task_manager=self.manager, limit=self.limit, bootstrap_iters=RESAMPLES
                    )
                outcomes = self._outcomes(found["samples"])
                on_outcomes(outcomes)
                if on_records:
                    on_records(_records(found["samples"]))
                scores |= _figures(found["results"], outcomes)
                if on_batch:
                    on_batch(number, len(self.asked))
        return scores

    def _outcomes(self, samples: dict[str, list[dict[str, Any]]]) -> Outcomes:
        """What each row of the tasks at hand came to."""
        return {
            name: np.array(
                [row[mean.metric] for row in samples[mean.task] if row["filter"] == mean.filter and mean.metric in row],
                dtype=float,
            )
            for name, mean in self.means.items()
            if mean.task in samples
        }


def _loaded(manager: Any, name: str) -> Any:
    """The task, or the tasks and groups, of a name, their rows read. Raises: ValueError."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, cutoff=0.5)
        advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists what there is"
        raise ValueError(f"lm_eval_tasks: lm-evaluation-harness has no task {name!r}; {advice}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # of the hub, of a file, of the task's own code
        raise ValueError(f"lm_eval_tasks: {name} cannot be loaded: {type(error).__name__}: {error}") from error
    for task in loaded["tasks"].values():
        for trait, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows more than text")):
            if getattr(task, trait, False):
                raise ValueError(f"lm_eval_tasks: {task.task_name} {what}, which is not supported; leave it out")
    return loaded


def _means(task: Any, limit: int | None) -> dict[str, Mean]:
    """The figures of a task that are means over its rows."""
    from lm_eval.api.metrics import mean

    rows = min(len(task.eval_docs), limit or len(task.eval_docs))
    filters = [entry["name"] for entry in task.get_config("filter_list") or [{"name": "none"}]]
    return {
        _named(task.task_name, metric, name, filters): Mean(
            task.task_name, metric, name, rows, task.higher_is_better().get(metric, True)
        )
        for metric, aggregation in task.aggregation().items()
        for name in filters
        if aggregation is mean
    }


def _records(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the model was asked, what is right, and its answers as they came: texts, or log likelihoods of options."""
    return [
        {
            "task": task,
            "row": row["doc_id"],
            "filter": row["filter"],
            "prompt": row["arguments"][0][0],
            "options": [request[1] for request in row["arguments"] if isinstance(request[1], str)],
            "answer": row["target"],
            "responses": row["resps"],
            **{metric: row[metric] for metric in row["metrics"] if isinstance(row[metric], Real)},
        }
        for task, rows in samples.items()
        for row in rows
    ]


def _figures(results: dict[str, dict[str, Any]], outcomes: Outcomes) -> Measurements:
    """The harness's table; its keys are "METRIC,FILTER" and "METRIC_stderr,FILTER", among others without a comma."""
    scores: Measurements = {}
    for task, entry in results.items():
        keys = [key.split(",") for key in entry if "," in key and "_stderr," not in key]
        for metric, chosen in keys:
            value, error = entry[f"{metric},{chosen}"], entry.get(f"{metric}_stderr,{chosen}")
            if isinstance(value, Real):
                name = _named(task, metric, chosen, [other for same, other in keys if same == metric])
                rows = len(outcomes[name]) if name in outcomes else entry["sample_len"]
                scores[name] = Measurement(float(value), float(error) if isinstance(error, Real) else None, rows)
    return scores


def _named(task: str, metric: str, chosen: str, filters: list[str]) -> str:
    return f"{task}_{metric}" if len(filters) == 1 else f"{task}_{metric}_{chosen}"


# --- the harness kept off everything else ----------------------------------------------------------------------------


@contextmanager
def _apart() -> Iterator[None]:
    """It seeds every generator, prints, shows bars and gives advice: none of that leaves this block."""
    forking = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork this process in order to resample
    logger, python, numpy = logging.getLogger("lm_eval"), random.getstate(), np.random.get_state()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
            warnings.catch_warnings(),
            torch.random.fork_rng(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        if forking is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forking
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _errors_of_commands_dropped() -> Iterator[None]:
    """It asks git for a commit, which complains where there is no repository, on the error stream of this process."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _weights_left_alone(model: Any) -> Iterator[None]:
    """It ties the weights of every model, which would overwrite a trained copy of a tied embedding by the base's."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights
