"""`beyondlora export`: from a run or an adapter folder to what a server loads, and back through other readers."""

import json
import shutil

import pytest
import small_runs
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from beyondlora.cli import app
from beyondlora.evaluate import evaluate, load_base
from beyondlora.export import export
from beyondlora.progress import Progress
from beyondlora.recipe import Recipe
from beyondlora.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:Merging AuroRA"),
]


@pytest.fixture(scope="session")
def exported(house):
    """One finished run a method, in a place of its own."""
    for name, adapter in small_runs.ADAPTERS.items():
        recipe = small_runs.recipe(
            house, adapter=adapter, output_dir=str(house / "export" / name), learning_rate=0.1, max_steps=8
        )
        train(recipe)
    return house / "export"


def call(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*map(str, arguments)])


def loss(metrics):
    return metrics["loss"]["value"]


def lora_scores(folder, run):
    """The figures of an exported folder, measured as any LoRA's."""
    return evaluate(folder, recipe=Recipe.load(run / "recipe.yaml"))["metrics"]


# A plain LoRA --------------------------------------------------------------------------------------------------------


def test_a_report_measures_base_live_and_exported_on_all_evaluation_rows(exported, house, tmp_path):
    run = exported / "stella"
    record = export(run, tmp_path / "lora", report=True)
    assert record["scores"]["live"] == json.loads((run / "metrics.json").read_text())["metrics"]
    assert record["scores"]["exported"] == lora_scores(tmp_path / "lora", run)
    assert loss(record["scores"]["exported"]) == pytest.approx(loss(record["scores"]["live"]), rel=1e-5)
    assert loss(record["scores"]["base"]) > loss(record["scores"]["live"]) + 0.1
    assert record["tokens"] >= record["scores"]["live"]["tokens"]["value"]
    assert json.loads((tmp_path / "lora" / "export.json").read_text())["scores"] == record["scores"]


def test_without_a_report_a_few_of_the_runs_own_rows_are_compared(exported, tmp_path):
    record = export(exported / "stella", tmp_path / "lora")
    assert record["compared_on"].startswith("the first 2 batches of")
    assert "scores" not in record


def test_where_the_runs_rows_are_not_found_prompts_are_compared(exported, tmp_path):
    """Its paths count from where it was trained."""
    run = shutil.copytree(exported / "stella", tmp_path / "run")
    recipe = Recipe.load(run / "recipe.yaml").replace(dataset_name="elsewhere/text.txt")
    recipe.save(run / "recipe.yaml")
    told = []
    progress = type("Told", (Progress,), {"say": lambda _, message: told.append(message)})()
    assert export(run, tmp_path / "lora", progress=progress)["compared_on"] == "built-in prompts"
    assert "rows are not found from here" in told[0]
    assert "Name them with --data" in told[0]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        export(run, tmp_path / "report", report=True)


def test_a_run_that_held_no_rows_out_is_compared_on_prompts(exported, tmp_path):
    run = shutil.copytree(exported / "stella", tmp_path / "run")
    Recipe.load(run / "recipe.yaml").replace(eval_fraction=0.0).save(run / "recipe.yaml")
    assert export(run, tmp_path / "lora")["compared_on"] == "built-in prompts"
    with pytest.raises(ValueError, match=r"holds out no evaluation rows .*--data FILE"):
        export(run, tmp_path / "report", report=True)


def test_a_static_form_is_reported_as_evaluate_merged_measures_it(exported, tmp_path):
    record = export(exported / "aurora", tmp_path / "lora", report=True)
    merged = evaluate(exported / "aurora", merged=True)["metrics"]
    assert loss(record["scores"]["exported"]) == pytest.approx(loss(merged), rel=1e-5)
    assert abs(loss(record["scores"]["exported"]) - loss(record["scores"]["live"])) > 1e-3
    assert record["top1_agreement"] < 1


def test_a_nonlinear_adapter_is_refused_until_it_is_distilled(exported, house, tmp_path):
    with pytest.raises(ValueError, match="--distil"):
        export(exported / "cera", tmp_path / "lora")
    record = export(exported / "cera", tmp_path / "lora", distil=str(house / "text.txt"))
    base, live, distilled = (loss(record["scores"][name]) for name in ("base", "live", "exported"))
    assert max(live, distilled) < base
    assert abs(distilled - live) < (base - live) / 4  # it keeps most of what was learned, on rows it was not fitted on
    assert distilled == loss(lora_scores(tmp_path / "lora", exported / "cera"))
    narrower = export(exported / "cera", tmp_path / "narrow", distil=str(house / "text.txt"), rank=1)
    assert narrower["rank"] == 1
    assert narrower["layer_gap"]["median"] > record["layer_gap"]["median"]


def test_distilling_on_the_training_data_leaves_the_evaluation_rows_out(exported, house, tmp_path, monkeypatch):
    """A copy of the file under another name is read whole; the recipe's own is not."""
    copy = shutil.copy(house / "text.txt", tmp_path / "copy.txt")
    import beyondlora.export.lora as lora

    counted = []
    right = lora.distil
    monkeypatch.setattr(
        lora, "distil", lambda *a, **k: counted.append(sum(b["input_ids"].numel() for b in a[2])) or right(*a, **k)
    )
    export(exported / "cera", tmp_path / "own", distil=str(house / "text.txt"))
    export(exported / "cera", tmp_path / "other", distil=str(copy))
    assert counted[0] < 0.95 * counted[1]


