"""Chapter 08: a student that learns while its layers are rounded as onnxruntime will round them.

From Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018,
arXiv 1712.05877): on the way forward weights and activations take one of 256 values, on the way back the gradient
passes as if they had not been rounded (the straight-through estimator). The values are those of onnxruntime's dynamic
quantisation: for each output of a layer its own steps from −max to max of its weights, and for the input of a layer
256 steps over the range of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize


class RoundedWeights(nn.Module):
    """Rounds the weights `[out, in]` of a layer to 255 values a row, from −max to max."""

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """The rounded weights; their gradient is that of the weights."""
        largest = weights.detach().abs().amax(dim=1)
        steps = largest.clamp(min=torch.finfo(weights.dtype).tiny) / 127
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weights, steps, zeros, 0, -127, 127)


def rounded_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Activations of any shape, rounded to 256 values over their range, of which 0 is one; same gradient."""
    exact = inputs.float()
    low, high = exact.detach().min().clamp(max=0), exact.detach().max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / step).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(exact, step, zero, 0, 255).to(inputs.dtype)


@contextlib.contextmanager
def rounded_layers(model: nn.Module) -> Iterator[None]:
    """Within, every `nn.Linear` of a model computes with rounded weights and inputs.

    The weights that are trained are those in full precision behind them, and they are what remains afterwards.

    Raises:
        ValueError: there is no such layer, or the model is rounded already.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("the model has no nn.Linear, so there is nothing to round.")
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("the model is rounded already; give a model as it was loaded.")
    hooks = [layer.register_forward_pre_hook(_round_input) for layer in layers]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeights())
    try:
        yield
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            hook.remove()


def _round_input(layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (rounded_inputs(inputs[0]),)
