"""Profiles of models: every method and PEFT's own against outputs collected whole and factorised directly."""

import numpy as np
import pytest
import scipy.linalg
import small_models
import torch
from methods import every_method
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

import beyondlora
from beyondlora.adapters.bspline import Spline
from beyondlora.analyse import profile

LAYER = "model.layers.1.mlp.down_proj"
PATH = f"base_model.model.{LAYER}"


def batches(count=3, rows=2, length=12):
    return [{"input_ids": small_models.tokens(rows, length, seed=seed)} for seed in range(count)]


def trained(config):
    model = get_peft_model(small_models.llama(), config)
    small_models.train_a_little(model)
    return model


def lora(**options):
    return trained(
        LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.3, "target_modules": "all-linear"} | options)
    )


def of(layers, name=LAYER):
    return next(layer for layer in layers if layer.name == name)


def whole_outputs(model, inputs, path=PATH):
    """What a layer adds to its base layer, for every token, in float64: run the layer's inputs through it again."""
    layer, seen = model.get_submodule(path), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in inputs:
            model(**batch)
        handle.remove()
        layer.double()
        x = torch.cat([part.flatten(0, -2) for part in seen]).double()
        added = layer(x) - layer.base_layer(x)
        layer.float()
    return added.numpy()


def direct(Y):
    return np.linalg.svd(Y - Y.mean(axis=0), compute_uv=False)


def agrees(layer, Y, tolerance):
    expected = direct(Y)
    sigma = layer.singular_values.numpy()
    short = min(len(sigma), len(expected))
    assert np.abs(sigma[:short] - expected[:short]).max() < tolerance * expected[0]
    assert np.all(expected[short:] < tolerance * expected[0])


@every_method
def test_every_methods_spectrum_is_that_of_its_outputs(method):
    model = trained(method.config(target_modules="all-linear"))
    layers = profile(model, batches())
    assert [layer.tokens for layer in layers] == [72] * 14
    assert {layer.rank for layer in layers} == {4}
    agrees(of(layers), whole_outputs(model, batches()), 1e-5)  # the model runs in float32


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_pefts_lora(options):
    model = lora(**options)
    layer = of(profile(model, batches()))
    agrees(layer, whole_outputs(model, batches()), 1e-5)
    assert layer.rank == 4
    assert layer.nonlinear_share is None


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
        LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False),
    ],
    ids=["dora", "loha"],
)
def test_methods_without_a_bottleneck_are_followed_by_their_whole_outputs(config):
    model = trained(config)
    layer = of(profile(model, batches()))
    agrees(layer, whole_outputs(model, batches()), 1e-5)
    assert layer.rank is None
    assert len(layer.singular_values) == 32


