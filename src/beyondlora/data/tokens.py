"""What every row of text goes through: its tokens, what stands in front of them, how many there may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .fields import DataRecipe

NOT_SCORED = -100  # the label that torch's cross entropy and transformers leave out
DEFAULT_MAX_LENGTH = 512


def longest(recipe: DataRecipe, tokenizer: Any) -> int:
    """Tokens of the longest row. Raises: ValueError."""
    allowed = tokenizer.model_max_length  # a huge number where the tokenizer does not know
    if recipe.max_length is None:
        return min(DEFAULT_MAX_LENGTH, allowed)
    if recipe.max_length > allowed:
        raise ValueError(f"max_length={recipe.max_length} is more than the {allowed} tokens that the tokenizer allows")
    return recipe.max_length


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, nothing put around them."""
    # verbose=False: longer than the model allows is fine here, it is cut below.
    return (
        tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if texts
        else []
    )


def head_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    alone, whole = ids_of(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
    return whole[: starts[0]] if starts else []


def tokenize_pairs(tokenizer: Any, prompts: list[str], completions: list[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of prompt and completion: the prompt's as they are at inference, the completion's as they follow it."""
    joint = ids_of(tokenizer, [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    for prompt, whole, completion in zip(ids_of(tokenizer, prompts), joint, completions, strict=True):
        if whole[: len(prompt)] == prompt:
            yield prompt, whole[len(prompt) :]
        else:  # a token straddles the border ("x " + "y" may be "x", " y"): the model will not see it so at inference
            yield prompt, ids_of(tokenizer, [completion])[0]
