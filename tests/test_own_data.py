from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.models import tiny_bert

from kd_helpers import data, own_data
from kd_helpers.config import DistillConfig
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import save_model
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill

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


def test_a_text_that_swallowed_others_is_refused(write):
    swallowed = "\n".join(f"review number {i},good" for i in range(20, 30))
    source = write(csv(REVIEWS[:20]) + f'"a stray quote {swallowed}",good\n')
    with pytest.raises(
        ValueError, match=r"^reviews.csv, line 22: the quotation mark that opens here closes in line 31, "
    ):
        load(source)


def test_a_text_that_may_have_swallowed_others_is_seen_in_the_notes(write):
    lines = "\n".join(f"this is line {i} of a letter" for i in range(20, 30))
    notes = load(write(csv(REVIEWS[:20]) + f'"{lines}",good\n')).notes
    assert "train, rows read: 21, the longest text has 279 characters (reviews.csv, line 22)" in notes
    assert "train, rows that span several lines: 1, the longest reviews.csv, lines 22 to 31" in notes


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


@pytest.mark.parametrize("classes", [151, own_data.MAX_CLASSES])
def test_as_many_classes_as_the_limit_allows(write, classes):
    rows = [(f"text {i}", f"class {i % classes:04}") for i in range(4 * classes)]
    splits = load(write(csv(rows)))
    assert splits.label_names == tuple(f"class {i:04}" for i in range(classes))
    for part in (splits.train, splits.validation, splits.test):
        assert set(part["label"]) == set(range(classes))
    assert labels_of(splits) == dict(rows)
    assert data.describe_splits(splits).shape == (5, classes + 2)
    labels = torch.tensor(splits.test["label"][:])
    wrong = (labels + 1) % classes
    measured = classification_metrics(20.0 * torch.nn.functional.one_hot(labels, classes), labels)
    assert (measured["accuracy"], measured["macro_f1"]) == (1.0, 1.0)
    measured = classification_metrics(20.0 * torch.nn.functional.one_hot(wrong, classes), labels)
    assert (measured["accuracy"], measured["macro_recall"]) == (0.0, 0.0)


def test_151_classes_are_distilled(write, tmp_path, own_artifacts, tokenizer):
    """As many as CLINC150 has with its class for what is out of scope."""
    names = [f"intent {i}" for i in range(151)]
    source = write(csv([(f"{i} please {name}", name) for i in range(4) for name in names]))
    teacher, student = (tiny_bert(layers, classes=151) for layers in (2, 1))
    teacher.config.id2label = dict(enumerate(names))
    save_model(tmp_path / "teacher", teacher, tokenizer)
    student.config.architectures = student.config.id2label = None
    save_model(tmp_path / "student", student.bert, tokenizer)
    config = DistillConfig(
        data=source,
        teacher_checkpoint=str(tmp_path / "teacher"),
        student_checkpoint=str(tmp_path / "student"),
        teacher_epochs=1,
        max_steps=3,
        max_length=16,
        device="cpu",
        precision="float32",
    )
    result = distill(config)
    assert sorted(result.student.config.id2label.values()) == sorted(names)
    assert result.predictions.logits.shape == (151, 151)
    assert sorted(result.predictions.labels.tolist()) == list(range(151))
    assert 0 < result.metrics["test"]["nll"] < 7


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
        r"a.jsonl, line 1: the label [1] is a list or an object; give each text one label",
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
        r"a.csv has 0 labels; have 2 to 1,000, or name the right label_col",
    ),
    "one label": ("a.csv", csv([("a", "x"), ("b", "x")]), r"a.csv has 1 label ('x'); have 2 to 1,000"),
    "1001 labels": (
        "a.csv",
        csv([(f"t{i}", f"c{i}") for i in range(1001)]),
        r"a.csv has 1,001 labels; have 2 to 1,000",
    ),
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


# Texts without labels, of which the teacher alone says something


@pytest.fixture
def teacher(tmp_path, tokenizer) -> str:
    """A classifier of three classes, in an order of its own."""
    model = tiny_bert()
    model.config.id2label = {0: "Poor", 1: "good", 2: "Fair"}
    save_model(tmp_path / "teacher", model, tokenizer)
    return str(tmp_path / "teacher")


BARE = "number,text\n" + "".join(f"{i},{text}\n" for i, (text, _) in enumerate(REVIEWS))


