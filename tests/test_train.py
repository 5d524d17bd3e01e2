"""Training from a recipe: the run folder, refusals, the same weights whatever interrupts a run, the stop at nan."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_runs
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import CLIPConfig, CLIPForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.llama.modeling_llama import LlamaMLP

import beyondlora.train
from beyondlora.attach import attach, config_from
from beyondlora.evaluate import evaluate, load_base, load_processor
from beyondlora.interrupts import Terminated, terminate
from beyondlora.progress import Progress
from beyondlora.recipe import Recipe
from beyondlora.run_folder import CONTENTS, RunFolder, alone_in
from beyondlora.train import train

ACCUMULATED = {  # 5 batches an epoch, so 3 steps, the last one shorter; 4 epochs
    "max_train_samples": 20,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 3,
    "logging_steps": 5,  # beside the checkpoints: a resumed run must log the same means
    "lr_scheduler_type": "cosine",
}
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CLASSES = {
    "task": "sequence-classification",
    "adapter": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture
def recipe(house, tmp_path):
    """Make a recipe that writes to this test's own folder."""
    return lambda **changes: small_runs.recipe(house, **{"output_dir": str(tmp_path / "run")} | changes)


def same_weights(first, second):
    """Whether two adapter folders hold the same tensors, bit for bit."""
    ours, theirs = small_runs.weights(first), small_runs.weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# What a run leaves behind --------------------------------------------------------------------------------------------


def test_a_finished_run_holds_what_it_should_and_nothing_else(recipe, tmp_path):
    summary = train(recipe())
    run = tmp_path / "run"
    unasked = {"tracking", "checkpoints", "generations.jsonl", "generations-test.jsonl"}
    assert {entry.name for entry in run.iterdir()} == set(CONTENTS) - unasked
    assert json.loads((run / "metrics.json").read_text()) == summary
    assert Recipe.load(run / "recipe.yaml") == recipe()
    assert summary["steps"] == 12
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 42
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")


def test_a_run_learns_and_keeps_its_best_adapter(recipe, tmp_path):
    summary = train(recipe())
    evaluations = {row["step"]: row["eval_loss"] for row in small_runs.rows(tmp_path / "run") if "eval_loss" in row}
    assert set(evaluations) == {4, 8, 12}
    assert summary["best_step"] == min(evaluations, key=evaluations.get)
    assert summary["metrics"]["loss"]["value"] == min(evaluations.values()) < evaluations[4]


def test_the_best_adapter_is_not_the_last_where_learning_turns_to_memorising(recipe, tmp_path):
    """Four blocks learnt by heart: the loss on other text falls, then rises."""
    summary = train(recipe(max_train_samples=4, max_steps=48, eval_steps=8, learning_rate=0.1))
    evaluations = {row["step"]: row["eval_loss"] for row in small_runs.rows(tmp_path / "run") if "eval_loss" in row}
    assert summary["best_step"] == min(evaluations, key=evaluations.get) < 48
    assert summary["metrics"]["loss"]["value"] == evaluations[summary["best_step"]]
    assert not same_weights(tmp_path / "run" / "adapter", tmp_path / "run" / "last")
    assert evaluate(tmp_path / "run")["metrics"]["loss"]["value"] == pytest.approx(evaluations[summary["best_step"]])
    assert evaluate(tmp_path / "run" / "last")["metrics"]["loss"]["value"] == pytest.approx(evaluations[48])


def test_without_evaluation_rows_the_last_adapter_is_the_one(recipe, tmp_path):
    summary = train(recipe(eval_fraction=0))
    assert summary["metrics"] == {}
    assert same_weights(tmp_path / "run" / "adapter", tmp_path / "run" / "last")


@pytest.mark.parametrize("name", small_runs.ADAPTERS)
def test_the_same_recipe_twice_gives_the_same_run(name, recipe, tmp_path):
    for folder in ("one", "two"):
        train(recipe(adapter=small_runs.ADAPTERS[name], output_dir=str(tmp_path / folder)))
    assert same_weights(tmp_path / "one" / "last", tmp_path / "two" / "last")
    assert small_runs.rows(tmp_path / "one") == small_runs.rows(tmp_path / "two")


