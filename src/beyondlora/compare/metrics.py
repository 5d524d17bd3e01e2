"""Figures out of what every test row came to (measure.Outcomes), written so that resampled rows are one more axis."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..figures import Harness, check_extras
from ..recipe import Recipe, nearest

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A figure of a set of rows.

    needs: the outcomes that it is made of.
    of: what its rows are, see Examination.counts.
    on_test_rows: whether it is of other rows in testing than in validation; if not, nothing can be chosen by it.
    value: outcomes whose last axis are the rows -> one figure for all other axes.
    """

    name: str
    higher_is_better: bool
    needs: tuple[str, ...]
    value: Callable[[Arrays], np.ndarray]
    decimals: int = 4
    of: str = "rows"
    on_test_rows: bool = True


def _token_loss(rows: Arrays) -> np.ndarray:
    return rows["nll"].sum(axis=-1) / rows["tokens"].sum(axis=-1)


def _forgetting(rows: Arrays) -> np.ndarray:
    grown = rows["forgetting_after"].sum(axis=-1) - rows["forgetting_before"].sum(axis=-1)
    return grown / rows["forgetting_tokens"].sum(axis=-1)


def _mean(name: str, rows: Arrays) -> np.ndarray:
    return np.asarray(rows[name].mean(axis=-1))


def _pearson(rows: Arrays) -> np.ndarray:
    from scipy.stats import pearsonr

    return np.asarray(pearsonr(rows["predicted"], rows["label"], axis=-1).statistic)


def _spearman(rows: Arrays) -> np.ndarray:
    """The correlation of the ranks, equal values sharing theirs."""
    from scipy.stats import rankdata

    return _pearson({name: rankdata(rows[name], axis=-1) for name in ("predicted", "label")})


def _matthews(rows: Arrays) -> np.ndarray:
    """Of any number of classes (Gorodkin's R_K); 0 where one side has a single class, as scikit-learn has it."""
    predicted, label = rows["predicted"], rows["label"]
    count = label.shape[-1]
    agreed = np.count_nonzero(predicted == label, axis=-1)
    by_chance = predicted_alike = label_alike = np.zeros(agreed.shape)
    for number in range(int(max(predicted.max(), label.max())) + 1):
        p, t = (np.count_nonzero(classes == number, axis=-1).astype(float) for classes in (predicted, label))
        by_chance, predicted_alike, label_alike = by_chance + p * t, predicted_alike + p * p, label_alike + t * t
    spread = np.sqrt((count**2 - predicted_alike) * (count**2 - label_alike))
    return np.divide(agreed * count - by_chance, spread, out=np.zeros_like(spread), where=spread > 0)


def _squared_error(rows: Arrays) -> np.ndarray:
    return np.asarray(((rows["predicted"] - rows["label"]) ** 2).mean(axis=-1))


def _mean_of(name: str, *, of: str | None = None, higher_is_better: bool = True) -> Metric:
    return Metric(name, higher_is_better, (of or name,), partial(_mean, of or name))


_CLASSES = [
    _mean_of("accuracy", of="correct"),
    _mean_of("loss", higher_is_better=False),
    Metric("matthews", True, ("predicted", "label"), _matthews),
]
METRICS = {  # the first is the default
    "causal-lm": [
        Metric("perplexity", False, ("nll", "tokens"), lambda rows: np.exp(_token_loss(rows)), 3),
        Metric("loss", False, ("nll", "tokens"), _token_loss),
    ],
    "sequence-classification": _CLASSES,
    "image-classification": _CLASSES,
    "sequence-regression": [
        Metric("pearson", True, ("predicted", "label"), _pearson),
        Metric("spearman", True, ("predicted", "label"), _spearman),
        Metric("loss", False, ("predicted", "label"), _squared_error),
    ],
}
FORGETTING = Metric(
    "forgetting",
    False,
    ("forgetting_before", "forgetting_after", "forgetting_tokens"),
    _forgetting,
    of="corpus",
    on_test_rows=False,
)


def metrics_of(recipe: Recipe) -> list[Metric]:
    """Every metric that the runs of a recipe can be compared by, but those of lm-evaluation-harness."""
    names = list(recipe.metrics or [])
    if "exact_match" in names:
        names.append("exact_match_strict")
    forgetting = [FORGETTING] if recipe.forgetting_dataset_name else []
    answers = [dataclasses.replace(_mean_of(name), of="questions") for name in names]
    return [*METRICS[recipe.task], *answers, *forgetting]


def _of_harness(recipe: Recipe) -> list[Metric]:
    """The figures of lm-evaluation-harness that rows can be resampled for, as the mean of a number for each."""
    check_extras(recipe)
    harness = Harness.of(recipe)
    return [
        dataclasses.replace(_mean_of(name, higher_is_better=mean.higher_is_better), of=name, on_test_rows=False)
        for name, mean in (harness.means.items() if harness else ())
    ]


def metric_named(name: str | None, recipe: Recipe) -> Metric:
    """The metric of a name, or the task's default. Raises: ValueError."""
    if name is None:
        return METRICS[recipe.task][0]
    known = {metric.name: metric for metric in metrics_of(recipe)}
    if name not in known:  # looking through the harness's tasks takes seconds
        known |= {metric.name: metric for metric in _of_harness(recipe)}
    if name not in known:
        raise ValueError(
            f"grid: metric {name!r} is not measured for {recipe.task}; {nearest(name, list(known))}. What else there "
            "is, a recipe asks for by metrics:, forgetting_dataset_name: and lm_eval_tasks:."
        )
    return known[name]
