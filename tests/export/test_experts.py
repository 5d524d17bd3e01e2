"""export_lora beside a mixture's experts: PEFT's own form, in which one LoRA has the factors of all of them."""

import json
import shlex
from pathlib import Path

import pytest
import small_models
import torch
from methods import METHODS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import gpt_oss, mixtral
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

import beyondlora
from beyondlora.export.distil import distil
from beyondlora.export.lora import adapted_layers
from beyondlora.tuner.experts import ExpertLinear
from beyondlora.tuner.layer import AdapterLayer

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BASE = "./somewhere/base"
PLACE = "base_model.model.model.layers.0.mlp.experts"
IDS = small_models.tokens()
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
every_form = pytest.mark.parametrize("build", [mixtral, gpt_oss])
static_warning = pytest.mark.filterwarnings("ignore:Merging AuroRA")


def trained(config, base):
    model = get_peft_model(base, config)
    small_models.train_a_little(model)
    return model.eval()


def stella(base, parameters, **options):
    options = {"r": 3, "target_modules": [], **options}
    return trained(beyondlora.StellaConfig(target_parameters=parameters, task_type="CAUSAL_LM", **options), base)


def exported(model, folder):
    record = beyondlora.export_lora(model, folder, base_model=BASE)
    return record, json.loads((folder / "adapter_config.json").read_text())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@every_form
@pytest.mark.parametrize("parameters", [[UP, DOWN], [UP], [DOWN]], ids=["both", "up", "down"])
@pytest.mark.parametrize("modules", [[], ["q_proj"]], ids=["experts alone", "and a linear layer"])
def test_a_user_of_peft_gets_the_live_adapters_logits(build, parameters, modules, tmp_path):
    one_less = {f"layers.0.mlp.experts.1.{parameters[0].split('.')[1]}": 2}
    model = stella(build(), parameters, target_modules=modules, rank_pattern=one_less)
    record, config = exported(model, tmp_path / "lora")
    loaded = logits(PeftModel.from_pretrained(build(), str(tmp_path / "lora")))
    torch.testing.assert_close(loaded, logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded, logits(build()), atol=1e-2)  # the adapter does something
    assert (config["target_modules"], config["target_parameters"]) == (modules, sorted(parameters))
    assert config["r"] == config["lora_alpha"] == record["rank"]
    assert record["layer_gap"]["largest"] < 1e-6
    experts = [path for path in record["layers"] if ".experts." in path]
    assert len(experts) > 2 * len(parameters)  # each expert that the prompts reach, in two layers


def test_the_two_matrices_hold_the_factors_of_each_expert(tmp_path):
    model = stella(mixtral(), [UP, DOWN])
    exported(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # A and B of two parameters in two layers
    for key, place in (("gate_up_proj", f"{PLACE}.base_layer"), ("down_proj", PLACE)):
        A, B = tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
        for index in range(4):
            adapter = model.get_submodule(f"{PLACE}.{index}.{key}").adapters["default"]
            B_MR, A_RN = adapter.lora_factors()
            assert torch.equal(A[3 * index : 3 * index + 3], A_RN)
            assert torch.equal(B[:, [index, 4 + index, 8 + index]], B_MR)


def test_experts_that_the_same_name_means_get_a_lora_of_zeros(tmp_path):
    model = stella(mixtral(), ["layers.0.mlp.experts.down_proj"])
    _, config = exported(model, tmp_path / "lora")
    assert config["target_parameters"] == [DOWN]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].any()
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(mixtral(), str(tmp_path / "lora"))), logits(model), rtol=1e-5, atol=1e-5
    )


def test_a_parameter_that_is_no_experts_is_not_meant(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(3))

    base = mixtral()
    base.experts = Other()  # experts.down_proj, too
    model = stella(base, ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"])
    _, config = exported(model, tmp_path / "lora")
    assert config["target_parameters"] == [f"model.layers.{index}.mlp.experts.down_proj" for index in range(2)]


@static_warning
@pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "static"], ids=lambda method: method.name)
def test_a_static_form_is_what_merging_gives(method, tmp_path):
    config = method.config(target_modules=[], target_parameters=[UP, DOWN], init_lora_weights=False)
    model = trained(config, mixtral())
    record, _ = exported(model, tmp_path / "lora")
    assert record["form"] == "static"
    loaded = logits(PeftModel.from_pretrained(mixtral(), str(tmp_path / "lora")))
    torch.testing.assert_close(loaded, logits(model.merge_and_unload()), rtol=1e-5, atol=1e-5)


def cera():
    options = {"target_modules": [], "target_parameters": [DOWN], "init_lora_weights": False}
    return trained(beyondlora.CeraConfig(r=4, **options), mixtral())


def test_each_expert_is_distilled_on_its_own_tokens(tmp_path):
    data = [{"input_ids": small_models.tokens(rows=16, length=12, seed=seed)} for seed in range(4)]
    model = cera()
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE, batches=data, distil_on=data)
    assert record["form"] == "distilled"
    assert len(record["layers"]) == 2 * 4
    factors = distil(model, adapted_layers(model), data)
    for path, layer in model.named_modules():
        if isinstance(layer, AdapterLayer) and isinstance(layer.get_base_layer(), ExpertLinear):
            inputs = []
            with layer.register_forward_pre_hook(lambda _layer, args, inputs=inputs: inputs.append(args[0].double())):
                for batch in data:
                    with torch.no_grad():
                        model(**batch)
            x = torch.cat(inputs)
            adapter = layer.adapters["default"]
            fitted = torch.linalg.lstsq(x, adapter(x.float()).double().detach()).solution.mT
            B, A = factors[path.removeprefix("base_model.model.")]
            torch.testing.assert_close(B @ A, fitted, rtol=1e-4, atol=1e-6)


def test_padding_is_not_distilled():
    model = cera()
    rows = small_models.tokens(rows=40, length=12)
    mask = torch.ones_like(rows)
    mask[::2, 7:] = 0
    padded = [{"input_ids": rows.where(mask.bool(), torch.zeros(())).long(), "attention_mask": mask}]
    alone = [{"input_ids": row[kept.bool()][None]} for row, kept in zip(rows, mask, strict=True)]
    one, other = (distil(model, adapted_layers(model), batches) for batches in (padded, alone))
    for path, (B, A) in one.items():
        torch.testing.assert_close(B @ A, other[path][0] @ other[path][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parameters", [[DOWN], []], ids=["beside experts", "alone"])
def test_layers_that_peft_takes_for_experts_by_their_names_are_refused(parameters, tmp_path):
    sizes = {**small_models.MIXTURE, "moe_intermediate_size": 12, "n_routed_experts": 4, "first_k_dense_replace": 1}
    heads = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    base = DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, **heads, n_group=1, topk_group=1, n_shared_experts=1))
    model = stella(base.eval(), parameters, target_modules=["down_proj"])
    with pytest.raises(
        ValueError, match=r"PEFT loads another LoRA .* takes .* down_proj for the experts .*--to merged"
    ):
        exported(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_vllm_is_told_the_form(tmp_path):
    record, _ = exported(stella(mixtral(), [DOWN]), tmp_path / "a lora")
    words = shlex.split(record["serve"])
    about = json.loads(words[words.index("--lora-modules") + 1])
    assert about == {"name": "a lora", "path": str(Path(tmp_path / "a lora")), "is_3d_lora_weight": True}
    assert "--enable-mixed-moe-lora-format" in words
