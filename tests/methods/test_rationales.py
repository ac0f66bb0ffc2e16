"""Distilling step by step: batches of two tasks, the loss, what is measured and written, and examples from a file."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_bert
from torch.testing import assert_close
from transformers import PreTrainedModel

from kd_helpers import artifacts
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.methods import rationales
from kd_helpers.methods.rationales import (
    BLANK,
    LABEL,
    RATIONALE,
    Example,
    cached_explanations,
    explained_first,
    load_seq2seq,
    make_seq2seq,
    measure,
    measured_batches,
    question_tokenizer,
    read_examples,
    split_answer,
    split_examples,
    step_by_step_loss,
    task_batches,
    train_seq2seq,
    with_blanks,
    write_targets,
)
from kd_helpers.models import freeze, weights_digest

COLOURS = ("red", "blue", "green")
EXAMPLES = [
    Example(f"the {colour} {thing} of {owner}. what colour?", colour, f"{owner} says that the {thing} is {colour}.")
    for colour in COLOURS
    for thing in ("hat", "cup", "old grey boat")
    for owner in ("anna", "ben")
]


@pytest.fixture(scope="module")
def tokenizer():
    return question_tokenizer([text for example in EXAMPLES for text in (*example, LABEL, RATIONALE)], vocabulary=320)


def tiny(tokenizer, *, seed: int = 0) -> PreTrainedModel:
    return make_seq2seq(tokenizer, width=32, encoder_layers=1, seed=seed)


@pytest.fixture(scope="module")
def taught(tokenizer) -> PreTrainedModel:
    """A student that has learned some of both tasks, but not all."""
    model = tiny(tokenizer)
    train_seq2seq(model, task_batches(EXAMPLES, tokenizer, 6, seed=0), steps=60, learning_rate=1e-2, description=None)
    return freeze(model)


# --- the model ---


def test_the_tokenizer_ends_a_text_and_gives_it_back(tokenizer):
    ids = tokenizer("the red hat")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the red hat"


def test_a_model_depends_on_its_seed_alone(tokenizer):
    state = torch.get_rng_state()
    one, other = tiny(tokenizer), tiny(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_digest(one) == weights_digest(tiny(tokenizer)) != weights_digest(other)
    assert one.config.decoder_start_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"width": 40}, "width is 40; give a multiple of 16, since each head has 16 numbers."),
        ({"width": 0}, "width is 0; give a whole number of at least 1."),
        ({"decoder_layers": 0}, "decoder_layers is 0; give a whole number of at least 1."),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(tokenizer, sizes, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make_seq2seq(tokenizer, seed=0, **sizes)


def test_a_checkpoint_in_a_folder_comes_back(tokenizer, taught, tmp_path):
    taught.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_seq2seq(str(tmp_path))
    assert weights_digest(loaded.model) == weights_digest(taught)
    questions = [example.question for example in EXAMPLES]
    assert write_targets(loaded.model, loaded.tokenizer, questions) == write_targets(taught, tokenizer, questions)


def test_another_kind_of_checkpoint_is_refused(tokenizer, tmp_path):
    tiny_bert(classes=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of the kind bert, which is no encoder-decoder; take one such as google/"):
        load_seq2seq(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tokenizer, taught, tmp_path):
    taught.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_layers": 2}))
    with pytest.raises(ValueError, match=r"lacks weights \(encoder\.block\.1\..*\); take a checkpoint that is whole\."):
        load_seq2seq(str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(taught, tmp_path):
    taught.save_pretrained(tmp_path)
    question_tokenizer([f"{number} words" for number in range(500)], vocabulary=340).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows 343 tokens, the model \d+; use the tokenizer that the model"):
        load_seq2seq(str(tmp_path))


# --- batches ---


def decoded(tokenizer, ids: torch.Tensor) -> list[str]:
    ids = ids.masked_fill(ids == IGNORE_INDEX, tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_a_batch_has_both_tasks_of_the_same_examples(tokenizer):
    of_question = {example.question: example for example in EXAMPLES}
    seen = []
    for batch in task_batches(EXAMPLES, tokenizer, 4, seed=0):
        labels, reasons = batch["label"], batch["rationale"]
        questions = [text.removeprefix(f"{LABEL} ") for text in decoded(tokenizer, labels["input_ids"])]
        assert decoded(tokenizer, reasons["input_ids"]) == [f"{RATIONALE} {question}" for question in questions]
        assert decoded(tokenizer, labels["labels"]) == [of_question[question].label for question in questions]
        assert decoded(tokenizer, reasons["labels"]) == [of_question[question].rationale for question in questions]
        for part in (labels, reasons):
            assert torch.equal(part["attention_mask"] == 0, part["input_ids"] == tokenizer.pad_token_id)
            ends = (part["labels"] == tokenizer.eos_token_id).sum(dim=1)
            assert ends.tolist() == [1] * len(questions), "every target ends"
        seen += questions
    assert sorted(seen) == sorted(of_question)


def test_what_has_no_rationale_is_learned_as_a_label(tokenizer):
    some = [EXAMPLES[0], EXAMPLES[1]._replace(rationale=""), EXAMPLES[2]]
    (batch,) = task_batches(some, tokenizer, 4, seed=0)
    assert len(batch["label"]["labels"]) == 3
    assert sorted(decoded(tokenizer, batch["rationale"]["labels"])) == sorted([some[0].rationale, some[2].rationale])
    (batch,) = task_batches([some[1]], tokenizer, 4, seed=0)
    assert batch["rationale"] is None


def test_the_order_depends_on_seed_and_epoch(tokenizer):
    def order(seed: int, epoch: int) -> list[str]:
        batches = task_batches(EXAMPLES, tokenizer, 4, seed=seed)
        batches.batch_sampler.set_epoch(epoch)
        return [text for batch in batches for text in decoded(tokenizer, batch["label"]["input_ids"])]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_long_texts_are_cut_and_still_end(tokenizer):
    long = Example("why " * 200, "red", "because " * 200)
    (batch,) = task_batches([long], tokenizer, 1, seed=0, max_length=20)
    for part in batch.values():
        assert part["input_ids"].shape[1] == 20
        assert part["input_ids"][0, -1] == tokenizer.eos_token_id
    assert batch["rationale"]["labels"].shape[1] == 20


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ([], "there are no examples; give at least one."),
        ([EXAMPLES[0], EXAMPLES[1]._replace(label="")], "1 of 2 examples have no label; leave them out."),
    ],
)
def test_examples_that_cannot_be_learned_are_refused(tokenizer, examples, sentence):
    for make in (lambda: task_batches(examples, tokenizer, seed=0), lambda: measured_batches(examples, tokenizer)):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            make()


# --- the loss ---


def reference(model: PreTrainedModel, tokenizer, examples: list[Example], task: str) -> float:
    """Nats a token in float64, one example at a time, from the transformers' own shift of the targets."""
    summed, count = 0.0, 0
    for example in examples:
        target = example.label if task == LABEL else example.rationale
        source = torch.tensor([tokenizer(f"{task} {example.question}")["input_ids"]])
        ids = torch.tensor([tokenizer(target)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=source, labels=ids).logits.double()
        summed += F.cross_entropy(logits[0], ids[0], reduction="sum").item()
        count += ids.shape[1]
    return summed / count


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_the_loss_is_label_plus_weighted_rationale(tokenizer, taught, weight):
    some = EXAMPLES[3:9]
    (batch,) = task_batches(some, tokenizer, len(some), seed=0)
    loss = step_by_step_loss(taught, rationale_weight=weight)(batch)
    label, rationale = (reference(taught, tokenizer, some, task) for task in (LABEL, RATIONALE))
    assert loss.label.item() == pytest.approx(label, rel=1e-4)
    assert loss.rationale.item() == pytest.approx(rationale if weight else 0.0, rel=1e-4)
    assert loss.total.item() == pytest.approx(label + weight * rationale, rel=1e-4)
    assert all(part.dtype == torch.float32 and part.shape == () for part in loss)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_the_weights_of_the_authors_code_are_the_same_loss_but_for_a_factor(tokenizer, alpha):
    (batch,) = task_batches(EXAMPLES[:6], tokenizer, 6, seed=0)
    ours, theirs = tiny(tokenizer), tiny(tokenizer)
    (alpha * step_by_step_loss(ours, rationale_weight=(1 - alpha) / alpha)(batch).total).backward()
    parts = step_by_step_loss(theirs)(batch)
    (alpha * parts.label + (1 - alpha) * parts.rationale).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_weight_of_0_does_not_read_the_rationales(tokenizer):
    model, batches = tiny(tokenizer), task_batches(EXAMPLES, tokenizer, 6, seed=0)
    reads = []
    model.register_forward_hook(lambda *_: reads.append(1))
    step_by_step_loss(model, rationale_weight=0.0)(next(iter(batches)))
    assert len(reads) == 1
    step_by_step_loss(model)(next(iter(batches)))
    assert len(reads) == 3


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_that_makes_no_sense_is_refused(taught, weight):
    with pytest.raises(ValueError, match=r"^rationale_weight is .*; give a number of at least 0\.$"):
        step_by_step_loss(taught, rationale_weight=weight)


# --- training ---


def test_training_is_the_same_for_the_same_seed_and_after_a_resume(tokenizer, tmp_path):
    def batches():
        return task_batches(EXAMPLES, tokenizer, 6, seed=0)

    whole, again, resumed = (tiny(tokenizer) for _ in range(3))
    train_seq2seq(whole, batches(), steps=10, description=None)
    train_seq2seq(again, batches(), steps=10, description=None)
    assert weights_digest(again) == weights_digest(whole)

    class StoppedError(Exception):
        pass

    def stop(step: int) -> None:
        if step == 7:
            raise StoppedError

    options = {"steps": 10, "checkpoints": tmp_path, "checkpoint_steps": 2, "description": None}
    with pytest.raises(StoppedError):
        train_seq2seq(resumed, batches(), after_step=stop, **options)
    fresh = tiny(tokenizer, seed=5)
    progress = train_seq2seq(fresh, batches(), **options)
    assert weights_digest(fresh) == weights_digest(whole)
    assert set(progress.history[-1]["losses"]) == {"total", "label", "rationale", "gradient_norm"}


# --- measuring and writing ---


def test_what_is_measured_is_what_would_be_written(tokenizer, taught):
    questions = [example.question for example in EXAMPLES]
    accuracies = []
    for task, name in ((LABEL, "label"), (RATIONALE, "rationale")):
        written = write_targets(taught, tokenizer, questions, task=task)
        exact = [text == getattr(example, name) for text, example in zip(written, EXAMPLES, strict=True)]
        for batch_size in (1, 5, 100):
            scores = measure(taught, measured_batches(EXAMPLES, tokenizer, batch_size), name)
            assert scores.accuracy == pytest.approx(sum(exact) / len(exact))
            assert scores.nats == pytest.approx(reference(taught, tokenizer, EXAMPLES, task), rel=1e-4)
        accuracies.append(sum(exact) / len(exact))
    assert accuracies[0] > 0.5
    assert min(accuracies) < 1, "something is still to be learned, or this test could not fail"


def test_nothing_to_measure_is_said(tokenizer, taught):
    batches = measured_batches([example._replace(rationale="") for example in EXAMPLES], tokenizer)
    with pytest.raises(ValueError, match=r"^no example has a rationale, so there is nothing to measure; give some"):
        measure(taught, batches, "rationale")


def test_answers_come_in_the_order_of_the_questions_and_leave_the_model_as_it_was(tokenizer, taught):
    model = copy.deepcopy(taught).train()
    questions = [example.question for example in EXAMPLES]
    together = write_targets(model, tokenizer, questions, batch_size=7)
    assert model.training
    assert together == [write_targets(taught, tokenizer, [question])[0] for question in questions]
    assert write_targets(model, tokenizer, questions[::-1], batch_size=5) == together[::-1]
    measure(model, measured_batches(EXAMPLES, tokenizer))
    assert model.training


# --- the rationale first ---


def test_a_rationale_first_is_split_again():
    chain = explained_first(EXAMPLES[0])
    assert chain.label == f"{EXAMPLES[0].rationale} so the answer is {EXAMPLES[0].label}"
    assert chain.rationale == ""
    assert split_answer(chain.label) == (EXAMPLES[0].rationale, EXAMPLES[0].label)
    assert split_answer("it goes on and on") == ("it goes on and on", "")
    assert split_answer("") == ("", "")
    assert split_answer("so the answer is red, so the answer is blue") == ("so the answer is red,", "blue")


def test_without_a_rationale_none_comes_first():
    with pytest.raises(ValueError, match=r"^the question 'why\?' has no rationale to begin with\.$"):
        explained_first(Example("why?", "so"))


@pytest.fixture(scope="module")
def explaining(tokenizer) -> PreTrainedModel:
    model = tiny(tokenizer)
    chains = [explained_first(example) for example in EXAMPLES]
    train_seq2seq(model, task_batches(chains, tokenizer, 6, seed=0), steps=150, learning_rate=1e-2, description=None)
    return freeze(model)


def test_explanations_are_cached_and_an_interrupted_pass_goes_on(own_artifacts, monkeypatch, tokenizer, explaining):
    questions = [example.question for example in EXAMPLES]
    asked = []
    real = write_targets

    def spied(model, tokenizer, some, **options):
        asked.append(len(some))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, some, **options)

    monkeypatch.setattr(rationales, "SHARD", 5)
    monkeypatch.setattr(rationales, "write_targets", spied)
    with pytest.raises(KeyboardInterrupt):
        cached_explanations(explaining, tokenizer, questions)
    found = cached_explanations(explaining, tokenizer, questions)
    assert asked == [5, 5, 5, 5, 3], "the first two parts were kept"
    assert cached_explanations(explaining, tokenizer, questions) == found
    assert len(asked) == 5
    assert [example.question for example in found] == questions
    written = real(explaining, tokenizer, questions)
    assert [(example.rationale, example.label) for example in found] == list(map(split_answer, written))
    assert sum(said.label == true.label for said, true in zip(found, EXAMPLES, strict=True)) > len(EXAMPLES) / 2
    assert not list((artifacts.artifacts_dir() / "checkpoints").iterdir())


