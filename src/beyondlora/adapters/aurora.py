"""AuroRA (arXiv 2505.18738): an adaptive nonlinear layer between two projectors. branch(x) = s · B · σ(A x).

    σ(z) = F(z) + L(z),   F(z) = act(H · act(z)) fixed,   L a learnable B-spline

Legend: T tokens, N inputs, M outputs, R rank, K = G + k basis functions.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .brief import weight_of
from .bspline import SPLINES, PooledSpline
from .cubic import UniformGrid, adaptive_cubic, all_gradients
from .fused import Middle, autocast_dtype, has_hooks, is_eager
from .products import flat
from .reading import Reading

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}


class AdaptiveNonlinearLayer(nn.Module):
    """σ(z) = act(H · act(z)) + L(z), from (..., R) to (..., R); either term can be left out for ablation.

    Args:
        rank: R.
        activation: "tanh", or "leaky_relu" and "sigmoid" for ablations.
        spline: "pooled" (the paper's shapes) or "per_dim" (the reading of KAN).
        fixed: keep F.
        learnable: keep L.
        grid_size, spline_order, grid_range: of the splines, see `beyondlora.adapters.bspline.bspline_basis`.
        device, dtype: of the weights.

    Raises: ValueError for an unknown activation or spline, or where both terms are left out.
    """

    def __init__(
        self,
        rank: int,
        *,
        activation: str = "tanh",
        spline: str = "pooled",
        fixed: bool = True,
        learnable: bool = True,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {sorted(ACTIVATIONS)}.")
        if spline not in SPLINES:
            raise ValueError(f"spline={spline!r} is unknown; choose one of {sorted(SPLINES)}.")
        if not (fixed or learnable):
            raise ValueError("fixed=False and learnable=False leave nothing of the nonlinear layer; keep one of them.")
        self.activation = ACTIVATIONS[activation]()
        self.H = nn.Linear(rank, rank, bias=False, device=device, dtype=dtype) if fixed else None
        self.spline = (
            SPLINES[spline](
                rank, grid_size=grid_size, order=spline_order, grid_range=grid_range, device=device, dtype=dtype
            )
            if learnable
            else None
        )

    def reset_parameters(self) -> None:
        """H Xavier-normal, spline weights uniform in (−0.1, 0.1)."""
        if self.H is not None:
            nn.init.xavier_normal_(self.H.weight)
        if self.spline is not None:
            self.spline.reset_parameters()

    def forward(self, z_TR: Tensor) -> Tensor:
        """Map (..., R) to (..., R)."""
        return self.closed_form(z_TR) if self.has_closed_form and is_eager() else self.by_definition(z_TR)

    @property
    def has_closed_form(self) -> bool:
        """Both terms, tanh and cubic: the paper's layer, on any grid, while nobody watches its parts being called."""
        parts: Any = self._modules  # `self.H` would search for it
        activation, H, spline = map(parts.get, ("activation", "H", "spline"))
        # The type itself: a wrapper around a part is another.
        if type(H) is not nn.Linear or type(spline) not in SPLINES.values() or not isinstance(activation, nn.Tanh):
            return False
        return bool(spline.order == 3) and not (has_hooks(activation) or has_hooks(H) or has_hooks(spline))

    def closed_form(self, z_TR: Tensor) -> Tensor:
        """The same as `by_definition` in one step that keeps z alone."""
        return in_closed_form(z_TR, *self.closed_form_weights(), self.grid())

    def closed_form_weights(self) -> tuple[Tensor, Tensor]:
        """H (R, R) and the splines' (R, K)."""
        parts: Any = self._modules
        return weight_of(parts["H"]), weight_of(parts["spline"])

    def grid(self) -> UniformGrid:
        """The splines'."""
        spline: Any = self._modules["spline"]
        (low, high), intervals = spline.grid_range, spline.grid_size
        return UniformGrid(low, (high - low) / intervals, intervals, isinstance(spline, PooledSpline))

    def by_definition(self, z_TR: Tensor) -> Tensor:
        """σ(z), term by term."""
        terms = []
        if self.H is not None:
            terms.append(self.activation(self.H(self.activation(z_TR))))
        if self.spline is not None:
            terms.append(self.spline(z_TR))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def in_closed_form(z_TR: Tensor, H_RR: Tensor, W_RK: Tensor, grid: UniformGrid) -> Tensor:
    """tanh(H tanh(z)) plus cubic splines on a grid, (..., R), in float32 at least, whatever z is in."""
    dtype, lower = _at_least_float32(z_TR), autocast_dtype(z_TR)
    with nullcontext() if lower is None else torch.autocast(z_TR.device.type, enabled=False):
        y_TR = adaptive_cubic(flat(z_TR).to(dtype), H_RR.to(dtype), W_RK.to(dtype), grid)
    return y_TR.view(z_TR.shape).to(z_TR.dtype)


class ClosedForm(Middle):
    """σ(z), whose values take too long to be made twice."""

    dear = True

    def __init__(self, core: AdaptiveNonlinearLayer) -> None:
        self.extra, self.grid = core.closed_form_weights(), core.grid()

    def values(self, z_TR: Tensor, *extra: Tensor) -> Tensor:
        """See `Middle.values`."""
        return in_closed_form(z_TR, *extra, self.grid)  # type: ignore[call-arg, arg-type]

    def gradients(self, dh_TR: Tensor, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """See `Middle.gradients`."""
        dtype = _at_least_float32(z_TR)
        dh_TR, rows_TR, H_RR, W_RK = (x.to(dtype) for x in (dh_TR, z_TR, *extra))
        dz_TR, dH_RR, dW_RK = all_gradients(dh_TR, rows_TR, H_RR, W_RK, self.grid)
        return dz_TR.to(z_TR.dtype), dH_RR, dW_RK


def _at_least_float32(z_TR: Tensor) -> torch.dtype:
    return z_TR.dtype if z_TR.dtype == torch.float64 else torch.float32


class AuroraAdapter(Adapter):
    """s · B · σ(A x) with A (R, N), B (M, R) and the adaptive nonlinear layer σ.

    Trained and evaluated dynamically. It merges in the paper's static form ΔW = s · B · σ(A), σ applied to each column
    of A, which is another function of x than the one trained: σ(A) x is not σ(A x). `static_gap` measures how far.
    Beside an embedding x picks a column, and the two are one.

    Args:
        in_features: N.
        out_features: M.
        rank: R >= 1.
        scaling: s, dimensionless.
        dropout: probability in [0, 1) with which an input feature is dropped in training.
        noop_start: True starts at zero (B = 0); False draws B at random.
        reading: see `Adapter`.
        device, dtype: of the weights.
        **nonlinear: passed to `AdaptiveNonlinearLayer`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 2.0,
        dropout: float = 0.0,
        noop_start: bool = True,
        reading: Reading | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **nonlinear: object,
    ) -> None:
        super().__init__(
            down=nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            up=nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype),
            scaling=scaling,
            dropout=dropout,
            reading=reading,
        )
        self.core: AdaptiveNonlinearLayer = AdaptiveNonlinearLayer(rank, device=device, dtype=dtype, **nonlinear)  # type: ignore[arg-type]
        self.reset_parameters(noop_start=noop_start)

    def reset_parameters(self, *, noop_start: bool = True) -> None:
        """A Kaiming-uniform (a = sqrt 5) as in LoRA, σ as it says, B zero or Kaiming-uniform if not `noop_start`."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        self.core.reset_parameters()
        if noop_start:
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.kaiming_uniform_(self.up.weight, a=math.sqrt(5))

    def middle(self) -> Middle | None:
        """See `Adapter.middle`."""
        core: Any = self._modules["core"]
        return ClosedForm(core) if core.has_closed_form and not has_hooks(core) else None

    def parts(self) -> dict[str, nn.Module]:
        """A, B, H and the spline, as far as they exist."""
        parts = {"A": self.down, "B": self.up, "H": self.core.H, "spline": self.core.spline}
        return {letter: module for letter, module in parts.items() if module is not None}

    @torch.no_grad()
    def static_gap(self, x_TN: Tensor) -> float:
        """How far static inference is from dynamic on inputs x (..., N): ‖ΔW x − branch(x)‖ / ‖branch(x)‖, unitless.

        Returns: 0 where they agree, 1 where the difference is as large as the adapter itself, inf or nan for an
        adapter whose output is zero.
        """
        dynamic = self.up(self.core(self.read(x_TN)))
        static = self.up(self.read(x_TN, self.static_down_weight()))
        return (torch.linalg.vector_norm(static - dynamic) / torch.linalg.vector_norm(dynamic)).item()

    @property
    def merge_warning(self) -> str | None:
        """The static form is an approximation, but for embeddings."""
        if self.picks_columns:
            return None
        return (
            "Merging AuroRA folds its static form s·B·σ(A) into the weights: σ(A)x is not σ(Ax), so the merged model "
            "differs from the trained one, sometimes beyond use. Measure it on your data before you rely on it: "
            "`beyondlora export ADAPTER --report`, or AuroraAdapter.static_gap(x) for one layer. `beyondlora export "
            "ADAPTER --distil DATA` fits a nearer LoRA."
        )


class StaticAuroraAdapter(AuroraAdapter):
    """AuroRA-S, static in training too: branch(x) = s · B · σ(A) x. An exact weight update."""

    def hidden(self, x_TN: Tensor) -> Tensor:
        """σ(A) x, (..., R)."""
        self.check_here(x_TN)
        return self.read(self.dropout(x_TN), self.static_down_weight())

    hidden_fused = hidden_briefly = hidden

    def replace(self, part: nn.Module, by: nn.Module) -> None:
        """See `Adapter.replace`. Raises: ValueError for FSDP1's wrapper around one part."""
        if type(by).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FSDP1 has wrapped a single module of AuroRA's static form, which reads weights and never calls the "
                "modules that hold them, so nothing would put this one's weight together. Wrap whole blocks of the "
                "model, take FSDP2 or DDP, or train the dynamic form (aurora_mode='dynamic')."
            )
        super().replace(part, by)

    def beside(self, base: nn.Module, x_TN: Tensor) -> None:
        """No weight of its own meets x."""

    @property
    def merge_warning(self) -> str | None:
        """What is merged is what was trained."""
        return None


MODES: dict[str, type[AuroraAdapter]] = {"dynamic": AuroraAdapter, "static": StaticAuroraAdapter}
