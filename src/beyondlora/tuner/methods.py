"""The methods: one block each, its config and its names in PEFT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..adapters.adapter import Adapter
from ..adapters.aurora import MODES
from ..adapters.cera import CeraAdapter
from ..adapters.stella import StellaAdapter, rank_problem
from .config import AdapterConfig, LayerSpec, option
from .layer import AdapterLayer
from .model import AdapterModel

# ---------------------------------------------------------------- CeRA


@dataclass
class CeraConfig(AdapterConfig):
    """CeRA (arXiv 2602.22911): a SiLU-gated bottleneck with dropout, s · B · D_p(SiLU(A x)).

    `lora_dropout` acts on the bottleneck units; `lora_alpha=None` means the paper's s = 1. Merging is refused,
    except beside embeddings and with `cera_activation="identity"`, where the adapter is a weight update.
    """

    method: ClassVar[str] = "cera"
    checkpoint_names: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "up_proj": "A", "down_proj": "B"}  # old: last two

    r: int = option("Rank R of the bottleneck, at least 1.", default=64)
    lora_dropout: float = option("Dropout probability in [0, 1) of the bottleneck units, in training.", default=0.1)
    cera_activation: Literal["silu", "relu", "identity"] = option("Activation of the bottleneck.", default="silu")

    def make_adapter(self, layer: LayerSpec) -> Adapter:
        """The CeRA adapter for one layer."""
        return CeraAdapter(
            layer.in_features,
            layer.out_features,
            layer.rank,
            scaling=layer.scaling,
            dropout=self.lora_dropout,
            activation=self.cera_activation,
            noop_start=self.init_lora_weights is True,
            reading=layer.reading,
        )


class CeraLinear(AdapterLayer):
    """A linear layer with CeRA adapters."""

    prefix = "cera_"
    letters = ("A", "B")


class CeraModel(AdapterModel):
    """A base model with CeRA adapters."""

    prefix = "cera_"
    tuner_layer_cls = CeraLinear


# ---------------------------------------------------------------- AuroRA


@dataclass
class AuroraConfig(AdapterConfig):
    """AuroRA (arXiv 2505.18738): tanh self-projection and B-splines at a tiny rank, s · B · σ(A x).

    Evaluated dynamically; merges in the paper's static form, an approximation (see `AuroraAdapter`).
    """

    method: ClassVar[str] = "aurora"

    r: int = option("Rank R of the bottleneck, at least 1.", default=2)
    lora_alpha: float | None = option("Scaling numerator: s = lora_alpha / r. None means s = 1.", default=4)
    aurora_mode: Literal["dynamic", "static"] = option(
        "'dynamic': s · B · σ(A x); 'static': the weight update s · B · σ(A), which merges exactly.", default="dynamic"
    )
    aurora_spline: Literal["pooled", "per_dim"] = option(
        "Spline term: 'pooled' sums the basis over z (the paper's shapes), 'per_dim' is element-wise (KAN).",
        default="pooled",
    )
    aurora_activation: Literal["tanh", "leaky_relu", "sigmoid"] = option(
        "Activation of the fixed part.", default="tanh"
    )
    aurora_fixed: bool = option("Keep the fixed part act(H · act(z)).", default=True)
    aurora_learnable: bool = option("Keep the learnable spline part.", default=True)
    aurora_grid_size: int = option("G, number of grid intervals.", default=5)
    aurora_spline_order: int = option("k, order of the splines (3 = cubic).", default=3)
    aurora_grid_range: tuple[float, float] = option("(low, high) of the grid.", default=(-1.0, 1.0))

    def make_adapter(self, layer: LayerSpec) -> Adapter:
        """The AuroRA adapter for one layer."""
        return MODES[self.aurora_mode](
            layer.in_features,
            layer.out_features,
            layer.rank,
            scaling=layer.scaling,
            dropout=self.lora_dropout,
            noop_start=self.init_lora_weights is True,
            reading=layer.reading,
            activation=self.aurora_activation,
            spline=self.aurora_spline,
            fixed=self.aurora_fixed,
            learnable=self.aurora_learnable,
            grid_size=self.aurora_grid_size,
            spline_order=self.aurora_spline_order,
            grid_range=self.aurora_grid_range,
        )

    def _check_method(self) -> None:
        self.aurora_grid_range = tuple(self.aurora_grid_range)  # type: ignore[assignment]  # JSON has lists only
        self._check_choice("aurora_mode", self.aurora_mode, tuple(MODES))
        super()._check_method()


class AuroraLinear(AdapterLayer):
    """A linear layer with AuroRA adapters."""

    prefix = "aurora_"
    letters = ("A", "B", "H", "spline")


class AuroraModel(AdapterModel):
    """A base model with AuroRA adapters."""

    prefix = "aurora_"
    tuner_layer_cls = AuroraLinear


# ---------------------------------------------------------------- StelLA


@dataclass
class StellaConfig(AdapterConfig):
    """StelLA (arXiv 2510.01938): s · U S Vᵀ x with U and V on Stiefel manifolds.

    The step on the manifolds is taken around any torch optimizer but LBFGS and schedule-free ones, which are refused.

    Fields, names and defaults are those of the authors' package, whose adapter folders load unchanged. The start is
    not a no-op unless `init_lora_weights="zero"`.
    """

    method: ClassVar[str] = "stella"

    lora_alpha: float | None = option("Scaling numerator: s = lora_alpha / r. None means s = 1.", default=8)
    init_lora_weights: bool | Literal["rando", "zero", "svd_major", "svd_minor"] = option(
        "True, False or 'rando': random orthonormal U and V, S = I; 'zero': the same with S = 0; 'svd_major', "
        "'svd_minor': leading, trailing singular vectors of the base weight. Only with 'zero' does training start from "
        "the base model's outputs, which DPO and its like take for granted.",
        default=True,
    )
    stella_retraction: Literal["polar", "exp_map"] = option(
        "How a step returns to the manifold: polar factor or geodesic.", default="polar"
    )
    stella_diag_s: bool = option("S diagonal instead of dense.", default=False)
    stella_grad_scaling: bool | float = option(
        "Scale the steps of U and V by sqrt(d / rows): True takes d = the model's hidden size (the layer's input width "
        "where there is none), a number is d, False turns it off.",
        default=True,
    )
    stella_geometry: Literal["stiefel", "euclidean"] = option(
        "'euclidean': no constraint (ablation).", default="stiefel"
    )

    def make_adapter(self, layer: LayerSpec) -> Adapter:
        """The StelLA adapter for one layer."""
        start = "rando" if isinstance(self.init_lora_weights, bool) else self.init_lora_weights
        return StellaAdapter(
            layer.in_features,
            layer.out_features,
            layer.rank,
            scaling=layer.scaling,
            dropout=self.lora_dropout,
            diag_s=self.stella_diag_s,
            retraction=self.stella_retraction,
            grad_scaling=self._dimension(layer),
            geometry=self.stella_geometry,
            start=start,
            base_weight=layer.base_weight() if start.startswith("svd") else None,
            reading=layer.reading,
        )

    def starts(self) -> tuple[bool | str, ...]:
        """The values that `init_lora_weights` takes."""
        return (True, False, "rando", "zero", "svd_major", "svd_minor")

    def layer_problem(self, rank: int, out_features: int, in_features: int) -> str | None:
        """Why a layer of this shape cannot take this rank."""
        return rank_problem(in_features, out_features, rank)

    def _dimension(self, layer: LayerSpec) -> float | None:
        if self.stella_grad_scaling is False:
            return None
        if self.stella_grad_scaling is True:
            looks_up = layer.reading is not None and layer.reading.picks_columns  # N is then the size of a vocabulary
            return float(layer.hidden_size or (layer.out_features if looks_up else layer.in_features))
        return self.stella_grad_scaling

    def _check_method(self) -> None:
        scaling = self.stella_grad_scaling
        if not isinstance(scaling, bool) and not (isinstance(scaling, (int, float)) and scaling > 0):
            self._refuse(f"stella_grad_scaling={scaling!r} is no dimension; give True, False or a number above 0.")
        super()._check_method()


class StellaLinear(AdapterLayer):
    """A linear layer with StelLA adapters."""

    prefix = "stella_"
    letters = ("U", "S", "Vt")


class StellaModel(AdapterModel):
    """A base model with StelLA adapters."""

    prefix = "stella_"
    tuner_layer_cls = StellaLinear


METHODS: dict[type[AdapterConfig], type[AdapterModel]] = {
    CeraConfig: CeraModel,
    AuroraConfig: AuroraModel,
    StellaConfig: StellaModel,
}
