"""The evaluator: token-exact whatever the batch, standard errors over rows, nothing disturbed."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import small_models
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from beyondlora.measure import measure


def collate(rows):
    """Pad on the right, as a tokenizer's collator does."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda row, key, value: row[key] + [value] * (longest - len(row[key]))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row, "input_ids", 0) for row in rows]),
        "attention_mask": torch.tensor([pad(row | {"mask": [1] * len(row["input_ids"])}, "mask", 0) for row in rows]),
        "labels": torch.tensor([pad(row, "labels", -100) for row in rows]),
    }


def prompts(count=11):
    """Rows of very different lengths, the first tokens of each not scored."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 64, (4 + 5 * (number % 4),), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:]})
    return rows


@pytest.fixture(scope="module")
def llama():
    model = small_models.llama().double()
    with torch.no_grad():  # far enough from a uniform guess that rows differ
        model.lm_head.weight.mul_(40)
    return model


def row_losses(model, rows):
    """(mean loss, scored tokens) of each row by transformers' own loss, one row at a time."""
    losses = []
    for row in rows:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        losses.append((loss.item(), sum(label != -100 for label in row["labels"][1:])))
    return np.array(losses).T


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_the_loss_is_that_of_tokens_whatever_the_batch_size(llama, batch_size):
    rows = prompts()
    means, tokens = row_losses(llama, rows)
    scores = measure(llama, rows, collate, task="causal-lm", batch_size=batch_size)
    # Padding changes the order of float32 additions in the loss only: 1e-6 of rounding.
    assert scores["loss"].value == pytest.approx((means * tokens).sum() / tokens.sum(), rel=1e-6)
    assert scores["perplexity"].value == pytest.approx(math.exp(scores["loss"].value))
    assert scores["tokens"].value == tokens.sum()
    assert scores["loss"].n == len(rows)


def test_virtual_tokens_in_front_are_not_scored():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, rows = get_peft_model(small_models.llama(), config).eval(), prompts()
    means, tokens = row_losses(model, rows)
    score = measure(model, rows, collate, task="causal-lm", batch_size=1)["loss"]
    assert score.value == pytest.approx((means * tokens).sum() / tokens.sum(), rel=1e-6)


def test_the_standard_error_of_equal_blocks_is_that_of_a_mean(llama):
    rows = [{"input_ids": row, "labels": row} for row in small_models.tokens(rows=20, length=16).tolist()]
    means, _ = row_losses(llama, rows)
    score = measure(llama, rows, collate, task="causal-lm")["loss"]
    assert score.stderr == pytest.approx(scipy.stats.sem(means), rel=1e-5)


def test_the_standard_error_of_unequal_rows_is_that_of_resampled_rows(llama):
    rows = prompts(200)
    means, tokens = row_losses(llama, rows)
    resampled = scipy.stats.bootstrap(
        (means, tokens), lambda m, t, axis: (m * t).sum(axis) / t.sum(axis), paired=True, vectorized=True, rng=0
    )
    score = measure(llama, rows, collate, task="causal-lm")["loss"]
    # 9999 resamples know their spread to 0.7 %; linearisation adds O(1/200). Tokens as if independent would be far off.
    assert score.stderr == pytest.approx(resampled.standard_error, rel=0.04)


def test_one_row_has_no_standard_error(llama):
    scores = measure(llama, prompts(1), collate, task="causal-lm")
    assert scores["loss"].stderr is None
    assert scores["perplexity"].stderr is None


