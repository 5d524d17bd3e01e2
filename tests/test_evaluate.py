"""Measuring what a folder holds: the same figures as training's, and a refusal of everything that is not sound."""

import json
import shutil

import pytest
import small_runs
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    XLNetConfig,
    XLNetModel,
)
from typer.testing import CliRunner

from beyondlora.cli import app
from beyondlora.evaluate import evaluate
from beyondlora.models import load_base
from beyondlora.recipe import Recipe
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CLASSES = {"task": "sequence-classification", "adapter": {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture(scope="session")
def runs(house):
    """One finished run a method."""
    for name, adapter in small_runs.ADAPTERS.items():
        train(small_runs.recipe(house, adapter=adapter, output_dir=str(house / name), learning_rate=0.1))
    return house


@pytest.fixture
def adapter(runs, tmp_path):
    """A copy of an adapter that a test may damage, away from its run."""
    return shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")


def loss(result):
    return result["metrics"]["loss"]["value"]


@pytest.mark.parametrize("name", small_runs.ADAPTERS)
def test_evaluating_a_run_gives_the_figures_of_its_training(name, runs):
    assert evaluate(runs / name)["metrics"] == json.loads((runs / name / "metrics.json").read_text())["metrics"]


def deberta():
    """Without its pooler, as DeBERTa is published."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=64, **sizes))


def distilbert():
    return DistilBertModel(DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2))


def xlnet():
    return XLNetModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16))


@pytest.mark.parametrize(
    ("body", "targets"), [(deberta, ["query_proj"]), (distilbert, "all-linear"), (xlnet, ["layer_1"])]
)
def test_whatever_of_a_head_was_begun_anew_is_trained_and_kept(body, targets, house, tmp_path):
    """PEFT knows heads called classifier or score; a pooler or another head would be random in every evaluation."""
    changes = CLASSES | {"adapter": {"peft_type": "LORA", "target_modules": targets}}
    base, rows = small_runs.base(tmp_path / "base", body()), str(house / "sentences.jsonl")
    train(small_runs.recipe(tmp_path, **changes, model_name_or_path=str(base), dataset_name=rows))
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert evaluate(tmp_path / "run")["metrics"] == trained


def test_a_head_that_an_adapter_does_not_hold_is_not_drawn_for_it(house, tmp_path):
    rows = str(house / "sentences.jsonl")
    base = str(small_runs.base(tmp_path / "base", deberta()))
    recipe = small_runs.recipe(tmp_path, **CLASSES, model_name_or_path=base, dataset_name=rows)
    model = load_base(base, task=recipe.task, num_labels=2)
    config = LoraConfig(target_modules=["query_proj"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pooler of the base model is begun anew, .* would be random"):
        evaluate(tmp_path / "adapter", recipe=recipe)
    tokens = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5], "target_modules": ["word_embeddings"]}
    with pytest.raises(ValueError, match="TRAINABLE_TOKENS trains no head, and pooler of this model"):
        train(recipe.replace(adapter=tokens))


def test_the_batch_size_does_not_matter(runs):
    one, all_rows = (loss(evaluate(runs / "lora", batch_size=size)) for size in (1, 10))
    assert one == pytest.approx(all_rows, rel=1e-6)  # float32


def test_other_data(runs, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("9876543210 zyx\n" * 20)
    assert loss(evaluate(runs / "lora", data=str(other))) > loss(evaluate(runs / "lora")) + 0.1


def test_an_adapter_without_a_run_is_evaluated_on_plain_text(adapter, runs):
    own = evaluate(runs / "lora", data=str(runs / "text.txt"))
    assert evaluate(adapter, data=str(runs / "text.txt"))["metrics"]["tokens"]["n"] > 0
    recipe = small_runs.recipe(runs)
    assert evaluate(adapter, data=str(runs / "text.txt"), recipe=recipe)["metrics"] == own["metrics"]
    with pytest.raises(ValueError, match="name the rows with --data"):
        evaluate(adapter)


def test_a_classifier_keeps_its_labels_and_its_head(house, tmp_path):
    data = shutil.copy(house / "sentences.jsonl", tmp_path / "sentences.jsonl")
    recipe = small_runs.recipe(house, **CLASSES, dataset_name=str(data), output_dir=str(tmp_path / "run"))
    summary = train(recipe)
    assert {"loss", "accuracy", "matthews", "f1_macro"} == set(summary["metrics"])
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]
    only_bad = tmp_path / "bad.jsonl"
    only_bad.write_text('{"sentence1": "bbb cat", "label": "bad"}\n' * 3)
    data.unlink()  # the labels are known without the training data
    assert evaluate(tmp_path / "run", data=str(only_bad))["metrics"]["accuracy"]["n"] == 3


def test_a_regression(house, tmp_path):
    recipe = small_runs.recipe(
        house,
        **CLASSES | {"task": "sequence-regression"},
        label_field="score",
        dataset_name=str(house / "sentences.jsonl"),
        output_dir=str(tmp_path / "run"),
        eval_fraction=0.3,
    )
    summary = train(recipe)
    assert {"loss", "pearson", "spearman"} == set(summary["metrics"])
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]


# Merged --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "stella"])
def test_what_merges_exactly_measures_the_same_merged(name, runs):
    attached, merged = evaluate(runs / name), evaluate(runs / name, merged=True)
    assert (attached["merged"], merged["merged"]) == (False, True)
    assert loss(merged) == pytest.approx(loss(attached), rel=1e-5)  # float32 weights, added in another order


def test_what_merges_to_another_function_is_measured_as_that(runs):
    with pytest.warns(UserWarning, match="static"):
        merged = loss(evaluate(runs / "aurora", merged=True))
    assert merged != pytest.approx(loss(evaluate(runs / "aurora")), rel=1e-5)


def test_what_cannot_be_merged_says_why(runs):
    with pytest.raises(ValueError, match="nonlinear"):
        evaluate(runs / "cera", merged=True)


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "LORA", "use_dora": True, "target_modules": "all-linear"},
        {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"]},
    ],
    ids=lambda adapter: adapter["peft_type"],
)
def test_any_method_of_peft_is_a_baseline(adapter, house, tmp_path):
    summary = train(small_runs.recipe(house, adapter=adapter, output_dir=str(tmp_path / "run"), max_steps=4))
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]


def test_virtual_tokens_cannot_be_merged(house, tmp_path):
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    train(small_runs.recipe(house, adapter=adapter, output_dir=str(tmp_path / "run"), max_steps=2))
    with pytest.raises(ValueError, match="cannot be merged"):
        evaluate(tmp_path / "run", merged=True)


# Damaged and foreign folders -----------------------------------------------------------------------------------------


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop_one(tensors):
    del tensors[sorted(tensors)[0]]


def misshape_one(tensors):
    tensors[sorted(tensors)[0]] = torch.zeros(3, 3)


def cut_short(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wider_base(adapter):
    """The same architecture with another width."""
    other = adapter.parent / "base"
    shutil.copytree(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"], other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.config.intermediate_size = 40
    type(model)(model.config).save_pretrained(other)
    edit_config(adapter, base_model_name_or_path=str(other))


DAMAGES = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), r"no adapter_config\.json"),
    "a config cut short": (
        lambda a: (a / "adapter_config.json").write_text('{"peft_'),
        r"adapter_config\.json is damaged",
    ),
    "a config that is a list": (
        lambda a: (a / "adapter_config.json").write_text("[]"),
        r"adapter_config\.json is damaged",
    ),
    "an unknown method": (lambda a: edit_config(a, peft_type="NOVA"), r"'NOVA' is unknown.*STELLA"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "weights cut short": (cut_short, r"weights in .* are damaged"),
    "weights that are text": (lambda a: (a / "adapter_model.safetensors").write_text("hello"), r"are damaged"),
    "a missing tensor": (lambda a: edit_weights(a, drop_one), r"1 missing \(.*lora_A"),
    "a strange tensor": (lambda a: edit_weights(a, lambda t: t.update(x=torch.ones(1))), r"1 unknown \(x"),
    "a wrong shape": (lambda a: edit_weights(a, misshape_one), r"has shape \(3, 3\), the model wants \("),
    "another rank": (lambda a: edit_config(a, r=8), r"has shape .*the model wants"),
    "another base": (wider_base, r"has shape .*Is it the base model the adapter was trained on"),
    "targets the base has not": (lambda a: edit_config(a, target_modules=["query"]), r"does not fit its base.*query"),
    "a base that is gone": (lambda a: edit_config(a, base_model_name_or_path="./gone"), r"\./gone"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused(damage, adapter, runs):
    break_it, message = DAMAGES[damage]
    break_it(adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        evaluate(adapter, data=str(runs / "text.txt"))


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ("answers.jsonl", ValueError, "nothing is asked that could be kept"),
        (".", IsADirectoryError, "is a folder; name a file"),
        ("file/answers.jsonl", NotADirectoryError, "file is a file"),
    ],
)
def test_answers_that_could_not_be_kept(keep, error, message, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("beyondlora.evaluate.load_base", lambda *_: pytest.fail("a model is loaded"))
    (tmp_path / "file").touch()
    recipe = Recipe.load(runs / "lora" / "recipe.yaml")
    if error is not ValueError:
        monkeypatch.setattr(Recipe, "asks", True)
    with pytest.raises(error, match=message):
        evaluate(runs / "lora", recipe=recipe, keep=tmp_path / keep)


def test_the_command_says_a_static_merge_in_a_sentence(runs):
    said = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["evaluate", str(runs / "aurora"), "--merged"]).stderr
    assert said.startswith("Warning: Merging AuroRA folds its static form")
    assert "UserWarning" not in said


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not an adapter folder"):
        evaluate(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(FileNotFoundError, match="no adapter yet"):
        evaluate(tmp_path)


def test_a_folder_that_peft_saved_itself(house, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(house / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert evaluate(tmp_path, data=str(house / "text.txt"))["metrics"]["loss"]["value"] > 0


def test_a_correlation_of_one_row_is_undefined_and_null_in_json(house, tmp_path):
    scores, row = {"dataset_name": str(house / "sentences.jsonl"), "label_field": "score"}, tmp_path / "row.jsonl"
    row.write_text('{"sentence1": "good cat", "score": 1.5}\n')
    task = CLASSES | {"task": "sequence-regression", "eval_dataset_name": str(row), "output_dir": str(tmp_path / "run")}
    summary = train(small_runs.recipe(house, **task, **scores, max_steps=1))
    assert summary["metrics"]["pearson"]["n"] == 1

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    as_json, table = (
        CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *option]) for option in (["--json"], [])
    )
    printed = json.loads(as_json.stdout, parse_constant=refuse)
    assert printed["metrics"]["pearson"] == {"value": None, "stderr": None, "n": 1}
    assert "undefined" in table.stdout
    assert "nan" not in table.stdout
