"""Chapter 05: a whole run, from a configuration to a student that is saved.

`distill` does all of it in one call. A run that was interrupted is resumed, and a finished one is found again.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.checkpoints import checkpoints_dir
from kd_helpers.config import PRESETS, DistillConfig, expanded, require_whole
from kd_helpers.data import DataSplits, dataset_digest, evaluation_batches, tokenize, training_batches
from kd_helpers.loop import train_classifier
from kd_helpers.metrics import Predictions, classification_metrics, predict
from kd_helpers.models import checkpoint_version, load_saved, load_student, load_tokenizer, save_model, warn_if_swapped
from kd_helpers.pretrained import some, warn_of_unknown_tokens
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, attach, load_teacher_logits, warn_if_teacher_at_chance


@dataclasses.dataclass(frozen=True)
class DistillResult:
    """A finished run.

    Attributes:
        config: what was asked for.
        student: the trained student, in eval mode.
        tokenizer: its tokenizer.
        history: one entry per epoch (see `loop.fit`).
        metrics: `validation` and `test` (see `classification_metrics`), `steps`, `labelled` and `unlabelled` texts
            that were trained on, `seconds`, and `computed_on`, the device and the precision.
        predictions: the student's logits on the test split.
        folder: where all of it was saved.
    """

    config: DistillConfig
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    predictions: Predictions
    folder: Path


def distill(
    config: DistillConfig,
    *,
    data: DataSplits | None = None,
    teacher_logits: TeacherLogits | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    checkpoint_steps: int = 0,
) -> DistillResult:
    """Distil a student as `config` says: the whole course in one call.

    Args:
        config: every choice.
        data: the splits, if they are loaded already.
        teacher_logits: for `data.student_train`, in place of those of the preset's fine-tuned teacher. An arm of the
            comparison is a run with other teacher logits.
        output_dir: where to save; None saves under `artifacts/runs`.
        resume: continue from the run's last checkpoint, or return the run if it is finished; False begins anew.
        checkpoint_steps: write a checkpoint after every so many steps, not only after each epoch.

    Returns:
        The student with its history and metrics, saved.

    Raises:
        ValueError: `data` or `teacher_logits` make no sense, or `output_dir` holds a finished run of something else, or
            in its folder `student` what no run wrote.
        DivergedError, MemoryError: see `loop.fit`.
    """
    require_whole("checkpoint_steps", checkpoint_steps, minimum=0)
    setup = resolve(config, data)
    chosen = Path(expanded(output_dir, "output_dir")) if output_dir else None
    if chosen and not (chosen / artifacts.MANIFEST).exists():  # where a run is finished, it may be this one
        _require_room_for_a_student(chosen / "student", config=config)
    if teacher_logits is None and config.alpha > 0:
        warn_if_swapped(config)
        teacher_logits = load_teacher_logits(setup, "student_train", checkpoint_steps=checkpoint_steps)
        warn_if_teacher_at_chance(teacher_logits, setup.data.train)
    if teacher_logits is not None:
        teacher_logits.require_classes(setup.data.label_names)
    provenance = provenance_of(setup, teacher_logits)
    key = artifacts.fingerprint(provenance)
    checkpoints = checkpoints_dir(key)
    folder = chosen or artifacts.artifacts_dir() / "runs" / key
    with artifacts.locked(checkpoints):
        found = find_run(folder, provenance)
        if not resume:
            shutil.rmtree(checkpoints, ignore_errors=True)
        elif found is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)  # of a process that died before it could
            return dataclasses.replace(found, student=found.student.to(setup.device))
        _require_room_for_a_student(folder / "student", config=setup.config)
        result = _train_and_measure(setup, teacher_logits, folder, checkpoints, checkpoint_steps)
        save_run(result, provenance)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def _require_room_for_a_student(student: Path, *, config: DistillConfig) -> None:
    """Refuse to write a student where a model stands that the run starts from, or files that no run wrote.

    Raises:
        ValueError: one sentence says which.
    """
    for name in ("student_checkpoint", "teacher_checkpoint"):
        checkpoint = getattr(config, name)
        if checkpoint and Path(checkpoint).resolve().is_relative_to(student.resolve()):
            raise ValueError(f"the run would write its student over {name} ({checkpoint}); choose another output_dir.")
    if student.exists() and (others := artifacts.foreign_files(student)):
        raise ValueError(
            f"{student} holds {some(others)}, which no run wrote and which would be lost; choose another output_dir."
        )


def provenance_of(setup: Setup, teacher_logits: TeacherLogits | None) -> dict[str, Any]:
    """Everything that determines the result of a run."""
    data = setup.data
    source = setup.config.student_source or setup.config.teacher_source  # whose layers and tokenizer it then has
    return {
        **made_by("kd_helpers.runs"),
        "config": setup.config.to_dict(),
        "machine": setup.machine,
        "checkpoint": checkpoint_version(source),
        "labels": data.label_names,
        "texts": [dataset_digest(part) for part in (data.student_train, data.validation, data.test)],
        "teacher_logits": None if teacher_logits is None else teacher_logits.digest(),
    }


def _train_and_measure(
    setup: Setup, teacher_logits: TeacherLogits | None, folder: Path, checkpoints: Path, checkpoint_steps: int
) -> DistillResult:
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.student
    texts = tokenize(data.student_train, tokenizer, config.max_length)
    warn_of_unknown_tokens(texts, tokenizer, config.student_source or config.teacher_source)
    if teacher_logits is not None:
        texts = attach(texts, teacher_logits)
    validation, test = (
        evaluation_batches(tokenize(part, tokenizer, config.max_length), tokenizer)
        for part in (data.validation, data.test)
    )
    seed_everything(config.seed)
    student = load_student(config, data.label_names, tokenizer).to(setup.device)
    progress = train_classifier(
        student,
        training_batches(texts, tokenizer, config.batch_size, seed=config.seed),
        config=config,
        validation=validation,
        precision=setup.precision,
        description="Distilling",
        checkpoints=checkpoints,
        checkpoint_steps=checkpoint_steps,
    )
    predictions = predict(student, test, setup.precision)
    metrics: dict[str, Any] = {
        "validation": progress.history[-1]["validation"],
        "test": classification_metrics(predictions.logits, predictions.labels),
        "steps": progress.step,
        "labelled": len(data.train),
        "unlabelled": len(data.transfer),
        "seconds": progress.seconds,
        "computed_on": setup.machine,
    }
    return DistillResult(config, student.eval(), tokenizer, progress.history, metrics, predictions, folder)


RUN_FILES = ("config.json", "history.json", "metrics.json", artifacts.PROVENANCE, "predictions.safetensors")


def save_run(result: DistillResult, provenance: dict[str, Any]) -> None:
    """Save a run in its folder: `student/` (weights, tokenizer, model card), its predictions, and JSON files.

    `metrics.json` is removed first and written late: where it exists, the run is complete. The seal, `manifest.json`,
    is written last and reveals a change in any of them. Other files in the folder are left alone.

    Args:
        result: of the run.
        provenance: all that determined it.

    Raises:
        OSError: the folder can't be written; one sentence says why.
    """

    def save_student(target: Path) -> None:
        save_model(target, result.student, result.tokenizer)
        (target / "README.md").write_text(model_card(result), encoding="utf-8")

    folder, student = result.folder, result.folder / "student"
    with artifacts.locked(folder / "run"):
        for name in (artifacts.MANIFEST, "metrics.json"):
            (folder / name).unlink(missing_ok=True)
        artifacts.write_folder(student, save_student)
        predictions = safetensors.torch.save(result.predictions._asdict())
        artifacts.write_bytes(folder / "predictions.safetensors", predictions)
        artifacts.save_json(folder / "config.json", result.config.to_dict())
        artifacts.save_json(folder / "history.json", result.history)
        artifacts.save_json(folder / artifacts.PROVENANCE, provenance)
        artifacts.save_json(folder / "metrics.json", result.metrics)
        weights = [f"student/{path.name}" for path in student.iterdir() if path.name != artifacts.MANIFEST]
        artifacts.seal(folder, [*RUN_FILES, *sorted(weights)])


def find_run(folder: Path, provenance: dict[str, Any]) -> DistillResult | None:
    """The finished run in a folder; None where there is none, or a damaged one, which is reported.

    Raises:
        ValueError: the folder holds a finished run with another provenance.
    """
    if not (folder / artifacts.MANIFEST).exists():
        return None
    try:
        result = load_run(folder)
    except ValueError as error:
        warnings.warn(str(error).replace("delete it and run again", "it is made again"), stacklevel=3)
        return None
    other = artifacts.load_json(folder / artifacts.PROVENANCE)
    if artifacts.fingerprint(other) != artifacts.fingerprint(provenance):
        settings = artifacts.differences(result.config.to_dict(), provenance["config"])
        rest = [name for name, value in provenance.items() if name != "config" and _plain(value) != other.get(name)]
        what = ", ".join([*settings, *(_PROVENANCE_IN_WORDS.get(name, f"another {name}") for name in rest)])
        raise ValueError(f"{folder} holds a finished run with {what}; choose another output_dir, or delete it.")
    return result


_PROVENANCE_IN_WORDS = {
    "source": "other code of kd_helpers",
    "machine": "another device or precision",
    "checkpoint": "another student checkpoint",
    "labels": "other classes",
    "texts": "other texts",
    "teacher_logits": "other teacher logits",
}


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON, where a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def load_run(folder: str | Path) -> DistillResult:
    """A run that `distill` saved, its student on the CPU.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: one of its files was changed or is missing; it is named.
    """
    folder = Path(expanded(folder, "the folder"))
    if not (folder / artifacts.MANIFEST).exists():
        raise FileNotFoundError(f"{folder} holds no finished run; give the folder of one.")
    if wrong := artifacts.damaged(folder):
        raise ValueError(f"the run in {folder} is damaged ({', '.join(wrong)}); delete it and run again.")
    config, history, metrics = (
        artifacts.load_json(folder / name) for name in ("config.json", "history.json", "metrics.json")
    )
    return DistillResult(
        config=DistillConfig(**config),
        student=load_saved(folder / "student"),
        tokenizer=load_tokenizer(str(folder / "student")),
        history=history,
        metrics=metrics,
        predictions=Predictions(**safetensors.torch.load((folder / "predictions.safetensors").read_bytes())),
        folder=folder,
    )


def model_card(result: DistillResult) -> str:
    """The student's README in the hub's format: how it was made and what it scores."""
    config, test = result.config, result.metrics["test"]
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in test.items())
    names = ", ".join(result.student.config.id2label.values())
    signal = "on labels alone"
    if config.alpha > 0:
        signal = (
            f"with knowledge distillation at temperature {config.temperature:g} and alpha {config.alpha:g} "
            "(the weight of the teacher's soft targets)"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [knowledge-distillation]
---
# A small classifier: {names}

Trained {signal}, on {result.metrics["labelled"]:,} labelled and {result.metrics["unlabelled"]:,} unlabelled texts of
{Path(config.data).name or PRESETS[config.preset].data} for {result.metrics["steps"]:,} steps, seed {config.seed}.
Preset {config.preset}, teacher {Path(config.teacher_checkpoint).name or config.teacher_source}.

| test split | |
|---|---|
{measured}

```python
from transformers import pipeline

pipeline("text-classification", "path/to/this/folder")("a text to classify")
```
"""
