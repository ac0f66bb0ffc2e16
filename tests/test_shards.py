"""Teacher logits in shards: those of the cache, whatever was cut off, and no others."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from support.architectures import tiny
from support.models import tiny_bert
from support.processes import TWO, free_port
from tokenizers import normalizers
from torch.testing import assert_close

from kd_helpers import artifacts, shards
from kd_helpers.data import tokenize
from kd_helpers.models import freeze, save_model
from kd_helpers.shards import cache_shards, missing_shards, read_shards
from kd_helpers.teacher import cached_logits


@pytest.fixture
def teacher():
    return freeze(tiny_bert(seed=1))


@pytest.fixture
def raw(splits) -> datasets.Dataset:
    """128 texts, the last 32 without a label."""
    return splits.student_train


def stream(raw: datasets.Dataset, count: int = 4) -> datasets.IterableDataset:
    return raw.select_columns(["text", "label"]).to_iterable_dataset(num_shards=count)


def test_the_logits_are_those_of_the_cache_in_the_order_of_the_texts(
    own_artifacts, tmp_path, monkeypatch, teacher, raw, tokenized, tokenizer
):
    monkeypatch.setattr(shards, "ROWS", 10)  # several to a shard, the last one smaller
    cache_shards(teacher, stream(raw), tokenizer, tmp_path, max_length=24)
    rows = list(read_shards(tmp_path))
    expected = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    ids = torch.tensor(raw["id"][:])
    assert_close(torch.tensor([row["teacher_logits"] for row in rows]), expected.lookup(ids), rtol=1e-4, atol=1e-5)
    assert [row["label"] for row in rows] == raw["label"][:]
    assert [row["input_ids"] for row in rows] == tokenized["input_ids"][:]


def test_texts_without_labels_have_none(tmp_path, teacher, raw, tokenizer):
    cache_shards(teacher, stream(raw).remove_columns("label"), tokenizer, tmp_path, max_length=24)
    assert {row["label"] for row in read_shards(tmp_path)} == {-100}


def test_what_is_done_is_left_alone_and_what_is_missing_or_damaged_is_made(
    tmp_path, monkeypatch, teacher, raw, tokenizer
):
    batches = []

    def run_twice(*given):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(1)
        return real(*given)

    real = shards.teacher_forward
    monkeypatch.setattr(shards, "teacher_forward", run_twice)
    with pytest.raises(KeyboardInterrupt):
        cache_shards(teacher, stream(raw), tokenizer, tmp_path, max_length=24)
    monkeypatch.setattr(shards, "teacher_forward", real)
    assert missing_shards(tmp_path) == [2, 3]
    with pytest.raises(FileNotFoundError, match=r"lacks 2 shards \(the first is 2\); run cache_shards again"):
        read_shards(tmp_path)
    file = tmp_path / "000000" / shards.LOGITS
    file.write_bytes(file.read_bytes()[:-1])
    assert missing_shards(tmp_path) == [0, 2, 3]
    kept = (tmp_path / "000001" / shards.LOGITS).stat().st_mtime_ns
    with pytest.warns(UserWarning, match="000000 is damaged; it is built anew"):
        cache_shards(teacher, stream(raw), tokenizer, tmp_path, max_length=24)
    assert missing_shards(tmp_path) == []
    assert (tmp_path / "000001" / shards.LOGITS).stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"teacher": freeze(tiny_bert(seed=2))}, "teacher"),
        ({"lower_case": False}, "tokenizer"),
        ({"max_length": 16}, "max_length"),
        ({"count": 5}, "shards"),
    ],
)
def test_logits_of_something_else_are_refused(tmp_path, teacher, raw, tokenizer, change, what):
    cache_shards(teacher, stream(raw), tokenizer, tmp_path, max_length=24)
    texts = stream(raw, change.get("count", 4))
    if "lower_case" in change:  # the same vocabulary, other rules
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=change["lower_case"])
    with pytest.raises(ValueError, match=rf"was begun with {what} .*; choose another folder, or delete it\."):
        cache_shards(
            change.get("teacher", teacher), texts, tokenizer, tmp_path, max_length=change.get("max_length", 24)
        )


def test_a_stream_without_texts_is_refused(tmp_path, teacher, raw, tokenizer):
    reviews = stream(raw).select_columns("text").rename_column("text", "review")
    with pytest.raises(ValueError, match="the texts have the columns review; rename the right one to 'text'"):
        cache_shards(teacher, reviews, tokenizer, tmp_path, max_length=24)


def test_a_text_without_a_label_is_marked(tmp_path, teacher, raw, tokenizer):
    """Also where a whole shard has none."""
    texts = datasets.Dataset.from_dict({"text": raw["text"][:8], "label": [None] * 5 + [1, 0, 1]})
    cache_shards(teacher, texts.to_iterable_dataset(num_shards=2), tokenizer, tmp_path, max_length=24)
    assert [row["label"] for row in read_shards(tmp_path)] == [-100] * 5 + [1, 0, 1]


def with_labels(raw: datasets.Dataset, labels: list, feature=None) -> datasets.IterableDataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": feature}) if feature else None
    texts = {"text": raw["text"][: len(labels)], "label": labels}
    return datasets.Dataset.from_dict(texts, features=features).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, -1, 2, -1], datasets.ClassLabel(names=["Negative", "neutral", "positive"])),
        ([0, None, 2, -1], datasets.ClassLabel(names=["negative", "neutral", "positive"])),
        ([0, -1, 2, -100], None),
        ([0.0, float("nan"), 2.0, None], None),
    ],
)
def test_every_way_to_write_that_there_is_no_label_is_one(tmp_path, teacher, raw, tokenizer, labels, feature):
    cache_shards(teacher, with_labels(raw, labels, feature), tokenizer, tmp_path, max_length=24)
    assert [row["label"] for row in read_shards(tmp_path)] == [0, -100, 2, -100]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"label": ["good", "bad"]}, "the column 'label' holds 'good'; give numbers from 0 to 2 in the order of the"),
        ({"label": [0, 3]}, "the column 'label' holds 3; give numbers from 0 to 2"),
        ({"label": [0, -2]}, "the column 'label' holds -2; give numbers from 0 to 2"),
        ({"label": [0.5, 1.0]}, "the column 'label' holds 0.5; give numbers from 0 to 2"),
        ({"label": [math.inf, 1.0]}, "the column 'label' holds inf; give numbers from 0 to 2"),
        ({"text": ["a", None]}, "the column 'text' holds None, which is no text; remove such rows, or fill them"),
        ({"text": [3, 4]}, "the column 'text' holds 3, which is no text"),
    ],
)
def test_what_is_no_text_or_no_class_is_refused(tmp_path, teacher, tokenizer, texts, sentence):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]} | texts)
    with pytest.raises(ValueError, match=sentence):
        cache_shards(teacher, rows.to_iterable_dataset(), tokenizer, tmp_path, max_length=24)


def test_classes_in_another_order_than_the_teachers_are_refused(tmp_path, teacher, raw, tokenizer):
    turned = datasets.ClassLabel(names=["positive", "neutral", "negative"])
    with pytest.raises(ValueError, match="the classes of the texts are positive, neutral, negative, the teacher's neg"):
        cache_shards(teacher, with_labels(raw, [0, 1], turned), tokenizer, tmp_path, max_length=24)
    teacher.config.id2label = {index: f"LABEL_{index}" for index in range(3)}  # it has no names
    cache_shards(teacher, with_labels(raw, [0, 1], turned), tokenizer, tmp_path, max_length=24)


SCRIPT = """
import json, os
from pathlib import Path
import datasets
from transformers import AutoTokenizer
from kd_helpers import artifacts
from kd_helpers.models import freeze, load_saved
from kd_helpers.shards import cache_shards
texts = datasets.load_from_disk("texts").to_iterable_dataset(num_shards=5)
tokenizer = AutoTokenizer.from_pretrained("teacher")
made, get_or_build = [], artifacts.get_or_build
def noted(folder, build):
    if not get_or_build(folder, build):
        made.append(int(folder.name))
