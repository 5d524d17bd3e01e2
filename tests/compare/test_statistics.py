"""Verdicts on simulated grids whose truth is known, and every part against scipy or a law."""

import itertools

import numpy as np
import pytest
from scipy import stats

from beyondlora.compare.metrics import METRICS
from beyondlora.compare.statistics import JACKKNIFED, compare_pairs, compare_with, holm, set_apart, sets_margin

ROWS = 60


def mean(outcomes):
    return outcomes["x"].mean(axis=-1)


def simulated(draw, *, arms=3, seeds=3, seed_spread=0.1, effect=0.0, rows=ROWS, spreads=None):
    """Outcomes of methods that do not differ, but for the second one by `effect`.

    Rows differ in difficulty for all; each method finds some rows easier (0.7), each training is a little better or
    worse than the method, and each training on each row has a little luck (0.3).
    """
    difficulty = draw.normal(size=rows)
    grid = []
    for arm in range(arms):
        spread = seed_spread * (spreads[arm] if spreads else 1)
        noise = (
            0.7 * draw.normal(size=rows) + spread * draw.normal(size=(seeds, 1)) + 0.3 * draw.normal(size=(seeds, rows))
        )
        grid.append({"x": difficulty + noise + (effect if arm == 1 else 0)})
    return grid


def verdicts(grid, **settings):
    others = {str(number): outcomes for number, outcomes in enumerate(grid[1:], start=1)}
    found = compare_with(grid[0], others, mean, **{"higher_is_better": True, "resamples": 100} | settings)
    return {name: comparison.verdict for name, comparison in found.items()}


# Known truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"arms": 2, "seeds": 2, "seed_spread": 0.1},
        {"arms": 2, "seeds": 3, "seed_spread": 0.0},
        {"arms": 4, "seeds": 3, "seed_spread": 0.1},
        {"arms": 4, "seeds": 3, "seed_spread": 0.1, "spreads": [1, 4, 0.1, 0.1]},
        {"arms": 4, "seeds": 3, "seed_spread": 0.1, "spreads": [1, 1, 1, 30]},
    ],
    ids=str,
)
def test_a_grid_without_a_difference_shows_one_in_at_most_five_percent(setting):
    draw, grids = np.random.default_rng(1), 200
    wrong = sum(set(verdicts(simulated(draw, **setting)).values()) != {"within noise"} for _ in range(grids))
    assert wrong / grids <= 0.05


def test_a_difference_is_found_as_often_as_the_smallest_detectable_one_promises():
    draw, found, grids = np.random.default_rng(2), 0, 100
    promised = []
    for _ in range(grids):
        grid = simulated(draw, arms=2, seed_spread=0.05, effect=0.5)
        comparison = compare_with(grid[0], {"1": grid[1]}, mean, higher_is_better=True, resamples=100)["1"]
        promised.append(comparison.detectable)
        found += comparison.verdict == "better"
        assert comparison.verdict != "worse"
    assert np.median(promised) < 0.5  # so it must be found in more than 80 %
    assert found / grids > 0.8


def test_all_intervals_hold_together_and_agree_with_the_verdicts():
    draw, effects, held, grids = np.random.default_rng(4), (0.0, 0.45, 1.5), 0, 200
    ended = 0
    for _ in range(grids):
        grid = simulated(draw, arms=4, seed_spread=0.05)
        others = {str(effect): {"x": arm["x"] + effect} for arm, effect in zip(grid[1:], effects, strict=True)}
        found = compare_with(grid[0], others, mean, higher_is_better=True, resamples=100)
        held += all(comparison.low <= float(effect) <= comparison.high for effect, comparison in found.items())
        for comparison in found.values():
            assert (comparison.low < 0 < comparison.high) == (comparison.verdict == "within noise")
            ended += 0 in (comparison.low, comparison.high)
    assert held / grids >= 0.95
    assert ended > 5  # Holm's later steps were at work


def test_better_means_what_the_metric_means():
    grid = simulated(np.random.default_rng(0), arms=2, seed_spread=0, effect=2.0)
    assert verdicts(grid, higher_is_better=True) == {"1": "better"}
    assert verdicts(grid, higher_is_better=False) == {"1": "worse"}


