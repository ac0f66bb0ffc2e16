"""Your own texts: a CSV, JSON Lines or Parquet file, or a dataset of the hub, read row by row and checked.

What can't be meant is refused with the file, the line and the way out; what is merely missing (a row without text,
a text without label) is kept apart and counted. Splitting is the business of `data`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd

from kd_helpers import hub

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_CLASSES = 100
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


class Record(NamedTuple):
    """One row: where it stands, and what stands there."""

    place: str
    text: Any
    label: Any


def read_texts(source: str, *, text_column: str, label_column: str) -> dict[str, pd.DataFrame]:
    """Read a file, or all splits of a hub dataset.

    Args:
        source: path of a file (see `FORMATS`), or `owner/name` or `owner/name:configuration` on the hub.
        text_column: where the texts stand.
        label_column: where the labels stand; it may be missing from a file whose rows all have none.

    Returns:
        For each split (a file is the split `train`) the columns `text`, `label` (a name, or None where there is
        none) and `place`, e.g. "reviews.csv, line 7".

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ConnectionError: the hub can't be reached.
        ValueError: the file can't be read, a column is missing, or a row makes no sense; the sentence names it.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in FORMATS:
        return {"train": _frame(_read_file(path, text_column, label_column))}
    found = _HUB_NAME.fullmatch(source)
    if path.exists() or not found:
        raise ValueError(
            f"data is {source!r}; give a file that ends in {', '.join(FORMATS)}, or a hub name OWNER/NAME."
        )
    splits = hub.load_dataset(*found.groups())
    return {
        name: _frame(_from_hub(f"{source}, {name}", split, text_column, label_column)) for name, split in splits.items()
    }


