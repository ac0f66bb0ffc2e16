from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from kd_helpers import data, own_data
from kd_helpers.config import DistillConfig

REVIEWS = [(f"review number {i}", "good" if i % 3 else "bad") for i in range(60)]


def csv(rows, header="text,label") -> str:
    return "\n".join([header, *(",".join(row) for row in rows)]) + "\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file beside which the test then works, as a reader does."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes | pd.DataFrame, name: str = "reviews.csv") -> str:
        if isinstance(content, pd.DataFrame):
            content.to_parquet(name)
        else:
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def load(source: str, **choices) -> data.DataSplits:
    return data.load_splits(DistillConfig(data=source, **choices))


def labels_of(splits: data.DataSplits) -> dict[str, str]:
    """Every labelled text with the name of its label."""
    parts = (splits.train, splits.validation, splits.test)
    return {row["text"]: splits.label_names[row["label"]] for part in parts for row in part}


def test_every_text_is_in_one_split_with_its_own_label(write):
    splits = load(write(csv(REVIEWS)))
    assert labels_of(splits) == dict(REVIEWS)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (43, 5, 12)
    assert splits.label_names == ("bad", "good")
    assert splits.notes[0] == "classes: bad (20), good (40)"
    assert splits.notes[-1] == (
        "train, labelled texts: 43; the student takes 43 (train_size), the teacher 43 (teacher_train_size)"
    )
    table = data.describe_splits(splits)
    assert table.loc["test"].tolist() == [4, 8, 0, 12]
    assert table.loc["transfer"].tolist() == [0, 0, 0, 0]


def test_formats_say_the_same(write):
    rows = [{"text": text, "label": label} for text, label in REVIEWS]
    wanted = load(write(csv(REVIEWS)))
    sources = [
        write("".join(json.dumps(row) + "\n" for row in rows), "reviews.jsonl"),
        write(pd.DataFrame(rows), "reviews.parquet"),
        write(csv(REVIEWS).replace(",", "\t"), "reviews.tsv"),
        write(csv(REVIEWS).replace(",", ";"), "semicolons.csv"),
        write(b"\xef\xbb\xbf" + csv(REVIEWS).replace("\n", "\r\n").encode(), "spreadsheet.csv"),
    ]
    for source in sources:
        splits = load(source)
        for part in ("train", "validation", "test"):
            assert getattr(splits, part).to_dict() == getattr(wanted, part).to_dict(), source


def test_the_split_does_not_depend_on_the_order_of_the_rows(write):
    one, other = load(write(csv(REVIEWS))), load(write(csv(REVIEWS[::-1]), "other.csv"))
    assert one.test.to_dict() == other.test.to_dict()


def test_quoted_texts_keep_commas_lines_and_odd_separators(write):
    odd = 'He said "no", then\nleft\x0b early \u2028 and cried'
    rows = [*REVIEWS, ('"' + odd.replace('"', '""') + '"', "bad")]
    assert labels_of(load(write(csv(rows))))[odd] == "bad"


def test_numbers_as_labels_are_ordered_as_numbers(write):
    rows = [(f"text {i}", label) for i, label in enumerate(["10", "9", "2.0", "-1"] * 5)]
    assert load(write(csv(rows))).label_names == ("-1", "2", "9", "10")
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(8)], "label": [1.0, 0.0] * 4})
    assert load(write(frame, "floats.parquet")).label_names == ("0", "1")


def test_rows_without_a_label_join_the_transfer_set(write):
    rows = [*REVIEWS, ("nobody judged this", ""), ("Review  NUMBER 1", ""), ("nor this", "")]
    splits = load(write(csv(rows)), train_size=20, transfer_size=10)
    hidden = set(splits.transfer["text"])
    assert len(hidden) == 12
    assert hidden >= {"nobody judged this", "nor this"}
    assert set(splits.transfer["label"]) == {-100}
    assert "train, texts without a label, for the transfer set: 2" in splits.notes


def test_a_text_without_a_label_that_is_held_out_is_not_trained_on(write):
    test = write("text,label\nReview number 1,good\nlast,bad\n", "test.csv")
    splits = load(write(csv([*REVIEWS, ("review  NUMBER 1", "")])), test_data=test)
    texts = {text.casefold() for text in splits.student_train["text"]}
    assert not texts & {"review number 1", "review  number 1"}


