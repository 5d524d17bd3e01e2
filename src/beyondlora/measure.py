"""How good a model is, with standard errors: the one evaluator, during training and after it.

`measure` looks at every row by itself and only then averages, so a figure does not depend on the batch size (beyond
float rounding), and its standard error treats rows, not tokens, as the independent draws. Several processes share the
rows out, and each of them gets the figures of all.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from . import processes
from .precise import precise

VERSION = 1  # changes whenever a figure's definition does: figures of two versions do not stand in one table
RESAMPLES = 400  # of the bootstrap; its own error on a standard error is then about 4 %


@dataclass(frozen=True)
class Measurement:
    """One figure (nan where the rows leave it undefined), its standard error (None where they allow none), the rows."""

    value: float
    stderr: float | None
    n: int


Measurements = dict[str, Measurement]
Outcomes = dict[str, np.ndarray]  # name -> one number a row, in the order of the rows


def measure(
    model: torch.nn.Module,
    rows: Any,
    collator: Callable[..., Any],
    *,
    task: str,
    batch_size: int = 8,
    bf16: bool = False,
    resample: bool = True,
    on_batch: Callable[[int, int], None] | None = None,
    on_outcomes: Callable[[Outcomes], None] | None = None,
) -> Measurements:
    """Measure a model on prepared rows; its training mode and every random generator stay as they were.

    Args:
        rows: a dataset of model-ready rows with `labels`.
        collator: makes a batch of a list of rows.
        task: one of `beyondlora.recipe.TASKS`.
        bf16: compute under bfloat16 autocast, as training with `bf16: true` does.
        resample: also the figures whose standard error takes resampling (Matthews, F1, correlations); slower.
        on_batch: called with (rows done, rows in all) after each batch.
        on_outcomes: called once with what every row came to, to compare two models row by row. causal-lm: nll (summed
            over the row), tokens (scored). Classification: loss, correct, predicted, label. Regression: predicted,
            label.

    Returns:
        causal-lm: loss (nats a token), perplexity. Classification: loss, accuracy, matthews, f1_macro.
        Regression: loss (= mean squared error), pearson, spearman.
    """
    told = on_outcomes or (lambda outcomes: None)
    if task == "causal-lm":
        nll, tokens = row_losses(model, rows, collator, batch_size=batch_size, bf16=bf16, on_batch=on_batch)
        told({"nll": nll.numpy(), "tokens": tokens.numpy()})
        return _language_scores(nll, tokens)
    logits, labels = _over_rows(_in_float32, model, rows, collator, batch_size, bf16, on_batch)
    if task == "sequence-regression":
        predicted, true = logits.squeeze(-1).double().numpy(), labels.double().numpy()
        told({"predicted": predicted, "label": true})
        return _regression_scores(predicted, true, resample)
    losses = F.cross_entropy(logits.double(), labels.long(), reduction="none")
    classes = logits.argmax(dim=1)
    outcomes = {"loss": losses, "correct": classes == labels, "predicted": classes, "label": labels}
    told({name: values.numpy() for name, values in outcomes.items()})
    return _classification_scores(logits.double(), labels.long(), resample)


def row_losses(
    model: torch.nn.Module,
    rows: Any,
    collator: Callable[..., Any],
    *,
    batch_size: int = 8,
    bf16: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (summed loss in nats, number of scored tokens) of each row under a causal language model."""
    return _over_rows(_token_losses, model, rows, collator, batch_size, bf16, on_batch)


