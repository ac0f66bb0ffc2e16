"""The plan and the runs of a verdict (see `verdict`): students on one's own texts, within a time budget.

All arms of a seed start from the same weights, see their texts in the same order and make the same number of steps. The
number of steps is doubled until no arm gains from it. An arm that still does at the end is unfinished.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, dataset_digest, evaluation_batches, tokenize, training_batches
from kd_helpers.experiments.comparison import BASELINE, Signal
from kd_helpers.experiments.study import Arm, Study, run_arm
from kd_helpers.lean import SeenRows
from kd_helpers.loop import classifier_loss, fit, recipe
from kd_helpers.losses import soft_targets
from kd_helpers.metrics import Predictions, classification_metrics, predict
from kd_helpers.models import checkpoint_version, load_student, save_model
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher

MODULE = "kd_helpers.experiments.verdict_runs"
UNIFORM, DISTILLED, TRANSFER, MORE = "uniform_teacher", "tuned_teacher", "transfer_set", "more_labels"

LENGTHS = (60, 125, 250, 500, 1000, 2000, 4000)  # steps that are tried, each about twice the one before
TRIED = 3  # of them at most
MOMENTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of a run, as shares of its steps, at which validation is looked at
FEWEST_SEEDS, MOST_SEEDS = 4, 8  # of an arm: with fewer, the interval over seeds is very wide
TEACHER_STEPS = 600  # of fine-tuning at least: a few hundred texts make few steps an epoch
VALIDATION_TEXTS = 1000  # at most: each run looks at them several times
TEACHER_SHARE, TRIES_SHARE = 0.4, 0.2  # of the budget, at most: for the teacher, and for what to try next
FALLS = 0.03  # an arm is unfinished where twice the steps lower its validation loss by more than this share
ROUGH = 600.0  # seconds; a smaller budget gives a rough answer


@dataclasses.dataclass(frozen=True)
class Training:
    """What one arm does.

    Attributes:
        signal: what the student learns from.
        texts: the split of labelled texts that it reads: "train" or "teacher_train".
        share: of the transfer set that it reads, if its signal has one.
    """

    signal: Signal
    texts: str = "train"
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """What this machine takes, in seconds: for a step of student and teacher, and for a text that each reads."""

    student_step: float
    teacher_step: float
    student_text: float
    teacher_text: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        lengths: steps that are tried with the first seed, ascending, until twice the steps no longer help.
        seeds: of every arm, for each of the lengths, should it be the one that is chosen.
        tries: whether other temperatures, alphas and sizes of the transfer set are tried, with the first seed.
        rough: whether the budget is too small for an answer to rely on.
        seconds: what it will take, by the measured speed; 0 where no speed was measured.
    """

    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    tries: bool = False
    rough: bool = False
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all runs share.

    Attributes:
        setup: configuration and data.
        model: the fine-tuned teacher.
        teacher: its logits for the texts that students read, and for validation.
        splits: "train", "teacher_train", "transfer" (if it has texts), "validation" and "test", tokenized for the
            student. Of test, `train_arm` makes a file that `open_test` alone reads.
        keep_student: whether a run with seed 0 keeps its student.
    """

    setup: Setup
    model: PreTrainedModel
    teacher: TeacherLogits
    splits: Mapping[str, datasets.Dataset]
    keep_student: bool = True


def arms_of(config: DistillConfig, data: DataSplits) -> dict[str, Arm]:
    """The arms that a verdict compares: with the configuration's temperature and alpha, and what the data allows.

    One teacher gives every class the same probability. Its student has the distilled one's loss without any knowledge:
    what it gains is regularisation, which is to be had without a teacher.
    """
    distilled = Signal("tuned", config.temperature, config.alpha)
    arms = {
        BASELINE: Arm("Labels only", Training(Signal())),
        UNIFORM: Arm("A teacher that knows nothing", Training(dataclasses.replace(distilled, teacher="uniform"))),
        DISTILLED: Arm("Distilled, same labels", Training(distilled)),
    }
    if len(data.transfer):
        with_transfer = dataclasses.replace(distilled, transfer=True)
        arms[TRANSFER] = Arm("Distilled, with texts without labels", Training(with_transfer))
    if config.teacher_epochs and len(data.teacher_train) > len(data.train):
        arms[MORE] = Arm("Labels only, all that the teacher saw", Training(Signal(), texts="teacher_train"))
    return arms


# ---- The plan


def with_enough_epochs(config: DistillConfig, data: DataSplits) -> DistillConfig:
    """The configuration with so many epochs of fine-tuning that the teacher makes `TEACHER_STEPS` steps at least."""
    if config.teacher_epochs == 0:
        return config
    per_epoch = _steps_an_epoch(len(data.teacher_train))
    return config.replace(teacher_epochs=max(config.teacher_epochs, math.ceil(TEACHER_STEPS / per_epoch)))


def _steps_an_epoch(texts: int) -> int:
    return math.ceil(texts / DistillConfig.batch_size)  # the teacher's batches are of the default size


def measure_speed(setup: Setup) -> Speed:
    """Time a few steps and forward passes of both models on the texts that they will read."""
    data, tokenizers, config = setup.data, setup.tokenizers, setup.config
    untuned = dataclasses.replace(setup, config=config.replace(teacher_epochs=0))
    found = {}
    for name, model, texts, tokenizer in (
        ("student", load_student(config, data.label_names, tokenizers.student), data.student_train, tokenizers.student),
        ("teacher", fine_tuned_teacher(untuned).requires_grad_(True), data.teacher_train, tokenizers.teacher),
    ):
        model = model.to(setup.device)
        few = tokenize(texts.select(range(min(len(texts), 512))), tokenizer, config.max_length)
        moments: list[float] = []
        fit(
            model,
            training_batches(attach(few, _uniform([few], data.label_names)), tokenizer, config.batch_size, seed=0),
            classifier_loss(model, temperature=1.0, alpha=1.0),
            steps=9,
            **recipe(config, 9),
            precision=setup.precision,
            lean=config.lean,
            after_step=lambda _, moments=moments: moments.append(time.perf_counter()),
            description=None,
        )
        found[f"{name}_step"] = float(np.mean(np.diff(moments)[1:]))
        started = time.perf_counter()
        predict(model, evaluation_batches(few, tokenizer), setup.precision)
        found[f"{name}_text"] = (time.perf_counter() - started) / len(few)
    return Speed(**found)


def stored_speed(setup: Setup) -> Speed:
    """The speed of this machine with these models and texts: measured once, so that a plan stays what it is."""
    teacher = setup.config.teacher_source
    provenance = made_by(MODULE) | {
        "machine": setup.machine,
        "threads": torch.get_num_threads(),
        "models": [checkpoint_version(name) for name in (teacher, setup.config.student_source or teacher)],
        "texts": dataset_digest(setup.data.student_train),
        "batch_size": setup.config.batch_size,
        "max_length": setup.config.max_length,
    }
    folder = artifacts.artifacts_dir() / "speeds" / artifacts.fingerprint(provenance)
    artifacts.get_or_build(
        folder, lambda target: artifacts.save_json(target / "speed.json", dataclasses.asdict(measure_speed(setup)))
    )
    return Speed(**artifacts.load_json(folder / "speed.json"))


def run_seconds(steps: int, speed: Speed, data: DataSplits) -> float:
    """What a run of so many steps takes: its steps, validation at each moment, test at the end."""
    texts = len(MOMENTS) * len(data.validation) + len(data.test)
    return steps * speed.student_step + texts * speed.student_text


def teacher_seconds(config: DistillConfig, speed: Speed, data: DataSplits) -> float:
    """What it takes to fine-tune the teacher and to let it read all texts."""
    steps = config.teacher_epochs * _steps_an_epoch(len(data.teacher_train))
    texts = len(data.student_train) + (1 + config.teacher_epochs) * len(data.validation) + len(data.test)
    return steps * speed.teacher_step + texts * speed.teacher_text


def within_budget(
    budget: float, speed: Speed, config: DistillConfig, data: DataSplits
) -> tuple[DistillConfig, DataSplits]:
    """The teacher's epochs and the labelled texts of teacher and student, such that time is left for the students.

    Where `with_enough_epochs` asks for more than `TEACHER_SHARE` of the budget, the teacher first gets fewer epochs,
    but not fewer than `config` says, and then fewer texts.
    """
    enough = with_enough_epochs(config, data)
    affordable = TEACHER_SHARE * budget / teacher_seconds(enough, speed, data) if enough.teacher_epochs else math.inf
    if affordable >= 1:
        return enough, data
    epochs = max(config.teacher_epochs, math.floor(affordable * enough.teacher_epochs))
    share = min(1.0, affordable * enough.teacher_epochs / epochs)
    kept = max(DistillConfig.batch_size, round(share * len(data.teacher_train)))
    train = data.train.select(range(min(kept, len(data.train))))
    teacher_train = data.teacher_train.select(range(min(kept, len(data.teacher_train))))
    return config.replace(teacher_epochs=epochs), dataclasses.replace(data, teacher_train=teacher_train, train=train)


def make_plan(budget: float, speed: Speed, config: DistillConfig, data: DataSplits) -> Plan:
    """The longest runs for which the budget allows `FEWEST_SEEDS` seeds of every arm, and then as many seeds as fit.

    Two lengths are needed to see whether an arm is finished, so a budget that is too small for the two shortest is
    exceeded.
    """
    arms, rough = len(arms_of(config, data)), budget < ROUGH
    for_teacher = teacher_seconds(config, speed, data)
    left = budget * (1.0 if rough else 1.0 - TRIES_SHARE) - for_teacher

    def cost(lengths: Sequence[int], seeds: int) -> float:
        """Of trying these lengths with one seed, and running the last with the others."""
        each = [run_seconds(length, speed, data) for length in lengths]
        return arms * (sum(each) + (seeds - 1) * each[-1])

    ladders = [LENGTHS[max(0, end - TRIED) : end] for end in range(2, len(LENGTHS) + 1)]
    lengths = [ladders[0], *(ladder for ladder in ladders if cost(ladder, FEWEST_SEEDS) <= left)][-1]
    seeds = []
    for end in range(1, len(lengths) + 1):
        fitting = [count for count in range(FEWEST_SEEDS, MOST_SEEDS + 1) if cost(lengths[:end], count) <= left]
        seeds.append(max(fitting, default=FEWEST_SEEDS))
    longest = max(cost(lengths[:end], count) for end, count in enumerate(seeds, start=1))
    tries = 0.0 if rough else TRIES_SHARE * budget
    return Plan(lengths, tuple(seeds), not rough, rough, for_teacher + longest + tries)


# ---- The runs


def prepare(setup: Setup) -> Ground:
    """Fine-tune the teacher and let it read all texts but those of test; what was made before is found again."""
    data, config, tokenizers = setup.data, setup.config, setup.tokenizers
    teacher = fine_tuned_teacher(setup)
    read = [data.train, data.transfer, data.validation]
    together = datasets.concatenate_datasets([part for part in read if len(part)])
    logits = cached_logits(
        teacher,
        tokenize(together, tokenizers.teacher, config.max_length),
        tokenizers.teacher,
        precision=setup.precision,
    )
    splits = {
        name: tokenize(getattr(data, name), tokenizers.student, config.max_length)
        for name in ("train", "teacher_train", "transfer", "validation", "test")
        if len(getattr(data, name))
    }
    return Ground(setup, teacher, logits, splits)


def verdict_study(ground: Ground, arms: Mapping[str, Arm], steps: int) -> Study:
    """The study whose runs make so many steps each. A run's folder holds what `train_arm` keeps."""
    config, data = ground.setup.config, ground.setup.data
    shared = config.replace(seed=0, max_steps=steps, temperature=1.0, alpha=0.0)  # each arm and run has its own
    return Study(
        name="verdict",
        module=MODULE,
        arms=arms,
        seeds=range(MOST_SEEDS),
        choices={
            "config": shared.to_dict(),
            "machine": ground.setup.machine,
            "student": checkpoint_version(config.student_source or config.teacher_source),
            "teacher": ground.teacher.digest(),
            "labels": data.label_names,
            "texts": [dataset_digest(part) for part in (data.train, data.transfer, data.teacher_train)],
            "held_out": [dataset_digest(part) for part in (data.validation, data.test)],
        },
        run=functools.partial(train_arm, ground, steps),
    )


