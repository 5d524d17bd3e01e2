import csv
import gzip
import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_models
import small_runs
import torch
from shared_data import MINILM, SHARED, STORIES, VIT, needs_minilm, needs_shared

from beyondlora import data, models
from beyondlora.data import inputs
from beyondlora.recipe import Recipe

GLUE = SHARED / "data" / "glue"
SHAKESPEARE = SHARED / "data" / "text" / "tinyshakespeare" / "input.txt"
GSM8K = SHARED / "data" / "gsm8k"
IMAGES = SHARED / "data" / "images"


def recipe(task="causal-lm", **fields):
    known = {"model_name_or_path": "x", "adapter": {"peft_type": "LORA"}, "output_dir": "x"}
    return Recipe(task=task, **{name: str(f) if isinstance(f, Path) else f for name, f in {**known, **fields}.items()})


def classification(**fields):
    return recipe("sequence-classification", sentence1_field="sentence", **fields)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, bytes):
            is_text = isinstance(content, str)
            content = (content if is_text else "".join(json.dumps(row) + "\n" for row in content)).encode()
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="module")
def stories():
    return models.load_processor(str(STORIES), task="causal-lm")


@pytest.fixture(scope="module")
def minilm():
    return models.load_processor(MINILM, task="sequence-classification")


def scored(row):
    return [label for label in row["labels"] if label != data.NOT_SCORED]


# Reading ------------------------------------------------------------------------------------------------------------

ROWS = [{"a": 'x "quoted", y', "b": 1}, {"a": "zwei\u2028Zeilen ü", "b": 2}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("rows.jsonl", "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n"),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", "\ufeff" + json.dumps({"data": ROWS}, indent=1)),
        ("rows.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode(), mtime=0)),
        ("rows.csv", 'a,b\n"x ""quoted"", y",1\nzwei\u2028Zeilen ü,2\n'),
        ("rows.tsv", 'a\tb\r\nx "quoted", y\t1\r\nzwei\u2028Zeilen ü\t2\r\n'),
    ],
)
def test_every_format_gives_the_same_rows(write, name, content):
    rows = data.read_rows(str(write(name, content)), fields=["a", "b"])
    assert rows["a"][:] == [row["a"] for row in ROWS]
    assert [int(number) for number in rows["b"]] == [1, 2]


def test_parquet_gives_the_rows_and_their_class_names(tmp_path):
    features = datasets.Features({"s": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"s": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(tmp_path / "x.parquet")
    rows = data.read_rows(str(tmp_path / "x.parquet"))
    assert rows[:] == {"s": ["a", "b"], "label": [1, 0]}
    assert rows.features["label"].names == ["no", "yes"]


def test_parquet_columns_that_nobody_asked_for_may_hold_anything(tmp_path):
    maps = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))  # `datasets` has no type for them
    pq.write_table(pa.table({"s": ["a", "b"], "maps": maps}), tmp_path / "x.parquet")
    assert data.read_rows(str(tmp_path / "x.parquet"), fields=["s"])[:] == {"s": ["a", "b"]}
    with pytest.raises(ValueError, match="has no field 't'; its fields are s, maps"):
        data.read_rows(str(tmp_path / "x.parquet"), fields=["t"])


def test_a_text_file_is_one_text(write):
    assert data.read_rows(str(write("a.txt", "one\n\ntwo\r\n")))["text"][:] == ["one\n\ntwo\r\n"]


def test_a_file_without_header_gets_its_names_from_the_recipe(write):
    path = str(write("a.tsv", "gj04\t1\t\tFine.\ngj05\t0\t*\tNot fine.\n"))
    rows = data.read_rows(path, columns=["source", "label", "mark", "sentence"], fields=["sentence", "label"])
    assert rows[:] == {"sentence": ["Fine.", "Not fine."], "label": ["1", "0"]}
    with pytest.raises(ValueError, match="line 1: 4 fields, but columns names 2"):
        data.read_rows(path, columns=["label", "sentence"])


def test_a_folder_holds_one_file_or_more_shards_a_split(write, tmp_path):
    for name, value in {"train.jsonl": 1, "test-00.jsonl": 2, "test-01.jsonl": 3, "trained.jsonl": 4}.items():
        write(name, [{"a": value}])
    assert data.read_rows(str(tmp_path), split="train")["a"][:] == [1]
    assert data.read_rows(str(tmp_path), split="test")["a"][:] == [2, 3]
    with pytest.raises(FileNotFoundError, match=r"split 'dev'.*holds test-00\.jsonl, test-01\.jsonl, train\.jsonl"):
        data.read_rows(str(tmp_path), split="dev")
    write("train.csv", "a\n1\n")
    with pytest.raises(ValueError, match="stands there twice"):
        data.read_rows(str(tmp_path), split="train")


