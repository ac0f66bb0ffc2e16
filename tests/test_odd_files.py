"""Odd files and odd columns of labels: each is read with the right value, or refused with this whole sentence.

Every file holds `ROWS`, with something odd about how it is written, or beside it. What is expected is every text with
the name of its label (None for a text without one), or the sentence.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import nbformat
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from support.models import tiny_bert

from kd_helpers import artifacts, data, own_data
from kd_helpers.config import PATHS, DistillConfig
from kd_helpers.experiments import sweep
from kd_helpers.models import freeze, save_model
from kd_helpers.runs import distill, load_run
from kd_helpers.shards import cache_shards, missing_shards, read_shards

NUL = "there is a NUL character, so this is no UTF-8 text or a damaged one; save it as UTF-8, or remove the character."
NOT_TEXT = (
    "whatever its name says; give a file of text (save a spreadsheet as CSV, unpack an archive), or name it by what it "
    "is."
)
NO_PARQUET = (
    "can't be read as Parquet (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
    "parquet file); write it anew."
)
HALF = "holds half of a character (a lone surrogate, as of an emoji that was cut); repair or remove it."
SEVERAL = "is a list or an object; give each text one label, since every text belongs to one class here."
FLOAT = (
    "was stored as a float, which can't tell whole numbers of this size apart; store the labels as text or as integers."
)
ALIKE = "in characters that look alike only; write them alike."
WITHOUT_LABELS = "distil without labels (alpha=1, teacher_epochs=0 and a fine-tuned teacher_checkpoint)"

ROWS = {f"review number {index}": "good" if index % 3 else "bad" for index in range(24)}
TEXTS = list(ROWS)
Labels = Mapping[str, str | None]


class Odd(NamedTuple):
    """One odd file.

    Attributes:
        name: of the test.
        content: what is in the file, or a function that makes it at a path.
        expected: every text with the name of its label, or the sentence with which the file is refused.
        file: its name.
        columns: settings that name the columns.
        notes: what the notes say among other things.
    """

    name: str
    content: str | bytes | Callable[[Path], object]
    expected: Labels | str
    file: str = "a.csv"
    columns: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()


def csv(rows: Labels = ROWS, *, header: str = "text,label", mark: str = ",", more: Iterable[str] = ()) -> str:
    """A CSV file of rows, then of further lines."""
    return "\n".join([header, *(f"{text}{mark}{label}" for text, label in rows.items()), *more, ""])


def tsv(rows: Labels = ROWS, **options: Any) -> str:
    return csv(rows, header="text\tlabel", mark="\t", **options)


def labelled(labels: Iterable[object], *, texts: Iterable[str] = TEXTS) -> dict[str, Any]:
    """The texts of `ROWS` with these labels, over and over."""
    labels = list(labels)
    return {text: labels[index % len(labels)] for index, text in enumerate(texts)}


def jsonl(rows: Mapping[str, object] = ROWS, more: Iterable[str] = ()) -> str:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows.items()]
    return "\n".join([*lines, *more, ""])


def parquet(labels: Any, kind: pa.DataType | None = None, text: pa.DataType | None = None) -> Callable[[Path], None]:
    """The texts of `ROWS` with these labels, over and over, in Parquet."""

    def write(path: Path) -> None:
        values = pa.array(list(labelled(labels).values()), kind)
        pq.write_table(pa.table({"text": pa.array(TEXTS, text), "label": values}), path)

    return write


def named_classes(numbers: Iterable[int | None]) -> Callable[[Path], None]:
    """Numbers with names, as `datasets` writes them."""

    def write(path: Path) -> None:
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
        rows = {"text": TEXTS, "label": list(labelled(numbers).values())}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))

    return write


def a_number_without_name(path: Path) -> None:
    classes = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    table = pa.table({"text": TEXTS, "label": list(labelled([0, 1, 2]).values())})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": classes}})}), path)


def a_link(path: Path) -> None:
    Path("elsewhere.csv").write_text(csv())
    path.symlink_to("elsewhere.csv")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("gone.csv")


def a_folder(path: Path) -> None:
    path.mkdir()


def in_a_folder_that_looks_like_a_column(path: Path) -> None:
    path.parent.mkdir()
    parquet(["bad", "good"])(path)


# Encodings, line ends and kinds of files

FILES = [
    Odd("UTF-8 with a byte order mark", b"\xef\xbb\xbf" + csv().encode(), ROWS),
    Odd(
        "UTF-16, as Excel saves Unicode text",
        tsv({**ROWS, "schön": "good"}).encode("utf-16"),
        {**ROWS, "schön": "good"},
    ),
    Odd("UTF-16 from the big end", b"\xfe\xff" + csv().encode("utf-16-be"), ROWS),
    Odd("UTF-32", csv().encode("utf-32"), ROWS),
    Odd("JSON in UTF-16", jsonl().encode("utf-16"), ROWS, "a.jsonl"),
    Odd(
        "UTF-16 without its mark",
        csv().encode("utf-16-le"),
        f"a.csv, line 1: {NUL}",
    ),
    Odd(
        "UTF-16 that was cut",
        csv().encode("utf-16")[:-1],
        "a.csv, line 25: the file is not UTF-16; save it as UTF-8.",
    ),
    Odd(
        "NUL in a text",
        csv(more=["da\0maged,good"]),
        f"a.csv, line 26: {NUL}",
    ),
    Odd(
        "Latin-1",
        csv(more=["schön,good"]).encode("latin-1"),
        "a.csv, line 26: the file is not UTF-8; save it as UTF-8.",
    ),
    Odd("carriage returns as line ends", csv().replace("\n", "\r"), ROWS),
    Odd("a carriage return in a text", csv(more=["split\rin two,good"]), {**ROWS, "split in two": "good"}),
    Odd("no line end at the end", csv().rstrip("\n"), ROWS),
    Odd("empty lines and lines of spaces", csv().replace("\n", "\n\n  \n"), ROWS),
    Odd("form feeds in texts", csv(more=["page\fbreak,good"]), {**ROWS, "page\fbreak": "good"}),
    Odd("a symbolic link", a_link, ROWS),
    Odd(
        "a link to nothing",
        a_dangling_link,
        "there is no file 'a.csv' in {here}; check the path.",
    ),
    Odd("a folder", a_folder, "'a.csv' is a folder; give one file."),
    Odd("a folder of Parquet files", a_folder, "'a.parquet' is a folder; give one file.", "a.parquet"),
    Odd(
        "a gzip archive that is called CSV",
        gzip.compress(csv().encode()),
        "a.csv is a gzip archive, whatever its name says; give a file of text (save a spreadsheet as CSV, unpack an "
        "archive), or name it by what it is.",
    ),
    Odd(
        "a workbook that is called CSV",
        b"PK\x03\x04\x14\x00\x06\x00",
        f"a.csv is an Excel workbook or a ZIP archive, {NOT_TEXT}",
    ),
    Odd(
        "Parquet that is called CSV",
        parquet(["bad", "good"]),
        "a.csv is a Parquet file, whatever its name says; give a file of text (save a spreadsheet as CSV, unpack an "
        "archive), or name it by what it is.",
    ),
    Odd(
        "CSV that is called Parquet",
        csv(),
        f"a.parquet {NO_PARQUET}",
        "a.parquet",
    ),
    Odd(
        "CSV that is called JSON",
        csv(),
        "a.json, line 1: no JSON (Expecting value); write one object on each line.",
        "a.json",
    ),
    Odd(
        "a packed file",
        gzip.compress(csv().encode()),
        "'a.csv.gz' can't be read; give a file that ends in .csv, .tsv, .jsonl, .json, .parquet (save a spreadsheet as "
        "CSV, unpack an archive), or as data the name OWNER/NAME of a hub dataset.",
        "a.csv.gz",
    ),
    Odd(
        "Parquet in a folder that looks like a column",
        in_a_folder_that_looks_like_a_column,
        labelled(["bad", "good"]),
        "label=fair/a.parquet",
    ),
]

# Headers, separators and quotation marks

QUOTED_LINE = '"the whole text"'
STRAY = tsv(
    {
        **{f'"{text}' if index in (5, 17) else text: label for index, (text, label) in enumerate(ROWS.items())},
        'ends with a mark"': "good",
        QUOTED_LINE: "bad",
        'a "quoted" word': "good",
    }
)

SHAPES = [
    Odd(
        "empty cells in the header",
        csv({f"{i},{t},": y for i, (t, y) in enumerate(ROWS.items())}, header=",text,,label"),
        ROWS,
    ),
    Odd("another column twice", csv({f"1,2,{t}": y for t, y in ROWS.items()}, header="n,n,text,label"), ROWS),
    Odd("a separator at the end of every line", csv().replace("\n", ",\n"), ROWS),
    Odd(
        "spaces around the separators",
        csv(mark=" , ", header="text , label", more=['"a, b", good']),
        {**ROWS, "a, b": "good"},
    ),
    Odd(
        "a space behind a closing quotation mark",
        csv(more=['"a, b" , good']),
        "a.csv, line 26: ',' expected after '\"'; check the quotes from this line on.",
    ),
    Odd("a byte order mark twice", "\ufeff\ufeff" + csv(), ROWS),
    Odd("vertical bars", csv(mark="|", header="text|label"), ROWS),
    Odd("Excel's line about the separator", "sep=;\n" + csv(mark=";", header="text;label"), ROWS),
    Odd("an upper-case name of a file", csv(), ROWS, "A.CSV"),
    Odd("rows of nothing but separators", csv(more=[",", ",", " , "]), ROWS),
    Odd(
        "a text over several lines",
        csv(more=['"good,', 'or not",good']),
        {**ROWS, "good,\nor not": "good"},
        notes=("train, rows that span several lines: 1, the longest a.csv, lines 26 to 27",),
    ),
    Odd(
        "labels first, a text over several lines",
        csv({}, header="label,text", more=[*(f"{y},{t}" for t, y in ROWS.items()), 'good,"over', 'two lines"']),
        {**ROWS, "over\ntwo lines": "good"},
    ),
    Odd("a text of 300,000 characters", csv(more=["x" * 300_000 + ",good"]), {**ROWS, "x" * 300_000: "good"}),
    Odd("quotation marks within texts", csv(more=['5" nails,good']), {**ROWS, '5" nails': "good"}),
    Odd("everything quoted", csv({f'"{t}"': f'"{y}"' for t, y in ROWS.items()}, header='"text","label"'), ROWS),
    Odd(
        "tab-separated, written by a program that quotes",
        tsv(more=['"""quoted"" text"\tgood']),
        {**ROWS, '"quoted" text': "good"},
        "a.tsv",
    ),
    Odd(
        "tab-separated with raw quotation marks",
        STRAY,
        dict(line.split("\t") for line in STRAY.splitlines()[1:]),
        "a.tsv",
        notes=("train, quotation marks are read as part of the texts, since they do not enclose fields",),
    ),
    Odd(
        "comma-separated with raw quotation marks",
        csv(more=['"Great" film,good', '"unfinished,bad']),
        {**ROWS, '"Great" film': "good", '"unfinished': "bad"},
    ),
    Odd(
        "a quotation mark that swallows rows",
        csv(more=['"begins,good', "one,bad", "two,good", 'ends",bad', '"with, comma",good']),
        "a.csv, line 26: the quotation mark that opens here closes in line 29, and whole rows stand between; close it "
        "earlier, or double the marks that belong to a text.",
    ),
    Odd(
        "everything quoted, one mark forgotten",
        csv(
            {f'"{t}"': f'"{y}"' for t, y in ROWS.items()},
            header='"text","label"',
            more=['"forgotten,"good"', '"x","bad"'],
        ),
        "a.csv, line 26: ',' expected after '\"'; check the quotes from this line on.",
    ),
    Odd(
        "a quotation mark that never closes",
        csv(more=['"open, and,good']),
        "a.csv, line 26: unexpected end of data; check the quotes from this line on.",
    ),
    Odd("a header only", "text,label\n", "a.csv has no rows; give it some."),
    Odd(
        "nothing",
        "\n\n",
        "a.csv has no column 'text' but none; name the right one as text_column.",
    ),
    Odd(
        "no header",
        csv(header="the first review,good"),
        "a.csv has no column 'text' but 'the first review', 'good'; name the right one as text_column.",
    ),
    Odd(
        "the header in capitals",
        csv(header="Text,Label"),
        "a.csv has no column 'text' but 'Text', 'Label'; name the right one as text_column.",
    ),
    Odd(
        "no column of labels",
        "text,stars\nfine,5\n",
        "a.csv has no column 'label' but 'text', 'stars'; name the right one as label_column, or distil without labels "
        "(alpha=1, teacher_epochs=0 and a fine-tuned teacher_checkpoint).",
    ),
    Odd(
        "the column of the labels twice",
        csv(header="text,label").replace("\n", ",x\n").replace("label,x", "label, label "),
        "a.csv has 2 columns 'label'; keep one.",
    ),
    Odd(
        "a short row",
        csv(more=["alone"]),
        "a.csv, line 26: 1 field where the header has 2; put texts that hold the separator into quotes.",
    ),
    Odd(
        "a separator at the end of one line",
        csv(more=["well, yes,"]),
        "a.csv, line 26: 3 fields where the header has 2; put texts that hold the separator into quotes.",
    ),
    Odd(
        "a comment in front",
        "# made by hand\n" + csv(),
        "a.csv has no column 'text' but '# made by hand'; name the right one as text_column.",
    ),
    Odd(
        "a comment between rows",
        csv(more=["# the rest was judged later"]),
        "a.csv, line 26: 1 field where the header has 2; put texts that hold the separator into quotes.",
    ),
    Odd(
        "two kinds of rows",
        csv(more=["review;good"]),
        "a.csv, line 26: 1 field where the header has 2; put texts that hold the separator into quotes.",
    ),
]