class Fixed(nn.Module):
    """Answers with the logits that stand in the row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, logits):
        return SimpleNamespace(logits=logits)


def stack(rows):
    return {key: torch.tensor(np.array([row[key] for row in rows])) for key in ("logits", "labels")}


def classified(count=300, classes=3):
    draw = np.random.default_rng(0)
    labels = draw.integers(classes, size=count)
    logits = draw.normal(size=(count, classes)) + 1.2 * np.eye(classes)[labels]
    return [{"logits": row, "labels": label} for row, label in zip(logits, labels, strict=True)]


@pytest.mark.parametrize("task", ["sequence-classification", "image-classification"])
def test_classification_figures_are_sklearns(task):
    rows = classified()
    labels, logits = np.array([row["labels"] for row in rows]), np.array([row["logits"] for row in rows])
    probabilities, predicted = scipy.special.softmax(logits, axis=1), logits.argmax(axis=1)
    scores = measure(Fixed(), rows, stack, task=task, batch_size=7)
    assert scores["loss"].value == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), rel=1e-6)
    assert scores["accuracy"].value == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert scores["matthews"].value == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted))
    assert scores["f1_macro"].value == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert scores["accuracy"].stderr == pytest.approx(scipy.stats.binom.std(300, scores["accuracy"].value) / 300)
    # Balanced classes, errors spread evenly: Matthews is then (k·accuracy − 1)/(k − 1), and so is its error.
    assert scores["matthews"].stderr == pytest.approx(scores["accuracy"].stderr * 3 / 2, rel=0.1)
    assert all(score.n == 300 for score in scores.values())


def left_out(statistic, labels, predicted):
    """The jackknife by its definition: the statistic without each row in turn."""
    count = len(labels)
    each = np.array([statistic(np.delete(labels, row), np.delete(predicted, row)) for row in range(count)])
    return math.sqrt((count - 1) / count * ((each - each.mean()) ** 2).sum())


def one_hot(labels, predicted, classes):
    return [{"logits": row, "labels": label} for row, label in zip(np.eye(classes)[predicted], labels, strict=True)]


@pytest.mark.filterwarnings("ignore:.*single label")
@pytest.mark.parametrize("count", [2, 3, 8, 30])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_standard_errors_of_classification_leave_out_each_row(count, classes):
    draw = np.random.default_rng(count * classes)
    macro = lambda t, p: sklearn.metrics.f1_score(t, p, average="macro", zero_division=0)  # noqa: E731
    cases = [draw.integers(classes, size=(2, count)) for _ in range(10)]  # many a class with one row, or with none
    for labels, wrong in cases:
        predicted = np.where(draw.random(count) < 0.6, labels, wrong)
        scores = measure(Fixed(), one_hot(labels, predicted, classes), stack, task="sequence-classification")
        for name, statistic in (("matthews", sklearn.metrics.matthews_corrcoef), ("f1_macro", macro)):
            assert scores[name].stderr == pytest.approx(left_out(statistic, labels, predicted), rel=1e-9, abs=1e-12)


def test_of_many_classes_each_figure_is_asked_for_once(monkeypatch):
    draw = np.random.default_rng(0)
    labels, wrong = draw.integers(200, size=(2, 8000))
    rows = one_hot(labels, np.where(draw.random(8000) < 0.5, labels, wrong), 200)
    asked = []
    for name in ("f1_score", "matthews_corrcoef"):  # each takes 10 ms here: not once for each of 6,000 cells
        theirs = getattr(sklearn.metrics, name)
        monkeypatch.setattr(sklearn.metrics, name, lambda *x, _f=theirs, **more: (asked.append(1), _f(*x, **more))[1])
    scores = measure(Fixed(), rows, stack, task="image-classification", batch_size=500)
    assert len(asked) == 2
    # Classes alike, errors spread evenly: both figures are then about the accuracy, and so are their errors.
    assert scores["matthews"].stderr == pytest.approx(scores["accuracy"].stderr, rel=0.1)
    assert scores["f1_macro"].stderr == pytest.approx(scores["accuracy"].stderr, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*single label")
def test_one_classified_row_has_no_standard_errors():
    scores = measure(Fixed(), one_hot([1], [1], 3), stack, task="sequence-classification")
    assert all(score.stderr is None for score in scores.values())


def test_regression_figures_are_scipys():
    draw = np.random.default_rng(0)
    true = draw.normal(size=2000)
    predicted = (true + draw.normal(size=2000)).astype(np.float32)
    rows = [{"logits": [p], "labels": t} for p, t in zip(predicted, true, strict=True)]
    scores = measure(Fixed(), rows, stack, task="sequence-regression", batch_size=64)
    assert scores["loss"].value == pytest.approx(sklearn.metrics.mean_squared_error(true, predicted))
    assert scores["pearson"].value == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    assert scores["spearman"].value == pytest.approx(scipy.stats.spearmanr(true, predicted).statistic)
    # Of a bivariate normal sample, the error of r is (1 − r²)/√n; 400 resamples know it to 4 %, 2000 rows to 3 %.
    assert scores["pearson"].stderr == pytest.approx((1 - scores["pearson"].value ** 2) / math.sqrt(2000), rel=0.12)


def test_a_constant_prediction_has_no_correlation_and_raises_nothing():
    rows = [{"logits": [0.5], "labels": float(number)} for number in range(10)]
    scores = measure(Fixed(), rows, stack, task="sequence-regression")
    assert math.isnan(scores["pearson"].value)
    assert scores["pearson"].stderr is None


def test_two_rows_say_nothing_of_a_correlations_error():
    rows = [{"logits": [0.5], "labels": 1.5}, {"logits": [0.7], "labels": 1.0}]
    scores = measure(Fixed(), rows, stack, task="sequence-regression")
    assert (scores["pearson"].value, scores["pearson"].stderr) == (pytest.approx(-1), None)


def test_one_row_has_no_correlation_and_raises_nothing():
    scores = measure(Fixed(), [{"logits": [0.5], "labels": 1.5}], stack, task="sequence-regression")
    assert scores["loss"].value == pytest.approx(1)
    assert math.isnan(scores["pearson"].value)
    assert math.isnan(scores["spearman"].value)
    assert all(score.stderr is None for score in scores.values())


def test_resampling_gives_the_same_errors_every_time():
    rows = classified(50)
    first, second = (measure(Fixed(), rows, stack, task="sequence-classification") for _ in range(2))
    assert first == second


def test_measuring_disturbs_neither_mode_nor_generators():
    model = small_models.llama().train()
    model.lm_head.eval()  # as one that is frozen
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    measure(model, prompts(), collate, task="causal-lm")
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not model.eval().training
    measure(model, prompts(), collate, task="causal-lm")
    assert not any(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


class ShortOfLogits(nn.Module):
    """A model whose outputs no loss can be computed of."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.weight.expand(*input_ids[:, :-2].shape, 4))


def test_an_error_amid_the_rows_leaves_no_mode_behind():
    """Whoever keeps the error, as a notebook does, keeps all frames that it came through."""
    model = ShortOfLogits().train()
    with pytest.raises(RuntimeError) as kept:
        measure(model, prompts(), collate, task="causal-lm")
    assert kept.tb is not None
    assert (torch.is_grad_enabled(), model.training) == (True, True)


class NoNumber(nn.Module):
    """A model whose outputs are nan."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), math.nan))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, 64))


def test_of_a_loss_that_is_no_number_the_perplexity_is_none():
    scores = measure(NoNumber(), prompts(), collate, task="causal-lm")
    assert math.isnan(scores["loss"].value)
    assert math.isnan(scores["perplexity"].value)


def test_progress_is_told_of_every_batch(llama):
    told = []
    measure(llama, prompts(), collate, task="causal-lm", batch_size=4, on_batch=lambda *numbers: told.append(numbers))
    assert told == [(4, 11), (8, 11), (11, 11)]
