"""Weights that take few values, and the gradient that passes through the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_helpers.methods.quantised import quantise, rounded


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounded_weights_take_evenly_spaced_values_and_the_nearest_ones(bits):
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits))
    found = rounded(weights, bits)
    step = (weights.max() - weights.min()) / (2**bits - 1)
    assert len(found.unique()) <= 2**bits
    assert (found - weights).abs().max() <= step / 2 * (1 + 1e-4)
    assert found.min().item() == weights.min().item()
    assert found.max().item() == pytest.approx(weights.max().item(), rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_quantised_layer_computes_with_no_more_values_than_its_bits_allow(bits):
    for seed in range(20):
        torch.manual_seed(seed)
        layer = quantise(nn.Linear(40, 30), bits)
        assert len(layer.weight.unique()) <= 2**bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_from_exact_values(dtype):
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rounded(weights, 4)
    assert found.dtype == dtype
    torch.testing.assert_close(found, rounded(weights.float(), 4).to(dtype))


def test_equal_weights_stay_as_they_are():
    assert rounded(torch.full((3, 2), 0.7), 2).tolist() == torch.full((3, 2), 0.7).tolist()


def test_the_gradient_of_rounded_weights_arrives_at_the_weights_behind_them():
    torch.manual_seed(0)
    layer, pictures = nn.Linear(5, 3), torch.randn(7, 5)
    behind = layer.weight.detach().clone()
    quantise(nn.Sequential(layer), bits=2)
    torch.testing.assert_close(layer.weight, rounded(behind, 2))
    layer(pictures).square().sum().backward()
    by_hand = rounded(behind, 2).requires_grad_()
    (pictures @ by_hand.T + layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, by_hand.grad)


def test_steps_smaller_than_a_level_add_up():
    """Without weights in full precision behind them, no small step would ever change a rounded weight."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 1, bias=False)
    quantise(nn.Sequential(layer), bits=2)
    target, pictures = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]]), torch.eye(6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    first = (layer(pictures) - target.T).square().sum().item()
    for _ in range(400):
        optimizer.zero_grad()
        loss = (layer(pictures) - target.T).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_convolutions_are_quantised_and_other_layers_are_not():
    model = quantise(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)), bits=1)
    assert len(model[0].weight.unique()) == len(model[3].weight.unique()) == 2
    assert model[1].weight.tolist() == [1.0] * 4
    assert len(model[0].bias.unique()) == 4


def test_what_can_not_be_quantised_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantise(nn.BatchNorm1d(3), bits=2)
    with pytest.raises(ValueError, match="bits is 9; give a whole number from 1 to 8"):
        quantise(nn.Linear(2, 2), bits=9)
    with pytest.raises(TypeError, match=r"bits is 2\.5"):
        quantise(nn.Linear(2, 2), bits=2.5)
    once = quantise(nn.Linear(2, 2), bits=2)
    with pytest.raises(ValueError, match="quantised already"):
        quantise(once, bits=2)
