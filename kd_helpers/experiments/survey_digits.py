"""The first ground of chapter 15: the methods on the survey's map, side by side on pictures of digits.

Every student of a seed starts from the same weights, learns from the same few labelled pictures in the same order, and
makes the same number of steps. Every method may try three values of its setting; where there is none, as in plain
training, three learning rates. The value with the best validation accuracy is measured on the test pictures. What
differs beside that is what a method is about: other pictures (`more_pictures`, the two without data), another student
(profiles, one bit), several models that are trained (`mutual`, `born_again`), or another task (new digits).

The learning rates and the range of each setting were chosen on validation with seeds that the study does not use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kd_helpers.experiments.study import Arm, Study
from kd_helpers.loop import Loss, fit
from kd_helpers.losses import distillation_loss, hard_loss, soft_loss
from kd_helpers.methods.data_free import generator_loss
from kd_helpers.methods.digit_cnns import DigitCNN, Seen, digit_cnn
from kd_helpers.methods.digits import CLASSES, Digits, DigitSplits, batches, load_digits
from kd_helpers.methods.peers import mutual_loss, own_teacher_loss
from kd_helpers.methods.quantised import quantise
from kd_helpers.methods.relations import (
    angle_loss,
    attention_transfer_loss,
    contrastive_loss,
    distance_loss,
    hint_loss,
    similarity_loss,
)
from kd_helpers.methods.responses import (
    confidence_weights,
    correlation_loss,
    decoupled_loss,
    several_teachers_loss,
    standardised,
)
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import count_parameters
from kd_helpers.optim import make_scheduler

MODULE = "kd_helpers.experiments.survey_digits"
SEEDS = tuple(range(10))
TEACHER_SEED = 100
TEACHER, STUDENT = (16, 32, 64), (6, 12, 24)  # channels of the convolutions
BATCH_SIZE = 50
LEARNING_RATE = 1e-2
SLOWER = 3e-3  # for weights of one bit, and for a student that has learned something before
TEMPERATURE, ALPHA = 8.0, 0.9  # of the response where another loss is added to it
NOISE, INK, SPREAD = 32, 0.305, 0.376  # numbers that a generator makes a picture of; the mean and spread of its pixels
OLD = 5  # digits from 0 that are learned first, where others are learned later


@dataclasses.dataclass(frozen=True)
class Method:
    """What an arm trains.

    Attributes:
        name: of a function in `METHODS`, or of a loss in `EXTRAS`.
        settings: the values it may try; what they mean is said there. Of a loss in `EXTRAS`, its weight.
        beside: what a loss in `EXTRAS` is added to, a name in `TASKS`.
    """

    name: str
    settings: tuple[float, ...]
    beside: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """How much is learned.

    Attributes:
        steps: of a student.
        teacher_steps: of the teacher.
        pictures: labelled ones of each class that a student learns from.
    """

    steps: int = 1000
    teacher_steps: int = 1000
    pictures: int = 10


# --- the teacher, and what a student learns from ---


@functools.cache
def splits() -> DigitSplits:
    """Training, validation and test digits."""
    return load_digits()


@functools.cache
def trained_teacher(steps: int) -> DigitCNN:
    """A network that has learned the labels of all training pictures; frozen."""
    return taught_by_labels(TEACHER, splits().train, steps=steps, seed=TEACHER_SEED)


@functools.cache
def teachers_of_thirds(steps: int) -> list[DigitCNN]:
    """Three networks, each of which has learned another third of the training pictures; frozen."""
    pool = splits().train
    order = torch.randperm(len(pool.labels), generator=torch.Generator().manual_seed(TEACHER_SEED))
    return [
        taught_by_labels(TEACHER, pool.where(third), steps=steps, seed=TEACHER_SEED + number)
        for number, third in enumerate(order.chunk(3), start=1)
    ]


def taught_by_labels(channels: Sequence[int], digits: Digits, *, steps: int, seed: int) -> DigitCNN:
    """A network that has learned the labels of some pictures; frozen."""
    net = digit_cnn(channels, seed=seed)

    def loss_of(batch: torch.Tensor) -> Loss:
        return Loss(hard_loss(net(digits.pictures[batch]).logits, digits.labels[batch]))

    learn([net], loss_of, len(digits.labels), steps=steps, seed=seed)
    return net.requires_grad_(False)


class Lesson(NamedTuple):
    """What the students of one seed learn from.

    Attributes:
        digits: the labelled pictures.
        seen: what the teacher makes of them.
        pool: all training digits; a student may see their pictures, and not their labels.
        pool_seen: what the teacher makes of those.
        teacher: frozen.
        training: how much is learned.
        seed: of weights and batches.
    """

    digits: Digits
    seen: Seen
    pool: Digits
    pool_seen: Seen
    teacher: DigitCNN
    training: Training
    seed: int


def lesson(training: Training, seed: int) -> Lesson:
    """The pictures of a seed, and what the teacher makes of them."""
    pool, teacher = splits().train, trained_teacher(training.teacher_steps)
    chosen = few_of_each_class(pool.labels, training.pictures, seed=seed)
    seen = teacher(pool.pictures)
    return Lesson(pool.where(chosen), seen_of(seen, chosen), pool, seen, teacher, training, seed)


def few_of_each_class(labels: torch.Tensor, count: int, *, seed: int) -> torch.Tensor:
    """Positions of `count` examples of each class, drawn by the seed.

    Raises:
        ValueError: a class has fewer.
    """
    draw = torch.Generator().manual_seed(seed)
    of_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    if (fewest := min(map(len, of_class))) < count:
        raise ValueError(f"{count} pictures of each class were asked for, one has {fewest}; ask for that many at most.")
    return torch.cat([positions[torch.randperm(len(positions), generator=draw)[:count]] for positions in of_class])


def seen_of(seen: Seen, batch: torch.Tensor) -> Seen:
    """What was seen of some of the pictures."""
    return Seen([made[batch] for made in seen.maps], seen.embedding[batch], seen.logits[batch])


# --- training ---


def learn(
    modules: Sequence[nn.Module],
    loss_of: Callable[[torch.Tensor], Any],
    pictures: int,
    *,
    steps: int,
    seed: int,
    learning_rates: Sequence[float] | None = None,
) -> None:
    """Train on batches of positions in 0 … `pictures` − 1; the modules are in eval mode afterwards.

    Args:
        modules: what is trained.
        loss_of: of a batch.
        pictures: how many there are.
        steps: batches of `BATCH_SIZE`.
        seed: of the batches.
        learning_rates: of each module, at the start; they fall linearly to 0. `LEARNING_RATE` when left out.
    """
    rates = [LEARNING_RATE] * len(modules) if learning_rates is None else learning_rates
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in zip(modules, rates, strict=True)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(
            modules,
            batches(pictures, steps=steps, batch_size=BATCH_SIZE, seed=seed),
            loss_of,
            steps=steps,
            optimizer=lambda _: torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
            scheduler=functools.partial(make_scheduler, steps=steps),
            max_grad_norm=math.inf,
            description=None,  # seconds
        )
    for module in modules:
        module.eval()


LossOfSeen = Callable[[Seen, Seen, torch.Tensor], torch.Tensor]  # of the student, of the teacher, and the labels


def taught(
    lesson: Lesson,
    loss: LossOfSeen,
    *others: nn.Module,
    student: nn.Module | None = None,
    learning_rate: float = LEARNING_RATE,
) -> nn.Module:
    """A student that has learned the labelled pictures with a loss.

    Args:
        lesson: what it learns from.
        loss: of a batch.
        others: modules that are trained along with it.
        student: a new one with the weights of the seed when left out.
        learning_rate: at its peak.
    """
    student = new_student(lesson) if student is None else student
    digits, seen = lesson.digits, lesson.seen

    def loss_of(batch: torch.Tensor) -> Loss:
        return Loss(loss(student(digits.pictures[batch]), seen_of(seen, batch), digits.labels[batch]))

    rates = [learning_rate] * (1 + len(others))
    count, steps = len(digits.labels), lesson.training.steps
    learn([student, *others], loss_of, count, steps=steps, seed=lesson.seed, learning_rates=rates)
    return student


def new_student(lesson: Lesson) -> DigitCNN:
    """The student of a seed before it has learned anything."""
    return digit_cnn(STUDENT, seed=lesson.seed)


def label_loss(own: Seen, _teacher: Seen, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels."""
    return hard_loss(own.logits, labels)


