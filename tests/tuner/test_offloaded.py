"""Base models that accelerate keeps elsewhere until they compute: their layers' weights are on the meta device."""

import pytest
import small_models
import torch
from accelerate import cpu_offload, disk_offload
from methods import every_method, one_of_each_paper
from peft import PeftModel, get_peft_model

from beyondlora import StellaConfig

IDS = small_models.tokens()
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
OPTIONS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS, "init_lora_weights": False}


def adapted(method, base):
    torch.manual_seed(1)
    return get_peft_model(base, method.config(**OPTIONS)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=["cpu", "disk"])
def away(request, tmp_path):
    """A base model that is not here."""
    base = small_models.mixtral()
    if request.param == "cpu":
        cpu_offload(base, execution_device="cpu")
    else:
        disk_offload(base, tmp_path / "disk", execution_device="cpu")
    assert all(weight.is_meta for weight in base.parameters())
    return base


@every_method
def test_a_new_adapter_is_where_the_layer_computes(method, away):
    model = adapted(method, away)
    assert not any(weight.is_meta for weight in model.parameters() if weight.requires_grad)
    assert torch.equal(logits(model), logits(adapted(method, small_models.mixtral())))
    assert not torch.allclose(logits(model), logits(small_models.mixtral()), atol=1e-4)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(small_models.mixtral()))


@one_of_each_paper
def test_it_trains_and_a_saved_one_is_loaded(method, away, tmp_path):
    model = adapted(method, away)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(small_models.mixtral(), tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected)
    base = small_models.mixtral()
    cpu_offload(base, execution_device="cpu")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


def test_merging_into_experts_that_are_elsewhere_is_refused(away):
    model = get_peft_model(away, StellaConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    with pytest.raises(ValueError, match=r"has been offloaded.*merge there"):
        model.merge_adapter()
