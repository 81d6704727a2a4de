"""Read a user's own pairs from JSON, JSONL or CSV."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fv_steer.errors import TaskError
from offline_extract.tasks.model import Pair

MIN_PAIRS = 30
COLUMNS = ("input", "output")

#: A row's place in the file, for messages, and its parsed value.
Row = tuple[str, Any]


def load_dataset(path: str | os.PathLike[str]) -> tuple[Pair, ...]:
    """Read pairs from `path`: .json (a list), .jsonl, or .csv with a header row.

    A row has `input` (a string) and `output` (a string, or outside CSV a list of accepted
    strings, the canonical one first). Spaces around a value are dropped, and so are exact
    duplicates of a row. Raises TaskError naming the file, the row and what is wrong. Rows
    count from 1: items of a JSON list, lines of a JSONL file, CSV records after the header.
    """
    source = Path(path)
    reader = _READERS.get(source.suffix.lower())
    if reader is None:
        raise TaskError(f"{source}: unknown dataset type {source.suffix!r}; use {', '.join(_READERS)}")
    try:
        return _collect(reader(_read_text(source)))
    except TaskError as error:
        raise TaskError(f"{source}: {error}") from None


def _read_text(source: Path) -> str:
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read the dataset: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TaskError(f"line {line} is not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where} is not valid JSON: {error}") from None
    except (RecursionError, ValueError):
        raise TaskError(f"{where} is not valid JSON: nested too deeply, or a number too long") from None


def _json_rows(text: str) -> Iterator[Row]:
    items = _parse_json(text, "the file")
    if not isinstance(items, list):
        raise TaskError(f"must hold a list of objects, holds {_kind(items)}")
    for number, item in enumerate(items, 1):
        yield f"row {number}", item


def _jsonl_rows(text: str) -> Iterator[Row]:
    # Not str.splitlines: U+2028 and its like are valid inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"row {number}", _parse_json(line, f"row {number}")


def _csv_rows(text: str) -> Iterator[Row]:
    records = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    number = 0
    try:
        header = [name.strip() for name in next(records, [])]
        if sorted(header) != sorted(COLUMNS):
            raise TaskError(f"the header must name the columns {' and '.join(COLUMNS)}, not {', '.join(header) or '-'}")
        for record in records:
            if not record:
                continue
            number += 1
            where = f"row {number} (line {records.line_num})"
            if len(record) != len(COLUMNS):
                raise TaskError(
                    f"{where} has {len(record)} columns, expected {len(COLUMNS)}; quote a value with commas"
                )
            yield where, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise TaskError(f"row {number + 1} (line {records.line_num}) is not valid CSV: {error}") from None


_READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
}


def _collect(rows: Iterator[Row]) -> tuple[Pair, ...]:
    """Check every row, drop exact duplicates, refuse contradictions and a too small set."""
    seen: dict[str, tuple[str, Pair]] = {}
    for where, item in rows:
        pair = _pair(where, item)
        first, known = seen.setdefault(pair.input, (where, pair))
        if known != pair:
            raise TaskError(
                f"{where} gives {pair.input!r} the output {pair.target!r}, {first} gives {known.target!r}; "
                "keep one row per input, with a list if several outputs are right"
            )
    if len(seen) < MIN_PAIRS:
        raise TaskError(f"{len(seen)} usable pairs; at least {MIN_PAIRS} are needed")
    return tuple(pair for _, pair in seen.values())


def _pair(where: str, item: Any) -> Pair:
    if not isinstance(item, dict):
        raise TaskError(f"{where} must be an object with {' and '.join(COLUMNS)}, is {_kind(item)}")
    if missing := [key for key in COLUMNS if key not in item]:
        raise TaskError(f"{where} has no {missing[0]!r}")
    if unknown := sorted(set(item) - set(COLUMNS)):
        raise TaskError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    output = item["output"]
    outputs = output if isinstance(output, list) else [output]
    if not outputs:
        raise TaskError(f"{where}: 'output' is an empty list")
    cleaned = [_text(where, "output", value) for value in outputs]
    return Pair(_text(where, "input", item["input"]), tuple(dict.fromkeys(cleaned)))


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        expected = "a string" if key == "input" else "a string or a list of strings"
        raise TaskError(f"{where}: {key!r} must be {expected}, is {_kind(value)}")
    text = value.strip()
    if not text:
        raise TaskError(f"{where}: {key!r} is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise TaskError(f"{where}: {key!r} contains half of a surrogate pair, which is no character")
    return text


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
