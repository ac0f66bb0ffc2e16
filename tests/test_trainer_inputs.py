"""What the Trainer is given: streams, texts without labels, two vocabularies, models in wrappers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from support.hub_cache import word_tokenizer
from support.models import tiny_bert
from support.processes import TWO, free_port, path_with_tests
from support.trainer import SOFTENING, arguments, collator
from support.trainer_streams import shards_of, train
from torch import nn
from torch.testing import assert_close
from transformers import BertForSequenceClassification

from kd_helpers import DistillationTrainer
from kd_helpers.data import tokenize
from kd_helpers.losses import distillation_loss
from kd_helpers.models import freeze, save_model
from kd_helpers.shards import cache_shards
from kd_helpers.teacher import attach, cached_logits
from kd_helpers.trainer import TeacherStudentCollator, with_teacher_tokens

WORDS = ["good", "bad", "plain", *map(str, range(80))]


@pytest.fixture
def tokenizers():
    """Of the student and of the teacher: the same words, other numbers."""
    return word_tokenizer(WORDS), word_tokenizer(WORDS[::-1])


def with_table(model: BertForSequenceClassification, rows: int) -> BertForSequenceClassification:
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture
def student():
    return with_table(tiny_bert(1, dropout=0.0), 96)


@pytest.fixture
def teacher():
    model = with_table(tiny_bert(seed=1), 100)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return freeze(model)


@pytest.fixture
def raw() -> datasets.Dataset:
    """64 texts of 2 to 4 words, each fourth without a label."""
    texts = [" ".join([WORDS[i % 3], *(str(i + j) for j in range(1 + i % 3))]) for i in range(64)]
    labels = [i % 3 if i % 4 else -100 for i in range(64)]
    return datasets.Dataset.from_dict({"id": range(64), "text": texts, "label": labels})


@pytest.fixture
def cached(own_artifacts, raw, teacher, tokenizers) -> datasets.Dataset:
    """The student's tokens with the logits of a teacher that read its own."""
    own = tokenize(raw, tokenizers[1], 16)
    return attach(tokenize(raw, tokenizers[0], 16), cached_logits(teacher, own, tokenizers[1], precision=torch.float32))


def make(folder: Path, model, texts, tokenizer, *, teacher_model=None, collate=None, **changes) -> DistillationTrainer:
    softening = SOFTENING | {name: changes.pop(name) for name in SOFTENING if name in changes}
    return DistillationTrainer(
        model,
        arguments(folder, per_device_train_batch_size=16, **changes),
        teacher_model=teacher_model,
        train_dataset=texts,
        data_collator=collate or collator(tokenizer),
        **softening,
    )


