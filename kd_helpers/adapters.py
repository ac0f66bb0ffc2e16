"""Chapter 02: a checkpoint that is an adapter (LoRA).

peft saves what it has trained, a few matrices and the head, and the name of the model that they belong to. Everything
else in this package wants a whole model. So an adapter is merged into its base model once, and the merged model is
kept in the artifacts folder like every other that was made here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kd_helpers import artifacts, hub
from kd_helpers.pretrained import (
    NO_CODE,
    VOCABULARIES,
    explained,
    file_of,
    has_trained_head,
    output_layer,
    quiet_transformers,
    read_tokenizer,
    require_encoder,
    some,
)
from kd_helpers.provenance import made_by

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name: str, path: str) -> bool:
    """Whether a checkpoint is an adapter rather than a whole model.

    Raises:
        ValueError: it is both, and it depends on whether peft is installed which of them transformers takes.
    """
    if file_of(path, CONFIG) is None:
        return False
    if any(file_of(path, weights) for weights in ("model.safetensors", "model.safetensors.index.json")):
        raise ValueError(
            f"{name!r} holds a whole model and an adapter ({CONFIG}), so it is not clear which is meant; put one of "
            "them elsewhere."
        )
    return True


def merged(name: str, path: str, path_of: Callable[[str], str]) -> Path:
    """The folder of a model into which an adapter was merged: found in `artifacts/merged_adapters`, or made.

    Args:
        name: of the adapter, as the user wrote it.
        path: where its files are: a folder, or its name on the hub.
        path_of: where transformers finds a checkpoint (`models.checkpoint_path`), for the base model.

    Raises:
        ValueError: peft is not installed, or the adapter has no head or does not name its labels.
        FileNotFoundError, ConnectionError: its base model can't be found.
    """
    settings = artifacts.load_json(file_of(path, CONFIG))
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type", "LORA")
    about = f"{name!r} is no model but an adapter ({kind}) of {base!r}"
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"{about}; install peft (`pip install peft`), and it is merged into that model, or merge and save it "
            "yourself (merge_and_unload)."
        )
    if file_of(path, WEIGHTS) is None:
        raise ValueError(f"{about}, and has no {WEIGHTS}; save it with a current version of peft.")
    base_path = path_of(base)
    in_folder = Path(base_path).is_dir()
    files = [file_of(path, file) for file in (CONFIG, WEIGHTS, "config.json", *VOCABULARIES)]
    provenance = {
        **made_by("kd_helpers.adapters"),
        "adapter": {file.name: artifacts.file_digest(file) for file in files if file is not None},
        "peft": importlib.metadata.version("peft"),
        "base": artifacts.model_folder_digest(Path(base_path)) if in_folder else f"{base}@{hub.commit(base)}",
    }
    folder = artifacts.artifacts_dir() / "merged_adapters" / artifacts.fingerprint(provenance)

    def merge(target: Path) -> None:
        model = _merge(name, path, base, base_path)
        tokenizer_at = path if any(file_of(path, file) for file in VOCABULARIES) else base_path
        tokenizer = read_tokenizer(name, tokenizer_at)
        with quiet_transformers():
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        artifacts.save_json(target / artifacts.PROVENANCE, provenance)

    artifacts.get_or_build(folder, merge)
    return folder


def _merge(name: str, path: str, base: str, base_path: str) -> PreTrainedModel:
    import peft

    def load_base(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        with quiet_transformers(), torch.random.fork_rng(), explained(base, base_path):
            return AutoModelForSequenceClassification.from_pretrained(
                base_path,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
                **NO_CODE,
            )

    weights = safetensors.torch.load(file_of(path, WEIGHTS).read_bytes())
    model, report = load_base()
    outputs = _outputs(weights, output_layer(model)[0])
    if outputs is None and not has_trained_head(base, model, model.config.architectures or (), report):
        raise ValueError(f"the adapter {name!r} has no classification head, nor has {base!r}; train one with it.")
    if outputs not in (None, model.config.num_labels):
        model, report = load_base(num_labels=outputs)
    require_encoder(base, model, report)
    names = _label_names(path) or (model.config.id2label if outputs is None else {})
    if len(names) != model.config.num_labels:
        raise ValueError(
            f"the adapter {name!r} has {model.config.num_labels} labels, but does not say which; put a config.json "
            'with {"id2label": {"0": FIRST, "1": SECOND, …}} beside it.'
        )
    model.config.id2label = {int(index): label for index, label in names.items()}
    model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    try:
        settings = peft.PeftConfig.from_pretrained(path)
        settings.inference_mode = False  # or nothing of it counts as trained
        adapted = peft.get_peft_model(model, settings)
        trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
        lacking = sorted(trained.intersection(peft.set_peft_model_state_dict(adapted, weights).missing_keys))
        merged_model = adapted.merge_and_unload()
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".:")
        raise ValueError(
            f"the adapter {name!r} can't be merged into {base!r} ({reason}); check its base model, or merge it "
            "where it was trained."
        ) from error
    if lacking:
        raise ValueError(f"the adapter {name!r} is not whole, it lacks {some(lacking)}; save it anew.")
    return merged_model


def _outputs(weights: Mapping[str, torch.Tensor], layer: str) -> int | None:
    """How many outputs the head has that an adapter brings; None where it brings none."""
    for key, tensor in weights.items():
        if key.replace(".modules_to_save", "").endswith(f".{layer}.weight"):
            return len(tensor)
    return None


def _label_names(path: str) -> dict[str, Any] | None:
    """The labels that a config.json beside an adapter names."""
    config = file_of(path, "config.json")
    return None if config is None else artifacts.load_json(config).get("id2label")
