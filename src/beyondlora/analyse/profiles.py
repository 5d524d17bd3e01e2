"""A model and batches in, one `LayerProfile` for each adapted layer out.

>>> layers = profile(model, batches, max_tokens=4096)
>>> layers[0].effective_rank
5.7
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..manifold.stiefel import distance_to_stiefel
from ..padding import without_padding
from ..precise import precise
from ..tuner.experts import has_open_experts
from .branches import Branch, Whole, find_branches
from .recorders import BranchRecorder, Tokens, WholeRecorder
from .spectra import (
    effective_rank,
    factored_singular_values,
    manifold_dimension,
    nearest_affine,
    product_svd,
    stable_rank,
    unexplained_share,
)

MAX_TOKENS = 16_384
DEAD = 1e-3  # a unit whose part in the outputs varies less than this beside the strongest unit's is dead
CURVE_POINTS = 101


@dataclass(frozen=True)
class SplineProfile:
    """Where a spline's inputs fell, and what it has learned.

    Attributes:
        grid: (G + 1,) the edges of its intervals.
        occupancy: (G + 2,) the shares of inputs below the grid, in each interval, and beyond it.
        z, curves: (P,) and (P, R): what one component at z adds to each output (pooled), or to its own (per_dim).
    """

    grid: list[float]
    occupancy: list[float]
    z: list[float]
    curves: list[list[float]]


@dataclass(frozen=True)
class UpdateProfile:
    """The exact spectrum of the weight update ΔW, from its factors.

    Attributes:
        form: "exact", or "static" where ΔW is another function of the input than the one trained.
    """

    form: str
    singular_values: Tensor
    effective_rank: float | None
    stable_rank: float | None


@dataclass(frozen=True)
class LayerProfile:
    """What one adapted layer does on the tokens it saw. Figures are None where they are not defined.

    Attributes:
        name: of the layer in the base model.
        rank: R, the rank limit; None where outputs pass through no bottleneck.
        tokens: how many it saw.
        singular_values: of the centred outputs (tokens × M), descending; none where the outputs do not vary.
        effective_rank, manifold_dimension, stable_rank: of those.
        nonlinear_share: of the outputs' variance, what no affine function of the bottleneck's input explains.
        dead_units: share of the units whose part in the outputs varies less than DEAD beside the strongest one's.
        saturated: share of (token, unit) at which an activation of the core is flat, slope below 0.01.
        saturated_units: share of the units that are flat on 99 % of the tokens or more.
        orthonormality: of each Stiefel factor Y, max |YᵀY − I|.
        directions: (M, k) orthonormal: where in output space the outputs go, strongest first.
        input_directions: (N, k) orthonormal: what of the input reaches them, strongest first: the right singular
            vectors of the weight update or, where the branch is nonlinear, of the affine map nearest to it on these
            tokens. As many as make up 90 % of its squared singular values; None where outputs pass no bottleneck.
    """

    name: str
    rank: int | None
    tokens: int
    singular_values: Tensor
    directions: Tensor
    input_directions: Tensor | None = None
    effective_rank: float | None = None
    manifold_dimension: int | None = None
    stable_rank: float | None = None
    nonlinear_share: float | None = None
    dead_units: float | None = None
    saturated: float | None = None
    saturated_units: float | None = None
    orthonormality: dict[str, float] | None = None
    update: UpdateProfile | None = None
    splines: tuple[SplineProfile, ...] = ()


@torch.no_grad()
def profile(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = MAX_TOKENS,
    on_tokens: Callable[[int, int], None] | None = None,
) -> list[LayerProfile]:
    """Run batches through a model with one active adapter and describe what it adds to each layer.

    Dropout is off while it runs; the model's mode is put back. Padding is left out where a batch has an attention mask.

    Args:
        batches: keyword arguments of the model's forward.
        max_tokens: the first so many of each layer, at least 2.
        on_tokens: called with (tokens done, max_tokens) after each batch.

    Returns: one profile a layer, in the model's order; layers that saw fewer than 2 tokens have no figures.
    Raises: ValueError for a merged, disabled, broken or absent adapter, for several at once, and where no layer has a
        spectrum.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: the outputs are centred, so a spectrum needs at least 2 tokens.")
    branches, tokens = find_branches(model), Tokens(max_tokens)
    _check_finite(branches)
    recorders = [BranchRecorder(b, tokens) if isinstance(b, Branch) else WholeRecorder(b, tokens) for b in branches]
    try:
        with _evaluating(model):
            _run(model, batches, tokens, recorders, on_tokens)
    finally:
        for recorder in recorders:
            recorder.stop()
    for branch, recorder in zip(branches, recorders, strict=True):
        _check_passed(branch.name, recorder)
    layers = [_describe(recorder) for recorder in recorders]
    _check_any(layers)
    return layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _run(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    tokens: Tokens,
    recorders: list[Any],
    on_tokens: Callable[[int, int], None] | None,
) -> None:
    device = next(model.parameters()).device
    if has_open_experts(model):
        batches = without_padding(batches)
    for batch in batches:
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        mask = inputs.get("attention_mask")
        tokens.mask = None if mask is None else mask.bool()
        model(**inputs)
        done = max(recorder.seen for recorder in recorders)
        if on_tokens:
            on_tokens(done, tokens.wanted)
        if done >= tokens.wanted:
            break


def _check_finite(branches: list[Branch | Whole]) -> None:
    for branch in branches:
        if not all(torch.isfinite(weight).all() for weight in branch.weights()):
            raise ValueError(
                f"{branch.name}: the adapter's weights are not finite (nan or infinity); it is broken. Analyse one "
                "saved before, or train again at a smaller learning rate."
            )


