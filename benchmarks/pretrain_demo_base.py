"""Train the base model that beyondlora ships, from the text that every CPython carries.

    python benchmarks/pretrain_demo_base.py --out src/beyondlora/demo/base --overwrite

`beyondlora demo` has to work without a model hub and without data, so the package brings its own base: a Llama of fewer
than three million parameters and its own byte-level BPE tokenizer. Both learn from two sources, and from nothing else:

* the language reference behind `help("topics")` (`pydoc_data.topics`);
* the docstrings of the standard library, read from its source with `ast`, never by importing a module.

Function bodies are left out on purpose: Python source is what the demo adapts to, and must be news to the base.

A document is one topic, or all docstrings of one module. A hash of its name puts it into one of three parts: train,
validation (watched while training, and decides which weights are kept), heldout (measured once, at the end).
The output folder is ready for `AutoModelForCausalLM.from_pretrained`, and carries its own model card and metrics.json.
In the making it is called OUT.partial. Ctrl-C ends the training early, and evaluates the best weights so far.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import lzma
import math
import os
import platform
import random
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

# Before torch is imported: on a busy machine, threads that spin while they wait make every operation ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
import typer
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

Part = Literal["train", "validation", "heldout"]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
DUPLICATE_CHARACTERS = 80  # shorter paragraphs ("Arguments:") are language, longer ones that come again are copies
CONTEXT = 256
VALIDATE_EVERY = 250  # steps
VOCABULARY = 2560
PROMPTS = ("Return a list of", "The for statement is used to", "Raise ValueError if")

# Words with the mark before them, digits one by one, runs of marks, line ends apart from the spaces after them.
WORDS = r" ?\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"

console = Console()


# ------------------------------------------------------------------------------------------------------------ the text


@dataclass(frozen=True)
class Document:
    """A topic, or one module's docstrings in the order of the source."""

    name: str
    texts: tuple[str, ...]


def part_of(name: str) -> Part:
    """5 % of the names are heldout and 3 % validation, by SHA-256: the same on every machine and CPython."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "heldout" if bucket < 5 else "validation" if bucket < 8 else "train"


def read_topics() -> Iterator[Document]:
    """The texts behind `help("topics")`, a document each."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name=f"topic {name}", texts=(text.strip(),))


def read_docstrings(*, library: Path | None = None) -> Iterator[Document]:
    """Docstrings of every module under `library`, by default the standard library; nothing is imported."""
    library = library or Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and (texts := docstrings_in(path.read_bytes())):
            yield Document(name=".".join(relative.with_suffix("").parts), texts=texts)


