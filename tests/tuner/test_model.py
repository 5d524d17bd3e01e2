"""What a PEFT user does with an adapter, for every method: build, train, save, load, switch, merge, delete."""

import copy
import json
import pickle
import warnings

import pytest
import small_models
import torch
from methods import METHODS, every_method, one_of_each_paper, since_peft_0_21
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    WavLMConfig,
    WavLMModel,
)
from transformers.models.mamba.modeling_mamba import MambaMixer

from beyondlora import AuroraConfig, CeraConfig, StellaConfig
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.layer import AdapterLayer

IDS = small_models.tokens()
MERGE_WARNING = r"Merging AuroRA folds its static form.*export ADAPTER --report"


def adapted(method, base=None, **options):
    config = method.config(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    return get_peft_model(base if base is not None else small_models.llama(), config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def merging(method):
    """The context in which a merge of this method must run: a warning where the merge is another function."""
    return pytest.warns(UserWarning, match=MERGE_WARNING) if method.merge == "static" else pytest.MonkeyPatch.context()


mergeable = pytest.mark.parametrize("method", [m for m in METHODS if m.merge != "refused"], ids=lambda m: m.name)
exact = pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "exact"], ids=lambda m: m.name)


@every_method
def test_the_start_is_what_the_method_says(method):
    model = adapted(method)
    assert torch.equal(logits(model), logits(small_models.llama())) == method.noop_start


@every_method
def test_all_linear_adapts_every_linear_but_the_head(method):
    model = adapted(method)
    assert len(layers(model)) == 2 * 7
    assert not any("lm_head" in name for name in layers(model))


