"""What every row of text goes through: its tokens, what stands in front of them, how many there may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .fields import DataRecipe

NOT_SCORED = -100  # the label that torch's cross entropy and transformers leave out
DEFAULT_MAX_LENGTH = 512


def longest(recipe: DataRecipe, tokenizer: Any) -> int:
    """Tokens of the longest row. Raises: ValueError."""
    allowed = tokenizer.model_max_length  # a huge number where neither tokenizer nor model know one
    if recipe.max_length is None:
        return min(DEFAULT_MAX_LENGTH, allowed)
    if recipe.max_length > allowed:
        raise ValueError(
            f"max_length={recipe.max_length} is more than the {allowed} tokens that the model and its tokenizer allow; "
            f"give at most {allowed}"
        )
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


def tokenize_stretches(tokenizer: Any, rows: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
    """Token ids of a row's stretches: those of each as they are at inference, those of the next as they follow it."""
    joint = iter(ids_of(tokenizer, ["".join(row[: end + 1]) for row in rows for end in range(len(row))]))
    for row in rows:
        parts, so_far = list[list[int]](), list[int]()
        for stretch in row:
            whole = next(joint)
            if whole[: len(so_far)] == so_far:
                parts.append(whole[len(so_far) :])
            else:  # a token straddles the border ("x " + "y" may be "x", " y"): not so at inference
                parts.append(ids_of(tokenizer, [stretch])[0])
            so_far = [*so_far, *parts[-1]]
        yield parts
