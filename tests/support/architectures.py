"""Tiny random classifiers of every kind that people fine-tune, each with a tokenizer of its own kind.

    model, tokenizer = tiny("roberta", ("negative", "positive"), seed=0)

The tokenizers are of the classes that the real checkpoints use, with small vocabularies made here: WordPiece (BERT),
byte-level BPE (RoBERTa, GPT-2) and Unigram (SentencePiece: XLM-R, ALBERT, T5). So special tokens, padding ids, the side
of the padding and token types are those of the real ones. Ids and padding differ between kinds on purpose.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

WORDS = (
    *("the", "a", "to", "i", "you", "it", "and", "is", "in", "my", "for", "of", "on", "this", "that", "so", "me"),
    *("have", "just", "with", "good", "day", "not", "at", "be", "great", "bad", "love", "like", "what", "today"),
)
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
POSITIONS = 128  # of the kinds that have a table of them


def wordpiece(kind: str, specials: Sequence[str], **options: Any) -> PreTrainedTokenizerBase:
    pieces = [*CHARACTERS, *(f"##{character}" for character in string.ascii_lowercase + string.digits), *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*specials, *pieces]))}
    return getattr(transformers, kind)(vocab=vocabulary, **options)


def _merges(alphabet: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges that make each of the words, from left to right, with a space before it."""
    tokens, merges = list(alphabet), {}
    for word in WORDS:
        made = "Ġ"
        for character in word:
            merges[made, character] = None
            made += character
            tokens.append(made)
    return list(dict.fromkeys(tokens)), list(merges)


def byte_level(kind: str, specials: Sequence[str], **options: Any) -> PreTrainedTokenizerBase:
    tokens, merges = _merges(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: index for index, token in enumerate([*specials, *tokens])}
    return getattr(transformers, kind)(vocab=vocabulary, merges=merges, **options)


def unigram(kind: str, specials: Sequence[str], **options: Any) -> PreTrainedTokenizerBase:
    pieces = [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(character, -8.0) for character in "▁" + CHARACTERS + string.ascii_uppercase]
    return getattr(transformers, kind)(vocab=[*((token, 0.0) for token in specials), *pieces], **options)


def from_file(specials: Sequence[str], template: str, **options: Any) -> PreTrainedTokenizerBase:
    """Byte-level BPE that is nothing but its tokenizer.json, as ModernBERT's and Llama 3's are."""
    tokens, merges = _merges(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: index for index, token in enumerate([*specials, *tokens])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = [(token, vocabulary[token]) for token in specials if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=named)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA_SIZES = {**BERT_SIZES, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS}


def bert_words(kind: str = "BertTokenizer") -> PreTrainedTokenizerBase:
    return wordpiece(kind, BERT_TOKENS)


def roberta_bytes() -> PreTrainedTokenizerBase:
    return byte_level("RobertaTokenizer", ROBERTA_TOKENS)


class Kind(NamedTuple):
    """How a kind is made.

    Attributes:
        model_type: as in config.json.
        tokenizer: makes one.
        sizes: of the model.
    """

    model_type: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    sizes: dict[str, Any]


# RoBERTa and its like have two positions less than their table; BART's configuration does not count the two.
_OFFSET = {"max_position_embeddings": POSITIONS + 2}
_POSITIONS = {"max_position_embeddings": POSITIONS}
_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 32,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}