def _over_rows(
    of: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    model: torch.nn.Module,
    rows: Any,
    collator: Callable[..., Any],
    batch_size: int,
    bf16: bool,
    on_batch: Callable[[int, int], None] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `of` makes of the logits and labels of each batch, over all rows, those of the other processes included."""
    device = next(model.parameters()).device
    mine: Any = Subset(rows, processes.share(len(rows)))
    # A loader draws a seed for its workers from the global generator unless it has its own.
    loader: DataLoader[Any] = DataLoader(
        mine, batch_size=batch_size, collate_fn=collator, generator=torch.Generator().manual_seed(0)
    )
    done, pairs = 0, list[tuple[torch.Tensor, torch.Tensor]]()
    with inference(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            labels = inputs.pop("labels")
            pairs.append(of(model(**inputs).logits, labels))
            done += len(labels)
            if on_batch:
                on_batch(done, len(mine))
    first, second = (torch.cat([part.cpu() for part in parts]) for parts in zip(*pairs, strict=True))
    return processes.gathered(first, len(rows)), processes.gathered(second, len(rows))


def moved(model: Any, device: torch.device) -> Any:
    """A model where it is to run; one in 8 or 4 bits was loaded there, and refuses to be moved."""
    return model if getattr(model, "hf_quantizer", None) is not None else model.to(device)


@contextmanager
def inference(*models: torch.nn.Module) -> Iterator[None]:
    """Neither dropout nor gradients; each module's own mode is put back."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.train(modes[model])  # some do more than to set a flag
        for module, training in modes.items():
            module.training = training


def _in_float32(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.float(), labels


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (summed loss in nats, number of scored tokens) of each row of a batch."""
    logits = logits[:, -labels.shape[1] :]  # a method with virtual tokens puts them in front
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return precise(nll).sum(dim=1), (targets != -100).sum(dim=1)


def per_token(sums: torch.Tensor, tokens: torch.Tensor) -> Measurement:
    """Σ sums / Σ tokens, a ratio of two sums over rows; its error by linearisation (Taylor), rows as clusters."""
    sums, tokens = sums[tokens > 0], tokens[tokens > 0].double()
    count = len(tokens)
    value = (sums.sum() / tokens.sum()).item()
    residuals = sums - value * tokens
    stderr = (
        math.sqrt(count / (count - 1) * residuals.square().sum().item()) / tokens.sum().item() if count > 1 else None
    )
    return Measurement(value, stderr, count)


def _language_scores(nll: torch.Tensor, tokens: torch.Tensor) -> Measurements:
    loss = per_token(nll, tokens)
    perplexity = math.inf if loss.value >= 700 else math.exp(loss.value)
    return {
        "loss": loss,
        "perplexity": Measurement(perplexity, None if loss.stderr is None else perplexity * loss.stderr, loss.n),
        "tokens": Measurement(tokens.double().sum().item(), None, loss.n),
    }


def _classification_scores(logits: torch.Tensor, labels: torch.Tensor, resample: bool) -> Measurements:
    losses = F.cross_entropy(logits, labels, reduction="none").numpy()
    predicted, true = logits.argmax(dim=1).numpy(), labels.numpy()
    count, accuracy = len(true), float((predicted == true).mean())
    scores = {
        "loss": mean_of(losses),
        "accuracy": Measurement(accuracy, math.sqrt(accuracy * (1 - accuracy) / count) if count > 1 else None, count),
    }
    if resample:
        from sklearn.metrics import f1_score, matthews_corrcoef

        with warnings.catch_warnings():  # all rows of one class: the figures are 0, which needs no advice
            warnings.simplefilter("ignore")
            values = matthews_corrcoef(true, predicted), f1_score(true, predicted, average="macro", zero_division=0)
        cells = _Cells.of(true, predicted)
        for name, value, without in zip(("matthews", "f1_macro"), values, (_matthews, _f1_macro), strict=True):
            scores[name] = Measurement(float(value), _jackknifed(without(cells), cells.counts), count)
    return scores


@dataclass(frozen=True)
class _Cells:
    """The cells of a confusion matrix that hold rows, and what its classes (C of them) count."""

    true: np.ndarray  # of each cell: its class's number
    predicted: np.ndarray
    counts: np.ndarray  # of each cell: its rows
    labelled: np.ndarray  # (C,): rows that are of each class,
    named: np.ndarray  # (C,): rows that are said to be,
    right: np.ndarray  # (C,): and rows that are both

    @classmethod
    def of(cls, true: np.ndarray, predicted: np.ndarray) -> "_Cells":
        names, numbers = np.unique(np.stack([true, predicted]), return_inverse=True)
        (t, p), counts = np.unique(numbers.reshape(2, -1), axis=1, return_counts=True)
        labelled, named, right = (
            np.bincount(of, rows, len(names)) for of, rows in ((t, counts), (p, counts), (t, counts * (t == p)))
        )
        return cls(t, p, counts, labelled, named, right)


def _matthews(cells: _Cells) -> np.ndarray:
    """Matthews (Gorodkin's R_K) without one row of each cell; 0 where one side has a single class left."""
    t, p, right = cells.true, cells.predicted, cells.true == cells.predicted
    true_C, predicted_C = cells.labelled, cells.named
    left = cells.counts.sum() - 1.0
    by_chance = true_C @ predicted_C - predicted_C[t] - true_C[p] + right
    spread = np.sqrt(left**2 - (true_C @ true_C - 2 * true_C[t] + 1)) * np.sqrt(
        left**2 - (predicted_C @ predicted_C - 2 * predicted_C[p] + 1)
    )
    agreed = (cells.right.sum() - right) * left
    return np.divide(agreed - by_chance, spread, out=np.zeros_like(spread), where=spread > 0)


def _f1_macro(cells: _Cells) -> np.ndarray:
    """Macro F1 without one row of each cell: over the classes that are still there, in truth or in prediction."""
    t, p, right = cells.true, cells.predicted, cells.true == cells.predicted
    right_C, named_C = cells.right, cells.labelled + cells.named
    f1_C = 2 * right_C / named_C
    total, classes = np.full(len(t), f1_C.sum()), np.full(len(t), float(len(f1_C)))
    # A right row stands twice in its class, a wrong one once in each of two.
    for touched, fewer, where in ((t, 1 + right, True), (p, 1, ~right)):
        named = named_C[touched] - fewer
        f1 = np.divide(2 * (right_C[touched] - right), named, out=np.zeros(len(t)), where=named > 0)
        total += np.where(where, f1 - f1_C[touched], 0)
        classes -= (named == 0) & where
    return np.divide(total, classes, out=np.zeros(len(t)), where=classes > 0)


def _jackknifed(without_one: np.ndarray, counts: np.ndarray) -> float | None:
    """The standard error from a figure without each row in turn, given once for all rows of a cell."""
    count = counts.sum()
    if count < 2:
        return None
    mean = np.average(without_one, weights=counts)
    return math.sqrt((count - 1) / count * (counts * (without_one - mean) ** 2).sum())


def _regression_scores(predicted: np.ndarray, true: np.ndarray, resample: bool) -> Measurements:
    scores = {"loss": mean_of((predicted - true) ** 2)}
    if resample:
        from scipy.stats import pearsonr, spearmanr

        scores["pearson"] = _bootstrapped(lambda t, p: pearsonr(t, p).statistic, true, predicted)
        scores["spearman"] = _bootstrapped(lambda t, p: spearmanr(t, p).statistic, true, predicted)
    return scores


def mean_of(values: np.ndarray) -> Measurement:
    """The mean over rows, and its standard error."""
    count = len(values)
    return Measurement(float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else None, count)


def _bootstrapped(statistic: Callable[..., float], true: np.ndarray, predicted: np.ndarray) -> Measurement:
    """A statistic of paired rows; its error from resampled rows, always the same ones (seed 0)."""
    from scipy.stats import bootstrap

    if len(true) < 2:
        return Measurement(math.nan, None, len(true))
    with warnings.catch_warnings():  # a constant sample has no correlation: it gives nan, which is left out below
        warnings.simplefilter("ignore")
        value = float(statistic(true, predicted))
        resampled = bootstrap(
            (true, predicted),
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        stderr = float(np.nanstd(resampled.bootstrap_distribution, ddof=1))
    known = math.isfinite(stderr) and len(true) > 2  # of two rows every correlation is 1 or -1
    return Measurement(value, stderr if known else None, len(true))


def as_dict(scores: Measurements) -> dict[str, dict[str, Any]]:
    """Measurements as plain mappings, for JSON."""
    return {name: asdict(score) for name, score in scores.items()}