def test_an_unstable_method_does_not_hide_a_difference_between_calm_ones():
    draw = np.random.default_rng(5)
    base, good, bad, wild, wilder = (
        {"x": np.repeat(mean + spread * draw.normal(size=(3, 1)), ROWS, axis=1)}
        for mean, spread in ((0, 0.01), (0.2, 0.01), (-0.2, 0.01), (5, 1), (5, 3))
    )
    others = {"good": good, "bad": bad, "wild": wild, "wilder": wilder}
    found = compare_with(base, others, mean, higher_is_better=True)
    assert (found["good"].verdict, found["bad"].verdict) == ("better", "worse")
    spreads = [mean(arm).var(ddof=1) for arm in (base, good, bad)]
    error = np.sqrt((sum(spreads) + 2 * max(spreads)) / 5 * 2 / 3)  # the two count as the widest of the three
    assert found["good"].p == pytest.approx(2 * stats.t.sf(found["good"].difference / error, 4), rel=1e-6)
    # An unstable method itself has the margin of its own few seeds.
    expected = stats.ttest_ind(mean(wild), mean(base), equal_var=False)
    assert found["wild"].p == pytest.approx(expected.pvalue, rel=1e-6)
    assert set_apart({"base": mean(base), **{name: mean(rows) for name, rows in others.items()}}) == ["wilder", "wild"]


def test_where_a_method_is_set_apart_no_difference_counts_more_than_by_its_own_seeds():
    base, other, wild = (
        np.repeat(np.array([values]).T, ROWS, axis=1) for values in ([0, 0.2, -0.3], [4, 8, 6], [0, 500, -300])
    )
    grid = {"base": {"x": base}, "other": {"x": other}, "wild": {"x": wild}}
    assert set_apart({name: mean(rows) for name, rows in grid.items()}) == ["wild"]
    found = compare_with(grid.pop("base"), grid, mean, higher_is_better=True)["other"]
    expected = stats.ttest_ind(mean({"x": other}), mean({"x": base}), equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (4, 3), (10, 5)])
def test_methods_whose_seeds_spread_alike_are_seldom_set_apart(arms, seeds):
    draw, grids = np.random.default_rng(6), 1000
    apart = sum(bool(set_apart(dict(enumerate(draw.normal(size=(arms, seeds)))))) for _ in range(grids))
    assert apart / grids <= 0.015  # 0.01, and three standard errors more would be 0.019


def test_seeds_that_are_all_equal_by_chance_set_no_other_method_apart():
    draw = np.random.default_rng(10)
    figures = {name: draw.normal(size=3) for name in "abc"} | {"an accuracy on few rows": np.full(3, 0.5)}
    assert set_apart(figures) == []


def test_a_method_sets_the_margin_where_without_it_that_would_be_less_than_half():
    seeds = np.array([-1.0, 0.0, 1.0])
    for spread, told in ((np.sqrt(9.9), None), (np.sqrt(10.1), "wide")):  # (1 + 1 + 10) / 3 is four times as much as 1
        figures = {"a": seeds, "b": seeds + 5, "wide": spread * seeds}
        assert set_apart(figures) == []
        assert sets_margin(figures) == told
    assert sets_margin({"a": seeds, "wide": 100 * seeds}) is None  # of two neither is the others


# Against scipy and laws ----------------------------------------------------------------------------------------------


def test_where_rows_agree_the_p_value_is_that_of_a_t_test_over_seeds():
    first, second = np.array([1.0, 1.3, 1.1, 0.8]), np.array([1.6, 1.2, 1.9, 1.5])
    grid = [{"x": np.repeat(values[:, None], ROWS, axis=1)} for values in (first, second)]
    found = compare_with(grid[0], {"1": grid[1]}, mean, higher_is_better=True)["1"]
    expected = stats.ttest_ind(second, first)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    error = (interval.high - interval.low) / 2 / stats.t.isf(0.025, 6)
    # The difference that leaves 0 outside its interval but in one of five times.
    assert found.detectable == pytest.approx((stats.t.isf(0.025, 6) + stats.t.isf(0.2, 6)) * error, rel=1e-6)


def test_where_seeds_agree_the_interval_is_that_of_a_paired_test_over_rows():
    draw = np.random.default_rng(3)
    first = draw.normal(size=400)
    second = first + 0.3 * draw.normal(size=400) + 0.02
    grid = [{"x": np.repeat(values[None], 2, axis=0)} for values in (first, second)]
    found = compare_with(grid[0], {"1": grid[1]}, mean, higher_is_better=True, resamples=4000)["1"]
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)  # resampling
    assert (found.rows_low, found.rows_high) == pytest.approx((expected.low, expected.high), abs=0.06 * width)


