import dataclasses
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from shared_data import REPOSITORY

from beyondlora.recipe import TASKS, Recipe, warmup_problem

MINIMAL = """\
task: causal-lm
model_name_or_path: demo
adapter: {peft_type: LORA, r: 8}
output_dir: runs/x
dataset_name: some.txt
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def load(write):
    return lambda text="", *overrides: Recipe.load(write(MINIMAL + text), overrides)


def minimal(**changes):
    return Recipe.from_mapping({**yaml.safe_load(MINIMAL), **changes})


# What a value means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", ".001", "'1e-3'", "+1e-3"])
def test_every_way_to_write_a_number_is_that_number(load, text):
    # PyYAML alone reads the first, the usual way to write a learning rate, as text.
    assert load(f"learning_rate: {text}").learning_rate == 0.001


def test_a_whole_number_will_do_for_a_fraction(load):
    epochs = load("num_train_epochs: 2").num_train_epochs
    assert (epochs, type(epochs)) == (2.0, float)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps: 1.0", "whole number"),
        ("max_steps: 1e3", "whole number"),
        ("max_steps: true", "whole number"),
        ("max_steps: '10'", "whole number"),
        ("bf16: yes", "true or false"),
        ("bf16: 'true'", "true or false"),
        ("bf16: 1", "true or false"),
        ("learning_rate: fast", "finite number"),
        ("learning_rate: true", "finite number"),
        ("learning_rate: .nan", "finite number"),
        ("learning_rate: .inf", "finite number"),
        ("learning_rate:", "finite number"),
        ("label_field: 3", "text"),
        ("columns: a", "a list"),
        ("columns: [a, 1]", "text"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key_and_what_was_expected(load, line, expected):
    with pytest.raises(ValueError, match=rf"recipe.yaml: {line.split(':')[0]}.*{expected}"):
        load(line)


def test_yaml_means_what_it_looks_like(load):
    # YAML 1.1 would make these False, 8, 5400 and a date.
    adapter = load(
        "", "adapter={peft_type: LORA, a: no, b: 010, c: 1:30, d: 2020-01-01, e: null, f: [1, 2e-1]}"
    ).adapter
    assert adapter == {
        "peft_type": "LORA",
        "a": "no",
        "b": 10,
        "c": "1:30",
        "d": "2020-01-01",
        "e": None,
        "f": [1, 0.2],
    }


def test_what_the_values_cannot_be(load):
    for line, reason in {
        "learning_rate: 0": "greater than 0",
        "learning_rate: -1e-3": "greater than 0",
        "per_device_train_batch_size: 0": "greater than 0",
        "max_train_samples: 0": "greater than 0",
        "eval_fraction: 1.0": "less than 1",
        "eval_fraction: -0.1": "at least 0",
        "max_steps: 0": "or -1",
        "max_steps: -2": "or -1",
        "weight_decay: -1": "at least 0",
        "max_length: 1": "at least 2",
        "seed: -1": "at least 0",
        "seed: 4294967296": "below",
        "dtype: float64": "float32",
        "prompt_field: question": "completion_field",
        "columns: [a, a]": "twice",
    }.items():
        with pytest.raises(ValueError, match=rf"{line.split(':')[0]}.*{reason}"):
            load(line)
    with pytest.raises(ValueError, match="one of them"):
        load("warmup_steps: 10\nwarmup_ratio: 0.1")
    with pytest.raises(ValueError, match="output_dir is empty"):
        minimal(output_dir=" ")


def test_an_unknown_task_names_the_nearest_and_all():
    with pytest.raises(ValueError, match="'sequence-classification'") as caught:
        minimal(task="sequence-clasification")
    assert all(task in str(caught.value) for task in TASKS)


def test_an_adapter_block_needs_a_method():
    with pytest.raises(ValueError, match="peft_type"):
        minimal(adapter={"r": 8})
    with pytest.raises(ValueError, match="a mapping"):
        minimal(adapter="LORA")


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learningrate", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),  # and not image_size, which is spelled more like it
    ],
)
def test_an_unknown_key_names_the_nearest(load, wrong, right):
    with pytest.raises(ValueError, match=rf"recipe.yaml.*'{wrong}'.*did you mean '{right}'"):
        load(f"{wrong}: 1")


def test_an_unknown_key_like_no_other_is_told_where_all_are_explained(load):
    with pytest.raises(ValueError, match=r"'lora_alpha' is not a key .*help\(r.Recipe\).*under adapter") as caught:
        load("lora_alpha: 16")
    assert len(str(caught.value)) < 300


def test_names_are_listed_once():
    with pytest.raises(ValueError, match=r"dtype='half' is unknown; choose from float32, bfloat16$"):
        minimal(dtype="half")


def test_all_missing_keys_are_named_at_once(write):
    with pytest.raises(ValueError, match="model_name_or_path, adapter, output_dir"):
        Recipe.load(write("task: causal-lm\ndataset_name: x"))


def test_a_key_that_stands_twice_is_refused_with_its_line(load):
    with pytest.raises(ValueError, match=r"line 6.*'task' stands twice"):
        load("task: causal-lm")


def test_every_field_is_documented_and_every_documented_field_exists():
    documented = set()
    for names in re.findall(r"^ {8}([a-z_0-9, ]+):", Recipe.__doc__, flags=re.MULTILINE):
        documented.update(names.split(", "))
    assert documented == {field.name for field in dataclasses.fields(Recipe)}


def test_training_fields_have_transformers_names_and_defaults():
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field.default for field in dataclasses.fields(Recipe)}
    first = list(ours).index("learning_rate")
    of_the_base = {"dtype", "load_in_8bit", "load_in_4bit"}  # from_pretrained's, and TRL's
    not_theirs = {"warmup_ratio", *of_the_base}  # the first until transformers 5
    chosen = {"learning_rate", "logging_steps", "eval_steps", "save_steps"}
    for name in list(ours)[first:]:
        if name not in not_theirs:
            assert name in theirs
            if name not in chosen:
                nothing = "none" if name == "report_to" else None  # their word for it
                assert (ours[name] or nothing) == (theirs[name] or nothing), name


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_saved_recipe_is_the_recipe(load, tmp_path):
    recipe = load(
        "learning_rate: 1e-5\ncolumns: ['yes', '1e-3', ü, '010']", "adapter.note=${HOME}", "adapter.list=[1, a]"
    )
    recipe.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == recipe
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "saved.yaml"]
    # Other tools read YAML 1.1.
    assert yaml.safe_load(recipe.to_yaml()) == dataclasses.asdict(recipe)


def test_a_failed_save_leaves_the_old_file(load, tmp_path, monkeypatch):
    recipe = load()
    recipe.save(tmp_path / "saved.yaml")
    before = (tmp_path / "saved.yaml").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        recipe.replace(seed=1).save(tmp_path / "saved.yaml")
    assert (tmp_path / "saved.yaml").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "saved.yaml"]


def test_replace_checks_again_and_differences_name_the_fields(load):
    recipe = load()
    other = recipe.replace(seed=7, adapter={"peft_type": "LORA", "r": 4})
    assert recipe.differences(other) == {
        "seed": (42, 7),
        "adapter": ({"peft_type": "LORA", "r": 8}, {"peft_type": "LORA", "r": 4}),
    }
    assert recipe.differences(recipe.replace()) == {}
    assert recipe.differences(recipe.replace(output_dir="elsewhere", report_to="tensorboard")) == {}
    with pytest.raises(ValueError, match="greater than 0"):
        recipe.replace(learning_rate=0.0)
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        recipe.replace(sed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"task: causal-lm\ndataset_name: caf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        (b"task: causal-lm\nadapter: {peft_type: LORA\n", "line 3: not valid YAML"),
        (b"task: a\n  b: c\n", "line 2: not valid YAML"),
        (b"? [a]\n: 1\n", "line 1: not valid YAML"),
        (b"task: !!python/object:os.system x\n", "line 1: not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_says_why_and_where(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(str(path))


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert Recipe.load(write(b"\xef\xbb\xbf" + MINIMAL.encode())).task == "causal-lm"


def test_a_missing_file_is_named_with_where_it_was_sought(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist; relative paths start from"):
        Recipe.load("none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        Recipe.load(tmp_path)


# Overrides and the environment ----------------------------------------------------------------------------------------


def test_overrides_change_fields_adapter_keys_or_the_whole_block(load):
    recipe = load("seed: 1", "learning_rate=1e-3", "adapter.r=4", "adapter.target_modules=[q_proj, v_proj]", "seed=2")
    assert (recipe.learning_rate, recipe.seed) == (1e-3, 2)
    assert recipe.adapter == {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    block = load("", "adapter={peft_type: IA3, target_modules: all-linear}", "adapter.fan_in_fan_out=true").adapter
    assert block == {"peft_type": "IA3", "target_modules": "all-linear", "fan_in_fan_out": True}
    assert load("eval_dataset_name: x", "eval_dataset_name=").eval_dataset_name is None
    assert load("", "dataset_name=a=b").dataset_name == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate", "key=value"),
        ("=3", "key=value"),
        ("learning_rat=1", "did you mean 'learning_rate'"),
        ("r=4", "r is a key of the adapter block; write adapter.r=4"),
        ("data.name=x", "can be set in the adapter block.*change others in the file"),
        ("adapter.=x", "can be set in the adapter block"),
        ("adapter={r: 1", "line 1: not valid YAML"),
        ("seed=1.5", r"\.yaml, with --set seed=1.5: seed=1.5"),
    ],
)
def test_a_wrong_override_says_how_it_is_written(load, override, message):
    with pytest.raises(ValueError, match=message):
        load("", override)


@pytest.mark.parametrize(("steps", "told"), [(9, True), (10, True), (11, False)])
def test_a_warmup_that_a_run_does_not_get_through_is_told(load, steps, told):
    assert bool(warmup_problem(load("warmup_steps: 10"), steps)) is told
    assert not warmup_problem(load("warmup_steps: 10\nlr_scheduler_type: constant"), steps)


def test_a_required_key_may_come_from_an_override(write):
    path = write(MINIMAL.replace("output_dir: runs/x\n", ""))
    assert Recipe.load(path, ["output_dir=elsewhere"]).output_dir == "elsewhere"


def test_environment_variables_are_expanded_everywhere(load, monkeypatch):
    monkeypatch.setenv("BL_SET", "here")
    monkeypatch.setenv("BL_EMPTY", "")
    monkeypatch.delenv("BL_UNSET", raising=False)
    adapter = load(
        "eval_dataset_name: ${BL_SET}/${BL_UNSET:-there}/${BL_EMPTY:-full}/${BL_EMPTY}x",
        "adapter={peft_type: LORA, modules_to_save: [ '${BL_SET}' ]}",
        "output_dir=${BL_UNSET:-}runs",
    )
    assert adapter.eval_dataset_name == "here/there/full/x"
    assert adapter.adapter["modules_to_save"] == ["here"]
    assert adapter.output_dir == "runs"


@pytest.mark.parametrize("text", ["${BL_UNSET}", "${BL-UNSET}", "${", "${BL_UNSET:-a}${x"])
def test_a_variable_that_cannot_be_expanded_names_its_key(load, monkeypatch, text):
    monkeypatch.delenv("BL_UNSET", raising=False)
    with pytest.raises(ValueError, match=r"adapter\.layers\[0\]") as caught:
        load("", f"adapter={{peft_type: LORA, layers: ['{text}']}}")
    assert "BL_UNSET" in str(caught.value) or "${NAME}" in str(caught.value)


# The recipes of this repository ---------------------------------------------------------------------------------------

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 11


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_is_headed_by_its_own_command(path):
    recipe = Recipe.load(path)
    assert path.read_text().startswith(f"# BEYONDLORA_SHARED=../shared beyondlora train configs/{path.name}\n")
    assert recipe.output_dir == f"runs/{path.stem}"
    assert math.isfinite(recipe.learning_rate)


def test_reading_a_recipe_needs_no_torch():
    heavy = ("torch", "transformers", "peft", "datasets")
    code = f"import sys, beyondlora.recipe; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
