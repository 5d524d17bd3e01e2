"""Where a PEFT model adds something to its layers, and how wide the bottleneck is that it passes through.

A `Branch` adds scaling · up(hidden): ours and PEFT's plain LoRA. Of any other PEFT layer only the whole output is
known, with the adapter minus without it: a `Whole`, exact too, at a cost that grows with the square of its width.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..manifold.linear import StiefelLinear
from ..tuner.experts import expert_shape, is_experts
from ..tuner.layer import AdapterLayer

# The factor of a whole output is M×M in float64: 128 MiB at this width, and some 0.5 TFLOP for 16k tokens.
WIDEST_WHOLE = 4096


@dataclass(frozen=True)
class Branch:
    """A layer whose adapter adds scaling · up(hidden), hidden (T, R).

    Attributes:
        name: of the layer in the base model.
        up: the up-projection (R → M); what enters it is the hidden.
        down: (R, N) the weight of the down-projection.
        core: what stands between the projections; None where nothing does.
        nonlinear: whether the core makes the hidden nonlinear in the layer's input.
        update: (M, R) and (R, N) whose product is the weight update ΔW, scaling included; None where there is none.
        update_form: "exact", or "static" where ΔW is another function of the input than the one trained.
        orthonormal: the Stiefel factors, by the paper's letter.
    """

    name: str
    up: nn.Linear
    down: Tensor
    scaling: float
    core: nn.Module | None = None
    nonlinear: bool = False
    update: tuple[Tensor, Tensor] | None = None
    update_form: str | None = None
    orthonormal: dict[str, StiefelLinear] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """R, the width of the bottleneck."""
        return self.up.in_features

    def weights(self) -> list[Tensor]:
        """What the adapter computes with."""
        return [self.up.weight, self.down, *(self.core.parameters() if self.core is not None else ())]


@dataclass(frozen=True)
class Whole:
    """A layer of which only the output is known, with the adapter and without."""

    name: str
    layer: Any
    width: int

    def weights(self) -> list[Tensor]:
        """What the adapter computes with."""
        base = {id(weight) for weight in self.layer.get_base_layer().parameters()}
        return [weight for weight in self.layer.parameters() if id(weight) not in base]


def find_branches(model: nn.Module) -> list[Branch | Whole]:
    """Every adapted layer of a model, in the model's order.

    Raises: ValueError for a model without an adapter at work beside a layer, and for layers too wide to be followed.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            name = name.removeprefix("base_model.model.")
            _check_attached(name, module)
            if any(_has(module, adapter) for adapter in module.active_adapters):  # others have adapters at rest alone
                found.append(_branch(name, module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapter beside any of its layers: it was merged, or never given one, or "
            "its method (virtual tokens, say) adapts no layer. Analyse the adapter's own folder, from before merging."
        )
    _check_widths([branch for branch in found if isinstance(branch, Whole)])
    return found


def _check_attached(name: str, layer: Any) -> None:
    if layer.merged:
        raise ValueError(
            f"{name}: the adapter is merged into the base weight, and its outputs can no longer be told from the "
            "base's. Call model.unmerge_adapter() first, or analyse the adapter's own folder."
        )
    if layer.disable_adapters:
        raise ValueError(
            f"{name}: the adapter is disabled and adds nothing. Call model.base_model.enable_adapter_layers()."
        )


def _branch(name: str, layer: Any) -> Branch | Whole:
    active = [adapter for adapter in layer.active_adapters if _has(layer, adapter)]
    if len(active) != 1:
        raise ValueError(
            f"{name}: {len(active)} adapters are active ({', '.join(active)}), and a spectrum is of one. "
            "Choose it with model.set_adapter(name)."
        )
    if isinstance(layer, AdapterLayer):
        return _ours(name, layer.adapters[active[0]])
    if isinstance(layer, ParamWrapper):  # PEFT's LoRA of a mixture's experts computes other weights, no branch
        experts = layer.get_base_layer()
        width = expert_shape(experts, "down_proj")[0] if is_experts(experts) else _width(name, layer)
        return Whole(f"{name.replace('.base_layer', '')}.{layer.parameter_name}", layer, width)
    if isinstance(layer, LoraLayer) and active[0] in layer.lora_A and active[0] not in layer.lora_variant:
        down, up = layer.lora_A[active[0]], layer.lora_B[active[0]]
        if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
            scaling = layer.scaling[active[0]]
            update = (up.weight * scaling, down.weight)
            return Branch(name, up, down.weight, scaling, update=update, update_form="exact")
    return Whole(name, layer, _width(name, layer))


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, kept) for kept in layer.adapter_layer_names)


def _ours(name: str, adapter: Adapter) -> Branch:
    branch = Branch(
        name,
        adapter.up,
        adapter.down.weight,
        adapter.scaling,
        adapter.core,
        nonlinear=bool(adapter.merge_refusal or adapter.merge_warning),
        orthonormal={letter: part for letter, part in adapter.parts().items() if isinstance(part, StiefelLinear)},
    )
    if adapter.merge_refusal:
        return branch
    update = (adapter.up.weight * adapter.scaling, adapter.static_down_weight())
    return dataclasses.replace(branch, update=update, update_form="static" if adapter.merge_warning else "exact")


def _width(name: str, layer: Any) -> int:
    base = layer.get_base_layer()
    width = getattr(base, "out_features", None) or getattr(base, "embedding_dim", None) or getattr(base, "nf", None)
    if width is None:
        raise ValueError(
            f"{name}: beside a {type(base).__name__} this method's outputs are no rows of features, and their spectrum "
            "is not defined here. Leave that layer out of target_modules to analyse the others."
        )
    return int(width)


def _check_widths(layers: list[Whole]) -> None:
    wide = [layer for layer in layers if layer.width > WIDEST_WHOLE]
    if wide:
        gigabytes = max(layer.width for layer in wide) ** 2 * 8 / 2**30
        raise ValueError(
            f"{wide[0].name} and {len(wide) - 1} more: {type(wide[0].layer).__name__} has no bottleneck that its "
            f"outputs pass through, so their spectrum takes a factor as wide as they: {gigabytes:.1f} GiB each, and "
            f"minutes a layer. The limit is {WIDEST_WHOLE} outputs; analyse an adapter of narrower layers."
        )
