"""A recipe under accelerate's FSDP2: two gloo processes, each with its shards, train what one process trains."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import small_runs
import torch
from accelerated import TESTS, launch
from safetensors.torch import load_file

from beyondlora.recipe import Recipe
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHARDS = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--num_processes",
    "2",
]
METHODS = {name: adapter | {"lora_dropout": 0.0} for name, adapter in small_runs.ADAPTERS.items()}
METHODS["full"] = {"peft_type": "FULL"}


def launch_shards(recipe: Recipe, folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    """Train a recipe by two processes under FSDP2. Returns: the exit code, and what was said."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    program = [str(TESTS / "fsdp_on_cpu.py")]
    return launch([SHARDS], folder / "recipe.yaml", folder / "home", program=program, options=options, **variables)[0]


def recipes(house: Path, folder: Path, **options: Any) -> tuple[Recipe, Recipe]:
    """The same steps for one process and, in halves, for two."""
    return (
        small_runs.recipe(house, per_device_train_batch_size=4, output_dir=str(folder / "one"), **options),
        small_runs.recipe(house, per_device_train_batch_size=2, output_dir=str(folder / "two"), **options),
    )


def assert_the_same(folder: Path, file: str = "adapter_model.safetensors") -> None:
    one, two = (load_file(folder / run / "adapter" / file) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)  # float32 means of halves, through Adam
    mine, theirs = (small_runs.rows(folder / run) for run in ("one", "two"))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for key in ("loss", "eval_loss"):  # and not grad_norm: old versions log one process's part of it
        found, expected = ([row[key] for row in rows if key in row] for rows in (theirs, mine))
        assert found == pytest.approx(expected, abs=1e-4)


def test_killed_and_resumed_the_shards_come_to_what_one_process_makes_of_it(house, tmp_path):
    one, two = recipes(house, tmp_path, adapter=METHODS["stella"], max_steps=6)
    code, said = launch_shards(two, tmp_path, DIES_AT="checkpoint-6")
    assert code != 0, said
    assert not (tmp_path / "two" / "metrics.json").exists()
    (checkpoint,) = (tmp_path / "two" / "checkpoints").glob("checkpoint-4")
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir()  # shards, and not data parallel
    assert small_runs.weights(checkpoint).keys()
    code, said = launch_shards(two, tmp_path, "--resume")
    assert code == 0, said
    assert "Resuming from step" in said
    assert "Stiefel" not in said
    train(one)
    assert_the_same(tmp_path)


def test_experts_that_are_a_parameter_train_in_shards(house, tmp_path):
    model = small_runs.base(tmp_path / "mixture", small_models.mixtral())
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = METHODS["stella"] | {"target_modules": ["q_proj"], "target_parameters": experts}
    one, two = recipes(house, tmp_path, adapter=adapter, max_steps=6, model_name_or_path=str(model))
    code, said = launch_shards(two, tmp_path)
    assert code == 0, said
    assert "Stiefel" not in said
    train(one)
    assert len(small_runs.weights(tmp_path / "two" / "adapter")) == 3 * 2 * (1 + 2 * 4)
    assert_the_same(tmp_path)


@pytest.mark.slow
def test_killed_after_the_last_step_it_is_measured_all_the_same(house, tmp_path):
    one, two = recipes(house, tmp_path, adapter=METHODS["stella"], max_steps=6)
    code, said = launch_shards(two, tmp_path, DIES_AT=".last.beyondlora.partial")
    assert code != 0, said
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-6").is_dir()
    code, said = launch_shards(two, tmp_path, "--resume")
    assert code == 0, said
    train(one)
    assert_the_same(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "cera", "aurora", "full"])
def test_every_method_trains_in_shards(method, house, tmp_path):
    rate = 1e-3 if method == "full" else 1e-2
    one, two = recipes(house, tmp_path, adapter=METHODS[method], max_steps=6, learning_rate=rate)
    code, said = launch_shards(two, tmp_path)
    assert code == 0, said
    train(one)
    assert_the_same(tmp_path, "model.safetensors" if method == "full" else "adapter_model.safetensors")
