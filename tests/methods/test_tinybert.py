"""Layer distillation: the losses inside, what they train and what they leave alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.models import tiny_bert
from transformers import BertConfig, BertForSequenceClassification

from kd_helpers.config import DistillConfig
from kd_helpers.data import LABEL_NAMES, training_batches
from kd_helpers.loop import DivergedError
from kd_helpers.methods.tinybert import (
    WEIGHTS,
    Layers,
    Projections,
    distill_layers,
    half_student,
    layer_losses,
    look_inside,
    narrow_shape,
    narrow_student,
)
from kd_helpers.models import freeze, load_teacher, random_like, weights_digest
from kd_helpers.resolve import Setup, resolve

CONFIG = DistillConfig(learning_rate=1e-2, batch_size=8, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def setup(splits) -> Setup:
    return resolve(CONFIG, splits)


@pytest.fixture
def teacher():
    return freeze(tiny_bert(layers=4, seed=1))


@pytest.fixture
def student(teacher):
    return random_like(narrow_shape(teacher, layers=2, width=16), seed=0)


@pytest.fixture
def batch(tokenized, tokenizer):
    found = next(iter(training_batches(tokenized.select(range(8)), tokenizer, 8, seed=0)))
    assert found["attention_mask"].min() == 0, "padding is what the tests are about"
    return found


def test_a_narrow_model_has_the_teachers_heads(teacher):
    shape = narrow_shape(teacher, layers=3, width=16).config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (3, 16, 2)
    assert shape.intermediate_size == teacher.config.intermediate_size // 2
    assert shape.id2label == teacher.config.id2label
    assert teacher.config.hidden_size == 32, "the teacher's own configuration stays"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 5}, "layers is 5; give a whole number from 1 to 4."),
        ({"width": 33}, "width is 33; give a whole number from 2 to 32."),
        ({"width": 15}, "width is 15, which 2 heads can't share evenly; give a multiple of 2."),
    ],
)
def test_a_shape_that_does_not_fit(teacher, changes, sentence):
    with pytest.raises(ValueError, match="give a") as error:
        narrow_shape(teacher, **{"layers": 2, "width": 16} | changes)
    assert str(error.value) == sentence


def test_the_courses_students():
    narrow = narrow_student(CONFIG, LABEL_NAMES)
    shape = narrow.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (3, 192, 12)
    assert weights_digest(narrow) != weights_digest(narrow_student(CONFIG.replace(seed=1), LABEL_NAMES))
    half, whole = half_student(CONFIG, LABEL_NAMES), load_teacher(CONFIG, LABEL_NAMES)
    for own, taken in zip(half.bert.encoder.layer, (1, 3, 5), strict=True):  # those that the mapping compares them with
        assert all(map(torch.equal, own.parameters(), whole.bert.encoder.layer[taken].parameters()))


def test_what_is_inside_is_what_the_model_computes():
    """With eager attention transformers gives probabilities; they are the softmax of our scores."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**shape, attn_implementation="eager")).eval()
    ids = torch.randint(5, 100, (2, 7))
    with torch.no_grad():
        found = look_inside(model, {"input_ids": ids, "id": torch.arange(2)})
        known = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert len(found.attention) == len(found.hidden) == 3
    for scores, probabilities in zip(found.attention, known.attentions, strict=True):
        torch.testing.assert_close(scores.softmax(dim=-1), probabilities)
    torch.testing.assert_close(found.embedding, known.hidden_states[0])
    for own, state in zip(found.hidden, known.hidden_states[1:], strict=True):
        torch.testing.assert_close(own, state)


def naive_losses(student: Layers, teacher: Layers, mask, mapping, projections) -> dict[str, float]:
    """Equations 7 to 9 with loops: means over the real tokens (pairs of them) and features (heads)."""

    def states(own, shown, projection):
        squares = [
            (float(lifted[i]) - float(shown[b, t, i])) ** 2
            for b, t in mask.nonzero().tolist()
            for lifted in [projection.weight @ own[b, t]]
            for i in range(shown.shape[-1])
        ]
        return sum(squares) / len(squares)

    def scores(own, shown):
        squares = [
            float(own[b, a, i, j] - shown[b, a, i, j]) ** 2
            for b in range(len(mask))
            for a in range(own.shape[1])
            for i in range(mask.shape[1])
            for j in range(mask.shape[1])
            if mask[b, i] and mask[b, j]
        ]
        return sum(squares) / len(squares)

    return {
        "embedding": states(student.embedding, teacher.embedding, projections.embedding),
        "attention": sum(scores(student.attention[m], teacher.attention[n]) for m, n in enumerate(mapping)),
        "hidden": sum(states(student.hidden[m], teacher.hidden[n], projections.hidden) for m, n in enumerate(mapping)),
    }


def random_layers(layers: int, width: int) -> Layers:
    draw = torch.randn
    attention = tuple(draw(3, 2, 5, 5) for _ in range(layers))
    return Layers(draw(3, 5, width), attention, tuple(draw(3, 5, width) for _ in range(layers)))


