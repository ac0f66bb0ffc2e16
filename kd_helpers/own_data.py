"""Your own texts: a CSV, JSON Lines or Parquet file, or a dataset of the hub, read row by row and checked.

What can't be meant is refused with the file, the line and the way out; what is merely missing (a row without text,
a text without label) is kept apart and counted. Splitting is the business of `data`.
"""

from __future__ import annotations

import codecs
import csv
import decimal
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kd_helpers import hub
from kd_helpers.config import expanded

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_CLASSES = 1000
LONGEST_LABEL = 1000  # characters; what is longer is a text, and stands in another column than was meant
NO_LABEL = ("", "nan", "n/a", "<na>")  # as other programs write that there is none
NO_CLASS = (-1, -100)  # the same among the numbers of named classes: the hub's way and torch's
WITHOUT_LABELS = "distil without labels (alpha=1, teacher_epochs=0 and a fine-tuned teacher_checkpoint)"

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
# A whole number as programs write it, maybe as a float. A code such as 01 or +1 is none: it keeps its spelling.
_PLAIN_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(\.0*)?", re.ASCII)
# How spreadsheets and pandas write floats of many digits.
_SHORTENED = re.compile(r"-?\d(\.\d+)?[eE]\+\d{2,}", re.ASCII)
# From these on, a whole number may have been rounded when it was stored as a float of 64 or of 32 bits.
_EXACT, _EXACT_FLOAT32 = 2**53, 2**24
_SPACE = re.compile(r"\s+")
# Soft hyphen, zero-width space and no-break space, word joiner, and the marks that steer the direction of writing.
_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
# Joiners and variation selectors matter inside some words and emoji, but no two classes differ by them alone.
_HARDLY_SEEN = re.compile("[\u200c\u200d\ufe00-\ufe0f]")
_ENDS = re.compile("^[\\s\u200c\u200d]+|[\\s\u200c\u200d]+$")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\w \n])"?\s*', re.IGNORECASE)  # Excel's first line
_BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8-sig",
}
_NO_TEXT = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "an SQLite database",
}


class Record(NamedTuple):
    """One row: where it stands, and what stands there."""

    place: str
    text: Any
    label: Any


class Columns(NamedTuple):
    """Where the texts and the labels stand.

    Attributes:
        text: the column of the texts.
        label: the column of the labels; "" where there are none.
        label_needed: whether a file without that column is refused.
    """

    text: str
    label: str
    label_needed: bool

    def require(self, name: str, there: Sequence[str]) -> None:
        """Refuse a table that lacks one of the columns, or has it twice.

        Raises:
            ValueError: one sentence says which.
        """
        wanted = {"text_column": self.text} | ({"label_column": self.label} if self.label else {})
        for role, column in wanted.items():
            if column not in there and (role == "text_column" or self.label_needed):
                listed = ", ".join(map(short, there[:10])) or "none"
                way_out = f", or {WITHOUT_LABELS}" if role == "label_column" else ""
                raise ValueError(
                    f"{name} has no column {column!r} but {listed}; name the right one as {role}{way_out}."
                )
            if there.count(column) > 1:
                raise ValueError(f"{name} has {there.count(column)} columns {column!r}; keep one.")


def read_texts(
    source: str, *, text_column: str, label_column: str, label_needed: bool = True
) -> dict[str, pd.DataFrame]:
    """Read a file, or all splits of a hub dataset.

    Args:
        source: path of a file (see `FORMATS`), or `owner/name` or `owner/name:configuration` on the hub.
        text_column: where the texts stand.
        label_column: where the labels stand; "" where there are none.
        label_needed: whether the column of the labels must be there. Of a hub dataset only `train` must have it.

    Returns:
        For each split (a file is the split `train`) the columns `text`, `label` (a name, or None where there is
        none) and `place`, e.g. "reviews.csv, line 7". What a reader should know about the file stands in
        `attrs["notes"]`, one sentence each.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ConnectionError: the hub can't be reached.
        ValueError: the file can't be read, a column is missing, or a row makes no sense; the sentence names it.
    """
    source = expanded(source, "data")
    named = _HUB_NAME.fullmatch(source)
    columns = {"text_column": text_column, "label_column": label_column}
    if Path(source).suffix.lower() in FORMATS or os.path.exists(source) or not named:
        return {"train": read_file(source, **columns, label_needed=label_needed)}
    return {
        name: _frame(
            _from_hub(f"{source}, {name}", split, Columns(text_column, label_column, label_needed and name == "train")),
            [],
        )
        for name, split in hub.load_dataset(*named.groups()).items()
    }


