"""The study of chapter 15: the methods on the survey's map, side by side on pictures of digits.

Every student of a seed starts from the same weights, learns from the same few labelled pictures in the same order, and
makes the same number of steps. Every method may try four values of its setting, plain training as well. The value with
the best validation accuracy is measured on the test pictures.
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

from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.loop import fit
from kd_helpers.losses import distillation_loss, hard_loss, soft_loss
from kd_helpers.methods.data_free import generator_loss
from kd_helpers.methods.digit_cnns import DigitCNN, Seen, digit_cnn
from kd_helpers.methods.digits import CLASSES, JITTER, Digits, DigitSplits, batches, jitter, load_digits
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
from kd_helpers.optim import make_optimizer, make_scheduler

MODULE = "kd_helpers.experiments.survey"
SEEDS = tuple(range(10))
TEACHER_SEED = 100
TEACHER, STUDENT = (16, 32, 64), (6, 12, 24)  # channels of the convolutions
BATCH_SIZE = 50
LEARNING_RATE = 3e-3
TEMPERATURE, ALPHA = 4.0, 0.9  # of the response where another loss is added to it
NOISE = 32  # numbers that a generator makes a picture of
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
    """A network that has learned all training pictures; frozen."""
    return taught_by_labels(TEACHER, splits().train, steps=steps, seed=TEACHER_SEED)


def taught_by_labels(channels: Sequence[int], digits: Digits, *, steps: int, seed: int) -> DigitCNN:
    """A network that has learned labels from pictures which were moved at random, as Hinton's teachers; frozen."""
    net = digit_cnn(channels, seed=seed)

    def loss_of(batch: torch.Tensor) -> Loss:
        moved = jitter(digits.pictures[batch], JITTER * digits.side)
        return Loss(hard_loss(net(moved).logits, digits.labels[batch]))

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
        steps: of a student.
        seed: of weights and batches.
    """

    digits: Digits
    seen: Seen
    pool: Digits
    pool_seen: Seen
    teacher: DigitCNN
    steps: int
    seed: int


def lesson(training: Training, seed: int) -> Lesson:
    """The pictures of a seed, and what the teacher makes of them."""
    pool, teacher = splits().train, trained_teacher(training.teacher_steps)
    chosen = few_of_each_class(pool.labels, training.pictures, seed=seed)
    seen = teacher(pool.pictures)
    return Lesson(pool.where(chosen), seen_of(seen, chosen), pool, seen, teacher, training.steps, seed)


def few_of_each_class(labels: torch.Tensor, count: int, *, seed: int) -> torch.Tensor:
    """Positions of `count` examples of each class, drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    of_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    return torch.cat([positions[torch.randperm(len(positions), generator=draw)[:count]] for positions in of_class])


def seen_of(seen: Seen, batch: torch.Tensor) -> Seen:
    """What was seen of some of the pictures."""
    return Seen([made[batch] for made in seen.maps], seen.embedding[batch], seen.logits[batch])


# --- training ---


class Loss(NamedTuple):
    """What is trained, a scalar."""

    total: torch.Tensor


def learn(
    modules: Sequence[nn.Module],
    loss_of: Callable[[torch.Tensor], Any],
    pictures: int,
    *,
    steps: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train on batches of positions in 0 … `pictures` − 1; the modules are in eval mode afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(
            modules,
            batches(pictures, steps=steps, batch_size=BATCH_SIZE, seed=seed),
            loss_of,
            steps=steps,
            optimizer=functools.partial(make_optimizer, learning_rate=learning_rate, weight_decay=0.0),
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

    count, steps = len(digits.labels), lesson.steps
    learn([student, *others], loss_of, count, steps=steps, seed=lesson.seed, learning_rate=learning_rate)
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
        lambda own, teacher, _: correlation_loss(own.logits, teacher.logits, temperature=TEMPERATURE)
    ),
}


def with_extra(lesson: Lesson, method: Method, weight: float) -> nn.Module:
    """A student that learns a task and a loss of `EXTRAS` with this weight."""
    task = TASKS[method.beside]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
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

    learn([student], loss_of, len(pool.labels), steps=lesson.steps, seed=lesson.seed)
    return student


