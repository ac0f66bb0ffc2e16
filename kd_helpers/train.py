"""Chapter 16: distil with the Trainer, in one process or in many.

    python -m kd_helpers.train --alpha 0.9
    accelerate launch --config_file kd_helpers/launch/two_cpu_processes.yaml -m kd_helpers.train --alpha 0.9
    torchrun --nproc_per_node 8 -m kd_helpers.train --alpha 0.9 --bf16

The arguments are those of `DistillConfig` and, for everything that the Trainer knows itself (steps, batches, learning
rate, precision, seed, checkpoints), those of `transformers.TrainingArguments`. The same command after a crash goes on
from the last checkpoint in `--output_dir`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import typing
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
from accelerate.utils import broadcast_object_list
from transformers import DataCollatorWithPadding, HfArgumentParser, TrainingArguments

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import PAD_TO_MULTIPLE_OF, dataset_digest, tokenize
from kd_helpers.loop import DivergedError
from kd_helpers.models import checkpoint_version, load_student, warn_if_swapped
from kd_helpers.provenance import made_by
from kd_helpers.resolve import resolve
from kd_helpers.teacher import attach, fine_tuned_teacher, load_teacher_logits, warn_if_teacher_at_chance
from kd_helpers.trainer import DistillationTrainer

DESCRIPTION = (
    "Distil a student with the Hugging Face Trainer, in one process or, started by accelerate or torchrun, in many. "
    "The first arguments below are the course's own, the rest are those of transformers.TrainingArguments. The same "
    "command after a crash continues from the last checkpoint in --output_dir."
)

# What the Trainer has arguments of its own for; every other choice of `DistillConfig` is an argument here.
OF_THE_TRAINER = (
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lean",
    "precision",
    "device",
    "seed",
)

# What of the Trainer's arguments changes the student, beside what stands in its configuration.
THAT_MATTER = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "data_seed",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "neftune_noise_alpha",
    "mixed_precision",
    "world_size",
)
# Texts and machine may move: what is in the files is noted, not where they are.
THAT_MOVE = ("data", "validation_data", "test_data", "device")


@dataclasses.dataclass
class CourseArguments(TrainingArguments):
    """`TrainingArguments` with the course's defaults."""

    output_dir: str = dataclasses.field(
        default="artifacts/trainer", metadata={"help": "checkpoints, the student and its metrics"}
    )
    learning_rate: float = dataclasses.field(default=1e-4, metadata={"help": "peak learning rate of the student"})
    weight_decay: float = dataclasses.field(default=0.01, metadata={"help": "AdamW's decoupled decay"})
    per_device_train_batch_size: int = dataclasses.field(default=32, metadata={"help": "texts a process and batch"})
    per_device_eval_batch_size: int = dataclasses.field(default=64, metadata={"help": "the same in evaluation"})
    eval_strategy: str = dataclasses.field(default="epoch", metadata={"help": "when to evaluate: no, steps, epoch"})
    save_strategy: str = dataclasses.field(default="epoch", metadata={"help": "when to save: no, steps, epoch"})
    save_total_limit: int | None = dataclasses.field(default=2, metadata={"help": "checkpoints to keep"})
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "steps between two lines of the log"})
    report_to: str | None = dataclasses.field(default="none", metadata={"help": "where else to log to"})
    ddp_timeout: int = dataclasses.field(
        default=4 * 3600, metadata={"help": "seconds that processes wait for the first, which tunes the teacher"}
    )


def _choices() -> type:
    """A dataclass of the fields of `DistillConfig` that the Trainer has no argument for, with their help."""
    types = typing.get_type_hints(DistillConfig)
    own = [
        (field.name, types[field.name], dataclasses.field(default=field.default, metadata=field.metadata))
        for field in dataclasses.fields(DistillConfig)
        if field.name not in OF_THE_TRAINER
    ]
    online = dataclasses.field(
        default=False, metadata={"help": "run the teacher on every batch instead of caching its logits"}
    )
    return dataclasses.make_dataclass("Choices", [*own, ("online", bool, online)])


Choices = _choices()


def config_from_arguments(choices: Any, args: TrainingArguments) -> DistillConfig:
    """The `DistillConfig` that both kinds of arguments amount to; it refuses values outside their range."""
    own = {name: value for name, value in dataclasses.asdict(choices).items() if name != "online"}
    return DistillConfig(
        **own,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        batch_size=args.train_batch_size,
        precision="bfloat16" if args.mixed_precision == "bf16" else "float32",  # accelerate's launcher may ask for it
        device=args.device.type,
        seed=args.seed,
    )