def read_file(source: str, *, text_column: str, label_column: str, label_needed: bool = True) -> pd.DataFrame:
    """Read a file; as `read_texts`, of which it is one split."""
    path, columns = Path(expanded(source, "data")), Columns(text_column, label_column, label_needed)
    if "://" in source:
        raise ValueError(f"{source!r} is an address; download the file and give its path.")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{source!r} can't be read; give a file that ends in {', '.join(FORMATS)} (save a spreadsheet as CSV, "
            "unpack an archive), or as data the name OWNER/NAME of a hub dataset."
        )
    if os.path.isdir(path):
        raise ValueError(f"{source!r} is a folder; give one file.")
    if not os.path.isfile(path):  # `Path.is_file` raises on a name that no system takes
        raise FileNotFoundError(f"there is no file {source!r} in {Path.cwd()}; check the path.")
    notes: list[str] = []
    try:
        if path.suffix.lower() == ".parquet":
            frame = _frame(_from_parquet(path, columns), notes)
        elif path.suffix.lower() in (".csv", ".tsv"):
            frame = _frame(_from_csv(path.name, _decoded(path), columns, notes), notes)
        else:
            frame = _frame(_from_json(path.name, _decoded(path), columns), notes)
    except OSError as error:
        raise OSError(
            f"{source!r} can't be read: {error.strerror or error}; check the file and your rights."
        ) from error
    if frame.empty:
        raise ValueError(f"{path.name} has no rows; give it some.")
    return frame


def _decoded(path: Path) -> str:
    """A file's text, each line ended by a line feed; a lone carriage return within one, as texts from the web have, is
    a space."""
    content = path.read_bytes()
    for start, kind in _NO_TEXT.items():
        if content.startswith(start):
            raise ValueError(
                f"{path.name} is {kind}, whatever its name says; give a file of text (save a spreadsheet as CSV, "
                "unpack an archive), or name it by what it is."
            )
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "UTF-8")
    try:
        text = content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = encoding.removesuffix("-sig")
        raise ValueError(f"{path.name}, line {line}: the file is not {kind}; save it as UTF-8.") from error
    if (position := text.find("\0")) >= 0:
        line = text.count("\n", 0, position) + 1
        raise ValueError(
            f"{path.name}, line {line}: there is a NUL character, so this is no UTF-8 text or a damaged one; save it "
            "as UTF-8, or remove the character."
        )
    return text.replace("\r", " " if "\n" in text else "\n")


def _lines(text: str) -> list[str]:
    """The lines with their ends. Not str.splitlines, which also cuts at rarer separators."""
    return list(io.StringIO(text))


# CSV


class Row(NamedTuple):
    """A row of a CSV file: its first and last line, and its fields."""

    line: int
    last_line: int
    fields: list[str]


def _from_csv(name: str, text: str, columns: Columns, notes: list[str]) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 131,072 characters
    columns = columns._replace(text=spelled(columns.text), label=spelled(columns.label))
    lines, delimiter = _lines(text), ""
    if lines and (chosen := _SEPARATOR_LINE.fullmatch(lines[0])):
        delimiter, lines[0] = chosen[1], "\n"  # an empty line, so that the others keep their numbers
    header = next((line for line in lines if line.strip()), "")
    delimiter = delimiter or _delimiter(header, columns.text)
    (_, _, cells), *rows = _rows(name, lines, delimiter, columns, notes)
    text_at = cells.index(columns.text)
    label_at = cells.index(columns.label) if columns.label in cells else None
    for line, _, fields in rows:
        yield Record(f"{name}, line {line}", fields[text_at], None if label_at is None else fields[label_at])


def _delimiter(header: str, text_column: str) -> str:
    """What separates the columns: spreadsheets of some countries write semicolons."""

    def columns(mark: str) -> list[str]:
        return [spelled(cell) for cell in next(csv.reader([header], delimiter=mark, skipinitialspace=True), [])]

    return max(",;\t|", key=lambda mark: (text_column in columns(mark), len(columns(mark))))