@pytest.mark.parametrize("content", [BARE, csv([(text, "") for text, _ in REVIEWS])], ids=["no column", "an empty one"])
def test_train_without_labels_has_the_classes_of_its_teacher(write, teacher, content):
    test = write("text,label\nreview number 3,good\nas usual,fair\nnever again,POOR\n", "test.csv")
    validation = write("text,label\nnot bad,good\nbad,poor\n", "validation.csv")
    pure = {"alpha": 1.0, "teacher_epochs": 0, "teacher_checkpoint": teacher}
    splits = load(write(content), test_data=test, validation_data=validation, **pure)
    assert splits.label_names == ("Poor", "good", "Fair")
    assert labels_of(splits) == {
        "review number 3": "good",
        "as usual": "Fair",
        "never again": "Poor",
        "not bad": "good",
        "bad": "Poor",
    }
    assert (len(splits.train), len(splits.teacher_train)) == (0, 0)
    assert set(splits.student_train["text"]) == {text for text, _ in REVIEWS} - {"review number 3"}
    assert set(splits.student_train["label"]) == {IGNORE_INDEX}
    assert splits.notes[0] == "classes, those of the teacher: Poor, good, Fair"
    assert splits.notes[-1] == "train, texts without a label: 59; the student takes all of them"
    assert data.describe_splits(splits).loc["transfer"].tolist() == [0, 0, 0, 59, 59]
    assert resolve(DistillConfig(data="reviews.csv", test_data=test, validation_data=validation, **pure), splits)


@pytest.mark.parametrize("label_column", ["", "label"])
def test_nothing_but_texts_is_split_and_can_not_be_scored(write, teacher, label_column):
    pure = {"alpha": 1.0, "teacher_epochs": 0, "teacher_checkpoint": teacher, "label_column": label_column}
    splits = load(write(BARE), **pure)
    assert [len(part) for part in (splits.student_train, splits.validation, splits.test)] == [43, 5, 12]
    texts = [*splits.student_train["text"], *splits.validation["text"], *splits.test["text"]]
    assert sorted(texts) == sorted(text for text, _ in REVIEWS)
    assert set(splits.test["label"]) | set(splits.validation["label"]) == {IGNORE_INDEX}
    assert load(write(csv(REVIEWS), "labelled.csv"), **pure).test["text"][:] == splits.test["text"][:] or label_column
    sentence = "validation and test have no labels, so accuracy can't be measured; give texts with labels as "
    with pytest.raises(ValueError, match=re.escape(sentence)):
        resolve(DistillConfig(data="reviews.csv", **pure))


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (
            {"alpha": 0.9},
            "a.csv has no column 'label' but 'number', 'text'; name the right one as label_column, or distil",
        ),
        (
            {"teacher_epochs": 1},
            "or distil without labels (alpha=1, teacher_epochs=0 and a fine-tuned teacher_checkpoint).",
        ),
        (
            {"teacher_checkpoint": ""},
            "a.csv has no column 'label' but 'number', 'text'; name the right one as label_column",
        ),
        (
            {"alpha": 0.9, "label_column": ""},
            "label_column is empty; name the column of the labels, or distil without la",
        ),
        (
            {"teacher_checkpoint": "encoder"},
            "is no fine-tuned classifier (its config.json names BertModel), so it can't",
        ),
        (
            {"teacher_checkpoint": "empty"},
            "the folder 'empty' has no config.json, which names the classes; give the folder",
        ),
        ({"teacher_checkpoint": "alike"}, "the classes of 'alike' are yes, Yes, no; name at least two, each otherwise"),
        (
            {"test_data": "test.csv"},
            "test has labels, but train has none, so validation has none either; give texts with ",
        ),
        (
            {"test_data": "test.csv", "validation_data": "a.csv"},
            "test has labels, but train has none, so validation has none either; give texts with labels as "
            "validation_data, or none as test_data.",
        ),
        (
            {"test_data": "odd.csv", "validation_data": "test.csv"},
            "odd.csv, line 2: the label 'superb' is none of the teacher's classes (Poor, good, Fair).",
        ),
        (
            {"test_data": "partly.csv", "validation_data": "test.csv"},
            "partly.csv, line 3: a test text has no label; label it or remove it.",
        ),
        (
            {"data": "two.csv"},
            "two.csv has 2 texts once copies are removed; give at least 3, one for each split that is",
        ),
    ],
)
def test_texts_without_labels_where_something_needs_labels(write, teacher, tokenizer, choices, sentence):
    write(BARE, "a.csv")
    write("text,label\nfine,good\n", "test.csv")
    write("text,label\nfine,superb\n", "odd.csv")
    write("text,label\nfine,good\nso so,\n", "partly.csv")
    write("text\none\ntwo\nTWO\n", "two.csv")
    save_model(Path("encoder"), tiny_bert().bert, tokenizer)
    model = tiny_bert()
    model.config.id2label = {0: "yes", 1: "Yes", 2: "no"}
    save_model(Path("alike"), model, tokenizer)
    Path("empty").mkdir()
    pure = {"data": "a.csv", "alpha": 1.0, "teacher_epochs": 0, "teacher_checkpoint": teacher}
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        data.load_splits(DistillConfig(**pure | choices))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_labels_that_nobody_reads_are_kept_where_there_are_any(write, teacher):
    """Pure distillation of labelled texts is what it was: the labels of train split it, and name its classes."""
    pure = {"alpha": 1.0, "teacher_epochs": 0, "teacher_checkpoint": teacher}
    one, other = load(write(csv(REVIEWS)), **pure), load("reviews.csv")
    assert one.label_names == other.label_names == ("bad", "good")
    assert one.test.to_dict() == other.test.to_dict()
