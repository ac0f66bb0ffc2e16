"""The cascade: who answers, and that its threshold keeps the agreement that it promises."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kd_helpers.cascade import cascade, choose_threshold, confidence


def random_pair(count: int, seed: int, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher, and of a student that resembles it."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(count, 3, generator=generator)
    return teacher + noise * torch.randn(count, 3, generator=generator), teacher


def test_the_student_answers_where_it_is_sure():
    student = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    answers = cascade(student, teacher, 0.9)
    assert answers.asked.tolist() == [False, True, False]
    assert answers.classes.tolist() == [0, 1, 1]
    assert cascade(student, teacher, math.inf).classes.tolist() == teacher.argmax(dim=-1).tolist()
    assert cascade(student, teacher, 0.0).classes.tolist() == student.argmax(dim=-1).tolist()
    assert confidence(student)[1] == pytest.approx(math.exp(0.1) / (1 + math.exp(0.1)))


@given(seed=st.integers(0, 1000), count=st.integers(1, 120), target=st.sampled_from([0.5, 0.8, 0.95]))
def test_the_threshold_is_the_lowest_that_the_bound_allows(seed, count, target):
    student, teacher = random_pair(count, seed)
    chosen = choose_threshold(student, teacher, target=target, certainty=0.9)
    allowed = []
    for threshold in [*confidence(student).tolist(), math.inf]:  # one by one, by the definition
        wrong = int((cascade(student, teacher, threshold).classes != teacher.argmax(dim=-1)).sum())
        bound = stats.beta.ppf(0.9, wrong + 1, count - wrong) if wrong < count else 1.0
        if bound <= 1 - target or threshold == math.inf:
            allowed.append(threshold)
    assert chosen == min(allowed)


def test_texts_of_one_confidence_are_answered_together():
    student = torch.zeros(400, 2)
    student[:, 0] = 1.0
    teacher = student.clone()
    teacher[300:] = torch.tensor([0.0, 1.0])
    assert choose_threshold(student, teacher, target=0.9) == math.inf
    assert choose_threshold(student, teacher, target=0.6) == float(confidence(student)[0])


def test_a_few_texts_are_not_enough_to_be_certain():
    student, _ = random_pair(20, 0)
    assert choose_threshold(student, student, target=0.99) == math.inf
    assert choose_threshold(student, student, target=0.7) < math.inf


def test_a_target_of_97_percent_needs_as_many_texts_as_the_docs_say():
    logits = torch.randn(152, 3, generator=torch.Generator().manual_seed(0))
    assert choose_threshold(logits[:-1], logits[:-1], target=0.97) == math.inf
    assert choose_threshold(logits, logits, target=0.97) < math.inf


def test_the_promise_is_kept():
    """The true agreement lies below the target in at most 5% of draws when the certainty is 95%; here of 200."""
    population = random_pair(200_000, 1)
    broken = 0
    for seed in range(200):
        drawn = torch.randint(200_000, (500,), generator=torch.Generator().manual_seed(seed))
        threshold = choose_threshold(*(logits[drawn] for logits in population), target=0.9, certainty=0.95)
        answers = cascade(*population, threshold)
        broken += float((answers.classes == population[1].argmax(dim=-1)).float().mean()) < 0.9
    assert 1 <= broken <= 18  # binomial with 200 draws at 5%: more in one of 100 times


@pytest.mark.parametrize(("name", "value"), [("target", 1.0), ("target", 0.0), ("certainty", 1.0), ("certainty", -1)])
def test_a_share_outside_its_range_is_refused(name, value):
    student, teacher = random_pair(10, 0)
    with pytest.raises(ValueError, match=f"^{name} is {value}; give a share between 0 and 1"):
        choose_threshold(student, teacher, **{"target": 0.9, name: value})


def test_a_student_whose_confidence_is_no_number_is_not_believed():
    student = torch.tensor([[math.nan, 0.0], [9.0, 0.0]])
    answers = cascade(student, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 0.5)
    assert answers.asked.tolist() == [True, False]
    assert answers.classes.tolist() == [1, 0]


@pytest.mark.parametrize("question", [partial(cascade, threshold=0.5), partial(choose_threshold, target=0.9)])
def test_both_models_must_have_seen_the_same_texts(question):
    with pytest.raises(ValueError, match=r"student logits have shape \(4, 3\) but teacher logits \(1, 3\)"):
        question(torch.zeros(4, 3), torch.zeros(1, 3))
