"""The losses of tokens against references in float64 with plain loops, trl's values, and the memory they take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from kd_helpers import losses
from kd_helpers.losses import (
    StatesAndHead,
    distillation_loss,
    hard_loss,
    soft_loss,
    token_hard_loss,
    token_soft_loss,
    token_soft_loss_top_k,
)

TEMPERATURES = (0.7, 1.0, 3.0)
BETAS = (0, 0.1, 0.5, 0.9, 1)
MASK = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
TOKENS = MASK.nonzero().tolist()
V = 7


def numbers(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_and_teacher() -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(*MASK.shape, V, seed=0).requires_grad_(), numbers(*MASK.shape, V, seed=1)


def naive_softmax(z: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in z]
    return [value / sum(exponentials) for value in exponentials]


def naive_divergence(p: list[float], q: list[float], beta: float) -> tuple[float, list[float]]:
    """D and its derivative by each q, one number at a time."""
    if beta == 0:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), [-a / b for a, b in zip(p, q, strict=True)]
    if beta == 1:
        return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)), [
            math.log(b / a) + 1 for a, b in zip(p, q, strict=True)
        ]
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    value = sum(beta * a * math.log(a / c) + (1 - beta) * b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True))
    return value, [(1 - beta) * math.log(b / c) for b, c in zip(q, m, strict=True)]


def naive_soft_loss(student, teacher, temperature: float, beta: float) -> tuple[float, torch.Tensor]:
    """The loss and its gradient by the student's logits."""
    loss, gradient = 0.0, torch.zeros(student.shape, dtype=torch.float64)
    for b, t in TOKENS:
        p, q = (naive_softmax(logits[b, t].tolist(), temperature) for logits in (teacher, student))
        value, by_q = naive_divergence(p, q, beta)
        loss += temperature**2 * value / len(TOKENS)
        mean = sum(x * y for x, y in zip(q, by_q, strict=True))
        for v in range(len(q)):  # d q_i / d z_v = q_v · (1[i = v] − q_i) / T
            gradient[b, t, v] = temperature * q[v] * (by_q[v] - mean) / len(TOKENS)
    return loss, gradient


# --- values and gradients ---


