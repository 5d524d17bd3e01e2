"""Whole comparisons, small ones: what stands in results.jsonl, what a kill leaves, what is refused."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_runs
from typer.testing import CliRunner

from beyondlora import interrupts
from beyondlora.cli import app
from beyondlora.compare import compare, runs
from beyondlora.compare import published as published_format
from beyondlora.compare.grid import Grid
from beyondlora.compare.held_out import check_apart, cut_off
from beyondlora.compare.runs import HeldOut, append_result, check_same, expected, read_results, train_and_measure
from beyondlora.compare.words import caption
from beyondlora.data import hold_out, read_rows, read_splits, splits
from beyondlora.evaluate import evaluate
from beyondlora.progress import Progress
from beyondlora.recipe import Recipe
from beyondlora.run_folder import alone_in

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CERA = {"peft_type": "CERA"}
HUGE = 1e30  # a learning rate that ends in nan


class Told(Progress):
    """Remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def mapping(house, output, **block):
    recipe = dataclasses.asdict(
        small_runs.recipe(house, output_dir=str(output), max_steps=4, eval_steps=2, save_steps=2)
    )
    shared = {"r": 4, "target_modules": "all-linear"}
    settings = {
        "methods": {"LoRA": {"peft_type": "LORA"}, "CeRA": {"peft_type": "CERA"}},
        "learning_rate": [1e-2, 3e-2],
        "seed": [0, 1],
        "test_fraction": 0.3,
    }
    return recipe | {"adapter": shared, "grid": settings | block}


def grid(house, output, **block):
    return Grid.from_mapping(mapping(house, output, **block))


def occupy(planned, method):
    """Put a stranger's file where each run of a method would go, so that it fails."""
    for run in planned.runs:
        if run.method == method:
            Path(run.recipe.output_dir).mkdir(parents=True)
            Path(run.recipe.output_dir, "notes.txt").write_text("mine")


@pytest.fixture(scope="module")
def finished(house, tmp_path_factory):
    """A comparison with a learning rate that diverges and one whose folders are taken: folder, grid, outcome, said."""
    folder, told = tmp_path_factory.mktemp("compare") / "out", Told()
    methods = {"LoRA": {"peft_type": "LORA"}, "CeRA": {"peft_type": "CERA"}, "occupied": {"peft_type": "LORA"}}
    planned = grid(house, folder, methods=methods, learning_rate=[1e-2, HUGE])
    occupy(planned, "occupied")
    return folder, planned, compare(planned, jobs=2, progress=told), told.lines


# What comes out ------------------------------------------------------------------------------------------------------


def test_every_run_is_one_line_and_what_went_wrong_is_a_result(finished):
    folder, planned, outcome, said = finished
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][: len(planned.runs)]
    assert sorted(line["run"] for line in lines) == sorted(run.name for run in planned.runs)
    status = {(line["arm"], line["recipe"]["learning_rate"]): line["status"] for line in lines}
    assert status == {
        ("LoRA", 1e-2): "finished",
        ("LoRA", HUGE): "diverged",
        ("CeRA", 1e-2): "finished",
        ("CeRA", HUGE): "diverged",
        ("occupied", 1e-2): "failed",
        ("occupied", HUGE): "failed",
    }
    assert all("holds files that no run wrote" in line["error"] for line in lines if line["status"] == "failed")
    assert any("occupied" in line and "failed" in line for line in said)
    notes = " ".join(outcome.notes)
    assert "diverged: 2 of LoRA, 2 of CeRA" in notes
    assert "failed: 4 of occupied" in notes
    assert [arm.name for arm in outcome.arms if arm.chosen is None] == ["occupied"]


def test_figures_are_those_of_the_runs_on_rows_that_nothing_was_chosen_on(finished):
    folder, _, outcome, _ = finished
    test, rest = folder / "data" / "test.txt", folder / "data" / "train-and-validation.txt"
    assert test.read_text() not in rest.read_text()
    for arm in (arm for arm in outcome.arms if arm.chosen):
        for line, figure in zip(arm.lines, arm.figures, strict=True):
            recipe = Recipe.load(Path(line["recipe"]["output_dir"]) / "recipe.yaml").replace(max_eval_samples=None)
            assert recipe.dataset_name == str(rest)
            again = evaluate(Path(line["recipe"]["output_dir"]), data=str(test), recipe=recipe)["metrics"]
            assert figure == pytest.approx(again["perplexity"]["value"], rel=1e-9)
            assert line["test"]["perplexity"] == again["perplexity"]
    written = json.loads((folder / "report.json").read_text())
    assert [arm["arm"] for arm in written["arms"]] == [arm.name for arm in outcome.arms]


