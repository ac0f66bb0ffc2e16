"""Chapter 02: checkpoints from elsewhere, and what has to be true of one before its model is used.

transformers fills every gap in a checkpoint without a word: it draws weights that are missing and makes up a tokenizer
that knows five tokens. Such a model trains and predicts like any other, only worse. The functions here look at what was
loaded, and refuse what can't be meant in one sentence. `models` loads; what it loads passes through here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors
import tokenizers
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from kd_helpers import hub

# Left open, transformers asks at the terminal whether to run the Python files of a checkpoint.
NO_CODE = {"trust_remote_code": False}
SINGLE_LABEL = "single_label_classification"
TOKENIZER = "tokenizer.json"
# Any of these holds a vocabulary; which of them a tokenizer reads depends on its class.
VOCABULARIES = (
    *(TOKENIZER, "vocab.txt", "vocab.json", "bpe.codes", "tekken.json", "tiktoken.model"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm"),
)
_PROBE = "A good Day, Élan: 12 apples — it's #1 @user 中文"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Leave out the report on missing weights: a fresh head is missing on purpose, anything else is refused here."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def explained(name: str, path: str) -> Iterator[None]:
    """Say in one sentence why the model, configuration or tokenizer of a checkpoint can't be read.

    Args:
        name: of the checkpoint, as the user wrote it.
        path: where transformers finds it (see `models.checkpoint_path`).

    Raises:
        FileNotFoundError: the checkpoint, or its weights, are not there.
        ValueError: it is damaged, of a kind that transformers does not know, or needs a package that is not installed.
    """
    try:
        with hub.found(name, "model"):
            yield
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"the weights of {name!r} are damaged, or no weights at all ({_first_line(error)}); fetch the file again "
            "(after a `git clone`: `git lfs pull`)."
        ) from error
    except ImportError as error:
        raise ValueError(
            f"{name!r} needs a Python package that is not installed ({_first_line(error)}); install it, or take "
            "another checkpoint."
        ) from error
    except StrictDataclassError as error:
        raise ValueError(f"config.json of {name!r} makes no sense ({_last_line(error)}); correct it.") from error
    except FileNotFoundError as error:
        if Path(path).is_dir():  # the sentence is about the hub
            raise FileNotFoundError(_about_folder(name, path, error.__cause__)) from error
        raise
    except ValueError as error:
        for sign, sentence in _SIGNS.items():
            if sign in str(error.__cause__):
                raise ValueError(sentence.format(name=repr(name), version=transformers.__version__)) from error
        raise


# What transformers says where the cause is not that files are missing, and what to say instead.
_SIGNS = {
    "Unrecognized configuration class": "transformers has no text classifier of the kind of {name}; take a model such "
    "as BERT.",
    "does not recognize this architecture": "transformers {version} does not know the kind of {name}; upgrade it, or "
    "take another checkpoint.",
    "`tiktoken` is required": "the vocabulary of {name} is a SentencePiece model, which needs two packages "
    "(`pip install sentencepiece protobuf`); install them, or save the tokenizer as tokenizer.json.",
}


def _about_folder(name: str, path: str, error: BaseException | None) -> str:
    """Why the model in a folder can't be read."""
    said = str(error)
    if "JSON" in said:
        return f"config.json of {name!r} is no valid JSON; write it anew."
    if "safetensors" in said:
        other = ", ".join(sorted(file.name for file in Path(path).glob("*.bin"))) or "none"
        return (
            f"{name!r} has no model.safetensors, or not all parts of it (other weights: {other}); load it with "
            "transformers and save it with save_pretrained, which writes safetensors."
        )
    return f"{name!r} can't be read ({_first_line(error)}); check the folder."


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2].strip().rstrip(".")


def require_model_folder(name: str, path: str) -> None:
    """Refuse a folder that holds no model.

    Raises:
        ValueError: it has no config.json.
    """
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ValueError(
            f"the folder {name!r} has no config.json, so it holds no model; give the folder that save_pretrained wrote."
        )


def file_of(path: str, file: str) -> Path | None:
    """A file of a checkpoint, in its folder or in the hub's cache; None where it has no such file."""
    if Path(path).is_dir():
        return Path(path, file) if Path(path, file).is_file() else None
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with contextlib.suppress(OSError):  # no name that the hub has; what loads the model says so
        found = cached_file(path, file, **lenient)
        return None if found is None else Path(found)
    return None


# The tokenizer


