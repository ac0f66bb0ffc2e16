"""Chapter 06: did distillation help?

The arms of the comparison, the same measures for every model, and tables of differences within a seed. Two arms with
the same seed start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers.config import DistillConfig
from kd_helpers.data import (
    DataSplits,
    corpus_digest,
    evaluation_batches,
    read_corpus,
    tokenize,
    training_batches,
)
from kd_helpers.experiments.signals import BASELINE, Signal, signal_logits
from kd_helpers.experiments.statistics import intervals, mean_interval
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study, study_table, titles
from kd_helpers.loop import classifier_loss, fit, recipe
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.metrics import (
    Predictions,
    classification_metrics,
    evaluate,
    fidelity,
    latency,
    predict,
    predict_and_evaluate,
    reliability,
)
from kd_helpers.models import checkpoint_version, count_parameters, freeze, load_student
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runs import distill
from kd_helpers.runtime import machine, seed_everything
from kd_helpers.teacher import TeacherLogits, fine_tuned_teacher, load_teacher_logits

METRICS = ("accuracy", "macro_recall", "macro_f1", "nll", "ece", "fidelity")


@dataclasses.dataclass(frozen=True)
class Recipe(Signal):
    """What an arm's student learns from, and what else an arm can change.

    Attributes:
        best_epoch: whether the student is measured after its best epoch, by accuracy on validation, not after its last.
        redrawn: whether each seed draws other labelled texts, from those of the teacher.
        new_texts: so many texts of the transfer set that the teacher was not fine-tuned on; 0 takes the whole set.
    """

    best_epoch: bool = False
    redrawn: bool = False
    new_texts: int = 0


_TUNED = Recipe("tuned", temperature=2.0, alpha=0.9)
_HARD = dataclasses.replace(_TUNED, teacher="hard")  # T and alpha as with soft targets, so that nothing else differs
_OWN = dataclasses.replace(_TUNED, teacher="own")


def _with_transfer(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, transfer=True)


def _redrawn(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, redrawn=True)


# Label smoothing with ε is distillation with alpha = ε and T = 1 from a teacher that gives every class the same
# probability (Yuan et al. 2020, arXiv 1909.11723): one loss and one loop serve all arms.
ARMS: dict[str, Arm] = {
    BASELINE: Arm("Baseline: labels only", Recipe()),
    "best_epoch": Arm("Baseline at its best epoch", Recipe(best_epoch=True)),
    "label_smoothing": Arm("Label smoothing 0.2", Recipe("uniform", temperature=1.0, alpha=0.2)),
    "untuned_teacher": Arm("Untuned teacher", Recipe("untuned", temperature=2.0, alpha=0.9)),
    "own_labels": Arm("Teacher of the same labels", _OWN),
    "hard_labels": Arm("Tuned teacher, hard labels", _HARD),
    "tuned_teacher": Arm("Tuned teacher", _TUNED),
    "transfer_own_labels": Arm("Teacher of the same labels + transfer set", _with_transfer(_OWN)),
    "transfer_hard_labels": Arm("Tuned teacher, hard labels + transfer set", _with_transfer(_HARD)),
    "transfer_set": Arm("Tuned teacher + transfer set", _with_transfer(_TUNED)),
    "more_labels": Arm("Baseline with 4 × the labels", Recipe(labels=4)),
    "redrawn_baseline": Arm("Baseline, labels redrawn", _redrawn(Recipe())),
    "redrawn_tuned_teacher": Arm("Tuned teacher, labels redrawn", _redrawn(_TUNED)),
    "redrawn_transfer_set": Arm("Tuned teacher + transfer set, labels redrawn", _redrawn(_with_transfer(_TUNED))),
}
# Those that a first look needs; the others take them apart.
MAIN_ARMS = (
    *(BASELINE, "best_epoch", "label_smoothing", "untuned_teacher", "own_labels", "hard_labels", "tuned_teacher"),
    *("transfer_set", "more_labels"),
)

# What the stored comparison was made with. Every arm makes the same number of steps, enough to memorise 2,500 labels
# (13 epochs) and to see the transfer set more than once. Alpha is each arm's own, and max_steps decides over epochs.
COMPARISON = DistillConfig(
    transfer_size=21_631, max_steps=1000, epochs=3, learning_rate=1e-4, warmup_ratio=0.1, alpha=0.5
)
COMPARISON_SEEDS = (0, 1, 2, 3, 4)


def comparison_study(
    config: DistillConfig, *, arms: Sequence[str] = tuple(ARMS), seeds: Sequence[int] = COMPARISON_SEEDS
) -> Study:
    """The study whose arms share a configuration.

    Its runs have `steps`, `seconds`, every one of `METRICS` on test, and what `describe` and `history` (step and
    measures on validation after each epoch) add. A run's folder holds its student, unless it is that of a best epoch.
    """
    sources = [name for name in (config.teacher_source, config.student_source) if name]

    @functools.cache
    def reference() -> TeacherLogits:
        """Those of the tuned teacher on test, with which fidelity is measured."""
        return load_teacher_logits(resolve(config), "test")

    def run(signal: Recipe, seed: int, folder: Path) -> dict[str, Any]:
        setup = resolve(signal.configure(config.replace(seed=seed)))
        if signal.redrawn:
            setup = dataclasses.replace(setup, data=redrawn(setup.data, seed))
        if signal.new_texts:
            setup = dataclasses.replace(setup, data=with_new_texts(setup.data, signal.new_texts))
        if signal.best_epoch:
            return at_best_epoch(setup, reference())
        teacher_logits = signal_logits(signal, setup)
        result = distill(setup.config, data=setup.data, teacher_logits=teacher_logits, output_dir=folder)
        return {
            "steps": result.metrics["steps"],
            "seconds": result.metrics["seconds"],
            "history": [{"step": epoch["step"], **epoch["validation"]} for epoch in result.history],
            **describe(result.predictions, reference()),
        }

    return Study(
        name="comparison",
        module="kd_helpers.experiments.comparison",
        arms={name: ARMS[name] for name in arms},
        seeds=seeds,
        choices={
            "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
            "machine": str(machine(config)),
            "checkpoints": [checkpoint_version(name) for name in sources],
            "texts": corpus_digest(read_corpus(config)),
        },
        run=run,
    )


def redrawn(data: DataSplits, seed: int) -> DataSplits:
    """The same splits with other labelled texts, drawn from those of the teacher.

    Where there is a transfer set, the texts whose place they take join it. It must hold all texts of the teacher that
    are not labelled.
    """
    order = np.random.default_rng(seed).permutation(len(data.teacher_train))
    train = data.teacher_train.select(np.sort(order[: len(data.train)]))
    if len(data.transfer) == 0:
        return dataclasses.replace(data, train=train)
    left = ~np.isin(data.student_train["id"][:], train["id"][:])
    transfer = data.student_train.select(np.flatnonzero(left)).remove_columns("label")
    hidden = [IGNORE_INDEX] * len(transfer)
    return dataclasses.replace(data, train=train, transfer=transfer.add_column("label", hidden))


def with_new_texts(data: DataSplits, count: int) -> DataSplits:
    """The same splits with so many texts in the transfer set, none of which the teacher was fine-tuned on.

    Raises:
        ValueError: there are fewer.
    """
    new = np.flatnonzero(~np.isin(data.transfer["id"][:], data.teacher_train["id"][:]))
    if len(new) < count:
        raise ValueError(f"{count:,} new texts were asked for, the transfer set has {len(new):,}; ask for fewer.")
    return dataclasses.replace(data, transfer=data.transfer.select(new[:count]))


def at_best_epoch(setup: Setup, teacher: TeacherLogits) -> dict[str, Any]:
    """Train on labels alone, and describe the student as it was after its best epoch, by accuracy on validation.

    Args:
        setup: of the arm.
        teacher: the logits with which fidelity is measured.

    Returns:
        The measures of a run (see `comparison_study`); `steps` as many as the best epoch ends after; and
        `last_accuracy` and `last_nll`, of the student after its last step.
    """
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.student
    train, validation, test = (
        tokenize(part, tokenizer, config.max_length) for part in (data.student_train, data.validation, data.test)
    )
    validation, test = evaluation_batches(validation, tokenizer), evaluation_batches(test, tokenizer)
    seed_everything(config.seed)
    student = load_student(config, data.label_names, tokenizer).to(setup.device)
    best = {"accuracy": -1.0}

    def validate() -> dict[str, float]:
        measures = evaluate(student, validation, setup.precision)
        if measures["accuracy"] > best["accuracy"]:
            best.update(measures, predictions=predict(student, test, setup.precision))
        return measures

    progress = fit(
        student,
        training_batches(train, tokenizer, config.batch_size, seed=config.seed),
        classifier_loss(student, temperature=config.temperature, alpha=config.alpha),
        steps=config.max_steps,
        **recipe(config, config.max_steps),
        precision=setup.precision,
        lean=config.lean,
        validate=validate,
        description="Training",
    )
    history = [{"step": epoch["step"], **epoch["validation"]} for epoch in progress.history]
    last = evaluate(student, test, setup.precision)
    return {
        "steps": max(history, key=lambda epoch: epoch["accuracy"])["step"],
        "seconds": progress.seconds,
        "history": history,
        "last_accuracy": last["accuracy"],
        "last_nll": last["nll"],
        **describe(best["predictions"], teacher),
    }


def describe(predictions: Predictions, teacher: TeacherLogits) -> dict[str, Any]:
    """Everything that the comparison keeps of a model's predictions on the test split.

    Returns:
        The measures, `confusion` `[C][C]` (rows are the labels), `reliability` by bin, and `predicted`, the numbers of
        the predicted classes in order of the texts' ids.
    """
    predicted = predictions.logits.argmax(dim=-1)
    return {
        **classification_metrics(predictions.logits, predictions.labels),
        **fidelity(predictions.logits, teacher.lookup(predictions.ids)),
        "confusion": confusion_matrix(
            predictions.labels, predicted, labels=range(predictions.logits.shape[1])
        ).tolist(),
        "reliability": {
            name: np.nan_to_num(values).round(4).tolist()
            for name, values in reliability(predictions.logits, predictions.labels).items()
        },
        "predicted": class_numbers(predicted),
    }


def class_numbers(classes: torch.Tensor) -> str:
    """The numbers of classes `[N]` in one line, which keeps the JSON short."""
    return " ".join(map(str, classes.tolist()))


def model_cost(model: PreTrainedModel, name: str, setup: Setup, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What it costs to keep and to run a model.

    Returns:
        `parameters`, `megabytes` of the weights on disk, `latency_p50_ms` and `latency_p95_ms` of single texts
        (float32), `texts_per_second` in batches of 64 (in the precision of the setup).
    """
    model = model.to(setup.device).eval()
    test = setup.data.test.select(range(min(2000, len(setup.data.test))))
    test = tokenize(test, tokenizer, setup.config.max_length)
    singles = list(evaluation_batches(test.select(range(min(200, len(test)))), tokenizer, batch_size=1))
    one_by_one = latency(model, singles, torch.float32)
    timed = predict_and_evaluate(model, name, evaluation_batches(test, tokenizer), setup.precision)
    return {
        "model": name,
        "parameters": count_parameters(model),
        "megabytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
        **{f"latency_{key}_ms": value for key, value in one_by_one.items()},
        "texts_per_second": timed["texts"] / timed["seconds"],
    }


