"""Conversations: what of them is scored, beside transformers' own mask; templates of other ways; what is refused."""

import json
import random
from pathlib import Path

import pytest
import small_runs
from shared_data import MINILM, STORIES, needs_minilm, needs_shared

from beyondlora import data, models
from beyondlora.compare.held_out import check_apart, cut_off
from beyondlora.data import read_splits
from beyondlora.data.conversations import Writer
from beyondlora.data.tokens import NOT_SCORED, ids_of, tokenize_stretches
from beyondlora.evaluate import evaluate, load_processor
from beyondlora.recipe import Recipe
from beyondlora.train import train

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}{% generation %}{{ m.content }}<eos>
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = """{% for m in messages %}[{{ m.role }}]
{%- set kept = m.content if loop.last else m.content.split("</think>")[-1] %}{{ kept }}
{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"""
ALTERNATING = """{% for m in messages %}{% if (m.role == "user") != (loop.index0 % 2 == 0) %}\
{{ raise_exception("roles must alternate") }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"""

PUBLISHED = ["cohere2", "gemma3", "lfm2", "llama3", "phi3", "qwen3_instruct_2507"]  # of trl's

TALKS = [
    [
        {"role": "system", "content": "You tell short stories."},
        {"role": "user", "content": "Tell me of a cat."},
        {"role": "assistant", "content": "Once there was a cat. It sat."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": " It ran away!"},
    ],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, Tim."}],
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = [[{"from": NAMES[m["role"]], "value": m["content"]} for m in talk] for talk in TALKS]


@pytest.fixture
def made(tmp_path):
    """Write talks and a template; return the recipe that reads them."""

    def make(talks, template=CHATML, **changes):
        (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        (tmp_path / "template.jinja").write_text(template)
        return Recipe(
            **{
                "task": "causal-lm",
                "model_name_or_path": "demo",
                "adapter": small_runs.ADAPTERS["stella"],
                "output_dir": str(tmp_path / "run"),
                "dataset_name": str(tmp_path / "talks.jsonl"),
                "messages_field": "messages",
                "chat_template_path": str(tmp_path / "template.jinja"),
                "eval_fraction": 0.0,
                "max_length": 250,
            }
            | changes
        )

    return make


def prepared(recipe):
    return data.prepare(data.read_splits(recipe), load_processor(recipe), recipe)


def said(tokenizer, row):
    """The text that is scored, and the whole."""
    return (
        tokenizer.decode([label for label in row["labels"] if label != NOT_SCORED]),
        tokenizer.decode(row["input_ids"]),
    )


@pytest.mark.parametrize("talks", [TALKS, SHAREGPT], ids=["role and content", "from and value"])
def test_what_the_assistant_says_is_scored_and_nothing_else(made, talks):
    recipe = made(talks)
    tokenizer, splits = load_processor(recipe), prepared(recipe)
    for row, talk in zip(splits.train, TALKS, strict=True):
        theirs = tokenizer.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
        )
        assert row["input_ids"] == theirs["input_ids"]
        masked = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        assert row["labels"] == [token if mark else NOT_SCORED for token, mark in masked]
    assert "last answer" not in splits.description


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_score_what_trls_forms_of_them_do(name):
    """TRL ships the templates of many models, and forms of them for training that mark what the assistant says."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    if not (folder / f"{name}_training.jinja").exists():
        pytest.skip("this trl has no such templates")
    tokenizer = models.load_processor("demo", task="causal-lm")
    tokenizer.chat_template = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
    marked = tokenizer.apply_chat_template(TALKS[0], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    theirs = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    found, last_alone = Writer(tokenizer).stretches(TALKS[0], "row 1")
    assert not last_alone
    ours = "".join(text for text, scored in found if scored)
    # This tokenizer has not their tokens for an end, so its own follows; Phi-3's template writes that itself.
    assert ours.removesuffix("<eos>") == tokenizer.decode(theirs).removesuffix("<eos>")
    assert ours.endswith("<eos>")


def by_the_whole(tokenizer, row):
    """The definition: a stretch's tokens are what the text up to it has more than the text before it."""
    parts, so_far = [], []
    for at, stretch in enumerate(row):
        whole = ids_of(tokenizer, ["".join(row[: at + 1])])[0]
        parts.append(whole[len(so_far) :] if whole[: len(so_far)] == so_far else ids_of(tokenizer, [stretch])[0])
        so_far = [*so_far, *parts[-1]]
    return parts


@pytest.mark.parametrize(
    "name", ["demo", pytest.param(STORIES, marks=needs_shared), pytest.param(MINILM, marks=needs_minilm)]
)
@pytest.mark.parametrize("ends", ["\n", " ", ""], ids=["lines", "blanks", "inside words"])
def test_stretches_have_the_tokens_of_the_whole_conversation(name, ends):
    draw, tokenizer = random.Random(0), models.load_processor(str(name), task="causal-lm")
    words = ["Once", "upon", "a", "time", "it's", "123", "<s>", "...", "x  y"]
    rows = [[" ".join(draw.choices(words, k=draw.randint(0, 60))) + ends for _ in range(12)] for _ in range(20)]
    assert list(tokenize_stretches(tokenizer, rows)) == [by_the_whole(tokenizer, row) for row in rows]


def test_the_cost_of_a_conversation_grows_with_its_length():
    tokenizer, tokenized = models.load_processor("demo", task="causal-lm"), 0

    def counting(texts, **options):
        nonlocal tokenized
        tokenized += sum(map(len, texts))
        return tokenizer(texts, **options)

    row = [f"question {number}\n" * 5 for number in range(400)]
    list(tokenize_stretches(counting, [row]))
    assert tokenized < 20 * len("".join(row))  # each with what is before it, up to 256 characters; it was 200 times


def long_talk(turns):
    """A conversation in which one turn in three calls a tool first."""
    talk = [{"role": "system", "content": "You count."}]
    for number in range(turns):
        talk.append({"role": "user", "content": f"And after {number}?"})
        if number % 3 == 2:
            call = {"name": "add", "arguments": {"to": number}}
            talk.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
            talk.append({"role": "tool", "content": str(number + 1)})
        talk.append({"role": "assistant", "content": f"Then comes {number + 1}."})
    return talk


NUMBERED = "{% for m in messages %}[{{ loop.index }} {{ m.role }}]{{ m.content }}{% endfor %}"
ENDING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("turns", [17, 31, 32, 50])
@pytest.mark.parametrize("template", [CHATML, THINKING, NUMBERED, ENDING, *PUBLISHED])
def test_a_long_conversation_has_the_stretches_that_its_template_gives_one_by_one(template, turns):
    tokenizer, talk = models.load_processor("demo", task="causal-lm"), long_talk(turns)
    if template in PUBLISHED:
        file = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / f"{template}.jinja"
        if not file.exists():
            pytest.skip("this trl has no such template")
        template = file.read_text(encoding="utf-8")
        talk = [message for message in talk if message["role"] != "tool" and "tool_calls" not in message]
    tokenizer.chat_template = template
    answers = [at for at, message in enumerate(talk) if message["role"] == "assistant"]
    writer = Writer(tokenizer)
    assert writer._counted(talk, answers) == writer._one_by_one(talk, answers)


def test_writing_a_conversation_costs_what_its_length_does(monkeypatch):
    tokenizer, written = models.load_processor("demo", task="causal-lm"), 0
    tokenizer.chat_template = CHATML
    write = tokenizer.apply_chat_template

    def counting(messages, **options):
        nonlocal written
        written += len(messages)
        return write(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    talk = [{"role": role, "content": str(number)} for number in range(200) for role in ("user", "assistant")]
    assert len(Writer(tokenizer).stretches(talk, "row 1")[0]) == 400
    assert written < 80 * len(talk)  # the few near each answer; it was 300 times, and grew


def test_what_nobody_asked_for_and_nobody_answered_is_not_scored(made):
    greeting = [{"role": "assistant", "content": "Welcome."}, *TALKS[1], {"role": "user", "content": "Bye"}]
    recipe = made([greeting])
    scored, whole = said(load_processor(recipe), prepared(recipe).train[0])
    assert scored.strip() == "Hi, Tim.<eos>"
    assert "Welcome" in whole
    assert "Bye" not in whole


def test_of_a_template_that_leaves_thoughts_out_the_last_answer_is_scored(made):
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>easy</think>Two."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>hard</think>Three."},
    ]
    recipe = made([talk, talk[:2]], THINKING)
    splits, tokenizer = prepared(recipe), load_processor(recipe)
    scored, whole = said(tokenizer, splits.train[0])
    assert scored.strip() == "hard</think>Three.\n<eos>"  # the template itself opens the thought
    assert "easy" not in whole
    assert said(tokenizer, splits.train[1])[0].strip() == "easy</think>Two.\n<eos>"
    assert "1 rows with the last answer alone scored" in splits.description


def test_a_long_conversation_is_cut_and_one_without_an_answer_dropped(made):
    recipe = made([TALKS[0], TALKS[1][:1]], max_length=90)
    splits = prepared(recipe)
    assert len(splits.train) == 1
    assert len(splits.train[0]["input_ids"]) == 90
    assert "1 rows cut" in splits.description
    assert "1 rows dropped: no answer in them" in splits.description


def test_conversations_without_any_answer_are_refused_by_what_they_lack(made):
    with pytest.raises(
        ValueError, match=r"training rows: none of the 2 conversations has an answer, .* of the assistant"
    ):
        prepared(made([TALKS[0][:1], TALKS[1][:1]]))


def test_tools_keep_what_the_template_may_want(made):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"name": "weather"}]}
    talk = [TALKS[1][0], call, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "It is sunny."}]
    recipe = made([talk], template)
    scored, whole = said(load_processor(recipe), prepared(recipe).train[0])
    assert whole.strip() == "[user]Hello[assistant]weather[tool]sun[assistant]It is sunny.<eos>"
    assert (
        scored.strip() == "[assistant]weather[assistant]It is sunny.<eos>"
    )  # no generation prompt: it opens the turn itself


