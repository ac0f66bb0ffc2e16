"""The hub's presets and checkpoints, against a local cache in the hub's own format; no test has a network."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from support import hub_cache
from support.models import tiny_bert, tiny_distilbert

from kd_helpers import data, hub, models, runs
from kd_helpers.config import DistillConfig
from kd_helpers.models import load_classifier, load_student, load_teacher, load_tokenizers, save_model
from kd_helpers.resolve import resolve
from kd_helpers.teacher import attach, load_teacher_logits

NAMES = ("negative", "neutral", "positive")


@pytest.fixture
def python(hub_environment, tmp_path):
    """Run code in a process of its own, since the hub's library reads its settings when it is imported."""

    def run(code: str) -> str:
        environment = {
            **os.environ,
            **hub_environment,
            "KD_ARTIFACTS": str(tmp_path / "artifacts"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def folder_with(tmp_path, model, tokenizer):
    """A checkpoint in a folder, as `save_pretrained` leaves it."""
    save_model(tmp_path / "checkpoint", model, tokenizer)
    return str(tmp_path / "checkpoint")


@pytest.mark.parametrize("preset", ["bert", pytest.param("bert-large", marks=pytest.mark.longer)])
def test_a_preset_of_the_hub_distils_without_a_network(python, preset):
    said = python(f"""
import json
from kd_helpers import DistillConfig, distill
from kd_helpers.models import checkpoint_version
sizes = {{"train_size": 200, "teacher_train_size": 200, "max_length": 32}}
config = DistillConfig(preset={preset!r}, teacher_epochs=1, max_steps=4, **sizes)
result = distill(config)
print(json.dumps({{
    "student": type(result.student).__name__,
    "inputs": list(result.tokenizer("hello")),
    "labels": list(result.student.config.id2label.values()),
    "steps": result.metrics["steps"],
    "student saved": (result.folder / "student" / "model.safetensors").exists(),
    "version": checkpoint_version(config.teacher_source),
}}))
""")
    found = json.loads(said.splitlines()[-1])
    student = "DistilBertForSequenceClassification" if preset == "bert" else "BertForSequenceClassification"
    assert found["student"] == student
    assert found["labels"] == list(NAMES)
    assert found["steps"] == 4
    assert found["student saved"]
    assert re.fullmatch(r"google-bert/bert-\w+-uncased@[0-9a-f]{40}", found["version"])


def test_what_the_cache_lacks_is_one_sentence(python):
    said = python("""
from kd_helpers import DistillConfig, load_splits
from kd_helpers.models import load_classifier, load_tokenizer
calls = [
    lambda: load_classifier("someone/pickled", ("a", "b"), seed=0),
    lambda: load_classifier("someone/else", ("a", "b"), seed=0),
    lambda: load_tokenizer("misspelt folder"),
    lambda: load_splits(DistillConfig(data="someone/texts")),
    lambda: load_splits(DistillConfig(data="cardiffnlp/tweet_eval")),
    lambda: load_splits(DistillConfig(data="cardiffnlp/tweet_eval:irony")),
]
for call in calls:
    try:
        call()
    except (FileNotFoundError, ValueError) as error:
        print(error)
""")
    offline = "is not in the hub's local cache (HF_HUB_OFFLINE is set), or not whole"
    lines = said.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"model 'someone/pickled' {offline} (")
    assert "safetensors" in lines[0]
    assert lines[1] == f"model 'someone/else' {offline}; run `hf download someone/else` where there is a network."
    assert lines[2].startswith(f"model 'misspelt folder' {offline}")
    assert lines[3].startswith(
        f"dataset 'someone/texts' {offline}; run `hf download someone/texts --repo-type dataset`"
    )
    assert lines[4].startswith(
        "dataset 'cardiffnlp/tweet_eval' has no configuration None; write OWNER/NAME:CONFIGURATION"
    )
    assert lines[5].endswith("with one of sentiment, emoji.")


def test_a_dataset_of_the_hub_is_own_data_too(python):
    said = python("""
from kd_helpers import DistillConfig, load_splits
splits = load_splits(DistillConfig(data="cardiffnlp/tweet_eval:emoji", train_size=50))
print(splits.label_names, len(splits.train), len(splits.validation), len(splits.test))
""")
    assert said.splitlines()[-1] == "('negative', 'neutral', 'positive') 50 600 700"


def test_tinystories_come_from_the_files_that_are_needed(python):
    said = python("""
import json
from kd_helpers import hub
from kd_helpers.methods.stories import read_stories, story_splits
asked = {}
download = hub.huggingface_hub.snapshot_download
def recorded(name, **options):
    asked[name] = options["allow_patterns"]
    return download(name, **options)
hub.huggingface_hub.snapshot_download = recorded
found = read_stories("roneneldan/TinyStories")
read_stories("cardiffnlp/tweet_eval:emoji")
splits = story_splits(train=40, held_out=10, stories="roneneldan/TinyStories")
print(json.dumps([asked, {name: split["text"][:2] for name, split in found.items()}, splits.held_out["text"][:]]))
""")
    asked, found, held_out = json.loads(said.splitlines()[-1])
    assert asked == {"roneneldan/TinyStories": ["README.md", "data/*"], "cardiffnlp/tweet_eval": None}
    assert found == {split: [f"{split} story {row}." for row in range(2)] for split in ("train", "validation")}
    assert sorted(held_out) == sorted(f"validation story {row}." for row in range(10))


def test_datasets_as_they_are_published(python):
    """Hidden labels of test, a column of another name, 151 classes, splits of other names, a script."""
    said = python("""
import collections, json
from kd_helpers import DistillConfig, load_splits

def show(**choices):
    splits = load_splits(DistillConfig(**choices))
    parts = (splits.student_train, splits.validation, splits.test)
    print(json.dumps({
        "classes": len(splits.label_names),
        "texts": [part["text"][:] for part in parts],
        "labels": [[splits.label_names[label] for label in part["label"]] for part in parts],
        "notes": splits.notes,
    }))

show(data="stanfordnlp/sst2", text_column="sentence")
show(data="clinc/clinc_oos:plus", label_column="intent")
show(data="clinc/clinc_oos", label_column="intent")
show(data="someone/two_validations")
for choices in ({"data": "someone/script"}, {"data": "clinc/clinc_oos:huge"}, {"data": "stanfordnlp/sst2"}):
    try:
        load_splits(DistillConfig(**choices))
    except ValueError as error:
        print(error)
""")
    lines = said.splitlines()[-7:]
    hidden, many, only, others = map(json.loads, lines[:4])
    assert [len(part) for part in hidden["texts"]] == [48, 12, 12]
    for texts, labels in zip(hidden["texts"], hidden["labels"], strict=True):
        for text, label in zip(texts, labels, strict=True):
            assert label == ("negative", "positive")[int(text.split()[-1]) % 2], text
            assert not text.startswith("test"), "the hidden texts are used nowhere"
    assert all(text.startswith("validation") for text in hidden["texts"][1])
    assert "test, rows left out because their labels are hidden: 20" in hidden["notes"]
    assert "test, texts cut from train, of each class its share: 12" in hidden["notes"]
    assert (many["classes"], [len(part) for part in many["texts"]]) == (151, [453, 151, 151])
    for texts, labels in zip(many["texts"], many["labels"], strict=True):
        assert all(text.endswith(f"wants {label}") for text, label in zip(texts, labels, strict=True))
    del many["notes"], only["notes"]  # they say which file a text comes from
    assert only == many, "the only configuration need not be named"
    assert "splits that are not used: validation_matched, validation_mismatched" in others["notes"]
    assert [len(part) for part in others["texts"]] == [14, 2, 4]
    assert lines[4].startswith("dataset 'someone/script' can't be read (")
    assert lines[4].endswith("; download it and give its files as data, validation_data and test_data.")
    assert lines[5].startswith("dataset 'clinc/clinc_oos' has no configuration 'huge'; write OWNER/NAME:CONFIGURATION")
    assert lines[6] == (
        "stanfordnlp/sst2, train has no column 'text' but 'idx', 'sentence', 'label'; name the right one as "
        "text_column."
    )


def test_a_dataset_that_is_not_open_to_everybody(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise GatedRepoError("Access to dataset someone/terms is restricted.\nVisit it.", response=response)

    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"^dataset 'someone/terms' is open only to those who ac"):
        data.load_splits(DistillConfig(data="someone/terms"))


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "never answers"])
def test_no_network_is_said_within_five_seconds(monkeypatch, answers):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()  # the connection is made, and then nothing comes
        monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        for call in (
            lambda: runs.distill(DistillConfig(preset="bert")),
            lambda: data.load_splits(DistillConfig(data="someone/texts")),
            lambda: load_teacher(DistillConfig(teacher_checkpoint="someone/model"), NAMES),
        ):
            start = time.monotonic()
            with pytest.raises(
                ConnectionError, match=r"'\S+' is no local file or folder and the Hugging Face hub can't"
            ):
                call()
            assert time.monotonic() - start < 5


