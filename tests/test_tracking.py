"""Experiment trackers: refused before the work, told what the run's own record holds, no part of what a run is."""

import pytest
import small_runs
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from beyondlora.compare import compare
from beyondlora.compare.grid import Grid
from beyondlora.compare.runs import read_results
from beyondlora.doctor import try_recipe
from beyondlora.run_folder import RunFolder
from beyondlora.tracking import open_in, trackers_of
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FIGURES = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_loss_stderr", "eval_perplexity")


class Ear(TrainerCallback):
    """A tracker of transformers' kind that keeps what it hears."""

    heard: list = []  # noqa: RUF012

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the run's name."""
        self.heard.append(args.run_name)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Keep the step and the figures that a run's own record has, too."""
        known = {key: value for key, value in logs.items() if key in FIGURES}
        if known:
            self.heard.append({"step": state.global_step} | known)


@pytest.fixture
def ear(monkeypatch):
    """Make `ear` a tracker that transformers knows; return what it hears."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ear", Ear)
    monkeypatch.setattr(Ear, "heard", [])
    return lambda: Ear.heard


@pytest.fixture
def recipe(house, tmp_path):
    """Make a recipe that writes to this test's own folder."""
    return lambda **changes: small_runs.recipe(house, **{"output_dir": str(tmp_path / "run")} | changes)


def recorded(run):
    """The steps and figures of a run's metrics.jsonl."""
    return [{key: value for key, value in row.items() if key in ("step", *FIGURES)} for row in small_runs.rows(run)]


def grid(house, output, **changes):
    block = {"methods": {"LoRA": {"peft_type": "LORA"}}, "learning_rate": [1e-2], "seed": [0], "test_fraction": 0.3}
    plan = small_runs.recipe(house, output_dir=str(output), max_steps=2, eval_steps=2, save_steps=2)
    shared = {"adapter": {"r": 4, "target_modules": "all-linear"}, "grid": block}
    return Grid.from_mapping(vars(plan) | shared | changes)


# Refused before the work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tensorbord",
            "report_to='tensorbord' is unknown to transformers; did you mean 'tensorboard'.*: .*mlflow",
        ),
        ("tensorboard", r"report_to='tensorboard' cannot work here: .*\(pip install tensorboard\)"),
        ("trackio", "report_to='trackio' cannot work here: .*`pip install trackio`"),
    ],
)
@pytest.mark.parametrize("command", [train, try_recipe, compare])
def test_a_tracker_that_is_unknown_or_absent_is_refused_before_anything_is_written(
    command, name, message, house, recipe, tmp_path, monkeypatch
):
    for package in ("tensorboard", "trackio"):
        monkeypatch.setattr(integration_utils, f"is_{package}_available", lambda: False)
    asked = grid(house, tmp_path / "run", report_to=name) if command is compare else recipe(report_to=[name])
    with pytest.raises(ValueError, match=message):
        command(asked)
    assert not (tmp_path / "run").exists()


def test_a_name_will_do_for_a_list_and_none_for_nothing(recipe):
    assert recipe(report_to="wandb").report_to == ["wandb"]
    assert recipe(report_to=["wandb", "mlflow"]).report_to == ["wandb", "mlflow"]
    assert recipe(report_to="none").report_to is None
    assert recipe(report_to=["none"]).report_to is None
    with pytest.raises(ValueError, match="report_to=3"):
        recipe(report_to=3)


# What they are told --------------------------------------------------------------------------------------------------


def test_a_tracker_hears_what_the_record_holds_and_changes_nothing(ear, recipe, tmp_path):
    train(recipe(report_to="ear", eval_steps=3))  # evaluations where the Trainer logs, too
    assert ear()[0] == "run"
    key = lambda row: (row["step"], "loss" in row)  # noqa: E731
    assert sorted(ear()[1:], key=key) == sorted(recorded(tmp_path / "run"), key=key)
    train(recipe(output_dir=str(tmp_path / "untold"), eval_steps=3))
    assert small_runs.rows(tmp_path / "untold") == small_runs.rows(tmp_path / "run")


def test_a_resumed_run_goes_on_telling_and_may_begin_to(ear, recipe, monkeypatch, tmp_path):
    keep_checkpoint = RunFolder.keep_checkpoint

    def keep_and_stop(run, step):
        keep_checkpoint(run, step)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep_checkpoint", keep_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe())
    monkeypatch.setattr(RunFolder, "keep_checkpoint", keep_checkpoint)
    assert not ear()
    train(recipe(report_to=["ear"]), resume=True)
    assert {row["step"] for row in ear()[1:]} == {8, 9, 12}
    assert train(recipe(), resume=True)["steps"] == 12  # finished, and told nobody


def test_runs_of_a_comparison_stand_whoever_is_told(ear, house, tmp_path):
    compare(grid(house, tmp_path / "out"))
    before = read_results(tmp_path / "out")
    compare(grid(house, tmp_path / "out", report_to=["ear"]))
    assert read_results(tmp_path / "out") == before


def test_a_trial_tells_nobody(ear, recipe):
    try_recipe(recipe(report_to="ear"))
    assert not ear()


# What they write -----------------------------------------------------------------------------------------------------


def test_what_a_tracker_writes_beside_the_checkpoints_outlives_them(tmp_path):
    run = RunFolder(tmp_path)
    (run.staging / "checkpoint-4").mkdir(parents=True)
    (run.staging / "emissions.csv").write_text("0.1")
    run.drop_checkpoints()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["tracking", "tracking/emissions.csv"]
    run.recipe.touch()
    run.claim(resume=False, overwrite=True)  # nobody else's file


def scalars(folder):
    """Tag -> [(step, value)], as TensorBoard itself reads a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(entry.step, entry.value) for entry in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_s_events_lie_in_the_run_folder_and_hold_its_figures(recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    train(recipe(report_to="tensorboard"))
    shown, rows = scalars(tmp_path / "run" / "tracking"), recorded(tmp_path / "run")
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
        assert shown[tag] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    train(recipe(max_steps=2, report_to="none"), overwrite=True)
    assert not (tmp_path / "run" / "tracking").exists()


def test_tensorboard_forgets_the_steps_that_are_taken_again(recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    whole = recipe(report_to="tensorboard", logging_steps=1, output_dir=str(tmp_path / "whole"))
    train(whole)

    def stop(recorder, args, state, control, **kwargs):
        if state.global_step == 5:  # the last checkpoint is of step 4
            raise KeyboardInterrupt

    again = whole.replace(output_dir=str(tmp_path / "run"))
    monkeypatch.setattr("beyondlora.recorder.Recorder.on_step_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.undo()
    train(again, resume=True)
    for tag in ("train/loss", "eval/loss"):
        assert scalars(tmp_path / "run" / "tracking")[tag] == scalars(tmp_path / "whole" / "tracking")[tag]


def test_a_weights_and_biases_run_is_kept_in_the_folder_and_ended_with_its_training(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_in(trackers_of(["wandb"]), tmp_path / "tracking", 0):
        wandb.init()
    assert wandb.run is None
    assert list((tmp_path / "tracking" / "wandb").glob("offline-run-*"))
    mine = wandb.init(dir=tmp_path)
    with open_in(trackers_of(["wandb"]), tmp_path / "tracking", 0):
        pass
    assert wandb.run is mine  # begun by somebody else, and his to end
    mine.finish()


def test_only_the_first_process_opens_a_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    with open_in(trackers_of(["tensorboard"]), tmp_path, 0):
        pass
    assert not list(tmp_path.iterdir())