def test_test_rows_are_cut_off_conversations_too(made, tmp_path):
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(20)]
    recipe, test = cut_off(made(talks, eval_fraction=0.2), 0.25, tmp_path / "cut")
    assert check_apart(recipe, read_splits(recipe), test) == 0
    assert len(prepared(recipe).train) == 12
    shared = recipe.replace(eval_dataset_name=test)
    with pytest.raises(ValueError, match="5 of the validation rows are test rows too"):
        check_apart(shared, read_splits(shared), test)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_on_conversations_is_measured_again_alike_and_keeps_its_template(made, tmp_path):
    summary = train(made(TALKS * 8, eval_fraction=0.25, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2))
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize(
    ("talks", "complaint"),
    [
        ([["Hello"]], "field 'messages' holds list<.*>, expected lists of messages"),
        (["Hello"], "field 'messages' holds string, expected lists of messages"),
        ([TALKS[1], []], "row 2: field 'messages' holds no messages"),
        ([TALKS[1], None], "row 2: no value in field 'messages'"),
        ([[{"role": "user"}]], "row 1: field 'messages' holds a message of 'user' without content"),
        ([[{"speaker": "Tim", "text": "Hi"}]], "holds a message with speaker, text; it needs role and content"),
        ([[{"from": "narrator", "value": "Hi"}]], "holds a message from 'narrator'; known are human, user, gpt"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(made, talks, complaint):
    with pytest.raises(ValueError, match=complaint):
        data.read_splits(made(talks))


def test_what_a_template_does_not_take_is_refused_with_its_row(made):
    with pytest.raises(
        ValueError, match=r"training rows, row 1: the chat template does not take .*: roles must alternate"
    ):
        prepared(made(TALKS, ALTERNATING))


def test_a_template_that_rewrites_the_question_is_refused(made):
    rewriting = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="writes the question in another way once it is answered"):
        prepared(made(TALKS, rewriting))


def test_a_tokenizer_without_a_template_is_refused(made):
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template.*chat_template_path"):
        prepared(made(TALKS, chat_template_path=None))


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"chat_template_path": "nowhere.jinja"}, FileNotFoundError, "chat_template_path='nowhere.jinja': there is no"),
        ({"messages_field": None}, ValueError, "name their field with messages_field"),
        ({"prompt_field": "a", "completion_field": "b"}, ValueError, "without prompt_field and completion_field"),
        (
            {"metrics": ["exact_match"], "eval_fraction": 0.1},
            ValueError,
            "there is the loss alone.*without messages_field",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(made, changes, error, complaint):
    with pytest.raises(error, match=complaint):
        prepared(made(TALKS, **changes))
