"""Ctrl-C that cannot be lost, and SIGTERM that loses nothing.

An interrupt that arrives inside a destructor or a callback of the garbage collector is printed and ignored by Python,
and the job would go on as if nobody had asked: what was swallowed is raised again at the next step. A scheduler that
wants its machine back sends SIGTERM and waits half a minute or so: the step is finished and saved first.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Terminated(SystemExit):
    """SIGTERM asked for the end; the exit code is 143, as if nobody had listened."""


def terminate(number: int, _frame: FrameType | None) -> None:
    """The command line's answer to SIGTERM."""
    raise Terminated(128 + number)


ASKED_TO_END = (KeyboardInterrupt, Terminated)
ANSWERS: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}


class Interrupts:
    """Remembers that Ctrl-C was pressed, or that SIGTERM came.

    >>> with listening() as interrupts:
    ...     for batch in batches:
    ...         interrupts.raise_if_asked()
    ...         ...
    ...         if interrupts.ending:
    ...             save()
    ...             interrupts.end()
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that must not be lost
        self.ending = False  # whether SIGTERM waits for what it asked for

    def raise_if_asked(self) -> None:
        """Raise the KeyboardInterrupt that was swallowed, if one was."""
        if self.asked is not None:
            ANSWERS[self.asked](self.asked, None)

    def end(self) -> None:
        """Answer the SIGTERM that was kept waiting."""
        terminate(signal.SIGTERM, None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self.ending:
            self.ending = True
            return
        self.asked = number
        ANSWERS[number](number, frame)


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Listen for Ctrl-C and SIGTERM, where a handler of ANSWERS would get them: nobody else's is replaced."""
    interrupts = Interrupts()
    with _answering(interrupts._remember):
        yield interrupts
    if interrupts.ending:
        interrupts.end()


@contextmanager
def held_back() -> Iterator[None]:
    """Raise what a signal asks for after the block and not within it: for what must not be left half done."""
    interrupts = Interrupts()

    def remember(number: int, _frame: FrameType | None) -> None:
        interrupts.asked = number

    with _answering(remember):
        yield
    interrupts.raise_if_asked()


@contextmanager
def _answering(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = {number: usual for number, usual in ANSWERS.items() if signal.getsignal(number) is usual}
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in replaced.items():
            signal.signal(number, usual)
