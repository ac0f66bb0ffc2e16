"""Chapter 12: more texts without labels, made of those that there are.

Algorithm 1 of TinyBERT (Jiao et al. 2020, arXiv 1909.10351): some of a text's words are replaced, by what a masked
language model finds likely in their place or, for words of several pieces, by words with similar embeddings. The
results have no labels; the teacher provides soft targets for them.

The authors' code shows the language model the whole text a second time, behind [SEP], so that its words are near the
original's. The course's language model was adapted to single texts and has not learned to use a second one, so here it
reads the masked text alone, as Algorithm 1 says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tqdm.auto import tqdm
from transformers import BertForMaskedLM, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.config import require_whole
from kd_helpers.data import DataSplits, duplicate_key, text_id
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.models import model_digest
from kd_helpers.pretrained import tokenizer_digest
from kd_helpers.provenance import made_by
from kd_helpers.runtime import autocast

PROBABILITY = 0.4  # of replacing a word: p_t in the paper
CANDIDATES = 15  # words of which one is drawn: K in the paper
_WORD = re.compile(r"[a-z]+")
_LINK = "http"  # what stands for a link in the course's tweets
_QUERIES_AT_ONCE = 128

Span = tuple[int, int]
Candidates = Mapping[Span, Sequence[str]]


class Word(NamedTuple):
    """A word of a text: its characters `start` to `end`, and the numbers of its tokens."""

    start: int
    end: int
    tokens: list[int]


def replaceable_words(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[Word]]]:
    """The token ids of each text, and those of its words that may be replaced.

    Only plain words are: no number, no sign, no `@user`, `#tag` or `http`, no part of a word with an apostrophe. Stop
    words (scikit-learn's list) stay, as in the authors' code, which has another list.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_offsets_mapping=True)
    found = []
    for row, text in enumerate(texts):
        by_word: dict[int, list[int]] = {}
        for token, word in enumerate(encoded.word_ids(row)):
            if word is not None:
                by_word.setdefault(word, []).append(token)
        offsets = encoded["offset_mapping"][row]
        words = [Word(offsets[tokens[0]][0], offsets[tokens[-1]][1], tokens) for tokens in by_word.values()]
        found.append((encoded["input_ids"][row], [word for word in words if _is_plain(text, word)]))
    return found


def _is_plain(text: str, word: Word) -> bool:
    characters = text[word.start : word.end].lower()
    before, after = text[max(word.start - 1, 0) : word.start], text[word.end : word.end + 1]
    plain = _WORD.fullmatch(characters) is not None and characters != _LINK and characters not in ENGLISH_STOP_WORDS
    return plain and before not in ("@", "#", "'") and after != "'"


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary's plain words that are a single piece, with their numbers, in the order of these."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    plain = {word: number for word, number in vocabulary if _WORD.fullmatch(word) and (len(word) > 1 or word in "ai")}
    plain.pop(_LINK, None)
    return plain


def candidate_words(
    texts: Sequence[str],
    language: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = CANDIDATES,
    max_length: int = 128,
    precision: torch.dtype = torch.float32,
) -> list[Candidates]:
    """For each word that may be replaced the `count` best words in its place, best first, itself left out.

    A word of one piece is masked, and nothing else, and the language model ranks the words of its vocabulary; a word
    of several pieces is compared with them by the cosine of embeddings, its own being the mean of its pieces'.

    Args:
        texts: to be augmented.
        language: a masked language model, in eval mode; its embedding table gives the similarities, in the place of
            the paper's GloVe vectors.
        tokenizer: the model's.
        count: K.
        max_length: tokens of a text; words beyond stay as they are.
        precision: of the matrix products.

    Returns:
        One mapping a text, from a word's first and last character (exclusive) to the candidates.

    Raises:
        ValueError: the language model is in train mode, or `count` lies outside 1 … the number of whole words in the
            vocabulary minus 1.
        TypeError: `count` is no whole number.
    """
    if language.training:
        raise ValueError("the language model is in train mode, so dropout changes its predictions; call .eval() first.")
    vocabulary = whole_words(tokenizer)
    require_whole("count", count, minimum=1, maximum=len(vocabulary) - 1)
    analysed = replaceable_words(texts, tokenizer, max_length)
    masked = [(row, word) for row, (_, words) in enumerate(analysed) for word in words if len(word.tokens) == 1]
    pieced = [(row, word) for row, (_, words) in enumerate(analysed) for word in words if len(word.tokens) > 1]
    found: list[dict[Span, Sequence[str]]] = [{} for _ in texts]
    names, allowed = list(vocabulary), torch.tensor(list(vocabulary.values()), device=language.device)
    queries = [(row, word, _masked(analysed[row][0], word, tokenizer.mask_token_id)) for row, word in masked]
    queries.sort(key=lambda query: len(query[2]))  # of similar length together: less padding
    with torch.inference_mode(), tqdm(total=len(queries), desc="Filling in", unit="word", leave=False) as bar:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = queries[start : start + _QUERIES_AT_ONCE]
            batch = tokenizer.pad({"input_ids": [ids for *_, ids in part]}, return_tensors="pt").to(language.device)
            with autocast(language.device, precision):
                hidden = language.base_model(**batch).last_hidden_state
                places = torch.tensor([word.tokens[0] for _, word, _ in part], device=hidden.device)
                scores = language.cls(hidden[torch.arange(len(part)), places])[:, allowed].float()
            _note(found, [(row, word) for row, word, _ in part], scores, texts, names, count)
            bar.update(len(part))
        if pieced:
            table = language.get_input_embeddings().weight.float()
            own = [table[[analysed[row][0][token] for token in word.tokens]].mean(dim=0) for row, word in pieced]
            similar = F.normalize(torch.stack(own), dim=-1) @ F.normalize(table[allowed], dim=-1).T
            _note(found, pieced, similar, texts, names, count)
    return found