# JSON

OBJECTS = [{"text": text, "label": label} for text, label in ROWS.items()]

JSON = [
    Odd("a list over many lines", json.dumps(OBJECTS, indent=2), ROWS, "a.json"),
    Odd("a list on one line", json.dumps(OBJECTS), ROWS, "a.json"),
    Odd("a list in a file of lines", json.dumps(OBJECTS, indent=0), ROWS, "a.jsonl"),
    Odd(
        "further keys, and no label",
        jsonl(more=['{"text": "no label", "id": 7}']),
        {**ROWS, "no label": None},
        "a.jsonl",
    ),
    Odd(
        "null and NaN",
        jsonl(labelled(["good", "bad"]) | {"a": None, "b": float("nan")}),
        labelled(["good", "bad"]) | {"a": None, "b": None},
        "a.jsonl",
    ),
    Odd(
        "1, 1.0 and the text 1",
        jsonl(labelled([1, 1.0, "1", 0, 0.0, "0.0"])),
        labelled(["1", "1", "1", "0", "0", "0"]),
        "a.jsonl",
    ),
    Odd("true and false", jsonl(labelled([True, False])), labelled(["True", "False"]), "a.jsonl"),
    Odd(
        "codes of 20 digits",
        jsonl(labelled([10**19 + 1, 10**19 + 2])),
        labelled([str(10**19 + 1), str(10**19 + 2)]),
        "a.jsonl",
    ),
    Odd("an empty list", "[\n]", "a.json has no rows; give it some.", "a.json"),
    Odd(
        "a list of texts",
        json.dumps(TEXTS, indent=1),
        "a.json, item 1: '\"review number 0\"' is no object; write one object on each line.",
        "a.json",
    ),
    Odd(
        "a list that is damaged",
        json.dumps(OBJECTS, indent=2).replace('"review number 3"', "review number 3"),
        "a.json, line 15: no JSON (Expecting value); write one object on each line.",
        "a.json",
    ),
    Odd(
        "one object of columns",
        json.dumps({"text": TEXTS, "label": list(ROWS.values())}),
        "a.json, line 1: ['review number 0', 'review number 1', 'revie … is no text; give text, or name the right "
        "text_column.",
        "a.json",
    ),
    Odd(
        "rows within an object",
        json.dumps({"data": OBJECTS}),
        "a.json, line 1 has no column 'text' but 'data'; name the right one as text_column.",
        "a.json",
    ),
    Odd(
        "one object over many lines",
        json.dumps(OBJECTS[0], indent=1),
        "a.json, line 1: no JSON (Expecting property name enclosed in double quotes); write one object on each line.",
        "a.json",
    ),
    Odd(
        "an object in an object",
        jsonl({"a": {"name": "good"}}),
        f"a.jsonl, line 1: the label {{'name': 'good'}} {SEVERAL}",
        "a.jsonl",
    ),
    Odd(
        "a key twice",
        jsonl(more=['{"text": "torn", "label": "good", "label": "bad"}']),
        "a.jsonl, line 25: no JSON ('label' comes twice in an object); write one object on each line.",
        "a.jsonl",
    ),
    Odd(
        "a number as text",
        jsonl(more=['{"text": 12, "label": "good"}']),
        "a.jsonl, line 25: 12 is no text; give text, or name the right text_column.",
        "a.jsonl",
    ),
    Odd(
        "half an emoji",
        jsonl(more=['{"text": "so \\ud83d", "label": "good"}']),
        f"a.jsonl, line 25: 'so \\ud83d' {HALF}",
        "a.jsonl",
    ),
    Odd(
        "half an emoji as label",
        jsonl(more=['{"text": "so", "label": "\\ude00"}']),
        f"a.jsonl, line 25: '\\ude00' {HALF}",
        "a.jsonl",
    ),
    Odd(
        "nested without end",
        jsonl(more=['{"text": ' + "[" * 100_000]),
        "a.jsonl, line 25: no JSON (it is nested too deep); write one object on each line.",
        "a.jsonl",
    ),
    Odd(
        "a number without end",
        jsonl(more=['{"text": "x", "label": 1' + "0" * 5000 + "}"]),
        "a.jsonl, line 25: no JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5001 "
        "digits); write one object on each line.",
        "a.jsonl",
    ),
    Odd(
        "several labels a text",
        jsonl({"a": ["good", "short"]}),
        f"a.jsonl, line 1: the label ['good', 'short'] {SEVERAL}",
        "a.jsonl",
    ),
    Odd(
        "infinity as label",
        jsonl({"a": float("inf")}),
        "a.jsonl, line 1: the label inf is neither a name nor a whole number; give one of them.",
        "a.jsonl",
    ),
]

