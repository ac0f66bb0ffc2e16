"""Chapter 06: did distillation help?

The arms of the comparison, the same measures for every model, and statistics that know that two arms
with the same seed start from the same weights and see the same batches. `python -m kd_helpers.comparison`
makes the full comparison that the course keeps as data.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import confusion_matrix
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kd_helpers import __version__, artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, evaluation_batches, load_splits, tokenize
from kd_helpers.models import (
    checkpoint_version,
    count_parameters,
    freeze,
    load_student,
    load_tokenizers,
    model_inputs,
)
from kd_helpers.teacher_logits import TeacherLogits, autocast
from kd_helpers.training import (
    Batch,
    Predictions,
    classification_metrics,
    dataset_digest,
    distill,
    fine_tuned_teacher,
    machine,
    predict,
    reliability,
    teacher_answers,
)

METRICS = ("accuracy", "macro_recall", "macro_f1", "nll", "ece", "fidelity")
BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training the student.

    Attributes:
        title: for tables and figures.
        teacher: whose soft targets: "none", "uniform" (the same probability for every class), "untuned"
            (a random head), or "tuned".
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        labels: how many of the labelled texts, as a multiple of `config.train_size`.
        transfer: whether the texts of `config.transfer_size` are added without labels.
    """

    title: str
    teacher: str = "none"
    temperature: float = 1.0
    alpha: float = 0.0
    labels: int = 1
    transfer: bool = False

    def configure(self, config: DistillConfig) -> DistillConfig:
        """The configuration of this arm, given the one all arms share."""
        return config.replace(
            temperature=self.temperature,
            alpha=self.alpha,
            train_size=config.train_size * self.labels,
            transfer_size=config.transfer_size if self.transfer else 0,
            teacher_epochs=0 if self.teacher == "untuned" else config.teacher_epochs,
        )


# Label smoothing with ε is distillation with alpha = ε and T = 1 from a teacher that finds every class
# equally likely (Yuan et al. 2020, arXiv 1909.11723): one loss and one loop serve all arms.
ARMS: dict[str, Arm] = {
    BASELINE: Arm("Baseline: labels only"),
    "label_smoothing": Arm("Label smoothing 0.2", teacher="uniform", temperature=1.0, alpha=0.2),
    "untuned_teacher": Arm("Untuned teacher", teacher="untuned", temperature=2.0, alpha=0.9),
    "tuned_teacher": Arm("Tuned teacher", teacher="tuned", temperature=2.0, alpha=0.9),
    "transfer_set": Arm("Tuned teacher + transfer set", teacher="tuned", temperature=2.0, alpha=0.9, transfer=True),
    "more_labels": Arm("Baseline with 4 × the labels", labels=4),
}

# The full comparison: every arm makes the same number of steps, long enough for 2,500 labels to be learned by heart
# (13 epochs) and for the transfer set to be seen more than once.
FULL = DistillConfig(transfer_size=21_949, max_steps=1000, learning_rate=1e-4, warmup_ratio=0.1)
FULL_SEEDS = (0, 1, 2, 3, 4)


def arm_answers(arm: Arm, config: DistillConfig, data: DataSplits) -> TeacherLogits | None:
    """The soft targets' logits for the arm's training texts; None for an arm without a teacher."""
    if arm.teacher == "none":
        return None
    if arm.teacher == "uniform":
        ids = torch.tensor(data.student_train["id"][:])
        return TeacherLogits(ids, torch.zeros(len(ids), len(data.label_names)))
    return teacher_answers(config, data, "student_train")


def run_arm(name: str, config: DistillConfig) -> dict[str, Any]:
    """Train one arm with one seed, measure it on test, and keep the result; found again when repeated.

    Returns:
        `arm`, `seed`, `steps`, `seconds`, every one of `METRICS` on test, `history` (step and measures on
        validation after each epoch), `confusion` `[C][C]` (rows are the labels), `reliability` by bin,
        `predicted`, the numbers of the test texts' classes in order of id, and `folder`, where under
        `artifacts/` the run with its student is.
    """
    arm = ARMS[name]
    own = arm.configure(config)
    data = load_splits(own)
    made_of = {
        "package": __version__,
        "arm": dataclasses.asdict(arm),
        "config": own.to_dict(),
        "machine": str(machine(own)),
        "versions": versions(),
        "measured_against": {"teacher_epochs": config.teacher_epochs},
        "checkpoints": [checkpoint_version(name) for name in (own.teacher_source, own.student_source) if name],
        "labels": data.label_names,
        "texts": [
            dataset_digest(part) for part in (data.student_train, data.teacher_train, data.validation, data.test)
        ],
    }
    folder = artifacts.artifacts_dir() / "comparison" / artifacts.fingerprint(made_of)

    def train_and_measure(target: Path) -> None:
        result = distill(own, data=data, answers=arm_answers(arm, own, data), output_dir=target)
        entry = {
            "arm": name,
            "seed": config.seed,
            "steps": result.metrics["steps"],
            "seconds": result.metrics["seconds"],
            "history": [{"step": epoch["step"], **epoch["validation"]} for epoch in result.history],
            **describe(result.predictions, teacher_answers(config, data, "test")),
        }
        artifacts.save_json(target / "entry.json", entry)

    artifacts.get_or_build(folder, train_and_measure)
    place = folder.relative_to(artifacts.artifacts_dir()).as_posix()
    return artifacts.load_json(folder / "entry.json") | {"folder": place}