def test_evaluating_more_often_does_not_change_what_is_trained(recipe, tmp_path):
    train(recipe(output_dir=str(tmp_path / "seldom"), eval_steps=12))
    train(recipe(output_dir=str(tmp_path / "often"), eval_steps=1, save_steps=5, logging_steps=2))
    assert same_weights(tmp_path / "seldom" / "last", tmp_path / "often" / "last")


def test_another_seed_gives_another_run(recipe, tmp_path):
    train(recipe(output_dir=str(tmp_path / "one")))
    train(recipe(output_dir=str(tmp_path / "two"), seed=43))
    assert not same_weights(tmp_path / "one" / "last", tmp_path / "two" / "last")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"warmup_ratio": 0.25, "lr_scheduler_type": "constant_with_warmup"},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_training(changes, recipe, tmp_path):
    summary = train(recipe(**changes))
    assert summary["metrics"]["loss"]["value"] < 4.1  # ln 64 = 4.16 is a guess
    assert evaluate(tmp_path / "run")["metrics"]["loss"]["value"] == pytest.approx(summary["metrics"]["loss"]["value"])


def test_gradient_checkpointing_recomputes_and_gives_the_same_weights(recipe, tmp_path, monkeypatch):
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    train(recipe(output_dir=str(tmp_path / "one")))
    plain = len(calls)
    train(recipe(output_dir=str(tmp_path / "two"), gradient_checkpointing=True))
    assert len(calls) - plain == plain + 12 * 2  # once more a step for each of two layers
    assert same_weights(tmp_path / "one" / "last", tmp_path / "two" / "last")


def test_bf16_computes_in_bfloat16(recipe, tmp_path):
    for name, bf16 in {"exact": False, "rounded": True}.items():
        train(recipe(output_dir=str(tmp_path / name), bf16=bf16))
    exact, rounded = (small_runs.rows(tmp_path / name) for name in ("exact", "rounded"))
    for key in ("loss", "eval_loss"):  # training and evaluation
        pairs = [(a[key], b[key]) for a, b in zip(exact, rounded, strict=True) if key in a]
        assert all(a != b for a, b in pairs)
        assert all(a == pytest.approx(b, rel=0.01) for a, b in pairs)


def test_a_warm_up_by_ratio_is_one_by_steps(recipe, tmp_path):
    for name, changes in {"ratio": {"warmup_ratio": 0.5}, "steps": {"warmup_steps": 6}, "none": {}}.items():
        train(recipe(output_dir=str(tmp_path / name), logging_steps=1, **changes))
    rates = {
        name: [row.get("learning_rate") for row in small_runs.rows(tmp_path / name)]
        for name in ("ratio", "steps", "none")
    }
    assert rates["ratio"] == rates["steps"] != rates["none"]


def test_an_image_classifier_trains_and_saves_its_head(recipe):
    base = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            num_labels=3,
        )
    )
    images = recipe(task="image-classification", adapter={"peft_type": "LORA", "target_modules": "all-linear"})
    model = attach(base, config_from(images), images)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any(name.endswith("classifier.modules_to_save.default.weight") for name in trained)
    assert "base_model.model.classifier.weight" in get_peft_model_state_dict(model)


