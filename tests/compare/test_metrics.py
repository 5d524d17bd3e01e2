"""Figures of many resampled sets of rows at once, against the libraries' on each of them."""

import itertools

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import small_runs

from beyondlora.compare.metrics import METRICS, metric_named, metrics_of

LANGUAGE = {"prompt_field": "prompt", "completion_field": "completion"}


@pytest.fixture
def recipe(tmp_path):
    return lambda **changes: small_runs.recipe(tmp_path, **changes)


def each(metric, rows, figure):
    """The metric of arrays (2, 3, rows), and a library's figure of every one of the six."""
    found = metric.value(rows)
    assert found.shape == (2, 3)
    for place in itertools.product(range(2), range(3)):
        expected = figure(**{name: values[place] for name, values in rows.items()})
        assert found[place] == pytest.approx(expected, abs=1e-12), place


def named(name, task):
    return next(metric for metric in METRICS[task] if metric.name == name)


@pytest.mark.parametrize("classes", [2, 5])
def test_matthews_of_any_number_of_classes_is_sklearns(classes):
    draw = np.random.default_rng(0)
    label = draw.integers(classes, size=(2, 3, 40))
    predicted = np.where(draw.random((2, 3, 40)) < 0.4, label, draw.integers(classes, size=(2, 3, 40)))
    predicted[0, 0] = 1  # always one class: sklearn says 0
    predicted[0, 1], label[0, 2] = label[0, 1], 0  # all right; one class only
    rows = {"predicted": predicted.astype(float), "label": label.astype(float)}
    each(
        named("matthews", "sequence-classification"),
        rows,
        lambda predicted, label: sklearn.metrics.matthews_corrcoef(label, predicted),
    )


@pytest.mark.parametrize(("name", "function"), [("pearson", "pearsonr"), ("spearman", "spearmanr")])
def test_correlations_are_scipys_with_ties(name, function):
    draw = np.random.default_rng(0)
    label = draw.integers(6, size=(2, 3, 40)).astype(float)  # many equal ones
    predicted = np.round(label + draw.normal(size=(2, 3, 40)), 1)
    each(
        named(name, "sequence-regression"),
        {"predicted": predicted, "label": label},
        lambda predicted, label: getattr(scipy.stats, function)(predicted, label).statistic,
    )


def test_forgetting_is_the_growth_of_the_loss_a_token(recipe):
    draw = np.random.default_rng(0)
    names = ("forgetting_before", "forgetting_after", "forgetting_tokens")
    rows = {name: draw.integers(1, 50, size=(2, 3, 40)).astype(float) for name in names}
    metric = metric_named("forgetting", recipe(forgetting_dataset_name="x.txt"))
    assert not metric.higher_is_better
    assert set(metric.needs) == set(names)
    each(
        metric,
        rows,
        lambda forgetting_before, forgetting_after, forgetting_tokens: (
            forgetting_after.sum() / forgetting_tokens.sum() - forgetting_before.sum() / forgetting_tokens.sum()
        ),
    )


def test_what_a_recipe_asks_can_be_compared_by_and_nothing_else(recipe):
    asked = recipe(**LANGUAGE, metrics=["exact_match", "pass@2"], num_return_sequences=2, temperature=1)
    assert [m.name for m in metrics_of(asked)] == ["perplexity", "loss", "exact_match", "pass@2", "exact_match_strict"]
    assert metric_named(None, asked).name == "perplexity"
    assert metric_named("pass@2", asked).value({"pass@2": np.array([[0.0, 1.0, 1.0, 0.0]])}) == [0.5]
    with pytest.raises(ValueError, match=r"'exact_mach' is not measured .*did you mean 'exact_match'"):
        metric_named("exact_mach", asked)
    with pytest.raises(ValueError, match=r"'exact_match' is not measured .*a recipe asks for by metrics:"):
        metric_named("exact_match", recipe())


@pytest.mark.parametrize(("name", "task"), [(metric.name, task) for task in METRICS for metric in METRICS[task]])
def test_every_metric_needs_what_its_figure_is_made_of(name, task):
    metric = named(name, task)
    rows = {need: np.random.default_rng(0).integers(1, 3, size=(1, 30)).astype(float) for need in metric.needs}
    assert np.isfinite(metric.value(rows)).all()
