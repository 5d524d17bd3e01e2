"""Factors that moved without the step are seen; optimizers that cannot step them are refused; skipped steps skip."""

import copy
import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from beyondlora.manifold import StiefelLinear, distance_to_stiefel
from beyondlora.manifold.guard import PATIENCE, check_manifold
from beyondlora.manifold.moves import Stack


def with_gradient(layer: StiefelLinear) -> StiefelLinear:
    layer.weight.grad = torch.randn_like(layer.weight)
    return layer


def stepped(**options: float) -> tuple[StiefelLinear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = StiefelLinear(4, 64)
    optimizer = torch.optim.AdamW(with_gradient(layer).parameters(), 1e-2, **options)
    optimizer.step()
    return layer, optimizer


def test_a_factor_a_little_off_is_brought_back_at_the_next_step_and_said_so() -> None:
    layer, optimizer = stepped()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    assert distance_to_stiefel(with_gradient(layer).orthonormal) > 1e-4
    with pytest.warns(UserWarning, match=r"shape \(64, 4\) had left the manifold by .*brought back"):
        optimizer.step()
    assert distance_to_stiefel(layer.orthonormal) < 1e-6
    with_gradient(layer)
    optimizer.step()  # nothing more to say


def test_a_factor_far_off_is_refused_before_anything_moved() -> None:
    layer, optimizer = stepped()
    with torch.no_grad():
        layer.weight.mul_(1.5)
    before = with_gradient(layer).weight.detach().clone()
    with pytest.raises(ValueError, match=r"off the manifold by 1\.3e"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_an_untouched_factor_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, optimizer = stepped()
    calls = []
    monkeypatch.setattr("beyondlora.manifold.guard.distance_to_stiefel", lambda Y: calls.append(Y))
    with_gradient(layer)
    optimizer.step()
    assert calls == []


def test_a_save_looks_even_where_nothing_says_that_a_factor_moved() -> None:
    layer, _ = stepped()
    layer.weight.data.mul_(1.5)  # as DeepSpeed writes: no counter moves
    assert layer.settled == (id(layer.weight), layer.weight._version)
    with pytest.raises(ValueError, match="off the manifold"):
        check_manifold(nn.Sequential(layer))


def test_a_save_brings_back_what_is_a_little_off() -> None:
    layer, _ = stepped()
    layer.weight.data.mul_(1.001)
    with pytest.warns(UserWarning, match="left the manifold by .*brought back"):
        check_manifold(layer)
    assert distance_to_stiefel(layer.orthonormal) < 1e-6


def test_a_copy_is_looked_at_afresh() -> None:
    layer, _ = stepped()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    with pytest.raises(ValueError, match="off the manifold"):
        check_manifold(twin)
    check_manifold(layer)


def test_a_factor_on_the_meta_device_is_refused() -> None:
    layer = StiefelLinear(4, 64, device="meta")
    layer.weight.grad = torch.empty_like(layer.weight)
    with pytest.raises(ValueError, match=r"on the meta device.*Materialise"):
        torch.optim.SGD(layer.parameters(), 0.1).step()


@pytest.mark.parametrize(
    "name",
    ["LBFGS", "AdamWScheduleFree", "DummyOptim", "CPUOffloadOptimizer", "AdaLomo"],
)
def test_optimizers_that_cannot_are_refused_by_name(name: str) -> None:
    kind = type("Mine", (type(name, (torch.optim.SGD,), {}),), {})
    layer = with_gradient(StiefelLinear(4, 64))
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"Mine cannot step Stiefel factors: .*Take AdamW"):
        kind(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.weight, before)


def test_a_factor_is_stepped_plainly_after_zero_which_leaves_its_mark() -> None:
    layer = with_gradient(StiefelLinear(4, 64))
    layer.weight._hp_mapping = None
    before = layer.weight.detach().clone()
    torch.optim.AdamW(layer.parameters(), 1e-2).step()
    assert distance_to_stiefel(layer.orthonormal) < 1e-6
    assert (layer.weight - before).abs().max() > 1e-3


def test_a_partition_is_not_looked_at_when_it_is_saved() -> None:
    for weight in (torch.empty(0), torch.ones(64, 4, dtype=torch.bfloat16)):
        layer = StiefelLinear(4, 64)
        layer.weight.data = weight
        layer.weight.ds_id = 0
        check_manifold(layer)
        assert layer.weight.dtype == weight.dtype


def test_deepspeed_may_round_a_factor_for_it_steps_a_copy() -> None:
    layer = StiefelLinear(4, 64)
    exec("layer.bfloat16()", {"__name__": "deepspeed.runtime.engine", "layer": layer})
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bfloat16().train().weight.dtype == torch.float32  # anybody else may not


def test_before_zero_3_factors_are_left_in_the_dtype_that_others_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL rounds what is trained, and DeepSpeed refuses two dtypes without a word."""
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    layer = StiefelLinear(4, 64)
    layer.weight.data = layer.weight.data.bfloat16()
    assert layer.train().weight.dtype == torch.bfloat16
    assert StiefelLinear(4, 64).bfloat16().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_partitions_of_an_unknown_kind_are_refused_at_the_first_step_of_their_optimizer(mark: str) -> None:
    """DeepSpeed hands its optimizer flat partitions, so nothing but marks on the parameters tells of it."""
    layer, flat = StiefelLinear(4, 64), nn.Parameter(torch.zeros(256))
    setattr(layer.weight, mark, None)
    flat.grad = torch.ones(256)
    with pytest.raises(ValueError, match=r"shape \(64, 4\) cannot be stepped: DeepSpeed .*, and not by .*ZeRO"):
        torch.optim.AdamW([flat], lr=0.1).step()
    assert not flat.any()
    layer.requires_grad_(False)
    torch.optim.AdamW([flat], lr=0.1).step()  # nobody trains the factor


def test_an_optimizer_that_cannot_is_refused_inside_zero_too() -> None:
    """Before anything travels between processes: there are none here."""
    layer, vector = StiefelLinear(4, 64), nn.Parameter(torch.zeros(256))
    layer.weight._hp_mapping = None
    wrapper = type("DeepSpeedZeroOptimizer", (), {})()
    wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups = [[layer.weight]], [vector]
    vector.grad = torch.ones(256)
    optimizer = type("AdamWScheduleFree", (torch.optim.SGD,), {})([vector], lr=0.1)
    with pytest.raises(ValueError, match=r"AdamWScheduleFree cannot step Stiefel factors: .*averages"):
        optimizer.step()
    assert not vector.any()


def test_a_factor_stepped_as_a_copy_is_refused_at_the_second_step() -> None:
    """What DeepSpeed does in half precision without ZeRO: float32 masters are stepped, and written back by `.data`."""
    layer, other = StiefelLinear(4, 64), nn.Linear(3, 3)
    master = layer.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([master, *other.parameters()], lr=1e-4)

    def train_a_step() -> None:
        master.grad = with_gradient(layer).weight.grad
        optimizer.step()
        layer.weight.data.copy_(master.data)

    train_a_step()
    with pytest.raises(ValueError, match=r"shape \(64, 4\) has left the manifold by .*AdamW .*a copy of it is stepped"):
        train_a_step()


def test_a_factor_that_was_never_on_the_manifold_and_has_no_owner_is_left_alone() -> None:
    layer, other = StiefelLinear(4, 64), nn.Linear(3, 3)
    layer.weight.data.mul_(1.5)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(3):
        with_gradient(layer)
        optimizer.step()


def test_a_half_precision_part_of_a_factor_is_left_to_the_step_that_refuses_it() -> None:
    """ZeRO 3 leaves an empty vector in the model's dtype."""
    layer = StiefelLinear(4, 64)
    layer.weight.data = torch.empty(0, dtype=torch.bfloat16)
    layer.weight.ds_id = 0
    layer.train()
    layer.load_state_dict({"weight": torch.empty(0)})  # as DeepSpeed does when it resumes
    with pytest.raises(ValueError, match=r"shape \(64, 4\) cannot be stepped: DeepSpeed"):
        torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1).step()