def test_a_body_that_is_not_called_as_its_class_says_is_no_head(recipe):
    """CLIP's prefix is clip, and its body vision_model, which was trained and saved whole."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = CLIPForImageClassification(CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}))
    images = recipe(task="image-classification", adapter={"peft_type": "LORA", "target_modules": ["q_proj"]})
    model = attach(base, config_from(images), images)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[2] for name in trained if "lora_" not in name} == {"classifier"}


# Interrupted and resumed ---------------------------------------------------------------------------------------------


def kill_and_resume(recipe, process, run, moments):
    """Repeat the recipe's run in another folder, kill it at each moment, let it finish, compare with the whole one."""
    whole, recipe = Path(recipe.output_dir), recipe.replace(output_dir=str(run))
    for moment in moments:
        assert process(small_runs.train_and_die, recipe, moment, True) == -signal.SIGKILL
        small_runs.nothing_half_written(run)
    assert process(small_runs.train_and_die, recipe, 10**9, True) == 0
    assert same_weights(run / "last", whole / "last")
    assert same_weights(run / "adapter", whole / "adapter")
    assert small_runs.rows(run) == small_runs.rows(whole)
    assert not list(run.glob("*.partial")) + list(run.glob("*.old"))


@pytest.mark.parametrize("name", small_runs.ADAPTERS)
def test_a_killed_run_resumes_to_the_same_weights(name, recipe, process, tmp_path):
    adapter = small_runs.ADAPTERS[name]
    whole = recipe(adapter=adapter, **ACCUMULATED, output_dir=str(tmp_path / "whole"))
    assert process(small_runs.train_and_die, whole, 10**9, False) == 0
    operations = int((tmp_path / "whole" / "operations").read_text())
    moments = [round(operations * part) for part in (0.3, 0.45)]  # of what is left, the second time
    kill_and_resume(whole, process, tmp_path / "run", moments)


def test_a_run_killed_after_its_last_step_takes_no_further_one(recipe, process, tmp_path):
    whole = recipe(**ACCUMULATED, max_steps=10, output_dir=str(tmp_path / "whole"))  # not the end of an epoch
    assert process(small_runs.train_and_die, whole, 10**9, False) == 0
    operations = int((tmp_path / "whole" / "operations").read_text())
    kill_and_resume(whole, process, tmp_path / "run", [operations - 12])


def test_a_stop_between_the_best_checkpoint_and_its_adapter_loses_neither(recipe, tmp_path, monkeypatch):
    """The checkpoint of what will stay the best adapter stands, adapter/ is not in place yet."""
    learnt_by_heart = {
        "max_train_samples": 4,
        "max_steps": 48,
        "eval_steps": 8,
        "learning_rate": 0.1,
        "save_steps": 100,
    }
    whole = recipe(output_dir=str(tmp_path / "whole"), **learnt_by_heart)
    best = train(whole)["best_step"]
    assert best < 48
    keep_checkpoint = RunFolder.keep_checkpoint

    def keep_and_stop(run, step):
        keep_checkpoint(run, step)
        if step == best:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep_checkpoint", keep_and_stop)
    stopped = whole.replace(output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    train(stopped, resume=True)
    assert same_weights(tmp_path / "run" / "adapter", tmp_path / "whole" / "adapter")
    assert small_runs.rows(tmp_path / "run") == small_runs.rows(tmp_path / "whole")


def test_a_killed_run_resumes_its_classification_head(recipe, house, process, tmp_path):
    whole = recipe(**CLASSES, dataset_name=str(house / "sentences.jsonl"), output_dir=str(tmp_path / "whole"))
    assert process(small_runs.train_and_die, whole, 10**9, False) == 0
    assert any("score" in key for key in small_runs.weights(tmp_path / "whole" / "last"))
    kill_and_resume(whole, process, tmp_path / "run", [90])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(recipe, process, tmp_path):
    whole, run = recipe(**ACCUMULATED, output_dir=str(tmp_path / "whole")), tmp_path / "run"
    train(whole)
    broken = whole.replace(output_dir=str(run))
    assert process(small_runs.train_and_die, broken, 190, False) == -signal.SIGKILL
    older, newest = sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-2:]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")  # a file that loads, with one number changed
    said = Said()
    train(broken, resume=True, progress=said)
    assert f"step {older.name[11:]}" in said.text
    assert same_weights(run / "last", tmp_path / "whole" / "last")
    assert small_runs.rows(run) == small_runs.rows(tmp_path / "whole")


