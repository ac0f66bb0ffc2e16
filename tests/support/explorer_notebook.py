"""The smallest notebook with every explorer, for tests that run notebooks. Its models are tiny and random."""

from __future__ import annotations

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

CELLS = (
    """\
import pandas as pd
import torch
from kd_helpers.config import PACKAGED_MODEL
from kd_helpers.course.explorers import (
    loss_explorer, predictions_explorer, story_explorer, sweep_explorer, temperature_explorer
)
from kd_helpers.experiments.sweep import stored_sweep
from kd_helpers.methods.language_models import CausalShape, make_causal_model
from kd_helpers.methods.stories import story_tokenizer
from kd_helpers.models import load_tokenizer
from support.models import tiny_bert, tiny_distilbert
names = ("negative", "neutral", "positive")
teacher = torch.tensor([-1.5, 0.5, 2.0])""",
    'temperature_explorer(["what a day", "what a terrible day"], torch.stack([teacher, -teacher]), names)',
    "loss_explorer(teacher, torch.zeros(3), 1, names)",
    """\
models = {"teacher": tiny_bert(), "baseline": tiny_distilbert(), "tuned_teacher": tiny_bert(1)}
for model in models.values():
    model.classifier.weight.data *= 50  # fresh heads would say almost the same of every text
predictions_explorer(models, load_tokenizer(PACKAGED_MODEL), names, start="what a day")""",
    """\
writers = {"teacher": make_causal_model(CausalShape(512, 32, 1, 2), seed=0)}
story_explorer(writers, story_tokenizer(), start="Tim was", new_tokens=12)""",
    'sweep_explorer(pd.DataFrame(stored_sweep()["runs"]))',
)


def explorer_notebook() -> NotebookNode:
    """The notebook, not executed; the cells of explorers are tagged, since nothing of a widget is stored."""
    cells = [new_code_cell(source, metadata={"tags": ["nbval-ignore-output"]}) for source in CELLS]
    cells[0].metadata.tags = []
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})
