"""Every kind of model that people fine-tune, as teacher and as student, from a folder to a pipeline.

Models are tiny and random, tokenizers of the kind's own (see `support.architectures`). Each kind is the student of a
BERT here; each as teacher, cross pairs and the comparison of all kinds with and without `lean` are in the longer part.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import datasets
import pytest
import torch
from support.architectures import KINDS, tiny, without_dropout
from support.runs import same_run
from support.trainer import arguments
from torch.testing import assert_close
from transformers import pipeline

from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, evaluation_batches, tokenize, training_batches
from kd_helpers.loop import classifier_loss, fit, recipe
from kd_helpers.losses import distillation_loss
from kd_helpers.models import (
    freeze,
    load_classifier,
    load_student,
    load_teacher,
    load_tokenizer,
    match_tokenizer,
    model_inputs,
    save_model,
    teacher_forward,
    warn_if_swapped,
)
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill, load_run
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import fine_tuned_teacher, load_teacher_logits
from kd_helpers.trainer import DistillationTrainer, TeacherStudentCollator, with_teacher_tokens

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown", "ignore:the student .* has")

LABELS = ("bad", "good", "mid")
# Padding changes what these compute for a text: their convolutions, landmarks or blocks reach into it.
PADDING_MATTERS = {"convbert", "nystromformer", "big_bird", "fnet"}
# Attention that goes through the interface of transformers in many ways, tables that scale or are shared.
LEAN_IN_MANY_WAYS = ("roberta", "xlnet", "gpt2", "qwen2", "gemma", "t5", "bart", "modernbert", "funnel", "convbert")
WORDS = (
    "good",
    "bad",
    "what",
    "a",
    "day",
    "I",
    "love",
    "this",
    "not",
    "great",
    "today",
    "it",
    "is",
    "so",
    "me",
    "123!",
)


def _texts(start: int, count: int) -> datasets.Dataset:
    """Different texts of 1 to 9 words, the label by their first."""
    chosen = [[WORDS[(index * step + step) % len(WORDS)] for step in range(1, 2 + index % 9)] for index in range(200)]
    texts = [f"{' '.join(words)} {index}" for index, words in enumerate(chosen)][start : start + count]
    return datasets.Dataset.from_dict(
        {
            "id": list(range(start, start + count)),
            "text": texts,
            "label": [WORDS.index(text.split()[0]) % 3 for text in texts],
        }
    )


DATA = DataSplits(
    train=_texts(0, 24),
    transfer=_texts(24, 8).map(lambda _: {"label": -100}),
    teacher_train=_texts(0, 24),
    validation=_texts(40, 8),
    test=_texts(60, 8),
    label_names=LABELS,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every kind, its labels in another order than the data's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, kind in enumerate(KINDS):
        save_model(folder / kind, *tiny(kind, ("Mid", "bad", "GOOD"), seed=seed))
    return folder


@pytest.fixture
def shared_artifacts(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One artifacts folder for the whole file, so that a teacher and its logits are made once."""
    monkeypatch.setenv("KD_ARTIFACTS", str(checkpoints / "artifacts"))


def pair(checkpoints: Path, teacher: str, student: str, **changes: object) -> DistillConfig:
    usual = {
        "teacher_checkpoint": str(checkpoints / teacher),
        "student_checkpoint": str(checkpoints / student),
        "alpha": 0.5,
        "max_steps": 3,
        "batch_size": 8,
        "max_length": 48,
        "learning_rate": 1e-3,
        "teacher_epochs": 0,
        "device": "cpu",
        "precision": "float32",
    }
    return DistillConfig(**usual | changes)


def run_all_the_way(config: DistillConfig, kind: str) -> None:
    """Distil, save, reload, and ask a pipeline, which knows nothing of this package."""
    run = distill(config, data=DATA)
    reloaded = load_run(run.folder)
    assert same_run(reloaded, run)
    assert all(len(entry["losses"]["soft"]) > 0 for entry in run.history)
    before = load_student(config, LABELS, load_tokenizer(config.student_source)).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in reloaded.student.state_dict().items())
    classify = pipeline("text-classification", str(run.folder / "student"), top_k=None, device="cpu")
    wanted = run.predictions.logits.softmax(dim=-1)
    for text, scores in zip(DATA.test["text"], wanted, strict=True):
        said = {answer["label"]: answer["score"] for answer in classify([text])[0]}
        assert said.keys() == set(LABELS)
        assert sum(said.values()) == pytest.approx(1, abs=1e-5)
        if kind not in PADDING_MATTERS:
            assert [said[label] for label in LABELS] == pytest.approx(scores.tolist(), abs=1e-4)


@pytest.mark.usefixtures("shared_artifacts")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_student_of_bert(kind, checkpoints):
    config = pair(checkpoints, "bert", kind)
    warn_if_swapped(config)
    run_all_the_way(config, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_every_kind_is_put_into_the_order_of_the_data(kind, checkpoints):
    model, tokenizer = tiny(kind, ("Mid", "bad", "GOOD"), seed=KINDS.index(kind))
    loaded = load_classifier(str(checkpoints / kind), LABELS, seed=0).eval()
    inputs = {"input_ids": torch.tensor([tokenizer("what a good day")["input_ids"]])}
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, model(**inputs).logits[:, [1, 2, 0]])
    assert loaded.config.id2label == dict(enumerate(LABELS))