def test_blanks_are_filled_with_the_words_that_were_left_out(tokenizer):
    texts = [example.question for example in EXAMPLES]
    examples = with_blanks(texts, seed=0)
    assert [example.label for example in examples] == texts
    words = blanks = 0
    for example in examples:
        pairs = list(zip(example.question.split(" "), example.label.split(" "), strict=True))
        assert all(shown in (word, BLANK) for shown, word in pairs)
        words, blanks = words + len(pairs), blanks + sum(shown == BLANK for shown, _ in pairs)
    assert 0.2 < blanks / words < 0.4
    assert with_blanks(texts, seed=0) == examples != with_blanks(texts, seed=1)
    assert with_blanks(texts, seed=0, share=0.0) == [Example(text, text) for text in texts]
    assert len(tokenizer(f"{LABEL} {BLANK} {RATIONALE}")["input_ids"]) in (4, 6), "a token each, with spaces or not"


def test_another_teacher_or_another_question_is_explained_anew(own_artifacts, tokenizer, explaining, monkeypatch):
    questions = [example.question for example in EXAMPLES[:4]]
    calls = []
    real = write_targets
    monkeypatch.setattr(rationales, "write_targets", lambda *a, **b: calls.append(1) or real(*a, **b))
    for count, (model, some, tokens) in enumerate(
        [
            (explaining, questions, 30),
            (explaining, questions[::-1], 30),
            (explaining, questions, 31),
            (freeze(tiny(tokenizer, seed=9)), questions, 30),
        ],
        start=1,
    ):
        cached_explanations(model, tokenizer, some, new_tokens=tokens)
        assert len(calls) == count