# Columns of labels in text

CAFE = ("caf\u00e9", "cafe\u0301")
LONG = "the customer writes about an order that " + "arrived late and " * 20
PILOT = "\U0001f469\u200d\u2708\ufe0f"

NAMES = [
    Odd("codes that begin with 0", csv(labelled(["01", "1", "0110", "110"])), labelled(["01", "1", "0110", "110"])),
    Odd(
        "codes of 17 digits",
        csv(labelled(["12345678901234567", "12345678901234568", "12345678901234569"])),
        labelled(["12345678901234567", "12345678901234568", "12345678901234569"]),
    ),
    Odd(
        "2 and 2.0, as spreadsheets write",
        csv(labelled(["2", "2.0", "1", "1.00"])),
        labelled(["2", "2", "1", "1"]),
        notes=("labels read as whole numbers: 1.00, 2.0",),
    ),
    Odd("versions", csv(labelled(["1.0", "1.1", "beta"])), labelled(["1.0", "1.1", "beta"])),
    Odd("whole floats beside names", csv(labelled(["1.0", "2.0", "other"])), labelled(["1", "2", "other"])),
    Odd("signs", csv(labelled(["+1", "-1"])), labelled(["+1", "-1"])),
    Odd("0 and -0.0", csv(labelled(["-0.0", "1.0"])), labelled(["0", "1"])),
    Odd(
        "names that look like numbers",
        csv(labelled(["1e3", "1000", "0x10", "16", "1_000"])),
        labelled(["1e3", "1000", "0x10", "16", "1_000"]),
    ),
    Odd(
        "-1 without names of classes",
        csv(labelled(["0", "1", "-1"])),
        labelled(["0", "1", "-1"]),
        notes=("counted as classes: -1; leave the field empty where a text has no label",),
    ),
    Odd(
        "None, null and NA",
        csv(labelled(["None", "null", "NA"])),
        labelled(["None", "null", "NA"]),
        notes=("counted as classes: NA, None, null; leave the field empty where a text has no label",),
    ),
    Odd(
        "nan and N/A",
        csv(labelled(["good", "bad"]) | {"a": "nan", "b": "N/A", "c": "<NA>"}),
        labelled(["good", "bad"]) | {"a": None, "b": None, "c": None},
    ),
    Odd(
        "names that differ in punctuation", csv(labelled(["C", "C++", "C#", "C."])), labelled(["C", "C++", "C#", "C."])
    ),
    Odd("dates", csv(labelled(["2024-01-01", "2024-01-02"])), labelled(["2024-01-01", "2024-01-02"])),
    Odd("True and False", csv(labelled(["True", "False"])), labelled(["True", "False"])),
    Odd("emoji", csv(labelled(["\U0001f600", "\U0001f622", PILOT])), labelled(["\U0001f600", "\U0001f622", PILOT])),
    Odd(
        "words from right to left, with marks",
        csv(labelled(["\u202bجيد\u202c", "جيد\u200f", "سيئ"])),
        labelled(["جيد", "جيد", "سيئ"]),
    ),
    Odd("a word with a joiner", csv(labelled(["می\u200cخواهم", "نه"])), labelled(["می\u200cخواهم", "نه"])),
    Odd("long names", csv(labelled([LONG + "one", LONG + "two"])), labelled([LONG + "one", LONG + "two"])),
    Odd("a name over two lines", csv(labelled(['"very\ngood"', "bad"])), labelled(["very good", "bad"])),
    Odd(
        "two Unicode forms of one name",
        csv(labelled([*CAFE, "bar"])),
        labelled([CAFE[0], CAFE[0], "bar"]),
        notes=(f"train, labels whose spaces or Unicode characters are made alike: 8, as {CAFE[1]!r} to {CAFE[0]!r}",),
    ),
    Odd(
        "no-break and double spaces",
        csv(labelled(["so so", "so\u00a0so", "so  so", "so\u202fso ", "bad"])),
        labelled(["so so", "so so", "so so", "so so", "bad"]),
    ),
    Odd(
        "zero-width spaces and byte order marks",
        csv(labelled(["good", "\ufeffgood", "go\u200bod", "good\u2060", "bad"])),
        labelled(["good", "good", "good", "good", "bad"]),
    ),
    Odd(
        "a label that can't be seen",
        csv({**ROWS, "nobody judged": "\u200b", "nor this": "\u00a0"}),
        {**ROWS, "nobody judged": None, "nor this": None},
    ),
    Odd(
        "a text that can't be seen",
        csv({**ROWS, "\u200b\ufeff": "good"}),
        ROWS,
        notes=("train, rows left out for want of a text: 1",),
    ),
    Odd(
        "copies of a text in two Unicode forms",
        csv({**ROWS, **dict.fromkeys(CAFE, "good")}),
        {**ROWS, CAFE[0]: "good"},
        notes=("train, rows left out as copies: 1",),
    ),
    Odd(
        "numbers as texts",
        csv({str(index): label for index, label in enumerate(ROWS.values())}),
        {str(index): label for index, label in enumerate(ROWS.values())},
    ),
    Odd(
        "names in two cases",
        csv({**ROWS, "x": "Good"}),
        "a.csv, line 26: the label 'Good' differs from 'good' in case only; write them alike.",
    ),
    Odd(
        "a joiner within a word",
        csv({**ROWS, "x": "go\u200cod"}),
        f"a.csv, line 26: the label 'go\\u200cod' differs from 'good' {ALIKE}",
    ),
    Odd(
        "wide letters",
        csv({**ROWS, "x": "ｇｏｏｄ"}),
        f"a.csv, line 26: the label 'ｇｏｏｄ' differs from 'good' {ALIKE}",
    ),
    Odd(
        "2.0 beside the code 02",
        csv(labelled(["02", "2", "2.0"])),
        f"a.csv, line 4: the label '2.0' differs from '2' {ALIKE}",
    ),
    Odd(
        "ratings",
        csv(labelled(["1.0", "1.5", "2.0"])),
        "a.csv, line 3: the label 1.5 is a fraction; give classes as names or whole numbers.",
    ),
    Odd(
        "codes that a spreadsheet shortened",
        csv(labelled(["1.23457E+16", "2"])),
        f"a.csv, line 2: the label 1.23457E+16 {FLOAT}",
    ),
    Odd(
        "codes that a program made floats",
        csv(labelled(["12345678901234568.0", "2.0"])),
        f"a.csv, line 2: the label 12345678901234568.0 {FLOAT}",
    ),
    Odd(
        "control characters",
        csv(labelled(["good\x1b[31m", "bad"])),
        "a.csv, line 2: the label 'good\\x1b[31m' holds a control character; remove it.",
    ),
    Odd(
        "texts in the column of labels",
        csv(labelled(["word " * 300, "bad"])),
        "a.csv, line 2: the label 'word word word word word word word word word … has 1,499 characters; name the right "
        "label_column, or shorten it to 1,000.",
    ),
    Odd(
        "one class",
        csv(labelled(["good"])),
        "a.csv has 1 label ('good'); have 2 to 1,000, or name the right label_column.",
    ),
    Odd(
        "two classes, of which one occurs once",
        csv(labelled(["good"]) | {"x": "bad"}),
        "a.csv: label 'bad' has 1 text once copies are removed; every class needs at least 3, one for each split that "
        "is made of this file.",
    ),
    Odd(
        "a number for each row",
        csv({f"text {index}": str(index) for index in range(1001)}),
        "a.csv has 1,001 labels; have 2 to 1,000, or name the right label_column.",
    ),
    Odd(
        "no labels",
        csv(labelled([""])),
        "a.csv has 0 labels; have 2 to 1,000, or name the right label_column, or distil without labels (alpha=1, "
        "teacher_epochs=0 and a fine-tuned teacher_checkpoint).",
    ),
    Odd(
        "an empty label_column",
        csv(),
        f"label_column is empty; name the column of the labels, or {WITHOUT_LABELS}.",
        columns={"label_column": ""},
    ),
]