def docstrings_in(source: bytes) -> tuple[str, ...]:
    """The docstrings of a module, its classes and its functions, dedented, in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted(
        (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)),
        key=lambda node: getattr(node, "lineno", 0),
    )
    texts = (inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip() for node in nodes)
    return tuple(text for text in texts if text)


def read_corpus() -> dict[Part, list[Document]]:
    """All documents by part, copies removed: no long paragraph comes twice, so none of heldout stands in train."""
    parts: dict[Part, list[Document]] = {"train": [], "validation": [], "heldout": []}
    for document in (*read_topics(), *read_docstrings()):
        parts[part_of(document.name)].append(document)
    seen: set[str] = set()
    return {part: list(without_copies(documents, seen=seen)) for part, documents in parts.items()}


def without_copies(documents: list[Document], *, seen: set[str]) -> Iterator[Document]:
    """The documents less the long paragraphs in `seen`, which grows meanwhile (topics quote each other at length)."""

    def is_new(paragraph: str) -> bool:
        words = " ".join(paragraph.split())
        known = words in seen
        seen.add(words)
        return not known or len(words) < DUPLICATE_CHARACTERS

    for document in documents:
        texts = ("\n\n".join(filter(is_new, text.split("\n\n"))) for text in document.texts)
        if kept := tuple(text for text in texts if text.strip()):
            yield Document(name=document.name, texts=kept)


def size_in_bytes(documents: list[Document]) -> int:
    """Bytes of UTF-8, separators not counted."""
    return sum(len(text.encode()) for document in documents for text in document.texts)


# ------------------------------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(documents: list[Document], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte string has a spelling, so nothing is unknown and decoding gives the source back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Docstrings are dedented and would teach shallow indentation only; the ladder makes every depth of code one token.
    ladder = ["\n".join(" " * (4 * depth) + "x" for depth in range(1, 7))] * 1000
    texts = [text for document in documents for text in document.texts]
    tokenizer.train_from_iterator([*ladder, *texts], trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """One list of ids a document: <bos> text <eos> for each of its texts, end to end."""
    eos = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return [*tokenizer(text, verbose=False).input_ids, eos]

    return [[token for text in document.texts for token in ids(text)] for document in documents]


# ----------------------------------------------------------------------------------------------------------- the model


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A randomly initialised Llama for this tokenizer: wide rather than deep, as that is quicker on a CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, *, probability: float) -> None:
    """Dropout after the embedding and each residual branch: Llama has none, and this little text is read many times."""

    def drop(module: torch.nn.Module, _: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output_BTD, p=probability, training=module.training)

    branches = [branch for layer in model.model.layers for branch in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (model.model.embed_tokens, *branches):
        module.register_forward_hook(drop)


# ----------------------------------------------------------------------------------------------------------- training
# Shapes: B sequences, T tokens, D hidden, V vocabulary.


@dataclass(frozen=True)
class Settings:
    """What decides the weights, besides the text."""

    steps: int
    seed: int
    stop_after: int | None = None  # end here, although the learning rate falls as for `steps`
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    dropout: float = 0.1
    bf16: bool = True


def batches(sequences: list[list[int]], *, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless (B, T + 1) batches. Every epoch strings the documents together in a new order and cuts them anew."""
    order = random.Random(seed)
    while True:
        stream = [token for sequence in order.sample(sequences, k=len(sequences)) for token in sequence]
        first = order.randrange(CONTEXT)
        blocks = [stream[start : start + CONTEXT + 1] for start in range(first, len(stream) - CONTEXT, CONTEXT)]
        order.shuffle(blocks)
        for start in range(0, len(blocks) - batch_size + 1, batch_size):
            yield torch.tensor(blocks[start : start + batch_size])


