"""The base model that the package ships: it loads, it is small, and it is as good as its card says."""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[1]
BASE = REPOSITORY / "src" / "beyondlora" / "demo" / "base"
SCRIPT = REPOSITORY / "benchmarks" / "pretrain_demo_base.py"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((BASE / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_demo_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_it_is_small(model):
    assert model.num_parameters() <= 3_000_000
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 6 * 2**20


def test_it_loads_in_float32_with_tied_embeddings(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True).dtype == torch.float32  # config's word


def test_the_special_tokens_are_the_models(model, tokenizer):
    names = tokenizer.convert_ids_to_tokens(
        [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id]
    )
    assert names == ["<pad>", "<bos>", "<eos>"] == [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token]
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("text", [Path(argparse.__file__).read_bytes(), "\tif x:\r\n  é ∂ 🐍\x00   \n\n\n ".encode()])
def test_the_tokenizer_gives_every_byte_back(tokenizer, text):
    ids = tokenizer(text.decode(), verbose=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).encode() == text


def test_indentation_of_any_usual_depth_is_one_token(tokenizer):
    for depth in range(1, 7):
        ids = tokenizer("\n" + " " * (4 * depth) + "return", add_special_tokens=False).input_ids
        assert len(ids) == 3, f"depth {depth}: {tokenizer.convert_ids_to_tokens(ids)}"  # line end, spaces, " return"


def test_greedy_generation_repeats(model, tokenizer):
    inputs = tokenizer("Return a list of", return_tensors="pt")
    first, second = (model.generate(**inputs, max_new_tokens=20, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[1] > inputs.input_ids.shape[1]


def test_the_weights_are_those_the_card_was_written_for(metrics):
    digest = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert digest == metrics["weights_sha256"]
    assert digest in (BASE / "README.md").read_text(encoding="utf-8")


def test_the_card_is_written_from_the_metrics(script, metrics):
    assert (BASE / "README.md").read_text(encoding="utf-8") == script.model_card(metrics)


def test_heldout_perplexity_is_the_recorded_one(script, model, tokenizer, metrics):
    """Transformers' own loss, one window at a time, against the script's figure.

    Another CPython has other docstrings, hence the standard error; 3 of it, since the documents are largely the same.
    """
    losses, tokens = 0.0, 0
    with torch.no_grad():
        for ids in script.tokenize(script.read_corpus()["heldout"], tokenizer):
            for start in range(0, len(ids) - 1, script.CONTEXT):
                window = torch.tensor([ids[start : start + script.CONTEXT + 1]])
                targets = window.shape[1] - 1
                losses += model(input_ids=window, labels=window).loss.item() * targets
                tokens += targets
    same_text = tokens == metrics["heldout"]["tokens"]
    tolerance = 1e-3 if same_text else 3 * metrics["heldout"]["loss_standard_error"]
    assert losses / tokens == pytest.approx(metrics["heldout"]["loss"], abs=tolerance)


def test_it_has_learnt_english_documentation(metrics):
    """A tenth fewer bits than LZMA needs that has read the same text: looking up known strings does not get there."""
    assert metrics["heldout"]["bits_per_byte"] < 0.9 * metrics["lzma_bits_per_byte"]


def test_no_heldout_paragraph_was_trained_on(script):
    corpus = script.read_corpus()

    def long_paragraphs(part: str) -> set[str]:
        paragraphs = (p for d in corpus[part] for text in d.texts for p in text.split("\n\n"))
        return {words for p in paragraphs if len(words := " ".join(p.split())) >= 80}

    assert len(long_paragraphs("heldout")) > 100
    assert long_paragraphs("heldout").isdisjoint(long_paragraphs("train") | long_paragraphs("validation"))


def test_function_bodies_are_left_out(script):
    source = (
        b'"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n'
        b'    def f(self):\n        """Method."""\n        return "body"\n'
    )
    assert script.docstrings_in(source) == ("Module.", "Class.\n\nMore.", "Method.")


def test_the_standard_error_is_that_of_the_ratio(script):
    """With equal sizes the ratio is a mean, whose standard error everybody knows."""
    values = [1.0, 2.0, 4.0, 9.0]
    ratio, error = script.ratio_error([10 * v for v in values], [10] * 4)
    assert ratio == pytest.approx(4.0)
    assert error == pytest.approx(torch.tensor(values).std().item() / 2, rel=1e-6)


@pytest.mark.slow
def test_the_script_makes_a_model_that_loads(tmp_path):
    out = tmp_path / "base"
    done = run_script("--out", str(out), "--steps", "3", "--batch-size", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {path.name for path in BASE.iterdir() if path.is_file()}
    assert not out.with_name("base.partial").exists()
    AutoModelForCausalLM.from_pretrained(out, local_files_only=True)


def test_the_script_refuses_to_overwrite(tmp_path):
    done = run_script("--out", str(tmp_path))
    assert done.returncode == 2
    assert "--overwrite" in done.stderr


def test_the_script_explains_itself():
    done = run_script("--help")
    assert done.returncode == 0
    assert "--steps" in done.stdout