# Columns of labels with types

CODE = 12345678901234567

TYPES = [
    Odd(
        "integers of 17 digits, some missing",
        parquet([CODE, CODE + 1, CODE + 2, None]),
        labelled([str(CODE), str(CODE + 1), str(CODE + 2), None]),
        "a.parquet",
    ),
    Odd("integers that pandas made floats", parquet([1.0, 0.0, None]), labelled(["1", "0", None]), "a.parquet"),
    Odd("booleans", parquet([True, False, None]), labelled(["True", "False", None]), "a.parquet"),
    Odd(
        "categories",
        parquet(["good", "bad"], pa.dictionary(pa.int8(), pa.string())),
        labelled(["good", "bad"]),
        "a.parquet",
    ),
    Odd("decimals", parquet([decimal.Decimal("1.00"), decimal.Decimal("2.00")]), labelled(["1", "2"]), "a.parquet"),
    Odd(
        "other kinds of text",
        parquet(["good", "bad"], pa.large_string(), pa.string_view()),
        labelled(["good", "bad"]),
        "a.parquet",
    ),
    Odd("numbers with names", named_classes([0, 1]), labelled(["bad", "good"]), "a.parquet"),
    Odd(
        "numbers with names, some hidden",
        named_classes([0, 1, -1, None]),
        labelled(["bad", "good", None, None]),
        "a.parquet",
    ),
    Odd("codes with leading zeros", parquet(["007", "7"]), labelled(["007", "7"]), "a.parquet"),
    Odd(
        "codes of 17 digits as floats",
        parquet([1.2345678901234568e16, 1.0]),
        f"a.parquet, row 1: the label 1.2345678901234568e+16 {FLOAT}",
        "a.parquet",
    ),
    Odd(
        "codes of 8 digits as small floats",
        parquet([1.0, 16777216.0], pa.float32()),
        f"a.parquet, row 2: the label 16777216.0 {FLOAT}",
        "a.parquet",
    ),
    Odd(
        "a fraction",
        parquet([0.0, 0.5]),
        "a.parquet, row 2: the label 0.5 is neither a name nor a whole number; give one of them.",
        "a.parquet",
    ),
    Odd(
        "dates with a type",
        parquet([datetime.date(2024, 1, 1)]),
        "a.parquet, row 1: the label datetime.date(2024, 1, 1) is neither a name nor a whole number; give one of them.",
        "a.parquet",
    ),
    Odd(
        "times",
        parquet([datetime.datetime(2024, 1, 1, 12)], pa.timestamp("us")),
        "a.parquet, row 1: the label datetime.datetime(2024, 1, 1, 12, 0) is neither a name nor a whole number; give "
        "one of them.",
        "a.parquet",
    ),
    Odd(
        "bytes",
        parquet([b"good", b"bad"]),
        "a.parquet, row 1: the label b'good' is neither a name nor a whole number; give one of them.",
        "a.parquet",
    ),
    Odd(
        "lists",
        parquet([["good"], ["bad", "long"]]),
        f"a.parquet, row 1: the label ['good'] {SEVERAL}",
        "a.parquet",
    ),
    Odd(
        "a number without a name",
        a_number_without_name,
        "a.parquet, row 3: the label 2 is none of the 2 classes that the file names; give 0 to 1, or -1 for none.",
        "a.parquet",
    ),
    Odd(
        "no texts but numbers",
        lambda path: pq.write_table(pa.table({"text": [1, 2], "label": ["good", "bad"]}), path),
        "a.parquet, row 1: 1 is no text; give text, or name the right text_column.",
        "a.parquet",
    ),
    Odd(
        "a column twice in Parquet",
        lambda path: pq.write_table(pa.table([pa.array(["x"])] * 3, names=["text", "label", "label"]), path),
        "a.parquet has 2 columns 'label'; keep one.",
        "a.parquet",
    ),
    Odd(
        "Parquet without rows",
        lambda path: pq.write_table(
            pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path
        ),
        "a.parquet has no rows; give it some.",
        "a.parquet",
    ),
    Odd(
        "Parquet that was cut",
        lambda path: path.write_bytes((parquet(["good", "bad"])(path), path.read_bytes()[:-30])[1]),
        f"a.parquet {NO_PARQUET}",
        "a.parquet",
    ),
]