def _rows(name: str, lines: list[str], delimiter: str, columns: Columns, notes: list[str]) -> list[Row]:
    """The header and the rows, after it is decided for the whole file whether quotation marks quote.

    They do in CSV as programs write it: a quoted text may hold separators and line ends. In many tab-separated files
    they are part of the texts, and one that opens a text would then swallow all rows up to the next. So the file is
    read in both ways, and each is taken for what it makes of the rows.

    Raises:
        ValueError: neither way gives rows as long as the header, or both ways could be meant.
    """

    def read(quoting: int) -> list[Row] | ValueError:
        try:
            return _rows_of_one_length(name, lines, delimiter, quoting, columns)
        except ValueError as error:
            return error

    quoted = read(csv.QUOTE_MINIMAL)
    literal: list[Row] | ValueError = quoted
    if any(_opens_with_quote(line, delimiter) for line in lines):
        literal = read(csv.QUOTE_NONE)
    if isinstance(literal, list) and literal is not quoted:
        swallows = isinstance(quoted, ValueError) or _swallowed(quoted, lines, delimiter, columns) is not None
        if (swallows or delimiter == "\t") and not _quotes_quote(literal, columns.text):
            notes.append("quotation marks are read as part of the texts, since they do not enclose fields")
            return literal
    if isinstance(quoted, ValueError):
        raise quoted
    if row := _swallowed(quoted, lines, delimiter, columns):
        raise ValueError(
            f"{name}, line {row.line}: the quotation mark that opens here closes in line {row.last_line}, and whole "
            "rows stand between; close it earlier, or double the marks that belong to a text."
        )
    if several := [row for row in quoted if row.last_line > row.line]:
        longest = max(several, key=lambda row: row.last_line - row.line)
        span = f"lines {longest.line} to {longest.last_line}"
        notes.append(f"rows that span several lines: {len(several):,}, the longest {name}, {span}")
    return quoted


def _opens_with_quote(line: str, delimiter: str) -> bool:
    return '"' in line and any(field.lstrip(" ").startswith('"') for field in line.split(delimiter))


def _rows_of_one_length(name: str, lines: list[str], delimiter: str, quoting: int, columns: Columns) -> list[Row]:
    """The header, its cells without the space around them, and the rows, each with as many fields.

    Raises:
        ValueError: a column is missing, a row is longer or shorter, or a quoted field does not end where it should.
    """
    # Space behind a separator means nothing, since texts and labels are stripped; before a quotation mark it must go.
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {line}: {error}; check the quotes from this line on.") from error
        if fields is None:
            break
        if not any(field.strip() for field in fields) and len(fields) < 2:  # an empty line
            continue
        if not rows:
            fields = [spelled(cell) for cell in fields]
            columns.require(name, fields)
        elif len(fields) != len(rows[0].fields):
            raise ValueError(
                f"{name}, line {line}: {count(len(fields), 'field')} where the header has {len(rows[0].fields)}; "
                "put texts that hold the separator into quotes."
            )
        rows.append(Row(line, reader.line_num, fields))
    if not rows:
        columns.require(name, [])
    return rows


def _quotes_quote(literal: list[Row], text_column: str) -> bool:
    """Whether quotation marks, read as any other character, are where a program that quotes puts them.

    Such a program quotes the other columns too, or all texts, or a text that holds the mark itself, which it doubles.
    """
    text_at = literal[0].fields.index(text_column)
    texts = [row.fields[text_at].strip() for row in literal[1:]]
    others = (field for row in literal for index, field in enumerate(row.fields) if index != text_at)
    return (
        any(field.strip().startswith('"') for field in others)
        or all(text.startswith('"') for text in texts)
        or any(re.fullmatch(r'".*"".*"', text) for text in texts)
    )


def _swallowed(quoted: list[Row], lines: list[str], delimiter: str, columns: Columns) -> Row | None:
    """The first row whose quoted text holds lines that are rows by themselves; None where there is none.

    The first line of a row, or the last, may look like one by chance. What lies between, or both of them, does not.
    """
    header = quoted[0].fields
    label_at = header.index(columns.label) if columns.label in header else None
    alone = [row.fields for row in quoted[1:] if row.line == row.last_line]
    labels = set() if label_at is None else {fields[label_at].strip() for fields in alone} - {""}

    def is_row(number: int) -> bool:
        fields = lines[number - 1].rstrip("\n").split(delimiter)
        return len(fields) == len(header) and (label_at is None or fields[label_at].strip(' "') in labels)

    for row in quoted[1:]:
        inner = [is_row(number) for number in range(row.line + 1, row.last_line)]
        ends = row.last_line > row.line and len(header) > 1 and is_row(row.line) and is_row(row.last_line)
        if (label_at is not None and any(inner)) or (ends and all(inner)):
            return row
    return None


