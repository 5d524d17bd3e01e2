"""Adapters beside the experts of a mixture, which transformers holds in parameters: each expert gets its own."""

import copy
import importlib
import pathlib
import pickle
import re
import warnings

import pytest
import small_models
import torch
import transformers.models
from methods import METHODS, every_method, one_of_each_paper
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import gpt_oss, mixtral
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from beyondlora import CeraConfig, StellaConfig
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.experts import ExpertLinear, OpenExperts, close_experts, open_experts
from beyondlora.tuner.layer import AdapterLayer

IDS = small_models.tokens(rows=3)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
every_form = pytest.mark.parametrize("build", [mixtral, gpt_oss])


def adapted(method, base, **options):
    """A model whose experts alone have adapters, not at their start."""
    torch.manual_seed(1)
    options = {"init_lora_weights": False, "target_modules": [], "target_parameters": EXPERTS, **options}
    model = get_peft_model(base, method.config(task_type="CAUSAL_LM", **options)).eval()
    for layer in layers_of(model).values() if options["init_lora_weights"] is False else ():
        for adapter in layer.adapters.values():
            adapter.scaling = 3.0  # far from the base model's output
    return model


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate")]


def token_by_token(experts, x, index, weights):
    """The oracle: the definition, with nothing sorted, grouped or fused."""
    rows = []
    for token, chosen, weight in zip(x, index, weights, strict=True):
        total = torch.zeros_like(token)
        for e, w in zip(chosen.tolist(), weight, strict=True):
            up, down = experts.get_submodule(str(e)).values()
            hidden = experts._apply_gate(one_layer(up, token))
            total = total + w * one_layer(down, hidden)
        rows.append(total)
    return torch.stack(rows)


def one_layer(layer, x):
    linear = layer.get_base_layer()
    parameter = getattr(linear.experts, linear.name)[linear.index]
    y = x @ (parameter if linear.experts.is_transposed else parameter.T)
    if linear.experts.has_bias:
        y = y + getattr(linear.experts, f"{linear.name}_bias")[linear.index]
    return y + sum(adapter(x) for adapter in layer.adapters.values())


