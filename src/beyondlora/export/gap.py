"""How far an exported form is from the live adapter, on real inputs: layer by layer, and at the model's end."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..measure import inference
from ..padding import without_padding
from ..precise import precise
from ..tuner.experts import ExpertLinear, has_open_experts
from ..tuner.layer import AdapterLayer
from . import experts
from .rows import Batch, rows_of, run, watching

OTHERWISE = (
    "PEFT loads another LoRA than was written. In target_modules of some mixtures it takes gate_proj, up_proj and "
    "down_proj for the experts that transformers 4 called so, and leaves the layers of these names out. Train without "
    "these layers, or export the model merged (--to merged)."
)

Adapted = dict[str, tuple[AdapterLayer, Adapter]]
"""Layer path in the base model → (the layer with its adapters, the adapter that is exported)."""


@dataclass(frozen=True)
class Gap:
    """Differences between the live adapter (the truth) and an exported form; 0 = none.

    Attributes:
        layers: path → ‖exported(x) − live(x)‖ / ‖live(x)‖ of the branch, over all tokens x that reach it live; 1 = the
            export is as far off as leaving the adapter out. Empty where the export is no adapter (merged).
        logits_max: largest absolute difference of a logit.
        logits_relative: ‖exported − live‖ / ‖live‖ over all logits.
        adapter_relative: ‖exported − live‖ / ‖live − base‖ over all logits: the share of the adapter's effect that
            is not reproduced.
        top1_agreement: share of tokens (rows) for which the two put the same class first; None where a model's output
            is a single number.
        tokens: how many.
    """

    layers: dict[str, float]
    logits_max: float
    logits_relative: float
    adapter_relative: float
    top1_agreement: float | None
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the largest and the median layer named."""
        content = asdict(self)
        if self.layers:
            largest = max(self.layers, key=lambda path: self.layers[path])
            content["layer_gap"] = {
                "largest": self.layers[largest],
                "largest_in": largest,
                "median": median(self.layers.values()),
            }
        return content

    def beyond_rounding(self, dtype: torch.dtype) -> str | None:
        """Where the difference is more than rounding in a dtype explains; None where it is not."""
        allowed = max(1e-4, 10 * torch.finfo(dtype).eps)
        for place, gap in {**self.layers, "the logits": self.logits_relative}.items():
            if not gap <= allowed:  # nan is beyond, too
                return f"{place}: {gap:.1e} of what the adapter gives, where rounding allows {allowed:.0e}"
        return None


def compare(model: PeftModel, adapted: Adapted, exported: nn.Module, batches: Iterable[Batch]) -> Gap:
    """Run the live model, its base and an exported form on the same batches.

    Args:
        exported: a PeftModel with a plain LoRA beside the same layers.
    """
    layers = {path: layer for path, (layer, _) in adapted.items()}
    branches = {path: _loaded(exported, path, layer) for path, layer in layers.items()}
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    ends = Ends()
    with inference(model, exported):
        for batch in without_padding(batches) if has_open_experts(model) else batches:
            with watching(layers) as seen:
                live = run(model, batch)
            for path, calls in seen.items():
                for x in calls:
                    squares[path] += _squares(adapted[path][1], branches[path], rows_of(x, batch))
            with model.disable_adapter():
                base = run(model, batch)
            ends.add(*(rows_of(logits, batch) for logits in (live, base, run(exported, batch))))
    return ends.gap({path: _ratio(*pair.tolist()) for path, pair in squares.items()})


class Ends:
    """Sums over the logits of batch after batch."""

    def __init__(self) -> None:
        self.difference = self.live = self.effect = self.largest = 0.0
        self.agreed = self.tokens = self.classes = 0

    def add(self, live_TC: Tensor, base_TC: Tensor, exported_TC: Tensor) -> None:
        """Take in the logits of some tokens."""
        live_TC, base_TC, exported_TC = (precise(logits).cpu() for logits in (live_TC, base_TC, exported_TC))
        self.difference += (exported_TC - live_TC).square().sum().item()
        self.live += live_TC.square().sum().item()
        self.effect += (live_TC - base_TC).square().sum().item()
        self.largest = max(self.largest, (exported_TC - live_TC).abs().max().item())
        self.agreed += int((exported_TC.argmax(-1) == live_TC.argmax(-1)).sum())
        self.tokens += len(live_TC)
        self.classes = live_TC.shape[-1]

    def gap(self, layers: Mapping[str, float]) -> Gap:
        """Make the gap of what was taken in."""
        return Gap(
            layers=dict(layers),
            logits_max=self.largest,
            logits_relative=_ratio(self.difference, self.live),
            adapter_relative=_ratio(self.difference, self.effect),
            top1_agreement=self.agreed / self.tokens if self.classes > 1 else None,
            tokens=self.tokens,
        )


def _loaded(exported: nn.Module, path: str, live: AdapterLayer) -> tuple[Tensor, Tensor, float]:
    """B (M, R), A (R, N) and the scaling of the LoRA that PEFT loaded for a layer."""
    base: nn.Module = exported.get_submodule("base_model.model")
    if isinstance(live.get_base_layer(), ExpertLinear):
        return experts.loaded(base, path)
    layer: Any = base.get_submodule(path)
    if not hasattr(layer, "lora_B"):
        raise ValueError(f"{path} got none: {OTHERWISE}")
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.scaling["default"]


def _squares(adapter: Adapter, lora: tuple[Tensor, Tensor, float], x_TN: Tensor) -> Tensor:
    """The summed squares of (exported − live, live) of a branch."""
    live = precise(adapter(x_TN.to(adapter.down.weight.dtype)))
    B_MR, A_RN, scaling = lora
    exported = precise(x_TN.to(A_RN.dtype) @ A_RN.mT @ B_MR.mT) * scaling
    return torch.stack([(exported - live).square().sum(), live.square().sum()]).cpu()


def _ratio(difference: float, whole: float) -> float:
    """The root of a ratio of squares; 0 for 0/0."""
    if difference == 0:
        return 0.0
    return (difference / whole) ** 0.5 if whole else float("inf")
