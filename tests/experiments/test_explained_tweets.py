"""The explanations of a real language model: what it is asked, what is kept of its answers, and what is stored."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest
import torch

from kd_helpers.data import LABEL_NAMES
from kd_helpers.experiments import explained_tweets as et
from kd_helpers.experiments import story_writer
from kd_helpers.experiments.explained_tweets import OPENING, SHOWN, clean, conversation, explain, main, store
from kd_helpers.experiments.story_writer import Writer
from kd_helpers.methods import reasoning_tasks
from kd_helpers.methods.rationales import Example
from kd_helpers.methods.reasoning_tasks import EXPLANATIONS, explained_tweets, first_tweets

TWEETS = [Example("what a day", "positive"), Example("rain", "neutral"), Example("late again", "negative")]


class Model:
    device = torch.device("cpu")


WRITER = Writer(Model(), None, "0" * 64)


def test_a_request_shows_one_example_of_each_label_and_ends_with_the_tweet():
    messages = conversation("what a day", "positive")
    assert {shown.label for shown in SHOWN} == set(LABEL_NAMES)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert messages[-1]["content"] == "Tweet: what a day\nSentiment: positive\nExplain in one short sentence."
    for shown, answer in zip(SHOWN, messages[2:-1:2], strict=True):
        assert answer["content"] == f"The tweet is {shown.label} because {shown.rationale}"


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("The tweet is neutral because it says nothing. It really does.", "it says nothing."),
        ("The tweet is neutral because of 3.5 apples!", "of 3.5 apples!"),
        ("The tweet is neutral because it goes on", ""),
        ("The tweet is neutral because it says\nnothing.", ""),
        ("The tweet is neutral because it is très bien.", ""),
        (None, ""),
    ],
)
def test_the_first_sentence_is_kept(answer, kept):
    assert clean(answer, "neutral") == kept


@pytest.fixture
def answered(own_artifacts, monkeypatch) -> list[int]:
    """A model that answers every tweet but neutral ones; the seeds it was asked with."""
    asked = []

    def answers(writer, conversations, openings, *, seed, sampling):
        asked.append(seed)
        assert sampling == et.SAMPLING
        assert openings == [OPENING.format(label=tweet.label) for tweet in TWEETS[: len(openings)]]
        return [None if "neutral" in opening else f"{opening} it says so. Yes." for opening in openings]

    monkeypatch.setattr(story_writer, "answers", answers)
    return asked


def test_a_part_is_written_once(answered):
    found = explain(WRITER, TWEETS, 4)
    assert found["answers"] == [
        "The tweet is positive because it says so. Yes.",
        None,
        "The tweet is negative because it says so. Yes.",
    ]
    assert explain(WRITER, TWEETS, 4) == found
    assert answered == [4]
    explain(WRITER, TWEETS[:2], 4)
    assert answered == [4, 4], "another tweet is another part"


def test_what_is_stored_can_be_read(answered, monkeypatch, tmp_path):
    monkeypatch.setattr(reasoning_tasks, "EXPLANATIONS", tmp_path / "some.jsonl.gz")
    about = store(WRITER, TWEETS, [explain(WRITER, TWEETS, 0)])
    assert about["counts"] == {"tweets": 3, "explained": 2}
    assert about == json.loads((tmp_path / "some.json").read_text())
    assert explained_tweets() == [
        tweet._replace(rationale="" if tweet.label == "neutral" else "it says so.") for tweet in TWEETS
    ]
    first = (tmp_path / "some.jsonl.gz").read_bytes()
    store(WRITER, TWEETS, [explain(WRITER, TWEETS, 0)])
    assert (tmp_path / "some.jsonl.gz").read_bytes() == first, "always the same bytes"


def test_the_stored_explanations_are_those_of_the_packaged_tweets():
    about = json.loads(EXPLANATIONS.with_name("smollm2_explanations.json").read_text())
    content = EXPLANATIONS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == about["sha256"]
    gzip.decompress(content).decode("ascii")
    stored = explained_tweets()
    assert [example._replace(rationale="") for example in stored] == first_tweets(len(stored))
    assert about["counts"] == {"tweets": len(stored), "explained": sum(bool(example.rationale) for example in stored)}
    assert about["counts"]["explained"] > 0.95 * len(stored)
    assert about["request"]["shown"] == [shown._asdict() for shown in SHOWN]
    assert about["sampling"] == et.SAMPLING._asdict()


def test_the_command(answered, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reasoning_tasks, "EXPLANATIONS", tmp_path / "some.jsonl.gz")
    monkeypatch.setattr(et, "PART_SIZE", 2)
    monkeypatch.setattr(reasoning_tasks, "first_tweets", lambda count: TWEETS[:count])
    monkeypatch.setattr(story_writer, "load_smollm2", lambda device: WRITER)
    assert main(["--tweets", "2"]) == 0
    assert capsys.readouterr().out == f"1 of 2 tweets were explained, written to {tmp_path / 'some.jsonl.gz'}\n"
    assert answered == [0]


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(story_writer.importlib.util, "find_spec", lambda name: None)
    for arguments, sentence in (
        ([], "SmolLM2-135M needs the package gguf, which is not installed"),
        (["--tweets", "0"], "tweets is 0; give a whole number of at least 1."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err
