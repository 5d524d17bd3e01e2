"""The command line: quick help, tables and JSON, sentences instead of tracebacks, exit codes, signals."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import small_runs
import torch
from typer.testing import CliRunner

import beyondlora.doctor
import beyondlora.evaluate
import beyondlora.train
from beyondlora import __version__
from beyondlora.cli import app
from beyondlora.doctor.layers import LAYER_KINDS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def recipe_file(house, tmp_path):
    """Write a recipe to a file; its run goes to this test's folder."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        small_runs.recipe(house, **{"output_dir": str(tmp_path / "run")} | changes).save(path)
        return str(path)

    return write


def call(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*map(str, arguments)])


# At once -------------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy_and_answers_at_once():
    code = (
        "import sys, beyondlora.cli as cli; sys.argv = ['beyondlora', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'datasets', 'numpy')))"
    )
    seconds = []
    for _ in range(3):
        begun = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        ended = os.times()
        seconds.append(ended.children_user + ended.children_system - begun.children_user - begun.children_system)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
        assert "evaluate" in done.stdout
    assert min(seconds) < 0.6  # of processor time, on a busy machine; 0.2 s on a quiet one


def test_usage_names_every_argument_once():
    for command, argument in [("train", "RECIPE"), ("doctor", "RECIPE"), ("analyse", "ADAPTER"), ("import", "SOURCE")]:
        usage = next(line for line in call(command, "--help").stdout.splitlines() if "Usage:" in line)
        assert usage.count(argument) == 1, usage
        assert "[[" not in usage, usage
        assert "...}" not in usage, usage


def test_version():
    assert call("--version").stdout == f"beyondlora {__version__}\n"


# Train and evaluate --------------------------------------------------------------------------------------------------


def test_train_then_evaluate(recipe_file, tmp_path):
    trained = call("train", recipe_file(), "--set", "adapter.r=2", "--set", "max_steps=4")
    assert trained.exit_code == 0, trained.stderr
    assert "perplexity" in trained.stdout
    assert "±" in trained.stdout
    assert "Run folder" in trained.stderr

    shown = call("evaluate", tmp_path / "run")
    assert shown.exit_code == 0, shown.stderr
    printed = json.loads(call("evaluate", tmp_path / "run", "--json").stdout)
    loss = printed["metrics"]["loss"]
    assert f"{loss['value']:.4f}" in shown.stdout
    assert f"± {loss['stderr']:.4f}" in shown.stdout
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert printed["metrics"] == stored["metrics"]
    assert stored["steps"] == 4
    merged = json.loads(call("evaluate", tmp_path / "run", "--json", "--merged").stdout)
    assert merged["merged"] is True


def test_evaluate_takes_data_and_how_to_read_it(recipe_file, house, tmp_path):
    assert call("train", recipe_file(max_steps=4)).exit_code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "the cat sat on one mat."}\n' * 8)
    refused = call("evaluate", tmp_path / "run", "--data", rows)
    assert refused.exit_code == 2
    assert "body" in refused.stderr
    read = call("evaluate", tmp_path / "run", "--data", rows, "--set", "dataset_text_field=body", "--json")
    assert json.loads(read.stdout)["metrics"]["loss"]["value"] > 0
    bare = call("evaluate", house / "base", "--set", "max_length=8")
    assert "--recipe" in bare.stderr


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "RECIPE", "--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["train", "RECIPE", "--set", "adapter.rnk=1"], "LORA has no key 'rnk'"),
        (["train", "RECIPE", "--set", "adapter.peft_type=LORRA"], "did you mean 'LORA'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "RECIPE", "--resume", "--overwrite"], "give one of them"),
        (["evaluate", "nowhere"], "does not exist"),
        (["train"], "RECIPE"),
        (["trane"], "trane"),
        (["doctor", "--set", "seed=1"], "name one"),
        (["doctor", "RECIPE", "--markdown"], "without a recipe"),
        (["doctor", "--json", "--markdown"], "without --json"),
        (["doctor", "RECIPE", "--set", "adapter.r=0"], "positive integer"),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, message, recipe_file):
    path = recipe_file()
    done = call(*(path if word == "RECIPE" else word for word in arguments))
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "work"),
    [("train", "beyondlora.train.train"), ("doctor", "beyondlora.doctor.try_recipe")],
)
def test_warnings_are_sentences_said_at_once(command, work, recipe_file, monkeypatch):
    def warned(*_arguments, **_options):
        for _ in range(2):
            warnings.warn("This is [red]said[/red] once.", stacklevel=2)
        raise ValueError("after it")

    monkeypatch.setattr(work, warned)
    assert call(command, recipe_file()).stderr == "Warning: This is [red]said[/red] once.\nError: after it\n"


