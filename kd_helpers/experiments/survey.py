"""The study of chapter 15: the survey's map on digits and on tweets, and three experiments at its edge."""

from __future__ import annotations

from typing import Any

from kd_helpers.experiments import survey_tweets
from kd_helpers.experiments.study import run_study
from kd_helpers.experiments.survey_digits import (
    ARMS,
    Training,
    digits_study,
    measured,
    splits,
    teachers_of_thirds,
    trained_teacher,
)
from kd_helpers.experiments.survey_extensions import calibration_study, subliminal_study, weak_to_strong_study
from kd_helpers.models import count_parameters


def study() -> dict[str, Any]:
    """The study of the digits, with what its teachers reach as `teachers`, and four studies within it.

    These are `tweets`, `subliminal`, `weak_to_strong` and `calibration`.
    """
    training = Training()
    thirds = {f"third {number}": net for number, net in enumerate(teachers_of_thirds(training.teacher_steps), start=1)}
    nets = {"teacher": trained_teacher(training.teacher_steps)} | thirds
    teachers = {
        name: measured(net, splits().test, name) | {"parameters": count_parameters(net)} for name, net in nets.items()
    }
    ground = survey_tweets.prepare()
    return run_study(digits_study(ARMS, training)) | {
        "teachers": teachers,
        "tweets": survey_tweets.study(ground),
        "subliminal": run_study(subliminal_study()),
        "weak_to_strong": run_study(weak_to_strong_study(ground)),
        "calibration": run_study(calibration_study()),
    }