def next_token_losses(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods in nats, (B, T - 1), 0 where the target is <pad>."""
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
    targets_BT = ids_BT[:, 1:]
    # Flat, because the CPU kernel is a hundred times slower on a class dimension that is not the last.
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=model.config.pad_token_id, reduction="none"
    )
    return losses.view(targets_BT.shape)


def new_optimizer(model: LlamaForCausalLM, *, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, *, steps: int) -> float:
    """Linear warm-up over the first 4 %, then a cosine down to 1 % of the peak."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class Progress:
    """Where the training stands; `best_step` made the weights that are kept."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    train_losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self.started


def train(
    model: LlamaForCausalLM, sequences: dict[Part, list[list[int]]], *, settings: Settings, checkpoint: Path
) -> Progress:
    """Train in place; `checkpoint` holds, at any time, the weights with the lowest validation loss so far."""
    add_dropout(model, probability=settings.dropout)
    optimizer = new_optimizer(model, settings=settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps=settings.steps)
    )
    progress = Progress()
    last_step = min(settings.steps, settings.stop_after or settings.steps)
    source = batches(sequences["train"], batch_size=settings.batch_size, seed=settings.seed)
    try:
        for progress.step, batch in enumerate(itertools.islice(source, last_step), start=1):
            progress.train_losses.append(training_step(model, batch, optimizer, bf16=settings.bf16))
            schedule.step()
            if progress.step % VALIDATE_EVERY == 0 or progress.step == last_step:
                validate(model, sequences["validation"], progress, settings=settings, checkpoint=checkpoint)
    except KeyboardInterrupt:
        if not progress.best_step:
            raise
        console.print(f"stopped in step {progress.step}; keeping the weights of step {progress.best_step}")
    return progress


def validate(
    model: LlamaForCausalLM, sequences: list[list[int]], progress: Progress, *, settings: Settings, checkpoint: Path
) -> None:
    """Measure the validation loss, save the weights if it is the lowest yet, and print one line."""
    loss = sum(loss for loss, _ in document_losses(model, sequences)) / count_targets(sequences)
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        save_weights(model, checkpoint)
    train_loss = statistics.fmean(progress.train_losses[-VALIDATE_EVERY:])
    speed = progress.step * settings.batch_size * CONTEXT / progress.seconds
    to_go = progress.seconds / progress.step * (settings.steps - progress.step)
    console.print(
        f"step {progress.step:>5}/{settings.steps}  train {train_loss:.4f}  validation {loss:.4f} nats/token"
        f"  {speed:,.0f} tokens/s  {progress.seconds / 60:.1f} min, {to_go / 60:.1f} to go",
        highlight=False,
        soft_wrap=True,
    )


def training_step(
    model: LlamaForCausalLM, ids_BT: torch.Tensor, optimizer: torch.optim.Optimizer, *, bf16: bool
) -> float:
    """One update on one batch; returns its mean loss in nats a token."""
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = next_token_losses(model, ids_BT).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save_weights(model: LlamaForCausalLM, path: Path) -> None:
    """float16 safetensors; the output layer is the embedding (tied), so it is not stored twice."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Score:
    """How well a model predicts some documents; the standard errors take the document as the unit of sampling."""

    documents: int
    tokens: int
    bytes: int
    loss: float  # nats a token
    loss_standard_error: float
    perplexity: float
    perplexity_standard_error: float
    bits_per_byte: float  # comparable across tokenizers
    bits_per_byte_standard_error: float


def windows(sequence: list[int]) -> list[list[int]]:
    """Cut a document so that every token but the first is predicted exactly once, from at most CONTEXT earlier ones."""
    return [sequence[start : start + CONTEXT + 1] for start in range(0, len(sequence) - 1, CONTEXT)]


def count_targets(sequences: list[list[int]]) -> int:
    """How many tokens `windows` has predicted."""
    return sum(len(sequence) - 1 for sequence in sequences)


@torch.no_grad()
def document_losses(
    model: LlamaForCausalLM, sequences: list[list[int]], *, batch_size: int = 16
) -> list[tuple[float, int]]:
    """For each document: the sum of its losses in nats, and the number of tokens predicted."""
    model.eval()
    pieces = [(index, window) for index, sequence in enumerate(sequences) for window in windows(sequence)]
    totals = [0.0] * len(sequences)
    for start in range(0, len(pieces), batch_size):
        batch = pieces[start : start + batch_size]
        longest = max(len(window) for _, window in batch)
        pad = model.config.pad_token_id
        ids_BT = torch.tensor([window + [pad] * (longest - len(window)) for _, window in batch])
        for (index, _), loss in zip(batch, next_token_losses(model, ids_BT).sum(dim=1).tolist(), strict=True):
            totals[index] += loss
    return [(total, len(sequence) - 1) for total, sequence in zip(totals, sequences, strict=True)]


def ratio_error(numerators: list[float], denominators: list[int]) -> tuple[float, float]:
    """sum(numerators) / sum(denominators), and the standard error of that ratio if the pairs are independent draws."""
    ratio, count = sum(numerators) / sum(denominators), len(numerators)
    residuals = sum((n - ratio * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(residuals * count / max(1, count - 1)) / sum(denominators)


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> Score:
    """Score the model in float32 on documents it has not been trained on."""
    losses, tokens = zip(*document_losses(model, tokenize(documents, tokenizer)), strict=True)
    sizes = [size_in_bytes([document]) for document in documents]
    loss, loss_error = ratio_error(list(losses), list(tokens))
    bits, bits_error = ratio_error([loss / math.log(2) for loss in losses], sizes)
    return Score(
        documents=len(documents),
        tokens=sum(tokens),
        bytes=sum(sizes),
        loss=loss,
        loss_standard_error=loss_error,
        perplexity=math.exp(loss),
        perplexity_standard_error=math.exp(loss) * loss_error,
        bits_per_byte=bits,
        bits_per_byte_standard_error=bits_error,
    )


def lzma_bits_per_byte(known: list[Document], new: list[Document]) -> float:
    """What a compressor that has read `known` needs for `new`: a yardstick that shares nothing with the model."""

    def compressed(documents: list[Document]) -> int:
        text = "\n\n".join(text for document in documents for text in document.texts)
        return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed([*known, *new]) - compressed(known)) / size_in_bytes(new)


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int = 40) -> str:
    """The prompt and its most likely continuation, token by token."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------- the folder

CARD = """\
---
license: other
license_name: PSF-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo base of beyondlora

A Llama of {parameters:,} parameters, trained from scratch on the text that every CPython carries, so that `beyondlora demo`
needs neither a model hub nor data. It writes the English of Python's documentation, and has never seen a function's body:
Python source is left for the adapters. It is a test bed, not a useful language model.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, hidden {hidden}, MLP {mlp}, {heads} heads, context {context}, tied embeddings |
| tokenizer | byte-level BPE of its own, {vocabulary:,} tokens, lossless on any UTF-8 text; `<bos>` is added, `<eos>` is not |
| stored as | float16 safetensors, {weights_bytes:,} bytes, loads as float32; the whole folder is below 6 MiB |
| SHA-256 of model.safetensors | `{weights_sha256}` |

## What it has read

`pydoc_data.topics` and the docstrings of the standard library of CPython {python}, read with `ast` from the source (tests,
site-packages and function bodies left out; long paragraphs that occur twice kept once): {train_documents} documents,
{train_bytes:,} bytes, {train_tokens:,} tokens. A document is one topic or one module's docstrings; by a hash of its name 5 % are held out
and 3 % serve as validation. Doctest sessions and code samples inside the documentation are part of the text.

**Licence.** Python's documentation and docstrings are under the PSF License Version 2, © 2001 onwards Python Software Foundation,
all rights reserved. These weights and this tokenizer are made from that text, and are given under the same licence.

## How it was trained

    {command}

CPython {python}, torch {torch}, transformers {transformers}, seed {seed}; {steps_done:,} steps of {steps:,} planned, each of {batch_size} × {context} tokens
({tokens_seen:,} tokens, {epochs:.1f} epochs); AdamW, learning rate {learning_rate} (warm-up, cosine), weight decay {weight_decay}, dropout {dropout},
{precision}; {minutes:.0f} minutes on {threads} CPU threads ({tokens_per_second:,.0f} tokens/s, validation included). The weights of step {best_step:,} are kept,
whose validation loss is lowest. The same seed on the same machine and versions repeats the run; elsewhere, rounding will differ.
{remark}

## How good it is

| | documents | tokens | bytes | perplexity a token | bits a byte |
|---|---|---|---|---|---|
| held out | {heldout[documents]} | {heldout[tokens]:,} | {heldout[bytes]:,} | {heldout[perplexity]:.2f} ± {heldout[perplexity_standard_error]:.2f} | {heldout[bits_per_byte]:.3f} ± {heldout[bits_per_byte_standard_error]:.3f} |
| validation (chose the weights to keep) | {validation[documents]} | {validation[tokens]:,} | {validation[bytes]:,} | {validation[perplexity]:.2f} ± {validation[perplexity_standard_error]:.2f} | {validation[bits_per_byte]:.3f} ± {validation[bits_per_byte_standard_error]:.3f} |
| held out, LZMA that has read the training text | | | | | {lzma_bits_per_byte:.3f} |

± is one standard error, the document being the unit. Measured on the stored float16 weights, computed in float32; every figure with all
its digits is in `metrics.json`. Greedy samples:

{quoted_samples}
"""  # noqa: E501


def model_card(metrics: dict[str, Any]) -> str:
    """README.md, from metrics.json and nothing else, so that the two cannot disagree."""
    samples = ("\n".join(f"    {line}".rstrip() for line in sample.splitlines()) for sample in metrics["samples"])
    return CARD.format(
        **metrics,
        quoted_samples="\n\n---\n\n".join(samples),
        precision="bfloat16 autocast" if metrics["bf16"] else "float32",
        minutes=metrics["wall_seconds"] / 60,
    )


def save_blueprint(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Everything but the weights: config.json, generation_config.json, tokenizer.json, tokenizer_config.json."""
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    GenerationConfig(**tokens, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def publish(partial: Path, out: Path) -> None:
    """Move the finished files under their final names; files of others in `out` stay."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.replace(out / path.name)
    partial.rmdir()


def pretrain(partial: Path, *, settings: Settings) -> None:
    """Text, tokenizer, model, training, evaluation: fills `partial` with a complete model folder."""
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus["train"])
    sequences: dict[Part, list[list[int]]] = {part: tokenize(corpus[part], tokenizer) for part in corpus}
    torch.manual_seed(settings.seed)
    model = new_model(tokenizer)
    save_blueprint(partial, model, tokenizer)
    text_tokens = sum(map(len, sequences["train"]))
    console.print(f"{model.num_parameters():,} parameters, {text_tokens:,} tokens of text", highlight=False)
    progress = train(model, sequences, settings=settings, checkpoint=partial / "model.safetensors")
    metrics = {
        **asdict(settings),
        **describe_training(progress, settings=settings, text_tokens=text_tokens),
        "remark": "",
    }
    conclude(partial, corpus, tokenizer, metrics=metrics)


def conclude(
    partial: Path, corpus: dict[Part, list[Document]], tokenizer: PreTrainedTokenizerBase, *, metrics: dict[str, Any]
) -> None:
    """Evaluate the model as it is stored; write metrics.json and the model card."""
    model = LlamaForCausalLM.from_pretrained(partial, dtype=torch.float32)
    metrics = {
        "heldout": asdict(evaluate(model, tokenizer, corpus["heldout"])),
        "validation": asdict(evaluate(model, tokenizer, corpus["validation"])),
        "lzma_bits_per_byte": lzma_bits_per_byte(corpus["train"], corpus["heldout"]),
        **describe_model(model, partial / "model.safetensors"),
        "train_documents": len(corpus["train"]),
        "train_bytes": size_in_bytes(corpus["train"]),
        **metrics,
        **describe_run(),
        "samples": [greedy(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(metrics), encoding="utf-8")


def describe_training(progress: Progress, *, settings: Settings, text_tokens: int) -> dict[str, Any]:
    """How much was read, how often and how fast."""
    tokens_seen = progress.step * settings.batch_size * CONTEXT
    return {
        "steps_done": progress.step,
        "best_step": progress.best_step,
        "train_tokens": text_tokens,
        "tokens_seen": tokens_seen,
        "epochs": tokens_seen / text_tokens,
        "wall_seconds": progress.seconds,
        "tokens_per_second": tokens_seen / progress.seconds,
    }


def describe_model(model: LlamaForCausalLM, weights: Path) -> dict[str, Any]:
    """Size and shape of the model, and its file's fingerprint."""
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "mlp": model.config.intermediate_size,
        "heads": model.config.num_attention_heads,
        "vocabulary": model.config.vocab_size,
        "context": CONTEXT,
        "weights_bytes": weights.stat().st_size,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def describe_run() -> dict[str, Any]:
    """The command, and what it ran on."""
    return {
        "command": shlex.join(["python", "benchmarks/pretrain_demo_base.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in an existing folder.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; 3 make a smoke test.")] = 2800,
    stop_after: Annotated[int | None, typer.Option(min=1, help="End early, on the schedule of --steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of 256 tokens a step.")] = Settings.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Settings.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices.")] = Settings.weight_decay,
    dropout: Annotated[float, typer.Option(help="After the embedding and each residual branch.")] = Settings.dropout,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; faster on CPUs with AMX.")] = Settings.bf16,
    seed: Annotated[int, typer.Option(help="Decides initial weights, order of the text and dropout.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 2,
) -> None:
    """Train the demo's base model from scratch on CPython's documentation topics and docstrings."""
    if out.exists() and not overwrite:
        raise typer.BadParameter(
            f"{out} exists already. Give --overwrite to replace the model in it, or name another folder."
        )
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    settings = Settings(
        steps=steps,
        seed=seed,
        stop_after=stop_after,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
        bf16=bf16,
    )
    pretrain(partial, settings=settings)
    publish(partial, out)
    console.print(f"wrote {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
