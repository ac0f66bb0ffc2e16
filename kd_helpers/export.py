"""Chapter 08: a student that serves, as an ONNX graph and with weights of eight bits.

torch's exporter writes the graph and onnxruntime quantises and runs it. This module loads what is to be exported,
compares every graph with the torch model before anyone may use it, and lets every measure of the course run on it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import onnxruntime
import pandas as pd
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from kd_helpers import artifacts
from kd_helpers.config import expanded, require_whole
from kd_helpers.data import evaluation_batches, tokenize
from kd_helpers.metrics import Predictions, classification_metrics, fidelity, predict
from kd_helpers.models import (
    Batch,
    load_classifier,
    load_config,
    load_tokenizer,
    match_tokenizer,
    model_digest,
    model_inputs,
    unwrapped,
)
from kd_helpers.pretrained import quiet_transformers, require_softmax_head, some
from kd_helpers.provenance import made_by
from kd_helpers.resolve import resolve
from kd_helpers.runs import DistillResult, load_run

# Where onnxruntime's and Hugging Face's own programs, transformers.js among them, look for the two graphs.
FLOAT32, INT8 = Path("onnx", "model.onnx"), Path("onnx", "model_quantized.onnx")
QUALITY = "quality.json"
Quality = dict[str, dict[str, float]]  # of each way to serve a model, its measures
# What onnxruntime does to a graph that makes it slower: layers of normalisation fused with the sum before them took a
# quarter more time in all than the two alone (1.32 on an AMD EPYC).
SLOWER = ["SkipLayerNormFusion"]
TOLERANCE = 1e-4  # a logit may differ from torch's z by so much times 1 + |z|
LONGEST = 512  # tokens that are kept of a text when nothing says how many
_WORDS = "What a good day, isn't it? My 2 friends love the new phone, but I do not @user http #1"
_PROBES = tuple(" ".join((_WORDS.split() * 40)[:count]) for count in (1, 2, 5, 11, 19, 40, 150, 600))


class OnnxClassifier(PreTrainedModel):
    """An exported classifier, with the interface of a torch model, so that `predict` and `evaluate` take it.

    It predicts and can't be trained. onnxruntime alone runs the graph; torch only holds what goes in and comes out.

    Args:
        folder: what `export_onnx` or `write_onnx` wrote.
        int8: take the graph with weights of eight bits.
        threads: for one matrix product; 0 leaves it to onnxruntime, which takes as many as there are cores.

    Raises:
        FileNotFoundError: the folder holds no such graph.
        ValueError: its file is damaged.
    """

    def __init__(self, folder: str | Path, *, int8: bool = False, threads: int = 0) -> None:
        require_whole("threads", threads, minimum=0)
        self.path = Path(expanded(folder, "the folder")) / (INT8 if int8 else FLOAT32)
        if not self.path.is_file():
            command = "python -m kd_helpers export RUN" + (" --int8" if int8 else "")
            raise FileNotFoundError(f"there is no {self.path}; export a model first (`{command}`).")
        if int8 and sums_overflow():
            warnings.warn(
                "on this processor, which has no VNNI, onnxruntime's sums of eight-bit products can overflow, so the "
                "graph may predict otherwise than elsewhere; compare it with float32 on this processor, or serve that.",
                stacklevel=2,
            )
        super().__init__(load_config(str(folder)))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER
            )
        except Exception as error:  # onnxruntime has a type of its own for each cause, and none for all
            raise ValueError(
                f"onnxruntime can't read {self.path} ({type(error).__name__}); export the model again."
            ) from error
        # The graph's digest stands for its weights: the device is read from it, and caches of logits are kept by it.
        digest = torch.tensor(list(hashlib.sha256(self.path.read_bytes()).digest()), dtype=torch.uint8)
        self.digest = nn.Parameter(digest, requires_grad=False)
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """The logits `[N, C]` of N texts of L tokens, each of the tensors int64 `[N, L]`.

        As in a torch model, every token is read where there is no mask, and all are of type 0 where no types are given.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        inputs = {entry.name: given[entry.name].cpu().numpy() for entry in self.session.get_inputs()}
        (logits,) = self.session.run(["logits"], inputs)
        return SequenceClassifierOutput(logits=torch.from_numpy(logits))

    @property
    def megabytes(self) -> float:
        """The size of the graph's file."""
        return self.path.stat().st_size / 1e6


