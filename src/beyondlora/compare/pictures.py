"""The pictures of a comparison, as SVG that takes its text colour from the page it stands on. Needs the extra `plots`.

Every figure is narrow, with text of a size that can be read where a phone shows it one to one.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from ..run_folder import RunFolder, write_text
from .arms import Arm, Outcome

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLORS = ("#3f7fd8", "#e0762f", "#229b72", "#c9498f", "#8d66d6", "#a9861c", "#2d9fb5", "#d3544f")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "beyondlora",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
STANDALONE = "<style>svg{color:#1c2128}@media(prefers-color-scheme:dark){svg{color:#e4e7eb}}</style>"


def draw(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """Picture name -> (caption, SVG), those for which there is something to show."""
    import matplotlib

    pictures = {}
    with matplotlib.rc_context(STYLE):
        for picture in (_differences, _parameters, _learning_rates, _curves, _seconds, _memory):
            drawn = picture(outcome, _colors(outcome))
            if drawn is not None:
                caption, figure = drawn
                pictures[picture.__name__.strip("_").replace("_", "-")] = (caption, _svg(figure))
    return pictures


def write(pictures: Mapping[str, tuple[str, str]], folder: Path) -> None:
    """Each picture as a file of its own, which follows light and dark by itself."""
    for name, (_, svg) in pictures.items():
        write_text(folder / f"{name}.svg", re.sub(r"(<svg[^>]*>)", rf"\1{STANDALONE}", svg, count=1))


# --- the pictures ----------------------------------------------------------------------------------------------------

Drawn = tuple[str, Any] | None


def _differences(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    shown = [arm for arm in outcome.arms if arm.name in outcome.comparisons]
    if not shown or outcome.baseline is None:
        return None
    figure, axes = _figure(height=1.1 + 0.32 * len(shown))
    for place, arm in enumerate(reversed(shown)):
        found = outcome.comparisons[arm.name]
        low, high = (found.rows_low, found.rows_high) if found.low is None else (found.low, found.high)
        axes.plot(
            [low, high], [place, place], color=colors[arm.method], linewidth=3, alpha=0.45, solid_capstyle="round"
        )
        axes.plot([found.difference], [place], "o", color=colors[arm.method], markersize=6)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(shown)), [arm.name for arm in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(f"{outcome.metric.name}, difference to {outcome.baseline.name}")
    better = "right" if outcome.metric.higher_is_better else "left"
    return (
        f"Difference to {outcome.baseline.name} with its {outcome.confidence:.0%} interval; {better} of 0 is better",
        figure,
    )


def _parameters(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    return _against(
        outcome, colors, "trainable_parameters", "trainable parameters", "The metric against trainable parameters"
    )


def _seconds(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    return _against(
        outcome, colors, "train_seconds", "seconds of training", "The metric against the time of a training"
    )


def _memory(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    return _against(
        outcome, colors, "peak_memory_bytes", "peak memory, MiB", "The metric against the peak memory of a run", 2**20
    )


def _against(outcome: Outcome, colors: Mapping[str, str], key: str, label: str, caption: str, unit: float = 1) -> Drawn:
    """One point an arm, ± its seeds; a line through the arms of a method."""
    figure, axes = _figure()
    drawn = []
    for method, arms in _by_method(outcome):
        points = sorted(((arm.mean_of(key) / unit, arm.figures) for arm in arms), key=lambda point: point[0])
        x, y = [at for at, _ in points], [values.mean() for _, values in points]
        spread = [values.std(ddof=1) if len(values) > 1 else 0 for _, values in points]
        axes.errorbar(x, y, yerr=spread, color=colors[method], marker="o", markersize=5, linewidth=1.2, label=method)
        drawn += x
    if not drawn:
        return None
    _label_logarithmic(axes, "x", drawn)
    axes.set(xlabel=label, ylabel=f"test {outcome.metric.name}")
    _legend(axes)
    return f"{caption}; bars are one standard deviation over seeds", figure


def _learning_rates(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    rates = sorted({setting.learning_rate for arm in outcome.arms for setting in arm.settings})
    if len(rates) < 2:
        return None
    figure, axes = _figure()
    heights = []
    for method, arms in _by_method(outcome, judged=False):
        for number, arm in enumerate(arms):
            settings = sorted(arm.settings, key=lambda setting: setting.learning_rate)
            good = [setting for setting in settings if setting.validation is not None]
            y = [float(setting.validation or 0) for setting in good]
            style = ("-", "--", ":", "-.")[number % 4]
            x = [setting.learning_rate for setting in good]
            axes.plot(x, y, style, color=colors[method], marker="o", markersize=4, label=arm.name)
            lost = [setting.learning_rate for setting in settings if setting.validation is None]
            axes.plot(lost, [0.98] * len(lost), "x", color=colors[method], transform=axes.get_xaxis_transform())
            heights += y
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    if heights and min(heights) > 0 and max(heights) > 3 * min(heights):
        axes.set_yscale("log")
    axes.set(xlabel="learning rate", ylabel=f"validation {outcome.metric.name}")
    _legend(axes)
    return (
        "Who is sensitive to the learning rate, on validation rows; × marks a setting with a diverged or failed run",
        figure,
    )


def _curves(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    figure, axes = _figure()
    drawn = False
    for method, arms in _by_method(outcome):
        for number, arm in enumerate(arms):
            style = ("-", "--", ":", "-.")[number % 4]
            curves = [_evaluations(line["recipe"]["output_dir"]) for line in arm.lines]
            curves = [curve for curve in curves if curve and curve.keys() == curves[0].keys()]
            if curves:
                mean = np.mean([list(curve.values()) for curve in curves], axis=0)
                axes.plot(list(curves[0]), mean, style, color=colors[method], marker="o", markersize=3, label=arm.name)
                drawn = True
    axes.set(xlabel="optimizer step", ylabel="validation loss")
    _legend(axes)
    return ("Training curves at each arm's chosen setting, the mean over seeds", figure) if drawn else None


def _evaluations(folder: str) -> dict[int, float]:
    rows = RunFolder(folder).rows()
    return {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}


# --- how they look ---------------------------------------------------------------------------------------------------


def _figure(height: float = 3.1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(True)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(3, 48 // (max(map(len, labels), default=1) + 6)))
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, handlelength=2, columnspacing=1.2
    )


def _label_logarithmic(axes: Any, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span it; plain numbers as labels, few enough to be read."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    spans = min(values) > 0 and max(values) > 3 * min(values)
    if spans:
        getattr(axes, f"set_{which}scale")("log")
        steps = (1.0,) if max(values) > 100 * min(values) else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5))
        low, high = min(values), max(values)
        margin = (high - low or abs(high) or 1) * 0.15
        getattr(axes, f"set_{which}lim")(low - margin, high + margin)
    axis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _colors(outcome: Outcome) -> dict[str, str]:
    methods = dict.fromkeys(line["method"] for line in outcome.lines)
    return dict(zip(methods, itertools.cycle(COLORS), strict=False))


def _by_method(outcome: Outcome, *, judged: bool = True) -> Iterator[tuple[str, list[Arm]]]:
    for method in dict.fromkeys(line["method"] for line in outcome.lines):
        arms = [arm for arm in outcome.arms if arm.method == method and (arm.chosen or not judged)]
        yield method, sorted(arms, key=lambda arm: arm.mean_of("trainable_parameters") if arm.chosen else math.inf)


def _svg(figure: Any) -> str:
    """The figure without its file header, its fonts the page's, its ink the page's colour."""
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor")
