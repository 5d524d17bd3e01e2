"""Multiple choice in the format of LLM-Adapters' commonsense tasks: by likelihood, and by what is written."""

import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from ..data import Question
from ..measure import row_losses


def most_likely(
    model: Any,
    questions: Sequence[Question],
    collator: Callable[..., Any],
    *,
    batch_size: int = 8,
    bf16: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The option of each question whose completion, said as the data says the right one, has the highest likelihood.

    The sum over its tokens, not their mean: the options differ in a word or a number, and share the rest.
    """
    rows = [option.row for question in questions for option in question.options]
    nll, _ = row_losses(model, rows, collator, batch_size=batch_size, bf16=bf16, on_batch=on_batch)
    losses = iter(nll.tolist())
    chosen = []
    for question in questions:
        own = list(islice(losses, len(question.options)))
        chosen.append(question.options[own.index(min(own))].text)
    return chosen


def first_named(text: str, options: Sequence[str]) -> str | None:
    """The option that a text names first, None where it names none; spelled as the prompt spells them."""
    either = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{either})(?!\w)", text)
    return found[0] if found else None