def test_a_teacher_in_train_mode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="train mode"):
        cached_explanations(tiny(tokenizer).train(), tokenizer, ["why?"])


# --- examples from elsewhere ---


def test_examples_of_a_file_a_practitioner_would_have(tmp_path):
    file = tmp_path / "tickets.csv"
    file.write_text(
        "id,message,team,why\n"
        '1,"My card was charged twice, please help",billing,"The writer was charged twice, so billing must look."\n'
        "2,The app crashes when I log in,technical,A crash is a technical fault.\n"
        "3,the app crashes  when I log in,technical,Another copy of it.\n"
        "4,Do you open on Sunday?,other,\n"
    )
    columns = {"text_column": "message", "label_column": "team", "rationale_column": "why"}
    assert read_examples(str(file), **columns) == [
        Example(
            "My card was charged twice, please help",
            "billing",
            "The writer was charged twice, so billing must look.",
        ),
        Example("The app crashes when I log in", "technical", "A crash is a technical fault."),
        Example("Do you open on Sunday?", "other", ""),
    ]


def test_labels_that_are_numbers(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text(
        '{"text": "1 + 1?", "label": 2, "rationale": "one more"}\n{"text": "2 + 1?", "label": 3.0, "rationale": null}\n'
    )
    assert read_examples(str(file)) == [Example("1 + 1?", "2", "one more"), Example("2 + 1?", "3", "")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "text,label\na,b\n",
            "f.csv has no column 'rationale' but 'text', 'label'; name the right one as rationale_column.",
        ),
        (
            "text,rationale\na,b\n",
            "f.csv has no column 'label' but 'text', 'rationale'; name the right one as label_column.",
        ),
        ("text,label,rationale\na,,c\n", "f.csv, line 2: there is no label; give one, or remove the row."),
        ("text,label,rationale\na,b,c\n,b,c\n", "f.csv, line 3: there is no text; give one, or remove the row."),
        (
            "text,label,rationale\nHello,b,c\nhello,d,c\n",
            "f.csv, line 3: the text 'hello' has the label 'd', a copy of it 'b'; keep the right one.",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, content, sentence):
    (tmp_path / "f.csv").write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_examples(str(tmp_path / "f.csv"))


def test_the_split_does_not_depend_on_the_order_of_the_file():
    learned, held_out = split_examples(EXAMPLES, held_out=5)
    assert len(held_out) == 5
    assert sorted(learned + held_out) == sorted(EXAMPLES)
    assert split_examples(EXAMPLES[::-1], held_out=5) == (learned, held_out)
    with pytest.raises(ValueError, match=r"^held_out is 18, there are 18 examples; give fewer than that\.$"):
        split_examples(EXAMPLES, held_out=18)