class Said(Progress):
    """Remembers what it was told to say."""

    text = ""

    def say(self, message):
        self.text += message + "\n"


def test_a_warmup_as_long_as_the_run_is_told(recipe):
    said = Said()
    train(recipe(max_steps=2, warmup_steps=2), progress=said)
    assert "warmup_steps=2 in a run of 2: the learning rate stays below 0.01" in said.text


def test_weights_that_no_batch_reaches_are_named(recipe, monkeypatch):
    def with_an_idle_one(*arguments):
        model = attach(*arguments)
        model.base_model.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr("beyondlora.train.attach", with_an_idle_one)
    said = Said()
    train(recipe(max_steps=2), progress=said)
    assert said.text.count("1 of 29 trained weights got no gradient from the first batches, as base_model.idle") == 1
    monkeypatch.undo()
    train(recipe(max_steps=2), overwrite=True, progress=(usual := Said()))
    assert "no gradient" not in usual.text


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond so many bytes, which is how a full disk looks to a writer."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [8_000, 24_000])  # of an adapter 13 KB, of the optimizer's state 28
def test_a_full_disk_is_said_and_resumed_from(size, recipe, tmp_path):
    with room_for(size), pytest.raises(OSError, match=r"could not be written .* make room, .* --resume"):
        train(recipe())
    train(recipe(), resume=True)
    train(recipe(output_dir=str(tmp_path / "other")))
    assert same_weights(tmp_path / "run" / "last", tmp_path / "other" / "last")


def test_an_adapter_of_ours_says_how_it_is_loaded(recipe, tmp_path):
    train(recipe(max_steps=2, adapter=small_runs.ADAPTERS["stella"]))
    for folder in ("adapter", "last"):
        card = (tmp_path / "run" / folder / "README.md").read_text()
        assert "A stella adapter" in card
        assert "    import beyondlora\n    from peft import PeftModel\n" in card
        assert f'from_pretrained(base, "path/to/{folder}")' in card


def test_resuming_where_nothing_is_begins_anew(recipe, tmp_path):
    train(recipe(output_dir=str(tmp_path / "one")), resume=True)
    train(recipe(output_dir=str(tmp_path / "two")))
    assert same_weights(tmp_path / "one" / "last", tmp_path / "two" / "last")


def test_resuming_a_finished_run_changes_nothing(recipe, tmp_path):
    summary = train(recipe())
    before = snapshot(tmp_path / "run")
    assert train(recipe(), resume=True) == summary
    assert snapshot(tmp_path / "run") == before


def test_resuming_with_another_recipe_is_refused(recipe, tmp_path):
    train(recipe())
    with pytest.raises(ValueError, match=r"learning_rate: 0\.5, was 0\.01"):
        train(recipe(learning_rate=0.5), resume=True)