def test_an_adapter_without_a_run_is_compared_on_prompts_or_data(exported, house, tmp_path):
    alone = shutil.copytree(exported / "stella" / "adapter", tmp_path / "alone")
    assert export(alone, tmp_path / "lora")["compared_on"] == "built-in prompts"
    record = export(alone, tmp_path / "lora", data=str(house / "text.txt"), report=True)
    assert loss(record["scores"]["live"]) > 0
    with pytest.raises(ValueError, match="name the rows with --data"):
        export(alone, tmp_path / "lora", report=True)


# Merged --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stella", "lora"])
def test_a_merged_model_is_a_model_like_any_other(name, exported, tmp_path):
    record = export(exported / name, tmp_path / "merged", to="merged", report=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat").input_ids
    live = evaluate(exported / name)["metrics"]
    assert loss(record["scores"]["exported"]) == pytest.approx(loss(live), rel=1e-5)
    assert record["logits_relative"] < 1e-5
    base = AutoModelForCausalLM.from_pretrained(exported.parent / "base").eval()
    ids = torch.tensor([[1, 5, 9, 13]])
    assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)


def test_a_merged_classifier_keeps_its_trained_head_and_its_labels(house, tmp_path):
    recipe = small_runs.recipe(
        house,
        task="sequence-classification",
        adapter={"peft_type": "STELLA", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        dataset_name=str(house / "sentences.jsonl"),
        output_dir=str(tmp_path / "run"),
    )
    train(recipe)
    with pytest.raises(ValueError, match=r"modules_to_save.*--to merged"):
        export(tmp_path / "run", tmp_path / "lora")
    record = export(tmp_path / "run", tmp_path / "merged", to="merged", report=True)
    assert record["scores"]["exported"]["accuracy"] == record["scores"]["live"]["accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert set(model.config.id2label.values()) == {"good", "bad"}


def test_a_nonlinear_adapter_cannot_be_merged(exported, tmp_path):
    with pytest.raises(ValueError, match="Cannot merge"):
        export(exported / "cera", tmp_path / "merged", to="merged")
    assert list(tmp_path.iterdir()) == []


def forbidden(*args, **kwargs):
    raise AssertionError("the base model was loaded")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"peft_type": "CERA", "r": 2}, "Cannot merge a CeRA adapter.*--distil DATA"),
        ({"peft_type": "STELLA", "r": 2, "modules_to_save": ["lm_head"]}, "trains more than a LoRA holds"),
        ({"peft_type": "LORA", "r": 2}, "PEFT's own type LORA"),
        ({"peft_type": "LORA", "r": 2, "use_dora": True}, "LoRA with use_dora=True, which is no plain.*--to merged"),
    ],
    ids=["nonlinear", "copied modules", "lora", "dora"],
)
def test_what_the_config_forbids_is_refused_before_anything_is_loaded(adapter, message, tmp_path, monkeypatch):
    monkeypatch.setattr("beyondlora.evaluate.load_base", forbidden)
    monkeypatch.setattr("beyondlora.models.load_processor", forbidden)
    run = tmp_path / "adapter"
    run.mkdir()
    (run / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **adapter}))
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "lora")


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_lost_and_how_to_serve(exported, tmp_path):
    done = call("export", exported / "aurora", "--out", tmp_path / "lora", "--round-rank", "--report")
    assert done.exit_code == 0, done.stderr
    stored = json.loads((tmp_path / "lora" / "export.json").read_text())
    assert f"{stored['top1_agreement']:.4%}" in done.stdout
    assert f"{stored['scores']['exported']['perplexity']['value']:.4f}" in done.stdout
    assert all(path in done.stdout for path in stored["layers"])
    assert "Warning: Merging AuroRA" in done.stderr
    assert " ".join(stored["serve"].split()) in " ".join(done.stdout.split())
    assert stored["rank"] == 8
    base = load_base(Recipe.load(exported / "aurora" / "recipe.yaml"), None, None)
    assert type(PeftModel.from_pretrained(base, str(tmp_path / "lora")).peft_config["default"]) is LoraConfig


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("", "runs/stella"),
        ("runs/stella", "."),
        ("runs/stella/last", ".."),
        ("", "runs/stella/last"),
        ("runs/stella", "adapter"),
    ],
)
def test_the_default_folder_stands_beside_the_run(place, target, exported, tmp_path, monkeypatch):
    run = shutil.copytree(exported / "stella", tmp_path / "runs" / "stella")
    monkeypatch.chdir(tmp_path / place)
    printed = json.loads(call("export", target, "--json").stdout)
    assert printed["serve"].endswith("=runs/stella-lora" if not place else str(tmp_path / "runs" / "stella-lora"))
    assert printed["layers"] == json.loads((tmp_path / "runs" / "stella-lora" / "export.json").read_text())["layers"]
    assert evaluate(run)["metrics"]  # the run is still one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "does not exist"),
        (["RUN", "--to", "gguf"], "choose 'lora' or 'merged'"),
        (["RUN", "--to", "merged", "--rank", "2"], "a merged model has none"),
        (["RUN", "--distil", "nowhere.txt"], "nowhere.txt"),
        (["RUN", "--distil", "DATA", "--rank", "99"], "Give 1 to 4"),
        (["RUN"], "--distil DATA"),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, message, exported, house, tmp_path):
    words = {"RUN": exported / "cera", "DATA": house / "text.txt"}
    done = call("export", *(words.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
