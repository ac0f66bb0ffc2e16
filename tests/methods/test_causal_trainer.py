"""The Trainer for causal models: its loss however a step is spread, padding on either side, a student that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.causal_trainer import DATASET, PAD, TEXTS, V, arguments, collate, make, sharp, teacher_of, tiny, trained
from support.models import tiny_bert
from support.processes import TWO, free_port, path_with_tests
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kd_helpers.methods import causal_trainer
from kd_helpers.methods.causal_trainer import CausalDistillationTrainer
from kd_helpers.methods.language_models import write_texts
from kd_helpers.models import freeze, weights_digest

MEASURES = ("loss", "soft_loss", "hard_loss", "fidelity")
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


def logged(trainer: CausalDistillationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_weights(one: PreTrainedModel, other: PreTrainedModel, atol: float = 1e-5) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert_close(value, expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """By its definition, for each row."""

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def naive_losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: list[list[int]],
    first: int,
    *,
    temperature: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Soft and hard loss and fidelity of texts of which the tokens from `first` on count, one text after the other."""
    soft, hard, agreed = [], [], []
    for text in texts:
        z_s, z_t = (model(input_ids=torch.tensor([text])).logits[0] for model in (student, teacher))
        p, q = (z_t / temperature).softmax(-1), (z_s / temperature).softmax(-1)
        for place in range(max(first, 1), len(text)):
            soft.append(temperature**2 * divergence(p[place - 1], q[place - 1], beta))
            hard.append(-z_s[place - 1].softmax(-1)[text[place]].log())
            agreed.append(float(z_s[place - 1].argmax() == z_t[place - 1].argmax()))
    return torch.stack(soft).mean(), torch.stack(hard).mean(), sum(agreed) / len(agreed)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "prompt"),
    [(0.6, 0.0, 2.0, 0), (0.6, 1.0, 1.0, 0), (1.0, 0.3, 2.0, 0), (0.25, 0.0, 1.5, 3)],
)
def test_a_step_follows_the_definition(tmp_path, alpha, beta, temperature, prompt):
    """In four batches of texts of other lengths, with and without labels; a step of SGD shows the gradient."""
    trainer = trained(
        tmp_path,
        collator=collate(labels=prompt > 0, prompt=prompt),
        model=sharp(tiny(), 5.0),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        **SGD,
    )
    student, teacher = sharp(tiny(), 5.0).double(), teacher_of().double()
    soft, hard, fidelity = naive_losses(student, teacher, TEXTS[:16], prompt, temperature=temperature, beta=beta)
    total = alpha * soft + (1 - alpha) * hard
    total.backward()
    found = {name: logged(trainer, name) for name in MEASURES}
    expected = {"loss": total.item(), "soft_loss": soft.item(), "hard_loss": hard.item(), "fidelity": fidelity}
    assert found == {name: [pytest.approx(value, abs=1e-4)] for name, value in expected.items()}
    for (name, before), after in zip(student.named_parameters(), trainer.model.parameters(), strict=True):
        gradient = before.detach() - after.double()
        assert_close(gradient, before.grad, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("batch_size", [2, 4])
def test_accumulated_batches_are_one_batch(tmp_path, batch_size):
    """Though each has another number of tokens."""
    whole = trained(tmp_path / "whole")
    parts = trained(
        tmp_path / "parts", per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size
    )
    assert len(logged(whole, "loss")) == 4
    for name in MEASURES:
        assert logged(parts, name) == pytest.approx(logged(whole, name), abs=1e-5), name
    same_weights(parts.model, whole.model)


def test_two_processes_are_one(tmp_path):
    """Two times 4 texts are 8, in training and in evaluation, where 30 are no multiple of 8."""
    command = [sys.executable, *TWO, free_port(), "-m", "support.causal_process"]
    environment = {**os.environ, **path_with_tests(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
    history = json.loads((tmp_path / "two.json").read_text())
    alone = trained(tmp_path / "alone")
    measured = alone.evaluate(DATASET.select(range(30)))
    for name in MEASURES:
        assert [entry[name] for entry in history if name in entry] == pytest.approx(logged(alone, name), abs=1e-5), name
        (found,) = [entry[f"eval_{name}"] for entry in history if f"eval_{name}" in entry]
        assert found == pytest.approx(measured[f"eval_{name}"], abs=1e-5), name
    for name, value in load_file(tmp_path / "two" / "model.safetensors").items():
        assert_close(value, alone.model.state_dict()[name], rtol=0, atol=1e-5)


def test_evaluation_is_the_mean_over_all_tokens(tmp_path):
    trainer = make(tmp_path, model=sharp(tiny(), 5.0), per_device_eval_batch_size=5)
    measured = trainer.evaluate(DATASET)
    models = sharp(tiny(), 5.0).double(), teacher_of().double()
    soft, hard, fidelity = naive_losses(*models, TEXTS, 0, temperature=2.0, beta=0.0)
    assert measured["eval_soft_loss"] == pytest.approx(soft.item(), abs=1e-4)
    assert measured["eval_hard_loss"] == pytest.approx(hard.item(), abs=1e-4)
    assert measured["eval_loss"] == pytest.approx(0.6 * soft.item() + 0.4 * hard.item(), abs=1e-4)
    assert measured["eval_fidelity"] == pytest.approx(fidelity, abs=1e-6)


def test_without_a_teacher_it_is_plain_training(tmp_path):
    trainer = CausalDistillationTrainer(
        tiny(), arguments(tmp_path, alpha=0.0), train_dataset=DATASET, data_collator=collate()
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "hard_loss"), abs=1e-5)
    assert not logged(trainer, "soft_loss")


def test_a_teacher_is_frozen_and_neither_trained_nor_saved(tmp_path):
    teacher = sharp(tiny(seed=1)).train()
    before = weights_digest(teacher)
    trainer = trained(tmp_path, teacher_model=teacher, save_strategy="epoch")
    assert not teacher.training
    assert weights_digest(teacher) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    assert load_file(saved).keys() <= trainer.model.state_dict().keys()


# Padding


def gpt2(seed: int) -> GPT2LMHeadModel:
    """Its positions are a table, so a text that begins elsewhere is another text."""
    torch.manual_seed(seed)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, **off))


