"""A page of the site in which teacher and students answer a sentence in the reader's own browser.

The models are ONNX graphs with weights of eight bits, and transformers.js runs them. All that the page loads stands
beside it, so it works without a network.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.course.npm import NpmPackage, npm_files
from kd_helpers.course.pages import page
from kd_helpers.data import evaluation_batches, tokenize
from kd_helpers.export import INT8, OnnxClassifier, cached_export
from kd_helpers.metrics import evaluate
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runs import distill
from kd_helpers.teacher import fine_tuned_teacher

TRANSFORMERS_JS = NpmPackage(
    "@huggingface/transformers",
    "4.3.1",
    "sha512-5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
    ("dist/transformers.web.min.js", "LICENSE"),
)
ONNXRUNTIME_WEB = NpmPackage(
    "onnxruntime-web",
    "1.31.0-dev.20260914-8d85527a0",  # the one that this transformers.js asks for
    "sha512-Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
    ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
)
# The student of the tuned teacher and the transfer set, and the same student without a teacher.
DISTILLED = DistillConfig(transfer_size=21_631, max_steps=1000, epochs=3)
BASELINE = DistillConfig(max_steps=1000, epochs=3, alpha=0.0)
EXAMPLES = (
    "What a lovely morning, I feel great!",
    "my flight is delayed again, thanks a lot",
    "The meeting starts at nine on Tuesday.",
    "I don't hate it, but I would not buy it twice",
)


class Shown(NamedTuple):
    """A model on the page: its name in addresses, its title, what it is, and the folder to which it was exported."""

    name: str
    title: str
    about: str
    graphs: Path


def course_models() -> list[Shown]:
    """The teacher, its student and the baseline; what is not there yet is trained now."""
    setup = resolve(DISTILLED)
    teacher, tokenizer, length = fine_tuned_teacher(setup), setup.tokenizers.teacher, DISTILLED.max_length
    shown = [
        Shown(
            "teacher",
            "Teacher",
            f"{teacher.config.num_hidden_layers} layers, from {len(setup.data.teacher_train):,} labelled tweets",
            cached_export(teacher, tokenizer, max_length=length),
        )
    ]
    for name, title, learned, config in (
        ("student", "Distilled student", "from the teacher, with {unlabelled:,} tweets without labels", DISTILLED),
        ("baseline", "Student without a teacher", "from {labelled:,} labelled tweets", BASELINE),
    ):
        run = distill(config)
        about = f"{run.student.config.num_hidden_layers} layers, {learned.format(**run.metrics)}"
        shown.append(Shown(name, title, about, cached_export(run.student, run.tokenizer, max_length=length)))
    return shown


def demo(folder: Path) -> Path:
    """Write the page with the course's models into the folder of the site; returns its path."""
    models = course_models()
    setup = resolve(DISTILLED)
    return write_demo(folder, models, {shown.name: test_accuracy(shown, setup) for shown in models})


def test_accuracy(shown: Shown, setup: Setup) -> float:
    """How often the graph of eight bits is right on the test split, one text at a time."""
    texts = tokenize(setup.data.test, setup.tokenizers.student, setup.config.max_length)
    model = OnnxClassifier(shown.graphs, int8=True)
    return evaluate(model, evaluation_batches(texts, setup.tokenizers.student, batch_size=1))["accuracy"]


def write_demo(folder: Path, models: Sequence[Shown], accuracy: dict[str, float]) -> Path:
    """Write `demo.html`, and beside it the folder `demo` with the libraries and the models that it loads.

    Args:
        folder: of the site.
        models: each with a graph of eight bits.
        accuracy: of each, by name.

    Raises:
        ValueError: see `npm_files`.
    """
    libraries = [*npm_files(TRANSFORMERS_JS), *npm_files(ONNXRUNTIME_WEB)]
    with artifacts.locked(folder / "demo"):
        artifacts.write_folder(folder / "demo", lambda target: _copy(libraries, models, target))
    shown = [_described(model, accuracy[model.name]) for model in models]
    artifacts.write_text(folder / "demo.html", page("demo.html.j2", models=shown, examples=EXAMPLES, content=None))
    return folder / "demo.html"


def _copy(libraries: Sequence[Path], models: Sequence[Shown], target: Path) -> None:
    for file in libraries:
        shutil.copy(file, target)
    for model in models:
        files = ("config.json", "tokenizer.json", "tokenizer_config.json", os.fspath(INT8))
        for name in files:
            place = target / model.name / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model.graphs / name, place)


def _described(model: Shown, accuracy: float) -> dict[str, Any]:
    """What the page says of a model."""
    megabytes = (model.graphs / INT8).stat().st_size / 1e6
    return {
        "name": model.name,
        "title": model.title,
        "about": model.about,
        "facts": f"{megabytes:.1f} MB, right on {accuracy:.1%} of the test tweets",
    }
