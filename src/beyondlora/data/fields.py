"""The fields of a recipe that say what the data is. This package knows no recipe, only these."""

from __future__ import annotations

from typing import Protocol


class DataRecipe(Protocol):
    """The fields of a recipe that say what the data is; recipe.Recipe documents them."""

    task: str
    dataset_name: str
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str | None
    eval_dataset_name: str | None
    eval_fraction: float
    split_seed: int
    max_train_samples: int | None
    max_eval_samples: int | None
    columns: list[str] | None
    dataset_text_field: str
    prompt_field: str | None
    completion_field: str | None
    completion_separator: str
    messages_field: str | None
    sentence1_field: str
    sentence2_field: str | None
    label_field: str
    image_field: str
    max_length: int | None
    metrics: list[str] | None
    answer_field: str | None
    max_new_tokens: int


def is_packed(recipe: DataRecipe) -> bool:
    """Whether the rows are plain text, cut into blocks of one length."""
    return recipe.task == "causal-lm" and recipe.prompt_field is None and recipe.messages_field is None


def text_fields(recipe: DataRecipe) -> list[str]:
    """The names of the columns that hold text, or conversations, for this task."""
    if recipe.task == "image-classification":
        return []
    if recipe.task == "causal-lm":
        fields = (recipe.prompt_field, recipe.completion_field, recipe.messages_field)
        return [name for name in fields if name is not None] or [recipe.dataset_text_field]
    return [recipe.sentence1_field, *([recipe.sentence2_field] if recipe.sentence2_field is not None else [])]


def answer_field(recipe: DataRecipe) -> str | None:
    """The column with the right answer; None where nothing is asked."""
    return (recipe.answer_field or recipe.completion_field) if recipe.metrics else None
