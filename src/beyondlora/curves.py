"""The loss-curve picture of one run, or of several beside each other. Needs the extra `plots`."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str = "") -> None:
    """Draw training losses (thin) and evaluation losses (dots) over the steps, and write the picture atomically.

    Args:
        runs: label -> the rows of that run's metrics.jsonl.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, rows) in enumerate(runs.items()):
        color = f"C{number % 10}"
        axes.plot(*_points(rows, "loss"), color=color, alpha=0.35, linewidth=1)
        axes.plot(*_points(rows, "eval_loss"), color=color, marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (thin: training, dots: evaluation)", title=title)
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
