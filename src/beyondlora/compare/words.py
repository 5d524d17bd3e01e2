"""A comparison in words: sentences, the terminal's table, Markdown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from rich.table import Table

from .arms import Arm, Outcome, Setting
from .runs import FINISHED
from .statistics import NO_VERDICT, POWER, Comparison

HEADINGS = (
    "arm",
    "trainable",
    "learning rate",
    "{metric}",
    "± seeds",
    "difference",
    "interval",
    "verdict",
    "time",
    "memory",
)
NO_NUMBER = "–"


def verdicts(outcome: Outcome) -> list[str]:
    """One sentence an arm: what can be said of it beside the baseline, and how much this grid could have seen."""
    if outcome.baseline is None:
        return []
    name, found = outcome.baseline.name, outcome.comparisons
    return [_sentence(outcome, arm, name, comparison, len(found)) for arm, comparison in found.items()]


def pair_verdicts(outcome: Outcome) -> list[str]:
    """The same, one sentence a pair that the grid asks about."""
    found = outcome.pairs
    return [_sentence(outcome, one, two, comparison, len(found)) for (one, two), comparison in found.items()]


def _sentence(outcome: Outcome, name: str, beside: str, found: Comparison, tests: int) -> str:
    said = {
        "better": f"is better than {beside}",
        "worse": f"is worse than {beside}",
        "within noise": f"is within noise of {beside}",
        "one seed": f"cannot be told from {beside} with one seed",
        NO_VERDICT: f"cannot be judged beside {beside}, for on too many resampled rows the figure is not defined",
    }
    decimals, metric = outcome.metric.decimals, outcome.metric.name
    evidence = f"{found.difference:+.{decimals}f} {metric}"
    if found.low is None or found.high is None or found.p_corrected is None or found.detectable is None:
        return f"{name} {said[found.verdict]}: {evidence} on {found.rows} rows."
    interval = f"{outcome.confidence:.0%} interval {_ends(found.low, found.high, decimals)}"
    corrected = f", for {tests} comparisons at once" if tests > 1 else ""
    return (
        f"{name} {said[found.verdict]}: {evidence}, {interval}, p = {_p(found.p_corrected)}{corrected} "
        f"({found.seeds} seeds, {found.rows} rows). A true difference of {found.detectable:.{decimals}f} would have "
        f"been found in {POWER:.0%} of such grids.{_reservation(outcome, name, beside)}"
    )


def _reservation(outcome: Outcome, *names: str) -> str:
    """A method that was stopped at the edge of the search has not been seen at its best."""
    edges = [arm.name for arm in outcome.arms if arm.at_edge and arm.name in names]
    return f" Not the last word: the search ended at its edge for {' and '.join(edges)}." if edges else ""


def _baseline(outcome: Outcome) -> str:
    return outcome.baseline.name if outcome.baseline else ""


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "under 0.001"


def headings(outcome: Outcome) -> list[str]:
    """The table's columns."""
    return [heading.format(metric=outcome.metric.name) for heading in HEADINGS]


def cells(outcome: Outcome, arm: Arm) -> list[str]:
    """One arm's row, as text."""
    if arm.chosen is None:
        return [arm.name, *[NO_NUMBER] * 6, "no result", NO_NUMBER, NO_NUMBER]
    decimals, found = outcome.metric.decimals, outcome.comparisons.get(arm.name)
    spread = f"{np.std(arm.figures, ddof=1):.{decimals}f}" if len(arm.figures) > 1 else NO_NUMBER
    difference = interval = ""
    verdict = "baseline" if arm is outcome.baseline else NO_NUMBER
    if found is not None:
        verdict = found.verdict
        difference, interval = _interval(found, decimals)
    return [
        arm.name,
        f"{arm.lines[0]['trainable_parameters']:,}",
        f"{arm.chosen.learning_rate:g}{'*' if arm.at_edge else ''}",
        f"{arm.figures.mean():.{decimals}f}",
        spread,
        difference,
        interval,
        verdict,
        f"{arm.mean_of('train_seconds'):.0f} s",
        f"{arm.mean_of('peak_memory_bytes') / 2**20:,.0f} MiB",
    ]


def table(outcome: Outcome) -> Table:
    """For a terminal without markup; what does not fit into 80 columns is in the Markdown and on the page."""
    shown = [0, 1, 2, 3, 4, 6, 7]
    grid = Table(title=outcome.title, title_justify="left")
    names = headings(outcome)
    names[2], names[6] = "LR", f"{outcome.confidence:.0%} of the difference"
    for column in shown:
        overflow: Literal["fold", "ellipsis"] = "fold" if column == 0 else "ellipsis"
        grid.add_column(names[column], justify="left" if column in (0, 7) else "right", overflow=overflow)
    for arm in outcome.arms:
        row = cells(outcome, arm)
        grid.add_row(*[row[column] for column in shown])
    return grid


