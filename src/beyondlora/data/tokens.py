"""What every row of text goes through: its tokens, what stands in front of them, how many there may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .fields import DataRecipe

NOT_SCORED = -100  # the label that torch's cross entropy and transformers leave out
DEFAULT_MAX_LENGTH = 512
CONTEXT = 256  # characters before a text that its first token may depend on; a word, for most tokenizers


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
    wanted = [[(stretch, *_before(row, at)) for at, stretch in enumerate(row)] for row in rows]
    texts = list(dict.fromkeys(text for row in wanted for _, before, whole in row for text in (before, whole)))
    ids = dict(zip(texts, ids_of(tokenizer, texts), strict=True))
    for row in wanted:
        parts, straddled = list[list[int]](), False
        for stretch, before, whole in row:
            # A token that straddles a border ("x " + "y" may be "x", " y") does not do so at inference; whatever
            # follows stands behind other tokens than the text's.
            straddled = straddled or ids[whole][: len(ids[before])] != ids[before]
            parts.append(ids_of(tokenizer, [stretch])[0] if straddled else ids[whole][len(ids[before]) :])
        yield parts


def _before(row: Sequence[str], at: int) -> tuple[str, str]:
    """What stands before a stretch, and the same with it: whole stretches, so many that tokens depend on no more.

    All of a conversation before each of its stretches would cost the square of its length.
    """
    start, characters = at, 0
    while start > 0 and characters < CONTEXT:
        start -= 1
        characters += len(row[start])
    return "".join(row[start:at]), "".join(row[start : at + 1])