def mutual(lesson: Lesson, weight: float) -> nn.Module:
    """Deep mutual learning of two students; the setting weighs what they learn from each other."""
    students = [digit_cnn(STUDENT, seed=seed) for seed in (lesson.seed, lesson.seed + 1000)]
    digits = lesson.digits

    def loss_of(batch: torch.Tensor) -> Loss:
        loss = mutual_loss([student(digits.pictures[batch]).logits for student in students], digits.labels[batch])
        return Loss(loss.hard + weight * loss.peers)

    learn(students, loss_of, len(digits.labels), steps=lesson.steps, seed=lesson.seed)
    return students[0]


def born_again(lesson: Lesson, temperature: float) -> nn.Module:
    """Three students in a row, each the teacher of the next, which has other first weights; the last one counts."""
    student = labels(lesson, LEARNING_RATE)
    for generation in (1, 2):
        before = student(lesson.digits.pictures)
        own_lesson = lesson._replace(seen=detached(before))
        first = digit_cnn(STUDENT, seed=lesson.seed + 1000 * (2 - generation))
        student = taught(own_lesson, response_loss(temperature), student=first)
    return student


def detached(seen: Seen) -> Seen:
    """What was seen, without its graph."""
    return Seen([made.detach() for made in seen.maps], seen.embedding.detach(), seen.logits.detach())


class WithExits(nn.Module):
    """A student with a classifier after each convolution."""

    def __init__(self, net: DigitCNN) -> None:
        super().__init__()
        self.net = net
        width = net.head.in_features
        self.shapes = nn.ModuleList(nn.Linear(channels, width) for channels in STUDENT[:-1])
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in self.shapes)

    def exits(self, seen: Seen) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Logits and features of all exits, the deepest one last."""
        shallow = [shape(made.mean(dim=(2, 3))) for shape, made in zip(self.shapes, seen.maps, strict=False)]
        logits = [head(torch.relu(own)) for head, own in zip(self.heads, shallow, strict=True)]
        return [*logits, seen.logits], [*shallow, seen.embedding]

    def forward(self, pictures: torch.Tensor) -> Seen:
        """What the network sees; its own exit is the deepest one."""
        return self.net(pictures)


def own_teacher(lesson: Lesson, alpha: float) -> nn.Module:
    """Be your own teacher: earlier exits learn from the deepest; the setting is alpha."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        student = WithExits(new_student(lesson))

    def loss(own: Seen, _: Seen, labels: torch.Tensor) -> torch.Tensor:
        return own_teacher_loss(*student.exits(own), labels, alpha=alpha).total

    return taught(lesson, loss, student=student)


def little_teachers(lesson: Lesson, count: int) -> list[Seen]:
    """What some large networks make of the labelled pictures, which are all that they have learned."""
    seeds = [2000 + 10 * lesson.seed + number for number in range(count)]
    teachers = [taught_by_labels(TEACHER, lesson.digits, steps=lesson.steps, seed=seed) for seed in seeds]
    return [teacher(lesson.digits.pictures) for teacher in teachers]


def one_little_teacher(lesson: Lesson, temperature: float) -> nn.Module:
    """Plain distillation from a teacher that has learned no more pictures than the student."""
    return taught(lesson._replace(seen=little_teachers(lesson, 1)[0]), response_loss(temperature))


def several_little_teachers(lesson: Lesson, temperature: float, *, by_confidence: bool = False) -> nn.Module:
    """Three such teachers, with equal weights or weighted by how sure they are of the label."""
    logits = torch.stack([seen.logits for seen in little_teachers(lesson, 3)])
    weights = confidence_weights(logits, lesson.digits.labels) if by_confidence else None
    student, digits = new_student(lesson), lesson.digits

    def loss_of(batch: torch.Tensor) -> Loss:
        own, of_batch = student(digits.pictures[batch]).logits, None if weights is None else weights[:, batch]
        soft = several_teachers_loss(own, logits[:, batch], temperature=temperature, weights=of_batch)
        return Loss(ALPHA * soft + (1 - ALPHA) * hard_loss(own, digits.labels[batch]))

    learn([student], loss_of, len(digits.labels), steps=lesson.steps, seed=lesson.seed)
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
    return taught(lesson, response_loss(temperature), student=quantise(new_student(lesson), bits=1))