def test_the_choice_is_made_on_validation_rows(house, tmp_path):
    outcome = compare(grid(house, tmp_path / "out", methods={"LoRA": {"peft_type": "LORA"}}, seed=[0]), jobs=2)
    arm = outcome.arms[0]
    by_rate = {
        line["recipe"]["learning_rate"]: line["validation"]["perplexity"]["value"]
        for line in read_results(tmp_path / "out").values()
    }
    assert arm.chosen.learning_rate == min(by_rate, key=by_rate.get)
    assert arm.chosen.validation == min(by_rate.values())
    assert arm.at_edge
    assert "One seed" in " ".join(outcome.notes)


def test_published_lines_have_what_peft_s_own_table_reads(finished):
    import pandas as pd

    folder, *_ = finished
    files = sorted((folder / "method_comparison").glob("*.json"))
    assert len(files) == 4  # two arms with a result, two seeds
    for path in files:
        row = json.loads(path.read_text())
        run, train, meta = row["run_info"], row["train_info"], row["meta_info"]
        last = train["metrics"][-1]
        # The columns of huggingface/peft, method_comparison/processing.py, and the types it casts them to.
        integers = ["accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"]
        table = pd.DataFrame(
            [
                {name: train[name] for name in [*integers, "file_size", "train_time"]}
                | {"total_time": run["total_time"], "test_accuracy": last["test accuracy"]}
                | {"train_loss": last["train loss"], "samples": last["train samples"]}
                | {"tokens": last["train total tokens"], "created_at": run["created_at"]}
            ]
        )
        table = table.astype(dict.fromkeys([*integers, "file_size", "samples", "tokens"], int))
        table = table.astype(dict.fromkeys(["train_time", "total_time", "test_accuracy", "train_loss"], float))
        assert pd.to_datetime(table["created_at"]).notna().all()
        assert table["file_size"][0] > 0
        assert table["samples"][0] == 4 * 4
        assert train["status"] == "success"
        assert run["peft_config"]["peft_type"] in ("LORA", "CERA")
        assert {"model_id", "max_steps", "seed", "optimizer_kwargs"} <= run["train_config"].keys()
        assert meta["package_info"]["peft-version"]
        assert [entry["step"] for entry in train["metrics"]] == [2, 4, 4]
    assert published_format.ACCURACY == "accuracy"


