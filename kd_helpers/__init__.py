"""The package behind the course on knowledge distillation: one module a chapter, in the same order.

| module | chapter |
|---|---|
| `config` | 00: what a run is made of |
| `data`, `own_data` | 01: tweets or your own texts, splits, batches |
| `models` | 02: teacher and student |
| `losses` | 03: the loss of distillation |
| `optim` | 04: optimiser and learning rate |
| `teacher_logits`, `lean`, `checkpoints`, `training` | 05: the loop |
| `comparison` | 06: did it help? |
| `sweep` | 07: which temperature, which alpha? |
| `dark_knowledge`, `studies` | 10: what a teacher knows beside the label |
| `features`, `distilbert` | 11: a student before there are labels |
| `tinybert`, `augmentation` | 12: a student that sees inside its teacher |
| `trainer`, `train`, `shards` | 16: many devices, many texts |

`artifacts`, `hub`, `plots`, `explorers`, `exercises`, `benchmark`, `course` and its `pages` serve all of them. The
names below can be imported from here; a module is loaded when one of its names is first used, so `import kd_helpers`
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.4.0"

_HOME = {
    "DistillConfig": "config",
    "PRESETS": "config",
    "load_splits": "data",
    "soft_targets": "losses",
    "soft_loss": "losses",
    "hard_loss": "losses",
    "distillation_loss": "losses",
    "distill_epoch": "training",
    "evaluate": "training",
    "distill": "training",
    "load_run": "training",
    "predict_and_evaluate": "comparison",
    "DistillationTrainer": "trainer",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