@pytest.fixture
def no_layers_left() -> Iterator[None]:
    """A layer that is in a cycle would be refused at others' steps, too, until it is collected."""
    yield
    gc.collect()


@pytest.mark.usefixtures("no_layers_left")
def test_a_weight_made_from_other_parameters_is_refused() -> None:
    layer = StiefelLinear(4, 64)
    nn.utils.parametrizations.weight_norm(layer)
    layer(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="cannot be stepped: its weight is made from other parameters"):
        torch.optim.SGD(layer.parameters(), 0.1).step()


@pytest.mark.parametrize("size", [0, 100])
def test_a_flat_shard_is_refused(size: int) -> None:
    """As FSDP1 makes one of a weight, with nothing that says which part it is; there may be nothing in it."""
    layer = StiefelLinear(4, 64)
    layer.weight = nn.Parameter(torch.zeros(size))
    layer.weight.grad = torch.zeros(size)
    with pytest.raises(ValueError, match=rf"has become a flat shard of shape \({size},\)"):
        torch.optim.SGD(layer.parameters(), 0.1).step()


def test_one_factor_on_the_meta_device_leaves_the_others_where_they_are() -> None:
    here, nowhere = with_gradient(StiefelLinear(4, 64)), StiefelLinear(4, 64, device="meta")
    nowhere.weight.grad = torch.empty_like(nowhere.weight)
    weight, gradient = here.weight.detach().clone(), here.weight.grad.clone()
    with pytest.raises(ValueError, match="on the meta device"):
        torch.optim.SGD([here.weight, nowhere.weight], 0.1).step()
    assert torch.equal(here.weight, weight)
    assert torch.equal(here.weight.grad, gradient)