def test_the_error_over_few_rows_is_not_the_smaller_one_of_resampling():
    """Which divides by n: of 20 rows that is 2.5 % less; 20,000 samples have the error to 0.5 %."""
    draw = np.random.default_rng(3)
    first, second = draw.normal(size=(2, 20))
    grid = [{"x": np.repeat(values[None], 2, axis=0)} for values in (first, second)]
    found = compare_with(grid[0], {"1": grid[1]}, mean, higher_is_better=True, resamples=20_000)["1"]
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.012)


def test_intervals_of_several_methods_are_as_wide_as_bonferroni_asks():
    first, second = np.array([1.0, 1.3, 1.1, 0.8]), np.array([1.6, 1.2, 1.9, 1.5])
    grid = [{"x": np.repeat(values[:, None], ROWS, axis=1)} for values in (first, second, second)]
    found = compare_with(grid[0], {"1": grid[1], "2": grid[2]}, mean, higher_is_better=True)["1"]
    pooled = np.sqrt(
        (first.var(ddof=1) + 2 * second.var(ddof=1)) / 3
    )  # of all methods: larger than the two methods' own
    width = stats.t.isf(0.05 / 4, 9) * pooled * np.sqrt(2 / 4)
    assert (found.low, found.high) == pytest.approx((found.difference - width, found.difference + width), rel=1e-6)
    assert found.p_corrected == pytest.approx(2 * found.p)


def test_an_interval_ends_at_zero_where_only_holm_finds_the_difference():
    seeds = np.array([-0.1, 0.1, 0.0])
    grid = [{"x": np.repeat((seeds + shift)[:, None], ROWS, axis=1)} for shift in (0, 1.0, 0.235, -0.235)]
    found = compare_with(grid[0], {"1": grid[1], "2": grid[2], "3": grid[3]}, mean, higher_is_better=True)
    width = stats.t.isf(0.05 / 6, 8) * np.sqrt(2 * 0.01 / 3)  # Bonferroni's
    assert width > 0.235
    for name, sign, verdict in (("2", 1, "better"), ("3", -1, "worse")):
        comparison = found[name]
        assert (comparison.verdict, comparison.p_corrected < 0.05 < 3 * comparison.p) == (verdict, True)
        assert sorted([comparison.low * sign, comparison.high * sign]) == pytest.approx([0, 0.235 + width])
    assert (found["1"].low, found["1"].high) == pytest.approx((1 - width, 1 + width))


def test_pairs_are_compared_first_with_second_and_corrected_together():
    figures = {"a": [1.0, 1.3, 1.1, 0.8], "b": [1.6, 1.2, 1.9, 1.5], "c": [2.0, 2.1, 2.0, 2.1]}
    arms = {name: {"x": np.repeat(np.array(values)[:, None], ROWS, axis=1)} for name, values in figures.items()}
    asked = {(one, two): (arms[one], arms[two]) for one, two in ("ba", "ca")}
    found = compare_pairs(asked, mean, higher_is_better=True)
    assert {pair: round(comparison.difference, 6) for pair, comparison in found.items()} == {
        ("b", "a"): 0.5,
        ("c", "a"): 1.0,
    }
    pooled = np.mean([np.var(values, ddof=1) for values in figures.values()])  # each arm once, though a is in two pairs
    width = stats.t.isf(0.05 / 4, 9) * np.sqrt(2 * pooled / 4)
    assert (found["c", "a"].low, found["c", "a"].high) == pytest.approx((1 - width, 1 + width), rel=1e-6)
    assert [comparison.p_corrected for comparison in found.values()] == holm([found[pair].p for pair in asked])
    assert found["c", "a"].p_corrected == pytest.approx(2 * found["c", "a"].p)
    alone = compare_with(arms["a"], {"b": arms["b"]}, mean, higher_is_better=True)["b"]
    assert compare_pairs({1: asked["b", "a"]}, mean, higher_is_better=True) == {1: alone}
    assert compare_pairs({}, mean, higher_is_better=True) == {}


def test_a_ratio_of_sums_is_compared_as_a_ratio_of_sums():
    draw = np.random.default_rng(4)
    tokens = np.repeat(draw.integers(5, 200, size=(1, ROWS)), 2, axis=0).astype(float)
    grid = [{"nll": tokens * (2 + shift + 0.1 * draw.normal(size=(2, ROWS))), "tokens": tokens} for shift in (0, 0.5)]
    found = compare_with(
        grid[0], {"1": grid[1]}, lambda rows: rows["nll"].sum(-1) / rows["tokens"].sum(-1), higher_is_better=False
    )["1"]
    by_hand = [float((arm["nll"].sum(1) / arm["tokens"].sum(1)).mean()) for arm in grid]
    assert found.difference == pytest.approx(by_hand[1] - by_hand[0])
    assert found.verdict == "worse"