def response_loss(temperature: float) -> LossOfSeen:
    """Hinton's loss, mostly the soft one."""

    def loss(own: Seen, teacher: Seen, labels: torch.Tensor) -> torch.Tensor:
        return distillation_loss(own.logits, teacher.logits, labels, temperature=temperature, alpha=ALPHA).total

    return loss


TASKS: dict[str, LossOfSeen] = {"labels": label_loss, "response": response_loss(TEMPERATURE)}


# --- losses that are added to another ---


class Extra(NamedTuple):
    """A loss, and the modules that are trained along for it."""

    loss: LossOfSeen
    modules: tuple[nn.Module, ...] = ()


def hints() -> Extra:
    """FitNets: the maps after the second convolution, through a learned 1 × 1 convolution."""
    regressor = nn.Conv2d(STUDENT[1], TEACHER[1], 1)
    return Extra(lambda own, teacher, _labels: hint_loss(own.maps[1], teacher.maps[1], regressor), (regressor,))


def contrast() -> Extra:
    """Contrast in the batch: embeddings through two learned linear maps."""
    heads = nn.Linear(STUDENT[-1], 32), nn.Linear(TEACHER[-1], 32)

    def loss(own: Seen, teacher: Seen, labels: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(heads[0](own.embedding), heads[1](teacher.embedding), labels=labels)

    return Extra(loss, heads)


def _relations(own: Seen, teacher: Seen, _labels: torch.Tensor) -> torch.Tensor:
    """RKD: distances and angles of embeddings, weighted one to two as by its authors."""
    return distance_loss(own.embedding, teacher.embedding) + 2 * angle_loss(own.embedding, teacher.embedding)


EXTRAS: dict[str, Callable[[], Extra]] = {
    "hints": hints,
    "attention": lambda: Extra(lambda own, teacher, _: attention_transfer_loss(own.maps, teacher.maps)),
    "similarity": lambda: Extra(lambda own, teacher, _: similarity_loss(own.maps[-1], teacher.maps[-1])),
    "relations": lambda: Extra(_relations),
    "contrast": contrast,
    "decoupled": lambda: Extra(lambda own, teacher, labels: decoupled_loss(own.logits, teacher.logits, labels)),
    "standardised": lambda: Extra(
        lambda own, teacher, _: soft_loss(standardised(own.logits), standardised(teacher.logits), 2.0)
    ),
    "correlations": lambda: Extra(
        lambda own, teacher, _: correlation_loss(own.logits, teacher.logits, temperature=4.0)
    ),
}


def with_extra(lesson: Lesson, weight: float, *, method: Method) -> nn.Module:
    """A student that learns a task and a loss of `EXTRAS` with this weight."""
    task = TASKS[method.beside]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed + 5000)  # other numbers than the student's first weights
        added = EXTRAS[method.name]()
    return taught(lesson, lambda *seen: task(*seen) + weight * added.loss(*seen), *added.modules)


