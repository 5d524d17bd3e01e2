"""The nearest linear map to a nonlinear branch, in the least-squares sense on data: one LoRA a layer.

The branch is y = s·B h with h = core(down(x)) (R numbers a token), so the best linear map for y is found in terms of h:

    W (R, N) = C_hx G⁻¹,   C_hx = Σ_t h_t x_tᵀ,   G = Σ_t x_t x_tᵀ          (ordinary least squares: h ≈ W x)

and s·B W minimises Σ_t ‖y_t − ΔW x_t‖² over all ΔW, of whatever rank. For a rank K < R, keep the K leading directions
of the fitted outputs (reduced-rank regression): those of s·B W G Wᵀ Bᵀ·s, an R×R eigenproblem after a QR of s·B.
Only sums over tokens are kept, in float64, never the tokens.

Legend: T tokens, N inputs, M outputs, R rank of the bottleneck, K rank asked for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..padding import without_padding
from ..precise import precise
from ..tuner.experts import has_open_experts
from .folder import Factors
from .gap import Adapted
from .rows import Batch, rows_of, run, watching


class _Moments:
    """Sums over the tokens a layer has seen, in float64 on the CPU: N² + R·N numbers."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.tokens = adapter, 0
        inputs = adapter.down.in_features
        self.gram_NN = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross_RN = torch.zeros(adapter.rank, inputs, dtype=torch.float64)

    def add(self, x_TN: Tensor) -> None:
        h_TR = self.adapter.core(self.adapter.down(x_TN.to(self.adapter.down.weight.dtype)))
        x_TN, h_TR = precise(x_TN), precise(h_TR)
        self.gram_NN += (x_TN.mT @ x_TN).cpu()
        self.cross_RN += (h_TR.mT @ x_TN).cpu()
        self.tokens += len(x_TN)


@torch.no_grad()
def distil(
    model: nn.Module,
    adapted: Adapted,
    batches: Iterable[Batch],
    *,
    rank: int | None = None,
) -> Factors:
    """Fit every layer's best linear map of rank K on the inputs that it gets in the live model.

    Args:
        model: with its adapters active; it is run on every batch, in evaluation mode.
        adapted: the layers to fit.
        batches: keyword arguments of the model; positions that an attention_mask leaves out are not counted.
        rank: K; None = each layer's own R, where nothing is cut off.

    Returns: layer path → (B (M, K), scaling folded in; A (K, N)).
    Raises: ValueError for a rank above R, no tokens, or fewer tokens than a layer has inputs.
    """
    _check_rank(adapted, rank)
    moments = {path: _Moments(adapter) for path, (_, adapter) in adapted.items()}
    layers = {path: layer for path, (layer, _) in adapted.items()}
    with watching(layers) as seen:
        for batch in without_padding(batches) if has_open_experts(model) else batches:
            run(model, batch)
            for path, calls in seen.items():
                for x in calls:
                    moments[path].add(rows_of(x, batch))
            seen.clear()
    return {path: _solve(path, sums, rank or sums.adapter.rank) for path, sums in moments.items()}


def _check_rank(adapted: Adapted, rank: int | None) -> None:
    smallest = min(adapter.rank for _, adapter in adapted.values())
    if rank is not None and not 1 <= rank <= smallest:
        raise ValueError(
            f"rank={rank}: the linear map nearest to a branch of rank {smallest} has rank {smallest} at most, so a "
            f"larger one brings nothing, and a smaller one than 1 does not exist. Give 1 to {smallest}, or no rank."
        )


def _solve(path: str, moments: _Moments, rank: int) -> tuple[Tensor, Tensor]:
    inputs = len(moments.gram_NN)
    if moments.tokens < inputs:
        raise ValueError(
            f"{path} has {inputs} inputs and the data hold {moments.tokens} tokens: they do not determine a linear "
            "map. Distil on more data, at least ten times as many tokens."
        )
    B_MR = precise(moments.adapter.up.weight * moments.adapter.scaling).cpu()
    W_RN = moments.cross_RN @ _pseudo_inverse(moments.gram_NN)
    if rank == moments.adapter.rank:
        return B_MR, W_RN
    Q_MR, T_RR = torch.linalg.qr(B_MR)
    fitted_RN = T_RR @ W_RN
    energy_RR = fitted_RN @ moments.gram_NN @ fitted_RN.mT
    leading_RK = torch.linalg.eigh(energy_RR).eigenvectors[:, -rank:]
    return Q_MR @ leading_RK, leading_RK.mT @ fitted_RN


def _pseudo_inverse(gram_NN: Tensor) -> Tensor:
    """G⁺, with the directions left out that the data hardly ever take (below float64's own noise)."""
    return torch.linalg.pinv(gram_NN, hermitian=True, rtol=len(gram_NN) * torch.finfo(torch.float64).eps)
