"""Timing several ways of doing one thing in one process: interleaved rounds, CPU time, medians of ratios, peak memory.

Every round runs every contender once, so that a machine that gets slower meanwhile slows all of them down; the order is
drawn anew each round. The contender given twice (A/A) shows what of a ratio is noise.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]


class Ratio(NamedTuple):
    """Median over the rounds of time / baseline's time, with the quartiles; and the median time itself in seconds."""

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def compare(contenders: Mapping[str, Work], baseline: str, rounds: int) -> dict[str, Ratio]:
    """Time all contenders against one of them: CPU time with one thread, the clock's with several.

    A contender that returns a number has timed itself, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for name in order:  # warm up
        contenders[name]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = seconds()
            own = contenders[name]()
            times[name].append(own if isinstance(own, float) else seconds() - start)
    return {name: _ratio(mine, times[baseline]) for name, mine in times.items()}


def seconds() -> float:
    """The time by which a contender is judged."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _ratio(mine: list[float], baselines: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(mine, baselines, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, statistics.median(mine))


def peak_bytes(work: Work) -> int:
    """The most bytes of tensors alive at once while `work` runs, beyond those alive before.

    Summed from the allocator's own record of every allocation and release (the profiler's memory events): exact and the
    same on every run, where the resident set of the process says what the C library has not given back yet.
    """
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def publish(lines: list[str], out: Path | None) -> None:
    """Print a page, and write it where a file is named."""
    text = "\n".join([*lines, ""])
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")


def machine() -> str:
    """What the figures were made on."""
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    )
