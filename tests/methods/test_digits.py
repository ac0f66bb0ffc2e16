"""Chapter 10's pieces against plain references: splits, jitter, training, ensembles, biases."""

from __future__ import annotations

import math
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd_helpers.methods import digits as dk
from kd_helpers.methods.digits import Digits


@pytest.fixture(scope="module")
def splits() -> dk.DigitSplits:
    return dk.load_digits()


def as_rows(digits: Digits) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in digits.pictures}


def test_digits_are_split_once_and_for_all(splits):
    assert [len(part.labels) for part in splits] == [899, 299, 599]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not as_rows(splits[first]) & as_rows(splits[second])
    for part in splits:
        assert part.pictures.dtype == torch.float32
        assert part.pictures.shape[1] == part.side**2 == 64
        assert 0 <= part.pictures.min() < part.pictures.max() <= 1
        shares = torch.bincount(part.labels) / len(part.labels)
        assert ((shares - 0.1).abs() < 0.01).all()
    assert_close(dk.load_digits().test.pictures, splits.test.pictures)


def test_digits_from_elsewhere_are_refused():
    with pytest.raises(ValueError, match="digits is 'svhn'; choose one of sklearn, mnist"):
        dk.load_digits("svhn")


def test_mnist_keeps_its_own_test_digits(own_artifacts, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked[name] = options
        labels = np.arange(70_000) % 10
        return np.repeat(255 * labels[:, None] // 9, 4, axis=1), labels.astype(str)

    monkeypatch.setattr(dk.sklearn.datasets, "fetch_openml", fetch)
    mnist = dk.load_digits("mnist")
    assert asked["mnist_784"]["data_home"] == own_artifacts / "openml"
    assert [len(part.labels) for part in mnist] == [50_000, 10_000, 10_000]
    assert mnist.test.labels.tolist() == [n % 10 for n in range(60_000, 70_000)]
    assert mnist.test.side == 2
    assert mnist.test.pictures.max() == 1
    assert_close(mnist.train.pictures[:, 0], (255 * mnist.train.labels // 9) / 255)


def test_mnist_without_a_network_is_one_sentence(own_artifacts, monkeypatch):
    def fetch(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(dk.sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(ConnectionError, match=r"digits='mnist' needs openml.org.*or use digits='sklearn'\.$"):
        dk.load_digits("mnist")


def moves(monkeypatch, rows: list[tuple[float, float]]) -> None:
    """Let the jitter draw these (right, down), as shares of the largest move, from -1 to 1."""
    monkeypatch.setattr(dk.torch, "rand", lambda *shape, device: (torch.tensor(rows) + 1) / 2)


def test_jitter_by_whole_pixels_moves_pixels(monkeypatch):
    picture = torch.arange(1.0, 17.0)
    moves(monkeypatch, [(0.0, 0.0), (1.0, 0.0), (0.0, -1.0)])
    same, across, along = dk.jitter(picture.repeat(3, 1), 1.0).view(3, 4, 4)
    grid = picture.view(4, 4)
    assert_close(same, grid)
    assert_close(across[:, :3], grid[:, 1:])
    assert_close(across[:, 3], torch.zeros(4))
    assert_close(along[1:], grid[:3])
    assert_close(along[0], torch.zeros(4))


def test_jitter_interpolates_and_stays_within_its_reach(monkeypatch):
    moves(monkeypatch, [(1.0, 0.0)])
    half = dk.jitter(torch.arange(1.0, 17.0)[None], 0.5).view(4, 4)
    assert_close(half[0], torch.tensor([1.5, 2.5, 3.5, 2.0]))
    monkeypatch.undo()
    dot = torch.zeros(200, 49)
    dot[:, 24] = 1.0  # in the middle of 7 × 7
    moved = dk.jitter(dot, 1.5).view(200, 7, 7)
    assert (moved.sum(dim=(1, 2)) - 1).abs().max() < 1e-4, "nothing is lost inside"
    assert moved[:, [0, 6]].abs().max() < 1e-5, "two pixels off the middle at most"
    assert moved[:, 1].max() > 0.1, "and as far as that"


def test_constraint_shrinks_only_what_is_too_long():
    net = dk.digit_net(4, 5, seed=0)
    with torch.no_grad():
        net[0].weight[0] *= 100
        net[6].weight *= 100
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dk.constrain(net, 2.0)
    after = net.state_dict()
    assert_close(after["0.weight"][0].norm(), torch.tensor(2.0))
    assert_close(after["0.weight"][0] / 2, before["0.weight"][0] / before["0.weight"][0].norm())
    assert_close(after["0.weight"][1:], before["0.weight"][1:])
    assert_close(after["6.weight"], before["6.weight"])  # those of the logits are free


def test_batches_go_through_epochs_in_an_order_of_the_seed():
    first = list(dk.batches(10, steps=7, batch_size=4, seed=3))
    assert [len(batch) for batch in first] == [4, 4, 2, 4, 4, 2, 4]
    epochs = [torch.cat(first[:3]).tolist(), torch.cat(first[3:6]).tolist()]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert all(a.equal(b) for a, b in zip(first, dk.batches(10, steps=7, batch_size=4, seed=3), strict=True))
    assert not first[0].equal(next(dk.batches(10, steps=7, batch_size=4, seed=4)))


@pytest.mark.parametrize("soft", [False, True])
def test_loop_is_the_plain_one(splits, soft):
    """A reference with torch's own AdamW and the learning rate by hand; soft targets by their definition."""
    teacher, temperature, steps = torch.randn(899, 10, generator=torch.Generator().manual_seed(1)), 3.0, 6
    reference = dk.digit_net(8, 12, seed=5)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    for step, batch in enumerate(dk.batches(899, steps=steps, seed=5)):
        optimizer.param_groups[0]["lr"] = dk.LEARNING_RATE * (steps - step) / steps
        z = reference(splits.train.pictures[batch])
        p = (teacher[batch] / temperature).softmax(-1)
        log_q = (z / temperature).log_softmax(-1)
        soft_loss = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
        loss = soft_loss if soft else F.cross_entropy(z, splits.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = teacher if soft else None
    net = dk.train_student(splits.train, logits, temperature=temperature, units=12, steps=steps, seed=5)
    assert not net.training
    assert_close(net.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-5)


def test_training_repeats_and_leaves_the_readers_random_numbers_alone(splits):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once, again = (dk.train_teacher(splits.train, units=9, steps=3, seed=2) for _ in range(2))
    assert_close(torch.rand(3), expected)
    assert_close(once.state_dict(), again.state_dict())
    other = dk.train_teacher(splits.train, units=9, steps=3, seed=3)
    assert not torch.equal(once[0].weight, other[0].weight)


def test_teacher_is_regularised(splits, monkeypatch):
    jittered = []
    monkeypatch.setattr(dk, "jitter", lambda pictures, pixels: jittered.append(pixels) or pictures)
    monkeypatch.setattr(dk, "MAX_NORM", 0.01)
    teacher = dk.train_teacher(splits.train, units=9, steps=3, seed=2)
    assert jittered == [8 / 14] * 3
    assert [layer.p for layer in teacher if isinstance(layer, torch.nn.Dropout)] == [dk.DROPOUT] * 2
    assert teacher[0].weight.norm(dim=1).max() <= 0.01 + 1e-6
    assert_close(dk.logits_of(teacher.train(), splits.test.pictures), dk.logits_of(teacher, splits.test.pictures))


def test_early_stopping_keeps_the_best_that_it_measured(splits, monkeypatch):
    measured, real = [], dk.logits_of

    def counting(net, pictures):
        logits = real(net, pictures)
        measured.append(int((logits.argmax(-1) == splits.validation.labels).sum()))
        return logits

    monkeypatch.setattr(dk, "logits_of", counting)
    few = splits.train.where(dk.few_positions(899, 0.03, seed=0))
    net = dk.train_student(few, None, temperature=1.0, units=20, steps=120, seed=0, stop_on=splits.validation)
    assert len(measured) == 12
    assert int((real(net, splits.validation.pictures).argmax(-1) == splits.validation.labels).sum()) == max(measured)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_ensemble_averages_probabilities(temperature):
    logits = 3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    merged = dk.ensemble_logits(logits, temperature)
    assert merged.shape == (4, 5)
    for row in range(4):
        mean = [0.0] * 5
        for member in logits[:, row].tolist():
            weights = [math.exp(value / temperature) for value in member]
            mean = [m + w / sum(weights) / 3 for m, w in zip(mean, weights, strict=True)]
        assert (merged[row] / temperature).softmax(-1).tolist() == pytest.approx(mean, abs=1e-6)


def test_ensemble_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature"):
        dk.ensemble_logits(torch.zeros(2, 3, 10), 0.0)


def test_shift_moves_the_biases_of_its_classes_alone():
    logits = torch.zeros(2, 10)
    shifted = dk.shift_classes(logits, [7, 8], -1.5)
    assert shifted[:, [7, 8]].tolist() == [[-1.5, -1.5]] * 2
    assert shifted.sum() == -6
    assert logits.abs().sum() == 0


def test_chosen_shift_has_the_lowest_nll():
    """Where all logits are alike, it gives the class its share of the labels: p = e^b / (9 + e^b)."""
    labels = torch.tensor([3] * 30 + [0] * 70)
    wanted = math.log(9 * 0.3 / 0.7)  # 1.35
    assert dk.choose_shift(torch.zeros(100, 10), labels, [3], dk.SHIFTS) == 1.25
    assert dk.choose_shift(torch.zeros(100, 10), labels, [3], [-1.0, 0.0, wanted, 1.3, 1.4]) == wanted
    assert dk.choose_shift(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long), [3], [-9.0, 0.0, 9.0]) == -9.0


def test_few_positions():
    few = dk.few_positions(899, 0.05, seed=1)
    assert len(few) == len(few.unique()) == 45
    assert few.max() < 899
    assert not few.equal(dk.few_positions(899, 0.05, seed=2))
    assert len(dk.few_positions(10, 0.001, seed=0)) == 1
    assert len(dk.few_positions(10, 1, seed=0)) == 10
    for share in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="share of digits"):
            dk.few_positions(10, share, seed=0)


def test_what_a_student_knows_of_digits_it_never_saw(splits, monkeypatch):
    """A net that knows every digit but says 3 too low: the shift brings all threes back and costs nothing."""
    lookup = {id(part.pictures): 10.0 * F.one_hot(part.labels, 10) for part in splits}
    low = {key: logits - 8 * F.one_hot(torch.tensor(3), 10) for key, logits in lookup.items()}
    for logits in low.values():
        logits[:, 1] += 4.0
    monkeypatch.setattr(dk, "logits_of", lambda net, pictures: low[id(pictures)])
    found = dk.unseen_measures(torch.nn.Identity(), splits, [d for d in range(10) if d != 3], [3])
    threes = int((splits.test.labels == 3).sum())
    assert found["shift"] == 9.0  # where 0.1 (e⁴ + 8) / e^(2 + b) = 0.9 e^(b − 18), as the derivative of NLL is 0
    assert (found["unseen_before"], found["unseen_after"]) == (0, threes)
    assert found["others_before"] == found["others_after"] == 599 - threes
    assert (found["errors_before"], found["errors_after"]) == (threes, 0)
