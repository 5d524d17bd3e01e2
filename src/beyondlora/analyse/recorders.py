"""Listeners on the layers of a model: they see the tokens pass and keep triangular factors and counts, no outputs.

Legend: T tokens, N inputs, M outputs, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.bspline import Spline
from ..padding import token_rows
from ..precise import precise
from .branches import Branch, Whole
from .spectra import CentredQR

FOR_ADAPTERS = {"adapter_names", "alora_offsets"}  # what PEFT's layers are told and do not pass on
FLAT = 0.01  # an activation whose slope is below this lets next to no change through: it is saturated


class Tokens:
    """Which rows of what passes a layer are tokens: padding is none, and no more are taken than wanted.

    Attributes:
        mask: the batch's attention mask (B, L), bool, or None.
        wanted: tokens a layer looks at, at most.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.mask: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """The tokens among (..., C), as (T, C)."""
        return token_rows(x, self.mask)


class BranchRecorder:
    """Follows what enters an up-projection, and what enters the core before it where that is nonlinear."""

    def __init__(self, branch: Branch, tokens: Tokens) -> None:
        self.branch, self.tokens = branch, tokens
        self.qr = CentredQR(branch.rank * (2 if branch.nonlinear else 1))
        self.activations: list[ActivationRecorder] = []
        self.splines: list[SplineRecorder] = []
        self._entered: Tensor | None = None
        self._handles = [branch.up.register_forward_pre_hook(self._at_up)]
        if branch.core is not None and branch.nonlinear:
            self._handles.append(branch.core.register_forward_pre_hook(self._at_core))
        for module in branch.core.modules() if branch.core is not None else ():
            self._listen(module)

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self.qr.rows

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _listen(self, module: nn.Module) -> None:
        recorder: Any
        if isinstance(module, Spline):
            recorder = SplineRecorder(module, self.tokens)
            self.splines.append(recorder)
        elif _is_activation(module):
            recorder = ActivationRecorder(module, self.tokens)
            self.activations.append(recorder)
        else:
            return
        self._handles.append(module.register_forward_pre_hook(recorder))

    def _at_core(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = args[0]

    def _at_up(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        parts = [args[0]] if self._entered is None else [self._entered, args[0]]
        rows = torch.cat([self.tokens.rows(part) for part in parts], dim=1)
        self.qr.add(rows[: self.tokens.wanted - self.seen])
        self._entered = None


class WholeRecorder:
    """Follows the output of a layer with its adapter minus that of its base layer alone."""

    def __init__(self, whole: Whole, tokens: Tokens) -> None:
        self.whole, self.tokens = whole, tokens
        self.qr = CentredQR(whole.width)
        self._handle = whole.layer.register_forward_hook(self._after, with_kwargs=True)

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self.qr.rows

    def stop(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if torch.finfo(output.dtype).bits < 32:
            raise ValueError(
                f"{self.whole.name}: this method's outputs are known only as a difference of two, and in "
                f"{output.dtype} it is mostly rounding. Load the base in float32 (`dtype: float32` in a recipe)."
            )
        meant_for_base = {name: value for name, value in kwargs.items() if name not in FOR_ADAPTERS}
        difference = precise(output) - precise(module.base_layer(*args, **meant_for_base))
        self.qr.add(self.tokens.rows(difference)[: self.tokens.wanted - self.seen])


class ActivationRecorder:
    """Counts, for each unit, on how many tokens an element-wise activation is flat."""

    def __init__(self, activation: nn.Module, tokens: Tokens) -> None:
        self._function: Callable[[Tensor], Tensor] = activation.forward  # not the module: its hooks would call us again
        self.tokens = tokens
        self.flat: Tensor | int = 0
        self.seen = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Count what enters (a forward pre-hook)."""
        with torch.enable_grad():
            z_TR = self.tokens.rows(args[0].detach()).requires_grad_()
            (slope_TR,) = torch.autograd.grad(self._function(z_TR).sum(), z_TR)
        self.flat = self.flat + (slope_TR.abs() < FLAT).sum(dim=0)
        self.seen += len(z_TR)


class SplineRecorder:
    """Counts where the inputs of a spline fall on its grid."""

    def __init__(self, spline: Spline, tokens: Tokens) -> None:
        self.spline, self.tokens = spline, tokens
        self.counts: Tensor | int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Count what enters (a forward pre-hook)."""
        self.counts = self.counts + self.spline.occupancy(self.tokens.rows(args[0]))


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is a leaf without weights that does something to every entry by itself."""
    bare = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return bare and not isinstance(module, (nn.Identity, nn.Dropout))