# --- methods: each takes a lesson and a setting, and returns a network ---


def labels(lesson: Lesson, learning_rate: float) -> nn.Module:
    """Plain training; the setting is the learning rate."""
    return taught(lesson, label_loss, learning_rate=learning_rate)


def smoothing(lesson: Lesson, share: float) -> nn.Module:
    """Label smoothing, a control without a teacher; the setting is the share that all classes get."""
    return taught(lesson, lambda own, _, labels: F.cross_entropy(own.logits, labels, label_smoothing=share))


def response(lesson: Lesson, temperature: float) -> nn.Module:
    """Plain distillation; the setting is T, as in the methods that follow."""
    return taught(lesson, response_loss(temperature))


def more_pictures(lesson: Lesson, temperature: float) -> nn.Module:
    """Plain distillation on all training pictures, without their labels."""
    student, pool, seen = new_student(lesson), lesson.pool, lesson.pool_seen

    def loss_of(batch: torch.Tensor) -> Loss:
        return Loss(soft_loss(student(pool.pictures[batch]).logits, seen.logits[batch], temperature))

    learn([student], loss_of, len(pool.labels), steps=lesson.training.steps, seed=lesson.seed)
    return student


def mutual(lesson: Lesson, weight: float) -> nn.Module:
    """Deep mutual learning of two students; the setting weighs what they learn from each other."""
    students = [digit_cnn(STUDENT, seed=seed) for seed in (lesson.seed, lesson.seed + 1000)]
    digits = lesson.digits

    def loss_of(batch: torch.Tensor) -> Loss:
        loss = mutual_loss([student(digits.pictures[batch]).logits for student in students], digits.labels[batch])
        return Loss(loss.hard + weight * loss.peers)

    learn(students, loss_of, len(digits.labels), steps=lesson.training.steps, seed=lesson.seed)
    return students[0]


