"""The other losses on logits, against released code, against the formulas, and at their edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.published import inputs

from kd_helpers.losses import soft_loss
from kd_helpers.methods.responses import (
    confidence_weights,
    correlation_loss,
    decoupled_loss,
    several_teachers_loss,
    standardised,
)

GIVEN = inputs()
LOGITS = (GIVEN.student_logits, GIVEN.teacher_logits)
THREE = torch.stack([GIVEN.teacher_logits, GIVEN.teacher_logits.flip(0), GIVEN.teacher_logits.flip(1)])


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # mdistiller, the authors' own
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels), 3.3046587747),
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels, temperature=1.0, others_weight=2.0), 0.7219248247),
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels, others_weight=0.0), 0.0866616683),
        # torchdistill; the authors' code adds 1e-8 to the lengths, which changes the sixth digit
        (lambda: correlation_loss(*LOGITS), 0.6541904690 + 0.4513967091),
        (lambda: correlation_loss(*LOGITS, temperature=4.0), 9.8210147258 + 5.6884803922),
        # sunshangquan/logit-standardization-KD
        (lambda: soft_loss(*map(standardised, LOGITS), 2.0), 0.4362188029),
        # the loops of Rorozhl/CA-MKD, which divide by the number of teachers once more
        (
            lambda: several_teachers_loss(
                LOGITS[0], THREE, temperature=4.0, weights=confidence_weights(THREE, GIVEN.labels)
            ),
            3 * 0.1891315257,
        ),
    ],
)
def test_a_loss_is_what_released_code_computes(loss, value):
    assert loss().item() == pytest.approx(value, rel=1e-5)


def test_the_weights_of_two_and_three_teachers_are_those_of_the_authors():
    two = [[0.3150374529, 0.4078698353, 0.7669161456, 0.1273188087]]
    two.append([1 - weight for weight in two[0]])
    torch.testing.assert_close(confidence_weights(THREE[:2], GIVEN.labels), torch.tensor(two))
    found = confidence_weights(THREE, GIVEN.labels)
    torch.testing.assert_close(found[0], torch.tensor([0.2787202130, 0.3913327662, 0.4013515152, 0.0934323223]))
    torch.testing.assert_close(found.sum(dim=0), torch.ones(4))


def test_the_two_parts_make_the_soft_loss_where_the_second_is_weighed_as_it_weighs_it():
    """1 − p of the label weighs the second part, for each example; so the batch has one example here."""
    student, teacher = (logits[:1] for logits in LOGITS)
    rest = 1 - F.softmax(teacher / 4, dim=1)[0, GIVEN.labels[0]].item()
    found = decoupled_loss(student, teacher, GIVEN.labels[:1], temperature=4.0, others_weight=rest)
    assert found.item() == pytest.approx(soft_loss(student, teacher, 4.0).item(), rel=1e-5)


def test_labels_of_any_whole_type_and_weights_of_the_first_part():
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(
            decoupled_loss(*LOGITS, GIVEN.labels.to(dtype)), decoupled_loss(*LOGITS, GIVEN.labels)
        )
    first = decoupled_loss(*LOGITS, GIVEN.labels, others_weight=0.0)
    torch.testing.assert_close(decoupled_loss(*LOGITS, GIVEN.labels, label_weight=3.0, others_weight=0.0), 3 * first)


def test_a_sure_teacher_and_student_stay_finite():
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    decoupled_loss(student, torch.tensor([[-200.0, 400.0, 0.0]]), torch.tensor([1]), temperature=1.0).backward()
    assert student.grad.isfinite().all()


def test_standardised_logits_have_mean_0_and_deviation_1_and_forget_shift_and_scale():
    rows = standardised(LOGITS[0])
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.std(dim=1), torch.ones(4))
    torch.testing.assert_close(standardised(7 * LOGITS[0] + 3), rows)
    assert standardised(torch.ones(1, 5)).tolist() == [[0.0] * 5], "a row of equal logits"


def test_correlation_asks_for_order_and_proportions_only():
    probabilities = LOGITS[1].softmax(dim=1)
    closer = (0.5 * probabilities + 0.1).log()  # half as far from uniform, perfectly correlated
    assert correlation_loss(closer, LOGITS[1]).item() == pytest.approx(0, abs=1e-6)
    assert soft_loss(closer, LOGITS[1], 1.0).item() > 0.01
    assert 0 < correlation_loss(*LOGITS, temperature=2.0).item() < 16


def test_several_teachers_with_equal_weights_give_the_gradient_of_their_mean():
    one, other = (LOGITS[0].float().requires_grad_() for _ in range(2))
    several_teachers_loss(one, THREE, temperature=4.0).backward()
    mean = (THREE / 4).softmax(dim=2).mean(dim=0)
    soft_loss(other, 4 * mean.log(), 4.0).backward()
    torch.testing.assert_close(one.grad, other.grad)
    three = torch.stack([soft_loss(LOGITS[0], logits, 4.0) for logits in THREE]).mean()
    torch.testing.assert_close(several_teachers_loss(LOGITS[0], THREE, temperature=4.0), three)


@pytest.mark.parametrize(
    "loss",
    [
        lambda student, teacher: decoupled_loss(student, teacher, GIVEN.labels),
        correlation_loss,
        lambda student, teacher: several_teachers_loss(student, teacher[None], temperature=2.0),
    ],
)
def test_gradients_reach_the_student_only(loss):
    student, teacher = (logits.clone().requires_grad_() for logits in LOGITS)
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    equal = GIVEN.teacher_logits.clone().requires_grad_()
    value = loss(equal, GIVEN.teacher_logits)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert equal.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda: decoupled_loss(LOGITS[0], LOGITS[1][:, :4], GIVEN.labels), r"give \[N, C\] for both"),
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels, temperature=0.0), "temperature is 0.0"),
        (lambda: decoupled_loss(*LOGITS, torch.tensor([0, -100, 1, 2])), "1 of 4 examples has no label"),
        (lambda: correlation_loss(LOGITS[0][0], LOGITS[1][0]), r"give \[N, C\] for both"),
        (lambda: several_teachers_loss(*LOGITS, temperature=1.0), r"give \[N, C\] and \[K, N, C\]"),
        (lambda: decoupled_loss(*LOGITS, torch.tensor([0, 5, 1, 2])), "labels run from 0 to 4"),
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels[:3]), "a whole number for each of 4 examples"),
        (lambda: decoupled_loss(*LOGITS, GIVEN.labels.float()), "a whole number for each of 4 examples"),
        (lambda: decoupled_loss(LOGITS[0][:, :1], LOGITS[1][:, :1], GIVEN.labels), "two classes or more"),
        (lambda: decoupled_loss(LOGITS[0][:0], LOGITS[1][:0], GIVEN.labels[:0]), "one example or more"),
        (lambda: correlation_loss(LOGITS[0][:1], LOGITS[1][:1]), "a batch of 1"),
        (lambda: correlation_loss(*LOGITS, temperature=-1.0), r"temperature is -1\.0"),
        (lambda: several_teachers_loss(LOGITS[0], THREE, temperature=0.0), r"temperature is 0\.0"),
        (
            lambda: several_teachers_loss(LOGITS[0], THREE, temperature=1.0, weights=torch.ones(4)),
            "each teacher and example",
        ),
        (lambda: confidence_weights(THREE[:1], GIVEN.labels), "two teachers or more"),
        (lambda: confidence_weights(THREE, LOGITS[1].softmax(dim=1)), "a whole number for each of 4 examples"),
        (lambda: confidence_weights(THREE, torch.full((4,), -100)), "4 of 4 examples have no label"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss()
