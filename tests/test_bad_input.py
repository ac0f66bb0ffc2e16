"""Bad input, wherever it comes in: one table of what is refused and the whole sentence with which.

A reader meets these sentences when something went wrong, so each of them is one line that says what was given and
what to do. The table holds them word for word: who rewords one reads it here once more.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import joblib
import nbformat
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from support.models import tiny_bert, tiny_distilbert

from kd_helpers import artifacts, hub, loop, models, runs
from kd_helpers.config import DistillConfig
from kd_helpers.course.full_sweep import SWEPT
from kd_helpers.data import DataSplits, load_splits, require_disjoint, tokenize, training_batches
from kd_helpers.experiments import sweep
from kd_helpers.losses import distillation_loss, hard_loss, soft_loss, soft_targets
from kd_helpers.metrics import Predictions
from kd_helpers.models import (
    copy_layers,
    freeze,
    head_order,
    model_inputs,
    require_teacher_and_student,
    teacher_forward,
)
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.runtime import pick_device
from kd_helpers.teacher import TeacherLogits

NAMES = ("negative", "neutral", "positive")
LONGEST_SENTENCE = 350


class World(NamedTuple):
    """What a case may use: an empty folder, in which it works, and small things to work on."""

    here: Path
    patch: pytest.MonkeyPatch
    splits: DataSplits
    tokenized: datasets.Dataset
    tokenizer: Any

    def file(self, content: str | bytes, name: str) -> str:
        """Write a file into the folder."""
        (self.here / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name


class Case(NamedTuple):
    """One bad input.

    Attributes:
        name: of the test.
        call: what a reader did.
        error: the type of what is raised, or of the warning.
        sentence: all of it. {here} stands for the world's folder, {cores} for the number of this machine's cores.
    """

    name: str
    call: Callable[[World], object]
    error: type[Exception]
    sentence: str


@pytest.fixture
def world(tmp_path, monkeypatch, small_data, tokenized, tokenizer) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no case asks a network
    return World(tmp_path, monkeypatch, small_data, tokenized, tokenizer)


def config(**choices: Any) -> Callable[[World], DistillConfig]:
    return lambda world: DistillConfig(**choices)


def a_gpu_that_is_absent(world: World) -> object:
    world.patch.setattr(torch.cuda, "is_available", lambda: False)
    return pick_device("cuda")


CONFIGURATION = [
    Case(
        "temperature of 0", config(temperature=0), ValueError, "temperature is 0; give a finite number greater than 0."
    ),
    Case(
        "temperature as text", config(temperature="2"), TypeError, "temperature is '2'; give a number greater than 0."
    ),
    Case(
        "alpha above 1",
        config(alpha=1.5),
        ValueError,
        "alpha is 1.5; give a finite number between 0 (labels only) and 1 (teacher only).",
    ),
    Case(
        "alpha that is no number",
        config(alpha=math.nan),
        ValueError,
        "alpha is nan; give a finite number between 0 (labels only) and 1 (teacher only).",
    ),
    Case(
        "misspelt preset",
        config(preset="bert-small"),
        ValueError,
        "preset is 'bert-small'; choose one of offline, bert, bert-large.",
    ),
    Case("half an epoch", config(epochs=1.5), TypeError, "epochs is 1.5; give a whole number of at least 1."),
    Case("batch of True", config(batch_size=True), TypeError, "batch_size is True; give a whole number of at least 1."),
    Case(
        "more tokens than positions",
        config(max_length=513),
        ValueError,
        "max_length is 513; give a whole number from 3 to 512.",
    ),
    Case("lean that is 1", config(lean=1), TypeError, "lean is 1; give True or False."),
    Case("negative seed", config(seed=-1), ValueError, "seed is -1; give a whole number from 0 to 4294967295."),
    Case(
        "nothing but warm-up",
        config(warmup_ratio=1.0),
        ValueError,
        "warmup_ratio is 1.0; give a finite number at least 0 and below 1.",
    ),
    Case(
        "teacher that stands still",
        config(teacher_learning_rate=0),
        ValueError,
        "teacher_learning_rate is 0; give a finite number greater than 0.",
    ),
    Case("unknown device", config(device="tpu"), ValueError, "device is 'tpu'; choose one of auto, cpu, cuda, mps."),
    Case(
        "absent device",
        a_gpu_that_is_absent,
        ValueError,
        "device is 'cuda', which this machine lacks; use device='auto'.",
    ),
    Case(
        "two columns alike",
        config(data="a.csv", text_column="label"),
        ValueError,
        "text_column is 'label' and label_column 'label'; name two columns.",
    ),
    Case(
        "validation without training",
        config(validation_data="dev.csv"),
        ValueError,
        "validation_data is 'dev.csv' but data is empty; give the training texts as data.",
    ),
    Case(
        "data that is a number",
        config(data=5),
        TypeError,
        "data is int; give text: a path, a hub name or the name of a column.",
    ),
    Case(
        "home folder of nobody",
        config(data="~nobody-here/a.csv"),
        ValueError,
        "data is '~nobody-here/a.csv', but there is no user 'nobody-here' with a home folder; write the path out "
        "(./~nobody-here/a.csv for a name that begins so).",
    ),
    Case(
        "change that makes no sense",
        lambda world: DistillConfig().replace(weight_decay=-0.1),
        ValueError,
        "weight_decay is -0.1; give a finite number 0 or greater.",
    ),
]

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
PROBABILITIES = LOGITS.softmax(dim=-1)
TOKENS = torch.zeros(2, 5, 7)
ONE_ROW_FOR_EACH = (
    "the logits have shape SHAPE; this loss takes one row of class logits for each example, [N, C]. For the logits of "
    "tokens, [B, L, V], use token_soft_loss and token_hard_loss of kd_helpers.losses, which leave padding out."
)

LOSSES = [
    Case(
        "logits of different shapes",
        lambda world: soft_loss(LOGITS, LOGITS[:, :2], 2.0),
        ValueError,
        "student logits have shape (2, 3) but teacher logits (2, 2); both need the same examples and the same classes.",
    ),
    Case(
        "logits of tokens",
        lambda world: distillation_loss(TOKENS, TOKENS, torch.zeros(2, 5).long(), temperature=2.0, alpha=0.5),
        ValueError,
        ONE_ROW_FOR_EACH.replace("SHAPE", "(2, 5, 7)"),
    ),
    Case(
        "logits of tokens for the soft loss",
        lambda world: soft_loss(TOKENS, TOKENS, 2.0),
        ValueError,
        ONE_ROW_FOR_EACH.replace("SHAPE", "(2, 5, 7)"),
    ),
    Case(
        "logits of one text",
        lambda world: hard_loss(LOGITS[0], torch.tensor(1)),
        ValueError,
        ONE_ROW_FOR_EACH.replace("SHAPE", "(3,)"),
    ),
    Case(
        "label that is no class",
        lambda world: hard_loss(LOGITS, torch.tensor([0, 3])),
        ValueError,
        "label 3 is out of range; labels run from 0 to 2, or −100 for none.",
    ),
    Case(
        "soft loss without a teacher",
        lambda world: distillation_loss(LOGITS, None, torch.tensor([0, 1]), temperature=2.0, alpha=0.5),
        ValueError,
        "alpha is 0.5 but there are no teacher logits; give them, or set alpha=0.",
    ),
    Case(
        "infinite temperature",
        lambda world: soft_targets(LOGITS, math.inf),
        ValueError,
        "temperature is inf; give a finite number greater than 0.",
    ),
    Case(
        "student's probabilities",
        lambda world: soft_loss(PROBABILITIES, LOGITS, 2.0),
        UserWarning,
        "the student's logits look like probabilities (every row sums to 1); the loss takes the outputs before the "
        "softmax.",
    ),
    Case(
        "teacher's probabilities",
        lambda world: soft_loss(LOGITS, PROBABILITIES, 2.0),
        UserWarning,
        "the teacher's logits look like probabilities (every row sums to 1); the loss takes the outputs before the "
        "softmax.",
    ),
]


def two_that_share_weights(world: World) -> None:
    teacher, student = tiny_bert(), tiny_bert(seed=1)
    student.bert = teacher.bert
    require_teacher_and_student(teacher, student)


def the_same_model(world: World) -> None:
    model = tiny_bert()
    require_teacher_and_student(model, model)


def a_hub_that_does_not_answer(world: World) -> object:
    world.patch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    world.patch.setattr(hub.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    return models.load_tokenizer("someone/model")


def a_model_of_other_classes(world: World) -> object:
    models.save_model(world.here / "model", tiny_bert(), world.tokenizer)
    return models.load_classifier("model", ("ham", "spam"), seed=0)


TEACHER_AND_STUDENT = [
    Case(
        "one model in both parts",
        the_same_model,
        ValueError,
        "teacher and student are the same model, so there is nothing to learn; load two.",
    ),
    Case(
        "shared weights",
        two_that_share_weights,
        ValueError,
        "teacher and student share weights, so the teacher would be trained too; copy them.",
    ),
    Case(
        "teacher and student swapped",
        lambda world: require_teacher_and_student(tiny_bert(seed=1), freeze(tiny_bert())),
        ValueError,
        "the student is frozen, so it can't learn; unfreeze it, or swap the two if it is the teacher.",
    ),
    Case(
        "classes of other names",
        lambda world: require_teacher_and_student(freeze(tiny_bert(classes=4)), tiny_bert()),
        ValueError,
        "the teacher's classes are negative, neutral, positive, class 3, the student's negative, neutral, positive; "
        "both must mean the same by the same output.",
    ),
    Case(
        "teacher in train mode",
        lambda world: teacher_forward(tiny_bert().train(), {"input_ids": torch.tensor([[101, 102]])}),
        ValueError,
        "the teacher is in train mode, so dropout changes its logits; call freeze(teacher) first.",
    ),
    Case(
        "module in place of a model",
        lambda world: model_inputs(torch.nn.Linear(2, 2), {"input_ids": torch.tensor([[101, 102]])}),
        TypeError,
        "the model is Linear; give a model of transformers (a PreTrainedModel).",
    ),
    Case(
        "function in place of a model",
        lambda world: model_inputs(lambda input_ids: input_ids, {"input_ids": torch.tensor([[101, 102]])}),
        TypeError,
        "the model is function; give a model of transformers (a PreTrainedModel).",
    ),
    Case(
        "head for other labels",
        lambda world: head_order("someone/model", {0: "Spam", 1: "Ham"}, NAMES),
        ValueError,
        "'someone/model' was trained for the labels Spam, Ham, the data has negative, neutral, positive; name them "
        "alike (id2label in the model's config.json), or take another model.",
    ),
    Case(
        "checkpoint for other labels",
        a_model_of_other_classes,
        ValueError,
        "'model' was trained for the labels negative, neutral, positive, the data has ham, spam; name them alike "
        "(id2label in the model's config.json), or take another model.",
    ),
    Case(
        "layer that the teacher lacks",
        lambda world: copy_layers(tiny_bert(layers=2), (0, 2), seed=0),
        ValueError,
        "layers are (0, 2); the teacher has layers 0 to 1, name at least one.",
    ),
    Case(
        "no layers",
        lambda world: copy_layers(tiny_bert(layers=2), (), seed=0),
        ValueError,
        "layers are (); the teacher has layers 0 to 1, name at least one.",
    ),
    Case(
        "layers of another kind of model",
        lambda world: copy_layers(tiny_distilbert(), (0,), seed=0),
        ValueError,
        "layers are copied from a BERT, this teacher is a distilbert; name a student.",
    ),
    Case(
        "model that the cache lacks",
        lambda world: models.load_classifier("someone/model", NAMES, seed=0),
        FileNotFoundError,
        "model 'someone/model' is not in the hub's local cache (HF_HUB_OFFLINE is set), or not whole; run `hf download "
        "someone/model` where there is a network.",
    ),
    Case(
        "hub out of reach",
        a_hub_that_does_not_answer,
        ConnectionError,
        "'someone/model' is no local file or folder and the Hugging Face hub can't be reached; download it first "
        "(`hf download`) and set HF_HUB_OFFLINE=1, or give a local path, or use preset='offline'.",
    ),
]

TEACHER_LOGITS = [
    Case(
        "ids and logits that don't fit",
        lambda world: TeacherLogits(torch.arange(3), LOGITS),
        ValueError,
        "ids have shape (3,) and logits (2, 3); give N ids and a row of logits for each.",
    ),
    Case(
        "one logit for each text",
        lambda world: TeacherLogits(torch.arange(2), LOGITS[:, 0]),
        ValueError,
        "ids have shape (2,) and logits (2,); give N ids and a row of logits for each.",
    ),
    Case(
        "teacher that diverged",
        lambda world: TeacherLogits(torch.arange(2), LOGITS / 0),
        ValueError,
        "the teacher's logits are not all finite; it diverged, so fine-tune it anew.",
    ),
    Case(
        "teacher logits that are probabilities",
        lambda world: TeacherLogits(torch.arange(2), PROBABILITIES),
        ValueError,
        "the teacher's logits are probabilities (every row sums to 1); give the outputs before the softmax.",
    ),
    Case(
        "teacher logits for other classes",
        lambda world: TeacherLogits(torch.arange(2), LOGITS).require_classes(("ham", "spam")),
        ValueError,
        "the teacher logits are for 3 classes, the data has 2 (ham, spam); use a teacher that was trained for these "
        "classes.",
    ),
]

REVIEWS = "text,label\n" + "".join(f"review {i},{'bad' if i % 3 else 'good'}\n" for i in range(30))


def own_data(content: str | bytes | None, name: str = "a.csv", **choices: Any) -> Callable[[World], DataSplits]:
    """Read a file with this content, or none where it is None."""

    def call(world: World) -> DataSplits:
        if content is not None:
            world.file(content, name)
        return load_splits(DistillConfig(data=name, **choices))

    return call


def held_out(content: str, **choices: Any) -> Callable[[World], DataSplits]:
    """Read good training texts beside a test file with this content."""

    def call(world: World) -> DataSplits:
        return load_splits(
            DistillConfig(data=world.file(REVIEWS, "a.csv"), test_data=world.file(content, "test.csv"), **choices)
        )

    return call


def splits_that_overlap(world: World) -> None:
    validation = datasets.concatenate_datasets([world.splits.validation, world.splits.test.select(range(2))])
    require_disjoint(dataclasses.replace(world.splits, validation=validation))


def trained_on_test(world: World) -> object:
    train = datasets.concatenate_datasets([world.splits.train, world.splits.test])
    return runs.distill(DistillConfig(alpha=0.0), data=dataclasses.replace(world.splits, train=train))


OTHER_FORMATS = (
    "can't be read; give a file that ends in .csv, .tsv, .jsonl, .json, .parquet (save a spreadsheet as CSV, unpack an "
    "archive), or as data the name OWNER/NAME of a hub dataset."
)

DATA = [
    Case(
        "more texts than there are",
        lambda world: load_splits(DistillConfig(train_size=20_000, transfer_size=5_000)),
        ValueError,
        "25,000 training texts were asked for but the pool has 24,131; lower train_size (20,000), transfer_size "
        "(5,000) or teacher_train_size (10,000).",
    ),
    Case(
        "nothing to tokenize",
        lambda world: tokenize(world.splits.transfer, world.tokenizer, 24),
        ValueError,
        "there are no texts to tokenize; give at least one.",
    ),
    Case(
        "test within validation",
        splits_that_overlap,
        ValueError,
        "2 texts stand both in test and in validation, so a score on test says nothing about new texts; cut the splits "
        "so that each text is in one of them.",
    ),
    Case(
        "test within training",
        trained_on_test,
        ValueError,
        "40 texts stand both in test and in train, so a score on test says nothing about new texts; cut the splits so "
        "that each text is in one of them.",
    ),
    Case(
        "missing file",
        own_data(None, "misspelt.csv"),
        FileNotFoundError,
        "there is no file 'misspelt.csv' in {here}; check the path.",
    ),
    Case("spreadsheet", own_data(b"PK\x03\x04", "a.xlsx"), ValueError, f"'a.xlsx' {OTHER_FORMATS}"),
    Case(
        "empty file",
        own_data(""),
        ValueError,
        "a.csv has no column 'text' but none; name the right one as text_column.",
    ),
    Case(
        "folder",
        lambda world: ((world.here / "b.csv").mkdir(), own_data(None, "b.csv")(world)),
        ValueError,
        "'b.csv' is a folder; give one file.",
    ),
    Case(
        "no column of labels",
        own_data(REVIEWS, label_column=""),
        ValueError,
        "label_column is empty; name the column of the labels, or distil without labels (alpha=1, teacher_epochs=0 and "
        "a fine-tuned teacher_checkpoint).",
    ),
    Case(
        "quotation mark that swallows rows",
        own_data(REVIEWS + '"begins,good\na,bad\nends",good\n"a, b",bad\n'),
        ValueError,
        "a.csv, line 32: the quotation mark that opens here closes in line 34, and whole rows stand between; close it "
        "earlier, or double the marks that belong to a text.",
    ),
    Case(
        "codes that became floats",
        own_data(REVIEWS.replace("bad", "12345678901234568.0").replace("good", "2.0")),
        ValueError,
        "a.csv, line 3: the label 12345678901234568.0 was stored as a float, which can't tell whole numbers of this "
        "size apart; store the labels as text or as integers.",
    ),
    Case(
        "labels that look alike",
        own_data(REVIEWS + "fine,go\u200dod\n"),
        ValueError,
        "a.csv, line 32: the label 'go\\u200dod' differs from 'good' in characters that look alike only; write them "
        "alike.",
    ),
    Case("header without rows", own_data("text,label\n"), ValueError, "a.csv has no rows; give it some."),
    Case(
        "missing column",
        own_data(REVIEWS, label_column="stars"),
        ValueError,
        "a.csv has no column 'stars' but 'text', 'label'; name the right one as label_column, or distil without labels "
        "(alpha=1, teacher_epochs=0 and a fine-tuned teacher_checkpoint).",
    ),
    Case(
        "one class only",
        own_data("text,label\none,good\ntwo,good\n"),
        ValueError,
        "a.csv has 1 label ('good'); have 2 to 1,000, or name the right label_column.",
    ),
    Case(
        "rare class",
        own_data(REVIEWS + "so so,fair\nnot bad,fair\n"),
        ValueError,
        "a.csv: label 'fair' has 2 texts once copies are removed; every class needs at least 3, one for each split "
        "that is made of this file.",
    ),
    Case(
        "text with a comma",
        own_data("text,label\nwell, well,good\n"),
        ValueError,
        "a.csv, line 2: 3 fields where the header has 2; put texts that hold the separator into quotes.",
    ),
    Case(
        "another encoding",
        own_data(REVIEWS.encode() + b"caf\xe9,good\n"),
        ValueError,
        "a.csv, line 32: the file is not UTF-8; save it as UTF-8.",
    ),
    Case(
        "label missing in test",
        held_out("text,label\nfine,good\nwell,\n"),
        ValueError,
        "test.csv, line 3: a test text has no label; label it or remove it.",
    ),
    Case(
        "label that train lacks",
        held_out("text,label\nfine,fair\n"),
        ValueError,
        "test.csv, line 2: the label 'fair' does not occur in train (bad, good).",
    ),
    Case(
        "test without a text",
        held_out("text,label\n ,good\n"),
        ValueError,
        "test has no text left once empty, disputed and copied rows are removed; give it more.",
    ),
    Case(
        "dataset that the cache lacks",
        lambda world: load_splits(DistillConfig(data="someone/texts")),
        FileNotFoundError,
        "dataset 'someone/texts' is not in the hub's local cache (HF_HUB_OFFLINE is set), or not whole; run `hf "
        "download someone/texts --repo-type dataset` where there is a network.",
    ),
]

BASELINE = DistillConfig(alpha=0.0, batch_size=16, precision="float32", device="cpu")


def train(world: World, student: torch.nn.Module, config: DistillConfig = BASELINE) -> None:
    batches = training_batches(world.tokenized, world.tokenizer, config.batch_size, seed=0)
    loop.train_classifier(student, batches, config=config, precision=torch.float32, description=None)


def one_epoch(student: torch.nn.Module, batches: Any) -> loop.EpochLosses:
    optimizer = make_optimizer(student, learning_rate=1e-3, weight_decay=0.0)
    return loop.distill_epoch(
        student, batches, optimizer, make_scheduler(optimizer, steps=1), temperature=2.0, alpha=0.0
    )


class Squared(NamedTuple):
    total: torch.Tensor


def fitted(batches: Any, **options: Any) -> object:
    """Fit a line of one weight."""
    line = torch.nn.Linear(1, 1)
    return loop.fit(
        line,
        batches,
        lambda batch: Squared(line(batch["x"]).square().sum()),
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        scheduler=torch.optim.lr_scheduler.ConstantLR,
        description=None,
        **options,
    )


def a_student_with_bad_weights(world: World) -> None:
    student = tiny_bert()
    student.classifier.bias.data.fill_(math.nan)
    train(world, student)


def too_little_memory(batch_size: int) -> Callable[[World], None]:
    def call(world: World) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise MemoryError

        world.patch.setattr(loop, "training_step", fail)
        train(world, tiny_bert(), BASELINE.replace(batch_size=batch_size))

    return call


def finished_run(world: World) -> dict[str, Any]:
    """Save a run in the folder `run`, without the training; returns its provenance."""
    provenance = {"config": BASELINE.to_dict(), "texts": "abc"}
    predictions = Predictions(torch.arange(2), LOGITS, torch.tensor([0, 1]))
    metrics = {"test": {"accuracy": 1.0}, "labelled": 64, "unlabelled": 0, "steps": 4}
    run = runs.DistillResult(BASELINE, tiny_bert(), world.tokenizer, [], metrics, predictions, world.here / "run")
    runs.save_run(run, provenance)
    return provenance


def a_run_with_another_seed(world: World) -> None:
    provenance = finished_run(world)
    runs.find_run(world.here / "run", provenance | {"config": BASELINE.replace(seed=1).to_dict()})


def a_run_on_other_texts(world: World) -> None:
    runs.find_run(world.here / "run", finished_run(world) | {"texts": "abd"})


def a_damaged_run(world: World) -> None:
    finished_run(world)
    world.file("[]", "run/history.json")
    runs.load_run("run")


def logits_of_another_teacher(world: World) -> None:
    ids = torch.tensor(world.splits.student_train["id"][:])
    runs.distill(BASELINE, data=world.splits, teacher_logits=TeacherLogits(ids, torch.zeros(len(ids), 4)))


TRAINING = [
    Case(
        "no batches",
        lambda world: one_epoch(tiny_bert(), []),
        ValueError,
        "there are no batches to train on; give at least one.",
    ),
    Case(
        "fewer batches than steps",
        lambda world: fitted([{"x": torch.ones(1)}] * 2, steps=3),
        ValueError,
        "3 steps need as many batches, there are 2; give more, or a loader.",
    ),
    Case(
        "stream that ends too soon",
        lambda world: fitted(iter([{"x": torch.ones(1)}] * 2), steps=3),
        ValueError,
        "3 steps need as many batches, the stream had 2; give more, or a loader.",
    ),
    Case(
        "no steps",
        lambda world: fitted([{"x": torch.ones(1)}], steps=0),
        ValueError,
        "steps is 0; give a whole number of at least 1.",
    ),
    Case(
        "lean training of a list",
        lambda world: fitted([{"x": torch.ones(1)}], steps=1, lean=True),
        ValueError,
        "lean training needs a loader of tokenized texts; give one, or lean=False.",
    ),
    Case(
        "training that diverges",
        a_student_with_bad_weights,
        loop.DivergedError,
        "training diverged at step 1 (total nan, soft 0, hard nan, gradient norm nan): lower the learning "
        "rate, or train in float32.",
    ),
    Case(
        "too little memory",
        too_little_memory(batch_size=16),
        MemoryError,
        "a step with batch_size=16 and 24 tokens a text needs more memory than there is; try batch_size=8.",
    ),
    Case(
        "too little memory for one text",
        too_little_memory(batch_size=1),
        MemoryError,
        "a step with batch_size=1 and 24 tokens a text needs more memory than there is; try a max_length below 24.",
    ),
    Case(
        "logits of another teacher",
        logits_of_another_teacher,
        ValueError,
        "the teacher logits are for 4 classes, the data has 3 (negative, neutral, positive); use a teacher that was "
        "trained for these classes.",
    ),
    Case(
        "folder of another run",
        a_run_with_another_seed,
        ValueError,
        "{here}/run holds a finished run with seed 0 (now 1); choose another output_dir, or delete it.",
    ),
    Case(
        "folder of a run on other texts",
        a_run_on_other_texts,
        ValueError,
        "{here}/run holds a finished run with other texts; choose another output_dir, or delete it.",
    ),
    Case(
        "folder without a run",
        lambda world: runs.load_run(world.here),
        FileNotFoundError,
        "{here} holds no finished run; give the folder of one.",
    ),
    Case(
        "damaged run", a_damaged_run, ValueError, "the run in run is damaged (history.json); delete it and run again."
    ),
]

PARAMETERS = 'x: float = 1.0\ncount: int = 2\nloud: bool = False\noutput_dir: str = ""'


def notebook(world: World, parameters: str = PARAMETERS) -> Path:
    """Write a notebook that declares these parameters and does nothing."""
    cell = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), "toy.ipynb")
    return Path("toy.ipynb")


def swept(grid: dict[str, list[Any]], **options: Any) -> Callable[[World], pd.DataFrame]:
    return lambda world: sweep.sweep(notebook(world), grid, **{"out": world.here / "out"} | options)


def swept_notebook(parameters: str) -> Callable[[World], sweep.Notebook]:
    return lambda world: sweep.read_notebook(notebook(world, parameters))


def a_sweep_of_another_notebook(world: World) -> None:
    plan = {"notebook": "other", "provenance": {}, "settings": []}
    artifacts.save_json(world.here / "plan.json", plan | {"digest": artifacts.fingerprint(plan)})
    sweep.sweep(notebook(world), {"x": [1]}, out=world.here)


SWEEPS = [
    Case(
        "unknown parameter",
        swept({"y": [1]}),
        ValueError,
        "toy has no parameter 'y'; it has x, count, loud.",
    ),
    Case("parameter of another type", swept({"count": [1.5]}), ValueError, "count is '1.5'; give a whole number."),
    Case("neither True nor False", swept({"loud": ["yes"]}), ValueError, "loud is 'yes'; give True or False."),
    Case("value twice", swept({"x": [1, 2, 1.0]}), ValueError, "x lists 1.0 twice; give each value once."),
    Case("no values", swept({"x": []}), ValueError, "x has no values; give at least one."),
    Case(
        "varied and fixed",
        swept({"x": [1]}, fixed={"x": 2}),
        ValueError,
        "x is given both as a grid and as a fixed value; give one of them.",
    ),
    Case(
        "output_dir chosen",
        swept({"output_dir": ["here"]}),
        ValueError,
        "output_dir is set by the sweep, a folder for each run; choose the sweep's folder with --out.",
    ),
    Case(
        "value outside its range",
        lambda world: sweep.plan(sweep.read_notebook(SWEPT), {"temperature": [2, 0]}),
        ValueError,
        "temperature is 0.0; give a finite number greater than 0.",
    ),
    Case(
        "texts that no run could read",
        lambda world: sweep.plan(sweep.read_notebook(SWEPT), {"data": ["misspelt.csv"]}),
        ValueError,
        "there is no file 'misspelt.csv' in {here}; check the path.",
    ),
    Case(
        "more jobs than cores",
        swept({"x": [1]}, jobs=10_000),
        ValueError,
        "jobs is 10000; this machine has {cores} cores, so give a whole number from 1 to {cores}.",
    ),
    Case(
        "missing notebook",
        lambda world: sweep.read_notebook("nowhere.ipynb"),
        FileNotFoundError,
        "there is no notebook nowhere.ipynb; give the path of an .ipynb file.",
    ),
    Case(
        "file that is no notebook",
        lambda world: sweep.read_notebook(world.file("print(1)", "script.py")),
        ValueError,
        "script.py is no notebook; give the path of an .ipynb file.",
    ),
    Case(
        "notebook without parameters",
        swept_notebook(""),
        ValueError,
        "toy.ipynb has no parameter 'output_dir', so its results can't be collected; declare it in the cell tagged "
        "'parameters', and write metrics.json there.",
    ),
    Case(
        "parameter that is a list",
        swept_notebook("layers = [0, 2]"),
        ValueError,
        "layers in toy.ipynb can't be swept; give it a default that is a number, text, True or False.",
    ),
    Case(
        "--out that is a file",
        lambda world: swept({"x": [1]}, out=world.here / world.file("", "taken"))(world),
        ValueError,
        "{here}/taken is a file; choose a folder for --out.",
    ),
    Case(
        "--out of another notebook",
        a_sweep_of_another_notebook,
        ValueError,
        "{here} holds a sweep of other, not of toy; choose another --out.",
    ),
    Case(
        "damaged plan",
        lambda world: sweep.collect((world.here / world.file("{}", "plan.json")).parent),
        ValueError,
        "{here}/plan.json is damaged; delete it and give the same command again, which finds the finished runs.",
    ),
    Case(
        "folder without a sweep",
        lambda world: sweep.collect(world.here),
        FileNotFoundError,
        "{here} holds no sweep; give the folder that was the sweep's --out.",
    ),
    Case(
        "surface of three parameters",
        lambda world: sweep.surface(
            pd.DataFrame({"temperature": [1, 1], "alpha": [0, 0], "seed": [0, 0], "nll": [1.0, 2.0]}), "nll"
        ),
        ValueError,
        "another parameter varies beside temperature, alpha and seed; keep the rows of one value of it.",
    ),
]


def a_full_disk(world: World) -> None:
    with artifacts.explained(world.here / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


ARTIFACTS = [
    Case(
        "damaged JSON",
        lambda world: artifacts.load_json(world.here / world.file('{"a": ', "a.json")),
        ValueError,
        "{here}/a.json is damaged; delete it and run again.",
    ),
    Case(
        "file where a folder is needed",
        lambda world: artifacts.save_json(world.here / world.file("", "taken") / "a.json", {}),
        OSError,
        "{here}/taken/a.json can't be written: a file stands where a folder is needed; set KD_ARTIFACTS (or the output "
        "folder) to a place that you may write to.",
    ),
    Case(
        "file in place of the artifacts",
        lambda world: artifacts.get_or_build(world.here / world.file("", "taken") / "teachers" / "a", Path.touch),
        OSError,
        "{here}/taken/teachers/a can't be written: a file stands where a folder is needed; set KD_ARTIFACTS (or the "
        "output folder) to a place that you may write to.",
    ),
    Case(
        "full disk",
        a_full_disk,
        OSError,
        "{here}/a.json can't be written: the disk is full; free some space, then run again: what was finished before "
        "is kept.",
    ),
]

TABLE = [
    *CONFIGURATION,
    *LOSSES,
    *TEACHER_AND_STUDENT,
    *TEACHER_LOGITS,
    *DATA,
    *TRAINING,
    *SWEEPS,
    *ARTIFACTS,
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_bad_input_gets_its_sentence(world: World, case: Case) -> None:
    with warnings.catch_warnings():
        if issubclass(case.error, Warning):  # raised where it is given, so that both are looked at in one way
            warnings.simplefilter("error", case.error)
        with pytest.raises(case.error) as caught:
            case.call(world)
    sentence = str(caught.value)
    # Not str.format: a sentence may hold braces of its own.
    wanted = case.sentence.replace("{here}", str(world.here)).replace("{cores}", str(joblib.cpu_count()))
    assert sentence == wanted
    assert type(caught.value) is case.error, "not one of a kind that only happens to be caught"
    assert "\n" not in sentence
    assert len(sentence) <= LONGEST_SENTENCE
    assert sentence.endswith(".")


def test_the_table_is_long_and_names_each_case_once() -> None:
    assert len(TABLE) >= 40
    assert len({case.name for case in TABLE}) == len(TABLE)