@pytest.mark.parametrize("case", range(20))
def test_holm_is_the_closed_test_with_bonferroni(case):
    """A hypothesis falls at a level exactly if every set of hypotheses it belongs to falls by Bonferroni."""
    p = np.random.default_rng(case).uniform(size=4) ** 3
    expected = [
        max(
            min(1.0, len(group) * min(p[j] for j in group))
            for size in range(1, 5)
            for group in itertools.combinations(range(4), size)
            if i in group
        )
        for i in range(4)
    ]
    assert holm(list(p)) == pytest.approx(expected)


# What cannot be said -------------------------------------------------------------------------------------------------


def test_one_seed_gives_no_verdict():
    assert verdicts(simulated(np.random.default_rng(0), arms=2, seeds=1, effect=5.0)) == {"1": "one seed"}


@pytest.mark.parametrize(("rows", "confidence", "needed"), [(19, 0.95, 20), (99, 0.99, 100)])
def test_too_few_rows_for_the_interval_are_refused(rows, confidence, needed):
    with pytest.raises(ValueError, match=f"{rows} test rows are too few .* at least {needed}"):
        verdicts(simulated(np.random.default_rng(0), arms=2, rows=rows), confidence=confidence)
    verdicts(simulated(np.random.default_rng(0), arms=2, rows=needed), confidence=confidence)


def test_methods_that_agree_on_every_row_are_within_noise():
    grid = simulated(np.random.default_rng(0), arms=1)
    assert verdicts([grid[0], grid[0]]) == {"1": "within noise"}


def pearson(label, predictions):
    return {"predicted": np.asarray(predictions, float), "label": np.repeat(label[None], len(predictions), axis=0)}


def test_a_figure_that_does_not_exist_gives_no_verdict_and_leaves_the_others_theirs():
    draw = np.random.default_rng(7)
    label = draw.normal(size=ROWS)
    base, good = (pearson(label, share * label + draw.normal(size=(3, ROWS))) for share in (0.3, 3))
    constant, all_but_one = np.zeros((3, ROWS)), np.zeros((3, ROWS))
    all_but_one[:, 0] = 1, 1.001, 1.002
    others = {"good": good, "constant": pearson(label, constant), "all but one": pearson(label, all_but_one)}
    value = METRICS["sequence-regression"][0].value
    with pytest.warns(stats.ConstantInputWarning):
        found = compare_with(base, others, value, higher_is_better=True)
    without = compare_with(base, {"good": good, "all but one": others["all but one"]}, value, higher_is_better=True)
    assert {name: comparison.verdict for name, comparison in found.items()} == {
        "good": "better",
        "constant": "no verdict",
        "all but one": "no verdict",
    }
    assert found["good"] == without["good"]


def test_the_error_is_that_of_the_resampled_rows_which_have_a_figure():
    grid = simulated(np.random.default_rng(8), arms=2)
    for arm in grid:
        arm["needed"] = np.repeat(np.arange(ROWS)[None] < 4.0, 3, axis=0)  # one of four rows: 2 % of samples have none

    def sometimes(rows):
        return np.where(rows["needed"].any(axis=-1), mean(rows), np.nan)

    with_all, with_most = (
        compare_with(grid[0], {"1": grid[1]}, value, higher_is_better=True)["1"] for value in (mean, sometimes)
    )
    assert with_most.high - with_most.low == pytest.approx(with_all.high - with_all.low, rel=0.02)
    assert with_most.rows_high - with_most.rows_low == pytest.approx(with_all.rows_high - with_all.rows_low, rel=0.1)


def test_of_many_rows_not_each_is_left_out_in_turn():
    def evaluated(rows):
        sets = []
        grid = simulated(np.random.default_rng(9), arms=2, rows=rows)

        def value(outcomes):
            sets.append(int(np.prod(outcomes["x"].shape[1:-1])))
            return mean(outcomes)

        compare_with(grid[0], {"1": grid[1]}, value, higher_is_better=True, resamples=200)
        return sum(sets) // 2

    assert evaluated(JACKKNIFED) > JACKKNIFED
    assert evaluated(JACKKNIFED + 1) < 300