def roberta(*, seed: int) -> RobertaForCausalLM:
    """It counts positions itself, from behind the id of its padding."""
    torch.manual_seed(seed)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return RobertaForCausalLM(
        RobertaConfig(vocab_size=V, max_position_embeddings=60, is_decoder=True, pad_token_id=PAD, **size, **off)
    )


@pytest.mark.parametrize("kind", [tiny, gpt2, roberta])
@pytest.mark.parametrize("labels", [False, True])
def test_padding_on_the_left_is_padding_on_the_right(tmp_path, kind, labels):
    found = {}
    for side in ("left", "right"):
        trainer = trained(
            tmp_path,
            collator=collate(side, labels=labels),
            model=kind(seed=0),
            teacher_model=freeze(sharp(kind(seed=1))),
            max_steps=2,
        )
        found[side] = trainer
        trainer.evaluate(DATASET)
    for name in (*MEASURES, *(f"eval_{name}" for name in MEASURES)):
        assert logged(found["left"], name) == pytest.approx(logged(found["right"], name), abs=1e-5), name
    same_weights(found["left"].model, found["right"].model)


@pytest.mark.parametrize("kind", [tiny, gpt2, roberta])
def test_a_model_reads_what_it_reads_by_itself(tmp_path, kind):
    teacher = freeze(kind(seed=1))
    trainer = make(tmp_path, model=kind(seed=0), teacher_model=teacher)
    batch = collate()([DATASET[row] for row in range(8)])
    own = teacher(**batch).logits[batch["attention_mask"] == 1]
    assert_close(trainer._run_teacher(batch)[batch["attention_mask"] == 1], own)


def test_packed_texts_are_not_continued(tmp_path):
    trainer = make(tmp_path, share=1.0)
    packed = DataCollatorWithFlattening()([DATASET[row] for row in range(4)])
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    with pytest.raises(ValueError, match="the batch holds packed texts"):
        trainer.get_batch_samples(iter([packed]), 1, torch.device("cpu"))


def test_a_model_that_counts_positions_itself_takes_no_packed_texts(tmp_path):
    trainer = make(tmp_path, model=roberta(seed=0), teacher_model=freeze(roberta(seed=1)))
    packed = DataCollatorWithFlattening()([DATASET[row] for row in range(4)])
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    with pytest.raises(ValueError, match="the batch holds position_ids, and the student counts positions itself"):
        trainer.get_batch_samples(iter([packed]), 1, torch.device("cpu"))


