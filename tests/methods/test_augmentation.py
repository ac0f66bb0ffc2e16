"""Augmentation: which words are replaced, by what, and that no held-out text comes out of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from kd_helpers.methods import augmentation
from kd_helpers.methods.augmentation import augmented_texts, candidate_words, replace_words, replaceable_words, whole_words
from kd_helpers.data import duplicate_key, require_disjoint
from kd_helpers.losses import IGNORE_INDEX

TEXTS = ["@user Deflategate is great, isn't it? #NFL http", "Watching the snowboarders again", "I'm ok @user"]


@pytest.fixture(scope="module")
def language(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape))
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # so that contexts tell candidates apart
    return model.eval()


@pytest.fixture
def few(splits):
    return dataclasses.replace(splits, train=splits.train.select(range(6)))


def spans(text: str, *words: str) -> list[tuple[int, int]]:
    return [(text.index(word), text.index(word) + len(word)) for word in words]


def test_only_plain_words_are_replaced(tokenizer):
    found = replaceable_words(TEXTS, tokenizer, 128)
    assert [(w.start, w.end) for w in found[0][1]] == spans(TEXTS[0], "Deflategate", "is", "great", "it")
    assert [(w.start, w.end) for w in found[2][1]] == spans(TEXTS[2], "ok")
    for ids, words in found:
        for word in words:
            pieces = tokenizer.convert_ids_to_tokens([ids[token] for token in word.tokens])
            assert all(piece.startswith("##") for piece in pieces[1:])


def test_a_word_that_was_cut_off_stays(tokenizer):
    (_, words), *_ = replaceable_words([TEXTS[1]], tokenizer, 4)  # [CLS] watching the [SEP]
    assert [(w.start, w.end) for w in words] == spans(TEXTS[1], "Watching", "the")


def test_single_pieces_are_ranked_by_the_language_model(tokenizer, language):
    """Against Algorithm 1, line by line: one word masked, the text alone in its batch."""
    count, vocabulary = 4, whole_words(tokenizer)
    found = candidate_words(TEXTS, language, tokenizer, count=count)
    compared = 0
    for text, candidates in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        for (start, end), words in candidates.items():
            own = tokenizer(text[start:end].lower(), add_special_tokens=False)["input_ids"]
            if len(own) > 1:
                continue
            masked = torch.tensor([[tokenizer.mask_token_id if i == own[0] else i for i in ids]])
            with torch.no_grad():
                scores = language(input_ids=masked).logits[masked == tokenizer.mask_token_id][0]
            ranked = sorted(vocabulary, key=lambda word: -scores[vocabulary[word]].item())
            assert words == [word for word in ranked if word != text[start:end].lower()][:count]
            compared += 1
    assert compared >= 6


def test_several_pieces_are_compared_by_their_embeddings(tokenizer, language):
    text, word = TEXTS[1], "snowboarders"
    (found,) = candidate_words([text], language, tokenizer, count=3)
    pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    table = language.get_input_embeddings().weight
    own = table[pieces].mean(dim=0)
    vocabulary = whole_words(tokenizer)
    cosine = {w: torch.cosine_similarity(own, table[i], dim=0).item() for w, i in vocabulary.items()}
    assert list(found[spans(text, word)[0]]) == sorted(cosine, key=cosine.get, reverse=True)[:3]


def test_what_stands_for_a_link_is_no_word(tokenizer):
    assert "http" in tokenizer.get_vocab()
    assert "http" not in whole_words(tokenizer)


def test_the_word_itself_is_no_candidate(tokenizer, language):
    for text, candidates in zip(TEXTS, candidate_words(TEXTS, language, tokenizer, count=50), strict=True):
        for (start, end), words in candidates.items():
            assert len(words) == 50
            assert text[start:end].lower() not in words


@pytest.mark.parametrize("probability", [0.2, 0.9])
def test_words_are_replaced_with_the_probability(probability):
    text = " ".join(["old"] * 50)
    candidates = {(4 * i, 4 * i + 3): ["newer", "x"] for i in range(50)}
    generator = np.random.default_rng(0)
    copies = [replace_words(text, candidates, probability=probability, generator=generator).split() for _ in range(80)]
    replaced = np.mean([word != "old" for copy in copies for word in copy])
    assert abs(replaced - probability) < 4 * np.sqrt(probability * (1 - probability) / 4000)
    assert {word for copy in copies for word in copy} == {"old", "newer", "x"}
    assert all(len(copy) == 50 for copy in copies), "each in its own place"


def test_copies_have_no_label_and_are_like_no_other_text(own_artifacts, few, tokenizer, language):
    made = augmented_texts(few, language, tokenizer, copies=3, count=5)
    assert 6 < len(made) <= 18
    assert set(made["label"][:]) == {IGNORE_INDEX}
    assert len(set(made["id"][:])) == len(made)
    require_disjoint(dataclasses.replace(few, transfer=made))
    assert not set(made["id"][:]) & set(few.train["id"][:])
    again = augmented_texts(few, language, tokenizer, copies=3, count=5)
    assert again["text"][:] == made["text"][:]
    assert augmented_texts(few, language, tokenizer, copies=3, count=5, seed=1)["text"][:] != made["text"][:]


def test_a_copy_that_is_a_held_out_text_is_left_out(own_artifacts, few, tokenizer, language, monkeypatch):
    held_out = few.test["text"][0]
    monkeypatch.setattr(augmentation, "replace_words", lambda text, *_, **__: f"@someone {text}")
    assert len(augmented_texts(few, language, tokenizer, copies=1, count=1)) == 6
    monkeypatch.setattr(augmentation, "replace_words", lambda *_, **__: held_out.upper())
    made = augmented_texts(few, language, tokenizer, copies=2, count=2)
    assert duplicate_key(held_out) not in map(duplicate_key, made["text"][:])
    assert len(made) == 0


def test_it_is_made_once(own_artifacts, few, tokenizer, language, monkeypatch):
    augmented_texts(few, language, tokenizer, copies=1, count=2)
    monkeypatch.setattr(augmentation, "candidate_words", None)
    augmented_texts(few, language, tokenizer, copies=1, count=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"copies": 0}, "copies is 0; give a whole number of at least 1."),
        ({"probability": 0.0}, "probability is 0.0; give a number above 0 and at most 1."),
        ({"probability": 1.2}, "probability is 1.2; give a number above 0 and at most 1."),
        ({"count": 0}, "count is 0; give a whole number from 1 to "),
    ],
)
def test_choices_that_make_no_sense(own_artifacts, few, tokenizer, language, changes, sentence):
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        augmented_texts(few, language, tokenizer, **{"copies": 1} | changes)


def test_a_language_model_with_dropout_is_refused(tokenizer, language):
    language.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            candidate_words(TEXTS, language, tokenizer)
    finally:
        language.eval()
