"""Every adapter against its equation: one row of `rows.ROWS` each. And the identity core against PEFT's LoRA.

Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank.
"""

from typing import Any

import numpy as np
import pytest
import torch
from adapters.rows import ROWS, Row, weights
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from beyondlora.adapters import Adapter, CeraAdapter, StaticAuroraAdapter
from beyondlora.adapters.reading import Lookup

ROUNDING: dict[str, Any] = {"rtol": 0, "atol": 1e-10}  # float64 on both sides, values of order one
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ forward


@every_row
@pytest.mark.parametrize(("N", "M", "R", "size"), [(6, 5, 3, 1), (4, 9, 1, 1), (5, 5, 5, 1), (6, 5, 3, 20)])
def test_forward_equals_the_papers_equation(row: Row, N: int, M: int, R: int, size: float) -> None:
    adapter, x = row.build(N, M, R), size * inputs(7, N)  # size 20: far beyond grids, deep in saturation
    np.testing.assert_allclose(adapter(x).detach().numpy(), row.output(adapter, x.numpy()), **ROUNDING)


@pytest.mark.parametrize(
    ("adapter", "x"),
    [
        (StaticAuroraAdapter(6, 5, 3), torch.zeros(4, 6)),
        (CeraAdapter(6, 5, 3, reading=Lookup()), torch.zeros(4, dtype=torch.int64)),
    ],
    ids=["static", "embedding"],
)
def test_a_weight_that_is_read_and_is_elsewhere_is_refused(adapter: Adapter, x: Tensor) -> None:
    adapter.to("meta")
    with pytest.raises(ValueError, match=r"have been offloaded"):
        adapter(x)
    assert adapter(x.to("meta")).shape == (4, 5)


@every_row
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3), (2, 1, 4, 2)])
def test_forward_keeps_leading_dimensions(row: Row, lead: tuple[int, ...]) -> None:
    adapter, x = row.build(6, 5, 3), inputs(*lead, 6)
    y = adapter(x)
    assert y.shape == (*lead, 5)
    if 0 not in lead:
        np.testing.assert_allclose(y.detach().numpy(), row.output(adapter, x.numpy()), **ROUNDING)


@every_row
def test_dropout_in_training_equals_the_equation_with_the_mask_torch_drew(row: Row) -> None:
    p, adapter, x = 0.4, row.build(6, 5, 3, dropout=0.4), inputs(20, 6)
    with torch.random.fork_rng():  # the same seed on ones shows which units the forward kept
        torch.manual_seed(3)
        y = adapter.train()(x).detach().numpy()
        torch.manual_seed(3)
        width = 3 if row.bottleneck_dropout else 6
        keep = nn.functional.dropout(torch.ones(20, width, dtype=torch.float64), p).numpy() != 0
    assert 0 < keep.sum() < keep.size
    if row.bottleneck_dropout:
        expected = row.output(adapter, x.numpy(), keep_TR=keep, p=p)
    else:
        expected = row.output(adapter, np.where(keep, x.numpy() / (1 - p), 0.0))
    np.testing.assert_allclose(y, expected, **ROUNDING)
    np.testing.assert_allclose(adapter.eval()(x).detach().numpy(), row.output(adapter, x.numpy()), **ROUNDING)


# ------------------------------------------------------------------------------------------------ weight update


@every_row
def test_delta_weight_equals_the_equation(row: Row) -> None:
    adapter = row.build(6, 5, 3, dropout=0.5).train()  # dropout is no part of it
    if row.delta is None:
        with pytest.raises(ValueError, match="Cannot merge") as refusal:
            adapter.delta_weight()
        assert str(refusal.value) == adapter.merge_refusal
    else:
        assert adapter.merge_refusal is None
        np.testing.assert_allclose(adapter.delta_weight().detach().numpy(), row.delta(weights(adapter)), **ROUNDING)


@every_row
def test_the_lora_factors_are_a_pair_of_the_adapters_rank_with_the_scaling_in_b(row: Row) -> None:
    adapter = row.build(7, 5, 3)
    if row.delta is None:
        with pytest.raises(ValueError, match="--distil"):
            adapter.lora_factors()
        return
    B_MR, A_RN = (factor.detach().numpy() for factor in adapter.lora_factors())
    assert (B_MR.shape, A_RN.shape) == ((5, 3), (3, 7))
    np.testing.assert_allclose(B_MR @ A_RN, row.delta(weights(adapter)), **ROUNDING)


