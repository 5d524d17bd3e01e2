"""Rows as questions: what a model is asked, what is right, and what it may choose from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from .fields import DataRecipe, answer_field, text_fields
from .tokens import NOT_SCORED, head_of, ids_of, longest, tokenize_stretches

# The last line of LLM-Adapters' prompts.
OPTIONS = re.compile(r"answer format:\s*([^\s/]+(?:/[^\s/]+)+)\s*$", re.IGNORECASE)
BY_LIKELIHOOD = "multiple_choice"  # generates nothing; all metrics whose names begin so are about options


@dataclass(frozen=True)
class Option:
    """One answer that a prompt offers, as a row that says it."""

    text: str
    row: dict[str, list[int]]  # input_ids, attention_mask, labels: what the loss of this answer would be


@dataclass(frozen=True)
class Question:
    """One row of an evaluation.

    Attributes:
        number: of the row, from 1.
        prompt: its text.
        input_ids: the prompt's tokens as the model sees them at inference.
        answer: the right option, or the reference solution.
        options: those that the prompt offers, where a metric is about them.
    """

    number: int
    prompt: str
    input_ids: list[int]
    answer: str
    options: list[Option]
    cut: bool  # whether the prompt lost its start


def questions_of(rows: datasets.Dataset, tokenizer: Any, recipe: DataRecipe, where: str) -> list[Question]:
    """The questions in checked evaluation rows; none where the recipe has no metrics about them.

    Raises: ValueError, for a prompt without options or without the right one among them, and where answers do not fit
    into max_length.
    """
    answer_name = answer_field(recipe)
    if answer_name is None:
        return []
    length = longest(recipe, tokenizer)
    written = recipe.max_new_tokens if set(recipe.metrics or ()) - {BY_LIKELIHOOD} else 0
    if written >= length:
        raise ValueError(
            f"max_new_tokens={written} leaves nothing of max_length={length} for a prompt; give a smaller "
            "max_new_tokens or a larger max_length"
        )
    about_options = any(name.startswith(BY_LIKELIHOOD) for name in recipe.metrics or ())
    head, found = head_of(tokenizer), []
    for number, row in enumerate(rows, start=1):
        prompt, completion = (row[name] for name in text_fields(recipe))
        answer, asked = str(row[answer_name]), prompt + recipe.completion_separator
        options: list[Option] = []
        if about_options:
            names = _options_in(prompt, answer, f"{where}, row {number}")
            options = list(_options(names, asked, completion, answer, tokenizer, head, length))
        (ids,) = ids_of(tokenizer, [asked])
        kept = _fitted(head, ids, length - written)
        found.append(Question(number, prompt, kept, answer, options, cut=len(kept) < len(head) + len(ids)))
    return found


def told(questions: Sequence[Question]) -> str:
    """What must be said of them in one line of description."""
    cut = sum(question.cut for question in questions)
    return f", {cut:,} prompts lose their start" if cut else ""


def digest_of(questions: Sequence[Question]) -> list[bytes]:
    """sha256 over what is asked and what is right; nothing where nothing is asked."""
    content = [[q.input_ids, q.answer, [option.row["input_ids"] for option in q.options]] for q in questions]
    return [hashlib.sha256(json.dumps(content).encode()).digest()] if questions else []


def _options_in(prompt: str, answer: str, where: str) -> list[str]:
    stands = OPTIONS.search(prompt)
    if stands is None:
        raise ValueError(
            f"{where}: the prompt names no options; metrics about them read a last line such as "
            "'Answer format: answer1/answer2/answer3'"
        )
    options = stands[1].split("/")
    if answer not in options:
        raise ValueError(
            f"{where}: the answer {answer!r} is none of the options {', '.join(options)}; name the field that "
            "holds one of them as answer_field"
        )
    return options


def _options(
    names: Sequence[str], asked: str, completion: str, answer: str, tokenizer: Any, head: list[int], length: int
) -> Iterator[Option]:
    """Each option said as the completion says the right one ("the correct answer is ..."), with its end token.

    By itself, where the completion does not hold the right one.
    """
    before, found, after = completion.rpartition(answer)
    said = [before + name + after if found else name for name in names]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name, (ids, more) in zip(
        names, tokenize_stretches(tokenizer, [(asked, answer) for answer in said]), strict=True
    ):
        scored = [*more, *end]
        context = _fitted(head, ids, length - len(scored))
        row = {
            "input_ids": [*context, *scored],
            "attention_mask": [1] * (len(context) + len(scored)),
            "labels": [*[NOT_SCORED] * len(context), *scored],
        }
        yield Option(name, row)


def _fitted(head: list[int], ids: list[int], room: int) -> list[int]:
    """A prompt that is too long loses its start: what is asked, and how, stands at its end."""
    kept = room - len(head)
    if kept < 1:
        raise ValueError(f"max_length leaves {room} tokens for a prompt, which cannot work; give a larger one")
    return [*head, *ids[-kept:]]
