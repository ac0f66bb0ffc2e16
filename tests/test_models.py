from __future__ import annotations

import pytest
import torch
from conftest import tiny_bert, tiny_distilbert
from torch.testing import assert_close

from kd_helpers.config import DistillConfig
from kd_helpers.models import (
    copy_layers,
    count_parameters,
    freeze,
    load_student,
    load_teacher,
    model_inputs,
    random_like,
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
