"""The losses against references written from their definitions, in float64 and with plain loops."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kd_helpers import losses
from kd_helpers.losses import (
    DistillationLoss,
    distillation_loss,
    hard_loss,
    soft_loss,
    soft_targets,
    token_hard_loss,
)

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 20.0)
ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def logits_and_labels(seed: int = 0, n: int = 7, classes: int = 4):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(n, classes, generator=generator)
    teacher = 3 * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[2] = -100
    return student, teacher, labels


def naive_softmax(z: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in z]
    return [value / sum(exponentials) for value in exponentials]


def naive_loss(student, teacher, labels, temperature: float, alpha: float) -> tuple[float, float, float]:
    """(total, soft, hard) by the definition, one number at a time."""
    soft, hard, labelled = 0.0, 0.0, 0
    for z_s, z_t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = naive_softmax(z_t, temperature), naive_softmax(z_s, temperature)
        soft += sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q, strict=True))
        if label != -100:
            hard -= math.log(naive_softmax(z_s, 1.0)[label])
            labelled += 1
    soft = temperature**2 * soft / len(labels)
    hard = hard / labelled if labelled else 0.0
    return alpha * soft + (1 - alpha) * hard, soft, hard


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_follow_the_definition(temperature, alpha):
    student, teacher, labels = logits_and_labels()
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    total, soft, hard = naive_loss(student, teacher, labels, temperature, alpha)
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.soft.item() == pytest.approx(soft, rel=1e-5)
    assert loss.hard.item() == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_follows_the_definition(temperature, alpha):
    """d soft / d z_S = T (q − p) / N and d hard / d z_S = (softmax(z_S) − onehot(y)) / labelled."""
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha).total.backward()
    z_s, z_t = student.detach().double(), teacher.double()
    soft = temperature * ((z_s / temperature).softmax(-1) - (z_t / temperature).softmax(-1)) / len(labels)
    labelled = labels != -100
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), z_s.shape[1])
    hard = (z_s.softmax(-1) - onehot) * labelled[:, None] / labelled.sum()
    assert_close(student.grad.double(), alpha * soft + (1 - alpha) * hard, rtol=1e-4, atol=1e-6)


def test_soft_targets_of_ten_and_two():
    for temperature, first in ((1, 0.9997), (2, 0.9820), (5, 0.8320)):
        assert soft_targets(torch.tensor([10.0, 2.0]), temperature)[0].item() == pytest.approx(first, abs=5e-5)


def test_alpha_zero_is_plain_cross_entropy_exactly():
    student, teacher, labels = logits_and_labels()
    with_teacher = distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.0)
    without = distillation_loss(student, None, labels, temperature=2.0, alpha=0.0)
    reference = torch.nn.functional.cross_entropy(student, labels, ignore_index=-100)
    assert torch.equal(with_teacher.total, without.total)
    assert_close(with_teacher.total, reference)
    assert without.soft.item() == 0.0


def test_alpha_one_never_looks_at_the_labels():
    student, teacher, labels = logits_and_labels()
    loss = distillation_loss(student, teacher, labels, temperature=2.0, alpha=1.0)
    shuffled = distillation_loss(student, teacher, labels.flip(0), temperature=2.0, alpha=1.0)
    assert torch.equal(loss.total, shuffled.total)
    assert torch.equal(loss.total, loss.soft)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_part_of_weight_zero_cannot_poison_the_total(alpha):
    student, teacher, labels = logits_and_labels()
    if alpha == 0.0:
        teacher[0, 0] = torch.inf
    else:
        labels[:] = -100
    total = distillation_loss(student, teacher, labels, temperature=2.0, alpha=alpha).total
    assert torch.isfinite(total)


def test_unlabelled_batch_has_zero_hard_loss_and_zero_gradient():
    student, _, labels = logits_and_labels()
    student.requires_grad_()
    loss = hard_loss(student, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_an_empty_batch_has_no_loss():
    student = torch.empty(0, 3, requires_grad=True)
    losses = distillation_loss(
        student, torch.empty(0, 3), torch.empty(0, dtype=torch.int64), temperature=2.0, alpha=0.5
    )
    assert [part.item() for part in losses] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_are_whole_numbers_of_any_size(dtype):
    student, _, labels = logits_and_labels()
    assert hard_loss(student, labels.to(dtype)) == hard_loss(student, labels)


def test_a_number_of_numpy_or_torch_is_refused_with_its_way_out():
    student, teacher, _ = logits_and_labels()
    for temperature in (np.int64(2), torch.tensor(2.0)):
        with pytest.raises(TypeError, match="give a number greater than 0, as an int or a float"):
            soft_loss(student, teacher, temperature)


def test_no_gradient_reaches_the_teacher():
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    teacher.requires_grad_()
    distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5).total.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    student, teacher, labels = (x.to(dtype) if x.is_floating_point() else x for x in logits_and_labels())
    loss = distillation_loss(student, teacher, labels, temperature=3.0, alpha=0.5)
    reference = distillation_loss(student.float(), teacher.float(), labels, temperature=3.0, alpha=0.5)
    assert all(part.dtype == torch.float32 for part in loss)
    assert_close(loss, reference)
    assert soft_targets(student, 2.0).dtype == torch.float32


def test_temperature_squared_keeps_the_gradient_at_high_temperature():
    """In the limit T² · KL is logit matching: gradient (z_S − z_T) / (C N) for zero-mean logits."""
    student, teacher, _ = (x.double() if x.is_floating_point() else x for x in logits_and_labels())
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    soft_loss(student.float(), teacher.float(), 1000.0).backward()
    limit = (student.detach() - teacher) / student.numel()
    assert_close(student.grad, limit, rtol=0.02, atol=1e-3)


def test_label_smoothing_is_a_uniform_teacher_at_temperature_one():
    student, _, labels = logits_and_labels()
    labels = labels.clamp(min=0)
    smoothed, uniform = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch.nn.functional.cross_entropy(smoothed, labels, label_smoothing=0.2).backward()
    distillation_loss(uniform, torch.zeros_like(student), labels, temperature=1.0, alpha=0.2).total.backward()
    assert_close(smoothed.grad, uniform.grad)


@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.floats(0.1, 50),
)
def test_soft_loss_is_never_negative_and_zero_only_for_equal_distributions(z_s, z_t, temperature):
    student, teacher = torch.tensor([z_s]), torch.tensor([z_t])
    assert soft_loss(student, teacher, temperature).item() >= -1e-4 * temperature**2
    assert soft_loss(teacher + 1.0, teacher, temperature).item() == pytest.approx(0.0, abs=1e-5 * temperature**2)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(0.05, 100))
def test_soft_targets_are_probabilities(z, temperature):
    p = soft_targets(torch.tensor(z), temperature)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert bool((p >= 0).all())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_refused_by_each_function(temperature):
    student, teacher, labels = logits_and_labels()
    with pytest.raises(ValueError, match="temperature is"):
        soft_targets(student, temperature)
    with pytest.raises(ValueError, match="temperature is"):
        soft_loss(student, teacher, temperature)
    with pytest.raises(ValueError, match="temperature is"):
        distillation_loss(student, teacher, labels, temperature=temperature, alpha=0.5)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan])
def test_bad_alpha_is_refused(alpha):
    student, teacher, labels = logits_and_labels()
    with pytest.raises(ValueError, match="alpha is"):
        distillation_loss(student, teacher, labels, temperature=2.0, alpha=alpha)


def test_other_bad_input_is_refused():
    student, teacher, labels = logits_and_labels()
    with pytest.raises(ValueError, match=r"shape \(7, 4\) but teacher logits \(7, 3\)"):
        soft_loss(student, teacher[:, :3], 2.0)
    with pytest.raises(ValueError, match="no teacher logits"):
        distillation_loss(student, None, labels, temperature=2.0, alpha=0.5)
    labels[0] = 4
    with pytest.raises(ValueError, match="label 4 is out of range; labels run from 0 to 3"):
        hard_loss(student, labels)


@pytest.mark.parametrize("shape", [(2, 5, 7), (7,), (), (3, 7, 7)], ids=str)
def test_logits_that_are_not_one_row_for_each_example_are_refused(shape):
    """With a third dimension the soft loss would be too large, and a square `[B, C, C]` would pass for labels."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    for call in (
        lambda: soft_loss(student, teacher, 2.0),
        lambda: hard_loss(student, labels),
        lambda: distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5),
        lambda: distillation_loss(student, None, labels, temperature=2.0, alpha=0.0),
        lambda: distillation_loss(student, teacher, labels, temperature=2.0, alpha=1.0),
    ):
        with pytest.raises(ValueError, match=r"one row of class logits for each example, \[N, C\]") as caught:
            call()
        sentence = str(caught.value)
        assert sentence.startswith(f"the logits have shape {shape};")
        for name in ("token_soft_loss", "token_hard_loss"):
            assert name in sentence
            assert callable(getattr(losses, name)), "the sentence sends a reader there"
        assert losses.__name__ in sentence


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 5, 7)], ids=str)
def test_soft_targets_take_any_shape(shape):
    targets = soft_targets(torch.randn(shape), 2.0)
    assert targets.shape == shape
    assert_close(targets.sum(dim=-1), torch.ones(shape[:-1]))


def test_loss_is_a_named_triple():
    assert DistillationLoss._fields == ("total", "soft", "hard")


def test_labels_in_unsigned_bytes_are_what_they_say():
    """As bytes −100 would be 156, and the number of classes 256 would be 0."""
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([156, 1, 255, 3])
    assert hard_loss(logits, labels.to(torch.uint8)) == hard_loss(logits, labels)
    assert token_hard_loss(logits[None], labels[None].to(torch.uint8)) == token_hard_loss(logits[None], labels[None])


def test_one_class_is_refused():
    for loss in (partial(soft_loss, temperature=2.0), lambda own, teacher: hard_loss(own, torch.zeros(4).long())):
        with pytest.raises(ValueError, match=r"shape \(4, 1\), so there is one class, whose probability is always 1"):
            loss(torch.randn(4, 1), torch.randn(4, 1))
