"""AuroRA beyond its equation (`test_adapter.py`): start, defaults, static form, refusals.

Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank.
"""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import stats

from beyondlora.adapters import AuroraAdapter, StaticAuroraAdapter, cubic
from beyondlora.adapters.aurora import MODES, AdaptiveNonlinearLayer

both_modes = pytest.mark.parametrize("make", [AuroraAdapter, StaticAuroraAdapter])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def is_uniform(values: torch.Tensor, bound: float) -> bool:
    return stats.kstest(values.detach().flatten().numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


@both_modes
def test_start_is_the_papers(make: type[AuroraAdapter]) -> None:
    N, R = 320, 64
    adapter = make(N, 9, R)
    assert is_uniform(adapter.down.weight, 1 / np.sqrt(N))  # gain of a = sqrt 5 is sqrt(1/3)
    H_RR = adapter.core.H.weight.detach().numpy()
    assert stats.kstest(H_RR.flatten(), "norm", args=(0, np.sqrt(2 / (R + R)))).pvalue > 1e-3
    assert is_uniform(adapter.core.spline.weight, 0.1)
    assert not adapter.up.weight.any()


@both_modes
@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
def test_starts_as_a_no_op(make: type[AuroraAdapter], spline: str) -> None:
    adapter = make(9, 5, 2, spline=spline)
    assert torch.equal(adapter(torch.randn(4, 9)), torch.zeros(4, 5))
    assert torch.equal(adapter.delta_weight(), torch.zeros(5, 9))
    adapter.reset_parameters(noop_start=False)
    assert adapter(torch.randn(4, 9)).any()
    adapter.reset_parameters()
    assert not adapter.up.weight.any()


def test_up_projection_is_kaiming_uniform_if_not_a_no_op() -> None:
    assert is_uniform(AuroraAdapter(8, 320, 64, noop_start=False).up.weight, 1 / np.sqrt(64))


def test_defaults_are_the_papers() -> None:
    adapter = AuroraAdapter(9, 5, 2)
    assert adapter.scaling == 2.0  # α / r = 4 / 2
    assert isinstance(adapter.core.activation, torch.nn.Tanh)
    assert (adapter.core.spline.grid_size, adapter.core.spline.order) == (5, 3)
    assert adapter.core.spline.grid_range == (-1.0, 1.0)
    assert set(adapter.parts()) == {"A", "B", "H", "spline"}
    assert {"dynamic": AuroraAdapter, "static": StaticAuroraAdapter} == MODES


def test_parameters_on_roberta_base_are_the_papers_number() -> None:
    """r = 2 on query and value of 12 layers of width 768: the paper's 0.075 M."""
    layer = AuroraAdapter(768, 768, 2)
    count = 24 * sum(p.numel() for p in layer.parameters())
    assert count == 24 * reference.aurora_parameter_count(768, 768, 2)
    assert round(count / 1e6, 3) == 0.074  # 0.0742 M; the paper prints 0.075


@pytest.mark.parametrize(("options", "letters"), [({"fixed": False}, "A B spline"), ({"learnable": False}, "A B H")])
def test_an_ablation_has_no_weights_for_what_it_leaves_out(options: dict[str, Any], letters: str) -> None:
    adapter = AuroraAdapter(9, 5, 2, **options)
    assert set(adapter.parts()) == set(letters.split())
    assert len(list(adapter.parameters())) == 3


# ------------------------------------------------------------------------------------------------ the static form


def trained(make: type[AuroraAdapter], **options: Any) -> AuroraAdapter:
    return make(6, 5, 2, noop_start=False, dtype=torch.float64, **options)


@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
def test_static_gap_is_the_relative_difference_of_the_two_forms(spline: Any, lead: tuple[int, ...]) -> None:
    adapter = trained(AuroraAdapter, spline=spline, dropout=0.5).train()  # dropout is no part of the gap
    x = torch.randn(*lead, 6, dtype=torch.float64)
    w = {letter: module.weight.detach().numpy() for letter, module in adapter.parts().items()}
    arrays = (w["A"], w["B"], w["H"], w["spline"])
    x_TN = x.numpy().reshape(-1, 6)
    dynamic = reference.aurora(x_TN, *arrays, adapter.scaling, spline=spline)
    static = x_TN @ reference.aurora_static_delta(*arrays, adapter.scaling, spline=spline).T
    gap = adapter.static_gap(x)
    assert isinstance(gap, float)
    assert gap == pytest.approx(np.linalg.norm(static - dynamic) / np.linalg.norm(dynamic), rel=1e-10)
    assert gap > 0.01  # σ(A)x is not σ(Ax)


def test_static_gap_is_zero_where_the_nonlinear_layer_happens_to_be_linear() -> None:
    """With leaky ReLU, without spline, and nothing negative anywhere, σ(z) = H z."""
    adapter = trained(AuroraAdapter, activation="leaky_relu", learnable=False)
    with torch.no_grad():
        adapter.down.weight.abs_()
        adapter.core.H.weight.abs_()
    assert adapter.static_gap(torch.rand(7, 6, dtype=torch.float64)) < 1e-12


def test_static_gap_of_an_adapter_that_is_a_no_op_is_not_a_number() -> None:
    assert math.isnan(AuroraAdapter(6, 5, 2).static_gap(torch.randn(3, 6)))


def test_merging_the_dynamic_mode_warns_and_names_the_way_to_measure() -> None:
    warning = trained(AuroraAdapter).merge_warning
    assert warning is not None
    assert "σ(A)x is not σ(Ax)" in warning
    assert "static_gap" in warning
    assert trained(StaticAuroraAdapter).merge_warning is None
    assert trained(AuroraAdapter).merge_refusal is trained(StaticAuroraAdapter).merge_refusal is None


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, r"activation='gelu' is unknown; choose one of \['leaky_relu', 'sigmoid', 'tanh'\]\."),
        ({"spline": "cubic"}, r"spline='cubic' is unknown; choose one of \['per_dim', 'pooled'\]\."),
        ({"fixed": False, "learnable": False}, "fixed=False and learnable=False leave nothing of the nonlinear layer"),
        ({"grid_size": 0}, "grid_size=0 and spline order=3 define no spline"),
        ({"spline_order": -2}, "spline order=-2 define no spline"),
        ({"grid_range": (2.0, 1.0)}, r"grid_range=\(2.0, 1.0\) is not an interval"),
    ],
)
def test_nonsense_is_refused_with_the_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveNonlinearLayer(2, **options)
    with pytest.raises(ValueError, match=message):
        AuroraAdapter(6, 5, 2, **options)


