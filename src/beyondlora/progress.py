"""How a long job tells people where it is: a bar on a terminal, plain lines elsewhere, nothing where nobody looks."""

import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """The silent one; the others override what they show.

    >>> progress.begin("training", total=100)
    >>> progress.advance(20, note="loss 2.31")
    >>> progress.say("curves.png is skipped: matplotlib is not installed")
    >>> progress.end()
    """

    def say(self, message: str) -> None:
        """Show one line that stays."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a stretch of `total` steps, `done` of which lie behind (a resumed run)."""

    def advance(self, done: int, note: str = "") -> None:
        """Say that `done` steps lie behind."""

    def end(self) -> None:
        """The stretch is over, finished or not."""


class BarProgress(Progress):
    """A bar with steps, note and the time left, for a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: RichProgress | None = None

    def say(self, message: str) -> None:
        """Print above the bar."""
        self.console.print(message, highlight=False, markup=False, emoji=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Show the bar."""
        self.end()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar = RichProgress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(what, total=total, completed=done, note="")
        self._bar.start()

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineProgress(Progress):
    """A plain line every few seconds, for log files."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._what, self._total, self._first, self._begun, self._printed = "", 0, 0, 0.0, 0.0

    def say(self, message: str) -> None:
        """Print a line."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember where the stretch starts."""
        self._what, self._total, self._first = what, total, done
        self._begun = self._printed = time.monotonic()

    def advance(self, done: int, note: str = "") -> None:
        """Print, but not more often than every few seconds."""
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        line = f"{self._what}: {done}/{self._total}  {note}"
        if done > self._first:  # before that there is no pace to go by
            line += f"  {(now - self._begun) / (done - self._first) * (self._total - done):.0f} s left"
        self.say(line)


def in_stretches(progress: Progress, what: str) -> Callable[[int, int], None]:
    """A callback (done, in all) that begins a stretch by its first call, and by one with less done or another total."""
    last, last_total = math.inf, 0

    def advance(done: int, total: int) -> None:
        nonlocal last, last_total
        if done <= last or total != last_total:
            progress.begin(what, total)
        progress.advance(done)
        last, last_total = done, total

    return advance


def progress_on(console: Console) -> Progress:
    """Return the progress that suits a console."""
    return BarProgress(console) if console.is_terminal else LineProgress(console)
