"""Chapter 10: dark knowledge, Hinton's experiments on pictures of digits.

A large teacher with dropout, a weight constraint and jitter; a student without any of them; and transfer sets that lack
a digit, or all digits but two. From Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), section 3. Shapes: N pictures of side × side pixels, K teachers, 10 classes.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn

from kd_helpers import artifacts
from kd_helpers.config import require_temperature
from kd_helpers.loop import fit
from kd_helpers.losses import DistillationLoss, distillation_loss
from kd_helpers.optim import make_optimizer, make_scheduler

SOURCES = ("sklearn", "mnist")
CLASSES = 10
LEARNING_RATE = 3e-3
# What regularises the teacher: dropout, the longest weight vector into a hidden unit, and how far pictures move, as a
# share of their side: two of MNIST's 28 pixels (1503.02531, section 3).
DROPOUT, MAX_NORM, JITTER = 0.5, 1.0, 2 / 28
SHIFTS = [quarter / 4 for quarter in range(-60, 61)]  # of biases, to choose from


class Digits(NamedTuple):
    """Pictures `[N, side²]`, float32 in [0, 1], and labels `[N]`, int64 from 0 to 9."""

    pictures: torch.Tensor
    labels: torch.Tensor

    @property
    def side(self) -> int:
        """Pixels along one edge of a picture."""
        return round(self.pictures.shape[1] ** 0.5)

    def where(self, keep: torch.Tensor) -> Digits:
        """The digits that a mask `[N]` or a list of positions keeps."""
        return Digits(self.pictures[keep], self.labels[keep])


class DigitSplits(NamedTuple):
    """Training, validation and test digits; no picture stands in two of them."""

    train: Digits
    validation: Digits
    test: Digits


def load_digits(source: str = "sklearn") -> DigitSplits:
    """Digits in three splits with the classes in equal shares, the same on every machine.

    Args:
        source: "sklearn", the 1,797 pictures of 8 × 8 that come with scikit-learn (a third for test, a sixth for
            validation), or "mnist", 70,000 of 28 × 28 from openml.org (MNIST's own 10,000 for test, 10,000 for
            validation). These are kept under `artifacts/`.

    Raises:
        ValueError: another source.
        ConnectionError: openml.org can't be reached and nothing is kept yet.
    """
    if source not in SOURCES:
        raise ValueError(f"digits is {source!r}; choose one of {', '.join(SOURCES)}.")
    if source == "sklearn":
        pictures, labels = sklearn.datasets.load_digits(return_X_y=True)
        rest, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
        scale, validation_size = 16, len(labels) // 6
    else:
        pictures, labels = _fetch_mnist()
        rest, test = np.arange(60_000), np.arange(60_000, 70_000)
        scale, validation_size = 255, 10_000
    train, validation = train_test_split(rest, test_size=validation_size, stratify=labels[rest], random_state=0)
    pictures = torch.from_numpy(pictures.astype(np.float32) / scale)
    every = Digits(pictures, torch.from_numpy(labels.astype(np.int64)))
    return DigitSplits(*(every.where(torch.from_numpy(part)) for part in (train, validation, test)))


def _fetch_mnist() -> tuple[np.ndarray, np.ndarray]:
    kept = artifacts.artifacts_dir() / "openml"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A network error occurred")  # our own error below says so
            return sklearn.datasets.fetch_openml(
                "mnist_784", version=1, as_frame=False, return_X_y=True, data_home=kept, n_retries=1
            )
    except OSError as error:  # urllib's errors are such
        raise ConnectionError(
            "digits='mnist' needs openml.org, which can't be reached; run once where there is a network, "
            "or use digits='sklearn'."
        ) from error


def digit_net(side: int, units: int, *, seed: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers of `units` rectified units over side² pixels, 10 logits; the seed draws the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(side**2, units),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(units, units),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(units, CLASSES),
        )


def jitter(pictures: torch.Tensor, pixels: float) -> torch.Tensor:
    """Move each picture `[N, side²]` at random by up to `pixels` in both directions; what is left free becomes 0.

    Parts of a pixel are interpolated, so that pictures of 8 × 8 can be moved by as little as MNIST's 28 × 28.
    """
    side = round(pictures.shape[1] ** 0.5)
    shape = (len(pictures), 1, side, side)
    maps = torch.eye(2, 3, device=pictures.device)  # affine, of the square from -1 to 1 onto itself
    moves = maps.repeat(len(pictures), 1, 1)
    moves[:, :, 2] = (2 * torch.rand(len(pictures), 2, device=pictures.device) - 1) * pixels * 2 / side
    grid = F.affine_grid(moves, shape, align_corners=False)
    return F.grid_sample(pictures.view(shape), grid, align_corners=False).flatten(start_dim=1)


def constrain(net: nn.Sequential, max_norm: float) -> None:
    """Shrink, in place, the incoming weights of every hidden unit to a length of at most `max_norm`."""
    hidden = [layer for layer in net if isinstance(layer, nn.Linear)][:-1]
    with torch.no_grad():
        for layer in hidden:
            layer.weight.renorm_(p=2, dim=0, maxnorm=max_norm)


def batches(n: int, *, steps: int, batch_size: int = 100, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches of positions in 0 … n − 1: epoch after epoch, each in an order that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(n, generator=generator).split(batch_size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def train_net(
    net: nn.Sequential,
    digits: Digits,
    teacher_logits: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 0.0,
    steps: int,
    seed: int,
    jitter_by: float = 0.0,
    max_norm: float | None = None,
    stop_on: Digits | None = None,
) -> nn.Sequential:
    """Train a net in place, on labels (alpha 0), on soft targets (alpha 1) or on both; AdamW, falling learning rate.

    Args:
        net: see `digit_net`.
        digits: its pictures are the transfer set.
        teacher_logits: `[N, 10]`, one row a picture of `digits`; None when alpha is 0.
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        steps: batches of 100.
        seed: of the batches, of dropout and of the jitter. Students of one seed see the same batches.
        jitter_by: pixels, see `jitter`.
        max_norm: see `constrain`; None leaves the weights alone.
        stop_on: digits on which every tenth step is measured; the net ends as it was when most of them were right
            (early stopping).

    Returns:
        The net, in evaluation mode.
    """
    most_right, best = -1, None

    def loss_of(batch: torch.Tensor) -> DistillationLoss:
        pictures = jitter(digits.pictures[batch], jitter_by) if jitter_by else digits.pictures[batch]
        logits = None if teacher_logits is None else teacher_logits[batch]
        return distillation_loss(net(pictures), logits, digits.labels[batch], temperature=temperature, alpha=alpha)

    def after_step(step: int) -> None:
        nonlocal most_right, best
        if max_norm is not None:
            constrain(net, max_norm)
        if stop_on is not None and step % 10 == 0:
            right = int((logits_of(net, stop_on.pictures).argmax(dim=-1) == stop_on.labels).sum())
            if right > most_right:
                most_right, best = right, copy.deepcopy(net.state_dict())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(
            net,
            batches(len(digits.labels), steps=steps, seed=seed),
            loss_of,
            steps=steps,
            optimizer=functools.partial(make_optimizer, learning_rate=LEARNING_RATE, weight_decay=0.0),
            scheduler=functools.partial(make_scheduler, steps=steps),
            max_grad_norm=math.inf,
            after_step=after_step,
            description=None,  # a second or less
        )
    if best is not None:
        net.load_state_dict(best)
    return net.eval()


def train_teacher(digits: Digits, *, units: int, steps: int, seed: int) -> nn.Sequential:
    """A net trained on labels with dropout, a weight constraint and jitter."""
    net = digit_net(digits.side, units, seed=seed, dropout=DROPOUT)
    return train_net(net, digits, steps=steps, seed=seed, jitter_by=JITTER * digits.side, max_norm=MAX_NORM)


def logits_of(net: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """A net's logits `[N, 10]`, dropout off."""
    net.eval()
    with torch.inference_mode():
        return torch.cat([net(part) for part in pictures.split(2000)]).clone()


