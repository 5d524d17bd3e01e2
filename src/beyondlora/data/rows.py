"""Rows from a file, a folder or a hub data set; a reader a format, each saying where exactly a file is broken."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


def read_rows(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
) -> datasets.Dataset:
    """The rows of a local file, a local folder or a hub data set, every named field present in every row.

    Args:
        name: a file (json, jsonl, csv, tsv, txt, all also .gz; parquet), a folder with one file a split
            (or shards of it, train-0, train-1 or train-00000-of-00002), or a hub name.
        split: which split of a folder or hub data set; a file has none.
        config: the hub data set's configuration.
        columns: names for the columns of a csv or tsv without a header line.
        fields: the fields to read; None = all.
    Raises: FileNotFoundError, ValueError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        rows = _read_file(path, columns, fields)
    elif path.is_dir():
        rows = _read_folder(path, split, columns, fields)
    elif _looks_like_a_path(name):
        start = "" if path.is_absolute() else f"; relative paths start from {Path.cwd()}"
        raise FileNotFoundError(f"data {name!r}: there is no such file or folder{start}")
    else:
        rows = _read_hub(name, config, split)
    rows = _select_fields(rows, fields, name)
    if len(rows) == 0:
        raise ValueError(f"{name}: no rows")
    return rows


def _select_fields(rows: datasets.Dataset, fields: Sequence[str] | None, where: str) -> datasets.Dataset:
    if fields is None:
        return rows
    _check_names(fields, rows.column_names, where)
    rows = rows.select_columns(list(fields))
    for name in fields:
        column = arrow_column(rows, name)
        if column.null_count:
            row = column.is_null().index(True).as_py() + 1
            raise ValueError(f"{where}, row {row}: no value in field {name!r} ({column.null_count} such rows)")
    return rows


def _check_names(wanted: Sequence[str], available: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in available and available:
            raise ValueError(f"{where} has no field {name!r}; its fields are {', '.join(available)}")


def arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow holds it."""
    return rows.with_format("arrow")[:][name] if rows._indices is not None else rows.data.column(name)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or _extension(Path(name)) in _READERS


def _extension(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_file(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    reader = _READERS.get(_extension(path))
    if reader is None:
        raise ValueError(
            f"{path}: unknown extension; choose one of {', '.join(sorted(_READERS))} (all but .parquet also with .gz)"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return reader(path, columns, fields)


def _read_folder(
    folder: Path, split: str, columns: Sequence[str] | None, fields: Sequence[str] | None
) -> datasets.Dataset:
    """`<split>.<extension>`, or shards `<split>-<number>.<extension>`; or what Dataset.save_to_disk wrote."""
    if (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        return _read_folder(folder / split, split, columns, fields)
    known = (
        sorted(path for path in folder.iterdir() if path.is_file() and _extension(path) in _READERS)
        if folder.is_dir()
        else []
    )
    # train-00000-of-00003, with the hub's checksum or without; train-small is another thing than the split
    shard = re.compile(rf"{re.escape(split)}(-\d+(-of-(?P<of>\d+))?(-[0-9a-f]+)?)?")
    found = {path: match for path in known if (match := shard.fullmatch(_stem(path)))}
    if not found:
        holds = ", ".join(path.name for path in known[:8]) or "no data file"
        raise FileNotFoundError(
            f"{folder}: no file of the split {split!r}, such as {split}.jsonl or {split}-00000-of-00002.jsonl; the "
            f"folder holds {holds}"
        )
    listed = ", ".join(path.name for path in found)
    if len({(path.name.removeprefix(_stem(path)), _stem(path) == split) for path in found}) > 1:
        raise ValueError(f"{folder}: the split {split!r} stands there twice: {listed}; name one file")
    numbers = {match["of"] for match in found.values()}
    if numbers != {None} and {int(of or 0) for of in numbers} != {len(found)}:
        raise ValueError(
            f"{folder}: the shards of the split {split!r} are not as many as their names say ({listed}); fetch the "
            "missing ones, or remove those of another version"
        )
    return _joined({path: _read_file(path, columns, fields) for path in found}, fields)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0]


def _joined(shards: dict[Path, datasets.Dataset], fields: Sequence[str] | None) -> datasets.Dataset:
    """The rows of all shards, of the fields asked for; whole and broken numbers become broken ones."""
    if fields is not None:
        for path, shard in shards.items():
            _check_names(fields, shard.column_names, str(path))
        shards = {path: shard.select_columns(list(fields)) for path, shard in shards.items()}
    parts = list(shards.values())
    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(parts)
    tables = [part.data.table.replace_schema_metadata(None) for part in parts]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(path.name for path in shards)
        raise ValueError(
            f"{next(iter(shards)).parent}: the fields of {names} do not go together ({error}); give each one type"
        ) from None
    features = datasets.Features.from_arrow_schema(table.schema)
    kept = {name: kind for name, kind in parts[0].features.items() if all(p.features.get(name) == kind for p in parts)}
    return datasets.Dataset(table.cast(datasets.Features(features | kept).arrow_schema))


def _read_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data {name!r}: there is no local file of that name, and as a hub data set (config {config}, "
            f"split {split!r}) it cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _read_text(path: Path) -> str:
    """The whole file as text. Errors name the line, and the byte that is not UTF-8."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged or cut-off gzip file ({error})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; convert the file, for example with iconv"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _read_jsonl(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); is the file cut off?") from None
            if not isinstance(records[-1], dict):
                raise ValueError(f"{path}, line {number}: a {_kind(records[-1])}; every line must hold one JSON object")
    return _from_records(records, fields, path)


def _read_json(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        hint = (
            "; one object a line is jsonl: name the file .jsonl"
            if str(error).startswith("Extra data")
            else "; is the file cut off?"
        )
        raise ValueError(f"{path}, line {line}: not valid JSON ({error}){hint}") from None
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f'{path} holds a {_kind(content)}; expected a list of objects, or {{"data": [...]}}')
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {number}: a {_kind(record)}; every row must be a JSON object")
    return _from_records(records, fields, path)


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}.get(
        type(value), "null"
    )


