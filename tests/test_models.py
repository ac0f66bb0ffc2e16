from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.models import tiny_bert, tiny_distilbert
from torch import nn
from torch.testing import assert_close
from transformers import BartConfig, BartForSequenceClassification, T5Config, T5ForSequenceClassification

from kd_helpers.config import DistillConfig
from kd_helpers.models import (
    checkpoint_version,
    copy_layers,
    count_parameters,
    freeze,
    load_student,
    load_teacher,
    model_inputs,
    random_like,
    require_teacher_and_student,
    save_model,
)
from kd_helpers.optim import make_optimizer, make_scheduler

NAMES = ("negative", "neutral", "positive")


def test_the_pair_of_the_offline_preset():
    teacher, student = (load(DistillConfig(), NAMES) for load in (load_teacher, load_student))
    assert count_parameters(teacher) == 22_714_371
    assert count_parameters(student) == 17_390_979
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (6, 3)
    assert student.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}


def test_layers_are_copied_in_the_named_order():
    teacher = tiny_bert(layers=6)
    student = copy_layers(teacher, (0, 2, 5), seed=1)
    for own, taken in enumerate((0, 2, 5)):
        own_weights = student.bert.encoder.layer[own].state_dict()
        for name, weight in teacher.bert.encoder.layer[taken].state_dict().items():
            assert torch.equal(own_weights[name], weight)
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


def test_copied_weights_are_the_students_own():
    teacher = tiny_bert()
    student = copy_layers(teacher, (0,), seed=1)
    with torch.no_grad():
        student.bert.embeddings.word_embeddings.weight.add_(1.0)
    assert not torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight
    )


def test_copying_every_layer_copies_the_encoder():
    teacher = tiny_bert(layers=2).eval()
    student = copy_layers(teacher, (0, 1), seed=1).eval()
    ids = torch.tensor([[101, 2054, 102]])
    assert_close(student.bert(ids).last_hidden_state, teacher.bert(ids).last_hidden_state)


