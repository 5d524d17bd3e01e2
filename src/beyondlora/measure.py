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
from functools import partial
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
    """One figure, its standard error (None where the rows allow none) and the number of rows behind it."""

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
    batches = _batches(model, rows, collator, batch_size, bf16, on_batch)
    logits, labels = _gathered(((batch_logits.float(), batch_labels) for batch_logits, batch_labels in batches), rows)
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
    return _gathered(map(_token_losses, _batches(model, rows, collator, batch_size, bf16, on_batch)), rows)


def _batches(
    model: torch.nn.Module,
    rows: Any,
    collator: Callable[..., Any],
    batch_size: int,
    bf16: bool,
    on_batch: Callable[[int, int], None] | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the (logits, labels) of each batch of this process's rows."""
    device = next(model.parameters()).device
    mine: Any = Subset(rows, processes.share(len(rows)))
    # A loader draws a seed for its workers from the global generator unless it has its own.
    loader: DataLoader[Any] = DataLoader(
        mine, batch_size=batch_size, collate_fn=collator, generator=torch.Generator().manual_seed(0)
    )
    done = 0
    with inference(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            labels = inputs.pop("labels")
            yield model(**inputs).logits, labels
            done += len(labels)
            if on_batch:
                on_batch(done, len(mine))


def moved(model: Any, device: torch.device) -> Any:
    """A model where it is to run; one in 8 or 4 bits was loaded there, and refuses to be moved."""
    return model if getattr(model, "hf_quantizer", None) is not None else model.to(device)


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Neither dropout nor gradients; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _token_losses(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The (summed loss in nats, number of scored tokens) of each row of a batch."""
    logits, labels = batch
    logits = logits[:, -labels.shape[1] :]  # a method with virtual tokens puts them in front
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return precise(nll).sum(dim=1), (targets != -100).sum(dim=1)


def _gathered(pairs: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of tensors a batch, as two tensors over all rows, those of the other processes included."""
    first, second = (torch.cat([part.cpu() for part in parts]) for parts in zip(*pairs, strict=True))
    return processes.gathered(first, len(rows)), processes.gathered(second, len(rows))


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
    perplexity = math.exp(loss.value) if loss.value < 700 else math.inf
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
        "accuracy": Measurement(accuracy, math.sqrt(accuracy * (1 - accuracy) / count), count),
    }
    if resample:
        from sklearn.metrics import f1_score, matthews_corrcoef

        with warnings.catch_warnings():  # all rows of one class: the figures are 0, which needs no advice
            warnings.simplefilter("ignore")
            scores["matthews"] = _jackknifed(matthews_corrcoef, true, predicted)
            scores["f1_macro"] = _jackknifed(partial(f1_score, average="macro", zero_division=0), true, predicted)
    return scores


def _jackknifed(statistic: Callable[..., float], true: np.ndarray, predicted: np.ndarray) -> Measurement:
    """A statistic of a confusion matrix; its error by leaving out each row in turn, once for all rows of a cell."""
    cells, counts = np.unique(np.stack([true, predicted]), axis=1, return_counts=True)
    count, value = len(true), float(statistic(true, predicted))
    if count < 2:
        return Measurement(value, None, count)
    cell_numbers = range(len(counts))
    without_one = np.array([statistic(*cells, sample_weight=counts - np.eye(len(counts))[i]) for i in cell_numbers])
    mean = np.average(without_one, weights=counts)
    variance = (count - 1) / count * (counts * (without_one - mean) ** 2).sum()
    return Measurement(value, math.sqrt(variance), count)


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

    with warnings.catch_warnings():  # a constant sample has no correlation: it gives nan, which is left out below
        warnings.simplefilter("ignore")
        value = float(statistic(true, predicted))
        stderr = None
        if len(true) > 1:
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
    return Measurement(value, stderr if stderr is not None and math.isfinite(stderr) else None, len(true))


def as_dict(scores: Measurements) -> dict[str, dict[str, Any]]:
    """Measurements as plain mappings, for JSON."""
    return {name: asdict(score) for name, score in scores.items()}