def caption(outcome: Outcome) -> str:
    """What the figures are of."""
    better = "higher" if outcome.metric.higher_is_better else "lower"
    alike = ", alike for every arm" if outcome.alike else ""
    return (
        f"{outcome.metric.name.capitalize()} ({better} is better) on {outcome.rows} test rows that nothing was trained "
        f"or chosen on; learning rates chosen on the validation rows{alike}; {outcome.seeds} seeds, ± "
        f"their standard deviation. Intervals of the difference to {_baseline(outcome) or 'the baseline'} count "
        "seeds and rows, and hold all together (p by Holm); time and memory are means of the runs shown."
    )


def pair_caption(outcome: Outcome) -> str:
    """What the pairs' figures are of."""
    return (
        "Pairs of arms that the grid asks about, whatever stands first in the table; intervals and p hold for all "
        f"{len(outcome.pairs)} together, apart from the table's."
    )


def _pair_rows(outcome: Outcome) -> list[str]:
    decimals = outcome.metric.decimals
    rows = [
        "| arm | against | difference | interval | p | could have seen | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for (one, two), found in outcome.pairs.items():
        p = "" if found.p_corrected is None else _p(found.p_corrected)
        seen = "" if found.detectable is None else f"{found.detectable:.{decimals}f}"
        row = [one, two, *_interval(found, decimals), p, seen, found.verdict]
        rows.append(_row(row))
    return rows


def _row(cells: Iterable[str]) -> str:
    """A row of a Markdown table; an arm may be named after a regular expression."""
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _interval(found: Comparison, decimals: int) -> tuple[str, str]:
    """A difference and its interval, the latter empty where there is none."""
    interval = ""
    if found.low is not None and found.high is not None:
        interval = _ends(found.low, found.high, decimals)
    return f"{found.difference:+.{decimals}f}", interval


def _ends(low: float, high: float, decimals: int) -> str:
    """An interval; an end that is 0 exactly, where Holm's correction put it, is shown so."""
    return " to ".join(f"{end:+.{decimals}f}" if end else "0" for end in (low, high))


def markdown(outcome: Outcome, *, command: str, machine: Sequence[str] = ()) -> str:
    """The whole comparison as a Markdown page."""
    rows = [
        headings(outcome),
        ["---", *["---:"] * 6, "---", "---:", "---:"],
        *(cells(outcome, arm) for arm in outcome.arms),
    ]
    parts = [f"# {outcome.title}", f"    {command}", "\n".join(machine), caption(outcome)]
    parts.append("\n".join(map(_row, rows)))
    parts.append("\n".join(f"- {sentence}" for sentence in [*verdicts(outcome), *outcome.notes]))
    if outcome.pairs:
        parts += [pair_caption(outcome), "\n".join(_pair_rows(outcome))]
        parts.append("\n".join(f"- {sentence}" for sentence in pair_verdicts(outcome)))
    found = f"{outcome.metric.name.capitalize()} on the validation rows, means over seeds; bold: what was chosen."
    parts += [found, "\n".join(_search(outcome))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _search(outcome: Outcome) -> list[str]:
    """The search itself: every setting's figure on the validation rows, a column a setting."""
    columns = list(dict.fromkeys(_setting(setting) for arm in outcome.arms for setting in arm.settings))
    rows = [_row(["arm", *columns]), f"| --- |{' ---: |' * len(columns)}"]
    for arm in outcome.arms:
        told = {_setting(setting): _searched(setting, arm, outcome.metric.decimals) for setting in arm.settings}
        rows.append(_row([arm.name, *(told.get(column, "") for column in columns)]))
    return rows


def _setting(setting: Setting) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.searched.items())


def _searched(setting: Setting, arm: Arm, decimals: int) -> str:
    """A figure, bold if it was chosen, and the runs that did not finish."""
    states = Counter(line["status"] for line in setting.lines if line["status"] != FINISHED)
    figure = NO_NUMBER if setting.validation is None else f"{setting.validation:.{decimals}f}"
    lost = ", ".join(f"{count} of {len(setting.lines)} {state}" for state, count in states.items())
    return (f"**{figure}**" if setting is arm.chosen else figure) + (f" ({lost})" if lost else "")
