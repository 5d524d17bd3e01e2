"""lm-evaluation-harness's tasks in a recipe: the figures are the model's, the same everywhere; nothing is disturbed.

The harness is not part of the development environment: `pip install lm_eval` to run what is not a refusal.
"""

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_models
import small_runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from beyondlora import processes
from beyondlora.attach import load_trained
from beyondlora.compare import compare
from beyondlora.compare.grid import Grid
from beyondlora.compare.runs import check_same
from beyondlora.evaluate import evaluate, load_base
from beyondlora.figures import Harness
from beyondlora.recipe import Recipe
from beyondlora.train import train

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CHOICES = [" the cat", " a dog", " one mat."]
ROWS = [
    {"question": question, "right": number * 2 % 3, "answer": CHOICES[number * 2 % 3]}
    for number, question in enumerate(
        f"{who} {did}" for who in ("it", "a cat", "dogs", "one") for did in ("sat", "ran")
    )
]
HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "choose": """\
output_type: multiple_choice
doc_to_choice: [" the cat", " a dog", " one mat."]
doc_to_target: right
metric_list: [{metric: acc}]
""",
    "follow": """\
output_type: loglikelihood
doc_to_target: "{{answer}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "write": """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: true, temperature: 1.0}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: letter, filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "unsafe": 'output_type: loglikelihood\ndoc_to_target: "{{answer}}"\nunsafe_code: true\n',
}
GROUP = """\
group: everything
task: [choose, follow]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
ASKED = ["everything", "write"]
FIGURES = {"choose_acc", "follow_perplexity", "everything_acc", "write_exact_match_whole", "write_exact_match_letter"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of eight rows, which need no download."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, rows=folder / "rows.jsonl") + body)
    (folder / "gone.yaml").write_text(HEAD.format(name="gone", rows=folder / "gone.jsonl") + TASKS["follow"])
    (folder / "everything.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def own_alone(monkeypatch):
    """Without the harness's own tasks, whose 15,000 files take it seconds to look through."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def recipe(house, output, tasks=None, **changes):
    asked = {"lm_eval_tasks": ASKED, "lm_eval_include_path": str(tasks)} if tasks else {}
    return small_runs.recipe(house, output_dir=str(output), max_steps=4, **asked | changes)


def tokenizer_of(house):
    return AutoTokenizer.from_pretrained(house / "base")


@torch.no_grad()
def log_likelihood(model, tokenizer, question, answer):
    asked = tokenizer(question, add_special_tokens=False).input_ids
    ids = torch.tensor([asked + tokenizer(answer, add_special_tokens=False).input_ids])
    predicted = model(ids).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)
    return predicted.gather(1, ids[0, len(asked) :, None]).sum().item()


def chosen_right(model, tokenizer):
    """Row by row, whether the right answer is the likeliest."""
    likely = [[log_likelihood(model, tokenizer, row["question"], choice) for choice in CHOICES] for row in ROWS]
    return [float(np.argmax(values) == row["right"]) for values, row in zip(likely, ROWS, strict=True)]


def perplexity(model, tokenizer):
    """exp of the mean negative log likelihood of an answer, as the harness defines it."""
    return math.exp(-np.mean([log_likelihood(model, tokenizer, row["question"], row["answer"]) for row in ROWS]))


# The same everywhere -------------------------------------------------------------------------------------------------


