"""The loss of a generator against its formula, and where it is lowest."""

from __future__ import annotations

import math

import pytest
import torch
from support.published import inputs

from kd_helpers.methods.data_free import generator_loss

GIVEN = inputs()


def test_the_generators_loss_is_the_formula():
    logits, features = GIVEN.teacher_logits, GIVEN.teacher_embeddings
    p = logits.softmax(dim=1)
    sure = -p.max(dim=1).values.log().mean()
    active = -features.abs().mean()
    balanced = sum(share * math.log(share) for share in p.mean(dim=0).tolist())
    found = generator_loss(logits, features, active_weight=0.1, balanced_weight=2.0)
    assert [part.item() for part in found[1:]] == pytest.approx([sure.item(), active.item(), balanced], rel=1e-5)
    assert found.total.item() == pytest.approx((sure + 0.1 * active + 2 * balanced).item(), rel=1e-5)


def test_sure_and_balanced_pictures_have_the_lowest_loss():
    features = torch.ones(5, 3)
    best = generator_loss(50 * torch.eye(5), features)
    assert best.sure.item() == pytest.approx(0, abs=1e-6)
    assert best.balanced.item() == pytest.approx(-math.log(5), rel=1e-5)
    one_class = generator_loss(50 * torch.eye(5)[[0] * 5], features)
    unsure = generator_loss(torch.eye(5), features)
    assert best.total < one_class.total
    assert best.total < unsure.total
    assert one_class.balanced.item() == pytest.approx(0, abs=1e-6)


def test_gradients_go_through_logits_and_features():
    logits, features = (tensor.clone().requires_grad_() for tensor in (GIVEN.teacher_logits, GIVEN.teacher_embeddings))
    generator_loss(logits, features).total.backward()
    assert logits.grad.abs().sum() > 0
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("logits", "features"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 5)),
        (torch.ones(2, 3), torch.ones(7, 5)),
        (torch.ones(0, 3), torch.ones(0, 5)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(logits, features):
    with pytest.raises(ValueError, match="the features of the same N pictures"):
        generator_loss(logits, features)
