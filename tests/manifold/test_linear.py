"""StiefelLinear: its start, its precision, and that the step finds it wherever it came from."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beyondlora.manifold import StiefelLinear, distance_to_stiefel
from beyondlora.manifold.linear import live_stiefel_layers

SIZES = [(4, 64), (64, 4), (7, 7), (1, 9), (9, 1)]  # (in, out): tall, wide, square, a column, a row
every_size = pytest.mark.parametrize(("N", "M"), SIZES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def is_live(layer: nn.Module) -> bool:
    return any(other is layer for other in live_stiefel_layers())


def step(layer: StiefelLinear) -> None:
    """One long SGD step along a random gradient."""
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


@every_size
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_starts_orthonormal(N: int, M: int, dtype: torch.dtype | None, tolerance: float) -> None:
    layer = StiefelLinear(N, M, dtype=dtype)
    assert layer.weight.shape == (M, N)
    assert layer.weight.dtype == (dtype or torch.float32)
    assert layer.bias is None
    W = layer.weight.detach()
    gram = W.T @ W if M >= N else W @ W.T
    torch.testing.assert_close(gram, torch.eye(min(N, M), dtype=W.dtype), rtol=0, atol=tolerance)


@every_size
def test_orthonormal_is_the_weight_itself_the_tall_way_round(N: int, M: int) -> None:
    layer = StiefelLinear(N, M)
    assert layer.orthonormal.shape == (max(N, M), min(N, M))
    assert layer.orthonormal.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(layer.orthonormal, layer.weight if M >= N else layer.weight.T)
    x = torch.randn(3, N)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_each_layer_draws_its_own_weight() -> None:
    layer = StiefelLinear(4, 64)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert (layer.weight - before).abs().max() > 0.01
    assert distance_to_stiefel(layer.orthonormal) < 1e-6


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(dtype=torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        nn.Module.half,
        nn.Module.bfloat16,
        lambda m: m.type(torch.bfloat16),
        lambda m: m.type(torch.float8_e4m3fn),
    ],
    ids=["to(bf16)", "to(f16)", "to(cpu, bf16)", "half()", "bfloat16()", "type(bf16)", "type(f8)"],
)
def test_lower_precision_leaves_the_factor_alone_and_not_its_neighbours(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), StiefelLinear(64, 4))
    weight, bits = model[1].weight, model[1].weight.detach().clone()
    model[1].weight.grad = torch.randn(4, 64)
    gradient = model[1].weight.grad.clone()
    convert(model)
    assert model[0].weight.dtype.itemsize < 4
    assert model[1].weight.dtype == model[1].weight.grad.dtype == torch.float32
    assert model[1].weight is weight
    assert torch.equal(weight, bits)
    assert torch.equal(weight.grad, gradient)


def test_double_and_float() -> None:
    layer = StiefelLinear(4, 64)
    bits = layer.weight.detach().clone()
    assert layer.double().weight.dtype == torch.float64
    assert layer.half().weight.dtype == torch.float64
    assert layer.float().weight.dtype == torch.float32
    assert torch.equal(layer.weight, bits)


def test_meta_and_back() -> None:
    layer = StiefelLinear(4, 64, device="meta")
    assert layer.weight.is_meta
    layer.reset_parameters()  # nothing to draw, nothing raised
    layer.to_empty(device="cpu").reset_parameters()
    assert distance_to_stiefel(layer.orthonormal) < 1e-6
    assert layer.to("meta").weight.is_meta
    both = StiefelLinear(4, 64).to("meta", torch.bfloat16)  # one call for device and dtype: the device alone changes
    assert both.weight.is_meta
    assert both.weight.dtype == torch.float32


def test_a_default_dtype_of_half_precision_does_not_reach_it() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = StiefelLinear(4, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.float32
    assert distance_to_stiefel(layer.orthonormal) < 1e-6


# ------------------------------------------------------------------------------------------------ being found


def through_pickle(protocol: int) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: pickle.loads(pickle.dumps(layer, protocol))


def through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def inside_a_model(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(nn.Sequential(nn.Linear(2, 2), layer))[1]


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda layer: layer,
    "deepcopy": copy.deepcopy,
    "deepcopy of a model": inside_a_model,
    "pickle 2": through_pickle(2),
    "pickle 5": through_pickle(5),
    "torch.save": through_torch_save,
}


@every_size
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_the_step_finds_layers_and_their_copies(copied: Callable[[Any], Any], N: int, M: int) -> None:
    original = StiefelLinear(N, M, retraction="exp_map", step_scale=0.5)
    layer = copied(original)
    assert is_live(layer)
    assert (layer.retraction, layer.step_scale) == ("exp_map", 0.5)
    before = layer.weight.detach().clone()
    step(layer)
    assert distance_to_stiefel(layer.orthonormal) < 1e-6
    assert (layer.weight - before).abs().max() > 0.01
    if layer is not original:
        assert torch.equal(original.weight, before)


def test_the_step_finds_a_loaded_state_dict(tmp_path: Path) -> None:
    torch.save(StiefelLinear(4, 9).state_dict(), tmp_path / "weights.pt")
    for assign in (False, True):  # with assign=True the Parameter is another one than before
        layer = StiefelLinear(4, 9)
        layer.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=assign)
        step(layer)
        assert distance_to_stiefel(layer.orthonormal) < 1e-6


def test_layers_die_when_their_owners_do() -> None:
    gc.collect()  # what other tests left to die
    layer = StiefelLinear(4, 9)
    step(layer)
    gone, weight_gone = weakref.ref(layer), weakref.ref(layer.weight)
    count = len(live_stiefel_layers())
    del layer
    gc.collect()
    assert gone() is weight_gone() is None
    assert len(live_stiefel_layers()) == count - 1


def test_a_layer_that_failed_to_be_built_disturbs_nobody() -> None:
    """It lives on in the traceback, without a weight."""
    with pytest.raises(ValueError, match="retraction='qr'") as failure:
        StiefelLinear(4, 9, retraction="qr")
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    step(StiefelLinear(4, 9))
    assert failure.value is not None  # alive to here


# ------------------------------------------------------------------------------------------------ refusals, repr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retraction": "qr"}, r"retraction='qr' is unknown; choose one of \['exp_map', 'polar'\]\."),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16: a Stiefel factor needs float32 or float64 to stay orthonor"),
        ({"dtype": torch.float16}, "dtype=torch.float16: a Stiefel factor needs"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StiefelLinear(4, 9, **options)


def test_repr_shows_the_geometry() -> None:
    layer = StiefelLinear(4, 9, retraction="exp_map", step_scale=2**0.5)
    expected = "in_features=4, out_features=9, bias=False, retraction='exp_map', step_scale=1.414"
    assert repr(layer) == f"StiefelLinear({expected})"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_meet_a_rounded_factor_and_leave_the_factor_alone(dtype: torch.dtype) -> None:
    layer = StiefelLinear(4, 16)
    before = layer.weight.detach().clone()
    x = torch.randn(5, 4, dtype=dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), x.float() @ before.mT, rtol=2e-2, atol=2e-2)  # 8 bits of bfloat16
    assert torch.equal(layer.weight, before)


@every_size
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_rounded_through_data_is_float32_again_before_it_is_trained(
    dtype: torch.dtype, N: int, M: int
) -> None:
    layer = StiefelLinear(N, M)
    before = layer.weight.detach().clone()
    layer.weight.data = layer.weight.data.to(dtype)
    layer.eval()
    assert layer.weight.dtype == dtype  # whoever only looks at it, or saves it, finds what was put there
    layer.train()
    assert layer.weight.dtype == torch.float32
    assert distance_to_stiefel(layer.orthonormal) < 2e-6
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0.01)


def test_a_rounded_weight_is_float32_again_in_the_step_at_the_latest() -> None:
    layer = StiefelLinear(4, 64)
    layer.weight.data = layer.weight.data.bfloat16()
    layer(torch.randn(8, 4).bfloat16()).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16
    before = layer.weight.detach().float()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    optimizer.step()
    assert layer.weight.dtype == optimizer.state[layer.weight]["exp_avg"].dtype == torch.float32
    assert distance_to_stiefel(layer.orthonormal) < 2e-6
    assert (layer.weight - before).abs().max() > 0.01
