"""What a grid file says, and what it must not say."""

from pathlib import Path

import pytest
from shared_data import SHARED, needs_minilm, needs_shared

from beyondlora.attach import config_from
from beyondlora.compare.grid import Grid, choices
from beyondlora.compare.held_out import check_apart, cut_off
from beyondlora.data import read_splits

RECIPE = {
    "task": "causal-lm",
    "model_name_or_path": "demo",
    "output_dir": "out",
    "dataset_name": "text.txt",
    "adapter": {"target_modules": ["q_proj", "v_proj"]},
}
METHODS = {"LoRA": {"peft_type": "LORA", "r": [4, 8]}, "DoRA": {"peft_type": "LORA", "use_dora": True, "r": 4}}


def grid(recipe=(), **block):
    settings = {"methods": METHODS, "learning_rate": [1e-3, 1e-2], "seed": [0, 1], "test_fraction": 0.1} | block
    return Grid.from_mapping({**RECIPE, **dict(recipe), "grid": settings})


def test_every_arm_has_the_same_search_and_the_same_seeds():
    runs = grid().runs
    assert len(runs) == 3 * 2 * 2
    by_arm = {}
    for run in runs:
        by_arm.setdefault(run.arm, set()).add((run.recipe.learning_rate, run.recipe.seed))
    assert list(by_arm) == ["LoRA r=4", "LoRA r=8", "DoRA"]
    assert set(map(frozenset, by_arm.values())) == {frozenset({(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)})}
    assert {run.recipe.adapter["r"] for run in runs if run.arm == "LoRA r=8"} == {8}
    assert all(run.recipe.adapter["target_modules"] == ["q_proj", "v_proj"] for run in runs)
    assert len({run.recipe.output_dir for run in runs}) == len(runs)


def test_what_is_left_out_has_its_default():
    made = Grid.from_mapping({**RECIPE, "grid": {"methods": METHODS, "test_fraction": 0.1}})
    assert (made.output, made.baseline, made.confidence, made.metric.name) == (Path("out"), "LoRA", 0.95, "perplexity")
    assert sorted({run.seed for run in made.runs}) == [0, 1, 2]
    assert made.describe() == "9 runs: 3 arms x 1 settings x 3 seeds"
    assert grid().describe() == "12 runs: 3 arms x 2 settings x 2 seeds"
    assert {run.seed for run in grid(seed=7).runs} == {7}
    assert grid(metric="loss", baseline="LoRA r=8").metric.name == "loss"
    assert grid().pairs == []
    assert grid(title=None, metric=None, max_test_samples=None).title is None
    assert grid(pairs=[["LoRA r=4", "LoRA r=8"]]).pairs == [("LoRA r=4", "LoRA r=8")]


def test_nothing_is_chosen_by_the_rows_that_it_is_reported_on():
    asked, one = {"forgetting_dataset_name": "other.txt"}, {"learning_rate": 1e-3, "baseline": "DoRA"}
    assert grid(asked, metric="forgetting", **one).metric.of == "corpus"
    assert grid(asked).settings == 2  # by the perplexity of other rows
    for change, told in (
        ({"learning_rate": [1e-3, 1e-2]}, "2 settings an arm and 1 arms"),
        ({"baseline": "LoRA"}, "1 settings an arm and 2 arms"),
    ):
        with pytest.raises(ValueError, match=f"forgetting is of the same rows in validation as in testing.* {told}"):
            grid(asked, metric="forgetting", **one | change)