TABLE = [*FILES, *SHAPES, *JSON, *NAMES, *TYPES]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the test works, as a reader does."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labels_of(splits: data.DataSplits) -> dict[str, str | None]:
    """Every text with the name of its label."""
    parts = (splits.train, splits.transfer, splits.validation, splits.test)
    names = dict(enumerate(splits.label_names))
    return {row["text"]: names.get(row["label"]) for part in parts for row in part}


@pytest.mark.parametrize("odd", TABLE, ids=lambda odd: odd.name)
def test_an_odd_file_is_read_rightly_or_refused_in_one_sentence(here: Path, odd: Odd) -> None:
    path = Path(odd.file)
    if callable(odd.content):
        odd.content(path)
    else:
        path.write_bytes(odd.content.encode() if isinstance(odd.content, str) else odd.content)
    config = DistillConfig(data=odd.file, **odd.columns)
    if isinstance(odd.expected, str):
        with pytest.raises((ValueError, OSError)) as caught:
            data.load_splits(config)
        assert type(caught.value) in (ValueError, FileNotFoundError)
        assert str(caught.value) == odd.expected.replace("{here}", str(here))
    else:
        splits = data.load_splits(config)
        assert labels_of(splits) == odd.expected
        assert set(odd.notes) <= set(splits.notes)