def born_again(lesson: Lesson, temperature: float) -> nn.Module:
    """Three students in a row, each the teacher of the next; the last one, with the seed's first weights, counts.

    Furlanello et al. (2018, arXiv 1805.04770) teach with T = 1 and a loss of equal parts or the soft one alone. All
    three make as many steps as other students make once.
    """
    own_lesson, loss = lesson, label_loss
    for later in (2, 1, 0):
        student = taught(own_lesson, loss, student=digit_cnn(STUDENT, seed=lesson.seed + 1000 * later))
        own_lesson = lesson._replace(seen=detached(student(lesson.digits.pictures)))
        loss = response_loss(temperature)
    return student


def detached(seen: Seen) -> Seen:
    """What was seen, without its graph."""
    return Seen([made.detach() for made in seen.maps], seen.embedding.detach(), seen.logits.detach())


class WithExits(nn.Module):
    """A student with a classifier after each convolution; a further convolution makes an embedding of its size."""

    def __init__(self, net: DigitCNN) -> None:
        super().__init__()
        self.net = net
        width = net.head.in_features
        self.ways = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()) for channels in STUDENT[:-1]
        )
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in self.ways)

    def exits(self, seen: Seen) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Logits and embeddings of all exits, the deepest one last."""
        shallow = [way(made).mean(dim=(2, 3)) for way, made in zip(self.ways, seen.maps, strict=False)]
        logits = [head(own) for head, own in zip(self.heads, shallow, strict=True)]
        return [*logits, seen.logits], [*shallow, seen.embedding]

    def forward(self, pictures: torch.Tensor) -> Seen:
        """What the network sees; its own exit is the deepest one."""
        return self.net(pictures)


def own_teacher(lesson: Lesson, alpha: float) -> nn.Module:
    """Be your own teacher: earlier exits learn from the deepest, which counts; the setting is alpha."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed + 5000)
        student = WithExits(new_student(lesson))

    def loss(own: Seen, _: Seen, labels: torch.Tensor) -> torch.Tensor:
        return own_teacher_loss(*student.exits(own), labels, alpha=alpha).total

    taught(lesson, loss, student=student)
    return student.net


def same_pictures_teacher(lesson: Lesson, temperature: float) -> nn.Module:
    """Plain distillation from a large teacher that has learned no more pictures than the student, a control."""
    steps, seed = lesson.training.teacher_steps, lesson.seed + 2000
    teacher = taught_by_labels(TEACHER, lesson.digits, steps=steps, seed=seed)
    return taught(lesson._replace(seen=teacher(lesson.digits.pictures)), response_loss(temperature))


def one_of_three(lesson: Lesson, temperature: float) -> nn.Module:
    """Plain distillation from a teacher that has learned a third of the training pictures."""
    teacher = teachers_of_thirds(lesson.training.teacher_steps)[0]
    return taught(lesson._replace(seen=teacher(lesson.digits.pictures)), response_loss(temperature))


def three_teachers(lesson: Lesson, temperature: float, *, by_confidence: bool = False) -> nn.Module:
    """Three teachers of a third each, with equal weights or weighted by how sure they are of the label."""
    student, digits = new_student(lesson), lesson.digits
    teachers = teachers_of_thirds(lesson.training.teacher_steps)
    logits = torch.stack([teacher(digits.pictures).logits for teacher in teachers])
    weights = confidence_weights(logits, digits.labels) if by_confidence else None

    def loss_of(batch: torch.Tensor) -> Loss:
        own, of_batch = student(digits.pictures[batch]).logits, None if weights is None else weights[:, batch]
        soft = several_teachers_loss(own, logits[:, batch], temperature=temperature, weights=of_batch)
        return Loss(ALPHA * soft + (1 - ALPHA) * hard_loss(own, digits.labels[batch]))

    learn([student], loss_of, len(digits.labels), steps=lesson.training.steps, seed=lesson.seed)
    return student