class AnySizes:
    """A config that has every name: few experts, small sizes."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        for part, value in {"act": "silu", "expert": 4, "limit": 1.7, "alpha": 1.7, "eps": 1e-6}.items():
            if part in name:
                return value
        return 8


def kinds_of_experts():
    """The classes of experts that transformers computes in one way, by the file that they are in."""
    for path in sorted(pathlib.Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation(?:\([^)]*\))?\s*class (\w+)", path.read_text("utf-8")):
            yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


def test_every_mixture_of_transformers_is_the_same_opened():
    torch.manual_seed(0)
    kinds = list(kinds_of_experts())
    assert len(kinds) > 40
    for kind in kinds:
        experts = kind(AnySizes()).eval()
        for weight in experts.parameters():
            nn.init.normal_(weight, std=0.3)
        names, width = list(experts.state_dict()), experts.down_proj.shape[2 if experts.is_transposed else 1]
        x, (weights, index) = torch.randn(11, width), torch.rand(11, 4).topk(2)
        expected = experts(x, index, weights)
        open_experts(experts)
        assert list(experts.state_dict()) == names
        assert all(isinstance(layer, ExpertLinear) for layer in experts.get_submodule("0").values())
        experts._is_whole = lambda: False  # as if there were adapters
        torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-5, atol=1e-5)
        close_experts(nn.Sequential(experts))
        assert type(experts) is kind
        assert list(experts.state_dict()) == names


@every_form
@every_method
def test_outputs_and_gradients_are_those_of_the_definition(method, build):
    model = adapted(method, build().double())
    experts = experts_of(model)[0]
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    weights, index = torch.rand(9, 4, dtype=torch.float64).topk(2)
    weights.requires_grad_()
    wanted = [x, weights, *(weight for weight in experts.parameters() if weight.requires_grad)]
    direction = torch.randn(9, 16, dtype=torch.float64)
    results = []
    for output in (experts(x, index, weights), token_by_token(experts, x, index, weights)):
        results.append([output, *torch.autograd.grad((output * direction).sum(), wanted)])
    assert len(wanted) == 2 + 8 * len(method.letters)
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@every_form
def test_without_an_activation_it_is_the_lora_of_peft(build):
    model = adapted(next(m for m in METHODS if m.name == "cera-linear"), build(), lora_dropout=0.0)
    options = {"r": 4, "lora_alpha": 12, "target_modules": [], "target_parameters": EXPERTS}
    theirs = get_peft_model(build(), LoraConfig(**options)).eval()
    weights = dict(theirs.named_parameters())
    for name, layer in layers_of(model).items():
        holder, index, key = name.rsplit(".", 2)
        place = ".base_layer" if key == "gate_up_proj" else ""  # PEFT's wrappers are around each other
        adapter, e = layer.adapters["default"], int(index)
        with torch.no_grad():
            weights[f"{holder}{place}.lora_A.default.weight"].unflatten(0, (4, -1))[e] = adapter.down.weight
            weights[f"{holder}{place}.lora_B.default.weight"].unflatten(1, (-1, 4))[:, :, e] = adapter.up.weight
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(build()), atol=1e-2)


@every_form
@every_method
def test_the_start_training_saving_and_loading(method, build, tmp_path):
    model = adapted(method, build(), init_lora_weights=method.options.get("init_lora_weights", True))
    assert torch.allclose(logits(model), logits(build()), atol=1e-5) == method.noop_start
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    factors = [module for module in model.modules() if isinstance(module, StiefelLinear)]
    assert len(factors) == (32 if method.prefix == "stella_" else 0)
    assert all(distance_to_stiefel(factor.orthonormal) < 2e-6 for factor in factors)
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(moved) == 2 * 4 * 2 * len(method.letters)
    assert f"base_model.model.model.layers.0.mlp.experts.3.down_proj.{method.prefix}{method.letters[0]}.weight" in saved
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model))


@every_form
@pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "exact"], ids=lambda m: m.name)
def test_merged_the_experts_are_the_class_they_were(method, build):
    model = adapted(method, build())
    before, live = copy.deepcopy(build().state_dict()), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(
        torch.equal(weight, before[name])
        for name, weight in model.get_base_model().state_dict().items()
        if name in before
    )
    base = model.merge_and_unload()
    torch.testing.assert_close(logits(base), live, rtol=1e-4, atol=1e-4)
    assert list(base.state_dict()) == list(before)
    assert not any(isinstance(module, OpenExperts) for module in base.modules())


@every_form
def test_disabled_while_they_are_merged_the_experts_are_the_base_models(build):
    model = adapted(next(m for m in METHODS if m.name == "stella"), build())
    live = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(build()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)


@every_form
@one_of_each_paper
def test_unloaded_nothing_is_left(method, build):
    base = adapted(method, build()).unload()
    assert torch.equal(logits(base), logits(build()))
    assert [type(module) for module in base.modules()] == [type(module) for module in build().modules()]


@one_of_each_paper
def test_an_expert_without_tokens_has_a_gradient_of_zero(method):
    model = adapted(method, mixtral(experts=16)).train()
    model(IDS[:1, :2], labels=IDS[:1, :2]).loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert any(not gradient.any() for gradient in gradients)


def test_no_tokens_are_no_output():
    model = adapted(METHODS[0], mixtral())
    with torch.no_grad():
        assert experts_of(model)[0](torch.zeros(0, 16), torch.zeros(0, 2).long(), torch.zeros(0, 2)).shape == (0, 16)


@every_form
@one_of_each_paper
def test_copies_are_copies(method, build):
    model = adapted(method, build())
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        for experts in experts_of(twin):
            nn.init.zeros_(experts.down_proj)
        assert not torch.equal(logits(twin), expected)
        assert torch.equal(logits(model), expected)


def test_sums_of_adapters_on_other_experts():
    torch.manual_seed(1)
    model = get_peft_model(mixtral(), StellaConfig(r=2, target_modules=["q_proj"]), adapter_name="attention")
    model.add_adapter(
        "up", StellaConfig(r=3, target_modules=[], target_parameters=["layers.0.mlp.experts.gate_up_proj"])
    )
    model.add_adapter("both", StellaConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    parts = {"attention": 0.5, "up": 2.0, "both": -1.0}
    model.add_weighted_adapter(list(parts), list(parts.values()), "sum")
    for layer in layers_of(model).values():
        expected = sum(
            weight * layer.get_delta_weight(name) for name, weight in parts.items() if name in layer.adapters
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-6)
    assert len(layers_of(model)) == 2 + 2 * 2 * 4


@one_of_each_paper
def test_each_row_of_a_batch_has_its_own_adapter(method):
    model = adapted(method, mixtral(), target_modules=["q_proj"])
    torch.manual_seed(2)
    model.add_adapter("other", method.config(target_modules=[], target_parameters=EXPERTS[1:], init_lora_weights=False))
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        mixed = model(IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(IDS[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(IDS[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], mixed[2], atol=1e-3)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@one_of_each_paper
def test_checkpointing_and_half_precision(method):
    model = adapted(method, mixtral()).train()
    model.base_model.model.config.use_cache = False
    results = []
    for turn in range(2):
        if turn:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        results.append([weight.grad.clone() for weight in model.parameters() if weight.requires_grad])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    half = adapted(method, mixtral().bfloat16())
    assert {weight.dtype for weight in half.parameters() if weight.requires_grad} == {torch.float32}
    difference = logits(half).float() - logits(adapted(method, mixtral()))
    assert difference.abs().median() < 0.02  # single tokens may go to other experts


def test_which_experts_are_meant():
    def adapted_by(**options):
        model = get_peft_model(mixtral(), StellaConfig(r=2, target_modules=["q_proj"], **options))
        return {re.sub(r"\.\d+\.(?=gate|down)", ".*.", name).split("layers.")[1] for name in layers_of(model)}

    attention = {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    down, up = ({f"{index}.mlp.experts.*.{name}" for index in range(2)} for name in ("down_proj", "gate_up_proj"))
    assert adapted_by(target_parameters=EXPERTS) == attention | down | up
    assert adapted_by(target_parameters=["down_proj"]) == attention | down
    assert adapted_by(target_parameters=["layers.1.mlp.experts.down_proj"]) == attention | {"1.mlp.experts.*.down_proj"}
    only = adapted_by(target_parameters=["experts.down_proj"], layers_to_transform=[1])
    assert only == {"1.self_attn.q_proj", "1.mlp.experts.*.down_proj"}
    without = adapted_by(target_parameters=EXPERTS, exclude_modules=["layers.0.mlp.experts.down_proj"])
    assert without == attention | up | {"1.mlp.experts.*.down_proj"}
    without = adapted_by(target_parameters=EXPERTS, exclude_modules=r".*layers\.0\.mlp\.experts\..*")
    assert without == attention | {"1.mlp.experts.*.down_proj", "1.mlp.experts.*.gate_up_proj"}
    ranks = {"down_proj": 3, r"experts\.2\.gate_up_proj": 5}
    model = get_peft_model(mixtral(), CeraConfig(r=2, target_parameters=EXPERTS, rank_pattern=ranks))
    found = {name.split("layers.")[1]: layer.adapters["default"].rank for name, layer in layers_of(model).items()}
    for name, rank in found.items():
        assert rank == (3 if name.endswith("down_proj") else 5 if name.endswith("2.gate_up_proj") else 2)
    assert len(found) == 2 * (2 + 8)


def test_target_modules_do_not_mean_experts_that_another_adapter_has_opened():
    model = get_peft_model(mixtral(), CeraConfig(r=2, target_modules=[], target_parameters=EXPERTS[:1]))
    for name, targets in (("ends", ["down_proj", "q_proj"]), ("all", "all-linear")):
        model.add_adapter(name, CeraConfig(r=2, target_modules=targets, target_parameters=[]))
        having = {key.rsplit(".", 1)[1] for key, layer in layers_of(model).items() if name in layer.adapters}
        assert having == ({"q_proj"} if name == "ends" else {"q_proj", "k_proj", "v_proj", "o_proj"})


@pytest.mark.parametrize(("targets", "said"), [("all-linear", 1), (["q_proj", "w1"], 1), (["q_proj", "v_proj"], 0)])
def test_experts_that_get_no_adapter_are_told(targets, said):
    def warned(base, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_peft_model(base, StellaConfig(r=2, target_modules=targets, **options))
        return [text for warning in caught if "experts are no layers" in (text := str(warning.message))]

    sentences = warned(mixtral())
    assert len(sentences) == said
    assert all("target_parameters=['experts.down_proj', 'experts.gate_up_proj'] gives" in text for text in sentences)
    assert not warned(mixtral(), target_parameters=[])
    assert [text for text in warned(llama4()) if "target_parameters" in text] == []
    assert len(warned(llama4())) == said


def llama4() -> Llama4ForCausalLM:
    """Its experts multiply all tokens by all experts, in a class of their own."""
    sizes = {**small_models.MIXTURE, "intermediate_size_mlp": 12, "use_qk_norm": False}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes)).eval()


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (llama4, {}, r"down_proj: Llama4TextExperts does not compute as transformers' experts do"),
        (mixtral, {"target_parameters": ["q_proj.weight"]}, r"q_proj.weight: Linear does not compute as"),
        (mixtral, {"target_parameters": ["gate.weight"]}, r"gate.weight: MixtralTopKRouter does not compute as"),
        (gpt_oss, {"target_parameters": ["experts.down_proj_bias"]}, r"adapted at gate_up_proj and down_proj; leave"),
        (mixtral, {"target_parameters": ["experts.w1"]}, r"\['experts.w1'\] not found .* \['experts.down_proj', 'exp"),
        (small_models.llama, {}, r"not found in the base model LlamaForCausalLM. It has no experts."),
        (mixtral, {"layers_to_transform": [7]}, r"name 4 parameters .*layers_to_transform=\[7\] leaves none"),
        (mixtral, {"r": 13}, r"down_proj: .*13"),
        (mixtral, {"target_parameters": "experts.down_proj"}, r"target_parameters='experts.down_proj' .* give a list"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(build, options, reason):
    base = build()
    with pytest.raises(ValueError, match=reason):
        get_peft_model(base, StellaConfig(**{"target_modules": [], "target_parameters": EXPERTS, "r": 2, **options}))
    assert [type(module) for module in base.modules()] == [type(module) for module in build().modules()]


def test_experts_that_are_split_over_devices_are_refused():
    base = mixtral()
    experts_of(base)[0]._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"split over devices, by expert or tensor parallelism"):
        get_peft_model(base, CeraConfig(r=2, target_parameters=EXPERTS))


def test_experts_that_a_kernel_computes_are_refused():
    base = mixtral()
    base.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: MixtralExperts or what is around .* kernel"):
        get_peft_model(base, CeraConfig(r=2, target_parameters=EXPERTS))


def test_experts_of_packed_numbers_are_refused():
    base = mixtral()
    experts = experts_of(base)[0]
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj: its numbers are packed"):
        get_peft_model(base, CeraConfig(r=2, target_parameters=EXPERTS))
