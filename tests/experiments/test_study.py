"""A study: every arm with every seed, made once, stored with its provenance, compared seed by seed."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import kd_helpers
from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.experiments import (
    RESULTS,
    comparison,
    dark_knowledge,
    deployment,
    distilbert,
    label_curve,
    language_models,
    patience,
    rationales,
    settings,
    studies,
    study,
    survey,
    survey_digits,
    survey_extensions,
    survey_tweets,
    tinybert,
    verdict_study,
)
from kd_helpers.experiments.studies import STUDIES
from kd_helpers.experiments.study import (
    Arm,
    Study,
    gains,
    made_with,
    means,
    run_arm,
    run_study,
    stored_study,
    study_table,
    titles,
)
from kd_helpers.provenance import made_by, source_digest

MODULE = "kd_helpers.experiments.dark_knowledge"  # of which the small study says that it defines it


@dataclasses.dataclass(frozen=True)
class Line:
    """An arm that scores `times · seed + plus`."""

    times: float = 1.0
    plus: float = 0.0


ARMS = {
    "plain": Arm("The seed", Line()),
    "ten": Arm("Ten more", Line(plus=10.0)),
    "twice": Arm("Twice as much", Line(times=2.0)),
}


@pytest.fixture
def happened() -> list[tuple[Line, int]]:
    """The runs that were made, not found."""
    return []


@pytest.fixture
def small(own_artifacts, happened) -> Study:
    def run(recipe: Line, seed: int, folder: Path) -> dict[str, float]:
        happened.append((recipe, seed))
        (folder / "student.txt").write_text("a student")
        return {"score": recipe.times * seed + recipe.plus}

    return Study("small", MODULE, ARMS, (1, 3), {"steps": 5}, run)


def replaced(small: Study, **changes) -> Study:
    return dataclasses.replace(small, **changes)


def test_every_arm_meets_every_seed_once(small, happened):
    result = run_study(small)
    assert happened == [(arm.recipe, seed) for seed in (1, 3) for arm in ARMS.values()]
    assert json.loads(json.dumps(result)) == result
    assert result["choices"] == {"steps": 5}
    assert result["arms"]["ten"] == {"title": "Ten more", "recipe": {"times": 1.0, "plus": 10.0}}
    assert result["seeds"] == [1, 3]
    assert [(run["arm"], run["seed"]) for run in result["runs"]] == [(arm, seed) for seed in (1, 3) for arm in ARMS]
    assert run_study(small)["runs"] == result["runs"]
    assert len(happened) == 6, "found again"
    run_study(replaced(small, choices={"steps": 6}))
    assert len(happened) == 12, "other choices are another study"


def test_a_study_goes_on_where_it_was_cut_off(small, happened):
    def cut_off(recipe: Line, seed: int, folder: Path) -> dict[str, float]:
        if recipe == ARMS["twice"].recipe:
            raise KeyboardInterrupt
        return small.run(recipe, seed, folder)

    with pytest.raises(KeyboardInterrupt):
        run_study(replaced(small, run=cut_off))
    assert happened == [(Line(), 1), (Line(plus=10.0), 1)]
    run_study(small)
    assert happened.count((Line(), 1)) == 1
    assert len(happened) == 6


def test_a_second_process_leaves_out_what_another_is_running(small, happened):
    """What is locked comes last, so two processes share the runs; both have all of them in the end."""
    folders = [study._folder(study._provenance(small, arm, seed)) for seed in (1, 3) for arm in ARMS]
    held, order = ExitStack(), []
    held.enter_context(artifacts.locked(folders[0]))

    def run(recipe: Line, seed: int, folder: Path) -> dict[str, float]:
        order.append((recipe, seed))
        if len(order) == 5:
            held.close()  # the other process has come to its end
        return small.run(recipe, seed, folder)

    result = run_study(replaced(small, run=run))
    assert order[-1] == (Line(), 1)
    assert len(order) == 6
    assert [(found["arm"], found["seed"]) for found in result["runs"]] == [
        (arm, seed) for seed in (1, 3) for arm in ARMS
    ]


def test_arms_are_compared_seed_by_seed(small):
    result = run_study(small)
    assert list(study_table(result, "score")) == ["plain", "ten", "twice"]
    assert means(result, "score")["mean"].to_dict() == {"plain": 2.0, "ten": 12.0, "twice": 4.0}
    gain = gains(result, "score", over="plain")
    assert list(gain.columns) == ["gain", "low", "high"]
    assert gain.loc["ten"].to_list() == [10.0, 10.0, 10.0], "the same for each seed: no spread"
    assert gain.loc["twice", "gain"] == 2.0
    assert gain.loc["twice", "low"] < 0 < gain.loc["twice", "high"]
    assert "plain" not in gain.index
    assert titles(result) == {"plain": "The seed", "ten": "Ten more", "twice": "Twice as much"}


# What a run is stored under


def test_a_run_is_stored_with_its_provenance(small, own_artifacts):
    run = run_arm(small, "ten", 3)
    assert run == {"arm": "ten", "seed": 3, "score": 13.0, "folder": run["folder"]}
    folder = own_artifacts / run["folder"]
    stored = artifacts.load_json(folder / artifacts.PROVENANCE)
    assert stored == {
        **made_by(MODULE),
        "study": "small",
        "arm": {"title": "Ten more", "recipe": {"times": 1.0, "plus": 10.0}},
        "seed": 3,
        "choices": {"steps": 5},
    }
    assert stored["source"] == source_digest(MODULE)
    assert folder.name == artifacts.fingerprint(stored)
    assert (folder / "student.txt").read_text() == "a student", "a run may keep files"
    assert artifacts.is_intact(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"ten": Arm("Ten more", Line(plus=11.0))}},
        {"arms": {"ten": Arm("Ten more", Line(times=3.0, plus=10.0))}},
        {"choices": {"steps": 6}},
        {"choices": {"steps": 5, "copies": 1}},
        {"choices": {}},
        {"module": "kd_helpers.experiments.tinybert"},
        {"name": "another"},
    ],
)
def test_what_decides_a_run_makes_it_anew(small, happened, changes):
    first = run_arm(small, "ten", 1)
    again = run_arm(replaced(small, **changes), "ten", 1)
    assert again["folder"] != first["folder"]
    assert len(happened) == 2
    assert run_arm(small, "ten", 1) == first
    assert len(happened) == 2, "the first is still there"


def test_another_seed_is_another_run(small, happened):
    assert run_arm(small, "ten", 1)["folder"] != run_arm(small, "ten", 2)["folder"]
    assert len(happened) == 2


def test_other_code_makes_a_run_anew(small, happened, monkeypatch):
    first, asked = run_arm(small, "ten", 1), []
    monkeypatch.setattr(study, "made_by", lambda *modules: asked.append(modules) or {"source": "another digest"})
    again = run_arm(small, "ten", 1)
    assert again["folder"] != first["folder"]
    assert len(happened) == 2
    assert asked == [(MODULE,)], "the code is that of the module which defines the study"
    assert run_arm(small, "ten", 1) == again


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"ten": ARMS["ten"]}},
        {"arms": dict(reversed(ARMS.items()))},
        {"arms": {**ARMS, "new": Arm("New", Line(times=9.0))}},
        {"arms": {"plain": Arm("Another baseline", Line(plus=-1.0)), "ten": ARMS["ten"]}},
        {"seeds": (1,)},
        {"seeds": (5, 1, 3)},
        {"run": lambda *_: pytest.fail("it was made twice")},
    ],
)
def test_nothing_else_makes_a_run_anew(small, happened, changes):
    """Neither what a study has beside this arm and this seed, nor their order, nor how the run is called."""
    first = run_arm(small, "ten", 1)
    assert run_arm(replaced(small, **changes), "ten", 1) == first
    assert len(happened) == 1


def test_neither_a_release_nor_another_day_makes_a_run_anew(small, happened, monkeypatch):
    first = run_arm(small, "ten", 1)
    monkeypatch.setattr(kd_helpers, "__version__", "99.0")
    monkeypatch.setattr(study.torch, "get_num_threads", lambda: 64)
    later = SimpleNamespace(today=lambda: datetime.date(2100, 1, 1))
    monkeypatch.setattr(study, "datetime", SimpleNamespace(date=later))
    assert run_arm(small, "ten", 1) == first
    assert len(happened) == 1
    made = run_study(small)["made_with"]
    assert (made["kd_helpers"], made["date"]) == ("99.0", "2100-01-01")


def test_the_order_of_the_choices_does_not_matter(small, happened):
    one, other = {"steps": 5, "copies": 1}, {"copies": 1, "steps": 5}
    assert run_arm(replaced(small, choices=one), "ten", 1) == run_arm(replaced(small, choices=other), "ten", 1)
    assert len(happened) == 1


def test_a_damaged_run_is_made_again(small, happened, own_artifacts):
    first = run_arm(small, "ten", 1)
    (own_artifacts / first["folder"] / "measures.json").write_text('{"score": 99.0}')
    with pytest.warns(UserWarning, match="is damaged; it is built anew"):
        assert run_arm(small, "ten", 1) == first
    assert len(happened) == 2


# What readers are told


def test_what_made_a_result_is_told():
    made = made_with(MODULE)
    assert {"module", "source", "kd_helpers", "python", "torch", "transformers", "machine", "date"} <= made.keys()
    assert all(isinstance(value, str) for value in made.values())


# The studies that come with the package

MODULES = {
    "comparison": comparison,
    "patience": patience,
    "dark_knowledge": dark_knowledge,
    "distilbert": distilbert,
    "label_curve": label_curve,
    "tinybert": tinybert,
    "language_models": language_models,
    "rationales": rationales,
    "survey": survey,
    "deployment": deployment,
    "verdict_study": verdict_study,
    "settings": settings,
}
SEEDS = {
    "comparison": comparison.COMPARISON_SEEDS,
    "patience": comparison.COMPARISON_SEEDS,
    "dark_knowledge": dark_knowledge.SEEDS,
    "distilbert": distilbert.SEEDS,
    "label_curve": distilbert.SEEDS,
    "tinybert": tinybert.SEEDS,
    "language_models": language_models.SEEDS,
    "rationales": rationales.SEEDS["knowledge"],
    "survey": survey_digits.SEEDS,
    "deployment": deployment.SEEDS,
    "verdict_study": verdict_study.SEEDS,
    "settings": settings.SEEDS,
}
ARMS_OF = {name: module.ARMS for name, module in MODULES.items() if hasattr(module, "ARMS")} | {
    "rationales": rationales.ARMS["knowledge"],
    "patience": patience.texts_study().arms,
}


def test_every_study_that_can_be_made_is_stored():
    assert set(STUDIES) == MODULES.keys()
    for name, module in MODULES.items():
        assert callable(module.study)
        assert (RESULTS / f"{name}.json").is_file()


@pytest.mark.parametrize("name", STUDIES)
def test_a_stored_study_has_the_arms_of_today(name):
    """Or a figure would put today's titles on what another arm once measured."""
    stored, arms = stored_study(name), ARMS_OF[name]
    today = {arm: described.to_dict() for arm, described in arms.items()}
    assert stored["arms"] == json.loads(json.dumps(today))
    assert list(stored["arms"]) == list(today), "in their order, which tables and figures keep"
    assert titles(stored) == {arm: described.title for arm, described in arms.items()}
    of_study = {
        "distilbert": "nats",
        "label_curve": "labels_50_accuracy",
        "language_models": "nats",
        "deployment": "int8_accuracy",
        "verdict_study": "pays",
    }
    measure = of_study.get(name, "accuracy")
    assert list(study_table(stored, measure)) == list(arms)