@every_row
def test_what_is_adopted_is_the_weight_update_whatever_the_scaling(row: Row) -> None:
    adapter, up, down = row.build(6, 5, 3), inputs(5, 3), inputs(3, 6, seed=1)
    if adapter.sum_refusal:
        with pytest.raises(ValueError, match="the core is nonlinear"):
            adapter.adopt(up, down)
        return
    adapter.adopt(up, down)
    np.testing.assert_allclose(adapter.delta_weight().detach().numpy(), (up @ down).numpy(), **ROUNDING)


@every_row
def test_delta_weight_is_the_branch_exactly_where_no_warning_says_otherwise(row: Row) -> None:
    adapter, x = row.build(6, 5, 3), inputs(7, 6)
    if adapter.merge_refusal:
        assert not row.exact
        return
    assert row.exact == (adapter.merge_warning is None)
    same = torch.allclose(adapter(x), x @ adapter.delta_weight().mT, rtol=0, atol=1e-10)
    assert same == row.exact


# ------------------------------------------------------------------------------------------------ gradients


@every_row
def test_gradients_of_input_and_all_weights(row: Row) -> None:
    N, R = 4, 2
    adapter, x = row.build(N, 3, R, seed=2), inputs(3, N, seed=2).requires_grad_()
    arguments = [x, *(p for p in adapter.parameters())]
    if row.kinks.size:
        w = weights(adapter)
        distances = [np.abs(z[..., None] - row.kinks).min() for z in bottleneck_values(w, x.detach().numpy())]
        assert min(distances) > 1e-4  # gradcheck's difference quotients reach 1e-6 far
    names = [name for name, _ in adapter.named_parameters()]

    def branch(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(branch, arguments)


def bottleneck_values(w: dict[str, np.ndarray], x_TN: np.ndarray) -> list[np.ndarray]:
    """What reaches the activation and the spline: A x (A itself, in static mode) and, behind leaky ReLU, H act(z)."""
    found = [x_TN @ w["A"].T, w["A"]]
    return found + [np.where(z >= 0, z, 0.01 * z) @ w["H"].T for z in found[:1] if "H" in w]


@every_row
def test_parameter_count(row: Row) -> None:
    adapter = row.build(11, 7, 3)
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == row.parameters(11, 7, 3)
    assert sum(m.weight.numel() for m in adapter.parts().values()) == row.parameters(11, 7, 3)
    assert adapter.rank == 3


# ------------------------------------------------------------------------------------------------ the identity core


def with_peft(N: int, M: int, R: int, *, alpha: float, p: float) -> tuple[nn.Linear, Adapter, LoraLinear]:
    base = nn.Linear(N, M)
    theirs = LoraLinear(
        base,
        "default",
        LoraConfig(r=R, lora_alpha=alpha, lora_dropout=p, init_lora_weights=False),
        r=R,
        lora_alpha=alpha,
    )
    ours = Adapter(down=nn.Linear(N, R, bias=False), up=nn.Linear(R, M, bias=False), scaling=alpha / R, dropout=p)
    ours.down.load_state_dict(theirs.lora_A["default"].state_dict())
    ours.up.load_state_dict(theirs.lora_B["default"].state_dict())
    return base, ours, theirs


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("N", "M", "R", "alpha", "lead"),
    [
        (8, 6, 2, 2, (5,)),
        (64, 48, 4, 12, (3, 7)),
        (33, 129, 7, 16, (2, 2, 5)),
        (5, 3, 1, 0.3, ()),
        (96, 96, 64, 1, (9,)),
    ],
)
def test_identity_core_is_pefts_lora_to_the_last_bit(
    N: int, M: int, R: int, alpha: float, p: float, lead: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    base, ours, theirs = with_peft(N, M, R, alpha=alpha, p=p)
    x = torch.randn(*lead, N, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upstream = torch.randn(*lead, M)
    torch.manual_seed(1)
    y = base(x) + ours.train()(x)
    torch.manual_seed(1)
    y_peft = theirs.train()(twin)
    assert torch.equal(y, y_peft)
    y.backward(upstream)
    base_gradients = [p.grad.clone() for p in base.parameters()]
    base.zero_grad()
    y_peft.backward(upstream)
    pairs = [
        (x.grad, twin.grad),
        (ours.down.weight.grad, theirs.lora_A["default"].weight.grad),
        (ours.up.weight.grad, theirs.lora_B["default"].weight.grad),
        *zip(base_gradients, (p.grad for p in base.parameters()), strict=True),
    ]
    assert all(torch.equal(mine, pefts) for mine, pefts in pairs)
    assert torch.equal(ours.delta_weight(), theirs.get_delta_weight("default"))


def test_no_dropout_is_no_module_that_draws_random_numbers() -> None:
    adapter = ROWS["lora"].build(6, 5, 3).train()
    state = torch.get_rng_state()
    adapter(inputs(4, 6))
    assert torch.equal(torch.get_rng_state(), state)
