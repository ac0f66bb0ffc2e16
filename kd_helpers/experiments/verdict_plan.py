"""The plan of a verdict (see `verdict`): how many steps, seeds and texts a time budget allows, and the runs of it.

Two learning rates are tried for every arm, and the number of steps is doubled until no arm gains from it. An arm that
still does at the end is unfinished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, dataset_digest, evaluation_batches, tokenize, training_batches
from kd_helpers.experiments.judgement import crossed, text_weights
from kd_helpers.experiments.signals import Signal, uniform_logits
from kd_helpers.experiments.study import Arm, Study, run_arm
from kd_helpers.experiments.verdict_runs import (
    MOST_SEEDS,
    Ground,
    arms_of,
    labels_of,
    run_logits,
    runs_study,
    steps_an_epoch,
    with_enough_epochs,
)
from kd_helpers.loop import DivergedError, classifier_loss, fit, recipe
from kd_helpers.metrics import predict
from kd_helpers.models import checkpoint_version, load_student, load_teacher
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup
from kd_helpers.teacher import attach

MODULE = "kd_helpers.experiments.verdict_plan"
RATES = (1.0, 3.0)  # learning rates that every arm is tried with, as multiples of the configuration's
LENGTHS = (  # steps that are tried, each about twice the one two before
    *(60, 90, 125, 180, 250, 375, 500, 750, 1000, 1500, 2000, 3000, 4000, 6000, 8000),
    *(12_000, 16_000, 24_000, 32_000, 48_000, 64_000),
)
ENOUGH_STEPS, FEWEST_TOKENS = 1000, 32  # where a budget allows fewer steps, texts are cut, but not shorter than this
WORTH_CUTTING = 0.2  # of the tokens, which a cut must save at least
FEWEST_SEEDS = 4  # of an arm: with fewer, the interval over seeds is very wide
ROUGH_SEEDS, ROUGH_RATES = 2, RATES[-1:]  # for a rough answer: few steps are best used at the higher rate
TEACHER_SHARE, TRIES_SHARE = 0.4, 0.1  # of the budget, at most: for the teacher, and for what to try next
READING_SHARE = 0.1  # of the budget, at most: for the teacher's logits of texts without labels
FALLS = 0.01  # an arm is unfinished where twice the steps lower its loss by more than this share of that of guessing
ONE_SIDED = 0.9  # the level of an interval of which one side is left with a probability of 5%
ROUGH = 600.0  # seconds; a smaller budget gives a rough answer
WARM_UP = 3  # steps that are not timed


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
        seeds: of every arm, for each of the lengths, should it be the one that is chosen; the first never is, since
            nothing says yet whether its arms are finished.
        rates: learning rates that every arm is tried with, as multiples of the configuration's.
        tries: how many other settings are tried at most, with the first seed (see `verdict.try_settings`).
        rough: whether the budget is too small for an answer to rely on.
        exceeds: whether even the least that can be run takes longer than the budget.
        seconds: what it will take, by the measured speed; 0 where no speed was measured.
        teacher_seconds: of these, what fine-tuning the teacher and its logits take.
    """

    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = RATES
    tries: int = 0
    rough: bool = False
    exceeds: bool = False
    seconds: float = 0.0
    teacher_seconds: float = 0.0


def measure_speed(setup: Setup) -> Speed:
    """Time steps and forward passes of both models on some of the texts that they will read.

    Batches hold texts of similar length, so that all of some texts tell more than a few batches. The first steps, which
    take longer, are left out.
    """
    data, tokenizers, config = setup.data, setup.tokenizers, setup.config
    found = {}
    student = load_student(config, data.label_names, tokenizers.student)
    teacher = load_teacher(config, data.label_names, tokenizers.teacher)
    for name, model, texts, tokenizer, batch_size in (
        ("student", student, data.student_train, tokenizers.student, config.batch_size),
        ("teacher", teacher, data.teacher_train, tokenizers.teacher, DistillConfig.batch_size),
    ):
        model = model.to(setup.device)
        some = tokenize(first_texts(texts, 512), tokenizer, config.max_length)
        batches = training_batches(
            attach(some, uniform_logits([some], data.label_names)), tokenizer, batch_size, seed=0
        )
        steps = len(batches) + WARM_UP
        moments: list[float] = []
        fit(
            model,
            batches,
            classifier_loss(model, temperature=1.0, alpha=1.0),
            steps=steps,
            **recipe(config, steps),
            precision=setup.precision,
            lean=config.lean,
            after_step=lambda _, moments=moments: moments.append(time.perf_counter()),
            description=None,
        )
        found[f"{name}_step"] = float(np.mean(np.diff(moments)[WARM_UP - 1 :]))
        started = time.perf_counter()
        predict(model, evaluation_batches(some, tokenizer), setup.precision)
        found[f"{name}_text"] = (time.perf_counter() - started) / len(some)
    return Speed(**found)