def test_an_encoder_decoder_of_the_hub_learns_rationales_from_a_file(python, tmp_path):
    file = tmp_path / "tickets.csv"
    rows = "".join(f"ticket {row} wants {row % 2},team {row % 2},it asks for {row % 2}\n" for row in range(40))
    file.write_text(f"message,team,why\n{rows}")
    said = python(f"""
import json
from kd_helpers.methods.rationales import (
    load_seq2seq, measure, measured_batches, read_examples, split_examples, task_batches, train_seq2seq
)
examples = read_examples({str(file)!r}, text_column="message", label_column="team", rationale_column="why")
learned, held_out = split_examples(examples, held_out=8)
student, tokenizer = load_seq2seq("google/flan-t5-small")
before = measure(student, measured_batches(held_out, tokenizer)).nats
train_seq2seq(student, task_batches(learned, tokenizer, 8, seed=0), steps=20, description=None)
after = measure(student, measured_batches(held_out, tokenizer)).nats
print(json.dumps({{"kind": type(student).__name__, "before": before, "after": after}}))
""")
    found = json.loads(said.splitlines()[-1])
    assert found["kind"] == "T5ForConditionalGeneration"
    assert found["after"] < found["before"] / 2


def test_a_trained_head_is_kept_in_the_order_of_the_data(tmp_path, tokenizer):
    trained = hub_cache.sentiment_model(("Positive", "negative", "NEUTRAL"))
    folder = folder_with(tmp_path, trained, tokenizer)
    loaded = load_classifier(folder, NAMES, seed=5).eval()
    ids = torch.tensor([[101, 2307, 102]])
    with torch.no_grad():
        wanted = trained.eval()(ids).logits[:, [1, 2, 0]]
        torch.testing.assert_close(loaded(ids).logits, wanted)
    assert loaded.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("negative", "positive")])
