"""The study of chapter 12: the stages of every arm, what a run is stored under, and all of it in small."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.models import tiny_bert
from transformers import BertConfig, BertForMaskedLM

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, read_corpus
from kd_helpers.experiments import tinybert
from kd_helpers.experiments.study import run_arm
from kd_helpers.experiments.tinybert import (
    ARMS,
    PART_SEEDS,
    PARTS,
    PILOT_SEED,
    SEEDS,
    WHOLE,
    Material,
    Rates,
    Stages,
    choose_rates,
    logits_only,
    tinybert_study,
    train_in_stages,
)
from kd_helpers.methods.augmentation import CANDIDATES, PROBABILITY
from kd_helpers.methods.tinybert import narrow_shape
from kd_helpers.models import freeze, random_like
from kd_helpers.resolve import resolve

CONFIG = DistillConfig(learning_rate=1e-2, batch_size=8, precision="float32", device="cpu")
RATES = Rates(layers=2e-3, prediction=1e-3, labels=5e-4)


@pytest.fixture
def material(tokenized, splits) -> Material:
    """Two tiny teachers, and the same texts for every arm."""
    teachers = (freeze(tiny_bert(layers=4, seed=seed)) for seed in (1, 2))
    texts = {"train": tokenized, "augmented": tokenized, "real": tokenized}
    return Material(resolve(CONFIG, splits), *teachers, texts=texts, test_logits=None)


# The arms


@pytest.mark.parametrize("length", [2, 7, 900])
def test_every_arm_makes_the_same_steps(length):
    for arm in (ARMS | PARTS).values():
        steps = dataclasses.replace(arm.recipe, length=length).steps()
        assert sum(steps.values()) == length
        assert steps["prediction"] > 0
    assert Stages(length=900, general=0).steps() == {"general": 0, "layers": 300, "prediction": 600}


def test_arms_that_are_compared_draw_from_the_same_texts():
    for name, arm in ARMS.items():
        if name.startswith("tinybert"):
            other = ARMS[name.replace("tinybert", "logits")].recipe
            assert other == dataclasses.replace(arm.recipe, general=0, layers=0)
    assert {arm.recipe.length for arm in ARMS.values()} == {600, 1200, 2400}
    assert len(ARMS) == 12


def test_ablations_differ_from_the_whole_in_one_thing():
    whole = vars(PARTS[WHOLE].recipe)
    for name in ("no_general", "no_layers", "no_augmentation", "no_embedding", "no_attention", "no_hidden"):
        fields = vars(PARTS[name].recipe)
        assert sum(fields[field] != value for field, value in whole.items()) == 1, name
    assert PARTS["no_attention"].recipe.weights() == {"embedding": 1.0, "hidden": 1.0}
    assert PARTS[WHOLE].recipe.weights() == {"embedding": 1.0, "attention": 0.1, "hidden": 1.0}
    assert {arm.recipe.length for arm in PARTS.values()} == {1200}


def test_no_two_arms_are_one():
    every = ARMS | PARTS
    assert len({arm.recipe for arm in every.values()}) == len({arm.title for arm in every.values()}) == len(every)
    assert PILOT_SEED not in {*SEEDS, *PART_SEEDS}


def test_the_stages_of_an_arm(monkeypatch, material, tokenized):
    """Who teaches what, on which texts, for how long."""
    happened = []
    student = random_like(narrow_shape(material.tuned, layers=2, width=16), seed=0)
    monkeypatch.setitem(tinybert.STUDENTS, "narrow", lambda config, names: student)

    maps, orders = [], []

    def layers(own, teaches, projections, texts, setup, *, steps, weights):
        assert own is student
        maps.append(projections)
        orders.append(setup.config.seed)
        happened.append((teaches, texts, setup.config.learning_rate, steps, weights))

    def logits(own, batches, *, config, precision, description):
        assert own is student
        assert config.seed == 3
        orders.append(batches.batch_sampler.seed)
        happened.append((batches.dataset, config.learning_rate, config.max_steps, config.alpha))

    monkeypatch.setattr(tinybert, "distill_layers", layers)
    monkeypatch.setattr(tinybert, "train_classifier", logits)
    train_in_stages(Stages(length=9, without="hidden"), material, RATES, seed=3)
    weights = {"embedding": 1.0, "attention": 0.1}
    assert happened == [
        (material.pretrained, tokenized, 2e-3, 2, weights),
        (material.tuned, tokenized, 2e-3, 2, weights),
        (tokenized, 1e-3, 5, 1.0),
    ]
    assert maps[0] is maps[1], "the second stage goes on with the projections of the first"
    assert {tuple(p.shape) for p in maps[0].parameters()} == {(32, 16)}
    assert orders == [3, 1003, 2003], "no stage begins with the batches of another"
    happened.clear()
    train_in_stages(logits_only(length=9, alpha=0.0), material, RATES, seed=3)
    assert happened == [(tokenized, 5e-4, 9, 0.0)]


def test_rates_are_chosen_on_validation_one_after_the_other(own_artifacts, monkeypatch, material):
    """First those of logits and of labels alone, then those of the layers before logits; the highest accuracy wins."""
    tried = []

    def train(stages, _material, rates, *, seed):
        assert seed == PILOT_SEED
        tried.append((stages, rates))
        return stages, rates

    def measured(student, _material, split):
        assert split == "validation"
        stages, rates = student
        used = abs(rates.prediction - 2e-3) if stages.alpha else abs(rates.labels - 1e-3)
        return {"accuracy": 1 - used - abs(rates.layers - 4e-3), "nll": 0.0}

    monkeypatch.setattr(tinybert, "train_in_stages", train)
    monkeypatch.setattr(tinybert, "measure", measured)
    assert choose_rates(material, "narrow") == Rates(layers=4e-3, prediction=2e-3, labels=1e-3)
    assert [(stages.layers, stages.alpha) for stages, _ in tried] == [(0, 1.0)] * 4 + [(0, 0.0)] * 4 + [(1, 1.0)] * 4
    assert {rates.prediction for stages, rates in tried if stages.layers} == {2e-3}
    assert {stages.texts for stages, _ in tried if not stages.alpha} == {"train"}
    tried.clear()
    assert choose_rates(material, "narrow") == Rates(layers=4e-3, prediction=2e-3, labels=1e-3)
    assert tried == [], "found again"


# What a run is stored under


def provenance_of(study, arm: str, seed: int) -> dict:
    """That of a run that trains nothing."""
    made = run_arm(dataclasses.replace(study, run=lambda *_: {}), arm, seed)
    return artifacts.load_json(artifacts.artifacts_dir() / made["folder"] / artifacts.PROVENANCE)


def test_everything_that_decides_a_run_is_in_its_provenance(own_artifacts, material):
    stored = provenance_of(tinybert_study(material, lambda student: RATES, PARTS, copies=2), "no_hidden", 1)
    assert stored["arm"]["recipe"] == {
        "length": 1200,
        "student": "narrow",
        "texts": "augmented",
        "general": 1,
        "layers": 1,
        "prediction": 2,
        "without": "hidden",
        "alpha": 1.0,
    }
    assert stored["seed"] == 1
    choices = stored["choices"]
    assert choices["config"] == CONFIG.to_dict()
    assert choices["copies"] == 2
    assert choices["replacement"] == {"probability": PROBABILITY, "candidates": CANDIDATES}
    assert choices["learning_rates"] == {name: RATES._asdict() for name in ("half", "narrow")}
    assert choices["texts"] == {"train": 128, "augmented": 128, "real": 128}
    assert choices["weights"] == tinybert.WEIGHTS
    assert choices["corpus"] == corpus_digest(read_corpus(CONFIG))
    assert choices["checkpoint"] == CONFIG.teacher_source
    assert "cpu" in choices["machine"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROBABILITY", 0.3),
        ("CANDIDATES", 14),
        ("WEIGHTS", {"hidden": 1.0}),
        ("corpus_digest", lambda corpus: "other tweets"),
        ("checkpoint_version", lambda name: "another checkpoint"),
    ],
)
def test_another_choice_is_another_run(own_artifacts, material, monkeypatch, name, value):
    monkeypatch.setattr(tinybert, "read_corpus", lambda config: "the course's tweets")  # they take a second
    monkeypatch.setattr(tinybert, "corpus_digest", lambda corpus: "their digest")

    def folder(rates=RATES, **options) -> str:
        study = tinybert_study(material, lambda student: rates, **options)
        return run_arm(dataclasses.replace(study, run=lambda *_: {}), WHOLE, 0)["folder"]

    before = folder()
    assert folder(arms=PARTS) == before, "a run of both studies is made once"
    assert len({before, folder(rates=Rates(1e-3, 1e-3)), folder(copies=3)}) == 3
    monkeypatch.setattr(tinybert, name, value)
    assert folder() != before


# In small


def test_a_study_in_small(own_artifacts, monkeypatch, small_data, splits):
    """Both kinds of stages, all kinds of texts, all of it measured; no text of test gets into training."""
    data = dataclasses.replace(small_data, train=small_data.train.select(range(24)), transfer=splits.transfer)
    language = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    shapes = {"narrow": (2, 16), "half": (4, 32)}
    students = {
        name: lambda config, _names, layers=layers, width=width: random_like(
            narrow_shape(tiny_bert(layers=4), layers=layers, width=width), seed=config.seed
        )
        for name, (layers, width) in shapes.items()
    }
    short = {
        name: dataclasses.replace(arm, recipe=dataclasses.replace(arm.recipe, length=6)) for name, arm in ARMS.items()
    }
    few = ("logits_augmented_600", "tinybert_augmented_600", "tinybert_real_600")
    parts = {
        name: dataclasses.replace(PARTS[name], recipe=dataclasses.replace(PARTS[name].recipe, length=6))
        for name in ("no_layers", "half_tinybert", "no_augmentation")
    }
    for name, made in {
        "resolve": lambda config: resolve(config, data),
        "load_teacher": lambda config, names: tiny_bert(layers=4, seed=1),
        "fine_tuned_teacher": lambda setup: freeze(tiny_bert(layers=4, seed=2)),
        "language_teacher": lambda setup: language,
        "STUDENTS": students,
        "PARTS": parts,
        "CONFIG": CONFIG.replace(max_length=24, alpha=1.0),
        "COPIES": 1,
        "choose_rates": lambda material, student: RATES,
    }.items():
        monkeypatch.setattr(tinybert, name, made)
    arms = {name: short[name] for name in few}
    monkeypatch.setattr(tinybert.tinybert_study, "__defaults__", (arms,))
    made = tinybert.study()
    assert json.loads(json.dumps(made)).keys() == made.keys()
    assert [(run["arm"], run["seed"]) for run in made["runs"]] == [(arm, seed) for seed in SEEDS for arm in few]
    assert [(run["arm"], run["seed"]) for run in made["parts"]["runs"]] == [
        (arm, seed) for seed in PART_SEEDS for arm in parts
    ]
    assert made["teacher"]["fidelity"] == 1.0
    runs = [*made["runs"], *made["parts"]["runs"]]
    assert len({run["nll"] for run in runs}) == len(runs), "arms and seeds differ"
    assert all(run["seconds"] > 0 for run in runs)
    texts = made["choices"]["texts"]
    assert texts["train"] == 24
    assert 24 < texts["augmented"] <= 48
    assert texts["real"] == 24 + len(splits.transfer)
    assert made["runs"] == tinybert.study()["runs"], "found again"
