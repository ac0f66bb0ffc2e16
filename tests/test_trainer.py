"""The Trainer's loss is the loop's: in one process and in two, online and cached, in one batch and in several."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.architectures import tiny
from support.models import tiny_bert, tiny_distilbert
from support.processes import TWO, free_port, path_with_tests
from support.trainer import SOFTENING, arguments, collator
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from kd_helpers import DistillationTrainer
from kd_helpers.loop import DivergedError, distill_epoch
from kd_helpers.losses import distillation_loss
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import freeze, save_model
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.teacher import attach, cached_logits
from kd_helpers.train import last_whole_checkpoint, main
from kd_helpers.trainer import course_metrics


@pytest.fixture
def teacher():
    """One whose predictions differ clearly from one text to another."""
    model = tiny_bert(seed=1)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return freeze(model)


@pytest.fixture
def texts_with_logits(own_artifacts, teacher, tokenized, tokenizer) -> datasets.Dataset:
    """The training texts, 32 of 128 without a label, in an order that mixes them, with the teacher's logits."""
    teacher_logits = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    return attach(tokenized, teacher_logits).shuffle(seed=0)


def student():
    return tiny_bert(dropout=0.0)


def trained(folder: Path, texts: datasets.Dataset, tokenizer, *, model=None, teacher_model=None, **changes):
    """A trainer that has trained."""
    trainer = DistillationTrainer(
        student() if model is None else model,
        arguments(folder, **changes),
        teacher_model=teacher_model,
        train_dataset=texts,
        data_collator=collator(tokenizer),
        **SOFTENING,
    )
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_weights(one, other, atol: float = 1e-5) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert_close(value, expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_the_loop(tmp_path, texts_with_logits, tokenizer):
    batches = DataLoader(texts_with_logits, batch_size=32, collate_fn=collator(tokenizer))
    by_loop = student()
    optimizer = make_optimizer(by_loop, learning_rate=1e-3, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=len(batches))
    losses = distill_epoch(by_loop, batches, optimizer, scheduler, **SOFTENING)
    trainer = trained(tmp_path, texts_with_logits, tokenizer)
    for name, expected in (
        ("loss", losses.total),
        ("soft_loss", losses.soft),
        ("hard_loss", losses.hard),
        ("grad_norm", losses.gradient_norm),
    ):
        assert_close(torch.tensor(logged(trainer, name)), expected, rtol=1e-5, atol=1e-5)
    same_weights(trainer.model, by_loop)


@pytest.mark.parametrize("batch_size", [8, 16, 24])
def test_accumulated_batches_are_one_batch(tmp_path, texts_with_logits, tokenizer, batch_size):
    """Also where they differ in how many labels they have, and where the last ones are fewer."""
    texts = texts_with_logits.select(range(90))
    whole = trained(tmp_path, texts, tokenizer, per_device_train_batch_size=48)
    split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 48 // batch_size}
    parts = trained(tmp_path, texts, tokenizer, **split)
    for name in ("loss", "soft_loss", "hard_loss", "fidelity"):
        assert_close(torch.tensor(logged(parts, name)), torch.tensor(logged(whole, name)), rtol=1e-5, atol=1e-5)
    same_weights(parts.model, whole.model)


def test_a_stream_leaves_out_what_does_not_fill_a_step(tmp_path, texts_with_logits, tokenizer):
    """Its gradient would else be added to that of the next epoch's first step."""
    texts = texts_with_logits.select(range(48)).to_iterable_dataset()
    split = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    stream = trained(tmp_path, texts, tokenizer, max_steps=3, learning_rate=1e-12, **split)
    whole = trained(tmp_path, texts_with_logits.select(range(32)), tokenizer, learning_rate=1e-12, **split)
    for name in ("loss", "grad_norm"):
        assert logged(stream, name) == pytest.approx(logged(whole, name) * 3, abs=1e-5), name


def test_online_and_cached_are_the_same(tmp_path, texts_with_logits, teacher, tokenizer):
    cached = trained(tmp_path, texts_with_logits, tokenizer)
    online = trained(tmp_path, texts_with_logits.remove_columns("teacher_logits"), tokenizer, teacher_model=teacher)
    assert_close(torch.tensor(logged(online, "loss")), torch.tensor(logged(cached, "loss")), rtol=1e-5, atol=1e-5)
    same_weights(online.model, cached.model)


def test_the_last_step_of_an_epoch_may_be_smaller(tmp_path, texts_with_logits, tokenizer):
    texts = texts_with_logits.select(range(40))
    trainer = trained(tmp_path, texts, tokenizer, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert trainer.state.global_step == 2
    assert len(logged(trainer, "loss")) == 2
    soft, hard = logged(trainer, "soft_loss"), logged(trainer, "hard_loss")
    expected = [0.7 * s + 0.3 * h for s, h in zip(soft, hard, strict=True)]
    assert logged(trainer, "loss") == pytest.approx(expected, abs=1e-5)


def test_the_teacher_is_frozen_kept_out_of_the_optimizer_and_never_saved(tmp_path, texts_with_logits, tokenizer):
    teacher = tiny_bert(seed=1).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    texts = texts_with_logits.remove_columns("teacher_logits")
    trainer = trained(tmp_path, texts, tokenizer, teacher_model=teacher, save_strategy="epoch")
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    weights = sum(value.numel() * 4 for value in trainer.model.state_dict().values())
    assert weights <= saved.stat().st_size < 1.01 * weights + 50_000


def test_a_student_that_reads_less_than_its_teacher(tmp_path, texts_with_logits, teacher, tokenizer):
    """DistilBERT has no token types; its teacher must get them all the same."""
    read = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: read.append(set(kwargs)), with_kwargs=True)
    texts = texts_with_logits.remove_columns("teacher_logits")
    trained(tmp_path, texts, tokenizer, model=tiny_distilbert(), teacher_model=teacher, max_steps=1)
    assert {"input_ids", "attention_mask", "token_type_ids"} in read


def test_evaluation_gives_the_measures_of_the_course(tmp_path, texts_with_logits, teacher, tokenizer):
    texts = texts_with_logits.filter(lambda row: row["label"] >= 0)
    trainer = DistillationTrainer(
        student(),
        arguments(tmp_path, per_device_eval_batch_size=40),
        train_dataset=texts,
        eval_dataset=texts,
        data_collator=collator(tokenizer),
        **SOFTENING,
    )
    metrics = trainer.evaluate()
    found = trainer.predict(texts)
    logits, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
    for name, value in classification_metrics(logits, labels).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6)
    teacher_logits = torch.tensor(texts["teacher_logits"][:])
    expected = distillation_loss(logits, teacher_logits, labels, **SOFTENING)
    assert metrics["eval_soft_loss"] == pytest.approx(expected.soft.item(), abs=1e-5)
    assert metrics["eval_hard_loss"] == pytest.approx(expected.hard.item(), abs=1e-5)
    assert metrics["eval_fidelity"] == pytest.approx(
        (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item(), abs=1e-6
    )
    assert trainer.evaluate()["eval_soft_loss"] == metrics["eval_soft_loss"], "each evaluation counts from zero"


def test_texts_to_evaluate_need_no_teacher_logits(tmp_path, texts_with_logits, tokenizer):
    texts = texts_with_logits.filter(lambda row: row["label"] >= 0).remove_columns("teacher_logits")
    trainer = DistillationTrainer(
        student(), arguments(tmp_path), train_dataset=texts_with_logits, data_collator=collator(tokenizer), **SOFTENING
    )
    metrics = trainer.evaluate(texts)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], abs=1e-4)
    assert metrics["eval_hard_loss"] == pytest.approx(metrics["eval_nll"], abs=1e-4)
    assert "eval_soft_loss" not in metrics