def describe(predictions: Predictions, teacher: TeacherLogits) -> dict[str, Any]:
    """All that the comparison keeps of a model's answers on the test split."""
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
    """The numbers of classes `[N]` in one line, which JSON keeps short."""
    return " ".join(map(str, classes.tolist()))


def fidelity(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> dict[str, float]:
    """How well a student matches its teacher, whatever the labels say (Stanton et al. 2021, 2106.05945).

    Returns:
        `fidelity`, the share of texts on which both name the same class, and `kl`, the mean of
        KL(teacher ‖ student) in nats.
    """
    agreement = (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).float().mean()
    divergence = F.kl_div(
        F.log_softmax(student_logits, dim=-1),
        F.log_softmax(teacher_logits, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return {"fidelity": agreement.item(), "kl": divergence.item()}


def predict_and_evaluate(
    model: nn.Module, name: str, batches: Iterable[Batch], precision: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Measure any model on labelled batches, with the time it takes.

    Returns:
        `model` (the name), the measures of `classification_metrics`, `texts`, `seconds` in all and
        `ms_per_text`. Batches are collected first, so only the model is timed.
    """
    batches = list(batches)
    start = time.perf_counter()
    predictions = predict(model, batches, precision)
    seconds = time.perf_counter() - start
    return {
        "model": name,
        **classification_metrics(predictions.logits, predictions.labels),
        "texts": len(predictions.labels),
        "seconds": seconds,
        "ms_per_text": 1000 * seconds / len(predictions.labels),
    }


def latency(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> dict[str, float]:
    """Milliseconds a batch takes, dropout off: `p50` and `p95` over the batches.

    Batches of one text give the usual latency. The first five batches run once more before, to warm up.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = list(batches)
    warm_up = batches[:5]
    milliseconds = []
    with torch.inference_mode(), autocast(device, precision):
        for batch in warm_up + batches:
            start = time.perf_counter()
            model(**model_inputs(model, batch)).logits.cpu()  # .cpu() waits for an asynchronous device
            milliseconds.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(milliseconds[len(warm_up) :], [50, 95])
    return {"p50": float(p50), "p95": float(p95)}


def cost(
    model: nn.Module, name: str, config: DistillConfig, data: DataSplits, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a model costs to keep and to run.

    Returns:
        `parameters`, `megabytes` of the weights on disk, `latency_p50_ms` and `latency_p95_ms` of single texts
        (float32), `texts_per_second` in batches of 64 (in the machine's precision).
    """
    device, precision = machine(config)
    model = model.to(device).eval()
    test = tokenize(data.test.select(range(min(2000, len(data.test)))), tokenizer, config.max_length)
    singles = list(evaluation_batches(test.select(range(min(200, len(test)))), tokenizer, batch_size=1))
    one_by_one = latency(model, singles, torch.float32)
    timed = predict_and_evaluate(model, name, evaluation_batches(test, tokenizer), precision)
    return {
        "model": name,
        "parameters": count_parameters(model),
        "megabytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
        **{f"latency_{key}_ms": value for key, value in one_by_one.items()},
        "texts_per_second": timed["texts"] / timed["seconds"],
    }


def compare(
    config: DistillConfig, *, arms: Sequence[str] = tuple(ARMS), seeds: Sequence[int] = FULL_SEEDS
) -> dict[str, Any]:
    """Run arms × seeds (finished ones are found again) and measure both teachers.

    Returns:
        JSON-ready: `made_with`, `config`, `seeds`, `labels` (of the test split, their numbers), `teachers`,
        `costs` and `runs` (see `run_arm`).
    """
    data = load_splits(config)
    tokenizers = load_tokenizers(config)
    labels = torch.tensor(data.test["label"][:])[torch.argsort(torch.tensor(data.test["id"][:]))]
    answers = {
        "untuned": teacher_answers(config.replace(teacher_epochs=0), data, "test"),
        "tuned": teacher_answers(config, data, "test"),
    }
    ids = answers["tuned"].ids.sort().values
    teachers = {
        name: describe(Predictions(ids, logits.lookup(ids), labels), answers["tuned"])
        for name, logits in answers.items()
    }
    plan = tqdm(list(itertools.product(seeds, arms)), desc="Comparing", unit="run", leave=False)
    runs = [run_arm(name, config.replace(seed=seed)) for seed, name in plan]
    teacher = fine_tuned_teacher(config, data, tokenizers.teacher)
    student = freeze(load_student(config, data.label_names))
    return {
        "made_with": made_with(config),
        "config": config.to_dict(),
        "arms": {name: dataclasses.asdict(ARMS[name]) for name in arms},
        "seeds": list(seeds),
        "labels": class_numbers(labels),
        "teachers": teachers,
        "costs": [
            cost(teacher, "teacher", config, data, tokenizers.teacher),
            cost(student, "student", config, data, tokenizers.student),
        ],
        "runs": runs,
    }


def versions() -> dict[str, str]:
    """What made a result: the versions of Python and of the packages that compute."""
    packages = ("torch", "transformers", "datasets", "numpy", "scikit-learn")
    return {
        "kd_helpers": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def made_with(config: DistillConfig) -> dict[str, str]:
    """What made a result, where and when."""
    where = f"{platform.machine()}, {machine(config)}"
    return versions() | {"machine": where, "date": datetime.date.today().isoformat()}


def runs_table(comparison: dict[str, Any]) -> pd.DataFrame:
    """One row a run: arm, seed and every one of `METRICS`."""
    return pd.DataFrame(comparison["runs"])[["arm", "seed", *METRICS, "seconds"]]


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval: (mean, low, high); NaN bounds for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, df=len(values) - 1)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def intervals(columns: Mapping[str, Sequence[float]], name: str) -> pd.DataFrame:
    """One row a column of values: their mean, called `name`, and its 95% t interval, `low` and `high`."""
    rows = {
        row: dict(zip((name, "low", "high"), mean_interval(values), strict=True)) for row, values in columns.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def summary(comparison: dict[str, Any]) -> pd.DataFrame:
    """Mean of each measure over the seeds with half the width of its 95% interval.

    Returns:
        One row an arm; for each of `METRICS` the columns `m` and `m ±`.
    """
    rows = {}
    for arm, group in runs_table(comparison).groupby("arm", sort=False):
        row = {}
        for metric in METRICS:
            mean, low, high = mean_interval(group[metric])
            row |= {metric: mean, f"{metric} ±": (high - low) / 2}
        rows[ARMS[arm].title] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def paired_differences(
    comparison: dict[str, Any], metric: str = "accuracy", *, reference: str = BASELINE
) -> pd.DataFrame:
    """Each arm minus the reference, seed by seed: `difference` with its 95% t interval `low` … `high`.

    The interval covers what another seed (head, dropout, batch order) would change. See
    `paired_over_texts` for what other test texts would.
    """
    table = runs_table(comparison).pivot(index="seed", columns="arm", values=metric)
    others = [arm for arm in comparison["arms"] if arm != reference]
    return intervals({ARMS[arm].title: table[arm] - table[reference] for arm in others}, "difference")


def paired_over_texts(comparison: dict[str, Any], *, reference: str = BASELINE) -> pd.DataFrame:
    """Each arm's accuracy minus the reference's, with the 95% interval over test texts.

    For each text the share of seeds that get it right is compared, so the interval covers what another
    sample of test texts would change.
    """
    labels = np.array(comparison["labels"].split())
    right: dict[str, list[np.ndarray]] = {}
    for run in comparison["runs"]:
        right.setdefault(run["arm"], []).append(np.array(run["predicted"].split()) == labels)
    share = {arm: np.mean(seeds, axis=0) for arm, seeds in right.items()}
    others = [arm for arm in share if arm != reference]
    return intervals({ARMS[arm].title: share[arm] - share[reference] for arm in others}, "difference")


def last_and_best(comparison: dict[str, Any], arm: str) -> tuple[float, float]:
    """Accuracy on validation, mean over the seeds: after the last epoch, and after each seed's best one.

    The best is picked with hindsight and so a little too good: it is what stopping early could reach at most.
    """
    curves = [[epoch["accuracy"] for epoch in run["history"]] for run in comparison["runs"] if run["arm"] == arm]
    return float(np.mean([curve[-1] for curve in curves])), float(np.mean([max(curve) for curve in curves]))


def stored_comparison() -> dict[str, Any]:
    """The full comparison that comes with the course, made by `make results`."""
    return artifacts.load_json(artifacts.RESULTS / "comparison.json")


def format_table(comparison: dict[str, Any]) -> str:
    """The comparison as plain text: both teachers, then every arm with its intervals."""
    lines = [f"{'':31}" + "".join(f"{metric.replace('_', ' '):>16}" for metric in METRICS)]
    for name, teacher in comparison["teachers"].items():
        cells = "".join(f"{teacher[metric]:.3f}        ".rjust(16) for metric in METRICS)
        lines.append(f"{name.capitalize() + ' teacher itself':31}" + cells)
    for title, row in summary(comparison).iterrows():
        cells = "".join(f"{row[metric]:.3f} ± {row[metric + ' ±']:.3f}".rjust(16) for metric in METRICS)
        lines.append(f"{title:31}" + cells)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the full comparison and store it in the package, with what made it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.parse_args(arguments)
    comparison = compare(FULL)
    artifacts.save_json(artifacts.RESULTS / "comparison.json", comparison)
    print(format_table(comparison))


if __name__ == "__main__":
    main()
