"""Full fine-tuning, `peft_type: FULL`: a method like the others, whose result is a model folder."""

import json
import shutil

import pytest
import small_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from beyondlora.analyse import analyse
from beyondlora.attach import config_from
from beyondlora.compare.grid import Grid
from beyondlora.evaluate import evaluate
from beyondlora.export import export
from beyondlora.recipe import Recipe
from beyondlora.run_folder import RunFolder
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FULL = {"adapter": {"peft_type": "FULL"}}


@pytest.fixture(scope="module")
def run(house, tmp_path_factory):
    """A finished run: (its folder, its summary)."""
    folder = tmp_path_factory.mktemp("full") / "run"
    return folder, train(small_runs.recipe(house, **FULL, output_dir=str(folder), learning_rate=3e-3))


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of the run, and the file of its weights."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    return folder, folder / "adapter" / "model.safetensors"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_every_weight_is_trained_and_measured_as_it_was_kept(run, house):
    folder, summary = run
    base = AutoModelForCausalLM.from_pretrained(house / "base")
    assert summary["trainable_parameters"] == summary["total_parameters"] == base.num_parameters()
    trained = tensors(folder / "adapter")
    before = base.state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in trained.items())
    assert evaluate(folder)["metrics"] == summary["metrics"]
    assert evaluate(folder / "adapter")["metrics"] == summary["metrics"]
    assert evaluate(folder / "last")["metrics"]["loss"]["value"] >= summary["metrics"]["loss"]["value"]


def test_the_best_is_kept_and_measured_not_the_last(house, tmp_path):
    foreign = tmp_path / "digits.txt"  # what training on words makes ever less likely
    foreign.write_text("".join(f"{number * 7919}\n" for number in range(60)))
    made = small_runs.recipe(house, **FULL, output_dir=str(tmp_path / "run"), eval_dataset_name=str(foreign))
    summary = train(made)
    losses = {row["step"]: row["eval_loss"] for row in RunFolder(tmp_path / "run").rows() if "eval_loss" in row}
    assert summary["best_step"] == 4 < max(losses) == summary["steps"]
    assert losses[4] < losses[8] < losses[12]
    assert summary["metrics"]["loss"]["value"] == pytest.approx(losses[4], rel=1e-6)
    for kept, step in (("adapter", 4), ("last", 12)):
        found = evaluate(tmp_path / "run" / kept)["metrics"]["loss"]["value"]
        assert found == pytest.approx(losses[step], rel=1e-6)


def test_it_learns_more_than_nothing(run, house, tmp_path):
    still = small_runs.recipe(house, **FULL, output_dir=str(tmp_path / "still"), learning_rate=1e-12, max_steps=1)
    untrained = train(still)["metrics"]["loss"]["value"]
    assert run[1]["metrics"]["loss"]["value"] < untrained - 0.3


def test_the_folder_is_a_model_that_transformers_loads(run, house):
    folder, summary = run
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    assert AutoTokenizer.from_pretrained(folder / "adapter")("the cat")["input_ids"]
    recipe = Recipe.load(folder / "recipe.yaml").replace(
        model_name_or_path=str(folder / "adapter"), adapter=small_runs.ADAPTERS["lora"], output_dir=str(folder / "lora")
    )
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    # A fresh LoRA adds nothing: the model, used as a base, has the loss that was reported.
    begun = train(recipe.replace(learning_rate=1e-12, max_steps=1))["metrics"]["loss"]["value"]
    assert begun == pytest.approx(summary["metrics"]["loss"]["value"], rel=1e-5)
    shutil.rmtree(folder / "lora")


def test_a_killed_run_resumes_to_the_same_weights(house, process, tmp_path):
    whole, broken = (small_runs.recipe(house, **FULL, output_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    train(whole)
    assert process(small_runs.train_and_die, broken, 90, False) != 0
    assert RunFolder(broken.output_dir).newest_checkpoint()
    train(broken, resume=True)
    for part in ("adapter", "last"):
        ours, theirs = tensors(tmp_path / "whole" / part), tensors(tmp_path / "broken" / part)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_classifier_s_new_head_is_part_of_it(house, tmp_path):
    recipe = small_runs.recipe(
        house,
        **FULL,
        task="sequence-classification",
        dataset_name=str(house / "sentences.jsonl"),
        output_dir=str(tmp_path / "run"),
    )
    summary = train(recipe)
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter")
    assert model.config.id2label == {0: "bad", 1: "good"}


# Refused -------------------------------------------------------------------------------------------------------------


def test_it_has_no_settings_and_a_misspelt_one_is_no_method(house):
    with pytest.raises(ValueError, match="FULL has no key 'r'"):
        config_from(small_runs.recipe(house, adapter={"peft_type": "FULL", "r": 4}))
    with pytest.raises(ValueError, match="did you mean 'FULL'"):
        config_from(small_runs.recipe(house, adapter={"peft_type": "FUL"}))


def test_what_needs_an_adapter_says_that_there_is_none(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="whole model, without an adapter beside it"):
        analyse([folder])
    with pytest.raises(ValueError, match="whole model already"):
        export(folder, tmp_path / "lora")
    with pytest.raises(ValueError, match="whole model: it has no adapter"):
        evaluate(folder, merged=True)


def test_a_whole_model_of_no_run_needs_a_recipe(run, tmp_path):
    alone = shutil.copytree(run[0] / "adapter", tmp_path / "alone")
    with pytest.raises(ValueError, match="name the rows with --data"):
        evaluate(alone, data="text.txt")
    recipe = Recipe.load(run[0] / "recipe.yaml")
    assert evaluate(alone, recipe=recipe)["metrics"] == run[1]["metrics"]


def test_damaged_weights_are_refused(damaged):
    folder, path = damaged
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing \({name}"):
        evaluate(folder)
    save_file(weights | {name: torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged or of another model|has shape"):
        evaluate(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        evaluate(folder)
    path.unlink()
    with pytest.raises(ValueError, match="missing, damaged"):
        evaluate(folder)


def test_a_model_of_another_shape_is_refused(run, house, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    config = AutoModelForCausalLM.from_pretrained(house / "base").config
    config.intermediate_size = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "adapter")
    with pytest.raises(ValueError, match=r"has shape .*the model wants"):
        evaluate(folder)


# In a grid -----------------------------------------------------------------------------------------------------------


def grid(house, **changes):
    recipe = vars(small_runs.recipe(house)) | {"adapter": {"target_modules": "all-linear", "r": 4}} | changes
    methods = {"LoRA": {"peft_type": "LORA"}, "full fine-tuning": {"peft_type": "FULL"}}
    return Grid.from_mapping(recipe | {"grid": {"methods": methods, "test_fraction": 0.2}})


def test_in_a_grid_what_holds_for_every_method_holds_where_it_can(house):
    blocks = {run.method: run.recipe.adapter for run in grid(house).runs}
    assert blocks == {
        "LoRA": {"target_modules": "all-linear", "r": 4, "peft_type": "LORA"},
        "full fine-tuning": {"peft_type": "FULL"},
    }
    assert json.dumps(blocks)


def test_a_key_that_no_method_has_is_misspelt(house):
    with pytest.raises(ValueError, match=r"no method of the grid has a key 'target_module'.*'target_modules'"):
        grid(house, adapter={"target_module": "all-linear"})