def test_a_layer_that_is_told_more_than_its_base_layer_takes_is_followed():
    """PEFT's activated LoRA: its layers are told where the tokens begin that call for it."""
    options = {"alora_invocation_tokens": [5], "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(small_models.llama(), LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
    seen = [
        {**batch, "input_ids": batch["input_ids"].clone().index_fill(1, torch.tensor([2]), 5)} for batch in batches()
    ]
    assert all(layer.singular_values[0] > 0 for layer in profile(model, seen))


@every_method
def test_a_weight_updates_spectrum_is_numpys_and_absent_where_there_is_none(method):
    model = trained(method.config(target_modules="all-linear"))
    layer, update = model.get_submodule(PATH), of(profile(model, batches())).update
    if method.merge == "refused":
        assert update is None
        return
    assert update.form == method.merge
    expected = np.linalg.svd(layer.get_delta_weight("default").double().numpy(), compute_uv=False)
    np.testing.assert_allclose(update.singular_values, expected[:4], atol=2e-6 * expected[0])


@every_method
def test_only_nonlinear_methods_have_a_nonlinear_share(method):
    layers = profile(trained(method.config(target_modules="all-linear")), batches())
    shares = [layer.nonlinear_share for layer in layers]
    if method.merge == "exact":
        assert shares == [None] * 14
    else:
        assert all(0 < share < 1 for share in shares)


@every_method
def test_input_directions_are_those_of_the_affine_map_nearest_to_the_branch(method):
    model = trained(method.config(target_modules="all-linear"))
    layer, seen = model.get_submodule(PATH), []
    found = of(profile(model, batches())).input_directions.numpy()
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
        handle.remove()
        x = torch.cat([part.flatten(0, -2) for part in seen])
        layer.double()
        added = (layer(x.double()) - layer.base_layer(x.double())).numpy()
        down = layer.adapters["default"].down.weight
        z = (x.double() @ down.mT).numpy()  # what enters the core
        layer.float()
    # The least squares of the outputs on [1, z], as a map of the layer's input; a linear branch is its ΔW.
    slope = np.linalg.lstsq(np.c_[np.ones(len(z)), z], added, rcond=None)[0][1:].T @ down.detach().numpy()
    if method.merge == "exact":
        slope = layer.get_delta_weight("default").detach().double().numpy()
    _, sigma, Vh = np.linalg.svd(slope)
    count = int((np.cumsum(sigma**2) < 0.9 * (sigma**2).sum()).sum()) + 1
    assert found.shape == (48, count)
    assert scipy.linalg.subspace_angles(found, Vh[:count].T).max() < 1e-4  # the model runs in float32


def test_what_has_no_bottleneck_has_no_input_directions():
    assert of(profile(lora(use_dora=True), batches())).input_directions is None


@every_method
def test_stiefel_factors_report_their_distance_and_others_none(method):
    model = trained(method.config(target_modules="all-linear"))
    found = of(profile(model, batches())).orthonormality
    if "U" not in method.letters:
        assert found is None
        return
    weight = model.get_submodule(PATH).stella_U["default"].weight.detach().double().numpy()
    assert found["U"] == pytest.approx(np.abs(weight.T @ weight - np.eye(4)).max(), rel=1e-6)
    assert set(found) == {"U", "Vt"}
    assert max(found.values()) < 1e-5


def test_padding_is_no_token():
    model = lora()
    ids, mask = small_models.tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    padded = profile(model, [{"input_ids": ids, "attention_mask": mask}])
    apart = profile(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :7]}])
    assert [layer.tokens for layer in padded] == [19] * 14
    for one, other in zip(padded, apart, strict=True):
        np.testing.assert_allclose(one.singular_values, other.singular_values, atol=1e-5 * other.singular_values[0])