@needs_harness
def test_train_and_evaluate_agree_and_the_figures_are_the_models(house, tasks, own_alone, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no repository
    made = recipe(house, tmp_path / "run", tasks)
    kept = []
    trained = train(made)["metrics"]
    evaluated = evaluate(tmp_path / "run", on_outcomes=kept.append)["metrics"]
    assert evaluated == trained
    assert set(trained) == {"loss", "perplexity", "tokens"} | FIGURES
    tokenizer = tokenizer_of(house)
    model = load_trained(tmp_path / "run" / "adapter", load_base(made, tokenizer, None))
    right = chosen_right(model, tokenizer)
    assert 0 < sum(right) < len(ROWS)
    stderr = np.std(right, ddof=1) / len(ROWS) ** 0.5
    assert trained["choose_acc"] == {"value": np.mean(right), "stderr": pytest.approx(stderr), "n": len(ROWS)}
    assert kept[0]["choose_acc"].tolist() == right
    for name in ("choose_acc", "write_exact_match_whole", "write_exact_match_letter"):
        assert len(kept[0][name]) == trained[name]["n"] == len(ROWS)
        assert np.mean(kept[0][name]) == trained[name]["value"]
    assert trained["everything_acc"]["value"] == np.mean(right)
    followed = trained["follow_perplexity"]
    assert math.log(followed["value"]) == pytest.approx(math.log(perplexity(model, tokenizer)), rel=1e-5)
    assert followed["stderr"] > 0
    assert followed["n"] == len(ROWS)
    assert "follow_perplexity" not in kept[0]  # a mean of no numbers
    printed = "".join(capfd.readouterr())
    assert not [word for word in ("bootstrapping", "Running", "it/s", "fatal") if word in printed]


@needs_harness
def test_what_was_asked_and_answered_is_kept(house, tasks, own_alone, tmp_path, monkeypatch):
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    made = recipe(house, tmp_path / "run", tasks)
    measured = train(made)["metrics"]
    assert "DISABLE_MULTIPROC" not in os.environ
    (path,) = (tmp_path / "run").glob("generations*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 4 * len(ROWS)  # write has two filters
    tokenizer = tokenizer_of(house)
    model = load_trained(tmp_path / "run" / "adapter", load_base(made, tokenizer, None))
    for number, row in enumerate(ROWS):
        chosen, followed, *written = (record for record in records if record["row"] == number)
        assert chosen["prompt"] == followed["prompt"] == row["question"]
        assert (chosen["task"], chosen["options"], chosen["answer"]) == ("choose", CHOICES, row["right"])
        for option, ((likelihood, _),) in zip(CHOICES, chosen["responses"], strict=True):
            expected = log_likelihood(model, tokenizer, row["question"], option)
            assert float(likelihood) == pytest.approx(expected, abs=1e-3)
        assert [record["filter"] for record in written] == ["whole", "letter"]
        ((text,),) = written[0]["responses"]
        assert written[0]["exact_match"] == float(text == row["answer"])
        assert written[0]["options"] == []
    right = [record["acc"] for record in records if record["task"] == "choose"]
    assert np.mean(right) == measured["choose_acc"]["value"]


@needs_harness
def test_figures_of_another_version_of_a_task_do_not_stand_in_one_table(house, tasks, own_alone, tmp_path):
    made = recipe(house, "unused", tasks, lm_eval_tasks=["choose", "follow"])
    version = Harness.of(made).version
    assert version == f"lm_eval {importlib.metadata.version('lm_eval')}: choose, follow"
    (tmp_path / "newer").mkdir()
    text = (tasks / "choose.yaml").read_text() + "metadata: {version: 2}\n"
    (tmp_path / "newer" / "choose.yaml").write_text(text)
    newer = Harness.of(recipe(house, "unused", tmp_path / "newer", lm_eval_tasks=["choose"])).version
    assert newer.endswith(": choose 2")
    common = dict.fromkeys(("task", "base_sha256", "data_sha256", "test_sha256", "metric_version"), "same")
    with pytest.raises(ValueError, match=f"harness_version: {re.escape(newer)}, here {re.escape(version)}"):
        check_same({"a": common | {"harness_version": newer}}, common | {"harness_version": version}, tmp_path)


@needs_harness
def test_max_eval_samples_is_the_harness_limit(house, tasks, own_alone):
    made = recipe(house, "unused", tasks, max_eval_samples=3, lm_eval_tasks=["choose"])
    harness, kept, model = Harness.of(made), [], small_models.llama()
    scores = harness.measure(model, tokenizer_of(house), batch_size=2, on_outcomes=kept.append)
    assert harness.means["choose_acc"].rows == scores["choose_acc"].n == 3
    assert kept[0]["choose_acc"].tolist() == chosen_right(model, tokenizer_of(house))[:3]
    assert Harness.of(recipe(house, "unused", tasks)).means["choose_acc"].rows == len(ROWS)


@needs_harness
def test_bf16_computes_under_autocast(house, tasks, own_alone):
    harness = Harness.of(recipe(house, "unused", tasks, lm_eval_tasks=["follow"]))
    model, tokenizer = small_models.llama(), tokenizer_of(house)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    plain, half = (
        harness.measure(model, tokenizer, batch_size=4, bf16=bf16, on_outcomes=lambda _: None)["follow_perplexity"]
        for bf16 in (False, True)
    )
    assert half.value != plain.value
    assert math.log(half.value) == pytest.approx(math.log(plain.value), rel=0.02)  # bfloat16 has 8 bits


@needs_harness
@pytest.mark.slow
def test_compare_judges_by_a_figure_of_the_harness(house, tasks, tmp_path):
    made = recipe(house, tmp_path / "out", tasks, lm_eval_tasks=["choose"])
    grid = {
        "methods": {"LoRA": {"peft_type": "LORA"}, "all": {"peft_type": "FULL"}},
        "seed": [0],
        "test_fraction": 0.3,
        "metric": "choose_acc",
        "confidence": 0.85,
    }
    mapping = vars(made) | {"adapter": {"r": 2, "target_modules": "all-linear"}}
    outcome = compare(Grid.from_mapping(mapping | {"grid": grid}), jobs=1)
    assert outcome.metric.higher_is_better
    assert outcome.rows == len(ROWS)
    assert [line["status"] for line in outcome.lines] == ["finished"] * 2
    for arm in outcome.arms:
        for line, figure in zip(arm.lines, arm.figures, strict=True):
            assert figure == np.mean(line["items"]["choose_acc"]) == line["test"]["choose_acc"]["value"]


# Nothing disturbed ---------------------------------------------------------------------------------------------------


@needs_harness
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_the_model_and_the_generators_stay_as_they_were(house, tasks, own_alone):
    config = small_models.llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    trained = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), trained)
    with torch.no_grad():  # the trained copy of the tied embedding is another one now
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 * weight.requires_grad)
    tokenizer = tokenizer_of(house)
    model.eval()
    expected = perplexity(model, tokenizer)
    model.train()
    random.seed(7)
    np.random.seed(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    level = logging.getLogger("lm_eval").level
    harness = Harness.of(recipe(house, "unused", tasks))
    scores = harness.measure(model, tokenizer, batch_size=3, on_outcomes=lambda _: None)
    assert scores["follow_perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert model.training
    assert "tie_weights" not in vars(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn[1:]
    assert logging.getLogger("lm_eval").level == level
    assert harness.measure(model, tokenizer, batch_size=3, on_outcomes=lambda _: None) == scores  # the same draws


# Refused before anything is trained ----------------------------------------------------------------------------------


@needs_harness
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chose", r"no task 'chose'; did you mean 'choose'\?"),
        ("xyzzy", "no task 'xyzzy'; `lm-eval ls tasks` lists"),
        ("gone", r"gone cannot be loaded: FileNotFoundError: .*gone\.jsonl"),
        ("unsafe", "unsafe runs code that the model writes"),
    ],
)
def test_what_cannot_be_asked_is_said_at_the_start(name, message, house, tasks, own_alone, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(recipe(house, tmp_path / "run", tasks, lm_eval_tasks=["choose", name]))
    assert not (tmp_path / "run").exists()


@needs_harness
def test_the_harness_own_tasks_are_known(house, tmp_path):
    with pytest.raises(ValueError, match="no task 'arc_eesy'; did you mean 'arc_easy'"):
        train(recipe(house, tmp_path / "run", lm_eval_tasks=["arc_eesy"]))


@needs_harness
def test_a_grid_is_not_searched_by_rows_that_it_is_reported_on(house, tasks, own_alone, tmp_path):
    grid = {"methods": {"LoRA": {"peft_type": "LORA"}}, "seed": [0], "test_fraction": 0.3}
    mapping = vars(recipe(house, tmp_path / "out", tasks)) | {"adapter": {"r": 2, "target_modules": "all-linear"}}
    searched = grid | {"learning_rate": [1e-3, 1e-2]}
    with pytest.raises(ValueError, match="choose_acc is of the same rows in validation as in testing"):
        Grid.from_mapping(mapping | {"grid": searched | {"metric": "choose_acc"}})
    assert not Grid.from_mapping(mapping | {"grid": searched}).metric.higher_is_better
    assert Grid.from_mapping(mapping | {"grid": grid | {"metric": "choose_acc"}}).metric.higher_is_better
    with pytest.raises(ValueError, match="metric 'follow_perplexity' is not measured"):  # no number a row
        Grid.from_mapping(mapping | {"grid": grid | {"metric": "follow_perplexity"}})


def test_a_folder_that_is_not_there_is_refused(house, tmp_path, monkeypatch):
    monkeypatch.setattr("beyondlora.train.check_extras", lambda recipe: None)
    with pytest.raises(FileNotFoundError, match="lm_eval_include_path='gone' is no folder"):
        train(recipe(house, tmp_path / "run", lm_eval_tasks=["choose"], lm_eval_include_path="gone"))


def test_several_processes_are_refused(house, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="measured by one process, and here are several"):
        Harness.of(recipe(house, "unused", lm_eval_tasks=["choose"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sequence-classification"}, "for task: causal-lm, .* the task is sequence-classification"),
        ({"eval_fraction": 0}, "lm_eval_tasks: measured beside the evaluation rows"),
        ({"lm_eval_tasks": "choose"}, r"lm_eval_tasks='choose' is str; expected a list"),
    ],
)
def test_a_recipe_says_what_it_cannot_ask(changes, message, house):
    with pytest.raises(ValueError, match=message):
        recipe(house, "unused", **{"lm_eval_tasks": ["choose"]} | changes)


def test_the_folder_of_tasks_may_name_a_variable(house, tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_TASKS", "/somewhere")
    recipe(house, "unused", lm_eval_tasks=["choose"]).save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(tmp_path / "recipe.yaml", ["lm_eval_include_path=${OUR_TASKS}/tasks"])
    assert (loaded.lm_eval_tasks, loaded.lm_eval_include_path) == (["choose"], "/somewhere/tasks")
    with pytest.raises(ValueError, match="did you mean 'lm_eval_tasks'"):
        Recipe.load(tmp_path / "recipe.yaml", ["lm_eval_task=[choose]"])


@pytest.mark.parametrize("entry", ["train", "evaluate", "compare", "a metric of compare"])
def test_a_missing_harness_is_named_before_the_first_step(entry, house, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    made = recipe(house, tmp_path / "out", lm_eval_tasks=["choose"])
    if entry == "evaluate":
        train(recipe(house, tmp_path / "run"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name))
    grid = {"methods": {"LoRA": {"peft_type": "LORA"}}, "test_fraction": 0.5}
    calls = {
        "train": lambda: train(made),
        "evaluate": lambda: evaluate(Path(tmp_path / "run"), recipe=made),
        "compare": lambda: compare(Grid.from_mapping(vars(made) | {"grid": grid})),
        "a metric of compare": lambda: Grid.from_mapping(vars(made) | {"grid": grid | {"metric": "choose_acc"}}),
    }
    with pytest.raises(ValueError, match=r"lm_eval_tasks needs lm_eval, .*pip install 'beyondlora\[lm_eval\]'"):
        calls[entry]()
    assert not (tmp_path / "out").exists()