def test_resuming_with_other_data_is_refused(recipe, house, process, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((house / "text.txt").read_text())
    assert process(small_runs.train_and_die, recipe(dataset_name=str(text)), 150, False) == -signal.SIGKILL
    text.write_text((house / "text.txt").read_text().replace("cat", "cow"))
    with pytest.raises(ValueError, match="the data have changed"):
        train(recipe(dataset_name=str(text)), resume=True)


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_is_still_at_work_is_neither_resumed_nor_deleted(flags, recipe, process, tmp_path, monkeypatch):
    assert process(small_runs.train_and_die, recipe(), 150, False) == -signal.SIGKILL
    with alone_in(tmp_path / "run", "run"), monkeypatch.context() as patch:
        patch.setattr(beyondlora.train.data, "read_splits", lambda _: pytest.fail("read data before it looked"))
        before = snapshot(tmp_path / "run")
        with pytest.raises(BlockingIOError, match="another run is at work"):
            train(recipe(), **flags)
        assert snapshot(tmp_path / "run") == before
    assert train(recipe(), **flags)["steps"] == 12  # what was killed holds nothing


@pytest.mark.parametrize("gone", [False, True], ids=["finished", "rotated"])
def test_a_run_that_went_on_meanwhile_is_not_set_back(gone, recipe, process, tmp_path, monkeypatch):
    assert process(small_runs.train_and_die, recipe(), 150, False) == -signal.SIGKILL
    run, open_base = RunFolder(tmp_path / "run"), beyondlora.train.load_base

    def while_another_is_at_work(*args):
        if gone:
            shutil.rmtree(run.newest_checkpoint())
        else:
            run.metrics.write_text("{}")
        return open_base(*args)

    monkeypatch.setattr(beyondlora.train, "load_base", while_another_is_at_work)
    events = run.metrics_log.read_bytes()
    with pytest.raises(BlockingIOError, match="another process went on with this run"):
        train(recipe(), resume=True)
    assert run.metrics_log.read_bytes() == events


def snapshot(folder):
    """Every file under a folder, with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_run_killed_at_any_file_operation_resumes_to_the_same_weights(part, recipe, process, tmp_path):
    whole = recipe(**ACCUMULATED, output_dir=str(tmp_path / "whole"))
    assert process(small_runs.train_and_die, whole, 10**9, False) == 0
    operations = int((tmp_path / "whole" / "operations").read_text())
    for moment in range(1 + part, operations, 24):
        run = tmp_path / f"run{moment}"
        kill_and_resume(whole, process, run, [moment])


# Refusals: before anything is trained or touched ---------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_and_left_alone(recipe, tmp_path):
    train(recipe())
    before = snapshot(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"already holds a finished run.*--resume.*--overwrite"):
        train(recipe())
    assert snapshot(tmp_path / "run") == before


def test_overwriting_leaves_nothing_of_the_old_run(recipe, tmp_path):
    train(recipe(learning_rate=0.5))
    train(recipe(), overwrite=True)
    train(recipe(output_dir=str(tmp_path / "fresh")))
    assert same_weights(tmp_path / "run" / "last", tmp_path / "fresh" / "last")
    assert small_runs.rows(tmp_path / "run") == small_runs.rows(tmp_path / "fresh")


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_strangers_folder_is_never_touched(flags, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        train(recipe(), **flags)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", ["adapter/mine.txt", "last/mine.txt", "checkpoints/mine.txt", "metrics.json", "curves.png"]
)
def test_a_name_of_ours_is_no_run_without_a_recipe(name, recipe, tmp_path):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("by hand")
    with pytest.raises(FileExistsError, match=rf"no run wrote \({mine.relative_to(tmp_path / 'mine').parts[0]}\)"):
        train(recipe(output_dir=str(tmp_path / "mine")))
    assert mine.read_text() == "by hand"


def test_overwriting_spares_a_run_with_a_strangers_file_in_it(recipe, tmp_path):
    train(recipe())
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        train(recipe(), overwrite=True)
    assert snapshot(tmp_path / "run") == before


def test_an_output_dir_that_is_a_file_is_refused(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        train(recipe())


def test_an_output_dir_where_nothing_can_be_written_is_refused(recipe, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run is a file; name another place"):
        train(recipe(output_dir=str(tmp_path / "run" / "within")))
    monkeypatch.setattr(os, "access", lambda folder, _mode: folder != tmp_path)
    with pytest.raises(PermissionError, match=f"{tmp_path} is not writable for you"):
        train(recipe(output_dir=str(tmp_path / "new" / "run")))


BAD = [
    ({"adapter": {"peft_type": "POLY"}}, "POLY wants a task id with every row, which a recipe does not have"),
    ({"adapter": {"peft_type": "XLORA"}}, "XLORA wants trained LoRA adapters to mix"),
    ({"adapter": {"peft_type": "LORRA"}}, r"'LORRA' is unknown, did you mean 'LORA'\?.*CERA"),
    ({"adapter": {"peft_type": "cera"}}, r"did you mean 'CERA'"),
    ({"adapter": {"peft_type": "DoRA"}}, r"it is written peft_type: LORA with use_dora: true"),
    ({"adapter": {"peft_type": "LORA", "rank": 4}}, r"LORA has no key 'rank'.*rank_pattern"),
    ({"adapter": {"peft_type": "LORA", "lora_alfa": 4}}, r"did you mean 'lora_alpha'"),
    ({"adapter": {"peft_type": "LORA", "task_type": "SEQ_CLS"}}, r"leave task_type out"),
    ({"adapter": {"peft_type": "LORA", "r": 0, "target_modules": "all-linear"}}, r"adapter: .*r"),
    ({"adapter": {"peft_type": "CERA", "r": 0, "target_modules": "all-linear"}}, r"adapter: .*r"),
    ({"adapter": {"peft_type": "CERA", "cera_activation": "gelu"}}, r"adapter: .*silu"),
    ({"adapter": {"peft_type": "STELLA", "r": 20, "target_modules": "all-linear"}}, r"adapter: .*k_proj"),
    ({"adapter": {"peft_type": "CERA", "target_modules": ["query"]}}, r"adapter: .*query"),
    ({"adapter": {"peft_type": "LORA", "modules_to_save": ["zzz"]}}, r"adapter: modules_to_save holds 'zzz'"),
    ({"adapter": {"peft_type": "LORA", "target_modules": "(["}}, r"target_modules='\(\[' is no regular expression"),
    ({"optim": "adamw_torched"}, r"optim='adamw_torched' is unknown to transformers; did you mean 'adamw_torch'\?"),
    ({"optim": "lomo"}, r"lomo_optim"),
    ({"lr_scheduler_type": "liner"}, r"lr_scheduler_type='liner' is unknown to transformers; did you mean 'linear'\?"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"follows evaluations of the Trainer's own"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, r"takes settings that a recipe has no keys for .*num_decay_steps"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, r"takes settings that a recipe has no keys for .*min_lr"),
    ({"dataset_name": "nowhere/at/all.txt"}, r"nowhere/at/all\.txt"),
    ({"dataset_name": "HOUSE/sentences.jsonl", "dataset_text_field": "body"}, r"body"),
    ({**CLASSES, "dataset_name": "HOUSE/sentences.jsonl", "label_field": "stars"}, r"stars"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused_before_training_and_loses_nothing(changes, message, recipe, house, tmp_path):
    if "dataset_name" in changes:
        changes = changes | {"dataset_name": changes["dataset_name"].replace("HOUSE", str(house))}
    old = tmp_path / "run"
    old.mkdir()
    (old / "recipe.yaml").write_text("the old run")
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=f"(?s){message}"):
        train(recipe(**changes), overwrite=True)
    assert snapshot(old) == {(old / "recipe.yaml").relative_to(old): b"the old run"}


def test_a_saved_adapter_config_is_an_adapter_block(recipe, tmp_path):
    train(recipe())
    block = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    again = config_from(recipe(adapter=block))
    assert (again.r, again.lora_dropout, again.inference_mode) == (4, 0.1, False)


# Numbers that are none -----------------------------------------------------------------------------------------------


def poison_loss(model, step):
    """The loss of the `step`-th batch is nan."""
    batches = iter(range(1, 1000))

    def hook(module, _inputs, output):
        if module.training and next(batches) == step:
            output.loss = output.loss * float("nan")

    model.register_forward_hook(hook)


def poison_gradient(model, step):
    """The loss of the `step`-th batch is finite, its gradient is not."""
    batches = iter(range(1, 1000))
    weight = next(weight for weight in model.parameters() if weight.requires_grad)
    weight.register_hook(lambda gradient: gradient * (float("inf") if next(batches) == step else 1))


@pytest.fixture
def shards(monkeypatch):
    """accelerate was asked for FSDP, on accelerators."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("beyondlora.train.PartialState", lambda: SimpleNamespace(distributed_type="MULTI_GPU"))


@pytest.mark.parametrize("version", [{}, {"FSDP_VERSION": "1"}])
def test_the_first_fsdp_is_refused_before_anything_is_read(version, recipe, monkeypatch, shards):
    for name, value in version.items():
        monkeypatch.setenv(name, value)
    asked = recipe(dataset_name="/nowhere")
    with pytest.raises(ValueError, match=r"first version of FSDP.*--fsdp_version 2"):
        train(asked)
    assert not Path(asked.output_dir).exists()


def test_the_base_models_loss_is_refused_in_shards_before_anything_is_read(recipe, monkeypatch, shards):
    monkeypatch.setenv("FSDP_VERSION", "2")
    asked = recipe(dataset_name="/nowhere", forgetting_dataset_name="corpus.txt")
    with pytest.raises(ValueError, match=r"forgetting_dataset_name='corpus.txt' asks .* under FSDP"):
        train(asked)
    assert not Path(asked.output_dir).exists()


def test_the_base_models_loss_is_refused_under_zero_3_before_anything_is_read(recipe, monkeypatch):
    monkeypatch.setattr("beyondlora.train.is_deepspeed_zero3_enabled", lambda: True)
    asked = recipe(dataset_name="/nowhere", forgetting_dataset_name="corpus.txt")
    with pytest.raises(ValueError, match=r"forgetting_dataset_name='corpus.txt' asks .* under ZeRO 3"):
        train(asked)
    assert not Path(asked.output_dir).exists()


@pytest.mark.parametrize(
    ("poison", "reason"), [(poison_loss, "the loss became nan"), (poison_gradient, "the gradient became nan")]
)
def test_nan_stops_the_run_and_keeps_the_last_good_weights(poison, reason, recipe, tmp_path, monkeypatch):
    train(recipe(output_dir=str(tmp_path / "good"), max_steps=4, lr_scheduler_type="constant"))
    attach = beyondlora.train.attach

    def attach_poisoned(*arguments):
        model = attach(*arguments)
        poison(model, 6)
        return model

    monkeypatch.setattr(beyondlora.train, "attach", attach_poisoned)
    with pytest.raises(FloatingPointError, match=rf"step 6: {reason}.*after step 4.*learning_rate \(it was 0\.01\)"):
        train(recipe(lr_scheduler_type="constant"))
    run = tmp_path / "run"
    assert same_weights(run / "last", tmp_path / "good" / "last")
    assert same_weights(run / "adapter", tmp_path / "good" / "adapter")  # evaluated after step 4
    assert not (run / "metrics.json").exists()
    assert small_runs.rows(run)[-1]["step"] == 6


def test_a_learning_rate_out_of_this_world_stops_the_run(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match="step 2"):
        train(recipe(learning_rate=1e30))
    assert all(tensor.isfinite().all() for tensor in small_runs.weights(tmp_path / "run" / "last").values())
    assert same_weights(tmp_path / "run" / "last", tmp_path / "run" / "adapter")


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.")  # the Trainer's checkpoints
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]], ids=lambda names: names[0])
@pytest.mark.parametrize("peft_type", ["LORA", "CERA", "AURORA", "STELLA"])
def test_adapters_beside_the_tables_of_tokens(peft_type, targets, recipe, house, tmp_path):
    """PEFT saves such a table, which has not changed, beside its adapter; a run does not, and reads both."""
    wanted = recipe(adapter={"peft_type": peft_type, "r": 2, "target_modules": targets}, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(wanted.replace(save_steps=1, logging_steps=1), progress=Swallowing())
    summary = train(wanted.replace(save_steps=1, logging_steps=1), resume=True)
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]
    assert not any("base_layer" in name for name in small_runs.weights(tmp_path / "run" / "adapter"))
    base = load_base(wanted, load_processor(wanted), None)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert any("base_layer" in name for name in small_runs.weights(tmp_path / "theirs"))
    theirs = evaluate(tmp_path / "theirs", recipe=wanted)
    assert theirs["metrics"] == summary["metrics"]


