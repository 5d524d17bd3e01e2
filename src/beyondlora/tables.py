"""What commands print on standard output: tables of results."""

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MAX_PAIRS = 15  # of subspaces, those of six adapters: more is no table that anybody reads
NARROW, BOUNDLESS = 8, 100_000  # columns of a terminal: for a name, and more than there are
COLUMNS = {
    "r": ("rank", "{:g}"),
    "effective\nrank": ("effective_rank", "{:.2f}"),
    "manifold\ndim.": ("manifold_dimension", "{:.1f}"),
    "stable\nrank": ("stable_rank", "{:.2f}"),
    "rank\nof ΔW": ("update_effective_rank", "{:.2f}"),
    "non-\nlinear": ("nonlinear_share", "{:.1%}"),
    "dead": ("dead_units", "{:.1%}"),
    "satu-\nrated": ("saturated", "{:.1%}"),
    "off\nStiefel": ("orthonormality", "{:.0e}"),
}


def show_analysis(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Averages over layers, and how far each two adapters write into the same directions; `say` what was left out."""
    means = {adapter["label"]: adapter["mean"] for adapter in result["adapters"]}
    told = {
        heading: column
        for heading, column in COLUMNS.items()
        if any(mean[column[0]] is not None for mean in means.values())
    }
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)  # eight columns of figures beside a name
    table.add_column("adapter", overflow="fold")
    for heading in told:
        table.add_column(heading, justify="right")
    for label, mean in means.items():
        table.add_row(label, *("" if mean[key] is None else form.format(mean[key]) for key, form in told.values()))
    first = next(iter(means.values()))
    measured = f"{first['tokens']:,} tokens of {result['data']}; means over {first['layers']} layers"
    _console().print(f"{measured}, {result['seconds']:.0f} s", highlight=False)
    show(table)
    for label, mean in means.items():
        if mean["left_out"]:
            names = ", ".join(mean["left_out"][:3]) + (", ..." if len(mean["left_out"]) > 3 else "")
            say(f"{label}: left out, for they saw too few tokens or add nothing that varies: {names}")
        if mean["rank"] and mean["tokens"] <= mean["rank"]:
            say(f"{label}: {mean['tokens']} tokens bound every rank here below r; give more.")
    pairs = result["subspaces"]
    if len(pairs) > MAX_PAIRS:
        say(f"How near the subspaces of {len(pairs)} pairs of adapters are is in the JSON (--json, or --out FOLDER).")
    elif pairs:
        _show_subspaces(pairs)


def _show_subspaces(pairs: list[dict[str, Any]]) -> None:
    table = Table(title="Leading directions: overlap (mean cos² of the principal angles)", title_justify="left")
    keys = {"outputs": "overlap", "by chance": "chance", "inputs": "input_overlap", "by chance ": "input_chance"}
    for heading in ("adapters", *keys):
        name = heading == "adapters"
        table.add_column(heading.rstrip(), justify="left" if name else "right", overflow="fold" if name else "ellipsis")
    for pair in pairs:
        numbers = ("" if pair[key] is None else f"{pair[key]:.2f}" for key in keys.values())
        table.add_row(f"{pair['a']} and {pair['b']}", *numbers)
    show(table)


def show_figures(title: str, metrics: dict[str, Any]) -> None:
    """One table of figures, standard errors and the number of rows behind them."""
    table = Table()
    for heading in ("metric", "value", "standard error", "n"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, score in metrics.items():
        stderr = "" if score["stderr"] is None else f"± {score['stderr']:.4f}"
        value = f"{score['value']:,.0f}" if name == "tokens" else _figure(score)
        table.add_row(name, value, stderr, f"{score['n']:,}")
    _console().print(title, highlight=False)
    if metrics:
        show(table)


def _figure(score: dict[str, Any]) -> str:
    """A correlation of one row, or with a prediction that is always the same, is undefined; nan looks like a fault."""
    return "undefined" if math.isnan(score["value"]) else f"{score['value']:.4f}"


def show_gap(record: dict[str, Any], *, every_layer: bool) -> None:
    """How far an export is from the live adapter."""
    _console().print(f"{record['made_from']} as {record['form']} form, compared on {record['compared_on']}")
    table = Table("exported against live", "")
    if record["layers"]:
        shown = record["layers"] if every_layer else {}
        for path, gap in shown.items():
            table.add_row(path, f"{gap:.2e}")
        table.add_row("layer output, relative: largest", f"{record['layer_gap']['largest']:.2e}")
        table.add_row("layer output, relative: median", f"{record['layer_gap']['median']:.2e}")
    table.add_row("logits, relative", f"{record['logits_relative']:.2e}")
    table.add_row("logits, largest difference", f"{record['logits_max']:.2e}")
    table.add_row("share of the adapter's effect lost", f"{record['adapter_relative']:.2e}")
    if record["top1_agreement"] is not None:
        table.add_row("top-1 agreement", f"{record['top1_agreement']:.4%}")
    show(table)
    if record["computed_in"] in ("bfloat16", "float16"):
        rounding = f"The model computes in {record['computed_in']}, whose rounding is in the figures of the logits"
        layers = "; those of the layers' outputs are of the functions alone." if record["layers"] else "."
        _console().print(rounding + layers)
    if "scores" in record:
        _show_scores(record["scores"])


def _show_scores(scores: dict[str, dict[str, Any]]) -> None:
    """The figures of the base model, the live adapter and the export beside each other."""
    table = Table("metric", *scores)
    for name in scores["live"]:
        if name != "tokens":
            table.add_row(name, *(_figure(figures[name]) for figures in scores.values()))
    show(table)


def show(table: Table) -> None:
    """Print a table whole: where the terminal is too narrow for its words, lines run on, and no figure is cut short.

    Names, in columns whose overflow is "fold", are broken anywhere.
    """
    console, widths, least = _console(), list[int](), list[int]()
    for column in table.columns:
        texts = [str(text) for text in (column.header, *column.cells)]
        widths.append(max(cell_len(line) for text in texts for line in text.split("\n")))
        words = max((cell_len(word) for text in texts for word in text.split()), default=0)
        least.append(min(NARROW, words) if column.overflow == "fold" else words)
    everything = console.options.update(max_width=BOUNDLESS)
    frame = Measurement.get(console, everything, table).maximum - sum(widths)
    while sum(widths) > max(console.width - frame, sum(least)):  # from whichever column has the most to spare
        widths[max(range(len(widths)), key=lambda at: widths[at] - least[at])] -= 1
    console.width = max(console.width, sum(widths) + frame)
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table)


def _console() -> Console:
    """Standard output, where [brackets] and :colons: in a name mean what they are."""
    return Console(markup=False, emoji=False)
