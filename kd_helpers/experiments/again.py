"""Whether today's code still gives what is stored: one run of every stored study, made again.

A study takes hours, and the library goes on changing. If a run that is made again gives what is stored, what has
changed since did not change it. On another kind of processor rounding differs, and then two runs with the same seed
part as two seeds do. A run is made again only if everything that the study names as its choices, such as the digest of
its texts, is still the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.experiments.origin import AGAIN, made_again
from kd_helpers.experiments.study import Study, run_arm, stored_study
from kd_helpers.provenance import source_digest
from kd_helpers.resolve import resolve


class OtherChoicesError(ValueError):
    """Today's code would make a study with other choices than the stored one."""

    def __init__(self, study: str, choices: Sequence[str]) -> None:
        super().__init__(
            f"the stored study and today's differ in their choices ({', '.join(choices)}), so one run would show "
            f"nothing; make the whole study again: `kd-helpers study {study}`."
        )


SEED = 0  # of the runs that are made again


class Entry(NamedTuple):
    """One run of a stored study.

    Attributes:
        build: the study as the code of today defines it, from what is stored of it.
        arm: of the run; one that takes little time.
        measures: that are compared.
    """

    build: Callable[[Mapping[str, Any]], Study]
    arm: str
    measures: tuple[str, ...] = ("accuracy", "nll")


def _module(name: str) -> ModuleType:
    """A module of this folder, loaded when its study is made again."""
    return importlib.import_module(f"kd_helpers.experiments.{name}")


def _without_choices(module: str, function: str) -> Callable[[Mapping[str, Any]], Study]:
    """A study that a function without arguments returns."""
    return lambda _stored: getattr(_module(module), function)()


def _comparison(stored: Mapping[str, Any]) -> Study:
    """In the precision that "auto" meant when the study was made."""
    config = DistillConfig(**stored["choices"]["config"])
    precision = re.search(r"torch\.(\w+)\)", stored["choices"]["machine"])[1]
    study = _module("comparison").comparison_study(config.replace(precision=precision))
    return dataclasses.replace(study, choices={**study.choices, "config": config.to_dict()})


