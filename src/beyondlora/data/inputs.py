"""Stage 2: checked rows to model-ready ones: tokens, packing, prompt masking, pixels; batches and fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from .conversations import Stretch, Writer, messages_of
from .fields import DataRecipe, is_packed, text_fields
from .labels import with_labels
from .questions import Question, digest_of, questions_of, told
from .rows import arrow_column
from .splits import RawSplits, read_checked, read_splits, sample
from .tokens import NOT_SCORED, head_of, ids_of, longest, tokenize_stretches

_BATCH = 1000


@dataclass(frozen=True)
class Splits:
    """Model-ready rows to train on and to evaluate on."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    questions: list[Question]  # the evaluation rows, where the recipe asks what the model answers to them
    collator: Callable[[list[Any]], dict[str, Any]]
    label_names: list[str] | None
    description: str  # one line for people
    fingerprint: str  # sha256 over all prepared rows; the same on every machine

    def held_out(self) -> Evaluation | None:
        """The rows to evaluate on, by themselves."""
        if self.evaluation is None:
            return None
        return Evaluation(self.evaluation, self.questions, self.collator, self.description, self.fingerprint)


@dataclass(frozen=True)
class Evaluation:
    """Model-ready rows to evaluate on, and the questions in them."""

    rows: datasets.Dataset
    questions: list[Question]
    collator: Callable[[list[Any]], dict[str, Any]]
    description: str
    fingerprint: str


def prepare(
    raw: RawSplits, processor: Any, recipe: DataRecipe, *, extra_inputs: Mapping[str, bool] | None = None
) -> Splits:
    """Tokenise (or set up the transform of images). Pass `remove_unused_columns=False` to a Trainer.

    Args:
        raw: from `read_splits`.
        processor: from models.load_processor.
        extra_inputs: from models.extra_inputs; put into every batch.
    Raises: ValueError, where no row is left.
    """
    train = _prepare_rows(raw.train, processor, recipe, recipe.max_train_samples, "training rows")
    evaluation = raw.evaluation and _prepare_rows(
        raw.evaluation, processor, recipe, recipe.max_eval_samples, "evaluation rows"
    )
    questions = questions_of(raw.evaluation, processor, recipe, "evaluation rows") if raw.evaluation else []
    parts = [("train", train), *([("evaluation", evaluation)] if evaluation else [])]
    return Splits(
        train=train.rows,
        evaluation=evaluation.rows if evaluation else None,
        questions=questions,
        collator=_collator(recipe, processor, extra_inputs),
        label_names=raw.label_names,
        description="; ".join(f"{name}: {part.description}" for name, part in parts)
        + (told(questions) if evaluation else "; no evaluation"),
        fingerprint=_sha256(*(part.digest for _, part in parts), *digest_of(questions)),
    )


def prepare_evaluation(
    recipe: DataRecipe,
    processor: Any,
    name: str | None = None,
    *,
    label_names: Sequence[str] | None = None,
    extra_inputs: Mapping[str, bool] | None = None,
) -> Evaluation:
    """Rows to evaluate on.

    Args:
        name: a file, folder or hub name; None = the recipe's own evaluation rows.
        label_names: the classes the model knows; None = those of the recipe's training rows, which are then read.
    Raises: FileNotFoundError, ValueError.
    """
    if name is None:
        rows = read_splits(recipe).evaluation
        if rows is None:
            raise ValueError("the recipe holds out no evaluation rows (eval_fraction: 0); name a file: --data FILE")
    else:
        if label_names is None and recipe.task.endswith("-classification"):
            label_names = read_splits(recipe).label_names
        rows = read_checked(recipe, name, recipe.dataset_test_split or "test")
        rows = with_labels(rows, recipe, label_names, name)
        rows = rows if is_packed(recipe) else sample(rows, recipe.max_eval_samples, recipe.split_seed)
    where = name or "evaluation rows"
    part = _prepare_rows(rows, processor, recipe, recipe.max_eval_samples, where)
    questions = questions_of(rows, processor, recipe, where)
    return Evaluation(
        rows=part.rows,
        questions=questions,
        collator=_collator(recipe, processor, extra_inputs),
        description=part.description + told(questions),
        fingerprint=_sha256(part.digest, *digest_of(questions)),
    )


@dataclass(frozen=True)
class _Part:
    rows: datasets.Dataset
    description: str
    digest: bytes


@dataclass
class _Lists:
    """A column of lists of whole numbers, 4 bytes each while it grows."""

    values: array[int] = field(default_factory=lambda: array("i"))
    ends: array[int] = field(default_factory=lambda: array("q", [0]))

    def append(self, numbers: Iterable[int]) -> None:
        self.values.extend(numbers)
        self.ends.append(len(self.values))

    def to_arrow(self) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(self.ends, pa.int64()), pa.array(self.values, pa.int32()))