def distil(choices: Any, args: TrainingArguments) -> dict[str, float]:
    """Train, evaluate on validation, measure on test once, and save the student in `args.output_dir`.

    Returns:
        What the Trainer measured on test, with the prefix `test_`.

    Raises:
        ValueError: the arguments make no sense, or `args.output_dir` was begun with others.
        DivergedError: a loss is not finite.
    """
    setup = resolve(config_from_arguments(choices, args))
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.student
    out = Path(args.output_dir)
    provenance = {
        **made_by("kd_helpers.train"),
        **{name: value for name, value in config.to_dict().items() if name not in THAT_MOVE},
        **{name: str(getattr(args, name)) for name in THAT_MATTER},
        "online": choices.online,
        "checkpoints": [checkpoint_version(name) for name in (config.teacher_source, config.student_source) if name],
        "texts": [dataset_digest(part) for part in (data.student_train, data.validation, data.test)],
    }
    with args.main_process_first(local=False, desc="the folder"):
        if args.process_index == 0 and not any((*out.glob("checkpoint-*"), *out.glob("student"))):
            (out / artifacts.PROVENANCE).unlink(missing_ok=True)  # of an attempt that came to nothing
        artifacts.require_same(out, provenance)
    texts = {
        split: tokenize(getattr(data, split), tokenizer, config.max_length)
        for split in ("student_train", "validation", "test")
    }
    teacher = None
    if config.alpha > 0:
        warn_if_swapped(config)
        split, labelled = ("validation", data.validation) if choices.online else ("student_train", data.train)
        with args.main_process_first(local=False, desc="the teacher and its logits"):  # the others find them
            teacher_logits = load_teacher_logits(setup, split)
        warn_if_teacher_at_chance(teacher_logits, labelled)
        if choices.online:
            teacher = fine_tuned_teacher(setup)
        else:
            texts["student_train"] = attach(texts["student_train"], teacher_logits)
    trainer = DistillationTrainer(
        load_student(config, data.label_names),
        args,
        teacher_model=teacher,
        temperature=config.temperature,
        alpha=config.alpha,
        train_dataset=texts["student_train"],
        eval_dataset=texts["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF),
    )
    # One process looks: on a shared disk they could see different ones.
    found = last_whole_checkpoint(out, processes=args.world_size) if args.process_index == 0 else None
    (checkpoint,) = broadcast_object_list([found])
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out / "student"))
    (out / "student" / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody who uses the student needs
    trainer.save_state()
    metrics = trainer.evaluate(texts["test"], metric_key_prefix="test")
    trainer.save_metrics("test", metrics)
    return metrics


def last_whole_checkpoint(folder: Path, *, processes: int) -> str | None:
    """The Trainer's newest checkpoint that was written to its end; the Trainer itself would take one that was not.

    Its state comes last from the first process, the state of the random generators last from the others. One that is
    passed over is reported.
    """
    named = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    numbered = {int(match[1]): path for path, match in named.items() if match}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        random_states = list(checkpoint.glob("rng_state*.pth"))
        archives = [*random_states, *checkpoint.glob("*.pt")]
        with contextlib.suppress(OSError, ValueError):
            json.loads((checkpoint / "trainer_state.json").read_bytes())
            # A file that torch saves is a zip archive, whose table of contents comes last.
            if len(random_states) == processes and all(map(zipfile.is_zipfile, archives)) and _have_weights(checkpoint):
                return str(checkpoint)
        warnings.warn(f"the checkpoint {checkpoint} is not whole; an earlier one is taken.", stacklevel=2)
    return None


def _have_weights(checkpoint: Path) -> bool:
    """Whether the files of its weights are as long as they say."""
    try:
        for path in checkpoint.glob("*.safetensors"):
            with safetensors.safe_open(path, "pt"):
                pass
    except safetensors.SafetensorError:
        return False
    return True


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m kd_helpers.train") -> int:
    """Read the command line and distil.

    Returns:
        Exit status: 0, 1 if training diverged, or 2 for a request that can't be met.
    """
    parser = HfArgumentParser((Choices, CourseArguments), prog=prog, description=DESCRIPTION)
    choices, args = parser.parse_args_into_dataclasses(arguments)
    try:
        metrics = distil(choices, args)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    except DivergedError as error:
        print(error, file=sys.stderr)
        return 1
    args.distributed_state.destroy_process_group()  # processes take leave of each other before one of them exits
    if args.process_index == 0:
        print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