@pytest.mark.parametrize("chunk", [None, 1, 6, 1000])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_loss_and_its_gradient_follow_the_definition(temperature, beta, chunk):
    student, teacher = student_and_teacher()
    found = token_soft_loss(student, teacher, MASK, temperature=temperature, beta=beta, chunk=chunk)
    found.backward()
    value, gradient = naive_soft_loss(student, teacher, temperature, beta)
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert_close(student.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    assert found.dtype == torch.float32
    assert found.shape == ()


@pytest.mark.parametrize("chunk", [None, 1, 6])
def test_hard_loss_and_its_gradient_follow_the_definition(chunk):
    student, _ = student_and_teacher()
    labels = torch.randint(V, MASK.shape, generator=torch.Generator().manual_seed(2)).masked_fill(MASK == 0, -100)
    found = token_hard_loss(student, labels, chunk=chunk)
    found.backward()
    value, gradient = 0.0, torch.zeros(student.shape, dtype=torch.float64)
    for b, t in TOKENS:
        q = naive_softmax(student[b, t].tolist(), 1.0)
        value -= math.log(q[labels[b, t]]) / len(TOKENS)
        for v in range(V):
            gradient[b, t, v] = (q[v] - (v == labels[b, t].item())) / len(TOKENS)
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert_close(student.grad.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_on_rows_the_losses_are_those_of_a_classifier(temperature):
    student, teacher = student_and_teacher()
    labels = torch.arange(MASK.numel()).reshape(MASK.shape) % V
    rows, targets = student.flatten(end_dim=1), teacher.flatten(end_dim=1)
    everything = torch.ones_like(MASK)
    soft = token_soft_loss(student, teacher, everything, temperature=temperature)
    assert_close(soft, soft_loss(rows, targets, temperature))
    assert_close(token_hard_loss(student, labels), hard_loss(rows, labels.flatten()))


# What trl 1.16.0 computes (`GKDTrainer.generalized_jsd_loss`, in float64, with labels) for `logits_for_trl`.
TRL = {
    1.0: {0: 1.3138750353, 0.1: 0.1095472944, 0.5: 0.2880030008, 0.9: 0.1269186052, 1: 1.8003387050},
    2.0: {0: 0.4797647130, 0.1: 0.0422759153, 0.5: 0.1159774144, 0.9: 0.0459670574, 1: 0.5412004561},
}


def logits_for_trl(scale: float) -> torch.Tensor:
    """`[2, 4, 6]`, made without a generator, so that they are the same for every version of torch."""
    return torch.tensor(
        [
            [[scale * ((7 * b + 5 * t + 3 * v + b * t * v) % 11 - 5) / 5 for v in range(6)] for t in range(4)]
            for b in range(2)
        ]
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TRL)
def test_it_is_trls_loss_times_the_square_of_the_temperature(temperature, beta):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = token_soft_loss(logits_for_trl(1.5), logits_for_trl(3.0).flip(-1), mask, temperature=temperature, beta=beta)
    assert found.item() == pytest.approx(temperature**2 * TRL[temperature][beta], rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_close_to_the_teacher_jsd_is_beta_times_one_minus_beta_of_the_kl(beta):
    _, teacher = student_and_teacher()
    student = teacher + numbers(*teacher.shape, seed=5, scale=0.05)
    kl, jsd = (token_soft_loss(student, teacher, MASK, temperature=1.0, beta=b).item() for b in (0, beta))
    assert jsd == pytest.approx(beta * (1 - beta) * kl, rel=0.05)


def test_at_its_ends_jsd_itself_vanishes():
    student, teacher = student_and_teacher()
    for beta, end in ((1e-4, 0), (1 - 1e-4, 1)):
        near, kl = (token_soft_loss(student, teacher, MASK, temperature=1.0, beta=b).item() for b in (beta, end))
        assert near == pytest.approx(1e-4 * kl, rel=0.05)


def test_half_way_jsd_does_not_tell_teacher_and_student_apart():
    student, teacher = (logits.detach() for logits in student_and_teacher())
    one = token_soft_loss(student, teacher, MASK, temperature=2.0, beta=0.5)
    assert_close(one, token_soft_loss(teacher, student, MASK, temperature=2.0, beta=0.5))
    assert one < 4 * math.log(2)


@pytest.mark.parametrize("beta", [0, 1])
def test_temperature_squared_keeps_the_gradient_at_high_temperature(beta):
    """In the limit both KLs are logit matching: gradient (z_S − z_T) / (V N) for logits of mean zero."""
    student, teacher = (logits.detach() for logits in student_and_teacher())
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    token_soft_loss(student, teacher, MASK, temperature=1000.0, beta=beta).backward()
    limit = (student.detach() - teacher) * MASK.unsqueeze(-1) / (V * len(TOKENS))
    assert_close(student.grad, limit, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_far_apart_the_loss_and_its_gradient_stay_finite(beta):
    student = torch.tensor([[[60.0, -60.0, 0.0]]], requires_grad=True)
    loss = token_soft_loss(student, -student.detach(), torch.ones(1, 1), temperature=0.5, beta=beta)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


# --- what does not count ---


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("chunk", [None, 1])
def test_values_at_tokens_that_do_not_count_have_no_effect(rubbish, chunk):
    clean, teacher = student_and_teacher()
    dirty = clean.detach().masked_fill(MASK.unsqueeze(-1) == 0, rubbish).requires_grad_()
    labels = torch.ones_like(MASK).masked_fill(MASK == 0, -100)
    ids = torch.arange(3).expand(*MASK.shape, 3)
    for of in (
        lambda logits: token_soft_loss(
            logits, teacher + 0 * logits.detach(), MASK, temperature=2.0, beta=0.5, chunk=chunk
        ),
        lambda logits: token_hard_loss(logits, labels, chunk=chunk),
        lambda logits: token_soft_loss_top_k(
            logits, teacher[..., :3], ids, teacher.logsumexp(-1), MASK, temperature=1.0, chunk=chunk
        ),
    ):
        clean.grad = dirty.grad = None
        one, other = of(clean), of(dirty)
        one.backward()
        other.backward()
        assert torch.equal(one, other)
        assert torch.equal(clean.grad, dirty.grad)
        assert not dirty.grad[MASK == 0].any()


@pytest.mark.parametrize("chunk", [None, 1])
def test_where_no_token_counts_loss_and_gradient_are_exactly_zero(chunk):
    student, teacher = student_and_teacher()
    states = numbers(*MASK.shape, 4, seed=3).requires_grad_()
    weight = numbers(V, 4, seed=4).requires_grad_()
    ids = torch.arange(3).expand(*MASK.shape, 3)
    none = torch.zeros_like(MASK)
    for loss in (
        token_soft_loss(student, teacher, none, temperature=2.0, beta=0.3, chunk=chunk),
        token_soft_loss(StatesAndHead(states, weight), teacher, none, temperature=2.0, chunk=chunk),
        token_hard_loss(student, none - 100, chunk=chunk),
        token_soft_loss_top_k(
            student, teacher[..., :3], ids, teacher.logsumexp(-1), none, temperature=1.0, chunk=chunk
        ),
    ):
        loss.backward()
        assert loss.item() == 0.0
    for leaf in (student, states, weight):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_batch_without_texts_or_tokens_has_no_loss():
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(*shape, V)
        assert token_soft_loss(empty, empty, torch.ones(shape), temperature=1.0).item() == 0
        assert token_hard_loss(empty, torch.zeros(shape, dtype=torch.long)).item() == 0


def test_no_gradient_reaches_the_teacher():
    student, teacher = student_and_teacher()
    states, weight = numbers(*MASK.shape, 4, seed=3).requires_grad_(), numbers(V, 4, seed=4).requires_grad_()
    teacher.requires_grad_()
    for chunk in (None, 1):
        (
            token_soft_loss(student, teacher, MASK, temperature=2.0, beta=0.5, chunk=chunk)
            + token_soft_loss(student, StatesAndHead(states, weight), MASK, temperature=2.0, chunk=chunk)
            + token_soft_loss_top_k(
                student,
                teacher,
                torch.arange(V).expand_as(teacher),
                teacher.logsumexp(-1),
                MASK,
                temperature=1.0,
                chunk=chunk,
            )
        ).backward()
    assert student.grad is not None
    assert teacher.grad is states.grad is weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    student, teacher = (logits.detach().to(dtype) for logits in student_and_teacher())
    for beta in (0, 0.5, 1):
        found = token_soft_loss(student, teacher, MASK, temperature=3.0, beta=beta)
        assert found.dtype == torch.float32
        assert_close(found, token_soft_loss(student.float(), teacher.float(), MASK, temperature=3.0, beta=beta))
    labels = torch.ones_like(MASK)
    assert_close(token_hard_loss(student, labels), token_hard_loss(student.float(), labels))


# --- states and head in the place of logits ---


def states_and_heads() -> tuple[StatesAndHead, StatesAndHead]:
    student = StatesAndHead(numbers(*MASK.shape, 4, seed=3), numbers(V, 4, seed=4, scale=0.7))
    teacher = StatesAndHead(numbers(*MASK.shape, 6, seed=5), numbers(V, 6, seed=6, scale=0.7))
    return student, teacher


@pytest.mark.parametrize("chunk", [None, 1, 6])
@pytest.mark.parametrize("kind", ["soft", "hard", "top k"])
def test_states_and_head_give_the_loss_and_the_gradients_of_their_logits(kind, chunk):
    student, teacher = states_and_heads()
    top = (teacher.states @ teacher.weight.T).topk(3)
    labels = torch.ones_like(MASK).masked_fill(MASK == 0, -100)
    found = []
    for whole in (True, False):
        for tensor in student:
            tensor.requires_grad_().grad = None
        own, theirs = ((given.states @ given.weight.T if whole else given) for given in (student, teacher))
        if kind == "soft":
            loss = token_soft_loss(own, theirs, MASK, temperature=2.0, beta=0.3, chunk=chunk)
        elif kind == "hard":
            loss = token_hard_loss(own, labels, chunk=chunk)
        else:
            log_total = (teacher.states @ teacher.weight.T / 2).logsumexp(-1)
            loss = token_soft_loss_top_k(own, top.values, top.indices, log_total, MASK, temperature=2.0, chunk=chunk)
        loss.backward()
        found.append([loss.detach(), *(tensor.grad for tensor in student)])
    assert found[0][1].abs().max() > 1e-3
    assert_close(found[0], found[1])


def test_under_autocast_the_product_is_in_bfloat16_and_the_loss_in_float32():
    student, teacher = states_and_heads()
    student.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_soft_loss(student, teacher, MASK, temperature=2.0, chunk=3)
        rounded = [given.states @ given.weight.T for given in (student, teacher)]
    assert rounded[0].dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert_close(found, token_soft_loss(*rounded, MASK, temperature=2.0))
    found.backward()  # outside of autocast, where the chunks must be computed as they were
    again = torch.autograd.grad(token_soft_loss(*rounded, MASK, temperature=2.0), student.weight)[0]
    assert_close(student.weight.grad, again, rtol=0.02, atol=1e-3)


# --- memory ---


def bytes_taken(compute: Callable[[], Any]) -> tuple[int, int]:
    """Of what is computed, what was there before left out: the most memory taken at a time, and what is left."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = compute()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept  # only now, so that it counts as left
    return peak, live


def peak_bytes(compute: Callable[[], torch.Tensor]) -> int:
    """The most memory that is taken at a time for a loss and its gradient."""
    return bytes_taken(lambda: compute().backward())[0]


def naive_in_one_piece(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """As it is usually written: every softmax over the vocabulary as a whole."""
    log_p, log_q = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    divergences = [F.kl_div(log_m, log, reduction="none", log_target=True) for log in (log_p, log_q)]
    return (beta * divergences[0] + (1 - beta) * divergences[1]).sum() / (student.shape[0] * student.shape[1])


LARGE, WIDTH = 2000, 8


def of_size(texts: int, tokens: int) -> tuple[StatesAndHead, StatesAndHead, torch.Tensor]:
    student, teacher = (
        StatesAndHead(numbers(texts, tokens, WIDTH, seed=seed), numbers(LARGE, WIDTH, seed=seed + 1)) for seed in (0, 2)
    )
    for tensor in student:
        tensor.requires_grad_()
    return student, teacher, torch.ones(texts, tokens)


def test_between_loss_and_gradient_nothing_is_kept_but_the_gradient():
    student, teacher, mask = of_size(2, 64)
    logits = (student.states @ student.weight.T).detach().requires_grad_()
    targets = teacher.states @ teacher.weight.T
    _, in_chunks = bytes_taken(lambda: token_soft_loss(logits, targets, mask, temperature=1.0, beta=0.5, chunk=16))
    _, in_one_piece = bytes_taken(lambda: naive_in_one_piece(logits, targets, 0.5))
    size = logits.untyped_storage().nbytes()
    assert in_one_piece > 3 * size
    assert size <= in_chunks < 1.01 * size
    with torch.no_grad():
        _, without = bytes_taken(lambda: token_soft_loss(logits, targets, mask, temperature=1.0, beta=0.5, chunk=16))
    assert without < 0.01 * size


def test_the_peak_of_memory_does_not_grow_with_the_texts():
    def peaks(texts: int, tokens: int) -> tuple[int, int, int]:
        student, teacher, mask = of_size(texts, tokens)
        options = {"temperature": 1.0, "beta": 0.5, "chunk": 16}

        def whole(given: StatesAndHead) -> torch.Tensor:
            return given.states @ given.weight.T

        return (
            peak_bytes(lambda: token_soft_loss(student, teacher, mask, **options)),
            peak_bytes(lambda: token_soft_loss(whole(student), whole(teacher), mask, **options)),
            peak_bytes(lambda: naive_in_one_piece(whole(student), whole(teacher), 0.5)),
        )

    logits = 2 * 128 * LARGE * 4  # bytes of [2, 128, V] in float32
    (few, _, _), (many, _, _), (long, from_logits, naive) = peaks(2, 32), peaks(8, 32), peaks(2, 128)
    assert max(many, long) < 1.1 * few, "from states it is that of a chunk"
    assert long < 2 * logits
    assert from_logits < 4.5 * logits, "those of both models and a gradient, which is put together from chunks"
    assert naive > 10 * logits


# --- the k likeliest tokens ---


def naive_top_k(student, teacher, ids, temperature: float, tail: bool) -> torch.Tensor:
    """In float64, from probabilities over the whole vocabulary; autograd derives it."""
    z_s, z_t = student.double(), teacher.double()
    total = z_s.new_zeros(())
    for b, t in TOKENS:
        p, q = ((z[b, t] / temperature).softmax(-1) for z in (z_t, z_s))
        known = ids[b, t].tolist()
        others = [v for v in range(V) if v not in known]
        share = 1.0 if tail else sum(p[v] for v in known)
        for v in known:
            total = total + p[v] / share * torch.log(p[v] / share / q[v])
        if tail and others:
            p_tail, q_tail = sum(p[v] for v in others), sum(q[v] for v in others)
            total = total + p_tail * torch.log(p_tail / q_tail)
    return temperature**2 * total / len(TOKENS)


@pytest.mark.parametrize("chunk", [None, 1, 6])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 3, V - 1, V])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_and_its_gradient_follow_the_definition(temperature, k, tail, chunk):
    student, teacher = student_and_teacher()
    top = teacher.topk(k)
    log_total = (teacher / temperature).logsumexp(-1)
    found = token_soft_loss_top_k(
        student, top.values, top.indices, log_total, MASK, temperature=temperature, tail=tail, chunk=chunk
    )
    found.backward()
    exact = student.detach().double().requires_grad_()
    expected = naive_top_k(exact, teacher, top.indices, temperature, tail)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_all_tokens_are_the_whole_loss(tail):
    student, teacher = student_and_teacher()
    ids = torch.arange(V, dtype=torch.int16).expand_as(teacher)
    found = token_soft_loss_top_k(student, teacher, ids, (teacher / 2).logsumexp(-1), MASK, temperature=2.0, tail=tail)
    assert_close(found, token_soft_loss(student, teacher, MASK, temperature=2.0))


def test_with_the_tail_the_teacher_itself_is_the_optimum_and_without_it_is_not():
    """Truncation is biased: its gradient pulls a student that equals its teacher away from it."""
    _, teacher = student_and_teacher()
    top = teacher.topk(3)
    gradients = []
    for tail in (True, False):
        student = teacher.clone().requires_grad_()
        token_soft_loss_top_k(
            student, top.values, top.indices, teacher.logsumexp(-1), MASK, temperature=1.0, tail=tail
        ).backward()
        gradients.append(student.grad)
    assert gradients[0].abs().max() < 1e-6
    assert gradients[1].abs().max() > 1e-2
    others = torch.ones_like(teacher).scatter(-1, top.indices, 0) * MASK.unsqueeze(-1)
    assert bool((gradients[1][others.bool()] > 0).all()), "all other tokens are made less likely"


@pytest.mark.parametrize("gap", [30.0, 200.0])
def test_a_tail_of_nothing_is_no_trouble(gap):
    """Neither the teacher's nor the student's tail can be told from 0 in float32."""
    teacher = torch.tensor([[[gap, gap, 0.0, 0.0]]])
    student = torch.tensor([[[gap, gap + 1, -gap, -gap]]], requires_grad=True)
    top = teacher.topk(2)
    loss = token_soft_loss_top_k(
        student, top.values, top.indices, teacher.logsumexp(-1), torch.ones(1, 1), temperature=1.0
    )
    loss.backward()
    kl = 0.5 * sum(math.log(0.5 / q) for q in naive_softmax([0.0, 1.0], 1.0))
    assert loss.item() == pytest.approx(kl, abs=1e-3)  # log_total, of this size, is rounded in float32
    assert student.grad.isfinite().all()


# --- refusals ---

ZEROS = torch.zeros(2, 3, V)
ALL = torch.ones(2, 3)
OTHER_VOCABULARY = (
    "the student's vocabulary has 7 tokens, the teacher's 32,000, so their logits can't be compared: use one tokenizer "
    "for both (and cut heads that are padded beyond it), train the student on texts that the teacher writes (sequence "
    "level), or compare sorted probabilities (ULD, arXiv 2402.12030)."
)


def top_k(*, top=(2, 3, 4), ids=(2, 3, 4), total=(2, 3), temperature=1.0):
    return token_soft_loss_top_k(
        ZEROS, torch.zeros(top), torch.zeros(ids, dtype=torch.long), torch.zeros(total), ALL, temperature=temperature
    )


WRONG = {
    "one text": (
        lambda: token_soft_loss(ZEROS[0], ZEROS[0], ALL[0], temperature=1.0),
        "student logits have shape (3, 7) and the mask (3,); give [B, L, V] and [B, L], for the same tokens of the "
        "same texts.",
    ),
    "mask of other tokens": (
        lambda: token_soft_loss(ZEROS, ZEROS, torch.ones(2, 4), temperature=1.0),
        "student logits have shape (2, 3, 7) and the mask (2, 4); give [B, L, V] and [B, L], for the same tokens of "
        "the same texts.",
    ),
    "teacher of other tokens": (
        lambda: token_soft_loss(ZEROS, ZEROS[:, :2], ALL, temperature=1.0),
        "teacher logits have shape (2, 2, 7) and the mask (2, 3); give [B, L, V] and [B, L], for the same tokens of "
        "the same texts.",
    ),
    "labels of other tokens": (
        lambda: token_hard_loss(ZEROS, torch.zeros(2, 2, dtype=torch.long)),
        "student logits have shape (2, 3, 7) and labels (2, 2); give [B, L, V] and [B, L], for the same tokens of the "
        "same texts.",
    ),
    "label out of range": (
        lambda: token_hard_loss(ZEROS, torch.full((2, 3), 7)),
        "label 7 is out of range; labels run from 0 to 6, or −100 for none.",
    ),
    "another vocabulary": (
        lambda: token_soft_loss(ZEROS, torch.zeros(2, 3, 32_000), ALL, temperature=1.0),
        OTHER_VOCABULARY,
    ),
    "another vocabulary of a head": (
        lambda: token_soft_loss(
            ZEROS, StatesAndHead(torch.zeros(2, 3, 5), torch.zeros(32_000, 5)), ALL, temperature=1.0
        ),
        OTHER_VOCABULARY,
    ),
    "head of another width": (
        lambda: token_hard_loss(
            StatesAndHead(torch.zeros(2, 3, 5), torch.zeros(7, 4)), torch.zeros(2, 3, dtype=torch.long)
        ),
        "the states have shape (2, 3, 5), the head's weight (7, 4); give [B, L, H] and [V, H].",
    ),
    "beta": (
        lambda: token_soft_loss(ZEROS, ZEROS, ALL, temperature=1.0, beta=1.5),
        "beta is 1.5; give a number between 0 (forward KL) and 1 (reverse KL).",
    ),
    "beta below 0": (
        lambda: token_soft_loss(ZEROS, ZEROS, ALL, temperature=1.0, beta=-0.1),
        "beta is -0.1; give a number between 0 (forward KL) and 1 (reverse KL).",
    ),
    "beta that is no number": (
        lambda: token_soft_loss(ZEROS, ZEROS, ALL, temperature=1.0, beta=math.nan),
        "beta is nan; give a number between 0 (forward KL) and 1 (reverse KL).",
    ),
    "temperature": (
        lambda: token_soft_loss(ZEROS, ZEROS, ALL, temperature=0.0),
        "temperature is 0.0; give a finite number greater than 0.",
    ),
    "temperature of top k": (
        lambda: top_k(temperature=math.inf),
        "temperature is inf; give a finite number greater than 0.",
    ),
    "top ids of another k": (
        lambda: top_k(ids=(2, 3, 5)),
        "top_logits have shape (2, 3, 4), top_ids (2, 3, 5) and log_total (2, 3); for this mask give [2, 3, 'k'], the "
        "same, and [2, 3], with k at most 7.",
    ),
    "totals of other tokens": (
        lambda: top_k(total=(2, 4)),
        "top_logits have shape (2, 3, 4), top_ids (2, 3, 4) and log_total (2, 4); for this mask give [2, 3, 'k'], the "
        "same, and [2, 3], with k at most 7.",
    ),
    "more than all": (
        lambda: top_k(top=(2, 3, 8), ids=(2, 3, 8)),
        "top_logits have shape (2, 3, 8), top_ids (2, 3, 8) and log_total (2, 3); for this mask give [2, 3, 'k'], the "
        "same, and [2, 3], with k at most 7.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused_in_a_sentence(name):
    call, sentence = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()
    assert len(sentence) <= 350


def test_a_beta_of_another_type_is_refused():
    for beta in ("0.5", True, None):
        with pytest.raises(TypeError, match=f"^beta is {beta!r}; give a number between"):
            token_soft_loss(ZEROS, ZEROS, ALL, temperature=1.0, beta=beta)


def test_the_losses_of_a_classifier_send_here():
    with pytest.raises(ValueError, match=r"For the logits of tokens, \[B, L, V\], use") as caught:
        distillation_loss(ZEROS, ZEROS, torch.zeros(2, 3, dtype=torch.long), temperature=1.0, alpha=0.5)
    for name in ("token_soft_loss", "token_hard_loss"):
        assert name in str(caught.value)
        assert callable(getattr(losses, name)), "the sentence sends a reader there"
    assert losses.__name__ in str(caught.value)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(context):
    states, weight = numbers(*MASK.shape, 4, seed=0), torch.nn.Parameter(numbers(7, 4, seed=1))
    teacher = numbers(*MASK.shape, 7, seed=2)
    expected = token_soft_loss(StatesAndHead(states, weight), teacher, MASK, temperature=2.0)
    assert expected.requires_grad
    with context():
        found = token_soft_loss(StatesAndHead(states, weight), teacher, MASK, temperature=2.0)
        assert not found.requires_grad
        assert torch.equal(found, expected)


def test_the_gradient_of_a_head_in_bfloat16_is_summed_in_float32():
    """Many chunks, each of which adds little: in bfloat16 most of them would be rounded away."""
    states, weight = numbers(1, 4000, 4, seed=0), numbers(7, 4, seed=1)
    teacher, mask = numbers(1, 4000, 7, seed=2), torch.ones(1, 4000)
    found = []
    for chunk in (1, 4000):
        head = weight.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            token_soft_loss(StatesAndHead(states, head), teacher, mask, temperature=1.0, chunk=chunk).backward()
        assert head.grad.dtype == torch.bfloat16
        found.append(head.grad.float())
    assert_close(found[0], found[1], rtol=0.02, atol=1e-3)


def test_the_gradient_of_a_loss_is_used_once():
    """It is handed out without a copy, so a second use would get the first one's factor as well."""
    student, teacher = (torch.randn(*MASK.shape, 7) for _ in range(2))
    loss = token_soft_loss(student.requires_grad_(), teacher, MASK, temperature=2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