def test_a_head_for_other_labels_is_refused(tmp_path, tokenizer, labels):
    folder = folder_with(tmp_path, hub_cache.sentiment_model(labels), tokenizer)
    sentence = (
        f"was trained for the labels {', '.join(labels)}, the data has negative, neutral, positive; name them alike"
    )
    with pytest.raises(ValueError, match=sentence):
        load_teacher(DistillConfig(teacher_checkpoint=folder), NAMES)


def test_a_teacher_that_is_tuned_already_teaches_as_it_is(own_artifacts, tmp_path, tokenizer, small_data):
    folder = folder_with(tmp_path, hub_cache.sentiment_model(NAMES), tokenizer)
    config = DistillConfig(teacher_checkpoint=folder, teacher_epochs=0, train_size=64, max_length=24)
    teacher_logits = load_teacher_logits(resolve(config, small_data), "train")
    teacher = models.freeze(load_teacher(config, NAMES))
    tokenized = data.tokenize(small_data.train.select([7]), tokenizer, 24)
    (batch,) = data.evaluation_batches(tokenized, tokenizer)
    with torch.no_grad():
        again = teacher(**models.model_inputs(teacher, batch)).logits
    torch.testing.assert_close(teacher_logits.lookup(batch["id"]), again, atol=0.02, rtol=0.02)
    assert not (own_artifacts / "teachers").exists()


def test_teacher_and_student_may_cut_texts_differently(own_artifacts, tmp_path, tokenizer, small_data):
    teacher = hub_cache.sentiment_model(NAMES)
    words = hub_cache.word_tokenizer([word for text in small_data.train["text"] for word in text.split()])
    student = tiny_bert(1, seed=3)
    config = DistillConfig(
        teacher_checkpoint=folder_with(tmp_path / "teacher", teacher, tokenizer),
        student_checkpoint=folder_with(tmp_path / "student", student, words),
        teacher_epochs=0,
        max_steps=3,
        precision="float32",
    )
    tokenizers = load_tokenizers(config)
    assert tokenizers.teacher("good day").input_ids != tokenizers.student("good day").input_ids
    teacher_logits = load_teacher_logits(resolve(config, small_data), "student_train")
    texts = data.tokenize(small_data.student_train, tokenizers.student, config.max_length)
    row = attach(texts, teacher_logits)[5]
    encoded = tokenizer(small_data.student_train["text"][5], return_tensors="pt")
    with torch.no_grad():
        wanted = teacher.eval()(**encoded).logits[0]
    torch.testing.assert_close(torch.tensor(row["teacher_logits"]), wanted, atol=1e-4, rtol=1e-4)
    result = runs.distill(config, data=small_data)
    saved = models.load_tokenizer(str(result.folder / "student"))
    assert saved("good day").input_ids == words("good day").input_ids


def test_another_checkpoint_in_the_same_folder_is_another_teacher(tmp_path, tokenizer):
    versions = []
    for seed in (0, 1):
        folder = folder_with(tmp_path / str(seed), hub_cache.sentiment_model(NAMES, seed=seed), tokenizer)
        versions.append(models.checkpoint_version(folder))
    assert len(set(versions)) == 2
    assert models.checkpoint_version(folder) == versions[1]


def test_only_a_bert_lends_its_layers(tmp_path, tokenizer):
    folder = folder_with(tmp_path, tiny_distilbert(), tokenizer)
    config = DistillConfig(teacher_checkpoint=folder)
    with pytest.raises(ValueError, match="layers are copied from a BERT, this teacher is a distilbert; name a student"):
        load_student(config, ("LABEL_0", "LABEL_1", "LABEL_2"))