def test_device_and_dtype_reach_every_weight() -> None:
    adapter = AuroraAdapter(9, 5, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in adapter.parameters()} == {("meta", torch.bfloat16)}
    assert len(list(adapter.parameters())) == 4


@both_modes
def test_bfloat16_weights_give_bfloat16_outputs(make: type[AuroraAdapter]) -> None:
    adapter = make(6, 5, 2, noop_start=False, dtype=torch.bfloat16)
    assert adapter(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_static_form_refuses_a_wrapper_that_it_would_never_call():
    class FullyShardedDataParallel(torch.nn.Module):
        """By its name."""

    adapter = StaticAuroraAdapter(6, 5, 2)
    with pytest.raises(ValueError, match=r"never calls.*Wrap whole blocks.*aurora_mode='dynamic'"):
        adapter.replace(adapter.down, FullyShardedDataParallel())


each_form = pytest.mark.parametrize("few", [0, 2**20], ids=["the four of a cell", "all functions"])


@each_form
@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
def test_a_nan_has_no_cell_and_stays_a_nan(spline, few, monkeypatch):
    monkeypatch.setattr(cubic, "FEW", few)
    layer = AdaptiveNonlinearLayer(3, spline=spline)
    layer.reset_parameters()
    z_TR = torch.randn(4, 3)
    z_TR[1, 2] = float("nan")
    assert torch.equal(layer.closed_form(z_TR).isnan(), layer.by_definition(z_TR).isnan())
    assert layer.closed_form(z_TR).isnan().any(1).tolist() == [False, True, False, False]


@each_form
@pytest.mark.parametrize("spline", ["pooled", "per_dim"])
@pytest.mark.parametrize("tokens", [0, 5, 8, 11])
def test_going_through_the_rows_in_pieces_is_the_definition_too(tokens, spline, few, monkeypatch):
    monkeypatch.setattr(cubic, "FEW", few)
    monkeypatch.setattr(cubic, "PIECE", 13)  # four rows of three
    layer = AdaptiveNonlinearLayer(3, spline=spline, dtype=torch.float64)
    layer.reset_parameters()
    z_TR = torch.randn(tokens, 3, dtype=torch.float64)
    z_TR[::3] = (5 * z_TR[::3]).round() / 2.5  # on knots
    z_TR.requires_grad_()
    g_TR, of = torch.randn(tokens, 3, dtype=torch.float64), [z_TR, *layer.parameters()]
    for run in (layer.closed_form, layer.by_definition):
        assert run(z_TR).shape == (tokens, 3)
    torch.testing.assert_close(layer.closed_form(z_TR), layer.by_definition(z_TR), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(run(z_TR), of, g_TR) for run in (layer.closed_form, layer.by_definition))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradients_of_pieces_are_added_up_as_they_come(monkeypatch):
    """At a large rank H's gradient is larger than a piece: kept for each, they were three quarters of the peak."""
    monkeypatch.setattr(cubic, "PIECE", 16)
    waiting, gradients = [], cubic._gradients

    def watched(*arguments: Any) -> Any:
        assert sum(found() is not None for found in waiting) <= 1
        found = gradients(*arguments)
        waiting.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr(cubic, "_gradients", watched)
    AdaptiveNonlinearLayer(8)(torch.randn(20, 8)).sum().backward()
    assert len(waiting) == 10