def _chosen_rates(module: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rates that were chosen when the study was made, as its module has them."""
    return {name: module.Rates(**found) for name, found in stored["choices"]["learning_rates"].items()}


def _tinybert(arms: str) -> Callable[[Mapping[str, Any]], Study]:
    def build(stored: Mapping[str, Any]) -> Study:
        tinybert = _module("tinybert")
        rates = _chosen_rates(tinybert, stored)
        material = tinybert.prepare_material(resolve(tinybert.CONFIG), copies=tinybert.COPIES)
        return tinybert.tinybert_study(material, rates.__getitem__, getattr(tinybert, arms))

    return build


def _distilbert(arms: str) -> Callable[[Mapping[str, Any]], Study]:
    def build(stored: Mapping[str, Any]) -> Study:
        distilbert = _module("distilbert")
        ground = distilbert.prepare(distilbert.CONFIG, adaptation_steps=distilbert.ADAPTATION_STEPS)
        return distilbert.distilbert_study(ground, _chosen_rates(distilbert, stored), getattr(distilbert, arms))

    return build


def _label_curve(_stored: Mapping[str, Any]) -> Study:
    distilbert, curve = _module("distilbert"), _module("label_curve")
    ground = distilbert.prepare(distilbert.CONFIG, adaptation_steps=distilbert.ADAPTATION_STEPS)
    return curve.curve_study(ground, curve.chosen_language_rates())


def _made_task(task: str) -> Callable[[Mapping[str, Any]], Study]:
    def build(_stored: Mapping[str, Any]) -> Study:
        rationales = _module("rationales")
        training, arms, seeds = (found[task] for found in (rationales.TRAINING, rationales.ARMS, rationales.SEEDS))
        return rationales.rationales_study(task, rationales.made_ground(task, training), arms, training, seeds=seeds)

    return build


def _explained_tweets(_stored: Mapping[str, Any]) -> Study:
    rationales = _module("rationales")
    training, arms, seeds = rationales.TWEETS_TRAINING, rationales.TWEET_ARMS, rationales.SEEDS["tweets"]
    ground = rationales.tweets_ground(training)
    return rationales.rationales_study("explained_tweets", ground, arms, training, seeds=seeds)


def _models_of_real_texts(name: str) -> Callable[[Mapping[str, Any]], Study]:
    def build(_stored: Mapping[str, Any]) -> Study:
        models = _module("language_models")
        return models.language_models_study(**models.REAL_TEXTS[name])

    return build


def _digits(_stored: Mapping[str, Any]) -> Study:
    digits = _module("survey_digits")
    return digits.digits_study(digits.ARMS)


def _on_tweets(module: str, function: str) -> Callable[[Mapping[str, Any]], Study]:
    """A study of the survey that needs what those on tweets share."""
    return lambda _stored: getattr(_module(module), function)(_module("survey_tweets").prepare())


# By the name of the stored study; after a dot a part of it.
ENTRIES: dict[str, Entry] = {
    "comparison": Entry(_comparison, "tuned_teacher"),
    "patience": Entry(_without_choices("patience", "texts_study"), "new_texts_2500"),
    "patience.125_steps": Entry(lambda _stored: _module("patience").length_study(125), "tuned_teacher"),
    "dark_knowledge": Entry(_without_choices("dark_knowledge", "dark_knowledge_study"), "30 units: T = 12"),
    "distilbert": Entry(_distilbert("ARMS"), "packaged", ("nats", "labels_500_accuracy")),
    "distilbert.parts": Entry(_distilbert("PARTS"), "random_none", ("nats", "labels_500_accuracy")),
    "label_curve": Entry(_label_curve, "none", ("labels_50_accuracy", "labels_2500_accuracy")),
    "tinybert": Entry(_tinybert("ARMS"), "logits_augmented_600"),
    "tinybert.parts": Entry(_tinybert("PARTS"), "logits_train"),
    "language_models": Entry(_without_choices("language_models", "language_models_study"), "baseline", ("nats",)),
    "language_models.tweets": Entry(_models_of_real_texts("tweets"), "baseline", ("nats",)),
    "language_models.written": Entry(_models_of_real_texts("written"), "baseline", ("nats",)),
    "language_models.sizes": Entry(_without_choices("language_models", "sizes_study"), "32 × 1", ("nats",)),
    "rationales": Entry(_made_task("knowledge"), "first_3200", ("accuracy",)),
    "rationales.arithmetic": Entry(_made_task("arithmetic"), "first_3200", ("accuracy",)),
    "rationales.tweets": Entry(_explained_tweets, "labels_3000", ("accuracy",)),
    "survey": Entry(_digits, "response"),
    "survey.tweets": Entry(_on_tweets("survey_tweets", "tweets_study"), "labels"),
    "survey.subliminal": Entry(
        _without_choices("survey_extensions", "subliminal_study"), "other_digits", ("accuracy",)
    ),
    "survey.weak_to_strong": Entry(_on_tweets("survey_extensions", "weak_to_strong_study"), "weak_labels"),
    "survey.calibration": Entry(_without_choices("survey_extensions", "calibration_study"), "times 0.125"),
    "deployment": Entry(
        _without_choices("deployment", "deployment_study"), "student", ("float32_accuracy", "int8_accuracy")
    ),
    "verdict_study": Entry(_without_choices("verdict_study", "verdict_study"), "random_head", ("pays", "steps")),
    "settings": Entry(_without_choices("settings", "settings_study"), "tweets, baseline, 250 steps"),
}


def stored_part(name: str) -> Mapping[str, Any]:
    """The stored study of an entry, or the part of it."""
    study, _, part = name.partition(".")
    stored = stored_study(study)
    return stored[part] if part else stored


def make_again(name: str) -> dict[str, Any]:
    """Make the run of an entry with the code of today.

    Returns:
        Ready for JSON: `of`, which names the stored result (`module`, `source` and `date` of what made it); `arm` and
        `seed`; `source` and `date` of now; and `measures`, for each name what is stored and what the run gave.

    Raises:
        OtherChoicesError: the study's choices are no longer those of the stored one.
    """
    entry, stored = ENTRIES[name], stored_part(name)
    study = entry.build(stored)
    then, now = stored["choices"], json.loads(json.dumps(dict(study.choices)))
    if other := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        raise OtherChoicesError(name.partition(".")[0], other)
    again = run_arm(study, entry.arm, SEED)
    (before,) = (run for run in stored["runs"] if (run["arm"], run["seed"]) == (entry.arm, SEED))
    return {
        "of": {key: stored["made_with"][key] for key in ("module", "source", "date")},
        "arm": entry.arm,
        "seed": SEED,
        "source": source_digest(study.module),
        "date": datetime.date.today().isoformat(),
        "measures": {measure: [float(before[measure]), float(again[measure])] for measure in entry.measures},
    }


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers again") -> int:
    """Make one run of stored studies again, and store in the package what it gave.

    Returns:
        Exit status: 0, or 1 if a run could not be made. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make one run of each stored study again, to see whether the code of today gives what is stored. "
        "What it gave is stored beside it, and readers are told.",
        epilog=f"Example: {prog} dark_knowledge survey. All of them take about an hour.",
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"which ones; all if none: {', '.join(ENTRIES)}")
    names = parser.parse_args(arguments).studies or list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        parser.error(f"there is no stored run of {', '.join(unknown)}; choose from {', '.join(ENTRIES)}.")
    failed = False
    for name in names:
        try:
            found = make_again(name)
        except (OtherChoicesError, FileNotFoundError) as error:  # the latter: texts that are not installed
            failed = True
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        _store(name, found)
        told = ", ".join(
            f"{measure} {now:.4f} (stored: {then:.4f})" for measure, (then, now) in found["measures"].items()
        )
        print(f"{name}, {found['arm']}, seed {found['seed']}: {told}", flush=True)
    return int(failed)


def _store(name: str, found: Mapping[str, Any]) -> None:
    """Keep what a run gave beside what others gave; another process may do the same at this moment."""
    with artifacts.locked(artifacts.artifacts_dir() / AGAIN.name):
        kept = made_again() if AGAIN.exists() else {}
        artifacts.save_json(AGAIN, dict(sorted((kept | {name: found}).items())))
