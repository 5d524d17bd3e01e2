"""What a recipe asks beside the loss: the same in train, evaluate and compare, and right by another way of looking."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import small_models
import small_runs
import torch
from shared_data import SHARED, needs_shared
from transformers import AutoModelForCausalLM

from beyondlora import data, models
from beyondlora.attach import load_trained
from beyondlora.compare import compare
from beyondlora.compare.grid import Grid
from beyondlora.compare.runs import read_results
from beyondlora.data.questions import OPTIONS
from beyondlora.evaluate import evaluate, load_base
from beyondlora.figures.choices import first_named, most_likely
from beyondlora.figures.examination import _judged
from beyondlora.figures.generation import write
from beyondlora.recipe import Recipe
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ASKED = ["multiple_choice", "multiple_choice_generated", "exact_match", "pass@2"]


@pytest.fixture(scope="module")
def place(house, tmp_path_factory):
    """The house of small_runs, and a folder with questions and a second corpus."""
    folder = tmp_path_factory.mktemp("asked")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(60):
        names = draw.permutation(["cat", "dog", "mat", "sat", "ran"])[: 2 + number % 2].tolist()
        right = names[int(draw.integers(len(names)))]
        prompt = f"who ran to the mat in the year {1000 + number}?\n\nanswer format: {'/'.join(names)}"
        rows.append({"instruction": prompt, "output": f"the correct answer is {right}", "answer": right})
    write_rows(folder / "questions.jsonl", rows)
    (folder / "second.txt").write_text("zyx 9876543210, one mat.\n" * 40)
    return house, folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(place, output, **changes):
    house, folder = place
    return small_runs.recipe(
        house,
        **{
            "output_dir": str(output),
            "dataset_name": str(folder / "questions.jsonl"),
            "prompt_field": "instruction",
            "completion_field": "output",
            "completion_separator": "\n",
            "answer_field": "answer",
            "eval_fraction": 0.4,
            "max_length": 120,
            "max_new_tokens": 12,
            "metrics": ASKED,
            "num_return_sequences": 2,
            "temperature": 1.0,
            "forgetting_dataset_name": str(folder / "second.txt"),
            "per_device_eval_batch_size": 5,
            "max_steps": 6,
            "eval_steps": 3,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run that was asked everything: (its recipe, its summary)."""
    made = recipe(place, tmp_path_factory.mktemp("runs") / "run")
    return made, train(made)


@pytest.fixture(scope="module")
def examined(run):
    """The run's model, tokenizer and questions."""
    made, _ = run
    tokenizer = models.load_processor(made.model_name_or_path, task=made.task)
    base = load_base(made, tokenizer, None)
    evaluation = data.prepare_evaluation(made, tokenizer)
    return load_trained(run_folder(made) / "adapter", base), tokenizer, evaluation


def run_folder(made):
    return Path(made.output_dir)


def kept(made, name="generations.jsonl"):
    return [json.loads(line) for line in (run_folder(made) / name).read_text().splitlines()]


# The same everywhere -------------------------------------------------------------------------------------------------


def test_train_and_evaluate_agree_on_every_figure_and_keep_what_was_written(run):
    made, summary = run
    figures = {*ASKED, "exact_match_strict", "forgetting", "forgetting_before", "forgetting_after"}
    assert set(summary["metrics"]) == {"loss", "perplexity", "tokens"} | figures
    assert evaluate(run_folder(made))["metrics"] == summary["metrics"]
    records = kept(made)
    assert len(records) == 24
    assert all(len(record["generations"]) == 2 for record in records)
    for name in (*ASKED, "exact_match_strict"):
        told = [record[name] for record in records]
        assert summary["metrics"][name]["value"] == pytest.approx(np.mean(told))
        assert summary["metrics"][name]["n"] == 24
        assert summary["metrics"][name]["stderr"] == pytest.approx(np.std(told, ddof=1) / 24**0.5)


