"""A local cache as the Hugging Face hub's library keeps it, with small random models and few tweets.

The repositories have the names, files and layout of the real ones, so that what loads from here under
`HF_HUB_OFFLINE=1` is the code that loads the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kd_helpers.config import PACKAGED_MODEL
from kd_helpers.data import LABEL_NAMES, clean, deduplicate, read_packaged_tweets
from kd_helpers.models import load_tokenizer

BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 128}
SPLITS = {"train": 10_200, "validation": 600, "test": 700}


def build(home: Path) -> dict[str, str]:
    """Fill `home` and return the environment in which the hub's library finds it and nothing else."""
    tokenizer = load_tokenizer(PACKAGED_MODEL)
    for name, model in {
        "google-bert/bert-base-uncased": _random(BertForMaskedLM, BertConfig(**BERT)),
        "google-bert/bert-large-uncased": _random(BertForMaskedLM, BertConfig(**BERT | {"num_hidden_layers": 6})),
        "distilbert/distilbert-base-uncased": _random(DistilBertForMaskedLM, DistilBertConfig(**DISTILBERT)),
    }.items():
        add_model(home, name, model, tokenizer)
    t5 = T5Config(**T5, vocab_size=30_528, decoder_start_token_id=0, tie_word_embeddings=False)  # as flan-t5 has it
    add_model(home, "google/flan-t5-small", _random(T5ForConditionalGeneration, t5), tokenizer)
    _add(home, "datasets--cardiffnlp--tweet_eval", _tweet_eval)
    _add(home, "datasets--stanfordnlp--sst2", _sst2)
    _add(home, "datasets--clinc--clinc_oos", _clinc)
    _add(home, "datasets--roneneldan--TinyStories", _tiny_stories)
    _add(home, "datasets--someone--two_validations", _two_validations)
    _add(home, "datasets--someone--script", lambda folder: (folder / "script.py").write_text("import os"))
    _add(home, "models--someone--pickled", lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'))
    return environment(home)


def environment(home: Path) -> dict[str, str]:
    """Where the hub's library looks, and that it may not look elsewhere."""
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def add_model(home: Path, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model repository with its tokenizer."""

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _add(home, "models--" + name.replace("/", "--"), fill)


def sentiment_model(labels: tuple[str, ...], *, seed: int = 0) -> PreTrainedModel:
    """A BERT that says it was fine-tuned already: its head is kept, whatever it says."""
    names = dict(enumerate(labels))
    return _random(BertForSequenceClassification, BertConfig(**BERT, num_labels=len(labels), id2label=names), seed=seed)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with a vocabulary of its own: whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def _random(model_class: type, config, *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)


def _add(home: Path, repository: str, fill: Callable[[Path], object]) -> None:
    commit = hashlib.sha1(repository.encode()).hexdigest()
    folder = home / "hub" / repository
    (folder / "snapshots" / commit).mkdir(parents=True)
    fill(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def _tweet_eval(folder: Path) -> None:
    """The sentiment task in Parquet with a dataset card, and a second task beside it as the real repository has."""
    tweets = deduplicate(clean(read_packaged_tweets()))[["text", "label"]]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABEL_NAMES))}
    )
    cards, start = [], 0
    for task in ("sentiment", "emoji"):
        (folder / task).mkdir()
        files = "".join(f"  - split: {split}\n    path: {task}/{split}-*\n" for split in SPLITS)
        cards.append(f"- config_name: {task}\n  data_files:\n{files}")
    for split, size in SPLITS.items():
        rows = tweets.iloc[start : start + size].to_dict("list")
        for task in ("sentiment", "emoji"):
            path = folder / task / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
        start += size
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(cards)}---\n# TweetEval, in small\n")


def _sst2(folder: Path) -> None:
    """Phrases with a number each, and a test split whose labels are hidden, as GLUE has it."""
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = {"idx": datasets.Value("int32"), "sentence": datasets.Value("string"), "label": names}
    for split, size in {"train": 60, "validation": 12, "test": 20}.items():
        rows = {
            "idx": list(range(size)),
            "sentence": [f"{split} phrase {row}" for row in range(size)],
            "label": [-1 if split == "test" else row % 2 for row in range(size)],
        }
        _write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, features)


def _clinc(folder: Path) -> None:
    """CLINC150's 151 intents, of which one is for what is out of scope."""
    names = [*(f"intent_{number:03}" for number in range(150)), "oos"]
    features = {"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=names)}
    for split, each in {"train": 3, "validation": 1, "test": 1}.items():
        rows = {
            "text": [f"{split} {row} wants {name}" for row in range(each) for name in names],
            "intent": [number for _ in range(each) for number in range(len(names))],
        }
        _write_parquet(folder / "plus" / f"{split}-00000-of-00001.parquet", rows, features)
    card = "configs:\n- config_name: plus\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: plus/{split}-*\n" for split in ("train", "validation", "test")
    )
    (folder / "README.md").write_text(f"---\n{card}---\n# CLINC150, in small\n")


def _tiny_stories(folder: Path) -> None:
    """Stories in two splits, and beside them the same once more as plain text, as the real repository has them."""
    for split, size in {"train": 40, "validation": 10}.items():
        rows = {"text": [f"{split} story {row}." for row in range(size)]}
        _write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, {"text": datasets.Value("string")})
    (folder / "TinyStories-train.txt").write_text("Again the train stories.\n<|endoftext|>\n")
    (folder / "TinyStories_all_data.tar.gz").write_bytes(b"gigabytes")
    (folder / "README.md").write_text("---\nlicense: cdla-sharing-1.0\n---\n# TinyStories, in small\n")


def _two_validations(folder: Path) -> None:
    """Splits of other names, as MultiNLI has them."""
    features = {"text": datasets.Value("string"), "label": datasets.Value("string")}
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows = {"text": [f"{split} {row}" for row in range(20)], "label": ["yes", "no"] * 10}
        _write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, features)
    card = "configs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: data/{split}-*\n"
        for split in ("train", "validation_matched", "validation_mismatched")
    )
    (folder / "README.md").write_text(f"---\n{card}---\n")


def _write_parquet(path: Path, rows: dict[str, list], features: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
