"""`python -m kd_helpers.train`: what it refuses at its entrance, two vocabularies, texts without labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hub_cache import word_tokenizer
from support.models import tiny_bert
from transformers import BertConfig, BertForSequenceClassification

from kd_helpers import train
from kd_helpers.config import DistillConfig
from kd_helpers.data import load_splits
from kd_helpers.losses import distillation_loss
from kd_helpers.models import load_saved, save_model

WORDS = ["order", "is", "fine", "late", *map(str, range(60))]


@pytest.fixture
def folder(tmp_path, own_artifacts, monkeypatch) -> Path:
    """Two models whose tokenizers give the same words other numbers, and texts with and without labels."""
    monkeypatch.chdir(tmp_path)
    for name, words, layers, size in (("teacher", WORDS, 2, 80), ("student", WORDS[::-1], 1, 72)):
        tokenizer = word_tokenizer(words)
        assert len(tokenizer) <= size
        torch.manual_seed(layers)
        shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        model = BertForSequenceClassification(
            BertConfig(vocab_size=size, num_hidden_layers=layers, id2label={0: "no", 1: "yes"}, **shape)
        )
        with torch.no_grad():
            model.classifier.weight.mul_(20)  # so that what it reads matters
        save_model(tmp_path / name, model, tokenizer)
    rows = [(f"order {number} is {word}", word == "fine") for number in range(60) for word in ("fine", "late")]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *(f"{text},{('no', 'yes')[y]}" for text, y in rows)]))
    (tmp_path / "bare.csv").write_text("\n".join(["number,text", *(f"{i},{text}" for i, (text, _) in enumerate(rows))]))
    return tmp_path


USUAL = (
    *("--teacher_checkpoint", "teacher", "--student_checkpoint", "student", "--teacher_epochs", "0", "--use_cpu"),
    *(
        "--max_length",
        "16",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
        "--output_dir",
        "out",
    ),
)


def refused(capsys, *arguments: str) -> str:
    """What the script says when it exits with status 2: one line, and nothing of Python's."""
    with pytest.raises(SystemExit) as done:
        train.main(arguments)
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("python -m kd_helpers.train: error: ")
    return line.removeprefix("python -m kd_helpers.train: error: ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--alhpa 0.5", "there is no option '--alhpa'; do you mean --alpha? --help lists all of them."),
        ("--alph=0.5", "there is no option '--alph=0.5'; do you mean --alpha?"),
        ("--epochs 3", "there is no option '--epochs'; do you mean --num_train_epochs?"),
        ("--batch-size 3", "there is no option '--batch-size'; do you mean --per_device_train_batch_size?"),
        ("--precision bfloat16", "there is no option '--precision'; do you mean --bf16?"),
        ("alpha 0.5", "there is no option 'alpha'; do you mean --alpha?"),
        ("--alpha high", "argument --alpha: invalid float value: 'high'"),
        ("--alpha", "argument --alpha: expected one argument"),
        ("--online maybe", "argument --online: "),
        ("--preset huge", "preset is 'huge'; choose one of"),
        ("--alpha nan", "alpha is nan; give a finite number between 0"),
        ("--temperature 0", "temperature is 0.0; give a finite number greater than 0"),
        ("--max_length 2", "max_length is 2; give a whole number from 3"),
        ("--online --alpha 0", "online is on and alpha is 0, which uses no teacher; leave online out"),
        ("--fp16 --bf16", "fp16 and bf16 are both on; choose one of them."),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; give a whole number of at least 1."),
        ("--per_device_train_batch_size -4", "per_device_train_batch_size is -4; give a whole number of at least 1."),
        ("--per_device_eval_batch_size 0", "per_device_eval_batch_size is 0; give a whole number of at least 1."),
        ("--num_train_epochs nan", "num_train_epochs is nan; give a number greater than 0."),
        ("--num_train_epochs 0", "num_train_epochs is 0.0; give a number greater than 0."),
        ("--max_steps -7", "max_steps is -7; give -1 (as many as the epochs have) or a whole number of at least 0."),
        ("--logging_steps inf", "logging_steps is inf; give a number greater than 0."),
        ("--save_steps 0", "save_steps is 0.0; give a number greater than 0."),
        ("--eval_steps -1", "eval_steps is -1.0; give a number greater than 0."),
        ("--save_total_limit 0", "save_total_limit is 0; give a whole number of at least 1."),
        ("--adam_beta2 1", "adam_beta2 is 1.0; give a number of at least 0 and below 1."),
        ("--seed -1", "seed is -1; give a whole number from 0 to 4294967295."),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor is 0.1; give 0: the soft targets take its place."),
        ("--warmup_steps -1", "warmup_steps is -1.0; give a number of at least 0."),
        ("--resume_from_checkpoint out", "resume_from_checkpoint is 'out'; leave it out"),
        ("--label_names stars", "label_names is set; leave it out"),
        ("--metric_for_best_model f1", "metric_for_best_model is 'f1'; choose one of loss, soft_loss, hard_loss"),
        ("--eval_strategy sometimes", "sometimes is not a valid IntervalStrategy"),
        ("--lr_scheduler_type flat", "argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'flat'"),
        ("--lr_scheduler_kwargs {", "lr_scheduler_kwargs is '{'; give a JSON object, as in "),
        ("--lr_scheduler_kwargs nonsense", "lr_scheduler_kwargs is 'nonsense'; give a JSON object"),
        ("--lr_scheduler_type warmup_stable_decay", "these options do not fit together (TypeError: get_wsd_schedule"),
        ("--lr_scheduler_type reduce_lr_on_plateau --eval_strategy no", "requires an eval strategy"),
        ("--load_best_model_at_end", "load_best_model_at_end is on, save_strategy is 'no' and eval_strategy 'epoch'"),
        ("--load_best_model_at_end --save_strategy steps", "requires the save and eval strategy to match"),
        ("--dataloader_prefetch_factor 2", "can only be set when data is loaded in a different process"),
        ("--optim adam", "argument --optim: invalid choice"),
        ("--optim_args nonsense", "optim_args is 'nonsense'; give name=value"),
        ("--optim galore_adamw", "install `galore_torch`"),
        ("--optim adamw_bnb_8bit", "install `bitsandbytes`"),
        ("--report_to somewhere", "somewhere"),
        ("--deepspeed none.json", "deepspeed"),
        ("--fsdp full_shard --fsdp_config none.json", "No such file or directory: 'none.json'"),
        ("--accelerator_config none.json", "No such file or directory: 'none.json'"),
        ("--accelerator_config {\"split\":true}", "these options do not fit together"),
        ("--output_dir own.csv", "own.csv"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_in_one_sentence(folder, capsys, given, sentence):
    usual = [option for option in USUAL if option not in ("--max_steps", "2")]
    line = refused(capsys, *usual, "--data", "own.csv", *given.split())
    assert sentence in line
    assert 10 < len(line) < 1000
    assert not (folder / "artifacts" / "teacher_logits").exists(), "refused before the teacher was run"
    assert tiny_bert().num_labels == 3, "what was refused is not in the way of other models"


def test_where_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "elsewhere"))
    assert train.CourseArguments(use_cpu=True).output_dir == str(tmp_path / "elsewhere" / "trainer")
    assert train.CourseArguments(output_dir="out", use_cpu=True).output_dir == "out"