def test_only_numbered_files_are_shards(write, tmp_path):
    for name in ("train.jsonl", "train-small.jsonl", "train-backup-2023.jsonl", "train.old.jsonl"):
        write(name, [{"a": name}])
    assert data.read_rows(str(tmp_path))["a"][:] == ["train.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of the split 'train'.*holds train-backup-2023\.jsonl"):
        data.read_rows(str(tmp_path))
    for number in range(2):
        write(f"train-0000{number}-of-00002.jsonl", [{"a": number}])
    assert data.read_rows(str(tmp_path))["a"][:] == [0, 1]
    write("test.jsonl", [{"a": 1}])
    write("test.jsonl.gz", gzip.compress(b'{"a": 1}'))
    with pytest.raises(ValueError, match=r"stands there twice: test\.jsonl, test\.jsonl\.gz"):
        data.read_rows(str(tmp_path), split="test")
    write("train.jsonl", [{"a": 2}])
    with pytest.raises(ValueError, match=r"stands there twice: train-00000-of-00002\.jsonl, .*, train\.jsonl"):
        data.read_rows(str(tmp_path))


def test_a_missing_shard_is_told(write, tmp_path):
    write("train-00000-of-00002-0123456789abcdef.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="not as many as their names say"):
        data.read_rows(str(tmp_path))


def test_shards_whose_types_differ_are_joined_where_they_can_be(write, tmp_path):
    write("train-0.jsonl", [{"text": "a", "label": 1, "talk": [{"role": "user"}], "more": 1}])
    write("train-1.jsonl", [{"text": "b", "label": 1.5, "talk": [{"role": "user", "name": "Tim"}], "more": "x"}])
    rows = data.read_rows(str(tmp_path), fields=["text", "label", "talk"])
    assert rows["label"][:] == [1.0, 1.5]
    assert rows["talk"][:] == [[{"role": "user", "name": None}], [{"role": "user", "name": "Tim"}]]
    with pytest.raises(ValueError, match=r"the fields of train-0\.jsonl, train-1\.jsonl do not go together .*more"):
        data.read_rows(str(tmp_path), fields=["text", "more"])


def test_shards_keep_their_classes_and_may_differ_in_what_is_not_read(tmp_path):
    names = datasets.ClassLabel(names=["bad", "good"])
    for number, (score, more) in enumerate([(1, 2), (1.5, "x")]):
        rows = datasets.Dataset.from_dict({"label": [number], "score": [score], "more": [more]})
        rows.cast_column("label", names).to_parquet(tmp_path / f"train-{number}.parquet")
    rows = data.read_rows(str(tmp_path), fields=["label", "score"])
    assert rows[:] == {"label": [0, 1], "score": [1.0, 1.5]}
    assert rows.features["label"] == names


def test_long_cells_and_blank_lines_of_a_csv_are_read(write):
    allowed = csv.field_size_limit()
    path = write("a.csv", f'\n\na,b\n"{"word " * 40_000}",1\n\nx,2\n')
    assert data.read_rows(str(path))[:] == {"a": ["word " * 40_000, "x"], "b": ["1", "2"]}
    assert csv.field_size_limit() == allowed


def test_what_datasets_saved_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"a": [1, 2]})
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "d")
    assert data.read_rows(str(tmp_path / "d"), split="test")["a"][:] == [2]
    assert data.read_rows(str(tmp_path / "d" / "train"))["a"][:] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.csv", b"a,b\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n\n[2]\n', "line 3: a list; every line must hold one JSON object"),
        ("a.json", b'[{"a": 1},\n {"a": 2', "line 2: not valid JSON.*cut off"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "line 2: not valid JSON.*name the file .jsonl"),
        ("a.json", b'{"rows": [{"a": 1}]}', "expected a list of objects"),
        ("a.json", b'[{"a": 1}, 2]', "row 2: a number; every row must be a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', "row 2: field 'a' holds a text, row 1 a number"),
        ("a.jsonl", b'{"a": null}\n{"a": 1}\n{"a": 2}\n{"a": [3]}\n', "row 4: field 'a' holds a list, row 2 a number"),
        ("a.jsonl", b'{"a": [1]}\n{"a": [2]}\n{"a": ["x"]}\n{"a": [4]}', "row 3: field 'a' holds .* another type"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": 99999999999999999999}\n',
            "row 2: field 'a' holds a whole number of more than 64",
        ),
        ("a.jsonl", b'{"a": "b"}\n{"a": "c\\ud83d"}\n', r"row 2: field 'a' holds '\\ud83d', one half of a character"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "caf\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
        ("a.tsv", b"a\tb\n1\t2\n3\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 3: not valid CSV|line 2: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", "names a column twice"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cut-off gzip"),
        ("a.jsonl.gz", b'{"a": 1}\n', "damaged or cut-off gzip"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.xlsx", b"x", r"unknown extension; choose one of \.csv, \.json"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_where(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_rows(str(path))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing", "/a/b", "a/b/c"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        data.read_rows(name)


def test_a_hub_name_that_cannot_be_had_says_so(monkeypatch, capfd):
    def fail(name, config, split):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"data 'some/data'.*no local file.*split 'train'.*Couldn't reach"):
        data.read_rows("some/data")
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_rows_without_the_named_fields_say_which_there_are(write):
    path = str(
        write("a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}, {"question": None, "answer": "a"}])
    )
    with pytest.raises(ValueError, match="no field 'prompt'; its fields are question, answer"):
        data.read_rows(path, fields=["prompt", "answer"])
    with pytest.raises(ValueError, match=r"row 2: no value in field 'answer' \(1 such rows\)"):
        data.read_rows(path, fields=["answer"])
    with pytest.raises(ValueError, match="row 3: no value in field 'question'"):
        data.read_rows(path, fields=["question"])


def test_a_field_nobody_asked_for_may_be_anything(write):
    path = write("a.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": "x"}])
    assert data.read_rows(str(path), fields=["text"]).column_names == ["text"]


@needs_shared
@pytest.mark.parametrize(
    ("name", "count"),
    [("CoLA/train", 8551), ("RTE/train", 2490), ("SST-2/train", 67349), ("STS-B/train", 5749), ("STS-B/dev", 1500)],
)
def test_glue_is_read_cell_for_cell(name, count):
    path = GLUE / f"{name}.tsv"
    columns = ["source", "label", "mark", "sentence"] if "CoLA" in name else None
    rows = data.read_rows(str(path), columns=columns)
    with path.open(newline="") as file:
        expected = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[0 if columns else 1 :]
    assert len(rows) == count  # data/README.md
    assert [list(cells) for cells in zip(*(rows[name] for name in rows.column_names), strict=True)] == expected


# Splitting ----------------------------------------------------------------------------------------------------------


def texts(count):
    return [{"text": f"row {i}", "label": i % 3} for i in range(count)]


def test_held_out_rows_are_drawn_by_split_seed_and_the_rest_is_for_training(write):
    path = write("a.jsonl", texts(50))
    ours = recipe(dataset_name=path, eval_fraction=0.2)
    raw = data.read_splits(ours)
    train, evaluation = raw.train["text"][:], raw.evaluation["text"][:]
    assert sorted(train + evaluation) == sorted(row["text"] for row in texts(50))
    assert len(evaluation) == 10
    assert data.read_splits(ours.replace(seed=1)).evaluation["text"][:] == evaluation
    assert data.read_splits(ours.replace(split_seed=1)).evaluation["text"][:] != evaluation
    assert data.read_splits(ours.replace(eval_fraction=0.0)).evaluation is None


def test_holding_rows_out_costs_less_than_reading_them(write):
    """`datasets` selects by an array a hundred times as fast as by a list."""
    ours = recipe(dataset_name=write("many.jsonl", texts(60_000)), max_eval_samples=5_000)
    begun = time.process_time()
    data.read_splits(ours.replace(eval_fraction=0.0))
    read = time.process_time() - begun
    data.read_splits(ours)
    assert time.process_time() - begun - read < 2 * read


def test_of_one_text_the_last_lines_are_held_out(write):
    text = "".join(f"line {i}\n" for i in range(100))
    raw = data.read_splits(recipe(dataset_name=write("a.txt", text), eval_fraction=0.25))
    train, evaluation = raw.train["text"][0], raw.evaluation["text"][0]
    assert train + evaluation == text
    assert evaluation.startswith("line ")
    assert 0.23 < len(evaluation) / len(text) <= 0.25
    with pytest.raises(ValueError, match="too short"):
        data.read_splits(recipe(dataset_name=write("b.txt", "a"), eval_fraction=0.25))


def test_one_row_cannot_be_split(write):
    path = write("a.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(ValueError, match="holds one row"):
        data.read_splits(recipe(dataset_name=path, prompt_field="q", completion_field="a"))


def test_evaluation_data_by_file_by_split_or_of_a_second_folder(write, tmp_path):
    for name, count in {"one/train.jsonl": 9, "one/dev.jsonl": 4, "two/test.jsonl": 3}.items():
        write(name, texts(count))
    one, two = tmp_path / "one", tmp_path / "two"

    def sizes(**fields):
        raw = data.read_splits(recipe(**fields))
        return len(raw.train), len(raw.evaluation)

    assert sizes(dataset_name=one / "train.jsonl", eval_dataset_name=one / "dev.jsonl") == (9, 4)
    assert sizes(dataset_name=one, dataset_test_split="dev") == (9, 4)
    assert sizes(dataset_name=one, eval_dataset_name=two) == (9, 3)
    with pytest.raises(ValueError, match="has no splits; name a second file"):
        sizes(dataset_name=one / "train.jsonl", dataset_test_split="dev")


def test_samples_do_not_depend_on_the_training_seed(write):
    path = write("a.jsonl", [{"sentence": str(i), "label": i % 2} for i in range(100)])
    ours = classification(dataset_name=path, max_train_samples=20, max_eval_samples=5)
    raw = data.read_splits(ours)
    assert (len(raw.train), len(raw.evaluation)) == (20, 5)
    drawn = data.read_splits(ours.replace(eval_fraction=0.0)).train["sentence"][:]
    assert len(drawn) == 20
    assert drawn != [str(i) for i in range(20)]
    assert data.read_splits(ours.replace(seed=1)).train["sentence"][:] == raw.train["sentence"][:]
    assert not set(raw.train["sentence"]) & set(raw.evaluation["sentence"])


# Labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["no", "yes", "no"], ["no", "yes"], [0, 1, 0]),
        ([0, 1, 0], ["0", "1"], [0, 1, 0]),
        ([10, 9, -1], ["-1", "9", "10"], [2, 1, 0]),
        (["10", "9", "9"], ["9", "10"], [1, 0, 0]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
    ],
)
def test_classes_are_numbered_in_order(write, labels, names, numbers):
    path = write("a.jsonl", [{"sentence": "s", "label": label} for label in labels])
    raw = data.read_splits(classification(dataset_name=path, eval_fraction=0.0))
    assert raw.label_names == names
    assert raw.train["labels"][:] == numbers


def test_classes_of_the_evaluation_rows_are_found_by_name(tmp_path, write):
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"sentence": ["s", "t"], "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    path = write("b.jsonl", [{"sentence": "s", "label": "a"}])
    raw = data.read_splits(classification(dataset_name=tmp_path / "a.parquet", eval_dataset_name=path))
    assert (raw.label_names, raw.evaluation["labels"][:]) == (["z", "a"], [1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], "row 2: no value in field 'label'"),
        ([0, 0.5, 1], "row 2: label=0.5 is no class.*sequence-regression"),
        (["a", "", "b"], "row 2: label='' is no class"),
        ([1, 1, 1], "'1' in every row"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_their_row(write, labels, message):
    path = write("a.jsonl", [{"sentence": "s", "label": label} for label in labels])
    with pytest.raises(ValueError, match=message):
        data.read_splits(classification(dataset_name=path, eval_fraction=0.0))


def test_a_label_outside_the_named_classes_is_refused(tmp_path):
    label = {"names": ["a", "b"], "_type": "ClassLabel"}
    features = {"sentence": {"dtype": "string", "_type": "Value"}, "label": label}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for label in (-1, 2):
        table = pa.table({"sentence": ["s", "t"], "label": [1, label]})
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=f"row 2: label {label} is out of range 0 to 1"):
            data.read_splits(classification(dataset_name=tmp_path / "a.parquet", eval_fraction=0.0))


def test_a_class_may_be_called_like_no_number(write):
    path = write("a.jsonl", [{"sentence": "s", "label": label} for label in ("--5", "7", "-5")])
    ours = classification(dataset_name=path, eval_fraction=0.0)
    assert data.read_splits(ours).label_names == ["-5", "7", "--5"]


def test_classes_that_training_never_showed_are_listed(write):
    train = write("a.jsonl", [{"sentence": "s", "label": label} for label in "ab"])
    test = write("b.jsonl", [{"sentence": "s", "label": label} for label in "adc"])
    with pytest.raises(ValueError, match=r"b\.jsonl.*c, d \(first in row 3\); known: a, b"):
        data.read_splits(classification(dataset_name=train, eval_dataset_name=test))


@pytest.mark.parametrize(
    ("labels", "row"), [([1, "x"], None), (["1.5", "x"], 2), (["0", "nan"], 2), (["inf", "1"], 1), ([1.0, -1e20], 2)]
)
def test_numbers_to_predict_are_finite(write, labels, row):
    path = write("a.jsonl", [{"sentence": "s", "label": label} for label in labels])
    ours = recipe("sequence-regression", sentence1_field="sentence", dataset_name=path, eval_fraction=0.0)
    with pytest.raises(ValueError, match=f"row {row}: label=.* no finite number" if row else "it needs one type"):
        data.read_splits(ours)


def test_texts_are_text(write):
    path = write("a.jsonl", [{"text": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"field 'text' holds list.*expected text"):
        data.read_splits(recipe(dataset_name=path, eval_fraction=0.0))


# Plain text ---------------------------------------------------------------------------------------------------------


def without_bos(tokenizer):
    """The same tokenizer, putting nothing in front of a text (as GPT-2's)."""
    import copy

    from tokenizers.processors import TemplateProcessing

    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return bare


@needs_shared
@pytest.mark.parametrize("length", [2, 17, 256, 512])
@pytest.mark.parametrize("bos", [True, False])
def test_every_token_of_a_text_is_scored_exactly_once(stories, write, length, bos):
    tokenizer = stories if bos else without_bos(stories)
    text = SHAKESPEARE.read_text()[:5000]
    ours = recipe(dataset_name=write("a.txt", text), eval_fraction=0.0, max_length=length)
    rows = data.prepare(data.read_splits(ours), tokenizer, ours).train
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    heads = [row["input_ids"][0] for row in rows]
    if bos:
        assert [label for row in rows for label in scored(row)] == stream
        assert set(heads) == {tokenizer.bos_token_id}
    else:  # a block begins with the last token of the one before; nothing predicts the very first
        assert [label for row in rows for label in scored(row)] == stream[1:]
        assert heads == stream[: len(stream) - 1 : length - 1]
    for row in rows:
        assert row["labels"] == [data.NOT_SCORED, *row["input_ids"][1:]]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    lengths = [len(row["input_ids"]) for row in rows]
    assert set(lengths[:-1]) <= {length}
    assert 2 <= lengths[-1] <= length


@needs_shared
def test_rows_of_text_are_parted_by_the_end_token(stories, write):
    path = write("a.jsonl", [{"text": "Once upon"}, {"text": "  "}, {"text": "a time"}])
    ours = recipe(dataset_name=path, eval_fraction=0.0)
    rows = data.prepare(data.read_splits(ours), stories, ours).train
    assert stories.decode(rows[0]["input_ids"]) == "<s> Once upon</s> a time</s>"
    assert len(rows) == 1


@needs_shared
def test_samples_of_packed_text_are_blocks(stories, write):
    path = write("a.txt", SHAKESPEARE.read_text()[:20000])
    ours = recipe(dataset_name=path, max_length=64, max_train_samples=7, max_eval_samples=3)
    splits = data.prepare(data.read_splits(ours), stories, ours)
    everything = data.prepare(data.read_splits(limitless := ours.replace(max_train_samples=None)), stories, limitless)
    assert (len(splits.train), len(splits.evaluation)) == (7, 3)
    assert splits.train[:] == everything.train[:7]
    assert splits.description == (
        "train: 7 blocks, 448 tokens, 441 scored; evaluation: 3 blocks, 192 tokens, 189 scored"
    )


@needs_shared
def test_max_length_fits_the_tokenizer(stories, write):
    ours = recipe(dataset_name=write("a.txt", "Once upon a time. " * 1000), eval_fraction=0.0)
    raw = data.read_splits(ours)
    assert len(data.prepare(raw, stories, ours).train[0]["input_ids"]) == 512
    with pytest.raises(ValueError, match="max_length=513 is more than the 512 tokens"):
        data.prepare(raw, stories, ours.replace(max_length=513))


def test_max_length_is_held_against_the_positions_a_model_has_learned(write, tmp_path):
    folder = small_runs.base(tmp_path / "gpt2", small_models.gpt2())
    ours = recipe(model_name_or_path=folder, dataset_name=write("a.txt", "a cat sat. " * 90), eval_fraction=0.0)
    raw, tokenizer = data.read_splits(ours), models.load_processor(str(folder), task="causal-lm")
    assert max(map(len, data.prepare(raw, tokenizer, ours).train["input_ids"])) == 64
    with pytest.raises(ValueError, match=r"max_length=65 is more than the 64 tokens .* give at most 64"):
        data.prepare(raw, tokenizer, ours.replace(max_length=65))


# Prompt and completion ----------------------------------------------------------------------------------------------


def pairs(**fields):
    return recipe(prompt_field="question", completion_field="answer", **fields)


@needs_shared
def test_of_gsm8k_exactly_the_answers_are_scored(stories):
    ours = pairs(dataset_name=GSM8K / "test.jsonl", completion_separator="\n", eval_fraction=0.0)
    rows = data.prepare(data.read_splits(ours), stories, ours).train
    source = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().splitlines()]
    assert len(rows) == len(source) == 1319
    cut = 0
    for row, expected in zip(rows, source, strict=True):
        prompt = stories(expected["question"] + "\n")["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [data.NOT_SCORED] * len(prompt) + row["input_ids"][len(prompt) :]
        whole = stories(expected["question"] + "\n" + expected["answer"])["input_ids"] + [stories.eos_token_id]
        assert row["input_ids"] == whole[:512]
        if len(whole) <= 512:
            assert stories.decode(scored(row)) == expected["answer"] + "</s>"
        cut += len(whole) > 512
    assert f"{cut} rows cut at 512 tokens" in data.prepare(data.read_splits(ours), stories, ours).description


@needs_minilm
def test_a_token_never_straddles_prompt_and_completion(minilm, write):
    # "playing" is one token: with it, the model would be trained on a prompt that it never meets at inference.
    path = write("a.jsonl", [{"question": "we like play", "answer": "ing games"}])
    ours = pairs(dataset_name=path, eval_fraction=0.0)
    row = data.prepare(data.read_splits(ours), minilm, ours).train[0]
    assert minilm.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "we", "like", "play", "ing", "games"]
    assert minilm.convert_ids_to_tokens(scored(row)) == ["ing", "games"]


@needs_shared
def test_empty_completions_are_counted(stories, write):
    rows = [{"question": "Once", "answer": answer} for answer in ("", "upon", "", "")]
    ours = pairs(dataset_name=write("a.jsonl", rows), eval_fraction=0.0)
    splits = data.prepare(data.read_splits(ours), stories, ours)
    assert "4 rows, " in splits.description
    assert "3 rows with an empty completion" in splits.description
    full = pairs(dataset_name=write("b.jsonl", rows[1:2]), eval_fraction=0.0)
    assert "empty" not in data.prepare(data.read_splits(full), stories, full).description


@needs_shared
def test_rows_without_a_scored_token_left_are_dropped_and_counted(stories, write):
    long = "Once upon a time. " * 20
    path = write(
        "a.jsonl",
        [{"question": long, "answer": "b"}, {"question": "Once", "answer": long}, {"question": "Once", "answer": "b"}],
    )
    ours = pairs(dataset_name=path, eval_fraction=0.0, max_length=16)
    splits = data.prepare(data.read_splits(ours), stories, ours)
    assert len(splits.train) == 2
    assert "1 rows cut at 16 tokens, 1 rows dropped: no token to predict within 16 tokens" in splits.description
    assert stories.eos_token_id not in splits.train[0]["input_ids"]  # a cut answer has not ended
    assert splits.train[1]["labels"][-1] == stories.eos_token_id
    path.write_text(json.dumps({"question": long, "answer": "b"}))
    with pytest.raises(ValueError, match="training rows: no row with a token to predict is left, 1 rows dropped"):
        data.prepare(data.read_splits(ours), stories, ours)
    with pytest.raises(ValueError, match=r"a\.jsonl: no row with a token to predict"):
        data.prepare_evaluation(ours, stories, str(path))


@needs_shared
def test_a_padded_batch_has_the_loss_of_its_rows(stories):
    ours = pairs(dataset_name=GSM8K / "test.jsonl", completion_separator="\n", max_train_samples=6, eval_fraction=0.0)
    splits = data.prepare(data.read_splits(ours), stories, ours)
    model = models.load_base(str(STORIES), task="causal-lm").double().eval()
    rows = [splits.train[i] for i in range(6)]
    counts = torch.tensor([len(scored(row)) for row in rows], dtype=torch.float64)
    with torch.no_grad():
        alone = torch.stack([model(**splits.collator([row])).loss for row in rows])
        batch = splits.collator(rows)
        together = model(**batch).loss
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert (batch["labels"] != data.NOT_SCORED).sum() == counts.sum()
    # transformers computes the loss itself in float32
    torch.testing.assert_close(together.double(), (alone * counts).sum() / counts.sum(), rtol=1e-6, atol=0)


# Sequences ----------------------------------------------------------------------------------------------------------


@needs_shared
@needs_minilm
def test_two_sentences_are_tokenised_as_a_pair_and_cut(minilm):
    fields = {"sentence2_field": "sentence2", "max_length": 64, "eval_fraction": 0.0}
    ours = recipe("sequence-classification", dataset_name=GLUE / "RTE" / "dev.tsv", **fields)
    splits = data.prepare(data.read_splits(ours), minilm, ours)
    source = data.read_rows(str(GLUE / "RTE" / "dev.tsv"))
    assert splits.label_names == ["entailment", "not_entailment"]
    assert len(splits.train) == 277
    cut = 0
    for row, expected in zip(splits.train, source, strict=True):
        whole = minilm(expected["sentence1"], expected["sentence2"], truncation=True, max_length=64)
        assert {name: row[name] for name in whole} == dict(whole)
        assert splits.label_names[row["labels"]] == expected["label"]
        cut += len(minilm(expected["sentence1"], expected["sentence2"])["input_ids"]) > 64
    assert f"{cut} cut at 64 tokens" in splits.description


@needs_minilm
def test_sentences_are_tokenised_once_where_none_is_cut(minilm, write, monkeypatch):
    calls, call = [], type(minilm).__call__
    monkeypatch.setattr(type(minilm), "__call__", lambda *args, **named: calls.append(named) or call(*args, **named))
    ours = recipe("sequence-classification", dataset_name=write("a.jsonl", texts(9)), sentence1_field="text")
    ours = ours.replace(eval_fraction=0.0)
    whole = data.prepare(data.read_splits(ours), minilm, ours)
    assert len(calls) == 1
    cut = ours.replace(max_length=3)
    shorter = data.prepare(data.read_splits(cut), minilm, cut)
    assert (len(calls), "9 cut at 3 tokens" in shorter.description) == (3, True)
    assert [row["input_ids"][:2] for row in shorter.train] == [row["input_ids"][:2] for row in whole.train]


@needs_shared
@needs_minilm
def test_scores_stay_numbers_in_the_batch(minilm):
    path = GLUE / "STS-B" / "dev.tsv"
    fields = {"sentence2_field": "sentence2", "label_field": "score", "eval_fraction": 0.0}
    ours = recipe("sequence-regression", dataset_name=path, **fields)
    splits = data.prepare(data.read_splits(ours), minilm, ours)
    batch = splits.collator([splits.train[i] for i in range(3)])
    expected = [float(line.split("\t")[-1]) for line in path.read_text().splitlines()[1:4]]
    torch.testing.assert_close(batch["labels"], torch.tensor(expected))
    assert batch["input_ids"].shape == batch["attention_mask"].shape


# Images -------------------------------------------------------------------------------------------------------------


def images(**fields):
    return recipe("image-classification", image_size=96, **fields)


@pytest.fixture(scope="module")
def vit(reads_images):
    return models.load_processor(str(VIT), task="image-classification", image_size=96)


@needs_shared
def test_images_arrive_resized_and_normalised(vit):
    from PIL import Image

    ours = images(dataset_name=IMAGES / "cifar10", dataset_test_split="test", max_train_samples=40, max_eval_samples=20)
    splits = data.prepare(data.read_splits(ours), vit, ours, extra_inputs={"interpolate_pos_encoding": True})
    assert splits.label_names[0] == "airplane"
    assert (len(splits.train), len(splits.evaluation)) == (40, 20)
    batch = splits.collator([splits.evaluation[i] for i in range(4)])
    assert batch["interpolate_pos_encoding"] is True
    table = pq.read_table(IMAGES / "cifar10" / "test.parquet").to_pylist()
    # by another route: pyarrow, Pillow, NumPy
    kept = sorted(np.random.RandomState(0).permutation(2000)[:20])[:4]
    for row, pixels, label in zip(kept, batch["pixel_values"], batch["labels"], strict=True):
        image = Image.open(io.BytesIO(table[row]["image"]["bytes"])).resize((96, 96), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.asarray(image, dtype=np.float64) / 255).permute(2, 0, 1) * 2 - 1
        torch.testing.assert_close(pixels.double(), expected, rtol=1e-6, atol=1e-6)
        assert label == table[row]["label"]


@needs_shared
def test_grey_images_and_paths_will_do_and_broken_ones_are_named(vit, tmp_path, write):
    from PIL import Image

    for number, mode in enumerate(("L", "RGBA", "P")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{number}.png")
    rows = [{"image": str(tmp_path / f"{i}.png"), "label": i} for i in range(3)]
    ours = images(dataset_name=write("a.jsonl", rows), eval_fraction=0.0)
    train = data.prepare(data.read_splits(ours), vit, ours).train
    assert {train[i]["pixel_values"].shape for i in range(3)} == {(3, 96, 96)}
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: field 'image' in .*1\.png is no whole image"):
        data.read_splits(ours)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="row 2"):
        data.read_splits(ours)
    with pytest.raises(ValueError, match=r"field 'label' holds .*expected images"):
        data.read_splits(ours.replace(image_field="label", label_field="image"))


@pytest.mark.parametrize("name", ["picture.jpg", "picture.png"])
def test_an_image_that_was_cut_off_is_named_before_any_training(name, tmp_path, write):
    from PIL import Image

    noise = np.random.RandomState(0).randint(256, size=(64, 64, 3), dtype=np.uint8)
    for picture in ("whole.png", name):
        Image.fromarray(noise).save(tmp_path / picture)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
    rows = [{"image": str(tmp_path / picture), "label": i} for i, picture in enumerate(("whole.png", name))]
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2: field 'image' in .*{name} is no whole image"):
        data.read_splits(images(model_name_or_path="x", dataset_name=write("a.jsonl", rows)))


# Fingerprints, evaluation -------------------------------------------------------------------------------------------

FINGERPRINT = """
import sys
from beyondlora import data, models
from beyondlora.data import inputs
from beyondlora.recipe import Recipe
for path in sys.argv[1:]:
    recipe = Recipe.load(path)
    processor = models.load_processor(recipe.model_name_or_path, task=recipe.task, image_size=recipe.image_size)
    print(data.prepare(data.read_splits(recipe), processor, recipe).fingerprint)
"""


@needs_shared
def test_a_fingerprint_is_the_same_in_every_process_and_another_for_other_rows(stories, vit, tmp_path):
    text = {"dataset_name": GSM8K / "test.jsonl", "dataset_text_field": "answer", "max_train_samples": 9}
    pictures = {"dataset_name": IMAGES / "dtd10", "dataset_test_split": "test", "max_train_samples": 9}
    recipes = {
        "text.yaml": (recipe(model_name_or_path=STORIES, **text), stories),
        "pictures.yaml": (images(model_name_or_path=VIT, **pictures), vit),
    }
    for name, (ours, _) in recipes.items():
        ours.save(tmp_path / name)
    elsewhere = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, *recipes],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )

    def fingerprint(ours, processor):
        return data.prepare(data.read_splits(ours), processor, ours).fingerprint

    assert elsewhere.stdout.split() == [fingerprint(*known) for known in recipes.values()]
    for ours, processor in recipes.values():
        assert fingerprint(ours.replace(max_train_samples=8), processor) != fingerprint(ours, processor)


def test_a_fingerprint_knows_where_rows_end():
    ends = [
        pa.table({"input_ids": pa.array(rows, pa.large_list(pa.int32()))}) for rows in ([[1, 2], [3]], [[1], [2, 3]])
    ]
    assert inputs._digest(ends[0]) != inputs._digest(ends[1])


@needs_shared
def test_rows_to_evaluate_on_are_the_recipes_own_or_those_of_a_file(stories, write):
    ours = recipe(dataset_name=SHAKESPEARE, max_length=64)
    own = data.prepare_evaluation(ours, stories)
    assert own.rows[:] == data.prepare(data.read_splits(ours), stories, ours).evaluation[:]
    other = data.prepare_evaluation(ours, stories, str(write("b.txt", "Once upon a time")))
    assert other.description.startswith("1 blocks")
    swapped = data.prepare_evaluation(ours, stories, str(write("c.txt", "Once a upon time")))
    assert other.description == swapped.description
    assert len({own.fingerprint, other.fingerprint, swapped.fingerprint}) == 3
    with pytest.raises(ValueError, match="holds out no evaluation rows"):
        data.prepare_evaluation(ours.replace(eval_fraction=0.0), stories)


@needs_minilm
def test_an_evaluation_file_is_labelled_with_the_classes_of_the_training_rows(minilm, write):
    train = write("a.jsonl", [{"sentence": "s", "label": label} for label in "abab"])
    test = str(write("b.jsonl", [{"sentence": "s", "label": "b"}]))
    ours = classification(dataset_name=train)
    assert data.prepare_evaluation(ours, minilm, test).rows["labels"][:] == [1]
    assert data.prepare_evaluation(ours, minilm, test, label_names=["x", "y", "b"]).rows["labels"][:] == [2]


@needs_shared
def test_nothing_is_printed_and_nothing_is_written(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    said: list[logging.LogRecord] = []  # transformers' own handler may hold a stream from before this test
    monkeypatch.setattr(logging.getLogger("transformers"), "handle", said.append)
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "handle", said.append)
    stories = models.load_processor(str(STORIES), task="causal-lm")  # a new one: it complains once about a long text
    ours = recipe(dataset_name=SHAKESPEARE)
    data.prepare(data.read_splits(ours), stories, ours)
    ours = images(dataset_name=IMAGES / "dtd10" / "test.parquet")
    data.read_splits(ours)
    assert (said, capfd.readouterr()) == ([], ("", ""))
    assert list(tmp_path.iterdir()) == []