@every_method
def test_only_the_adapter_is_trainable_and_every_part_gets_a_gradient(method):
    model = adapted(method, lora_dropout=0.0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if f".{method.prefix}" in name}
    small_models.train_a_little(model, steps=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@every_method
def test_parameter_names_are_the_frozen_ones(method):
    keys = adapted(method).state_dict()
    ours = {key for key in keys if f".{method.prefix}" in key}
    assert ours == {
        f"{name}.{method.prefix}{letter}.default.weight"
        for name in layers(adapted(method))
        for letter in method.letters
    }
    assert not any("lora_" in key for key in keys)


@every_method
def test_saving_and_loading_gives_the_same_model(method, tmp_path):
    model = adapted(method)
    small_models.train_a_little(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(get_peft_model_state_dict(model))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(small_models.llama(), tmp_path, **options).eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


@every_method
def test_targets_by_list_regex_and_architecture(method):
    for targets, count in ((["q_proj", "up_proj"], 4), (r".*layers\.1\..*(q|k)_proj", 2), (None, 4)):
        assert len(layers(adapted(method, target_modules=targets))) == count


@every_method
def test_layers_to_transform_and_excluded_modules(method):
    assert (
        len(layers(adapted(method, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"))) == 1
    )
    chosen = layers(adapted(method, target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]))
    assert all("q_proj" in name for name in chosen)


@every_method
def test_patterns_set_rank_and_scaling_by_layer(method):
    model = adapted(
        method,
        target_modules=["q_proj", "k_proj"],
        lora_alpha=8,
        rank_pattern={"k_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.k_proj": 6},
    )
    by_name = {name.split("layers.")[1]: layer.adapters["default"] for name, layer in layers(model).items()}
    assert (by_name["0.self_attn.q_proj"].rank, by_name["0.self_attn.q_proj"].scaling) == (4, 2.0)
    assert (by_name["0.self_attn.k_proj"].rank, by_name["0.self_attn.k_proj"].scaling) == (2, 4.0)
    assert (by_name["1.self_attn.k_proj"].rank, by_name["1.self_attn.k_proj"].scaling) == (2, 3.0)


@every_method
def test_several_adapters_switch_disable_and_delete(method, tmp_path):
    model = adapted(method)
    small_models.train_a_little(model)
    first = logits(model)
    model.add_adapter("second", method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    small_models.train_a_little(model, seed=7)
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(small_models.llama()))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in key for key in model.state_dict())
    model.load_adapter(tmp_path / "second", adapter_name="again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), second, rtol=0, atol=0)


def test_a_name_that_torch_refuses_leaves_nothing_behind():
    config = CeraConfig(r=2, target_modules=["first"])
    model = get_peft_model(small_models.Perceptron(), config)
    with pytest.raises(KeyError, match=r"name can.*contain"):
        model.add_adapter("a.b", config)
    assert list(model.peft_config) == ["default"]
    assert [list(layer.adapters) for layer in layers(model).values()] == [["default"]]


@every_method
def test_two_active_adapters_add_up(method):
    model = adapted(method, target_modules=["q_proj"], base=small_models.llama())
    small_models.train_a_little(model)
    model.add_adapter("second", method.config(target_modules=["q_proj"], init_lora_weights=False))
    layer = next(iter(layers(model).values()))
    x = torch.randn(5, 32)
    with torch.no_grad():
        base, both = layer.base_layer(x), [layer.adapters[name](x) for name in ("default", "second")]
        model.base_model.set_adapter(["default", "second"])
        model.eval()
        torch.testing.assert_close(layer(x), base + both[0] + both[1])
        assert both[1].abs().max() > 0


@exact
def test_an_exact_merge_changes_nothing_but_the_speed(method):
    model = adapted(method)
    small_models.train_a_little(model)
    attached = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-4)  # float32: one rounding a weight
    assert not torch.equal(logits(small_models.llama()), attached)


@mergeable
def test_unmerging_restores_every_bit(method):
    model = adapted(method)
    small_models.train_a_little(model)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    attached = logits(model)
    with merging(method):
        model.merge_adapter()
    assert any(not torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers(model).items())
    assert torch.equal(logits(model), attached)


@exact
def test_adapters_that_were_merged_one_after_the_other_are_unmerged_to_the_bit(method):
    model = adapted(method, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", method.config(target_modules=["q_proj"], init_lora_weights=False))
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    for layer in layers(model).values():
        layer.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            layer.merge(adapter_names=["second"])
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers(model).items())


@exact
def test_a_merge_into_half_precision_is_rounded_once(method):
    model = adapted(method, small_models.llama().bfloat16(), target_modules=["q_proj"], init_lora_weights=False)
    expected = {
        name: (layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()).bfloat16()
        for name, layer in layers(model).items()
    }
    model.merge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, expected[name]) for name, layer in layers(model).items())


@mergeable
def test_merged_and_unmerged_in_inference_mode_the_model_still_trains(method):
    model = adapted(method)
    with merging(method), torch.inference_mode():
        model.merge_adapter()
    model(input_ids=IDS, labels=IDS)
    with torch.inference_mode(), model.disable_adapter():  # which unmerges
        model(input_ids=IDS)
    small_models.train_a_little(model)


@mergeable
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_leaves_a_plain_model(method, safe_merge):
    model = adapted(method)
    small_models.train_a_little(model)
    with merging(method):
        model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    with merging(method):
        plain = model.merge_and_unload(safe_merge=safe_merge)
    assert set(plain.state_dict()) == set(small_models.llama().state_dict())
    torch.testing.assert_close(logits(plain), merged, rtol=0, atol=0)


def test_a_static_merge_is_the_papers_static_form():
    method = next(m for m in METHODS if m.name == "aurora")
    model = adapted(method)
    small_models.train_a_little(model)
    layer = next(iter(layers(model).values()))
    adapter, weight = layer.adapters["default"], layer.get_base_layer().weight.clone()
    sigma_of_columns = torch.stack([adapter.core(column) for column in adapter.down.weight.unbind(dim=1)], dim=1)
    expected = weight + adapter.scaling * adapter.up.weight @ sigma_of_columns
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight, expected)


def test_a_nonlinear_adapter_refuses_to_merge_and_leaves_the_model_untouched():
    model = adapted(next(m for m in METHODS if m.merge == "refused"))
    small_models.train_a_little(model)
    state = copy.deepcopy(model.state_dict())
    layer = next(iter(layers(model).values()))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge, lambda: layer.get_delta_weight("default")):
        with pytest.raises(ValueError, match=r"nonlinear in x.*Keep it attached"):
            merge()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer.merged for layer in layers(model).values())


