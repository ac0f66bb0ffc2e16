"""The made tasks of chapter 14: their rationales are right, and those of the controls wrong in the way they say."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kd_helpers.data import LABEL_NAMES
from kd_helpers.methods.reasoning_tasks import (
    HELD_OUT_NOUNS,
    LABELS,
    MATERIALS,
    NOUNS,
    QUALITIES,
    TASKS,
    TRAINING_NOUNS,
    WORLD,
    first_examples,
    first_tweets,
    held_out_tweets,
)

FACT = re.compile(r"(\w+) is (\w+), so it (.+?)\.")
STEP = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)\.")
COUNT = 600


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def test_the_world_can_be_asked_about():
    for quality in QUALITIES:
        have = sum(WORLD[material][quality.yes] for material in MATERIALS)
        assert 2 <= have <= len(MATERIALS) - 2, "or not every label could be right"


@pytest.mark.parametrize("task", TASKS)
def test_nouns_of_held_out_questions_are_new(task):
    assert len(set(NOUNS)) == len(NOUNS)
    assert set(HELD_OUT_NOUNS) | set(TRAINING_NOUNS) == set(NOUNS)
    asked, held_out = (
        set().union(*(words(example.question) for example in first_examples(task, COUNT, seed=0, held_out=of)))
        for of in (False, True)
    )
    new = {word for noun in HELD_OUT_NOUNS for word in (noun, f"{noun}s")}
    assert not asked & new
    assert len(held_out & new) > len(HELD_OUT_NOUNS) / 2


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_different_and_always_the_same(task):
    examples = first_examples(task, COUNT, seed=1)
    assert len({example.question for example in examples}) == COUNT
    assert first_examples(task, 100, seed=1) == examples[:100]
    other = first_examples(task, COUNT, seed=2)
    assert len({example.question for example in other} & {example.question for example in examples}) < COUNT / 10


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("facts", ["false", "random"])
def test_only_the_rationales_of_the_controls_differ(task, facts):
    true, other = (first_examples(task, COUNT, seed=0, facts=kind) for kind in ("true", facts))
    assert [example[:2] for example in other] == [example[:2] for example in true]
    same = sum(one.rationale == another.rationale for one, another in zip(true, other, strict=True)) / COUNT
    assert same == 0 if facts == "false" else same < 0.35


@pytest.mark.parametrize("facts", ["true", "false", "random"])
def test_rationales_about_materials(facts):
    right = Counter()
    for example in first_examples("knowledge", COUNT, seed=0, facts=facts):
        materials = re.findall(r"\bof (\w+)", example.question)
        place, does = re.search(r"of \w+ and a \w+ of \w+ (.+)\. which (.+)\?", example.question).groups()
        (quality, do), *more = [
            (quality, do)
            for quality in QUALITIES
            for where, verb, do in quality.events
            if (where, verb) == (place, does)
        ]
        assert not more
        told = FACT.findall(example.rationale)
        assert [material for material, *_ in told] == materials
        claims = []
        for material, word, does_it in told:
            claims.append(word == quality.yes)
            assert word in (quality.yes, quality.no)
            assert does_it == (does if claims[-1] else f"does not {do}")
            right[claims[-1] == WORLD[material][quality.yes]] += 1
        truth = tuple(WORLD[material][quality.yes] for material in materials)
        assert example.label == {(1, 1): "both", (1, 0): "first", (0, 1): "second", (0, 0): "neither"}[truth]
    share = right[True] / right.total()
    assert share == {"true": 1, "false": 0}.get(facts, pytest.approx(0.5, abs=0.06))


def test_labels_about_materials_are_balanced():
    counts = Counter(example.label for example in first_examples("knowledge", COUNT, seed=0))
    assert set(counts) == set(LABELS)
    assert all(abs(count - COUNT / 4) < 4 * (COUNT * 3 / 16) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("facts", ["true", "false", "random"])
def test_rationales_of_sums(facts):
    right = Counter()
    for example in first_examples("arithmetic", COUNT, seed=0, facts=facts):
        a, b, c = map(int, re.findall(r"\d+", example.question))
        first, then = STEP.findall(example.rationale)
        assert (first[0], first[2], then[2]) == (str(a), str(b), str(c))
        assert then[0] == first[3], "the second step goes on from the first"
        assert ("boxes" in example.question) == (first[1] == "*")
        compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        middle = compute[first[1]](a, b)
        result = compute[then[1]](middle, c)
        assert middle >= 1
        assert result >= 0
        assert example.label == str(result)
        if facts == "false":
            assert (first[3], then[3]) == (str(middle + 1), str(result + 1))
        right[(first[3], then[3]) == (str(middle), str(result))] += 1
    share = right[True] / COUNT
    assert share == {"true": 1, "false": 0}.get(facts, pytest.approx(0.0, abs=0.03))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"task": "history"}, "task is 'history'; give one of knowledge, arithmetic."),
        ({"facts": "some"}, "facts is 'some'; give one of true, false, random."),
    ],
)
def test_what_is_not_made_is_refused(asked, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        first_examples(**{"task": "knowledge", "count": 1, "seed": 0} | asked)


def test_tweets_to_learn_and_to_measure_with_are_different():
    learned = first_tweets(300)
    validation, test = held_out_tweets(50, 60)
    assert (len(learned), len(validation), len(test)) == (300, 50, 60)
    texts = [example.question for example in (*learned, *validation, *test)]
    assert len(set(texts)) == len(texts)
    assert {example.label for example in learned} == set(LABEL_NAMES)