# Killed and continued ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_goes_on_to_the_same_figures(house, tmp_path):
    whole = compare(grid(house, tmp_path / "whole"), jobs=2)
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps(mapping(house, tmp_path / "out")))
    command = [sys.executable, "-m", "beyondlora", "compare", str(path), "--jobs", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not read_results(tmp_path / "out") and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = read_results(tmp_path / "out")
    assert 0 < len(before) < 8
    again = compare(grid(house, tmp_path / "out"), jobs=2)
    after = read_results(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 8
    assert {arm.name: arm.figures.tolist() for arm in again.arms} == {
        arm.name: arm.figures.tolist() for arm in whole.arms
    }
    assert not [child for child in multiprocessing.active_children() if "ForkServer" in child.name]


def test_a_line_cut_short_by_a_kill_is_neither_read_nor_in_the_way(tmp_path):
    append_result(tmp_path, {"run": "a", "value": float("nan")})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"run": "b", "val')
    assert read_results(tmp_path) == {"a": {"run": "a", "value": None}}
    append_result(tmp_path, {"run": "c"})
    assert list(read_results(tmp_path)) == ["a", "c"]
    (tmp_path / "results.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_results(tmp_path)


def test_a_line_is_what_will_be_read_again(house, tmp_path, monkeypatch):
    """A figure that is not finite is none at once, and the same command twice says the same."""
    planned = grid(house, tmp_path / "out", seed=[0], learning_rate=[1e-2])
    result = {"status": "finished", "error": "", "validation": {"perplexity": {"value": float("nan"), "n": 3}}}
    monkeypatch.setattr(runs, "side_by_side", lambda *_, **__: (pair for pair in [(0, result), (1, result)]))
    test = HeldOut("test.txt", "t", 9, None)
    lines = list(runs.run_all(planned.runs, test, {}, tmp_path, jobs=1, progress=Progress()))
    assert lines == list(read_results(tmp_path).values())
    assert lines[0]["validation"]["perplexity"]["value"] is None


def test_what_is_finished_is_not_run_again_and_what_failed_is(finished, tmp_path):
    folder, planned, outcome, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")}
    lines = len((folder / "results.jsonl").read_text().splitlines())
    told = Told()
    again = compare(planned, jobs=2, progress=told)
    assert any("4 left" in line for line in told.lines)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")}
    assert len((folder / "results.jsonl").read_text().splitlines()) == lines + 4
    assert [arm.figures.tolist() for arm in again.arms] == [arm.figures.tolist() for arm in outcome.arms]


def test_a_worker_that_is_killed_is_a_failed_run(house, tmp_path):
    from beyondlora.workers import WorkerDiedError, side_by_side

    found = dict(side_by_side(_perhaps_killed, [(True,), (False,)], count=2))
    assert isinstance(found[0], WorkerDiedError)
    assert "SIGKILL" in str(found[0])
    assert found[1] == "alive"


def _perhaps_killed(die, _progress):
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_runs_on_weights_of_four_bits_do_not_stand_beside_those_on_whole_ones(house):
    recipe, test = small_runs.recipe(house), HeldOut("test.txt", "t", 9, None)
    line = expected(recipe.replace(load_in_4bit=True), test, "d", None)
    check_same({"one": line}, line, Path("here"))
    with pytest.raises(ValueError, match=r"base_sha256: 4 bits \w+, here (?!4 bits)"):
        check_same({"one": line}, expected(recipe, test, "d", None), Path("here"))


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupts.Terminated)]
)
def test_a_worker_that_a_signal_finds_being_begun_is_ended(number, raised, monkeypatch):
    from beyondlora.workers import side_by_side

    begun = []

    def start(process):
        begun.append(process)
        original(process)
        os.kill(os.getpid(), number)

    kind = multiprocessing.get_context("forkserver").Process
    original = kind.start
    monkeypatch.setattr(kind, "start", start)
    before = signal.signal(number, interrupts.ANSWERS[number])
    try:
        with pytest.raises(raised):
            list(side_by_side(_asleep, [(60,)]))
    finally:
        signal.signal(number, before)
    assert begun[0].exitcode == -signal.SIGTERM


def _asleep(seconds, _progress):
    time.sleep(seconds)


def test_a_script_without_the_guard_of_its_own_start_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from beyondlora.workers import side_by_side as run\nfrom operator import neg\nprint(list(run(neg, [(1,)])))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert 'beneath `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]
    assert "[(" not in ended.stdout