# JSON


def _from_json(name: str, text: str, columns: Columns) -> Iterator[Record]:
    """Records from JSON Lines, or from one list of objects."""
    seen: dict[str, None] = {}
    for place, fields in _objects(name, text):
        if not isinstance(fields, dict):
            raise ValueError(f"{place}: {short(json.dumps(fields))} is no object; write one object on each line.")
        seen |= dict.fromkeys(fields)
        if columns.text not in fields:
            columns.require(place, list(fields))
        yield Record(place, fields[columns.text], fields.get(columns.label) if columns.label else None)
    if seen:  # a row may lack its label, but not every row
        columns.require(name, list(seen))


def _objects(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON file with its place: one on each line, or the items of a list."""
    lines = _lines(text)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("[") and not _is_json(first):  # a list over several lines
        try:
            items = _loads(text)
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            raise ValueError(
                f"{name}, line {line}: no JSON ({_message(error)}); write one object on each line."
            ) from error
        yield from ((f"{name}, item {number}", item) for number, item in enumerate(items, start=1))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _loads(line)
        except ValueError as error:
            raise ValueError(
                f"{name}, line {number}: no JSON ({_message(error)}); write one object on each line."
            ) from error
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):  # a list on one line
            yield from ((f"{name}, line {number}, item {item}", fields) for item, fields in enumerate(value, start=1))
        else:
            yield f"{name}, line {number}", value


def _loads(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none, names something twice, or is nested too deep.
    """

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):
            repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise ValueError(f"{repeated!r} comes twice in an object")
        return named

    try:
        return json.loads(text, object_pairs_hook=fields)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _is_json(text: str) -> bool:
    try:
        _loads(text)
    except ValueError:
        return False
    return True


def _message(error: ValueError) -> str:
    """What is wrong, without the position, which says nothing about a file."""
    return getattr(error, "msg", str(error).partition(";")[0])


# Tables with types


def _from_parquet(path: Path, columns: Columns) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:  # not `read_table`, which makes columns of the names of folders
            schema = file.schema_arrow
            names = [name for name in schema.names if name in columns[:2]]
            table = file.read(columns=list(dict.fromkeys(names)))
    except Exception as error:  # pyarrow's errors have no common ancestor of their own
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise ValueError(f"{path.name} can't be read as Parquet ({reason}); write it anew.") from error
    columns.require(path.name, schema.names)
    labels = table[columns.label] if columns.label in schema.names else None
    feature = None if labels is None else _feature(schema, columns.label)
    texts = table[columns.text].to_pylist()
    yield from _records(path.name, texts, None if labels is None else labels.to_pylist(), feature)


def _feature(schema: pa.Schema, column: str) -> Any:
    """What `datasets` wrote down about a column, above all the names of its classes; None where it can't be read."""
    try:
        return datasets.Features.from_arrow_schema(pa.schema([schema.field(column)], schema.metadata))[column]
    except Exception:  # metadata of any program, or a type that datasets does not know; the values are what counts
        return None


def _from_hub(name: str, split: datasets.Dataset, columns: Columns) -> Iterator[Record]:
    columns.require(name, split.column_names)
    labelled = columns.label in split.column_names
    labels = split[columns.label][:] if labelled else None
    yield from _records(name, split[columns.text][:], labels, split.features[columns.label] if labelled else None)


def _records(name: str, texts: list[Any], labels: list[Any] | None, feature: Any) -> Iterator[Record]:
    """The rows of a table with types.

    Args:
        name: of the table, for the place of a row.
        texts: as they are.
        labels: as they are; None where there are none.
        feature: what is known about the labels. Numbers with names (`ClassLabel`) become these names.
    """
    names = getattr(feature, "names", None)
    narrow = getattr(feature, "dtype", None) == "float32"
    for row, text in enumerate(texts, start=1):
        place, label = f"{name}, row {row}", None if labels is None else labels[row - 1]
        if names and isinstance(label, int):
            label = class_name(label, names, place)
        elif narrow and isinstance(label, float) and abs(label) >= _EXACT_FLOAT32:
            raise ValueError(_rounded(place, label))
        yield Record(place, text, label)


