"""How often is a verdict right? Verdicts with teachers that know nothing, and with one that does.

Each run is a whole verdict (see `verdict`), small enough for a few minutes, on its own draw of labelled and of held-out
texts. With a teacher that knows nothing, "pays" is an error. With a teacher that was fine-tuned on the course's tweets
and 2,500 labels for the student, anything else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from scipy import stats

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, dataset_digest
from kd_helpers.experiments.environment import environment
from kd_helpers.experiments.judgement import PAYS
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study
from kd_helpers.experiments.text_sets import TWEETS, all_texts
from kd_helpers.experiments.verdict import ask
from kd_helpers.experiments.verdict_plan import FEWEST_SEEDS, Plan
from kd_helpers.experiments.verdict_runs import EFFECT, prepare
from kd_helpers.models import checkpoint_version, copy_layers, load_classifier, load_tokenizer, save_model
from kd_helpers.provenance import made_by
from kd_helpers.resolve import resolve
from kd_helpers.runtime import machine

TEXTS = (TWEETS, "news", "politicians")  # one after the other, seed after seed
SEEDS = tuple(range(20))
CONFIG = DistillConfig(max_length=16, batch_size=16, learning_rate=1e-3)
LAYERS = (0,)  # of the teacher, which the students have: the smallest that learns, so that many verdicts can be made
TEACHER_LABELS = 10_000  # the tweets that the course's teacher was fine-tuned on; those of the student are among them
SHUFFLED_EPOCHS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """The teacher and the sizes of one kind of verdict.

    Attributes:
        teacher: "random head" was not fine-tuned; "shuffled labels" was, on labels that were dealt out at random;
            "tuned" was fine-tuned as in the course.
        texts: "all" takes one of `TEXTS` after the other, else the name of one.
        labels: labelled texts of the student.
        validation, test: held-out texts.
        lengths: steps that are tried.
    """

    teacher: str
    texts: str
    labels: int
    validation: int
    test: int
    lengths: tuple[int, int]


ARMS: dict[str, Arm] = {
    "random_head": Arm("A teacher with a random head", Case("random head", "all", 500, 500, 1000, (125, 250))),
    "shuffled_labels": Arm("A teacher of shuffled labels", Case("shuffled labels", "all", 500, 500, 1000, (125, 250))),
    "tuned": Arm("The tweets' own teacher", Case("tuned", "tweets", 2500, 1000, 3000, (250, 500))),
}
IGNORANT = ("random_head", "shuffled_labels")


def draw(whole: DataSplits, case: Case, seed: int) -> DataSplits:
    """The texts of one verdict: labelled and held-out ones drawn by the seed.

    A tuned teacher has read the first texts of the pool, from which the student's are drawn then.
    """
    rng = np.random.default_rng(seed)
    seen = TEACHER_LABELS if case.teacher == "tuned" else len(whole.train)
    train = whole.train.select(rng.permutation(seen)[: case.labels])
    shuffled = rng.permutation(np.array(train["label"][:])).tolist()
    return dataclasses.replace(
        whole,
        train=train,
        teacher_train=whole.teacher_train if case.teacher == "tuned" else _labelled(train, shuffled),
        validation=whole.validation.select(rng.permutation(len(whole.validation))[: case.validation]),
        test=whole.test.select(rng.permutation(len(whole.test))[: case.test]),
    )


def _labelled(texts: datasets.Dataset, labels: list[int]) -> datasets.Dataset:
    """The texts with other labels."""
    return texts.remove_columns("label").add_column("label", labels)


def run(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    """One verdict.

    Returns:
        `texts`, `pays` (whether any question but that of the teacher is answered so), `questions`, `unfinished`,
        `steps`, and the accuracies of all candidates on test.
    """
    name = TEXTS[seed % len(TEXTS)] if case.texts == "all" else case.texts
    epochs = {"random head": 0, "shuffled labels": SHUFFLED_EPOCHS, "tuned": CONFIG.teacher_epochs}[case.teacher]
    config = CONFIG.replace(teacher_epochs=epochs, train_size=case.labels)
    config = config.replace(student_checkpoint=str(small_student()))
    with contextlib.nullcontext() if case.teacher == "tuned" else _artifacts_of_its_own():
        ground = prepare(resolve(config, draw(all_texts(name, TEACHER_LABELS), case, seed)))
        # Once the teacher has learned, no arm shall read the labels that it saw beyond those of the student.
        data = dataclasses.replace(ground.setup.data, teacher_train=ground.setup.data.train)
        ground = dataclasses.replace(ground, setup=dataclasses.replace(ground.setup, data=data), keep_student=False)
        result, _ = ask(ground, Plan(case.lengths, (FEWEST_SEEDS, FEWEST_SEEDS)))
    asked = [entry for entry in result["questions"] if entry["question"] != "teacher"]
    return {
        "texts": name,
        "pays": any(entry["answer"] == PAYS for entry in asked),
        **{key: result[key] for key in ("questions", "unfinished", "steps")},
        "accuracy": {row["name"]: row["accuracy"] for row in result["table"]},
    }


def small_student() -> Path:
    """The folder of the students' first weights, without a head."""
    provenance = made_by("kd_helpers.models") | {
        "checkpoint": checkpoint_version(CONFIG.teacher_source),
        "layers": LAYERS,
    }
    folder = artifacts.artifacts_dir() / "small_students" / artifacts.fingerprint(provenance)

    def build(target: Path) -> None:
        teacher = load_classifier(CONFIG.teacher_source, ("one", "other"), seed=0)
        save_model(target, copy_layers(teacher, LAYERS, seed=0).base_model, load_tokenizer(CONFIG.teacher_source))

    artifacts.get_or_build(folder, build)
    return folder