def test_one_adapter_that_cannot_merge_keeps_all_layers_as_they_are():
    linear, gated = (
        CeraConfig(r=2, cera_activation=a, target_modules=t)
        for a, t in (("identity", ["first", "second"]), ("silu", ["second"]))
    )
    model = get_peft_model(small_models.Perceptron(), linear)
    model.add_adapter("gated", gated)
    model.base_model.set_adapter(["default", "gated"])
    with pytest.raises(ValueError, match="nonlinear in x"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("door", ["merge_adapter", "merge_and_unload"])
def test_adapters_that_are_named_are_looked_at_and_no_others(door):
    linear = CeraConfig(r=2, cera_activation="identity", target_modules=["first", "second"])
    model = get_peft_model(small_models.Perceptron(), linear)
    model.add_adapter("gated", CeraConfig(r=2, target_modules=["second"]))
    with pytest.raises(ValueError, match="nonlinear in x"):
        getattr(model, door)(adapter_names=["default", "gated"])
    assert len(layers(model)) == 2
    assert not any(layer.merged for layer in layers(model).values())
    model.set_adapter("gated")
    getattr(model, door)(adapter_names=["default"])
    model.unload()

    model = get_peft_model(small_models.Perceptron(), StellaConfig(r=2, target_modules=["first"]))
    model.add_adapter("broken", StellaConfig(r=2, target_modules=["first", "second"]))
    layers(model.get_base_model())["second"].adapters["broken"].core.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        getattr(model, door)(adapter_names=["broken"])
    assert len(layers(model)) == 2
    assert not any(layer.merged for layer in layers(model).values())


def test_a_safe_merge_refuses_broken_weights_and_keeps_the_base():
    model = adapted(next(m for m in METHODS if m.name == "stella"), target_modules=["q_proj"])
    layer = next(iter(layers(model).values()))
    before = layer.get_base_layer().weight.clone()
    layer.adapters["default"].core.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@mergeable
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_before_the_first_layer(method, value):
    model = adapted(method, target_modules=["q_proj"])
    last = list(layers(model).values())[-1]
    for part in last.adapters["default"].parts().values():
        part.weight.data[0] = value
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge()
    assert not any(layer.merged for layer in layers(model).values())


@mergeable
def test_conv1d_layers_of_gpt2_are_adapted_and_merged(method):
    model = adapted(method, base=small_models.gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    small_models.train_a_little(model)
    assert len(layers(model)) == 4
    layer = next(layer for name, layer in layers(model).items() if "c_attn" in name)
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape == (32, 96)
    attached = logits(model)
    with merging(method):
        model.merge_adapter()
    if method.merge == "exact":
        torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), attached)


@every_method
def test_modules_to_save_are_trained_and_saved(method, tmp_path):
    model = adapted(method, base=small_models.bert(), task_type="SEQ_CLS", target_modules=["query", "value"])
    assert any("classifier.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_models.bert(seed=0), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("bias", ["all", "only"])
def test_biases_that_an_older_peft_would_not_save_are_refused(method, bias, monkeypatch):
    monkeypatch.setattr("beyondlora.tuner.config.METHODS_SAY_WHAT_IS_SAVED", False)
    bias = f"{method.config_cls.method}_only" if bias == "only" else bias
    with pytest.raises(ValueError, match="would train the biases and not save them"):
        method.config(target_modules=["first"], bias=bias)
    method.config(target_modules=["first"], bias="none")


@every_method
@pytest.mark.parametrize(
    ("bias", "count"),
    [("none", 0), pytest.param("all", 2, marks=since_peft_0_21), pytest.param("only", 1, marks=since_peft_0_21)],
)
def test_biases(method, bias, count, tmp_path):
    bias = f"{method.config_cls.method}_only" if bias == "only" else bias
    model = get_peft_model(small_models.Perceptron(), method.config(target_modules=["first"], bias=bias))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(trained) == count
    model(torch.randn(3, 16)).sum().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(1.0)
    model.eval().save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    loaded = PeftModel.from_pretrained(small_models.Perceptron(), tmp_path).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@every_method
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent_models(method, copied):
    model = adapted(method)
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    small_models.train_a_little(twin)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    for layer in twin.modules():
        if isinstance(layer, StiefelLinear):
            assert distance_to_stiefel(layer.orthonormal) < 2e-6


@every_method
def test_dropout_follows_train_and_eval(method):
    model = adapted(method, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    layer, x = next(iter(layers(model).values())), torch.randn(4, 32)
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))


def test_inputs_keep_their_dtype_where_peft_is_told_so():
    model = adapted(next(m for m in METHODS if m.name == "cera"), small_models.llama().bfloat16())
    model(IDS)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
        model(IDS)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(method, dtype, autocast_adapter_dtype):
    base = small_models.llama().to(dtype)
    config = method.config(target_modules="all-linear")
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert model(IDS).logits.dtype == dtype
    for module in model.modules():
        if isinstance(module, StiefelLinear):
            assert module.weight.dtype == torch.float32
            assert distance_to_stiefel(module.orthonormal) < 1e-5