def _masked(token_ids: Sequence[int], word: Word, mask: int) -> list[int]:
    return [mask if place == word.tokens[0] else token for place, token in enumerate(token_ids)]


def _note(
    found: list[dict[Span, Sequence[str]]],
    words: Sequence[tuple[int, Word]],
    scores: torch.Tensor,
    texts: Sequence[str],
    names: Sequence[str],
    count: int,
) -> None:
    """Write down, for each of N words, the names of the best of its scores `[N, V]`."""
    best = scores.topk(count + 1, dim=-1).indices.tolist()
    for (row, word), ranked in zip(words, best, strict=True):
        itself = texts[row][word.start : word.end].lower()
        found[row][word.start, word.end] = [names[index] for index in ranked if names[index] != itself][:count]


def replace_words(text: str, candidates: Candidates, *, probability: float, generator: np.random.Generator) -> str:
    """One augmented copy of a text: each word with candidates is replaced, by one of them, with `probability`."""
    copy = text
    for (start, end), words in sorted(candidates.items(), reverse=True):  # from the end: the places before stay valid
        if generator.random() < probability:
            copy = copy[:start] + str(generator.choice(words)) + copy[end:]
    return copy


def augmented_texts(
    data: DataSplits,
    language: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    copies: int,
    probability: float = PROBABILITY,
    count: int = CANDIDATES,
    seed: int = 0,
    max_length: int = 128,
    precision: torch.dtype = torch.float32,
) -> datasets.Dataset:
    """Texts without labels made of `data.train`, up to `copies` for each of its texts; made once and found again.

    A copy that says what a text of the training pool or of a held-out split says, or another copy, is left out: words
    drawn at random do hit real texts now and then.

    Args:
        data: its labelled training texts are augmented, no others.
        language: see `candidate_words`.
        tokenizer: the model's.
        copies: N_a in the paper.
        probability: p_t, of replacing a word.
        count: K, candidates for a word.
        seed: of the draws.
        max_length: tokens of a text.
        precision: of the matrix products.

    Returns:
        Columns `id`, `text` and `label` (−100 in every row).

    Raises:
        ValueError: `probability` does not lie in (0, 1], or `copies` or `count` is no whole number of at least 1.
    """
    require_whole("copies", copies, minimum=1)
    if not 0 < probability <= 1:
        raise ValueError(f"probability is {probability}; give a number above 0 and at most 1.")
    texts = data.train["text"][:]
    others = [data.train, data.transfer, data.teacher_train, data.validation, data.test]
    taken = {duplicate_key(text) for split in others for text in split["text"][:]}
    provenance = {
        **made_by("kd_helpers.methods.augmentation"),
        "texts": texts,
        "tokenizer": tokenizer_digest(tokenizer),
        "taken": sorted(taken),
        "language": model_digest(language),
        "copies": copies,
        "probability": probability,
        "count": count,
        "seed": seed,
        "max_length": max_length,
        "precision": str(precision),
    }
    folder = artifacts.artifacts_dir() / "augmented" / artifacts.fingerprint(provenance)

    def make(target: Path) -> None:
        chosen = {"count": count, "max_length": max_length, "precision": precision}
        candidates = candidate_words(texts, language, tokenizer, **chosen)
        generator = np.random.default_rng(seed)
        made: dict[str, str] = {}
        for text, words in zip(texts, candidates, strict=True):
            for _ in range(copies):
                copy = replace_words(text, words, probability=probability, generator=generator)
                if (key := duplicate_key(copy)) not in taken:
                    made.setdefault(key, copy)
        artifacts.save_json(target / "texts.json", list(made.values()))

    artifacts.get_or_build(folder, make)
    made = artifacts.load_json(folder / "texts.json")
    ids = [text_id(duplicate_key(text)) for text in made]
    rows = {"id": ids, "text": made, "label": [IGNORE_INDEX] * len(made)}
    return datasets.Dataset.from_dict(rows, features=data.train.features)  # so that the two can be put together