def stored_speed(setup: Setup) -> Speed:
    """The speed of this machine with these models and texts: measured once, so that a plan stays what it is."""
    teacher = setup.config.teacher_source
    provenance = made_by(MODULE) | {
        "machine": setup.machine,
        "threads": torch.get_num_threads(),
        "models": [checkpoint_version(name) for name in (teacher, setup.config.student_source or teacher)],
        "texts": [dataset_digest(part) for part in (setup.data.student_train, setup.data.teacher_train)],
        "batch_size": setup.config.batch_size,
        "max_length": setup.config.max_length,
    }
    folder = artifacts.artifacts_dir() / "speeds" / artifacts.fingerprint(provenance)
    artifacts.get_or_build(
        folder, lambda target: artifacts.save_json(target / "speed.json", dataclasses.asdict(measure_speed(setup)))
    )
    return Speed(**artifacts.load_json(folder / "speed.json"))


def run_seconds(steps: int, moments: int, speed: Speed, data: DataSplits) -> float:
    """What a run takes: its steps, validation at each of its moments, and test at the last and the best of them."""
    texts = moments * len(data.validation) + min(moments, 2) * len(data.test)
    return steps * speed.student_step + texts * speed.student_text


def teacher_seconds(config: DistillConfig, speed: Speed, data: DataSplits) -> float:
    """What it takes to fine-tune the teacher and to let it read all texts."""
    steps = config.teacher_epochs * steps_an_epoch(len(data.teacher_train))
    texts = len(data.student_train) + (1 + config.teacher_epochs) * len(data.validation) + len(data.test)
    return steps * speed.teacher_step + texts * speed.teacher_text


def within_budget(
    budget: float, speed: Speed, config: DistillConfig, data: DataSplits
) -> tuple[DistillConfig, DataSplits]:
    """The teacher's epochs and the texts of teacher and student, such that time is left for the students.

    Texts without labels are left out where the teacher would need more than `READING_SHARE` of the budget to read them.
    Where `with_enough_epochs` asks for more than `TEACHER_SHARE` of the budget, the teacher first gets fewer epochs,
    but not fewer than `config` says, and then fewer texts. Of each split the first texts are kept.
    """
    readable = max(1, int(READING_SHARE * budget / speed.teacher_text))
    data = dataclasses.replace(data, transfer=first_texts(data.transfer, readable))
    enough = with_enough_epochs(config, data)
    affordable = TEACHER_SHARE * budget / teacher_seconds(enough, speed, data) if enough.teacher_epochs else math.inf
    if affordable >= 1:
        return enough, data
    epochs = max(config.teacher_epochs, math.floor(affordable * enough.teacher_epochs))
    share = min(1.0, affordable * enough.teacher_epochs / epochs)
    kept = max(DistillConfig.batch_size, round(share * len(data.teacher_train)))
    fewer = {"train": first_texts(data.train, kept), "teacher_train": first_texts(data.teacher_train, kept)}
    return config.replace(teacher_epochs=epochs), dataclasses.replace(data, **fewer)


def first_texts(split: datasets.Dataset, most: int) -> datasets.Dataset:
    """The first texts of a split, so many at most."""
    return split.select(range(min(most, len(split))))