def compare(
    config: DistillConfig, *, arms: Sequence[str] = tuple(ARMS), seeds: Sequence[int] = COMPARISON_SEEDS
) -> dict[str, Any]:
    """Run arms × seeds (finished runs are found again) and measure the teachers.

    Returns:
        What `study.run_study` returns, with `labels` (of the test split, their numbers), `teachers` (of each kind:
        `train_accuracy`, on the student's labelled texts, and on test what `describe` returns; the tuned and the
        untuned one, and the one of the student's own labels where an arm has it) and `costs` (see `model_cost`).
    """
    setup = resolve(config)
    test = setup.data.test
    labels = torch.tensor(test["label"][:])[torch.argsort(torch.tensor(test["id"][:]))]
    kinds = ["untuned", *(["own"] if any(ARMS[arm].recipe.teacher == "own" for arm in arms) else []), "tuned"]
    setups = {kind: resolve(Signal(kind).configure(config)) for kind in kinds}
    logits = {kind: load_teacher_logits(of_teacher, "test") for kind, of_teacher in setups.items()}
    ids = logits["tuned"].ids.sort().values
    teachers = {
        kind: {
            "train_accuracy": _accuracy(load_teacher_logits(setups[kind], "train"), setup.data.train),
            **describe(Predictions(ids, of_teacher.lookup(ids), labels), logits["tuned"]),
        }
        for kind, of_teacher in logits.items()
    }
    result = run_study(comparison_study(config, arms=arms, seeds=seeds))
    teacher, student = fine_tuned_teacher(setup), freeze(load_student(config, setup.data.label_names))
    return result | {
        "labels": class_numbers(labels),
        "teachers": teachers,
        "costs": [
            model_cost(teacher, "teacher", setup, setup.tokenizers.teacher),
            model_cost(student, "student", setup, setup.tokenizers.student),
        ],
    }