def test_stella_trains_on_the_manifold_in_a_bfloat16_base():
    model = get_peft_model(small_models.llama().to(torch.bfloat16), StellaConfig(r=4, target_modules="all-linear"))
    small_models.train_a_little(model)
    factors = [module for module in model.modules() if isinstance(module, StiefelLinear)]
    assert len(factors) == 2 * 14
    assert max(distance_to_stiefel(factor.orthonormal) for factor in factors) < 2e-6


def test_gradient_scaling_takes_the_hidden_size_or_the_input_width_or_a_number():
    def scales(model):
        return {round(m.step_scale, 6) for m in model.modules() if isinstance(m, StiefelLinear)}

    def model_with(base, targets, grad_scaling):
        return get_peft_model(base, StellaConfig(r=2, target_modules=targets, stella_grad_scaling=grad_scaling))

    assert scales(model_with(small_models.llama(), ["down_proj"], True)) == {round((32 / 48) ** 0.5, 6), 1.0}
    assert scales(model_with(small_models.Perceptron(), ["first"], True)) == {round((16 / 24) ** 0.5, 6), 1.0}
    assert scales(model_with(small_models.Perceptron(), ["first"], 96.0)) == {2.0, round(6**0.5, 6)}
    assert scales(model_with(small_models.Perceptron(), ["first"], False)) == {1.0}


def test_svd_starts_take_singular_vectors_of_the_base_weight():
    for start, kept in (("svd_major", slice(0, 4)), ("svd_minor", slice(-4, None))):
        config = StellaConfig(r=4, target_modules=["c_attn"], init_lora_weights=start, lora_alpha=4)
        model = get_peft_model(small_models.gpt2(), config)
        layer = next(iter(layers(model).values()))
        U, _, Vh = torch.linalg.svd(layer.get_base_layer().weight.mT, full_matrices=False)
        torch.testing.assert_close(layer.get_delta_weight("default").mT, U[:, kept] @ Vh[kept], rtol=1e-4, atol=1e-5)


def test_folders_of_the_stella_authors_load_unchanged(tmp_path):
    """A folder built by hand from the description of the authors' format."""
    base = small_models.llama()
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for index in range(2):
        stem = f"base_model.model.model.layers.{index}.self_attn.q_proj.stella_"
        for letter in ("U", "V"):
            weights[stem + letter] = torch.linalg.qr(torch.randn(32, 8, generator=generator))[0].contiguous()
        weights[stem + "S.weight"] = torch.randn(8, 8, generator=generator)
        weights[stem + "U.weight"] = weights.pop(stem + "U")
        weights[stem + "Vt.weight"] = weights.pop(stem + "V").mT.contiguous()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "STELLA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    stella = {"stella_retraction": "polar", "stella_diag_s": False, "stella_grad_scaling": True, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | stella | {"init_lora_weights": True}))
    model = PeftModel.from_pretrained(base, tmp_path)
    for name, layer in layers(model).items():
        stem = name + ".stella_"
        expected = 2.0 * weights[stem + "U.weight"] @ weights[stem + "S.weight"] @ weights[stem + "Vt.weight"]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    assert len(layers(model)) == 2


# ---------------------------------------------------------------- refusals


def test_a_rank_above_the_smaller_side_names_the_layers_and_changes_nothing():
    base = small_models.llama()
    modules = dict(base.named_modules())
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.k_proj: r=20 is larger.*16×32.*Choose r ≤ 16"
    ) as refusal:
        get_peft_model(base, StellaConfig(r=20, target_modules="all-linear"))
    assert "v_proj" in str(refusal.value)
    assert "q_proj" not in str(refusal.value)
    assert dict(base.named_modules()) == modules
    get_peft_model(base, StellaConfig(r=20, target_modules="all-linear", rank_pattern={"[kv]_proj": 16}))


def test_targets_that_match_nothing_show_near_names():
    with pytest.raises(ValueError, match=r"\['q_porj'\] not found.*Did you mean .*q_proj"):
        get_peft_model(small_models.llama(), CeraConfig(target_modules=["q_porj"]))