artifacts.get_or_build = noted
cache_shards(freeze(load_saved(Path("teacher"))), texts, tokenizer, "two", max_length=24)
Path(os.environ["RANK"] + ".json").write_text(json.dumps(made))
"""


def test_processes_share_the_shards_out(tmp_path, teacher, raw, tokenizer):
    raw.select_columns(["text", "label"]).save_to_disk(tmp_path / "texts")
    save_model(tmp_path / "teacher", teacher, tokenizer)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *TWO, free_port(), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[0, 2, 4], [1, 3]]
    cache_shards(teacher, stream(raw, 5), tokenizer, tmp_path / "one", max_length=24)
    assert missing_shards(tmp_path / "two") == []
    for index in range(5):
        files = [tmp_path / way / f"{index:06d}" / artifacts.MANIFEST for way in ("one", "two")]
        assert Path(files[0]).read_text() == Path(files[1]).read_text()


def test_a_folder_with_brackets_in_its_name_is_read(tmp_path, teacher, raw, tokenizer):
    cache_shards(teacher, stream(raw), tokenizer, tmp_path / "cache[1]", max_length=24)
    assert len(list(read_shards(tmp_path / "cache[1]"))) == len(raw)


def test_a_teacher_that_looks_for_the_last_token_is_told_which_one_pads(own_artifacts, tmp_path):
    teacher, tokenizer = tiny("gpt2", ("bad", "good"))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    teacher.resize_token_embeddings(len(tokenizer))
    freeze(teacher)
    lines = ["good", "not good at all today", "bad day"]
    alone = torch.cat([teacher(**tokenizer([line], return_tensors="pt")).logits for line in lines])
    rows = datasets.Dataset.from_dict({"text": lines, "label": [1, 0, 0]})
    teacher.config.pad_token_id = tokenizer("good")["input_ids"][0]
    cache_shards(teacher, rows.to_iterable_dataset(num_shards=1), tokenizer, tmp_path, max_length=24)
    assert_close(torch.tensor([row["teacher_logits"] for row in read_shards(tmp_path)]), alone, rtol=1e-4, atol=1e-5)

    teacher.config.pad_token_id = tokenizer("good")["input_ids"][0]
    texts = tokenize(rows.add_column("id", range(3)), tokenizer, 24)
    found = cached_logits(teacher, texts, tokenizer, precision=torch.float32)
    assert_close(found.lookup(torch.arange(3)), alone, rtol=1e-4, atol=1e-5)
