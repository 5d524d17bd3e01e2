"""How cost grows: forward and backward of adapted linear layers against tokens, width, rank and number of layers.

    python benchmarks/scaling.py --out docs/results/scaling.md

float32, one thread, CPU time (the least of some rounds) and peak bytes of tensors; LoRA and the three methods. The
dashed lines are the arithmetic of one step at the speed of the largest point of the base layer: 4·T·N·M for the frozen
layer (output and gradient of x) and 6·T·R·(N + M) for the branch. The exponent is the slope between the two largest
points on logarithmic axes: above 1.1 in tokens, rank or layers, or above 2.2 in width, is more than the arithmetic's.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import LoraConfig, inject_adapter_in_model
from side_by_side import machine, peak_bytes
from torch import nn

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullLocator

METHODS: dict[str, Any] = {"LoRA": LoraConfig, "CeRA": CeraConfig, "AuroRA": AuroraConfig, "StelLA": StellaConfig}
AXES: dict[str, list[int]] = {
    "tokens": [512, 2048, 8192, 16384],
    "width": [256, 1024, 2048, 4096],
    "rank": [2, 8, 32, 128, 512],
    "layers": [1, 2, 4, 8],
}
DEFAULT = {"tokens": 2048, "width": 1024, "rank": 8, "layers": 1}


def step(method: str | None, tokens: int, width: int, rank: int, layers: int) -> Callable[[], None]:
    """Forward and backward of a row of layers, adapted or (None) frozen."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).requires_grad_(
        False
    )
    if method is not None:
        model = inject_adapter_in_model(METHODS[method](r=rank, target_modules=r"\d+"), model)
    x, upstream = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)

    def run() -> None:
        model.train()(x).backward(upstream)
        x.grad = None
        model.zero_grad()

    return run


def least(work: Callable[[], None], rounds: int) -> float:
    """CPU seconds of the fastest round after a warm one."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def operations(tokens: int, width: int, rank: int, layers: int) -> tuple[float, float]:
    """Of one step: the frozen layers', and with the branches'."""
    base = 4 * tokens * width**2 * layers
    return base, base + 6 * tokens * rank * 2 * width * layers


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file; the figure lies beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figure, panels = pyplot.subplots(2, len(AXES), figsize=(4 * len(AXES), 7), layout="constrained")
    lines = ["# How cost grows", "", f"`python benchmarks/scaling.py`. {machine()}.", ""]
    lines += ["![Time and peak memory](scaling.png)", "", "| axis | method | ms | MiB | exponent of time | of memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for column, (axis, values) in enumerate(AXES.items()):
        for method in [None, *METHODS]:
            works = [step(method, **(DEFAULT | {axis: value})) for value in values]
            seconds = [least(work, arguments.rounds) for work in works]
            peaks = [peak_bytes(work) for work in works]
            name = method or "base"
            style = {"marker": "o", "label": name, "color": "black" if method is None else None}
            panels[0][column].plot(values, [1e3 * s for s in seconds], **style)
            panels[1][column].plot(values, [p / 2**20 for p in peaks], **style)
            if method is None:
                speed = operations(**(DEFAULT | {axis: values[-1]}))[0] / seconds[-1]
            growth = [math.log(y[-1] / y[-2]) / math.log(values[-1] / values[-2]) for y in (seconds, peaks)]
            ms = ", ".join(f"{1e3 * s:.1f}" for s in seconds)
            mib = ", ".join(f"{p / 2**20:.1f}" for p in peaks)
            lines.append(f"| {axis} {values} | {name} | {ms} | {mib} | {growth[0]:.2f} | {growth[1]:.2f} |")
            print(lines[-1], flush=True)
        for place, label in enumerate(["base, by arithmetic", "with a branch"]):
            theory = [1e3 * operations(**(DEFAULT | {axis: value}))[place] / speed for value in values]
            panels[0][column].plot(values, theory, "--", color="grey", alpha=0.5 + place / 2, label=label)
        for row, unit in enumerate(["ms", "MiB at the peak"]):
            panels[row][column].set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
            panels[row][column].set_xticks(values, values)
            panels[row][column].xaxis.set_minor_locator(NullLocator())
    panels[0][0].legend(fontsize=8)
    figure.savefig(arguments.out.with_suffix(".png"), dpi=110)
    arguments.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
