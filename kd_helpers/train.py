"""Chapter 16: distil with the Trainer, in one process or in many.

    python -m kd_helpers.train --alpha 0.9
    accelerate launch --config_file kd_helpers/launch/two_cpu_processes.yaml -m kd_helpers.train --alpha 0.9
    torchrun --nproc_per_node 8 -m kd_helpers.train --alpha 0.9 --bf16

The arguments are those of `DistillConfig` and, for everything that the Trainer knows itself (steps, batches, learning
rate, precision, seed, checkpoints), those of `transformers.TrainingArguments`. The same command after a crash goes on
from the last checkpoint in `--output_dir`.

Texts need no labels with `--alpha 1 --teacher_epochs 0` and a teacher that is fine-tuned already: the classes are the
teacher's then, and the student is measured by its soft loss and its fidelity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
import sys
import typing
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import safetensors
import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import PAD_TO_MULTIPLE_OF, dataset_digest, load_splits, tokenize
from kd_helpers.loop import DivergedError
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import checkpoint_version, load_student, warn_if_swapped
from kd_helpers.pretrained import warn_of_unknown_tokens
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup, resolve
from kd_helpers.teacher import attach, fine_tuned_teacher, load_teacher_logits, warn_if_teacher_at_chance
from kd_helpers.trainer import DistillationTrainer, TeacherStudentCollator, course_metrics, with_teacher_tokens
from kd_helpers.trainer_arguments import require_json_object

DESCRIPTION = (
    "Distil a student with the Hugging Face Trainer, in one process or, started by accelerate or torchrun, in many. "
    "The first arguments below are the course's own, the rest are those of transformers.TrainingArguments. The same "
    "command after a crash continues from the last checkpoint in --output_dir. Texts need no labels with --alpha 1 "
    "--teacher_epochs 0 and a --teacher_checkpoint that is fine-tuned already."
)

# What the Trainer has arguments of its own for, and their names; every other choice of `DistillConfig` is one here.
OF_THE_TRAINER = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "lean": "",
    "precision": "bf16",
    "device": "use_cpu",
    "seed": "seed",
}

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

# What the Trainer's numbers may be, in words and as a test, where `DistillConfig` has no word in it: the Trainer takes
# any, and fails in the middle or trains nothing.
AT_LEAST_1 = ("a whole number of at least 1", lambda number: number >= 1)
POSITIVE = ("a number greater than 0", lambda number: number > 0)
NOT_NEGATIVE = ("a number of at least 0", lambda number: number >= 0)
BELOW_1 = ("a number of at least 0 and below 1", lambda number: 0 <= number < 1)
SEED = (f"a whole number from 0 to {2**32 - 1}", lambda number: 0 <= number < 2**32)
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), AT_LEAST_1),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"), AT_LEAST_1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(("warmup_steps", "eval_delay", "dataloader_num_workers", "neftune_noise_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), BELOW_1),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "max_steps": ("-1 (as many as the epochs have) or a whole number of at least 0", lambda number: number >= -1),
    "label_smoothing_factor": ("0: the soft targets take its place", lambda number: number == 0),
}
# Arguments that are JSON; where others are, a name of a file is meant if there is no brace.
JSON_OBJECTS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# What a model that is kept may be the best of, beside the measures of the course.
LOSSES = ("loss", "soft_loss", "hard_loss", "fidelity")


@dataclasses.dataclass
class CourseArguments(TrainingArguments):
    """`TrainingArguments` with the course's defaults. Values that make no sense are refused.

    Raises:
        ValueError: a number outside its range, or two arguments that clash; one sentence says which.
    """

    output_dir: str = dataclasses.field(
        default="", metadata={"help": "checkpoints, the student and its metrics; empty: trainer/ in artifacts/"}
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

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or str(artifacts.artifacts_dir() / "trainer")
        for name, (allowed, holds) in NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} is {value}; give {allowed}.")
        for name in JSON_OBJECTS:
            require_json_object(name, getattr(self, name, None))
        for part in self.optim_args.split(",") if self.optim_args else ():
            if part.count("=") != 1:
                raise ValueError(f"optim_args is {self.optim_args!r}; give name=value, with commas between several.")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both on; choose one of them.")
        if self.resume_from_checkpoint:
            raise ValueError(
                f"resume_from_checkpoint is {self.resume_from_checkpoint!r}; leave it out: the same command continues "
                "from the last checkpoint in output_dir by itself."
            )
        if self.label_names:
            raise ValueError("label_names is set; leave it out: the column of the labels is named by label_column.")
        if self.load_best_model_at_end and "no" in (self.save_strategy, self.eval_strategy):
            raise ValueError(
                f"load_best_model_at_end is on, save_strategy is {self.save_strategy!r} and eval_strategy "
                f"{self.eval_strategy!r}; set both to 'epoch' or 'steps', or nothing is kept to load."
            )
        measured = [*LOSSES, *classification_metrics(torch.eye(2), torch.arange(2))]
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in measured:
            raise ValueError(f"metric_for_best_model is {best!r}; choose one of {', '.join(measured)}.")
        super().__post_init__()


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
    config = config_from_arguments(choices, args)
    if choices.online and config.alpha == 0:
        raise ValueError("online is on and alpha is 0, which uses no teacher; leave online out, or raise alpha.")
    setup = resolve(config, load_splits(config))  # held-out texts may be without labels here
    data, tokenizer = setup.data, setup.tokenizers.student
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
        if args.process_index == 0:
            _require_room(out)
        if args.process_index == 0 and not any((*out.glob("checkpoint-*"), *out.glob("student"))):
            (out / artifacts.PROVENANCE).unlink(missing_ok=True)  # of an attempt that came to nothing
        artifacts.require_same(out, provenance)
    texts = _tokenized(setup, tokenizer)
    warn_of_unknown_tokens(texts["student_train"], tokenizer, config.student_source or config.teacher_source)
    teacher, collator = None, DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
    if config.alpha > 0:
        warn_if_swapped(config)
        labelled = data.validation if choices.online else data.train
        # Where held-out texts have no labels, the teacher is all that a student can be measured by.
        bare = [split for split in ("validation", "test") if not _has_labels(getattr(data, split))]
        wanted = [] if choices.online else ["student_train", *bare]
        if choices.online and _has_labels(labelled):
            wanted = ["validation"]
        with args.main_process_first(local=False, desc="the teacher and its logits"):  # the others find them
            teacher_logits = {split: load_teacher_logits(setup, split) for split in wanted}
        if _has_labels(labelled):
            warn_if_teacher_at_chance(teacher_logits[wanted[0]], labelled)
        if choices.online:
            teacher = fine_tuned_teacher(setup)
            if setup.tokenizers.teacher is not tokenizer:
                own = _tokenized(setup, setup.tokenizers.teacher)
                texts = {split: with_teacher_tokens(texts[split], own[split]) for split in texts}
                collator = TeacherStudentCollator(
                    tokenizer, setup.tokenizers.teacher, pad_to_multiple_of=PAD_TO_MULTIPLE_OF
                )
        else:
            texts |= {split: attach(texts[split], logits) for split, logits in teacher_logits.items()}
    trainer = DistillationTrainer(
        load_student(config, data.label_names, tokenizer),
        args,
        teacher_model=teacher,
        temperature=config.temperature,
        alpha=config.alpha,
        train_dataset=texts["student_train"],
        eval_dataset=texts["validation"],
        processing_class=tokenizer,
        data_collator=collator,
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


def _require_room(out: Path) -> None:
    """Refuse a folder whose student this command did not write."""
    if (out / "student").exists() and not (out / artifacts.PROVENANCE).exists():
        raise ValueError(
            f"{out / 'student'} is there already, was not written by this command, and would be lost; choose another "
            "output_dir."
        )


def _tokenized(setup: Setup, tokenizer: PreTrainedTokenizerBase) -> dict[str, datasets.Dataset]:
    """The splits that a student is trained and measured on, encoded by one of the tokenizers."""
    splits = ("student_train", "validation", "test")
    return {split: tokenize(getattr(setup.data, split), tokenizer, setup.config.max_length) for split in splits}


def _has_labels(texts: datasets.Dataset) -> bool:
    return any(label != IGNORE_INDEX for label in texts["label"][:])


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


class Parser(HfArgumentParser):
    """Refuses in one sentence; the hundreds of lines of usage before it are what --help is for."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parsed(parser: Parser, arguments: Sequence[str] | None) -> tuple[Any, CourseArguments]:
    """The two kinds of arguments.

    Raises:
        Exception: transformers, accelerate or torch refuses some of them, whatever they raise then.
    """
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [action.dest for action in parser._actions]
        given = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        close = OF_THE_TRAINER.get(given) or next(iter(difflib.get_close_matches(given, known, n=1)), None)
        hint = f"do you mean --{close}? " if close else ""
        parser.error(f"there is no option {unknown[0]!r}; {hint}--help lists all of them.")
    choices, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    with torch.random.fork_rng(devices=[]):
        # What the Trainer refuses it shall refuse now, not when a teacher has been tuned.
        rehearsal = Trainer(torch.nn.Linear(1, 1), args, eval_dataset=[{}], compute_metrics=course_metrics)
        rehearsal.create_optimizer_and_scheduler(num_training_steps=1)
    return choices, args


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m kd_helpers.train") -> int:
    """Read the command line and distil.

    Returns:
        Exit status: 0, 1 if training diverged, or 2 for a request that can't be met.
    """
    parser = Parser((Choices, CourseArguments), prog=prog, description=DESCRIPTION, allow_abbrev=False)
    try:
        choices, args = _parsed(parser, arguments)
    except Exception as error:  # of half a dozen kinds, all of them about what was asked for
        unset_hf_deepspeed_config()  # a configuration that is not valid would stay in use for every later model
        is_sentence = isinstance(error, (ImportError, OSError, ValueError))
        clash = f"these options do not fit together ({type(error).__name__}: {error}); --help explains them."
        parser.error(str(error) if is_sentence else clash)
    try:
        metrics = distil(choices, args)
    except (ImportError, OSError, TypeError, ValueError) as error:
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
