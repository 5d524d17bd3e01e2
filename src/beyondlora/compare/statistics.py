"""Is one method better than another, or is it noise? Pure: arrays in, verdicts out.

Two things vary besides the method: the seed a model was trained with, and the rows it was tested on. A new training
and new rows would both move the difference D of two methods, so its margin of error counts both, each with its own
degrees of freedom f, added in quadrature:

    margin(tail)² = (t(tail, f_seeds) · e_seeds)² + (t(tail, f_rows) · e_rows)²        t: Student's upper quantile

p: the α at which margin(α/2) just reaches D; Holm's correction for k methods beside the baseline. Interval:
D ± margin(α/2k), so that all hold together, ended at 0 where Holm's correction says that the difference is not 0: these
are the intervals that belong to Holm's verdicts (Strassburger and Bretz, Stat. Med. 2008). (One t quantile for the
summed variance, with the degrees of freedom of Welch and Satterthwaite, finds differences that are not there in 7 % of
grids with two seeds.)

e_rows: paired bootstrap over the test rows (scipy.stats.bootstrap) of D averaged over the seeds; both methods see the
same resampled rows. e_seeds: from the spread over seeds of the two methods or, where that is larger, of all methods
of the grid together: two or three seeds alone often look alike by chance. Methods whose seeds spread clearly more than
the others' (`set_apart`) count there as the widest of the others, or one unstable method would hide every difference
between calm ones; the sum over methods so unlike then has the degrees of freedom of the two alone, and the margin by
the two's own spread counts where it is wider.
Quadrature counts what seeds and rows do together twice; that makes a verdict rarer, never easier.

No verdict where a figure is not finite (a correlation with constant predictions), or is not on more than 1 − confidence
of the resampled rows: what it would have been there is not known, so neither is the error.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.stats import bootstrap, f, t

Outcomes = Mapping[str, np.ndarray]  # name -> (seeds, rows)
Name = TypeVar("Name", bound=Hashable)
POWER = 0.8
SMALLEST_P = 1e-15
UNLIKE = 0.01  # how seldom seeds that spread alike may be told apart
JACKKNIFED = 1000  # rows; BCa leaves out each in turn, and beyond them its corrections are small
NO_VERDICT = "no verdict"


@dataclass(frozen=True)
class Comparison:
    """What is known of a method beside the baseline. Differences are method minus baseline, in the metric's unit."""

    difference: float
    low: float | None  # of the interval that counts seeds and rows, for all methods at once; None with one seed each
    high: float | None
    rows_low: float  # of the paired bootstrap over rows: these trained models, other rows (BCa up to JACKKNIFED rows)
    rows_high: float
    p: float | None
    p_corrected: float | None  # Holm's, over everything that was compared in the same call
    detectable: float | None  # the smallest true difference that so many seeds and rows find in 80 of 100 grids
    seeds: int
    rows: int
    verdict: str  # "better", "worse", "within noise", "one seed", "no verdict" (a figure that is not finite)


def compare_with(
    baseline: Outcomes,
    others: Mapping[str, Outcomes],
    value: Callable[[Outcomes], np.ndarray],
    *,
    higher_is_better: bool,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Comparison]:
    """Compare every other method with the baseline.

    Args:
        baseline, others: outcomes of shape (seeds, rows) by name; the same rows in the same order everywhere.
        value: the figure of outcomes whose last axis are rows.
        confidence: of intervals, and 1 − the chance that a grid without any difference shows one.

    Raises: ValueError, for too few rows.
    """
    check_rows(_rows(baseline), confidence)
    return compare_pairs(
        {name: (outcomes, baseline) for name, outcomes in others.items()},
        value,
        higher_is_better=higher_is_better,
        confidence=confidence,
        resamples=resamples,
    )