def test_an_optimizer_that_cannot_step_orthonormal_factors_is_refused_before_the_run_is_begun(recipe, tmp_path):
    pytest.importorskip("schedulefree")
    unsuited = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "max_steps": 1}
    with pytest.raises(ValueError, match="SGDScheduleFree cannot step Stiefel factors"):
        train(recipe(adapter=small_runs.ADAPTERS["stella"], **unsuited))
    assert not (tmp_path / "run").exists()
    assert train(recipe(**unsuited))["steps"] == 1


def test_of_several_devices_without_a_launcher_one_is_used_and_said(recipe, monkeypatch):
    """The Trainer would take nn.DataParallel."""
    arguments, told = [], []

    def of_two_devices(recipe):
        arguments.append(made(recipe))
        arguments[0]._n_gpu = 2
        return arguments[0]

    made = beyondlora.train._training_arguments
    monkeypatch.setattr(beyondlora.train, "_training_arguments", of_two_devices)
    monkeypatch.setattr(Progress, "say", lambda _, message: told.append(message))
    train(recipe(max_steps=1))
    assert arguments[0].n_gpu == 1
    assert any("There are 2 devices, and one is used: `accelerate launch" in message for message in told)


# A Ctrl-C that something swallows, and SIGTERM -----------------------------------------------------------------------