# --- special cases ---


class Profiles(nn.Module):
    """Shows a network only how much ink each row and each column has, as a picture of their products."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures `[N, side²]`, as they were and as they are shown."""
        side = round(pictures.shape[1] ** 0.5)
        square = pictures.view(-1, side, side)
        row, column = square.mean(dim=2), square.mean(dim=1)
        return (row[:, :, None] * column[:, None, :] / square.mean(dim=(1, 2), keepdim=True).clamp(min=1e-6)).flatten(1)


def profile_student(lesson: Lesson) -> nn.Module:
    """A student that sees profiles."""
    return nn.Sequential(Profiles(), new_student(lesson))


def profile_labels(lesson: Lesson, learning_rate: float) -> nn.Module:
    """Another modality: a student of profiles that learns labels; the setting is the learning rate."""
    return taught(lesson, label_loss, student=profile_student(lesson), learning_rate=learning_rate)


def profile_response(lesson: Lesson, temperature: float) -> nn.Module:
    """A student of profiles whose teacher sees the pictures they were made of; the setting is T."""
    return taught(lesson, response_loss(temperature), student=profile_student(lesson))


def coarse_labels(lesson: Lesson, learning_rate: float) -> nn.Module:
    """A student with weights of one bit that learns labels; the setting is the learning rate."""
    return taught(lesson, label_loss, student=quantise(new_student(lesson), bits=1), learning_rate=learning_rate)


def coarse_response(lesson: Lesson, temperature: float) -> nn.Module:
    """A student with weights of one bit and a teacher; the setting is T."""
    student = quantise(new_student(lesson), bits=1)
    return taught(lesson, response_loss(temperature), student=student, learning_rate=SLOWER)


def noise_pictures(lesson: Lesson, temperature: float) -> nn.Module:
    """No data: the teacher answers to pictures of uniform noise, a control of `generated_pictures`."""
    student, draw = new_student(lesson), torch.Generator().manual_seed(lesson.seed)

    def loss_of(_batch: torch.Tensor) -> Loss:
        pictures = torch.rand(BATCH_SIZE, lesson.pool.side**2, generator=draw)
        return Loss(soft_loss(student(pictures).logits, lesson.teacher(pictures).logits, temperature))

    learn([student], loss_of, BATCH_SIZE, steps=lesson.training.steps, seed=lesson.seed)
    return student


def generated_pictures(lesson: Lesson, balanced_weight: float) -> nn.Module:
    """No data: a generator learns to make pictures that the teacher is sure of, while the student learns from them.

    The setting is the weight of equal shares of all classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed + 5000)
        generator = picture_generator(lesson.pool.side)
    student, draw = new_student(lesson), torch.Generator().manual_seed(lesson.seed)

    def loss_of(_batch: torch.Tensor) -> Loss:
        pictures = generator(torch.randn(BATCH_SIZE, NOISE, generator=draw))
        teacher = lesson.teacher(pictures)
        made = generator_loss(teacher.logits, teacher.embedding, balanced_weight=balanced_weight).total
        return Loss(made + soft_loss(student(pictures.detach()).logits, teacher.logits, TEMPERATURE))

    learn(
        [student, generator],
        loss_of,
        BATCH_SIZE,
        steps=lesson.training.steps,
        seed=lesson.seed,
        learning_rates=[LEARNING_RATE, 1e-3],  # a generator that learns faster makes one picture for each class
    )
    return student


class Inked(nn.Module):
    """Gives numbers with mean 0 and spread 1 the mean and the spread that pixels of digits have."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return INK + SPREAD * pixels