def read_tokenizer(name: str, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; it has a padding token.

    Args:
        name: of the checkpoint, as the user wrote it.
        path: where transformers finds it.

    Raises:
        ValueError: its files are missing or don't fit together.
        FileNotFoundError: there is no such checkpoint.
    """
    try:
        with explained(name, path):
            tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
    except Exception as error:  # tokenizers, written in Rust, has no errors of its own
        if Path(path).is_dir() or isinstance(error.__cause__, (ValueError, TypeError)):
            require_tokenizer_files(name, path, None)
        if isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(f"the tokenizer of {name!r} can't be read ({_first_line(error)}); save it anew.") from error
    require_tokenizer_files(name, path, tokenizer)
    require_tokenizer_as_in_file(name, path, tokenizer)
    if tokenizer.pad_token is None:
        config = file_of(path, "config.json")
        with explained(name, path):
            pad = None if config is None else AutoConfig.from_pretrained(path, **NO_CODE).pad_token_id
        give_padding(name, tokenizer, pad)
    return tokenizer


def require_tokenizer_files(name: str, path: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a checkpoint without the files of its tokenizer, for which transformers makes up one of special tokens.

    Args:
        name: of the checkpoint, as the user wrote it.
        path: where transformers finds it.
        tokenizer: what transformers made of it; None where that failed, and any vocabulary will do.

    Raises:
        ValueError: files are missing; they are named.
    """
    if tokenizer is None:
        wanted = ("vocab.json", "merges.txt") if file_of(path, "vocab.json") else VOCABULARIES
    else:
        wanted = _vocabulary_files(tokenizer)
    whole = (TOKENIZER, "tekken.json")  # each of them is a tokenizer by itself
    there = [file for file in dict.fromkeys([*whole, *wanted]) if file_of(path, file)]
    lacking = [file for file in wanted if file not in there]
    merges = [file for file in lacking if file.startswith("merges")]
    if not wanted or set(whole) & set(there) or (len(lacking) < len(wanted) and not merges):
        return
    kind = "" if tokenizer is None else f" for a {type(tokenizer).__name__}"
    made = f", or {' and '.join(lacking)}{kind}," if kind or merges else ""
    raise ValueError(
        f"{name!r} has no tokenizer ({TOKENIZER}{made} is missing); save the one that belongs to the model beside "
        f"it: AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained({name!r})."
    )


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The files that a tokenizer of this class reads its vocabulary from, where there is no tokenizer.json."""
    names = getattr(tokenizer, "vocab_files_names", {})
    return [file for role, file in names.items() if role != "tokenizer_file" and file]


def require_tokenizer_as_in_file(name: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cuts texts in another way than its tokenizer.json says.

    transformers takes the class from tokenizer_config.json, else from the kind of the model, and builds the tokenizer
    anew from the vocabulary alone. With the wrong class, texts are cut by another algorithm; without the
    configuration, a cased vocabulary meets texts in lower case.

    Raises:
        ValueError: they differ.
    """
    file = file_of(path, TOKENIZER)
    if file is None or not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        return
    stored = tokenizers.Tokenizer.from_file(str(file))
    stored.no_padding()
    stored.no_truncation()
    alike = type(stored.model) is type(tokenizer.backend_tokenizer.model)
    if alike and file_of(path, "tokenizer_config.json") is None:
        alike = stored.encode(_PROBE).ids == tokenizer(_PROBE)["input_ids"]
    if not alike:
        raise ValueError(
            f"{TOKENIZER} of {name!r} cuts texts in another way than the {type(tokenizer).__name__} that transformers "
            "makes of it; put the tokenizer_config.json that belongs to it beside it (tokenizer.save_pretrained writes "
            "both)."
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides which tokens a text becomes: vocabulary, rules, special tokens, sides.

    Two tokenizers of one vocabulary can still differ, for example in whether they lower the case of a text.
    """
    described = {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": tokenizer.special_tokens_map,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        described |= json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # those of the last call
            del described[state]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def give_padding(name: str, tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None) -> None:
    """Give a tokenizer without padding token, such as GPT-2's, that of the model's configuration, else its end token.

    Never a token that stands for text: it would be cut out of words, and taken for padding where a text ends with it.

    Raises:
        ValueError: it has no end token either.
    """
    added = tokenizer.added_tokens_decoder
    if pad_token_id in added and added[pad_token_id].special:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        raise ValueError(
            f"the tokenizer of {name!r} has no padding token, so texts of different lengths can't share a batch; set "
            "tokenizer.pad_token to one of its tokens and save it."
        )


def warn_of_unknown_tokens(tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Warn when most tokens of texts are unknown to a tokenizer: it is for another language, or not the model's.

    Args:
        tokenized: what `data.tokenize` returns.
        tokenizer: that cut them.
        name: of the checkpoint, for the sentence.
    """
    if (unknown := tokenizer.unk_token_id) is None:
        return
    tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in tokenized["input_ids"][:]])
    added = np.isin(tokens, [index for index in tokenizer.all_special_ids if index != unknown])
    share = float((tokens[~added] == unknown).mean()) if not added.all() else 0.0
    if share > 0.5:
        warnings.warn(
            f"{share:.0%} of the tokens of the training texts are unknown to the tokenizer of {name!r}, so the model "
            "can't read them; check that it is made for their language.",
            stacklevel=2,
        )


# The weights


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the encoder's weights begin with; "" for a model that is nothing but an encoder."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def head_weights(model: PreTrainedModel) -> set[str]:
    """The names of the weights beside the encoder's: those of the classification head."""
    every = model.named_parameters(remove_duplicate=False)  # a head may share weights, under names of its own
    return {name for name, _ in every if not name.startswith(base_prefix(model))}


def output_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The layer of a classifier whose outputs are the logits, with its name.

    Raises:
        ValueError: there is none.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(base_prefix(model))
        and module.out_features == model.config.num_labels
    ]
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no linear output layer; take another kind of model.")
    return layers[-1]


