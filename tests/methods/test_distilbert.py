"""The triple loss against the formula, what is hidden, the language teacher, and whole small runs."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import tiny_distilbert
from transformers import BertConfig, BertForMaskedLM, BertModel

from kd_helpers.experiments import distilbert
from kd_helpers.methods import distilbert
from kd_helpers.config import DistillConfig, PACKAGED_MODEL
from kd_helpers.data import evaluation_batches, tokenize
from kd_helpers.experiments.distilbert import COURSE, FULL, PLAIN, SHORT, run_arm
from kd_helpers.methods.distilbert import Weights, answered, as_classifier, ask_language_model, fine_tune, held_out_batches, language_batches, language_loss, language_student, language_teacher, likely_words, load_language_model, train_language_model, triple_loss
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.models import freeze, load_teacher
from kd_helpers.models import weights_digest
from kd_helpers.teacher import TeacherLogits
from kd_helpers.loop import DivergedError
from kd_helpers.metrics import predict

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


# --- what is hidden ---


def test_hidden_tokens_are_real_ones_and_their_labels_what_stood_there(tokenized, tokenizer):
    originals = {tuple(ids) for ids in tokenized["input_ids"][:]}
    hidden = tokens = replaced = 0
    for batch in language_batches(tokenized, tokenizer, 16, seed=0):
        chosen = batch["labels"] != IGNORE_INDEX
        assert not chosen[batch["attention_mask"] == 0].any(), "padding"
        restored = torch.where(chosen, batch["labels"], batch["input_ids"])
        special = torch.isin(restored, torch.tensor(tokenizer.all_special_ids))
        assert not chosen[special].any(), "[CLS], [SEP]"
        for ids, mask in zip(restored, batch["attention_mask"].bool(), strict=True):
            assert tuple(ids[mask].tolist()) in originals
        hidden, tokens = hidden + int(chosen.sum()), tokens + int((~special).sum())
        replaced += int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum())
    assert hidden / tokens == pytest.approx(0.15, abs=0.03)
    assert replaced / hidden == pytest.approx(0.8, abs=0.1)


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
    hidden = [batch["labels"][batch["labels"] != IGNORE_INDEX].sort().values for batch in first]
    assert hidden[0].tolist() != hidden[1].tolist(), "other tokens in the second epoch"


def test_a_tokenizer_without_a_mask_token_is_refused(tokenized, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="this tokenizer has no mask token"):
        language_batches(tokenized, other, seed=0)


# --- the loss ---


def test_logits_of_the_hidden_tokens_are_those_of_the_whole_model(teacher, batch):
    answers = ask_language_model(teacher, batch)
    whole = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(answers.logits, whole.logits[batch["labels"] != IGNORE_INDEX])
    torch.testing.assert_close(answers.states, whole.hidden_states[-1])


def test_triple_loss_is_the_formula(teacher, batch):
    student = language_student(teacher).eval()
    own, theirs = (ask_language_model(model, batch) for model in (student, teacher))
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
    answers = ask_language_model(teacher, batch)
    loss = triple_loss(answers, answers, batch)
    assert loss.soft.item() == pytest.approx(0, abs=1e-5)
    assert loss.cosine.item() == pytest.approx(0, abs=1e-5)
    assert loss.language.item() > 1


@pytest.mark.parametrize("left_out", Weights._fields)
def test_a_loss_of_weight_zero_is_left_out(teacher, batch, left_out):
    own, theirs = (ask_language_model(model, batch) for model in (language_student(teacher).eval(), teacher))
    whole = triple_loss(own, theirs, batch)
    loss = triple_loss(own, theirs, batch, weights=Weights()._replace(**{left_out: 0}))
    assert getattr(loss, left_out).item() == 0
    weight = getattr(Weights(), left_out)
    assert loss.total.item() == pytest.approx(whole.total.item() - weight * getattr(whole, left_out).item(), rel=1e-5)


def test_weights_and_answers_that_make_no_sense_are_refused(teacher, batch):
    own = ask_language_model(teacher, batch)
    for weights in (Weights(0, 0, 0), Weights(-1, 1, 1)):
        with pytest.raises(ValueError, match=re.escape("give three numbers of at least 0, one of them above 0.")):
            triple_loss(own, own, batch, weights=weights)
    with pytest.raises(ValueError, match="soft and cosine loss need a teacher's answers"):
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


def test_batches_that_carry_the_teachers_states_train_alike(teacher, tokenized, tokenizer):
    def run(carried: bool) -> torch.Tensor:
        batches = language_batches(tokenized, tokenizer, 32, seed=0)
        torch.manual_seed(0)
        student = language_student(teacher)
        if carried:
            batches = answered(batches, teacher, 6)  # more than an epoch
            torch.manual_seed(0)
        return train_language_model(student, batches, steps=5, teacher=teacher).total

    torch.manual_seed(0)
    torch.testing.assert_close(run(carried=True), run(carried=False))
    with pytest.raises(ValueError, match="3 steps need as many batches, there are 2; give more, or a loader"):
        train_language_model(
            language_student(teacher), answered(language_batches(tokenized, tokenizer, 32, seed=0), teacher, 2), steps=3
        )


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


def test_language_loss_is_the_mean_over_all_hidden_tokens(teacher, splits, tokenizer):
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
    with pytest.raises(ValueError, match="no token is hidden"):
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


def test_a_student_of_all_layers_answers_as_its_teacher(teacher, batch):
    copy = language_student(teacher, range(4)).eval()
    torch.testing.assert_close(ask_language_model(copy, batch).logits, ask_language_model(teacher, batch).logits)


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


def test_a_teacher_with_a_language_head_is_taken_as_it_is(own_artifacts, tmp_path, tokenizer):
    model = tiny_language_model()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    found = language_teacher(DistillConfig(teacher_checkpoint=str(tmp_path / "whole")))
    assert weights_digest(found) == weights_digest(model)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert not (own_artifacts / "language_teachers").exists()


def test_a_teacher_without_one_is_adapted_once(own_artifacts, headless, tokenizer, small_data, monkeypatch):
    config = DistillConfig(teacher_checkpoint=headless, max_length=24, precision="float32")
    data = distilbert.load_splits(config.replace(teacher_train_size=64))
    monkeypatch.setattr(distilbert, "load_splits", lambda config: data)
    batches = held_out_batches(small_data.validation, tokenizer, 24)
    start, has_head = load_language_model(headless)
    assert not has_head
    torch.manual_seed(3)
    adapted = language_teacher(config, steps=20)
    drawn = torch.rand(1)
    assert language_loss(adapted, batches)["loss"] < language_loss(start, batches)["loss"] - 0.01
    head_only = language_teacher(config, steps=20, head_only=True)
    own, theirs = head_only.base_model.state_dict(), start.base_model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert weights_digest(head_only) != weights_digest(start)
    assert not any(p.requires_grad for p in head_only.parameters())

    monkeypatch.setattr(distilbert, "train_language_model", lambda *_, **__: pytest.fail("made twice"))
    torch.manual_seed(3)
    again = language_teacher(config.replace(seed=1, train_size=100, alpha=0.1), steps=20)
    assert torch.equal(torch.rand(1), drawn), "found or made, the caller draws the same"
    assert weights_digest(again) == weights_digest(adapted)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_language_teacher_is_a_bert(tmp_path):
    tiny_distilbert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a language teacher must be a BERT, .* is a distilbert; name another"):
        language_teacher(DistillConfig(teacher_checkpoint=str(tmp_path)))


def test_likely_words_are_those_of_the_whole_softmax(teacher, tokenizer):
    words = likely_words(teacher, tokenizer, "i am [MASK] today", temperature=2.0, count=3)
    inputs = tokenizer("i am [MASK] today", return_tensors="pt")
    place = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    logits = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, place]
    best = (logits / 2).softmax(dim=-1).topk(3)
    assert [word for word, _ in words] == tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert [share for _, share in words] == pytest.approx(best.values.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match=re.escape("hides 2 words; write [MASK] once.")):
        likely_words(teacher, tokenizer, "[MASK] and [MASK]")


def test_the_packaged_model_has_no_language_head():
    model, has_head = load_language_model(PACKAGED_MODEL)
    assert not has_head
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- whole runs ---


def test_each_arm_of_the_ablation_leaves_out_one_thing():
    whole = distilbert.ARMS[FULL]
    assert whole.weights == Weights(5, 2, 1)
    differences = []
    for name, arm in distilbert.ARMS.items():
        left_out = [part for part in Weights._fields if arm.weights and getattr(arm.weights, part) == 0]
        differences.append((name, left_out, arm.random_start, arm.weights is None, arm.task_only, not arm.adapted))
    assert differences == [
        (FULL, [], False, False, False, False),
        ("without the soft loss", ["soft"], False, False, False, False),
        ("without the cosine loss", ["cosine"], False, False, False, False),
        ("without the language loss", ["language"], False, False, False, False),
        ("random start", [], True, False, False, False),
        (SHORT, [], False, True, False, False),
        (PLAIN, [], False, True, True, False),
        (COURSE, [], False, True, True, True),
    ]


def test_fine_tuning_starts_from_the_seed_and_heeds_the_answers(headless, small_data, tokenizer):
    config = DistillConfig(teacher_checkpoint=headless, alpha=0.0, max_steps=3, learning_rate=1e-3, max_length=24)
    student = load_language_model(headless)[0]
    ids = torch.tensor(small_data.train["id"][:])
    answers = TeacherLogits(ids, torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(0)))
    batches = list(evaluation_batches(tokenize(small_data.test, tokenizer, 24), tokenizer))

    def run(config: DistillConfig, answers: TeacherLogits | None = None) -> torch.Tensor:
        classifier = as_classifier(student, config, small_data.label_names)
        return predict(fine_tune(classifier, config, small_data.train, tokenizer, answers), batches).logits

    plain, again, distilled = run(config), run(config), run(config.replace(alpha=0.9), answers)
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, distilled)


def test_arms_run_repeat_themselves_and_are_measured(own_artifacts, headless, small_data, splits, monkeypatch):
    data = dataclasses.replace(small_data, transfer=splits.transfer)
    monkeypatch.setattr(distilbert, "load_splits", lambda config: data)
    config = DistillConfig(
        teacher_checkpoint=headless, teacher_epochs=0, alpha=0.0, max_steps=2, max_length=24, precision="float32"
    )
    shortened = {"config": config, "steps": 2, "adaptation_steps": 2}
    more = {
        FULL: {"again_accuracy", "again_nll"},
        "random start": set(),
        SHORT: {"again_accuracy", "again_nll"},
        PLAIN: {"again_accuracy", "again_nll", "transfer_accuracy", "transfer_nll"},
        COURSE: {"again_accuracy", "again_nll", "transfer_accuracy", "transfer_nll"},
    }
    measures = {name: run_arm(name, 0, **shortened) for name in more}
    names = {"language_loss", "language_accuracy", "accuracy", "nll"}
    for name, found in measures.items():
        assert found.keys() == names | more[name], name
        assert all(math.isfinite(value) for value in found.values()), name
    assert run_arm(FULL, 0, **shortened) == pytest.approx(measures[FULL])
    assert len({found["nll"] for found in measures.values()}) == len(measures), "every arm is another student"
    untouched = measures[SHORT]["language_loss"]
    assert measures[PLAIN]["language_loss"] == untouched != measures[FULL]["language_loss"]
    assert measures[COURSE]["language_loss"] > untouched, "cut from a model that never guessed words"
    assert measures[PLAIN]["transfer_nll"] != measures[PLAIN]["again_nll"]


def test_the_study_keeps_its_arms_its_teachers_and_what_they_say(own_artifacts, teacher, small_data, monkeypatch):
    def arm(name: str, seed: int) -> dict[str, float]:
        return {"accuracy": len(name) + seed}

    monkeypatch.setattr(distilbert, "run_arm", arm)
    monkeypatch.setattr(distilbert, "load_splits", lambda config: small_data)
    monkeypatch.setattr(distilbert, "language_teacher", lambda config, head_only=False: teacher)
    study = distilbert.study()
    assert json.loads(json.dumps(study))["runs"][0] == {"arm": FULL, "seed": 0, "accuracy": len(FULL)}
    assert len(study["runs"]) == len(distilbert.ARMS) * len(distilbert.SEEDS)
    assert study["teachers"]["head only"] == study["teachers"]["all weights"]
    assert study["teachers"]["not adapted"]["loss"] > 9, "the packaged model with a fresh head"
    for sentence, by_temperature in study["words"].items():
        assert list(by_temperature) == ["1", "2"], sentence
        for words in by_temperature.values():
            shares = [share for _, share in words]
            assert shares == sorted(shares, reverse=True)
            assert 0 < sum(shares) < 1
