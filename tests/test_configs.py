"""Every recipe of configs/ runs, on the real data and models it names, shortened to three steps and a few rows."""

import math
from pathlib import Path

import pytest
from shared_data import SHARED, needs_minilm, needs_shared

from beyondlora.evaluate import evaluate
from beyondlora.recipe import Recipe
from beyondlora.train import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHORTENED = ["max_steps=3", "eval_steps=3", "save_steps=3", "warmup_steps=1", "warmup_ratio=0", "max_train_samples=48"]
SHORTENED += ["max_eval_samples=24", "per_device_train_batch_size=4", "per_device_eval_batch_size=8"]
HEADLINE = {
    "causal-lm": "perplexity",
    "sequence-classification": "accuracy",
    "sequence-regression": "pearson",
    "image-classification": "accuracy",
}


@needs_shared
@needs_minilm
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_trains_and_its_run_evaluates_to_the_same_figures(path, tmp_path, monkeypatch, request):
    monkeypatch.setenv("BEYONDLORA_SHARED", str(SHARED))
    recipe = Recipe.load(path, [*SHORTENED, f"output_dir={tmp_path / 'run'}"])
    if recipe.task == "image-classification":
        request.getfixturevalue("reads_images")
    summary = train(recipe)
    score = summary["metrics"][HEADLINE[recipe.task]]
    assert math.isfinite(score["value"])
    assert score["n"] == 24
    assert summary["steps"] == 3
    assert summary["trainable_parameters"] > 0
    again = evaluate(tmp_path / "run")["metrics"]
    assert again["loss"]["value"] == pytest.approx(summary["metrics"]["loss"]["value"], rel=1e-6)