def test_compare_chooses_and_reports_by_what_was_asked(place, tmp_path):
    made = recipe(place, tmp_path / "out", metrics=["multiple_choice"], num_return_sequences=1, temperature=0)
    settings = {
        "methods": {"LoRA": {"peft_type": "LORA"}, "all": {"peft_type": "FULL"}},
        "learning_rate": [1e-2],
        "seed": [0],
        "test_fraction": 0.5,
    }
    shared = {"r": 2, "target_modules": "all-linear"}
    mapping = vars(made) | {"adapter": shared}
    outcome = compare(Grid.from_mapping(mapping | {"grid": settings | {"metric": "multiple_choice"}}), jobs=2)
    assert [arm.name for arm in outcome.arms if arm.chosen] == [arm.name for arm in outcome.arms]
    for arm in outcome.arms:
        for line, figure in zip(arm.lines, arm.figures, strict=True):
            assert figure == pytest.approx(line["test"]["multiple_choice"]["value"])
            assert figure == pytest.approx(np.mean(line["items"]["multiple_choice"]))
            told = kept(Recipe.from_mapping(line["recipe"]), "generations-test.jsonl")
            assert [record["multiple_choice"] for record in told] == line["items"]["multiple_choice"]
    assert outcome.rows == 30
    assert outcome.metric.higher_is_better
    (whole,) = (arm for arm in outcome.arms if arm.name == "all")
    assert whole.lines[0]["trainable_parameters"] == whole.lines[0]["total_parameters"]
    # The same lines, judged by another figure; nothing is run again.
    begun = len(read_results(tmp_path / "out"))
    again = compare(Grid.from_mapping(mapping | {"grid": settings | {"metric": "forgetting", "confidence": 0.85}}))
    assert len(read_results(tmp_path / "out")) == begun
    for arm in again.arms:
        assert arm.figures == pytest.approx([line["test"]["forgetting"]["value"] for line in arm.lines])


# Multiple choice -----------------------------------------------------------------------------------------------------


def test_the_most_likely_option_is_that_of_the_models_own_loss(examined):
    _, tokenizer, evaluation = examined
    model = small_models.llama()
    with torch.no_grad():  # far from a uniform guess, so that its choices differ from row to row
        model.lm_head.weight.mul_(40)
    expected = []
    for question in evaluation.questions:
        losses = []
        names = question.prompt.rpartition("answer format: ")[2].split("/")
        prompt = tokenizer(question.prompt + "\n", add_special_tokens=False)["input_ids"]
        for name in names:
            said = tokenizer(f"the correct answer is {name}", add_special_tokens=False)["input_ids"] + [2]
            ids, labels = torch.tensor([prompt + said]), torch.tensor([[-100] * len(prompt) + said])
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=labels).loss.item() * len(said))
        expected.append(names[int(np.argmin(losses))])
    assert most_likely(model, evaluation.questions, evaluation.collator, batch_size=4) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("the correct answer is answer2, not answer1", "answer2"),
        ("answer12 or answer3", "answer3"),
        ("Answer1", None),  # as LLM-Adapters reads it
        ("none of them", None),
        ("", None),
        ("myanswer1 (answer1)", "answer1"),
    ],
)
def test_the_first_option_named(text, named):
    assert first_named(text, ["answer1", "answer2", "answer3"]) == named


