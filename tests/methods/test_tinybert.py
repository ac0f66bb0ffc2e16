"""TinyBERT: the losses inside, what they train and what they leave alone, and the stages of every arm."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from conftest import tiny_bert
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from kd_helpers.experiments import tinybert
from kd_helpers.methods import tinybert
from kd_helpers.methods.augmentation import CANDIDATES
from kd_helpers.config import DistillConfig
from kd_helpers.data import LABEL_NAMES, training_batches
from kd_helpers.models import freeze, load_teacher, random_like
from kd_helpers.models import weights_digest
from kd_helpers.experiments.tinybert import Material, RECIPES, Recipe, train_student
from kd_helpers.methods.tinybert import Layers, PARTS, Projections, distill_layers, half_student, layer_losses, look_inside, narrow_shape, narrow_student

CONFIG = DistillConfig(learning_rate=1e-2, batch_size=8, precision="float32", device="cpu")


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


@pytest.mark.parametrize("parts", [PARTS, ("attention",), ("embedding", "hidden")])
def test_losses_are_the_papers(parts):
    torch.manual_seed(0)
    student, teacher, projections = random_layers(2, 4), random_layers(4, 6), Projections(4, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        found = layer_losses(student, teacher, mask, (1, 3), projections, parts)
        expected = naive_losses(student, teacher, mask, (1, 3), projections)
    for part in PARTS:
        assert getattr(found, part).item() == pytest.approx(expected[part], rel=1e-5)
    assert found.total.item() == pytest.approx(sum(expected[part] for part in parts), rel=1e-5)


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


@pytest.mark.parametrize("part", PARTS)
def test_a_part_trains_what_it_depends_on(student, teacher, batch, part):
    projections = Projections(16, 32)
    shown, own = look_inside(teacher, batch), look_inside(student, batch)
    losses = layer_losses(own, shown, batch["attention_mask"], (1, 3), projections, (part,))
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


def test_distilling_layers(student, teacher, tokenized, tokenizer):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    known, names = weights_digest(teacher), set(student.state_dict())
    losses = distill_layers(student, teacher, tokenized, tokenizer, config=CONFIG, steps=40)
    for part, values in losses._asdict().items():
        assert values.shape == (40,)
        assert values[-5:].mean() < 0.9 * values[:5].mean(), part
    torch.testing.assert_close(losses.total, losses.embedding + losses.attention + losses.hidden)
    after = student.state_dict()
    assert set(after) == names, "the projections stay outside"
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(
        after["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"]
    )
    assert weights_digest(teacher) == known


def test_students_of_the_same_batches_share_what_the_teacher_has_inside(teacher, tokenized, tokenizer):
    asked, memory = [], {}
    teacher.bert.register_forward_hook(lambda *_: asked.append(1))

    def run(**options) -> torch.Tensor:
        torch.manual_seed(0)
        own = random_like(narrow_shape(teacher, layers=2, width=16), seed=0)
        return distill_layers(own, teacher, tokenized, tokenizer, config=CONFIG, **options).total

    first = run(steps=4, memory=memory)
    assert len(asked) == 4
    assert torch.equal(run(steps=4, memory=memory), first)
    run(steps=6, memory=memory)
    assert len(asked) == 6, "only the last two are new"
    assert torch.equal(run(steps=4), first)
    assert len(asked) == 10


def test_the_seed_decides(teacher, tokenized, tokenizer):
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        own = random_like(narrow_shape(teacher, layers=2, width=16), seed=seed)
        return distill_layers(own, teacher, tokenized, tokenizer, config=CONFIG.replace(seed=seed), steps=3).total

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_what_cannot_be_distilled(student, teacher, tokenized, tokenizer):
    def run(*, learns=student, teaches=teacher, **changes):
        return distill_layers(learns, teaches, tokenized, tokenizer, **{"config": CONFIG, "steps": 2} | changes)

    with pytest.raises(ValueError, match="parts are none; name one or more of embedding, attention, hidden"):
        run(parts=())
    with pytest.raises(ValueError, match="parts are logits; name one or more"):
        run(parts=("logits",))
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


@pytest.mark.parametrize("total", [2, 7, 900])
def test_every_arm_makes_the_same_steps(total):
    for recipe in RECIPES.values():
        steps = recipe.steps(total)
        assert sum(steps.values()) == round(total * recipe.times)
        assert steps["prediction"] > 0
    assert Recipe("", general=0).steps(900) == {"general": 0, "layers": 300, "prediction": 600}


def test_the_stages_come_on_top_of_as_many_steps_for_answers():
    assert RECIPES["tinybert"].steps(600)["prediction"] == RECIPES["plain_short"].steps(600)["prediction"]


def test_ablations_differ_from_the_whole_in_one_thing():
    whole = RECIPES["tinybert"]
    for name in ("no_general", "no_layers", "no_augmentation", "transfer", "no_embedding", "no_attention", "no_hidden"):
        fields = vars(RECIPES[name]) | {"title": whole.title}
        assert sum(fields[field] != value for field, value in vars(whole).items()) == 1, name


def test_the_stages_of_a_recipe(monkeypatch, student, teacher, tokenized, tokenizer, splits):
    """Who teaches what, on which texts, for how long."""
    happened = []
    tuned = freeze(tiny_bert(layers=4, seed=2))
    material = Material(
        splits, tokenizer, teacher, tuned, "general", {"train": tokenized, "augmented": tokenized}, None
    )
    monkeypatch.setitem(tinybert.STUDENTS, "narrow", lambda config, names: student)

    def layers(own, teaches, texts, _tokenizer, *, config, steps, parts, memory):
        happened.append((teaches, texts, config.learning_rate, steps, parts))

    def answers(own, batches, validation, *, config, precision, description):
        happened.append((batches.dataset, validation, config.learning_rate, config.max_steps, config.alpha))

    monkeypatch.setattr(tinybert, "distill_layers", layers)
    monkeypatch.setattr(tinybert, "train", answers)
    rates = tinybert.LEARNING_RATES["narrow"]
    train_student(RECIPES["no_hidden"], CONFIG, material, steps=9)
    parts = ("embedding", "attention")
    assert happened == [
        (teacher, "general", rates["layers"], 2, parts),
        (tuned, tokenized, rates["layers"], 2, parts),
        (tokenized, None, rates["prediction"], 5, 1.0),
    ]
    happened.clear()
    train_student(RECIPES["baseline"], CONFIG, material, steps=9)
    assert happened == [(tokenized, None, rates["prediction"], 9, 0.0)]


def test_a_study_in_small(own_artifacts, monkeypatch, tokenizer, small_data, splits):
    """Both kinds of stages, both kinds of texts, all of it measured; no text of test gets into training."""
    data = dataclasses.replace(small_data, train=small_data.train.select(range(24)), transfer=splits.transfer)
    language = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    small = narrow_shape(tiny_bert(layers=4), layers=2, width=16)
    for name, made in {
        "load_splits": lambda config: data,
        "load_teacher": lambda config, names: tiny_bert(layers=4, seed=1),
        "fine_tuned_teacher": lambda config, data, tokenizer: freeze(tiny_bert(layers=4, seed=2)),
        "language_teacher": lambda config: language,
        "STUDENTS": {"narrow": lambda config, names: random_like(small, seed=config.seed)},
        "RECIPES": {name: RECIPES[name] for name in ("plain", "tinybert", "transfer")},
        "STUDY": CONFIG.replace(max_length=24, alpha=1.0),
        "STEPS": 6,
        "COPIES": 1,
    }.items():
        monkeypatch.setattr(tinybert, name, made)
    made = tinybert.study()
    kept = json.loads(json.dumps(made))
    assert Recipe(**kept["choices"]["recipes"]["plain"]).steps(6) == RECIPES["plain"].steps(6)
    assert [(run["arm"], run["seed"]) for run in made["runs"]] == [
        (arm, seed) for seed in (0, 1, 2) for arm in ("plain", "tinybert", "transfer")
    ]
    assert made["teacher"]["fidelity"] == 1.0
    for text, found in kept["candidates"].items():
        for start, end, words in found:
            assert len(words) == CANDIDATES
            assert text[start:end] not in words
    assert len({run["nll"] for run in made["runs"]}) == 9, "arms and seeds differ"
    texts = made["choices"]["texts"]
    assert texts["train"] == 24
    assert 24 < texts["augmented"] == texts["transfer"] <= 48, "made and real ones are as many"
    assert made["runs"] == tinybert.study()["runs"], "found again"
