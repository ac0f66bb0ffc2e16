"""The triple loss against the formula, what is masked, the language teacher, training and resuming it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_distilbert
from transformers import BertConfig, BertForMaskedLM, BertModel

from kd_helpers.config import PACKAGED_MODEL, DistillConfig
from kd_helpers.data import DataSplits, evaluation_batches, load_splits, tokenize
from kd_helpers.loop import DivergedError
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.methods import distilbert
from kd_helpers.methods.distilbert import (
    Weights,
    as_classifier,
    fine_tune,
    held_out_batches,
    language_batches,
    language_forward,
    language_loss,
    language_student,
    language_teacher,
    likely_words,
    load_language_model,
    train_language_model,
    triple_loss,
)
from kd_helpers.metrics import predict
from kd_helpers.models import freeze, load_teacher, weights_digest
from kd_helpers.resolve import Setup, resolve
from kd_helpers.teacher import TeacherLogits

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_language_model(layers: int = 4, *, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(**SHAPE, num_hidden_layers=layers))


@pytest.fixture(scope="module")
def teacher() -> BertForMaskedLM:
    model = tiny_language_model()
    with torch.no_grad():  # as drawn, layers change little and all tokens are nearly as likely
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    return freeze(model)


@pytest.fixture(scope="module")
def batch(tokenized, tokenizer):
    return next(iter(language_batches(tokenized, tokenizer, 8, seed=0)))


@pytest.fixture(scope="module")
def headless(tmp_path_factory, tokenizer) -> str:
    """A pre-trained BERT without a language head, as the packaged one."""
    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE, num_hidden_layers=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def setup_of(data: DataSplits, **changes: Any) -> Setup:
    usual = {"alpha": 0.0, "max_length": 24, "precision": "float32", "device": "cpu"}
    return resolve(DistillConfig(**usual | changes), data)


# --- what is masked ---


def test_masked_tokens_are_real_ones_and_their_labels_what_stood_there(tokenized, tokenizer):
    originals = {tuple(ids) for ids in tokenized["input_ids"][:]}
    masked = tokens = replaced = 0
    for batch in language_batches(tokenized, tokenizer, 16, seed=0):
        chosen = batch["labels"] != IGNORE_INDEX
        assert not chosen[batch["attention_mask"] == 0].any(), "padding"
        restored = torch.where(chosen, batch["labels"], batch["input_ids"])
        special = torch.isin(restored, torch.tensor(tokenizer.all_special_ids))
        assert not chosen[special].any(), "[CLS], [SEP]"
        for ids, mask in zip(restored, batch["attention_mask"].bool(), strict=True):
            assert tuple(ids[mask].tolist()) in originals
        masked, tokens = masked + int(chosen.sum()), tokens + int((~special).sum())
        replaced += int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum())
    assert masked / tokens == pytest.approx(0.15, abs=0.03)
    assert replaced / masked == pytest.approx(0.8, abs=0.1)


def test_masking_is_dynamic_and_belongs_to_the_seed(tokenized, tokenizer):
    def epochs(seed: int) -> list[torch.Tensor]:
        batches = language_batches(tokenized, tokenizer, 128, seed=seed)
        found = []
        for epoch in range(2):
            batches.batch_sampler.set_epoch(epoch)
            torch.rand(3)  # what else is drawn does not matter
            found.append(next(iter(batches)))
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    masked = [batch["labels"][batch["labels"] != IGNORE_INDEX].sort().values for batch in first]
    assert masked[0].tolist() != masked[1].tolist(), "other tokens in the second epoch"


def test_a_tokenizer_without_a_mask_token_is_refused(tokenized, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="this tokenizer has no mask token"):
        language_batches(tokenized, other, seed=0)


# --- the loss ---


def test_logits_of_the_masked_tokens_are_those_of_the_whole_model(teacher, batch):
    output = language_forward(teacher, batch)
    whole = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, whole.logits[batch["labels"] != IGNORE_INDEX])
    torch.testing.assert_close(output.states, whole.hidden_states[-1])


def test_triple_loss_is_the_formula(teacher, batch):
    student = language_student(teacher).eval()
    own, theirs = (language_forward(model, batch) for model in (student, teacher))
    loss = triple_loss(own, theirs, batch, temperature=3.0, weights=Weights(5, 2, 1))
    soft = language = cosine = 0.0
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    for z, r, label in zip(own.logits, theirs.logits, labels, strict=True):
        p = torch.softmax(r.double() / 3, dim=-1)
        soft += 9 * (p * (p.log() - torch.log_softmax(z.double() / 3, dim=-1))).sum().item() / len(labels)
        language -= torch.log_softmax(z.double(), dim=-1)[label].item() / len(labels)
    tokens = batch["attention_mask"].nonzero().tolist()
    for b, t in tokens:
        s, r = own.states[b, t], theirs.states[b, t]
        cosine += (1 - (s @ r / s.norm() / r.norm()).item()) / len(tokens)
    assert loss.soft.item() == pytest.approx(soft, rel=1e-4)
    assert loss.language.item() == pytest.approx(language, rel=1e-4)
    assert loss.cosine.item() == pytest.approx(cosine, rel=1e-4)
    assert loss.total.item() == pytest.approx(5 * soft + 2 * language + cosine, rel=1e-4)
    assert min(soft, language, cosine) > 0.001


def test_a_copy_of_the_teacher_has_no_soft_and_no_cosine_loss(teacher, batch):
    output = language_forward(teacher, batch)
    loss = triple_loss(output, output, batch)
    assert loss.soft.item() == pytest.approx(0, abs=1e-5)
    assert loss.cosine.item() == pytest.approx(0, abs=1e-5)
    assert loss.language.item() > 1


@pytest.mark.parametrize("left_out", Weights._fields)
def test_a_loss_of_weight_zero_is_left_out(teacher, batch, left_out):
    own, theirs = (language_forward(model, batch) for model in (language_student(teacher).eval(), teacher))
    whole = triple_loss(own, theirs, batch)
    loss = triple_loss(own, theirs, batch, weights=Weights()._replace(**{left_out: 0}))
    assert getattr(loss, left_out).item() == 0
    weight = getattr(Weights(), left_out)
    assert loss.total.item() == pytest.approx(whole.total.item() - weight * getattr(whole, left_out).item(), rel=1e-5)


def test_weights_and_outputs_that_make_no_sense_are_refused(teacher, batch):
    own = language_forward(teacher, batch)
    for weights in (Weights(0, 0, 0), Weights(-1, 1, 1)):
        with pytest.raises(ValueError, match=re.escape("give three numbers of at least 0, one of them above 0.")):
            triple_loss(own, own, batch, weights=weights)
    with pytest.raises(
        ValueError, match="soft and cosine loss need the teacher's output; give it, or set these two weights to 0"
    ):
        triple_loss(own, None, batch)
    assert triple_loss(own, None, batch, weights=Weights(0, 1, 0)).total > 0


# --- training and measuring ---


def test_all_three_losses_fall_and_the_teacher_stays_as_it_is(teacher, tokenized, tokenizer):
    before = weights_digest(teacher)
    student = language_student(teacher, random_start=True)
    batches = language_batches(tokenized, tokenizer, 16, seed=0)
    losses = train_language_model(student, batches, steps=24, teacher=teacher, learning_rate=1e-2)
    assert [part.shape for part in losses] == [(24,)] * 4
    for name, part in losses._asdict().items():
        assert part[-4:].mean() < 0.97 * part[:4].mean(), name
    assert weights_digest(teacher) == before
    assert not student.training


def test_training_repeats_itself(teacher, tokenized, tokenizer):
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        student = language_student(teacher)
        batches = language_batches(tokenized, tokenizer, 16, seed=0)
        return train_language_model(student, batches, steps=3, teacher=teacher).total

    assert torch.equal(run(), run())


def test_a_list_of_batches_must_be_long_enough(teacher, tokenized, tokenizer):
    batches = list(language_batches(tokenized, tokenizer, 32, seed=0))[:2]
    with pytest.raises(ValueError, match="3 steps need as many batches, there are 2; give more, or a loader"):
        train_language_model(language_student(teacher), batches, steps=3)


def test_a_teacher_in_train_mode_is_refused(teacher, tokenized, tokenizer):
    batches = language_batches(tokenized, tokenizer, 16, seed=0)
    with pytest.raises(ValueError, match="the teacher is in train mode"):
        train_language_model(language_student(teacher), batches, steps=1, teacher=tiny_language_model().train())


def test_a_student_that_trains_its_teacher_along_is_refused(teacher, tokenized, tokenizer):
    batches = language_batches(tokenized, tokenizer, 16, seed=0)
    student = language_student(teacher)
    student.set_input_embeddings(teacher.get_input_embeddings())  # tied by accident
    with pytest.raises(ValueError, match="teacher and student share weights"):
        train_language_model(student, batches, steps=1, teacher=teacher)
    with pytest.raises(ValueError, match=re.escape("steps is 0; give a whole number of at least 1.")):
        train_language_model(language_student(teacher), batches, steps=0, teacher=teacher)


def test_a_loss_that_is_not_finite_ends_training(teacher, tokenized, tokenizer):
    student = language_student(teacher)
    with torch.no_grad():
        student.cls.predictions.bias[0] = math.inf
    batches = language_batches(tokenized, tokenizer, 16, seed=0)
    with pytest.raises(DivergedError, match="training diverged at step 1"):
        train_language_model(student, batches, steps=1, teacher=teacher)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_named(teacher, tokenized, tokenizer, factor):
    """The losses say nothing then, so that the sentence must."""
    student, gradients = language_student(teacher), []

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        gradients.append(gradient)
        return gradient * factor if len(gradients) == 2 else None

    student.cls.predictions.transform.dense.weight.register_hook(spoil)
    batches = language_batches(tokenized, tokenizer, 16, seed=0)
    number = r"\d[\d.e+-]*"
    losses = f"total {number}, soft {number}, language {number}, cosine {number}"
    sentence = rf"^training diverged at step 2 \({losses}, gradient norm (inf|nan)\): lower the learning rate"
    with pytest.raises(DivergedError, match=sentence) as error:
        train_language_model(student, batches, steps=3, teacher=teacher)
    assert error.value.step == 2
    assert all(value.isfinite().all() for value in student.state_dict().values()), "the step was not made"


@pytest.mark.parametrize("call", [5, 7, 10])
def test_interrupted_and_resumed_it_ends_in_the_same_weights(
    tmp_path, teacher, tokenized, tokenizer, monkeypatch, call
):
    """An epoch has four steps; dropout and masking go on where the last checkpoint left them."""

    def run(seed: int, checkpoints: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        student = language_student(teacher)
        assert student.config.hidden_dropout_prob > 0
        batches = language_batches(tokenized.select(range(32)), tokenizer, 8, seed=0)
        losses = train_language_model(student, batches, steps=10, teacher=teacher, checkpoints=checkpoints)
        return torch.stack(tuple(losses)), student.state_dict()

    calls = []

    def interrupted(*arguments, **options) -> distilbert.LanguageLoss:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return triple_loss(*arguments, **options)

    losses, weights = run(0, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(distilbert, "triple_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(0, tmp_path / "cut")
    made = []
    monkeypatch.setattr(distilbert, "triple_loss", lambda *a, **o: made.append(1) or triple_loss(*a, **o))
    again, resumed = run(1, tmp_path / "cut")  # what is drawn before does not matter
    assert len(made) == 10 - 4 * ((call - 1) // 4), "it went on from the last epoch that was finished"
    assert torch.equal(again, losses)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def test_other_random_numbers_give_other_weights(teacher, tokenized, tokenizer):
    """Or the test above would show nothing."""

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        batches = language_batches(tokenized.select(range(32)), tokenizer, 8, seed=0)
        return train_language_model(language_student(teacher), batches, steps=2, teacher=teacher).total

    assert not torch.equal(run(0), run(1))


def test_language_loss_is_the_mean_over_all_masked_tokens(teacher, splits, tokenizer):
    batches = held_out_batches(splits.validation.select(range(100)), tokenizer, 24)
    assert all(
        torch.equal(one["labels"], two["labels"])
        for one, two in zip(batches, held_out_batches(splits.validation.select(range(100)), tokenizer, 24), strict=True)
    )
    summed, right, count = 0.0, 0, 0
    for batch in batches:
        log_q = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for b, t in (batch["labels"] != IGNORE_INDEX).nonzero().tolist():
            summed -= log_q[b, t, batch["labels"][b, t]].item()
            right += int(log_q[b, t].argmax() == batch["labels"][b, t])
            count += 1
    found = language_loss(teacher, batches)
    assert found["loss"] == pytest.approx(summed / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(summed / count), rel=1e-3)
    assert found["accuracy"] == pytest.approx(right / count)
    with pytest.raises(ValueError, match="no token is masked"):
        language_loss(teacher, [])


# --- the models ---


def test_the_student_is_every_second_layer_with_a_head_of_its_own(teacher):
    student = language_student(teacher)
    layers = student.base_model.encoder.layer
    assert len(layers) == student.config.num_hidden_layers == 2
    for own, taken in zip(layers, (0, 3), strict=True):
        theirs = teacher.base_model.encoder.layer[taken].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in own.state_dict().items())
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    assert torch.equal(student.cls.predictions.transform.dense.weight, teacher.cls.predictions.transform.dense.weight)


def test_a_student_of_all_layers_predicts_as_its_teacher(teacher, batch):
    copy = language_student(teacher, range(4)).eval()
    torch.testing.assert_close(language_forward(copy, batch).logits, language_forward(teacher, batch).logits)


def test_a_layer_that_is_named_twice_is_copied_twice(teacher):
    layers = language_student(teacher, [0, 0, 1]).base_model.encoder.layer
    assert len({id(parameter) for layer in layers for parameter in layer.parameters()}) == sum(
        len(list(layer.parameters())) for layer in layers
    )


def test_a_random_start_has_the_shape_and_nothing_else(teacher):
    copied, drawn = (language_student(teacher, random_start=start) for start in (False, True))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (copied, drawn)]
    assert shapes[0] == shapes[1]
    assert weights_digest(drawn) == weights_digest(language_student(teacher, random_start=True))
    assert weights_digest(drawn) != weights_digest(language_student(teacher, random_start=True, seed=1))
    first = [model.base_model.encoder.layer[0].attention.self.query.weight for model in (copied, drawn)]
    assert not torch.equal(*first)


@pytest.mark.parametrize("layers", [(), (-1,), (4,)])
def test_layers_that_are_not_there_are_refused(teacher, layers):
    with pytest.raises(ValueError, match="the teacher has layers 0 to 3, name at least one"):
        language_student(teacher, layers)


def test_the_classifier_has_the_students_layers_and_the_checkpoints_pooler(headless, tokenizer):
    config = DistillConfig(teacher_checkpoint=headless)
    student = language_student(load_language_model(headless)[0], random_start=True, seed=5)
    names = ("negative", "neutral", "positive")
    classifier = as_classifier(student, config, names)
    for part in ("embeddings", "encoder"):
        own, theirs = (getattr(model.base_model, part).state_dict() for model in (classifier, student))
        assert own.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    pooler = classifier.base_model.pooler.dense.weight
    assert torch.equal(pooler, load_teacher(config, names).base_model.pooler.dense.weight)
    drawn = as_classifier(student, config, names, random_start=True)
    assert not torch.equal(pooler, drawn.base_model.pooler.dense.weight)
    assert not torch.equal(
        classifier.classifier.weight, as_classifier(student, config.replace(seed=1), names).classifier.weight
    )


def test_a_teacher_with_a_language_head_is_taken_as_it_is(own_artifacts, tmp_path, tokenizer, small_data):
    model = tiny_language_model()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    found = language_teacher(setup_of(small_data, teacher_checkpoint=str(tmp_path / "whole")))
    assert weights_digest(found) == weights_digest(model)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert not (own_artifacts / "language_teachers").exists()


def test_a_teacher_without_one_is_adapted_once(own_artifacts, headless, tokenizer, small_data, monkeypatch):
    data = load_splits(DistillConfig(teacher_train_size=64))
    setup = setup_of(data, teacher_checkpoint=headless)
    batches = held_out_batches(small_data.validation, tokenizer, 24)
    start, has_head = load_language_model(headless)
    assert not has_head
    torch.manual_seed(3)
    adapted = language_teacher(setup, steps=20)
    drawn = torch.rand(1)
    assert language_loss(adapted, batches)["loss"] < language_loss(start, batches)["loss"] - 0.01
    head_only = language_teacher(setup, steps=20, head_only=True)
    own, theirs = head_only.base_model.state_dict(), start.base_model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert weights_digest(head_only) != weights_digest(start)
    assert not any(p.requires_grad for p in head_only.parameters())

    monkeypatch.setattr(distilbert, "train_language_model", lambda *_, **__: pytest.fail("made twice"))
    torch.manual_seed(3)
    again = language_teacher(setup_of(data, teacher_checkpoint=headless, seed=1, train_size=100, alpha=0.1), steps=20)
    assert torch.equal(torch.rand(1), drawn), "found or made, the caller draws the same"
    assert weights_digest(again) == weights_digest(adapted)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["code", "steps", "head_only", "texts", "max_length", "MASKED_SHARE", "LEARNING_RATE"])
def test_a_language_teacher_is_made_anew_where_something_decides(
    own_artifacts, headless, small_data, monkeypatch, name
):
    made = []
    monkeypatch.setattr(distilbert, "train_language_model", lambda *_, **__: made.append(1))
    data = dataclasses.replace(small_data, teacher_train=small_data.teacher_train.select(range(50)))
    setup, options = setup_of(data, teacher_checkpoint=headless), {"steps": 2}
    language_teacher(setup, **options)
    language_teacher(setup, **options)
    assert len(made) == 1
    if name == "code":
        monkeypatch.setattr(distilbert, "made_by", lambda *modules: {"source": "another"})
    elif name in ("steps", "head_only"):
        options |= {name: 3}
    elif name == "texts":
        fewer = data.teacher_train.select(range(40))
        setup = setup_of(dataclasses.replace(data, teacher_train=fewer), teacher_checkpoint=headless)
    elif name == "max_length":
        setup = setup_of(data, teacher_checkpoint=headless, max_length=20)
    else:
        monkeypatch.setattr(distilbert, name, 0.2)
    language_teacher(setup, **options)
    assert len(made) == 2


def test_a_language_teacher_is_a_bert(tmp_path, tokenizer, small_data):
    tiny_distilbert().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a language teacher must be a BERT, .* is a distilbert; name another"):
        language_teacher(setup_of(small_data, teacher_checkpoint=str(tmp_path)))


def test_likely_words_are_those_of_the_whole_softmax(teacher, tokenizer):
    words = likely_words(teacher, tokenizer, "i am [MASK] today", temperature=2.0, count=3)
    inputs = tokenizer("i am [MASK] today", return_tensors="pt")
    place = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    logits = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, place]
    best = (logits / 2).softmax(dim=-1).topk(3)
    assert [word for word, _ in words] == tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert [share for _, share in words] == pytest.approx(best.values.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match=re.escape("the text masks 2 words; write [MASK] once.")):
        likely_words(teacher, tokenizer, "[MASK] and [MASK]")


def test_the_packaged_model_has_no_language_head():
    model, has_head = load_language_model(PACKAGED_MODEL)
    assert not has_head
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- fine-tuning ---


def test_fine_tuning_starts_from_the_seed_and_heeds_the_teacher(headless, small_data, tokenizer):
    setup = setup_of(small_data, teacher_checkpoint=headless, max_steps=3, learning_rate=1e-3)
    student = load_language_model(headless)[0]
    ids = torch.tensor(small_data.train["id"][:])
    teacher_logits = TeacherLogits(ids, torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(0)))
    batches = list(evaluation_batches(tokenize(small_data.test, tokenizer, 24), tokenizer))

    def run(setup: Setup, teacher_logits: TeacherLogits | None = None) -> torch.Tensor:
        classifier = as_classifier(student, setup.config, small_data.label_names)
        return predict(fine_tune(classifier, setup, small_data.train, teacher_logits), batches).logits

    plain, again = run(setup), run(setup)
    distilled = run(dataclasses.replace(setup, config=setup.config.replace(alpha=0.9)), teacher_logits)
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, distilled)