def compare_pairs(
    pairs: Mapping[Name, tuple[Outcomes, Outcomes]],
    value: Callable[[Outcomes], np.ndarray],
    *,
    higher_is_better: bool,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> dict[Name, Comparison]:
    """Compare the first of every pair with its second; intervals hold for all pairs together.

    The other arguments, and errors, are `compare_with`'s; "all methods of the grid" are those of the pairs.
    """
    compared = {id(outcomes): outcomes for pair in pairs.values() for outcomes in pair}
    for outcomes in compared.values():
        check_rows(_rows(outcomes), confidence)
    figures = {key: value(outcomes) for key, outcomes in compared.items()}
    finite = [key for key, values in figures.items() if np.isfinite(values).all()]
    pooled = _common({key: figures[key] for key in finite})
    found = {
        name: _Difference(second, first, figures[id(second)], figures[id(first)], value, pooled, confidence, resamples)
        for name, (first, second) in pairs.items()
    }
    tested = {name: difference.p for name, difference in found.items() if difference.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: difference.comparison(corrected.get(name), len(tested), higher_is_better)
        for name, difference in found.items()
    }


def check_rows(rows: int, confidence: float) -> None:
    """Refuse intervals that so few rows cannot give: less than one row would lie outside them. Raises: ValueError."""
    needed = math.ceil(round(1 / (1 - confidence), 6))
    if rows < needed:
        raise ValueError(
            f"{rows} test rows are too few for intervals of {confidence:.0%}, which take at least {needed}: "
            "name more test rows or a lower confidence."
        )


def set_apart(figures: Mapping[Name, np.ndarray]) -> list[Name]:
    """The methods whose seeds spread clearly more than the others': no measure of how far those are to be believed.

    Of the methods in the order of their spread, those before a gap: the one that the F test of those before against
    those after finds least likely, corrected (Bonferroni) for every choice of so many methods, and for every gap.
    From three seeds on: with two, verdicts are wrong too often already, and this would add to it. Seeds that are all
    equal, as coarse figures may be by chance, are no measure either.
    """
    found = [name for name, values in figures.items() if len(values) > 2 and 0 < np.ptp(values) < math.inf]
    order = sorted(found, key=lambda name: -float(figures[name].var(ddof=1)))
    p, apart = 1.0, 0
    for wide in range(1, len(order)):
        (above, f_above), (below, f_below) = (_pooled(figures, names) for names in (order[:wide], order[wide:]))
        choices = math.comb(len(order), wide) * (len(order) - 1)
        p, apart = min((p, apart), (choices * float(f.sf(above / below, f_above, f_below)), wide))
    return order[:apart] if p < UNLIKE else []


def sets_margin(figures: Mapping[Name, np.ndarray]) -> Name | None:
    """The method, of those not set apart, without which the seeds' common margin would be less than half as wide."""
    apart = set_apart(figures)
    within = [name for name, values in figures.items() if len(values) > 1 and name not in apart]
    widest = max(within, key=lambda name: float(figures[name].var(ddof=1)), default=None)
    rest = [name for name in within if name != widest]
    return widest if len(rest) > 1 and 4 * _pooled(figures, rest)[0] < _pooled(figures, within)[0] else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: how likely any of the tests would be this extreme if no method differed."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]


class _Difference:
    """One method against the baseline, before the correction for several."""

    def __init__(
        self,
        baseline: Outcomes,
        other: Outcomes,
        baseline_figures: np.ndarray,
        figures: np.ndarray,
        value: Callable[[Outcomes], np.ndarray],
        pooled: tuple[float, int | None],
        confidence: float,
        resamples: int,
    ) -> None:
        self.confidence = confidence
        self.rows, self.seeds = _rows(baseline), min(len(figures), len(baseline_figures))
        self.value = float(figures.mean() - baseline_figures.mean())
        self.row_error, self.rows_low, self.rows_high = _over_rows(baseline, other, value, confidence, resamples)
        self.seed_errors = _over_seeds(baseline_figures, figures, pooled)
        self.known = math.isfinite(self.value) and math.isfinite(self.row_error)
        self.p = self._p() if self.seed_errors and self.known else None

    def margin(self, tail: float) -> float:
        """How far from the true difference this one lies with probability `tail` on one side."""
        seeds = max(t.isf(tail, freedom) * error for error, freedom in self.seed_errors)
        return float(math.hypot(seeds, t.isf(tail, self.rows - 1) * self.row_error))

    def _p(self) -> float:
        if self.value == 0:
            return 1.0
        if self.margin(SMALLEST_P / 2) <= abs(self.value):
            return SMALLEST_P
        return float(brentq(lambda p: self.margin(p / 2) - abs(self.value), SMALLEST_P, 1.0, xtol=1e-12))

    def comparison(self, p_corrected: float | None, tests: int, higher_is_better: bool) -> Comparison:
        low = high = detectable = None
        verdict = "one seed" if self.known else NO_VERDICT
        if p_corrected is not None:
            alpha = 1 - self.confidence
            margin = self.margin(alpha / (2 * tests))  # of all intervals together, as the verdicts are
            low, high = self.value - margin, self.value + margin
            detectable = margin + self.margin(1 - POWER)
            verdict = "within noise"
            if p_corrected < alpha:
                verdict = "better" if (self.value > 0) == higher_is_better else "worse"
                low, high = (max(low, 0.0), high) if self.value > 0 else (low, min(high, 0.0))
        return Comparison(
            difference=self.value,
            low=low,
            high=high,
            rows_low=self.rows_low,
            rows_high=self.rows_high,
            p=self.p,
            p_corrected=p_corrected,
            detectable=detectable,
            seeds=self.seeds,
            rows=self.rows,
            verdict=verdict,
        )


def _rows(outcomes: Outcomes) -> int:
    return int(next(iter(outcomes.values())).shape[-1])


def _over_rows(
    baseline: Outcomes, other: Outcomes, value: Callable[[Outcomes], np.ndarray], confidence: float, resamples: int
) -> tuple[float, float, float]:
    """Standard error and interval of the seeds' mean difference when the test rows are drawn anew, for both alike."""

    def difference(numbers: np.ndarray, axis: int = -1) -> np.ndarray:
        numbers = numbers.astype(int)
        means = [
            value({name: np.asarray(rows)[:, numbers] for name, rows in outcomes.items()}).mean(axis=0)
            for outcomes in (other, baseline)
        ]
        return np.asarray(means[0] - means[1])

    rows = _rows(baseline)
    with warnings.catch_warnings():  # methods that agree on every row have an interval of no width
        warnings.simplefilter("ignore")
        drawn = bootstrap(
            (np.arange(rows),),
            difference,
            vectorized=True,
            n_resamples=resamples,
            batch=100,
            confidence_level=confidence,
            method="BCa" if rows <= JACKKNIFED else "percentile",
            rng=np.random.default_rng(0),
        )
    known = drawn.bootstrap_distribution[np.isfinite(drawn.bootstrap_distribution)]
    if len(known) < confidence * resamples:
        return math.nan, math.nan, math.nan
    low, high = map(float, drawn.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = map(float, np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]))
    # Resampling n rows has the spread of dividing by n; an unbiased variance divides by n - 1.
    return float(known.std(ddof=1)) * math.sqrt(rows / (rows - 1)), low, high


