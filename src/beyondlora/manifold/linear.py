"""StiefelLinear: a linear layer whose type says that its weight lives on a Stiefel manifold."""

import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stiefel import RETRACTIONS, distance_to_stiefel, polar_retraction, random_stiefel

PRECISE = (torch.float32, torch.float64)
ROUNDING = 1e-5  # largest |YᵀY − I| that float32 leaves
SURELY_NO_ROUNDING = 0.1  # bfloat16 leaves some 1e-3 on factors of any size

# By id: a set of them could not be listed while another thread adds to it.
_live: "weakref.WeakValueDictionary[int, StiefelLinear]" = weakref.WeakValueDictionary()


class StiefelLinear(nn.Linear):
    """``y = x Wᵀ`` with W orthonormal: its columns where it is tall (out >= in), its rows where it is wide.

    Any torch optimizer that owns the weight takes the Riemannian step instead of its Euclidean one (see
    `beyondlora.manifold.riemannian`). There is no bias.

    The weight stays in float32 (or float64): `.to(bfloat16)`, `.half()` and friends move it to the device asked for
    and leave its precision alone. bfloat16 keeps 8 bits: orthonormality is off by 3e-4 as soon as the factor is
    rounded, and most entries do not move in a typical step. DeepSpeed may round it: what it steps is a float32 copy.

    Args:
        in_features: N, size of the last dimension of the input.
        out_features: M, size of the last dimension of the output.
        retraction: "polar" or "exp_map", the way back to the manifold after a step.
        step_scale: factor on every step, dimensionless (gradient scaling sqrt(d / rows), arXiv 2510.01938).
        device: of the weight.
        dtype: float32 or float64; default: torch's default dtype, at least float32.

    Raises: ValueError for an unknown retraction or a dtype below float32.

    >>> layer = StiefelLinear(4, 64)
    >>> distance_to_stiefel(layer.orthonormal) < 1e-6
    tensor(True)
    """

    owned: int | None = None  # the weight that an optimizer has owned when it stepped; a copy's is another one

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the layer known to `live_stiefel_layers`."""
        # __new__ and not __init__: copies and unpickled layers pass through here too. They are found through this
        # dictionary, because an attribute on the Parameter would not survive deepcopy or sharding.
        layer = super().__new__(cls)
        _live[id(layer)] = layer
        return layer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        retraction: str = "polar",
        step_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if retraction not in RETRACTIONS:
            raise ValueError(f"retraction={retraction!r} is unknown; choose one of {sorted(RETRACTIONS)}.")
        if dtype is not None and dtype not in PRECISE:
            raise ValueError(f"dtype={dtype}: a Stiefel factor needs float32 or float64 to stay orthonormal.")
        if dtype is None:  # torch's default dtype may be bfloat16, as while transformers loads a model
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.retraction = retraction
        self.step_scale = step_scale
        self.settled: tuple[int, int] | None = None  # the weight and its version when it was last seen on the manifold

    def reset_parameters(self) -> None:
        """Draw a weight uniformly from the manifold."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            tall = self.orthonormal
            tall.copy_(random_stiefel(*tall.shape, dtype=tall.dtype, device=tall.device))

    def tall(self, matrix: Tensor) -> Tensor:
        """View a matrix of the weight's shape as (rows, R), rows >= R: itself, or transposed where it is wide."""
        return matrix if self.out_features >= self.in_features else matrix.mT

    @property
    def whole_shape(self) -> tuple[int, int]:
        """The weight's shape, of which a process may hold some."""
        return self.out_features, self.in_features

    @property
    def orthonormal(self) -> Tensor:
        """The weight as Y (rows, R) with orthonormal columns, a view."""
        return self.tall(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., N) to (..., M) in the dtype of x; for half-precision inputs a rounded copy of the factor."""
        return self.product(x, self.weight)

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with a weight (M, N)."""
        return F.linear(x, weight.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if converted.dtype in PRECISE or _deepspeed_asks() or _zero_3_is_coming():
                return converted
            return tensor.to(converted.device)

        return super()._apply(keep_precision, recurse)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or back; what is about to be trained is in float32 again, whoever rounded it."""
        if mode:
            self.restore_precision()
        return super().train(mode)

    def restore_precision(self) -> None:
        """Undo ``weight.data = weight.data.to(bfloat16)``, which passes `_apply` by: float32, and on the manifold.

        TRL's SFTTrainer does so to every trainable parameter beside a base in 4 or 8 bits.
        """
        weight = weight_of(self)
        if weight.dtype in PRECISE or weight.is_meta or is_cut_by_zero(weight) or is_cut_by_fsdp(self):
            return  # their own copies are in float32
        if _zero_3_is_coming():
            return
        with torch.no_grad():
            weight.data = self._on_the_manifold(weight.detach())
            if weight.grad is not None:
                weight.grad = weight.grad.to(weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if (
            isinstance(loaded, Tensor)
            and type(loaded) in (Tensor, nn.Parameter)
            and loaded.shape == self.weight.shape == self.whole_shape  # and no part of one
            and not loaded.is_meta
        ):
            state_dict[f"{prefix}weight"] = self._on_the_manifold(loaded.detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _on_the_manifold(self, loaded: Tensor) -> Tensor:
        """A checkpoint's weight in float32 or better; what half precision has rounded off the manifold is put back."""
        precise = loaded.to(torch.promote_types(loaded.dtype, torch.float32))
        Y_MR = self.tall(precise)
        distance = distance_to_stiefel(Y_MR).item()
        if distance <= ROUNDING:
            return precise
        if distance < SURELY_NO_ROUNDING:
            return self.tall(polar_retraction(Y_MR, torch.zeros_like(Y_MR))).contiguous()
        warnings.warn(
            f"A weight that should be orthonormal was loaded and is off by {distance:.2g}: the checkpoint was not "
            "trained on the Stiefel manifold. It computes as it is; training or merging it is refused.",
            stacklevel=2,
        )
        return precise

    def extra_repr(self) -> str:
        """Sizes, retraction and step scale for `repr`."""
        return f"{super().extra_repr()}, retraction={self.retraction!r}, step_scale={self.step_scale:.4g}"


def live_stiefel_layers() -> dict["StiefelLinear", Any]:
    """Every StiefelLinear alive in this process that has its weight, with it."""
    # A layer whose __init__ raised lives without one for as long as the traceback is kept (notebooks keep the last).
    living = {}
    for reference in _live.valuerefs():
        layer = reference()
        if layer is not None and (weight := weight_of(layer)) is not None:
            living[layer] = weight
    return living


def _deepspeed_asks() -> bool:
    """Whether DeepSpeed is casting a model: it wants one dtype of all weights, and steps float32 copies of its own."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "deepspeed.runtime.engine":
            return True
    return False


def _zero_3_is_coming() -> bool:
    """Whether transformers trains under ZeRO 3 in this process: there others cast what DeepSpeed will step."""
    known = sys.modules.get("transformers.integrations.deepspeed")
    return known is not None and bool(known.is_deepspeed_zero3_enabled())


def is_cut_by_zero(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO trains the weight through a partition: it leaves marks on parameters, 3 and 1 or 2."""
    return hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")


def is_cut_by_fsdp(layer: StiefelLinear) -> bool:
    """Whether FSDP1 trains the weight through a flat parameter, of which there is a part here."""
    weight = layer.__dict__["_parameters"].get("weight")
    # Of its two ways one sets a view of the flat parameter beside the module's parameters, one leaves a part there.
    return weight.dim() == 1 if weight is not None else "weight" in layer.__dict__


def weight_of(layer: StiefelLinear) -> Any:
    """`layer.weight`, or None, past `nn.Module.__getattr__`: a step of 300 layers asks ten times each."""
    try:
        return layer.__dict__["_parameters"]["weight"]
    except KeyError:  # FSDP1, a parametrization, a layer whose __init__ raised
        return getattr(layer, "weight", None)