_KINDS: dict[str, Kind] = {
    "bert": Kind("bert", bert_words, BERT_SIZES | _POSITIONS),
    "distilbert": Kind(
        "distilbert", bert_words, {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} | _POSITIONS
    ),
    "roberta": Kind("roberta", roberta_bytes, BERT_SIZES | _OFFSET | {"type_vocab_size": 1}),
    "xlm-roberta": Kind(
        "xlm-roberta",
        lambda: unigram("XLMRobertaTokenizer", ("<s>", "<pad>", "</s>", "<unk>")),
        BERT_SIZES | _OFFSET | {"type_vocab_size": 1},
    ),
    "camembert": Kind(
        "camembert",
        lambda: unigram(
            "CamembertTokenizer", ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
        ),
        BERT_SIZES | _OFFSET | {"type_vocab_size": 1},
    ),
    "deberta": Kind(
        "deberta",
        lambda: byte_level("DebertaTokenizer", ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")),
        BERT_SIZES | _POSITIONS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    ),
    "deberta-v2": Kind(
        "deberta-v2",
        lambda: unigram("DebertaV2Tokenizer", ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), unk_id=3),
        BERT_SIZES | _POSITIONS | {"relative_attention": True, "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "deberta-v3": Kind(
        "deberta-v2",
        lambda: unigram("DebertaV2Tokenizer", ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), unk_id=3),
        BERT_SIZES | _POSITIONS | _DEBERTA_V3,
    ),
    "albert": Kind(
        "albert",
        lambda: unigram("AlbertTokenizer", ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        BERT_SIZES | _POSITIONS | {"embedding_size": 8},
    ),
    "electra": Kind("electra", bert_words, BERT_SIZES | _POSITIONS | {"embedding_size": 8}),
    "modernbert": Kind(
        "modernbert",
        lambda: from_file(
            ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
            "[CLS] $A [SEP]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "attention_mask"],
        ),
        BERT_SIZES | _POSITIONS | {"num_hidden_layers": 3, "local_attention": 8, "classifier_pooling": "mean"},
    ),
    "mpnet": Kind(
        "mpnet",
        lambda: wordpiece("MPNetTokenizer", ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")),
        BERT_SIZES | _OFFSET,
    ),
    "mobilebert": Kind(
        "mobilebert",
        bert_words,
        BERT_SIZES
        | _POSITIONS
        | {"embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2, "true_hidden_size": 8},
    ),
    "xlnet": Kind(
        "xlnet",
        lambda: unigram("XLNetTokenizer", ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>")),
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "gpt2": Kind(
        "gpt2",
        lambda: byte_level("GPT2Tokenizer", ("<|endoftext|>",)),
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
    ),
    "llama": Kind(
        "llama",
        lambda: from_file(("<s>", "</s>"), "<s> $A", bos_token="<s>", eos_token="</s>"),
        LLAMA_SIZES,
    ),
    "qwen2": Kind("qwen2", lambda: byte_level("Qwen2Tokenizer", ("<|endoftext|>",)), LLAMA_SIZES),
    "mistral": Kind(
        "mistral",
        lambda: from_file(("<unk>", "<s>", "</s>"), "<s> $A", unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
        LLAMA_SIZES | {"head_dim": 8, "sliding_window": 8},
    ),
    "gemma": Kind(
        "gemma",
        lambda: from_file(
            ("<pad>", "<eos>", "<bos>", "<unk>"),
            "<bos> $A",
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
        ),
        LLAMA_SIZES | {"head_dim": 8},
    ),
    "opt": Kind(
        "opt",
        lambda: byte_level(
            "GPT2Tokenizer",
            ("<s>", "<pad>", "</s>"),
            bos_token="</s>",
            eos_token="</s>",
            unk_token="</s>",
            pad_token="<pad>",
        ),
        {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
        | _POSITIONS,
    ),
    "bloom": Kind(
        "bloom",
        lambda: from_file(
            ("<unk>", "<s>", "</s>", "<pad>"),
            "$A",
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            padding_side="left",
        ),
        {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "t5": Kind(
        "t5",
        lambda: unigram("T5Tokenizer", ("<pad>", "</s>", "<unk>")),
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
    "bart": Kind(
        "bart",
        roberta_bytes,
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | _POSITIONS,
    ),
    "funnel": Kind(
        "funnel",
        lambda: wordpiece("FunnelTokenizer", ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>")),
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
    ),
    "convbert": Kind("convbert", bert_words, BERT_SIZES | _POSITIONS | {"embedding_size": 16, "conv_kernel_size": 3}),
    "longformer": Kind("longformer", roberta_bytes, BERT_SIZES | _OFFSET | {"attention_window": 8}),
    "big_bird": Kind(
        "big_bird",
        lambda: unigram("BigBirdTokenizer", ("<pad>", "</s>", "<s>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        BERT_SIZES | _POSITIONS | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    ),
    "nystromformer": Kind(
        "nystromformer",
        bert_words,
        BERT_SIZES | _POSITIONS | {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
    ),
    "squeezebert": Kind(
        "squeezebert",
        bert_words,
        BERT_SIZES
        | _POSITIONS
        | {"embedding_size": 16}
        | {f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")},
    ),
    "fnet": Kind(
        "fnet",
        lambda: unigram("FNetTokenizer", ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24} | _POSITIONS,
    ),
    "ernie": Kind("ernie", bert_words, BERT_SIZES | _POSITIONS),
    "roformer": Kind("roformer", bert_words, BERT_SIZES | _POSITIONS | {"embedding_size": 16}),
}

KINDS = tuple(_KINDS)


def tiny(
    kind: str, labels: Sequence[str] = ("negative", "neutral", "positive"), seed: int = 0, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with random weights, and its tokenizer.

    Args:
        kind: one of `KINDS`.
        labels: the names of its outputs.
        seed: of the weights.
        changes: of the model's configuration.
    """
    model_type, make_tokenizer, sizes = _KINDS[kind]
    tokenizer = make_tokenizer()
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("pad", "bos", "eos", "cls", "sep", "unk")
        if getattr(tokenizer, f"{name}_token_id", None) is not None
    }
    # The defaults of a configuration are ids of the real vocabulary, 50256 for one.
    config = AutoConfig.for_model(
        model_type,
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        | tokens
        | {"vocab_size": len(tokenizer), "id2label": dict(enumerate(labels))}
        | {"label2id": {label: index for index, label in enumerate(labels)}}
        # Ten times the usual, so that the logits of two texts, or of two ways to compute them, differ visibly.
        | {"initializer_range": 0.2, "init_std": 0.2, "initializer_std": 0.2}
        | sizes
        | changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    return model.eval(), tokenizer


def without_dropout(model: nn.Module) -> nn.Module:
    """All of it off, wherever a module keeps its rate, so that two trainings can be compared."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    return model