def trained(*given, **options) -> DistillationTrainer:
    trainer = make(*given, **options)
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_weights(one, other, atol: float) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert_close(value, expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# Two vocabularies


def test_a_teacher_that_has_another_vocabulary_reads_its_own_tokens(
    tmp_path, raw, cached, student, teacher, tokenizers
):
    texts = with_teacher_tokens(tokenize(raw, tokenizers[0], 16), tokenize(raw, tokenizers[1], 16))
    online = trained(
        tmp_path,
        with_table(tiny_bert(1, dropout=0.0), 96),
        texts,
        None,
        teacher_model=teacher,
        collate=TeacherStudentCollator(*tokenizers, pad_to_multiple_of=8),
    )
    by_cache = trained(tmp_path, student, cached, tokenizers[0])
    assert len(logged(online, "soft_loss")) == 4
    for name in ("soft_loss", "fidelity"):
        assert logged(online, name) == pytest.approx(logged(by_cache, name), abs=1e-5)
    same_weights(online.model, by_cache.model, atol=1e-5)
    measured = online.evaluate(texts)
    assert measured["eval_soft_loss"] == pytest.approx(by_cache.evaluate(cached)["eval_soft_loss"], abs=1e-5)
    without = online.evaluate(tokenize(raw, tokenizers[0], 16))
    assert not {"eval_soft_loss", "eval_fidelity"} & without.keys(), "the student's tokens are not the teacher's"
    assert without["eval_loss"] == pytest.approx(measured["eval_hard_loss"], abs=1e-5)


SENTENCE = (
    r"the teacher's vocabulary has 100 tokens, the student's 96, and train_dataset has the student's tokens only; add "
    r"the teacher's \(with_teacher_tokens .*, or give the teacher's cached logits in a column 'teacher_logits'"
)


def test_the_students_tokens_are_not_given_to_a_teacher_that_has_others(tmp_path, raw, student, teacher, tokenizers):
    texts = tokenize(raw, tokenizers[0], 16)
    with pytest.raises(ValueError, match=SENTENCE):
        make(tmp_path, student, texts, tokenizers[0], teacher_model=teacher)
    rows = list(texts)  # of which nobody says what columns they have
    with pytest.raises(ValueError, match=SENTENCE):
        trained(tmp_path, student, rows, tokenizers[0], teacher_model=teacher)


def test_tokens_of_other_texts_are_refused(raw, tokenizers):
    other = raw.select(range(63, -1, -1))
    with pytest.raises(ValueError, match="hold other texts, or in another order; tokenize the same dataset"):
        with_teacher_tokens(tokenize(raw, tokenizers[0], 16), tokenize(other, tokenizers[1], 16))


def test_each_half_of_a_batch_is_padded_by_its_tokenizer(raw):
    student, teacher = (
        word_tokenizer(WORDS),
        word_tokenizer(
            WORDS,
        ),
    )
    teacher.add_tokens(["[FILL]"])
    teacher.pad_token = "[FILL]"
    teacher.padding_side = "left"
    texts = with_teacher_tokens(tokenize(raw, student, 16), tokenize(raw, teacher, 16)).select(range(3))
    batch = TeacherStudentCollator(student, teacher, pad_to_multiple_of=8)([dict(text) for text in texts])
    assert batch["input_ids"].shape == batch["teacher_input_ids"].shape == (3, 8)
    assert batch["input_ids"][0, -1] == student.pad_token_id
    assert batch["teacher_input_ids"][0, 0] == teacher.pad_token_id == len(teacher) - 1
    assert batch["teacher_attention_mask"][0].tolist() == batch["attention_mask"][0].flip(0).tolist()
    assert batch["labels"].tolist() == [-100, 1, 2]


# Texts without labels


def test_pure_distillation_needs_no_labels(tmp_path, cached, student, tokenizers):
    bare = cached.remove_columns("label")
    with_labels = trained(tmp_path, with_table(tiny_bert(1, dropout=0.0), 96), cached, tokenizers[0], alpha=1.0)
    without = trained(tmp_path, student, bare, tokenizers[0], alpha=1.0)
    same_weights(without.model, with_labels.model, atol=0)
    assert logged(without, "soft_loss") == logged(with_labels, "soft_loss")
    assert logged(without, "loss") == pytest.approx(logged(without, "soft_loss"), abs=1e-6)
    assert not logged(without, "hard_loss")
    measured = without.evaluate(bare)
    logits = torch.tensor(without.predict(bare).predictions)
    teacher_logits = torch.tensor(cached["teacher_logits"][:])
    expected = distillation_loss(logits, teacher_logits, torch.full((64,), -100), temperature=2.0, alpha=1.0)
    for name in ("eval_loss", "eval_soft_loss"):
        assert measured[name] == pytest.approx(expected.soft.item(), abs=1e-5)
    assert measured["eval_fidelity"] == pytest.approx(
        (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item(), abs=1e-6
    )
    assert not {"eval_hard_loss", "eval_accuracy", "eval_nll"} & measured.keys()


def test_texts_to_evaluate_need_no_labels_at_any_alpha(tmp_path, cached, student, tokenizers):
    """The loss is the soft loss then, not alpha times it; and none at all where there is no teacher either."""
    trainer = make(tmp_path, student, cached, tokenizers[0])
    for unlabelled in (
        cached.remove_columns("label"),
        cached.map(lambda _: {"label": -100}),
    ):
        measured = trainer.evaluate(unlabelled)
        assert measured["eval_loss"] == measured["eval_soft_loss"] > 1e-3
    neither = cached.remove_columns(["label", "teacher_logits"])
    assert not [name for name in trainer.evaluate(neither) if name.endswith("loss")]
    assert trainer.predict(neither).predictions.shape == (64, 3)
    all_hidden = cached.map(lambda _: {"label": -100}).remove_columns("teacher_logits")
    assert not [name for name in trainer.evaluate(all_hidden) if name.endswith("loss")]


def test_labels_are_missed_below_alpha_1(tmp_path, cached, student, tokenizers):
    bare = cached.remove_columns("label")
    sentence = "train_dataset has the columns .*; add a column 'label', with -100 .*, or set alpha=1, .* is 0.7"
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, student, bare, tokenizers[0])
    with pytest.raises(ValueError, match=sentence):
        trained(tmp_path, student, list(bare), tokenizers[0])


# Models in wrappers


class Adapted(nn.Module):
    """What peft does to a model: its `forward` names some inputs and hands on all the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **others):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **others)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "adapted": Adapted,
    "both": lambda model: torch.compile(Adapted(model), backend="eager"),
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("way", ["compiled", "adapted", "both"])
def test_a_student_in_a_wrapper_reads_all_its_inputs(tmp_path, cached, student, tokenizers, way):
    """BERT reads token types, and no wrapper names them."""
    texts = cached.map(lambda row: {"token_type_ids": [0] + [1] * (len(row["input_ids"]) - 1)})
    plain = trained(tmp_path / "plain", with_table(tiny_bert(1, dropout=0.0), 96), texts, tokenizers[0])
    zeros = texts.map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    assert logged(plain, "loss") != logged(
        trained(tmp_path / "z", with_table(tiny_bert(1, dropout=0.0), 96), zeros, tokenizers[0]), "loss"
    )
    wrapped = trained(tmp_path / way, WRAPPERS[way](student), texts, tokenizers[0])
    assert logged(wrapped, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    same_weights(student, plain.model, atol=1e-6)
    assert wrapped.evaluate(texts)["eval_loss"] == pytest.approx(plain.evaluate(texts)["eval_loss"], abs=1e-6)


def test_a_compiled_student_is_saved_under_its_own_names(tmp_path, cached, student, tokenizers):
    wrapped = trained(tmp_path, WRAPPERS["compiled"](student), cached, tokenizers[0], save_strategy="epoch")
    wrapped.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", *tmp_path.glob("checkpoint-*")):
        loaded = BertForSequenceClassification.from_pretrained(folder)
        same_weights(loaded, student, atol=0)
        assert next(iter(load_file(folder / "model.safetensors"))).startswith("bert.")
        assert load_file(folder / "model.safetensors").keys() == student.state_dict().keys()


def test_a_compiled_student_goes_on_from_its_checkpoint(tmp_path, cached, student, tokenizers):
    compiled = WRAPPERS["compiled"](student)
    whole = trained(tmp_path, compiled, cached, tokenizers[0], save_strategy="steps", save_steps=2)
    fresh = WRAPPERS["compiled"](with_table(tiny_bert(1, dropout=0.0, seed=5), 96))
    again = make(tmp_path / "again", fresh, cached, tokenizers[0])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again, "loss")[-2:] == logged(whole, "loss")[-2:]
    same_weights(again.model, whole.model, atol=0)


def test_a_compiled_student_stays_compiled(tmp_path, cached, student, tokenizers):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    trained(tmp_path, torch.compile(student, backend=backend), cached, tokenizers[0], max_steps=1)
    assert graphs


@pytest.mark.parametrize("way", WRAPPERS)
def test_a_teacher_in_a_wrapper_reads_all_its_inputs(tmp_path, raw, student, tokenizers, way):
    teacher = with_table(tiny_bert(seed=1), 96)
    read = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: read.append(set(kwargs)), with_kwargs=True)
    texts = tokenize(raw, tokenizers[0], 16).map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    trained(tmp_path, student, texts, tokenizers[0], teacher_model=WRAPPERS[way](teacher), max_steps=1)
    assert read
    assert all({"input_ids", "attention_mask", "token_type_ids"} <= names for names in read)


def test_adapters_are_trained(tmp_path, cached, student, tokenizers):
    import peft  # slow to load

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    texts = cached.map(lambda row: {"token_type_ids": [1] * len(row["input_ids"])})
    read = []
    student.register_forward_pre_hook(lambda _, args, kwargs: read.append(set(kwargs)), with_kwargs=True)
    trainer = trained(tmp_path, peft.get_peft_model(student, config), texts, tokenizers[0])
    assert all("token_type_ids" in names for names in read)
    assert len(logged(trainer, "loss")) == 4


# Streams


def test_a_stream_that_is_shorter_than_a_step_is_refused(tmp_path, cached, student, tokenizers):
    stream = cached.select(range(20)).to_iterable_dataset()
    sentence = "train_dataset is a stream of 20 texts, and one step takes 32 .*; give more texts, or lower per_device"
    with pytest.raises(ValueError, match=sentence):
        trained(tmp_path, student, stream, tokenizers[0], gradient_accumulation_steps=2, max_steps=2)


UNEVEN = {"three": [20, 9, 21], "two": [38, 12], "one": [50], "even": [25, 25]}


def test_two_processes_share_shards_of_any_length(tmp_path, own_artifacts, raw, student, teacher, tokenizers):
    """Each text counts once in an epoch, and no process waits for another: 50 texts are 3 steps of 16."""
    texts = raw.select(range(50)).select_columns(["text", "label"])
    same = with_table(tiny_bert(seed=1), 96)
    for name, sizes in UNEVEN.items():
        cache_shards(freeze(same), shards_of(texts, sizes), tokenizers[0], tmp_path / name, max_length=16)
    save_model(tmp_path / "student", student, tokenizers[0])
    command = [sys.executable, *TWO, free_port(), "-m", "support.trainer_streams", *UNEVEN]
    environment = {**os.environ, **path_with_tests(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        alone = train(tmp_path / "one", batch_size=16)
    finally:
        os.chdir(here)
    assert len(logged(alone, "eval_loss")) == 2
    assert len(logged(alone, "soft_loss")) == 6
    for name in UNEVEN:
        history = json.loads((tmp_path / f"{name}.json").read_text())
        for measure in ("loss", "soft_loss", "hard_loss", "fidelity", "eval_loss", "eval_soft_loss", "eval_nll"):
            found = [entry[measure] for entry in history if measure in entry]
            assert found == pytest.approx(logged(alone, measure), abs=1e-5), (name, measure)