def test_an_argument_file_beside_the_script_is_not_read(folder, monkeypatch, capsys):
    """`HfArgumentParser` would take the options in a file that happens to stand there."""
    (folder / "train.args").write_text("--alpha 7")
    monkeypatch.setattr("sys.argv", [str(folder / "train.py")])
    assert "there is no option '--oops'" in refused(capsys, *USUAL, "--data", "own.csv", "--oops")
    assert train.main([*USUAL, "--data", "own.csv", "--alpha", "0"]) == 0


def test_each_model_reads_its_own_tokens(folder):
    """Online is what the cache gives, whose teacher always had its own tokens: a mean over all texts of each split."""
    for way in ("cached", "online"):
        more = ["--online"] if way == "online" else []
        options = [*USUAL[:-1], way, "--data", "own.csv", "--alpha", "1", "--logging_steps", "1", *more]
        assert train.main(options) == 0
    logged = []
    for way in ("cached", "online"):
        history = json.loads(Path(way, "trainer_state.json").read_text())["log_history"]
        logged.append([entry["soft_loss"] for entry in history if "soft_loss" in entry])
    assert len(logged[0]) == 2
    assert logged[1] == pytest.approx(logged[0], abs=1e-5)
    weights = [load_file(Path(way, "student", "model.safetensors")) for way in ("cached", "online")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [(), ("--online",), ("--label_column", "")])
def test_texts_without_labels_are_distilled_and_measured_by_their_teacher(folder, more):
    options = [*USUAL, "--data", "bare.csv", "--alpha", "1", *more]
    assert train.main(options) == 0
    measured = json.loads((folder / "out" / "test_results.json").read_text())
    assert {"test_loss", "test_soft_loss", "test_fidelity"} <= measured.keys()
    assert not {"test_hard_loss", "test_accuracy", "test_nll"} & measured.keys()
    config = DistillConfig(
        data="bare.csv", alpha=1.0, teacher_epochs=0, teacher_checkpoint="teacher", label_column="", max_length=16
    )
    splits = load_splits(config)
    teacher, student = (load_saved(Path(name)).eval() for name in ("teacher", "out/student"))
    logits = [
        model(**tokenizer(splits.test["text"][:], return_tensors="pt", padding=True)).logits
        for model, tokenizer in ((student, word_tokenizer(WORDS[::-1])), (teacher, word_tokenizer(WORDS)))
    ]
    expected = distillation_loss(*logits, torch.full((len(splits.test),), -100), temperature=2.0, alpha=1.0).soft.item()
    assert measured["test_soft_loss"] == pytest.approx(expected, abs=1e-5)
    assert measured["test_loss"] == pytest.approx(expected, abs=1e-5)
    fidelity = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    assert measured["test_fidelity"] == pytest.approx(fidelity, abs=1e-6)


def test_labels_are_missed_where_something_reads_them(folder, capsys):
    assert "bare.csv has no column 'label'" in refused(capsys, *USUAL, "--data", "bare.csv")
    assert "label_column is empty" in refused(capsys, *USUAL, "--data", "bare.csv", "--label_column", "")
    tuned = ("--data", "bare.csv", "--alpha", "1", "--teacher_epochs", "2")
    assert "bare.csv has no column 'label'" in refused(capsys, *USUAL, *tuned)
