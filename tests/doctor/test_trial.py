"""The trial of a recipe: what would stop a run stops the trial, and the run's own folder stays untouched."""

import json
from pathlib import Path

import pytest
import small_runs

from beyondlora.doctor import try_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def recipe(house, tmp_path, **changes):
    return small_runs.recipe(house, **{"output_dir": str(tmp_path / "run")} | changes)


def test_a_good_recipe_runs_and_leaves_nothing_behind(house, tmp_path):
    found = try_recipe(recipe(house, tmp_path, adapter=small_runs.ADAPTERS["stella"]))
    assert found["steps"] == 12
    assert found["seconds"] == pytest.approx(12 * found["seconds_per_step"])
    assert found["loss_before"] > 0
    assert found["trainable_parameters"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [2.0, 0.01])
def test_epochs_are_counted_in_optimizer_steps(epochs, house, tmp_path):
    by_epochs = {"max_steps": -1, "num_train_epochs": epochs, "gradient_accumulation_steps": 2}
    found = try_recipe(recipe(house, tmp_path, **by_epochs))
    from beyondlora.train import train

    assert train(recipe(house, tmp_path, **by_epochs))["steps"] == found["steps"]


def test_a_run_in_the_output_folder_is_noted_and_left_alone(house, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("task: causal-lm\n")
    assert "--resume or --overwrite" in try_recipe(recipe(house, tmp_path))["notes"][0]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    (tmp_path / "run" / "mine.txt").touch()
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        try_recipe(recipe(house, tmp_path))


def test_a_warmup_that_is_too_long_is_noted(house, tmp_path):
    assert try_recipe(recipe(house, tmp_path))["notes"] == []
    assert "warmup_steps=12 in a run of 12" in try_recipe(recipe(house, tmp_path, warmup_steps=12))["notes"][0]


def test_a_trial_that_ends_in_nan_names_no_folder_that_is_gone(house, tmp_path):
    with pytest.raises(FloatingPointError, match=r"In step \d of 3, .*learning_rate \(it is 1e\+30\)") as caught:
        try_recipe(recipe(house, tmp_path, learning_rate=1e30))
    assert "beyondlora-trial" not in str(caught.value)


def test_a_bad_row_far_behind_the_first_batch_is_found(house, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 200 + [{"prompt": "a"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="completion"):
        try_recipe(
            recipe(
                house,
                tmp_path,
                dataset_name=str(data),
                eval_fraction=0.1,
                prompt_field="prompt",
                completion_field="completion",
            )
        )


def test_an_adapter_that_does_not_fit_is_found(house, tmp_path):
    with pytest.raises(ValueError, match="smaller side"):
        try_recipe(recipe(house, tmp_path, adapter=small_runs.ADAPTERS["stella"] | {"r": 1000}))
    assert not Path(tmp_path / "run").exists()