def _read_file(path: Path, text_column: str, label_column: str) -> Iterable[Record]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; check the path, which is relative to {Path.cwd().name}/."
        )
    if path.suffix.lower() == ".parquet":
        return _from_parquet(path, text_column, label_column)
    lines = _lines(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _from_csv(path.name, lines, text_column, label_column)
    return _from_json_lines(path.name, lines, text_column, label_column)


def _lines(path: Path) -> list[str]:
    """The file's lines with their ends; a lone carriage return within one, as texts from the web have, is a space."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        # Not str.splitlines, which also cuts at rarer separators.
        return list(io.StringIO(text.replace("\r", " " if "\n" in text else "\n")))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line}: the file is not UTF-8; save it as UTF-8.") from error


def _from_csv(name: str, lines: list[str], text_column: str, label_column: str) -> Iterator[Record]:
    header = lines[0] if lines else ""
    # Spreadsheets of some countries write semicolons: take what separates the wanted column from the others.
    delimiters = [mark for mark in ",;\t" if text_column in next(csv.reader([header], delimiter=mark), [])]
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 131,072 characters
    rows = csv.reader(lines, delimiter=delimiters[0] if delimiters else ",", strict=True)
    columns = _columns(name, next(rows, []), text_column, label_column)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {line}: {error}; check the quotes from this line on.") from error
        if row is None:
            return
        if not row:  # an empty line
            continue
        if len(row) != len(columns):
            raise ValueError(
                f"{name}, line {line}: {len(row)} fields where the header has {len(columns)}; "
                "put texts that hold the separator into quotes."
            )
        fields = dict(zip(columns, row, strict=True))
        yield Record(f"{name}, line {line}", fields[text_column], fields.get(label_column))


def _from_json_lines(name: str, lines: list[str], text_column: str, label_column: str) -> Iterator[Record]:
    for line, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {line}: no JSON ({error.msg}); write one object on each line.") from error
        if not isinstance(fields, dict):
            raise ValueError(
                f"{name}, line {line}: {content.strip()[:40]!r} is no object; write one object on each line."
            )
        if text_column not in fields:
            _columns(f"{name}, line {line}", list(fields), text_column, label_column)
        yield Record(f"{name}, line {line}", fields[text_column], fields.get(label_column))


def _from_parquet(path: Path, text_column: str, label_column: str) -> Iterator[Record]:
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow's errors have no common ancestor of their own
        raise ValueError(f"{path.name} can't be read as Parquet ({error}); write it anew.") from error
    columns = _columns(path.name, list(table.columns), text_column, label_column)
    labels = table[label_column].tolist() if label_column in columns else [None] * len(table)
    for row, (text, label) in enumerate(zip(table[text_column].tolist(), labels, strict=True), start=1):
        yield Record(f"{path.name}, row {row}", text, label)


def _from_hub(name: str, split: datasets.Dataset, text_column: str, label_column: str) -> Iterator[Record]:
    columns = _columns(name, split.column_names, text_column, label_column)
    labels = split[label_column][:] if label_column in columns else [None] * len(split)
    feature = split.features.get(label_column)
    if isinstance(feature, datasets.ClassLabel):  # numbers with names; the hub writes −1 where the label is secret
        labels = [None if label is None or label < 0 else feature.int2str(label) for label in labels]
    for row, (text, label) in enumerate(zip(split[text_column][:], labels, strict=True), start=1):
        yield Record(f"{name}, row {row}", text, label)


def _columns(name: str, columns: list[str], text_column: str, label_column: str) -> list[str]:
    """The columns, when those that are needed are there and none comes twice."""
    if text_column not in columns:
        listed = ", ".join(repr(column) for column in columns[:10]) or "none"
        raise ValueError(f"{name} has no column {text_column!r} but {listed}; name the right one as text_column.")
    for column in (text_column, label_column):
        if columns.count(column) > 1:
            raise ValueError(f"{name} has {columns.count(column)} columns {column!r}; keep one.")
    return columns


def _frame(records: Iterable[Record]) -> pd.DataFrame:
    rows = [(as_text(record), as_label(record), record.place) for record in records]
    return pd.DataFrame(rows, columns=["text", "label", "place"], dtype=object)


def as_text(record: Record) -> str:
    """The text without surrounding space; "" where there is none.

    Raises:
        ValueError: something else than text stands there.
    """
    if _is_missing(record.text):
        return ""
    if not isinstance(record.text, str):
        raise ValueError(f"{record.place}: {record.text!r} is no text; give text, or name the right text_column.")
    return record.text.strip()


def as_label(record: Record) -> str | None:
    """The label as a name; None where there is none. 2, "2" and "2.0" (as spreadsheets write) are one label.

    Raises:
        ValueError: neither a name nor a whole number stands there.
    """
    label = record.label
    if _is_missing(label):
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, (str, int)):
        raise ValueError(f"{record.place}: the label {label!r} is neither a name nor a whole number; give one of them.")
    name = str(label).strip()
    return (str(int(float(name))) if _WHOLE.fullmatch(name) else name) or None


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def label_names(labelled: pd.DataFrame, source: str) -> tuple[str, ...]:
    """The classes, in the order of their numbers when all are numbers, else of the alphabet.

    Args:
        labelled: rows with `label` and `place`.
        source: for the sentence.

    Raises:
        ValueError: fewer than 2 or more than 100 classes, names that differ in case only, or fractions.
    """
    names = labelled["label"].unique().tolist()
    if not 2 <= len(names) <= MAX_CLASSES:
        few = "" if len(names) > 1 else f" ({names[0]!r})" if names else ""
        raise ValueError(
            f"{source} has {len(names):,} labels{few}; have 2 to {MAX_CLASSES}, or name the right label_column."
        )
    by_case: dict[str, str] = {}
    for name, place in labelled.drop_duplicates("label")[["label", "place"]].itertuples(index=False):
        other = by_case.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"{place}: the label {name!r} differs from {other!r} in case only; write them alike.")
    if not all(map(_is_number, names)):
        return tuple(sorted(names, key=str.casefold))
    if fractions := [name for name in names if not _WHOLE.fullmatch(name)]:
        place = labelled.loc[labelled["label"] == fractions[0], "place"].iloc[0]
        raise ValueError(f"{place}: the label {fractions[0]} is a fraction; give classes as names or whole numbers.")
    return tuple(sorted(names, key=int))


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