class Swallowing(Progress):
    """Loses an interrupt at the second step, as a destructor does."""

    def advance(self, done, note=""):
        if done == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_a_swallowed_ctrl_c_stops_the_run_at_the_next_step(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(recipe(logging_steps=1, save_steps=1), progress=Swallowing())
    assert max(row["step"] for row in RunFolder(tmp_path / "run").rows()) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(recipe(logging_steps=1, save_steps=1), resume=True)["steps"] == 12


def test_somebody_elses_handler_is_left_alone(recipe):
    def theirs(number, frame):
        raise RuntimeError("theirs")

    before = signal.signal(signal.SIGINT, theirs)
    try:
        train(recipe(max_steps=1))
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


class ToldToEnd(Progress):
    """SIGTERM comes once, as the fourth step or its evaluation is shown."""

    told = False

    def advance(self, done, note=""):
        if done == 4 and not self.told:
            self.told = True
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def answering_sigterm():
    """The command line's answer to SIGTERM, for as long as a test runs."""
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_lets_the_step_be_finished_and_saved(recipe, tmp_path, answering_sigterm):
    wanted = recipe(save_steps=100, eval_steps=100, logging_steps=2)
    with pytest.raises(Terminated) as ended:
        train(wanted, progress=ToldToEnd())
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is terminate
    assert RunFolder(tmp_path / "run").newest_checkpoint().name == "checkpoint-5"
    train(wanted, resume=True)
    train(wanted.replace(output_dir=str(tmp_path / "whole")))
    assert same_weights(tmp_path / "run" / "last", tmp_path / "whole" / "last")
    assert same_weights(tmp_path / "run" / "adapter", tmp_path / "whole" / "adapter")


def test_sigterm_at_the_last_step_is_answered(recipe, tmp_path, answering_sigterm):
    wanted = recipe(max_steps=4)
    with pytest.raises(Terminated):
        train(wanted, progress=ToldToEnd())
    assert RunFolder(tmp_path / "run").newest_checkpoint().name == "checkpoint-4"
    assert train(wanted, resume=True)["steps"] == 4


PROMPTS = {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16}


def test_an_encoder_of_prompts_is_measured_as_it_is_saved(recipe, tmp_path):
    summary = train(recipe(adapter=PROMPTS, learning_rate=0.05))
    assert summary["metrics"] == evaluate(tmp_path / "run")["metrics"]


def test_an_encoder_of_prompts_cannot_be_resumed(recipe, tmp_path):
    wanted = recipe(adapter=PROMPTS, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, progress=Swallowing())
    with pytest.raises(ValueError, match="P_TUNING trains an encoder of prompts, and PEFT saves the prompts alone"):
        train(wanted, resume=True)
    assert train(wanted, overwrite=True)["steps"] == 12
