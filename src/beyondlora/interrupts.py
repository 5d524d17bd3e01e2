"""Ctrl-C that cannot be lost: what Python swallows is raised again at the next step.

An interrupt that arrives inside a destructor or a callback of the garbage collector is printed and ignored by Python,
and the job would go on as if nobody had asked.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Remembers that Ctrl-C was pressed.

    >>> with listening() as interrupts:
    ...     for batch in batches:
    ...         interrupts.raise_if_asked()
    """

    def __init__(self) -> None:
        self.asked = False

    def raise_if_asked(self) -> None:
        """Raise the KeyboardInterrupt that was swallowed, if one was."""
        if self.asked:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.default_int_handler(number, frame)


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Listen for Ctrl-C, where it is Python's own handler that would get it: nobody else's is replaced."""
    interrupts = Interrupts()
    with _answering(interrupts._remember):
        yield interrupts


@contextmanager
def held_back() -> Iterator[None]:
    """Raise a KeyboardInterrupt after the block and not within it: for what must not be left half done."""
    interrupts = Interrupts()

    def remember(_number: int, _frame: FrameType | None) -> None:
        interrupts.asked = True

    with _answering(remember):
        yield
    interrupts.raise_if_asked()


@contextmanager
def _answering(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
