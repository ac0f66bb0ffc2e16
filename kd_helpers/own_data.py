"""Your own texts: a CSV, JSON Lines or Parquet file, or a dataset of the hub, read row by row and checked.

What can't be meant is refused with the file, the line and the way out; what is merely missing (a row without text,
a text without label) is kept apart and counted. Splitting is the business of `data`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd

from kd_helpers import hub

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_CLASSES = 100
NO_LABEL = ("", "nan", "n/a", "<na>")  # as other programs write that there is none
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
        label_column: where the labels stand.

    Returns:
        For each split (a file is the split `train`) the columns `text`, `label` (a name, or None where there is
        none) and `place`, e.g. "reviews.csv, line 7".

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ConnectionError: the hub can't be reached.
        ValueError: the file can't be read, a column is missing, or a row makes no sense; the sentence names it.
    """
    named = _HUB_NAME.fullmatch(source)
    if Path(source).suffix.lower() in FORMATS or Path(source).exists() or not named:
        return {"train": read_file(source, text_column=text_column, label_column=label_column)}
    splits = hub.load_dataset(*named.groups())
    return {
        name: _frame(_from_hub(f"{source}, {name}", split, text_column, label_column)) for name, split in splits.items()
    }


def read_file(source: str, *, text_column: str, label_column: str) -> pd.DataFrame:
    """Read a file; as `read_texts`, of which it is one split."""
    path = Path(source).expanduser()
    if "://" in source:
        raise ValueError(f"{source!r} is an address; download the file and give its path.")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{source!r} can't be read; give a file that ends in {', '.join(FORMATS)} (save a spreadsheet as CSV, "
            "unpack an archive), or as data the name OWNER/NAME of a hub dataset."
        )
    if not os.path.isfile(path):  # `Path.is_file` raises on a name that no system takes
        raise FileNotFoundError(f"there is no file {source!r} in {Path.cwd()}; check the path.")
    if path.suffix.lower() == ".parquet":
        frame = _frame(_from_parquet(path, text_column, label_column))
    elif path.suffix.lower() in (".csv", ".tsv"):
        frame = _frame(_from_csv(path.name, _lines(path), text_column, label_column))
    else:
        frame = _frame(_from_json_lines(path.name, _lines(path), text_column, label_column))
    if frame.empty:
        raise ValueError(f"{path.name} has no rows; give it some.")
    return frame


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
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 131,072 characters
    rows = csv.reader(lines, delimiter=_delimiter(lines[0] if lines else "", text_column), strict=True)
    columns: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {line}: {error}; check the quotes from this line on.") from error
        if row is None:
            break
        if not row:  # an empty line
            continue
        if not columns:
            columns = _columns(name, row, text_column, label_column)
            continue
        if len(row) != len(columns):
            raise ValueError(
                f"{name}, line {line}: {count(len(row), 'field')} where the header has {len(columns)}; "
                "put texts that hold the separator into quotes."
            )
        fields = dict(zip(columns, row, strict=True))
        yield Record(f"{name}, line {line}", fields[text_column], fields[label_column])
    if not columns:
        _columns(name, [], text_column, label_column)


def _delimiter(header: str, text_column: str) -> str:
    """What separates the columns: spreadsheets of some countries write semicolons."""

    def columns(mark: str) -> list[str]:
        return next(csv.reader([header], delimiter=mark), [])

    return max(",;\t|", key=lambda mark: (text_column in columns(mark), len(columns(mark))))


def _from_json_lines(name: str, lines: list[str], text_column: str, label_column: str) -> Iterator[Record]:
    seen: dict[str, None] = {}
    for line, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {line}: no JSON ({error.msg}); write one object on each line.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{name}, line {line}: {_short(content)} is no object; write one object on each line.")
        seen |= dict.fromkeys(fields)
        if text_column not in fields:
            _columns(f"{name}, line {line}", list(fields), text_column, label_column)
        yield Record(f"{name}, line {line}", fields[text_column], fields.get(label_column))
    if seen:  # a row may lack its label, but not every row
        _columns(name, list(seen), text_column, label_column)


def _from_parquet(path: Path, text_column: str, label_column: str) -> Iterator[Record]:
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow's errors have no common ancestor of their own
        raise ValueError(f"{path.name} can't be read as Parquet ({error}); write it anew.") from error
    _columns(path.name, list(table.columns), text_column, label_column)
    for row, (text, label) in enumerate(
        zip(table[text_column].tolist(), table[label_column].tolist(), strict=True), start=1
    ):
        yield Record(f"{path.name}, row {row}", text, label)


def _from_hub(name: str, split: datasets.Dataset, text_column: str, label_column: str) -> Iterator[Record]:
    _columns(name, split.column_names, text_column, label_column)
    labels = split[label_column][:]
    feature = split.features[label_column]
    if isinstance(feature, datasets.ClassLabel):  # numbers with names; the hub writes −1 where the label is secret
        labels = [None if label is None or label < 0 else feature.int2str(label) for label in labels]
    for row, (text, label) in enumerate(zip(split[text_column][:], labels, strict=True), start=1):
        yield Record(f"{name}, row {row}", text, label)


def _columns(name: str, columns: list[str], text_column: str, label_column: str) -> list[str]:
    """The columns, when those that are needed are there and none of them comes twice."""
    for role, column in {"text_column": text_column, "label_column": label_column}.items():
        if column not in columns:
            listed = ", ".join(map(_short, columns[:10])) or "none"
            raise ValueError(f"{name} has no column {column!r} but {listed}; name the right one as {role}.")
        if columns.count(column) > 1:
            raise ValueError(f"{name} has {columns.count(column)} columns {column!r}; keep one.")
    return columns


def _short(value: object) -> str:
    """What was given, as it fits into a sentence."""
    shown = repr(value.strip() if isinstance(value, str) else value)
    return shown if len(shown) <= 50 else f"{shown[:45]} …"


def count(number: int, noun: str) -> str:
    """A number with its noun, which has an s unless there is one of it."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
        raise ValueError(f"{record.place}: {_short(record.text)} is no text; give text, or name the right text_column.")
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
        raise ValueError(
            f"{record.place}: the label {_short(label)} is neither a name nor a whole number; give one of them."
        )
    name = str(label).strip()
    if name.casefold() in NO_LABEL:
        return None
    return str(int(float(name))) if _WHOLE.fullmatch(name) else name


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
            f"{source} has {count(len(names), 'label')}{few}; have 2 to {MAX_CLASSES}, or name the right label_column."
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