def test_what_a_method_says_itself_goes_before_what_holds_for_all():
    made = grid({"adapter": {"r": 16, "target_modules": "all-linear"}}, methods={"x": {"peft_type": "LORA", "r": 2}})
    assert made.runs[0].recipe.adapter == {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def test_a_run_is_named_after_what_sets_it_apart():
    names = [run.name for run in grid(learning_rate=[1e-3], weight_decay=[0, 0.1], seed=[3]).runs]
    assert names[:2] == ["lora-r-4-lr0.001-weight-decay0-seed3", "lora-r-4-lr0.001-weight-decay0.1-seed3"]
    assert grid(methods={"x": {"peft_type": "LORA", "r": [4]}}).arms.keys() == {"x"}  # a list of one sets nothing apart
    assert all(run.recipe.output_dir == f"out/runs/{run.name}" for run in grid().runs)
    assert {run.recipe.weight_decay for run in grid(weight_decay=[0, 0.1]).runs} == {0, 0.1}
    block = {"methods": METHODS, "_learning_rate": [1e-3, 1e-2], "_weight_decay": [0, 0.1], "test_fraction": 0.1}
    paired = Grid.from_mapping({**RECIPE, "grid": block}).arms["DoRA"]
    assert {(run.recipe.learning_rate, run.recipe.weight_decay) for run in paired} == {(1e-3, 0), (1e-2, 0.1)}


def test_of_paired_lists_only_those_that_tell_the_pairs_apart_are_in_an_arm_s_name():
    def arms(**block):
        return list(grid(methods={"x": {"peft_type": "LORA", **block}}).arms)

    assert arms(_r=[4, 8], _lora_alpha=[8, 16]) == ["x r=4", "x r=8"]
    assert arms(_r=[4, 4, 8], _lora_alpha=[8, 16, 8]) == [
        "x r=4 lora_alpha=8",
        "x r=4 lora_alpha=16",
        "x r=8 lora_alpha=8",
    ]
    assert arms(_r=[4, 8], lora_dropout=[0, 0.1], _lora_alpha=[8, 8]) == [
        "x r=4 lora_dropout=0",
        "x r=8 lora_dropout=0",
        "x r=4 lora_dropout=0.1",
        "x r=8 lora_dropout=0.1",
    ]
    assert arms(_r=[4, 8, 4], _lora_alpha=[1, 1, 2], _lora_dropout=[0, 0.1, 0.2])[2] == "x r=4 lora_alpha=2"
    with pytest.raises(ValueError, match="_r: 2, _lora_alpha: 3"):
        arms(_r=[4, 8], _lora_alpha=[8, 16, 32])


def test_plain_lists_are_grids_and_underscored_ones_are_paired():
    assert choices({"a": [1, 2], "b": [3, 4], "c": 5}, "") == [{"a": a, "b": b, "c": 5} for a in (1, 2) for b in (3, 4)]
    assert choices({"_a": [1, 2], "_b": [3, 4], "c": [5, 6]}, "") == [
        {"c": 5, "a": 1, "b": 3},
        {"c": 5, "a": 2, "b": 4},
        {"c": 6, "a": 1, "b": 3},
        {"c": 6, "a": 2, "b": 4},
    ]
    assert choices({}, "") == [{}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0, 1, 0]}, "seed lists 0 twice"),
        ({"learning_rate": []}, "empty list"),
        ({"methods": {}}, "methods is missing"),
        ({"methods": {"LoRA": "LORA"}}, "give an adapter block"),
        ({"methods": {1: {"peft_type": "LORA"}}}, "1 is a int, and a name is text; quote it"),
        ({"methods": {"a b": {"peft_type": "LORA"}, "a-b": {"peft_type": "LORA"}}}, "share the folder a-b-lr0.001"),
        ({"methods": {"x": {"peft_type": "LORA", "_r": [1, 2], "_lora_alpha": [1]}}}, "_r: 2, _lora_alpha: 1"),
        (
            {"methods": {"x": {"peft_type": "LORA", "_r": [4, 4], "_lora_alpha": [1, 1]}}},
            "x: _r, _lora_alpha lists {'r': 4, 'lora_alpha': 1} twice",
        ),
        ({"methods": {"x": {"peft_type": "LORA", "_r": [], "_lora_alpha": []}}}, "_r is an empty list"),
        ({"methods": {"x": {"peft_type": "LORA", "_r": 4}}}, "pairs lists, but holds 4"),
        ({"methods": {"x": {"peft_type": "LORA", "_r": [4], "r": 4}}}, "say the same thing"),
        (
            {"methods": {"x": {"peft_type": "LORA", "target_modules": ["q", "v"]}}},
            r"write target_modules: \[\['q', 'v'\]\]",
        ),
        (
            {"methods": {"x": {"peft_type": "CERA", "target_parameters": ["up", "down"]}}},
            r"write target_parameters: \[\['up', 'down'\]\]",
        ),
        ({"baseline": "Lora"}, "did you mean 'LoRA'"),
        ({"metric": "perplexty"}, "did you mean 'perplexity'"),
        ({"learning_rates": [1]}, "did you mean 'learning_rate'"),
        ({"dataset_name": ["a", "b"]}, "'dataset_name' is not a key of a grid"),
        ({"test_dataset_name": "x"}, "one of the two"),
        ({"test_fraction": None}, "one of the two"),
        ({"test_fraction": 1.5}, "between 0 and 1"),
        ({"test_fraction": 0}, "between 0 and 1"),
        ({"confidence": 95}, "for example 0.95"),
        ({"confidence": 1.0}, "for example 0.95"),
        ({"confidence": None}, "confidence is empty; give a number such as 0.95, or leave the key out"),
        ({"confidence": [0.9]}, r"confidence is \[0.9\] \(list\); give a number"),
        ({"confidence": True}, r"confidence is True \(bool\)"),
        ({"test_fraction": "0.1"}, r"test_fraction is '0.1' \(str\); give a number between 0 and 1"),
        ({"baseline": ["LoRA"]}, r"baseline is \['LoRA'\] \(list\); give the name"),
        ({"baseline": None}, "baseline is empty"),
        ({"metric": 5}, r"metric is 5 \(int\); give the name of a metric"),
        ({"max_test_samples": 0}, r"max_test_samples is 0 \(int\); give a whole number greater than 0"),
        ({"max_test_samples": 1.5}, "max_test_samples is 1.5"),
        ({"test_dataset_name": 3, "test_fraction": None}, "test_dataset_name is 3"),
        ({"title": 2024}, r"title is 2024 \(int\); give text \(put it in quotes\)"),
        ({"confidence": 0.4}, "for example 0.95"),
        ({"pairs": [["DoRA", "LoRA r=2"]]}, "'LoRA r=2' is none of the arms; did you mean 'LoRA r=8'"),
        ({"pairs": [["DoRA", "LoRA"]]}, "'LoRA' is none of the arms"),
        ({"pairs": ["DoRA", "LoRA r=4"]}, r"pairs holds 'DoRA'; give lists of two arms, as \[\[DoRA, LoRA r=4\]\]"),
        ({"pairs": {"DoRA": "LoRA r=4"}}, "give lists of two arms"),
        ({"pairs": [["DoRA", "LoRA r=4", "LoRA r=8"]]}, "give lists of two arms"),
        ({"pairs": [["DoRA", "DoRA"]]}, "compared with itself"),
        ({"pairs": [["DoRA", "LoRA r=4"], ["LoRA r=4", "DoRA"]]}, "'LoRA r=4' and 'DoRA' twice"),
        ({"methods": {"x": {"peft_type": "LORA", "modules_to_save": ["a", "b"]}}}, r"\[\['a', 'b'\]\]"),
        ({"methods": {"x": {"peft_type": "LORA", "layers_to_transform": [0, 1]}}}, r"\[\[0, 1\]\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_work_is_refused_with_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(**changes)


def test_without_validation_rows_nothing_can_be_chosen():
    with pytest.raises(ValueError, match="without validation rows nothing can be chosen"):
        grid({"eval_fraction": 0})
    assert grid({"eval_fraction": 0, "dataset_test_split": "validation"})
    assert grid({"eval_fraction": 0, "eval_dataset_name": "other.txt"})


def test_a_comparison_needs_a_folder():
    with pytest.raises(ValueError, match="output_dir is missing"):
        grid({"output_dir": None})


def test_lists_of_lists_are_grids_of_lists():
    made = grid(methods={"x": {"peft_type": "LORA", "target_modules": [["q_proj"], ["q_proj", "v_proj"]]}})
    assert [runs[0].recipe.adapter["target_modules"] for runs in made.arms.values()] == [
        ["q_proj"],
        ["q_proj", "v_proj"],
    ]


def test_a_file_without_a_grid_says_what_a_grid_is(tmp_path):
    (tmp_path / "recipe.yaml").write_text("task: causal-lm\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: there is no grid: block"):
        Grid.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("content", [None, b"", b"- a\n", b"caf\xe9: 1\n"])
def test_a_file_that_is_no_grid_is_not_called_a_recipe(content, tmp_path):
    path = tmp_path / "grid.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        Grid.load(path)
    assert str(caught.value).startswith(str(path))
    assert "recipe" not in str(caught.value)


GRIDS = sorted((Path(__file__).parents[2] / "configs" / "grids").glob("*.yaml"))


@needs_shared
@needs_minilm
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_of_configs_is_ready_to_run(path, monkeypatch, tmp_path):
    monkeypatch.setenv("BEYONDLORA_SHARED", str(SHARED))
    grid = Grid.load(path, [f"output_dir={tmp_path}"])
    assert f"configs/grids/{path.name}" in path.read_text().splitlines()[0]
    for runs in grid.arms.values():
        config_from(runs[0].recipe)
    recipe, test = grid.runs[0].recipe, grid.test_dataset_name
    if grid.test_fraction:
        recipe, test = cut_off(recipe, grid.test_fraction, tmp_path)
    check_apart(recipe, read_splits(recipe), test)