def test_workers_say_nothing_of_what_they_import(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import beyondlora.chatter\n"
        "from beyondlora.compare.runs import train_and_measure\n"
        "from beyondlora.workers import side_by_side\n"
        "if __name__ == '__main__':\n"
        "    print(list(side_by_side(train_and_measure, [(None, None)])))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "AttributeError" in ended.stdout  # there is no run to take; the worker has come that far
    assert ended.stderr == ""


def test_shown_again_a_comparison_reads_its_training_rows_once_and_sees_where_they_changed(
    house, tmp_path, monkeypatch
):
    rows, test = small_runs.sentences(tmp_path / "rows.jsonl"), tmp_path / "test.jsonl"
    distinct = [{"sentence1": f"nobody says {number}", "label": "good"} for number in range(20)]
    test.write_text("".join(json.dumps(row) + "\n" for row in distinct))
    block = {"methods": {"LoRA": {"peft_type": "LORA"}}, "learning_rate": [1e-2], "seed": [0], "test_fraction": None}
    changes = {"task": "sequence-classification", "dataset_name": str(rows)}
    planned = Grid.from_mapping(
        mapping(house, tmp_path / "out", **block, test_dataset_name=str(test))
        | changes
        | {"adapter": {"r": 4, "target_modules": ["q_proj"]}}
    )
    compare(planned, jobs=1)
    asked, read_rows = [], splits.read_rows
    monkeypatch.setattr(splits, "read_rows", lambda name, **named: asked.append(name) or read_rows(name, **named))
    compare(planned)
    assert asked.count(str(rows)) == 1
    rows.write_text(rows.read_text().replace("cat", "cow", 1))
    with pytest.raises(ValueError, match=r"cannot stand beside .*data_sha256"):
        compare(planned)


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_grid_that_has_changed_is_refused_with_the_difference(finished, house):
    folder, *_ = finished
    changed = mapping(house, folder, learning_rate=[1e-2, HUGE]) | {"max_steps": 5}
    with pytest.raises(ValueError, match="max_steps: 5, was 4"):
        compare(Grid.from_mapping(changed))


def test_runs_of_other_data_are_not_joined(finished, house, tmp_path):
    folder, *_ = finished
    with pytest.raises(ValueError, match=r"cannot stand beside .*test_sha256"):
        compare(grid(house, tmp_path / "out", test_fraction=0.4), joined=[folder])
    with pytest.raises(FileNotFoundError, match="--join"):
        compare(grid(house, tmp_path / "out"), joined=[tmp_path])


def test_two_comparisons_are_not_at_work_in_one_folder(finished, house, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    holder = "import sys, time; from pathlib import Path; from beyondlora.run_folder import alone_in\n"
    holder += "with alone_in(Path(sys.argv[1]), 'comparison'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = (folder / "results.jsonl").read_bytes()
        with pytest.raises(BlockingIOError, match="another comparison is at work in this folder"):
            compare(grid(house, folder))
        assert (folder / "results.jsonl").read_bytes() == before
        other.kill()
    with alone_in(folder, "comparison"):  # what held it is dead, and the file it left is in nobody's way
        pass


def of_one_method(finished, house, folder):
    """The grid of LoRA alone, finished already in a folder."""
    folder.mkdir()
    lines = [line for line in (finished[0] / "results.jsonl").read_text().splitlines() if '"arm": "LoRA"' in line]
    (folder / "results.jsonl").write_text("\n".join(lines).replace(f"{finished[0]}/data", f"{folder}/data") + "\n")
    return grid(house, folder, methods={"LoRA": {"peft_type": "LORA"}}, learning_rate=[1e-2, HUGE])


def another(finished, folder, change=dict):
    """The comparison again in another folder, each line changed."""
    folder.mkdir(parents=True)
    for line in read_results(finished[0]).values():
        append_result(folder, change(line))
    return folder


def test_runs_of_another_folder_stand_in_the_table(finished, house, tmp_path):
    one = of_one_method(finished, house, tmp_path / "out")
    other, namesake = another(finished, tmp_path / "other"), another(finished, tmp_path / "old" / "other")
    outcome = compare(one, joined=[other, namesake])
    names = {arm.name for arm in outcome.arms}
    assert {"LoRA", f"LoRA ({tmp_path.name}/other)", "LoRA (old/other)", "CeRA (old/other)"} <= names
    assert all(len(arm.lines) in (0, 2) for arm in outcome.arms)
    assert outcome.comparisons["LoRA (old/other)"].difference == 0
    assert outcome.comparisons["LoRA (old/other)"].verdict == "within noise"
    assert outcome.alike
    # One file a run: two seeds of LoRA here, of LoRA and CeRA in either of the others.
    assert len(list((tmp_path / "out" / "method_comparison").glob("*.json"))) == 2 + 2 * 4


def test_the_same_runs_are_not_joined_as_new_evidence(finished, house, tmp_path):
    one, other = of_one_method(finished, house, tmp_path / "out"), another(finished, tmp_path / "other")
    with pytest.raises(ValueError, match=r"names .*other twice: .* new evidence"):
        compare(one, joined=[other, tmp_path / "out" / ".." / "other"])
    with pytest.raises(ValueError, match=r"--join .*out is this comparison's own folder"):
        compare(one, joined=[tmp_path / "out"])
    first = next(iter(read_results(other).values()))
    append_result(other, first | {"run": "again"})
    with pytest.raises(ValueError, match=r"other.results.jsonl: the runs .* and again are of one arm"):
        compare(one, joined=[other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda line: line | {"recipe": line["recipe"] | {"max_steps": 400}},
            "another recipe .*max_steps: 400",
        ),
        (lambda line: line | {"recipe": line["recipe"] | {"gone_key": 1}}, "'gone_key' is not a key of a recipe"),
        (
            lambda line: {name: line[name] for name in line if name != "tokens_per_row"},
            "has no tokens_per_row.",
        ),
        (
            lambda line: line | {"validation": {}, "items": {}},
            "has no validation: perplexity, items: nll, ",
        ),
        (lambda line: {"run": line["run"]}, "has no method, arm, searched"),
    ],
)
def test_runs_made_in_another_way_are_not_joined(finished, house, tmp_path, change, message):
    one, other = of_one_method(finished, house, tmp_path / "out"), another(finished, tmp_path / "other", change)
    with pytest.raises(ValueError, match=rf"other.results.jsonl: the .*run lora-.*{message}"):
        compare(one, joined=[other])


def test_a_recipe_of_another_version_is_refused_with_its_file_and_run(finished, house, tmp_path):
    one = of_one_method(finished, house, tmp_path / "out")
    name, line = next(iter(read_results(tmp_path / "out").items()))
    append_result(tmp_path / "out", line | {"recipe": line["recipe"] | {"gone_key": 1}})
    with pytest.raises(ValueError, match=rf"results.jsonl: the recipe of the run {name} is none .*'gone_key'"):
        compare(one)


def test_a_joined_arm_is_not_the_baseline_and_another_search_is_said(finished, house, tmp_path):
    def better_and_wider(line):
        if line["status"] != "finished":
            return line
        rate = {"learning_rate": 2e-2}
        value = {"perplexity": {"value": 1.0, "stderr": 0.1}}
        return line | {"validation": value, "searched": rate, "recipe": line["recipe"] | rate}

    one = of_one_method(finished, house, tmp_path / "out")
    outcome = compare(one, joined=[another(finished, tmp_path / "other", better_and_wider)])
    assert outcome.arms[0].chosen.validation == 1.0
    assert outcome.baseline.name == "LoRA"
    assert any("Not searched like the arms of this grid: LoRA (other), CeRA (other)" in note for note in outcome.notes)
    assert "alike for every arm" not in caption(outcome)


def test_what_was_forgotten_of_another_corpus_is_no_comparison(house):
    recipe, test = small_runs.recipe(house), HeldOut("test.txt", "t", 9, None)
    line = expected(recipe, test, "d", None, "one corpus")
    check_same({"one": line}, expected(recipe, test, "d", None), Path("here"))  # nothing is compared by it
    check_same({"one": line}, line, Path("here"))
    with pytest.raises(ValueError, match="forgetting_sha256: one corpus, here another"):
        check_same({"one": line}, expected(recipe, test, "d", None, "another"), Path("here"))


def test_a_run_that_was_trained_on_other_rows_is_not_taken_up(house, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((house / "text.txt").read_text())
    values = mapping(house, tmp_path / "out", methods={"LoRA": {"peft_type": "LORA"}}, seed=[0], learning_rate=[1e-2])
    planned = Grid.from_mapping(values | {"dataset_name": str(text)})
    compare(planned, jobs=1)
    (tmp_path / "out" / "results.jsonl").unlink()
    compare(planned, jobs=1)  # the run is there, and only its line is missing
    (tmp_path / "out" / "results.jsonl").unlink()
    text.write_text(text.read_text().replace("cat", "cow"))
    with pytest.raises(ValueError, match=r"out.runs.lora-.* was trained on other rows .*Delete that folder"):
        compare(planned, jobs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": "adamw_bogus"}, "grid: LoRA cannot be trained: optim='adamw_bogus' is unknown"),
        ({"grid": {"optim": ["adamw_torch", "adamw_bogus"]}}, "LoRA cannot be trained: optim='adamw_bogus' is unknown"),
        (
            {
                "grid": {
                    "methods": {
                        "LoRA": {"peft_type": "LORA"},
                        "CeRA": {"peft_type": "CERA", "target_modules": "q_porj"},
                    }
                }
            },
            "grid: CeRA cannot be trained: adapter: .*q_porj",
        ),
    ],
    ids=["optim", "one optim", "modules"],
)
def test_what_cannot_be_begun_is_refused_before_the_first_run(house, tmp_path, change, message):
    values = mapping(house, tmp_path / "out", **change.pop("grid", {}))
    with pytest.raises(ValueError, match=message):
        compare(Grid.from_mapping(values | change))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_method_that_begins_with_the_weights_themselves_is_let_in(house, tmp_path):
    methods = {"PiSSA": {"peft_type": "LORA", "init_lora_weights": "pissa"}}
    outcome = compare(grid(house, tmp_path / "out", methods=methods, seed=[0], learning_rate=[1e-3]), jobs=1)
    assert outcome.baseline.name == "PiSSA"


def test_a_comparison_whose_baseline_failed_is_written_and_is_an_error(house, tmp_path):
    few = {"learning_rate": [1e-2], "seed": [0], "baseline": "CeRA"}
    planned = grid(house, tmp_path / "out", **few)
    occupy(planned, "CeRA")
    with pytest.raises(ValueError, match=r"baseline CeRA has no result \(1 of .* cera-lr0.01-seed0: FileExistsError"):
        compare(planned, jobs=2)
    assert "no result" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "grid.yaml").write_text(json.dumps(mapping(house, tmp_path / "out", **few)))
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["compare", str(tmp_path / "grid.yaml")])
    assert done.exit_code == 2
    assert "The baseline CeRA has no result" in done.stderr
    assert re.search(r"LoRA .* 0\.01", done.stdout)  # what there is