def test_head_depends_on_the_seed_alone():
    teacher = tiny_bert()
    heads = []
    for seed in (1, 1, 2):
        torch.rand(7)  # draws elsewhere must not matter
        heads.append(copy_layers(teacher, (0,), seed=seed).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_building_a_model_does_not_move_the_random_state():
    teacher = tiny_bert()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    copy_layers(teacher, (0,), seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_random_student_shares_nothing_with_the_teacher():
    teacher = tiny_bert()
    student = random_like(copy_layers(teacher, (0, 1), seed=1), seed=5)
    assert student.config.num_hidden_layers == 2
    assert not torch.equal(
        student.bert.encoder.layer[0].attention.self.query.weight,
        teacher.bert.encoder.layer[0].attention.self.query.weight,
    )


@pytest.mark.parametrize("layers", [(), (0, 2), (-1,)])
def test_layers_the_teacher_lacks_are_refused(layers):
    with pytest.raises(ValueError, match="the teacher has layers 0 to 1"):
        copy_layers(tiny_bert(layers=2), layers, seed=0)


def test_frozen_model_has_no_gradient_and_no_dropout():
    model = freeze(tiny_bert().train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([[101, 2054, 102]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_inputs_a_model_does_not_take_stay_out():
    batch = {
        name: torch.ones(1, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids", "id")
    }
    assert set(model_inputs(tiny_bert(), batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(model_inputs(tiny_distilbert(), batch)) == {"input_ids", "attention_mask"}


def tiny_t5() -> T5ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForSequenceClassification(T5Config(**sizes, vocab_size=20, decoder_start_token_id=0, num_labels=3))


def tiny_bart() -> BartForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForSequenceClassification(BartConfig(**sizes, **heads, d_model=16, vocab_size=20, num_labels=3))


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_a_model_with_a_decoder_gets_its_inputs(make):
    model = make().eval()
    end = model.config.eos_token_id
    both = {
        "input_ids": torch.tensor([[5, 6, 7, end], [7, 8, 9, end]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]),
        "decoder_input_ids": torch.tensor([[0, 9, 8, 12], [0, 13, 14, 11]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]),
    }
    others = {
        "labels": torch.tensor([1, 2]),
        "id": torch.tensor([7, 8]),
        "length": torch.tensor([4, 4]),
        "teacher_logits": torch.zeros(2, 3),
    }
    inputs = model_inputs(model, both | others)
    assert inputs.keys() == both.keys()
    assert all(torch.equal(inputs[name], both[name]) for name in both)
    encoder_alone = {name: both[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**both).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(model(**encoder_alone).logits, expected), "the decoder's inputs matter"


@pytest.mark.parametrize(("thing", "kind"), [(nn.Linear(2, 2), "Linear"), (lambda input_ids: input_ids, "function")])
def test_what_is_no_model_of_transformers_is_refused(thing, kind):
    sentence = rf"^the model is {kind}; give a model of transformers \(a PreTrainedModel\)\.$"
    with pytest.raises(TypeError, match=sentence):
        model_inputs(thing, {"input_ids": torch.tensor([[101, 102]])})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_weights(folder: Path) -> None:
    tiny_bert(1, seed=9).save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_json(folder / "config.json", hidden_act="relu"),
        lambda folder: edit_json(folder / "tokenizer.json", truncation={"max_length": 3}),
        lambda folder: edit_json(folder / "tokenizer_config.json", do_lower_case=False),
        lambda folder: (folder / "vocab.txt").write_text("[PAD]"),
        other_weights,
    ],
    ids=["config.json", "tokenizer.json", "tokenizer_config.json", "a file that is added", "weights"],
)
def test_the_version_of_a_folder_follows_every_file_that_matters(tmp_path, tokenizer, change):
    save_model(tmp_path / "model", tiny_bert(1), tokenizer)
    before = checkpoint_version(str(tmp_path / "model"))
    (tmp_path / "model" / "README.md").write_text("how it was made")
    assert checkpoint_version(str(tmp_path / "model")) == before
    change(tmp_path / "model")
    assert checkpoint_version(str(tmp_path / "model")) != before


def test_the_version_of_a_folder_does_not_depend_on_where_it_is(tmp_path, tokenizer):
    save_model(tmp_path / "model", tiny_bert(1), tokenizer)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    versions = [checkpoint_version(str(tmp_path / name)) for name in ("model", "moved")]
    assert versions[0] == versions[1]


def test_biases_and_layer_norms_do_not_decay():
    model = tiny_bert()
    decayed, spared = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1).param_groups
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {by_identity[id(p)] for p in spared["params"]} == {
        name for name in by_identity.values() if name.endswith("bias") or "LayerNorm" in name
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(by_identity)


def test_frozen_parameters_are_not_optimised():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    groups = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1).param_groups
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize(("warmup_ratio", "expected"), [(0.0, [1.0, 0.75, 0.5, 0.25]), (0.5, [0.0, 0.5, 1.0, 0.5])])
def test_learning_rate_rises_and_falls_linearly(warmup_ratio, expected):
    optimizer = make_optimizer(tiny_bert(), learning_rate=1.0, weight_decay=0.0)
    scheduler = make_scheduler(optimizer, steps=4, warmup_ratio=warmup_ratio)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == expected
    assert scheduler.get_last_lr()[0] == 0.0


def test_a_step_alone_learns_something():
    optimizer = make_optimizer(tiny_bert(), learning_rate=1.0, weight_decay=0.0)
    assert make_scheduler(optimizer, steps=1, warmup_ratio=0.6).get_last_lr() == [1.0, 1.0]


def test_names_of_classes_are_compared_by_number():
    """A configuration may list them in any order."""
    models = {order: tiny_bert(classes=2, seed=order[0]) for order in ((0, 1), (1, 0))}
    for order, model in models.items():
        model.config.id2label = {number: ("neg", "pos")[number] for number in order}
    teacher, student = freeze(models[0, 1]), models[1, 0]
    require_teacher_and_student(teacher, student)
    student.config.id2label = {1: "neg", 0: "pos"}
    with pytest.raises(ValueError, match="the teacher's classes are neg, pos, the student's pos, neg"):
        require_teacher_and_student(teacher, student)


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_heads_of_which_a_softmax_means_nothing_are_refused(whose, kind):
    models = [freeze(tiny_bert(seed=1)), tiny_bert()]
    models[whose].config.problem_type = kind
    with pytest.raises(ValueError, match=f"BertForSequenceClassification' was trained for {kind}"):
        require_teacher_and_student(*models)