def test_copies_are_removed_within_and_across_splits(write):
    test = write(csv([("Review number 1", "good"), ("fresh", "bad")]), "test.csv")
    validation = write(csv([("fresh", "bad"), ("newer", "good"), ("newest", "bad")]), "validation.csv")
    rows = [*REVIEWS, ("review number 2", "good"), ("Torn", "good"), ("torn", "bad")]
    splits = load(write(csv(rows)), test_data=test, validation_data=validation)
    assert sorted(splits.test["text"]) == ["Review number 1", "fresh"]
    assert sorted(splits.validation["text"]) == ["newer", "newest"]
    assert len(splits.train) == 59
    assert {"Torn", "torn", "review number 1"}.isdisjoint(splits.train["text"])
    assert {
        "validation, rows left out because a held-out split has their text: 1",
        "train, rows left out because a held-out split has their text: 1",
        "train, rows left out because copies of them have another label: 2",
        "train, rows left out as copies: 1",
    } <= set(splits.notes)


def test_a_text_that_swallowed_others_is_seen_in_the_notes(write):
    swallowed = "\n".join(f"review number {i},good" for i in range(20, 30))
    source = write(csv(REVIEWS[:20]) + f'"a stray quote {swallowed}",good\n')
    (note,) = [note for note in load(source).notes if note.startswith("train, rows read")]
    assert note == "train, rows read: 21, the longest text has 233 characters (reviews.csv, line 22)"


def test_a_label_that_says_it_is_missing_is_missing(write):
    rows = [*REVIEWS, ("one", "nan"), ("two", "N/A"), ("three", "none")]
    splits = load(write(csv([*rows, ("four", "none"), ("five", "none")])))
    assert splits.label_names == ("bad", "good", "none")
    assert set(splits.transfer["text"]) == {"one", "two"}


def test_a_path_object_is_a_path(write):
    assert load(Path(write(csv(REVIEWS)))).test.to_dict() == load("reviews.csv").test.to_dict()


def test_rows_without_a_text_are_counted(write):
    splits = load(write(csv([*REVIEWS, ("", "good"), ("  ", "bad")])))
    assert "train, rows left out for want of a text: 2" in splits.notes
    assert len(labels_of(splits)) == 60


def test_every_class_is_in_every_split(write):
    rows = [(f"text {i}", f"class {i % 100:03}") for i in range(400)]
    splits = load(write(csv(rows)))
    for part in (splits.train, splits.validation, splits.test):
        assert set(part["label"]) == set(range(100))


def test_large_data_is_held_out_up_to_a_limit(write):
    rows = [(f"text {i}", str(i % 2)) for i in range(30_000)]
    splits = load(write(csv(rows)), train_size=2500)
    assert (len(splits.test), len(splits.validation)) == (data.TEST_SIZE, data.VALIDATION_SIZE)
    assert len(splits.train) == 2500


def test_texts_that_lose_their_end_are_counted(write, tokenizer):
    splits = load(write(csv([*REVIEWS, (" ".join(["word"] * 50), "bad")])))
    everything = [data.count_truncated(part, tokenizer, 20) for part in (splits.train, splits.validation, splits.test)]
    assert sum(everything) == 1
    assert data.count_truncated(splits.transfer, tokenizer, 20) == 0


def test_other_columns(write):
    source = write("id;stars;review\n" + "".join(f"{i};{i % 2};text {i}\n" for i in range(20)))
    splits = load(source, text_column="review", label_column="stars")
    assert splits.label_names == ("0", "1")
    assert all(splits.label_names[row["label"]] == str(int(row["text"].split()[1]) % 2) for row in splits.train)