@pytest.mark.parametrize("name", STUDIES)
def test_a_stored_study_is_complete(name):
    stored = stored_study(name)
    assert stored["seeds"] == list(SEEDS[name])
    found = [(run["arm"], run["seed"]) for run in stored["runs"]]
    assert len(set(found)) == len(found)
    assert set(found) == {(arm, seed) for arm in ARMS_OF[name] for seed in SEEDS[name]}


@pytest.mark.parametrize(
    ("part", "arms"), [("arithmetic", rationales.ARMS["arithmetic"]), ("tweets", rationales.TWEET_ARMS)]
)
def test_the_parts_of_the_study_of_rationales_are_complete(part, arms):
    stored, seeds = stored_study("rationales")[part], rationales.SEEDS[part]
    assert stored["arms"] == json.loads(json.dumps({arm: described.to_dict() for arm, described in arms.items()}))
    found = [(run["arm"], run["seed"]) for run in stored["runs"]]
    assert sorted(found) == sorted((arm, seed) for arm in arms for seed in seeds)


@pytest.mark.parametrize(
    ("part", "arms", "seeds"),
    [
        ("tweets", survey_tweets.ARMS, survey_tweets.SEEDS),
        ("subliminal", survey_extensions.SUBLIMINAL_ARMS, survey_extensions.SEEDS),
        ("weak_to_strong", survey_extensions.WEAK_ARMS, survey_extensions.WEAK_SEEDS),
        ("calibration", survey_extensions.CALIBRATION_ARMS, survey_extensions.SEEDS),
    ],
)
def test_the_parts_of_the_survey_are_complete(part, arms, seeds):
    stored = stored_study("survey")[part]
    assert stored["arms"] == json.loads(json.dumps({arm: described.to_dict() for arm, described in arms.items()}))
    found = [(run["arm"], run["seed"]) for run in stored["runs"]]
    assert sorted(found) == sorted((arm, seed) for arm in arms for seed in seeds)