def picture_generator(side: int) -> nn.Module:
    """Makes pictures `[N, side²]` of `[N, NOISE]` normal numbers.

    As the paper's it ends in a normalisation, so the mean and the spread of the data's pixels are all it is told.
    """
    half = side // 2
    return nn.Sequential(
        nn.Linear(NOISE, 16 * half**2),
        nn.BatchNorm1d(16 * half**2),
        nn.ReLU(),
        nn.Unflatten(1, (16, half, half)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 3, padding=1),
        nn.BatchNorm2d(1, affine=False),
        Inked(),
        nn.Flatten(),
    )


def old_student(lesson: Lesson) -> DigitCNN:
    """A student that has learned the digits below `OLD` from all their training pictures."""
    known = lesson.pool.where(lesson.pool.labels < OLD)
    student = new_student(lesson)

    def loss_of(batch: torch.Tensor) -> Loss:
        return Loss(hard_loss(student(known.pictures[batch]).logits[:, :OLD], known.labels[batch]))

    learn([student], loss_of, len(known.labels), steps=lesson.training.steps, seed=lesson.seed)
    return student


def new_classes(lesson: Lesson, learning_rate: float, *, weight: float = 0.0) -> nn.Module:
    """The other digits, learned by a student that knows the first five; the setting is the learning rate."""
    student = old_student(lesson)
    digits = lesson.digits.where(lesson.digits.labels >= OLD)
    before = student(digits.pictures).logits[:, :OLD].detach()

    def loss_of(batch: torch.Tensor) -> Loss:
        logits = student(digits.pictures[batch]).logits
        learned = hard_loss(logits[:, OLD:], digits.labels[batch] - OLD)
        return Loss(learned + weight * soft_loss(logits[:, :OLD], before[batch], 2.0) if weight else learned)

    steps, rates = lesson.training.steps, [learning_rate]
    learn([student], loss_of, len(digits.labels), steps=steps, seed=lesson.seed, learning_rates=rates)
    return student


def without_forgetting(lesson: Lesson, weight: float) -> nn.Module:
    """The same, while the old logits shall stay what they were on the new digits; the setting weighs it.

    Li and Hoiem (2016, arXiv 1606.09282) take T = 2 without the factor T², so their weight of 1 is 0.25 here. They
    train the new classes' outputs alone first, which is left out. As in the paper, it is known whether a digit is an
    old or a new one.
    """
    return new_classes(lesson, SLOWER, weight=weight)


METHODS: dict[str, Callable[[Lesson, float], nn.Module]] = {
    method.__name__: method
    for method in (
        labels,
        smoothing,
        response,
        more_pictures,
        mutual,
        born_again,
        own_teacher,
        same_pictures_teacher,
        one_of_three,
        three_teachers,
        profile_labels,
        profile_response,
        coarse_labels,
        coarse_response,
        noise_pictures,
        generated_pictures,
        new_classes,
        without_forgetting,
    )
} | {"three_by_confidence": functools.partial(three_teachers, by_confidence=True)}


# --- the study ---


def measured(net: nn.Module, digits: Digits, method: str) -> dict[str, float]:
    """Accuracy and NLL on some digits; where classes came later, those among old and among new classes."""
    with torch.no_grad():
        logits = net(digits.pictures).logits
    if method not in ("new_classes", "without_forgetting"):
        found = classification_metrics(logits, digits.labels)
        return {name: found[name] for name in ("accuracy", "nll")}
    old = digits.labels < OLD
    known = (logits[old, :OLD].argmax(dim=1) == digits.labels[old]).float().mean().item()
    learned = (logits[~old, OLD:].argmax(dim=1) == digits.labels[~old] - OLD).float().mean().item()
    return {"accuracy": (known + learned) / 2, "old_accuracy": known, "new_accuracy": learned}


def digits_study(arms: Mapping[str, Arm], training: Training = Training(), *, seeds: Sequence[int] = SEEDS) -> Study:
    """Train students of digits in several ways.

    Runs have the measures of `measured` on the test digits, the `setting` that was best on validation, its
    `validation`, what each setting reached there (`tried`), and `parameters`.
    """

    def run(method: Method, seed: int, _folder: Path) -> dict[str, Any]:
        given = lesson(training, seed)
        train = functools.partial(with_extra, method=method) if method.beside else METHODS[method.name]
        nets = {setting: train(given, setting) for setting in method.settings}
        tried = {name: measured(net, splits().validation, method.name)["accuracy"] for name, net in nets.items()}
        chosen = max(tried, key=lambda setting: tried[setting])  # of several that are as good the first
        return {
            **measured(nets[chosen], splits().test, method.name),
            "setting": chosen,
            "validation": tried[chosen],
            "tried": list(tried.values()),
            "parameters": count_parameters(nets[chosen]),
        }

    return Study("survey_digits", MODULE, arms, seeds, {"training": dataclasses.asdict(training)}, run)