def noise_pictures(lesson: Lesson, temperature: float) -> nn.Module:
    """No data: the teacher answers to pictures of uniform noise, a control of `generated_pictures`."""
    student, draw = new_student(lesson), torch.Generator().manual_seed(lesson.seed)

    def loss_of(_batch: torch.Tensor) -> Loss:
        pictures = torch.rand(BATCH_SIZE, lesson.pool.side**2, generator=draw)
        return Loss(soft_loss(student(pictures).logits, lesson.teacher(pictures).logits, temperature))

    learn([student], loss_of, BATCH_SIZE, steps=lesson.steps, seed=lesson.seed)
    return student


def generated_pictures(lesson: Lesson, balanced_weight: float) -> nn.Module:
    """No data: a generator learns to make pictures that the teacher is sure of, while the student learns from them.

    The setting is the weight of equal shares of all classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        generator = picture_generator(lesson.pool.side)
    student, draw = new_student(lesson), torch.Generator().manual_seed(lesson.seed)

    def loss_of(_batch: torch.Tensor) -> Loss:
        pictures = generator(torch.randn(BATCH_SIZE, NOISE, generator=draw))
        teacher = lesson.teacher(pictures)
        made = generator_loss(teacher.logits, teacher.embedding, balanced_weight=balanced_weight).total
        return Loss(made + soft_loss(student(pictures.detach()).logits, teacher.logits, TEMPERATURE))

    modules, rate = [student, generator], 1e-3  # a generator that learns faster makes one picture for each class
    learn(modules, loss_of, BATCH_SIZE, steps=lesson.steps, seed=lesson.seed, learning_rate=rate)
    return student


def picture_generator(side: int) -> nn.Module:
    """Makes pictures `[N, side²]` of `[N, NOISE]` normal numbers; as the paper's, it ends in a normalisation."""
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
        nn.Flatten(),
    )


def old_student(lesson: Lesson) -> DigitCNN:
    """A student that has learned the digits below `OLD` from all their training pictures."""
    known = lesson.pool.where(lesson.pool.labels < OLD)
    student = new_student(lesson)

    def loss_of(batch: torch.Tensor) -> Loss:
        return Loss(hard_loss(student(known.pictures[batch]).logits[:, :OLD], known.labels[batch]))

    learn([student], loss_of, len(known.labels), steps=lesson.steps, seed=lesson.seed)
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

    learn([student], loss_of, len(digits.labels), steps=lesson.steps, seed=lesson.seed, learning_rate=learning_rate)
    return student


def without_forgetting(lesson: Lesson, weight: float) -> nn.Module:
    """The same, while the old logits shall stay what they were (learning without forgetting); the setting weighs it."""
    return new_classes(lesson, LEARNING_RATE, weight=weight)


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
        one_little_teacher,
        several_little_teachers,
        profile_labels,
        profile_response,
        coarse_labels,
        coarse_response,
        noise_pictures,
        generated_pictures,
        new_classes,
        without_forgetting,
    )
} | {"confident_little_teachers": functools.partial(several_little_teachers, by_confidence=True)}


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


