"""Figures out of what every test row came to (measure.Outcomes), written so that resampled rows are one more axis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..recipe import nearest

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A figure of a set of rows.

    value: outcomes whose last axis are the rows -> one figure for all other axes.
    """

    name: str
    higher_is_better: bool
    value: Callable[[Arrays], np.ndarray]
    decimals: int = 4


def _token_loss(rows: Arrays) -> np.ndarray:
    return rows["nll"].sum(axis=-1) / rows["tokens"].sum(axis=-1)


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    from scipy.stats import pearsonr

    return np.asarray(pearsonr(first, second, axis=-1).statistic)


def _of_classes(rows: Arrays) -> np.ndarray:
    """Matthews' coefficient of two classes is the correlation of their numbers."""
    if max(rows["label"].max(), rows["predicted"].max()) > 1:
        raise ValueError("metric matthews is for two classes here; choose accuracy or loss.")
    return _correlation(rows["predicted"].astype(float), rows["label"].astype(float))


_CLASSES = [
    Metric("accuracy", True, lambda rows: rows["correct"].mean(axis=-1)),
    Metric("loss", False, lambda rows: rows["loss"].mean(axis=-1)),
    Metric("matthews", True, _of_classes),
]
METRICS = {  # the first is the default
    "causal-lm": [
        Metric("perplexity", False, lambda rows: np.exp(_token_loss(rows)), 3),
        Metric("loss", False, _token_loss),
    ],
    "sequence-classification": _CLASSES,
    "image-classification": _CLASSES,
    "sequence-regression": [
        Metric("pearson", True, lambda rows: _correlation(rows["predicted"], rows["label"])),
        Metric("loss", False, lambda rows: ((rows["predicted"] - rows["label"]) ** 2).mean(axis=-1)),
    ],
}


def metric_named(name: str | None, task: str) -> Metric:
    """The metric of a name, or the task's default. Raises: ValueError."""
    known = {metric.name: metric for metric in METRICS[task]}
    if name is not None and name not in known:
        raise ValueError(f"grid: metric {name!r} is unknown for {task}; {nearest(name, list(known))}.")
    return known[name] if name is not None else METRICS[task][0]
