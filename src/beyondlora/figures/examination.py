"""Everything that a recipe asks about a model, put together before training and asked after it."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data
from ..measure import Measurements, Outcomes, mean_of, measure, moved
from ..recipe import Recipe, passes
from ..run_folder import write_text
from .choices import first_named, most_likely
from .forgetting import Corpus
from .generation import write
from .harness import Harness
from .solutions import pass_at_k, right, strict

EXTRAS = {  # what is needed beyond the plain installation: task, metric or key -> (module, extra)
    "sequence-classification": [("sklearn", "metrics")],
    "sequence-regression": [("scipy", "metrics")],
    "image-classification": [("sklearn", "metrics"), ("PIL", "images")],
    "exact_match": [("math_verify", "math")],
    "pass@": [("math_verify", "math")],
    "lm_eval_tasks": [("lm_eval", "lm_eval")],
    "load_in_8bit": [("bitsandbytes", "quantization")],
    "load_in_4bit": [("bitsandbytes", "quantization")],
}

OnBatch = Callable[[int, int], None]


def check_extras(recipe: Recipe) -> None:
    """Refuse a recipe that needs what is not installed. Raises: ValueError."""
    asked = [("task", recipe.task), *(("metric", name) for name in recipe.metrics or ())]
    asked += [("key", key) for key in ("lm_eval_tasks", "load_in_8bit", "load_in_4bit") if getattr(recipe, key)]
    for what, name in asked:
        for module, extra in EXTRAS.get("pass@" if passes(name) else name, []):
            if importlib.util.find_spec(module) is None:
                raise ValueError(
                    f"{what} {name} needs {module}, which is not installed: pip install 'beyondlora[{extra}]'"
                )


@dataclass(frozen=True)
class Examination:
    """The rows and the questions; `measure` may be called on as many models as one likes."""

    recipe: Recipe
    processor: Any
    rows: data.Evaluation
    corpus: Corpus | None = None
    harness: Harness | None = None

    @classmethod
    def of(cls, recipe: Recipe, processor: Any, rows: data.Evaluation) -> "Examination":
        """Everything that can be made ready without a model. Raises: as reading data does."""
        return cls(recipe, processor, rows, Corpus.of(recipe, processor), Harness.of(recipe))

    def begun_with(self, base: Any, device: torch.device) -> "Examination":
        """The same, knowing what the base model knew before anything was attached to it; the base stays where it is."""
        if self.corpus is None:
            return self
        home = base.device
        corpus = self.corpus.begun_with(moved(base, device), **self._how)
        moved(base, home)
        return dataclasses.replace(self, corpus=corpus)

    @property
    def counts(self) -> dict[str, int]:
        """Rows with a loss, questions, blocks of the second corpus; by the name of its figure, rows of the harness."""
        corpus = 0 if self.corpus is None else len(self.corpus.rows.rows)
        harness = {} if self.harness is None else {name: mean.rows for name, mean in self.harness.means.items()}
        return {"rows": len(self.rows.rows), "questions": len(self.rows.questions), "corpus": corpus} | harness

    def measure(
        self,
        model: Any,
        *,
        batch_size: int | None = None,
        on_batch: OnBatch | None = None,
        on_outcomes: Callable[[Outcomes], None] | None = None,
        keep: Path | None = None,
    ) -> Measurements:
        """Every figure of the recipe.

        Args:
            batch_size: None = the recipe's.
            on_batch: called with (rows done, rows in all); begins anew with every kind of figure.
            on_outcomes: called once with what every row came to (see measure.measure), and a number for each question
                under the name of its metric, and forgetting_before, forgetting_after, forgetting_tokens; under the
                names of the harness's figures what they are the means of.
            keep: a file for what was asked, chosen and written, one JSON object a line.
        """
        outcomes: Outcomes = {}
        kept: list[dict[str, Any]] = []
        how = self._how | ({} if batch_size is None else {"batch_size": batch_size}) | {"on_batch": on_batch}
        scores = measure(
            model, self.rows.rows, self.rows.collator, task=self.recipe.task, on_outcomes=outcomes.update, **how
        )
        if self.rows.questions:
            answers, records = self._answers(model, how)
            outcomes |= answers
            scores |= {name: mean_of(values) for name, values in answers.items()}
            kept += records
        if self.corpus is not None:
            scores |= self.corpus.measure(model, on_outcomes=outcomes.update, **how)
        if self.harness is not None:
            scores |= self.harness.measure(
                model, self.processor, on_outcomes=outcomes.update, on_records=kept.extend, **how
            )
        if kept and keep is not None:
            write_text(keep, "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in kept))
        if on_outcomes:
            on_outcomes(outcomes)
        return scores

    @property
    def _how(self) -> dict[str, Any]:
        return {"batch_size": self.recipe.per_device_eval_batch_size, "bf16": self.recipe.bf16}

    def _answers(self, model: Any, how: dict[str, Any]) -> tuple[Outcomes, list[dict[str, Any]]]:
        """A number in [0, 1] for each metric and question, and the records that show why."""
        questions, metrics = self.rows.questions, self.recipe.metrics or []
        records: list[dict[str, Any]] = [
            {"row": question.number, "prompt": question.prompt, "answer": question.answer} for question in questions
        ]
        if "multiple_choice" in metrics:
            for record, chosen in zip(records, most_likely(model, questions, self.rows.collator, **how), strict=True):
                record |= {"most_likely": chosen, "multiple_choice": float(chosen == record["answer"])}
        if set(metrics) - {"multiple_choice"}:
            texts = write(
                model,
                questions,
                self.processor,
                max_new_tokens=self.recipe.max_new_tokens,
                num_return_sequences=self.recipe.num_return_sequences,
                temperature=self.recipe.temperature,
                **how,
            )
            for record, question, written in zip(records, questions, texts, strict=True):
                record |= {"generations": written} | _judged(question, written, metrics)
        names = [name for name in records[0] if isinstance(records[0][name], float)]
        return {name: np.array([record[name] for record in records]) for name in names}, records


def _judged(question: data.Question, written: list[str], metrics: list[str]) -> dict[str, float]:
    """What several answers to one question are worth, each figure in [0, 1]."""
    judged: dict[str, float] = {}
    if "multiple_choice_generated" in metrics:
        options = [option.text for option in question.options]
        judged["multiple_choice_generated"] = _share(first_named(text, options) == question.answer for text in written)
    sought = [name for name in metrics if name == "exact_match" or passes(name)]
    if sought:
        found = [right(text, question.answer) for text in written]
        if "exact_match" in metrics:
            judged["exact_match"] = _share(found)
            judged["exact_match_strict"] = _share(strict(text, question.answer) for text in written)
        judged |= {name: pass_at_k(found, passes(name)) for name in sought if passes(name)}
    return judged


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