def survey_study(arms: Mapping[str, Arm], training: Training = Training(), *, seeds: Sequence[int] = SEEDS) -> Study:
    """Train students of digits in several ways.

    Runs have the measures of `measured` on the test digits, the `setting` that was best on validation, its
    `validation`, what each setting reached there (`tried`), and `parameters`.
    """

    def run(method: Method, seed: int, _folder: Path) -> dict[str, Any]:
        given, best, tried = lesson(training, seed), None, {}
        for setting in method.settings:
            net = with_extra(given, method, setting) if method.beside else METHODS[method.name](given, setting)
            tried[setting] = measured(net, splits().validation, method.name)["accuracy"]
            if best is None or tried[setting] > max(tried[other] for other in tried if other != setting):
                best, chosen = net, setting
        return {
            **measured(best, splits().test, method.name),
            "setting": chosen,
            "validation": tried[chosen],
            "tried": list(tried.values()),
            "parameters": count_parameters(best),
        }

    return Study("survey", MODULE, arms, seeds, {"training": dataclasses.asdict(training)}, run)


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SMALL, MIDDLE, LARGE = (0.03, 0.1, 0.3, 1.0), (0.1, 1.0, 10.0, 100.0), (10.0, 100.0, 1000.0, 10_000.0)
ON_RESPONSES = {
    "decoupled": ("Decoupled response", SMALL),
    "standardised": ("Standardised response", (1.0, 3.0, 9.0, 27.0)),
    "correlations": ("Correlations (DIST)", (0.01, 0.03, 0.1, 0.3)),
}
ON_FEATURES = {
    "hints": ("Hints", MIDDLE),
    "attention": ("Attention", (1.0, 10.0, 100.0, 1000.0)),
    "similarity": ("Similarity", LARGE),
    "relations": ("Distances and angles", MIDDLE),
    "contrast": ("Contrast in the batch", (0.1, 0.3, 1.0, 3.0)),
}
ARMS: dict[str, Arm] = {
    "labels": Arm("Labels", Method("labels", RATES)),
    "smoothing": Arm("Label smoothing", Method("smoothing", (0.05, 0.1, 0.2, 0.4))),
    "response": Arm("Response", Method("response", (2.0, 4.0, 8.0, 16.0))),
    **{
        name: Arm(title, Method(name, weights, "labels"))
        for name, (title, weights) in (ON_RESPONSES | ON_FEATURES).items()
    },
    **{
        f"response_{name}": Arm(f"Response and {title[0].lower()}{title[1:]}", Method(name, weights, "response"))
        for name, (title, weights) in ON_FEATURES.items()
    },
    "mutual": Arm("Two students, mutually", Method("mutual", (0.1, 0.3, 1.0, 3.0))),
    "born_again": Arm("Born again, twice", Method("born_again", TEMPERATURES)),
    "own_teacher": Arm("Its own teacher", Method("own_teacher", (0.1, 0.3, 0.5, 0.7))),
    "one_little_teacher": Arm("A teacher of the same pictures", Method("one_little_teacher", (2.0, 4.0, 8.0, 16.0))),
    "several_little_teachers": Arm("Three of them", Method("several_little_teachers", (2.0, 4.0, 8.0, 16.0))),
    "confident_little_teachers": Arm(
        "Three, by confidence", Method("confident_little_teachers", (2.0, 4.0, 8.0, 16.0))
    ),
    "more_pictures": Arm("Response, all pictures without labels", Method("more_pictures", TEMPERATURES)),
    "profile_labels": Arm("Profiles: labels", Method("profile_labels", RATES)),
    "profile_response": Arm("Profiles: response", Method("profile_response", TEMPERATURES)),
    "coarse_labels": Arm("One bit: labels", Method("coarse_labels", (3e-4, 1e-3, 3e-3, 1e-2))),
    "coarse_response": Arm("One bit: response", Method("coarse_response", TEMPERATURES)),
    "noise_pictures": Arm("No data: noise", Method("noise_pictures", TEMPERATURES)),
    "generated_pictures": Arm("No data: a generator", Method("generated_pictures", (1.0, 3.0, 10.0, 30.0))),
    "new_classes": Arm("New digits", Method("new_classes", RATES)),
    "without_forgetting": Arm("New digits without forgetting", Method("without_forgetting", (0.1, 0.3, 1.0, 3.0))),
}


def study() -> dict[str, Any]:
    """The study of the digits, with what is measured of its teacher: `teacher`."""
    training = Training()
    result, teacher = run_study(survey_study(ARMS, training)), trained_teacher(training.teacher_steps)
    measures = measured(teacher, splits().test, "teacher") | {"parameters": count_parameters(teacher)}
    return result | {"teacher": measures}