def _from_records(records: list[dict[str, Any]], fields: Sequence[str] | None, path: Path) -> datasets.Dataset:
    available = list(dict.fromkeys(name for record in records for name in record))
    wanted = available if fields is None else list(fields)
    _check_names(wanted, available, str(path))
    return datasets.Dataset(
        pa.table({name: _column([record.get(name) for record in records], name, path) for name in wanted})
    )


def _column(values: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(values)
    except _MISFITS as error:
        row, reason = _misfit(values, error)
        raise ValueError(f"{path}, row {row}: field {name!r} holds {reason}") from None


_MISFITS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def _misfit(values: list[Any], error: Exception) -> tuple[int, str]:
    """The first row that does not go with those before it, from 1, and why."""
    fits, row = 0, len(values)  # so many go together, and so many do not
    while row - fits > 1:
        middle = (row + fits) // 2
        try:
            pa.array(values[:middle])
            fits = middle
        except _MISFITS as earlier:
            row, error = middle, earlier
    kinds = [_kind(value) for value in values[:row]]
    first = next((number for number, kind in enumerate(kinds, start=1) if kind != "null"), row)
    if kinds[-1] != kinds[first - 1]:
        return row, f"a {kinds[-1]}, row {first} a {kinds[first - 1]}; it needs one type"
    if isinstance(error, OverflowError):
        return row, "a whole number of more than 64 bits; write it as text"
    if isinstance(error, UnicodeEncodeError):
        half = error.object[error.start : error.end]
        return row, f"{half!r}, one half of a character, which is no text; write the whole character or leave it out"
    return row, f"something of another type than the rows before it ({error}); it needs one type"


def _read_csv(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if cells:  # no blank line
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None

    allowed = csv.field_size_limit(2**31 - 1)  # of the whole process: 131,072 characters a cell
    try:
        return _from_cells(numbered(), columns, path)
    finally:
        csv.field_size_limit(allowed)


def _read_tsv(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    """Cells between tabs, quotes are ordinary characters (GLUE's sentences are full of them)."""
    lines = enumerate(_read_text(path).split("\n"), start=1)
    return _from_cells(
        ((number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip("\r")), columns, path
    )


def _from_cells(rows: Iterator[tuple[int, list[str]]], columns: Sequence[str] | None, path: Path) -> datasets.Dataset:
    header = list(columns) if columns is not None else next(rows)[1]
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: the header {header} names a column twice")
    cells: list[list[str]] = [[] for _ in header]
    for number, row in rows:
        if len(row) != len(header):
            named = "columns names" if columns is not None else "the header has"
            raise ValueError(
                f"{path}, line {number}: {len(row)} fields, but {named} {len(header)} ({', '.join(header)})"
            )
        for column, cell in zip(cells, row, strict=True):
            column.append(cell)
    return datasets.Dataset(
        pa.table({name: pa.array(column, pa.large_string()) for name, column in zip(header, cells, strict=True)})
    )


def _read_txt(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    name = (
        fields[0] if fields and len(fields) == 1 else "text"
    )  # a text file has no field names: it is what is asked for
    return datasets.Dataset(pa.table({name: pa.array([_read_text(path)], pa.large_string())}))


def _read_parquet(path: Path, columns: Sequence[str] | None, fields: Sequence[str] | None) -> datasets.Dataset:
    try:
        if fields is not None:  # others may hold what `datasets` has no type for, and much of it
            _check_names(fields, pq.read_schema(path).names, str(path))
        return datasets.Dataset(pq.read_table(path, columns=fields and list(fields), partitioning=None))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a parquet file, or a damaged one ({' '.join(str(error).split())[:200]})"
        ) from None


_READERS: dict[str, Callable[[Path, Sequence[str] | None, Sequence[str] | None], datasets.Dataset]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
