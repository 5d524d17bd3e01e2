"""The answer to one question of the kind "does this work here?"."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..evaluate import device

State = Literal["yes", "approximate", "refused", "wrong", "absent"]


class WrongResultError(Exception):
    """A probe ran to its end and its result was not what it has to be."""


class ApproximateResultError(Exception):
    """A probe's result differs from what was asked for, and the library said so while it ran."""


@dataclass(frozen=True)
class Answer:
    """What a probe found.

    Attributes:
        state: "yes"; "approximate" (it differs, and a warning says so); "refused" (an error said why not); "wrong" (it
            ran, and the result is false: a defect); "absent" (a package it needs is not installed).
        why: the reason, where the state is not "yes".
    """

    state: State
    why: str = ""


def ask(probe: Callable[[], None]) -> Answer:
    """Run a probe that returns where the thing works, and raises where it does not. Random numbers are put back."""
    where = device()
    try:
        with torch.random.fork_rng([] if where.type == "cpu" else [where.index or 0], device_type=where.type):
            probe()
    except WrongResultError as error:
        return Answer("wrong", str(error))
    except ApproximateResultError as error:
        return Answer("approximate", str(error))
    except Exception as error:  # whatever a library raises is its answer
        return Answer("refused", _first_sentence(error))
    return Answer("yes")


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!])\s", text, maxsplit=1)[0][:240]