def test_unlabelled_texts_are_not_scored():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=np.float32)
    assert course_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, -100, 1])))["accuracy"] == 0.5


def test_the_best_model_is_loaded_and_training_goes_on(tmp_path, texts_with_logits, tokenizer):
    labelled = texts_with_logits.filter(lambda row: row["label"] >= 0)
    options = {
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "nll",
        "greater_is_better": False,
    }

    def make(folder):
        return DistillationTrainer(
            student(),
            arguments(folder, **options),
            train_dataset=texts_with_logits,
            eval_dataset=labelled,
            data_collator=collator(tokenizer),
            **SOFTENING,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    assert whole.evaluate()["eval_nll"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(again, "loss")[-8:] == logged(whole, "loss")[-8:]
    same_weights(again.model, whole.model, atol=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; set it to 0"),
        ({"temperature": 0.0}, "temperature is 0.0; give a finite number greater than 0"),
        ({"alpha": 1.5}, "alpha is 1.5; give a finite number between 0"),
        ({"cached": False}, "alpha is 0.7 but there is no teacher; give a teacher_model, a column 'teacher_logits'"),
        ({"teacher": True}, "there is a teacher_model, and train_dataset has a column 'teacher_logits'; drop one"),
        ({"same": True}, "teacher and student are the same model"),
        (
            {"labels": False},
            "train_dataset has the columns .*; add a column 'label', with -100 for texts that have none",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, texts_with_logits, teacher, tokenizer, options, sentence):
    model = student()
    texts = texts_with_logits if options.pop("cached", True) else texts_with_logits.remove_columns("teacher_logits")
    texts = texts if options.pop("labels", True) else texts.remove_columns("label")
    teacher_model = model if options.pop("same", False) else teacher if options.pop("teacher", False) else None
    softening = SOFTENING | {name: options.pop(name) for name in SOFTENING if name in options}
    with pytest.raises(ValueError, match=sentence):
        DistillationTrainer(
            model, arguments(tmp_path, **options), teacher_model=teacher_model, train_dataset=texts, **softening
        )


def test_divergence_stops_the_run(tmp_path, texts_with_logits, tokenizer):
    with pytest.raises(DivergedError, match=r"at step 2 \(total (nan|inf)"):
        trained(tmp_path, texts_with_logits, tokenizer, learning_rate=1e30)


def test_a_bad_gradient_leaves_the_weights_alone(tmp_path, texts_with_logits, tokenizer):
    model = student()
    model.classifier.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match=r"at step 1 \(gradient norm nan\)"):
        trained(tmp_path, texts_with_logits, tokenizer, model=model)
    same_weights(model, student(), atol=0)


def test_a_teacher_does_not_keep_the_student_from_being_prepared(tmp_path, texts_with_logits, teacher, tokenizer):
    """accelerate gives a model that it prepares for bfloat16 another `forward`."""
    labelled = texts_with_logits.filter(lambda row: row["label"] >= 0).remove_columns("teacher_logits")
    options = {"train_dataset": labelled, "eval_dataset": labelled, "data_collator": collator(tokenizer), **SOFTENING}
    trainer = DistillationTrainer(student(), arguments(tmp_path, bf16=True), teacher_model=teacher, **options)
    trainer.evaluate()
    assert hasattr(trainer.model_wrapped, "_original_forward")


def test_a_bad_loss_leaves_the_weights_alone(tmp_path, texts_with_logits, tokenizer):
    bad = texts_with_logits.map(lambda row: {"teacher_logits": [float("nan")] * 3})
    model = student()
    with pytest.raises(DivergedError, match=r"at step 1 \(total nan, soft nan, hard \d"):
        trained(tmp_path, bad, tokenizer, model=model, save_strategy="steps", save_steps=1)
    same_weights(model, student(), atol=0)
    assert not list(tmp_path.glob("checkpoint-*"))


# Two processes


def in_two(*command: str, folder: Path) -> subprocess.Popen:
    """Start a script or module in two processes that talk through gloo."""
    environment = {**os.environ, **path_with_tests(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *TWO, free_port(), *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_processes_are_one(tmp_path, texts_with_logits, teacher, tokenizer):
    """Two times 16 texts are 32, whether the teacher is online or cached; and no text is evaluated twice."""
    texts_with_logits.save_to_disk(tmp_path / "texts")
    save_model(tmp_path / "student", student(), tokenizer)
    save_model(tmp_path / "teacher", teacher, tokenizer)
    process = in_two("-m", "support.trainer_process", folder=tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-6000:]
    alone = trained(tmp_path / "alone", texts_with_logits, tokenizer)
    expected = alone.model.state_dict()
    measured = alone.evaluate(texts_with_logits.select(range(90)))
    measured |= alone.evaluate(texts_with_logits.select(range(84)), metric_key_prefix="few")
    for way in ("cached", "online", "stream"):
        history = json.loads((tmp_path / f"{way}.json").read_text())
        for name in ("loss", "soft_loss", "hard_loss", "fidelity"):
            found = [entry[name] for entry in history if name in entry]
            assert found == pytest.approx(logged(alone, name), abs=1e-5), (way, name)
        for prefix, name in itertools.product(("eval", "few"), ("loss", "soft_loss", "hard_loss", "fidelity", "nll")):
            (found,) = [entry[f"{prefix}_{name}"] for entry in history if f"{prefix}_{name}" in entry]
            assert found == pytest.approx(measured[f"{prefix}_{name}"], abs=1e-5), (way, prefix, name)
        weights = load_file(tmp_path / way / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_checkpoint_that_was_not_written_to_its_end_is_left_alone(tmp_path, texts_with_logits, tokenizer):
    trained(tmp_path, texts_with_logits, tokenizer, save_strategy="steps", save_steps=1)
    newest, one_before = (str(tmp_path / f"checkpoint-{step}") for step in (4, 3))
    assert last_whole_checkpoint(tmp_path, processes=1) == newest
    with pytest.warns(UserWarning, match="is not whole"):
        assert last_whole_checkpoint(tmp_path, processes=2) is None
    for name in ("trainer_state.json", "rng_state.pth", "optimizer.pt", "model.safetensors"):
        content = (Path(newest) / name).read_bytes()
        (Path(newest) / name).write_bytes(content[: len(content) // 2])
        with pytest.warns(UserWarning, match="checkpoint-4 is not whole; an earlier one is taken"):
            assert last_whole_checkpoint(tmp_path, processes=1) == one_before, name
        (Path(newest) / name).write_bytes(content)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path, processes=1) == newest, "what has no number is somebody's own"
    assert last_whole_checkpoint(tmp_path / "none", processes=1) is None


def wait_for(holds, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def of_the_script(tmp_path, own_artifacts, tokenizer, monkeypatch) -> tuple[str, ...]:
    """Arguments of a short run, in a folder that has its texts and its models."""
    monkeypatch.chdir(tmp_path)
    for name, layers in (("teacher", 2), ("student", 1)):
        model = tiny_bert(layers, classes=2)
        model.config.id2label = {0: "no", 1: "yes"}
        save_model(tmp_path / name, model, tokenizer)
    rows = [
        f"order {number} is {word},{label}" for number in range(60) for word, label in (("fine", "yes"), ("late", "no"))
    ]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]))
    return (
        *("--data", "own.csv", "--teacher_checkpoint", "teacher", "--student_checkpoint", "student"),
        *("--teacher_epochs", "1", "--max_length", "16", "--use_cpu", "--logging_steps", "1", "--disable_tqdm", "true"),
    )


def test_the_script_refuses_another_run_in_its_folder(of_the_script, capsys):
    short = (*of_the_script, "--output_dir", "out", "--max_steps", "2", "--save_strategy", "no")
    Path("out").mkdir()
    Path("out/provenance.json").write_text('{"alpha": 1}')  # of an attempt that saved nothing
    assert main([*short, "--alpha", "0.5"]) == 0
    assert not list(Path("out").rglob("training_args.bin")), "a pickle"
    with pytest.raises(SystemExit) as refused:
        main([*short, "--alpha", "0.9"])
    assert refused.value.code == 2
    assert "out was begun with alpha 0.5 (now 0.9); choose another folder, or delete it." in capsys.readouterr().err


def test_the_script_writes_over_no_student_of_others(of_the_script, capsys):
    Path("student").mkdir(exist_ok=True)
    Path("student/notes.md").write_text("mine")
    with pytest.raises(SystemExit) as refused:
        main([*of_the_script, "--output_dir", "."])
    assert refused.value.code == 2
    assert "student is there already, was not written by this command, and would be lost" in capsys.readouterr().err
    assert not Path("provenance.json").exists()


def test_the_script_says_that_it_diverged(of_the_script, capsys):
    assert main([*of_the_script, "--output_dir", "out", "--learning_rate", "1e30", "--save_strategy", "no"]) == 1
    assert "training diverged at step 2" in capsys.readouterr().err


@pytest.mark.longer
def test_the_script_goes_on_under_two_processes(tmp_path, of_the_script):
    command = (
        *("-m", "kd_helpers.train", *of_the_script, "--online"),
        *("--per_device_train_batch_size", "4", "--num_train_epochs", "4", "--save_strategy", "steps"),
        *("--save_steps", "2", "--output_dir"),
    )
    whole = in_two(*command, "whole", folder=tmp_path)
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output[-6000:]

    killed = in_two(*command, "killed", folder=tmp_path)
    wait_for(lambda: list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")), killed)
    for process in [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]:
        process.kill()  # the workers have a session of their own
    killed.communicate()
    assert not (tmp_path / "killed" / "student").exists()
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) <= 2
    last = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["global_step"]
    assert not (tmp_path / "killed" / f"checkpoint-{last}").exists(), "killed in the middle"
    again = in_two(*command, "killed", folder=tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output[-6000:]
    ways = [load_file(tmp_path / way / "student" / "model.safetensors") for way in ("whole", "killed")]
    assert all(torch.equal(value, ways[1][name]) for name, value in ways[0].items())
    tests = [json.loads((tmp_path / way / "test_results.json").read_text()) for way in ("whole", "killed")]
    assert tests[0]["test_nll"] == tests[1]["test_nll"]


def test_of_what_a_student_returns_its_logits_are_scored(tmp_path, texts_with_logits, tokenizer):
    verbose = student()
    verbose.config.output_hidden_states = True
    texts = texts_with_logits.select(range(32))
    given = {"data_collator": collator(tokenizer), "eval_dataset": texts, **SOFTENING}
    terse, chatty = (DistillationTrainer(model, arguments(tmp_path), **given) for model in (student(), verbose))
    expected, found = terse.evaluate(), chatty.evaluate()
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    assert chatty.predict(texts).predictions.shape == (32, 3)
    without = texts.remove_columns(["teacher_logits", "label"])
    assert chatty.predict(without).predictions.shape == (32, 3)


def test_a_student_with_a_decoder_is_scored(tmp_path):
    model, tokenizer = tiny("bart", ("calm", "loud"))
    texts = datasets.Dataset.from_dict({**tokenizer(["a good day", "bad"] * 4), "label": [0, 1] * 4})
    trainer = DistillationTrainer(
        model, arguments(tmp_path), alpha=0.0, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer
    )
    assert {"eval_accuracy", "eval_hard_loss"} <= trainer.evaluate().keys()


def test_a_teacher_that_looks_for_the_last_token_is_told_which_one_pads(tmp_path):
    model, tokenizer = tiny("gpt2", ("calm", "loud"))
    teacher, _ = tiny("gpt2", ("calm", "loud"), seed=1)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for one in (model, teacher):
        one.resize_token_embeddings(len(tokenizer))
    freeze(teacher)
    lines = ["good", "not good at all today"]
    alone = torch.cat([teacher(**tokenizer([line], return_tensors="pt")).logits for line in lines])
    for wrong in (model, teacher):
        wrong.config.pad_token_id = tokenizer("good")["input_ids"][0]
    texts = datasets.Dataset.from_dict({**tokenizer(lines), "label": [0, 1]})
    trainer = DistillationTrainer(
        model, arguments(tmp_path), teacher_model=teacher, train_dataset=texts, processing_class=tokenizer, **SOFTENING
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert_close(trainer._run_teacher(batch), alone)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_column_about_teachers_is_no_input_of_the_teacher(tmp_path, texts_with_logits, teacher, tokenizer):
    texts = texts_with_logits.remove_columns("teacher_logits").select(range(32))
    named = texts.add_column("teacher_name", ["Ms"] * len(texts))
    plain, schooled = (
        trained(tmp_path, part, tokenizer, teacher_model=teacher).evaluate(part) for part in (texts, named)
    )
    assert schooled["eval_soft_loss"] == plain["eval_soft_loss"]
    assert schooled["eval_loss"] == plain["eval_loss"]


def test_measures_of_the_users_own_are_kept(tmp_path, texts_with_logits, tokenizer):
    trainer = DistillationTrainer(
        student(),
        arguments(tmp_path),
        eval_dataset=texts_with_logits.select(range(32)),
        data_collator=collator(tokenizer),
        compute_metrics=lambda _: {"log_loss": 0.7},
        **SOFTENING,
    )
    assert trainer.evaluate()["eval_log_loss"] == 0.7
    trainer.log({"aux_loss": 0.5})
    assert trainer.state.log_history[-1]["aux_loss"] == 0.5


def test_a_loss_of_the_users_own_and_a_student_to_come_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is a compute_loss_func; give a student as model, whose loss is this"):
        DistillationTrainer(student(), arguments(tmp_path), compute_loss_func=print)
    with pytest.raises(ValueError, match="model is None; give a student as model"):
        DistillationTrainer(None, arguments(tmp_path), model_init=student)