def require_encoder(name: str, model: PreTrainedModel, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model of which some weights beside its head were not in the checkpoint, or did not fit.

    A pooler may be missing: masked language models have none. Weights that are left over are those of other heads,
    unless they bear the name of one of the model's own layers with another number: then the checkpoint has more layers
    than its configuration says.

    Args:
        name: of the checkpoint, as the user wrote it.
        model: what transformers made of it.
        report: `missing_keys`, `unexpected_keys` and `mismatched_keys`, as transformers reports them.

    Raises:
        ValueError: with the names of some of these weights.
    """
    head = head_weights(model)
    missing = sorted(key for key in report["missing_keys"] if key not in head and "pooler" not in key)
    unknown = sorted(report["unexpected_keys"])
    if missing:
        if prefix := _prefix(missing, unknown):
            wrapper = _WRAPPERS.get(prefix, "some program")
            renamed = f"{{name.removeprefix({prefix!r}): tensor for name, tensor in load_file(FILE).items()}}"
            raise ValueError(
                f"the weights of {name!r} were saved by {wrapper} under other names, which begin with {prefix!r}; "
                f"rename them with safetensors.torch: save_file({renamed}, FILE, {{'format': 'pt'}})."
            )
        every = sum(1 for _ in model.named_parameters())
        left = f"; what it has instead: {some(unknown)}" if unknown else ""
        raise ValueError(
            f"{name!r} lacks {len(missing):,} of the {every:,} weights of a {type(model).__name__} ({some(missing)})"
            f"{left}. Take a checkpoint that is whole and of the kind that config.json names."
        )
    if wrong := sorted(mismatch for mismatch in report["mismatched_keys"] if mismatch[0] not in head):
        key, stored, expected = wrong[0]
        raise ValueError(
            f"config.json of {name!r} does not fit its weights: {key} has the shape {tuple(stored)}, it says "
            f"{tuple(expected)}; take the config.json that was saved with them."
        )
    own = {_without_numbers(key) for key in model.state_dict()}
    own |= {key.removeprefix(base_prefix(model)) for key in own}
    if more := [key for key in unknown if _without_numbers(key) in own]:
        raise ValueError(
            f"{name!r} has more layers than its config.json says (it leaves out {some(more)}); correct the number of "
            "layers there."
        )


_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "peft",
    "model.": "Lightning or a module around the model",
}


def _prefix(missing: Iterable[str], unknown: Iterable[str]) -> str | None:
    """What stands before the names of missing weights where the checkpoint has them under longer names."""
    for key in unknown:
        for own in missing:
            if key != own and key.endswith(f".{own}"):
                return key.removesuffix(own)
    return None


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def some(names: Sequence[str], shown: int = 2) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def has_trained_head(
    name: str, model: PreTrainedModel, architectures: Sequence[str], report: Mapping[str, Collection[Any]]
) -> bool:
    """Whether a checkpoint brought a trained classification head, by its weights rather than by what it says.

    Args:
        name: of the checkpoint, as the user wrote it.
        model: what transformers made of it.
        architectures: the classes that config.json names, if any. Heads of other tasks may have weights of the same
            names (`classifier.weight` of a token classifier); they are not meant.
        report: see `require_encoder`.

    Raises:
        ValueError: config.json promises such a head, or the weights have a part of one, but not the whole.
    """
    if any(map(_is_head_of_another_task, architectures)):
        return False
    promised = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    missing = set(report["missing_keys"])
    if not promised and any(f"{output_layer(model)[0]}.{part}" in missing for part in ("weight", "bias")):
        return False
    if lacking := sorted(key for key in missing if key in head_weights(model) or "pooler" in key):
        raise ValueError(
            f"{name!r} should have a trained classification head, but lacks {some(lacking)}; take a checkpoint that is "
            "whole, or remove `architectures` from its config.json, and its head is trained anew."
        )
    return True


def is_loaded(layer: str, report: Mapping[str, Collection[Any]]) -> bool:
    """Whether the weights of a layer came from the checkpoint."""
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return f"{layer}.weight" not in fresh


def _is_head_of_another_task(architecture: str) -> bool:
    return hasattr(transformers, architecture) and bool(re.search("For(?!SequenceClassification)[A-Z]", architecture))


def require_head_size(name: str, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a trained head with another number of outputs than config.json has labels.

    Raises:
        ValueError: with both numbers.
    """
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"config.json of {name!r} names {expected[0]} labels, but {key} has {stored[0]} outputs; correct id2label."
        )


def require_softmax_head(name: str, config: PretrainedConfig) -> None:
    """Refuse to take a head as it is that was trained for something else than one label for each text.

    Raises:
        ValueError: it was trained for several labels at once, or for numbers.
    """
    if config.problem_type not in (None, SINGLE_LABEL):
        raise ValueError(
            f"the head of {name!r} was trained for {config.problem_type}, so a softmax of its logits means nothing; "
            f"fine-tune it (teacher_epochs), or correct problem_type in its config.json to {SINGLE_LABEL}."
        )
