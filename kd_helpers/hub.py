"""The Hugging Face hub: one sentence at once when it cannot be reached, and models and datasets from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


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
        FileNotFoundError: the hub, or its local cache when `HF_HUB_OFFLINE` is set, lacks it or some of its files.
        ValueError: it needs code of its own, or is not whole.
    """
    try:
        yield
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


def _first(error: Exception) -> str:
    """The first sentence of what a library says."""
    return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")


def load_dataset(name: str, subset: str | None) -> datasets.DatasetDict:
    """A dataset of the hub with all its splits.

    The repository is taken as it is (`hf download` leaves the same), so it is found again without a network.

    Args:
        name: `owner/name`.
        subset: one of its configurations; None takes the only one.

    Raises:
        ConnectionError: the hub can't be reached.
        FileNotFoundError: there is no such dataset.
        ValueError: there is no such configuration.
    """
    require_hub(name)
    with found(name, "dataset"):
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset")
    try:
        return datasets.load_dataset(folder, subset)
    except ValueError as error:
        choices = ", ".join(datasets.get_dataset_config_names(folder))
        raise ValueError(
            f"dataset {name!r} has no configuration {subset!r}; write OWNER/NAME:CONFIGURATION with one of {choices}."
        ) from error
