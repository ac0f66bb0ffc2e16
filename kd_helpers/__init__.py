"""The package behind the course on knowledge distillation.

Its top level is the library: what a practitioner imports. Modules follow the first chapters.

| module | chapter |
|---|---|
| `config` | 00: every choice that makes up a run |
| `data`, `own_data`, `hub` | 01: tweets or your own texts, splits, batches |
| `models`, `pretrained`, `adapters` | 02: teacher and student |
| `teacher` | 02: the teacher's fine-tuning and its cached logits |
| `losses` | 03: the distillation loss |
| `optim` | 04: optimiser and learning rate |
| `loop`, `lean`, `checkpoints`, `metrics`, `runs` | 05: the training loop, and a whole run |
| `export`, `cascade` | 08: a student that serves, alone or before its teacher |
| `trainer`, `teacher_trainer`, `trainer_arguments`, `train`, `shards` | 16: many devices, many texts |
| `resolve`, `runtime`, `artifacts`, `provenance` | all of them |

`methods` holds one module for each published method (chapters 08 and 10 to 15), and `methods.causal_trainer`, which
brings those of chapter 13 into the Trainer of chapter 16. `experiments` holds the comparisons, sweeps and studies (06
to 08, 10 to 15), and `course` the notebooks' figures, pages and execution. An import goes down in this order, never up.
`python -m kd_helpers` is the command line.

The names below can be imported from here. A module is loaded when one of its names is first used, so
`import kd_helpers` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.6.0"

_HOME = {
    "DistillConfig": "config",
    "PRESETS": "config",
    "load_splits": "data",
    "soft_targets": "losses",
    "soft_loss": "losses",
    "hard_loss": "losses",
    "distillation_loss": "losses",
    "fit": "loop",
    "distill_epoch": "loop",
    "evaluate": "metrics",
    "predict_and_evaluate": "metrics",
    "distill": "runs",
    "load_run": "runs",
    "export_onnx": "export",
    "DistillationTrainer": "trainer",
    "DistillationArguments": "trainer",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