def train_arm(ground: Ground, steps: int, training: Training, seed: int, folder: Path) -> dict[str, Any]:
    """Train one student and keep what it predicts.

    Args:
        ground: what all runs share.
        steps: of the optimiser.
        training: what the arm does.
        seed: of head, dropout and order.
        folder: gets `validation.safetensors` and `test.safetensors`: logits `[N, C]` in order of the ids, after the
            `last` step and at the `best` of the moments (see `_Watch`). With seed 0 it also gets the student.

    Returns:
        `history` (measures and `loss` on validation at each moment, see `validation_loss`) and `seconds`.
    """
    setup, signal = ground.setup, training.signal
    config, tokenizer = setup.config.replace(seed=seed, max_steps=steps), setup.tokenizers.student
    started = time.perf_counter()
    texts = ground.splits[training.texts]
    if signal.transfer:
        transfer = ground.splits["transfer"]
        transfer = transfer.select(range(max(1, round(training.share * len(transfer)))))
        texts = datasets.concatenate_datasets([texts, transfer])
    held_out = ground.splits["validation"]
    teacher = {"none": None, "tuned": ground.teacher, "uniform": _uniform([texts, held_out], setup.data.label_names)}
    teacher_logits = teacher[signal.teacher]
    if teacher_logits is not None:
        texts = attach(texts, teacher_logits)
    validation, test = (evaluation_batches(ground.splits[name], tokenizer) for name in ("validation", "test"))
    seed_everything(seed)
    student = load_student(config, setup.data.label_names, tokenizer).to(setup.device)
    predicted = functools.partial(predict, student, validation, setup.precision)
    watch = _Watch(student, predicted, functools.partial(validation_loss, signal, teacher_logits), steps)
    fit(
        student,
        training_batches(texts, tokenizer, config.batch_size, seed=seed),
        classifier_loss(student, temperature=signal.temperature, alpha=signal.alpha),
        steps=steps,
        **recipe(config, steps),
        precision=setup.precision,
        lean=config.lean,
        after_step=watch.look,
        description="Training",
    )
    if seed == 0 and ground.keep_student:
        save_model(folder / "student", student, tokenizer)
    on_test = {"last": predict(student, test, setup.precision).logits}
    student.load_state_dict(watch.weights)
    on_test["best"] = predict(student, test, setup.precision).logits
    for split, logits in (("validation", watch.logits), ("test", on_test)):
        safetensors.torch.save_file(logits, folder / f"{split}.safetensors")
    return {"history": watch.history, "seconds": time.perf_counter() - started}