def test_padding_is_no_token_where_a_model_flattens_its_hidden_states():
    """OPT's fc1 and fc2 get (B·L, C)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 2}
    base = OPTForCausalLM(OPTConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=64, **sizes)).eval()
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    ids, mask = small_models.tokens(4), torch.ones(4, 12, dtype=torch.long)
    mask[1:, 3:] = 0
    whole = profile(get_peft_model(base, config), [{"input_ids": ids, "attention_mask": mask}])
    assert [layer.tokens for layer in whole] == [int(mask.sum())] * 2


def test_padding_is_no_token_of_an_expert():
    config = beyondlora.CeraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"], init_lora_weights=False
    )
    model = get_peft_model(small_models.mixtral(), config)
    ids, mask = small_models.tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:], mask[2, :4] = 0, 0
    padded = profile(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    apart = profile(model, [{"input_ids": row} for row in (ids[:1], ids[1:2, :7], ids[2:, 4:])])
    of_experts = [layer.tokens for layer in padded if "experts" in layer.name and "layers.0" in layer.name]
    assert len(of_experts) == 4
    assert sum(of_experts) == 2 * (12 + 7 + 8)
    for one, other in zip(padded, apart, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.singular_values, other.singular_values, atol=1e-5 * other.singular_values[0])


def test_pefts_lora_of_experts_is_followed_by_what_it_changes():
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(small_models.mixtral(), config).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    found = {layer.name: layer for layer in profile(model, batches())}
    assert sorted(found) == [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]
    outputs = []
    experts = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    handle = experts.register_forward_hook(lambda *call: outputs.append(call[2]))
    for scaling in (1, 0):
        experts.scaling["default"] *= scaling
        with torch.no_grad():
            for batch in batches():
                model(**batch)
    handle.remove()
    half = len(outputs) // 2
    agrees(found["model.layers.1.mlp.experts.down_proj"], torch.cat(outputs[:half]) - torch.cat(outputs[half:]), 1e-4)


def test_max_tokens_takes_the_first_ones_and_stops():
    model, asked = lora(), []

    def endless():
        for batch in batches(100):
            asked.append(1)
            yield batch

    layers = profile(model, endless(), max_tokens=30)
    assert {layer.tokens for layer in layers} == {30}
    assert len(asked) == 2
    agrees(of(layers), whole_outputs(model, batches(2))[:30], 1e-5)


def test_max_tokens_holds_for_outputs_followed_whole_too():
    model = lora(use_dora=True)
    layers = profile(model, batches(), max_tokens=30)
    assert {layer.tokens for layer in layers} == {30}
    agrees(of(layers), whole_outputs(model, batches(2))[:30], 1e-5)


def test_the_model_is_left_as_it_was():
    model = lora().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    profile(model, batches())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dead_units():
    model = lora()
    with torch.no_grad():
        model.get_submodule(PATH).lora_B["default"].weight[:, 1] = 0
        model.get_submodule(PATH).lora_A["default"].weight[2] *= 1e-4
        model.get_submodule(PATH).lora_A["default"].weight[3] *= 0.02  # weak, and alive
    layers = profile(model, batches())
    assert of(layers).dead_units == 0.5
    assert layers[0].dead_units == 0


@pytest.mark.parametrize(("share", "dead"), [(0.9e-3, 0.25), (1.1e-3, 0)])
def test_a_unit_is_dead_beside_the_strongest_one(share, dead):
    model, seen = lora(), []
    down, up = (model.get_submodule(PATH).get_submodule(part)["default"] for part in ("lora_A", "lora_B"))
    handle = down.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, -2)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
        handle.remove()
        h_TR = torch.cat(seen)
        parts_R = (h_TR - h_TR.mean(0)).norm(dim=0) * up.weight.norm(dim=0)
        weakest = parts_R.argmin()
        up.weight[:, weakest] *= share * parts_R.max() / parts_R[weakest]
    assert of(profile(model, batches())).dead_units == dead


def test_saturated_units_are_where_the_activation_is_flat():
    model = trained(beyondlora.CeraConfig(r=4, cera_activation="relu", target_modules="all-linear"))
    layer, seen = model.get_submodule(PATH), []
    with torch.no_grad():
        layer.cera_A["default"].weight[0] = 0
    handle = layer.adapters["default"].core.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    z_TR = torch.cat([z.flatten(0, -2) for z in seen])
    found = of(profile(model, batches()))
    assert found.saturated == pytest.approx((z_TR <= 0).double().mean().item())  # ReLU: flat where it is off
    assert found.saturated_units == ((z_TR <= 0).double().mean(dim=0) >= 0.99).double().mean()
    assert found.saturated_units >= 0.25


@pytest.mark.parametrize("options", [{}, {"aurora_spline": "per_dim"}, {"aurora_mode": "static"}])
def test_splines_say_where_their_inputs_fall_and_what_they_learned(options):
    model = trained(beyondlora.AuroraConfig(r=3, aurora_grid_range=(-0.5, 1.0), target_modules="all-linear", **options))
    spline = next(m for m in model.get_submodule(PATH).adapters["default"].modules() if isinstance(m, Spline))
    seen = []
    handle = spline.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten()))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    (found,) = of(profile(model, batches())).splines
    edges = np.r_[-np.inf, np.linspace(-0.5, 1.0, 6), np.inf]
    counts, _ = np.histogram(torch.cat(seen).numpy(), edges)
    np.testing.assert_allclose(found.occupancy, counts / counts.sum(), atol=1e-12)
    assert (found.z[0], found.z[-1]) == pytest.approx((-0.5 - 3 * 0.3, 1.0 + 3 * 0.3))  # as far as the basis reaches
    # The curve of one component: the spline's own output with only that component inside the grid's reach.
    for place in (10, 50, 77):
        z = torch.full((3, 3), 1e3).fill_diagonal_(found.z[place])
        alone = spline(z)
        expected = alone.diagonal() if options.get("aurora_spline") == "per_dim" else alone[0]
        np.testing.assert_allclose(found.curves[place], expected.detach(), atol=1e-6)


# What cannot be described --------------------------------------------------------------------------------------------


def test_a_merged_a_disabled_and_an_absent_adapter_are_refused():
    model = lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base weight.*unmerge_adapter"):
        profile(model, batches())
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="disabled"), model.disable_adapter():
        profile(model, batches())
    assert profile(model, batches())
    with pytest.raises(ValueError, match="no adapter beside any of its layers"):
        profile(model.unload(), batches())


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, beyondlora.CeraConfig], ids=lambda kind: kind.__name__)
def test_weights_that_are_not_finite_are_refused(config):
    model = trained(config(r=4, target_modules=["q_proj", "down_proj"]))
    layer = model.get_submodule(PATH)
    weight = next(weight for name, weight in layer.named_parameters() if "base_layer" not in name)
    weight.data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"{LAYER}: the adapter's weights are not finite"):
        profile(model, batches())


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig], ids=lambda kind: kind.__name__)
def test_a_base_model_whose_hidden_states_are_not_finite_is_refused(config):
    model = trained(config(r=4, target_modules=["q_proj", "down_proj"]))
    model.get_submodule("base_model.model.model.layers.1.post_attention_layernorm").weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=rf"{LAYER}: what passes here is not finite on this data"):
        profile(model, batches())


def test_virtual_tokens_adapt_no_layer():
    model = get_peft_model(small_models.llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens"):
        profile(model, batches())


def test_two_adapters_at_once_are_refused():
    model = get_peft_model(small_models.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"2 adapters are active .*set_adapter"):
        profile(model, batches())


def test_layers_of_another_adapter_that_is_at_rest_are_left_out():
    model = get_peft_model(small_models.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    alone = profile(model, batches())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    beside = profile(model, batches())
    assert [layer.name for layer in beside] == [layer.name for layer in alone]
    assert [layer.effective_rank for layer in beside] == [layer.effective_rank for layer in alone]
    model.set_adapter("second")
    assert all(layer.name.endswith("v_proj") for layer in profile(model, batches()))


def test_an_untrained_adapter_is_refused_and_one_untrained_layer_is_left_without_figures():
    model = get_peft_model(small_models.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="untrained"):
        profile(model, batches())
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_B["default"].weight[0, 0] = 1
    layers = profile(model, batches())
    assert [layer.effective_rank is not None for layer in layers] == [True, False, False, False]
    assert layers[0].effective_rank == pytest.approx(1)
    assert layers[0].manifold_dimension == 1


def test_layers_that_saw_no_token():
    model = lora(target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"saw two tokens.*give more rows"):
        profile(model, [])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        profile(model, batches(), max_tokens=1)
    model.get_submodule("base_model.model.model.layers.1.mlp").forward = lambda x: x  # its down_proj is never called
    first, second = profile(model, batches())
    assert (first.tokens, second.tokens) == (72, 0)
    assert second.effective_rank is None
    asked = iter(batches())
    assert profile(model, asked, max_tokens=30)[0].tokens == 30
    assert next(asked, None) is not None  # nobody waits for a layer that sees nothing


def test_outputs_too_wide_to_be_followed_whole_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("beyondlora.analyse.branches.WIDEST_WHOLE", 40)
    model = trained(LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj and 1 more: .*no bottleneck.*The limit is 40"):
        profile(model, [])


def test_a_difference_of_half_precision_outputs_is_refused():
    model = get_peft_model(small_models.llama().bfloat16(), LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"bfloat16 it is mostly rounding"):
        profile(model, batches())
