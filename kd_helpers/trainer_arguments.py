"""Chapter 16: what there is to choose when a Trainer distils, checked when it is chosen.

`DistillationArguments` are `transformers.TrainingArguments` with these choices beside the Trainer's own: they are read
from a command line by `HfArgumentParser`, logged, and saved with the checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import Any

import torch
from transformers import TrainingArguments

from kd_helpers.config import require_alpha, require_temperature, require_whole
from kd_helpers.losses import require_beta

# How a checkpoint is read that nobody has looked at yet is not for a command line to decide.
NOT_TO_CHOOSE = ("trust_remote_code", "use_safetensors", "ignore_mismatched_sizes", "output_loading_info")


def _choice(default: Any, explanation: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": explanation})


@dataclasses.dataclass
class DistillationChoices:
    """What a distilling Trainer must know beside the Trainer's arguments. Values that make no sense are refused.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value lies outside its range, or two clash; one sentence says which, and what is allowed.
    """

    temperature: float = _choice(2.0, "T > 0, divides the logits of both models in the soft loss")
    alpha: float = _choice(0.9, "weight of the soft loss in [0, 1]; 0 is plain training, 1 is pure distillation")
    beta: float = _choice(
        0.0, "divergence of the soft loss of tokens: 0 is forward KL, 1 reverse KL, between them Jensen-Shannon"
    )
    share: float = _choice(
        0.0, "share of the batches that the student writes, λ of GKD (arXiv 2306.13649), in [0, 1]; causal models only"
    )
    prompt_tokens: int = _choice(8, "tokens of each text from which the student goes on, in a batch that it writes")
    new_tokens: int = _choice(128, "tokens that it writes after them, at most")
    sampling_temperature: float = _choice(1.0, "divides the logits when it writes; 0 takes the likeliest token")
    end_id: int | None = _choice(
        None, "the token that ends a text which it writes; when left out, that of the tokenizer, or of the model"
    )
    teacher_init_kwargs: dict | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "a JSON object of arguments for from_pretrained, for a teacher that is given by name or folder: "
            "dtype, quantization_config, revision and so on; without dtype it has that of its checkpoint"
        },
    )

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        require_alpha(self.alpha)
        require_beta(self.beta)
        if not _is_finite(self.share) or not 0 <= self.share <= 1:
            raise ValueError(
                f"share is {self.share!r}; give the share of batches that the student writes, between 0 and 1."
            )
        if self.share > 0 and self.alpha == 0:
            raise ValueError(
                f"share is {self.share} and alpha 0, but from what it writes itself a student learns by the teacher "
                "alone; raise alpha, or set share to 0."
            )
        require_whole("prompt_tokens", self.prompt_tokens, minimum=1)
        require_whole("new_tokens", self.new_tokens, minimum=1)
        if not _is_finite(self.sampling_temperature) or self.sampling_temperature < 0:
            raise ValueError(
                f"sampling_temperature is {self.sampling_temperature!r}; give a finite number of at least 0 (at 0 the "
                "likeliest token is written)."
            )
        if self.end_id is not None:
            require_whole("end_id", self.end_id, minimum=0)
        self.teacher_init_kwargs = _init_kwargs(self.teacher_init_kwargs)


@dataclasses.dataclass
class DistillationArguments(DistillationChoices, TrainingArguments):
    """`transformers.TrainingArguments` with temperature, alpha and the other choices of a distillation.

    For `DistillationTrainer` and `methods.causal_trainer.CausalDistillationTrainer`.

    Raises:
        TypeError, ValueError: see `DistillationChoices` and `TrainingArguments`.
    """

    def __post_init__(self) -> None:
        DistillationChoices.__post_init__(self)
        TrainingArguments.__post_init__(self)


def choices_of(
    args: TrainingArguments, *, temperature: float | None = None, alpha: float | None = None
) -> DistillationChoices:
    """The choices that a Trainer was given: in its arguments, or as keywords beside plain `TrainingArguments`.

    Args:
        args: its arguments.
        temperature: T; None takes that of `args`, or the default.
        alpha: the same.

    Raises:
        TypeError, ValueError: a value makes no sense, or was given twice and is not the same.
    """
    given = {name: value for name, value in (("temperature", temperature), ("alpha", alpha)) if value is not None}
    if not isinstance(args, DistillationChoices):
        return DistillationChoices(**given)
    for name, value in given.items():
        if value != getattr(args, name):
            raise ValueError(f"{name} is {value}, but {getattr(args, name)} in args; give it there alone.")
    return args


def require_json_object(name: str, value: Any) -> None:
    """Refuse text that is no JSON object."""
    with contextlib.suppress(json.JSONDecodeError):
        if not isinstance(value, str) or isinstance(json.loads(value), dict):
            return
    raise ValueError(f"{name} is {value!r}; give a JSON object, as in '{{\"name\": 1}}'.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _init_kwargs(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Arguments for from_pretrained in a form that JSON can hold.

    Raises:
        ValueError: they are no JSON object, name no dtype, or name something that is not to be chosen.
    """
    name = "teacher_init_kwargs"
    require_json_object(name, given)
    # Parsed here, or the Trainer's arguments would make a number of a revision such as "1.0".
    given = json.loads(given) if isinstance(given, str) else given
    if given is None:
        return None
    if not isinstance(given, dict):
        raise TypeError(f"{name} is {type(given).__name__}; give a dictionary, or a JSON object.")
    for key in NOT_TO_CHOOSE:
        if key in given:
            raise ValueError(
                f"{name} has {key!r}; leave it out: only weights in safetensors are read, and whole, and no code of a "
                "checkpoint is run."
            )
    if "token" in given:
        raise ValueError(f"{name} has a token, which would be logged and saved; run `hf auth login` in its place.")
    kept = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in given.items()}
    if (dtype := kept.pop("torch_dtype", kept.get("dtype"))) is not None:  # as older versions of transformers call it
        kept["dtype"] = _dtype_name(dtype)
    return kept


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if name == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return name
    raise ValueError(
        f'dtype in teacher_init_kwargs is {str(dtype)!r}; give "auto" (that of the checkpoint), or a dtype of torch '
        'for real numbers, such as "bfloat16".'
    )
