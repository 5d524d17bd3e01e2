"""The plug-in for Axolotl: its own check of recipes takes ours, and its own loader puts the adapter on.

Axolotl is not part of the development environment (it pins the versions of most of it). To run this:
`pip install --no-deps axolotl addict posthog distro`.
"""

import pytest
import small_models
import torch
from methods import one_of_each_paper
from peft import PeftModel

pytest.importorskip("axolotl.integrations.base")
PLUGIN = "beyondlora.axolotl.BeyondLoraPlugin"


@pytest.fixture
def load(monkeypatch):
    """Axolotl's loader, with a manager of plug-ins that knows ours."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import adapter as loaders
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    manager.register(PLUGIN)
    yield lambda model, **recipe: loaders.load_adapter(model, DictDefault(recipe), recipe["adapter"])
    manager.plugins.clear()
    manager.plugins.update(before)


@one_of_each_paper
def test_axolotls_loader_attaches_the_method(load, method):
    model, config = load(
        small_models.llama(), adapter=method.name, lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_linear=True
    )
    assert isinstance(model, PeftModel)
    assert type(config) is method.config_cls
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 8, 0.0, "CAUSAL_LM")
    assert len([name for name, _ in model.named_modules() if name.endswith("base_layer")]) == 14


def test_more_fields_of_the_config_stand_in_the_recipe_too(load):
    recipe = {"adapter": "stella", "lora_target_modules": ["q_proj"], "beyondlora": {"stella_retraction": "exp_map"}}
    _, config = load(small_models.llama(), **recipe)
    assert (config.target_modules, config.stella_retraction) == ({"q_proj"}, "exp_map")
    with pytest.raises(ValueError, match="no key 'stella_retractoin', did you mean 'stella_retraction'"):
        load(small_models.llama(), **recipe | {"beyondlora": {"stella_retractoin": "polar"}})


def test_experts_are_named_as_for_its_lora(load):
    model, config = load(small_models.mixtral(), adapter="cera", lora_r=2, lora_target_parameters=["experts.down_proj"])
    assert config.target_parameters == ["experts.down_proj"]
    assert any(name.endswith("experts.3.down_proj.base_layer") for name, _ in model.named_modules())


def test_what_is_made_for_lora_alone_is_refused(load):
    with pytest.raises(ValueError, match="peft_use_dora, load_in_4bit: Axolotl has this for its LoRA alone"):
        load(small_models.llama(), adapter="cera", lora_target_linear=True, peft_use_dora=True, load_in_4bit=True)


@one_of_each_paper
def test_a_trained_adapter_goes_on_training(load, method, tmp_path):
    recipe = {"adapter": method.name, "lora_r": 4, "lora_target_linear": True}
    model, _ = load(small_models.llama(), **recipe)
    small_models.train_a_little(model)
    model.save_pretrained(tmp_path)
    loaded, _ = load(small_models.llama(), **recipe, lora_model_dir=str(tmp_path))
    ids = small_models.tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    assert loaded.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0] > 0


def test_other_adapters_are_left_to_axolotl(load):
    from axolotl.utils.dict import DictDefault

    from beyondlora.axolotl import BeyondLoraPlugin

    assert BeyondLoraPlugin().load_adapter(small_models.llama(), DictDefault(adapter="lora")) is None


def test_axolotls_check_of_a_recipe_takes_the_added_keys(load):
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    recipe = DictDefault(
        base_model="a/base",
        datasets=[{"path": "rows.jsonl", "type": "alpaca"}],
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        plugins=[PLUGIN],
        adapter="aurora",
        lora_r=2,
        lora_target_linear=True,
        beyondlora={"aurora_grid_size": 7},
    )
    prepare_plugins(recipe)
    checked = validate_config(recipe)
    assert (checked.adapter, dict(checked.beyondlora)) == ("aurora", {"aurora_grid_size": 7})