def test_a_few_steps_tell_how_long_a_run_will_take():
    """20 s for four steps of one second, and the evaluations after them and at the end, of 3 s: 10 s to begin with."""
    rows = [{"step": step, "epoch": step / 4, "loss": 1.0, "seconds": 4.0 + step} for step in (1, 2, 3, 4)]
    rows.append({"step": 4, "epoch": 1.0, "eval_loss": 1.0, "seconds": 11.0})
    by_steps = SimpleNamespace(max_steps=100, eval_steps=10, num_train_epochs=3)
    assert runs._extrapolated(by_steps, rows, wall=20.0) == (10 + 100 + (10 + 3) * 3, 100)  # at the end; the test rows
    by_epochs = SimpleNamespace(max_steps=-1, eval_steps=10, num_train_epochs=2)
    assert runs._extrapolated(by_epochs, rows, wall=20.0) == (10 + 8 + 3 * 3, 8)
    assert runs._extrapolated(by_steps, rows[:2], wall=20.0) == (20, 100)  # diverged at once


def test_an_absurd_grid_is_counted_and_refused_without_yes(house, tmp_path):
    told = Told()
    with pytest.raises(ValueError, match=r"200 runs, about .*--yes"):
        compare(grid(house, tmp_path / "out", seed=list(range(50))), progress=told)
    assert any("200 runs: 2 arms x 2 settings x 50 seeds" in line for line in told.lines)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_too_few_test_rows_are_refused_before_the_first_run(house, tmp_path):
    with pytest.raises(ValueError, match="too few for intervals of 95%"):
        compare(grid(house, tmp_path / "out", test_fraction=0.05))
    assert not (tmp_path / "out" / "runs").exists()