@pytest.mark.parametrize(("name", "module"), [("distilbert", distilbert), ("tinybert", tinybert)])
def test_a_stored_study_was_made_with_the_choices_of_today(name, module):
    choices = stored_study(name)["choices"]
    assert DistillConfig(**choices["config"]) == module.CONFIG
    if name == "distilbert":
        assert choices["steps"] == distilbert.STEPS
        assert choices["adaptation_steps"] == distilbert.ADAPTATION_STEPS
        assert choices["tasks"] == {task: described._asdict() for task, described in distilbert.TASKS.items()}
    else:
        assert choices["copies"] == tinybert.COPIES
        assert choices["weights"] == tinybert.WEIGHTS


@pytest.mark.parametrize("steps", [steps for steps in patience.STEPS if steps != patience.CONFIG.max_steps])
def test_the_lengths_of_patience_are_complete_and_as_precise_as_the_comparison(steps):
    stored, seeds = stored_study("patience")[f"{steps}_steps"], patience.length_study(steps).seeds
    assert stored["choices"]["config"]["max_steps"] == steps
    assert stored["choices"]["machine"] == stored_study("comparison")["choices"]["machine"]
    assert {(run["arm"], run["seed"]) for run in stored["runs"]} == {
        (arm, seed) for arm in patience.ARMS_BY_STEPS for seed in seeds
    }


