"""Models that learn together, and exits that learn from the deepest one, against the formulas."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from support.published import inputs
from torch import nn

from kd_helpers.loop import fit
from kd_helpers.methods.peers import mutual_loss, own_teacher_loss
from kd_helpers.optim import make_optimizer, make_scheduler

GIVEN = inputs()
LABELS = GIVEN.labels
THREE = [GIVEN.student_logits, GIVEN.teacher_logits, GIVEN.teacher_logits.flip(1)]


def divergence(target: torch.Tensor, own: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    p, q = ((logits / temperature).softmax(dim=1) for logits in (target, own))
    return (p * (p / q).log()).sum(dim=1).mean()


@pytest.mark.parametrize("models", [2, 3])
def test_mutual_learning_is_the_papers_loss_of_every_model(models):
    logits = THREE[:models]
    expected = 0.0
    for k, own in enumerate(logits):
        peers = [divergence(other, own) for j, other in enumerate(logits) if j != k]
        expected += F.cross_entropy(own, LABELS) + sum(peers) / len(peers)
    found = mutual_loss(logits, LABELS)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found.total, found.hard + found.peers)


def test_a_models_gradient_is_that_of_its_own_loss():
    one, other = (logits.clone().requires_grad_() for logits in THREE[:2])
    mutual_loss([one, other], LABELS).total.backward()
    alone = THREE[0].clone().requires_grad_()
    (F.cross_entropy(alone, LABELS) + divergence(THREE[1], alone)).backward()
    torch.testing.assert_close(one.grad, alone.grad, rtol=1e-5, atol=1e-6)


def test_models_with_the_same_logits_have_nothing_to_learn_from_each_other():
    same = THREE[0].clone().requires_grad_()
    assert mutual_loss([same, same.clone()], LABELS).peers.item() == pytest.approx(0, abs=1e-6)
    assert mutual_loss([same, same], LABELS).peers.item() == pytest.approx(0, abs=1e-6), "the very same tensor"


def test_exits_learn_what_the_paper_says():
    features = [GIVEN.student_embeddings, GIVEN.teacher_embeddings[:, :7], GIVEN.teacher_embeddings[:, 2:]]
    deepest, alpha = THREE[2], 0.3
    expected, hard, softs, hints = F.cross_entropy(deepest, LABELS), F.cross_entropy(deepest, LABELS), 0, 0
    for own, feature in zip(THREE[:2], features[:2], strict=True):
        soft = 9 * divergence(deepest, own, 3.0)
        expected += (1 - alpha) * F.cross_entropy(own, LABELS) + alpha * soft
        hint = (feature - features[2]).square().mean()
        expected += 0.5 * hint
        hard, softs, hints = hard + F.cross_entropy(own, LABELS), softs + soft, hints + hint
    found = own_teacher_loss(THREE, features, LABELS, temperature=3.0, alpha=alpha, hint_weight=0.5)
    parts = [part.item() for part in (expected, hard, softs, hints)]
    assert [part.item() for part in found] == pytest.approx(parts, rel=1e-5)


def test_the_deepest_exit_learns_from_the_labels_alone():
    shallow, deepest = (logits.clone().requires_grad_() for logits in THREE[:2])
    features = [GIVEN.student_embeddings.clone().requires_grad_() for _ in range(2)]
    own_teacher_loss([shallow, deepest], features, LABELS).total.backward()
    alone = THREE[1].clone().requires_grad_()
    F.cross_entropy(alone, LABELS).backward()
    torch.testing.assert_close(deepest.grad, alone.grad, rtol=1e-5, atol=1e-6)
    assert features[1].grad is None


def test_two_models_learn_together_in_one_loop():
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randn(60, 4, generator=draw)
    labels = (pictures[:, 0] > 0).long()
    torch.manual_seed(0)
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]

    def loss_of(batch):
        return mutual_loss([model(pictures[batch]) for model in models], labels[batch])

    progress = fit(
        models,
        [torch.arange(60)] * 40,
        loss_of,
        steps=40,
        optimizer=functools.partial(make_optimizer, learning_rate=0.05, weight_decay=0.0),
        scheduler=functools.partial(make_scheduler, steps=40),
        description=None,
    )
    losses = progress.history[-1]["losses"]
    assert set(losses) >= {"total", "hard", "peers"}
    assert losses["hard"][-1] < 0.6 * losses["hard"][0]
    assert all((model(pictures).argmax(dim=1) == labels).float().mean() > 0.9 for model in models)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda: mutual_loss(THREE[:1], LABELS), "needs two models or more, and there are logits of 1"),
        (lambda: own_teacher_loss(THREE[:1], [GIVEN.student_embeddings], LABELS), "1 exits and 1 features"),
        (lambda: own_teacher_loss(THREE, [GIVEN.student_embeddings], LABELS), "3 exits and 1 features"),
        (
            lambda: own_teacher_loss(THREE[:2], [GIVEN.student_embeddings, GIVEN.student_embeddings[:, :1]], LABELS),
            "map those of all exits to one shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss()
