"""Losses inside the models, against the papers' formulas in loops, and the scores that attention never shows."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support.models import tiny_bert
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from kd_helpers.methods.hidden_losses import (
    attention_loss,
    attention_scores,
    cosine_loss,
    every_second_layer,
    hidden_loss,
    layer_mapping,
    masked_language_loss,
    vocabulary_soft_loss,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
TOKENS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_rubbish(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same, with NaN at every token that does not count."""
    return torch.where(mask.bool().unsqueeze(-1), states, torch.nan)


def pairwise_rubbish(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same, with infinity at every pair of which one does not count."""
    counts = mask.bool()
    return torch.where(counts[:, None, :, None] & counts[:, None, None, :], scores, torch.inf)


# --- the soft loss over the vocabulary ---


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_vocabulary_soft_loss_is_the_mean_over_tokens_of_the_formula(temperature):
    student, teacher = numbers(2, 4, 9, seed=0), 3 * numbers(2, 4, 9, seed=1)
    expected = 0.0
    for b, t in TOKENS:
        p = [math.exp(z / temperature) for z in teacher[b, t].tolist()]
        q = [math.exp(z / temperature) for z in student[b, t].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += temperature**2 * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / len(TOKENS)
    found = vocabulary_soft_loss(student, teacher, MASK, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    picked = [torch.stack([logits[b, t] for b, t in TOKENS]) for logits in (student, teacher)]
    torch.testing.assert_close(vocabulary_soft_loss(*picked, torch.ones(len(TOKENS)), temperature), found)


def test_masked_language_loss_is_the_negative_log_likelihood_of_the_masked_tokens():
    logits = numbers(2, 4, 9, seed=0)
    labels = torch.tensor([[-100, 3, -100, -100], [8, -100, -100, -100]])
    log_q = logits.log_softmax(dim=-1)
    expected = -(log_q[0, 1, 3] + log_q[1, 0, 8]) / 2
    torch.testing.assert_close(masked_language_loss(logits, labels), expected)


# --- states ---


def test_cosine_loss_is_the_mean_of_one_minus_the_cosine():
    student, teacher = numbers(2, 4, 5, seed=0), numbers(2, 4, 5, seed=1)
    expected = 0.0
    for b, t in TOKENS:
        s, r = student[b, t].tolist(), teacher[b, t].tolist()
        dot = sum(x * y for x, y in zip(s, r, strict=True))
        expected += (1 - dot / math.sqrt(sum(x * x for x in s) * sum(y * y for y in r))) / len(TOKENS)
    assert cosine_loss(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_cosine_loss_sees_direction_only():
    teacher = numbers(2, 4, 5, seed=1)
    assert cosine_loss(3 * teacher, teacher, MASK).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-teacher, teacher, MASK).item() == pytest.approx(2, abs=1e-6)


def test_hidden_loss_is_the_mean_of_squares():
    student, teacher = numbers(2, 4, 5, seed=0), numbers(2, 4, 5, seed=1)
    squares = [(student[b, t, i] - teacher[b, t, i]).item() ** 2 for b, t in TOKENS for i in range(5)]
    assert hidden_loss(student, teacher, MASK).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_hidden_loss_goes_through_the_projection_and_trains_it():
    student, teacher = numbers(2, 4, 3, seed=0), numbers(2, 4, 5, seed=1)
    projection = nn.Linear(3, 5, bias=False)
    squares = []
    for b, t in TOKENS:
        lifted = [sum((w * x).item() for w, x in zip(row, student[b, t], strict=True)) for row in projection.weight]
        squares += [(x - y) ** 2 for x, y in zip(lifted, teacher[b, t].tolist(), strict=True)]
    loss = hidden_loss(student, teacher, MASK, projection)
    assert loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    loss.backward()
    assert projection.weight.grad.abs().sum() > 0


# --- attention ---


def test_attention_loss_is_the_mean_of_squares_over_heads_and_pairs_of_tokens():
    student, teacher = numbers(2, 3, 4, 4, seed=0), numbers(2, 3, 4, 4, seed=1)
    pairs = [(b, i, j) for b, i in TOKENS for c, j in TOKENS if b == c]
    squares = [(student[b, h, i, j] - teacher[b, h, i, j]).item() ** 2 for b, i, j in pairs for h in range(3)]
    assert len(squares) == 3 * (9 + 4)
    assert attention_loss(student, teacher, MASK).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_attention_loss_of_other_head_counts_compares_the_means_over_heads():
    student, teacher = numbers(2, 2, 4, 4, seed=0), numbers(2, 6, 4, 4, seed=1)
    means = [scores.mean(dim=1, keepdim=True) for scores in (student, teacher)]
    torch.testing.assert_close(attention_loss(student, teacher, MASK), attention_loss(*means, MASK))
    assert attention_loss(teacher[:, :2].repeat(1, 3, 1, 1), teacher[:, :2], MASK).item() == pytest.approx(0, abs=1e-9)


@pytest.fixture(params=["eager", "sdpa"])
def bert(request) -> BertModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    model = BertModel(BertConfig(**shape, vocab_size=50, attn_implementation=request.param)).eval()
    with torch.no_grad():  # as drawn, all scores are nearly 0 and every softmax nearly uniform
        for layer in model.encoder.layer:
            layer.attention.self.query.weight *= 20
    return model


IDS = torch.tensor([[2, 7, 9, 0], [2, 8, 0, 0]])


def test_scores_are_what_attention_takes_the_softmax_of(bert):
    torch.manual_seed(0)
    eager = BertModel._from_config(bert.config, attn_implementation="eager").eval()
    eager.load_state_dict(bert.state_dict())
    with torch.no_grad(), attention_scores(bert) as scores:
        bert(input_ids=IDS, attention_mask=MASK)
    expected = eager(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
    assert len(scores) == len(expected) == 3
    for own, probabilities in zip(scores, expected, strict=True):
        assert own.shape == (2, 4, 4, 4)
        masked = own.masked_fill(~MASK.bool()[:, None, None, :], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(masked, probabilities, rtol=1e-4, atol=1e-5)
        assert probabilities.max() > 0.5, "some head must look somewhere, or a wrong scale would pass"


def test_scores_carry_gradients_start_anew_and_leave_nothing_behind(bert):
    with attention_scores(bert) as scores:
        bert(input_ids=IDS[:1], attention_mask=MASK[:1])
        bert(input_ids=IDS, attention_mask=MASK)
    assert [own.shape[0] for own in scores] == [2, 2, 2]
    attention_loss(scores[-1], torch.zeros_like(scores[-1]), MASK).backward()
    assert bert.encoder.layer[2].attention.self.query.weight.grad.abs().sum() > 0
    bert(input_ids=IDS, attention_mask=MASK)
    assert len(scores) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.modules())
    with pytest.raises(RuntimeError, match="stop"), attention_scores(bert):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.modules())


def test_scores_are_collected_from_a_bert_only():
    model = DistilBertModel(DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=20))
    sentence = r"attention scores are collected from a BERT, this model is a distilbert\."
    with pytest.raises(ValueError, match=sentence), attention_scores(model):
        pass


# --- what holds for all of them ---

LOSSES = {
    "vocabulary": lambda s, t, mask: vocabulary_soft_loss(s, t, mask, 2.0),
    "cosine": cosine_loss,
    "hidden": hidden_loss,
    "projected": lambda s, t, mask: hidden_loss(s, t, mask, nn.Linear(5, 5, bias=False)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_never_looked_at(name):
    student, teacher = numbers(2, 4, 5, seed=0), numbers(2, 4, 5, seed=1)
    torch.manual_seed(0)
    expected = LOSSES[name](student, teacher, MASK)
    dirty = with_rubbish(student, MASK).requires_grad_()
    torch.manual_seed(0)
    found = LOSSES[name](dirty, with_rubbish(teacher, MASK), MASK)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.isfinite(dirty.grad).all()
    assert dirty.grad[~MASK.bool()].abs().sum() == 0


def test_attention_of_padding_is_never_looked_at():
    student, teacher = numbers(2, 3, 4, 4, seed=0), numbers(2, 3, 4, 4, seed=1)
    dirty = pairwise_rubbish(student, MASK).requires_grad_()
    found = attention_loss(dirty, pairwise_rubbish(teacher, MASK), MASK)
    torch.testing.assert_close(found, attention_loss(student, teacher, MASK))
    found.backward()
    assert torch.isfinite(dirty.grad).all()


@pytest.mark.parametrize("name", [*LOSSES, "attention"])
def test_the_teacher_gets_no_gradient_and_float32_is_used(name):
    shape = (2, 3, 4, 4) if name == "attention" else (2, 4, 5)
    loss = attention_loss if name == "attention" else LOSSES[name]
    student = numbers(*shape, seed=0).bfloat16().requires_grad_()
    teacher = numbers(*shape, seed=1).bfloat16().requires_grad_()
    torch.manual_seed(0)
    found = loss(student, teacher, MASK)
    torch.manual_seed(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student.detach().float(), teacher.detach().float(), MASK))
    found.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [*LOSSES, "attention"])
def test_no_token_no_loss(name):
    shape = (2, 3, 4, 4) if name == "attention" else (2, 4, 5)
    loss = attention_loss if name == "attention" else LOSSES[name]
    student = numbers(*shape, seed=0).requires_grad_()
    found = loss(student, numbers(*shape, seed=1), torch.zeros(2, 4))
    assert found.item() == 0
    found.backward()
    assert student.grad.abs().sum() == 0


def sized(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


WRONG = {
    "other vocabulary": (
        lambda: vocabulary_soft_loss(sized(2, 4, 9), sized(2, 4, 8), MASK, 2.0),
        "the student's shape is (2, 4, 9), the teacher's (2, 4, 8); both need the same texts, tokens and width.",
    ),
    "temperature": (
        lambda: vocabulary_soft_loss(sized(2, 4, 9), sized(2, 4, 9), MASK, 0.0),
        "temperature is 0.0; give a finite number greater than 0.",
    ),
    "other mask": (
        lambda: cosine_loss(sized(2, 3, 5), sized(2, 3, 5), MASK),
        "the mask has shape (2, 4); give one number for each of the tokens (2, 3).",
    ),
    "other tokens": (
        lambda: hidden_loss(sized(2, 3, 5), sized(2, 4, 5), MASK),
        "the student's shape is (2, 3, 5), the teacher's (2, 4, 5); both need the same texts and tokens.",
    ),
    "other width": (
        lambda: hidden_loss(sized(2, 4, 3), sized(2, 4, 5), MASK),
        "the student's states are 3 wide, the teacher's 5; give a projection, nn.Linear(3, 5, bias=False), and train "
        "it along.",
    ),
    "projection of another width": (
        lambda: hidden_loss(sized(2, 4, 3), sized(2, 4, 5), MASK, nn.Linear(3, 4)),
        "the projection goes from 3 to 4, the states need one from 3 to 5.",
    ),
    "labels": (
        lambda: masked_language_loss(sized(2, 4, 9), torch.zeros(2, 3, dtype=torch.long)),
        "logits have shape (2, 4, 9), labels (2, 3); give one label for each token.",
    ),
    "scores": (
        lambda: attention_loss(sized(2, 3, 4, 4), sized(2, 3, 5, 5), MASK),
        "the teacher's scores have shape (2, 3, 5, 5), the mask (2, 4); give scores [2, heads, 4, 4].",
    ),
    "mapping": (lambda: layer_mapping(2, 4, "middle"), "how is 'middle'; choose one of uniform, top, bottom."),
    "deeper student": (
        lambda: layer_mapping(7, 6, "top"),
        "the student has 7 layers and the teacher 6; it must have at least one and no more than its teacher.",
    ),
    "uneven": (
        lambda: layer_mapping(4, 6),
        "6 teacher layers can't be dealt evenly to 4; choose a depth that divides 6, or how='top' or 'bottom'.",
    ),
    "one layer": (lambda: every_second_layer(1), "the teacher's depth is 1; give one of at least 2 to halve."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused_in_a_sentence(name):
    call, sentence = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


# --- which layer learns from which ---


@pytest.mark.parametrize(
    ("student", "teacher", "how", "expected"),
    [
        (4, 12, "uniform", [2, 5, 8, 11]),  # the paper's 4-layer student: g(m) = 3m
        (6, 12, "uniform", [1, 3, 5, 7, 9, 11]),
        (3, 6, "uniform", [1, 3, 5]),
        (3, 6, "top", [3, 4, 5]),
        (3, 6, "bottom", [0, 1, 2]),
        (6, 6, "uniform", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layer_mapping(student, teacher, how, expected):
    assert layer_mapping(student, teacher, how) == expected


@pytest.mark.parametrize(("layers", "expected"), [(12, [0, 2, 4, 7, 9, 11]), (6, [0, 2, 5]), (4, [0, 3]), (2, [0])])
def test_every_second_layer(layers, expected):
    assert every_second_layer(layers) == expected


def test_scores_without_a_gradient_are_refused():
    model = tiny_bert()
    model.gradient_checkpointing_enable()
    refused = pytest.raises(ValueError, match="gradient checkpointing is on, and with it attention scores have no grad")
    with refused, attention_scores(model.train()):
        pass
    with attention_scores(model.eval()) as scores:
        model(torch.tensor([[1, 2]]))
    assert len(scores) == model.config.num_hidden_layers
