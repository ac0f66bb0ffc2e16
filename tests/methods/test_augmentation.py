"""Augmentation: which words are replaced, by what, and that no held-out text comes out of it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from kd_helpers.data import duplicate_key, require_disjoint
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.methods import augmentation
from kd_helpers.methods.augmentation import (
    augmented_texts,
    candidate_words,
    replace_words,
    replaceable_words,
    whole_words,
)

TEXTS = ["@user Deflategate is great, isn't it? #NFL http", "Watching the snowboarders again", "I'm ok @user"]


def tiny_language(tokenizer, *, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape))
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # so that contexts tell candidates apart
    return model.eval()


@pytest.fixture(scope="module")
def language(tokenizer):
    return tiny_language(tokenizer)


@pytest.fixture
def few(splits):
    return dataclasses.replace(splits, train=splits.train.select(range(6)))


@pytest.fixture
def fewer(few):
    """With 50 texts in each of the other splits, so that they are read in no time."""
    names = ("transfer", "teacher_train", "validation", "test")
    return dataclasses.replace(
        few, **{name: getattr(few, name).select(range(min(50, len(getattr(few, name))))) for name in names}
    )


def spans(text: str, *words: str) -> list[tuple[int, int]]:
    return [(text.index(word), text.index(word) + len(word)) for word in words]


def test_only_plain_words_are_replaced(tokenizer):
    found = replaceable_words(TEXTS, tokenizer, 128)
    assert [(w.start, w.end) for w in found[0][1]] == spans(TEXTS[0], "Deflategate", "great")  # no stop words
    assert [(w.start, w.end) for w in found[2][1]] == spans(TEXTS[2], "ok")
    for ids, words in found:
        for word in words:
            pieces = tokenizer.convert_ids_to_tokens([ids[token] for token in word.tokens])
            assert all(piece.startswith("##") for piece in pieces[1:])


def test_a_word_that_was_cut_off_stays(tokenizer):
    (_, words), *_ = replaceable_words([TEXTS[1]], tokenizer, 4)  # [CLS] watching the [SEP]
    assert [(w.start, w.end) for w in words] == spans(TEXTS[1], "Watching")


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
    assert compared == 3  # watching, great, ok


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


def test_a_copy_like_its_text_or_a_held_out_one_is_left_out(own_artifacts, few, tokenizer, language, monkeypatch):
    held_out = few.test["text"][0]
    monkeypatch.setattr(augmentation, "replace_words", lambda text, *_, **__: f"indeed {text}")
    assert len(augmented_texts(few, language, tokenizer, copies=1, count=1)) == 6
    monkeypatch.setattr(augmentation, "replace_words", lambda text, *_, **__: f"@someone {text}!")
    assert len(augmented_texts(few, language, tokenizer, copies=1, count=1, seed=1)) == 0, "like the text itself"
    monkeypatch.setattr(augmentation, "replace_words", lambda *_, **__: held_out.upper())
    made = augmented_texts(few, language, tokenizer, copies=2, count=2)
    assert duplicate_key(held_out) not in map(duplicate_key, made["text"][:])
    assert len(made) == 0


def test_it_is_made_once(own_artifacts, few, tokenizer, language, monkeypatch):
    augmented_texts(few, language, tokenizer, copies=1, count=2)
    monkeypatch.setattr(augmentation, "candidate_words", None)
    augmented_texts(few, language, tokenizer, copies=1, count=2)


def another_vocabulary(tokenizer):
    """That of the same model, with a word more."""
    own = copy.deepcopy(tokenizer)
    assert own.add_tokens(["zebrafishes"]) == 1
    return own


OTHERWISE = {
    "nothing": lambda few, language, tokenizer: (few, language, tokenizer),
    "vocabulary": lambda few, language, tokenizer: (few, language, another_vocabulary(tokenizer)),
    "texts": lambda few, language, tokenizer: (
        dataclasses.replace(few, train=few.train.select(range(5))),
        language,
        tokenizer,
    ),
    "held-out texts": lambda few, language, tokenizer: (
        dataclasses.replace(few, test=few.test.select(range(5))),
        language,
        tokenizer,
    ),
    "language model": lambda few, language, tokenizer: (few, tiny_language(tokenizer, seed=1), tokenizer),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_it_is_made_anew_for_other_texts_models_and_vocabularies(
    own_artifacts, fewer, tokenizer, language, monkeypatch, what
):
    made = []
    monkeypatch.setattr(augmentation, "candidate_words", lambda texts, *_, **__: made.append(1) or [{} for _ in texts])
    augmented_texts(fewer, language, tokenizer, copies=1)
    other = OTHERWISE[what](fewer, language, tokenizer)
    for _ in range(2):
        augmented_texts(*other, copies=1)
    assert len(made) == (1 if what == "nothing" else 2)
    augmented_texts(fewer, language, tokenizer, copies=1)
    assert len(made) == (1 if what == "nothing" else 2), "the first is still there"


@pytest.mark.parametrize(
    "change",
    [{"copies": 2}, {"probability": 0.3}, {"count": 3}, {"seed": 1}, {"max_length": 64}, {"precision": torch.bfloat16}],
)
def test_it_is_made_anew_for_other_choices(own_artifacts, fewer, tokenizer, language, monkeypatch, change):
    made = []
    monkeypatch.setattr(augmentation, "candidate_words", lambda texts, *_, **__: made.append(1) or [{} for _ in texts])
    augmented_texts(fewer, language, tokenizer, copies=1)
    augmented_texts(fewer, language, tokenizer, **{"copies": 1} | change)
    assert len(made) == 2


def test_it_is_made_anew_by_other_code(own_artifacts, fewer, tokenizer, language, monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(augmentation, "candidate_words", lambda texts, *_, **__: made.append(1) or [{} for _ in texts])
    for digest, count in (("one", 1), ("one", 1), ("other", 2), ("one", 2)):
        monkeypatch.setattr(
            augmentation, "made_by", lambda *modules, digest=digest: asked.append(modules) or {"source": digest}
        )
        augmented_texts(fewer, language, tokenizer, copies=1)
        assert len(made) == count
    assert set(asked) == {("kd_helpers.methods.augmentation",)}


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
