from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from scipy import stats
from support.architectures import tiny, without_dropout
from support.models import tiny_bert, tiny_distilbert
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

from kd_helpers.data import evaluation_batches, training_batches
from kd_helpers.lean import ATTENTION, CoarseDropout, RoundedNorm, SeenRows, coarse_dropout, lean_training
from kd_helpers.loop import distill_epoch
from kd_helpers.metrics import predict
from kd_helpers.models import model_inputs
from kd_helpers.optim import make_optimizer, make_scheduler


@pytest.fixture(params=[tiny_bert, tiny_distilbert])
def student(request):
    return request.param()


def train(model, batches, *, weight_decay: float):
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=weight_decay)
    scheduler = make_scheduler(optimizer, steps=100)
    return distill_epoch(model, batches, optimizer, scheduler, temperature=1.0, alpha=0.0)


def test_training_lean_gives_the_losses_and_weights_of_training_whole(student, tokenized, tokenizer):
    whole, lean = without_dropout(student), copy.deepcopy(student)
    batches = list(training_batches(tokenized, tokenizer, 16, seed=0))
    expected = train(whole, batches, weight_decay=0.0)
    with lean_training(lean, tokenized["input_ids"][:]):
        losses = train(lean, batches, weight_decay=0.0)
    assert_close(losses.total, expected.total, rtol=1e-5, atol=1e-6)
    assert lean.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert_close(
            lean.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_weight_decay_reaches_the_rows_that_occur_and_no_others(student, tokenized, tokenizer):
    start = student.get_input_embeddings().weight.detach().clone()
    whole, lean = without_dropout(student), copy.deepcopy(student)
    batches = list(training_batches(tokenized, tokenizer, 16, seed=0))
    train(whole, batches, weight_decay=0.5)
    with lean_training(lean, tokenized["input_ids"][:]):
        train(lean, batches, weight_decay=0.5)
    occurring = torch.zeros(len(start), dtype=torch.bool)
    occurring[[*sorted({token for text in tokenized["input_ids"][:] for token in text}), 0]] = True  # 0 pads
    after, expected = lean.get_input_embeddings().weight, whole.get_input_embeddings().weight
    assert_close(after[occurring], expected[occurring], rtol=1e-3, atol=2e-5)
    assert torch.equal(after[~occurring], start[~occurring])
    assert not torch.equal(expected[~occurring], start[~occurring])


def test_only_the_rows_that_occur_are_trained_within(student, tokenized):
    table = student.get_input_embeddings()
    texts = tokenized["input_ids"][:]
    with lean_training(student, texts):
        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        assert not any(parameter is table.weight for parameter in trainable)
        assert len({token for text in texts for token in text} | {0}) in {len(parameter) for parameter in trainable}
    assert student.get_input_embeddings() is table
    assert table.weight.requires_grad


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_itself_again_afterwards(student, tokenized, fail):
    names = [(name, type(module)) for name, module in student.named_modules()]
    attention = student.config._attn_implementation
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    try:
        with lean_training(student, tokenized["input_ids"][:]):
            assert any(isinstance(module, CoarseDropout) for module in student.modules())
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    assert [(name, type(module)) for name, module in student.named_modules()] == names
    assert student.config._attn_implementation == attention
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_texts_outside_the_training_texts_are_answered_as_ever(student, tokenized, tokenizer):
    batches = evaluation_batches(tokenized, tokenizer, 16)
    before = predict(student, batches)
    with lean_training(student, tokenized["input_ids"][:3]):
        within = predict(student, batches)
    assert torch.equal(before.logits, within.logits)


def test_attention_drops_weights_and_never_looks_at_padding():
    model = tiny_bert(dropout=0.0)
    texts = {
        "input_ids": torch.tensor([[101, 2054, 2003, 102], [101, 2054, 102, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    other = texts | {"input_ids": torch.tensor([[101, 2054, 2003, 102], [101, 2054, 102, 2009]])}
    expected = model.eval()(**texts).logits
    with lean_training(model.train(), [[101, 2054, 2003, 2009, 102]]):
        assert_close(model(**texts).logits, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(**texts).logits, model(**other).logits)
        model.bert.encoder.layer[0].attention.self.dropout.p = 0.5
        assert not torch.equal(model(**texts).logits, model(**texts).logits)


def test_a_text_that_is_all_padding_gives_numbers():
    model = tiny_bert(dropout=0.0)
    texts = {"input_ids": torch.tensor([[101, 102], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with lean_training(model.train(), [[101, 102]]):
        assert model(**texts).logits.isfinite().all()


def test_validation_within_sees_the_trained_rows(student, tokenized, tokenizer):
    batches = evaluation_batches(tokenized, tokenizer, 16)
    before = predict(student, batches)
    with lean_training(student, tokenized.select(range(64))["input_ids"][:]):
        train(student, training_batches(tokenized.select(range(64)), tokenizer, 16, seed=0), weight_decay=0.0)
        within = predict(student, batches)
    assert_close(predict(student, batches).logits, within.logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before.logits, within.logits, atol=1e-3)


def test_a_frozen_table_stays_frozen(student, tokenized):
    table = student.get_input_embeddings().requires_grad_(False)
    with lean_training(student, tokenized["input_ids"][:]):
        assert not any(parameter.requires_grad for parameter in student.get_input_embeddings().parameters())
    assert not table.weight.requires_grad


def test_a_shared_table_is_refused():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="shares the embedding table"), lean_training(BertForMaskedLM(config), [[1]]):
        pass


def test_a_token_that_the_table_lacks_changes_nothing(student):
    with pytest.raises(IndexError), lean_training(student, [[10**6]]):
        pass
    assert isinstance(student.get_input_embeddings(), nn.Embedding)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_it_should_wherever_a_value_stands(p, dtype):
    torch.manual_seed(0)
    kept = coarse_dropout(torch.ones(400, 500, dtype=dtype), p)
    assert kept.dtype == dtype
    dropped, scaled = kept.unique().tolist()
    assert dropped == 0
    assert scaled == pytest.approx(torch.tensor(1, dtype=dtype).div(1 - p).item(), rel=2e-5)
    assert stats.binomtest(int((kept == 0).sum()), kept.numel(), p).pvalue > 1e-3
    lanes = (kept == 0).flatten().view(-1, 4)  # four values share a draw
    for counts, n in ((lanes.sum(dim=0), len(lanes)), ((kept == 0).sum(dim=1), 500), ((kept == 0).sum(dim=0), 400)):
        assert stats.chi2.sf(((counts - n * p) ** 2 / (n * p * (1 - p))).sum().item(), len(counts)) > 1e-3
    together = (lanes[:, 0] & lanes[:, 1]).sum().item()
    assert stats.binomtest(together, len(lanes), p * p).pvalue > 1e-3


def test_dropout_repeats_with_the_seed_and_scales_the_gradient_alike():
    values = torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(1)
    first = coarse_dropout(values, 0.3)
    torch.manual_seed(1)
    assert torch.equal(first, coarse_dropout(values, 0.3))
    assert not torch.equal(first, coarse_dropout(values, 0.3))
    first.sum().backward()
    assert_close(values.grad * values.detach(), first.detach())


def test_dropout_is_off_outside_training():
    values = torch.randn(4, 4)
    assert torch.equal(CoarseDropout(0.5).eval()(values), values)
    assert torch.equal(CoarseDropout(0.0)(values), values)
    for p in (1.0, 0.999999):
        assert not CoarseDropout(p)(values).any()


def test_a_norm_is_rounded_in_training_under_autocast_and_nowhere_else():
    values = torch.randn(5, 16) + 3
    usual, rounded = nn.LayerNorm(16), RoundedNorm(16)
    expected = usual(values)
    assert torch.equal(rounded(values), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rounded(values)
        assert torch.equal(rounded.eval()(values), expected)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, rtol=2**-7, atol=2**-6)
    found.float().sum().backward()
    assert rounded.weight.grad.dtype == torch.float32


def test_in_bfloat16_lean_losses_are_those_of_ordinary_training_but_for_rounding(student, tokenized, tokenizer):
    whole, lean = without_dropout(student), copy.deepcopy(student)
    batches = list(training_batches(tokenized, tokenizer, 16, seed=0))
    losses = []
    for model, context in ((whole, contextlib.nullcontext()), (lean, lean_training(lean, tokenized["input_ids"][:]))):
        with context:
            optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
            settings = {"temperature": 1.0, "alpha": 0.0, "precision": torch.bfloat16}
            losses.append(distill_epoch(model, batches, optimizer, make_scheduler(optimizer, steps=100), **settings))
    assert_close(losses[1].total, losses[0].total, rtol=0.02, atol=0.01)
    assert {type(module) for module in lean.modules()} == {type(module) for module in whole.modules()}


def test_the_row_of_the_padding_gets_no_gradient():
    seen = SeenRows(nn.Embedding(6, 2, padding_idx=0), [[3, 5]])
    seen(torch.tensor([[3, 0]])).sum().backward()
    assert seen.weight.grad.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_training_on_a_token_that_does_not_occur_is_an_error():
    seen = SeenRows(nn.Embedding(6, 2, padding_idx=0), [[3, 5]])
    with pytest.raises(IndexError):
        seen(torch.tensor([[4]]))
    assert seen.eval()(torch.tensor([[4]])).shape == (1, 1, 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "t5", "bart", "modernbert", "xlm-roberta"])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_of_every_form_is_the_models_own(kind, padded):
    """Causal with and without a mask, heads that share keys, a bias for positions, a window, a decoder."""
    model, tokenizer = tiny(kind)
    without_dropout(model)
    texts = ["what a good day it is for you and me to be"] * 2 if not padded else ["what a good day it is", "good"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = model_inputs(model, tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        with lean_training(model.train(), batch["input_ids"].tolist()):
            assert model.config._attn_implementation == ATTENTION
            assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
            assert_close(model.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "limited"), [("t5", True), ("gpt2", True), ("xlnet", True), ("gemma", False), ("bart", False)]
)
def test_a_table_is_limited_to_rows_that_occur_wherever_it_is_held_unless_it_scales_them(kind, limited):
    model, _ = tiny(kind)
    held = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    modules, names = dict(model.named_modules()), list(model.state_dict())
    shared = [name for name, module in modules.items() if getattr(module, "weight", None) is modules[held[0]].weight]
    assert len(shared) == (3 if kind in ("t5", "bart") else 1)
    with lean_training(model, [[4, 5, 6]]):
        assert all(isinstance(model.get_submodule(name), SeenRows) == limited for name in shared)
        assert modules[held[0]].weight.requires_grad == (not limited)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == names


def test_attention_that_goes_its_own_way_is_left_alone():
    model, _ = tiny("deberta-v3")
    with lean_training(model, [[4, 5, 6]]):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"