RATES = (3e-3, 1e-2, 3e-2)
LOW, MIDDLE, HIGH = (1.0, 2.0, 4.0), (4.0, 8.0, 16.0), (8.0, 16.0, 32.0)  # temperatures
ARMS: dict[str, Arm] = {
    "labels": Arm("Labels", Method("labels", RATES)),
    "smoothing": Arm("Label smoothing", Method("smoothing", (0.1, 0.2, 0.4))),
    "response": Arm("Response", Method("response", MIDDLE)),
    "decoupled": Arm("Decoupled response", Method("decoupled", (0.01, 0.03, 0.1), "labels")),
    "standardised": Arm("Standardised response", Method("standardised", (27.0, 81.0, 243.0), "labels")),
    "correlations": Arm("Correlations (DIST)", Method("correlations", (0.1, 0.3, 1.0), "labels")),
    "hints": Arm("Hints", Method("hints", (1.0, 10.0, 100.0), "labels")),
    "attention": Arm("Attention", Method("attention", (100.0, 300.0, 1000.0), "labels")),
    "similarity": Arm("Similarity", Method("similarity", (1e4, 1e5, 1e6), "labels")),
    "relations": Arm("Distances and angles", Method("relations", (100.0, 1000.0, 1e4), "labels")),
    "contrast": Arm("Contrast in the batch", Method("contrast", (3.0, 10.0, 30.0), "labels")),
    "response_hints": Arm("Response and hints", Method("hints", (0.1, 1.0, 10.0), "response")),
    "response_attention": Arm("Response and attention", Method("attention", (1.0, 10.0, 100.0), "response")),
    "response_similarity": Arm("Response and similarity", Method("similarity", (1e3, 1e4, 1e5), "response")),
    "response_relations": Arm("Response, distances and angles", Method("relations", (10.0, 100.0, 1000.0), "response")),
    "response_contrast": Arm("Response and contrast", Method("contrast", (0.03, 0.3, 3.0), "response")),
    "mutual": Arm("Two students, mutually", Method("mutual", (0.1, 0.3, 1.0))),
    "born_again": Arm("Born again, twice", Method("born_again", LOW)),
    "own_teacher": Arm("Its own teacher", Method("own_teacher", (0.5, 0.7, 0.9))),
    "same_pictures_teacher": Arm("A teacher of the same pictures", Method("same_pictures_teacher", LOW)),
    "one_of_three": Arm("A teacher of a third", Method("one_of_three", MIDDLE)),
    "three_teachers": Arm("Three teachers of a third", Method("three_teachers", MIDDLE)),
    "three_by_confidence": Arm("Three, by confidence", Method("three_by_confidence", MIDDLE)),
    "more_pictures": Arm("Response, all pictures without labels", Method("more_pictures", LOW)),
    "profile_labels": Arm("Profiles: labels", Method("profile_labels", RATES)),
    "profile_response": Arm("Profiles: response", Method("profile_response", MIDDLE)),
    "coarse_labels": Arm("One bit: labels", Method("coarse_labels", (1e-3, SLOWER, 6e-3))),
    "coarse_response": Arm("One bit: response", Method("coarse_response", (2.0, 4.0, 8.0))),
    "noise_pictures": Arm("No data: noise", Method("noise_pictures", HIGH)),
    "generated_pictures": Arm("No data: a generator", Method("generated_pictures", (3.0, 10.0, 30.0))),
    "new_classes": Arm("New digits", Method("new_classes", (1e-4, 3e-4, 1e-3))),
    "without_forgetting": Arm("New digits without forgetting", Method("without_forgetting", (0.1, 0.3, 1.0))),
}