def test_an_unsupported_layer_leaves_the_supported_ones_as_they_were():
    base = small_models.Perceptron()
    base.tail = nn.LayerNorm(10)
    with pytest.raises(ValueError, match="tail is a LayerNorm"):
        get_peft_model(base, AuroraConfig(target_modules=["first", "tail"]))
    assert not isinstance(base.first, AdapterLayer)


def test_the_projection_that_attention_never_calls_is_refused():
    base = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises(
        ValueError, match=r"out_proj: nn.MultiheadAttention reads this layer's weight and never calls it"
    ):
        get_peft_model(base, CeraConfig(target_modules=["out_proj"]))


class Attention(nn.Module):
    """Reads one weight, hands one layer on, and asks the others for shapes and types alone."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.handed_on = (nn.Linear(16, 16) for _ in range(3))
        nn.init.zeros_(self.handed_on.weight)

    def forward(self, x):
        x = self.called(x.to(self.called.weight.dtype)) + nn.functional.linear(x, self.read.weight)
        return self.through(self.handed_on, x[..., : self.handed_on.weight.shape[1]])

    def through(self, layer, x):
        return layer(x)


class Narrower(Attention):
    """Has its code from another class."""


@pytest.mark.parametrize("kind", [Attention, Narrower])
def test_a_layer_whose_weight_alone_is_read_is_refused(kind):
    with pytest.raises(
        ValueError, match=rf"0\.read: {kind.__name__} reads this layer's weight and does not call it, so"
    ):
        get_peft_model(nn.Sequential(kind()), CeraConfig(r=4, target_modules=["read", "called"]))
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out 0\.read: "):
        model = get_peft_model(nn.Sequential(kind()), CeraConfig(r=4, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in layers(model)} == {"called", "handed_on"}
    model(torch.randn(2, 16)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_wavlm_reads_the_weights_of_its_attention():
    """PEFT's LoRA beside them is trained by no gradient, and says nothing."""
    base = WavLMModel(
        WavLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
                    conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"attention\.q_proj: WavLMAttention reads this layer's weight"):
        get_peft_model(base, CeraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match=r"leaves out .*attention\..*_proj \(and 3 more\): WavLMAttention"):
        model = get_peft_model(base, CeraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model(torch.randn(1, 64)).last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_a_router_that_returns_two_tensors_takes_no_adapter():
    """Beside Llama 4's router an adapter, PEFT's LoRA as ours, failed in the first forward pass, without a name."""
    config = Llama4TextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, moe_layers=[0],
    )  # fmt: skip
    base = Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match=r"feed_forward\.router: Llama4Router returns more than one tensor"):
        get_peft_model(base, CeraConfig(r=2, target_modules=["router", "q_proj"]))
    with pytest.warns(UserWarning, match=r"leaves out model\.layers\.0\.feed_forward\.router: Llama4Router"):
        model = get_peft_model(base, CeraConfig(r=2, target_modules="all-linear", target_parameters=[]))
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_all_linear_leaves_out_what_is_trained_whole(tmp_path):
    """DistilBERT's pre_classifier ends like the classifier that PEFT trains whole, and is trained whole, too."""

    def base():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        ).eval()

    model = get_peft_model(base(), CeraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {
        "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2",
    }  # fmt: skip
    train = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in train:
            weight.add_(0.1)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()(tokens).logits
    torch.testing.assert_close(loaded, expected)


def test_all_linear_leaves_out_what_no_module_calls_and_says_so(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2))

    with pytest.warns(UserWarning, match=r"leaves out 1\.out_proj \(and 1 more\): nn.Multi.* never calls it"):
        model = get_peft_model(base(), CeraConfig(r=4, target_modules="all-linear"))
    assert model.base_model.targeted_module_names == ["0"]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftModel.from_pretrained(base(), tmp_path).base_model.targeted_module_names == ["0"]
    with pytest.raises(ValueError, match=r"0\.out_proj: .* never calls it"):  # where nothing would be left
        get_peft_model(nn.Sequential(nn.MultiheadAttention(16, 2)), CeraConfig(r=4, target_modules="all-linear"))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@one_of_each_paper
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_is_the_model(method, grad):
    """torch checks it by tracing again without gradients: the same modules must be called."""
    config = method.config(target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(small_models.Perceptron(), config).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(5, 16))
    x = torch.randn(7, 16)
    torch.testing.assert_close(traced(x), model(x))


