"""Chapter 15: a student whose weights take few values, trained through the rounding.

From Polino, Pascanu and Alistarh, "Model compression via distillation and quantization" (2018, arXiv 1802.05668):
the student computes with rounded weights, and the gradient that arrives at them is applied to weights in
full precision behind them, as if nothing had been rounded (the straight-through estimator).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from kd_helpers.config import require_whole


def rounded(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of 2^bits values that lie evenly from the smallest to the largest weight; same shape and dtype.

    The authors' code does so in buckets of 256 weights. Here one tensor is one bucket.
    """
    exact = weights.float()
    low, high = exact.min(), exact.max()
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.round((exact - low) / step) * step + low).to(weights.dtype)


class StraightThrough(nn.Module):
    """Rounds weights on the way forward, and leaves their gradient as it is on the way back."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """The rounded weights."""
        return rounded(weights, self.bits).detach() + (weights - weights.detach())


def quantise(model: nn.Module, bits: int) -> nn.Module:
    """Let a model compute with rounded weights, in place; all else stays as it is.

    Args:
        model: with `nn.Linear` or `nn.Conv2d` layers.
        bits: of a weight, 1 to 8.

    Returns:
        The model. Its weights in full precision are trained as usual.

    Raises:
        ValueError: `bits` is out of range, there is no such layer, or the model is quantised already.
    """
    require_whole("bits", bits, minimum=1, maximum=8)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError("the model has neither nn.Linear nor nn.Conv2d, so there is nothing to quantise.")
    if any(parametrize.is_parametrized(layer, "weight") for layer in layers):
        raise ValueError("the model is quantised already; quantise a new one.")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", StraightThrough(bits))
    return model
