"""Adapter: x ↦ s · up(core(down(x))), the one space in which every method is a point.

A frozen linear layer's output W0 x + b becomes W0 x + b + adapter(x). With an identity core this is LoRA.
Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .brief import call, is_brief, weight_of
from .fused import Beside, Middle, add_up, autocast_dtype, drawn, dropped_linear, has_hooks, is_idle, operands
from .reading import Reading


class Adapter(nn.Module):
    """The branch beside a frozen linear layer: down-projection (N → R), core (R → R), up-projection (R → M).

    Args:
        down: maps (T, N) to (T, R).
        core: maps (T, R) to (T, R); `nn.Identity()` gives LoRA.
        up: maps (T, R) to (T, M).
        scaling: s, dimensionless.
        dropout: probability p in [0, 1) with which an input feature is dropped in training.
        reading: how `down` meets the input of an embedding or a convolution; None beside a linear layer.

    >>> linear, adapter = nn.Linear(8, 6), Adapter(down=nn.Linear(8, 2, bias=False), up=nn.Linear(2, 6, bias=False))
    >>> (linear(x) + adapter(x)).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        *,
        down: nn.Linear,
        up: nn.Linear,
        core: nn.Module | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.down, self.core, self.up = down, core if core is not None else nn.Identity(), up
        self.scaling = scaling
        self.reading = reading
        self.dropout: nn.Module = dropout_layer(dropout if reading is None or reading.drops_features else 0.0)

    @property
    def rank(self) -> int:
        """R, the width of the bottleneck."""
        return self.down.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the down-projection's weight, and of the inputs that it wants."""
        down: Any = self._modules["down"]
        return weight_of(down).dtype

    def parts(self) -> dict[str, nn.Module]:
        """The modules that hold the trainable weights, each in `.weight`, by the paper's letter."""
        return {"A": self.down, "B": self.up}

    def replace(self, part: nn.Module, by: nn.Module) -> None:
        """Call another module in place of a part from now on: a wrapper around it, such as FSDP's."""
        for module in list(self.modules()):
            for name, child in module._modules.items():
                if child is part:
                    module._modules[name] = by

    def forward(self, x_TN: Tensor) -> Tensor:
        """Map inputs (..., N) to the addition to the layer's output (..., M)."""
        return self.write(self.up(self.hidden(x_TN))) * self.scaling

    def hidden(self, x_TN: Tensor) -> Tensor:
        """What the up-projection sees, (..., R)."""
        return self.core(self.read(self.dropout(x_TN)))

    def hidden_fused(self, x_TN: Tensor) -> Tensor:
        """The same without a copy of x, dropout's mask drawn anew."""
        return self.core(dropped_linear(x_TN, self.down, self.input_dropout))

    def hidden_briefly(self, x_TN: Tensor) -> Tensor:
        """The same in as few calls as can be, beside a linear layer and without gradients."""
        parts: Any = self._modules
        return call(parts["core"], call(parts["down"], call(parts["dropout"], x_TN)))

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        dropout: Any = self._modules["dropout"]
        return not is_idle(dropout)

    @property
    def input_dropout(self) -> nn.Module:
        """The dropout between x and the down-projection."""
        return self.dropout

    def beside(self, base: nn.Module, x_TN: Tensor) -> Tensor | None:
        """base(x) + self(x) in one go where base is a frozen linear layer; otherwise None, and where it does not pay.

        It pays where gradients are wanted. Where dropout is at work it is the way in any case: reentrant checkpointing
        calls a layer without gradients and then with them, and the same must be drawn both times.
        """
        if self.reading is not None or not (torch.is_grad_enabled() or self.drops):
            return None
        parts: Any = self._modules
        dropout = self.input_dropout
        found = operands(x_TN, base, parts["down"], parts["up"], dropout)
        middle = None if found is None else self.middle()
        if found is None or middle is None:
            return None
        y_TM: Tensor = Beside.apply(*found, self.scaling, drawn(dropout, found.x), middle, *middle.extra)
        return y_TM

    def add_to(self, y_TM: Tensor, x_TN: Tensor, *, overwrite: bool = False) -> Tensor:
        """y + self(x), in fewer passes over memory (see `beyondlora.adapters.fused`).

        Args:
            y_TM: the output of the layer so far.
            x_TN: the layer's input.
            overwrite: y was made for the caller and nobody else holds it, so its memory may take the result.
        """
        if self.reading is not None:
            return y_TM + self(x_TN)
        # In half precision branch and sum are rounded once, as where gradients are wanted: ratios of the two must be 1.
        if is_brief(y_TM) and autocast_dtype(y_TM) is None and not (overwrite or self.drops):
            return self.add_briefly(y_TM, x_TN)
        return add_up(y_TM, self.hidden_fused(x_TN), self.up, self.scaling, overwrite=overwrite)

    def add_briefly(self, y_TM: Tensor, x_TN: Tensor) -> Tensor:
        """The same in as few calls as can be, for a y that `is_brief`."""
        up: Any = self._modules["up"]
        return torch.add(y_TM, call(up, self.hidden_briefly(x_TN)), alpha=self.scaling)

    def middle(self) -> Middle | None:
        """The core for `Beside`; None where its gradients are autograd's, or somebody watches it."""
        core: Any = self._modules["core"]
        return Middle() if type(core) is nn.Identity and not has_hooks(core) else None

    def read(self, x_TN: Tensor, weight_RN: Tensor | None = None) -> Tensor:
        """Down-project (..., N), or what `reading` says, to (..., R); with another weight if one is given.

        Raises: ValueError where the weight that is to be read is elsewhere, on disk for example.
        """
        if self.reading is None:
            return self.down(x_TN) if weight_RN is None else F.linear(x_TN, weight_RN)
        self.check_here(x_TN)
        return self.reading.read(x_TN, self.down.weight if weight_RN is None else weight_RN)

    def check_here(self, x_TN: Tensor) -> None:
        """Raise a ValueError where the down-projection's weight is elsewhere, for what reads it and calls no module."""
        if self.down.weight.is_meta and not x_TN.is_meta:
            raise ValueError(
                "The adapter's weights have been offloaded, by accelerate for example, and come back when the modules "
                "that hold them are called. Beside convolutions and embeddings, and in a static form, they are read "
                "and no module is called: keep these layers on a device (device_map)."
            )

    def write(self, y_TM: Tensor) -> Tensor:
        """Give (..., M) the layout of the layer's output."""
        return y_TM if self.reading is None else self.reading.write(y_TM)

    def static_down_weight(self) -> Tensor:
        """The core applied to each column of the down-projection's weight, (R, N); for a linear core, core · down."""
        return self.core(self.down.weight.mT).mT

    def delta_weight(self) -> Tensor:
        """The weight update ΔW (M, N), scaling included: base + ΔW ≡ base + adapter, up to `merge_warning`.

        Raises: ValueError where no such matrix exists (see `merge_refusal`).
        """
        if self.merge_refusal:
            raise ValueError(self.merge_refusal)
        return self.up.weight @ self.static_down_weight() * self.scaling

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The pair (M, R), (R, N) whose product is the weight update ΔW: a LoRA's B, scaling folded in, and its A.

        Raises: ValueError where no such pair exists (see `merge_refusal`).
        """
        if self.merge_refusal:
            raise ValueError(self.merge_refusal)
        return self.up.weight * self.scaling, self.static_down_weight()

    def adopt(self, up_MK: Tensor, down_KN: Tensor) -> None:
        """Become the weight update up · down, whose rank is at most R. Scaling stays as it is.

        Raises: ValueError where the core is not linear (see `sum_refusal`).
        """
        raise ValueError(self.sum_refusal)

    @property
    def picks_columns(self) -> bool:
        """Whether the core sees single columns of the down-projection only, so that any core is a weight update."""
        return self.reading is not None and self.reading.picks_columns

    @property
    def sum_refusal(self) -> str | None:
        """Why a weighted sum of such adapters is not such an adapter; None where it is, and `adopt` works."""
        return (
            f"Cannot combine {type(self).__name__}s: the core is nonlinear, so a weighted sum of branches is not a "
            "branch. Activate the adapters together (model.base_model.set_adapter([...])): their outputs add up."
        )

    @property
    def merge_refusal(self) -> str | None:
        """Why the adapter is not a weight update, and what to do; None where it is one."""
        return None

    @property
    def merge_warning(self) -> str | None:
        """In which way the merged layer differs from the trained one; None where it does not."""
        return None


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or nothing at all for probability 0, as in PEFT's LoRA."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()
