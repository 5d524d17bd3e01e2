"""DeepSpeed's engine itself, two processes on a CPU, trains as one process does without it.

DeepSpeed is no dependency of the tests, as it is built against the torch that is installed:
pip install --no-build-isolation deepspeed.
"""

import json

import pytest
import small_models
import small_runs
import torch
from accelerated import launch
from safetensors.torch import load_file

from beyondlora.train import train

pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def launch_zero(stage, recipe, folder, monkeypatch):
    """Train a recipe by two processes under ZeRO. Returns: the exit code, and what was said."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})  # cut small ones, too
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": zero} | dict.fromkeys(automatic, "auto")
    (folder / "zero.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "accelerate.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
        f"deepspeed_config:\n  deepspeed_config_file: {folder / 'zero.json'}\n  zero3_init_flag: false\n",
        encoding="utf-8",
    )
    machine = ["--config_file", str(folder / "accelerate.yaml")]
    return launch([machine], folder / "recipe.yaml", folder / "home")[0]


@pytest.mark.parametrize(
    ("method", "stage"), [*((method, stage) for method in ("aurora", "stella") for stage in (1, 2, 3)), ("full", 3)]
)
def test_under_zero_a_recipe_trains_to_what_one_process_makes_of_it(method, stage, house, tmp_path, monkeypatch):
    adapter = {"peft_type": "FULL"} if method == "full" else small_runs.ADAPTERS[method] | {"lora_dropout": 0.0}
    options = {"adapter": adapter, "max_steps": 6, "learning_rate": 1e-3 if method == "full" else 1e-2}
    half = small_runs.recipe(house, **options, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    code, said = launch_zero(stage, half, tmp_path, monkeypatch)
    assert code == 0, said
    assert "Stiefel" not in said
    train(small_runs.recipe(house, **options, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / run / "adapter" / file) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)  # float32 means of halves, through Adam


@pytest.mark.parametrize("stage", [2, 3])
def test_experts_that_are_a_parameter_train_alike(stage, house, tmp_path, monkeypatch):
    model = small_runs.base(tmp_path / "mixture", small_models.mixtral())
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    options = {"adapter": small_runs.ADAPTERS["stella"] | experts, "max_steps": 4, "model_name_or_path": str(model)}
    half = small_runs.recipe(house, **options, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    code, said = launch_zero(stage, half, tmp_path, monkeypatch)
    assert code == 0, said
    train(small_runs.recipe(house, **options, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    one, two = (small_runs.weights(tmp_path / run / "adapter") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
