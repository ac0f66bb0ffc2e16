"""Chapter 12: a student that is shown the inside of its teacher.

TinyBERT (Jiao et al. 2020, arXiv 1909.10351) compares embeddings, attention scores and hidden states of both models,
layer by layer, before it compares their answers; first with the pre-trained teacher on texts of any kind (general
distillation), then with the fine-tuned one on texts of the task (task distillation).

Shapes: B texts of L tokens, h and H the widths of student and teacher, A heads, M and N their layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers.augmentation import augmented_texts, candidate_words
from kd_helpers.comparison import fidelity
from kd_helpers.config import DistillConfig, require_whole, seed_everything
from kd_helpers.data import DataSplits, endless, evaluation_batches, load_splits, tokenize, training_batches
from kd_helpers.distilbert import language_teacher
from kd_helpers.features import attention_loss, attention_scores, hidden_loss, layer_mapping
from kd_helpers.lean import lean_training
from kd_helpers.models import (
    copy_layers,
    freeze,
    load_teacher,
    load_tokenizers,
    model_inputs,
    random_like,
    require_eval_mode,
    require_teacher_and_student,
)
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.studies import run_study
from kd_helpers.teacher_logits import TeacherLogits, attach, autocast, cached_logits
from kd_helpers.training import (
    classification_metrics,
    fine_tuned_teacher,
    machine,
    predict,
    require_finite,
    train,
)

PARTS = ("embedding", "attention", "hidden")


def narrow_shape(teacher: PreTrainedModel, *, layers: int, width: int) -> PreTrainedModel:
    """A model like the teacher, with fewer and narrower layers, that has no weights yet (`random_like` draws them).

    It has as many heads as the teacher, since the attention loss compares them one to one; they are narrower instead.

    Raises:
        ValueError: `layers` or `width` is larger than the teacher's, or the heads don't share the width evenly.
    """
    config = copy.deepcopy(teacher.config)
    heads = config.num_attention_heads
    require_whole("layers", layers, minimum=1, maximum=config.num_hidden_layers)
    require_whole("width", width, minimum=heads, maximum=config.hidden_size)
    if width % heads:
        raise ValueError(f"width is {width}, which {heads} heads can't share evenly; give a multiple of {heads}.")
    config.intermediate_size = config.intermediate_size * width // config.hidden_size
    config.num_hidden_layers, config.hidden_size = layers, width
    with torch.device("meta"):
        return type(teacher)(config)


def narrow_student(config: DistillConfig, label_names: Sequence[str]) -> PreTrainedModel:
    """Half the teacher's layers at half its width, random weights drawn from `config.seed`."""
    teacher = load_teacher(config, label_names)
    heads, width = teacher.config.num_attention_heads, teacher.config.hidden_size
    layers = max(1, teacher.config.num_hidden_layers // 2)
    shape = narrow_shape(teacher, layers=layers, width=heads * max(1, width // heads // 2))
    return random_like(shape, seed=config.seed)


def half_student(config: DistillConfig, label_names: Sequence[str]) -> PreTrainedModel:
    """Half the teacher's layers at its full width, copies of those that they are compared with."""
    teacher = load_teacher(config, label_names)
    depth = teacher.config.num_hidden_layers
    return copy_layers(teacher, layer_mapping(max(1, depth // 2), depth), seed=config.seed)


STUDENTS = {"narrow": narrow_student, "half": half_student}


class Layers(NamedTuple):
    """What a model computes inside, for one batch.

    Attributes:
        embedding: output of the embedding layer, `[B, L, h]`.
        attention: of each layer the scores before the softmax, `[B, A, L, L]`.
        hidden: of each layer the output, `[B, L, h]`.
    """

    embedding: torch.Tensor
    attention: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]


def look_inside(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Layers:
    """Run the encoder of a BERT on a batch and keep what is inside it."""
    with attention_scores(model) as scores:
        states = model.base_model(**model_inputs(model, dict(batch)), output_hidden_states=True).hidden_states
    return Layers(states[0], tuple(scores), tuple(states[1:]))


Memory = dict[tuple[int, ...], Layers]


class Projections(nn.Module):
    """The learned maps from the student's width to the teacher's: W_e for embeddings, W_h for every hidden state.

    They belong to the loss, not to the student: nothing of them is saved with it. Models of one width need none.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        needed = student_width != teacher_width
        self.embedding = nn.Linear(student_width, teacher_width, bias=False) if needed else None
        self.hidden = nn.Linear(student_width, teacher_width, bias=False) if needed else None


class LayerLosses(NamedTuple):
    """The sum that is trained, and its three parts, each summed over the student's layers: scalars, or `[steps]`."""

    total: torch.Tensor
    embedding: torch.Tensor
    attention: torch.Tensor
    hidden: torch.Tensor


def layer_losses(
    student: Layers,
    teacher: Layers,
    mask: torch.Tensor,
    mapping: Sequence[int],
    projections: Projections,
    parts: Collection[str] = PARTS,
) -> LayerLosses:
    """Equations 7 to 9 of the paper and their sum over layers (equation 11 with weights of 1).

    Args:
        student: of the student.
        teacher: the same batch inside the teacher.
        mask: `[B, L]`, 1 for tokens and 0 for padding.
        mapping: for each of the student's layers the teacher's layer that it is compared with, 0 the lowest.
        projections: from the student's width to the teacher's.
        parts: which of the three are trained; the others are reported all the same.
    """
    found = {
        "embedding": hidden_loss(student.embedding, teacher.embedding, mask, projections.embedding),
        "attention": sum(
            attention_loss(student.attention[m], teacher.attention[n], mask) for m, n in enumerate(mapping)
        ),
        "hidden": sum(
            hidden_loss(student.hidden[m], teacher.hidden[n], mask, projections.hidden) for m, n in enumerate(mapping)
        ),
    }
    return LayerLosses(sum(found[part] for part in parts), **found)


def distill_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: DistillConfig,
    steps: int,
    parts: Collection[str] = PARTS,
    memory: Memory | None = None,
) -> LayerLosses:
    """Train the student's layers to resemble the teacher's; its head learns nothing here.

    Args:
        student: learns, in place.
        teacher: frozen. It is asked at every step: what is inside it for all texts would fill a disk.
        texts: tokenized, labels are not looked at.
        tokenizer: of both.
        config: learning rate, warm-up, weight decay, clipping, batch size and seed.
        steps: optimiser steps.
        parts: which losses are trained.
        memory: what is inside the teacher for batches that it was asked about, filled here. Students that meet the
            same batches can share it; a batch takes some 10 MB.

    Returns:
        The losses of every step, `[steps]`.

    Raises:
        ValueError: `parts` names none of the losses or an unknown one; the teacher is in train mode; the two models
            can't be teacher and student.
        DivergedError: a loss or a gradient is not finite.
    """
    require_whole("steps", steps, minimum=1)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts are {', '.join(parts) or 'none'}; name one or more of {', '.join(PARTS)}.")
    require_teacher_and_student(teacher, student)
    require_eval_mode(teacher)
    device, precision = machine(config)
    mapping = layer_mapping(student.config.num_hidden_layers, teacher.config.num_hidden_layers, "uniform")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        projections = Projections(student.config.hidden_size, teacher.config.hidden_size).to(device)
    batches = training_batches(texts, tokenizer, config.batch_size, seed=config.seed)
    found: list[tuple[torch.Tensor, ...]] = []
    student.train()
    with lean_training(student, texts["input_ids"][:]):
        trained = nn.ModuleList([student, projections])
        optimizer = make_optimizer(trained, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        scheduler = make_scheduler(optimizer, steps=steps, warmup_ratio=config.warmup_ratio)
        for batch in tqdm(
            itertools.islice(endless(batches), steps), desc="Distilling layers", total=steps, leave=False
        ):
            with autocast(device, precision):
                shown = _learned_from(teacher, batch, mapping, {} if memory is None else memory)
                own = look_inside(student, batch)
                mask, same = batch["attention_mask"].to(device), range(len(mapping))
                losses = layer_losses(own, shown, mask, same, projections, parts)
            optimizer.zero_grad()
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            require_finite(len(found) + 1, losses.total.detach() + norm, losses._asdict())
            optimizer.step()
            scheduler.step()
            found.append(tuple(loss.detach() for loss in losses))
    return LayerLosses(*(torch.stack(values).cpu() for values in zip(*found, strict=True)))


def _learned_from(
    teacher: PreTrainedModel, batch: Mapping[str, torch.Tensor], mapping: Sequence[int], memory: Memory
) -> Layers:
    """Of what is inside the teacher that which a student learns from, in the order of its layers."""
    key = (id(teacher), *batch["id"].tolist())
    if key not in memory:
        with torch.no_grad():
            found = look_inside(teacher, batch)
        taken = [tuple(values[n] for n in mapping) for values in (found.attention, found.hidden)]
        memory[key] = Layers(found.embedding, *taken)
    return memory[key]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an arm of the study does with its steps.

    Attributes:
        title: for tables and figures.
        student: a key of `STUDENTS`.
        general: its share of the steps for the layers of the pre-trained teacher, on real texts of no task.
        layers: share for the layers of the fine-tuned teacher, on the task's texts.
        prediction: share for the fine-tuned teacher's answers to the task's texts (or for labels).
        texts: the task's: "train" alone, or with those that are "augmented", or with as many real ones ("transfer").
        parts: which layer losses are trained.
        alpha: weight of the soft loss in the prediction stage; 0 is the baseline.
        times: 0.5 gives it half of the others' steps.
    """

    title: str
    student: str = "narrow"
    general: int = 1
    layers: int = 1
    prediction: int = 2
    texts: str = "augmented"
    parts: tuple[str, ...] = PARTS
    alpha: float = 1.0
    times: float = 1.0

    def steps(self, total: int) -> dict[str, int]:
        """The steps of each stage, `total · times` in all: what an arm leaves out goes to its other stages."""
        total = round(total * self.times)
        shares = {"general": self.general, "layers": self.layers, "prediction": self.prediction}
        steps = {stage: total * share // sum(shares.values()) for stage, share in shares.items()}
        steps["prediction"] += total - sum(steps.values())
        return steps


_ANSWERS_ONLY = {"general": 0, "layers": 0}
RECIPES: dict[str, Recipe] = {
    "baseline": Recipe("Labels only", texts="train", alpha=0.0, **_ANSWERS_ONLY),
    "plain": Recipe("Answers only", texts="train", **_ANSWERS_ONLY),
    "plain_augmented": Recipe("Answers only, augmented", **_ANSWERS_ONLY),
    "plain_transfer": Recipe("Answers only, transfer set", texts="transfer", **_ANSWERS_ONLY),
    "tinybert": Recipe("TinyBERT"),
    "no_general": Recipe("− general distillation", general=0),
    "no_layers": Recipe("− task's layers", layers=0),
    "no_augmentation": Recipe("− augmentation", texts="train"),
    "transfer": Recipe("transfer set for augmentation", texts="transfer"),
    "no_embedding": Recipe("− embedding loss", parts=("attention", "hidden")),
    "no_attention": Recipe("− attention loss", parts=("embedding", "hidden")),
    "no_hidden": Recipe("− hidden loss", parts=("embedding", "attention")),
    # With half of the steps, answers only get as many of them as in TinyBERT, whose stages then come on top.
    "plain_short": Recipe("Answers only, augmented, half the steps", times=0.5, **_ANSWERS_ONLY),
    "tinybert_short": Recipe("TinyBERT, half the steps", times=0.5),
    "half_baseline": Recipe("Half: labels only", student="half", texts="train", alpha=0.0, **_ANSWERS_ONLY),
    "half_plain": Recipe("Half: answers only, augmented", student="half", **_ANSWERS_ONLY),
    "half_tinybert": Recipe("Half: TinyBERT", student="half"),
}

# The narrow student's: the lowest NLL on validation, after 300 steps, of 5e-4, 1e-3 and 2e-3 for answers alone, then of
# 1e-3 and 2e-3 for the layers before them, with a seed that the study does not use. The half student's is the course's.
LEARNING_RATES = {"narrow": {"layers": 0.002, "prediction": 0.001}, "half": {"layers": 1e-4, "prediction": 1e-4}}
STUDY = DistillConfig(transfer_size=21_949, warmup_ratio=0.1, alpha=1.0, precision="bfloat16")
STUDY_SEEDS = (0, 1, 2)
STEPS = 600
COPIES = 4  # of each labelled text
SENTENCES = ("the flight was great", "i love this phone", "my bag is lost again and nobody helps")


class Material(NamedTuple):
    """What all arms share: the data, both teachers, the texts of each stage, and how a student is measured.

    Attributes:
        data: the splits.
        tokenizer: of teachers and students.
        pretrained: the teacher before fine-tuning.
        tuned: the teacher after it.
        general: the real texts, tokenized; the task's texts are among them.
        task: tokenized texts with the tuned teacher's answers, by the names that `Recipe.texts` has.
        answers: of the tuned teacher to the test texts.
    """

    data: DataSplits
    tokenizer: PreTrainedTokenizerBase
    pretrained: PreTrainedModel
    tuned: PreTrainedModel
    general: datasets.Dataset
    task: dict[str, datasets.Dataset]
    answers: TeacherLogits


def prepare(config: DistillConfig, *, copies: int) -> Material:
    """Load, fine-tune, augment and ask once, for all arms; what was made before is found again."""
    data, tokenizer = load_splits(config), load_tokenizers(config).teacher
    device, precision = machine(config)
    tuned = fine_tuned_teacher(config, data, tokenizer)
    language = language_teacher(config)
    chosen = {"max_length": config.max_length, "precision": precision}
    augmented = augmented_texts(data, language, tokenizer, copies=copies, **chosen)
    real = data.transfer.select(range(min(len(augmented), len(data.transfer))))
    more = {"train": [], "augmented": [augmented], "transfer": [real]}

    def answered(texts: datasets.Dataset) -> datasets.Dataset:
        tokenized = tokenize(texts, tokenizer, config.max_length)
        return attach(tokenized, cached_logits(tuned, tokenized, tokenizer, precision=precision))

    return Material(
        data=data,
        tokenizer=tokenizer,
        pretrained=freeze(load_teacher(config, data.label_names)).to(device),
        tuned=tuned,
        general=tokenize(data.student_train, tokenizer, config.max_length),
        task={name: answered(datasets.concatenate_datasets([data.train, *added])) for name, added in more.items()},
        answers=cached_logits(tuned, tokenize(data.test, tokenizer, config.max_length), tokenizer, precision=precision),
    )


def train_student(
    recipe: Recipe, config: DistillConfig, material: Material, *, steps: int, memory: Memory | None = None
) -> PreTrainedModel:
    """One arm with one seed: its student, trained for `recipe.steps(steps)` (`memory`: see `distill_layers`)."""
    seed_everything(config.seed)
    device, precision = machine(config)
    student = STUDENTS[recipe.student](config, material.data.label_names).to(device)
    rates, planned = LEARNING_RATES[recipe.student], recipe.steps(steps)
    stages = {
        "general": (material.pretrained, material.general),
        "layers": (material.tuned, material.task[recipe.texts]),
    }
    for stage, (teacher, texts) in stages.items():
        if planned[stage]:
            own = config.replace(learning_rate=rates["layers"])
            options = {"steps": planned[stage], "parts": recipe.parts, "memory": memory}
            distill_layers(student, teacher, texts, material.tokenizer, config=own, **options)
    own = config.replace(learning_rate=rates["prediction"], alpha=recipe.alpha, max_steps=planned["prediction"])
    batches = training_batches(material.task[recipe.texts], material.tokenizer, own.batch_size, seed=own.seed)
    train(student, batches, None, config=own, precision=precision, description="Distilling answers")
    return student.eval()


def measure(model: PreTrainedModel, config: DistillConfig, material: Material) -> dict[str, float]:
    """The course's measures on test, and how well the model matches the tuned teacher."""
    test = tokenize(material.data.test, material.tokenizer, config.max_length)
    predictions = predict(model, evaluation_batches(test, material.tokenizer), machine(config).precision)
    return {
        **classification_metrics(predictions.logits, predictions.labels),
        **fidelity(predictions.logits, material.answers.lookup(predictions.ids)),
    }


def study() -> dict[str, Any]:
    """Every recipe with every seed.

    Beside what `run_study` returns: `teacher`, the tuned teacher's own measures, and `candidates`, what augmentation
    would put in the place of each word of some sentences, as `[start, end, words]`.

    The arms of a seed share what the teachers have inside, up to 10 GB of it.
    """
    material = prepare(STUDY, copies=COPIES)
    memories: dict[int, Memory] = {}

    def run(recipe: Recipe, seed: int) -> dict[str, float]:
        if seed not in memories:  # other batches
            memories.clear()
        config, memory = STUDY.replace(seed=seed), memories.setdefault(seed, {})
        return measure(train_student(recipe, config, material, steps=STEPS, memory=memory), config, material)

    choices = {
        "config": STUDY.to_dict(),
        "steps": STEPS,
        "copies": COPIES,
        "learning_rates": LEARNING_RATES,
        "texts": {name: len(texts) for name, texts in material.task.items()} | {"general": len(material.general)},
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()},
    }
    arms = {name: functools.partial(run, recipe) for name, recipe in RECIPES.items()}
    made = run_study("tinybert", arms, STUDY_SEEDS, choices=choices)
    options = {"max_length": STUDY.max_length, "precision": machine(STUDY).precision}
    found = candidate_words(SENTENCES, language_teacher(STUDY), material.tokenizer, **options)
    candidates = {
        text: [[*span, words] for span, words in by_word.items()]
        for text, by_word in zip(SENTENCES, found, strict=True)
    }
    return made | {"teacher": measure(material.tuned, STUDY, material), "candidates": candidates}