def test_the_table_is_long_and_names_each_case_once() -> None:
    assert len(TABLE) >= 100
    assert len({odd.name for odd in TABLE}) == len(TABLE)


def test_a_file_that_may_not_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.csv").write_text(csv())

    def refuse(path: Path) -> bytes:  # as the system does, but for the administrator
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"^'a.csv' can't be read: Permission denied; check the file and your rights\.$"):
        data.load_splits(DistillConfig(data="a.csv"))


@pytest.mark.parametrize("name", ["a\0.csv", "x" * 5000 + ".csv", "x" * 5000])
def test_a_path_that_no_system_takes(here: Path, name: str) -> None:
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"there is no file '|can't be read; give a file that ends"
    ):
        data.load_splits(DistillConfig(data=name))


def test_numbers_are_read_alike_in_all_splits(here: Path) -> None:
    """What the whole floats of one file mean, another file may say: a code of train makes them codes in test too."""
    Path("train.csv").write_text(csv(labelled(["1.0", "1.1", "beta"])))
    Path("test.csv").write_text(csv({"a": "1.0", "b": "beta", "c": "1.1"}))
    splits = data.load_splits(DistillConfig(data="train.csv", test_data="test.csv"))
    assert {row["text"]: splits.label_names[row["label"]] for row in splits.test} == {
        "a": "1.0",
        "b": "beta",
        "c": "1.1",
    }
    Path("train.csv").write_text(csv(labelled(["1", "2"])))
    Path("test.csv").write_text(csv({"a": "1.0", "b": "2.0"}))
    splits = data.load_splits(DistillConfig(data="train.csv", test_data="test.csv"))
    assert {row["text"]: splits.label_names[row["label"]] for row in splits.test} == {"a": "1", "b": "2"}


