"""Chapter 08: a student that learns while its layers are rounded as onnxruntime will round them.

From Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018,
arXiv 1712.05877): on the way forward weights and activations take few values, on the way back the gradient
passes as if they had not been rounded (the straight-through estimator). The values are those of onnxruntime's dynamic
quantisation: for each output of a layer 255 of its own from −max to max of its weights; for the input of a layer 256
over the range of the batch; for an embedding table 256 over its range.
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
        steps = weights.detach().abs().amax(dim=1) / 127
        steps = steps.clamp(min=torch.finfo(weights.dtype).tiny)  # of a row of zeros; a smaller one has no inverse
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weights, steps, zeros, 0, -127, 127)


def rounded_between(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Values of any shape, rounded to 256 that lie evenly between two ends, and 0 is one of them; same gradient.

    Args:
        values: are cut at the ends.
        low: at most 0.
        high: at least 0.
    """
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / step).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values.float(), step, zero, 0, 255).to(values.dtype)


def rounded_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Activations of any shape, rounded to 256 values over their range, which is extended to contain 0."""
    return rounded_between(inputs, *_ends(inputs))


def _ends(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = values.detach().float()
    return exact.min().clamp(max=0), exact.max().clamp(min=0)


@contextlib.contextmanager
def rounded_layers(model: nn.Module) -> Iterator[None]:
    """Within, a model computes as onnxruntime will: rounded weights and inputs in `nn.Linear`, rounded `nn.Embedding`.

    The weights that are trained are those in full precision behind them, and they are what remains afterwards. Train
    with `lean=False`: `lean_training` puts a module of its own in the place of the embedding table.

    Raises:
        ValueError: there is no `nn.Linear`, or the model is rounded already.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    tables = [table for table in model.modules() if isinstance(table, nn.Embedding)]
    if not layers:
        raise ValueError("the model has no nn.Linear, so there is nothing to round.")
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("the model is rounded already; give a model as it was loaded.")
    hooks = [layer.register_forward_pre_hook(_round_input) for layer in layers]
    hooks += [table.register_forward_hook(_round_rows) for table in tables]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeights())
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for hook in hooks:
            hook.remove()


def _round_input(layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (rounded_inputs(inputs[0]),)


def _round_rows(table: nn.Embedding, inputs: tuple[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The rows that were looked up, rounded over the range of the whole table."""
    return rounded_between(rows, *_ends(table.weight))
