"""Weighted sums and hotswaps: what comes out must be what NumPy's sum, or a freshly loaded model, says."""

import copy

import pytest
import small_models
import torch
from methods import METHODS, every_method
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import beyondlora
from beyondlora import CeraConfig, StellaConfig
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.layer import AdapterLayer

IDS = small_models.tokens()
summable = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name.startswith("stella") or m.name == "cera-linear"], ids=lambda m: m.name
)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def trained(method, seed=0, base=None, **options):
    torch.manual_seed(seed)
    config = method.config(**{"target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base or small_models.llama(), config)
    small_models.train_a_little(model, seed=seed)
    return model.eval()


@summable
def test_a_weighted_sum_is_the_sum_of_the_weight_updates(method):
    model = trained(method, lora_alpha=6)
    model.add_adapter("second", method.config(target_modules=["k_proj", "o_proj"], r=14, init_lora_weights=False))
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    model.add_weighted_adapter(["default", "second"], [0.7, -2.0], "sum")
    for name, layer in layers(model).items():
        expected = sum(
            weight * layer.get_delta_weight(adapter)
            for adapter, weight in (("default", 0.7), ("second", -2.0))
            if adapter in layer.adapters
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.get_base_layer().weight, before[name])
    ranks = {name.rpartition(".")[2]: layer.adapters["sum"].rank for name, layer in layers(model).items()}
    assert ranks == {"q_proj": 4, "k_proj": 16, "o_proj": 14}  # k_proj is 16×32: 4 + 14 would be more than it can hold
    factors = [m for m in model.modules() if isinstance(m, StiefelLinear)]
    assert all(distance_to_stiefel(factor.orthonormal) < 2e-6 for factor in factors)


def test_a_layer_whose_name_is_the_end_of_another_has_its_own_rank():
    base = nn.Sequential()
    base.proj, base.head = nn.Linear(16, 16), nn.ModuleDict({"proj": nn.Linear(16, 16)})
    model = get_peft_model(base, StellaConfig(r=2, target_modules=["proj"]))
    model.add_adapter("second", StellaConfig(r=3, target_modules=["head.proj"]))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    ranks = {name: layer.adapters["sum"].rank for name, layer in layers(model.get_base_model()).items()}
    assert ranks == {"proj": 2, "head.proj": 5}
    layer = model.get_base_model().head.proj
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-5)


@summable
def test_the_sum_saves_loads_and_trains(method, tmp_path):
    model = trained(method)
    model.add_adapter("second", method.config(target_modules=["q_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(small_models.llama(), tmp_path / "sum", is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    small_models.train_a_little(loaded)
    assert not torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["cera", "aurora", "aurora-static"])
def test_nonlinear_cores_have_no_weighted_sum(name):
    method = next(m for m in METHODS if m.name == name)
    model = trained(method)
    state = set(model.state_dict())
    model.add_adapter("second", method.config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"core is nonlinear.*Activate the adapters together"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config
    model.delete_adapter("second")
    assert set(model.state_dict()) == state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "third"], [1, 1], "sum"), r"adapters=\['third'\] are not on this model"),
        ((["default"], [1, 1], "sum"), "1 adapters and 2 weights"),
        ((["default"], [float("nan")], "sum"), "must be finite"),
        ((["default"], [1.0], "default"), "is taken"),
        ((["default"], [1.0], "a.b"), "'a.b' cannot be the name of a module"),
        ((["default"], [1.0], "keys"), "'keys' cannot be the name of a module"),
        ((["default"], [1.0], "sum", "svd"), "combination_type='svd' is not offered"),
    ],
)
def test_sums_that_make_no_sense_are_refused(arguments, message):
    model = get_peft_model(small_models.Perceptron(), StellaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


class Namesakes(nn.Module):
    """A layer, and another whose name ends in its."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.sub = nn.ModuleDict({"q": nn.Linear(8, 8)})

    def forward(self, x):
        return self.sub["q"](self.q(x))


def test_a_layer_whose_name_ends_in_an_adapted_ones_gets_no_sum(tmp_path):
    torch.manual_seed(0)
    base = Namesakes()
    model = get_peft_model(copy.deepcopy(base), StellaConfig(r=2, target_modules="q"))
    x = torch.randn(3, 8)
    expected = model(x)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "sum")(x), expected)


def test_adapters_that_train_a_head_have_no_weighted_sum():
    config = StellaConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    model = get_peft_model(small_models.Perceptron(), config)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# ---------------------------------------------------------------- hotswap


@every_method
def test_a_hotswapped_adapter_is_the_loaded_one(method, tmp_path):
    other = trained(method, seed=5, lora_alpha=3, alpha_pattern={"k_proj": 5.0}, use_rslora=True)
    other.save_pretrained(tmp_path)
    model = trained(method)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not torch.equal(logits(model), logits(other))
    beyondlora.hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    model.save_pretrained(tmp_path / "again")
    reloaded = PeftModel.from_pretrained(small_models.llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(reloaded), logits(other), rtol=0, atol=0)


def test_a_hotswapped_file_in_half_precision_is_put_back_on_the_manifold(tmp_path):
    other = get_peft_model(small_models.llama(), StellaConfig(r=4, target_modules=["k_proj"]))
    other.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(path).items()}, path)
    model = get_peft_model(small_models.llama(), StellaConfig(r=4, target_modules=["k_proj"]))
    beyondlora.hotswap_adapter(model, tmp_path)
    factors = [layer.orthonormal for layer in model.modules() if isinstance(layer, StiefelLinear)]
    assert max(distance_to_stiefel(factor).item() for factor in factors) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StellaConfig(r=3, target_modules=["first"]), "has shape .* hotswapping needs equal ranks"),
        (StellaConfig(r=2, target_modules=["first", "second"]), "do not have the same layers"),
        (StellaConfig(r=2, target_modules=["first"], stella_diag_s=True), "stella_diag_s is True in the other adapter"),
        (StellaConfig(r=2, target_modules=["first"], lora_dropout=0.1), "lora_dropout is 0.1 in the other adapter"),
        (StellaConfig(r=2, target_modules=["first"], modules_to_save=["second"]), "modules_to_save is .*'second'"),
        (CeraConfig(r=2, target_modules=["first"]), "A CeraConfig cannot take the place of a StellaConfig"),
        (LoraConfig(r=2, target_modules=["first"]), "A LoraConfig cannot take the place of a StellaConfig"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(config, message, tmp_path):
    get_peft_model(small_models.Perceptron(), config).save_pretrained(tmp_path)
    model = get_peft_model(small_models.Perceptron(), StellaConfig(r=2, target_modules=["first"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        beyondlora.hotswap_adapter(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_merged_adapters_and_loras_are_not_swapped(tmp_path):
    model = get_peft_model(small_models.Perceptron(), StellaConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        beyondlora.hotswap_adapter(model, tmp_path)
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="is no adapter of beyondlora"):
        beyondlora.hotswap_adapter(lora, tmp_path)