def test_an_adapter_added_after_the_optimizer_is_told_of() -> None:
    first, late = with_gradient(StiefelLinear(4, 16)), with_gradient(StiefelLinear(4, 16))
    optimizer = torch.optim.SGD(first.parameters(), 0.1)

    def train_a_step() -> None:
        with_gradient(first)
        late.weight.grad.add_(1.0)  # as a backward pass does that nobody clears
        optimizer.step()

    with pytest.warns(UserWarning, match=r"1 Stiefel factors have had gradients.*not being trained"):
        [train_a_step() for _ in range(PATIENCE)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_a_step()  # once


def test_gradients_made_anew_for_every_step_are_told_of_too() -> None:
    first, late = with_gradient(StiefelLinear(4, 16)), StiefelLinear(4, 16)
    optimizer = torch.optim.SGD(first.parameters(), 0.1)

    def train_a_step() -> None:
        with_gradient(first)
        late.zero_grad()
        late(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="not being trained"):
        [train_a_step() for _ in range(PATIENCE)]


def test_a_factor_whose_own_optimizer_steps_seldom_is_not_told_of() -> None:
    often, seldom = with_gradient(StiefelLinear(4, 16)), with_gradient(StiefelLinear(4, 16))
    one, other = (torch.optim.SGD(layer.parameters(), 0.1) for layer in (often, seldom))
    other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PATIENCE + 1):
            with_gradient(often)
            with_gradient(seldom)
            one.step()


def test_a_gradient_that_is_only_looked_at_is_not_told_of() -> None:
    first, looked_at = with_gradient(StiefelLinear(4, 16)), with_gradient(StiefelLinear(4, 16))
    optimizer = torch.optim.SGD(first.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PATIENCE + 1):
            with_gradient(first)
            optimizer.step()
    assert looked_at.weight.grad is not None


def test_a_factor_in_two_optimizers_is_told_of_where_both_step_on_one_gradient() -> None:
    layer = with_gradient(StiefelLinear(4, 64))
    one, other = torch.optim.SGD(layer.parameters(), 0.1), torch.optim.AdamW(layer.parameters(), 0.01)
    one.step()
    with pytest.warns(UserWarning, match=r"1 Stiefel factors are stepped on gradients .*second optimizer"):
        other.step()
    assert distance_to_stiefel(layer.orthonormal) <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (one, other):  # each on a gradient of its own
            with_gradient(layer)
            optimizer.step()
        with torch.no_grad():
            layer.weight.grad.zero_().add_(torch.randn(64, 4))  # zeroed in place, and another backward pass
        one.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_factor_that_an_optimizer_has_twice_is_converted_and_retracted_once() -> None:
    once, twice = StiefelLinear(4, 64), StiefelLinear(4, 64)
    twice.load_state_dict(once.state_dict())
    twice.weight.grad = with_gradient(once).weight.grad.clone()
    torch.optim.SGD([once.weight], 0.2).step()
    torch.optim.SGD([twice.weight, twice.weight], 0.1, foreach=False).step()
    torch.testing.assert_close(twice.weight, once.weight, rtol=0, atol=1e-6)


def test_what_a_stack_refused_is_told_with_the_next_save() -> None:
    layers = [StiefelLinear(4, 64) for _ in range(3)]
    stack = Stack(layers)  # the form for CUDA, which cannot raise without waiting for the device
    for layer in layers:
        with_gradient(layer)
    layers[1].weight.grad[0, 0] = float("nan")
    with torch.no_grad():
        stack.begin()
        stack.end()
    with pytest.warns(UserWarning, match="1 steps of single Stiefel factors were refused since the last save"):
        check_manifold(nn.ModuleList(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_manifold(nn.ModuleList(layers))  # once


def test_what_a_stack_refused_is_told_when_its_optimizer_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where training is a function that makes its optimizer, and the model is saved after it."""
    monkeypatch.setattr("beyondlora.manifold.riemannian.plan", lambda layers: [Stack(layers)])
    layers = [StiefelLinear(4, 64) for _ in range(3)]

    def train() -> None:
        optimizer = torch.optim.SGD([layer.weight for layer in layers], 0.1)
        for stepped in (layers, layers[:2]):
            optimizer.zero_grad()
            for layer in stepped:
                with_gradient(layer)
            layers[1].weight.grad[0, 0] = float("nan")
            optimizer.step()

    train()
    with pytest.warns(UserWarning, match="2 steps of single Stiefel factors were refused since the last save"):
        check_manifold(nn.ModuleList(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_manifold(nn.ModuleList(layers))  # once


def test_a_gradient_scaler_skips_and_steps() -> None:
    for options in ({}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        layer = StiefelLinear(4, 64)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        x = torch.randn(8, 4)
        for poison in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(layer(x).square().mean() + layer.weight.sum() * 1e-2).backward()
            if poison:
                layer.weight.grad[0, 0] = float("inf")
            before = layer.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(layer.weight, before) == poison
            assert distance_to_stiefel(layer.orthonormal) <= 1e-6
