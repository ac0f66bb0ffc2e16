"""The study of chapter 12: the stages of every arm, what a run is stored under, and all of it in small."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from support.models import tiny_bert
from transformers import BertConfig, BertForMaskedLM

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, read_corpus
from kd_helpers.experiments import tinybert
from kd_helpers.experiments.study import Arm, run_arm
from kd_helpers.experiments.tinybert import ARMS, Material, Stages, prepare_material, tinybert_study, train_in_stages
from kd_helpers.methods.augmentation import CANDIDATES, PROBABILITY
from kd_helpers.methods.tinybert import PARTS, narrow_shape
from kd_helpers.models import freeze, random_like
from kd_helpers.resolve import resolve

CONFIG = DistillConfig(learning_rate=1e-2, batch_size=8, precision="float32", device="cpu")


@pytest.fixture
def material(tokenized, splits) -> Material:
    """Two tiny teachers, and the same texts for every stage but the first."""
    teachers = (freeze(tiny_bert(layers=4, seed=seed)) for seed in (1, 2))
    texts = {"train": tokenized, "augmented": tokenized}
    return Material(resolve(CONFIG, splits), *teachers, general="general", task=texts, test_logits=None)


# The arms


@pytest.mark.parametrize("total", [2, 7, 900])
def test_every_arm_makes_the_same_steps(total):
    for arm in ARMS.values():
        steps = arm.recipe.steps(total)
        assert sum(steps.values()) == round(total * arm.recipe.times)
        assert steps["prediction"] > 0
    assert Stages(general=0).steps(900) == {"general": 0, "layers": 300, "prediction": 600}


def test_the_stages_come_on_top_of_as_many_steps_for_logits():
    whole, short = ARMS["tinybert"].recipe, ARMS["plain_short"].recipe
    assert whole.steps(600)["prediction"] == short.steps(600)["prediction"]


def test_ablations_differ_from_the_whole_in_one_thing():
    whole = vars(ARMS["tinybert"].recipe)
    for name in ("no_general", "no_layers", "no_augmentation", "transfer", "no_embedding", "no_attention", "no_hidden"):
        fields = vars(ARMS[name].recipe)
        assert sum(fields[field] != value for field, value in whole.items()) == 1, name


def test_no_two_arms_are_one():
    assert len({arm.recipe for arm in ARMS.values()}) == len({arm.title for arm in ARMS.values()}) == len(ARMS) == 17


def test_the_stages_of_an_arm(monkeypatch, material, tokenized):
    """Who teaches what, on which texts, for how long."""
    happened = []
    student = random_like(narrow_shape(material.tuned, layers=2, width=16), seed=0)
    monkeypatch.setitem(tinybert.STUDENTS, "narrow", lambda config, names: student)

    def layers(own, teaches, texts, setup, *, steps, parts, memory):
        assert own is student
        assert setup.config.seed == 3
        happened.append((teaches, texts, setup.config.learning_rate, steps, parts))

    def logits(own, batches, *, config, validation=None, precision, description):
        assert own is student
        assert config.seed == 3
        happened.append((batches.dataset, validation, config.learning_rate, config.max_steps, config.alpha))

    monkeypatch.setattr(tinybert, "distill_layers", layers)
    monkeypatch.setattr(tinybert, "train_classifier", logits)
    rates = tinybert.LEARNING_RATES["narrow"]
    train_in_stages(ARMS["no_hidden"].recipe, material, seed=3, steps=9)
    parts = ("embedding", "attention")
    assert happened == [
        (material.pretrained, "general", rates["layers"], 2, parts),
        (material.tuned, tokenized, rates["layers"], 2, parts),
        (tokenized, None, rates["prediction"], 5, 1.0),
    ]
    happened.clear()
    train_in_stages(ARMS["baseline"].recipe, material, seed=3, steps=9)
    assert happened == [(tokenized, None, rates["prediction"], 9, 0.0)]


# What a run is stored under


def provenance_of(study, arm: str, seed: int) -> dict:
    """That of a run that trains nothing."""
    made = run_arm(dataclasses.replace(study, run=lambda *_: {}), arm, seed)
    return artifacts.load_json(artifacts.artifacts_dir() / made["folder"] / artifacts.PROVENANCE)


def test_everything_that_decides_a_run_is_in_its_provenance(own_artifacts, material, tokenized):
    material = material._replace(general=tokenized)
    stored = provenance_of(tinybert_study(material, steps=60, copies=2), "no_hidden", 1)
    assert stored["arm"] == {
        "title": "− hidden loss",
        "recipe": {
            "student": "narrow",
            "general": 1,
            "layers": 1,
            "prediction": 2,
            "texts": "augmented",
            "parts": ["embedding", "attention"],
            "alpha": 1.0,
            "times": 1.0,
        },
    }
    assert stored["seed"] == 1
    choices = stored["choices"]
    assert choices["config"] == CONFIG.to_dict()
    assert (choices["steps"], choices["copies"]) == (60, 2)
    assert choices["replacement"] == {"probability": PROBABILITY, "candidates": CANDIDATES}
    assert choices["learning_rates"] == tinybert.LEARNING_RATES
    assert choices["texts"] == {"train": 128, "augmented": 128, "general": 128}
    assert choices["corpus"] == corpus_digest(read_corpus(CONFIG))
    assert choices["checkpoint"] == CONFIG.teacher_source
    assert "cpu" in choices["machine"]
    assert "float32" in choices["machine"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROBABILITY", 0.3),
        ("CANDIDATES", 14),
        ("LEARNING_RATES", {"narrow": {"layers": 1.0, "prediction": 1.0}}),
        ("corpus_digest", lambda corpus: "other tweets"),
        ("checkpoint_version", lambda name: "another checkpoint"),
        ("ARMS", {"tinybert": Arm("TinyBERT", Stages(layers=2))}),
        ("ARMS", {"tinybert": Arm("TinyBERT", Stages(parts=PARTS[1:]))}),
    ],
)
def test_another_choice_is_another_run(own_artifacts, material, tokenized, monkeypatch, name, value):
    material = material._replace(general=tokenized)
    monkeypatch.setattr(tinybert, "read_corpus", lambda config: "the course's tweets")  # they take a second
    monkeypatch.setattr(tinybert, "corpus_digest", lambda corpus: "their digest")

    def folder(**options) -> str:
        study = tinybert_study(material, **{"steps": 60, "copies": 2} | options)
        return run_arm(dataclasses.replace(study, run=lambda *_: {}), "tinybert", 0)["folder"]

    before = folder()
    assert folder() == before
    assert len({before, folder(steps=61), folder(copies=3)}) == 3
    monkeypatch.setattr(tinybert, name, value)
    assert folder() != before


# In small


def test_a_study_in_small(own_artifacts, monkeypatch, small_data, splits):
    """Both kinds of stages, both kinds of texts, all of it measured; no text of test gets into training."""
    data = dataclasses.replace(small_data, train=small_data.train.select(range(24)), transfer=splits.transfer)
    language = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    small = narrow_shape(tiny_bert(layers=4), layers=2, width=16)
    passes = []

    def inside(*arguments, memory, layers=tinybert.distill_layers, **options):
        passes.append(memory)
        return layers(*arguments, memory=memory, **options)

    for name, made in {
        "resolve": lambda config: resolve(config, data),
        "load_teacher": lambda config, names: tiny_bert(layers=4, seed=1),
        "fine_tuned_teacher": lambda setup: freeze(tiny_bert(layers=4, seed=2)),
        "language_teacher": lambda setup: language,
        "STUDENTS": {"narrow": lambda config, names: random_like(small, seed=config.seed)},
        "ARMS": {name: ARMS[name] for name in ("plain", "tinybert", "transfer")},
        "CONFIG": CONFIG.replace(max_length=24, alpha=1.0),
        "COPIES": 1,
        "tinybert_study": functools.partial(tinybert_study, steps=6, copies=1),
        "distill_layers": inside,
    }.items():
        monkeypatch.setattr(tinybert, name, made)
    made = tinybert.study()
    kept = json.loads(json.dumps(made))
    assert Stages(**kept["arms"]["plain"]["recipe"]).steps(6) == ARMS["plain"].recipe.steps(6)
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
    assert len(passes) == 3 * 2 * 2
    assert len({id(memory) for memory in passes}) == 3, "the arms of a seed share one"
    assert made["runs"] == tinybert.study()["runs"], "found again"


def test_a_run_is_the_same_alone_and_after_other_arms(own_artifacts, monkeypatch, tmp_path, small_data, splits):
    """Arms share what was computed inside the teachers, and nothing of it may depend on who came before."""
    data = dataclasses.replace(small_data, train=small_data.train.select(range(24)), transfer=splits.transfer)
    language = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    shapes = {"narrow": (2, 16), "half": (4, 32)}
    students = {
        name: lambda config, _names, layers=layers, width=width: random_like(
            narrow_shape(tiny_bert(layers=4), layers=layers, width=width), seed=config.seed
        )
        for name, (layers, width) in shapes.items()
    }
    monkeypatch.setattr(tinybert, "load_teacher", lambda config, names: tiny_bert(layers=4, seed=1))
    monkeypatch.setattr(tinybert, "fine_tuned_teacher", lambda setup: freeze(tiny_bert(layers=4, seed=2)))
    monkeypatch.setattr(tinybert, "language_teacher", lambda setup: language)
    monkeypatch.setattr(tinybert, "STUDENTS", students)
    material = prepare_material(resolve(CONFIG.replace(max_length=24, alpha=1.0), data), copies=1)
    names = ("half_tinybert", "no_general", "tinybert", "transfer")

    def measures(study, name: str) -> dict:
        return study.run(ARMS[name].recipe, 0, tmp_path)

    together = tinybert_study(material, steps=6, copies=1)
    found = {name: measures(together, name) for name in names}
    for name in names:
        assert found[name] == measures(tinybert_study(material, steps=6, copies=1), name), name
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in found.values())
