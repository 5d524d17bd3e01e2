"""The demo: fair by construction, honest in what it prints, ordinary in what it leaves behind."""

import ast
import copy
import io
import json
import math
import multiprocessing
from collections import Counter

import pytest
from peft import get_peft_model
from rich.console import Console

from beyondlora import models
from beyondlora.attach import config_from
from beyondlora.demo import run as demo_run
from beyondlora.demo.corpus import module_source, without_docstrings, write_corpus
from beyondlora.demo.run import demo, free_folder, settings, table
from beyondlora.evaluate import evaluate
from beyondlora.progress import Progress
from beyondlora.recipe import Recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def plan():
    """The demo cut down to seconds: two methods, two learning rates, three steps, a page of each split."""
    plan = copy.deepcopy(settings())
    plan["recipe"] |= {"max_steps": 3, "max_length": 64, "eval_steps": 2, "warmup_steps": 0, "max_eval_samples": 4}
    plan["learning_rates"] = ["1e-3", "1e-2"]
    plan["methods"] = {name: plan["methods"][name] for name in ("LoRA", "StelLA")}
    plan["corpus"] = {"max_bytes": 2000, "train": ["textwrap"], "validation": ["csv"], "test": ["heapq", "shlex"]}
    return plan


def shown(rows):
    console = Console(file=io.StringIO(), width=80)
    console.print(table(rows))
    return console.file.getvalue()


def read(path):
    return json.loads(path.read_text())


# Fair ----------------------------------------------------------------------------------------------------------------


def test_every_method_has_lora_s_budget_within_four_percent_and_never_more():
    plan = settings()
    counts = {}
    for method, adapter in plan["methods"].items():
        recipe = Recipe(**plan["recipe"], adapter=adapter, output_dir="x", dataset_name="x")
        model = get_peft_model(models.load_base("demo", task="causal-lm"), config_from(recipe))
        counts[method], _ = model.get_nb_trainable_parameters()
    assert list(counts) == ["LoRA", "DoRA", "CeRA", "AuroRA", "StelLA"]
    assert all(0.96 * counts["LoRA"] <= count <= counts["LoRA"] for count in counts.values()), counts


def test_no_module_is_in_two_splits_and_this_python_has_them():
    corpus = settings()["corpus"]
    modules = [*corpus["train"], *corpus["validation"], *corpus["test"]]
    assert len(set(modules)) == len(modules)
    assert [name for name in modules if module_source(name) is None] == []


def test_docstrings_are_cut_out_and_nothing_else():
    source = '"""Module.\n\nMore."""\nimport os\n\n\nclass A:\n    """One line."""\n\n    x = """kept"""\n\n'
    source += (
        '    def f(self):\n        """Two\n        lines."""\n        return 1\n\f\nasync def g():\n    \'A string.\'\n'
    )
    left = 'import os\n\n\nclass A:\n\n    x = """kept"""\n\n    def f(self):\n        return 1\n\f\nasync def g():\n'
    assert without_docstrings(source) == left


@pytest.mark.parametrize("name", settings()["corpus"]["test"])
def test_no_docstring_of_a_test_module_is_left(name):
    import importlib
    import inspect

    source, left = inspect.getsource(importlib.import_module(name)), module_source(name)
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)
    ]
    assert any(docstrings)
    assert not any(text in left for text in docstrings if text and "\n" in text)
    assert not Counter(left.split("\n")) - Counter(source.split("\n"))


def test_modules_that_this_python_lacks_are_left_out(tmp_path):
    files = write_corpus(tmp_path, {"train": ["no_such_module", "heapq"]}, max_bytes=300)
    assert files["train"].read_text() == module_source("heapq")[:300]
    with pytest.raises(FileNotFoundError, match="without the source"):
        write_corpus(tmp_path, {"train": ["no_such_module"]}, max_bytes=300)


# Honest and ordinary -------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_runs_say(plan, tmp_path):
    rows = demo(tmp_path / "demo", plan=plan)
    assert [row.method for row in rows] == ["none (base)", "LoRA", "StelLA"]
    for row in rows[1:]:
        folders = {rate: tmp_path / "demo" / f"{row.method.lower()}-lr{rate:g}" for rate in (1e-3, 1e-2)}
        losses = {rate: read(folder / "metrics.json")["metrics"]["loss"]["value"] for rate, folder in folders.items()}
        assert row.learning_rate == min(losses, key=losses.get)
        assert row.at_edge
        best = folders[row.learning_rate]
        recipe = Recipe.load(best / "recipe.yaml").replace(max_eval_samples=None)
        test = evaluate(best, data=str(tmp_path / "demo" / "corpus" / "test.txt"), recipe=recipe)
        assert row.perplexity == test["metrics"]["perplexity"]
        assert row.perplexity["n"] == rows[0].perplexity["n"] > 4
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    for row in rows:
        assert f"{row.perplexity['value']:.2f}" in text
        assert f"{row.parameters:,}" in text
    stored = read(tmp_path / "demo" / "results.json")["rows"]
    assert [row["perplexity"] for row in stored] == [row.perplexity for row in rows]
    assert (tmp_path / "demo" / "curves.png").exists()
    assert "smallest or largest" in demo_run.caption(rows)


class CtrlC(Progress):
    """Interrupts as soon as one training is through."""

    def advance(self, done, note=""):
        if not note.startswith("0 of"):
            raise KeyboardInterrupt


def test_an_interrupted_demo_goes_on_where_it_stopped(plan, tmp_path):
    whole = demo(tmp_path / "whole", plan=plan)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "demo", plan=plan, progress=CtrlC())
    assert not [process for process in multiprocessing.active_children() if "ForkServerProcess" in process.name]
    assert not (tmp_path / "demo" / "results.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*/metrics.json")}
    rows = demo(tmp_path / "demo", plan=plan, resume=True)
    assert finished
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert [row.perplexity for row in rows] == [row.perplexity for row in whole]


def test_a_learning_rate_that_ends_in_nan_loses_and_does_not_stop_the_demo(plan, tmp_path):
    plan["learning_rates"] = ["1e30", "1e-3"]
    plan["methods"] = {"LoRA": plan["methods"]["LoRA"]}
    assert [row.learning_rate for row in demo(tmp_path / "one", plan=plan)] == [None, 1e-3]
    plan["learning_rates"] = ["1e30"]
    with pytest.raises(FloatingPointError, match="Every learning rate that was tried with LoRA"):
        demo(tmp_path / "two", plan=plan)


def test_bad_settings_reach_the_caller_as_they_are(plan, tmp_path):
    plan["methods"] = {"LoRA": {"peft_type": "LORA", "rnk": 3}}
    with pytest.raises(ValueError, match="LORA has no key 'rnk'"):
        demo(tmp_path / "demo", plan=plan)


def test_a_folder_that_is_not_empty_is_refused_and_the_default_moves_on(plan, tmp_path):
    (tmp_path / "demo").mkdir()
    assert free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "results.json").write_text("{}")
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"
    with pytest.raises(FileExistsError, match="not empty"):
        demo(tmp_path / "demo", plan=plan)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    rows = demo(tmp_path / "demo")
    assert [row.method for row in rows] == ["none (base)", *settings()["methods"]]
    assert all(math.isfinite(row.perplexity["value"]) and row.perplexity["stderr"] > 0 for row in rows)
    assert all(row.perplexity["value"] < rows[0].perplexity["value"] for row in rows[1:])  # each one learns something
    assert max(map(len, shown(rows).splitlines())) <= 80