def test_options_stand_by_themselves_where_the_completion_does_not_say_one(place, tmp_path):
    unsaid = {"output": "who can know", "answer": "dog"}
    rows = [unsaid | {"instruction": f"{number}? answer format: cat/dog"} for number in range(9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    made = recipe(place, tmp_path, dataset_name=str(tmp_path / "rows.jsonl"))
    tokenizer = models.load_processor(made.model_name_or_path, task=made.task)
    question = data.prepare_evaluation(made, tokenizer).questions[0]
    for option, name in zip(question.options, ("cat", "dog"), strict=True):
        scored = [label for label in option.row["labels"] if label != -100]
        assert tokenizer.decode(scored) == " ".join(name) + " </s>"


def test_a_generated_choice_is_right_where_it_names_the_right_option_first(examined):
    _, _, evaluation = examined
    question = evaluation.questions[0]
    wrong = next(option.text for option in question.options if option.text != question.answer)
    written = [f"it is {question.answer}, not {wrong}", f"it is {wrong}, not {question.answer}", "nothing", wrong]
    assert _judged(question, written, ["multiple_choice_generated"]) == {"multiple_choice_generated": 0.25}


def test_options_are_literal_and_the_longer_one_wins():
    assert first_named("it is c++", ["c", "c++"]) == "c++"
    assert first_named("it is a.b", ["axb", "a.b"]) == "a.b"


def test_looking_for_options_takes_no_time():
    started = time.perf_counter()
    assert OPTIONS.search("Answer format: " + "a/" * 27 + "b or c") is None
    assert time.perf_counter() - started < 5  # it doubled with every option: half a minute here, hours with 35


@needs_shared
@pytest.mark.parametrize(
    "task", ["boolq", "piqa", "social_i_qa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa", "hellaswag"]
)
def test_every_prompt_of_the_commonsense_tasks_names_its_answer(task):
    rows = json.loads((SHARED / "data/commonsense" / task / "test.json").read_text())
    for row in rows:
        options = OPTIONS.search(row["instruction"])[1].split("/")
        assert row["answer"] in options
        assert len(options) == len(set(options)) >= 2
        assert row["output"].endswith(row["answer"])
        assert first_named(row["output"], options) == row["answer"]


# Generation ----------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_plain_loop_whatever_the_batch(examined):
    _, tokenizer, evaluation = examined
    model = small_models.llama()
    with torch.no_grad():  # what it writes hangs on every token before
        model.lm_head.weight.mul_(40)
    questions = evaluation.questions[:7]
    expected = []
    for question in questions:
        ids = list(question.input_ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append([tokenizer.decode(ids[len(question.input_ids) :], skip_special_tokens=True)])
    for size in (1, 3, 7):
        assert write(model, questions, tokenizer, max_new_tokens=12, batch_size=size) == expected
    assert any(text for (text,) in expected)


OWN = {
    **{"top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.2, "temperature": 9.0},
    **{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 7, "suppress_tokens": [*range(4, 40)]},
    **{"forced_eos_token_id": 2, "max_time": 1e-4, "max_length": 4, "stop_strings": ["a"]},
    **{"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", OWN)
def test_the_models_own_generation_config_has_no_say(name, examined):
    model, tokenizer, evaluation = examined
    questions = evaluation.questions[:3]
    sampled = {"num_return_sequences": 3, "temperature": 0.7}
    plain = [write(model, questions, tokenizer, max_new_tokens=8, **how) for how in ({}, sampled)]
    config = model.base_model.model.generation_config
    before = getattr(config, name)
    setattr(config, name, OWN[name])
    try:
        again = [write(model, questions, tokenizer, max_new_tokens=8, **how) for how in ({}, sampled)]
    finally:
        setattr(config, name, before)
    assert again == plain
    assert any(len(set(texts)) > 1 for texts in plain[1])


def test_drawing_answers_disturbs_neither_mode_nor_generators(examined):
    model, tokenizer, evaluation = examined
    before = torch.get_rng_state()
    how = {"max_new_tokens": 12, "num_return_sequences": 4, "temperature": 1.0}
    calm = write(model, evaluation.questions[:6], tokenizer, **how)
    model.train()
    assert write(model, evaluation.questions[:6], tokenizer, **how) == calm  # no dropout
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_that_is_too_long_loses_its_start(place, tmp_path):
    made = recipe(place, tmp_path, max_length=70, metrics=["exact_match"], num_return_sequences=1, temperature=0)
    tokenizer = models.load_processor(made.model_name_or_path, task=made.task)
    evaluation = data.prepare_evaluation(made, tokenizer)
    assert "24 prompts lose their start" in evaluation.description
    assert "lose" not in data.prepare_evaluation(recipe(place, tmp_path), tokenizer).description
    for question in evaluation.questions:
        whole = tokenizer(question.prompt + "\n", add_special_tokens=False)["input_ids"]
        assert question.input_ids == whole[-58:] != whole


# Forgetting ----------------------------------------------------------------------------------------------------------


def test_forgetting_is_the_loss_of_the_second_corpus_after_less_before(run, place):
    made, summary = run
    _, folder = place
    text = {"prompt_field": None, "completion_field": None, "metrics": None, "forgetting_dataset_name": None}
    plain = made.replace(**text, num_return_sequences=1, temperature=0)
    after = evaluate(run_folder(made) / "adapter", data=str(folder / "second.txt"), recipe=plain)["metrics"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(made.model_name_or_path)
    blocks = data.prepare_evaluation(
        plain, models.load_processor(made.model_name_or_path, task=made.task), str(folder / "second.txt")
    ).rows
    sums = tokens = 0
    for block in blocks:
        ids, labels = (torch.tensor([block[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            sums += base(input_ids=ids, labels=labels).loss.item() * (labels[0, 1:] != -100).sum().item()
        tokens += (labels[0, 1:] != -100).sum().item()
    scores = summary["metrics"]
    assert scores["forgetting_before"]["value"] == pytest.approx(sums / tokens, rel=1e-5)
    assert scores["forgetting_after"] == after
    assert scores["forgetting"]["value"] == pytest.approx(after["value"] - sums / tokens, abs=1e-5)
    assert scores["forgetting"]["value"] != 0
    assert scores["forgetting"]["n"] == len(blocks)


# Refused before anything is trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["exact_mach"]}, "did you mean 'exact_match'"),
        ({"metrics": ["pass@0"]}, "'pass@0' is unknown"),
        ({"metrics": ["pass@3"]}, "num_return_sequences is 2"),
        ({"temperature": 0}, "would all be the same; give a temperature"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt_field": None, "completion_field": None}, "with a prompt_field and a completion_field"),
        ({"eval_fraction": 0}, "metrics and forgetting_dataset_name: measured beside the evaluation rows"),
        ({"max_new_tokens": 120}, "leaves nothing of max_length=120"),
        ({"answer_field": "right"}, "has no field 'right'"),
        ({"answer_field": "instruction"}, "row 1: the answer 'who ran"),
        ({"forgetting_dataset_name": "./gone.txt"}, "gone.txt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked_is_said_at_the_start(changes, message, place, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe(place, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_prompts_without_options_are_refused_by_their_row(place, tmp_path):
    rows = [{"instruction": "who?", "output": "the correct answer is true", "answer": "true"}] * 20
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 1: the prompt names no options"):
        train(recipe(place, tmp_path / "run", dataset_name=str(tmp_path / "rows.jsonl")))


def test_forgetting_is_for_language_models(place, tmp_path):
    with pytest.raises(ValueError, match="the task is sequence-classification"):
        small_runs.recipe(place[0], task="sequence-classification", forgetting_dataset_name="x.txt")


@pytest.mark.parametrize("entry", ["train", "evaluate", "compare"])
def test_a_missing_package_is_named_before_the_first_step(entry, place, run, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else found(name))
    made = recipe(place, tmp_path / "out")
    grid = {"methods": {"LoRA": {"peft_type": "LORA"}}, "test_fraction": 0.5}
    calls = {
        "train": lambda: train(made),
        "evaluate": lambda: evaluate(run_folder(run[0])),
        "compare": lambda: compare(Grid.from_mapping(vars(made) | {"grid": grid})),
    }
    with pytest.raises(ValueError, match=r"needs math_verify, .*beyondlora\[math\]"):
        calls[entry]()
    assert not (tmp_path / "out").exists()