def test_both_models_are_told_what_is_padding(tmp_path):
    student, teacher, read = tiny(), teacher_of(), []
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs), with_kwargs=True)
    trained(tmp_path, model=student, teacher_model=teacher, collator=collate("left"), max_steps=1)
    assert len(read) == 2
    for given in read:
        assert given["attention_mask"].sum() == sum(map(len, TEXTS[:8]))
        assert given["position_ids"][given["attention_mask"].bool()].tolist() == [
            place for text in TEXTS[:8] for place in range(len(text))
        ]
        assert given["use_cache"] is False


# What the student writes


def note_texts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is written from now on: the weights that write, what they are given, and the texts."""
    notes, original = [], causal_trainer.written_by_student

    def note(student, batch, **options):
        written, counts = original(student, batch, **options)
        notes.append({"weights": weights_digest(student), "batch": batch, "counts": counts, **written, **options})
        return written, counts

    monkeypatch.setattr(causal_trainer, "written_by_student", note)
    return notes


def test_a_batch_of_the_students_own_is_judged_where_it_wrote(tmp_path, monkeypatch):
    notes = note_texts(monkeypatch)
    settings = {"share": 1.0, "beta": 1.0, "alpha": 0.6, "prompt_tokens": 3, "seed": 5, "end_id": 2}
    trainer = trained(tmp_path, model=sharp(tiny(), 5.0), max_steps=1, collator=collate("left"), **settings, **SGD)
    student, teacher = sharp(tiny(), 5.0), teacher_of()
    prompts = [text[: min(3, len(text) - 1)] for text in TEXTS[:8]]
    texts = write_texts(student, prompts, new_tokens=6, seed=[5, 0, 0, 1], end_id=2)
    (note,) = notes
    found = zip(note["input_ids"], note["attention_mask"].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in found] == texts
    assert note["weights"] == weights_digest(student), "as it is before the step"
    student, teacher, soft = student.double(), teacher.double(), []
    for text, prompt in zip(texts, prompts, strict=True):
        q, p = ((model(input_ids=torch.tensor([text])).logits[0] / 2).softmax(-1) for model in (student, teacher))
        soft += [4 * divergence(p[place - 1], q[place - 1], 1.0) for place in range(len(prompt), len(text))]
    soft = torch.stack(soft).mean()
    (0.6 * soft).backward()
    assert logged(trainer, "soft_loss") == [pytest.approx(soft.item(), rel=1e-4)]
    assert logged(trainer, "loss") == [pytest.approx(0.6 * soft.item(), rel=1e-4)]
    assert not logged(trainer, "hard_loss")
    for before, after in zip(student.parameters(), trainer.model.parameters(), strict=True):
        assert_close(before.detach() - after.double(), before.grad, rtol=1e-3, atol=2e-5)


def test_without_a_share_nothing_is_written(tmp_path, monkeypatch):
    notes = note_texts(monkeypatch)
    trainer = trained(tmp_path, share=0.0, beta=1.0)
    assert notes == []
    assert len(logged(trainer, "hard_loss")) == 4


def test_a_share_of_the_batches_is_written_each_with_its_own_numbers(tmp_path, monkeypatch):
    notes = note_texts(monkeypatch)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 4}
    trained(tmp_path, share=0.5, new_tokens=1, prompt_tokens=1, **options)
    assert len(notes) / 128 == pytest.approx(0.5, abs=0.12)
    seeds = [tuple(note["seed"]) for note in notes]
    assert len(set(seeds)) == len(seeds)
    assert {place for _, _, place, _ in seeds} == {0, 1, 2, 3}
    assert {step for _, step, _, _ in seeds} <= set(range(32))


def test_evaluation_is_on_the_texts_as_they_are(tmp_path, monkeypatch):
    plain = make(tmp_path).evaluate(DATASET)
    notes = note_texts(monkeypatch)
    measured = make(tmp_path, share=1.0).evaluate(DATASET)
    assert notes == []
    assert measured["eval_loss"] == plain["eval_loss"]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_resumed_it_ends_in_the_same_weights(tmp_path, share):
    options = {
        "share": share,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = trained(tmp_path, save_strategy="steps", save_steps=3, **options)
    again = make(tmp_path / "again", model=tiny(seed=9), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again, "loss")[-5:] == logged(whole, "loss")[-5:]
    same_weights(again.model, whole.model, atol=0)


def test_the_token_that_ends_a_text_is_found(tmp_path):
    class Tokenizer:
        eos_token_id = 7

    assert make(tmp_path).end_id is None
    trainer = make(tmp_path)
    trainer.model.config.eos_token_id = [4, 5]
    assert trainer._token_that_ends_a_text() == 4
    trainer.processing_class = Tokenizer()
    assert trainer._token_that_ends_a_text() == 7
    assert make(tmp_path, end_id=3).end_id == 3


# Adapters


def test_a_student_with_adapters_learns_and_writes(tmp_path):
    import peft  # slow to load

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    base = tiny()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = {"share": 0.5, "learning_rate": 1e-2, "save_strategy": "epoch"}
    trainer = trained(tmp_path, model=base, options={"peft_config": config}, **settings)
    moved = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    state = trainer.model.state_dict()
    assert any(state[name].any() for name in state if "lora_B" in name), "they begin at 0"
    inner = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(value, inner[_in_adapter(name)]) for name, value in before.items())
    assert [path.name for path in tmp_path.glob("checkpoint-*/*.safetensors")] == ["adapter_model.safetensors"]
    again = make(tmp_path, options={"peft_config": config}, **settings)
    fresh = make(tmp_path, options={"peft_config": config}, **settings)
    same_weights(again.model, fresh.model, atol=0)


def _in_adapter(name: str) -> str:
    parts = name.rsplit(".", 1)
    return f"{parts[0]}.base_layer.{parts[1]}" if parts[0].endswith(("q_proj", "v_proj")) else name


# What is refused

BERT = BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            lambda: {"teacher_model": teacher_of(vocabulary=20)},
            "the student's vocabulary has 24 tokens, the teacher's 20, so their logits can't be compared",
        ),
        (
            lambda: {"model": tiny_bert(1)},
            r"the student is a BertForSequenceClassification, and CausalDistillationTrainer is for causal language "
            r"models \(AutoModelForCausalLM\); for classifiers use DistillationTrainer",
        ),
        (lambda: {"teacher_model": tiny_bert(1)}, "the teacher is a BertForSequenceClassification"),
        (lambda: {"model": BertForMaskedLM(BERT)}, "the student is a BertForMaskedLM, whose tokens see those that"),
        (
            lambda: {"teacher_model": BertLMHeadModel(BERT)},
            "the teacher is a BertLMHeadModel that is no decoder, .* set is_decoder to True",
        ),
        (
            lambda: {
                "model": T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1))
            },
            "the student is a T5ForConditionalGeneration",
        ),
        (
            lambda: {"texts": DATASET.rename_column("input_ids", "text")},
            "train_dataset has the columns text, and no 'input_ids'; tokenize its texts",
        ),
        (
            lambda: {"share": 0.5, "prompt_tokens": 30},
            "30 tokens of a prompt and 6 new ones are more than the model's 32 positions; set new_tokens to at most 2",
        ),
        (
            lambda: {"share": 0.5, "prompt_tokens": 50},
            "a prompt has 50 tokens and the model 32 positions; shorten the prompts",
        ),
        (lambda: {"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; set it to 0"),
    ],
)
def test_mistakes_are_named(tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, **given())


def test_a_teacher_is_missed(tmp_path):
    with pytest.raises(ValueError, match=r"alpha is 0\.6 but there is no teacher; give a teacher_model, or alpha=0"):
        CausalDistillationTrainer(tiny(), arguments(tmp_path), train_dataset=DATASET)


@pytest.mark.parametrize(("sharded", "by"), [("fsdp", "FSDP"), ("zero", "DeepSpeed ZeRO-3")])
def test_a_student_whose_weights_are_divided_does_not_write(tmp_path, monkeypatch, sharded, by):
    """As the Trainer finds it after it has read its arguments."""
    original = CausalDistillationTrainer.create_accelerator_and_postprocess

    def divided(self):
        original(self)
        self.is_fsdp_enabled = sharded == "fsdp"

    monkeypatch.setattr(CausalDistillationTrainer, "create_accelerator_and_postprocess", divided)
    monkeypatch.setattr(CausalDistillationTrainer, "_place", lambda self, teacher: teacher)
    monkeypatch.setattr(causal_trainer, "_zero_stage", lambda state: 3 if sharded == "zero" else 0)
    make(tmp_path, share=0.0)
    with pytest.raises(ValueError, match=f"share is 0.5, but {by} divides the student's weights among the processes"):
        make(tmp_path, share=0.5)