def test_an_error_stands_alone():
    command = [sys.executable, "-m", "beyondlora", "evaluate", "nowhere"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: nowhere")


def test_a_run_that_is_there_is_refused(recipe_file):
    path = recipe_file(max_steps=2)
    assert call("train", path).exit_code == 0
    assert call("train", path).exit_code == 2
    assert call("train", path, "--resume").exit_code == 0
    assert call("train", path, "--overwrite").exit_code == 0


def test_nan_is_a_sentence_and_exit_code_1(recipe_file, tmp_path):
    done = call("train", recipe_file(learning_rate=1e30))
    assert done.exit_code == 1
    assert "Training stopped at step 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "last" / "adapter_model.safetensors").exists()


def test_a_bug_shows_itself(recipe_file, monkeypatch):
    def bug(*_arguments, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(beyondlora.train, "train", bug)
    done = call("train", recipe_file())
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)


def test_a_traceback_can_be_asked_for(recipe_file, monkeypatch):
    monkeypatch.setenv("BEYONDLORA_TRACEBACK", "1")
    assert isinstance(call("train", recipe_file(), "--set", "adapter.r=0").exception, ValueError)


# The doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_layer(monkeypatch):
    from beyondlora.doctor import probes

    monkeypatch.setattr(probes, "LAYER_KINDS", probes.LAYER_KINDS[:1])


def test_the_doctor_answers_for_machines_and_for_people(one_layer):
    found = json.loads(call("doctor", "--json").stdout)
    version = found["environment"]["versions"]["torch"]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]  # one of them may lack a build's "+cu128"
    assert found["methods"]["STELLA"]["Linear"]["merge"] == {"state": "yes", "why": ""}
    assert found["methods"]["CERA"]["Linear"]["merge"]["state"] == "refused"
    assert found["optimizers"]["torch AdamW"]["state"] == "yes"
    shown = call("doctor")
    assert shown.exit_code == 0
    assert "Cannot merge a CeRA adapter" in " ".join(shown.stdout.split())
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_the_doctors_8bit_layers_say_nothing(caplog):
    pytest.importorskip("bitsandbytes")
    kind = next(kind for kind in LAYER_KINDS if kind.name == "bnb 8-bit")
    kind.build().eval()(kind.inputs())
    assert caplog.messages == []


def test_the_doctor_tries_a_recipe(recipe_file, tmp_path):
    done = call("doctor", recipe_file())
    assert done.exit_code == 0, done.stderr
    assert "This recipe runs" in done.stdout
    assert not (tmp_path / "run").exists()
    assert call("doctor", recipe_file(), "--json").stdout.startswith("{")
    assert call("doctor", recipe_file(adapter=small_runs.ADAPTERS["stella"] | {"r": 999})).exit_code == 2


# Where the output goes -----------------------------------------------------------------------------------------------

EVALUATED = """
import sys
from beyondlora import cli, evaluate
scores = {"loss": {"value": 2.5, "stderr": 0.125, "n": 8}}
found = {"adapter": "a", "data": "b" * 10**6, "seconds": 1, "metrics": scores}
evaluate.evaluate = lambda *_, **__: found
sys.argv = ["beyondlora", "evaluate", "somewhere", *sys.argv[1:]]
cli.main()
"""


def test_output_that_nobody_reads_is_no_error():
    child = subprocess.Popen(
        [sys.executable, "-c", EVALUATED, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 1
    child.stderr.close()


def test_a_pipe_that_breaks_elsewhere_is_an_error(recipe_file, monkeypatch):
    def broken(*_arguments, **_options):
        raise BrokenPipeError(32, "Broken pipe")  # as a tracker's, whose process has died

    monkeypatch.setattr("beyondlora.train.train", broken)
    done = call("train", recipe_file())
    assert (done.exit_code, done.stderr) == (2, "Error: [Errno 32] Broken pipe\n")


def test_a_terminal_that_knows_no_plus_minus_gets_its_table():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", EVALUATED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "? 0.1250" in done.stdout


# Ctrl-C and SIGTERM --------------------------------------------------------------------------------------------------


def test_ctrl_c_exits_130_leaves_nothing_half_written_and_can_be_resumed(recipe_file, process, tmp_path):
    path, run, whole = recipe_file(), tmp_path / "run", tmp_path / "whole"
    assert call("train", path, "--set", f"output_dir={whole}").exit_code == 0
    for moment in (1, 25, 90, 60):  # of the file operations of what is left each time
        arguments = ["train", path, "--resume"]
        assert process(small_runs.command_and_interrupt, arguments, str(run), moment) == 130
        said = (tmp_path / "run.stderr").read_text()
        assert "Interrupted" in said
        assert "Traceback" not in said
        small_runs.nothing_half_written(run)
    assert "continued from step" in said
    assert call("train", path, "--resume").exit_code == 0
    ours, theirs = small_runs.weights(run / "last"), small_runs.weights(whole / "last")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_from_outside(number, code, recipe_file, tmp_path):
    """The real thing: a process of its own, the signal from outside, at whatever moment it comes."""
    command = [sys.executable, "-m", "beyondlora", "train", recipe_file(max_steps=100_000)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(number)
    try:
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, said
    assert "Traceback" not in said
    assert "--resume" in said
    small_runs.nothing_half_written(tmp_path / "run")
