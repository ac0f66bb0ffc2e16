"""Checks of exercises refuse answers that are nearly right. (That they accept the solution, every notebook shows.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from scipy import stats

from kd_helpers.course.notebooks import notebook_paths


def check_of(chapter: str, name: str) -> Callable[..., None]:
    """The check `name` of a chapter, made from the source of its cell."""
    path = next(path for path in notebook_paths() if path.stem.startswith(chapter))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if f"def {name}(" in cell.source]
    (source,) = cells
    made: dict[str, Any] = {"torch": torch, "np": np, "stats": stats, "Callable": Callable}
    exec(source.partition("\nattempt(")[0], made)
    return made[name]


def pooled(a, b):
    """Student's interval of two samples, which takes their variances as equal."""
    intervals = [test(a, b).confidence_interval() for test in (stats.ttest_rel, stats.ttest_ind)]
    return tuple((interval.high - interval.low) / 2 for interval in intervals)


def without_a_lower_end(gained, lost, n):
    mean = (gained - lost) / n
    half = 1.96 * math.sqrt(((gained + lost) / n - mean**2) / n)
    return 100 * mean, -99.0, 100 * (mean + half)


def turned_round(logits, generator):
    """The others keep their order and are turned by a random number of places."""
    ranked, classes = logits.sort(dim=-1, descending=True)
    others = ranked.shape[1] - 1
    turns = torch.randint(0, others, (len(ranked), 1), generator=generator)
    places = (torch.arange(others) + turns) % others
    return torch.zeros_like(logits).scatter(-1, classes, torch.cat([ranked[:, :1], ranked[:, 1:].gather(1, places)], 1))


def relations(student, teacher, mask, *, divided: bool = True) -> torch.Tensor:
    """KL of every row and head `[B, L, A]`."""
    keys = mask.bool()[:, None, None, :]

    def log_relation(values):
        scores = values @ values.mT / (values.shape[-1] ** 0.5 if divided else 1)
        return scores.masked_fill(~keys, -torch.inf).log_softmax(dim=-1)

    log_p, log_q = log_relation(teacher), log_relation(student)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~keys, 0).sum(dim=-1).transpose(1, 2)


def undivided(student, teacher, mask):
    return relations(student, teacher, mask, divided=False)[mask.bool()].mean()


def summed_over_heads(student, teacher, mask):
    return relations(student, teacher, mask)[mask.bool()].sum(dim=-1).mean()


def mean_of_texts(student, teacher, mask):
    rows = relations(student, teacher, mask)
    return torch.stack([of_text[real].mean() for of_text, real in zip(rows, mask.bool(), strict=True)]).mean()


@pytest.mark.parametrize(
    ("chapter", "check", "answer", "said"),
    [
        ("06", "check_half_widths", pooled, "Welch's interval allows two variances"),
        ("08", "check_change_of_accuracy", without_a_lower_end, "the interval is symmetric around the change"),
        ("10", "check_shuffle_the_rest", turned_round, "all six orders of the other three must occur"),
        ("12", "check_value_relation_loss", undivided, "divide by √d"),
        ("12", "check_value_relation_loss", summed_over_heads, "average over all heads and real tokens"),
        ("12", "check_value_relation_loss", mean_of_texts, "average over all heads and real tokens"),
    ],
)
def test_an_answer_that_is_nearly_right_is_refused(chapter, check, answer, said):
    with pytest.raises(AssertionError, match=said):
        check_of(chapter, check)(answer)