@pytest.mark.parametrize(("name", "module"), [("distilbert", distilbert), ("tinybert", tinybert)])
def test_the_parts_of_a_study_are_complete(name, module):
    assert {(run["arm"], run["seed"]) for run in stored_study(name)["parts"]["runs"]} == {
        (arm, seed) for arm in module.PARTS for seed in module.PART_SEEDS
    }


def test_the_stored_digits_were_made_with_the_choices_of_today():
    assert stored_study("dark_knowledge")["choices"] == json.loads(json.dumps(dark_knowledge.CHOICES))


# The command


def test_the_command_stores_a_study(own_artifacts, monkeypatch, tmp_path, capsys):
    for module in (study, studies):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    made = {"made_with": {}, "choices": {}, "arms": {"one": {}}, "seeds": [0], "runs": [{}, {}]}
    asked = []
    monkeypatch.setattr(
        studies.importlib, "import_module", lambda name: asked.append(name) or SimpleNamespace(study=lambda: made)
    )
    assert studies.main(["dark_knowledge"]) == 0
    assert asked == ["kd_helpers.experiments.dark_knowledge"]
    assert stored_study("dark_knowledge") == made
    assert capsys.readouterr().out == f"2 runs of 1 arms, written to {tmp_path / 'dark_knowledge.json'}\n"


def test_a_study_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as stopped:
        studies.main(["other"])
    assert stopped.value.code == 2
    assert "invalid choice: 'other'" in capsys.readouterr().err
