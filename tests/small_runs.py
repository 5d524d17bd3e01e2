"""Runs small enough for a test: a random Llama, a tokenizer of letters, a page of text, recipes of a second."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import small_models
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from beyondlora.recipe import Recipe

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # the ids that small_models.llama expects
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?;:'-\n0123456789"

ADAPTERS = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "cera": {"peft_type": "CERA", "r": 4, "lora_dropout": 0.2, "target_modules": "all-linear"},
    "aurora": {"peft_type": "AURORA", "r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "stella": {"peft_type": "STELLA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
}


def base(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Save the small Llama, or another model of 64 tokens, and its tokenizer."""
    (model or small_models.llama()).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def text(path: Path, words: int = 600) -> Path:
    """Write lines of nonsense with a structure that a model can learn."""
    draw = random.Random(0)
    lines = [" ".join(draw.choice(["the cat", "a dog", "sat on", "ran to", "one mat."]) for _ in range(6))]
    while sum(len(line.split()) for line in lines) < words:
        lines.append(" ".join(draw.choice(["the cat", "a dog", "sat on", "ran to", "one mat."]) for _ in range(6)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sentences(path: Path, rows: int = 48, labels=("good", "bad")) -> Path:
    """Write labelled sentences as JSON lines."""
    draw = random.Random(0)
    records = []
    for number in range(rows):
        label = labels[number % len(labels)]
        words = [label[0] * 3, *(draw.choice(["cat", "dog", "mat"]) for _ in range(draw.randint(2, 5)))]
        records.append({"sentence1": " ".join(words), "label": label, "score": round(draw.random() * 5, 2)})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def recipe(folder: Path, **changes) -> Recipe:
    """12 optimizer steps on the page of text, with an evaluation and a checkpoint every few."""
    return Recipe(
        **{
            "task": "causal-lm",
            "model_name_or_path": str(folder / "base"),
            "adapter": ADAPTERS["lora"],
            "output_dir": str(folder / "run"),
            "dataset_name": str(folder / "text.txt"),
            "max_length": 24,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 12,
            "logging_steps": 3,
            "eval_steps": 4,
            "save_steps": 3,
        }
        | changes
    )


def house(folder: Path) -> Path:
    """A folder with everything a recipe of `recipe` names."""
    base(folder / "base")
    text(folder / "text.txt")
    sentences(folder / "sentences.jsonl")
    return folder


def weights(folder: Path) -> dict:
    """The tensors of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors")


def rows(run: Path) -> list[dict]:
    """The events of a run without what differs between any two."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def signal_at(moment: int, folder: str, number: int) -> Callable[[], int]:
    """Send this process a signal at its `moment`-th file operation inside a folder; return what counts them."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and folder in str(arguments[0]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    return lambda: count


def train_and_die(recipe: Recipe, moment: int, resume: bool) -> None:
    """Train in this process until the `moment`-th file operation inside the run folder; there, SIGKILL."""
    from beyondlora.train import train

    count = signal_at(moment, recipe.output_dir, signal.SIGKILL)
    train(recipe, resume=resume)
    Path(recipe.output_dir, "operations").write_text(str(count()))


def command_and_interrupt(arguments: list[str], folder: str, moment: int) -> None:
    """Run the command line in this process, Ctrl-C at a moment as above; what it says goes to FOLDER.stderr."""
    from beyondlora.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["beyondlora", *arguments]
    with Path(folder + ".stderr").open("w") as sys.stderr, Path(folder + ".stdout").open("w") as sys.stdout:
        signal_at(moment, folder + os.sep, signal.SIGINT)
        main()


def nothing_half_written(run: Path) -> None:
    """Every file of a run that has its final name can be read to its end."""
    for path in run.rglob("*"):
        if ".partial" in str(path) or ".old" in str(path) or "/partial/" in str(path) or path.is_dir():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "recipe.yaml":
            Recipe.load(path)
        elif path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
        elif path.suffix == ".png":
            assert path.read_bytes()[-8:-4] == b"IEND"
