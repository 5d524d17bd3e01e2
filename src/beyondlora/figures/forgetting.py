"""Forgetting: the loss on a second corpus under the base model, and after training."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import data
from ..measure import Measurements, Outcomes, per_token, row_losses
from ..recipe import Recipe


@dataclass(frozen=True)
class Corpus:
    """The second corpus in blocks, and what the base model's loss on each was (None = not measured yet)."""

    rows: data.Evaluation
    before: torch.Tensor | None = None

    @classmethod
    def of(cls, recipe: Recipe, processor: Any) -> "Corpus | None":
        """The corpus that a recipe names, as plain text, at most max_eval_samples blocks.

        Raises: as reading data does.
        """
        name = recipe.forgetting_dataset_name
        if name is None:
            return None
        of_other_rows = (
            "prompt_field",
            "completion_field",
            "messages_field",
            "chat_template_path",
            "metrics",
            "columns",
        )
        plain = recipe.replace(**dict.fromkeys(of_other_rows))
        return cls(data.prepare_evaluation(plain, processor, name))

    def begun_with(self, base: Any, **how: Any) -> "Corpus":
        """The same, with the loss of the base model."""
        return dataclasses.replace(self, before=row_losses(base, self.rows.rows, self.rows.collator, **how)[0])

    def measure(self, model: Any, *, on_outcomes: Callable[[Outcomes], None], **how: Any) -> Measurements:
        """Nats a token before and after, and their difference: positive where something was forgotten."""
        if self.before is None:
            raise ValueError("what the base model knew was not measured")
        after, tokens = row_losses(model, self.rows.rows, self.rows.collator, **how)
        told = {"forgetting_before": self.before, "forgetting_after": after, "forgetting_tokens": tokens}
        on_outcomes({name: values.numpy() for name, values in told.items()})
        return {
            "forgetting_before": per_token(self.before, tokens),
            "forgetting_after": per_token(after, tokens),
            "forgetting": per_token(after - self.before, tokens),
        }
