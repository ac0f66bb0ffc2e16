"""Chapter 04: the optimiser and the learning rate over time."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup


def make_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Biases and LayerNorm's scales, which are vectors, are not decayed, as in BERT's own training: there are few of them,
    and a scale that is pulled towards 0 removes what its layer computes. `fused=True` updates a tensor in one pass over
    memory, on a CPU as on a GPU.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, *, steps: int, warmup_ratio: float = 0.0) -> LRScheduler:
    """The learning rate rises over `warmup_ratio · steps` steps, then falls linearly to 0 at `steps`.

    It rises over `steps − 1` at most: the first step of a rise has a rate of 0, and one step alone would learn nothing.
    """
    warmup = min(round(warmup_ratio * steps), steps - 1)
    return get_linear_schedule_with_warmup(optimizer, num_warmup_steps=warmup, num_training_steps=steps)
