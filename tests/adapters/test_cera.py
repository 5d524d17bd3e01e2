"""CeRA beyond its equation (`test_adapter.py`): start, defaults, refusals.

Legend of the shape suffixes: N inputs, M outputs, R rank.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from beyondlora.adapters import CeraAdapter


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_down_projection_starts_kaiming_normal_with_the_relu_gain() -> None:
    A_RN = CeraAdapter(320, 8, 64).down.weight.detach().numpy()
    assert stats.kstest(A_RN.flatten(), "norm", args=(0, np.sqrt(2 / 320))).pvalue > 1e-3


@pytest.mark.parametrize("activation", ["silu", "relu", "identity"])
def test_starts_as_a_no_op(activation: str) -> None:
    adapter = CeraAdapter(9, 5, 3, activation=activation).train()
    assert torch.equal(adapter(torch.randn(4, 9)), torch.zeros(4, 5))
    adapter.reset_parameters(noop_start=False)
    assert adapter(torch.randn(4, 9)).any()
    adapter.reset_parameters()
    assert not adapter.up.weight.any()


def test_up_projection_is_kaiming_uniform_if_not_a_no_op() -> None:
    B_MR = CeraAdapter(8, 320, 64, noop_start=False).up.weight.detach().numpy()
    bound = 1 / np.sqrt(64)  # gain of a = sqrt 5 is sqrt(1/3); bound = gain · sqrt(3 / fan_in)
    assert stats.kstest(B_MR.flatten(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


def test_defaults_are_the_papers() -> None:
    adapter = CeraAdapter(9, 5, 3)
    assert adapter.scaling == 1.0
    assert isinstance(adapter.activation, nn.SiLU)
    assert isinstance(adapter.dropout, nn.Dropout)
    assert adapter.dropout.p == 0.1
    assert adapter.down.bias is None
    assert adapter.up.bias is None


def test_dropout_drops_bottleneck_units_behind_the_activation_and_nothing_else() -> None:
    adapter = CeraAdapter(9, 3, 3, dropout=0.5, noop_start=False)
    with torch.no_grad():
        adapter.up.weight.copy_(torch.eye(3))
    x = torch.randn(1000, 9)
    kept, dropped = adapter.eval()(x), adapter.train()(x)
    assert torch.all((dropped == 0) | (dropped == 2 * kept))
    assert 0.4 < (dropped == 0).float().mean() < 0.6  # 3000 draws: 0.5 ± 0.009


def test_merging_is_refused_with_the_ways_out() -> None:
    adapter = CeraAdapter(9, 5, 3)
    with pytest.raises(ValueError, match="Cannot merge a CeRA adapter: it is nonlinear in x") as refusal:
        adapter.delta_weight()
    for way_out in ("save_pretrained", "PeftModel.from_pretrained", "LoRA or StelLA, which merge exactly"):
        assert way_out in str(refusal.value)


def test_the_identity_ablation_merges() -> None:
    adapter = CeraAdapter(9, 5, 3, activation="identity")
    assert adapter.merge_refusal is None
    assert adapter.merge_warning is None


def test_an_unknown_activation_lists_the_choices() -> None:
    message = r"activation='gelu' is unknown; choose one of \['identity', 'relu', 'silu'\]\."
    with pytest.raises(ValueError, match=message):
        CeraAdapter(9, 5, 3, activation="gelu")


def test_device_and_dtype_reach_every_weight() -> None:
    adapter = CeraAdapter(9, 5, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in adapter.parameters()} == {("meta", torch.bfloat16)}
