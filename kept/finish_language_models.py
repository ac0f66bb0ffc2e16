"""Finish chapter 13's study, whose part on made stories is whole: `KD_ARTIFACTS=… python kept/finish_language_models.py`.

First `restore.py`. Two processes share the runs. The one that ends last writes the whole study into the package.
"""

from pathlib import Path

from kd_helpers import artifacts
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.language_models import (
    REAL_ARMS,
    TWEETS,
    TWEETS_TRAINING,
    WRITTEN,
    WRITTEN_TRAINING,
    sizes_study,
    study_of,
)
from kd_helpers.experiments.origin import is_current
from kd_helpers.experiments.study import run_study

made = artifacts.load_json(Path(__file__).parent / "made_stories.json")
assert is_current(made), "the code has changed since its runs were made"
whole = made | {
    "tweets": study_of(TWEETS, TWEETS_TRAINING, arms=REAL_ARMS, name="tweets"),
    "written": study_of(WRITTEN, WRITTEN_TRAINING, arms=REAL_ARMS, name="written"),
    "sizes": run_study(sizes_study()),
}
artifacts.save_json(RESULTS / "language_models.json", whole)
