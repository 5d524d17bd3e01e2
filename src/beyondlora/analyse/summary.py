"""Profiles as plain mappings, their averages over layers, and two adapters' profiles beside each other."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from .profiles import LayerProfile
from .spectra import normalised, principal_angles

FIGURES = (
    "effective_rank",
    "manifold_dimension",
    "stable_rank",
    "nonlinear_share",
    "dead_units",
    "saturated",
    "saturated_units",
)


def as_mapping(layer: LayerProfile) -> dict[str, Any]:
    """A profile for JSON; without the directions, which are as large as the adapter."""
    mapping = {field.name: getattr(layer, field.name) for field in fields(layer) if "directions" not in field.name}
    mapping["singular_values"] = layer.singular_values.tolist()
    mapping["splines"] = [vars(spline) for spline in layer.splines]
    if layer.update is not None:
        mapping["update"] = vars(layer.update) | {"singular_values": layer.update.singular_values.tolist()}
    return mapping


def mean_of(layers: Sequence[LayerProfile]) -> dict[str, Any]:
    """Averages over the layers that have a spectrum; of the spectra, that of the normalised ones."""
    described = [layer for layer in layers if layer.effective_rank is not None]
    longest = max(len(layer.singular_values) for layer in described)
    spectra = torch.zeros(len(described), longest, dtype=torch.float64)
    for spectrum, layer in zip(spectra, described, strict=True):
        spectrum[: len(layer.singular_values)] = normalised(layer.singular_values)
    ranks = [layer.rank for layer in described if layer.rank is not None]
    return {
        "layers": len(described),
        "left_out": [layer.name for layer in layers if layer.effective_rank is None],
        "tokens": min(layer.tokens for layer in described),
        "rank": sum(ranks) / len(ranks) if ranks else None,
        "spectrum": spectra.mean(dim=0).tolist(),
        "effective_rank_deviation": _deviation([float(layer.effective_rank or 0) for layer in described]),
        **{name: _mean([getattr(layer, name) for layer in described]) for name in FIGURES},
        "update_effective_rank": _mean(
            [None if layer.update is None else layer.update.effective_rank for layer in described]
        ),
        "orthonormality": max(
            (distance for layer in layers for distance in (layer.orthonormality or {}).values()), default=None
        ),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def compare_subspaces(a: Sequence[LayerProfile], b: Sequence[LayerProfile]) -> dict[str, Any]:
    """How far two adapters write into the same directions of each layer they share, and read from the same.

    In each layer the k leading output directions of both, k the smaller of their manifold dimensions. The overlap is
    the mean cos² of the k principal angles: 1 = the same subspace, and k / M is what two random ones have on average.
    The same of the k leading input directions, k the smaller number of those that a `LayerProfile` holds.
    """
    theirs = {layer.name: layer for layer in b}
    pairs = [(layer, theirs[layer.name]) for layer in a if layer.name in theirs]
    rows = [row for row in (_compare(mine, other) for mine, other in pairs) if row is not None]
    return {
        "overlap": _mean([row["overlap"] for row in rows]),
        "chance": _mean([row["chance"] for row in rows]),
        "input_overlap": _mean([row["inputs"] and row["inputs"]["overlap"] for row in rows]),
        "input_chance": _mean([row["inputs"] and row["inputs"]["chance"] for row in rows]),
        "layers": rows,
    }


def _compare(a: LayerProfile, b: LayerProfile) -> dict[str, Any] | None:
    if a.manifold_dimension is None or b.manifold_dimension is None:
        return None
    k = min(a.manifold_dimension, b.manifold_dimension)
    return {"name": a.name, **_between(a.directions[:, :k], b.directions[:, :k]), "inputs": _compare_inputs(a, b)}


def _compare_inputs(a: LayerProfile, b: LayerProfile) -> dict[str, Any] | None:
    if a.input_directions is None or b.input_directions is None:
        return None
    k = min(a.input_directions.shape[1], b.input_directions.shape[1])
    return _between(a.input_directions[:, :k], b.input_directions[:, :k])


def _between(A_Mk: torch.Tensor, B_Mk: torch.Tensor) -> dict[str, Any]:
    angles = principal_angles(A_Mk, B_Mk)
    return {
        "k": A_Mk.shape[1],
        "overlap": angles.cos().square().mean().item(),
        "chance": A_Mk.shape[1] / len(A_Mk),
        "angles_degrees": angles.rad2deg().tolist(),
    }