def _prepare_rows(
    rows: datasets.Dataset, processor: Any, recipe: DataRecipe, max_samples: int | None, where: str
) -> _Part:
    if recipe.task == "image-classification":
        return _prepare_images(rows, processor, recipe)
    length = longest(recipe, processor)
    if recipe.task != "causal-lm":
        return _prepare_sequences(rows, processor, recipe, length)
    if is_packed(recipe):
        return _prepare_text(rows, processor, recipe, length, max_samples, where)
    if recipe.messages_field is not None:
        return _prepare_conversations(rows, processor, recipe.messages_field, length, where)
    return _prepare_pairs(rows, processor, recipe, length, where)


def _batches(rows: datasets.Dataset) -> Iterator[dict[str, list[Any]]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _prepare_text(
    rows: datasets.Dataset, tokenizer: Any, recipe: DataRecipe, length: int, max_blocks: int | None, where: str
) -> _Part:
    head = head_of(tokenizer)
    context = max(len(head), 1)
    if length <= context:
        raise ValueError(f"max_length={length} leaves no room behind the {context} tokens that a block begins with")
    stream = _token_stream(
        rows, tokenizer, recipe.dataset_text_field, None if max_blocks is None else 1 + max_blocks * length
    )
    ids, labels = _Lists(), _Lists()
    # Without a head the first block begins with the first token, which nothing predicts.
    for start in range(0 if head else 1, len(stream), length - context):
        if max_blocks is not None and len(ids.ends) > max_blocks:
            break
        scored = stream[start : start + length - context]
        ids.append([*(head or stream[start - 1 : start]), *scored])
        labels.append([*[NOT_SCORED] * context, *scored])
    return _causal_part(ids, labels, "blocks", where, "")


def _token_stream(rows: datasets.Dataset, tokenizer: Any, name: str, enough: int | None) -> array[int]:
    stream: array[int] = array("i")
    end = [] if len(rows) == 1 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(rows):
        for row in ids_of(tokenizer, [text for text in batch[name] if text.strip()]):
            stream.extend([*row, *end])
        if enough is not None and len(stream) >= enough:
            break
    return stream


def _prepare_pairs(rows: datasets.Dataset, tokenizer: Any, recipe: DataRecipe, length: int, where: str) -> _Part:
    head, end = head_of(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt_field, completion_field = text_fields(recipe)
    written = (
        [(prompt + recipe.completion_separator, False), (completion, True)]
        for batch in _batches(rows)
        for prompt, completion in zip(batch[prompt_field], batch[completion_field], strict=True)
    )
    part = _prepare_stretches(written, tokenizer, length, where, head=head, end=end)
    empty = pc.sum(pc.equal(arrow_column(rows, completion_field), "")).as_py() if end else 0
    told = f", {empty:,} rows with an empty completion: all that they teach is to end" if empty else ""
    return dataclasses.replace(part, description=part.description + told)


def _prepare_conversations(rows: datasets.Dataset, tokenizer: Any, name: str, length: int, where: str) -> _Part:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"messages_field={name!r}: the tokenizer has no chat template, which would write conversations as text; "
            "name a file that holds one with chat_template_path, or take the instruction-tuned model"
        )
    writer, last_alone, silent = Writer(tokenizer), 0, 0

    def written() -> Iterator[list[Stretch]]:
        nonlocal last_alone, silent
        for number, row in enumerate(arrow_column(rows, name), start=1):
            found, last = writer.stretches(messages_of(row.as_py()), f"{where}, row {number}")
            last_alone += last
            if found:
                yield found
            else:
                silent += 1
        if silent and silent == len(rows):
            raise ValueError(
                f"{where}: none of the {silent:,} conversations has an answer, which is what the loss counts: a "
                "message of the assistant that is not the first"
            )

    part = _prepare_stretches(written(), tokenizer, length, where)
    told = f", {silent:,} rows dropped: no answer in them" if silent else ""
    told += f", {last_alone:,} rows with the last answer alone scored, as their template asks" if last_alone else ""
    return dataclasses.replace(part, description=part.description + told)


def _prepare_stretches(
    written: Iterable[list[Stretch]],
    tokenizer: Any,
    length: int,
    where: str,
    *,
    head: Sequence[int] = (),
    end: Sequence[int] = (),
) -> _Part:
    """Rows of which some stretches are scored; `head` and `end` are put around each."""
    ids, labels = _Lists(), _Lists()
    cut = dropped = 0
    rows = iter(written)
    while batch := list(itertools.islice(rows, _BATCH)):
        texts = [[text for text, _ in row] for row in batch]
        for row, parts in zip(batch, tokenize_stretches(tokenizer, texts), strict=True):
            tokens, marks = [*head], [NOT_SCORED] * len(head)
            for part, (_, scored) in zip(parts, row, strict=True):
                tokens += part
                marks += part if scored else [NOT_SCORED] * len(part)
            tokens += end
            marks += end
            marks[:1] = [NOT_SCORED] * len(marks[:1])  # nothing predicts a first token
            if all(mark == NOT_SCORED for mark in marks[:length]):
                dropped += 1
                continue
            cut += len(tokens) > length
            ids.append(tokens[:length])
            labels.append(marks[:length])
    note = f", {cut:,} rows cut at {length} tokens" if cut else ""
    note += f", {dropped:,} rows dropped: no token to predict within {length} tokens" if dropped else ""
    return _causal_part(ids, labels, "rows", where, note)


def _causal_part(ids: _Lists, labels: _Lists, unit: str, where: str, note: str) -> _Part:
    rows = len(ids.ends) - 1
    if rows == 0:
        raise ValueError(
            f"{where}: no row with a token to predict is left{note}; give a larger max_length or longer texts"
        )
    mask = pa.LargeListArray.from_arrays(pa.array(ids.ends, pa.int64()), pa.array(np.ones(len(ids.values), np.int8)))
    table = pa.table({"input_ids": ids.to_arrow(), "attention_mask": mask, "labels": labels.to_arrow()})
    scored = len(labels.values) - labels.values.count(NOT_SCORED)
    return _Part(
        datasets.Dataset(table), f"{rows:,} {unit}, {len(ids.values):,} tokens, {scored:,} scored{note}", _digest(table)
    )


def _prepare_sequences(rows: datasets.Dataset, tokenizer: Any, recipe: DataRecipe, length: int) -> _Part:
    columns: dict[str, _Lists] = {}
    cut = 0
    for batch in _batches(rows):
        texts = [batch[name] for name in text_fields(recipe)]
        found = tokenizer(*texts, verbose=False)
        if longer := sum(len(row) > length for row in found["input_ids"]):
            found = tokenizer(*texts, truncation=True, max_length=length)
        cut += longer
        for name, lists in found.items():
            column = columns.setdefault(name, _Lists())
            for numbers in lists:
                column.append(numbers)
    table = pa.table(
        {
            **{name: column.to_arrow() for name, column in columns.items()},
            "labels": rows.with_format("arrow")[:]["labels"],
        }
    )
    note = f", {cut:,} cut at {length} tokens" if cut else ""
    return _Part(
        datasets.Dataset(table),
        f"{len(rows):,} rows, {len(columns['input_ids'].values):,} tokens{note}",
        _digest(table),
    )


def _prepare_images(rows: datasets.Dataset, processor: Any, recipe: DataRecipe) -> _Part:
    size = ", ".join(f"{key} {value}" for key, value in dict(processor.size).items() if value is not None)
    digest = hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    for image, label in zip(arrow_column(rows, recipe.image_field), arrow_column(rows, "labels"), strict=True):
        content = image.as_py()
        raw = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
        digest.update(hashlib.sha256(raw).digest() + label.as_py().to_bytes(8, "little"))
    transformed = rows.with_transform(_ImageTransform(processor, recipe.image_field))
    return _Part(transformed, f"{len(rows):,} images ({size} pixels)", digest.digest())


@dataclass(frozen=True)
class _ImageTransform:
    processor: Any
    image_field: str

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = self.processor(batch[self.image_field], return_tensors="pt")
        return {"pixel_values": list(pixels["pixel_values"]), "labels": batch["labels"]}


def _collator(
    recipe: DataRecipe, processor: Any, extra: Mapping[str, bool] | None
) -> Callable[[list[Any]], dict[str, Any]]:
    if recipe.task == "image-classification":
        return _ImageCollator(dict(extra or {}))
    if recipe.task == "causal-lm":
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=NOT_SCORED)
    return DataCollatorWithPadding(processor)


@dataclass(frozen=True)
class _ImageCollator:
    extra: dict[str, bool]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows]), **self.extra}


def _digest(table: pa.Table) -> bytes:
    """sha256 over names, values and lengths; not over Arrow's own bytes, which depend on chunks."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        digest.update(name.encode())
        if pa.types.is_large_list(column.type):
            digest.update(np.diff(column.offsets.to_numpy()).astype("<i8").tobytes())
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        digest.update(values.astype("<f4" if values.dtype.kind == "f" else "<i8").tobytes())
    return digest.digest()


def _sha256(*digests: bytes) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()
