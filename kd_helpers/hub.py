"""The Hugging Face hub: one sentence at once when it cannot be reached, and models and datasets from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import huggingface_hub.constants
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

# What is needed of repositories that hold the same data several times over, in several gigabytes.
NEEDED = {"roneneldan/TinyStories": ["README.md", "data/*"]}


def require_hub(name: str) -> None:
    """Stop at once, instead of after minutes of retries, when the Hugging Face hub can't be reached.

    Does nothing when `HF_HUB_OFFLINE` is set: then models and datasets come from the hub's local cache.

    Raises:
        ConnectionError: the hub did not respond within three seconds.
    """
    if is_offline():
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=3)
    except Exception as error:  # which one depends on the HTTP library that huggingface_hub uses
        raise ConnectionError(
            f"{name!r} is no local file or folder and the Hugging Face hub can't be reached; download it first "
            "(`hf download`) and set HF_HUB_OFFLINE=1, or give a local path, or use preset='offline'."
        ) from error


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` was set when the hub's library was imported."""
    return huggingface_hub.constants.HF_HUB_OFFLINE


@contextlib.contextmanager
def found(name: str, kind: str) -> Iterator[None]:
    """Replace the long error of a missing model or dataset by one sentence.

    Args:
        name: of the repository.
        kind: "model" or "dataset", for the sentence.

    Raises:
        FileNotFoundError: the hub, or its local cache when `HF_HUB_OFFLINE` is set, lacks it or some of its files, or
            does not give it to everybody.
        ValueError: it needs code of its own, or is not whole.
    """
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{kind} {name!r} is open only to those who accept its terms; accept them on its page on the Hugging Face "
            "hub and run `hf auth login`."
        ) from error
    except (OSError, HFValidationError, HfHubHTTPError) as error:  # which one depends on what is missing
        where = "the hub's local cache (HF_HUB_OFFLINE is set)" if is_offline() else "the Hugging Face hub"
        flag = "" if kind == "model" else " --repo-type dataset"
        way_out = f"run `hf download {name}{flag}` where there is a network" if is_offline() else "check its name"
        reason = f" ({_first(error)})" if "safetensors" in str(error) or "JSON" in str(error) else ""
        raise FileNotFoundError(f"{kind} {name!r} is not in {where}, or not whole{reason}; {way_out}.") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{kind} {name!r} needs Python code of its own, which is never run here; take one that transformers "
                "knows."
            ) from error
        raise ValueError(f"{kind} {name!r} can't be read; give a folder that save_pretrained wrote, whole.") from error


def commit(name: str) -> str:
    """The commit of a model's repository that is used.

    Raises:
        FileNotFoundError: there is no such model.
    """
    with found(name, "model"):
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent.name


def class_names(checkpoint: str) -> tuple[str, ...]:
    """What the outputs of a classifier mean, in their order.

    Args:
        checkpoint: its folder, or its name on the hub.

    Raises:
        ConnectionError: the hub can't be reached.
        FileNotFoundError: there is no such model.
        ValueError: it is no classifier, or its classes have no names of their own.
    """
    if Path(checkpoint).is_dir() and not Path(checkpoint, "config.json").is_file():
        raise ValueError(
            f"the folder {checkpoint!r} has no config.json, which names the classes; give the folder of a classifier, "
            "whole (of an adapter, that of the merged model)."
        )
    if not Path(checkpoint).is_dir():
        require_hub(checkpoint)
    with found(checkpoint, "model"):
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    names = tuple(str(config.id2label[output]) for output in sorted(config.id2label))
    if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
        kinds = ", ".join(config.architectures or ["no kind of model"])
        raise ValueError(
            f"{checkpoint!r} is no fine-tuned classifier (its config.json names {kinds}), so it can't label texts; "
            "give one, or fine-tune it on labelled texts (teacher_epochs)."
        )
    if len({name.casefold() for name in names}) < max(2, len(names)):
        raise ValueError(
            f"the classes of {checkpoint!r} are {', '.join(names[:10])}; name at least two, each otherwise, as "
            "id2label in its config.json."
        )
    return names


def _first(error: Exception) -> str:
    """The first sentence of what a library says."""
    return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")


def load_dataset(name: str, subset: str | None) -> datasets.DatasetDict:
    """A dataset of the hub with all its splits.

    The repository is taken as it is (`hf download` leaves the same), so it is found again without a network. Of those
    in `NEEDED` only the files that are read are downloaded.

    Args:
        name: `owner/name`.
        subset: one of its configurations; None takes the only one.

    Raises:
        ConnectionError: the hub can't be reached.
        FileNotFoundError: there is no such dataset.
        ValueError: there is no such configuration, or its files can't be read.
    """
    require_hub(name)
    with found(name, "dataset"):
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=NEEDED.get(name))
    try:
        return datasets.load_dataset(folder, subset)
    except Exception as error:  # of a dozen kinds, of which most are no ValueError
        choices: list[str] = []
        with contextlib.suppress(Exception):  # the same may fail for the same reason
            choices = datasets.get_dataset_config_names(folder)
        if choices and subset not in (choices if len(choices) > 1 else [*choices, None]):
            raise ValueError(
                f"dataset {name!r} has no configuration {subset!r}; write OWNER/NAME:CONFIGURATION with one of "
                f"{', '.join(choices)}."
            ) from error
        raise ValueError(
            f"dataset {name!r} can't be read ({_first(error)}); download it and give its files as data, "
            "validation_data and test_data."
        ) from error