@one_of_each_paper
@pytest.mark.parametrize("batch_first", [True, False], ids=["fast path", "no fast path"])
def test_torchs_own_transformer_evaluates_its_adapters_or_refuses_them(method, batch_first, monkeypatch):
    """Its layers' fast path reads weights, where batches come first, and calls no module."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    config = method.config(target_modules=["linear1", "linear2"], init_lora_weights=False, lora_dropout=0.0)
    if batch_first:
        with pytest.raises(ValueError, match=r"layers.0.linear1: .* trained and then without effect.*fastpath_enabled"):
            get_peft_model(base, config)
        monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model, x = get_peft_model(base, config), torch.randn(2, 4, 16)
    torch.testing.assert_close(model.eval()(x), model.train()(x))
    with model.disable_adapter():
        disabled = model(x)
    assert not torch.allclose(model(x), disabled, atol=1e-3)


def test_a_transformer_layer_with_an_attention_of_its_own_has_no_fast_path():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = nn.Linear(16, 16)
    model = get_peft_model(nn.Sequential(layer), CeraConfig(target_modules=["linear1", "self_attn"]))
    assert sorted(layers(model.get_base_model())) == ["0.linear1", "0.self_attn"]


@every_method
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["rows", "sequences"])
def test_the_output_can_be_changed_in_place(method, bias, shape):
    gradients = []
    for in_place in (True, False):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(inplace=in_place), nn.Linear(5, 4))
        model = adapted(method, base, r=2, target_modules=["0"], task_type=None, init_lora_weights=False).train()
        torch.manual_seed(1)
        model(torch.randn(*shape, 6)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients)


MAMBA = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


def test_what_a_layer_has_inherited_is_seen_too():
    class Mine(MambaMixer):
        pass

    base = MambaForCausalLM(MambaConfig(**MAMBA))
    base.backbone.layers[0].mixer = Mine(MambaConfig(**MAMBA), 0)
    with pytest.raises(ValueError, match=r"mixer\.dt_proj: Mine reads"):
        get_peft_model(base, CeraConfig(target_modules=["dt_proj"]))


@pytest.mark.parametrize("name", ["out_proj", "conv1d", "x_proj", "dt_proj"])
def test_what_mamba_reads_and_does_not_call_is_refused(name):
    with pytest.raises(ValueError, match=rf"layers\.0\.mixer\.{name}: MambaMixer reads this layer's weight"):
        get_peft_model(MambaForCausalLM(MambaConfig(**MAMBA)), CeraConfig(target_modules=[name]))


@every_method
def test_every_adapter_of_a_state_space_model_learns(method):
    read = ["out_proj", "conv1d", "x_proj", "dt_proj"]
    model = adapted(method, MambaForCausalLM(MambaConfig(**MAMBA)), r=2, exclude_modules=read).train()
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert layers(model).keys() == {"base_model.model.backbone.layers.0.mixer.in_proj"}
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_a_state_space_model_that_calls_its_projection_keeps_its_adapter():
    config = JambaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_offset=1, expert_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    assert layers(get_peft_model(JambaForCausalLM(config), CeraConfig(r=2, target_modules=["out_proj", "x_proj"])))
    with pytest.raises(ValueError, match=r"dt_proj: JambaMambaMixer reads"):
        get_peft_model(JambaForCausalLM(config), CeraConfig(r=2, target_modules=["dt_proj"]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers_to_transform": [9]}, r"layers_to_transform=\[9\] leaves none"),
        ({"layers_to_transform": range(9, 11)}, r"layers_to_transform=\[9, 10\] leaves none"),
        ({"exclude_modules": ["q_proj"]}, r"exclude_modules=\{'q_proj'\} leaves none"),
    ],
)
def test_an_option_that_leaves_no_layer_is_named(options, reason):
    with pytest.raises(ValueError, match=rf"target_modules \['q_proj'\] name 2 modules .*, and {reason}"):
        get_peft_model(small_models.llama(), StellaConfig(r=2, target_modules=["q_proj"], **options))


def test_the_inside_of_an_adapted_layer_is_no_target_and_no_option_is_blamed():
    model = get_peft_model(small_models.llama(), StellaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"Target modules \['base_layer'\] not found in the base model"):
        model.add_adapter("other", StellaConfig(r=2, target_modules=["base_layer"]))


@every_method
def test_half_precision_is_the_same_with_gradients_and_without(method):
    """Policy and reference, or old and new probabilities, are computed one way each; their ratio is to be one."""
    model = adapted(method)
    small_models.train_a_little(model)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = model(IDS).logits
        assert torch.equal(logits(model), with_gradients)


@every_method
def test_a_module_to_save_that_does_not_exist_is_refused(method):
    with pytest.raises(ValueError, match=r"modules_to_save holds 'lm_haed'.* did you mean 'lm_head'\?"):
        adapted(method, modules_to_save=["embed_tokens", "lm_haed"])
    adapted(method, modules_to_save=["embed_tokens", "model.lm_head"])  # base_model.model.lm_head


@every_method
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_tied_embeddings_that_are_trained_stay_tied_where_asked(method, saved, tmp_path):
    """As PEFT's LoRA keeps them: one table, trained by both of its uses, the same after a save and a merge."""

    def tied():
        return small_models.llama(tie_word_embeddings=True)

    model = adapted(method, tied(), modules_to_save=[saved], ensure_weight_tying=True)
    small_models.train_a_little(model)
    table, head = (layer.modules_to_save["default"].weight for layer in ends(model))
    assert table is head
    assert not torch.equal(table, ends(model)[0].original_module.weight)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tied(), tmp_path)), expected)
    if method.merge == "exact":
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@one_of_each_paper
def test_rows_of_tokens_are_tied_without_a_false_warning(method, recwarn):
    options = {"trainable_token_indices": [3, 4], "ensure_weight_tying": True}
    model = adapted(method, small_models.llama(tie_word_embeddings=True), **options)
    rows, head = (layer.token_adapter.trainable_tokens_delta["default"] for layer in ends(model))
    assert rows is head
    assert not [str(w.message) for w in recwarn if "tied" in str(w.message)]


