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
COLORS = ("#3f7fd8", "#e0762f", "#229b72", "#c9498f", "#8d66d6", "#a9861c", "#2d9fb5", "#d3544f", "#7f8c8d", "#5d8a2b")
FAR = 2.5  # times the distance of the best four fifths from the best: from there a point is left off the scale
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
    """One point an arm, ± its seeds; a line through the arms of a method that grows from one to the next."""
    figure, axes = _figure()
    drawn: list[tuple[float, float, str, str]] = []
    for method, arms in _by_method(outcome):
        points = sorted(((arm.mean_of(key) / unit, arm.figures, arm.name) for arm in arms), key=lambda point: point[0])
        x, y = [at for at, _, _ in points], [float(values.mean()) for _, values, _ in points]
        spread = [values.std(ddof=1) if len(values) > 1 else 0 for _, values, _ in points]
        sizes = {arm.mean_of("trainable_parameters") for arm in arms}
        line = "-" if len(sizes) == len(arms) else "none"  # starts and other options have no order
        style = {"color": colors[method], "linestyle": line, "linewidth": 1.2, "label": method}
        axes.errorbar(x, y, yerr=spread, marker="o", markersize=5, **style)
        drawn += [(at, value, name, colors[method]) for at, value, (_, _, name) in zip(x, y, points, strict=True)]
    if not drawn:
        return None
    _label_logarithmic(axes, "x", [at for at, *_ in drawn])
    axes.set(xlabel=label, ylabel=f"test {outcome.metric.name}")
    deviations = [arm.figures.std(ddof=1) for arm in outcome.arms if len(arm.figures) > 1]
    noise = 2 * float(np.median(deviations)) if deviations else 0.0
    _leave_off_scale(axes, drawn, noise, worse_is_up=not outcome.metric.higher_is_better)
    _legend(axes)
    return f"{caption}; bars are one standard deviation over seeds", figure


def _leave_off_scale(
    axes: Any, points: Sequence[tuple[float, float, str, str]], noise: float, *, worse_is_up: bool
) -> None:
    """Cut off what is so bad that everything else would lie on one line, and say at the edge where it is."""
    sign = 1 if worse_is_up else -1
    badness = sorted(sign * value for _, value, _, _ in points)
    reach = max(badness[math.ceil(0.8 * len(badness)) - 1] - badness[0], noise)
    limit = badness[0] + FAR * reach
    far = [point for point in points if reach > 0 and sign * point[1] > limit]
    if not far:
        return
    inside = [bad for bad in badness if bad <= limit]
    room = (inside[-1] - inside[0] or abs(inside[0])) * 0.12
    low, high = sorted((sign * (inside[0] - room), sign * (inside[-1] + 2.5 * room)))
    axes.set_ylim(low, high)
    for at, value, name, color in far:
        axes.annotate(
            f"{name}: {_short(value)}",
            (at, high if worse_is_up else low),
            xytext=(0, -14 if worse_is_up else 14),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            color=color,
            arrowprops={"arrowstyle": "->", "color": color},
        )


def _learning_rates(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    rates = sorted({setting.learning_rate for arm in outcome.arms for setting in arm.settings})
    if len(rates) < 2:
        return None
    figure, lines = _panels(outcome, colors, judged=False)
    heights = []
    for axes, arm, style in lines:
        settings = sorted(arm.settings, key=lambda setting: setting.learning_rate)
        good = [setting for setting in settings if setting.validation is not None]
        y = [float(setting.validation or 0) for setting in good]
        axes.plot([setting.learning_rate for setting in good], y, marker="o", markersize=4, **style)
        lost = [setting.learning_rate for setting in settings if setting.validation is None]
        axes.plot(lost, [0.98] * len(lost), "x", color=style["color"], transform=axes.get_xaxis_transform())
        heights += y
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    if heights and min(heights) > 0 and max(heights) > 3 * min(heights):
        _label_logarithmic(figure.axes[0], "y", heights)
    _finish_panels(figure, "learning rate", f"validation {outcome.metric.name}")
    return (
        "Who is sensitive to the learning rate, on validation rows; × marks a setting with a diverged or failed run",
        figure,
    )


def _curves(outcome: Outcome, colors: Mapping[str, str]) -> Drawn:
    """The validation loss, or the training loss where validation rows were measured once."""
    for key, what in (("eval_loss", "validation loss"), ("loss", "training loss")):
        figure, lines = _panels(outcome, colors)
        drawn = False
        for axes, arm, style in lines:
            curves = [_logged(line["recipe"]["output_dir"], key) for line in arm.lines]
            curves = [curve for curve in curves if len(curve) > 1 and curve.keys() == curves[0].keys()]
            if curves:
                mean = np.mean([list(curve.values()) for curve in curves], axis=0)
                axes.plot(list(curves[0]), mean, **style)
                drawn = True
        if drawn:
            _finish_panels(figure, "optimizer step", what)
            return f"The {what} at each arm's chosen setting, the mean over seeds", figure
    return None


def _logged(folder: str, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in RunFolder(folder).rows() if row.get(key) is not None}


# --- how they look ---------------------------------------------------------------------------------------------------


def _figure(height: float = 3.1) -> tuple[Any, Any]:
    figure, grid = _axes(height, 1, 1)
    return figure, grid[0][0]


def _axes(height: float, rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.patch.set_alpha(0)
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure, grid


def _panels(
    outcome: Outcome, colors: Mapping[str, str], *, judged: bool = True
) -> tuple[Any, list[tuple[Any, Arm, dict[str, Any]]]]:
    """A figure, and for every arm where and how its line is drawn.

    A method with several arms has a panel of its own, its smallest arm pale and its largest full; the others share one.
    """
    methods = [(method, arms) for method, arms in _by_method(outcome, judged=judged) if arms]
    single = [pair for pair in methods if len(pair[1]) == 1]
    panels = [[pair] for pair in methods if len(pair[1]) > 1] + ([single] if single else [])
    columns = 1 if len(panels) < 2 else 2
    rows = max(1, math.ceil(len(panels) / columns))
    figure, grid = _axes(3.1 if rows == 1 else 2.3 * rows, rows, columns)
    lines = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        for method, arms in panel:
            for number, arm in enumerate(arms):
                label = arm.name.removeprefix(method).strip() if len(arms) > 1 else arm.name
                style = {"color": colors[method], "alpha": 0.3 + 0.7 * (number + 1) / len(arms), "label": label}
                lines.append((axes, arm, style))
        if len(panels) > 1:
            axes.set_title(panel[0][0] if panel is not single else "", color=colors[panel[0][0]], fontsize=9)
    if len(panels) < rows * columns and rows > 1:
        grid[-1][1].remove()
        grid[-2][1].tick_params(labelbottom=True)
    return figure, lines


def _finish_panels(figure: Any, xlabel: str, ylabel: str) -> None:
    if len(figure.axes) == 1:
        figure.axes[0].set(xlabel=xlabel, ylabel=ylabel)
        _legend(figure.axes[0])
        return
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, handlelength=1.2, labelspacing=0.2, loc="best")


def _legend(axes: Any) -> None:
    """Above the axes; what room it takes is added to the picture's."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(3, 48 // (max(map(len, labels), default=1) + 6)))
    rows = math.ceil(len(labels) / columns)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * max(rows - 1, 0))
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
