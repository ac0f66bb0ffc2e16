"""What the arms of a comparison learn from."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from kd_helpers.config import DistillConfig
from kd_helpers.experiments.signals import Signal, hard_logits
from kd_helpers.losses import hard_loss, soft_loss, soft_targets
from kd_helpers.teacher import TeacherLogits


def test_a_teacher_of_the_students_labels_has_epochs_of_its_own():
    config = DistillConfig(train_size=2500, teacher_train_size=10_000, teacher_epochs=2)
    own = Signal("own", temperature=2.0, alpha=0.9).configure(config)
    assert (own.teacher_train_size, own.teacher_epochs) == (2500, 3)
    assert (own.train_size, own.temperature, own.alpha) == (2500, 2.0, 0.9)
    for teacher in ("tuned", "hard"):
        same = Signal(teacher).configure(config)
        assert (same.teacher_train_size, same.teacher_epochs) == (10_000, 2)


def test_hard_logits_make_the_soft_loss_that_of_the_teachers_class():
    """At temperature 1 the soft loss is the cross-entropy with the class that the teacher finds most probable."""
    torch.manual_seed(0)
    found = TeacherLogits(torch.arange(20), torch.randn(20, 5))
    hard = hard_logits(found)
    student = torch.randn(20, 5, requires_grad=True)
    assert torch.equal(hard.ids, found.ids)
    assert_close(soft_targets(hard.logits, 1.0).amax(dim=-1), torch.ones(20), rtol=0, atol=0)
    labels = found.logits.argmax(dim=-1)
    assert_close(soft_loss(student, hard.logits, 1.0), hard_loss(student, labels))
    gradients = [
        torch.autograd.grad(loss, student)[0]
        for loss in (soft_loss(student, hard.logits, 1.0), hard_loss(student, labels))
    ]
    assert_close(*gradients)
