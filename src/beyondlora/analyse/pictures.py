"""The pictures: normalised spectra with the rank limit, effective rank against rank, splines. Needs the extra `plots`.

A method has one colour in all of them; ranks of one method differ by shade, the larger the darker.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # told apart by everybody
NOISE = 1e-12  # of the spectrum's sum; below it is rounding
INK, FAINT = "#333333", "#999999"


PICTURES = SPECTRUM, RANKS, SPLINES = ("spectrum.png", "effective-rank.png", "splines.png")


def draw_all(result: Mapping[str, Any], folder: Path) -> None:
    """Draw every picture that the result has something for."""
    adapters = result["adapters"]
    colours = _colours(adapters)
    _save(_spectra(adapters, colours), folder / SPECTRUM)
    if any(adapter["mean"]["rank"] for adapter in adapters):
        _save(_ranks(adapters, colours), folder / RANKS)
    if any(layer["splines"] for adapter in adapters for layer in adapter["layers"]):
        _save(_splines(adapters, colours), folder / SPLINES)


def _colours(adapters: list[Any]) -> dict[str, Any]:
    """Label → colour: one hue a method, darkened with the rank."""
    methods: dict[str, list[Any]] = defaultdict(list)
    for adapter in adapters:
        methods[adapter["peft_type"]].append(adapter)
    colours = {}
    for number, members in enumerate(methods.values()):
        members.sort(key=lambda adapter: adapter["mean"]["rank"] or 0)
        for place, adapter in enumerate(members, start=1):
            colours[adapter["label"]] = _mixed(COLOURS[number % len(COLOURS)], place / len(members))
    return colours


def _mixed(colour: str, strength: float) -> tuple[float, ...]:
    """A colour, lightened towards white for a strength below 1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    share = 0.3 + 0.7 * strength
    return tuple(1 - (1 - channel) * share for channel in channels)


def _spectra(adapters: list[Any], colours: Mapping[str, Any]) -> Any:
    figure, axes = _figure()
    for adapter in adapters:
        shares = [share for share in adapter["mean"]["spectrum"] if share > NOISE]
        axes.plot(
            range(1, len(shares) + 1), shares, color=colours[adapter["label"]], linewidth=1.8, label=adapter["label"],
            marker="o", markersize=3.2 if len(shares) <= 64 else 0,
        )  # fmt: skip
    limits = sorted({adapter["mean"]["rank"] for adapter in adapters if adapter["mean"]["rank"]})
    for limit in limits:
        axes.axvline(limit, color=FAINT, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        axes.annotate(
            f"r = {limit:g}", (limit, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="index i of the singular value", ylabel="σᵢ / Σσ, mean over layers")
    _plain_numbers(axes.xaxis, max(len(adapter["mean"]["spectrum"]) for adapter in adapters))
    axes.set_title("Spectrum of the adapters' centred outputs; dotted: the rank limit", pad=20)
    _legend(axes, len(adapters))
    return figure


def _ranks(adapters: list[Any], colours: Mapping[str, Any]) -> Any:
    figure, axes = _figure()
    methods: dict[str, list[Any]] = defaultdict(list)
    for adapter in adapters:
        if adapter["mean"]["rank"]:
            methods[adapter["peft_type"]].append(adapter)
    ranks = sorted({adapter["mean"]["rank"] for members in methods.values() for adapter in members})
    ends = [ranks[0] / 1.3, ranks[-1] * 1.3]
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (2, 3)), zorder=0, label="the rank limit")
    for place, (method, members) in enumerate(sorted(methods.items())):
        members.sort(key=lambda adapter: adapter["mean"]["rank"])
        shift = 1.02 ** (place - (len(methods) - 1) / 2)  # so that the bars stand beside each other
        axes.errorbar(
            [adapter["mean"]["rank"] * shift for adapter in members],
            [adapter["mean"]["effective_rank"] for adapter in members],
            yerr=[adapter["mean"]["effective_rank_deviation"] for adapter in members],
            color=colours[members[-1]["label"]], marker="o", markersize=5, linewidth=1.8, elinewidth=0.9, capsize=2.5,
            label=method,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel="effective rank of the outputs")
    axes.set_xlim(*ends)
    axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    axes.minorticks_off()
    heights = [adapter["mean"]["effective_rank"] for members in methods.values() for adapter in members]
    _plain_numbers(axes.yaxis, ends[1])
    axes.set_ylim(min(heights) / 1.6, ends[1])
    axes.set_title("Effective rank against rank; bars: deviation over layers", pad=10)
    _legend(axes, len(methods) + 1)
    return figure


def _splines(adapters: list[Any], colours: Mapping[str, Any]) -> Any:
    """For each adapter with splines, where inputs fall on the grid (mean over layers) and the curves it learned."""
    with_splines = [adapter for adapter in adapters if any(layer["splines"] for layer in adapter["layers"])]
    figure, grid = _figure(rows=len(with_splines), columns=2, size=(9, 2.7 * len(with_splines) + 0.5))
    for (left, right), adapter in zip(grid, with_splines, strict=True):
        splines = [spline for layer in adapter["layers"] for spline in layer["splines"]]
        colour = colours[adapter["label"]]
        edges = splines[0]["grid"]
        step = edges[1] - edges[0]
        shares = torch.tensor([spline["occupancy"] for spline in splines]).mean(dim=0).tolist()
        places = [edges[0] - step / 2, *(edge + step / 2 for edge in edges[:-1]), edges[-1] + step / 2]
        outside = [FAINT, *[colour] * (len(edges) - 1), FAINT]
        left.bar(places, [100 * share for share in shares], width=step * 0.92, color=outside)
        left.set_xticks(edges, [f"{edge:.1f}" for edge in edges])
        for word, place, share in (("below", places[0], shares[0]), ("above", places[-1], shares[-1])):
            left.text(place, 100 * share, word, ha="center", va="bottom", fontsize=8, color=INK)
        left.set(ylabel="% of inputs", title=f"{adapter['label']}: inputs on the grid")
        for spline in splines:
            right.plot(spline["z"], spline["curves"], color=colour, alpha=0.25, linewidth=0.8)
        right.axvspan(edges[0], edges[-1], color="#000000", alpha=0.04, linewidth=0)
        right.set(xlabel="input of the spline", title="learned curves, every layer (shaded: the grid)")
    return figure


# --- what all pictures share -----------------------------------------------------------------------------------------


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.8)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.title.set(fontsize=11, color=INK)
    return figure, axes[0, 0] if rows == columns == 1 else axes


def _plain_numbers(axis: Any, largest: float) -> None:
    """Powers of two as ticks of a logarithmic axis, written out."""
    ticks = [2**power for power in range(max(int(largest), 1).bit_length())]
    axis.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _legend(axes: Any, entries: int) -> None:
    """Beside the picture where the entries would cover it."""
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if entries > 5 else {}
    axes.legend(frameon=False, fontsize=9, **beside)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)
