"""`accelerate launch`: two processes, on one machine or on two, train a recipe to what one process makes of it."""

import pytest
import small_models
import small_runs
import torch
from accelerated import launch

from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ONE_MACHINE = [["--multi_gpu", "--num_processes", "2"]]
TWO_MACHINES = [
    [*ONE_MACHINE[0], "--num_machines", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"] for rank in "01"
]
two_machines = pytest.param(TWO_MACHINES, id="two machines", marks=pytest.mark.slow)


@pytest.mark.parametrize("machines", [pytest.param(ONE_MACHINE, id="one machine"), two_machines])
def test_two_processes_train_a_recipe_as_one_does(machines, house, tmp_path):
    options = {"adapter": small_runs.ADAPTERS["stella"], "max_steps": 6}
    half = small_runs.recipe(house, **options, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    (tmp_path / "recipe.yaml").write_text(half.to_yaml(), encoding="utf-8")
    for code, said in launch(machines, tmp_path / "recipe.yaml", tmp_path / "home"):
        assert code == 0, said
    train(small_runs.recipe(house, **options, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    one, two = (small_runs.weights(tmp_path / run / "adapter") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)  # float32 means of halves, through Adam
    mine, theirs = (small_runs.rows(tmp_path / run) for run in ("one", "two"))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]  # one process of the two keeps the record


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cera", "stella"])
def test_experts_of_which_few_have_tokens_train_alike(method, house, tmp_path):
    model = small_runs.base(tmp_path / "mixture", small_models.mixtral(experts=24))
    experts = {"lora_dropout": 0.0, "target_modules": [], "target_parameters": ["down_proj"]}
    options = {"adapter": small_runs.ADAPTERS[method] | experts, "max_steps": 4, "max_length": 6}
    options["model_name_or_path"] = str(model)
    half = small_runs.recipe(house, **options, per_device_train_batch_size=1, output_dir=str(tmp_path / "two"))
    (tmp_path / "recipe.yaml").write_text(half.to_yaml(), encoding="utf-8")
    for code, said in launch(ONE_MACHINE, tmp_path / "recipe.yaml", tmp_path / "home"):
        assert code == 0, said
    train(small_runs.recipe(house, **options, per_device_train_batch_size=2, output_dir=str(tmp_path / "one")))
    one, two = (small_runs.weights(tmp_path / run / "adapter") for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
