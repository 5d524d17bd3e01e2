"""Timing several ways of doing one thing in one process: interleaved rounds, medians of ratios, peak memory.

Every round runs every contender once, so that a machine that gets slower meanwhile slows all of them down; the order is
drawn anew each round. The contender given twice (A/A) shows what of a ratio is noise. On a CPU a thread's own time is
taken, on an accelerator the clock's, between two moments at which the device has nothing left to do.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]
CPU = torch.device("cpu")


class Ratio(NamedTuple):
    """Median over the rounds of time / baseline's time, with the quartiles; and the median time itself in seconds."""

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"

    @property
    def ms(self) -> str:
        """The median time in milliseconds: three digits, of long ones all that stand before the point."""
        milliseconds = 1e3 * self.seconds
        return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def compare(
    contenders: Mapping[str, Work], baseline: str, rounds: int, device: torch.device = CPU, *, at_once: int = 1
) -> dict[str, Ratio]:
    """Time all contenders against one of them, by `seconds`.

    Args:
        contenders: what to run. One that returns a number has timed itself, in seconds.
        baseline: one of their names.
        rounds: 2 at least.
        device: where they run.
        at_once: calls in a row between two looks at the clock, as a model gives an accelerator its layers.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for name in order:  # warm up
        contenders[name]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = seconds(device)
            own = [contenders[name]() for _ in range(at_once)]
            spent = sum(own) if isinstance(own[0], float) else seconds(device) - start
            times[name].append(spent / at_once)
    return {name: _ratio(mine, times[baseline]) for name, mine in times.items()}


def seconds(device: torch.device = CPU) -> float:
    """The time by which a contender is judged: with one CPU thread its own, otherwise the clock's."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _ratio(mine: list[float], baselines: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(mine, baselines, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, statistics.median(mine))


def peak_bytes(work: Work, device: torch.device = CPU) -> int:
    """The most bytes of tensors alive at once while `work` runs, beyond those alive before.

    On a CPU summed from the allocator's own record of every allocation and release (the profiler's memory events):
    exact and the same on every run, where the resident set of the process says what the C library has not given back
    yet. On an accelerator what its allocator has handed out.
    """
    work()
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats()
        before: int = memory.memory_allocated()
        work()
        return memory.max_memory_allocated() - before
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


def machine(device: torch.device = CPU) -> str:
    """What the figures were made on, and when."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        place = f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread{'s' * (threads > 1)}"
    else:
        place = torch.get_device_module(device).get_device_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    return f"{date.today()}, {place}, {versions}"


def options(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark can be told: how many rounds, on which device, where to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", type=torch.device, default=CPU, help='"cpu" (default), "cuda", or another')
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output only")
    return parser


def command() -> str:
    """The command line, for a page to name."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """How a base of this dtype with float32 adapters is trained: on an accelerator under autocast, on a CPU without."""
    return nullcontext() if device.type == "cpu" or dtype == torch.float32 else torch.autocast(device.type, dtype)