def test_an_unknown_method_is_refused_with_the_nearest(house, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'LORA'"):
        compare(grid(house, tmp_path / "out", methods={"LoRA": {"peft_type": "LRA"}}))


# Rows apart ----------------------------------------------------------------------------------------------------------


def test_validation_rows_that_are_test_rows_are_refused(house, tmp_path):
    small_runs.sentences(tmp_path / "rows.jsonl", rows=200)
    recipe = small_runs.recipe(house, task="sequence-classification", dataset_name=str(tmp_path / "rows.jsonl"))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    distinct = list({json.loads(line)["sentence1"]: line for line in lines}.values())
    (tmp_path / "rows.jsonl").write_text("\n".join(distinct) + "\n")
    with pytest.raises(ValueError, match=r"of the validation rows are test rows too \(the first is validation row 1"):
        check_apart(recipe, read_splits(recipe), recipe.dataset_name)
    rest, test = cut_off(recipe, 0.2, tmp_path / "data")
    assert check_apart(rest, read_splits(rest), test) == 0
    (tmp_path / "one.jsonl").write_text(json.dumps({"sentence1": "nobody says this", "label": "good"}) + "\n")
    assert check_apart(recipe, read_splits(recipe), str(tmp_path / "one.jsonl")) == 0


def test_a_test_text_inside_the_validation_text_is_refused_wherever_its_blocks_begin(house, tmp_path):
    recipe = small_runs.recipe(house, eval_fraction=0.5)
    lines = (house / "text.txt").read_text().splitlines()
    (tmp_path / "late.txt").write_text("\n".join(lines[-7:-1]) + "\n")
    (tmp_path / "early.txt").write_text("\n".join(lines[1:7]) + "\n")
    with pytest.raises(ValueError, match="test rows too"):
        check_apart(recipe, read_splits(recipe), str(tmp_path / "late.txt"))
    # Training rows that are test rows: said, not refused.
    assert check_apart(recipe, read_splits(recipe), str(tmp_path / "early.txt")) == 4


def sentences_of(tmp_path, texts):
    rows = [json.dumps({"sentence1": text, "label": ("good", "bad")[n % 2]}) for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return {"task": "sequence-classification", "dataset_name": str(tmp_path / "rows.jsonl")}


def test_rows_that_are_the_same_are_cut_off_together(house, tmp_path):
    texts = [f"sentence {number % 50}" for number in range(100)]
    recipe = small_runs.recipe(house, **sentences_of(tmp_path, texts))
    rest, test = cut_off(recipe, 0.2, tmp_path / "data")
    kept, tested = (Counter(read_rows(name)["sentence1"]) for name in (rest.dataset_name, test))
    assert kept + tested == Counter(texts)
    assert not kept.keys() & tested.keys()
    assert tested.total() == 20
    assert check_apart(rest, read_splits(rest), test) == 0
    distinct = small_runs.recipe(house, **sentences_of(tmp_path, list(map(str, range(100)))))
    _, test = cut_off(distinct, 0.2, tmp_path / "data")
    assert read_rows(test)["sentence1"] == hold_out(distinct, 0.2)[1]["sentence1"]  # as validation rows are drawn
    same = small_runs.recipe(house, **sentences_of(tmp_path, ["one", "two"] * 50))
    with pytest.raises(ValueError, match="100 rows are 2 different ones, and none comes so seldom"):
        cut_off(same, 0.2, tmp_path / "data")


def test_texts_that_share_some_lines_are_not_the_same(house, tmp_path):
    header = [f"Licensed under the one licence that everybody writes above all of it, {n}" for n in range(4)]
    body = "a line of file {} that stands in no other one, and is long enough to count: {}"
    # Of the six stretches of three lines two are the licence's.
    texts = ["\n".join([*header, *(body.format(file, line) for line in range(4))]) for file in range(30)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = small_runs.recipe(house, dataset_name=str(tmp_path / "code.jsonl"), eval_fraction=0.2)
    rest, test = cut_off(recipe, 0.2, tmp_path / "data")
    assert check_apart(rest, read_splits(rest), test) == 0
    changed = [text.replace("count: 3", "count: three") for text in texts]  # one line of each: still the same texts
    (tmp_path / "again.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in changed))
    with pytest.raises(ValueError, match=r"^5 of the validation rows are test rows too"):
        check_apart(rest, read_splits(rest), str(tmp_path / "again.jsonl"))


def test_evaluation_rows_of_the_hub_keep_their_configuration(house, tmp_path):
    named = sentences_of(tmp_path, list(map(str, range(100)))) | {"dataset_config": "sst2", "eval_dataset_name": "glue"}
    rest, _ = cut_off(small_runs.recipe(house, **named), 0.2, tmp_path / "data")
    assert (rest.eval_dataset_name, rest.dataset_config) == ("glue", "sst2")


def test_the_test_rows_are_cut_off_as_they_stand(house, tmp_path):
    recipe = small_runs.recipe(house)
    rest, test = cut_off(recipe, 0.25, tmp_path)
    whole = (house / "text.txt").read_text()
    assert Path(rest.dataset_name).read_text() + Path(test).read_text() == whole
    assert 0.2 < len(Path(test).read_text()) / len(whole) <= 0.25


def test_a_run_on_other_test_rows_than_the_grid_began_with_fails(house, tmp_path):
    planned = grid(house, tmp_path / "out", test_fraction=0.3)
    _, test = cut_off(planned.runs[0].recipe, 0.3, tmp_path)
    line = train_and_measure(planned.runs[0], HeldOut(test, "another", 30, None), Progress())
    assert line["status"] == "failed"
    assert "have changed" in line["error"]