def validation_loss(signal: Signal, teacher_logits: TeacherLogits | None, found: Predictions) -> float:
    """The loss that an arm is trained with, on validation, with cross-entropy in place of KL.

    The two differ by the entropy of the soft targets, which no student changes. Beside it, a change of a loss that is
    all but zero does not look large.
    """
    hard = F.cross_entropy(found.logits, found.labels)
    if teacher_logits is None:
        return hard.item()
    targets = soft_targets(teacher_logits.lookup(found.ids), signal.temperature)
    soft = signal.temperature**2 * F.cross_entropy(found.logits / signal.temperature, targets)
    return (signal.alpha * soft + (1 - signal.alpha) * hard).item()


class _Watch:
    """Looks at validation at a few moments of a run, and keeps the weights of the best: by accuracy, then by NLL."""

    def __init__(
        self,
        student: PreTrainedModel,
        predicted: Callable[[], Predictions],
        loss: Callable[[Predictions], float],
        steps: int,
    ) -> None:
        self.student, self.predicted, self.loss = student, predicted, loss
        self.moments = {max(1, round(share * steps)) for share in MOMENTS}
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.logits: dict[str, torch.Tensor] = {}
        self.best = (-1.0, 0.0)

    def look(self, step: int) -> None:
        """After a step."""
        if step not in self.moments:
            return
        found = self.predicted()
        measures = classification_metrics(found.logits, found.labels)
        self.history.append({"step": step, "loss": self.loss(found), **measures})
        self.logits["last"] = found.logits
        value = (measures["accuracy"], -measures["nll"])
        if value > self.best:
            self.best, self.weights, self.logits["best"] = value, whole_weights(self.student), found.logits.clone()


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of a model's weights under the names that they have outside `lean_training`, also within it."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, SeenRows):
            table = state.pop(f"{name}.table.weight")
            table[module.rows >= 0] = state[f"{name}.weight"]
            state[f"{name}.weight"] = table
    return state