@contextlib.contextmanager
def _artifacts_of_its_own() -> Iterator[None]:
    """A folder for what nobody needs again: a teacher that knows nothing, and its students."""
    with tempfile.TemporaryDirectory() as folder, environment({"KD_ARTIFACTS": folder}):
        yield


def verdict_study() -> Study:
    """The study that comes with the package."""
    return Study(
        name="verdict",
        module="kd_helpers.experiments.verdict_study",
        arms=ARMS,
        seeds=SEEDS,
        choices={
            "config": CONFIG.to_dict(),
            "layers": LAYERS,
            "effect": EFFECT,
            "machine": str(machine(CONFIG)),
            "checkpoint": checkpoint_version(CONFIG.teacher_source),
            "texts": {name: dataset_digest(all_texts(name, TEACHER_LABELS).train) for name in TEXTS},
        },
        run=run,
    )


def study() -> dict[str, Any]:
    """Make it (see `study.run_study`)."""
    return run_study(verdict_study())


def stored_verdicts() -> dict[str, Any]:
    """The study that comes with the package, made by `make study`."""
    return stored_study("verdict_study")


def shares(result: Mapping[str, Any]) -> pd.DataFrame:
    """How often each arm's verdicts said "pays", with the 95% interval of Clopper and Pearson.

    Returns:
        Rows "ignorant" (both kinds of teachers that know nothing), "ignorant, finished" (of these the verdicts in which
        no student was unfinished) and each arm; columns `pays`, `verdicts`, `share`, `low`, `high`.
    """
    of_ignorant = [entry for entry in result["runs"] if entry["arm"] in IGNORANT]
    groups = {
        "ignorant": of_ignorant,
        "ignorant, finished": [entry for entry in of_ignorant if not entry["unfinished"]],
        **{arm: [entry for entry in result["runs"] if entry["arm"] == arm] for arm in result["arms"]},
    }
    rows = {}
    for name, entries in groups.items():
        answers = [entry["pays"] for entry in entries]
        found = stats.binomtest(sum(answers), len(answers)).proportion_ci(method="exact")
        share = float(np.mean(answers))
        rows[name] = {
            "pays": sum(answers),
            "verdicts": len(answers),
            "share": share,
            "low": found.low,
            "high": found.high,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
