"""Training through the rounding of onnxruntime: the values, the gradients, and that it is taken out again."""

from __future__ import annotations

import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.models import tiny_bert
from torch import nn
from torch.testing import assert_close

from kd_helpers.export import INT8, OnnxClassifier, sums_overflow, write_onnx
from kd_helpers.methods.quantisation_aware import RoundedWeights, rounded_inputs, rounded_layers
from kd_helpers.metrics import predict


def test_weights_take_255_values_a_row_and_0_is_one_of_them():
    weights = torch.tensor([[1.0, -0.49, 0.251, 0.0], [0.02, -0.011, 0.00017, 0.0]])
    rounded = RoundedWeights()(weights)
    for row, exact in zip(rounded, weights, strict=True):
        step = exact.abs().max() / 127
        assert_close(row, torch.round(exact / step) * step)
    assert rounded[0, 0] == 1.0
    assert rounded[1, 0] == pytest.approx(0.02)


def test_weights_of_zero_can_learn():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    with rounded_layers(layer):
        layer(torch.tensor([[1.0, -2.0, 0.5]])).sum().backward()
    assert_close(layer.weight.grad, torch.tensor([[1.0, -2.0, 0.5]] * 2), rtol=0.02, atol=0.02)


def test_inputs_take_256_values_over_their_range():
    inputs = torch.tensor([[-1.0, 0.0, 0.3], [2.0, 1.7, 0.001]])
    step = 3.0 / 255
    zero = round(1.0 / step)
    expected = (torch.clamp(torch.round(inputs / step) + zero, 0, 255) - zero) * step
    assert_close(rounded_inputs(inputs), expected)
    assert rounded_inputs(inputs)[0, 1] == 0
    assert_close(rounded_inputs(torch.zeros(3)), torch.zeros(3))
    assert rounded_inputs(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_gradient_passes_as_if_nothing_were_rounded():
    torch.manual_seed(0)
    weights, inputs = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    RoundedWeights()(weights).sum().backward()
    rounded_inputs(inputs).sum().backward()
    assert_close(weights.grad, torch.ones_like(weights))
    assert_close(inputs.grad, torch.ones_like(inputs))


def test_a_model_is_rounded_within_and_trained_behind_it():
    model = tiny_bert(1, dropout=0.0).eval()
    ids = torch.tensor([[101, 2054, 2003, 102]])
    before, names = model(ids).logits, list(model.state_dict())
    with rounded_layers(model):
        rounded = model(ids).logits
        assert 0 < float((rounded - before).abs().max().detach()) < 0.05
        rounded.sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        with pytest.raises(ValueError, match="rounded already"), rounded_layers(model):
            pass
    after = model(ids).logits
    assert sorted(model.state_dict()) == sorted(names)
    assert float((after - before).abs().max().detach()) > 0.05
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear, so there is nothing to round"), rounded_layers(nn.ReLU()):
        pass


def test_the_rounding_is_that_of_onnxruntime(tmp_path, tokenized, tokenizer):
    model = tiny_bert(2, dropout=0.0).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    write_onnx(model, tokenizer, tmp_path, max_length=24, int8=True)
    rows = [tokenized.select([index]) for index in range(16)]
    columns = ("id", "input_ids", "attention_mask", "token_type_ids")
    alone = [{name: torch.tensor(row[name][:]) for name in columns} for row in rows]
    alone = [batch | {"labels": torch.zeros(1, dtype=torch.long)} for batch in alone]
    graph = predict(OnnxClassifier(tmp_path, int8=True), alone).logits
    if sums_overflow():  # here; the evaluator of onnx computes what onnxruntime does elsewhere
        exact = ReferenceEvaluator(str(tmp_path / INT8))
        inputs = [{name: batch[name].numpy() for name in exact.input_names} for batch in alone]
        found = [torch.from_numpy(exact.run(["logits"], given)[0]) for given in inputs]
        graph = torch.cat(found)[torch.argsort(torch.cat([batch["id"] for batch in alone]))]
    unrounded = float((predict(model, alone).logits - graph).abs().max())
    assert unrounded > 5e-3
    with rounded_layers(model):
        rounded = predict(model, alone).logits
    gaps = (rounded - graph).abs().amax(dim=1)
    assert float(gaps.max()) < unrounded / 2
    assert int((gaps > 1e-5).sum()) <= 1, "a number just between two steps may be rounded up here and down there"