def test_no_line_is_joined_to_another_by_one_mark(here: Path) -> None:
    """One opening quotation mark used to swallow every row up to the next: 45 of 90."""
    rows = {f"tweet number {index}": ("no", "yes", "perhaps")[index % 3] for index in range(90)}
    for first, last in ((0, 44), (10, 55), (44, 89)):
        texts = [f'"{text}' if at == first else f'{text}"' if at == last else text for at, text in enumerate(rows)]
        marked = dict(zip(texts, rows.values(), strict=True))
        Path("a.tsv").write_text(tsv(marked))
        assert labels_of(data.load_splits(DistillConfig(data="a.tsv"))) == marked


def test_a_label_means_the_same_in_every_format(here: Path) -> None:
    rows = labelled(["good", "bad", None])
    frame = pd.DataFrame({"text": list(rows), "label": list(rows.values())})
    frame.to_csv("a.csv", index=False)
    frame.to_csv("a.tsv", index=False, sep="\t")
    frame.to_parquet("a.parquet")
    frame.to_json("a.json", orient="records")
    frame.to_json("a.jsonl", orient="records", lines=True)
    named_classes([1, 0, -1])(Path("names.parquet"))
    for file in ("a.csv", "a.tsv", "a.parquet", "a.json", "a.jsonl", "names.parquet"):
        assert labels_of(data.load_splits(DistillConfig(data=file))) == rows, file


def test_spelling_twice_changes_nothing() -> None:
    for name in ("Café", "cafe\u0301", " a\u00a0 b\u200b", "می\u200cخواهم", PILOT, "\u200d x \u200d", "\ufeff"):
        once = own_data.spelled(name)
        assert own_data.spelled(once) == once
        assert once == once.strip()