def make_plan(budget: float, speed: Speed, config: DistillConfig, data: DataSplits) -> Plan:
    """The longest runs for which the budget allows the fewest seeds of every arm that are enough.

    Two lengths are needed to see whether an arm is finished, so a budget that is too small for the two shortest is
    exceeded. What is left goes to a third, shorter length, which may turn out to be enough; then to what to try next,
    and to more seeds.
    """
    moments = [len(arm.recipe.moments) for arm in arms_of(config, data).values()]
    fewest, rates = (ROUGH_SEEDS, ROUGH_RATES) if budget < ROUGH else (FEWEST_SEEDS, RATES)
    for_teacher = teacher_seconds(config, speed, data)
    left = budget - for_teacher

    def cost(lengths: Sequence[int], seeds: int) -> float:
        """Of trying these lengths with one seed and every rate, and running the last with the other seeds."""
        each = [sum(run_seconds(length, count, speed, data) for count in moments) for length in lengths]
        return len(rates) * sum(each) + (seeds - 1) * each[-1]

    last = range(2, len(LENGTHS))
    ladders = [LENGTHS[first : end + 1 : 2] for end in last for first in (end - 2, end - 4) if first >= 0]
    lengths = [ladders[0], *(ladder for ladder in ladders if cost(ladder, fewest) <= left)][-1]
    exceeds = cost(lengths, fewest) > left
    rough = exceeds or budget < ROUGH
    for_tries = 0.0 if rough else min(TRIES_SHARE * budget, left - cost(lengths, fewest))
    left -= for_tries
    seeds = []
    for end in range(1, len(lengths) + 1):
        fitting = [count for count in range(fewest, MOST_SEEDS + 1) if cost(lengths[:end], count) <= left]
        seeds.append(max(fitting, default=fewest))
    longest = max(cost(lengths[:end], count) for end, count in enumerate(seeds, start=1))
    tries = int(for_tries / run_seconds(lengths[-1], 1, speed, data))
    seconds = for_teacher + longest + for_tries
    return Plan(lengths, tuple(seeds), rates, tries, rough, exceeds, seconds, for_teacher)


def plan_within(budget: float, setup: Setup) -> tuple[Setup, Plan]:
    """The plan for a budget, and what it leaves of the texts and of the teacher's training.

    Texts are cut to half of their tokens, and again, while fewer than `ENOUGH_STEPS` steps fit: an arm that is not
    finished is not judged, and few texts need all of their tokens to be told apart.
    """
    tokens = tokenize(setup.data.student_train, setup.tokenizers.student, setup.config.max_length)
    lengths = np.array(tokens["length"][:])
    while True:
        speed = stored_speed(setup)
        config, data = within_budget(budget, speed, setup.config, setup.data)
        plan = make_plan(budget, speed, config, data)
        kept = setup.config.max_length
        half = kept // 2
        saved = 1 - np.minimum(lengths, half).sum() / np.minimum(lengths, kept).sum()
        if plan.lengths[-1] >= ENOUGH_STEPS or half < FEWEST_TOKENS or saved < WORTH_CUTTING:
            return dataclasses.replace(setup, config=config, data=data), plan
        setup = dataclasses.replace(setup, config=setup.config.replace(max_length=half))


# ---- The runs


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a verdict.

    Attributes:
        steps: of each.
        arms: title and recipe, by name; each recipe has the learning rate that was best for it.
        runs: of each arm, one for each seed (see `study.run_arm`).
        unfinished: arms that twice the steps still improve (see `improves`).
        losses: the lowest `validation_loss` of the first seed, by length and arm, at the better rate.
    """

    steps: int
    arms: Mapping[str, Arm]
    runs: Mapping[str, list[dict[str, Any]]]
    unfinished: tuple[str, ...]
    losses: Mapping[int, Mapping[str, float]]


def lowest_loss(run: Mapping[str, Any]) -> float:
    """The lowest loss on validation among a run's moments."""
    return min(moment["loss"] for moment in run["history"])


def improves(ground: Ground, signal: Signal, shorter: Mapping[str, Any], longer: Mapping[str, Any]) -> bool:
    """Whether twice the steps make a run better on validation.

    They do if they lower its loss by more than the share `FALLS` of that of guessing, or if they raise its measure by
    what matters, and by more than chance (a paired test over texts, one-sided, at 5%). The second is needed for soft
    targets of much entropy, the uniform ones above all: their loss hardly moves while the student learns its classes.

    Args:
        ground: has the validation texts, the measure and what matters.
        signal: what the run's student learns from.
        shorter, longer: the runs.
    """
    data = ground.setup.data
    if lowest_loss(shorter) - lowest_loss(longer) > FALLS * loss_of_guessing(signal, len(data.label_names)):
        return True
    labels = labels_of(data.validation)
    before, after = ((best_classes(run) == labels).astype(float) for run in (shorter, longer))
    rise = crossed(after - before, text_weights(labels, ground.measure), level=ONE_SIDED)
    return rise.gain >= ground.effect and rise.low > 0