@functools.cache
def sums_overflow() -> bool:
    """Whether onnxruntime's sums of eight-bit products overflow on this processor, as on x86 without VNNI.

    There the products of activations from 0 to 255 and weights from −127 to 127 are added in pairs, in sixteen bits,
    and what is too large is cut off.
    """
    weights = helper.make_tensor("weights", TensorProto.INT8, [2, 1], [127, 127])
    given = helper.make_tensor_value_info("activations", TensorProto.UINT8, [1, 2])
    found = helper.make_tensor_value_info("sum", TensorProto.INT32, [1, 1])
    product = helper.make_node("MatMulInteger", ["activations", "weights"], ["sum"])
    graph = helper.make_graph([product], "overflow", [given], [found], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (total,) = session.run(None, {"activations": np.array([[255, 255]], dtype=np.uint8)})
    return int(total[0, 0]) != 2 * 255 * 127


def export_onnx(source: str | Path, out: str | Path, *, int8: bool = False, max_length: int | None = None) -> Path:
    """Write a folder from which onnxruntime, optimum and transformers.js serve a classifier.

    It holds `onnx/model.onnx`, with `int8` also `onnx/model_quantized.onnx`, tokenizer, config.json, and a model card.
    Of a run of `distill` the card says how good each graph is on the run's test split, as `quality.json` does.

    Args:
        source: the folder of a run, or the folder or hub name of any classifier of transformers.
        out: the folder to write, new or with an earlier export.
        int8: also write the graph with weights of eight bits.
        max_length: tokens of a text that are kept; None takes those of the run, else those of the tokenizer, 512 at
            most.

    Returns:
        The folder.

    Raises:
        ValueError: the classifier has no trained head, torch can't export its kind, the graph computes other logits
            than the model, or `out` holds something else, which would be lost.
        FileNotFoundError, ConnectionError: there is no such model, or it can't be reached.
    """
    folder = Path(expanded(out, "out"))
    if folder.is_symlink():
        folder = folder.resolve()  # or the link itself would be replaced
    _require_room(folder)
    loaded = _load(str(source), max_length)

    def build(target: Path) -> None:
        write_onnx(loaded.model, loaded.tokenizer, target, max_length=loaded.max_length, int8=int8)
        quality = None if loaded.run is None else _quality(loaded.run, target)
        if quality is not None:
            artifacts.save_json(target / QUALITY, quality)
        (target / "README.md").write_text(_card(loaded, str(source), quality), encoding="utf-8")

    with artifacts.locked(folder):
        artifacts.write_folder(folder, build)
    return folder


def _require_room(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export, which is replaced as a whole."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / FLOAT32).exists()):
        raise ValueError(f"{folder} is there already and holds no export; choose another folder.")
    if others := artifacts.foreign_files(folder):
        raise ValueError(
            f"{folder} holds {some(others)}, which no export wrote and which would be lost; choose another folder."
        )


def cached_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Path:
    """The folder with both graphs of a model: found again in `artifacts/exports`, or written there.

    Args, errors: see `write_onnx`.
    """
    provenance = made_by("kd_helpers.export") | {"model": model_digest(model), "max_length": max_length}
    folder = artifacts.artifacts_dir() / "exports" / artifacts.fingerprint(provenance)
    artifacts.get_or_build(
        folder, lambda target: write_onnx(model, tokenizer, target, max_length=max_length, int8=True)
    )
    return folder


def write_onnx(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, max_length: int, int8: bool = False
) -> None:
    """Write a model as ONNX into a folder, with what a program needs to run it, and compare it with the model.

    Args:
        model: a classifier of transformers. It stays as it is, in its mode: a copy of it is exported.
        tokenizer: that of the model.
        folder: is filled.
        max_length: tokens of a text that are kept.
        int8: also write the graph with weights of eight bits.

    Raises:
        ValueError: torch can't export this kind of model, or the graph computes other logits.
    """
    model = copy.deepcopy(unwrapped(model)).cpu().float().eval()
    kind = model.config.model_type
    match_tokenizer(model, tokenizer, max_length, kind)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of the {kind} has no tokenizer.json, which serves without transformers.")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length  # where transformers.js cuts texts; the next line is for tokenizers
    tokenizer.backend_tokenizer.enable_truncation(max_length)
    with quiet_transformers():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / FLOAT32).parent.mkdir()
    batches = list(_probe_batches(model, tokenizer, max_length))
    with _one_sentence(kind):
        model.set_attn_implementation("eager")  # the one that the exporter knows for every kind of model
        _export(model, batches[0], folder / FLOAT32)
        exported = OnnxClassifier(folder)
        found = [exported(**batch).logits for batch in batches]
    with torch.inference_mode():
        expected = [model.eval()(**batch).logits for batch in batches]
    worst = max(float((mine - theirs).abs().max()) for mine, theirs in zip(found, expected, strict=True))
    if not all(map(_is_close, found, expected)):
        raise ValueError(
            f"the exported {kind} computes other logits than the model: they differ by up to {worst:.2g}, and "
            f"{TOLERANCE:g} · (1 + |logit|) is allowed; serve it with torch."
        )
    if int8:
        _quantise(folder / FLOAT32, folder / INT8)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


class _LogitsOf(nn.Module):
    """A classifier that takes its tensors in order and returns nothing but logits."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def _export(model: PreTrainedModel, batch: Batch, path: Path) -> None:
    """Write the graph, whose batches may have any number of texts and any length."""
    names = list(batch)
    with _quiet():
        torch.onnx.export(
            _LogitsOf(model, names),
            tuple(batch.values()),
            path,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes={"tensors": tuple({0: "texts", 1: "tokens"} for _ in names)},
            external_data=False,  # one file; programs that serve look for it alone
            verbose=False,
        )


def _quantise(source: Path, target: Path) -> None:
    """Round weights to 255 values, embeddings to 256; activations are rounded when a batch comes, by its own range."""
    with _quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def _probe_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Batch]:
    """Texts of one word to very many: padded together to the longest, in pairs, and each alone."""
    texts = [tokenizer(text, truncation=True, max_length=max_length) for text in _PROBES]
    middle = len(texts) // 2
    pairs = [[texts[index], texts[-1 - index]] for index in range(middle)]
    for batch in (texts[:middle], texts, *pairs, *([text] for text in texts)):
        yield model_inputs(model, dict(tokenizer.pad(batch, return_tensors="pt")))


@contextlib.contextmanager
def _one_sentence(kind: str) -> Iterator[None]:
    """Say in a sentence that torch or onnxruntime can't cope with a kind of model; each raises errors of many types."""
    try:
        yield
    except OSError:  # a full disk is no fault of the model
        raise
    except Exception as error:
        raise ValueError(
            f"a {kind} can't be exported as ONNX ({type(error).__name__}); serve it with torch, or distil a student of "
            "another kind, such as BERT or DistilBERT."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter and the quantiser say to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Source(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    run: DistillResult | None


def _load(source: str, max_length: int | None) -> _Source:
    """What is to be exported: the student of a run, or a classifier from elsewhere."""
    if max_length is not None:
        require_whole("max_length", max_length, minimum=3)
    folder = Path(expanded(source, "source"))
    if (folder / "student").is_dir():
        run = load_run(folder)
        return _Source(run.student, run.tokenizer, max_length or run.config.max_length, run)
    config = load_config(source)
    require_softmax_head(source, config)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise ValueError(f"{source!r} has no trained classification head; fine-tune it, or distil a student from it.")
    tokenizer = load_tokenizer(source)
    model = load_classifier(source, list(config.id2label.values()), seed=0)
    return _Source(model, tokenizer, max_length or min(tokenizer.model_max_length, LONGEST), None)


def _quality(run: DistillResult, folder: Path) -> Quality | None:
    """How good the student and its graphs are on the run's test split; None where the run's texts are not found.

    Returns:
        For "torch", "onnx" and, where there is one, "int8": the measures of `classification_metrics`, `fidelity` to the
        torch student, and `megabytes`. The graph of eight bits reads one text at a time, as it will when it serves.
    """
    texts = _test_texts(run)
    if texts is None:
        return None
    size = next((run.folder / "student").glob("*.safetensors")).stat().st_size / 1e6
    rows = {"torch": _measures(run.predictions, run.predictions) | {"megabytes": size}}
    for name, path in (("onnx", FLOAT32), ("int8", INT8)):
        if (folder / path).exists():
            model = OnnxClassifier(folder, int8=path == INT8)
            batches = evaluation_batches(texts, run.tokenizer, batch_size=1 if path == INT8 else 64)
            rows[name] = _measures(predict(model, batches), run.predictions) | {"megabytes": model.megabytes}
    return rows


def _test_texts(run: DistillResult) -> datasets.Dataset | None:
    """The tokenized texts of a run's test split, if its data is still where it was."""
    try:
        data = resolve(run.config).data
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the export is not measured, because the data of {run.folder} can't be read: {error}", stacklevel=5
        )
        return None
    if sorted(data.test["id"][:]) != run.predictions.ids.tolist():
        warnings.warn(f"the export is not measured, because {run.folder} was made with data given to it.", stacklevel=5)
        return None
    return tokenize(data.test, run.tokenizer, run.config.max_length)


def _measures(predictions: Predictions, reference: Predictions) -> dict[str, float]:
    scores = classification_metrics(predictions.logits, predictions.labels)
    return scores | {"fidelity": fidelity(predictions.logits, reference.logits)["fidelity"]}


_CARD = """---
library_name: transformers.js
pipeline_tag: text-classification
tags: [knowledge-distillation, onnx]
---
# A classifier in ONNX: {classes}

{about}

`onnx/model.onnx` computes in float32, `onnx/model_quantized.onnx`, where there is one, with weights of eight bits.
Texts are cut at {max_length} tokens.

{measured}

```python
import numpy as np
import onnxruntime
import tokenizers

tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("onnx/model.onnx")
text = tokenizer.encode("a text to classify")
given = {{"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}}
(logits,) = session.run(["logits"], {{entry.name: np.array([given[entry.name]]) for entry in session.get_inputs()}})
```
"""


def _card(loaded: _Source, source: str, quality: Quality | None) -> str:
    """The export's README in the hub's format."""
    about = f"Exported from {Path(source).name}."
    if loaded.run is not None:
        config = loaded.run.config
        about = (
            f"A student, distilled at temperature {config.temperature:g} with alpha {config.alpha:g}, the weight of "
            f"the soft loss: preset {config.preset}, seed {config.seed}."
        )
    measured = "How good the graphs are was not measured."
    if quality is not None:
        rows = ["| test split | " + " | ".join(quality["torch"]) + " |", "|---" * (1 + len(quality["torch"])) + "|"]
        rows += [
            f"| {way} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |" for way, row in quality.items()
        ]
        measured = "\n".join(rows) + "\n\nFidelity is the share of texts for which torch predicts the same class."
    return _CARD.format(
        classes=", ".join(loaded.model.config.id2label.values()),
        about=about,
        max_length=loaded.max_length,
        measured=measured,
    )


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers export") -> int:
    """Export a run or a model folder.

    Returns:
        Exit status: 0, or 2 for a request that can't be met.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a classifier as ONNX, so that onnxruntime, optimum or transformers.js can serve it. Every "
        "graph is compared with the torch model; of a run, its quality on the run's test split is measured.",
        epilog=f"Example: {prog} artifacts/runs/0123456789abcdef --int8",
    )
    parser.add_argument("source", metavar="RUN", help="folder of a run, or folder or hub name of a classifier")
    parser.add_argument("--int8", action="store_true", help="also write the graph with weights of eight bits")
    parser.add_argument("--out", help="folder; artifacts/exports/NAME when left out")
    parser.add_argument("--max-length", type=int, help="tokens of a text that are kept; when left out, the run's own")
    chosen = parser.parse_args(arguments)
    out = chosen.out or artifacts.artifacts_dir() / "exports" / Path(expanded(chosen.source, "RUN")).resolve().name
    try:
        folder = export_onnx(chosen.source, out, int8=chosen.int8, max_length=chosen.max_length)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    if (folder / QUALITY).exists():
        print(pd.DataFrame.from_dict(artifacts.load_json(folder / QUALITY), orient="index").round(4).to_string())
    print(f"written to {folder}")
    return 0
