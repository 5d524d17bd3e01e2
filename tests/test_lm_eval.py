"""lm-evaluation-harness on an adapted model, as an object and by its own command: its figures are the model's.

The harness is not part of the development environment: `pip install lm_eval` to run these.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from beyondlora import StellaConfig

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
QUESTIONS = [("the cat", " sat on"), ("a dog", " ran to"), ("one", " mat.")]
TASK = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of three rows, which needs no download."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "answers.yaml").write_text(TASK.format(file=rows), encoding="utf-8")
    return tmp_path / "tasks"


@pytest.fixture
def base(house, tmp_path):
    """The small Llama with as many embeddings as tokens: the harness makes it so beside an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(house / "base")
    model = AutoModelForCausalLM.from_pretrained(house / "base", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base):
    """An adapter that is far from doing nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, StellaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.eval()


@torch.no_grad()
def perplexity(model, tokenizer) -> float:
    """exp of the mean negative log likelihood of an answer, as the harness defines it."""
    logs = []
    for question, answer in QUESTIONS:
        asked = tokenizer(question, add_special_tokens=False).input_ids
        ids = torch.tensor([asked + tokenizer(answer, add_special_tokens=False).input_ids])
        predicted = model(ids).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)
        logs.append(predicted.gather(1, ids[0, len(asked) :, None]).sum().item())
    return math.exp(-sum(logs) / len(logs))


def test_an_adapted_model_as_an_object(tasks, adapted, base):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(base)
    harness = HFLM(pretrained=adapted, tokenizer=tokenizer, device="cpu", batch_size=2)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=harness, tasks=["answers"], task_manager=manager, bootstrap_iters=0)
    measured = found["results"]["answers"]["perplexity,none"]
    assert measured == pytest.approx(perplexity(adapted, tokenizer), rel=1e-4)
    with adapted.disable_adapter():
        assert measured != pytest.approx(perplexity(adapted, tokenizer), rel=0.01)


def test_an_adapter_folder_by_the_harness_own_command(tasks, adapted, base, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    # As in docs/evaluating.md; without the first import PEFT does not know the method.
    command = [sys.executable, "-c", "import beyondlora; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]
    command += ["run", "--model", "hf", "--model_args", f"pretrained={base},peft={tmp_path / 'adapter'},dtype=float32"]
    command += ["--tasks", "answers", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    finished = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    (written,) = (tmp_path / "out").rglob("results*.json")
    measured = json.loads(written.read_text(encoding="utf-8"))["results"]["answers"]["perplexity,none"]
    assert measured == pytest.approx(perplexity(adapted, AutoTokenizer.from_pretrained(base)), rel=1e-4)