GOOD = csv(REVIEWS)
BAD = {
    "no such file": ("missing.csv", None, r"there is no file 'missing.csv' in "),
    "another format": ("reviews.xlsx", b"PK", r"'reviews.xlsx' can't be read; give a file that ends in .csv, "),
    "no header": ("a.csv", "", r"a.csv has no column 'text' but none; name the right one as text_column"),
    "another column": (
        "a.csv",
        "review,label\nx,1\n",
        r"a.csv has no column 'text' but 'review', 'label'; name the right",
    ),
    "semicolons and another column": (
        "a.csv",
        "review;label\nx;1\n",
        r"a.csv has no column 'text' but 'review', 'label'; ",
    ),
    "another label column": (
        "a.csv",
        "text,stars\nx,1\n",
        r"a.csv has no column 'label' but 'text', 'stars'; name the ri",
    ),
    "no label in JSON": (
        "a.jsonl",
        '{"text": "x", "y": 1}\n',
        r"a.jsonl has no column 'label' but 'text', 'y'; name the",
    ),
    "an open quote in the header": (
        "a.csv",
        '"text;label\nx;1\n',
        r"a.csv, line 1: unexpected end of data; check the quo",
    ),
    "no rows": ("a.csv", "text,label\n", r"a.csv has no rows; give it some."),
    "an address": ("https://example.com/a.csv", None, r"'https://example.com/a.csv' is an address; download the file"),
    "a folder": (".", None, r"'.' can't be read; give a file that ends in .csv"),
    "a column twice": ("a.csv", "text,label,text\nx,1,y\n", r"a.csv has 2 columns 'text'; keep one."),
    "too many fields": ("a.csv", GOOD + "so, so,bad\n", r"a.csv, line 62: 3 fields where the header has 2; put texts"),
    "too few fields": ("a.csv", GOOD + "alone\n", r"a.csv, line 62: 1 field where the header has 2"),
    "an open quote": (
        "a.csv",
        GOOD + '"open,bad\nand on\n',
        r"a.csv, line 62: unexpected end of data; check the quotes",
    ),
    "not UTF-8": (
        "a.csv",
        GOOD.encode() + b"caf\xe9,good\n",
        r"a.csv, line 62: the file is not UTF-8; save it as UTF-8.",
    ),
    "no JSON": ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', r"a.jsonl, line 2: no JSON (Expecting value)"),
    "a JSON list": ("a.json", "[1, 2]\n", r"a.json, line 1: '[1, 2]' is no object; write one object on each line."),
    "a line without text": ("a.jsonl", '{"label": 1}\n', r"a.jsonl, line 1 has no column 'text' but 'label'"),
    "a number as text": ("a.jsonl", '{"text": 5, "label": 1}\n', r"a.jsonl, line 1: 5 is no text; give text"),
    "a list as label": (
        "a.jsonl",
        '{"text": "x", "label": [1]}\n',
        r"a.jsonl, line 1: the label [1] is neither a name nor",
    ),
    "a fraction as label": (
        "a.jsonl",
        '{"text": "x", "label": 0.5}\n',
        r"a.jsonl, line 1: the label 0.5 is neither a name",
    ),
    "ratings": ("a.csv", csv([("a", "1"), ("b", "2.5"), ("c", "3")]), r"a.csv, line 3: the label 2.5 is a fraction"),
    "no Parquet": ("a.parquet", "text,label\n", r"a.parquet can't be read as Parquet"),
    "no labels": (
        "a.csv",
        csv([("a", ""), ("b", "")]),
        r"a.csv has 0 labels; have 2 to 100, or name the right label_col",
    ),
    "one label": ("a.csv", csv([("a", "x"), ("b", "x")]), r"a.csv has 1 label ('x'); have 2 to 100"),
    "101 labels": ("a.csv", csv([(f"t{i}", f"c{i}") for i in range(101)]), r"a.csv has 101 labels; have 2 to 100"),
    "case": (
        "a.csv",
        csv([("a", "Good"), ("b", "good"), ("c", "x")]),
        r"a.csv, line 3: the label 'good' differs from 'Good'",
    ),
    "rare": (
        "a.csv",
        csv([*REVIEWS, ("a", "rare"), ("b", "rare")]),
        r"a.csv: label 'rare' has 2 texts once copies are rem",
    ),
}


@pytest.mark.parametrize(("name", "content", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(write, name, content, sentence):
    if content is not None:
        write(content, name)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("text,label\nx,good\ny,\n", "test.csv, line 3: a test text has no label; label it or remove it."),
        (
            "text,label\n,good\n",
            "test has no text left once empty, disputed and copied rows are removed; give it more.",
        ),
        ("text,label\nx,good\ny,fair\n", "test.csv, line 3: the label 'fair' does not occur in train (bad, good)."),
    ],
)
def test_held_out_texts_need_a_known_label(write, content, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(write(GOOD), test_data=write(content, "test.csv"))


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"test_data": "test.csv"}, "test_data is 'test.csv' but data is empty; give the training texts as data."),
        ({"data": "a.csv", "text_column": ""}, "text_column is '' and label_column 'label'; name two columns."),
        (
            {"data": "a.csv", "text_column": "label"},
            "text_column is 'label' and label_column 'label'; name two columns.",
        ),
    ],
)
def test_choices_that_do_not_fit(choices, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        DistillConfig(**choices)


def test_a_path_must_be_text():
    with pytest.raises(TypeError, match="data is int; give text: a path"):
        DistillConfig(data=5)


def test_reading_says_where_each_row_stands(write):
    rows = own_data.read_texts(write('text,label\n"two\nlines",a\n\nx,b\n'), text_column="text", label_column="label")
    assert rows["train"]["place"].tolist() == ["reviews.csv, line 2", "reviews.csv, line 5"]