@one_of_each_paper
def test_a_config_may_be_used_again_beside_a_model_that_ties_nothing(method):
    saved = ["lm_head"]
    config = method.config(r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    get_peft_model(small_models.llama(tie_word_embeddings=True), config)
    assert saved == ["lm_head"]
    with pytest.warns(UserWarning, match="no tied modules were found"):
        get_peft_model(small_models.llama(), config)


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@every_method
def test_adapters_cannot_be_tied(method):
    """PEFT ties LoRA's by a transpose, which a nonlinear core does not have."""
    model = small_models.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ensure_weight_tying.*modules_to_save"):
        adapted(method, model, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    adapted(method, model, target_modules=["q_proj"])  # as it was


@exact
def test_a_model_that_was_cast_while_merged_stays_cast(method):
    model = adapted(method)
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert {layer.get_base_layer().weight.dtype for layer in layers(model).values()} == {torch.float16}


def test_an_embeddings_steps_are_scaled_by_its_width_and_not_by_its_vocabulary():
    """Of a model whose config names no hidden size; the gradient's scale is √(d / rows) (METHODS.md)."""
    model = get_peft_model(nn.Sequential(nn.Embedding(500, 16)), StellaConfig(r=4, target_modules=["0"]))
    adapter = layers(model)["base_model.model.0"].adapters["default"]
    assert adapter.up.step_scale == 1
    assert adapter.down.step_scale == pytest.approx((16 / 500) ** 0.5)


def test_lora_is_left_alone():
    assert not layers(get_peft_model(small_models.llama(), LoraConfig(target_modules=["q_proj"])))


class Wrapper(nn.Module):
    """Around a module, as FSDP1's: it counts its calls, and passes on what it is asked for."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.wrapped(x)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


@every_method
def test_what_stands_in_place_of_a_part_is_what_is_called(method):
    config = method.config(target_modules=["first"], init_lora_weights=False, lora_dropout=0.0)
    model = get_peft_model(small_models.Perceptron(), config)
    layer, x = model.base_model.model.first, torch.randn(5, 16)
    expected = model(x)
    expected.sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    for name in layer.adapter_layer_names:
        modules = getattr(layer, name)
        if "default" in modules:
            modules["default"] = Wrapper(modules["default"])
    for each in (copy.deepcopy(model), model):
        output = each(x)
        output.sum().backward()
        torch.testing.assert_close(output, expected)
        wrappers = [module for module in each.modules() if isinstance(module, Wrapper)]
        assert len(wrappers) == len(method.letters)
        if method.name != "aurora-static":  # which reads its weights and calls nothing
            assert all(wrapper.calls for wrapper in wrappers)
        for name, weight in each.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weight.grad, gradients[name.replace("wrapped.", "")])