def _accuracy(of_teacher: TeacherLogits, texts: datasets.Dataset) -> float:
    right = of_teacher.lookup(torch.tensor(texts["id"][:])).argmax(dim=-1) == torch.tensor(texts["label"][:])
    return right.float().mean().item()


def study() -> dict[str, Any]:
    """The full comparison that comes with the package (see `compare`)."""
    return compare(COMPARISON)


def stored_comparison() -> dict[str, Any]:
    """The full comparison that comes with the package, made by `make results`."""
    return stored_study("comparison")


def main_arms(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The same comparison with the arms of `MAIN_ARMS` alone."""
    arms = {name: arm for name, arm in comparison["arms"].items() if name in MAIN_ARMS}
    return {**comparison, "arms": arms, "runs": [run for run in comparison["runs"] if run["arm"] in arms]}


def summary(comparison: Mapping[str, Any]) -> pd.DataFrame:
    """Mean of each measure over the seeds with half the width of its 95% interval.

    Returns:
        One row per arm, by title; for each of `METRICS` the columns `m` and `m ±`.
    """
    tables = {metric: study_table(comparison, metric) for metric in METRICS}
    rows = {}
    for arm, title in titles(comparison).items():
        row = {}
        for metric, table in tables.items():
            mean, low, high = mean_interval(table[arm])
            row |= {metric: mean, f"{metric} ±": (high - low) / 2}
        rows[title] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def gains_over_texts(comparison: Mapping[str, Any], *, over: str = BASELINE) -> pd.DataFrame:
    """Each other arm's accuracy minus that of the arm `over`, with the 95% t interval over test texts.

    For each text the share of seeds that predict it correctly is compared, so the interval covers what another sample
    of test texts would change. `study.gains` gives the interval over seeds.
    """
    labels = np.array(comparison["labels"].split())
    right: dict[str, list[np.ndarray]] = {}
    for run in comparison["runs"]:
        right.setdefault(run["arm"], []).append(np.array(run["predicted"].split()) == labels)
    share = {arm: np.mean(seeds, axis=0) for arm, seeds in right.items()}
    return intervals({arm: share[arm] - share[over] for arm in share if arm != over}, "gain")


def last_and_best(comparison: Mapping[str, Any], arm: str) -> tuple[float, float]:
    """Accuracy on validation, mean over the seeds: after the last epoch, and after each seed's best one.

    The best epoch is chosen with hindsight, so its value is slightly too high: it is the most that early stopping could
    reach.
    """
    curves = [[epoch["accuracy"] for epoch in run["history"]] for run in comparison["runs"] if run["arm"] == arm]
    return float(np.mean([curve[-1] for curve in curves])), float(np.mean([max(curve) for curve in curves]))