def loss_of_guessing(signal: Signal, classes: int) -> float:
    """The `validation_loss` of a student that gives every class the same probability."""
    return (signal.alpha * signal.temperature**2 + 1 - signal.alpha) * math.log(classes)


def best_classes(run: Mapping[str, Any]) -> np.ndarray:
    """The classes `[N]` that a run predicts for validation, at its best moment if it was measured at several."""
    moment = "best" if len(run["history"]) > 1 else "last"
    return run_logits(run, moment, "validation").argmax(axis=-1)


def with_rates(arms: Mapping[str, Arm], rates: Mapping[str, float]) -> dict[str, dict[str, Arm]]:
    """For each arm what is tried: the same with each of the rates, by a name of its own.

    Args:
        arms: by name; each recipe is a `Training`.
        rates: by name.
    """
    return {
        name: {
            f"{name}, {which}": Arm(arm.title, dataclasses.replace(arm.recipe, learning_rate=rate))
            for which, rate in rates.items()
        }
        for name, arm in arms.items()
    }


def run_all(ground: Ground, plan: Plan) -> Runs:
    """Double the steps until no arm gains from it, or the plan ends; then run the other seeds.

    At each length every arm is tried with each of the plan's rates. The one with the lower loss on validation counts,
    and the other seeds use it: a rate that suits labels need not suit soft targets, nor one length the next. A rate at
    which a run diverges is left out.

    Raises:
        DivergedError: an arm diverges at all rates.
    """
    config = ground.setup.config
    arms = arms_of(config, ground.setup.data)
    tried = with_rates(arms, {f"{factor:g}": factor * config.learning_rate for factor in plan.rates})
    recipes = {name: recipe for of_arm in tried.values() for name, recipe in of_arm.items()}
    losses: dict[int, dict[str, float]] = {}
    before: dict[str, dict[str, Any]] = {}  # by name, and by arm the better of them
    most = len(recipes) * len(plan.lengths) + len(tried) * (max(plan.seeds) - 1)
    with tqdm(total=most, desc="Verdict", unit="run", leave=False) as bar:

        def run(study: Study, seed: int, name: str) -> dict[str, Any]:
            steps = study.choices["config"]["max_steps"]
            bar.set_postfix_str(f"{recipes[name].title}, {steps} steps, seed {seed}")
            found = run_arm(study, name, seed)
            bar.update()
            return found

        for length in plan.lengths:
            study = runs_study(ground, recipes, length)
            now, ranked = {}, {}
            for arm, names in tried.items():
                first = without_diverged(names, functools.partial(run, study, 0))
                ranked[arm] = sorted(first, key=lambda name, first=first: lowest_loss(first[name]))
                now |= first | {arm: first[ranked[arm][0]]}
            losses[length] = {arm: lowest_loss(now[arm]) for arm in tried}
            shorter = {arm: [before[name] for name in (arm, ranked[arm][0]) if name in before] for arm in tried}
            unfinished = [
                name
                for name, arm in arms.items()
                if not before or any(improves(ground, arm.recipe.signal, one, now[name]) for one in shorter[name])
            ]
            if not unfinished:
                break
            before = now
        seeds = range(1, dict(zip(plan.lengths, plan.seeds, strict=True))[length])
        found = {arm: all_seeds(names, now, functools.partial(run, study), seeds) for arm, names in ranked.items()}
    chosen = {arm: recipes[name] for arm, (name, _) in found.items()}
    return Runs(length, chosen, {arm: runs for arm, (_, runs) in found.items()}, tuple(unfinished), losses)


def all_seeds(
    names: Sequence[str],
    first: Mapping[str, dict[str, Any]],
    run: Callable[[int, str], dict[str, Any]],
    seeds: Iterable[int],
) -> tuple[str, list[dict[str, Any]]]:
    """The first of these names that diverges with no seed, and its runs.

    Args:
        names: the best first.
        first: the run of the first seed, by name.
        run: makes one with another seed.
        seeds: the others.

    Raises:
        DivergedError: all diverge.
    """
    *better, last = names
    for name in better:
        with contextlib.suppress(DivergedError):
            return name, [first[name], *(run(seed, name) for seed in seeds)]
    return last, [first[last], *(run(seed, last) for seed in seeds)]


def without_diverged(names: Iterable[str], run: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs of these names, without those that diverge.

    Raises:
        DivergedError: all diverge.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = run(name)
        except DivergedError as error:
            last = error
    if not found:
        raise last
    return found
