"""nn.DataParallel, which the Trainer takes by itself on several GPUs: replicas share nothing that one changes."""

import collections

import pytest
import small_models
import torch
from methods import METHODS, every_method, one_of_each_paper
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.layer import AdapterLayer


class Biased(nn.Module):
    """Two layers with biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def replicate(network, count):
    """torch.nn.parallel.replicate on one CPU: a multiplication by one stands for the broadcast to a device."""
    modules, replicas = list(network.modules()), []
    for _ in range(count):
        weights = {weight: weight * 1.0 for weight in network.parameters()}
        copies = {module: module._replicate_for_data_parallel() for module in modules}
        for module, copy in copies.items():
            copy._former_parameters = collections.OrderedDict()
            for name, child in module._modules.items():
                setattr(copy, name, None if child is None else copies[child])
            for name, weight in module._parameters.items():
                if weight is None:
                    copy._parameters[name] = None
                else:
                    setattr(copy, name, weights[weight])
        replicas.append(copies[network])
    return replicas


def adapted(method):
    torch.manual_seed(0)
    model = get_peft_model(Biased(), method.config(target_modules=["first", "second"], lora_dropout=0.0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and f"{method.prefix}B" in name:
                weight.normal_()
    return model


@every_method
def test_replicas_compute_what_the_model_does(method):
    model, x = adapted(method), torch.randn(64, 16)
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    one, other = replicate(model, 2)
    first, second = one(x[:32]), other(x[32:])
    assert torch.allclose(torch.cat([first, second]), expected, atol=1e-6)
    (first.square().sum() + second.square().sum()).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, gradients[name], rtol=1e-4, atol=1e-5), name


@every_method
def test_a_replica_changes_nothing_of_the_model_or_another_replica(method):
    model, x = adapted(method), torch.randn(8, 16)
    one, other = replicate(model, 2)
    for replica in (one, other):
        replica(x)
    ours = set(model.modules())
    for layer, first, second in zip(*(map_layers(network) for network in (model, one, other)), strict=True):
        for name in layer.adapters:
            held = [set(network.adapters[name].parts().values()) for network in (layer, first, second)]
            assert held[0] <= ours
            assert not held[0] & held[1]
            assert not held[1] & held[2]


def map_layers(network):
    return [module for module in network.modules() if isinstance(module, AdapterLayer)]


def test_stella_steps_beside_living_replicas():
    method = next(method for method in METHODS if method.name == "stella")
    model = adapted(method)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        replicas = replicate(model, 2)
        sum(replica(torch.randn(8, 16)).square().sum() for replica in replicas).backward()
        optimizer.step()
    factors = [layer.orthonormal for layer in model.modules() if isinstance(layer, StiefelLinear)]
    assert max(distance_to_stiefel(factor).item() for factor in factors) < 1e-5


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, bias):
        return 2 * bias


@pytest.mark.parametrize("gradients", [True, False])
@every_method
def test_a_bias_that_is_made_from_another_is_added(method, gradients):
    model, x = adapted(method).eval(), torch.randn(5, 16)
    expected = model(x)
    last = model.base_model.model.second
    bias = last.base_layer.bias.detach().clone()
    parametrize.register_parametrization(last.base_layer, "bias", Doubled()).requires_grad_(False)
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(model(x), expected + bias, atol=1e-6)


@one_of_each_paper
def test_replicas_of_experts_compute_with_their_own_weights(method):
    config = method.config(target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    model, ids = get_peft_model(small_models.mixtral(), config).eval(), small_models.tokens()
    expected = model(ids).logits
    replicas = replicate(model, 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and "layers.0" in name:
                weight.zero_()
    for replica in replicas:
        torch.testing.assert_close(replica(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected)