@pytest.mark.parametrize("weights", [WEIGHTS, {"attention": 1.0}, {"embedding": 1.0, "attention": 0.1, "hidden": 2.0}])
def test_losses_are_the_papers(weights):
    torch.manual_seed(0)
    student, teacher, projections = random_layers(2, 4), random_layers(4, 6), Projections(4, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        found = layer_losses(student, teacher, mask, (1, 3), projections, weights)
        expected = naive_losses(student, teacher, mask, (1, 3), projections)
    for part in WEIGHTS:
        assert getattr(found, part).item() == pytest.approx(expected[part], rel=1e-5)
    assert found.total.item() == pytest.approx(
        sum(weight * expected[part] for part, weight in weights.items()), rel=1e-5
    )


def test_padding_changes_nothing(student, teacher, batch):
    projections, mapping = Projections(16, 32), (1, 3)
    student.eval()
    longer = {k: torch.nn.functional.pad(v, (0, 9)) if v.ndim == 2 else v for k, v in batch.items()}
    with torch.no_grad():
        first, second = (
            layer_losses(look_inside(student, b), look_inside(teacher, b), b["attention_mask"], mapping, projections)
            for b in (batch, longer)
        )
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_part_trains_what_it_depends_on(student, teacher, batch, part):
    projections = Projections(16, 32)
    shown, own = look_inside(teacher, batch), look_inside(student, batch)
    losses = layer_losses(own, shown, batch["attention_mask"], (1, 3), projections, {part: 1.0})
    losses.total.backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert ("bert.encoder.layer.1.attention.self.query.weight" in moved) == (part != "embedding")
    assert ("bert.encoder.layer.1.output.dense.weight" in moved) == (part == "hidden")
    assert (projections.embedding.weight.grad is not None) == (part == "embedding")
    assert (projections.hidden.weight.grad is not None) == (part == "hidden")


def test_models_of_one_width_need_no_projection():
    assert list(Projections(8, 8).parameters()) == []
    assert [p.shape for p in Projections(4, 8).parameters()] == [(8, 4), (8, 4)]


def test_distilling_layers(student, teacher, tokenized, setup):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    known, names = weights_digest(teacher), set(student.state_dict())
    projections = Projections(16, 32)
    drawn = projections.hidden.weight.clone()
    losses = distill_layers(student, teacher, projections, tokenized, setup, steps=40)
    for part, values in losses._asdict().items():
        assert values.shape == (40,)
        assert values[-5:].mean() < 0.9 * values[:5].mean(), part
    torch.testing.assert_close(losses.total, losses.embedding + losses.attention + losses.hidden)
    after = student.state_dict()
    assert set(after) == names, "the projections stay outside"
    assert not torch.equal(projections.hidden.weight, drawn), "they learn, for the next stage to go on with"
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(
        after["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"]
    )
    assert weights_digest(teacher) == known


def test_the_seed_decides(teacher, tokenized, setup):
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        own = random_like(narrow_shape(teacher, layers=2, width=16), seed=seed)
        seeded = dataclasses.replace(setup, config=CONFIG.replace(seed=seed))
        return distill_layers(own, teacher, Projections(16, 32), tokenized, seeded, steps=3).total

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_what_cannot_be_distilled(student, teacher, tokenized, setup):
    def run(*, learns=student, teaches=teacher, **changes):
        maps = Projections(learns.config.hidden_size, teaches.config.hidden_size)
        return distill_layers(learns, teaches, maps, tokenized, setup, **{"steps": 2} | changes)

    for weights in ({}, {"logits": 1.0}, {"hidden": 0.0}, {"hidden": 1.0, "attention": -1.0}):
        with pytest.raises(ValueError, match="give numbers of at least 0 to embedding, attention, hidden, one of them"):
            run(weights=weights)
    with pytest.raises(ValueError, match="steps is 0"):
        run(steps=0)
    with pytest.raises(ValueError, match="train mode"):
        run(teaches=tiny_bert(layers=4).train())
    with pytest.raises(ValueError, match="frozen"):
        run(learns=freeze(tiny_bert(layers=2)))
    with pytest.raises(ValueError, match="dealt evenly"):
        run(learns=tiny_bert(layers=3))
    with torch.no_grad():
        student.bert.encoder.layer[0].output.dense.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="diverged at step 1"):
        run()


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_named(student, teacher, tokenized, setup, factor):
    """The losses say nothing then, so that the sentence must."""
    weight = student.bert.encoder.layer[0].output.dense.weight
    gradients = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        gradients.append(gradient)
        return gradient * factor if len(gradients) == 2 else None

    weight.register_hook(spoil)
    number = r"\d[\d.e+-]*"
    losses = f"total {number}, embedding {number}, attention {number}, hidden {number}"
    sentence = rf"^training diverged at step 2 \({losses}, gradient norm (inf|nan)\): lower the learning rate"
    with pytest.raises(DivergedError, match=sentence) as error:
        distill_layers(student, teacher, Projections(16, 32), tokenized, setup, steps=3)
    assert error.value.step == 2
    assert all(value.isfinite().all() for value in student.state_dict().values()), "the step was not made"