def _uniform(texts: Sequence[datasets.Dataset], label_names: Sequence[str]) -> TeacherLogits:
    """The logits of a teacher that gives every class the same probability."""
    ids = torch.tensor([number for part in texts for number in part["id"][:]])
    return TeacherLogits(ids, torch.zeros(len(ids), len(label_names)))


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a verdict.

    Attributes:
        steps: of each.
        arms: title and recipe, by name.
        runs: of each arm, one for each seed (see `study.run_arm`).
        unfinished: arms that twice the steps still improve: at the length before this one they were worse by more than
            `FALLS`.
        losses: the lowest `validation_loss` of the first seed, by length and arm.
    """

    steps: int
    arms: Mapping[str, Arm]
    runs: Mapping[str, list[dict[str, Any]]]
    unfinished: tuple[str, ...]
    losses: Mapping[int, Mapping[str, float]]


def lowest_loss(run: Mapping[str, Any]) -> float:
    """The lowest loss on validation among a run's moments."""
    return min(moment["loss"] for moment in run["history"])


def still_falls(shorter: float, longer: float) -> bool:
    """Whether twice the steps lower the validation loss by more than the share `FALLS`."""
    return longer < (1 - FALLS) * shorter


def run_all(ground: Ground, plan: Plan) -> Runs:
    """Double the steps until no arm gains from it, or the plan ends; then run the other seeds."""
    arms = arms_of(ground.setup.config, ground.setup.data)
    losses: dict[int, dict[str, float]] = {}
    most = len(arms) * (len(plan.lengths) + max(plan.seeds) - 1)
    with tqdm(total=most, desc="Verdict", unit="run", leave=False) as bar:

        def run(study: Study, arm: str, seed: int) -> dict[str, Any]:
            bar.set_postfix_str(f"{study.arms[arm].title}, {study.choices['config']['max_steps']} steps, seed {seed}")
            found = run_arm(study, arm, seed)
            bar.update()
            return found

        for length in plan.lengths:
            study = verdict_study(ground, arms, length)
            first = {arm: run(study, arm, 0) for arm in arms}
            before = losses.get(max(losses, default=0), {})
            losses[length] = {arm: lowest_loss(found) for arm, found in first.items()}
            unfinished = [arm for arm in arms if arm not in before or still_falls(before[arm], losses[length][arm])]
            if not unfinished:
                break
        seeds = range(1, dict(zip(plan.lengths, plan.seeds, strict=True))[length])
        runs = {arm: [first[arm], *(run(study, arm, seed) for seed in seeds)] for arm in arms}
    return Runs(length, arms, runs, tuple(unfinished), losses)