def ensemble_logits(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits `[N, 10]` whose soft targets at T are the mean of those of K teachers, whose logits are `[K, N, 10]`.

    They are T · log(mean of softmax(z / T)): an average of probabilities, not of logits.
    """
    require_temperature(temperature)
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature * (log_probabilities.logsumexp(dim=0) - np.log(len(logits)))


def shift_classes(logits: torch.Tensor, classes: Sequence[int], by: float) -> torch.Tensor:
    """Logits `[N, 10]` as they are after adding `by` to the biases of these classes."""
    shifted = logits.clone()
    shifted[:, list(classes)] += by
    return shifted


def choose_shift(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[int], shifts: Sequence[float]) -> float:
    """The shift of these classes' biases with the lowest NLL; give it validation digits.

    The number of errors is the same for a whole range of shifts, and which of them has one error fewer is chance.

    Args:
        logits: `[N, 10]`.
        labels: `[N]`.
        classes: whose biases move together.
        shifts: what to choose from.
    """

    return min(shifts, key=lambda by: F.cross_entropy(shift_classes(logits, classes, by), labels).item())


def few_positions(n: int, share: float, *, seed: int) -> torch.Tensor:
    """Positions of a share of n digits, drawn by the seed.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of digits is {share}; give a number above 0 and at most 1.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(share * n))]


def train_student(
    digits: Digits,
    teacher_logits: torch.Tensor | None,
    *,
    temperature: float,
    units: int,
    steps: int,
    seed: int,
    stop_on: Digits | None = None,
) -> nn.Sequential:
    """A net trained without any regularisation on soft targets alone, or on labels where `teacher_logits` is None."""
    net = digit_net(digits.side, units, seed=seed)
    alpha = 0.0 if teacher_logits is None else 1.0
    return train_net(
        net, digits, teacher_logits, temperature=temperature, alpha=alpha, steps=steps, seed=seed, stop_on=stop_on
    )


def unseen_measures(net: nn.Module, splits: DigitSplits, seen: Sequence[int], moved: Sequence[int]) -> dict[str, float]:
    """What a student knows of digits that it never saw, before and after moving some biases.

    Args:
        net: the student.
        splits: the shift is chosen on validation, where the unseen digits have labels.
        seen: the digits of its transfer set.
        moved: the classes whose biases are shifted together.

    Returns:
        `shift`; and on test, `…_before` and `…_after` it, `unseen` (how many of the digits never seen are right),
        `others` (the same of the digits that were seen) and `errors`.
    """
    validation = logits_of(net, splits.validation.pictures)
    shift = choose_shift(validation, splits.validation.labels, moved, SHIFTS)
    logits, labels = logits_of(net, splits.test.pictures), splits.test.labels
    known = torch.isin(labels, torch.tensor(seen))
    found: dict[str, float] = {"shift": shift}
    for when, by in (("before", 0.0), ("after", shift)):
        right = shift_classes(logits, moved, by).argmax(dim=-1) == labels
        found[f"unseen_{when}"] = int((right & ~known).sum())
        found[f"others_{when}"] = int((right & known).sum())
        found[f"errors_{when}"] = int((~right).sum())
    return found