# Paths that begin with ~, which a shell does not replace in `--out=~/sweep`, nor Python anywhere


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder beside the folder in which the test works."""
    folder = here / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(here)
    return folder


def test_every_path_of_a_configuration_may_begin_with_the_home_folder(home: Path) -> None:
    config = DistillConfig(**{name: f"~/{name}" for name in PATHS}, text_column="~")
    assert {name: getattr(config, name) for name in PATHS} == {name: str(home / name) for name in PATHS}
    assert config.text_column == "~", "no path"
    assert config.replace(data="~").data == str(home)
    assert DistillConfig(data="./~/a.csv").data == "./~/a.csv"
    assert config == DistillConfig(**config.to_dict())


@pytest.mark.parametrize("name", PATHS)
def test_a_home_folder_of_nobody_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(
        f"{name} is '~nobody-here/a', but there is no user 'nobody-here' with a home folder; write the path out "
        "(./~nobody-here/a for a name that begins so)."
    )):  # fmt: skip
        DistillConfig(**{"data": "a.csv", name: "~nobody-here/a"})


def test_files_in_the_home_folder_are_read(home: Path) -> None:
    (home / "train.csv").write_text(csv())
    (home / "test.csv").write_text(csv({"held out": "good", "and this": "bad"}))
    (home / "validation.csv").write_text(csv({"to choose by": "bad"}))
    splits = data.load_splits(
        DistillConfig(data="~/train.csv", test_data="~/test.csv", validation_data="~/validation.csv")
    )
    assert labels_of(splits) == {**ROWS, "held out": "good", "and this": "bad", "to choose by": "bad"}
    assert len(own_data.read_texts("~/train.csv", text_column="text", label_column="label")["train"]) == len(ROWS)
    with pytest.raises(ValueError, match=r"^data is '~nobody-here/a.csv', but there is no user 'nobody-here'"):
        own_data.read_file("~nobody-here/a.csv", text_column="text", label_column="label")


def test_artifacts_may_be_in_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_ARTIFACTS", "~/kept")
    assert artifacts.artifacts_dir() == home / "kept"
    monkeypatch.setenv("KD_ARTIFACTS", "~nobody-here/kept")
    with pytest.raises(ValueError, match=r"^KD_ARTIFACTS is '~nobody-here/kept', but there is no user 'nobody-here'"):
        artifacts.artifacts_dir()


PARAMETERS = "\n".join([
    'preset: str = "offline"  # of the run', 'data: str = ""  # texts', 'test_data: str = ""  # texts',
    'teacher_checkpoint: str = ""  # a folder', 'seed: int = 0  # of the run', 'output_dir: str = ""  # where',
])  # fmt: skip
BODY = """import json, pathlib
pathlib.Path(output_dir).mkdir(parents=True)
pathlib.Path(output_dir, "metrics.json").write_text(json.dumps({"validation": {"accuracy": 1.0}}))"""


def sweepable(path: Path) -> Path:
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_a_sweep_knows_its_files_and_checkpoints_by_what_is_in_them(home: Path, tokenizer) -> None:
    """Changed texts in the home folder, and a teacher that was trained on, are other runs."""
    notebook = sweep.read_notebook(sweepable(home / "small.ipynb"))
    (home / "train.csv").write_text(csv())
    (home / "test.csv").write_text(csv({"held out": "good", "and this": "bad"}))
    save_model(home / "teacher", tiny_bert(), tokenizer)
    fixed = {"data": "~/train.csv", "test_data": "~/test.csv", "teacher_checkpoint": "~/teacher"}

    def run() -> str:
        (setting,) = sweep.plan(notebook, {"seed": [1]}, fixed)
        return setting.run.name

    names = [run()]
    assert run() == names[0]
    (home / "train.csv").write_text(csv({**ROWS, "one more": "good"}))
    names.append(run())
    (home / "test.csv").write_text(csv({"held out": "bad", "and this": "bad"}))
    names.append(run())
    save_model(home / "teacher", tiny_bert(seed=1), tokenizer)
    names.append(run())
    (home / "teacher" / "README.md").write_text("Trained anew.")
    assert run() == names[-1], "a description changes no result"
    settings = json.loads((home / "teacher" / "config.json").read_text())
    (home / "teacher" / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    names.append(run())
    vocabulary = json.loads((home / "teacher" / "tokenizer.json").read_text())
    vocabulary["normalizer"]["lowercase"] = not vocabulary["normalizer"]["lowercase"]
    (home / "teacher" / "tokenizer.json").write_text(json.dumps(vocabulary))
    names.append(run())
    assert len(set(names)) == len(names) == 6


def test_results_may_be_in_the_home_folder(home: Path, small_data, tokenizer, own_artifacts: Path) -> None:
    save_model(home / "student", tiny_bert(), tokenizer)
    config = DistillConfig(student_checkpoint="~/student", alpha=0.0, max_steps=1, precision="float32", device="cpu")
    run = distill(config, data=small_data, output_dir="~/run")
    assert run.folder == home / "run"
    assert load_run("~/run").metrics == run.metrics
    teacher = freeze(tiny_bert(seed=1))
    texts = small_data.test.select_columns(["text"]).select(range(4)).to_iterable_dataset()
    cache_shards(teacher, texts, tokenizer, "~/shards", max_length=16)
    assert missing_shards("~/shards") == []
    assert len(list(read_shards("~/shards"))) == 4
    assert not Path("~").exists()


def test_a_sweep_may_be_written_to_the_home_folder(home: Path, capsys: pytest.CaptureFixture) -> None:
    (home / "train.csv").write_text(csv())
    sweepable(home / "small.ipynb")
    arguments = ["~/small.ipynb", "-g", "seed=0", "-p", "data", "~/train.csv"]
    assert sweep.main([*arguments, "--out=~/swept", "--dry-run"]) == 0
    assert f"results in {home / 'swept'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        sweep.main([*arguments, "--out=~nobody-here/swept", "--dry-run"])
    assert refused.value.code == 2
    assert "--out is '~nobody-here/swept', but there is no user 'nobody-here'" in capsys.readouterr().err
    assert sweep.main([*arguments, "--out=~/swept"]) == 0
    assert sweep.collect("~/swept")["status"].tolist() == ["finished"]
    assert sweep.sweep("~/small.ipynb", {"seed": [0]}, fixed={"data": "~/train.csv"}, out="~/swept")[
        "seed"
    ].tolist() == [0]
    assert not Path("~").exists()
