"""The losses on features and relations, against released code, against the formulas, and at their edges."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.published import inputs
from torch import nn

from kd_helpers.methods.relations import (
    angle_loss,
    attention_map,
    attention_transfer_loss,
    contrastive_loss,
    distance_loss,
    hint_loss,
    similarity_loss,
)

GIVEN = inputs()
EMBEDDINGS = (GIVEN.student_embeddings, GIVEN.teacher_embeddings)
MAPS = (GIVEN.student_maps, GIVEN.teacher_maps)


def test_the_inputs_are_those_that_the_values_were_computed_with():
    assert GIVEN.student_logits.sum().item() == pytest.approx(-1.6550012247)
    assert GIVEN.teacher_embeddings.sum().item() == pytest.approx(-8.1859922432)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # RepDistiller, mdistiller, torchdistill and szagoruyko/attention-transfer agree on the first.
        (lambda: attention_transfer_loss([MAPS[0]], [MAPS[1]]), 0.0208637511),
        # RepDistiller and mdistiller. (torchdistill divides the rows by their sums, not their lengths: 0.0066175276.)
        (lambda: similarity_loss(*MAPS), 0.0069004801),
        # lenscloth/RKD, RepDistiller, mdistiller and torchdistill agree on both.
        (lambda: distance_loss(*EMBEDDINGS), 0.0307744818),
        (lambda: angle_loss(*EMBEDDINGS), 0.0185240942),
        # RepDistiller, with a regressor that changes nothing.
        (lambda: hint_loss(MAPS[0], MAPS[1][:, :3], nn.Identity()), 2.1336858185),
    ],
)
def test_a_loss_is_what_released_code_computes(loss, value):
    assert loss().item() == pytest.approx(value, rel=1e-5)


def test_the_attention_map_is_that_of_the_authors():
    first = [0.2182713578, 0.1408015700, 0.0824066574, 0.0401524706, 0.0305861064, 0.3441322293]
    torch.testing.assert_close(attention_map(MAPS[0])[0, :6], torch.tensor(first))


def test_distances_and_angles_are_those_of_the_formulas():
    def cosine(rows, i, j, k):
        return F.normalize(rows[i] - rows[j], dim=0) @ F.normalize(rows[k] - rows[j], dim=0)

    def mean_distance(rows):
        return torch.stack([(a - b).norm() for a, b in itertools.permutations(rows, 2)]).mean()

    distances, angles = [], []
    means = [mean_distance(rows) for rows in EMBEDDINGS]
    for i, j in itertools.product(range(4), repeat=2):
        pair = [(rows[i] - rows[j]).norm() / mean for rows, mean in zip(EMBEDDINGS, means, strict=True)]
        distances.append(F.smooth_l1_loss(*pair))
        for k in range(4):
            angles.append(F.smooth_l1_loss(*(cosine(rows, i, j, k) for rows in EMBEDDINGS)))
    assert distance_loss(*EMBEDDINGS).item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)
    assert angle_loss(*EMBEDDINGS).item() == pytest.approx(torch.stack(angles).mean().item(), rel=1e-5)


RELATIONS = [
    lambda student, teacher: attention_transfer_loss([student], [teacher]),
    similarity_loss,
    lambda student, teacher: distance_loss(student.flatten(1), teacher.flatten(1)),
    lambda student, teacher: angle_loss(student.flatten(1), teacher.flatten(1)),
    lambda student, teacher: hint_loss(student, teacher[:, :3], nn.Identity()),
]


@pytest.mark.parametrize("loss", RELATIONS)
def test_gradients_reach_the_student_only(loss):
    student, teacher = (maps.clone().requires_grad_() for maps in MAPS)
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", RELATIONS)
def test_a_student_that_equals_its_teacher_has_no_loss_and_a_finite_gradient(loss):
    student = MAPS[0].clone().requires_grad_()
    value = loss(student, MAPS[0])
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [distance_loss, angle_loss, similarity_loss])
def test_copies_in_a_batch_leave_the_gradient_finite(loss):
    student = GIVEN.student_embeddings[[0, 0, 1, 2]].clone().requires_grad_()
    for teacher in (GIVEN.teacher_embeddings[[0, 0, 1, 2]], GIVEN.teacher_embeddings[[0, 3, 1, 2]]):
        student.grad = None
        loss(student, teacher).backward()
        assert student.grad.norm() < 100, "also where only the student puts them on one spot"


@pytest.mark.parametrize("loss", [distance_loss, similarity_loss])
def test_relations_do_not_depend_on_scale_or_on_a_turn(loss):
    rows = EMBEDDINGS[1]
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert loss(3 * rows @ turn, rows).item() == pytest.approx(0, abs=1e-6)


def test_layers_of_attention_are_summed():
    first, second = [MAPS[0]], [MAPS[0].flip(2)]
    alone = [attention_transfer_loss(maps, [MAPS[1]]) for maps in (first, second)]
    torch.testing.assert_close(attention_transfer_loss([*first, *second], [MAPS[1]] * 2), sum(alone))


def test_the_mean_distance_has_a_gradient_too():
    """In float64 the loss itself is computed in float32, so the step of the finite difference is large."""
    student = GIVEN.student_embeddings.float().requires_grad_()
    distance_loss(student, GIVEN.teacher_embeddings).backward()
    direction = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    steps = [distance_loss(student.detach() + sign * 1e-2 * direction, GIVEN.teacher_embeddings) for sign in (1, -1)]
    slope = (steps[0] - steps[1]).item() / 2e-2
    assert (student.grad * direction).sum().item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("loss", [similarity_loss, angle_loss])
def test_products_are_in_float32_under_autocast(loss):
    features = [100 * rows.float() for rows in EMBEDDINGS]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*features)
    torch.testing.assert_close(found, loss(*features))


def test_half_precision_is_computed_in_float32():
    for loss in (distance_loss, angle_loss, similarity_loss):
        assert loss(*(rows.bfloat16() for rows in EMBEDDINGS)).dtype == torch.float32


# --- contrast ---


def test_the_contrastive_loss_is_a_cross_entropy_over_the_batch():
    student, teacher = EMBEDDINGS[0], EMBEDDINGS[1][:, :7]
    expected = []
    for i in range(4):
        scores = torch.stack([F.cosine_similarity(student[i], row, dim=0) / 0.1 for row in teacher])
        expected.append(scores.logsumexp(dim=0) - scores[i])
    found = contrastive_loss(student, teacher, temperature=0.1)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_examples_of_the_same_class_are_not_told_apart():
    student, teacher = EMBEDDINGS[0], EMBEDDINGS[1][:, :7]
    labels = torch.tensor([0, 0, 1, 0])
    expected = []
    for i in range(4):
        rows = [row for j, row in enumerate(teacher) if j == i or labels[j] != labels[i]]
        scores = torch.stack([F.cosine_similarity(student[i], row, dim=0) / 0.5 for row in rows])
        expected.append(scores.logsumexp(dim=0) - F.cosine_similarity(student[i], teacher[i], dim=0) / 0.5)
    found = contrastive_loss(student, teacher, temperature=0.5, labels=labels)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_both_maps_of_a_contrast_learn():
    student, teacher = EMBEDDINGS[0].clone().requires_grad_(), EMBEDDINGS[1][:, :7].clone().requires_grad_()
    contrastive_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad.abs().sum() > 0


def test_examples_without_a_label_are_told_apart_from_all():
    student, teacher = EMBEDDINGS[0], EMBEDDINGS[1][:, :7]
    unlabelled = contrastive_loss(student, teacher, labels=torch.full((4,), -100))
    torch.testing.assert_close(unlabelled, contrastive_loss(student, teacher))


def test_a_batch_of_one_class_has_nothing_to_tell_apart():
    student = EMBEDDINGS[0].clone().requires_grad_()
    loss = contrastive_loss(student, EMBEDDINGS[1][:, :7], labels=torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.isfinite().all()


# --- refusals ---


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda: hint_loss(*MAPS, nn.Conv2d(3, 4, 1).double()), "give a regressor to that shape"),
        (lambda: attention_map(EMBEDDINGS[0]), r"give maps \[N, C, H, W\]"),
        (lambda: attention_transfer_loss([MAPS[0]], [MAPS[1][:, :, :3]]), "resize one of them"),
        (lambda: attention_transfer_loss([MAPS[0].view(4, 3, 4, 9)], [MAPS[1]]), "resize one of them"),
        (lambda: attention_transfer_loss(MAPS, MAPS[:1]), "of 2 layers of the student and of 1 of the teacher"),
        (lambda: attention_transfer_loss([], []), "at least one"),
        (lambda: distance_loss(*MAPS), "flatten maps first"),
        (lambda: angle_loss(*MAPS), "flatten maps first"),
        (lambda: distance_loss(*(rows[:1] for rows in EMBEDDINGS)), "a batch of 1"),
        (lambda: angle_loss(*(rows[:1] for rows in EMBEDDINGS)), "a batch of 1"),
        (lambda: similarity_loss(*(rows[:0] for rows in EMBEDDINGS)), "a batch of 0"),
        (lambda: contrastive_loss(EMBEDDINGS[0], EMBEDDINGS[0], temperature=0.0), "temperature is 0.0"),
        (lambda: contrastive_loss(EMBEDDINGS[0], EMBEDDINGS[0], labels=GIVEN.labels[:3]), "one for each of 4"),
        (lambda: similarity_loss(MAPS[0], MAPS[1][:3]), "the student has 4 examples, the teacher 3"),
        (lambda: distance_loss(EMBEDDINGS[0][:2], EMBEDDINGS[1]), "the student has 2 examples, the teacher 4"),
        (lambda: angle_loss(EMBEDDINGS[0][:2], EMBEDDINGS[1]), "the student has 2 examples, the teacher 4"),
        (lambda: contrastive_loss(*EMBEDDINGS), r"map both to the same \[N, D\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss()