def _common(figures: Mapping[Name, np.ndarray]) -> tuple[float, int | None]:
    """The variance of all together, those set apart as the widest of the others, and its degrees of freedom.

    None where some are set apart: those of the two methods that are compared.
    """
    apart = set_apart(figures)
    within = [name for name in figures if name not in apart]
    variance, freedom = _pooled(figures, within)
    if not apart:
        return variance, freedom
    widest = max(float(figures[name].var(ddof=1)) for name in within if len(figures[name]) > 1)
    more = sum(len(figures[name]) - 1 for name in apart)
    return (variance * freedom + widest * more) / (freedom + more), None


def _pooled(figures: Mapping[Name, np.ndarray], names: Sequence[Name]) -> tuple[float, int]:
    """The variance over seeds of these methods together, each around its own mean, and its degrees of freedom."""
    freedom = sum(len(figures[name]) - 1 for name in names)
    squares = sum(float(((figures[name] - figures[name].mean()) ** 2).sum()) for name in names)
    return (squares / freedom if freedom else 0.0), freedom


def _over_seeds(first: np.ndarray, second: np.ndarray, pooled: tuple[float, int | None]) -> list[tuple[float, float]]:
    """Standard errors of a difference of two means over seeds, with their degrees of freedom; the wider margin counts.

    None are known of a single seed.
    """
    variance, freedom = pooled
    together = variance * (1 / len(first) + 1 / len(second))
    if min(len(first), len(second)) < 2:
        return []
    parts = [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in (first, second)]
    own = sum(part for part, _ in parts)
    is_wider, errors = own > together * (1 + 1e-9), list[tuple[float, float]]()  # of two alone both are the same
    if is_wider or (freedom is None and own):
        errors.append((math.sqrt(own), own**2 / sum(part**2 / part_freedom for part, part_freedom in parts)))
    if not is_wider:
        errors.append((math.sqrt(together), len(first) + len(second) - 2 if freedom is None else freedom))
    return errors
