"""The study of chapter 11: what its arms leave out, what a run is stored under, and all of it in small."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, read_corpus
from kd_helpers.experiments import distilbert
from kd_helpers.experiments.distilbert import (
    ALL_LOSSES,
    ARMS,
    COURSE_STUDENT,
    NOT_DISTILLED,
    SEEDS,
    TASK_ONLY,
    Route,
    distilbert_study,
)
from kd_helpers.experiments.study import Arm, run_arm
from kd_helpers.methods import distilbert as method
from kd_helpers.methods.distilbert import Weights
from kd_helpers.models import freeze
from kd_helpers.resolve import resolve

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def headless(tmp_path_factory, tokenizer) -> str:
    """A pre-trained BERT without a language head, as the packaged one."""
    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(headless, small_data, splits, monkeypatch) -> DistillConfig:
    """Of two steps with a teacher that is not fine-tuned, on few texts."""
    data = dataclasses.replace(small_data, transfer=splits.transfer)
    monkeypatch.setattr(distilbert, "resolve", lambda config: resolve(config, data))
    return DistillConfig(
        teacher_checkpoint=headless,
        teacher_epochs=0,
        alpha=0.0,
        max_steps=2,
        max_length=24,
        precision="float32",
        device="cpu",
    )


# The arms


def test_each_arm_of_the_ablation_leaves_out_one_thing():
    assert ARMS[ALL_LOSSES].recipe.weights == Weights(5, 2, 1)
    differences = []
    for name, arm in ARMS.items():
        route = arm.recipe
        left_out = [part for part in Weights._fields if route.weights and getattr(route.weights, part) == 0]
        differences.append(
            (name, left_out, route.random_start, route.weights is None, route.task_only, not route.adapted)
        )
    assert differences == [
        (ALL_LOSSES, [], False, False, False, False),
        ("without the soft loss", ["soft"], False, False, False, False),
        ("without the cosine loss", ["cosine"], False, False, False, False),
        ("without the language loss", ["language"], False, False, False, False),
        ("random start", [], True, False, False, False),
        (NOT_DISTILLED, [], False, True, False, False),
        (TASK_ONLY, [], False, True, True, False),
        (COURSE_STUDENT, [], False, True, True, True),
    ]


def test_the_routes_that_are_distilled_again():
    assert [name for name, arm in ARMS.items() if arm.recipe.again] == [
        ALL_LOSSES,
        NOT_DISTILLED,
        TASK_ONLY,
        COURSE_STUDENT,
    ]


# What a run is stored under


def unrun(config: DistillConfig, **options):
    """The study, whose runs train nothing."""
    return dataclasses.replace(distilbert_study(config, **options), run=lambda *_: {})


def test_everything_that_decides_a_run_is_in_its_provenance(own_artifacts, config):
    made = run_arm(unrun(config, steps=7, adaptation_steps=9), "without the soft loss", 2)
    stored = artifacts.load_json(own_artifacts / made["folder"] / artifacts.PROVENANCE)
    assert stored["study"] == "distilbert"
    assert stored["arm"] == {
        "title": "without the soft loss",
        "recipe": {
            "weights": [0, 2.0, 1.0],
            "random_start": False,
            "task_only": False,
            "adapted": True,
            "again": False,
        },
    }
    assert stored["seed"] == 2
    choices = stored["choices"]
    assert choices["config"] == config.to_dict()
    assert (choices["steps"], choices["adaptation_steps"]) == (7, 9)
    assert choices["second_distillation"] == {"alpha": 0.9, "temperature": 2.0}
    assert choices["learning_rate"] == method.LEARNING_RATE
    assert choices["batch_size"] == method.BATCH_SIZE
    assert choices["masked_share"] == method.MASKED_SHARE
    assert choices["temperature"] == method.TEMPERATURE
    assert choices["texts"] == corpus_digest(read_corpus(config))
    assert len(choices["checkpoint"]) == 16
    assert "cpu" in choices["machine"]
    assert "float32" in choices["machine"]


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (method, "LEARNING_RATE", 1e-3),
        (method, "BATCH_SIZE", 8),
        (method, "MASKED_SHARE", 0.3),
        (method, "TEMPERATURE", 4.0),
        (distilbert, "SECOND_DISTILLATION", {"alpha": 0.5, "temperature": 2.0}),
        (distilbert, "corpus_digest", lambda corpus: "other tweets"),
        (distilbert, "ARMS", {ALL_LOSSES: Arm(ALL_LOSSES, Route(Weights(soft=4.0), again=True))}),
        (distilbert, "ARMS", {ALL_LOSSES: Arm(ALL_LOSSES, Route())}),
    ],
)
def test_another_choice_is_another_run(own_artifacts, config, monkeypatch, place, name, value):
    monkeypatch.setattr(distilbert, "read_corpus", lambda config: "the course's tweets")  # they take a second
    monkeypatch.setattr(distilbert, "corpus_digest", lambda corpus: "their digest")

    def folder(config: DistillConfig = config, **options) -> str:
        study = unrun(config, **{"steps": 7, "adaptation_steps": 9} | options)
        return run_arm(study, ALL_LOSSES, 0)["folder"]

    before = folder()
    assert folder() == before
    others = folder(steps=8), folder(adaptation_steps=8), folder(config.replace(learning_rate=1e-3))
    assert len({before, *others}) == 4
    monkeypatch.setattr(place, name, value)
    assert folder() != before


def test_a_changed_file_of_the_teacher_is_another_run(own_artifacts, config, headless, tmp_path, monkeypatch):
    monkeypatch.setattr(distilbert, "read_corpus", lambda config: "the course's tweets")
    monkeypatch.setattr(distilbert, "corpus_digest", lambda corpus: "their digest")
    before = run_arm(unrun(config), ALL_LOSSES, 0)["folder"]
    own = tmp_path / "own"
    shutil.copytree(headless, own)
    config = config.replace(teacher_checkpoint=str(own))
    copied = run_arm(unrun(config), ALL_LOSSES, 0)["folder"]
    text = (own / "config.json").read_text()
    (own / "config.json").write_text(text.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))
    assert text != (own / "config.json").read_text()
    assert len({before, copied, run_arm(unrun(config), ALL_LOSSES, 0)["folder"]}) == 3


# In small


def test_arms_run_repeat_themselves_and_are_measured(own_artifacts, config, tmp_path):
    more = {
        ALL_LOSSES: {"again_accuracy", "again_nll"},
        "random start": set(),
        NOT_DISTILLED: {"again_accuracy", "again_nll"},
        TASK_ONLY: {"again_accuracy", "again_nll", "transfer_accuracy", "transfer_nll"},
        COURSE_STUDENT: {"again_accuracy", "again_nll", "transfer_accuracy", "transfer_nll"},
    }
    study = distilbert_study(config, steps=2, adaptation_steps=2)
    measures = {name: run_arm(study, name, 0) for name in more}
    about = {"arm", "seed", "folder"}
    names = {"language_loss", "language_accuracy", "accuracy", "nll"}
    for name, found in measures.items():
        assert found.keys() - about == names | more[name], name
        assert all(math.isfinite(found[measure]) for measure in found.keys() - about), name
    again = distilbert_study(config, steps=2, adaptation_steps=2)
    for name in (ALL_LOSSES, TASK_ONLY):  # alone, not after the other arms of its seed
        made = again.run(ARMS[name].recipe, 0, tmp_path)
        assert made == {measure: measures[name][measure] for measure in made}
    assert len({found["nll"] for found in measures.values()}) == len(measures), "every arm is another student"
    untouched = measures[NOT_DISTILLED]["language_loss"]
    assert measures[TASK_ONLY]["language_loss"] == untouched != measures[ALL_LOSSES]["language_loss"]
    assert measures[COURSE_STUDENT]["language_loss"] > untouched, "made of a model that never predicted masked tokens"
    assert measures[TASK_ONLY]["transfer_nll"] != measures[TASK_ONLY]["again_nll"]


def test_the_study_keeps_its_arms_its_teachers_and_what_they_say(own_artifacts, small_data, monkeypatch):
    names = {arm.recipe: name for name, arm in ARMS.items()}
    assert len(names) == len(ARMS)

    def run(route: Route, seed: int, _folder) -> dict[str, float]:
        return {"accuracy": len(names[route]) + seed}

    torch.manual_seed(0)
    teacher = freeze(BertForMaskedLM(BertConfig(**SHAPE)))
    monkeypatch.setattr(distilbert, "resolve", lambda config: resolve(config.replace(precision="float32"), small_data))
    monkeypatch.setattr(method, "language_teacher", lambda setup, head_only=False: teacher)
    monkeypatch.setattr(distilbert, "distilbert_study", lambda: dataclasses.replace(distilbert_study(), run=run))
    study = distilbert.study()
    first = json.loads(json.dumps(study))["runs"][0]
    folder = first.pop("folder")
    assert first == {"arm": ALL_LOSSES, "seed": 0, "accuracy": len(ALL_LOSSES)}
    assert (own_artifacts / folder / "measures.json").is_file()
    assert [(run["arm"], run["seed"]) for run in study["runs"]] == [(arm, seed) for seed in SEEDS for arm in ARMS]
    assert study["teachers"]["head only"] == study["teachers"]["all weights"]
    assert study["teachers"]["not adapted"]["loss"] > 9, "the packaged model with a fresh head"
    for sentence, by_temperature in study["words"].items():
        assert list(by_temperature) == ["1", "2"], sentence
        for words in by_temperature.values():
            shares = [share for _, share in words]
            assert shares == sorted(shares, reverse=True)
            assert 0 < sum(shares) < 1
