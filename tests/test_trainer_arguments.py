"""What a Trainer that distils is told: by its arguments, and by the teacher and the adapters that it makes of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.causal_trainer import DATASET, collate, sharp
from support.causal_trainer import arguments as causal_arguments
from support.causal_trainer import tiny as tiny_causal
from support.models import tiny_bert
from support.trainer import usual
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, HfArgumentParser, T5Config, T5ForConditionalGeneration, TrainingArguments

import kd_helpers
from kd_helpers import DistillationArguments, DistillationTrainer
from kd_helpers.methods.causal_trainer import CausalDistillationTrainer
from kd_helpers.models import freeze, weights_digest
from kd_helpers.teacher_trainer import inference_config, load_named_teacher
from kd_helpers.trainer_arguments import choices_of

TEXTS = datasets.Dataset.from_dict(
    {
        "input_ids": [[2 + number, 3, 4 + number % 3] for number in range(16)],
        "attention_mask": [[1, 1, 1]] * 16,
        "labels": [number % 3 for number in range(16)],
    }
)


def arguments(folder: Path, **changes: Any) -> DistillationArguments:
    return DistillationArguments(**usual(folder) | {"per_device_train_batch_size": 8} | changes)


def student(**changes: Any):
    return tiny_bert(1, dropout=0.0, vocabulary=64, **changes)


def teacher():
    model = tiny_bert(1, dropout=0.0, vocabulary=64, seed=1)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return freeze(model)


def make(args: TrainingArguments, teacher_model: Any = None, **options: Any) -> DistillationTrainer:
    teacher_model = teacher() if teacher_model is None else teacher_model
    return DistillationTrainer(student(), args, teacher_model=teacher_model, train_dataset=TEXTS, **options)


def make_causal(args: TrainingArguments, teacher_model: Any, **options: Any) -> CausalDistillationTrainer:
    return CausalDistillationTrainer(
        tiny_causal(), args, teacher_model=teacher_model, train_dataset=DATASET, data_collator=collate(), **options
    )


# The arguments


def test_the_command_line_sets_them_and_they_are_saved(tmp_path):
    line = [
        *("--output_dir", str(tmp_path), "--temperature", "3", "--alpha", "0.5", "--beta", "0.25", "--share", "0.1"),
        *("--prompt_tokens", "4", "--new_tokens", "9", "--sampling_temperature", "0", "--end_id", "2", "--use_cpu"),
        *("--teacher_init_kwargs", '{"dtype": "bfloat16", "revision": "1.0", "attn_implementation": "eager"}'),
    ]
    (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(line)
    expected = {"temperature": 3.0, "alpha": 0.5, "beta": 0.25, "share": 0.1, "prompt_tokens": 4, "new_tokens": 9}
    expected |= {"sampling_temperature": 0.0, "end_id": 2}
    expected["teacher_init_kwargs"] = {"dtype": "bfloat16", "revision": "1.0", "attn_implementation": "eager"}
    stored = json.loads(args.to_json_string())
    assert {name: stored[name] for name in expected} == expected
    (again,) = HfArgumentParser(DistillationArguments).parse_dict(args.to_dict())
    assert again.to_dict() == args.to_dict()
    logged = args.to_sanitized_dict()
    assert (logged["temperature"], logged["beta"]) == (3.0, 0.25)


def test_each_is_explained_and_defaults_are_those_of_the_trainer():
    own = [f for f in dataclasses.fields(DistillationArguments) if f not in dataclasses.fields(TrainingArguments)]
    fields = {field.name: field for field in own if field.name not in TrainingArguments.__dataclass_fields__}
    assert len(fields) == 9
    assert all(len(field.metadata["help"]) > 20 for field in fields.values())
    defaults = (fields["temperature"].default, fields["alpha"].default, fields["beta"].default, fields["share"].default)
    assert defaults == (2.0, 0.9, 0.0, 0.0)
    assert kd_helpers.DistillationArguments is DistillationArguments


def test_they_lie_beside_the_checkpoints(tmp_path):
    trainer = make(arguments(tmp_path, temperature=3.0))
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert isinstance(saved, DistillationArguments)
    assert saved.temperature == 3.0


def test_what_json_can_not_hold_is_made_so_that_it_can(tmp_path):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    given = {"dtype": torch.float16, "quantization_config": quantised}
    args = arguments(tmp_path, teacher_init_kwargs=given)
    assert args.teacher_init_kwargs["dtype"] == "float16"
    stored = json.loads(args.to_json_string())["teacher_init_kwargs"]
    assert stored["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert given["dtype"] is torch.float16
    assert arguments(tmp_path, teacher_init_kwargs={"torch_dtype": "float16"}).teacher_init_kwargs == {
        "dtype": "float16"
    }


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; give a finite number greater than 0"),
        ({"temperature": "2"}, TypeError, "temperature is '2'; give a number greater than 0"),
        ({"alpha": 1.5}, ValueError, "alpha is 1.5; give a finite number between 0"),
        ({"beta": -0.1}, ValueError, r"beta is -0.1; give a number between 0 \(forward KL\) and 1 \(reverse KL\)"),
        (
            {"share": 1.1},
            ValueError,
            "share is 1.1; give the share of batches that the student writes, between 0 and 1",
        ),
        ({"share": None}, ValueError, "share is None; give the share"),
        ({"share": 0.5, "alpha": 0.0}, ValueError, "share is 0.5 and alpha 0, but from what it writes .*; raise alpha"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens is 0; give a whole number of at least 1"),
        ({"new_tokens": 2.5}, TypeError, "new_tokens is 2.5; give a whole number of at least 1"),
        (
            {"sampling_temperature": -1.0},
            ValueError,
            "sampling_temperature is -1.0; give a finite number of at least 0",
        ),
        ({"sampling_temperature": float("inf")}, ValueError, "sampling_temperature is inf"),
        ({"end_id": -1}, ValueError, "end_id is -1; give a whole number of at least 0"),
        ({"teacher_init_kwargs": "bfloat16"}, ValueError, "teacher_init_kwargs is 'bfloat16'; give a JSON object"),
        ({"teacher_init_kwargs": "[1]"}, ValueError, "teacher_init_kwargs is '.1.'; give a JSON object"),
        ({"teacher_init_kwargs": [1]}, TypeError, "teacher_init_kwargs is list; give a dictionary, or a JSON object"),
        (
            {"teacher_init_kwargs": {"dtype": "int8"}},
            ValueError,
            "dtype in teacher_init_kwargs is 'int8'; give \"auto\"",
        ),
        ({"teacher_init_kwargs": {"dtype": "half-size"}}, ValueError, "dtype in teacher_init_kwargs is 'half-size'"),
        (
            {"teacher_init_kwargs": '{"trust_remote_code": true}'},
            ValueError,
            "teacher_init_kwargs has 'trust_remote_code'; leave it out: .* no code of a checkpoint is run",
        ),
        ({"teacher_init_kwargs": {"token": "hf_x"}}, ValueError, "has a token, which would be logged .*; run `hf auth"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, given, error, sentence):
    with pytest.raises(error, match=sentence):
        arguments(tmp_path, **given)


def test_temperature_and_alpha_come_from_where_they_are_given(tmp_path):
    plain = TrainingArguments(**usual(tmp_path))
    assert (choices_of(plain).temperature, choices_of(plain).alpha) == (2.0, 0.9)
    trainer = make(plain, temperature=3.0, alpha=0.25)
    assert (trainer.temperature, trainer.alpha) == (3.0, 0.25)
    args = arguments(tmp_path, temperature=3.0, alpha=0.25)
    for given in ({}, {"temperature": 3.0}, {"alpha": 0.25, "temperature": 3}):
        assert (make(args, **given).temperature, make(args, **given).alpha) == (3.0, 0.25)
    for name, sentence in (
        ("temperature", "temperature is 1.0, but 3.0 in args"),
        ("alpha", "alpha is 1.0, but 0.25 in"),
    ):
        with pytest.raises(ValueError, match=f"{sentence}.*; give it there alone"):
            make(args, **{name: 1.0})


def test_they_train_as_the_keywords_do(tmp_path):
    by_keyword = make(TrainingArguments(**usual(tmp_path)), temperature=3.0, alpha=0.25)
    by_arguments = make(arguments(tmp_path, per_device_train_batch_size=32, temperature=3.0, alpha=0.25))
    for trainer in (by_keyword, by_arguments):
        trainer.train()
    assert weights_digest(by_keyword.model) == weights_digest(by_arguments.model)
    assert weights_digest(by_keyword.model) != weights_digest(student())


# A teacher by its name


@pytest.mark.parametrize("way", [str, Path])
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_a_teacher_in_a_folder_is_loaded_in_the_dtype_asked_for(tmp_path, way, kind):
    model = teacher() if kind == "classifier" else sharp(tiny_causal(seed=1))
    model.save_pretrained(tmp_path / "teacher")
    made, args = (make, arguments) if kind == "classifier" else (make_causal, causal_arguments)
    trainers = [
        made(args(tmp_path, teacher_init_kwargs=options), given)
        for given, options in (
            (way(tmp_path / "teacher"), None),
            (freeze(model), None),
            (way(tmp_path / "teacher"), '{"dtype": "bfloat16"}'),
        )
    ]
    for trainer in trainers:
        trainer.train()
    by_name, by_model, in_bfloat16 = (
        [entry["soft_loss"] for entry in trainer.state.log_history if "soft_loss" in entry] for trainer in trainers
    )
    assert by_name == pytest.approx(by_model, abs=1e-5)
    assert in_bfloat16 == pytest.approx(by_model, rel=0.1)
    assert in_bfloat16 != by_name
    assert {value.dtype for value in trainers[2].teacher.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in trainers[0].teacher.parameters()} == {torch.float32}
    assert {value.dtype for value in trainers[2].model.parameters()} == {torch.float32}
    assert not any(value.requires_grad for value in trainers[0].teacher.parameters())
    assert not trainers[0].teacher.training


def test_to_load_a_teacher_draws_no_random_numbers(tmp_path):
    teacher().save_pretrained(tmp_path / "teacher")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loaded = load_named_teacher(tmp_path / "teacher", DistillationTrainer.KIND, DistillationTrainer.KIND_IN_WORDS)
    assert torch.equal(torch.rand(2), expected)
    ids = torch.tensor(TEXTS["input_ids"][:])
    assert_close(loaded(input_ids=ids).logits, teacher()(input_ids=ids).logits)


def headless(folder: Path) -> None:
    tiny_bert(1, vocabulary=64).bert.save_pretrained(folder)


def an_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def of_another_kind(folder: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_layers=1)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "causal", "options", "error", "sentence"),
    [
        (
            None,
            False,
            {},
            (ConnectionError, FileNotFoundError),
            "teacher'.* (hub can't be reached; download|is not in)",
        ),
        (None, True, {}, (ConnectionError, FileNotFoundError), "teacher'.* (hub can't be reached; download|is not in)"),
        (Path.mkdir, True, {}, ValueError, "the folder .* has no config.json, so it holds no model"),
        (Path.touch, True, {}, ValueError, "teacher' is a file; give the folder of a model, or its name on the hub"),
        (
            headless,
            False,
            {},
            ValueError,
            "is no trained text classifier .classifier.bias, classifier.weight is not in",
        ),
        (of_another_kind, True, {}, ValueError, "is a t5, which is no causal language model; take a teacher that is"),
        (an_adapter, True, {}, ValueError, "is no model but an adapter; merge it into its base model"),
        (
            lambda folder: tiny_causal().save_pretrained(folder),
            True,
            {"colour": "red"},
            ValueError,
            "teacher_init_kwargs has something that .* does not take .*colour",
        ),
    ],
    ids=["missing", "missing-causal", "empty", "file", "headless", "t5", "adapter", "option"],
)
def test_a_teacher_that_can_not_be_loaded_is_explained(tmp_path, write, causal, options, error, sentence):
    folder = tmp_path / "teacher"
    if write is not None:
        write(folder)
    made, args = (make_causal, causal_arguments) if causal else (make, arguments)
    with pytest.raises(error, match=sentence):
        made(args(tmp_path, teacher_init_kwargs=options), folder)


def test_ways_to_load_need_something_to_load(tmp_path):
    args = arguments(tmp_path, teacher_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"teacher_init_kwargs has dtype, which say how .*, but teacher_model is no name"
    ):
        make(args)


# A classifier's Trainer


@pytest.mark.parametrize("given", [{"beta": 0.5}, {"share": 0.5}])
def test_a_classifier_learns_by_forward_kl_from_given_texts(tmp_path, given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, which is for causal language models .CausalDistillation"):
        make(arguments(tmp_path, **given))


def test_a_causal_model_is_sent_to_its_own_trainer(tmp_path):
    sentence = "is a causal language model .LlamaForCausalLM., .*; use CausalDistillationTrainer of kd_helpers.methods"
    with pytest.raises(ValueError, match=f"the student {sentence}"):
        DistillationTrainer(tiny_causal(), arguments(tmp_path), teacher_model=teacher(), train_dataset=TEXTS)
    with pytest.raises(ValueError, match=f"the teacher {sentence}"):
        make(arguments(tmp_path), tiny_causal())


# Adapters


def test_adapters_are_made_and_nothing_else_learns(tmp_path):
    import peft  # slow to load

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    trainer = make(arguments(tmp_path, learning_rate=1e-2), peft_config=config)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert value.requires_grad == ("lora_" in name or "modules_to_save" in name), name
        assert value.requires_grad or torch.equal(value, before[name]), name
    assert any(
        not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters() if "lora_B" in name
    )
    with pytest.raises(ValueError, match="the student has adapters already; leave peft_config out"):
        DistillationTrainer(
            trainer.model, arguments(tmp_path), teacher_model=teacher(), train_dataset=TEXTS, peft_config=config
        )


def test_peft_is_missed(tmp_path, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else original(name, *rest)
    )
    with pytest.raises(ValueError, match="peft_config is given, but peft is not installed; install it"):
        make(arguments(tmp_path), peft_config=object())


# DeepSpeed, by a stand-in that is given what the real one would be


CONFIG = {
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 4,
}


def test_under_deepspeed_a_teacher_has_an_engine_of_its_own(monkeypatch):
    engine = torch.nn.Linear(1, 1).train()
    given = {}

    def initialize(**options):
        given.update(options)
        return engine, None, None, None

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(initialize=initialize))
    plugin = types.SimpleNamespace(deepspeed_config=CONFIG)
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(deepspeed_plugin=plugin))
    trainer = types.SimpleNamespace(is_deepspeed_enabled=True, accelerator=accelerator)
    model = teacher()
    assert DistillationTrainer._place(trainer, model) is engine
    assert not engine.training
    assert given == {
        "model": model,
        "config": {
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": 4,
        },
    }
    assert CONFIG["zero_optimization"]["stage"] == 2, "the student's is as it was"


@pytest.mark.parametrize("model", [teacher, tiny_causal])
def test_with_zero_3_a_teacher_is_divided_as_the_student_is(model):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": 7}
    model = model()
    width = model.config.hidden_size
    config = inference_config(model, CONFIG | {"zero_optimization": zero})
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": width * width,
        "stage3_param_persistence_threshold": 7,
    }
    assert "optimizer" not in config
    assert zero["reduce_bucket_size"] == "auto"
