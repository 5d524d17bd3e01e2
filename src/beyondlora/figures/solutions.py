"""Is a written solution right? GSM8K ("#### 72"), MATH ("\\boxed{72}"), or an answer that stands by itself."""

import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

HASHES, BOXED = "####", r"\boxed{"
# A number that goes on is none: 2/3, 2 1/2, 10:30, 2 + 3. "clips" or "%" behind it are left out.
NUMBER = re.compile(r"####\s*(-?\.?[0-9][0-9.,]*+)(?P<more>[\w\\]|:\d|[ \t]*[/^*+=×÷]|[ \t]*-[ \t]*\d|[ \t]+\d)?")
SECONDS = 3  # for one expression: a model may write a tower of powers


def strict(text: str, reference: str) -> bool:
    """Whether a text ends as its reference does, in the reference's own format and with the same characters.

    GSM8K: the number behind the first "####", thousands separators aside; where the reference has none there ("Yes",
    "1/2"), the rest of that line. MATH: what the last box holds, blanks aside. A reference without an answer where its
    format has one (a box that never closes) makes nothing right.
    """
    read: Callable[[str], str | None]
    if HASHES in reference:
        reference = _last_hashes(reference)
        read = _rest_of_line if _number(reference) is None else _number
    else:
        read = _box if BOXED in reference else str.strip
    answer = read(text)
    return answer is not None and answer == read(reference)


def _last_hashes(reference: str) -> str:
    return HASHES + reference.rpartition(HASHES)[2]


def _number(text: str) -> str | None:
    found = NUMBER.search(text)
    return found[1].replace(",", "").rstrip(".") if found and not found["more"] else None


def _rest_of_line(text: str) -> str | None:
    line = text.partition(HASHES)[2].strip().partition("\n")[0]
    return " ".join(line.split()).removesuffix(".") or None


def _box(text: str) -> str | None:
    boxed = last_boxed(text)
    return None if boxed is None else re.sub(r"\s", "", boxed)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces inside it counted; None where there is none that closes."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begun = 1, start + len(BOXED)
    for end in range(begun, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begun:end]
    return None


def right(text: str, reference: str) -> bool:
    """Whether the last answer in a text is mathematically that of its reference (math-verify); what is strict, is."""
    if strict(text, reference):
        return True
    from math_verify import verify

    gold = _gold(reference)
    return gold is not None and bool(verify(_parsed(rf"$\boxed{{{gold}}}$"), _parsed(text), timeout_seconds=_seconds()))


def _gold(reference: str) -> str | None:
    """The reference's answer by itself; None where its format holds none."""
    if HASHES in reference:
        last = _last_hashes(reference)
        return _number(last) or _rest_of_line(last)
    return last_boxed(reference) if BOXED in reference else reference.strip()


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=_seconds())
    return parsed


def _seconds() -> int | None:
    """math-verify ends what takes too long by a signal, which only a main thread gets."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def pass_at_k(right_ones: Sequence[bool], k: int) -> float:
    """The chance that one of k answers, drawn from these n without putting back, is right: 1 − C(n−c, k) / C(n, k).

    Unbiased for the chance that one of k new answers is right (arXiv 2107.03374). Raises: ValueError for k > n.

    >>> pass_at_k([True, False, False, False], 2)
    0.5
    """
    n, wrong = len(right_ones), sum(not one for one in right_ones)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k must lie between 1 and the number of answers.")
    return 1 - math.comb(wrong, k) / math.comb(n, k)
