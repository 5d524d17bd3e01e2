"""Weighted sums of adapters as one adapter, exact where the core is linear.

ΔW = Σ w_i s_i B_i A_i is one product of stacked factors, [w_1 s_1 B_1, …] · [A_1; …], which an adapter whose rank is
the sum of the ranks holds exactly. A nonlinear core has no such form: the sum of two branches is no branch.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..targets import fits
from .experts import ExpertLinear, parameter_name
from .layer import AdapterLayer


def combined_config(layers: dict[str, AdapterLayer], adapters: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """The fields of the sum's config that differ from its parts': the ranks, layer by layer, and no scaling.

    Args:
        layers: the adapted layers of the model.
        adapters: the parts.
        names: of all modules of the model.
    """
    ranks = {
        name: min(sum(layer.adapters[a].rank for a in present), layer.in_features, layer.out_features)
        for name, layer in layers.items()
        if (present := [a for a in adapters if a in layer.adapters])
    }
    experts = {name for name in ranks if isinstance(layers[name].get_base_layer(), ExpertLinear)}
    targets, others = ranks.keys() - experts, [name for name in names if name not in ranks]
    ambiguous = any(fits(other, targets) for other in others)  # a list of names means those that end in one, too
    largest = max(ranks.values())
    return {
        "r": largest,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest},
        "lora_alpha": None,
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": "|".join(map(re.escape, sorted(targets))) if ambiguous else targets,
        "target_parameters": sorted(set(map(parameter_name, experts))) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": False,
    }


def check_combination(
    layers: dict[str, AdapterLayer],
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    new_name: str,
) -> None:
    """Refuse what cannot be summed, before anything is changed. Raises: ValueError."""
    missing = [name for name in adapters if name not in configs]
    if missing:
        raise ValueError(f"adapters={missing} are not on this model; it has {sorted(configs)}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)} must be finite numbers.")
    if new_name in configs:
        raise ValueError(f"adapter_name={new_name!r} is taken; delete that adapter first, or choose another name.")
    if not new_name or "." in new_name or hasattr(nn.ModuleDict, new_name):
        raise ValueError(f"adapter_name={new_name!r} cannot be the name of a module in torch; choose another one.")
    for name in adapters:
        kept = [f for f in ("modules_to_save", "trainable_token_indices") if getattr(configs[name], f)]
        if kept or configs[name].bias != "none":
            raise ValueError(
                f"Adapter {name!r} trains more than its factors ({', '.join(kept or ['bias'])}), which has no weighted "
                "sum here. Combine adapters without it."
            )
        for layer in layers.values():
            refusal = layer.adapters[name].sum_refusal if name in layer.adapters else None
            if refusal:
                raise ValueError(refusal)


@torch.no_grad()
def combine(layer: AdapterLayer, adapters: Sequence[str], weights: Sequence[float], new_name: str) -> None:
    """Give the layer's new adapter the weighted sum of the others. All are there already."""
    pairs = [
        (weight * up, down)
        for name, weight in zip(adapters, weights, strict=True)
        if name in layer.adapters
        for up, down in [layer.adapters[name].lora_factors()]
    ]
    layer.adapters[new_name].adopt(torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs]))