def class_name(number: int, names: Sequence[str], place: str) -> str | None:
    """The name of a class that is given by its number; None for `NO_CLASS`, which says that there is no label.

    Raises:
        ValueError: there is no such class.
    """
    if number in NO_CLASS:
        return None
    if not 0 <= number < len(names):
        raise ValueError(
            f"{place}: the label {number} is none of the {len(names)} classes that the file names; give 0 to "
            f"{len(names) - 1}, or -1 for none."
        )
    return names[number]


# Texts and labels


def short(value: object) -> str:
    """What was given, as it fits into a sentence."""
    shown = repr(value.strip() if isinstance(value, str) else value)
    return shown if len(shown) <= 50 else f"{shown[:45]} …"


def count(number: int, noun: str) -> str:
    """A number with its noun, which has an s unless there is one of it."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _frame(records: Iterable[Record], notes: list[str]) -> pd.DataFrame:
    """The rows as `read_texts` returns them; notes may still grow while the records are read."""
    rows, respelled = [], Counter()
    for record in records:
        text, label = as_text(record), as_label(record)
        rows.append((text, label, record.place))
        if label is not None and isinstance(record.label, str) and record.label.strip() != label:
            respelled[record.label, label] += 1
    frame = pd.DataFrame(rows, columns=["text", "label", "place"], dtype=object)
    if respelled:
        (written, label), _ = respelled.most_common(1)[0]
        notes.append(
            f"labels whose spaces or Unicode characters are made alike: {respelled.total():,}, as {written!r} to "
            f"{label!r}"
        )
    frame.attrs["notes"] = notes
    return frame


def as_text(record: Record) -> str:
    """The text without surrounding space; "" where there is none.

    Raises:
        ValueError: something else than text stands there, or half a character.
    """
    if _is_missing(record.text):
        return ""
    if not isinstance(record.text, str):
        raise ValueError(f"{record.place}: {short(record.text)} is no text; give text, or name the right text_column.")
    _require_whole_characters(record.place, record.text)
    return record.text.strip() if spelled(record.text) else ""


def as_label(record: Record) -> str | None:
    """The label as a name; None where there is none. A name keeps its spelling, see `spelled`.

    Raises:
        ValueError: neither a name nor a whole number stands there.
    """
    label = record.label
    if _is_missing(label):
        return None
    if isinstance(label, (list, dict)):
        raise ValueError(
            f"{record.place}: the label {short(label)} is a list or an object; give each text one label, since every "
            "text belongs to one class here."
        )
    if isinstance(label, (float, decimal.Decimal)) and math.isfinite(label) and label == int(label):
        if isinstance(label, float) and abs(label) >= _EXACT:
            raise ValueError(_rounded(record.place, label))
        label = int(label)
    if not isinstance(label, (str, int)):
        raise ValueError(
            f"{record.place}: the label {short(label)} is neither a name nor a whole number; give one of them."
        )
    _require_whole_characters(record.place, str(label))
    name = spelled(str(label))
    return None if name.casefold() in NO_LABEL else name


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, (float, decimal.Decimal)) and math.isnan(value))


def _require_whole_characters(place: str, text: str) -> None:
    if _SURROGATE.search(text):
        raise ValueError(
            f"{place}: {short(text)} holds half of a character (a lone surrogate, as of an emoji that was cut); repair "
            "or remove it."
        )


def _rounded(place: str, label: object) -> str:
    """The sentence about a number that may stand for several."""
    return (
        f"{place}: the label {label} was stored as a float, which can't tell whole numbers of this size apart; store "
        "the labels as text or as integers."
    )


def spelled(name: str) -> str:
    """A name in the one spelling of all that look like it: Unicode form NFC, single spaces, no unseen characters."""
    return _ENDS.sub("", _SPACE.sub(" ", unicodedata.normalize("NFC", _UNSEEN.sub("", name))))


def unify_numbers(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Let 2.0, as spreadsheets write, be the label 2, in place.

    Only where all numbers among the labels of all frames are whole and written so: beside the codes 01 or 1.5, the
    label 1.0 is a code as well.

    Args:
        frames: with `label` and `place`, see `read_texts`.

    Returns:
        A note if labels were changed.

    Raises:
        ValueError: a number is so long that the float it was stored as may stand for several.
    """
    first = pd.concat([frame[["label", "place"]].dropna().drop_duplicates("label") for frame in frames.values()])
    places = dict(zip(first["label"], first["place"], strict=True))
    numbers = [name for name in places if _NUMBER.fullmatch(name)]
    whole = {name: match for name in numbers if (match := _PLAIN_WHOLE.fullmatch(name))}
    for name in numbers:
        digits = whole[name][1].lstrip("-") if name in whole and whole[name][2] else ""
        if _SHORTENED.fullmatch(name) or (len(digits), digits) >= (len(str(_EXACT)), str(_EXACT)):
            raise ValueError(_rounded(places[name], name))
    if len(whole) < len(numbers):
        return []
    changed = {name: "0" if match[1] == "-0" else match[1] for name, match in whole.items()}
    for frame in frames.values():
        frame["label"] = pd.Series([changed.get(name, name) for name in frame["label"]], frame.index, dtype=object)
    written = sorted(name for name, plain in changed.items() if name != plain)
    return [f"labels read as whole numbers: {', '.join(written[:10])}"] if written else []