def lean_and_not(kind: str, folder: Path) -> None:
    config = pair(folder, kind, kind, weight_decay=0.0)
    tokenizer = load_tokenizer(str(folder / kind))
    model = without_dropout(load_student(config, LABELS, tokenizer))
    attention = model.config._attn_implementation
    tokenized = tokenize(DATA.train, tokenizer, config.max_length)
    losses, weights = [], []
    for lean in (False, True):
        student = copy.deepcopy(model)
        batches = training_batches(tokenized, tokenizer, config.batch_size, seed=0)
        loss_of = classifier_loss(student, temperature=1.0, alpha=0.0)
        seed_everything(0)  # BigBird draws blocks of tokens
        progress = fit(student, batches, loss_of, steps=5, **recipe(config, 5), lean=lean, description=None)
        assert student.config._attn_implementation == attention
        losses.append(progress.curve("total"))
        weights.append(student.state_dict())
    assert losses[0].std() > 0.005
    assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():  # AdamW makes a whole step of a gradient that is nothing but rounding
        assert_close(weights[1][name], value, rtol=0, atol=5e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", LEAN_IN_MANY_WAYS)
def test_lean_training_is_ordinary_training(kind, checkpoints):
    lean_and_not(kind, checkpoints)


@pytest.mark.longer
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(LEAN_IN_MANY_WAYS)))
def test_lean_training_is_ordinary_training_for_the_other_kinds(kind, checkpoints):
    lean_and_not(kind, checkpoints)


@pytest.mark.longer
@pytest.mark.usefixtures("shared_artifacts")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_teacher_of_distilbert(kind, checkpoints):
    config = pair(checkpoints, kind, "distilbert", teacher_epochs=1)
    run_all_the_way(config, "distilbert")
    setup = resolve(config, DATA)
    teacher, tokenizer = fine_tuned_teacher(setup), setup.tokenizers.teacher
    cached = load_teacher_logits(setup, "train")
    for index in range(0 if kind in PADDING_MATTERS else len(DATA.train)):  # one by one, without padding
        (batch,) = evaluation_batches(tokenize(DATA.train.select([index]), tokenizer, config.max_length), tokenizer)
        alone = teacher_forward(teacher, batch, torch.float32)
        assert_close(cached.lookup(batch["id"]), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.longer
@pytest.mark.usefixtures("shared_artifacts")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_it_is_gives_its_own_logits(kind, checkpoints):
    config = pair(checkpoints, kind, "distilbert")
    cached = load_teacher_logits(resolve(config, DATA), "student_train")
    teacher, tokenizer = freeze(load_teacher(config, LABELS)), load_tokenizer(config.teacher_source)
    teacher.config.pad_token_id = tokenizer.pad_token_id
    batches = evaluation_batches(tokenize(DATA.student_train, tokenizer, config.max_length), tokenizer)
    for batch in batches:
        assert_close(cached.lookup(batch["id"]), teacher_forward(teacher, batch, torch.float32), rtol=1e-5, atol=1e-5)


def trainer_loss(kind: str, folder: Path, out: Path) -> None:
    """One step of the Trainer with an online teacher of another vocabulary, against the loss by its formula."""
    tokenizers = [load_tokenizer(str(folder / name)) for name in (kind, "camembert")]
    loaded = [load_classifier(str(folder / name), LABELS, seed=0) for name in (kind, "camembert")]
    student, teacher = without_dropout(loaded[0]), freeze(loaded[1])
    for model, tokenizer in zip((student, teacher), tokenizers, strict=True):
        match_tokenizer(model, tokenizer, 48, kind)
    own = [tokenize(DATA.train, tokenizer, 48) for tokenizer in tokenizers]
    texts, collate = with_teacher_tokens(*own), TeacherStudentCollator(*tokenizers)
    batch = collate([{name: text[name] for name in text if name not in ("id", "length")} for text in texts])
    read = {name.removeprefix("teacher_"): value for name, value in batch.items() if name.startswith("teacher_")}
    with torch.no_grad():
        wanted = distillation_loss(
            student.train()(**model_inputs(student, batch)).logits,
            teacher_forward(teacher, read),
            batch["labels"],
            temperature=3.0,
            alpha=0.7,
        )
    trainer = DistillationTrainer(
        student,
        arguments(out, per_device_train_batch_size=len(texts), max_steps=1),
        teacher_model=teacher,
        temperature=3.0,
        alpha=0.7,
        train_dataset=texts,
        data_collator=collate,
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(float(wanted.total), rel=1e-4)
    assert entry["soft_loss"] == pytest.approx(float(wanted.soft), rel=1e-4)


@pytest.mark.parametrize("kind", LEAN_IN_MANY_WAYS)
def test_the_trainer_gives_each_model_its_own_tokens(kind, checkpoints, tmp_path):
    trainer_loss(kind, checkpoints, tmp_path)


@pytest.mark.longer
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(LEAN_IN_MANY_WAYS)))
def test_the_trainer_gives_each_model_of_the_other_kinds_its_own_tokens(kind, checkpoints, tmp_path):
    trainer_loss(kind, checkpoints, tmp_path)


CROSS = [*itertools.pairwise(KINDS), *((KINDS[-1 - index], kind) for index, kind in enumerate(KINDS[::4]))]


@pytest.mark.longer
@pytest.mark.usefixtures("shared_artifacts")
@pytest.mark.parametrize(("teacher", "student"), CROSS, ids=" teaches ".join)
def test_kinds_teach_each_other(teacher, student, checkpoints):
    run_all_the_way(pair(checkpoints, teacher, student, lean=False), student)