def _check_passed(name: str, recorder: BranchRecorder | WholeRecorder) -> None:
    if not torch.isfinite(recorder.qr.factor()).all():
        raise ValueError(
            f"{name}: what passes here is not finite on this data (nan or infinity), and the adapter's weights are: "
            "the base model is broken, or overflows in half precision. Load it in float32 (recipe: `dtype: float32`)."
        )


def _check_any(layers: list[LayerProfile]) -> None:
    if all(layer.effective_rank is not None for layer in layers):
        return
    if all(layer.tokens < 2 for layer in layers):
        raise ValueError(
            f"No adapted layer saw two tokens of this data ({layers[0].name}, ...): give more rows, or rows that reach "
            "these layers."
        )
    if all(layer.effective_rank is None for layer in layers):
        raise ValueError(
            "The adapter's outputs do not vary on this data in any layer: it is untrained (its up-projection is still "
            "zero), or its weights were not loaded."
        )


# --- from what was recorded to figures -------------------------------------------------------------------------------


def _describe(recorder: BranchRecorder | WholeRecorder) -> LayerProfile:
    return _describe_branch(recorder) if isinstance(recorder, BranchRecorder) else _describe_whole(recorder)


def _describe_whole(recorder: WholeRecorder) -> LayerProfile:
    _, sigma, Vh = torch.linalg.svd(recorder.qr.factor(), full_matrices=False)
    return LayerProfile(
        recorder.whole.name, None, recorder.seen, sigma, Vh.mT, **(_shape(sigma) if recorder.seen > 1 else {})
    )


def _describe_branch(recorder: BranchRecorder) -> LayerProfile:
    branch, F_KC = recorder.branch, recorder.qr.factor()
    W_MR = precise(branch.up.weight) * branch.scaling
    distances = {name: distance_to_stiefel(f.orthonormal).item() for name, f in branch.orthonormal.items()}
    sigma, directions_Mk = product_svd(F_KC[:, -branch.rank :], W_MR)
    figures: dict[str, Any] = {}
    if recorder.seen > 1:
        figures = _shape(sigma) | _units(F_KC[:, -branch.rank :], W_MR) | _saturation(recorder)
        if branch.nonlinear:
            figures["nonlinear_share"] = unexplained_share(F_KC, W_MR)
        figures["input_directions"] = _inputs(branch, F_KC, W_MR)
        figures["splines"] = tuple(_describe_spline(s.spline, s.counts) for s in recorder.splines)
    return LayerProfile(
        branch.name,
        branch.rank,
        recorder.seen,
        sigma,
        directions_Mk,
        orthonormality=distances or None,
        update=_describe_update(branch),
        **figures,
    )


def _inputs(branch: Branch, F_KC: Tensor, W_MR: Tensor) -> Tensor | None:
    """What of the input the branch, or the affine map nearest to it, lets through, strongest first."""
    P_MR, Q_RN = W_MR, branch.down
    if branch.nonlinear:
        P_MR = W_MR @ nearest_affine(F_KC, branch.rank)
    elif branch.update is not None:
        P_MR, Q_RN = branch.update
    sigma, directions_Nk = product_svd(torch.linalg.qr(precise(P_MR), mode="r").R, Q_RN.mT)
    return directions_Nk[:, : manifold_dimension(sigma)] if sigma.any() else None


def _shape(sigma: Tensor) -> dict[str, Any]:
    if not sigma.any():
        return {}
    return {
        "effective_rank": effective_rank(sigma),
        "manifold_dimension": manifold_dimension(sigma),
        "stable_rank": stable_rank(sigma),
    }


def _units(F_KR: Tensor, W_MR: Tensor) -> dict[str, float]:
    """A unit's part in the outputs is its column of H times its column of W: their norms multiply."""
    parts_R = torch.linalg.vector_norm(F_KR, dim=0) * torch.linalg.vector_norm(W_MR, dim=0)
    return {"dead_units": (parts_R <= DEAD * parts_R.max()).float().mean().item()}


def _saturation(recorder: BranchRecorder) -> dict[str, float]:
    if not recorder.activations or not all(activation.seen for activation in recorder.activations):
        return {}
    shares_R = torch.stack([torch.as_tensor(a.flat) / a.seen for a in recorder.activations])
    return {
        "saturated": shares_R.mean().item(),
        "saturated_units": (shares_R >= 0.99).float().mean().item(),
    }


def _describe_update(branch: Branch) -> UpdateProfile | None:
    if branch.update is None or branch.update_form is None:
        return None
    sigma = factored_singular_values(*branch.update)
    return UpdateProfile(
        branch.update_form,
        sigma,
        effective_rank(sigma) if sigma.any() else None,
        stable_rank(sigma) if sigma.any() else None,
    )


def _describe_spline(spline: Any, counts: Tensor | int) -> SplineProfile:
    low, high = spline.grid_range
    reach = spline.order * (high - low) / spline.grid_size  # beyond it every basis function is zero
    z = torch.linspace(low - reach, high + reach, CURVE_POINTS, device=spline.weight.device)
    shares = precise(torch.as_tensor(counts))
    return SplineProfile(
        grid=torch.linspace(low, high, spline.grid_size + 1).tolist(),
        occupancy=(shares / shares.sum()).tolist(),
        z=z.tolist(),
        curves=spline.curves(z).tolist(),
    )