def label_names(labelled: pd.DataFrame, source: str) -> tuple[str, ...]:
    """The classes, in the order of their numbers when all are whole numbers, else of the alphabet.

    Args:
        labelled: rows with `label` and `place`.
        source: for the sentence.

    Raises:
        ValueError: fewer than 2 or more than 1,000 classes, names that look alike, are no names, or are fractions.
    """
    names = labelled["label"].unique().tolist()
    if not 2 <= len(names) <= MAX_CLASSES:
        few = "" if len(names) > 1 else f" ({short(names[0])})" if names else ""
        way_out = "" if names else f", or {WITHOUT_LABELS}"
        raise ValueError(
            f"{source} has {count(len(names), 'label')}{few}; have 2 to {MAX_CLASSES:,}, or name the right "
            f"label_column{way_out}."
        )
    alike: dict[str, str] = {}
    for name, place in labelled.drop_duplicates("label")[["label", "place"]].itertuples(index=False):
        _require_name(place, name)
        other = alike.setdefault(_look(name), name)
        if other != name:
            case = name.casefold() == other.casefold()
            what = "in case" if case else "in characters that look alike"
            raise ValueError(f"{place}: the label {name!r} differs from {other!r} {what} only; write them alike.")
    if not all(map(_NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=str.casefold))
    if fractions := [name for name in names if not _WHOLE.fullmatch(name) and not float(name).is_integer()]:
        place = labelled.loc[labelled["label"] == fractions[0], "place"].iloc[0]
        raise ValueError(f"{place}: the label {fractions[0]} is a fraction; give classes as names or whole numbers.")
    return tuple(sorted(names, key=_by_value if all(map(_WHOLE.fullmatch, names)) else str.casefold))


def _by_value(name: str) -> tuple[int, str]:
    return int(name), name


def _require_name(place: str, name: str) -> None:
    """Refuse a label that can't be the name of a class."""
    if len(name) > LONGEST_LABEL:
        raise ValueError(
            f"{place}: the label {short(name)} has {len(name):,} characters; name the right label_column, or shorten "
            f"it to {LONGEST_LABEL:,}."
        )
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise ValueError(f"{place}: the label {short(name)} holds a control character; remove it.")


def _look(name: str) -> str:
    """What two names that look alike have in common: case, compatible forms, joiners and a trailing `.0` aside."""
    folded = unicodedata.normalize("NFKC", _HARDLY_SEEN.sub("", name)).casefold()
    return match[1] if (match := _PLAIN_WHOLE.fullmatch(folded)) else folded


def doubtful(names: Sequence[str]) -> list[str]:
    """Classes whose names may have been meant to say that there is no label."""
    numbers = [name for name in names if _WHOLE.fullmatch(name)]
    negative = [name for name in numbers if int(name) in NO_CLASS]
    others = [int(name) for name in numbers if name not in negative]
    as_numbers = negative if len(numbers) == len(names) and others and min(others) == 0 else []
    return [*as_numbers, *(name for name in names if name.casefold() in ("none", "null", "na", r"\n"))]
